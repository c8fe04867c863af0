"""What the measurements share: the server process, percentiles, a line of JSON."""

from __future__ import annotations

import asyncio
import json
import platform
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from statistics import median
from typing import Any


def report(benchmark: str, **figures: Any) -> None:
    """Print one result."""
    print(json.dumps({"benchmark": benchmark, "python": platform.python_version(), **figures}), flush=True)


def middle(values: Sequence[float]) -> float:
    """Return the median."""
    return median(values)


def high(values: Sequence[float], share: float = 0.95) -> float:
    """Return a percentile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


@asynccontextmanager
async def server(speed: float = 1.0) -> AsyncIterator[str]:
    """Run an emulated ComfyUI in another process for the block; yields its address."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "benchmarks.server",
        str(speed),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        yield (await process.stdout.readline()).decode().strip()
    finally:
        process.stdin.close()
        await process.wait()


def graph(colour: int, prefix: str = "bench") -> dict[str, Any]:
    """Return EmptyImage 64x64 -> SaveImage; another colour is another picture, so that nothing is cached."""
    return {
        "1": {
            "class_type": "EmptyImage",
            "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": colour},
        },
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": prefix}},
    }
