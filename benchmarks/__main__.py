"""
`python -m benchmarks [NAME]… [--record]`: the measurements of `PERFORMANCE`, all of them unless named, and `CAMPAIGNS`.

`python -m benchmarks NAME …` of `ALONE` takes the rest of the line as its own: `replay --trace FILE [--seed N]`.

With `--record`, or RECORD=1, each measurement writes `benchmarks/results/NAME.json`, and docs/performance.md is made
anew. One that fails is told, and the others go on.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable
from typing import Final

from benchmarks.common import summary
from benchmarks.performance import BENCHMARKS, write
from benchmarks.results import Result, keep, told_to_keep

PERFORMANCE: Final = tuple(BENCHMARKS)
CAMPAIGNS: Final = ("killing", "leaks")
"""Run by name; they take no arguments."""
ALONE: Final = ("replay", "soak", "fuzz", "simulate", "killpoints", "mutation", "model")
"""Run by name, with arguments of their own: `main(arguments)` returns the exit code."""


def _calls(name: str) -> Callable[[], object]:
    return lambda: importlib.import_module(f"benchmarks.{name}").main()


ALL: Final[dict[str, Callable[[], object]]] = {name: _calls(name) for name in (*PERFORMANCE, *CAMPAIGNS)} | {
    name: lambda name=name: sys.exit(importlib.import_module(f"benchmarks.{name}").main(sys.argv[2:])) for name in ALONE
}


def main() -> None:
    names = [word for word in sys.argv[1:] if word != "--record"]
    if names and names[0] in ALONE:
        names = names[:1]  # the rest is its own
    for name in names:
        if name not in ALL:
            sys.exit(f"no benchmark {name!r}; there are: {', '.join(ALL)}")
    failed = []
    for name in names or PERFORMANCE:
        try:
            result = ALL[name]()
        except Exception:  # noqa: BLE001 - the others are to be measured all the same
            traceback.print_exc()
            failed.append(name)
            continue
        if isinstance(result, Result):
            summary(result)
            if told_to_keep(*sys.argv[1:]):
                keep(result)
    if told_to_keep(*sys.argv[1:]):
        write()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
