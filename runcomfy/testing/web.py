"""
The HTTP API over an emulated ComfyUI, in one event loop, reached as a client would: over loopback, with the token.

It is wired as `comfyctl serve --no-pool` wires it. Times come from the clock that is passed in, so that it works under
virtual time.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import aiohttp

from runcomfy.adapters.config import load_settings
from runcomfy.adapters.stores.jobs import SqlJobs
from runcomfy.application.heartbeat import Pulse
from runcomfy.application.service import ServeOptions
from runcomfy.bootstrap import App
from runcomfy.domain.lease import Owner
from runcomfy.domain.settings import QueueSettings, Settings
from runcomfy.ports.clock import Clock
from runcomfy.testing.programs import EmulatedProcesses
from runcomfy.testing.workers import queue_settings_for


class _WebApp(App):
    """The product's wiring; its worker beats in the loop, whose time is the story's."""

    def __init__(self, settings: Settings, queue: QueueSettings, clock: Clock) -> None:
        self.said: list[str] = []
        super().__init__(settings, clock=clock, tell=self.said.append, processes=EmulatedProcesses())
        self._queue_settings = queue

    def _heart(self, store: SqlJobs, owner: Owner, settings: QueueSettings) -> Pulse | None:
        return None


class Answer:
    """What the API said, read whole."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes, json: Any) -> None:
        self.status, self.headers, self.body = status, headers, body
        self.json = json
        """None if it was no JSON."""

    def __repr__(self) -> str:
        return f"{self.status} {self.body[:2_000]!r}"


class Web:
    """A running API and a client of it that has the token."""

    def __init__(self, app: _WebApp, address: str, page: str, token: str, http: aiohttp.ClientSession) -> None:
        self.app, self.address, self.page, self.token, self.http = app, address, page, token, http
        self.state = Path(app.settings.files.state_dir)

    async def ask(self, method: str, path: str, *, token: bool = True, **options: Any) -> Answer:
        """Send a request and return the whole answer; `options` are aiohttp's. Redirects are not followed."""
        headers = dict(options.pop("headers", {}))
        if token:
            headers.setdefault("Authorization", f"Bearer {self.token}")
        options.setdefault("allow_redirects", False)
        async with self.http.request(method, f"{self.address}{path}", headers=headers, **options) as answer:
            body = await answer.read()
            said = None
            if answer.content_type == "application/json" and body:
                said = await answer.json()
            return Answer(answer.status, answer.headers, body, said)

    async def get(self, path: str, **options: Any) -> Answer:
        """Send a GET."""
        return await self.ask("GET", path, **options)

    async def post(self, path: str, json: Any = None, **options: Any) -> Answer:
        """Send a POST, with a JSON body if there is one."""
        return await self.ask("POST", path, **({"json": json} if json is not None else {}), **options)

    async def ended(self, job_id: str, *, within: float = 3_600) -> Any:
        """Return a job once it is done or failed, as `GET /jobs/ID` shows it."""
        wait = 0.25
        async with asyncio.timeout(within):
            while True:
                job = (await self.get(f"/jobs/{job_id}")).json
                if job["status"] in ("done", "failed"):
                    return job
                await asyncio.sleep(wait)
                wait = min(wait * 1.5, 10.0)


Serving = Callable[..., AbstractAsyncContextManager[Web]]


@asynccontextmanager
async def serving_web(
    folder: Path,
    clock: Clock,
    *,
    comfyui: str | None = None,
    settings: Settings | None = None,
    queue: Mapping[str, Any] | None = None,
    **http: Any,
) -> AsyncIterator[Web]:
    """Serve for the block. `comfyui`: where jobs run; None: nowhere, they wait.

    `settings` come from the environment unless they are given; `queue` and `http` are laid over the queue's and the
    API's.
    """
    whole = settings or load_settings(overrides={})
    files = replace(whole.files, durable=False, state_dir=str(folder / "state"), output_dir=str(folder / "outputs"))
    whole = replace(whole, files=files, http=replace(whole.http, **http))
    # Each look into the file is real work, in a story of hours too much.
    rarely = {"wake_interval": timedelta(seconds=2), "poll_interval": timedelta(seconds=15)}
    queue_settings = queue_settings_for(comfyui or "http://127.0.0.1:9", folder, **{**rarely, **(queue or {})})
    app = _WebApp(whole, queue_settings, clock)
    heard: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    extra = {"http": {"enabled": True, "port": 0, "listening": heard.set_result}}
    options = ServeOptions(guard=False, pool=False, queue=comfyui is not None, extra=extra)
    stop, leave = asyncio.Event(), asyncio.Event()
    async with app:
        serving = asyncio.create_task(app.serve(options, stop, leave), name="serve")
        try:
            await asyncio.wait({serving, heard}, return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                serving.result()
                raise AssertionError("it ended before it listened")
            where = heard.result()
            token = (await asyncio.to_thread((folder / "state" / "http_token").read_text)).strip()
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as client:
                yield Web(app, where.address, where.page, token, client)
        finally:
            stop.set()
            leave.set()
            with suppress(asyncio.CancelledError):
                await serving


def data_url(data: bytes) -> str:
    """Return a picture as it may stand in a body of JSON."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def refused(answer: Answer, status: int, *words: str) -> None:
    """Raise AssertionError unless the answer has that status, the shape of every error, and says these words."""
    said = answer.json
    whole = set(said) == {"detail", "error"} and set(said["error"]) == {"code", "message", "hint", "details"}
    if answer.status != status or not whole or not all(word in json.dumps(said) for word in words):
        raise AssertionError(f"{answer} is no {status} that says {words}")


async def uploads(api: Web) -> list[Path]:
    """Return the files that were uploaded and are kept."""
    return await asyncio.to_thread(lambda: list((api.state / "uploads").glob("*/*")))
