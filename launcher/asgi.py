"""
The service as an ASGI application, for whoever brings a server: `uvicorn launcher.api_server:app`.

It opens the product when the server starts and closes it in good order when that ends. What it works on beside HTTP is
as `RUNCOMFY_SERVE` says (`bootstrap.serves`). Prefer `comfyctl serve`: it drains on the first Ctrl+C, leaves on the
second, and says what it does.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from runcomfy.application.service import ServeOptions
from runcomfy.bootstrap import App, serves
from runcomfy.domain.exceptions import RunComfyError
from runcomfy.domain.secret import is_loopback

if TYPE_CHECKING:
    from fastapi import FastAPI

    from launcher.backend import Backend

log = logging.getLogger("runcomfy.http")

ELSEWHERE: Final = (
    "the server listens where the settings do not say; set RUNCOMFY_HTTP_HOST to the address it listens at"
)


class Product:
    """One service per server process."""

    def __init__(self) -> None:
        self._web: FastAPI | None = None
        self._local = True
        self._announced = False
        self._app: App | None = None
        self._stack = AsyncExitStack()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer as ASGI has it."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif self._web is None:
            raise RuntimeError("the server runs without lifespan events; uvicorn needs `--lifespan on`")
        elif self._local and not _is_local(scope):
            # Guarded as something that only this computer reaches, it is not shown to others by accident.
            await JSONResponse({"detail": ELSEWHERE}, 403)(scope, receive, send)
        else:
            if not self._announced:
                self._announced = True
                await self._announce(scope)
            await self._web(scope, receive, send)

    async def _announce(self, scope: Scope) -> None:
        """Write down where this listens: only requests tell."""
        from launcher.announced import announce
        from runcomfy.adapters.files import remove_quietly

        host, port = scope.get("server") or ("", None)
        if self._app is not None and host and port:
            with suppress(RunComfyError):  # only `comfyctl page` needs it
                folder, now = self._app.settings.files.state_dir, self._app.clock.now()
                file = await asyncio.to_thread(announce, folder, str(host), int(port), now=now)
                self._stack.callback(remove_quietly, file)

    async def _live(self, receive: Receive, send: Send) -> None:
        while True:
            kind = (await receive())["type"]
            try:
                await (self._open() if kind == "lifespan.startup" else self._stack.aclose())
            except RunComfyError as error:
                hint = f"\n  -> {error.hint}" if error.hint else ""
                sys.stderr.write(f"error: {error.message} [{error.code}]{hint}\n")
                await self._stack.aclose()
                await send({"type": f"{kind}.failed", "message": ""})
                return
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return

    async def _open(self) -> None:
        from launcher.pace import quick_answers
        from launcher.part import open_backend, page_of
        from launcher.routes.conjure import at_desk
        from launcher.web_app import create_app
        from runcomfy.adapters.log import configure_logging

        access = logging.getLogger("uvicorn.access")
        if not any(isinstance(each, _WithoutQueries) for each in access.filters):
            access.addFilter(_WithoutQueries())
        app = await self._stack.enter_async_context(_app())
        self._app = app
        configure_logging(app.settings)
        parts, host = serves(app.settings), app.settings.http.host
        options = ServeOptions(
            queue="queue" in parts,
            pool="pool" in parts,
            shut_down=lambda: signal.raise_signal(signal.SIGTERM),
        )
        backend = await self._stack.enter_async_context(open_backend(app, options, host=host))
        self._stack.enter_context(_told_first(backend.closing.set))
        leaving = asyncio.create_task(_let_go(backend), name="listeners-leave")
        self._stack.callback(leaving.cancel)
        self._web, self._local = create_app(backend), is_loopback(host)
        await self._stack.enter_async_context(at_desk(self._web, backend))
        self._stack.enter_context(quick_answers())
        stop = asyncio.Event()
        work = asyncio.create_task(app.serve(options, stop), name="serve")
        work.add_done_callback(_ended)
        self._stack.push_async_callback(_stopped, work, stop)
        # Where the server listens is its own business; the settings say where it should.
        page = page_of(backend, host, app.settings.http.port).page
        sys.stderr.write(f"the page, for you alone (at the server's port, if that is another): {page}\n")


class _WithoutQueries(logging.Filter):
    """Keeps the server's access log from writing down what comes after the path: it may be a code that logs in."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record pass, the address in it cut."""
        if isinstance(record.args, tuple):
            record.args = tuple(
                arg.partition("?")[0] if isinstance(arg, str) and arg.startswith("/") else arg for arg in record.args
            )
        return True


def _app() -> App:
    parts = serves()
    where: dict[str, Any] = {"where": "pool" if "pool" in parts else "server"}
    return App(
        launches="pool" in parts, queue=where, tell=lambda said: log.info("said", extra={"fields": {"words": said}})
    )


async def _let_go(backend: Backend) -> None:
    """Let the listeners go when everybody has to leave: they never end by themselves."""
    await backend.closing.wait()
    await backend.hub.close()


@contextmanager
def _told_first(heard: Callable[[], None]) -> Iterator[None]:
    """Have `heard` called when the server is told to stop, for the block.

    Servers say so (`lifespan.shutdown`) only after the last connection is closed. Who waits for that with a page open
    presses Ctrl+C once more, and then nothing is ended in good order.
    """
    loop, before = asyncio.get_running_loop(), dict[int, Any]()

    def told(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(heard)
        before[number](number, frame)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if callable(handler := signal.getsignal(number)):
                before[number] = handler
                signal.signal(number, told)
    try:
        yield
    finally:
        for heard_on, handler in before.items():
            if signal.getsignal(heard_on) is told:
                signal.signal(heard_on, handler)


async def _stopped(work: asyncio.Task[bool], stop: asyncio.Event) -> None:
    stop.set()
    await asyncio.wait({work})
    if not work.cancelled() and (error := work.exception()) is not None:
        raise error


def _ended(work: asyncio.Task[bool]) -> None:
    """Take the server down with the work, loudly: nobody is to believe that jobs are worked off."""
    if not work.cancelled() and (error := work.exception()) is not None:
        log.error("serve_failed", exc_info=error)
        sys.stderr.write(f"error: {error}\n")
        signal.raise_signal(signal.SIGTERM)  # os.kill would end the process at once on Windows


def _is_local(scope: Scope) -> bool:
    server = scope.get("server")
    return server is None or server[1] is None or is_loopback(str(server[0]))


app: Final = Product()
