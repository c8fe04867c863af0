"""
`kill -9` at every durable write and every remote call of every command, on real databases; then the invariants.

`python -m benchmarks killpoints [--record] [--database sqlite|postgres|both] [--only PATTERN]`: each scene
(`runcomfy.testing.killpoints`) is told once to learn which points its command passes, and then once for each of them:
killed there, started again, and judged by the emulated cloud's books and the ComfyUI servers' logs.

    points         places at which commands were to die: (scene, point, visit)
    not reached    of those, how many the command did not pass that time
    violations     stories after which something was wrong
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from runcomfy.testing.forked import Commands
from runcomfy.testing.killpoints import SCENES, KillPoint, Told, points_of, staged, tell
from runcomfy.testing.postgres import PostgresForTests

AT_ONCE: Final = 6
"""Stories that are told at the same time: their processes mostly wait."""
DATABASES: Final = ("sqlite", "postgres")


class Sweep:
    """All stories over one kind of database."""

    def __init__(self, database: str, folder: Path, commands: Commands, server: PostgresForTests | None) -> None:
        self.database, self._folder, self._commands, self._server = database, folder, commands, server
        self._places = asyncio.Semaphore(AT_ONCE)
        self._number = 0
        self.told: list[Told] = []

    async def story(self, scene: str, at: KillPoint | None) -> Told:
        """Tell one story in a world of its own."""
        async with self._places:
            self._number += 1
            folder = self._folder / f"{self.database}-{self._number}"
            dsn = await asyncio.to_thread(self._server.database) if self._server is not None else ""
            try:
                async with staged(self._commands, folder, dsn) as stage:
                    told = await tell(SCENES[scene], stage, at)
            finally:
                if self._server is not None:
                    await asyncio.to_thread(self._server.drop, dsn)
                await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        if at is not None:
            self.told.append(told)
        if told.complaints:
            print(json.dumps({"database": self.database, "at": str(at or scene), "wrong": told.complaints}))
            print(told.said, file=sys.stderr)
        return told

    async def run(self, only: str) -> None:
        """Learn the points of every scene, then die at each."""
        learned = await asyncio.gather(*(self.story(scene, None) for scene in SCENES))
        points = [
            point
            for scene, told in zip(SCENES, learned, strict=True)
            for point in points_of(scene, told.points)
            if fnmatch(str(point), only)
        ]
        await asyncio.gather(*(self.story(point.scene, point) for point in points))


async def sweep(databases: Sequence[str], only: str) -> list[Sweep]:
    """Tell every story over each of these databases, one kind after the other."""
    sweeps = []
    with TemporaryDirectory(prefix="comfyctl-killpoints-") as name:
        for database in databases:
            with ExitStack() as stack:
                server = stack.enter_context(PostgresForTests(fsync=True)) if database == "postgres" else None
                async with Commands() as commands:
                    sweeps.append(Sweep(database, Path(name), commands, server))
                    await sweeps[-1].run(only)
    return sweeps


def main(arguments: Sequence[str] = ()) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks killpoints")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--database", choices=(*DATABASES, "both"), default="both")
    parser.add_argument("--only", default="*", help="scene and point: 'run: provider.*'")
    asked = parser.parse_args(arguments)
    began = time.monotonic()
    sweeps = asyncio.run(sweep(DATABASES if asked.database == "both" else (asked.database,), asked.only))
    for each in sweeps:
        print(
            json.dumps(
                {
                    "database": each.database,
                    "points": len(each.told),
                    "not_reached": [str(told.at) for told in each.told if not told.reached],
                    "violations": sum(bool(told.complaints) for told in each.told),
                    "recovery_max_s": round(max((told.recovery_s for told in each.told), default=0.0), 1),
                    "took_s": round(time.monotonic() - began),
                }
            )
        )
    return 1 if any(told.complaints for each in sweeps for told in each.told) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
