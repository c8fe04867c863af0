"""What the tests of the ComfyUI client are told with: clients under virtual time, workflows, what the server did."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from runcomfy.comfyui_workflow_client import ComfyUIWorkflowClient
from runcomfy.domain.job import FileRef, PromptId
from runcomfy.domain.secret import SecretUrl
from runcomfy.domain.settings import ComfySettings
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator

SETTINGS: Final = ComfySettings()
PAGE: Final = "<!DOCTYPE html><title>Welcome</title>"
"""What a gateway, or anything else, answers in ComfyUI's place."""


def a_client(url: str | SecretUrl, **changes: Any) -> ComfyUIWorkflowClient:
    """Return a client; `changes` are laid over the usual settings."""
    return ComfyUIWorkflowClient(url, replace(SETTINGS, **changes), clock=LoopClock())


def an_id() -> PromptId:
    """Return a prompt's id that no other prompt has."""
    return PromptId(str(uuid.uuid4()))


def picture(color: int = 1) -> dict[str, Any]:
    """Return a workflow that saves a picture at once."""
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": color}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "story"}},
    }


def slow(seconds: float = 60.0) -> dict[str, Any]:
    """Return a workflow that takes its time."""
    return {
        "1": {"class_type": "ProbeBlock", "inputs": {"seconds": seconds, "seed": 1}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }


async def until(condition: Callable[[], bool], *, what: str, within: float = 60.0) -> None:
    """Wait on the loop's clock for something to happen. Raises AssertionError that names what did not."""
    for _ in range(int(within * 100)):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"this did not happen within {within:g} s: {what}")


def put(comfyui: ComfyUIEmulator, name: str, content: bytes) -> FileRef:
    """Lay a file into the server's output folder."""
    (comfyui.folders.output / name).write_bytes(content)
    return FileRef(name)


def runs_of(comfyui: ComfyUIEmulator, prompt_id: str) -> int:
    """Return how often the server began a prompt."""
    return sum(1 for record in comfyui.run_log if record.prompt_id == prompt_id)
