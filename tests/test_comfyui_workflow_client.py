"""The ComfyUI client against a server, and a network, that misbehave. Time is virtual: minutes cost nothing."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import math
import os
import traceback
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from runcomfy.adapters.comfyui.upload import clean_name
from runcomfy.comfyui_workflow_client import ComfyUIWorkflowClient
from runcomfy.domain.exceptions import (
    AnswerUnreadable,
    DiskFull,
    DownloadFailed,
    InputFileInvalid,
    NotComfyUI,
    OutputMissing,
    PromptRejected,
    ServerRestarted,
    ServerTooOld,
    ServerUnreachable,
    SettingInvalid,
    WorkflowInvalid,
)
from runcomfy.domain.job import FileRef, PromptId
from runcomfy.domain.progress import Said, SocketDown, SocketUp
from runcomfy.domain.secret import SecretUrl
from runcomfy.domain.settings import ComfySettings
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator, Fault, SocketFault

SETTINGS = ComfySettings()
Elapsed = Callable[[], float]


@pytest_asyncio.fixture
async def comfyui() -> AsyncIterator[ComfyUIEmulator]:
    async with ComfyUIEmulator() as emulator:
        yield emulator


@pytest_asyncio.fixture
async def client(comfyui: ComfyUIEmulator) -> AsyncIterator[ComfyUIWorkflowClient]:
    async with a_client(comfyui.url) as client:
        yield client


def a_client(url: str | SecretUrl, **changes: Any) -> ComfyUIWorkflowClient:
    return ComfyUIWorkflowClient(url, replace(SETTINGS, **changes), clock=LoopClock())


def an_id() -> PromptId:
    return PromptId(str(uuid.uuid4()))


def picture(color: int = 1) -> dict[str, Any]:
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": color}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "story"}},
    }


def slow(seconds: float = 60.0) -> dict[str, Any]:
    return {
        "1": {"class_type": "ProbeBlock", "inputs": {"seconds": seconds, "seed": 1}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }


async def until(condition: Callable[[], bool], *, what: str, within: float = 60.0) -> None:
    """Wait on the loop's clock for something to happen."""
    for _ in range(int(within * 100)):
        if condition():
            return
        await asyncio.sleep(0.01)
    pytest.fail(f"this did not happen within {within:g} s: {what}")


def put(comfyui: ComfyUIEmulator, name: str, content: bytes) -> FileRef:
    """Lay a file into the server's output folder."""
    (comfyui.folders.output / name).write_bytes(content)
    return FileRef(name)


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


PAGE = "<!DOCTYPE html><title>Welcome</title>"


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


# --- submitting ---------------------------------------------------------------------------------------------


def runs_of(comfyui: ComfyUIEmulator, prompt_id: str) -> int:
    return sum(1 for record in comfyui.run_log if record.prompt_id == prompt_id)


@pytest.mark.fault(34)
@pytest.mark.parametrize(
    "fault",
    [
        Fault(reply="never"),
        Fault(reply="lost"),
        Fault(status=500),
        Fault(status=502),
        Fault(body=b"", content_type="application/json"),
        Fault(body=b'{"prompt_id": 5}', content_type="application/json"),
        Fault(truncate=10),
    ],
)
@pytest.mark.parametrize("queued", [True, False], ids=["queued", "not queued"])
async def test_a_lost_answer_is_no_second_run(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, fault: Fault, queued: bool
) -> None:
    comfyui.faults.add("POST", "/prompt", replace(fault, work=queued))
    prompt_id = an_id()
    async with client.listen(prompt_id):
        submitted = await client.submit(picture(), prompt_id=prompt_id)
        assert submitted.prompt_id == prompt_id
        await until(lambda: runs_of(comfyui, prompt_id) > 0, what="the prompt ran")
        await asyncio.sleep(5)
    assert runs_of(comfyui, prompt_id) == 1
    assert comfyui.count("POST", "/prompt") == (1 if queued else 2)


