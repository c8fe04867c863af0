"""Keeping to a provider's rate: the bucket, one process alone, all processes through the store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runcomfy.adapters.providers.limits import LocalLimiter, retry_after
from runcomfy.adapters.stores.sql import SqlStore
from runcomfy.application.limiter import StoreLimiter
from runcomfy.domain.exceptions import DiskFull, LocalError
from runcomfy.domain.pacing import SLACK, TokenBucket
from runcomfy.domain.settings import CloudSettings
from runcomfy.ports.limiter import Limiter
from runcomfy.testing.clock import LoopClock

SETTINGS = CloudSettings(requests_per_second=1.0, burst=5, stop_reserve=2)
NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


# --- the bucket --------------------------------------------------------------------------------------------


@given(
    st.floats(0.1, 20),
    st.integers(1, 8),
    st.integers(0, 8),
    st.lists(st.tuples(st.floats(0, 30), st.booleans()), max_size=40),
)
def test_never_more_than_the_burst_and_the_rate(
    rate: float, burst: int, reserve: int, asks: list[tuple[float, bool]]
) -> None:
    bucket = TokenBucket(per_second=rate, burst=burst, reserve=reserve)
    now, taken = 100.0, 0
    for gap, urgent in asks:
        now += gap
        wait = bucket.take(now, urgent=urgent)
        assert 0 <= wait <= (burst + 1) / rate  # never longer than filling the whole bucket
        if wait == 0:
            taken += 1
        else:  # whoever waits as told is not turned away again
            now += wait
            assert bucket.take(now, urgent=urgent) == 0
            taken += 1
        assert taken <= burst + (now - 100.0) * rate + 1e-3


@given(st.floats(0, 1e6), st.floats(0, 600))
def test_nobody_goes_while_it_is_held(now: float, wait: float) -> None:
    bucket = TokenBucket(per_second=1, burst=5, reserve=0)
    bucket.hold(now, wait)
    assert bucket.take(now, urgent=True) >= wait - 1e-6
    assert bucket.take(now + wait + 1 + SLACK, urgent=True) == 0


def test_the_reserve_is_for_urgent_calls() -> None:
    bucket = TokenBucket(per_second=1, burst=5, reserve=2)
    assert [bucket.take(0, urgent=False) for _ in range(4)] == [0, 0, 0, 1]
    assert [bucket.take(0, urgent=True) for _ in range(3)] == [0, 0, 1]


# --- Retry-After -------------------------------------------------------------------------------------------


@given(st.one_of(st.text(max_size=40), st.integers().map(str), st.floats().map(str)), st.text(max_size=40))
def test_any_retry_after_is_sensible_or_ignored(value: str, date: str) -> None:
    wait = retry_after({"Retry-After": value, "Date": date}, now=NOON, cap=MINUTE)
    assert wait is None or timedelta(0) <= wait <= MINUTE


@pytest.mark.parametrize(
    ("value", "wait"),
    [
        ("3", timedelta(seconds=3)),
        (" 0 ", timedelta(0)),
        ("3600", MINUTE),
        ("-1", None),
        ("", None),
        ("Fri, 20 Nov 2026 12:00:30 GMT", timedelta(seconds=30)),
        ("Fri, 20 Nov 2026 11:59:30 GMT", None),
        ("Fri, 20 Nov 2026 12:00:30 -0000", timedelta(seconds=30)),
        ("Fri, 99 Nov 2026", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str, wait: timedelta | None) -> None:
    assert retry_after({"Retry-After": value}, now=NOON, cap=MINUTE) == wait


# --- limiters ----------------------------------------------------------------------------------------------


class FullDisk(SqlStore):
    """A store whose disk has no room for the account's turns."""

    async def reserve_request(
        self, account: str, *, now: datetime, per_second: float, burst: int, reserve: int, urgent: bool
    ) -> timedelta:
        raise DiskFull

    async def hold_requests(self, account: str, *, now: datetime, wait: timedelta) -> None:
        raise DiskFull


@pytest.fixture
async def store(tmp_path: Path, clock: LoopClock) -> AsyncIterator[SqlStore]:
    async with SqlStore(tmp_path / "state" / "store.sqlite3", clock=clock, durable=False) as store:
        yield store


