"""
How many machines a rate of arrivals deserves: what they cost against the waiting that they spare.

`cost(m) = c m + lam E[queue]`, in USD per hour. The rate is not known, only estimated from few arrivals, so the queue
is averaged over what it may be (a Gamma law around the estimate). A queue in balance follows Erlang's C formula, with
the correction of Allen and Cunneen for run times that are not exponential; one that is not in balance grows like a
fluid, for as long as it takes until more machines can be there.

The few special functions live here, because a library of them would be the largest dependency of the product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

QUANTILES: Final = 7
"""Rates that stand for the whole law; more change no decision in replays."""
OVERLOAD_S: Final = 420.0
"""How long a queue is thought to grow before help is there: a start (three to four minutes) and as long again."""
_CRITICAL: Final = 0.4
"""Mean of the largest excursion of a random walk over its end's spread, halved for the way there."""
_LARGE_LOAD: Final = 200.0
"""From here on the law of Halfin and Whitt is within two per cent of Erlang's, and needs no sum over all machines."""
_LARGE_SHAPE: Final = 60.0
"""From here on the cube-root law of Wilson and Hilferty is within 1e-4 of the Gamma law."""
_PRECISION: Final = 1e-12


def erlang_c(machines: int, load: float) -> float:
    """Return the probability that an arrival has to wait: `load` is arrivals per second x run time in seconds."""
    if load <= 0:
        return 0.0
    if load >= machines:
        return 1.0
    if load > _LARGE_LOAD:
        spare = (machines - load) / math.sqrt(load)
        below, density = math.erfc(-spare / math.sqrt(2)) / 2, math.exp(-spare * spare / 2) / math.sqrt(2 * math.pi)
        return density / (density + spare * below)
    blocked = 1.0
    for number in range(1, machines + 1):
        blocked = load * blocked / (number + load * blocked)
    return machines * blocked / (machines - load * (1 - blocked))


def gamma_p(shape: float, x: float) -> float:
    """Return the regularised lower incomplete gamma function P(shape, x): a Gamma law's share below `x`."""
    if x <= 0:
        return 0.0
    front = math.exp(shape * math.log(x) - x - math.lgamma(shape))
    if x < shape + 1:
        term = total = 1.0 / shape
        n = shape
        while abs(term) > abs(total) * _PRECISION:
            n += 1
            term *= x / n
            total += term
        return min(1.0, total * front)
    # Lentz's way through the continued fraction of the upper function.
    tiny = 1e-300
    b = x + 1 - shape
    c, d = 1 / tiny, 1 / b
    h, i, step = d, 0, 0.0
    while abs(step - 1) > _PRECISION:
        i += 1
        a = -i * (i - shape)
        b += 2
        d = 1 / ((a * d + b) or tiny)
        c = (b + a / c) or tiny
        step = d * c
        h *= step
    return max(0.0, 1 - front * h)


def normal_quantile(share: float) -> float:
    """Return where the standard normal law has `share` below it (0 < share < 1)."""
    low, high = -9.0, 9.0
    for _ in range(60):
        middle = (low + high) / 2
        if math.erfc(-middle / math.sqrt(2)) / 2 < share:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def gamma_quantile(shape: float, share: float) -> float:
    """Return where the Gamma law of this shape and scale 1 has `share` below it (0 < share < 1)."""
    z = normal_quantile(share)
    guess = shape * (1 - 1 / (9 * shape) + z / (3 * math.sqrt(shape))) ** 3
    if shape >= _LARGE_SHAPE:
        return guess
    low, high = 0.0, max(guess, shape, 1.0)
    while gamma_p(shape, high) < share:
        low, high = high, high * 2
    for _ in range(60):
        middle = (low + high) / 2
        if gamma_p(shape, middle) < share:
            low = middle
        else:
            high = middle
    return (low + high) / 2


@lru_cache(maxsize=512)
def _spread(shape: int) -> tuple[float, ...]:
    """Return the rates that stand for a Gamma law of mean 1."""
    found = [gamma_quantile(shape, (number + 0.5) / QUANTILES) for number in range(QUANTILES)]
    mean = sum(found) / QUANTILES
    return tuple(value / mean for value in found)


@dataclass(frozen=True, slots=True)
class Staffing:
    """What numbers of machines cost at an uncertain rate. Money in USD per hour, times in seconds."""

    rate: float
    """Arrivals per second, best guess."""
    seen: float
    """Arrivals that the guess rests on."""
    service_s: float
    service_cv2: float
    usd_per_hour: float
    wait_usd_per_hour: float
    group: float = 1.0
    """How many jobs come together, as a job sees it."""
    overlap: float = 1.0
    """How often jobs meet others, relative to independent arrivals."""

    def queue(self, machines: int) -> float:
        """Return the mean number of waiting jobs, averaged over what the rate may be."""
        if self.rate <= 0 or self.service_s <= 0:
            return 0.0
        # Shapes are rounded so that few laws are ever computed: above a hundred arrivals, to three per cent.
        shape = 2 + self.seen
        rounded = round(shape) if shape <= 100 else round(1.03 ** round(math.log(shape, 1.03)))
        rates = [self.rate * factor for factor in _spread(rounded)]
        return sum(self._queue_at(machines, rate) for rate in rates) / len(rates)

    def _queue_at(self, machines: int, rate: float) -> float:
        load = rate * self.service_s
        if machines <= 0:
            return rate * OVERLOAD_S / 2
        # Out of balance, or nearly: chance alone makes no queue longer than the spread of what comes in that time.
        waiting = _CRITICAL * math.sqrt(rate * OVERLOAD_S * (1 + self.service_cv2))
        # Of jobs that come together, those that find no machine of their own wait for the run time of others.
        together = load * max(0.0, self.group / machines - 1) / 2
        if load < machines:
            balanced = erlang_c(machines, load) * load / (machines - load) * (1 + self.service_cv2) / 2
            return self.overlap * min(balanced, waiting) + together
        return self.overlap * waiting + together + (load - machines) / self.service_s * OVERLOAD_S / 2

    def cost(self, machines: int) -> float:
        """Return what an hour with so many machines costs, waiting included, in USD."""
        return self.usd_per_hour * machines + self.wait_usd_per_hour * self.queue(machines)

    def best(self, near: int, cap: int) -> int:
        """Return the cheapest number of machines from `near` to `cap`; `near` if a smaller one would be cheaper."""
        return near + _far(lambda more: self.cost(near + more) < self.cost(near + more - 1), cap - near)

    def fewest(self, near: int) -> int:
        """Return the cheapest number of machines from 1 to `near`; `near` if a larger one would be cheaper."""
        return near - _far(lambda fewer: self.cost(near - fewer) < self.cost(near - fewer + 1), near - 1)


def _far(pays: Callable[[int], bool], most: int) -> int:
    """Return how many steps in a row pay, at most so many; steps double, since a cost that is convex turns once."""
    low, step = 0, 1
    while low + step <= most and pays(low + step):
        low, step = low + step, step * 2
    high = max(low, min(most, low + step - 1))
    while low < high:
        middle = (low + high + 1) // 2
        if pays(middle):
            low = middle
        else:
            high = middle - 1
    return low
