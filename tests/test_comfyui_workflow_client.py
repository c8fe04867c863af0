"""The ComfyUI client finds its server, and tells it from others, old ones and broken ones. Time is virtual."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from runcomfy.comfyui_workflow_client import ComfyUIWorkflowClient
from runcomfy.domain.exceptions import DownloadFailed, NotComfyUI, ServerTooOld, ServerUnreachable, SettingInvalid
from runcomfy.domain.progress import Said, SocketDown, SocketUp
from runcomfy.domain.secret import SecretUrl
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.comfyui_clients import PAGE, SETTINGS, a_client, an_id, picture, put
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator, Fault

# --- addresses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8188",
        "ftp://host",
        "http://",
        "http://host:99999",
        "http://host/?a=b",
        "http://[::1",
        "//x",
        "http://h:0",
    ],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(SettingInvalid):
        a_client(url)


async def test_slashes_and_prefixes_are_kept_in_order(comfyui: ComfyUIEmulator) -> None:
    for url in (comfyui.url + "/", f" {comfyui.url}// ", comfyui.url + "/api/"):
        async with a_client(url) as client:
            assert (await client.probe()).version == "0.33.0"


async def test_the_address_of_a_machine_is_shown_nowhere(comfyui: ComfyUIEmulator) -> None:
    url = SecretUrl("https://4f5e-comfyui.example.invalid")
    async with a_client(url, unreachable_timeout=timedelta(seconds=1)) as client:
        with pytest.raises(ServerUnreachable) as caught:
            await client.queue()
        shown = "".join(traceback.format_exception(caught.value)) + repr(client) + str(caught.value.as_dict())
        assert "4f5e" not in shown
        assert "***" in client.masked_url


async def test_a_password_in_the_address_opens_both_doors(comfyui: ComfyUIEmulator) -> None:
    seen: list[str | None] = []

    async def check(request: web.Request) -> web.StreamResponse:
        seen.append(request.headers.get("Authorization"))
        return web.Response(status=401)

    async with stand_in(check) as url, a_client(url.replace("http://", "http://me:p%40ss@")) as client:
        assert "me" not in client.masked_url
        with pytest.raises(NotComfyUI):
            await client.queue()
        async with client.listen(an_id()) as events:
            assert isinstance(await anext(events), SocketDown)
    assert set(seen) == {"Basic bWU6cEBzcw=="}


def test_an_address_with_an_impossible_port_is_bad_input_and_prints() -> None:
    address = SecretUrl("http://127.0.0.1:99999")
    assert repr(address) == "SecretUrl('***')"
    with pytest.raises(SettingInvalid):
        ComfyUIWorkflowClient(address, SETTINGS, clock=LoopClock())


# --- somebody else answers ----------------------------------------------------------------------------------


class stand_in:  # noqa: N801 - reads as a verb where it is used
    """A server of any kind in ComfyUI's place."""

    def __init__(self, handler: Callable[[web.Request], Any]) -> None:
        self._handler = handler

    async def __aenter__(self) -> str:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._handler)
        self._runner = web.AppRunner(app, shutdown_timeout=0)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()


@pytest.mark.parametrize(
    "answer",
    [
        lambda: web.Response(text=PAGE, content_type="text/html"),
        lambda: web.Response(text=PAGE),
        lambda: web.json_response({"hello": "world"}),
        lambda: web.json_response(["x"]),
        lambda: web.Response(status=404),
        lambda: web.Response(status=403, text=PAGE, content_type="text/html"),
        lambda: web.Response(status=302, headers={"Location": "http://127.0.0.1:1/"}),
    ],
)
async def test_something_else_is_told_from_comfyui(answer: Callable[[], web.Response]) -> None:
    async def handle(_: web.Request) -> web.Response:
        return answer()

    async with stand_in(handle) as url, a_client(url) as client:
        with pytest.raises(NotComfyUI):
            await client.probe()


async def test_no_server_is_told_from_a_wrong_one() -> None:
    async with a_client("http://127.0.0.1:1") as client:
        with pytest.raises(ServerUnreachable) as caught:
            await client.probe()
    assert caught.value.details["kind"] == "refused"
    assert caught.value.hint


@pytest.mark.fault(33)
@pytest.mark.threat("S10")
async def test_redirects_lead_nowhere(comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, tmp_path: Path) -> None:
    visits: list[str] = []

    async def elsewhere(request: web.Request) -> web.Response:
        visits.append(request.path)
        return web.json_response({"queue_running": [], "queue_pending": []})

    async with stand_in(elsewhere) as url:
        for target in (url + "/queue", "self"):
            comfyui.faults.add("GET", "/queue", Fault(redirect=target), times=20)
            with pytest.raises(NotComfyUI, match="redirects"):
                await client.queue()
            comfyui.faults.clear()
        comfyui.faults.add("GET", "/view", Fault(redirect=url + "/view"), times=20)
        with pytest.raises(NotComfyUI):
            await client.fetch(put(comfyui, "a.png", b"x"), str(tmp_path / "a"))
        comfyui.faults.add("GET", "/ws", Fault(work=False, redirect=url + "/ws"), times=20)
        async with client.listen(an_id()) as events:
            assert isinstance(await anext(events), SocketDown)
    assert not visits


# --- slow, endless, broken answers --------------------------------------------------------------------------


