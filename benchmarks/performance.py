"""
docs/performance.md, made from what `RECORD=1 make bench` has kept: one table for each measurement, in one order.

A test compares the page with the files; what has no file yet is said on the page.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from benchmarks.results import Figure, Result, kept

PAGE: Final = Path(__file__).resolve().parents[1] / "docs" / "performance.md"

BENCHMARKS: Final[Mapping[str, str]] = {
    "startup": "Start-up",
    "overhead": "One job, beside a bare client",
    "watching": "Memory for each watched job",
    "fan_in": "Messages of a thousand servers",
    "queue": "The queue",
    "two_deep": "Machines that compute all the time",
    "planning": "One plan",
    "fleet": "A thousand machines, one controller",
    "time_left": "Time left",
    "http": "The HTTP service",
    "idle": "Nothing to do",
}
"""Measurement -> heading, in the order of the page."""
_HEAD: Final = """\
# Performance

Generated from `benchmarks/results/*.json`, which `RECORD=1 make bench` writes; a test compares the two. What each
measures, and how to repeat it, stands in [measure it](howto/measure.md). Both sides of every comparison were run in
turns on one computer; absolute figures are that computer's, and quiet ones give better figures."""


def page(results: Iterable[Result]) -> str:
    """Return the page."""
    known = {result.name: result for result in results}
    parts = [_HEAD, _overview(known)]
    parts += [_section(heading, known.get(name), name) for name, heading in BENCHMARKS.items()]
    return "\n\n".join(parts) + "\n"


def write() -> None:
    """Write the page anew."""
    PAGE.write_text(page(kept()), encoding="utf-8")


def _overview(known: Mapping[str, Result]) -> str:
    """Return every figure that has a bar, in one table."""
    rows = [
        "## Bars",
        "",
        "| measurement | figure | value | bar | |",
        "|---|---|---|---|---|",
    ]
    for name in BENCHMARKS:
        barred = [figure for figure in known[name].figures if figure.met is not None] if name in known else []
        rows += [f"| `{name}` | {_row(figure)} | {'met' if figure.met else '**missed**'} |" for figure in barred]
    missing = [f"`{name}`" for name in BENCHMARKS if name not in known]
    if missing:
        rows += ["", f"Not measured yet: {', '.join(missing)}."]
    return "\n".join(rows)


def _section(heading: str, result: Result | None, name: str) -> str:
    return "\n".join(_lines(heading, result, name))


def _lines(heading: str, result: Result | None, name: str) -> Iterator[str]:
    yield f"## {heading}"
    yield ""
    if result is None:
        yield f"Not measured yet: `python -m benchmarks {name} --record`."
        return
    where = f"Python {result.python}, {result.system}, {result.cores} cores"
    yield f"`{result.command}`, {result.day}, {where}, {result.took_s:,.0f} s."
    yield ""
    yield "| figure | value | bar |"
    yield "|---|---|---|"
    for figure in result.figures:
        yield f"| {_row(figure)} |"
    if result.notes:
        yield ""
        yield " ".join(result.notes)


def _row(figure: Figure) -> str:
    return " | ".join(_cell(text) for text in (figure.what, figure.value, figure.bar))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
