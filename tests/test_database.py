"""The thread a database lives in, over a file and over a server: shared commits, waiting, time, siblings."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, text

from runcomfy.adapters.clock import SystemClock
from runcomfy.adapters.stores.choose import store_from
from runcomfy.adapters.stores.database import Database
from runcomfy.adapters.stores.server_time import MEASURED_EVERY, ServerTime, steady
from runcomfy.adapters.stores.waking import UNHEARD
from runcomfy.domain.exceptions import LeaseLost, LocalError, RunComfyError, StoreUnavailable
from runcomfy.ports.clock import Clock
from runcomfy.testing.clock import START, LoopClock

SOON = timedelta(seconds=30)
"""Longer than any machine takes; nothing is measured by it."""

Make = Callable[..., Database]


@pytest.fixture(params=["file", "server"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """One place, which several databases may open."""
    if request.param == "server":
        return str(request.getfixturevalue("postgres_dsn"))
    return str(tmp_path / "store.sqlite3")


@pytest.fixture
def make(where: str) -> Make:
    def one(clock: Clock | None = None, **options: Any) -> Database:
        options = {"durable": False, "wake_interval": timedelta(milliseconds=20), **options}
        return store_from(where, clock=clock or LoopClock(), **options)

    return one


@pytest.fixture
async def database(make: Make) -> AsyncIterator[Database]:
    async with make() as database:
        yield database


def note(word: str) -> Callable[[Connection], str]:
    """Write a row that is there once, and return its word."""

    def work(connection: Connection) -> str:
        connection.execute(
            text("INSERT INTO upgrades (revision, program_version, at) VALUES (:word, '', '2026-01-01 00:00:00')"),
            {"word": word},
        )
        return word

    return work


def call(connection: Connection) -> None:
    """Change something that others wait for: a row of a file is enough, a server must be told to call."""
    note("called")(connection)
    if connection.dialect.name == "postgresql":
        connection.execute(text("NOTIFY runcomfy_jobs"))


def words(connection: Connection) -> list[str]:
    """Return the words that were noted, in order."""
    found = connection.execute(text("SELECT revision FROM upgrades WHERE program_version = '' ORDER BY number"))
    return [str(word) for (word,) in found]


# -- group commit ----------------------------------------------------------------------------------------------


async def together(database: Database, *works: Callable[[Connection], Any]) -> list[Any]:
    """Have writes wait for the thread at the same time; return what came of each, errors too."""
    go_on = threading.Event()
    busy = asyncio.create_task(database.read(lambda _: go_on.wait(60)))
    await asyncio.sleep(0)
    writes = [asyncio.create_task(database.write(work)) for work in works]
    await asyncio.sleep(0)
    go_on.set()
    await busy
    return await asyncio.gather(*writes, return_exceptions=True)


def refuse(connection: Connection) -> None:
    note("never seen")(connection)
    raise LeaseLost("somebody was quicker")


def break_a_rule(connection: Connection) -> None:
    note("never seen")(connection)
    connection.execute(text("INSERT INTO ledger (machine_id, note) VALUES ('no such machine', '')"))


@pytest.mark.parametrize(("harm", "error"), [(refuse, LeaseLost), (break_a_rule, LocalError)])
async def test_one_write_that_fails_takes_none_of_those_beside_it_along(
    database: Database, harm: Callable[[Connection], None], error: type[RunComfyError]
) -> None:
    before = [note(f"before {number}") for number in range(20)]
    after = [note(f"after {number}") for number in range(20)]
    done = await together(database, *before, harm, *after)
    [failed] = [item for item in done if isinstance(item, BaseException)]
    assert isinstance(failed, error)
    expected = [*(f"before {number}" for number in range(20)), *(f"after {number}" for number in range(20))]
    assert [item for item in done if isinstance(item, str)] == expected
    assert await database.read(words) == expected


async def test_writes_that_wait_together_share_a_transaction(database: Database) -> None:
    seen: list[object] = []

    def work(connection: Connection) -> None:
        seen.append(connection.get_transaction())
        note("one of many")(connection)

    assert await together(database, *[work] * 100) == [None] * 100
    assert len(await database.read(words)) == 100
    assert len(seen) == 100
    assert all(transaction is seen[0] for transaction in seen)


async def test_all_of_them_hear_that_the_commit_failed(database: Database) -> None:
    def lose_the_connection(connection: Connection) -> None:
        note("lost")(connection)
        connection.invalidate()

    lost = await together(database, note("one"), lose_the_connection, note("two"))
    assert [type(item) for item in lost] == [StoreUnavailable] * 3
    assert await database.write(note("after")) == "after"
    assert await database.read(words) == ["after"]


async def test_a_value_of_the_wrong_kind_is_the_callers_defect_and_nobody_elses(database: Database) -> None:
    from runcomfy.adapters.stores import tables

    def work(connection: Connection) -> None:
        connection.execute(tables.upgrades.insert().values(revision=4711, program_version="", at=START))

    good, bad = await together(database, note("good"), work)
    assert good == "good"
    assert isinstance(bad, TypeError)


# -- waiting for changes ---------------------------------------------------------------------------------------


async def settled(database: Database) -> int:
    """Return the mark once waits last until something happens: a server must first have shown that it calls."""
    mark = await database.changed(timeout=timedelta(0))
    while not database.wakes_at_once:
        mark = await database.changed(timeout=UNHEARD, seen=mark)
    await asyncio.sleep(0)  # the call that told it so
    return await database.changed(timeout=timedelta(0), seen=mark)


@pytest.mark.looptime(False)
async def test_a_change_by_another_process_wakes_who_waits(make: Make) -> None:
    async with make() as waiting, make() as other:
        mark = await settled(waiting)
        for _ in range(3):
            waits = asyncio.create_task(waiting.changed(timeout=SOON, seen=mark))
            await asyncio.sleep(0)
            await other.write(call)
            found = await waits
            assert found > mark
            mark = found


@pytest.mark.looptime(False)
async def test_a_change_between_two_waits_is_not_missed(make: Make) -> None:
    async with make() as waiting, make() as other:
        mark = await settled(waiting)
        await other.write(call)
        assert await waiting.changed(timeout=SOON, seen=mark) > mark


@pytest.mark.looptime(False)
async def test_what_this_process_writes_wakes_its_own_waiters(make: Make) -> None:
    async with make() as database:
        mark = await database.changed(timeout=timedelta(0))
        waits = [asyncio.create_task(database.changed(timeout=SOON, seen=mark)) for _ in range(3)]
        await asyncio.sleep(0)
        await database.write(note("for the waiters"), wakes=True)
        assert all(found > mark for found in await asyncio.gather(*waits))


async def test_who_wrote_nothing_wakes_nobody(database: Database) -> None:
    """Else two idle workers would wake each other for ever by looking for work."""
    mark = await settled(database)
    waits = asyncio.create_task(database.changed(timeout=timedelta(minutes=2), seen=mark))
    for _ in range(5):
        await database.write(lambda connection: connection.execute(text("UPDATE upgrades SET revision = '' WHERE 1=0")))
        await database.write(note("silently"), wakes=False)
    assert await waits == mark


async def test_waiting_ends_with_its_timeout(database: Database) -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    mark = await database.changed(timeout=timedelta(minutes=1))
    assert mark >= 0
    assert loop.time() - began <= 60.001


async def test_an_old_mark_ends_the_wait_at_once(database: Database) -> None:
    await database.write(note("something"), wakes=True)
    began = asyncio.get_running_loop().time()
    mark = await database.changed(timeout=SOON, seen=-1)
    assert asyncio.get_running_loop().time() == began
    assert mark >= 0


async def test_hours_of_waiting_for_a_file_cost_little(tmp_path: Path) -> None:
    """Under virtual time each look at the file costs real time, so its interval can be made long."""
    async with store_from(
        tmp_path / "store.sqlite3", clock=LoopClock(), wake_interval=timedelta(seconds=30)
    ) as database:
        began = asyncio.get_running_loop().time()
        await database.changed(timeout=timedelta(hours=8))
        assert asyncio.get_running_loop().time() - began == pytest.approx(8 * 3600)


async def test_a_file_is_asked_again_by_a_new_connection(tmp_path: Path) -> None:
    async with store_from(tmp_path / "store.sqlite3", clock=LoopClock()) as database:
        with pytest.raises(StoreUnavailable):
            await database.read(lambda connection: connection.connection.dbapi_connection.close())  # type: ignore[union-attr]
        with pytest.raises(StoreUnavailable):
            await database.changed(timeout=SOON)
        mark = await database.changed(timeout=SOON)
        async with store_from(tmp_path / "store.sqlite3", clock=LoopClock()) as other:
            await other.write(call)
            assert await database.changed(timeout=SOON, seen=mark) > mark


async def test_a_closed_database_cannot_be_waited_for(make: Make) -> None:
    database = make()
    with pytest.raises(StoreUnavailable, match="not open"):
        await database.changed(timeout=SOON)
    async with database:
        pass
    with pytest.raises(StoreUnavailable, match="not open"):
        await database.changed(timeout=SOON)


async def test_who_waits_is_let_go_when_the_database_is_closed(make: Make) -> None:
    database = make()
    await database.open()
    waits = [asyncio.create_task(database.changed(timeout=SOON)) for _ in range(3)]
    await asyncio.sleep(0)
    began = asyncio.get_running_loop().time()
    await database.close()
    await asyncio.gather(*waits)
    assert asyncio.get_running_loop().time() - began < SOON.total_seconds()


# -- time ------------------------------------------------------------------------------------------------------


class FastClock(SystemClock):
    """This computer's clock, a day ahead of everybody else's."""

    def now(self) -> datetime:
        return super().now() + timedelta(days=1)


async def test_a_story_goes_by_its_own_clock(database: Database) -> None:
    assert START <= database.now() < START + timedelta(minutes=1)
    await asyncio.sleep(3600)
    assert START + timedelta(hours=1) <= database.now() < START + timedelta(hours=1, minutes=1)


@pytest.mark.fault(60)
async def test_on_a_server_the_workers_own_clock_counts_for_nothing(postgres_dsn: str) -> None:
    async with (
        store_from(postgres_dsn, clock=FastClock()) as ahead,
        store_from(postgres_dsn, clock=SystemClock()) as right,
    ):
        asked = await right.read(lambda connection: connection.execute(text("SELECT clock_timestamp()")).scalar_one())
        for database in (ahead, right):
            assert database.now().tzinfo is UTC
            assert abs(database.now() - asked) < timedelta(minutes=1)
        by_itself = store_from(postgres_dsn, clock=FastClock(), server_time=False)
        async with by_itself:
            assert by_itself.now() - right.now() > timedelta(hours=23)


async def test_a_file_is_shared_by_who_lives_by_this_computers_clock(tmp_path: Path) -> None:
    async with store_from(tmp_path / "store.sqlite3", clock=FastClock()) as database:
        assert database.now() - datetime.now(UTC) > timedelta(hours=23)


class Pendulum:
    """A steady clock that is moved by hand."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def test_the_servers_time_goes_on_by_the_steady_clock() -> None:
    swings = Pendulum()
    time = ServerTime(steady=swings)
    due = [time.due]
    assert time.now() is None

    def ask() -> datetime:
        swings.seconds += 0.2  # there and back
        return START

    time.measure(ask)
    due.append(time.due)
    assert time.now() == START + timedelta(seconds=0.1)
    swings.seconds += 30
    assert time.now() == START + timedelta(seconds=30.1)
    due.append(time.due)
    swings.seconds += MEASURED_EVERY.total_seconds()
    due.append(time.due)
    assert due == [True, False, False, True]


