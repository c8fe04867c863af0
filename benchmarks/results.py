"""
What campaigns and benchmarks found, kept in the repository: one file each in `benchmarks/results/`.

`docs/performance.md` and `docs/reliability.md` are generated from these files, so a figure on a page always has a
command, a day, and a computer. A run writes its file only when it is told to (`--record`, or `RECORD=1`).
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import psutil

FOLDER: Final = Path(__file__).with_suffix("")


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of a table.

    Attributes:
        what: what was measured, in words.
        value: the figure with its unit, as it is printed: `22.8 ms`.
        bar: what it has to be, or nothing: `at most 50 ms`.
        met: whether it is; None without a bar.
    """

    what: str
    value: str
    bar: str = ""
    met: bool | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """What one command measured.

    Attributes:
        name: the campaign or benchmark, and its file: `soak`.
        command: what to type to see it again.
        figures: what it found.
        took_s: seconds it ran.
        notes: what a reader has to know, a sentence each.
        day: UTC, ISO 8601.
    """

    name: str
    command: str
    figures: Sequence[Figure]
    took_s: float
    notes: Sequence[str] = ()
    day: str = ""
    python: str = field(default_factory=platform.python_version)
    system: str = field(default_factory=platform.system)
    cores: int = field(default_factory=lambda: psutil.cpu_count() or 1)

    @property
    def met(self) -> bool:
        """Whether every figure with a bar meets it."""
        return all(figure.met is not False for figure in self.figures)


def keep(result: Result) -> Path:
    """Write a result into its file, in place of an earlier one."""
    facts: dict[str, Any] = {**asdict(result), "day": result.day or datetime.now(UTC).date().isoformat()}
    path = FOLDER / f"{result.name}.json"
    FOLDER.mkdir(exist_ok=True)
    path.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def told_to_keep(*arguments: str) -> bool:
    """Return whether this run shall write its file."""
    return "--record" in arguments or os.environ.get("RECORD", "") == "1"


def kept() -> Iterator[Result]:
    """Yield what is in the files, by name."""
    for path in sorted(FOLDER.glob("*.json")):
        facts = json.loads(path.read_text(encoding="utf-8"))
        facts["figures"] = [Figure(**figure) for figure in facts["figures"]]
        yield Result(**facts)
