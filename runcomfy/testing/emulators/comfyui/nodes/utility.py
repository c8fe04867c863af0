"""Nodes that no real server has: they make the emulated one slow, silent or faulty, and say so in their names."""

from __future__ import annotations

from typing import Any

from runcomfy.testing.emulators.comfyui.nodes.base import InputSpec, NodeClass, NodeContext, NodeResult
from runcomfy.testing.emulators.comfyui.nodes.declare import choice, flag, real, seed, text, whole
from runcomfy.testing.emulators.comfyui.nodes.pictures import preview_frame, render
from runcomfy.testing.emulators.comfyui.nodes.values import Images

MODULE = "custom_nodes.runcomfy_emulator"
FAILURE_KINDS = ("error", "oom", "cuda")
FAILURE_STEP = 0.12
"""Seconds between its steps: just above what the server's throttle lets through, so that each is seen."""

# Failures of a real GPU have these type names, by which clients tell them apart.
OutOfMemoryError = type("OutOfMemoryError", (RuntimeError,), {"__module__": "torch"})
AcceleratorError = type("AcceleratorError", (RuntimeError,), {"__module__": "torch"})

OOM_TEXT = (
    "CUDA out of memory. Tried to allocate 2.25 GiB. GPU 0 has a total capacity of 15.77 GiB of which 1.02 GiB is"
    " free. Including non-PyTorch memory, this process has 14.74 GiB memory in use. Of the allocated memory 14.02 GiB"
    " is allocated by PyTorch, and 241.07 MiB is reserved by PyTorch but unallocated. If reserved but unallocated"
    " memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  See"
    " documentation for Memory Management "
    " (https://pytorch.org/docs/stable/notes/cuda.html#environment-variables)\nThis error means you ran out of memory"
    " on your GPU.\n\nTIPS: If the workflow worked before you might have accidentally set the batch_size to a large"
    " number."
)
CUDA_TEXT = (
    "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported at"
    " some other API call, so the stacktrace below might be incorrect.\nFor debugging consider passing"
    " CUDA_LAUNCH_BLOCKING=1\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."
)


async def delay(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """Take that long, in that many steps, then pass the picture on or draw one."""
    steps, images = inputs["steps"], inputs.get("image")
    if images is None:
        images = Images((await context.in_thread(render, None, "a delay", inputs["seed"], 20, 128, 128),))
    for step in range(1, steps + 1):
        await context.sleep(inputs["seconds"] / steps)
        preview = preview_frame(images.frames[0], inputs["seed"], step, steps) if inputs["previews"] else None
        await context.progress(step, steps, preview)
    return NodeResult([images])


async def fail(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """Report progress up to `at_step`, then raise what a broken workflow, a full GPU or a broken GPU raises."""
    for step in range(1, inputs["at_step"] + 1):
        await context.sleep(FAILURE_STEP)
        await context.progress(step, max(inputs["steps"], inputs["at_step"]))
    if inputs["kind"] == "oom":
        raise OutOfMemoryError(OOM_TEXT)
    if inputs["kind"] == "cuda":
        raise AcceleratorError(CUDA_TEXT)
    raise RuntimeError(inputs["message"])


CLASSES = (
    NodeClass(
        "EmulatorDelay",
        delay,
        InputSpec(
            required={
                "seconds": real(1.0, 0.0, 86400.0, 0.01),
                "steps": whole(10, 1, 10000),
                "previews": flag(False),
                "seed": seed(),
            },
            optional={"image": ["IMAGE"]},
        ),
        outputs=("IMAGE",),
        display_name="Emulator: Delay",
        category="emulator",
        python_module=MODULE,
        description="Takes a given time. Part of the emulator; no real server has it.",
    ),
    NodeClass(
        "EmulatorFail",
        fail,
        InputSpec(
            required={
                "message": text("failed on purpose"),
                "kind": choice(FAILURE_KINDS),
                "steps": whole(4, 0, 10000),
                "at_step": whole(2, 0, 10000),
            },
            optional={"image": ["IMAGE"]},
        ),
        outputs=("IMAGE",),
        display_name="Emulator: Fail",
        category="emulator",
        python_module=MODULE,
        description="Fails on purpose. Part of the emulator; no real server has it.",
    ),
)
