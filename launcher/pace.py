"""
What the interpreter is told in a process that answers many at once while it works.

Without it, answers wait now and then for a tenth of a second that nobody needs: for the garbage collector to look
through all that was loaded at the start, and for threads that hand the interpreter on only every 5 ms.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

HAND_ON_S: Final = 0.0005
"""How long a thread may go on while another one wants to. The event loop waits for the database's threads several
times per answer; Python's 5 ms add up."""


@contextmanager
def quick_answers() -> Iterator[None]:
    """Have what is loaded by now left out of garbage collections, and threads take turns quickly, for the block."""
    interval = sys.getswitchinterval()
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(min(interval, HAND_ON_S))
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        gc.unfreeze()
