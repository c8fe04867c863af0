"""The heart beats whatever the event loop does, tells what is held, and knows when nothing is sure any more."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from datetime import timedelta

import pytest

from runcomfy.application.heartbeat import Heart, LoopHeart
from runcomfy.domain.exceptions import StoreUnavailable
from runcomfy.domain.queued import RowId

HELD: Mapping[RowId, int] = {RowId(7): 3}


class Renewals:
    """A database that renews when it can; counts how often."""

    def __init__(self) -> None:
        self.count = 0
        self.locked = False
        self.often = threading.Event()
        self.threads: set[str] = set()

    def __call__(self) -> Mapping[RowId, int]:
        self.threads.add(threading.current_thread().name)
        if self.locked:
            raise StoreUnavailable("database is locked")
        self.count += 1
        if self.count >= 5:
            self.often.set()
        return HELD

    async def in_loop(self) -> Mapping[RowId, int]:
        return self()


@pytest.mark.fault(62)
@pytest.mark.processes
@pytest.mark.looptime(False)
async def test_a_blocked_event_loop_does_not_stop_the_heart() -> None:
    renewals, closed = Renewals(), threading.Event()
    told: list[Mapping[RowId, int]] = []
    heart = Heart(renewals, every=timedelta(milliseconds=20), lease=timedelta(seconds=60), close=closed.set)
    heart.start(told.append)

    assert renewals.often.wait(30)  # nothing else runs in this thread meanwhile

    assert told == []
    async with asyncio.timeout(30):
        while len(told) < 5:  # noqa: ASYNC110 - a thread tells it
            await asyncio.sleep(0.01)
    assert told[:5] == [HELD] * 5
    assert heart.fresh
    await heart.stop()
    await heart.stop()
    assert closed.is_set()
    beats = renewals.count
    await asyncio.sleep(0.1)
    assert renewals.count == beats
    assert "heart" in renewals.threads


async def test_a_heart_that_misses_beats_hurries_and_says_when_nothing_is_sure() -> None:
    renewals = Renewals()
    told: list[Mapping[RowId, int]] = []
    heart = LoopHeart(renewals.in_loop, every=timedelta(seconds=15), lease=timedelta(seconds=60))
    heart.start(told.append)
    await asyncio.sleep(31)
    assert renewals.count == 2
    renewals.locked = True
    await asyncio.sleep(58)
    seen = [heart.fresh]
    await asyncio.sleep(3)
    seen.append(heart.fresh)

    renewals.locked = False
    await asyncio.sleep(3.5)  # not a whole period
    seen.append(heart.fresh)
    assert seen == [True, False, True]
    assert told == [HELD] * 3
    await heart.stop()


async def test_a_heart_can_be_told_to_beat_at_once() -> None:
    renewals = Renewals()
    told: list[Mapping[RowId, int]] = []
    heart = LoopHeart(renewals.in_loop, every=timedelta(seconds=15), lease=timedelta(seconds=60))
    heart.start(told.append)
    await asyncio.sleep(1)
    heart.hurry()
    await asyncio.sleep(0.1)
    assert told == [HELD]
    await heart.stop()


@pytest.mark.processes
@pytest.mark.looptime(False)
async def test_a_heart_whose_loop_is_gone_ends_quietly() -> None:
    renewals = Renewals()
    heart = Heart(renewals, every=timedelta(milliseconds=10), lease=timedelta(seconds=60))
    started = threading.Event()

    async def short_life() -> None:
        heart.start(lambda _: None)
        started.set()

    await asyncio.to_thread(asyncio.run, short_life())
    assert started.is_set()
    assert renewals.often.wait(30)  # it goes on, with nobody to tell
    await heart.stop()
