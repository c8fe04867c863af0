"""
Which lines and branches of `runcomfy/` the tests have reached: read from what `make coverage` left, in one table.

The figure of `coverage report` counts lines and branches together; branches alone are shown beside it. What a program
did before it was killed with SIGKILL is in neither: it could not write it down.

Python 3.11 counts too little: it tells a tracer nothing when an exception is thrown into a waiting coroutine, but does
when that one returns, so that the rest of those that called it is taken for another file's (coveragepy#2124). The
figures that count are those of 3.12 or later: `make PYTHON=python3.13 install coverage RECORD=1`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import coverage

from benchmarks.results import Figure, Result, keep, told_to_keep

LEAST_PERCENT: Final = 95.0
WHAT: Final = "runcomfy/*"
COUNTS_ALL: Final = (3, 12)
"""The first Python that tells a tracer of every coroutine that goes on."""


def measured(data: Path) -> Mapping[str, Any]:
    """Return the JSON report of a data file; raises coverage.CoverageException if there is none."""
    reader = coverage.Coverage(data_file=str(data))
    reader.load()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "coverage.json"
        reader.json_report(outfile=str(out), include=[WHAT])
        found: Mapping[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return found


def below(report: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return the files that miss the bar, the worst first."""
    shares = {path: float(file["summary"]["percent_covered"]) for path, file in report["files"].items()}
    return sorted(
        ((path, share) for path, share in shares.items() if share < LEAST_PERCENT), key=lambda found: found[1]
    )


def figures(report: Mapping[str, Any]) -> list[Figure]:
    """Return the figures for all files together."""
    totals = report["totals"]
    whole = float(totals["percent_covered"])
    branches, lines = int(totals["num_branches"]), int(totals["num_statements"])
    return [
        Figure("lines and branches", f"{whole:.2f} %", f"at least {LEAST_PERCENT:g} %", whole >= LEAST_PERCENT),
        Figure("lines alone", f"{100 * int(totals['covered_lines']) / lines:.1f} % of {lines:,}"),
        Figure("branches alone", f"{100 * int(totals['covered_branches']) / branches:.1f} % of {branches:,}"),
        Figure("files", f"{len(report['files'])}, {len(below(report))} of them below {LEAST_PERCENT:g} %"),
    ]


def main(arguments: list[str]) -> int:
    """Print the table and the files below the bar; keep the figures if told to. Returns 1 below the bar."""
    data = next((Path(word) for word in arguments if not word.startswith("-")), Path(".coverage"))
    report = measured(data)
    for path, share in below(report):
        print(f"{share:6.1f} %  {path}")
    found = figures(report)
    for figure in found:
        print(f"{figure.what}: {figure.value}{f' ({figure.bar})' if figure.bar else ''}")
    if sys.version_info < COUNTS_ALL:
        print("Python 3.11 counts too little after exceptions in coroutines; 3.12 and later count all")
    if told_to_keep(*arguments):
        note = "Of runcomfy/, the emulators and tools for tests included; programs that tests start are measured, too."
        keep(Result("coverage", "make coverage RECORD=1", found, 0.0, [note]))
    return 0 if all(figure.met is not False for figure in found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
