"""
What every client of ComfyUI must do with every server, as tests: `class TestMine(ComfyUIContract)` with a fixture
`server_url`, or with a fixture `comfyui` that gives another client.

Only nodes that every ComfyUI has are used, nothing is deleted, and no more than a few small pictures are made, so the
suite may be run against a server that people use. Needs pytest and pytest-asyncio.
"""

# ruff: noqa: D102, S101 - the names of the tests say what is shown, and asserts show it

from __future__ import annotations

import asyncio
import hashlib
import io
import uuid
from collections.abc import AsyncIterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from PIL import Image

from runcomfy.adapters.comfyui.client import ComfyUIWorkflowClient
from runcomfy.application.watcher import Ended, Watcher
from runcomfy.domain.exceptions import InputFileMissing, OutputMissing, PromptRejected
from runcomfy.domain.job import FileRef, PromptId
from runcomfy.domain.progress import NodeLabel, Progress
from runcomfy.domain.settings import ComfySettings
from runcomfy.ports.comfyui import ComfyUI
from runcomfy.testing.clock import LoopClock

SETTINGS = ComfySettings(poll_interval=timedelta(seconds=2), request_timeout=timedelta(seconds=20))


def a_prompt_id() -> PromptId:
    """Return an id that no server has seen."""
    return PromptId(str(uuid.uuid4()))


def a_picture(color: int | None = None) -> dict[str, Any]:
    """Return a graph that makes a small picture, by default one that no server has made before."""
    if color is None:
        color = uuid.uuid4().int % 0xFFFFFF
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": color}},
        "2": {
            "class_type": "SaveImage",
            "inputs": {"images": ["1", 0], "filename_prefix": "contract/picture"},
            "_meta": {"title": "Keep it"},
        },
    }


def an_inversion(name: str) -> dict[str, Any]:
    """Return a graph that inverts an uploaded picture."""
    return {
        "1": {"class_type": "LoadImage", "inputs": {"image": name}},
        "2": {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "contract/inverted"}},
    }


def file_of(outputs: Mapping[str, Any], node: str) -> FileRef:
    """Return the first picture of a node's outputs."""
    picture = outputs[node]["images"][0]
    return FileRef(picture["filename"], picture["subfolder"], picture["type"])


async def run(comfyui: ComfyUI, graph: Mapping[str, Any], *, told: list[Progress] | None = None) -> Ended:
    """Submit a graph and watch it to its end."""
    prompt_id = a_prompt_id()
    labels = {
        node: NodeLabel(entry.get("_meta", {}).get("title", ""), entry["class_type"]) for node, entry in graph.items()
    }
    async with comfyui.listen(prompt_id) as events:
        submitted = await comfyui.submit(graph, prompt_id=prompt_id)
        watcher = Watcher(comfyui, SETTINGS, clock=LoopClock())
        on_progress = told.append if told is not None else None
        return await watcher.watch(submitted.prompt_id, labels, events=events, on_progress=on_progress)


