"""
How long the last idle machine is kept: learned from one's own silences.

Keeping it costs its price for as long as the silence lasts; letting it go costs a cold start when work comes again. In
units of machine-seconds that cold start is worth R, and the best time T to let go is the one that would have cost least
over past silences: mean of min(g, T) + R if g > T. A few prior silences (heavy-tailed, as people's pauses are) speak
until there are own ones.

The classical answer without knowledge, T = R, costs at most twice the optimum and is never left by more than a factor
of two upwards; downwards a factor of eight, because machines of rare users are best ended soon.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

HALF_LIFE: Final = 300
"""Silences after which an older one counts half."""
PRIOR_COUNT: Final = 5
"""Fifteen, with the same law, cost 2 % more over single users, and 15 % more than break-even on one of them: who comes
back seldom has too few silences of their own to outvote so many."""
PRIOR_SHAPE: Final = 0.75
"""Lomax law: pauses of single users in a production trace of Stable Diffusion requests; its mean is infinite."""
PRIOR_SCALE: Final = 0.1
"""Scale of the law in units of R."""
LEAST: Final = 1 / 8
MOST: Final = 2.0


def worth_of_start(
    *, load_s: float, usd_per_hour: float, wait_usd_per_hour: float, waits_s: float, billed_boot_s: float = 0.0
) -> float:
    """Return R: what a cold start costs, in seconds of the machine's price.

    `waits_s` are the seconds that jobs wait because of it, all jobs together; `load_s` is billed before the first one
    computes.
    """
    if usd_per_hour <= 0:
        return float("inf")
    return load_s + billed_boot_s + wait_usd_per_hour / usd_per_hour * waits_s


@lru_cache(maxsize=256)
def keep_alive(silences: tuple[float, ...], worth_s: float) -> float:
    """Return how long to keep the last machine after its last work, in seconds.

    `silences`: lengths of past ones in seconds, oldest first. `worth_s`: what a cold start costs, in seconds of the
    machine's price (R); rounded by the caller if the cache is to help.
    """
    if worth_s <= 0:
        return 0.0
    weighed = list(zip(silences, _fading(len(silences)), strict=True))
    weighed += [(length * worth_s, 1.0) for length in _prior()]
    weighed.sort()
    low, high = LEAST * worth_s, MOST * worth_s
    over = sum([weight for _, weight in weighed])
    best, least, waited, until = low, float("inf"), 0.0, low
    for length, weight in weighed:
        if length > low:
            # The best time is just behind a silence, or an end of the range.
            cost = waited + over * (until + worth_s)
            if cost < least - 1e-9 * worth_s:
                best, least = until, cost
            if length > high:
                break
            until = length
        waited += length * weight
        over -= weight
    return high if waited + over * (high + worth_s) < least - 1e-9 * worth_s else best


@lru_cache(maxsize=1024)
def _fading(count: int) -> tuple[float, ...]:
    """Return the weights of so many silences, oldest first."""
    fade = 0.5 ** (1 / HALF_LIFE)
    return tuple(fade ** (count - 1 - index) for index in range(count))


@lru_cache(maxsize=1)
def _prior() -> tuple[float, ...]:
    """Return the prior silences in units of R: quantiles of the Lomax law."""
    shares = [(number + 0.5) / PRIOR_COUNT for number in range(PRIOR_COUNT)]
    return tuple(PRIOR_SCALE * ((1 - share) ** (-1 / PRIOR_SHAPE) - 1) for share in shares)
