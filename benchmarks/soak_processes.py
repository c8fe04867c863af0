"""
The processes of a soak: started as people start them, started again at once when they end, as systemd would.

Here they are killed and stopped, too, and what they take of memory is looked at.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil

ROOT: Final = str(Path(__file__).resolve().parents[1])
TAIL: Final = 30
"""Lines of a log that are told of a process that ended by itself."""
OURS: Final = ("COMFYUI_", "RUNCOMFY_", "CONJURE_", "E3_", "COV_", "FAULT")


def environment(**named: str) -> dict[str, str]:
    """Return the variables of a process of ours: nothing of whoever runs the campaign reaches it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    return kept | {
        "PYTHONPATH": ROOT,
        "PYTHONDONTWRITEBYTECODE": "1",
        "NO_COLOR": "1",
        "RUNCOMFY_CREDENTIALS_FILE": os.devnull,
        **named,
    }


@dataclass(eq=False)
class Kept:
    """A process that is started again whenever it ends."""

    name: str
    kind: str
    command: Sequence[str]
    env: Mapping[str, str]
    folder: Path
    ready_word: str = "\n"
    """What it says when it works."""
    mortal: bool = True
    """Whether it may be killed; a process whose memory is looked at may only be stopped."""
    process: asyncio.subprocess.Process | None = None
    starts: int = 0
    kills: int = 0
    stops: int = 0
    asleep_until: float = 0.0
    ended_alone: list[str] = field(default_factory=list)
    """What it said when it ended though nobody killed it."""
    sizes: list[tuple[float, int]] = field(default_factory=list)
    """Seconds since the beginning, and resident bytes."""
    _said_before: int = 0
    _began_at: float = 0.0
    _ready_at: float | None = None
    _killed: bool = False
    _keeper: asyncio.Task[None] | None = None

    @property
    def log(self) -> Path:
        """What it says."""
        return self.folder / "logs" / f"{self.name}.log"

    async def start(self) -> None:
        """Start it, and keep it running until `end`."""
        await self._spawn()
        self._keeper = asyncio.create_task(self._keep(), name=f"keeper of {self.name}")

    @property
    def at_work(self) -> bool:
        """Whether it has worked for as long as its start took: on a slow computer both take longer."""
        return self._ready_at is not None and time.monotonic() - self._ready_at >= self._ready_at - self._began_at

    def look(self) -> None:
        """Notice that it has said that it works."""
        if self._ready_at is None and self.pid is not None and self.log.is_file():
            with self.log.open("rb") as log:
                log.seek(self._said_before)
                if self.ready_word.encode() in log.read():
                    self._ready_at = time.monotonic()

    async def _spawn(self) -> None:
        self._said_before = self.log.stat().st_size if self.log.is_file() else 0
        self._began_at, self._ready_at = time.monotonic(), None
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "runcomfy.cli.main", *self.command,
                stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder, env=dict(self.env),
            )  # fmt: skip
        self.starts += 1
        self._killed = False

    async def _keep(self) -> None:
        while self.process is not None:
            code = await self.process.wait()
            if not self._killed:
                tail = await asyncio.to_thread(self._tail)
                self.ended_alone.append(f"{self.name} ended by itself with {code}:\n{tail}")
                await asyncio.sleep(0.5)
            await self._spawn()

    def _tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-TAIL:])

    @property
    def pid(self) -> int | None:
        """Its number, while it runs."""
        return self.process.pid if self.process is not None and self.process.returncode is None else None

    def kill(self) -> bool:
        """SIGKILL; return whether it ran."""
        if self.pid is None or not self.mortal:
            return False
        self._killed = True
        self.kills += 1
        self._send(signal.SIGKILL)
        return True

    def sleep(self, seconds: float) -> bool:
        """SIGSTOP, and SIGCONT so much later; return whether it ran and was awake."""
        now = time.monotonic()
        if self.pid is None or now < self.asleep_until:
            return False
        self.asleep_until = now + seconds
        self.stops += 1
        self._send(signal.SIGSTOP)
        asyncio.get_running_loop().call_later(seconds, self.wake, self.pid)
        return True

    def wake(self, pid: int | None = None) -> None:
        """SIGCONT."""
        if self.pid is not None and pid in (None, self.pid):
            self.asleep_until = 0.0
            self._send(signal.SIGCONT)

    def _send(self, number: signal.Signals) -> None:
        if self.process is not None:
            with suppress(ProcessLookupError):
                self.process.send_signal(number)

    def measure(self, at: float) -> None:
        """Note what it takes of memory."""
        if self.pid is not None:
            with suppress(psutil.Error):
                self.sizes.append((at, psutil.Process(self.pid).memory_info().rss))

    async def end(self, *, within: float = 90.0) -> int | None:
        """Stop it in good order; return its exit code, None if it had to be killed."""
        if self._keeper is not None:
            self._keeper.cancel()
            with suppress(asyncio.CancelledError):
                await self._keeper
        if self.process is None:
            return 0
        self.wake()
        self._send(signal.SIGTERM)
        try:
            async with asyncio.timeout(within):
                return await self.process.wait()
        except TimeoutError:
            self._send(signal.SIGKILL)
            await self.process.wait()
            return None

    async def cut(self) -> None:
        """Kill it for good: the campaign itself ends early."""
        if self._keeper is not None:
            self._keeper.cancel()
        self.wake()
        self._send(signal.SIGKILL)
        if self.process is not None:
            await self.process.wait()


def guards(state_folders: Sequence[Path]) -> list[psutil.Process]:
    """Return the guard processes of these state folders: children of nobody, known by what they were told."""
    wanted = {str(folder) for folder in state_folders}
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.cmdline()[-1:] == ["guard"] and process.environ().get("RUNCOMFY_STATE_DIR") in wanted:
                found.append(process)
    return found


def course(sizes: Sequence[tuple[float, int]], *, every: float) -> list[int]:
    """Return the median of resident memory in each such time (seconds), in MB; times without a look are left out."""
    parts: dict[int, list[int]] = {}
    for at, size in sizes:
        parts.setdefault(int(at // every), []).append(size)
    return [sorted(part)[len(part) // 2] // 1_000_000 for _, part in sorted(parts.items())]


def growth(sizes: Sequence[tuple[float, int]], *, warm: float, until: float) -> float | None:
    """Return by which share resident memory grew from the end of the warm-up until then; None: too little is known.

    Medians of a tenth of the time each, so that one look in the middle of something big says nothing.
    """
    width = max(5.0, until / 10)
    first = sorted(size for at, size in sizes if warm <= at < warm + width)
    last = sorted(size for at, size in sizes if until - width <= at <= until)
    if not first or not last:
        return None
    before, after = first[len(first) // 2], last[len(last) // 2]
    return (after - before) / before