class ComfyUIContract:
    """Derive from it, and give `server_url`."""

    @pytest_asyncio.fixture
    async def comfyui(self, server_url: str) -> AsyncIterator[ComfyUI]:
        async with ComfyUIWorkflowClient(server_url, SETTINGS, clock=LoopClock()) as client:
            yield client

    # --- what is there ------------------------------------------------------------------------------------

    async def test_a_server_says_what_it_can_do(self, comfyui: ComfyUI) -> None:
        info = await comfyui.probe()
        assert info.version
        assert info.max_upload_bytes is None or info.max_upload_bytes > 0
        assert await comfyui.probe() is info, "asked once for each server process"

    async def test_classes_the_server_does_not_have_are_left_out(self, comfyui: ComfyUI) -> None:
        info = await comfyui.node_info(["SaveImage", "No such node /?#%", "EmptyImage"])
        assert set(info) == {"SaveImage", "EmptyImage"}
        assert "images" in info["SaveImage"]["input"]["required"]
        assert await comfyui.node_info([]) == {}
        assert {"SaveImage", "LoadImage"} <= set(await comfyui.class_names())

    # --- prompts ------------------------------------------------------------------------------------------

    async def test_a_picture_is_made_and_fetched_whole(self, comfyui: ComfyUI, tmp_path: Path) -> None:
        told: list[Progress] = []
        ended = await run(comfyui, a_picture(0x336699), told=told)
        target = tmp_path / "picture"
        fetched = await comfyui.fetch(file_of(ended.outputs, "2"), str(target))
        body = target.read_bytes()
        assert fetched.size_bytes == len(body)
        assert fetched.sha256 == hashlib.sha256(body).hexdigest()
        with Image.open(io.BytesIO(body)) as picture:
            assert picture.convert("RGB").getpixel((5, 5)) == (0x33, 0x66, 0x99)
        assert told[-1].percent == 100
        assert [p.percent for p in told] == sorted(p.percent for p in told)
        assert "Keep it" in {p.node_title for p in told}

    async def test_the_same_again_comes_from_the_cache(self, comfyui: ComfyUI) -> None:
        graph = a_picture()
        first = await run(comfyui, graph)
        second = await run(comfyui, graph)
        assert not first.cached
        assert second.cached == {"1", "2"}
        assert second.outputs == first.outputs
        assert second.started_at is not None
        assert second.ended_at is not None
        assert second.started_at <= second.ended_at

    async def test_the_history_knows_only_what_has_ended(self, comfyui: ComfyUI) -> None:
        assert await comfyui.history(a_prompt_id()) is None
        ended = await run(comfyui, a_picture())
        entry = await comfyui.history(ended.prompt_id)
        assert entry is not None
        assert entry.status == "success"
        queue = await comfyui.queue()
        assert ended.prompt_id not in (*queue.running, *queue.pending)

    async def test_many_prompts_share_one_client(self, comfyui: ComfyUI) -> None:
        graphs = [a_picture() for _ in range(12)]
        ended = await asyncio.gather(*(run(comfyui, graph) for graph in graphs))
        assert len({one.prompt_id for one in ended}) == 12
        assert len({file_of(one.outputs, "2").filename for one in ended}) == 12

    async def test_a_refusal_names_every_node_at_fault(self, comfyui: ComfyUI) -> None:
        graph = a_picture()
        graph["1"]["inputs"]["width"] = 0
        with pytest.raises(PromptRejected) as caught:
            await comfyui.submit(graph, prompt_id=a_prompt_id())
        [error] = caught.value.details["errors"]
        assert (error["node_id"], error["class_type"], error["input"]) == ("1", "EmptyImage", "width")
        unknown = {"1": {"class_type": "NoSuchNode", "inputs": {}}}
        with pytest.raises(PromptRejected, match="NoSuchNode"):
            await comfyui.submit(unknown, prompt_id=a_prompt_id())

    async def test_what_is_accepted_in_part_does_not_count(self, comfyui: ComfyUI) -> None:
        graph = a_picture()
        graph["3"] = {"class_type": "EmptyImage", "inputs": {**graph["1"]["inputs"], "height": 0}}
        graph["4"] = {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "contract/x"}}
        with pytest.raises(PromptRejected, match="height"):
            await comfyui.submit(graph, prompt_id=a_prompt_id())

    async def test_nothing_is_cancelled_that_is_not_there(self, comfyui: ComfyUI) -> None:
        assert await comfyui.cancel(a_prompt_id(), alone=True) is False
        ended = await run(comfyui, a_picture())
        assert await comfyui.cancel(ended.prompt_id, alone=True) is False

    # --- files --------------------------------------------------------------------------------------------

    async def test_an_uploaded_picture_is_used(self, comfyui: ComfyUI, tmp_path: Path) -> None:
        path = tmp_path / 'grün & "schräg" [output].png'
        Image.new("RGB", (16, 16), (250, 10, 0)).save(path)
        name = await comfyui.upload(str(path))
        assert await comfyui.upload(str(path)) == name
        ended = await run(comfyui, an_inversion(name))
        await comfyui.fetch(file_of(ended.outputs, "3"), str(tmp_path / "inverted"))
        with Image.open(tmp_path / "inverted") as picture:
            assert picture.convert("RGB").getpixel((3, 3)) == (5, 245, 255)

    async def test_other_content_gets_another_name(self, comfyui: ComfyUI, tmp_path: Path) -> None:
        path = tmp_path / "same.bin"
        names = set()
        for content in (b"one", b"two", b"one"):
            path.write_bytes(content + str(tmp_path).encode())
            names.add(await comfyui.upload(str(path)))
        assert len(names) == 2

    async def test_a_file_that_is_not_here_is_missed_before_anything_is_sent(
        self, comfyui: ComfyUI, tmp_path: Path
    ) -> None:
        with pytest.raises(InputFileMissing):
            await comfyui.upload(str(tmp_path / "nothing.png"))

    @pytest.mark.parametrize("name", ["no such file.png", "../../etc/passwd", "/etc/passwd", "a..png", "\0", ""])
    async def test_a_file_that_is_not_there_is_missing(self, comfyui: ComfyUI, name: str, tmp_path: Path) -> None:
        with pytest.raises(OutputMissing):
            await comfyui.fetch(FileRef(name), str(tmp_path / "x"))
        assert not (tmp_path / "x").exists()