@pytest.mark.fault(34)
async def test_a_server_that_is_down_is_waited_for(comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient) -> None:
    await comfyui.kill()
    prompt_id = an_id()
    submitting = asyncio.create_task(client.submit(picture(), prompt_id=prompt_id))
    await asyncio.sleep(30)
    await comfyui.restart()
    assert (await submitting).prompt_id == prompt_id
    await until(lambda: runs_of(comfyui, prompt_id) == 1, what="the prompt ran")


async def test_a_server_that_stays_down_is_given_up(comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient) -> None:
    await comfyui.kill()
    began = asyncio.get_running_loop().time()
    with pytest.raises(ServerUnreachable):
        await client.submit(picture(), prompt_id=an_id())
    took = asyncio.get_running_loop().time() - began
    assert took == pytest.approx(SETTINGS.unreachable_timeout.total_seconds(), abs=3)


@pytest.mark.fault(34)
async def test_a_restart_in_the_middle_of_submitting_is_said(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient
) -> None:
    comfyui.faults.add("POST", "/prompt", Fault(reply="never"))
    prompt_id = an_id()
    async with client.listen(prompt_id):
        submitting = asyncio.create_task(client.submit(slow(), prompt_id=prompt_id))
        await asyncio.sleep(5)
        await comfyui.restart()
        with pytest.raises(ServerRestarted):
            await submitting
    assert comfyui.count("POST", "/prompt") == 1, "it may have run on the old server: nothing is sent again"


@pytest.mark.fault(35)
async def test_a_second_copy_in_the_queue_is_removed(comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient) -> None:
    first, prompt_id = an_id(), an_id()
    async with client.listen(first), client.listen(prompt_id):
        await client.submit(slow(10), prompt_id=first)
        comfyui.faults.add("POST", "/prompt", Fault(twice=True))
        await client.submit(picture(), prompt_id=prompt_id)
        assert (await client.queue()).pending == (prompt_id, prompt_id)
        assert (await client.queue()).pending == (prompt_id,)
        await asyncio.sleep(20)
    assert runs_of(comfyui, prompt_id) == 1


async def test_copies_of_other_peoples_prompts_are_left_alone(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient
) -> None:
    async with a_client(comfyui.url) as other:
        await other.submit(slow(10), prompt_id=an_id())
        comfyui.faults.add("POST", "/prompt", Fault(twice=True))
        await other.submit(picture(), prompt_id=an_id())
    for _ in range(3):
        assert len((await client.queue()).pending) == 2


async def test_a_500_that_stays_is_a_refusal(comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient) -> None:
    with pytest.raises(PromptRejected) as caught:
        await client.submit({"nodes": [], "links": []}, prompt_id=an_id())
    assert caught.value.details["status"] == 500


async def test_a_workflow_too_large_for_the_server_is_refused() -> None:
    async with ComfyUIEmulator(max_upload_size_mb=0.01) as comfyui, a_client(comfyui.url) as client:
        graph = picture()
        graph["2"]["inputs"]["filename_prefix"] = "x" * 20_000
        with pytest.raises(PromptRejected, match="larger"):
            await client.submit(graph, prompt_id=an_id())


@pytest.mark.parametrize("value", [float("nan"), object(), {1, 2}])
async def test_what_is_no_json_is_never_sent(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, value: object
) -> None:
    graph = picture()
    graph["1"]["inputs"]["color"] = value
    with pytest.raises(WorkflowInvalid):
        await client.submit(graph, prompt_id=an_id())
    assert comfyui.count("POST", "/prompt") == 0


async def test_what_is_accepted_in_part_is_taken_back(comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient) -> None:
    graph = slow()
    graph["3"] = {"class_type": "EmptyImage", "inputs": {"width": 0, "height": 8, "batch_size": 1, "color": 1}}
    graph["4"] = {"class_type": "PreviewImage", "inputs": {"images": ["3", 0]}}
    with pytest.raises(PromptRejected, match="in part") as caught:
        await client.submit(graph, prompt_id=an_id())
    assert caught.value.details["errors"][0]["input"] == "width"
    assert "not_taken_back" not in caught.value.details
    await asyncio.sleep(70)
    assert [record.outcome for record in comfyui.run_log] in ([], ["interrupted"])


