"""Budgets and work in the database itself: upgrades, damage, full disks, locks, rival processes, much history."""

# ruff: noqa: ASYNC240 - while a test looks at a file, nobody waits for the loop

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import pytest
from alembic import command
from sqlalchemy import Connection, insert, text

from runcomfy.adapters.clock import SystemClock
from runcomfy.adapters.stores import migrate, tables
from runcomfy.adapters.stores.choose import is_server, store_from
from runcomfy.adapters.stores.sql import SqlStore
from runcomfy.domain.budget import Budget, Period, made_out
from runcomfy.domain.decision import Decision
from runcomfy.domain.exceptions import (
    BudgetExceeded,
    DiskFull,
    StoreCorrupt,
    StoreTooNew,
    StoreUnavailable,
)
from runcomfy.domain.machine import MachineEvent, MachineId, MachineState
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.contracts.store import ALICE, NOW, a_machine, after, ready
from runcomfy.testing.contracts.store_words import a_work
from runcomfy.testing.postgres import PostgresForTests

IMPATIENT: Final = timedelta(seconds=0.2)
SIX: Final = Decimal(6)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "runcomfy.sqlite3"


@pytest.fixture
async def store(path: Path) -> AsyncIterator[SqlStore]:
    async with a_store(path) as store:
        yield store


def a_store(path: Path) -> SqlStore:
    return SqlStore(path, clock=LoopClock(), durable=False, busy_timeout=IMPATIENT)


