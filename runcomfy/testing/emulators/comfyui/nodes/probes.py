"""
The nodes of the small test pack that the recordings of real servers were made with, rebuilt from what they did.

They have no use of their own: each makes a server do one thing on purpose (report steps, fail, block an output, hold
still, run beside another, expand, send text, deliver without ui).
"""

from __future__ import annotations

import asyncio
import io
from typing import Any

from PIL import Image, ImageDraw

from runcomfy.testing.emulators.comfyui.nodes import meshes
from runcomfy.testing.emulators.comfyui.nodes.base import (
    ExecutionBlocker,
    InputSpec,
    Link,
    NodeClass,
    NodeContext,
    NodeResult,
)
from runcomfy.testing.emulators.comfyui.nodes.declare import choice, flag, real, seed, text, whole
from runcomfy.testing.emulators.comfyui.nodes.values import Images, Voxels, stable_random, write_files

MODULE = "custom_nodes.probe_nodes"
FAILURE_STEP = 0.02
"""Seconds between the steps of ProbeFail and of the nodes that ProbeExpand makes, as recorded."""

FAILURES: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (ValueError, RuntimeError, OSError, MemoryError, KeyError)
}


def picture_of(number: int) -> Images:
    """Return a small picture whose colour depends on a seed."""
    return Images((Image.new("RGB", (32, 32), tuple(stable_random("probe", number).randbytes(3))),))


def step_picture(step: int, steps: int) -> Image.Image:
    """Return the preview of a step: a bar that grows on a dark ground."""
    done = step / steps
    picture = Image.new("RGB", (96, 96), (20, 20, 60))
    ImageDraw.Draw(picture).rectangle((0, 0, round(96 * done) - 1, 95), fill=(220, 120 + round(28 * done), 30))
    # Through JPEG and back, as a sampler's preview would have been.
    data = io.BytesIO()
    picture.save(data, format="JPEG", quality=90)
    return Image.open(data)