@pytest.mark.fault(32)
@pytest.mark.parametrize(
    "fault", [Fault(body=b" " * 100_000, content_type="application/json", rate=1), Fault(reply="never")]
)
async def test_an_answer_that_drips_ends_at_the_deadline(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, fault: Fault
) -> None:
    comfyui.faults.add("GET", "/queue", fault, times=99)
    began = asyncio.get_running_loop().time()
    with pytest.raises(ServerUnreachable) as caught:
        await client.queue()
    assert caught.value.details["kind"] == "timeout"
    took = asyncio.get_running_loop().time() - began
    assert took == pytest.approx(SETTINGS.request_timeout.total_seconds(), abs=1)


@pytest.mark.fault(32)
@pytest.mark.threat("S10")
async def test_an_endless_answer_is_cut_at_the_limit(comfyui: ComfyUIEmulator, tmp_path: Path) -> None:
    comfyui.faults.add(
        "GET", "/queue", Fault(body=b" " * 65536, content_type="application/json", endless=True), times=99
    )
    comfyui.faults.add("GET", "/view", Fault(body=bytes(65536), content_type="image/png", endless=True), times=99)
    async with a_client(comfyui.url, max_frame_bytes=1_000_000, max_output_bytes=3_000_000, max_retries=1) as client:
        with pytest.raises(Exception, match="more than 1000000 bytes"):
            await client.queue()
        with pytest.raises(DownloadFailed, match="larger than"):
            await client.fetch(put(comfyui, "a.bin", b"x"), str(tmp_path / "a"))
    assert not (tmp_path / "a").exists()


@pytest.mark.fault(31)
@pytest.mark.parametrize("fault", [Fault(reply="lost"), Fault(truncate=3), Fault(status=502), Fault(status=429)])
async def test_reading_is_repeated_when_the_connection_breaks(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, fault: Fault
) -> None:
    comfyui.faults.add("GET", "/queue", fault, times=2)
    view = await client.queue()
    assert (view.running, view.pending) == ((), ())


# --- what is known is kept ----------------------------------------------------------------------------------


async def test_a_warm_job_takes_three_requests_at_most(comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient) -> None:
    await client.probe()
    await client.node_info(["SaveImage", "EmptyImage"])
    for color in range(3):
        prompt_id = an_id()
        await client.probe()
        await client.node_info(["SaveImage", "EmptyImage"])
        before = len(comfyui.requests)
        async with client.listen(prompt_id) as events:
            await client.submit(picture(color), prompt_id=prompt_id)
            async for event in events:
                if isinstance(event, Said) and event.type == "executing" and event.data["node"] is None:
                    break
            assert await client.history(prompt_id) is not None
        asked = [record for record in comfyui.requests[before:] if record.path != "/ws"]
        assert len(asked) <= 3


@pytest.mark.fault(38)
async def test_a_restarted_server_is_asked_anew(comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient) -> None:
    async with client.listen(an_id()) as events:
        assert isinstance(await anext(events), SocketUp)
        await client.probe()
        await client.node_info(["SaveImage"])
        await comfyui.kill()
        down = await anext(events)
        assert isinstance(down, SocketDown)
        assert down.lost
        await comfyui.restart()
        async for event in events:
            if isinstance(event, SocketUp):
                break
        before = comfyui.count("GET", "/system_stats")
        await client.probe()
        await client.node_info(["SaveImage"])
        assert comfyui.count("GET", "/system_stats") == before + 1
        assert comfyui.count("GET", "/object_info/SaveImage") == 2


@pytest.mark.parametrize(
    ("version", "refused"), [("0.3.44", True), ("0.3.45", False), ("0.3.10", True), ("0.38.0", False)]
)
async def test_servers_from_before_our_protocol_are_told_so(version: str, refused: bool) -> None:
    async with ComfyUIEmulator(version=version) as comfyui, a_client(comfyui.url) as client:
        if refused:
            with pytest.raises(ServerTooOld, match=version) as caught:
                await client.probe()
            assert "update" in caught.value.hint
        else:
            info = await client.probe()
            assert info.version == version
            assert info.interrupts_by_id is (version == "0.38.0")


@pytest.mark.parametrize(("features", "jobs"), [(True, True), (True, False), (False, False)])
async def test_an_unknown_version_is_judged_by_what_the_server_can(features: bool, jobs: bool) -> None:
    async def answer(request: web.Request) -> web.Response:
        if request.path == "/system_stats":
            return web.json_response({"system": {"comfyui_version": "my own build"}, "devices": []})
        if request.path == "/features" and features:
            return web.json_response({"max_upload_size": 1048576.5})
        if request.path == "/api/jobs" and jobs:
            return web.json_response({"jobs": [], "pagination": {}})
        return web.Response(status=404)

    async with stand_in(answer) as url, a_client(url) as client:
        if not features:
            with pytest.raises(ServerTooOld):
                await client.probe()
            return
        info = await client.probe()
        assert (info.interrupts_by_id, info.cancels_jobs, info.max_upload_bytes) == (jobs, False, 1048576)


async def test_readers_of_the_queue_share_one_request(comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient) -> None:
    await asyncio.gather(*(client.queue() for _ in range(200)))
    assert comfyui.count("GET", "/queue") <= 2
