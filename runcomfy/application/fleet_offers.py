"""
What machine types cost and take, for the plan: prices from the rate table, times from one's own history.

History is read again now and then, not with every plan: a run more or less changes no decision. What history does not
say yet is said by defaults that RunComfy's users report (`OfferView`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from statistics import median
from typing import Final

from runcomfy.domain.estimate import History, quantile
from runcomfy.domain.exceptions import ValueInvalid
from runcomfy.domain.plan_view import OfferView
from runcomfy.domain.settings import Settings
from runcomfy.domain.work import Work
from runcomfy.ports.clock import Clock
from runcomfy.ports.store import Store

LOOK_BACK: Final = timedelta(days=7)
MOST_WORKS: Final = 5_000
REFRESH: Final = 60.0
"""Seconds for which history is believed to be what it was."""
UNKNOWN_RUN: Final = 30.0
"""Seconds that a job is taken to compute where nothing at all was run yet."""
_ENOUGH_STARTS: Final = 3
"""From so many starts on their own times are believed."""

WAIT_PRICES: Final = {"batch": 1.0, "normal": 5.0, "person waiting": 20.0}
"""What an hour of one job's waiting is worth, in words: times the price of an hour of the machine."""


def wait_usd_per_hour(wait_price: str, reference_usd_per_hour: float) -> float:
    """Return what an hour of one job's waiting is worth in USD, from words or a number. Raises ValueInvalid."""
    words = wait_price.strip().lower().replace("-", " ").replace("_", " ")
    if words in WAIT_PRICES:
        return WAIT_PRICES[words] * reference_usd_per_hour
    try:
        price = float(wait_price.strip().removeprefix("$"))
    except ValueError:
        price = -1.0
    if not 0 <= price < 1e6:  # also what is no number
        raise ValueInvalid(
            f"{wait_price!r} is no price of waiting",
            hint="write batch, normal, person waiting, or USD per hour of one job's waiting, for example 8.75",
        )
    return price


class FleetOffers:
    """The types the plan may choose from, the reference type first."""

    def __init__(self, store: Store, settings: Settings, clock: Clock, *, provider: str, types: Sequence[str]) -> None:
        """Raises ValueInvalid for a type without a price."""
        self._store, self._clock, self._provider = store, clock, provider
        self.types = tuple(dict.fromkeys(types))
        self._base: dict[str, OfferView] = {}
        for name in self.types:
            rate = settings.rates.find(name)
            if rate is None:
                raise ValueInvalid(
                    f"no price is known for the machine type {name!r}",
                    hint=f"use one of {', '.join(settings.rates.rates)}, or add its price to RUNCOMFY_RATES_FILE",
                )
            self._base[name] = OfferView(name, float(rate.usd_per_hour))
        self.works: Sequence[Work] = ()
        """What ran in the time looked back at, oldest first, as last read."""
        self.history = History(())
        self.own_starts: dict[str, int] = {}
        """By type: on how many own starts the time of a start rests; without an entry it is the default."""
        self._read_at = float("-inf")

    @property
    def reference(self) -> str:
        """The type that run times are counted on."""
        return self.types[0]

    def price(self, name: str) -> float:
        """Return USD per hour."""
        return self._base[name].usd_per_hour

    async def refresh(self, *, at_once: bool = False) -> bool:
        """Read history again, if it is old; return whether it was. Raises LocalError."""
        now = asyncio.get_running_loop().time()
        if not at_once and now - self._read_at < REFRESH:
            return False
        self.works = await self._store.works(since=self._clock.now() - LOOK_BACK, limit=MOST_WORKS)
        self.history = await asyncio.to_thread(History, self.works)
        for name, offer in self._base.items():
            starts = await self._store.boot_times(provider=self._provider, server_type=name)
            seconds = [start.total_seconds() for start in starts]
            if len(seconds) >= _ENOUGH_STARTS:
                offer = replace(offer, boot_s=median(seconds), boot_p90_s=quantile(seconds, 0.9))
                self.own_starts[name] = len(seconds)
            load = self.history.cold_extra_s(name)
            if load is not None:
                offer = replace(offer, load_s=load)
            speed = self.history.speed(name, than=self.reference)
            self._base[name] = offer if speed is None else replace(offer, speed=speed)
        self._read_at = now
        return True

    def views(self, room: Callable[[str], int]) -> tuple[OfferView, ...]:
        """Return the types as the plan sees them; `room` says how many more of one may be launched."""
        return tuple(replace(offer, room=max(0, room(name))) for name, offer in self._base.items())

    def boot_s(self, name: str) -> float:
        """Return how long a start usually takes."""
        return self._base[name].boot_s if name in self._base else self._base[self.reference].boot_s

    def run_s(self, workflow: str, server_type: str | None = None) -> float:
        """Return how long a run is predicted to compute, in seconds; on the reference type if none is named."""
        predicted = self.history.predict(workflow, server_type or self.reference)
        return predicted.mean_s if predicted is not None else UNKNOWN_RUN

    def load_s(self, workflow: str, server_type: str) -> float:
        """Return how much longer a run takes where its models are not loaded yet, in seconds; 0 if nobody knows."""
        return self.history.cold_extra_s(server_type, workflow) or 0.0

    def on_reference(self, seconds: float, server_type: str) -> float:
        """Return what a run on a type would have taken on the reference type."""
        speed = self.history.speed(server_type, than=self.reference)
        return seconds / speed if speed else seconds
