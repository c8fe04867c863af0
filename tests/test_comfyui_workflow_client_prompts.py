"""Prompts that the ComfyUI client submits and cancels: one run each, whatever gets lost between. Time is virtual."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from runcomfy.comfyui_workflow_client import ComfyUIWorkflowClient
from runcomfy.domain.exceptions import PromptRejected, ServerRestarted, ServerUnreachable, WorkflowInvalid
from runcomfy.domain.progress import Said
from runcomfy.testing.comfyui_clients import SETTINGS, a_client, an_id, picture, runs_of, slow, until
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator, Fault

# --- submitting ---------------------------------------------------------------------------------------------


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
