"""HTTP beside queue and pool in one process: each can be switched off, and all of it begins and ends together."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from launcher.asgi import Product
from launcher.options import HttpOptions, Listening
from runcomfy.application.service import ServeOptions
from runcomfy.bootstrap import App, serves
from runcomfy.cli.main import call, comfyctl
from runcomfy.domain.exceptions import CredentialsMissing, SettingInvalid, ValueInvalid
from runcomfy.domain.settings import CloudSettings
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.queue_programs import drawing
from runcomfy.testing.serving import Services
from runcomfy.testing.web import Web, serving_web


async def put(web: Web, number: int, seconds: float = 3.0) -> Any:
    answer = await web.post("/jobs", {"workflow": drawing(seconds, number)})
    assert answer.status == 201, answer
    return answer.json


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


async def test_without_the_queue_nothing_is_run_and_everything_is_shown(tmp_path: Path, clock: LoopClock) -> None:
    async with serving_web(tmp_path, clock) as web:
        job = await put(web, 1)
        await asyncio.sleep(120)
        assert (await web.get(f"/jobs/{job['id']}")).json["status"] == "pending"
        machines = (await web.get("/machines")).json
        assert machines["listed"] is False
        assert machines["why"], "without an account it is said why no machine is listed"


async def test_a_service_that_is_not_told_to_listen_does_not(tmp_path: Path, clock: LoopClock) -> None:
    assert not HttpOptions.of(ServeOptions()).enabled
    with pytest.raises(ValueInvalid):
        HttpOptions.of(ServeOptions(extra={"http": {"colour": "red"}}))


async def test_without_an_account_nothing_listens_before_it_is_said(tmp_path: Path, clock: LoopClock) -> None:
    heard: list[Listening] = []
    extra = {"http": {"enabled": True, "port": 0, "listening": heard.append}}
    async with App(clock=clock, queue={"root": str(tmp_path)}) as app:
        with pytest.raises(CredentialsMissing):
            await app.serve(ServeOptions(extra=extra), asyncio.Event())
    assert heard == []


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1"])  # noqa: S104 - that is what is told of
async def test_it_is_said_when_other_computers_can_connect(tmp_path: Path, clock: LoopClock, host: str) -> None:
    said: list[str] = []
    stop = asyncio.Event()
    http = {"enabled": True, "host": host, "port": 0, "listening": lambda _: stop.set()}
    async with App(clock=clock, queue={"root": str(tmp_path), "where": "server"}, tell=said.append) as app:
        await app.serve(ServeOptions(queue=False, pool=False, extra={"http": http}), stop)
    assert any("other computers can connect" in words for words in said) == (host != "127.0.0.1")


@pytest.mark.cloud(boot_time=60)
async def test_http_queue_and_pool_in_one_process(
    cloud: RunComfyEmulator, cloud_settings: CloudSettings, clock: LoopClock, tmp_path: Path
) -> None:
    """And a second service on the same books waits its turn, while it answers HTTP at a port of its own."""
    async with Services(cloud, cloud_settings, clock, tmp_path) as services:
        async with services.start(works=False) as first, services.start(works=False) as second:
            addresses = []
            for served in (first, second):
                heard: asyncio.Future[Listening] = asyncio.get_running_loop().create_future()
                http = {"enabled": True, "port": 0, "listening": heard.set_result}
                served.begin(ServeOptions(guard=False, extra={"http": http}))
                addresses.append((await heard).address)
            token = (Path(first.app.settings.files.state_dir) / "http_token").read_text(encoding="utf-8").strip()
            async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {token}"}) as client:
                async with client.post(f"{addresses[1]}/jobs", json={"workflow": drawing(30, 1)}) as answer:
                    assert answer.status == 201, await answer.text()
                    job = await answer.json()
                await services.all_ended()
                for address in addresses:
                    async with client.get(f"{address}/jobs/{job['id']}") as answer:
                        assert (await answer.json())["status"] == "done"
                async with client.get(f"{addresses[0]}/machines") as answer:
                    machines = await answer.json()
                assert machines["listed"]
            assert any("another process serves these books" in said for said in second.said)
        assert not await services.complaints()


@pytest.mark.parametrize(
    ("said", "parts"), [("pool", {"queue", "pool"}), (" Queue ", {"queue"}), ("none", set()), ("", set())]
)
def test_what_the_api_server_works_on(said: str, parts: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNCOMFY_SERVE", said)
    assert serves() == parts


def test_what_it_cannot_work_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNCOMFY_SERVE", "everything")
    with pytest.raises(SettingInvalid, match="RUNCOMFY_SERVE"):
        serves()


async def test_the_asgi_application_opens_and_closes_with_its_server(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("RUNCOMFY_SERVE", "none")
    monkeypatch.setattr(logging.getLogger("uvicorn"), "propagate", True)
    product, told, said = Product(), asyncio.Queue[dict[str, Any]](), asyncio.Queue[dict[str, Any]]()
    lifespan = asyncio.create_task(product({"type": "lifespan"}, told.get, said.put))  # type: ignore[arg-type]
    told.put_nowait({"type": "lifespan.startup"})
    assert await said.get() == {"type": "lifespan.startup.complete"}
    assert "/?code=" in capsys.readouterr().err
    access = logging.getLogger("uvicorn.access")
    with caplog.at_level(logging.INFO, "uvicorn.access"):
        access.info('%s - "%s %s HTTP/%s" %d', "127.0.0.1:5", "GET", "/?code=secret", "1.1", 303)
    assert caplog.messages[-1] == '127.0.0.1:5 - "GET / HTTP/1.1" 303', "a code is in no log"
    assert await _status(product, "127.0.0.1") == 200
    assert await _status(product, "192.0.2.7") == 403, "settings that say loopback do not guard a network"
    told.put_nowait({"type": "lifespan.shutdown"})
    assert await said.get() == {"type": "lifespan.shutdown.complete"}
    await lifespan


async def _status(product: Product, server: str) -> int:
    said: list[Any] = []

    async def send(message: Any) -> None:
        said.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "scheme": "http",
        "path": "/health", "raw_path": b"/health", "query_string": b"", "root_path": "",
        "headers": [(b"host", b"127.0.0.1:8000")], "server": (server, 8000), "client": ("127.0.0.1", 5000),
    }  # fmt: skip
    await product(scope, receive, send)
    status: int = said[0]["status"]
    return status


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--no-queue", "--once"], "--no-queue"),
        (["--no-http", "--no-queue"], "nothing to do"),
        (["--no-http", "--port", "9000"], "--no-http"),
        (["--server", "not a url", "--no-http", "--once"], "not a"),
        (["--server", "", "--no-http", "--once"], "names no address"),
    ],
)
def test_flags_that_contradict_each_other(
    arguments: list[str], words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(comfyctl, ["serve", *arguments]) in (2, 3)
    assert words in capsys.readouterr().err


def test_without_an_account_it_says_what_works_without_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(comfyctl, ["serve", "--port", "0"]) == 3
    said = capsys.readouterr()
    assert "--no-pool" in said.err
    assert "--server" in said.err
    assert "HTTP" not in said.out
