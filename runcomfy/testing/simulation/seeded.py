"""
No chance and no clock but the seed's, for the block: what asks the system for either gets the simulation's answer.

Ids, jitter and keys come from one generator; wall and monotonic clocks go by the loop's time. All that is put in place
is taken away again.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from random import Random
from typing import Any
from unittest.mock import patch


@contextmanager
def seeded(seed: int, *, now: Callable[[], float], began: float) -> Iterator[Random]:
    """Seed everything by which chance comes in, and have every clock show `now` (seconds), the wall's plus `began`."""
    draw = Random(f"{seed}/system")
    state = random.getstate()
    with ExitStack() as stack:
        stack.callback(random.setstate, state)
        random.seed(f"{seed}/random")

        def urandom(size: int) -> bytes:
            return draw.randbytes(size)

        def instead(module: Any, name: str, value: Any) -> None:
            if hasattr(module, name):
                stack.enter_context(patch.object(module, name, value))

        instead(os, "urandom", urandom)
        instead(random, "_urandom", urandom)
        instead(time, "time", lambda: began + now())
        instead(time, "time_ns", lambda: int((began + now()) * 1e9))
        for clock in ("monotonic", "perf_counter"):
            instead(time, clock, now)
            instead(time, f"{clock}_ns", lambda: int(now() * 1e9))
        yield draw