async def test_a_server_that_chooses_its_own_id_is_followed(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient
) -> None:
    ours, theirs = an_id(), an_id()

    def other_id(body: bytes, _: int) -> bytes:
        return body.replace(ours.encode(), theirs.encode())

    comfyui.faults.add("POST", "/prompt", Fault(corrupt=other_id))
    async with client.listen(ours) as events:
        assert (await client.submit(slow(5), prompt_id=ours)).prompt_id == theirs
        await anext(events)
        comfyui.inject(None, f'{{"type": "execution_start", "data": {{"prompt_id": "{theirs}"}}}}', text=True)
        async with asyncio.timeout(5):
            async for event in events:
                if isinstance(event, Said) and event.data.get("prompt_id") == theirs:
                    break


# --- cancelling ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["0.3.50", "0.3.64", "0.10.0", "0.33.0"])
async def test_a_waiting_and_a_running_prompt_are_cancelled(version: str) -> None:
    async with ComfyUIEmulator(version=version) as comfyui, a_client(comfyui.url) as client:
        running, waiting = an_id(), an_id()
        steps = {
            "1": {
                "class_type": "ProbeSteps",
                "inputs": {"steps": 100, "seconds_per_step": 0.5, "preview": False, "seed": 1},
            },
            "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
        }
        async with client.listen(running), client.listen(waiting):
            await client.submit(steps, prompt_id=running)
            await client.submit(picture(), prompt_id=waiting)
            await asyncio.sleep(2)
            assert await client.cancel(waiting, alone=False) is True
            assert (await client.queue()).pending == ()
            # Before 0.3.57 an interrupt hits whoever runs: only on a machine of our own.
            alone_needed = version == "0.3.50"
            assert await client.cancel(running, alone=False) is not alone_needed
            if alone_needed:
                assert comfyui.count("POST", "/interrupt") == 0
                assert await client.cancel(running, alone=True) is True
            await asyncio.sleep(2)
        assert [record.outcome for record in comfyui.run_log] == ["interrupted"]


@pytest.mark.fault(35)
async def test_every_copy_is_cancelled(comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient) -> None:
    prompt_id = an_id()
    comfyui.faults.add("POST", "/prompt", Fault(twice=True))
    await client.submit(slow(5), prompt_id=prompt_id)
    await asyncio.sleep(1)
    assert await client.cancel(prompt_id, alone=False) is True
    await asyncio.sleep(60)
    assert [record.outcome for record in comfyui.run_log] == ["interrupted"]


async def test_a_submission_cancelled_in_between_can_still_be_taken_back(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient
) -> None:
    await client.submit(slow(20), prompt_id=an_id())
    prompt_id = an_id()
    comfyui.faults.add("POST", "/prompt", Fault(delay=2))
    submitting = asyncio.create_task(client.submit(picture(), prompt_id=prompt_id))
    await asyncio.sleep(1)
    submitting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await submitting
    assert await client.cancel(prompt_id, alone=False) is True
    await asyncio.sleep(60)
    assert runs_of(comfyui, prompt_id) == 0


async def test_only_our_own_prompt_is_interrupted_on_old_servers() -> None:
    async with ComfyUIEmulator(version="0.3.50") as comfyui, a_client(comfyui.url) as client:
        await client.submit(slow(5), prompt_id=an_id())
        assert await client.cancel(an_id(), alone=True) is False
        assert comfyui.count("POST", "/interrupt") == 0


def test_an_address_with_an_impossible_port_is_bad_input_and_prints() -> None:
    address = SecretUrl("http://127.0.0.1:99999")
    assert repr(address) == "SecretUrl('***')"
    with pytest.raises(SettingInvalid):
        ComfyUIWorkflowClient(address, SETTINGS, clock=LoopClock())


