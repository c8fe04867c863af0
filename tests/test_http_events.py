"""What is said of what happens, to those who listen and to those who count: event streams, metrics."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from launcher import listening
from launcher.listening import Line
from runcomfy.domain.queued import EventKind
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.queue_programs import drawing
from runcomfy.testing.web import Web, serving_web


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


def holding_little(*where: Any, bind: Any = listening._bind) -> socket.socket:
    """Listen so that the system keeps little for a client that reads nothing."""
    found: socket.socket = bind(*where)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)
    return found


async def test_a_client_that_reads_nothing_is_given_up(
    tmp_path: Path, clock: LoopClock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("launcher.hub.WAITING_MOST", 20)
    monkeypatch.setattr("launcher.listening._bind", holding_little)
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
            for number in range(60):  # more than the system keeps for a connection
                await store.note(EventKind.NOTE, data={"number": number, "text": "x" * 19_000})
            await asyncio.sleep(200)
            metrics = (await web.get("/metrics")).body.decode()
            assert "comfyctl_listeners 0.0" in metrics
            assert (await web.get("/jobs?limit=1")).status == 200, "nobody else is held up"
            given_up = {"listener_given_up", "client_given_up"}  # whoever looks first
            assert given_up & set(caplog.messages)
            assert "request_broke" not in caplog.messages, "a client that sleeps is no defect of ours"
        finally:
            writer.transport.abort()
            await asyncio.sleep(0.1)


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


def _at(address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix("http://").rpartition(":")
    return host, int(port)