@contextmanager
def somebody_else(path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        yield connection


# -- upgrades --------------------------------------------------------------------------------------------------

OLD_MACHINE: Final = (
    "INSERT INTO machines (id, provider, account, purpose, server_type, duration, usd_per_hour, rate_source, "
    "requested_at, since, state, workflow_version_id, reason, owner_id, epoch, before_ids, server_id, ready_at, "
    "planned_stop_at, kept_until, stop_asked_at, stop_reason, stop_accepted_at, gone_at, last_used_at) VALUES "
    "('{id}', 'runcomfy', 'a', 'run', 'medium', 600000000, '6', 'a table', '2026-03-29 00:00:00.000000', "
    "'2026-03-29 00:00:00.000000', 'ready', '', 'a job', 'alice', 1, '[]', 'srv', '2026-03-29 00:01:00.000000', "
    "'2026-03-29 00:11:00.000000', NULL, NULL, '', NULL, NULL, NULL)"
)
OLD_ENTRY: Final = (
    "INSERT INTO ledger (machine_id, started_at, ended_at, usd_per_hour, amount_usd, recorded_at, note) VALUES "
    "('old', '2026-03-29 00:01:00.000000', '2026-03-29 00:02:00.000000', '6', '0.1', '2026-03-29 00:02:00.000000', '')"
)


@pytest.fixture(params=["sqlite", "postgresql"])
def old_database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database as the version before pools left it, with a machine that runs and a bill that was begun."""
    server: PostgresForTests | None = None
    if request.param == "sqlite":
        database = str(tmp_path / "old.sqlite3")
    else:
        server = request.getfixturevalue("postgres_server")
        assert server is not None
        database = server.database(empty=True)
    with an_engine_of(database) as connection:
        config = migrate._config()
        config.attributes["connection"] = connection
        command.upgrade(config, "0002")
        connection.exec_driver_sql(OLD_MACHINE.format(id="old"))
        connection.exec_driver_sql(OLD_ENTRY)
    yield database
    if server is not None:
        server.drop(database)


@contextmanager
def an_engine_of(database: str) -> Iterator[Connection]:
    engine = store_from(database, clock=SystemClock()).kind.engine()
    try:
        with engine.begin() as connection:
            yield connection
    finally:
        engine.dispose()


def opened(database: str) -> SqlStore:
    return SqlStore.over(store_from(database, clock=LoopClock()))


@pytest.mark.fault(65)
async def test_a_machine_that_ran_during_the_upgrade_counts_and_is_billed(old_database: str) -> None:
    """I23: nothing is lost, and what an older program still writes is whole."""
    per_day = Budget(Period.DAY, Decimal("1.50"))
    async with opened(old_database) as store:
        machine = await store.machine(MachineId("old"))
        assert machine is not None
        assert (machine.run_id, machine.for_user, machine.for_project, machine.draining) == ("", "", "", "")
        assert machine.asked_duration is None
        assert (machine.state, machine.duration) == (MachineState.READY, timedelta(minutes=10))
        new = a_machine(account="a", usd_per_hour=SIX)
        with pytest.raises(BudgetExceeded):
            await store.add_machine(new, at=NOW, budgets=[per_day])
        gone = machine.requested_at + timedelta(minutes=6)
        entry = await store.close_bill(machine.id, end=gone, recorded_at=gone, note="")
        assert entry is not None
        assert (entry.started_at, entry.amount_usd) == (machine.requested_at + timedelta(minutes=2), Decimal("0.4"))
        with an_engine_of(old_database) as older:
            older.exec_driver_sql(OLD_MACHINE.format(id="later"))
        found = await store.machines(provider="runcomfy", account="a")
        assert {one.id for one in found} == {"old", "later"}
        asked, _ = await store.ask_duration(
            MachineId("later"),
            total=timedelta(hours=1),
            at=NOW,
            by=ALICE,
            epoch=1,
            budgets=[replace(per_day, hard=None)],
        )
        assert asked.asked_duration == timedelta(hours=1)


@pytest.mark.fault(65)
async def test_a_database_after_pools_is_refused_by_what_does_not_know_them(old_database: str) -> None:
    async with opened(old_database):
        pass
    with an_engine_of(old_database) as newer:
        newer.execute(text("UPDATE alembic_version SET version_num = '0005'"))
        newer.execute(text("UPDATE upgrades SET program_version = '9.8.7'"))
    with pytest.raises(StoreTooNew, match=r"version 9\.8\.7 .*0005") as caught:
        await opened(old_database).open()
    assert f"up to {migrate.HEAD}" in caught.value.message
    with an_engine_of(old_database) as connection:
        assert connection.execute(text("SELECT count(*) FROM machines WHERE id = 'old'")).scalar() == 1


@pytest.mark.fault(65)
async def test_three_that_start_at_once_upgrade_once(old_database: str) -> None:
    import asyncio

    stores = [opened(old_database) for _ in range(3)]
    await asyncio.gather(*(store.open() for store in stores))
    for store in stores:
        assert await store.machine(MachineId("old")) is not None
        await store.close()
    with an_engine_of(old_database) as connection:
        rows = connection.execute(text("SELECT revision FROM upgrades")).scalars().all()
    assert rows == [migrate.HEAD]
    assert is_server(old_database) or Path(old_database).exists()


# -- two programs ----------------------------------------------------------------------------------------------

CHILD: Final = """
import asyncio, sys
from decimal import Decimal
import runcomfy.testing.contracts.store as words
from runcomfy.adapters.clock import SystemClock
from runcomfy.adapters.stores.choose import store_from
from runcomfy.adapters.stores.sql import SqlStore
from runcomfy.domain.budget import Budget, Period
from runcomfy.domain.exceptions import BudgetExceeded

async def main():
    database = sys.stdin.readline().strip()
    budgets = [Budget(Period.DAY, Decimal("7.00"))]
    async with SqlStore.over(store_from(database, clock=SystemClock())) as store:
        print("ready", flush=True)
        sys.stdin.readline()
        written = 0
        for _ in range(6):
            machine = words.a_machine(account="shared", usd_per_hour=Decimal(6))
            try:
                await store.add_machine(machine, at=words.NOW, budgets=budgets)
            except BudgetExceeded:
                continue
            written += 1
        print(written, flush=True)

asyncio.run(main())
"""


@pytest.mark.processes
@pytest.mark.fault(63)
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_four_processes_spend_what_is_left_once(kind: str, path: Path, request: pytest.FixtureRequest) -> None:
    """I6: seven machines fit, and whoever asks for them, seven are written."""
    database = str(path) if kind == "sqlite" else request.getfixturevalue("postgres_dsn")
    async with opened(database):
        pass
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", CHILD], text=True, **pipes)  # noqa: ASYNC220
        for _ in range(4)
    ]
    for word in (database, "go"):
        for process in processes:
            process.stdin.write(word + "\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
        if word == database:
            for process in processes:
                assert process.stdout.readline().strip() == "ready", process.communicate()[1]  # type: ignore[union-attr]
    written = []
    for process in processes:
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        written.append(int(out))
    assert sum(written) == 7
    async with opened(database) as store:
        assert len(await store.machines(provider="runcomfy", account="shared")) == 7


# -- damage, full disks, locks ---------------------------------------------------------------------------------

DAY: Final = Budget(Period.DAY, Decimal(100))
ANNS: Final = Budget(Period.DAY, Decimal(100), user="ann")


@pytest.mark.fault(56)
@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE machines SET ready_at = 'yesterday, all my troubles'",
        "UPDATE machines SET usd_per_hour = 'cheap'",
        "UPDATE machines SET stop_accepted_at = 'soon'",
        "UPDATE machines SET state = 'ready', planned_stop_at = 'soon'",
        "UPDATE machine_work SET computing_at = 7",
        "UPDATE machine_work SET computed_at = 'then'",
        "DROP TABLE machine_work",
    ],
)
async def test_budgets_over_damaged_rows_refuse_and_write_nothing(store: SqlStore, path: Path, damage: str) -> None:
    """I23: what cannot be read is not taken for nothing."""
    machine = await ready(store)
    gone = after(100)
    await store.record(machine.id, MachineEvent.GONE, at=gone, by=ALICE, changes={"stop_accepted_at": gone})
    await store.put_work(a_work(machine, computing_at=after(50)))
    with somebody_else(path) as other:
        other.execute(damage)
    new = a_machine(account=machine.account)
    with pytest.raises(StoreCorrupt):
        await store.add_machine(new, at=NOW, budgets=[DAY, ANNS])
    with pytest.raises(StoreCorrupt):
        await store.budgets([DAY, ANNS], now=NOW)
    with somebody_else(path) as other:
        assert other.execute("SELECT count(*) FROM machines").fetchone() == (1,)


@pytest.mark.fault(54)
async def test_on_a_full_disk_nothing_is_launched_and_machines_still_stop(store: SqlStore) -> None:
    """I23, I4: the intent is refused before anything leaves; what stops a machine has room."""
    machine = await ready(store)
    await store._read(lambda connection: connection.exec_driver_sql("PRAGMA max_page_count = 1"))

    async def until_full(write: Any) -> DiskFull:
        for number in range(500):
            try:
                await write(number)
            except DiskFull as error:
                return error
        raise AssertionError("the disk never got full")

    notes = "x" * 4000
    for write in (
        lambda _: store.add_machine(a_machine(account="full", reason=notes), at=NOW, budgets=[DAY, ANNS]),
        lambda number: store.put_work(a_work(machine, f"{number}{notes}")),
        lambda number: store.decide([Decision(after(number), "launch", "medium", notes)] * 3),
        lambda number: store.first_alert(f"{number}{notes}", at=NOW),
    ):
        assert "machines stop" in (await until_full(write)).hint
    assert await store.machine(machine.id) == machine
    [state] = await store.budgets([DAY], now=NOW, provider="runcomfy", account=machine.account)
    assert state.committed > 0
    stopping = await store.record(machine.id, MachineEvent.STOP_ASKED, at=NOW, by=ALICE)
    assert stopping.state is MachineState.STOPPING


@pytest.mark.fault(55)
async def test_a_locked_database_tells_budgets_and_writes_no_intent(store: SqlStore, path: Path) -> None:
    machine = await ready(store)
    new = a_machine(account=machine.account)
    with somebody_else(path) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailable, match="locked"):
            await store.add_machine(new, at=NOW, budgets=[DAY])
        [state] = await store.budgets([DAY], now=NOW)
        assert state.committed > 0
        other.execute("ROLLBACK")
    assert await store.machine(new.id) is None
    assert await store.add_machine(new, at=NOW, budgets=[DAY])


async def test_a_refused_intent_leaves_others_in_the_same_commit_alone(store: SqlStore) -> None:
    import asyncio

    account = "together"
    budget = Budget(Period.DAY, Decimal("2.00"))
    machines = [a_machine(account=account, usd_per_hour=SIX) for _ in range(5)]
    answers = await asyncio.gather(
        *(store.add_machine(machine, at=NOW, budgets=[budget]) for machine in machines), return_exceptions=True
    )
    assert [isinstance(answer, BudgetExceeded) for answer in answers] == [False, False, True, True, True]
    assert len(await store.machines(provider="runcomfy", account=account)) == 2
    [state] = await store.budgets([budget], now=NOW, provider="runcomfy", account=account)
    assert state.committed == 2


HOSTILE: Final = [
    "'; DROP TABLE machines; --",
    '"',
    "%s %(x)s :since",
    "*",
    "\x00nul",
    "\ud800",
    "日本",
    "a" * 5000,
    " ",
]


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.threat("S8")
@pytest.mark.threat("S14")
async def test_whatever_people_are_called_their_budget_holds(store: SqlStore, name: str) -> None:
    budgets = made_out([Budget(Period.DAY, Decimal("1.50"), user="*")], project=name, user=name)
    assert len(budgets) == 1
    words: dict[str, Any] = {"account": "a", "usd_per_hour": SIX, "for_user": name, "for_project": name, "run_id": name}
    await store.add_machine(a_machine(**words), at=NOW, budgets=budgets)
    with pytest.raises(BudgetExceeded):
        await store.add_machine(a_machine(**words), at=NOW, budgets=budgets)
    others = made_out([Budget(Period.DAY, Decimal("1.50"), user="*")], project="", user="somebody else")
    await store.add_machine(a_machine(**{**words, "for_user": "somebody else"}), at=NOW, budgets=others)
    run = [Budget(Period.RUN, Decimal(9))]
    [state] = await store.budgets(run, now=NOW, run_id=name)
    assert state.committed == 2


# -- much history ----------------------------------------------------------------------------------------------


async def test_history_is_found_by_indexes(store: SqlStore, path: Path) -> None:
    """What a check reads is what its windows hold, however long the history before them."""
    statements: list[str] = []
    with somebody_else(path) as tracer:
        await store._read(lambda c: c.connection.dbapi_connection.set_trace_callback(statements.append))  # type: ignore[union-attr]
        budgets = [Budget(Period.DAY, SIX), Budget(Period.RUN, SIX), Budget(Period.DAY, SIX, user="ann")]
        await store.add_machine(a_machine(run_id="r", account="a"), at=NOW, budgets=budgets)
        await store.budgets(budgets, now=NOW, run_id="r")
        await store.machines(provider="runcomfy", account="a", since=NOW)
        await store.works(machine_ids=[MachineId("m")], since=NOW, limit=5)
        await store.works(since=NOW, until=after(60), limit=5)
        await store.signals(since=NOW)
        await store.decisions(since=NOW)
        await store.decisions(limit=5)
        await store.ledger(since=NOW)
        await store.close_bill((await ready(store)).id, end=after(99), recorded_at=NOW, note="")
        await store._read(lambda c: c.connection.dbapi_connection.set_trace_callback(None))  # type: ignore[union-attr]
        reads = {s for s in statements if s.lstrip().upper().startswith("SELECT")}
        assert len(reads) > 10
        for statement in reads:
            plan = [row[3] for row in tracer.execute(f"EXPLAIN QUERY PLAN {statement}")]
            scans = {step for step in plan if step.startswith("SCAN") and "json_each" not in step}
            assert not scans - {"SCAN decisions"}, (statement, plan)  # the newest so many, read from the end


async def test_twenty_thousand_machines_of_history_are_counted_to_the_cent(store: SqlStore) -> None:
    rows = []
    for number in range(20_000):
        start = NOW.replace(day=1, hour=0, minute=0) + timedelta(seconds=100 * number)
        machine = a_machine(
            id=MachineId(f"{number:05}"), account="old", state=MachineState.STOPPED, requested_at=start, ready_at=start
        )
        end = start + timedelta(minutes=10)
        rows.append(tables.values_of(replace(machine, since=end, gone_at=end, stop_accepted_at=end)))
    await store._write(lambda connection: connection.execute(insert(tables.machines), rows))
    budgets = [Budget(Period.MONTH, Decimal("3300.00"))]
    new = a_machine(account="old", duration=timedelta(0))
    [state] = await store.add_machine(new, at=NOW, budgets=budgets)
    assert state.committed == Decimal("0.165") * 20_000
    with pytest.raises(BudgetExceeded):
        await store.add_machine(a_machine(account="old"), at=NOW, budgets=budgets)