@pytest.mark.fault(64)
def test_an_answer_that_was_long_on_its_way_does_not_move_the_time() -> None:
    """The process was stopped for ten minutes between question and answer."""
    swings = Pendulum()
    delays = [600.0, 0.2, 600.0, 600.0, 600.0]

    def ask() -> datetime:
        at = START + timedelta(seconds=swings.seconds - 1000)
        swings.seconds += delays.pop(0)
        return at

    time = ServerTime(steady=swings)
    for left in (3, 0):
        time.measure(ask)
        assert len(delays) == left
        off = time.now() or START
        assert abs(off - START - timedelta(seconds=swings.seconds - 1000)) <= timedelta(seconds=0.1)


def test_a_server_whose_clock_was_set_is_believed() -> None:
    swings = Pendulum()
    time = ServerTime(steady=swings)
    time.measure(lambda: START)
    time.measure(lambda: START - timedelta(days=1))
    assert time.now() == START - timedelta(days=1)


def test_the_steady_clock_only_goes_forward() -> None:
    found = [steady() for _ in range(100)]
    assert found == sorted(found)


# -- siblings --------------------------------------------------------------------------------------------------


@pytest.fixture(params=["file", "server", "memory"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "server":
        yield str(request.getfixturevalue("postgres_dsn"))
    else:
        yield ":memory:" if request.param == "memory" else str(tmp_path / "store.sqlite3")


async def test_another_thread_reads_and_writes_the_same_database(anywhere: str) -> None:
    async with store_from(anywhere, clock=LoopClock()) as database:
        await database.write(note("from the loop"))

        def in_a_thread() -> list[str]:
            with database.sibling() as sibling:
                with pytest.raises(LocalError):
                    sibling.write(break_a_rule)
                assert sibling.write(note("from the thread")) == "from the thread"
                return sibling.read(words)

        assert await asyncio.to_thread(in_a_thread) == ["from the loop", "from the thread"]
        assert await database.read(words) == ["from the loop", "from the thread"]


async def test_a_sibling_does_not_wait_for_what_the_database_does(database: Database) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def long_read(connection: Connection) -> None:
        inside.set()
        assert go_on.wait(60)

    def in_a_thread() -> list[str]:
        assert inside.wait(60)
        try:
            with database.sibling() as sibling:
                sibling.write(note("meanwhile"))
                return sibling.read(words)
        finally:
            go_on.set()

    found, _ = await asyncio.gather(asyncio.to_thread(in_a_thread), database.read(long_read))
    assert found == ["meanwhile"]


async def test_a_sibling_of_a_closed_database_in_memory_says_so() -> None:
    async with store_from(":memory:", clock=LoopClock()) as database:
        sibling = database.sibling()
    with pytest.raises(StoreUnavailable, match="not open"):
        await asyncio.to_thread(sibling.read, words)
