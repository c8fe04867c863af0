"""
The dev server's published state with what CONJURE does to it: look whether the server answers, add costs, clean up.

The file is `runcomfy.adapters.dev_server_state`'s business. Where CONJURE's own HTTP library (httpx) is installed it
asks the server, so that a proxy or a stand-in that was set up there counts here, too; else aiohttp does.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final
from urllib.parse import urlsplit

from runcomfy.adapters.dev_server_state import ACTIVE, DevServerState
from runcomfy.adapters.dev_server_state import DevServerStateManager as StateFile

HEALTH_TIMEOUT_SECONDS: Final = 10.0
"""For each question (CONJURE's own limit)."""

HEALTH_PATHS: Final = ("/queue", "/")
"""What is asked for, in order; one answer with 200 is enough."""

Ask = Callable[[str], Awaitable[int]]
"""Takes an address, returns the status of the answer."""

log = logging.getLogger("runcomfy.conjure")


class DevServerStateManager(StateFile):
    """Reads and writes the file, as CONJURE's class of that name does. What is no coroutine blocks."""

    def load_server_state(self) -> DevServerState | None:
        """Return what the file says of a server; None, too, if it does not name one: no id, no address or no status.

        Such a file is left where it is. Raises LocalError.
        """
        state = super().load_server_state()
        if state is not None and state.server_id and state.base_url and state.status:
            return state
        return None

    async def check_server_health(self, state: DevServerState) -> bool:
        """Ask the server whether it answers, note it in `state`, and save that.

        `health_status` becomes `healthy` (200), `unhealthy` (another answer) or `unreachable` (none). Raises LocalError
        if the file cannot be written.
        """
        state.health_status = await _health(state.base_url)
        state.last_health_check = (self._clock.now() if self._clock else datetime.now(UTC)).isoformat()
        await asyncio.to_thread(self.save_server_state, state)
        return state.health_status == "healthy"

    def update_cost(self, additional_cost: float) -> None:
        """Add to both costs in the file; nothing happens without a server.

        The true costs are in the ledger; what is added here is overwritten when the snapshot is next published.
        """
        state = self.load_server_state()
        if state is None:
            return
        state.total_cost += additional_cost
        state.session_cost += additional_cost
        self.save_server_state(state)

    async def validate_and_cleanup_state(self) -> bool:
        """Return whether the file names a server that answers; if it names one that does not, the file goes.

        The machine itself is not touched: our books still have it, `comfyctl dev status` finds it, the guard ends it.
        """
        state = await asyncio.to_thread(self.load_server_state)
        if state is None or state.status not in ACTIVE:
            return False
        if await self.check_server_health(state):
            return True
        log.warning("dev_server_does_not_answer", extra={"fields": {"health": state.health_status}})
        await asyncio.to_thread(self.clear_server_state)
        return False


dev_server_state: Final = DevServerStateManager()
"""The manager of the file in the state folder."""


def get_active_server() -> DevServerState | None:
    """Return what the file says of a server that can be used, or None."""
    state = dev_server_state.load_server_state()
    return state if state is not None and state.status in ACTIVE else None


def has_active_dev_server() -> bool:
    """Return whether the file says that a server can be used."""
    return dev_server_state.has_active_server()


async def validate_dev_server() -> bool:
    """Return whether the file names a server that answers; one that does not is taken out of it."""
    return await dev_server_state.validate_and_cleanup_state()


async def _health(base_url: str) -> str:
    try:  # it came out of a file and may be anything
        parts = urlsplit(base_url if len(base_url) < 2_000 else "")
        usable = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        usable = False
    if not usable:
        return "unreachable"
    answered = False
    async with _asking() as ask:
        for path in HEALTH_PATHS:
            try:
                async with asyncio.timeout(HEALTH_TIMEOUT_SECONDS):
                    status = await ask(base_url.rstrip("/") + path)
            except Exception as error:  # noqa: BLE001 - two libraries, each with its own tree: no answer is no answer
                log.info("health_check_unanswered", extra={"fields": {"error": type(error).__name__}})
                continue
            answered = True
            if status == 200:
                return "healthy"
    return "unhealthy" if answered else "unreachable"


def _asking() -> AbstractAsyncContextManager[Ask]:
    there = "httpx" in sys.modules or find_spec("httpx") is not None
    return _with_httpx() if there else _with_aiohttp()


@asynccontextmanager
async def _with_httpx() -> Any:
    httpx: Any = import_module("httpx")
    async with httpx.AsyncClient(timeout=HEALTH_TIMEOUT_SECONDS) as client:

        async def ask(url: str) -> int:
            return int((await client.get(url)).status_code)

        yield ask


@asynccontextmanager
async def _with_aiohttp() -> Any:
    import aiohttp

    async with aiohttp.ClientSession() as session:

        async def ask(url: str) -> int:
            async with session.get(url, allow_redirects=False) as answer:
                return answer.status

        yield ask
