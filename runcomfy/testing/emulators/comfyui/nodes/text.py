"""Nodes of the core that carry plain values and text."""

from __future__ import annotations

import json
from typing import Any

from runcomfy.testing.emulators.comfyui.nodes.base import InputSpec, NodeClass, NodeContext, NodeResult
from runcomfy.testing.emulators.comfyui.nodes.declare import SEED_MAX, combo, modern, real, text, whole
from runcomfy.testing.emulators.comfyui.nodes.values import write_files

INT_LIMIT = SEED_MAX // 2
TEXT_FORMATS = ("txt", "md", "json", "csv")


async def plain(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """The value itself."""
    return NodeResult([inputs["value"]])


async def preview_any(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """Anything as text."""
    source = inputs["source"]
    if isinstance(source, str):
        shown = source
    elif isinstance(source, bool | int | float):
        shown = str(source)
    elif source is None:
        shown = "None"
    else:
        try:
            shown = json.dumps(source, indent=4)
        except TypeError:
            shown = str(source)
    return NodeResult([shown], ui={"text": [shown]})


async def save_text(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """A text file, and the text itself."""
    content = inputs["text"]

    def save() -> list[dict[str, str]]:
        target = context.save_path(inputs["filename_prefix"])
        name = target.name(f".{inputs['format']}", underscore=False)
        return write_files(target, [(name, content.encode())], "output")

    return NodeResult([content], ui={"text": [content], "files": await context.in_thread(save)})


def _primitive(name: str, kind: str, declared: list[Any], title: str) -> NodeClass:
    return NodeClass(
        name,
        plain,
        InputSpec(required={"value": declared}),
        outputs=(kind,),
        display_name=title,
        category="utils/primitive",
        python_module="comfy_extras.nodes_primitive",
        extra_info=modern(1),
        since=(0, 3, 31),
    )


CLASSES = (
    _primitive("PrimitiveString", "STRING", ["STRING", {"multiline": False}], "String"),
    _primitive("PrimitiveStringMultiline", "STRING", ["STRING", {"multiline": True}], "String (Multiline)"),
    _primitive("PrimitiveInt", "INT", whole(0, -INT_LIMIT - 1, INT_LIMIT, control_after_generate=True), "Int"),
    _primitive("PrimitiveFloat", "FLOAT", real(0.0, -float(INT_LIMIT), float(INT_LIMIT), 0.1), "Float"),
    _primitive("PrimitiveBoolean", "BOOLEAN", ["BOOLEAN", {}], "Boolean"),
    NodeClass(
        "PreviewAny",
        preview_any,
        InputSpec(required={"source": ["*", {}]}),
        outputs=("STRING",),
        output_node=True,
        display_name="Preview as Text",
        category="utils",
        python_module="comfy_extras.nodes_preview_any",
        since=(0, 3, 31),
    ),
    NodeClass(
        "SaveText",
        save_text,
        InputSpec(
            required={
                "text": ["STRING", {"forceInput": True}],
                "filename_prefix": text("ComfyUI", multiline=False),
                "format": combo(TEXT_FORMATS, default="txt"),
            }
        ),
        outputs=("STRING",),
        output_names=("text",),
        output_node=True,
        display_name="Save Text",
        category="text",
        python_module="comfy_extras.nodes_text",
        extra_info=modern(1),
        since=(0, 28, 0),
    ),
)
