"""What the measurements share: the server process, percentiles, a line of JSON, figures with their bars."""

from __future__ import annotations

import asyncio
import json
import platform
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from statistics import median
from typing import Any

from benchmarks.results import Figure, Result


def report(benchmark: str, **figures: Any) -> None:
    """Print one result."""
    print(json.dumps({"benchmark": benchmark, "python": platform.python_version(), **figures}), flush=True)


def summary(result: Result) -> None:
    """Print how a measurement stands to its bars."""
    missed = [f"{figure.what}: {figure.value}" for figure in result.figures if figure.met is False]
    report(result.name, met=result.met, missed=missed, took_s=round(result.took_s, 1))


def middle(values: Sequence[float]) -> float:
    """Return the median."""
    return median(values)


def high(values: Sequence[float], share: float = 0.95) -> float:
    """Return a percentile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def shown(value: float, unit: str = "") -> str:
    """Return a figure as people read it: `4,149/s`, `22.8 ms`, `0.34`."""
    size = abs(value)
    digits = 0 if size >= 100 or value == int(value) else 1 if size >= 10 else 2 if size >= 0.1 else 3
    gap = "" if not unit or unit.startswith("/") else " "
    return f"{value:,.{digits}f}{gap}{unit}"


class Findings:
    """Collects the figures of one measurement, from when it begins."""

    def __init__(self, name: str, *notes: str) -> None:
        self._name, self._notes = name, list(notes)
        self._began = time.perf_counter()
        self._figures: list[Figure] = []

    def told(self, what: str, value: float, unit: str = "") -> None:
        """Add a figure that has no bar."""
        self._figures.append(Figure(what, shown(value, unit)))

    def at_most(self, what: str, value: float, bar: float, unit: str = "") -> None:
        """Add a figure that must not be above its bar."""
        self._figures.append(Figure(what, shown(value, unit), f"at most {shown(bar, unit)}", value <= bar))

    def at_least(self, what: str, value: float, bar: float, unit: str = "") -> None:
        """Add a figure that must not be below its bar."""
        self._figures.append(Figure(what, shown(value, unit), f"at least {shown(bar, unit)}", value >= bar))

    def note(self, sentence: str) -> None:
        """Add what a reader has to know."""
        self._notes.append(sentence)

    def result(self) -> Result:
        """Return all of it."""
        return Result(
            name=self._name,
            command=f"python -m benchmarks {self._name}",
            figures=tuple(self._figures),
            took_s=round(time.perf_counter() - self._began, 1),
            notes=tuple(self._notes),
        )


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
