"""A project of CONJURE's with the user's files in it, and its API served there as `comfyctl serve` serves it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from fastapi import FastAPI
from PIL import Image

from launcher.conjure.desk import Desk
from launcher.errors import install_errors
from launcher.listening import answering, bound
from launcher.part import open_backend
from launcher.routes import conjure
from runcomfy.application.service import ServeOptions
from runcomfy.bootstrap import App
from runcomfy.conjure.client import ConjureAPIClient
from runcomfy.domain.settings import CloudSettings, Settings
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.programs import settings_for

RENDER = Path("data/generated_images/gestureCamera/render.png")
STATE = Path("data/input/state.json")
PROMPT = Path("data/generated_text/userPrompt.txt")


def draw(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.radial_gradient("L").resize((128, 128)).convert("RGBA").save(path)


def lay_out(root: Path) -> Path:
    """Make CONJURE's folder with the user's prompt and render in it."""
    draw(root / RENDER)
    (root / PROMPT).parent.mkdir(parents=True)
    (root / PROMPT).write_text("a bronze statue\n", encoding="utf-8")
    return root


@pytest.fixture
def settings(cloud_settings: CloudSettings, tmp_path: Path) -> Settings:
    """The defaults with the emulated account, in a folder of their own."""
    return settings_for(cloud_settings, tmp_path)


@pytest.fixture
def open_app(settings: Settings, clock: LoopClock) -> Callable[..., App]:
    """What opens the product for one call of CONJURE's."""
    return lambda given=None: App(given or settings, clock=clock, launches=False)


@pytest.fixture
def client(settings: Settings, open_app: Callable[..., App]) -> ConjureAPIClient:
    """CONJURE's client of the account."""
    return ConjureAPIClient(office=open_app, settings=settings)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CONJURE's folder, the working directory."""
    root = lay_out(tmp_path / "CONJURE")
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def conjure_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CONJURE's folder with its state in it, the working directory."""
    root = lay_out(tmp_path / "CONJURE")
    (root / STATE).parent.mkdir(parents=True)
    state = {"generation_mode": "local_comfyui", "app_status": "running"}
    (root / STATE).write_text(json.dumps(state), encoding="utf-8")
    monkeypatch.chdir(root)
    return root


@pytest_asyncio.fixture
async def own_comfyui() -> AsyncIterator[ComfyUIEmulator]:
    async with ComfyUIEmulator() as running:
        yield running


@dataclass
class Client:
    """Talks to a served API as CONJURE does: JSON, no token."""

    http: aiohttp.ClientSession
    base: str
    web: FastAPI
    app: App
    shut: list[bool]

    async def send(self, method: str, path: str, body: Any = None) -> tuple[int, Any, Any]:
        async with self.http.request(method, f"{self.base}{path}", json=body) as answer:
            return answer.status, await answer.json(), answer.headers

    async def get(self, path: str) -> Any:
        status, found, _ = await self.send("GET", path)
        assert status == 200, found
        return found

    async def post(self, path: str, body: Any = None) -> Any:
        status, found, _ = await self.send("POST", path, body)
        assert status == 200, found
        return found

    @property
    def desk(self) -> Desk:
        desk: Desk = self.web.state.conjure
        return desk


class _Served(App):
    """The product's wiring; its executor beats in the loop, whose time is the story's."""

    def _heart(self, *_: Any) -> None:
        return None


@asynccontextmanager
async def serving(clock: LoopClock, *, works: bool = True, **queue: Any) -> AsyncIterator[Client]:
    """Serve CONJURE's endpoints in the working directory, with an executor beside."""
    shut: list[bool] = []
    options = ServeOptions(pool=False, shut_down=lambda: shut.append(True))
    async with AsyncExitStack() as stack:
        # Each look into the file is real work, in a story of minutes too.
        queue = {"wake_interval": timedelta(milliseconds=500), **queue}
        app = await stack.enter_async_context(_Served(clock=clock, queue=queue))
        backend = await stack.enter_async_context(open_backend(app, options, host="127.0.0.1"))
        web = FastAPI()
        web.state.backend = backend
        web.router.routes.extend(conjure.router.routes)  # see `create_app`
        install_errors(web)
        backend.guard.install(web)
        sockets = await bound("127.0.0.1", 0)
        port = sockets[0].getsockname()[1]
        stop = asyncio.Event()
        work = asyncio.create_task((await app.executor()).run(stop)) if works else None
        await stack.enter_async_context(conjure.at_desk(web, backend))
        await stack.enter_async_context(answering(web, sockets))
        http = await stack.enter_async_context(aiohttp.ClientSession())
        client = Client(http, f"http://127.0.0.1:{port}", web, app, shut)
        try:
            yield client
        finally:
            backend.closing.set()
            await backend.hub.close()
            stop.set()
            if work is not None:
                await work


@pytest.fixture
def serve(clock: LoopClock) -> Callable[..., AbstractAsyncContextManager[Client]]:
    """`async with serve(api_base_url=…) as client:`"""
    return lambda **options: serving(clock, **options)


@pytest_asyncio.fixture
async def api(conjure_project: Path, own_comfyui: ComfyUIEmulator, clock: LoopClock) -> AsyncIterator[Client]:
    """The API over a queue whose jobs run on the user's own ComfyUI."""
    del conjure_project
    async with serving(clock, where="server", api_base_url=own_comfyui.url) as client:
        yield client
