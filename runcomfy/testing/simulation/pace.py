"""
How often those look who look for themselves, in a simulated day: all of them more rarely than in life.

What they do when they look is the product's; what happens wakes most of them all the same. The user's settings are in
`world.py`; here are the rhythms that nobody can set. A day would cost five times as much with those of life, and show
the same: what is missed is found at the next look.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, Final
from unittest.mock import patch

from runcomfy.application import claims, executor, fleet, owner, reconciler, role, service, sweeper

RHYTHMS: Final[tuple[tuple[Any, str, Any], ...]] = (
    (owner, "HEARTBEAT_EVERY", timedelta(minutes=10)),
    (claims, "WATCH_EVERY", 60.0),
    (executor, "REPORT_EVERY", 60.0),
    (executor, "TROUBLE_MOST", 60.0),
    (sweeper, "SWEEP_EVERY", 120.0),
    (reconciler, "LOOK_EVERY", 120.0),
    (fleet, "BUDGETS_EVERY", 60.0),
    (service, "STANDBY_EVERY", 60.0),
)
ROLE_LEASE: Final = timedelta(minutes=20)


_installed: Final = cache(importlib.metadata.entry_points)


@contextmanager
def slower() -> Iterator[None]:
    """Have everybody look more rarely, for the block."""
    with ExitStack() as stack:
        for module, name, value in RHYTHMS:
            stack.enter_context(patch.object(module, name, value))
        stack.enter_context(patch.dict(role.Role.__init__.__kwdefaults__, lease=ROLE_LEASE))
        # Forty services are started a day, and what is installed stays as it is.
        stack.enter_context(patch.object(importlib.metadata, "entry_points", _installed))
        yield
