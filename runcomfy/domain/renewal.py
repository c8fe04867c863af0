"""
How far machines are paid ahead when one process pays for many.

Each machine is paid ahead by a lease, so that it stops by itself if nobody renews it (I5), and the lease is renewed
when half of it is left. A renewal is one request, and the account has about one request a second for everything. So:

    renewals may take half of the account's requests, and every machine must get its turn within half of a lease:
    machines / (lease / 2) <= requests_per_second / 2, that is lease >= 4 x machines / requests_per_second.

Up to 150 machines the usual ten minutes do; a thousand are paid 67 minutes ahead. Reading back what was granted costs
nothing more, since one list shows all of them.
"""

from __future__ import annotations

from datetime import timedelta
from math import ceil
from typing import Final

RENEWALS_SHARE: Final = 0.5
"""The part of the account's requests that renewals may take: the rest is for launches, lists and stops."""
LOOKS_PER_LEASE: Final = 8
"""How often in a lease it is looked what is due: half a lease is four looks, so that three may be missed (a blocked
event loop, a busy cloud) before a machine stops that should not."""
_LONGEST: Final = timedelta(days=365)


def lease_for(machines: int, *, lease: timedelta, requests_per_second: float) -> timedelta:
    """Return for how long each of so many machines is to be paid ahead: `lease`, or longer where there are too many."""
    needed = 2 * machines / (requests_per_second * RENEWALS_SHARE)
    return max(lease, min(timedelta(seconds=ceil(needed)), _LONGEST))


def is_due(left_s: float, lease: timedelta) -> bool:
    """Whether a machine that is paid for so many more seconds is to be renewed now."""
    return left_s <= lease.total_seconds() / 2


def look_every(lease: timedelta) -> float:
    """Return the seconds between two looks at what is due."""
    return lease.total_seconds() / LOOKS_PER_LEASE


def total_for(used_s: float, lease: timedelta) -> timedelta:
    """Return the running time to ask for: whole seconds, counted from ready, a lease from now on."""
    return timedelta(seconds=round(used_s)) + lease
