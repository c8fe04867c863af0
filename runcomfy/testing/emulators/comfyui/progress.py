"""Progress of one running prompt: the node states, what goes to the sockets, and how often."""

from __future__ import annotations

import asyncio
import io
import json
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from PIL import Image, ImageOps

from runcomfy.testing.emulators.comfyui.graph import RunningGraph
from runcomfy.testing.emulators.comfyui.sockets import SocketHub
from runcomfy.testing.emulators.comfyui.versions import Capabilities

PREVIEW_SIZE = 512
"""Longest edge of a preview; `--preview-size` on the real server."""

LEAST_INTERVAL = 0.1
"""Seconds between two reports of a node that are neither first, last nor with a picture (since 0.9.2)."""

LEAST_STEP_PERCENT = 0.5


class BinaryEvent(IntEnum):
    """First word of a binary frame."""

    PREVIEW = 1
    TEXT = 3
    PREVIEW_WITH_METADATA = 4


@dataclass(slots=True)
class NodeState:
    """Where a node stands. Numbers keep the type they were reported with, as on the wire."""

    value: float
    maximum: float
    state: str = "running"


def encode_preview(picture: Image.Image) -> bytes:
    """The format word and the picture as JPEG, as both preview events carry it."""
    if max(picture.size) > PREVIEW_SIZE:
        picture = ImageOps.contain(picture, (PREVIEW_SIZE, PREVIEW_SIZE))
    data = io.BytesIO()
    picture.convert("RGB").save(data, format="JPEG", quality=95)
    return struct.pack(">I", 1) + data.getvalue()


class PromptProgress:
    """The progress registry of one prompt."""

    def __init__(
        self,
        prompt_id: str,
        client_id: Any,
        graph: RunningGraph,
        hub: SocketHub,
        capabilities: Capabilities,
    ) -> None:
        self._prompt_id = prompt_id
        self._client_id = client_id
        self._graph = graph
        self._hub = hub
        self._can = capabilities
        self._nodes: dict[str, NodeState] = {}
        self._reported: dict[str, tuple[float, float]] = {}

    def start(self, node_id: str) -> None:
        """A node begins."""
        self._nodes[node_id] = NodeState(0.0, 1.0)
        self._send_state()

    def finish(self, node_id: str) -> None:
        """A node ended, or its result came from the cache."""
        state = self._nodes.setdefault(node_id, NodeState(1, 1))
        state.state = "finished"
        state.value = state.maximum
        self._send_state()

    def due(self, node_id: str, value: float, maximum: float, has_picture: bool) -> bool:
        """Whether the server's helper lets this report through."""
        now = asyncio.get_running_loop().time()
        last = self._reported.get(node_id)
        if self._can.throttled_progress and last is not None and not has_picture and value < maximum:
            percent = abs(value - last[1]) / max(maximum, 1e-9) * 100
            if now - last[0] < LEAST_INTERVAL or percent < LEAST_STEP_PERCENT:
                return False
        self._reported[node_id] = (now, value)
        return True

    def report(self, node_id: str, value: float, maximum: float, encoded: bytes | None) -> None:
        """Tell the owner's socket, or everybody if the prompt has no owner."""
        self._nodes[node_id] = NodeState(value, maximum)
        self._send_state()
        with_metadata = self._can.modern_progress and self._hub.declared(self._client_id, "supports_preview_metadata")
        if encoded is not None and with_metadata:
            metadata = json.dumps({**self._identity(node_id), "image_type": "image/jpeg"}).encode()
            head = struct.pack(">II", BinaryEvent.PREVIEW_WITH_METADATA, len(metadata))
            self._hub.send_bytes(head + metadata + encoded[4:], self._client_id)
        self._hub.send(
            "progress",
            {"value": value, "max": maximum, "prompt_id": self._prompt_id, "node": node_id},
            self._client_id,
        )
        if encoded is not None and not with_metadata:
            self._hub.send_bytes(struct.pack(">I", BinaryEvent.PREVIEW) + encoded, self._client_id)

    def text(self, node_id: str, text: str) -> None:
        """Send a text frame to everybody."""
        if self._can.text_frames:
            name = node_id.encode()
            head = struct.pack(">II", BinaryEvent.TEXT, len(name))
            self._hub.send_bytes(head + name + text.encode(), None)

    def _identity(self, node_id: str) -> dict[str, Any]:
        return {
            "node_id": node_id,
            "prompt_id": self._prompt_id,
            "display_node_id": self._graph.real(node_id),
            "parent_node_id": self._graph.parent(node_id),
            "real_node_id": self._graph.real(node_id),
        }

    def _send_state(self) -> None:
        if not self._can.modern_progress:
            return
        nodes = {
            node_id: {
                "value": state.value,
                "max": state.maximum,
                "state": state.state,
                **self._identity(node_id),
            }
            for node_id, state in self._nodes.items()
        }
        self._hub.send("progress_state", {"prompt_id": self._prompt_id, "nodes": nodes}, self._client_id)
