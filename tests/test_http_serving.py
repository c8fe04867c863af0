"""HTTP beside queue and pool in one process: each can be switched off, and all of it begins and ends together."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from launcher.asgi import Product
from launcher.listening import Line, answering, bound
from launcher.options import HttpOptions, Listening
from runcomfy.application.service import ServeOptions
from runcomfy.bootstrap import App, serves
from runcomfy.cli.main import call, comfyctl
from runcomfy.domain.exceptions import AddressInUse, CredentialsMissing, SettingInvalid, ValueInvalid
from runcomfy.domain.queued import EventKind
from runcomfy.domain.settings import CloudSettings
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.queue_programs import drawing
from runcomfy.testing.serving import Services
from runcomfy.testing.web import Web, serving_web

ROOT = Path(__file__).resolve().parents[1]


class Stream:
    """What a client hears: (event, data, id) in order."""

    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        self.answer = answer
        self.head: list[str] = []

    async def events(self) -> AsyncIterator[tuple[str, Any, int | None]]:
        name, data, number = "", "", None
        async for raw in self.answer.content:
            line = raw.decode().rstrip("\n")
            key, _, value = line.partition(": ")
            if key == "event":
                name = value
            elif key == "data":
                data = value
            elif key == "id":
                number = int(value)
            elif not line and name:
                yield name, json.loads(data), number
                name, number = "", None
            elif line:
                self.head.append(line)


@asynccontextmanager
async def streamed(web: Web, path: str, **headers: str) -> AsyncIterator[Stream]:
    headers = {"Authorization": f"Bearer {web.token}", **headers}
    timeout = aiohttp.ClientTimeout(total=None, sock_read=None)
    async with web.http.get(f"{web.address}{path}", headers=headers, timeout=timeout) as answer:
        assert answer.status == 200, await answer.text()
        yield Stream(answer)


async def put(web: Web, number: int, seconds: float = 3.0) -> Any:
    answer = await web.post("/jobs", {"workflow": drawing(seconds, number)})
    assert answer.status == 201, answer
    return answer.json


# -- events ------------------------------------------------------------------------------------------------


async def test_a_job_is_followed_from_its_beginning_to_its_last_word(tmp_path: Path, clock: LoopClock) -> None:
    async with ComfyUIEmulator() as comfyui, serving_web(tmp_path, clock, comfyui=comfyui.url) as web:
        job = await put(web, 1)
        async with streamed(web, f"/jobs/{job['id']}/events") as stream:
            assert stream.answer.headers["Content-Type"].startswith("text/event-stream")
            assert stream.answer.headers["Cache-Control"] == "no-store"
            assert stream.answer.headers["X-Accel-Buffering"] == "no"
            heard = [event async for event in stream.events()]  # it ends by itself
        assert any(line.startswith("retry: ") for line in stream.head)
    kinds = [data["kind"] for name, data, _ in heard if name == "job"]
    assert kinds[0] == "enqueued"
    assert kinds[-1] == "done"
    numbers = [number for name, _, number in heard if name == "job"]
    assert numbers == sorted(set(numbers), key=lambda number: number or 0)
    assert heard[-1][0] == "end"
    last = next(data for name, data, _ in reversed(heard) if name == "job")
    assert last["job"]["status"] == "done"
    assert last["job"]["id"] == job["id"]
    progress = [data for name, data, _ in heard if name == "progress"]
    assert progress, "and how far it is, in between"
    assert all(said["id"] == job["id"] and "percent" in said["progress"] for said in progress)


async def test_what_everybody_hears_is_written_at_once(
    tmp_path: Path, clock: LoopClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, write = list[bytes](), Line.write

    def noted(line: Line, chunk: bytes) -> None:
        written.append(chunk)
        write(line, chunk)

    monkeypatch.setattr(Line, "write", noted)
    async with (
        ComfyUIEmulator() as comfyui,
        serving_web(tmp_path, clock, comfyui=comfyui.url) as web,
        streamed(web, "/events") as one,
        streamed(web, "/events") as other,
    ):
        job = await put(web, 1)
        for stream in (one, other):
            kinds = []
            async for name, data, _ in stream.events():
                if name == "job":
                    assert data["job"]["id"] == job["id"]
                    kinds.append(data["kind"])
                if kinds[-1:] == ["done"]:
                    break
            assert kinds == ["enqueued", "claimed", "submitting", "submitted", "done"]
    assert sum(b'"done"' in chunk for chunk in written) >= 2


async def test_a_client_that_lost_the_connection_goes_on_where_it_was(tmp_path: Path, clock: LoopClock) -> None:
    async with ComfyUIEmulator() as comfyui, serving_web(tmp_path, clock, comfyui=comfyui.url) as web:
        seen: list[int] = []
        async with streamed(web, "/events?after=0") as stream:
            first = await put(web, 1)
            async for name, _, number in stream.events():
                if name == "job" and number is not None:
                    seen.append(number)
                if len(seen) == 2:
                    break
        await web.ended(first["id"])
        second = await put(web, 2)
        async with streamed(web, "/events", **{"Last-Event-ID": str(seen[-1])}) as stream:
            async for name, data, number in stream.events():
                if name != "job" or number is None:
                    continue
                seen.append(number)
                if data["kind"] == "done" and data["job"]["id"] == second["id"]:
                    break
        written = [event.number for event in await (await web.app.job_store()).events()]
    assert seen == written


@pytest.mark.parametrize(("path", "status"), [("/events?after=x", 422), ("/events?after=-1", 422)])
async def test_what_is_no_number_is_refused(tmp_path: Path, clock: LoopClock, path: str, status: int) -> None:
    async with serving_web(tmp_path, clock) as web:
        assert (await web.get(path)).status == status
        assert (await web.get("/jobs/nobody/events")).status == 404
        assert (await web.get("/events", token=False)).status == 401


async def test_listeners_do_not_hold_up_the_end(tmp_path: Path, clock: LoopClock) -> None:
    loop = asyncio.get_running_loop()
    async with serving_web(tmp_path, clock) as web, asyncio.TaskGroup() as group:
        ready = asyncio.Event()

        async def listens() -> None:
            async with streamed(web, "/events") as stream:
                ready.set()
                assert [event async for event in stream.events() if event[0] == "job"] == []

        for _ in range(5):
            group.create_task(listens())
        await ready.wait()
        await asyncio.sleep(1)
        began = loop.time()
        assert web.app.live is not None
        assert (await web.post("/shutdown")).status == 200
    assert loop.time() - began < 10


async def test_a_client_that_reads_nothing_is_given_up(
    tmp_path: Path, clock: LoopClock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("launcher.hub.WAITING_MOST", 50)
    caplog.set_level(logging.INFO, "runcomfy.http")
    async with serving_web(tmp_path, clock) as web:
        monkeypatch.setattr(logging.getLogger("launcher"), "propagate", True)
        tight = socket.socket()
        tight.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        tight.connect(_at(web.address))
        reader, writer = await asyncio.open_connection(sock=tight, limit=1024)
        try:
            head = f"GET /events HTTP/1.1\r\nHost: {web.address[7:]}\r\nAuthorization: Bearer {web.token}\r\n\r\n"
            writer.write(head.encode())
            await reader.readuntil(b"\r\n\r\n")
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            store = await web.app.job_store()
            for number in range(600):  # more than the system keeps for a connection
                await store.note(EventKind.NOTE, data={"number": number, "text": "x" * 19_000})
            await asyncio.sleep(200)
            metrics = (await web.get("/metrics")).body.decode()
            assert "comfyctl_listeners 0.0" in metrics
            assert (await web.get("/jobs?limit=1")).status == 200, "nobody else is held up"
            assert "listener_given_up" in caplog.messages
            assert "request_broke" not in caplog.messages, "a client that sleeps is no defect of ours"
        finally:
            writer.transport.abort()
            await asyncio.sleep(0.1)


# -- metrics -----------------------------------------------------------------------------------------------


async def test_metrics_count_and_name_nobody(tmp_path: Path, clock: LoopClock) -> None:
    async with ComfyUIEmulator() as comfyui, serving_web(tmp_path, clock, comfyui=comfyui.url) as web:
        answer = await web.post(
            "/jobs", {"workflow": drawing(1, 1), "user": "ann", "project": "moon", "prompt": None, "priority": 3}
        )
        assert answer.status == 201, answer
        await web.ended(answer.json["id"])
        await web.get("/no/such/page")
        async with streamed(web, "/events"):
            said = await web.get("/metrics")
    text = said.body.decode()
    assert said.headers["Content-Type"].startswith("text/plain")
    samples: dict[tuple[Any, ...], float] = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["comfyctl_jobs", ("status", "done")] == 1
    assert samples["comfyctl_jobs", ("status", "pending")] == 0
    assert samples["comfyctl_listeners",] == 1
    assert samples["comfyctl_part", ("part", "pool")] == 0
    assert samples["comfyctl_part", ("part", "queue")] == 1
    assert samples["comfyctl_readable", ("what", "queue")] == 1
    assert samples["comfyctl_http_requests_total", ("method", "POST"), ("route", "/jobs"), ("status", "201")] == 1
    assert any(key[0] == "comfyctl_http_request_seconds_count" for key in samples)
    routes = {
        value
        for key in samples
        if key[0] == "comfyctl_http_requests_total"
        for name, value in key[1:]
        if name == "route"
    }
    assert any("{" in route for route in routes), "routes are counted, not addresses"
    assert not any(answer.json["id"] in route or "no/such" in route for route in routes)
    assert "ann" not in text.split()
    assert "moon" not in text


# -- which parts work --------------------------------------------------------------------------------------


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


# -- sockets -----------------------------------------------------------------------------------------------


async def test_a_port_that_is_taken_is_said_and_nothing_is_half_started(tmp_path: Path, clock: LoopClock) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        extra = {"http": {"enabled": True, "host": "127.0.0.1", "port": port}}
        async with App(clock=clock, queue={"root": str(tmp_path)}) as app:
            with pytest.raises(AddressInUse) as raised:
                await app.serve(ServeOptions(pool=False, extra=extra), asyncio.Event())
            assert str(port) in raised.value.message
            assert "--port" in raised.value.hint
            assert await (await app.job_queue()).workers() == [], "no executor was begun"


@pytest.mark.parametrize("host", ["no such host.invalid", "203.0.113.7"])
async def test_an_address_that_is_not_ours_is_refused(host: str) -> None:
    with pytest.raises(SettingInvalid):
        await bound(host, 0)


async def test_of_a_names_addresses_those_that_are_here_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container without IPv6 `localhost` is ::1 all the same."""

    async def both(host: str, port: int, **how: Any) -> list[Any]:
        kind = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
        return [(*kind, ("203.0.113.7", port)), (*kind, ("127.0.0.1", port))]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", both)
    [listening] = await bound("localhost", 0)
    with listening:
        assert listening.getsockname()[0] == "127.0.0.1"