# --- uploading ----------------------------------------------------------------------------------------------


@pytest.mark.fault(53)
@pytest.mark.parametrize(
    "fault", [Fault(keep=10), Fault(reply="lost"), Fault(status=500), Fault(truncate=5), Fault(body=b"{}")]
)
async def test_a_cut_upload_is_made_good(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, fault: Fault, tmp_path: Path
) -> None:
    content = os.urandom(5000)
    (tmp_path / "a.png").write_bytes(content)
    comfyui.faults.add("POST", "/upload/image", fault)
    name = await client.upload(str(tmp_path / "a.png"))
    assert (comfyui.folders.input / name).read_bytes() == content


@pytest.mark.fault(53)
@pytest.mark.parametrize(
    "fault",
    [
        Fault(work=False, status=200, body=b""),
        Fault(work=False, status=405, body=b""),
        Fault(endless=True, body=b"[" * 1000),
    ],
)
async def test_a_proxy_that_hides_lengths_does_not_hide_an_upload(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, fault: Fault, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(os.urandom(5000))
    comfyui.faults.add("HEAD", "/view", fault, times=math.inf)
    await client.upload(str(tmp_path / "a.png"))
    assert comfyui.count("POST", "/upload/image") == 1
    (tmp_path / "b.png").write_bytes(os.urandom(5000))
    comfyui.faults.add("POST", "/upload/image", Fault(keep=10))
    name = await client.upload(str(tmp_path / "b.png"))
    assert (comfyui.folders.input / name).read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.fault(32)
async def test_an_upload_that_is_looked_up_in_an_answer_without_an_end_says_that(
    comfyui: ComfyUIEmulator, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(os.urandom(5000))
    comfyui.faults.add("*", "/view", Fault(endless=True, body=b"[" * 1000), times=math.inf)
    async with a_client(comfyui.url, max_frame_bytes=10_000, max_retries=0) as client:
        with pytest.raises(AnswerUnreadable, match="sends more than 10000 bytes where a short answer was expected"):
            await client.upload(str(tmp_path / "a.png"))


@pytest.mark.fault(53)
async def test_a_name_taken_by_other_content_is_not_used(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, tmp_path: Path
) -> None:
    content = b"right" * 100
    (tmp_path / "a.png").write_bytes(content)
    taken = f"{hashlib.sha256(content).hexdigest()[:20]}_a.png"
    (comfyui.folders.input / taken).write_bytes(b"wrong" * 100)
    name = await client.upload(str(tmp_path / "a.png"))
    assert name != taken
    assert (comfyui.folders.input / name).read_bytes() == content


async def test_the_same_content_is_sent_once(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, tmp_path: Path
) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"same")
    names = await asyncio.gather(*(client.upload(str(tmp_path / name)) for name in ("a.png", "b.png") * 10))
    assert len(set(names)) == 1
    assert comfyui.count("POST", "/upload/image") == 1


async def test_one_cancelled_upload_does_not_hurt_the_other(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(b"same")
    comfyui.faults.add("POST", "/upload/image", Fault(delay=5))
    first = asyncio.create_task(client.upload(str(tmp_path / "a.png")))
    second = asyncio.create_task(client.upload(str(tmp_path / "a.png")))
    await asyncio.sleep(1)
    first.cancel()
    assert await second


async def test_what_the_server_will_not_take_is_not_sent(tmp_path: Path) -> None:
    (tmp_path / "big.png").write_bytes(bytes(200_000))
    (tmp_path / "empty.png").write_bytes(b"")
    async with ComfyUIEmulator(max_upload_size_mb=0.1) as comfyui, a_client(comfyui.url) as client:
        with pytest.raises(InputFileInvalid, match="more than"):
            await client.upload(str(tmp_path / "big.png"))
        assert comfyui.count("POST", "/upload/image") == 1, "not asked before: the server said 413"
        await client.probe()
        with pytest.raises(InputFileInvalid, match="bytes this server takes"):
            await client.upload(str(tmp_path / "big.png"))
        with pytest.raises(InputFileInvalid, match="empty"):
            await client.upload(str(tmp_path / "empty.png"))
        assert comfyui.count("POST", "/upload/image") == 1


async def test_a_large_file_is_streamed(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, tmp_path: Path
) -> None:
    content = os.urandom(1024) * (9 * 1024)
    (tmp_path / "big.bin").write_bytes(content)
    name = await client.upload(str(tmp_path / "big.bin"), kind="file")
    assert (comfyui.folders.input / name).stat().st_size == len(content)


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("photo.png", "photo.png"),
        ("Bild größer.JPG", "Bild größer.JPG"),
        ('a"b\\c/d.png', "a_b_c_d.png"),
        ("..", "file"),
        ("...hidden", "hidden"),
        ("a..png", "a.png"),
        ("\x00\x1b[31m.png", "(31m.png"),
        ("name [output]", "name (output)"),
        (".png", "png"),
        ("日本語.webp", "日本語.webp"),
        ("\udce4.png", "png"),
        ("x. .y", "x.y"),
    ],
)
def test_names_are_made_safe(name: str, clean: str) -> None:
    assert clean_name(name) == clean


