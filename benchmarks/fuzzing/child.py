"""
Targets under libFuzzer, each in a process of its own: `python -m benchmarks.fuzzing.child FOLDER SEED NAME=RUNS…`.

Our code is loaded once, with its branches and comparisons made visible to libFuzzer; every target is a fork of that.
What is not as it should be is written into the target's folder, each kind once, and the process goes on; a hang that
Python cannot interrupt, and memory beyond the limit, end it.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Final

RSS_MB: Final = 512
STUCK_SECONDS: Final = 120
"""Wall time after which libFuzzer gives the process up: what code in C alone can take, on a busy computer."""
SIZE_MB: Final = 300
"""Of one allocation."""
MOST_KINDS: Final = 50
SAID: Final = "libfuzzer.txt"
TOOK: Final = "took.txt"


def main() -> None:
    folder, seed = Path(sys.argv[1]), sys.argv[2]
    import atheris

    with atheris.instrument_imports(include=["runcomfy", "launcher", "workflows"]):
        import benchmarks.fuzzing.all_targets  # noqa: F401
    for wanted in sys.argv[3:]:
        name, _, runs = wanted.partition("=")
        began = time.monotonic()
        (folder / name).mkdir(parents=True, exist_ok=True)
        child = os.fork()
        if not child:
            _fuzz(name, int(runs), folder / name, seed)
        _, status = os.waitpid(child, 0)
        took = {"took_s": round(time.monotonic() - began, 1), "status": os.waitstatus_to_exitcode(status)}
        (folder / name / TOOK).write_text(json.dumps(took | {"runs": int(runs)}), encoding="utf-8")


def _fuzz(name: str, runs: int, folder: Path, seed: str) -> None:
    """Run one target in this process, which ends with it."""
    import atheris

    from benchmarks.fuzzing import scratch
    from benchmarks.fuzzing.all_targets import TARGETS, beginnings
    from benchmarks.fuzzing.mutate import mutated
    from benchmarks.fuzzing.target import Hang, limited

    said = os.open(folder / SAID, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 2)
    scratch.forget()
    target = TARGETS[name]
    corpus, found = folder / "corpus", folder / "findings"
    corpus.mkdir(parents=True, exist_ok=True)
    found.mkdir(exist_ok=True)
    for title, data in beginnings(target):
        (corpus / f"{title}-{hashlib.sha256(data).hexdigest()[:8]}").write_bytes(data)
    words = folder / "words"
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in target.words), encoding="ascii")
    seen: set[str] = set()

    def one(data: bytes) -> None:
        try:
            with limited():
                target.run(data)
        except KeyboardInterrupt:
            raise
        except (Exception, Hang) as error:  # noqa: BLE001 - that is what is looked for
            mark = _mark(error)
            if mark not in seen and len(seen) < MOST_KINDS:
                seen.add(mark)
                told = {"target": name, "mark": mark, "trace": traceback.format_exc()[-4_000:]}
                digest = hashlib.sha256(data).hexdigest()[:12]
                (found / digest).write_bytes(data)
                (found / f"{digest}.json").write_text(json.dumps(told, indent=1), encoding="utf-8")

    def custom(data: bytes, most: int, number: int) -> bytes:
        chance = random.Random(number)
        if chance.random() < 0.4:
            changed: bytes = atheris.Mutate(data, most)
            return changed
        return mutated(bytes(data), chance, is_json=target.is_json, words=target.words, max_bytes=most)

    arguments = [
        sys.argv[0],
        f"-runs={runs}",
        f"-seed={seed}",
        f"-max_len={target.max_bytes}",
        f"-rss_limit_mb={RSS_MB}",
        f"-malloc_limit_mb={SIZE_MB}",
        f"-timeout={STUCK_SECONDS}",
        f"-artifact_prefix={found}/stopped-",
        "-print_final_stats=1",
        "-len_control=0",
        "-reload=0",
        "-detect_leaks=0",
        str(corpus),
    ]
    if target.words:
        arguments.insert(1, f"-dict={words}")
    setup: Any = atheris.Setup
    setup(arguments, one, custom_mutator=custom)
    atheris.Fuzz()
    os._exit(0)


def _mark(error: BaseException) -> str:
    """Return what tells one kind of finding from another: the error and where it came from."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/site-packages/" not in frame.filename]
    inside = [f for f in frames if "/runcomfy/" in f.filename or "/launcher/" in f.filename]
    where = (inside or frames)[-1]
    said = str(error)[:24] if type(error).__name__ in ("Broken", "Hang") else ""
    return f"{type(error).__name__} {said} {Path(where.filename).name}:{where.name}"


def _escaped(word: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word.encode("latin-1", "replace"))


if __name__ == "__main__":
    main()