async def steps(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """Wait and report, step by step; interrupts are noticed at each report."""
    count = inputs["steps"]
    for step in range(1, count + 1):
        await context.sleep(inputs["seconds_per_step"])
        await context.progress(step, count, step_picture(step, count) if inputs.get("preview") else None)
    images = inputs.get("image")
    return NodeResult([picture_of(inputs["seed"]) if images is None else images, count])


async def fail(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """Report some steps, then raise."""
    for step in range(1, inputs["after_steps"] + 1):
        await context.sleep(FAILURE_STEP)
        await context.progress(step, inputs["after_steps"])
    raise FAILURES[inputs["kind"]](inputs["message"])


async def gate(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """Let nothing through; with a message the server tells, without one it is silent."""
    return NodeResult([ExecutionBlocker(inputs["message"] or None)])


async def run_async(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """Steps of an async function: two such nodes overlap."""
    count = inputs["steps"]
    for step in range(1, count + 1):
        await context.sleep(inputs["seconds_per_step"])
        await context.progress(step, count)
    return NodeResult([picture_of(inputs["seed"])])


async def expand(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """Put a chain of ProbeSteps in its own place."""
    graph: dict[str, dict[str, Any]] = {}
    for number in range(1, inputs["length"] + 1):
        values: dict[str, Any] = {
            "steps": inputs["steps"],
            "seconds_per_step": FAILURE_STEP,
            "preview": False,
            "seed": (inputs["seed"] + number) % 2**64,
        }
        if number > 1:
            values["image"] = [str(number - 1), 0]
        graph[str(number)] = {"class_type": "ProbeSteps", "inputs": values}
    return NodeResult([Link(str(inputs["length"]), 0)], expand=graph)


async def say(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """Deliver a text, and send it as a text frame first if asked to."""
    await context.sleep(inputs.get("seconds", 0.0))
    if inputs["send_frame"]:
        await context.send_text(inputs["text"])
    return NodeResult([inputs["text"]], ui={"text": [inputs["text"]]})


async def block(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """Work without a sign of life; interrupts are not noticed."""
    await context.sleep(inputs["seconds"])
    return NodeResult([picture_of(inputs["seed"])])


async def voxels(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """A ball."""
    return NodeResult([Voxels(inputs["resolution"])])


async def save_cube(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """A cube as GLB, saved the way a third-party node would."""

    def save() -> list[dict[str, str]]:
        target = context.save_path(inputs["filename_prefix"])
        data = meshes.glb(meshes.cube(inputs["size"]), name=target.stem, extras={})
        return write_files(target, [(target.name(".glb"), data)], "output")

    return NodeResult([], ui={"3d": await context.in_thread(save)})


async def no_ui(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """An output node that has nothing to show."""
    await asyncio.sleep(0)
    return NodeResult([])


def _probe(name: str, run: Any, title: str, **more: Any) -> NodeClass:
    return NodeClass(name, run, display_name=f"Probe: {title}", category="probe", python_module=MODULE, **more)


CLASSES = (
    _probe(
        "ProbeSteps",
        steps,
        "Steps",
        inputs=InputSpec(
            required={
                "steps": whole(5, 1, 10000),
                "seconds_per_step": real(0.2, 0.0, 60.0, 0.01),
                "preview": flag(False),
                "seed": seed(),
            },
            optional={"image": ["IMAGE"]},
        ),
        outputs=("IMAGE", "INT"),
        output_names=("image", "steps"),
    ),
    _probe(
        "ProbeFail",
        fail,
        "Fail",
        inputs=InputSpec(
            required={
                "message": text("the probe failed on purpose"),
                "kind": choice(list(FAILURES)),
                "after_steps": whole(2, 0, 10000),
            },
            optional={"image": ["IMAGE"]},
        ),
        outputs=("IMAGE",),
        output_names=("image",),
    ),
    _probe(
        "ProbeGate",
        gate,
        "Gate",
        inputs=InputSpec(required={"image": ["IMAGE"], "message": text("blocked by the probe")}),
        outputs=("IMAGE",),
        output_names=("image",),
    ),
    _probe(
        "ProbeAsync",
        run_async,
        "Async",
        inputs=InputSpec(
            required={"steps": whole(3, 1, 10000), "seconds_per_step": real(0.1, 0.0, 60.0, 0.01), "seed": seed()}
        ),
        outputs=("IMAGE",),
        output_names=("image",),
        concurrent=True,
    ),
    _probe(
        "ProbeExpand",
        expand,
        "Expand",
        inputs=InputSpec(required={"length": whole(2, 1, 100), "steps": whole(2, 1, 10000), "seed": seed()}),
        outputs=("IMAGE",),
        output_names=("image",),
    ),
    _probe(
        "ProbeText",
        say,
        "Text",
        inputs=InputSpec(
            required={"text": text("hello"), "send_frame": flag(False)},
            optional={"seconds": real(0.0, 0.0, 600.0, 0.01)},
        ),
        outputs=("STRING",),
        output_names=("text",),
        output_node=True,
    ),
    _probe(
        "ProbeBlock",
        block,
        "Block",
        inputs=InputSpec(required={"seconds": real(1.0, 0.0, 600.0, 0.01), "seed": seed()}),
        outputs=("IMAGE",),
        output_names=("image",),
    ),
    _probe(
        "ProbeVoxel",
        voxels,
        "Voxel",
        inputs=InputSpec(required={"resolution": whole(16, 4, 256)}),
        outputs=("VOXEL",),
        output_names=("voxel",),
    ),
    _probe(
        "ProbeSaveGLB",
        save_cube,
        "Save GLB",
        inputs=InputSpec(required={"filename_prefix": text("mesh/probe"), "size": real(1.0, 0.01, 100.0, 0.01)}),
        output_node=True,
    ),
    _probe(
        "ProbeNoUi",
        no_ui,
        "No ui",
        inputs=InputSpec(required={"image": ["IMAGE"]}),
        output_node=True,
    ),
)
