"""Nodes of the real server's core that carry, show and save text and plain values."""

from __future__ import annotations

import json
import sys
from typing import Any

from runcomfy.testing.emulators.comfyui.nodes.base import InputSpec, NodeClass, NodeContext, NodeResult
from runcomfy.testing.emulators.comfyui.nodes.declare import Declared, aliases, combo, modern, text
from runcomfy.testing.emulators.comfyui.nodes.values import write_files

PRIMITIVES = "comfy_extras.nodes_primitive"


async def pass_on(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """Deliver the one input as it is."""
    return NodeResult([inputs["value"]])


def readable(value: Any) -> str:
    """Return a value of any type as text: plain ones as they are, the rest as JSON if JSON can hold them."""
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, bool | int | float):
        return str(value)
    try:
        return json.dumps(value, indent=4)
    except (TypeError, ValueError):
        return str(value)


async def preview_any(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """Show a value of any type, and deliver what was shown."""
    shown = await context.in_thread(readable, inputs["source"])
    return NodeResult([shown], ui={"text": [shown]})


def file_content(value: str, form: str) -> str:
    """Return what SaveText writes: JSON indented if it is JSON, anything else unchanged."""
    if form == "json":
        try:
            return json.dumps(json.loads(value), indent=2, ensure_ascii=False)
        except json.JSONDecodeError:
            return value
    return value


async def save_text(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """Write a text file; show the text beside the file."""

    def save() -> list[dict[str, str]]:
        target = context.save_path(inputs["filename_prefix"], width=1, height=1)
        data = file_content(inputs["text"], inputs["format"]).encode()
        return write_files(target, [(target.name(f".{inputs['format']}", underscore=False), data)], "output")

    return NodeResult([inputs["text"]], ui={"text": [inputs["text"]], "files": await context.in_thread(save)})


def _primitive(name: str, title: str, declared: Declared) -> NodeClass:
    return NodeClass(
        name,
        pass_on,
        InputSpec(required={"value": declared}),
        outputs=(declared[0],),
        display_name=title,
        category="utils/primitive",
        python_module=PRIMITIVES,
        extra_info=modern(1),
        since=(0, 3, 30),
    )


CLASSES = (
    _primitive("PrimitiveString", "String", text(multiline=False)),
    _primitive("PrimitiveStringMultiline", "String (Multiline)", text(multiline=True)),
    _primitive(
        "PrimitiveInt", "Int", ["INT", {"min": -sys.maxsize, "max": sys.maxsize, "control_after_generate": True}]
    ),
    _primitive("PrimitiveFloat", "Float", ["FLOAT", {"min": -sys.maxsize, "max": sys.maxsize, "step": 0.1}]),
    _primitive("PrimitiveBoolean", "Boolean", ["BOOLEAN", {}]),
    NodeClass(
        "PreviewAny",
        preview_any,
        InputSpec(required={"source": ["*", {}]}),
        outputs=("STRING",),
        output_node=True,
        display_name="Preview as Text",
        category="utilities",
        python_module="comfy_extras.nodes_preview_any",
        extra_info=aliases("show output", "inspect", "debug", "print value", "show text"),
    ),
    NodeClass(
        "SaveText",
        save_text,
        InputSpec(
            required={
                "text": text(multiline=False, forceInput=True),
                "filename_prefix": text("ComfyUI", multiline=False),
                "format": combo(["txt", "md", "json"], default="txt"),
            }
        ),
        outputs=("STRING",),
        output_names=("text",),
        output_node=True,
        display_name="Save Text",
        category="text",
        description="Save text content to a file in the output directory.",
        python_module="comfy_extras.nodes_text",
        extra_info=modern(1, aliases=["save text", "write text", "export text"]),
        since=(0, 28, 0),
    ),
)