async def test_small_answers_are_not_held_back() -> None:
    """Without TCP_NODELAY every answer waits for an acknowledgement, 40 ms on Linux."""

    async def hello(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"hello"})

    [listening] = await bound("127.0.0.1", 0)
    assert listening.proto == socket.IPPROTO_TCP, "the event loop switches it on where it sees TCP"
    address = f"http://127.0.0.1:{listening.getsockname()[1]}/"
    async with answering(hello, [listening]), aiohttp.ClientSession() as client, client.get(address) as answer:
        assert await answer.text() == "hello"
        assert "server" not in answer.headers
    assert listening.fileno() == -1


async def _hello(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"hello"})


async def _asks(address: tuple[str, int]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection(*address)
    writer.write(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
    assert (await reader.readuntil(b"hello")).startswith(b"HTTP/1.1 200")
    return reader, writer


@pytest.mark.fault(59)
async def test_who_asks_for_nothing_is_let_go(clock: LoopClock) -> None:
    """Slow heads: nothing at all, a byte now and then, and a second request that never gets whole."""
    [listening] = await bound("127.0.0.1", 0)
    async with answering(_hello, [listening]):
        address = listening.getsockname()
        silent, end = await asyncio.open_connection(*address)
        slow, drips = await asyncio.open_connection(*address)
        used, more = await _asks(address)
        more.write(b"GET / HT")
        for byte in b"GET / HTTP/1.1\r\nX: ":
            drips.write(bytes([byte]))
            await asyncio.sleep(1)
        for reader in (silent, slow, used):
            async with asyncio.timeout(10):
                assert await reader.read() == b""
        again, last = await _asks(address)
        await asyncio.sleep(40)  # between two requests a client may take its time
        last.write(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
        await again.readuntil(b"hello")
        for writer in (end, drips, more, last):
            writer.close()


@pytest.mark.fault(59)
async def test_connections_do_not_take_the_last_file(monkeypatch: pytest.MonkeyPatch, clock: LoopClock) -> None:
    monkeypatch.setattr("launcher.listening.connections_most", lambda: 3)
    [listening] = await bound("127.0.0.1", 0)
    async with answering(_hello, [listening]):
        address = listening.getsockname()
        opened = await asyncio.gather(*(asyncio.open_connection(*address) for _ in range(20)))
        ended = [asyncio.create_task(reader.read()) for reader, _ in opened]
        await asyncio.sleep(1)
        assert sum(task.done() for task in ended) == 17, "also if they come at once"
        answered = [await _asks(address) for _ in range(3)]  # each in the place of one that never asked
        assert set(await asyncio.gather(*ended)) == {b""}
        fourth = await _asks(address)
        assert await answered[0][0].read() == b"", "then the oldest that asks for nothing now"
        for _, writer in [*opened, *answered, fourth]:
            writer.close()


async def test_a_server_that_dies_takes_the_service_down() -> None:
    async def hello(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError

    [listening] = await bound("127.0.0.1", 0)
    with pytest.raises(BaseExceptionGroup):  # noqa: PT012 - what is raised is raised where the block is left
        async with answering(hello, [listening]):
            server = next(task for task in asyncio.all_tasks() if task.get_name() == "http")
            server.get_coro().throw(RuntimeError("broken"))
            await asyncio.sleep(3_600)


# -- as an ASGI application --------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


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


# -- as people meet it -------------------------------------------------------------------------------------


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


@contextmanager
def running(folder: Path, *command: str, **env: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """Run a program of ours; gives what it prints, as it comes."""
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        lines: list[str] = []

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)  # noqa: PERF402 - they are looked at while they come

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            yield process, lines
        finally:
            process.kill()
            reader.join(10)


def found(process: subprocess.Popen[str], lines: list[str], pattern: str) -> str:
    """Return what a line says, once it was printed."""
    for _ in range(600):
        for line in list(lines):
            if (match := re.search(pattern, line)) is not None:
                return match[1]
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
            break
    for line in lines:
        if (match := re.search(pattern, line)) is not None:
            return match[1]
    pytest.fail(f"it never said {pattern}: {''.join(lines)}")


def get(address: str, **headers: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=30) as answer:  # noqa: S310
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


SERVES = ["-m", "runcomfy.cli.main", "serve"]


@pytest.mark.processes
@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends processes without asking")
@pytest.mark.parametrize(
    ("command", "env"),
    [
        ([*SERVES, "--no-pool", "--port", "0"], {}),
        ([str(ROOT / "launcher" / "main.py"), "--no-queue", "--port", "0"], {}),
        ([str(ROOT / "launcher" / "api_server.py"), "--port", "0"], {}),
        ([str(ROOT / "launcher" / "api_server.py"), "--port", "0"], {"RUNCOMFY_SERVE": "queue"}),
    ],
    ids=["serve", "main.py", "api_server.py", "api_server.py with a queue"],
)
def test_a_real_process_listens_and_ends_in_good_order(command: list[str], env: dict[str, str], tmp_path: Path) -> None:
    state = tmp_path / "state"
    with running(tmp_path, *command, RUNCOMFY_STATE_DIR=str(state), **env) as (process, lines):
        address = found(process, lines, r"answering HTTP at (http://127\.0\.0\.1:\d+)")
        page = found(process, lines, r"(http://127\.0\.0\.1:\d+/\?code=\S+)")
        assert json.loads(get(f"{address}/health")[1])["status"] == "healthy"
        assert get(f"{address}/jobs")[0] == 401
        token = (state / "http_token").read_text().strip()
        assert get(f"{address}/jobs", Authorization=f"Bearer {token}")[0] == 200
        assert get(page)[0] in (200, 404, 401), "the code was taken"
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 0, lines
    assert any("stopped" in line for line in lines), lines
    log = "".join(path.read_text() for path in (state / "logs").glob("*")) if (state / "logs").is_dir() else ""
    code = page.partition("code=")[2]
    assert code not in log
    assert token not in log + "".join(lines)


@pytest.mark.processes
@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends processes without asking")
def test_under_another_server_an_open_page_does_not_keep_it_from_ending(tmp_path: Path) -> None:
    """Servers wait for their connections before they say that it ends; impatient people then kill it."""
    state = tmp_path / "state"
    command = ["-m", "uvicorn", "launcher.api_server:app", "--port", "0"]
    with running(tmp_path, *command, RUNCOMFY_STATE_DIR=str(state), RUNCOMFY_SERVE="queue") as (process, lines):
        address = found(process, lines, r"running on (http://127\.0\.0\.1:\d+)")
        token = {"Authorization": f"Bearer {(state / 'http_token').read_text().strip()}"}
        with urllib.request.urlopen(urllib.request.Request(f"{address}/events", headers=token), timeout=30) as page:  # noqa: S310
            assert page.readline().startswith(b"retry")
            process.send_signal(signal.SIGTERM)
            assert page.read().endswith(b"\n\n"), "the stream ended, whole"
            process.wait(120)
    assert any("Application shutdown complete" in line for line in lines), lines


@pytest.mark.processes
@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends processes without asking")
def test_a_second_one_at_the_same_port_is_told_so(tmp_path: Path) -> None:
    env = {"RUNCOMFY_STATE_DIR": str(tmp_path / "state")}
    with running(tmp_path, *SERVES, "--no-pool", "--port", "0", **env) as (process, lines):
        port = found(process, lines, r"answering HTTP at http://127\.0\.0\.1:(\d+)")
        second = subprocess.run(
            [sys.executable, *SERVES, "--no-pool", "--port", port],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), **env},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert second.returncode == 9
        assert f"port {port}" in second.stderr
        assert "[address-in-use]" in second.stderr
        assert get(f"http://127.0.0.1:{port}/health")[0] == 200, "the first one goes on"


@pytest.mark.processes
@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends processes without asking")
def test_the_demos_page_is_served_until_it_is_stopped(tmp_path: Path) -> None:
    real = {
        "RUNCOMFY_DATABASE_URL": "postgresql://nobody:secret@127.0.0.1:1/books",
        "COMFYUI_AGENT_DATABASE": str(tmp_path / "real_queue.sqlite3"),
        "RUNCOMFY_STATE_DIR": str(tmp_path / "real_state"),
        "RUNCOMFY_BUDGET_DAY": "0.000001",
    }
    with running(tmp_path, "-m", "runcomfy.cli.main", "demo", "--serve", **real) as (process, lines):
        address = found(process, lines, r"until Ctrl\+C: (http://127\.0\.0\.1:\d+)/\?code=")
        assert get(f"{address}/health")[0] == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 0, lines
    assert lines[-1].strip() == "nothing bills any more"
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"], "the user's books and queue are not touched"


def _at(address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix("http://").rpartition(":")
    return host, int(port)
