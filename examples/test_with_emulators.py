"""Tests of a program that uses runcomfy: no account, no GPU, no cost. Run them with pytest (and pytest-asyncio)."""

from pathlib import Path
from typing import Any

import runcomfy
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.emulators.comfyui.faults import Fault
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator


async def test_a_download_that_is_cut_is_taken_up_again(tmp_path: Path) -> None:
    async with ComfyUIEmulator() as server:
        server.faults.add("GET", "/view", Fault.cut(100))
        async with runcomfy.connect(server_url=server.url) as comfy:
            result = await comfy.run("image_invert", image="examples/render.png", out_dir=tmp_path)
        assert result.outputs[0].name == "inverted"
        assert server.count("GET", "/view") == 2


async def test_a_launch_whose_answer_is_lost_leaves_nothing_that_bills(tmp_path: Path) -> None:
    async with RunComfyEmulator(boot_time=0.5, delete_takes=0.5, comfyui_speed=50) as cloud:
        cloud.next_call("POST servers", reply="lost", works=True)
        settings: dict[str, Any] = {
            **cloud.environment(),
            "RUNCOMFY_STATE_DIR": str(tmp_path),
            "RUNCOMFY_POLL_INTERVAL": "0.2",
        }
        async with runcomfy.connect(**settings) as comfy:
            result = await comfy.run("image_invert", image="examples/render.png", out_dir=tmp_path)
        assert result.status == "done"
        assert len(cloud.launched) == 1
        assert not cloud.billing
