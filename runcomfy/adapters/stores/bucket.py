"""
The account's rate limit as arithmetic: who may send when, decided from a few stamps in one row.

Every request gets a slot of `1 / per_second` at the end of a line of slots; the request may start before its slot
does, as far as the burst allows. A request that is not urgent starts when at most `burst - reserve` slots lie ahead
of the end of its own. An urgent one starts at the earlier of two moments: when the whole burst covers it, or when
fewer than `reserve` urgent slots are still to come. So it passes those who were told to wait, whose moments were
given out and stay as they are, and those who come later pay for it.

Why that keeps the limit: at no moment are more than `burst` requests started whose slots have not ended. Of the
others at most `burst - reserve` can be, of the urgent ones at most `reserve`. Slots do not overlap and none begins
before its request, hence no window of length t sees more than `burst + per_second * t` starts.

A hold (the provider said Retry-After) means that its own count differs from ours: afterwards one request starts, then
one per slot, and the reserve of the urgent ones.

The stamps come from wall clocks, which jump. A clock that went forward only fills the bucket. A clock behind the
newest stamp by less than the bucket takes to fill is another process's that read it a moment earlier: the newest
stamp is taken for now. Behind by more, it was set back: all stamps are moved with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

HELD_TOLERANCE: Final = timedelta(minutes=1)
"""A clock that is behind by more was set back."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """What is remembered of an account's requests."""

    seen_at: datetime | None = None
    """The newest time anybody came with."""
    line_until: datetime | None = None
    """When the last slot given out ends."""
    urgent_until: tuple[datetime, ...] = ()
    """When the slots of the newest urgent requests end, in order."""
    hold_until: datetime | None = None
    """No request starts before."""

    def moved(self, by: timedelta) -> Bucket:
        """Return the same with every stamp moved."""
        return Bucket(
            seen_at=self.seen_at and self.seen_at + by,
            line_until=self.line_until and self.line_until + by,
            urgent_until=tuple(at + by for at in self.urgent_until),
            hold_until=self.hold_until and self.hold_until + by,
        )


def take(
    bucket: Bucket, *, now: datetime, per_second: float, burst: int, reserve: int, urgent: bool
) -> tuple[Bucket, timedelta]:
    """Return the bucket after one more request, and how long that request has to wait."""
    if not per_second > 0 or not math.isfinite(per_second):
        raise ValueError(f"a rate limit must be above zero: {per_second}")
    burst = max(1, burst)
    reserve = min(max(0, reserve), burst - 1)
    slot = timedelta(microseconds=math.ceil(1_000_000 / per_second))
    bucket = _as_of(bucket, now, tolerance=burst * slot)
    start = max(filter(None, (now, bucket.seen_at, bucket.hold_until)))
    line = max(start, bucket.line_until or start)
    if bucket.hold_until is not None:
        line = max(line, bucket.hold_until + (burst - reserve - 1) * slot)
    end = line + slot
    if urgent:
        coming = [at for at in bucket.urgent_until if at > start]
        moment = end - burst * slot
        if reserve:
            moment = min(moment, start if len(coming) < reserve else coming[-reserve])
        bucket = replace(bucket, urgent_until=(*coming, end)[-burst:])
    else:
        moment = end - (burst - reserve) * slot
    return replace(bucket, line_until=end), max(start, moment) - now


def hold(bucket: Bucket, *, now: datetime, wait: timedelta) -> Bucket:
    """Return the bucket with nothing to start before `wait` from now is over; a longer hold stays."""
    seen_at = max(bucket.seen_at or now, now)
    until = seen_at + max(wait, timedelta(0))
    return replace(bucket, seen_at=seen_at, hold_until=max(bucket.hold_until or until, until))


def held(bucket: Bucket, *, now: datetime) -> timedelta:
    """Return for how much longer nothing may start; zero if nothing is held."""
    bucket = _as_of(bucket, now, tolerance=HELD_TOLERANCE)
    start = max(filter(None, (now, bucket.seen_at)))
    return max(timedelta(0), (bucket.hold_until or start) - start)


def _as_of(bucket: Bucket, now: datetime, *, tolerance: timedelta) -> Bucket:
    if bucket.seen_at is None or now >= bucket.seen_at:
        return replace(bucket, seen_at=now)
    behind = bucket.seen_at - now
    if behind <= tolerance:
        return bucket
    moved, latest = bucket.moved(-behind), now + tolerance
    return replace(
        moved,
        line_until=moved.line_until and min(moved.line_until, latest),
        urgent_until=tuple(min(at, latest) for at in moved.urgent_until),
    )
