"""
`python -m benchmarks model [--small] [--record]`: everything that can happen in the protocol, searched through.

The scopes of the gate, the larger ones (a minute), and every rejected design, which must still be rejected.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from benchmarks.common import summary
from benchmarks.results import Figure, Result, keep, told_to_keep
from runcomfy.domain.protocol.rejected import LARGER, OURS, REJECTED
from runcomfy.domain.protocol.search import search

BAR = "nothing breaks, no dead end"
NOTE = (
    "What the model holds and leaves out: docs/design/protocol.md. The stories of the rejected designs: "
    "`runcomfy/domain/protocol/rejected.txt`."
)


def main(arguments: Sequence[str] = ()) -> int:
    began = time.perf_counter()
    rows: list[Figure] = []
    for name, model in (OURS if "--small" in arguments else {**OURS, **LARGER}).items():
        searched = search(model(), most=20_000_000)
        if searched.against is not None:
            print(f"{name}\n{searched.against}")
        value = f"{searched.states:,} states, {searched.steps:,} steps"
        rows.append(Figure(name, value, BAR, searched.against is None))
        print(f"{name}: {value}", flush=True)
    against = [design.searched().against for design in REJECTED]
    right = [
        found is not None and found.invariant.startswith(design.invariant)
        for design, found in zip(REJECTED, against, strict=True)
    ]
    rows.append(Figure("rejected designs", f"{sum(right)} of {len(right)}", "all are found out", all(right)))
    result = Result(
        "model",
        " ".join(["python -m benchmarks model", *(word for word in arguments if word == "--small")]),
        rows,
        round(time.perf_counter() - began, 1),
        (NOTE,),
    )
    summary(result)
    if told_to_keep(*arguments):
        keep(result)
    return 0 if result.met else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