@given(st.text(max_size=300) | st.text("a. \xa0/\t\x00", max_size=12))
def test_any_name_becomes_one_that_the_server_takes(name: str) -> None:
    clean = clean_name(name)
    assert clean
    assert len(clean.encode()) <= 120
    assert ".." not in clean
    assert not set(clean) & set("/\\\"'\x00\r\n")
    assert not clean.startswith(".")
    assert clean == clean_name(clean)


# --- downloading --------------------------------------------------------------------------------------------

CONTENT = bytes(range(256)) * 4096  # 1 MiB


async def fetched(client: ComfyUIWorkflowClient, file: FileRef, folder: Path) -> bytes:
    target = folder / str(uuid.uuid4())
    got = await client.fetch(file, str(target))
    body = target.read_bytes()
    assert (got.size_bytes, got.sha256) == (len(body), hashlib.sha256(body).hexdigest())
    assert os.name == "nt" or target.stat().st_mode & 0o777 == 0o600
    return body


@pytest.mark.fault(49)
async def test_a_cut_download_goes_on_where_it_stopped(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, tmp_path: Path
) -> None:
    file = put(comfyui, "a.bin", CONTENT)
    comfyui.faults.add("GET", "/view", Fault(truncate=300_000), times=3)
    assert await fetched(client, file, tmp_path) == CONTENT


@pytest.mark.fault(49)
@pytest.mark.parametrize("claim", [len(CONTENT) + 50, len(CONTENT) - 50])
async def test_a_wrong_length_once_is_made_good(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, tmp_path: Path, claim: int
) -> None:
    file = put(comfyui, "a.bin", CONTENT)
    comfyui.faults.add("GET", "/view", Fault(claim=claim))
    assert await fetched(client, file, tmp_path) == CONTENT


@pytest.mark.fault(49)
async def test_a_download_that_is_always_cut_fails_and_leaves_nothing(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, tmp_path: Path
) -> None:
    file = put(comfyui, "a.bin", CONTENT)
    comfyui.faults.add("GET", "/view", Fault(truncate=0), times=99)
    with pytest.raises(DownloadFailed) as caught:
        await client.fetch(file, str(tmp_path / "a"))
    assert caught.value.hint
    assert not any(tmp_path.iterdir())  # noqa: ASYNC240


@pytest.mark.fault(50)
async def test_a_page_in_place_of_a_picture_is_no_result(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, tmp_path: Path
) -> None:
    file = put(comfyui, "a.png", CONTENT)
    comfyui.faults.add("GET", "/view", Fault(body=PAGE.encode()), times=2)
    assert await fetched(client, file, tmp_path) == CONTENT
    comfyui.faults.add("GET", "/view", Fault(body=PAGE.encode()), times=99)
    with pytest.raises(DownloadFailed, match="web page") as caught:
        await client.fetch(file, str(tmp_path / "b"))
    assert "text/html" in str(caught.value.details["content_type"])
    assert not (tmp_path / "b").exists()


