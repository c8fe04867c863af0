"""Saying ahead that somebody is there: what is written, what the fleet makes of it, who is not believed any more."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from runcomfy.adapters.stores.sql import SqlStore
from runcomfy.application.axis import Axis
from runcomfy.application.fleet_demand import FleetSignals
from runcomfy.application.presence import Presence
from runcomfy.cli.main import call, comfyctl
from runcomfy.cli.presence import parse_when
from runcomfy.domain.exceptions import ValueInvalid
from runcomfy.domain.signal import Signal, SignalKind
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.contracts.jobs_words import StoryClock

QUARTER = timedelta(minutes=15)
NOON = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


@pytest_asyncio.fixture
async def books(clock: LoopClock, tmp_path: Path) -> AsyncIterator[SqlStore]:
    async with SqlStore(tmp_path / "books.sqlite3", clock=clock, durable=False) as store:
        yield store


@pytest.fixture
def presence(books: SqlStore, clock: LoopClock) -> Presence:
    async def opened() -> SqlStore:
        return books

    return Presence(opened, clock)


async def told(books: SqlStore) -> list[Signal]:
    return list(await books.signals(since=datetime(2026, 1, 1, tzinfo=UTC)))


def listening(books: SqlStore, clock: LoopClock, said: list[str] | None = None) -> FleetSignals:
    return FleetSignals(books, clock, axis=Axis(clock.now), lead_s=300, tell=(said if said is not None else []).append)


# -- saying --------------------------------------------------------------------------------------------------


async def test_what_is_said_is_written_down_with_its_end(presence: Presence, books: SqlStore, clock: LoopClock) -> None:
    now = clock.now()
    await presence.opened("conjure", user="ann")
    await presence.intent("conjure", lasts=timedelta(minutes=2))
    await presence.batch(40, "night", work=timedelta(hours=1), at=now + timedelta(hours=8))
    await presence.left("conjure", user="ann")
    opened, intent, batch, left = await told(books)
    assert (opened.kind, opened.source, opened.user, opened.until) == (
        SignalKind.OPENED,
        "conjure",
        "ann",
        now + QUARTER,
    )
    assert (intent.kind, intent.until) == (SignalKind.INTENT, now + timedelta(minutes=2))
    assert (batch.kind, batch.jobs, batch.work) == (SignalKind.BATCH, 40, timedelta(hours=1))
    assert batch.expected_at == now + timedelta(hours=8)
    assert (left.kind, left.until) == (SignalKind.LEFT, None)


async def test_who_is_here_says_it_again_and_says_goodbye(presence: Presence, books: SqlStore) -> None:
    async with presence.here("ann", lasts=QUARTER):
        await asyncio.sleep(3_600)
    kinds = [signal.kind for signal in await told(books)]
    assert kinds == [SignalKind.OPENED] * 12 + [SignalKind.LEFT]
    signals = await told(books)
    for earlier, later in itertools.pairwise(signals):
        assert earlier.until is not None
        assert later.at < earlier.until  # there is no moment at which nobody would be there


async def test_who_is_here_leaves_also_when_the_block_breaks(presence: Presence, books: SqlStore) -> None:
    with pytest.raises(RuntimeError, match="it broke"):
        async with presence.here("ann"):
            raise RuntimeError("it broke")
    assert [signal.kind for signal in await told(books)] == [SignalKind.OPENED, SignalKind.LEFT]


@pytest.mark.parametrize(
    "say",
    [
        lambda p: p.opened(""),
        lambda p: p.opened("\x1b\n"),
        lambda p: p.opened("a" * 100_000),
        lambda p: p.opened(lasts=timedelta(0)),
        lambda p: p.opened(lasts=timedelta(days=2)),
        lambda p: p.intent(lasts=timedelta(seconds=-1)),
        lambda p: p.batch(0),
        lambda p: p.batch(5, work=timedelta(seconds=-1)),
        lambda p: p.batch(5, at=datetime(2026, 1, 1)),  # noqa: DTZ001 - that is what is refused
    ],
)
async def test_what_makes_no_sense_is_refused(
    presence: Presence, books: SqlStore, say: Callable[[Presence], Any]
) -> None:
    with pytest.raises(ValueInvalid):
        await say(presence)
    assert await told(books) == []


# -- hearing -------------------------------------------------------------------------------------------------


async def test_presence_holds_until_it_runs_out_or_somebody_leaves(
    presence: Presence, books: SqlStore, clock: LoopClock
) -> None:
    signals = listening(books, clock)
    loop = asyncio.get_running_loop()
    await presence.opened("ann")
    await presence.opened("bob", lasts=timedelta(minutes=5))
    await signals.hear()
    assert signals.view(loop.time(), worth_s=1_000).present == 2
    await asyncio.sleep(301)
    assert signals.view(loop.time(), worth_s=1_000).present == 1
    await presence.left("ann")
    at = loop.time()
    await signals.hear()
    seen = signals.view(loop.time(), worth_s=1_000)
    assert seen.present == 0
    assert seen.left_at == pytest.approx(at, abs=1)


async def test_presence_is_without_a_break_while_it_is_said_again(
    presence: Presence, books: SqlStore, clock: LoopClock
) -> None:
    signals, loop = listening(books, clock), asyncio.get_running_loop()
    began = loop.time()
    for _ in range(5):
        await presence.opened("ann")
        await signals.hear()
        await asyncio.sleep(600)
    assert signals.view(loop.time(), worth_s=1e6).since == pytest.approx(began, abs=1)


async def test_an_intent_and_a_batch_are_expected_until_they_come(
    presence: Presence, books: SqlStore, clock: LoopClock
) -> None:
    signals, loop = listening(books, clock), asyncio.get_running_loop()
    await presence.intent("ann", lasts=timedelta(minutes=2))
    await presence.batch(3, "night", work=timedelta(seconds=90), at=clock.now() + timedelta(minutes=10))
    await signals.hear()
    seen = signals.view(loop.time(), worth_s=1_000)
    assert seen.expected_until == pytest.approx(120, abs=1)
    assert [(b.count, b.work_s, round(b.at)) for b in seen.batches] == [(3, 90, 600)]
    await asyncio.sleep(600)
    assert signals.work_came(loop.time(), "", after_silence=True)
    seen = signals.view(loop.time(), worth_s=1_000)
    assert seen.expected_until is None
    assert [(b.count, b.work_s) for b in seen.batches] == [(2, 60)]
    assert signals.batched(loop.time())
    assert signals.work_came(loop.time(), "", after_silence=False)
    assert signals.work_came(loop.time(), "", after_silence=False)
    assert signals.view(loop.time(), worth_s=1_000).batches == ()
    assert not signals.work_came(loop.time(), "", after_silence=False)
    assert not signals.batched(loop.time())


async def test_a_source_that_is_never_followed_by_work_is_not_heeded_and_that_is_said_once(
    presence: Presence, books: SqlStore, clock: LoopClock
) -> None:
    said: list[str] = []
    signals, loop = listening(books, clock, said), asyncio.get_running_loop()
    for _ in range(30):
        await presence.opened("crier", lasts=timedelta(hours=1))
        await presence.opened("ann", lasts=timedelta(minutes=10))
        await signals.hear()
        await asyncio.sleep(300)
        signals.work_came(loop.time(), "", after_silence=True)
        await presence.opened("crier", lasts=timedelta(hours=1))
        await signals.hear()
        await asyncio.sleep(4 * 3_600)
        signals.view(loop.time(), worth_s=600)
    await presence.opened("crier")
    await signals.hear()
    assert signals.view(loop.time(), worth_s=600).present == 0
    await presence.opened("ann")
    await signals.hear()
    assert signals.view(loop.time(), worth_s=600).present == 1
    assert [sentence.split(" are ")[0] for sentence in said] == ["signals of crier"]


async def test_a_users_own_source_is_judged_by_that_users_jobs(
    presence: Presence, books: SqlStore, clock: LoopClock
) -> None:
    signals, loop = listening(books, clock), asyncio.get_running_loop()
    for _ in range(40):
        await presence.opened("app:ann", user="ann", lasts=timedelta(minutes=30))
        await presence.opened("app:bob", user="bob", lasts=timedelta(minutes=30))
        await signals.hear()
        await asyncio.sleep(60)
        signals.work_came(loop.time(), "ann", after_silence=True)
        await asyncio.sleep(3_600)
    await presence.opened("app:bob", user="bob")
    await signals.hear()
    assert signals.view(loop.time(), worth_s=100).present == 0
    await presence.opened("app:ann", user="ann")
    await signals.hear()
    assert signals.view(loop.time(), worth_s=100).present == 1


async def test_a_fleet_that_starts_later_hears_who_is_there(
    presence: Presence, books: SqlStore, clock: LoopClock
) -> None:
    await presence.opened("ann", lasts=timedelta(hours=1))
    await asyncio.sleep(600)
    signals = listening(books, clock)
    await signals.hear(history=True)
    signals.relived()
    seen = signals.view(asyncio.get_running_loop().time(), worth_s=1_000)
    assert seen.present == 1
    assert seen.since == pytest.approx(0, abs=1)


@pytest.mark.fault(60)
@pytest.mark.parametrize("jump", [timedelta(days=1), timedelta(days=-1)])
async def test_a_clock_that_is_set_moves_nothing_that_was_said(tmp_path: Path, jump: timedelta) -> None:
    clock = StoryClock()
    async with SqlStore(tmp_path / "books.sqlite3", clock=clock, durable=False) as books:

        async def opened() -> SqlStore:
            return books

        presence, signals = Presence(opened, clock), listening(books, clock)
        loop = asyncio.get_running_loop()
        await presence.opened("ann", lasts=QUARTER)
        await signals.hear()
        await asyncio.sleep(60)
        clock.jump(jump)
        await signals.hear()
        assert signals.view(loop.time(), worth_s=1_000).present == 1
        await presence.opened("bob", lasts=QUARTER)
        await signals.hear()
        assert signals.view(loop.time(), worth_s=1_000).present == 2
        await asyncio.sleep(901)
        assert signals.view(loop.time(), worth_s=1_000).present == 0


# -- the axis ------------------------------------------------------------------------------------------------


@pytest.mark.fault(60)
async def test_stamps_are_read_by_the_clock_they_were_made_with() -> None:
    clock = StoryClock()
    axis = Axis(clock.now)
    made: list[tuple[float, datetime]] = []
    for by in (timedelta(0), timedelta(days=1), timedelta(hours=-30), timedelta(days=3)):
        clock.jump(by)
        axis.look()
        for _ in range(3):
            await asyncio.sleep(600)
            made.append((asyncio.get_running_loop().time(), clock.now()))
            axis.look()
    assert [axis.of(stamp) for _, stamp in made[-3:]] == pytest.approx([at for at, _ in made[-3:]])
    assert [axis.of(stamp) for _, stamp in made[:3]] == pytest.approx([at for at, _ in made[:3]])
    now = asyncio.get_running_loop().time()
    assert axis.of(clock.now() + timedelta(hours=5)) == now
    assert axis.ahead(clock.now() + timedelta(seconds=90)) == pytest.approx(now + 90)


# -- the command ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("+30m", NOON + timedelta(minutes=30)),
        ("2026-11-20T18:00+00:00", datetime(2026, 11, 20, 18, tzinfo=UTC)),
        ("2026-11-21 06:30+02:00", datetime(2026, 11, 21, 4, 30, tzinfo=UTC)),
    ],
)
def test_times_as_people_write_them(text: str, at: datetime) -> None:
    assert parse_when(text, now=NOON) == at


@given(st.integers(0, 23), st.integers(0, 59))
def test_a_time_of_day_is_the_next_one(hour: int, minute: int) -> None:
    at = parse_when(f"{hour:02}:{minute:02}", now=NOON)
    assert at is not None
    assert NOON <= at <= NOON + timedelta(days=1, hours=1)
    assert (at.astimezone().hour, at.astimezone().minute) == (hour, minute)


@pytest.mark.parametrize("text", ["", "soon", "25:00", "+", "18:00:00:00", "2026-13-01"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValueInvalid):
        parse_when(text, now=NOON)


def test_the_command_writes_without_any_account(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(comfyctl, ["presence", "open", "--source", "conjure", "--for", "5m"]) == 0
    assert "conjure is there until" in capsys.readouterr().out
    assert call(comfyctl, ["presence", "batch", "--jobs", "20", "--work", "20m", "--at", "+1h", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["kind"], said["jobs"], said["work_seconds"]) == ("batch", 20, 1200)
    assert call(comfyctl, ["presence", "batch", "--source", "night", "--jobs", "20", "--work", "20m"]) == 0
    assert "20 jobs of night are expected at" in capsys.readouterr().out
    assert call(comfyctl, ["presence", "intent"]) == 0
    assert call(comfyctl, ["presence", "left", "--source", "conjure"]) == 0
    assert "conjure has left" in capsys.readouterr().out
    assert call(comfyctl, ["presence", "open", "--for", "3d"]) == 2
    assert "cannot hold" in capsys.readouterr().err
