"""The ComfyUI client's socket: cut, silent, refused or flooded, no message that counts is missed. Time is virtual."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from runcomfy.comfyui_workflow_client import ComfyUIWorkflowClient
from runcomfy.domain.exceptions import ServerUnreachable
from runcomfy.domain.progress import Said, SocketDown, SocketUp
from runcomfy.testing.comfyui_clients import SETTINGS, a_client, an_id, picture, runs_of, slow, until
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator, SocketFault


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