@pytest.mark.fault(52)
async def test_a_file_that_changes_while_it_is_read_is_read_again(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, tmp_path: Path
) -> None:
    file = put(comfyui, "a.bin", CONTENT)
    path = comfyui.folders.output / "a.bin"
    newer = CONTENT[::-1]

    moments = itertools.count(1)

    def change(body: bytes, _: int) -> bytes:
        path.write_bytes(newer)
        os.utime(path, (moment := next(moments), moment))
        return body

    comfyui.faults.add("GET", "/view", Fault(corrupt=change))
    assert await fetched(client, file, tmp_path) == newer
    comfyui.faults.add("GET", "/view", Fault(corrupt=change), times=99)
    with pytest.raises(DownloadFailed, match="changes while it is read"):
        await client.fetch(file, str(tmp_path / "b"))


@pytest.mark.fault(52)
async def test_parts_of_two_files_are_never_joined(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, tmp_path: Path
) -> None:
    file = put(comfyui, "a.bin", CONTENT)
    path = comfyui.folders.output / "a.bin"
    newer = CONTENT[::-1]

    def change(body: bytes, _: int) -> bytes:
        path.write_bytes(newer)
        os.utime(path, (1, 1))
        return body

    comfyui.faults.add("GET", "/view", Fault(corrupt=change, truncate=500_000))
    assert await fetched(client, file, tmp_path) == newer


@pytest.mark.fault(32)
async def test_a_download_that_drips_ends_at_its_deadline(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, tmp_path: Path
) -> None:
    file = put(comfyui, "a.bin", CONTENT)
    comfyui.faults.add("GET", "/view", Fault(rate=10), times=99)
    began = asyncio.get_running_loop().time()
    with pytest.raises(DownloadFailed, match="longer than 1800 s"):
        await client.fetch(file, str(tmp_path / "a"))
    assert asyncio.get_running_loop().time() - began == pytest.approx(1800, abs=2)
    assert not any(tmp_path.iterdir())  # noqa: ASYNC240


async def test_results_survive_a_restart_in_the_middle_of_the_download(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, tmp_path: Path
) -> None:
    file = put(comfyui, "a.bin", CONTENT)
    comfyui.faults.add("GET", "/view", Fault(rate=100_000))
    fetching = asyncio.create_task(fetched(client, file, tmp_path))
    await asyncio.sleep(3.5)
    await comfyui.kill()
    await asyncio.sleep(30)
    await comfyui.restart()
    assert await fetching == CONTENT


async def test_an_empty_file_is_no_result(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, tmp_path: Path
) -> None:
    with pytest.raises(DownloadFailed, match="empty"):
        await client.fetch(put(comfyui, "a.bin", b""), str(tmp_path / "a"))


async def test_a_result_over_the_limit_is_not_fetched(comfyui: ComfyUIEmulator, tmp_path: Path) -> None:
    async with a_client(comfyui.url, max_output_bytes=1000) as client:
        with pytest.raises(DownloadFailed, match="larger than the 1000 bytes"):
            await client.fetch(put(comfyui, "a.bin", CONTENT), str(tmp_path / "a"))


