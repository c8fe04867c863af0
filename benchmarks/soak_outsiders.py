"""The emulated clouds' process (`soak_outside`), as the campaign starts it and talks to it."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from benchmarks.soak_processes import environment


class Outsiders:
    """The process of the clouds, as this one talks to it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._turn = asyncio.Lock()

    async def told(self) -> Any:
        """Return its next line."""
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise RuntimeError("the emulated clouds' process has died")
        said = json.loads(line)
        if isinstance(said, dict) and "error" in said:
            raise RuntimeError(f"the emulated clouds' process: {said['error']}")
        return said

    async def do(self, kind: str, **more: Any) -> Any:
        """Have something done there, and return what it says."""
        assert self._process.stdin is not None
        async with self._turn:
            self._process.stdin.write(json.dumps({"kind": kind, **more}).encode() + b"\n")
            return await self.told()


@asynccontextmanager
async def outsiders(folder: Path) -> AsyncIterator[tuple[Outsiders, dict[str, Any]]]:
    """Run the emulated clouds in another process for the block."""
    log = (folder / "logs" / "outside.log").open("ab")
    with log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "benchmarks.soak_outside", str(folder / "outside"),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=log, env=environment(),
            limit=1 << 26,
        )  # fmt: skip
    try:
        outside = Outsiders(process)
        yield outside, await outside.told()
    finally:
        if process.stdin is not None:
            process.stdin.close()
        try:
            async with asyncio.timeout(30):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
