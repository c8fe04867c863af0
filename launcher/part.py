"""The HTTP part of `comfyctl serve`: the API and the page, beside the queue and the pool of the same process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from runcomfy.application.service import ServeOptions
from runcomfy.bootstrap import App

if TYPE_CHECKING:
    from launcher.backend import Backend
    from launcher.options import Listening


@asynccontextmanager
async def http(app: App, options: ServeOptions) -> AsyncIterator[None]:
    """Answer HTTP for the block, if the options say so; entered before the first job and left after the last.

    Raises AddressInUse, SettingInvalid, LocalError before anything is answered.
    """
    from launcher.options import HttpOptions

    asked = HttpOptions.of(options)
    if not asked.enabled:
        yield
        return
    from launcher.announced import announce, sweep
    from launcher.listening import answering, bound
    from launcher.pace import quick_answers
    from launcher.routes.conjure import at_desk
    from launcher.web_app import create_app
    from runcomfy.adapters.files import remove_quietly

    settings = app.settings.http
    host = asked.host or settings.host
    await asyncio.to_thread(sweep, app.settings.files.state_dir)
    sockets = await bound(host, settings.port if asked.port is None else asked.port)
    try:
        async with AsyncExitStack() as stack:
            backend = await stack.enter_async_context(open_backend(app, options, host=host))
            web = create_app(backend)
            await stack.enter_async_context(at_desk(web, backend))
            await stack.enter_async_context(answering(web, sockets, patience=settings.stalled))
            stack.enter_context(quick_answers())
            where = page_of(backend, host, sockets[0].getsockname()[1])
            file = await asyncio.to_thread(
                announce, app.settings.files.state_dir, where.host, where.port, now=app.clock.now()
            )
            asked.listening(where)
            try:
                yield
            finally:
                await asyncio.to_thread(remove_quietly, file)
                # Listeners never end by themselves; a client that comes back later finds what it missed in the log.
                backend.closing.set()
                await backend.hub.close()
    finally:
        for each in sockets:
            each.close()


@asynccontextmanager
async def open_backend(app: App, options: ServeOptions, *, host: str) -> AsyncIterator[Backend]:
    """Give what the routes work with, for a server that listens at `host`. Raises LocalError, CredentialsMalformed."""
    from launcher.backend import Backend
    from launcher.guarding.guard import Guard
    from launcher.hub import Hub
    from launcher.teller import teller_of
    from launcher.tidying import keep_tidy
    from launcher.webhooks import Webhooks
    from runcomfy.application.service import first_of

    queue = await app.job_queue(looks_often=True)
    guard = await asyncio.to_thread(
        Guard.open, Path(app.settings.files.state_dir), app.settings.http, bound_host=host, clock=app.clock
    )
    if said := guard.announcement():
        app.tell(said)
    hub, webhooks = Hub(queue, app.live, teller_of(app)), await Webhooks.open(app)
    app.time_left()  # loaded now: else the first answer of all loads it, and everybody waits for 15 ms
    parts = options.parts | {"http"}
    backend = Backend(app, queue, hub, guard, options.shut_down, parts=parts, queue_name=await webhooks.queue_name())
    try:
        async with asyncio.TaskGroup() as group:
            work = [
                group.create_task(webhooks.run(), name="webhooks"),
                group.create_task(keep_tidy(app, queue, backend.queue_name), name="tidying"),
            ]
            try:
                yield backend
            finally:
                for task in work:
                    task.cancel()
                await hub.close()
    except BaseExceptionGroup as errors:
        raise first_of(errors) from errors


def page_of(backend: Backend, host: str, port: int) -> Listening:
    """Return where the page is found, with a new code that logs in once."""
    from launcher.options import Listening

    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound
    address = f"http://{f'[{shown}]' if ':' in shown else shown}:{port}"
    return Listening(shown, port, address, f"{address}/?code={backend.guard.new_code()}")
