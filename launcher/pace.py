"""
What the interpreter is told in a process that answers many at once while it works.

Without it, answers wait now and then for more than a tenth of a second while the garbage collector looks through all
that was loaded at the start.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache


@contextmanager
def quick_answers() -> Iterator[None]:
    """Have what is loaded by now left out of garbage collections, for the block."""
    _tidied()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@cache
def _tidied() -> None:
    """Collect what the imports left behind; once, because a process loads its modules once."""
    gc.collect()