async def test_nothing_is_written_over(comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(Exception, match="could not create"):
        await client.fetch(put(comfyui, "a.bin", CONTENT), str(tmp_path / "a"))
    assert (tmp_path / "a").read_text() == "mine"


@pytest.mark.fault(54)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
async def test_a_full_disk_is_said(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The file is opened as always; only where its bytes go is another place.
    monkeypatch.setattr(
        "runcomfy.adapters.comfyui.download.open_new",
        lambda _: open("/dev/full", "wb", buffering=0),  # noqa: PTH123, SIM115
    )
    with pytest.raises(DiskFull):
        await client.fetch(put(comfyui, "a.bin", CONTENT), str(tmp_path / "a"))


async def test_folders_in_names_go_where_the_server_wants_them(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, tmp_path: Path
) -> None:
    folder = comfyui.folders.output / "mesh" / "a b%date%"
    folder.mkdir(parents=True)
    (folder / "x+y & z?.glb").write_bytes(b"glTF")
    assert await fetched(client, FileRef("a b%date%/x+y & z?.glb", "mesh"), tmp_path) == b"glTF"
    with pytest.raises(OutputMissing):
        await client.fetch(FileRef("x+y & z?.glb", "mesh"), str(tmp_path / "a"))


# --- the socket ---------------------------------------------------------------------------------------------


async def test_a_socket_is_kept_between_jobs(comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient) -> None:
    for _ in range(5):
        async with client.listen(an_id()) as events:
            assert isinstance(await anext(events), SocketUp)
    assert comfyui.count("GET", "/ws") == 1


@pytest.mark.fault(46)
async def test_a_cut_socket_comes_back_and_repeats_nothing(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient
) -> None:
    prompt_id = an_id()
    async with client.listen(prompt_id) as events:
        await client.submit(slow(30), prompt_id=prompt_id)
        await asyncio.sleep(1)
        comfyui.cut_sockets()
        await asyncio.sleep(60)
        seen: list[Any] = []
        async with asyncio.timeout(1):
            async for event in events:
                seen.append(event)
                if isinstance(event, Said) and event.type == "executing" and event.data["node"] is None:
                    break
    kinds = [type(event) for event in seen]
    assert kinds.count(SocketDown) == 1
    assert kinds.count(SocketUp) == 2
    starts = [event for event in seen if isinstance(event, Said) and event.type == "execution_start"]
    assert len(starts) == 1
    assert len(comfyui.process.hub.open) == 1


@pytest.mark.fault(45)
async def test_a_half_open_socket_is_noticed(comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient) -> None:
    comfyui.faults.add_socket(SocketFault(silent_after=1))
    async with client.listen(an_id()) as events:
        assert isinstance(await anext(events), SocketUp)
        async with asyncio.timeout(3 * SETTINGS.ping_interval.total_seconds()):
            assert isinstance(await anext(events), SocketDown)
            assert isinstance(await anext(events), SocketUp)


@pytest.mark.fault(44)
async def test_a_refused_socket_stops_nobody(comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient) -> None:
    comfyui.faults.add_socket(SocketFault(refuse=403), times=1000)
    prompt_id = an_id()
    async with client.listen(prompt_id) as events:
        down = await anext(events)
        assert isinstance(down, SocketDown)
        assert "403" in down.reason
        assert not down.lost
        await client.submit(picture(), prompt_id=prompt_id)
        await asyncio.sleep(600)
    assert runs_of(comfyui, prompt_id) == 1
    assert comfyui.count("GET", "/ws") < 100, "attempts keep a growing distance"


@pytest.mark.fault(47)
@pytest.mark.threat("S10")
async def test_a_frame_too_large_costs_the_connection_and_nothing_else(comfyui: ComfyUIEmulator) -> None:
    async with a_client(comfyui.url, max_frame_bytes=100_000) as client, client.listen(an_id()) as events:
        assert isinstance(await anext(events), SocketUp)
        comfyui.inject(None, b"\0" * 200_000)
        assert isinstance(await anext(events), SocketDown)
        assert isinstance(await anext(events), SocketUp)


@pytest.mark.fault(48)
async def test_senseless_frames_are_dropped_and_counted(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient
) -> None:
    prompt_id = an_id()
    async with client.listen(prompt_id) as events:
        assert isinstance(await anext(events), SocketUp)
        senseless: list[bytes] = [b"{", b"\xff\xfe\xfd", b'{"type": "x", "data": NaN}', b"[" * 1_000_000]
        for raw in senseless:
            comfyui.inject(None, raw, text=True)
        comfyui.inject(None, b"\0\0\0\x04\xff\xff\xff\xff")
        comfyui.inject(None, f'{{"type": "execution_start", "data": {{"prompt_id": "{prompt_id}"}}}}')
        event = await anext(events)
        assert isinstance(event, Said)
        assert event.type == "execution_start"
    assert client.dropped == 5
    assert comfyui.count("GET", "/ws") == 1


@pytest.mark.fault(47)
@pytest.mark.threat("S10")
async def test_a_flood_of_pictures_drowns_no_message(comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient) -> None:
    prompt_id = an_id()
    async with client.listen(prompt_id) as events:
        await client.submit(slow(1), prompt_id=prompt_id)
        await asyncio.sleep(0.5)
        for step in range(50):
            for _ in range(100):
                comfyui.inject(None, b"\0\0\0\1\0\0\0\1" + bytes(1000))
            message = f'{{"type": "pack.news", "data": {{"prompt_id": "{prompt_id}", "step": {step}}}}}'
            comfyui.inject(None, message)
        await asyncio.sleep(1)
        seen = []
        async with asyncio.timeout(1):
            async for event in events:
                seen.append(event)
                if isinstance(event, Said) and event.data.get("step") == 49:
                    break
    steps = [event.data["step"] for event in seen if isinstance(event, Said) and event.type == "pack.news"]
    assert steps == list(range(50))
    assert len(seen) < 250, "of pictures that nobody looked at only the newest was kept"


@pytest.mark.fault(47)
async def test_a_listener_that_does_not_read_costs_little(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient
) -> None:
    prompt_id = an_id()
    async with client.listen(prompt_id) as events:
        for number in range(3000):
            kind = "progress" if number % 3 else "pack.news"
            data = {"prompt_id": prompt_id, "node": "1", "value": number, "max": 3000, "number": number}
            comfyui.inject(None, json.dumps({"type": kind, "data": data}))
        await asyncio.sleep(10)
        comfyui.inject(None, f'{{"type": "executing", "data": {{"prompt_id": "{prompt_id}", "node": null}}}}')
        await asyncio.sleep(1)
        seen = []
        async for event in events:
            seen.append(event)
            if isinstance(event, Said) and event.type == "executing":
                break
    assert len(seen) <= 512
    newest = [event.data["value"] for event in seen if isinstance(event, Said) and event.type == "progress"]
    assert newest[-1] == 2999, "of progress the newest is what counts"
    assert client.dropped > 0


async def test_messages_read_before_the_answer_are_kept(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient
) -> None:
    early = an_id()
    async with client.listen(an_id()) as events:
        await anext(events)
        comfyui.inject(None, f'{{"type": "execution_start", "data": {{"prompt_id": "{early}"}}}}')
        await asyncio.sleep(1)
        async with client.listen(early) as kept:
            assert isinstance(await anext(kept), SocketUp)
            event = await anext(kept)
            assert isinstance(event, Said)
            assert event.type == "execution_start"


async def test_a_socket_the_server_forgot_is_renewed_but_not_too_often(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient
) -> None:
    async with client.listen(an_id()) as events:
        assert isinstance(await anext(events), SocketUp)
        for _ in range(10):
            client.renew_socket("it says nothing")
            await asyncio.sleep(1)
        down, up = await anext(events), await anext(events)
        assert isinstance(down, SocketDown)
        assert not down.lost, "we closed it ourselves: no sign of a restart"
        assert isinstance(up, SocketUp)
    assert comfyui.count("GET", "/ws") == 2
    assert len(comfyui.process.hub.open) == 1


async def test_closing_twice_is_harmless(comfyui: ComfyUIEmulator) -> None:
    client = a_client(comfyui.url)
    async with client.listen(an_id()):
        pass
    await client.close()
    await client.close()
    await until(lambda: not comfyui.process.hub.open, what="the server saw the socket close")
    with pytest.raises(ServerUnreachable, match="closed"):
        await client.queue()
