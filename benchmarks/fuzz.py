"""
`python -m benchmarks fuzz [--runs N] [--target NAME]... [--keep FOLDER] [--record]`: hostile machines, clouds, files.

A million inputs, shared out among the targets of `benchmarks.fuzzing`, each grown from recordings and the kept corpus
by libFuzzer (atheris), which sees what of our code an input reaches. One process per target, one after the other. What
is found is written down as a file that the tests can replay; the exit code is 1 then. With `--keep` the folder stays,
and the same command goes on with the targets that did not end clean.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from benchmarks.fuzzing.all_targets import CORPUS, TARGETS
from benchmarks.fuzzing.child import RSS_MB, SAID, TOOK
from benchmarks.results import Figure, Result, keep, told_to_keep

RUNS: Final = 1_000_000
SEED: Final = 20261122
_STATS: Final = re.compile(r"^stat::(\w+):\s+(\d+)", re.MULTILINE)
_DONE: Final = re.compile(r"cov: (\d+) ft: (\d+) corp: (\d+)/")


@dataclass(slots=True)
class Ran:
    """What one target's process said."""

    name: str
    runs: int
    took_s: float
    rss_mb: int
    reached: int
    grown: int
    findings: list[Path] = field(default_factory=list)
    ended: str = ""
    """Why it ended too early, if it did."""

    @property
    def clean(self) -> bool:
        """Whether it ran to its end and found nothing."""
        return not self.findings and not self.ended


def shares(names: Sequence[str], runs: int) -> dict[str, int]:
    """Return how many runs each target gets; together they are `runs`."""
    whole = sum(TARGETS[name].share for name in names)
    found = {name: max(1, runs * TARGETS[name].share // whole) for name in names}
    found[names[0]] += max(0, runs - sum(found.values()))
    return found


def read(name: str, runs: int, folder: Path) -> Ran | None:
    """Return what a target's process left in its folder; None if it did not run that often."""
    try:
        took = json.loads((folder / TOOK).read_text(encoding="utf-8"))
        said = (folder / SAID).read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):
        return None
    if took["runs"] != runs:
        return None
    stats = {key: int(value) for key, value in _STATS.findall(said)}
    last = list(_DONE.finditer(said))
    ran = Ran(
        name=name,
        runs=stats.get("number_of_executed_units", 0),
        took_s=took["took_s"],
        rss_mb=stats.get("peak_rss_mb", 0),
        reached=int(last[-1][1]) if last else 0,
        grown=int(last[-1][3]) if last else 0,
        findings=[path for path in sorted((folder / "findings").iterdir()) if path.suffix != ".json"],
    )
    if took["status"] != 0 or ran.runs < runs:
        ran.ended = said[-2_000:]
    return ran


def main(arguments: Sequence[str]) -> int:
    """Run the campaign. Returns the exit code."""
    if find_spec("atheris") is None:
        sys.exit("atheris is not installed: pip install --group fuzz (Linux with CPython 3.11 to 3.13)")
    names = [arguments[n + 1] for n, word in enumerate(arguments) if word == "--target"] or list(TARGETS)
    runs = next((int(arguments[n + 1]) for n, word in enumerate(arguments) if word == "--runs"), RUNS)
    kept = next((Path(arguments[n + 1]) for n, word in enumerate(arguments) if word == "--keep"), None)
    if unknown := [name for name in names if name not in TARGETS]:
        sys.exit(f"no target {unknown[0]!r}; there are: {', '.join(TARGETS)}")
    folder = kept or Path(tempfile.mkdtemp(prefix="fuzz-"))
    wanted = shares(names, runs)
    clean = {name for name, share in wanted.items() if (ran := read(name, share, folder / name)) and ran.clean}
    left = {name: share for name, share in wanted.items() if name not in clean}
    for name in left:
        shutil.rmtree(folder / name, ignore_errors=True)
    running = _start(folder, left)
    told: list[Ran] = []
    print(f"{'target':<14}{'runs':>9}{'per s':>8}{'RSS MB':>8}{'reached':>9}{'corpus':>8}  findings", flush=True)
    for name, share in wanted.items():
        ran = _wait(name, share, folder / name, running)
        told.append(ran)
        rate = ran.runs / ran.took_s if ran.took_s else 0
        line = f"{name:<14}{ran.runs:>9}{rate:>8.0f}{ran.rss_mb:>8}{ran.reached:>9}{ran.grown:>8}"
        print(f"{line}  {len(ran.findings)}{' ENDED EARLY' if ran.ended else ''}", flush=True)
        _explain(ran)
    took = sum(ran.took_s for ran in told)
    result = _result(told, runs, took, partly=len(names) < len(TARGETS))
    for figure in result.figures:
        print(f"{figure.what}: {figure.value}{f' ({figure.bar})' if figure.bar else ''}")
    if told_to_keep(*arguments):
        keep(result)
    if kept is None and all(ran.clean for ran in told):
        shutil.rmtree(folder, ignore_errors=True)
    sound = all(ran.clean and ran.rss_mb < RSS_MB for ran in told)
    return 0 if sound else 1


def _start(folder: Path, wanted: Mapping[str, int]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "benchmarks.fuzzing.child", str(folder), str(SEED)]
    return subprocess.Popen([*command, *(f"{name}={runs}" for name, runs in wanted.items())], stderr=subprocess.DEVNULL)


def _wait(name: str, runs: int, folder: Path, running: subprocess.Popen[bytes]) -> Ran:
    """Return what a target's process left once it has ended. Ends this program if the processes cannot be run."""
    while (ran := read(name, runs, folder)) is None:
        if running.poll() is not None and read(name, runs, folder) is None:
            sys.exit(f"the process of {name} could not be run (exit code {running.returncode})")
        time.sleep(1)
    return ran


def _explain(ran: Ran) -> None:
    for path in ran.findings:
        about = path.with_suffix(".json")
        mark = json.loads(about.read_text(encoding="utf-8"))["mark"] if about.is_file() else "the process was ended"
        print(f"    {path}: {mark}; once repaired, keep it in {CORPUS.relative_to(Path.cwd())}/{ran.name}/")
    if ran.ended:
        print("    " + ran.ended.replace("\n", "\n    "))


def _result(told: Sequence[Ran], wanted: int, took: float, *, partly: bool) -> Result:
    runs = sum(ran.runs for ran in told)
    most = max(ran.rss_mb for ran in told)
    found = sum(len(ran.findings) for ran in told)
    early = [ran.name for ran in told if ran.ended]
    return Result(
        name="fuzz",
        command=f"make fuzz RUNS={wanted}",
        figures=(
            Figure("inputs run", f"{runs:,}", f"at least {RUNS:,}", runs >= RUNS),
            Figure("readers of outside bytes", str(len(told))),
            Figure("crashes, hangs, broken promises", str(found), "0", found == 0 and not early),
            Figure("most memory of a process", f"{most} MB", f"under {RSS_MB} MB", 0 < most < RSS_MB),
            Figure("inputs a second", f"{runs / took:,.0f}"),
            Figure("places of our code reached, all readers together", f"{sum(ran.reached for ran in told):,}"),
        ),
        took_s=round(took, 1),
        notes=(
            "libFuzzer (atheris) guides the growth of inputs by what of our code they reach.",
            "Inputs begin as recordings of real ComfyUI servers, answers of clouds, shipped workflows, small files.",
            "One process for each reader, one after the other; the memory is the largest of them.",
            *(["Only some of the readers were run."] if partly else []),
            *([f"Ended early: {', '.join(early)}."] if early else []),
        ),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
