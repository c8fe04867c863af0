"""What a hostile server sends about prompts that nobody listens to is kept for a moment, and only so much of it."""

from __future__ import annotations

import json

from runcomfy.adapters.comfyui.exchange import Address
from runcomfy.adapters.comfyui.socket import EARLY_BYTES, Socket
from runcomfy.adapters.comfyui.wire import read_frame
from runcomfy.domain.settings import ComfySettings


async def test_messages_about_strange_prompts_fill_no_memory() -> None:
    socket = Socket(Address("http://127.0.0.1:8188"), ComfySettings())
    for number in range(60):
        data = {"prompt_id": f"strange-{number}", "node": "1", "output": {"text": ["a" * 200_000]}}
        frame = read_frame(json.dumps({"type": "executed", "data": data}).encode())
        assert frame is not None
        socket._dispatch(frame)
    assert 0 < sum(early.size_bytes for early in socket._early.values()) <= EARLY_BYTES
    assert "strange-59" in socket._early
