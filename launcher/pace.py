"""
What the interpreter is told in a process that answers many at once while it works.

Without it, answers wait now and then for more than a tenth of a second while the garbage collector looks through all
that was loaded at the start.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_answers() -> Iterator[None]:
    """Have what is loaded by now left out of garbage collections, for the block."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
