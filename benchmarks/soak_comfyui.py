"""
One emulated ComfyUI in a process of its own, for `soak`: it may be killed and stopped like a real one.

`python -m benchmarks.soak_comfyui` says when it has started, is told on its standard input for which folder it is to be
the server and where to keep its log, and then says its port. What it runs is written to the log while it runs, a line
for each beginning and each end of a prompt: that is what the campaign believes, whoever is killed.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.emulators.comfyui.process import RunRecord

LOOK_EVERY: Final = 0.02


def line_of(record: RunRecord) -> dict[str, Any]:
    """Return a record as the log has it."""
    return {
        "prompt": str(record.prompt_id),
        "pid": os.getpid(),
        "began": record.started,
        "ended": record.ended,
        "outcome": record.outcome,
    }


async def _keep_log(server: ComfyUIEmulator, path: Path) -> None:
    known: dict[int, float | None] = {}
    first = 0
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    while True:
        for at in range(first, len(server.run_log)):
            record = server.run_log[at]
            if at not in known or known[at] != record.ended:
                known[at] = record.ended
                os.write(log, json.dumps(line_of(record)).encode() + b"\n")
        while known.get(first) is not None:  # ended, and told
            first += 1
        await asyncio.sleep(LOOK_EVERY)


async def run(folder: Path, log: Path) -> None:
    """Serve until killed, or until whoever started this is gone."""
    server = ComfyUIEmulator(folder=folder)
    await server.start("127.0.0.1")
    parent = os.getppid()
    keeping = asyncio.create_task(_keep_log(server, log))
    sys.stdout.write(json.dumps({"port": server.port}) + "\n")
    sys.stdout.flush()
    while os.getppid() == parent and not keeping.done():  # noqa: ASYNC110 - a parent sets no event when it dies
        await asyncio.sleep(0.5)
    keeping.cancel()
    with suppress(asyncio.CancelledError):
        await keeping
    await server.stop()


def main() -> None:
    """Wait to be needed, then serve."""
    sys.stdout.write("started\n")
    sys.stdout.flush()
    if wanted := sys.stdin.readline():
        said = json.loads(wanted)
        asyncio.run(run(Path(said["folder"]), Path(said["log"])))


if __name__ == "__main__":
    main()