@pytest.fixture(params=["local", "store"])
def limiter(request: pytest.FixtureRequest, store: SqlStore, clock: LoopClock) -> Limiter:
    if request.param == "local":
        return LocalLimiter(per_second=1.0, burst=5, reserve=2)
    return StoreLimiter(store, "account", SETTINGS, clock)


async def test_turns_come_at_the_accounts_rate(limiter: Limiter, looptime: float) -> None:
    for _ in range(13):
        await limiter.wait_turn(urgent=False)
    assert 9.9 <= looptime <= 11


async def test_an_urgent_call_does_not_wait_for_the_others(limiter: Limiter, looptime: float) -> None:
    for _ in range(3):
        await limiter.wait_turn(urgent=False)
    await limiter.wait_turn(urgent=True)
    await limiter.wait_turn(urgent=True)
    assert looptime < 0.5


async def test_a_hold_holds_everybody(limiter: Limiter, looptime: float) -> None:
    await limiter.wait_turn(urgent=False)
    await limiter.hold(timedelta(seconds=20))
    await limiter.wait_turn(urgent=True)
    assert 19.9 <= looptime <= 21.1


async def test_a_hold_also_holds_those_who_wait_for_their_turn_already(limiter: Limiter, looptime: float) -> None:
    """I22: else a queue of requests runs on into a provider that has said that it is too much."""
    gone: list[float] = []

    async def goes(urgent: bool) -> None:
        await limiter.wait_turn(urgent=urgent)
        gone.append(asyncio.get_running_loop().time())

    waiting = [asyncio.create_task(goes(urgent=number % 5 == 0)) for number in range(15)]
    await asyncio.sleep(3)
    before = len(gone)
    await limiter.hold(timedelta(seconds=20))
    await asyncio.gather(*waiting)
    assert 5 <= before <= 9
    assert all(at >= 22.9 for at in gone[before:])
    later = sorted(gone)[before:]
    assert later[-1] - later[0] >= len(later) - 1 - SETTINGS.burst  # and then at the account's rate again


async def test_waiting_can_be_cancelled(looptime: float) -> None:
    limiter = LocalLimiter(per_second=1.0, burst=1, reserve=0)
    await limiter.wait_turn(urgent=False)
    impatient = asyncio.create_task(limiter.wait_turn(urgent=False))
    await asyncio.sleep(0.5)
    impatient.cancel()
    await limiter.wait_turn(urgent=False)
    assert impatient.cancelled()
    assert looptime == pytest.approx(1.0, abs=0.01)


@pytest.mark.fault(25)
@pytest.mark.invariant("I22")
async def test_a_hold_of_another_process_holds_those_who_wait_for_their_turn_already(
    store: SqlStore, clock: LoopClock
) -> None:
    told, waiting = (StoreLimiter(store, "account", SETTINGS, clock) for _ in range(2))
    gone: list[float] = []

    async def goes() -> None:
        await waiting.wait_turn(urgent=False)
        gone.append(asyncio.get_running_loop().time())

    tasks = [asyncio.create_task(goes()) for _ in range(15)]
    await asyncio.sleep(3.5)
    before = len(gone)
    await told.hold(timedelta(seconds=20))
    await asyncio.gather(*tasks)
    assert 3 <= before <= 9
    assert min(gone[before:]) >= 23.4
    assert gone[-1] - gone[before] >= len(gone) - before - 1 - SETTINGS.burst


async def test_two_processes_share_one_rate(store: SqlStore, clock: LoopClock, looptime: float) -> None:
    limiters = [StoreLimiter(store, "account", SETTINGS, clock) for _ in range(2)]
    await asyncio.gather(*(limiter.wait_turn(urgent=False) for _ in range(8) for limiter in limiters))
    assert 12.5 <= looptime <= 14


async def test_a_full_disk_stops_ordinary_calls_but_never_a_stop(
    tmp_path: Path, clock: LoopClock, looptime: float
) -> None:
    async with FullDisk(tmp_path / "full" / "store.sqlite3", clock=clock, durable=False) as store:
        limiter = StoreLimiter(store, "account", SETTINGS, clock)
        with pytest.raises(LocalError):
            await limiter.wait_turn(urgent=False)
        for _ in range(4):
            await limiter.wait_turn(urgent=True)
        assert 1.9 <= looptime <= 2.5  # still at the account's rate, after a burst of two
        await limiter.hold(timedelta(seconds=10))
        await limiter.wait_turn(urgent=True)
        assert looptime >= 11.9
