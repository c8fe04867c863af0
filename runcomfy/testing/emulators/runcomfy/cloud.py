"""
What the emulated clouds have in common: where they listen, their clock, the calls they got, and how calls go wrong.

What a cloud does when it is asked is for the cloud itself.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from aiohttp import web

from runcomfy.testing.emulators.runcomfy.faults import CallFault, CallFaults, Outcome, send
from runcomfy.testing.emulators.runcomfy.machines import in_seconds


@dataclass(frozen=True, slots=True)
class CallRecord:
    """One request as it arrived."""

    at: datetime
    method: str
    path: str
    """Below the user's prefix where there is one, with its query."""
    body: Any
    token: int | None
    """Which token it carried: 1, 2, or None for none or a wrong one."""
    status: int = 0
    """What was answered, or would have been if the answer had not been lost."""
    retry_after: str | None = None
    """The header of the answer."""
    reply: str | None = None
    """How the answer got lost, if it did (`CallFault.reply`)."""
    worked: bool = True
    """False: a fault kept the call from doing what it is for."""
    delay: float = 0.0
    """Seconds from the work to the answer."""

    @property
    def refused(self) -> bool:
        """Whether the caller was told plainly that nothing was done."""
        return self.reply is None and 400 <= self.status < 500


class Listener:
    """An HTTP server at one address, whose requests `answer` answers."""

    def __init__(
        self,
        answer: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        *,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        """Nothing listens before `start`. Port 0 is any that is free, and the same one when it starts again."""
        self._answer, self._host, self._port = answer, host, port
        self._runner: web.ServerRunner | None = None
        self.url = ""

    async def start(self) -> str:
        """Listen, and return the base address. Harmless when repeated. Raises OSError if the port is taken."""
        if self._runner is not None:
            return self.url
        runner = web.ServerRunner(web.Server(self._answer, access_log=None), shutdown_timeout=0.1)
        await runner.setup()
        try:
            await web.TCPSite(runner, self._host, self._port).start()
        except OSError:
            await runner.cleanup()
            raise
        self._runner = runner
        self._port = runner.addresses[0][1]
        host = f"[{self._host}]" if ":" in self._host else self._host
        self.url = f"http://{host}:{self._port}"
        return self.url

    async def stop(self) -> None:
        """Listen no longer. Harmless when repeated."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None


class EmulatedCloud(ABC):
    """The outside of an emulated cloud. `async with` starts and stops it."""

    calls: list[CallRecord]
    """Every request to the API."""

    url: str
    """The API's base address; empty before `start`."""

    def __init__(self, *, folder: Path | None, now: Callable[[], datetime] | None, host: str, port: int) -> None:
        """Nothing listens before `start`.

        `folder` is for what machines keep; None: a temporary one. `now` is the cloud's clock; None: a stamp taken when
        it is asked first, plus the loop's time since.
        """
        self.calls = []
        self.on_call: list[Callable[[CallRecord], None]] = []
        """Told of each request to the API when it has been worked on, before it is answered."""
        self.url = ""
        self._api = Listener(self._serve, host=host, port=port)
        self._faults = CallFaults()
        self._folder = folder
        self._own_folder: tempfile.TemporaryDirectory[str] | None = None
        self._clock = now
        self._origin: tuple[datetime, float] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing = asyncio.Event()

    async def start(self) -> str:
        """Listen, and return the base address. Harmless when repeated. Raises OSError if the port is taken."""
        self.url = await self._api.start()
        return self.url

    async def stop(self) -> None:
        """Answer nobody any more. Harmless when repeated."""
        self._closing.set()
        await self._api.stop()
        if self._own_folder is not None:
            self._own_folder.cleanup()
            self._own_folder = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def now(self) -> datetime:
        """The cloud's time."""
        if self._clock is not None:
            return self._clock()
        if self._loop is None:
            self._loop = asyncio.get_running_loop()  # kept: the nodes of a ComfyUI ask from other threads
        loop_time = self._loop.time()
        if self._origin is None:
            self._origin = datetime.now(UTC), loop_time
        start, zero = self._origin
        return start + timedelta(seconds=loop_time - zero)

    def next_call(self, call: str = "*", **fault: Any) -> CallFault:
        """Let the next calls that fit go wrong; the arguments are those of `CallFault`. Returned is what to forget."""
        return self._faults.add(CallFault(call, **fault))

    def forget_call(self, fault: CallFault) -> bool:
        """Let a fault of calls be over; return whether it was switched on until now."""
        return self._faults.remove(fault)

    @abstractmethod
    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer a request to the API."""

    def _room(self) -> Path:
        """Return the folder for what machines keep; a temporary one goes away with the cloud."""
        if self._folder is None:
            self._own_folder = tempfile.TemporaryDirectory(prefix="runcomfy-emulator-")
            self._folder = Path(self._own_folder.name)
        return self._folder

    async def _heard(self, request: web.BaseRequest) -> tuple[bytes, Any]:
        """Return a request's body as it came, and its JSON; None if it has none."""
        raw = await request.read()
        try:
            return raw, json.loads(raw) if raw else None
        except ValueError:
            return raw, None

    async def _tell(
        self, request: web.BaseRequest, call: str, body: Any, token: int | None, do: Callable[[bool], Outcome]
    ) -> web.StreamResponse:
        """Note a call and answer it, as the fault wants that it meets. `do` does it, or only says so if told False."""
        fault = self._faults.take(call, loop_time=asyncio.get_running_loop().time())
        if fault is None:
            outcome = do(True)
            self._note(call, body, token, outcome)
            return await send(request, outcome, reply=None, closing=self._closing)
        outcome, delay = fault.answer(do(fault.does_work)), in_seconds(fault.delay)
        self._note(call, body, token, outcome, reply=fault.reply, worked=fault.does_work, delay=delay)
        if delay:
            await asyncio.sleep(delay)
        return await send(request, outcome, reply=fault.reply, closing=self._closing)

    def _note(
        self,
        call: str,
        body: Any,
        token: int | None,
        outcome: Outcome,
        *,
        reply: str | None = None,
        worked: bool = True,
        delay: float = 0.0,
    ) -> None:
        method, _, path = call.partition(" ")
        retry_after = outcome.headers.get("Retry-After")
        record = CallRecord(self.now(), method, path, body, token, outcome.status, retry_after, reply, worked, delay)
        self.calls.append(record)
        for tell in self.on_call:
            tell(record)
