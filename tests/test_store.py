"""The database file itself: versions, damage, full disks, locks, rights, and processes that die."""

# ruff: noqa: ASYNC240 - while a test looks at a file, nobody waits for the loop

from __future__ import annotations

import asyncio
import inspect
import logging
import shutil
import sqlite3
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import fields, replace
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Table, create_engine

from runcomfy.adapters.stores import migrate, tables
from runcomfy.adapters.stores.sql import SqlStore
from runcomfy.domain.budget import Budget, Period
from runcomfy.domain.decision import Decision
from runcomfy.domain.exceptions import (
    DiskFull,
    LeaseLost,
    LocalError,
    StoreCorrupt,
    StoreTooNew,
    StoreUnavailable,
)
from runcomfy.domain.lease import Owner, Use
from runcomfy.domain.machine import (
    IllegalTransition,
    Machine,
    MachineEvent,
    MachineId,
    MachineState,
    OwnerId,
    Transition,
)
from runcomfy.domain.money import LedgerEntry
from runcomfy.domain.signal import Signal, SignalKind
from runcomfy.domain.work import Work
from runcomfy.ports.store import Store
from runcomfy.testing.clock import LoopClock, SettableClock
from runcomfy.testing.contracts.store import ALICE, BOB, NOW, a_machine, after, an_entry, an_owner, ready
from runcomfy.testing.contracts.store_words import a_work

IMPATIENT: Final = timedelta(seconds=0.2)


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
    """Another program with the same database open."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        yield connection


async def filled(path: Path) -> Machine:
    """Leave a database with one ready machine behind."""
    async with a_store(path) as store:
        return await ready(store)


# -- versions --------------------------------------------------------------------------------------------------


def scripts() -> ScriptDirectory:
    config = Config()
    config.set_main_option("script_location", str(Path(migrate.__file__).with_name("migrations")))
    config.set_main_option("path_separator", "os")
    return ScriptDirectory.from_config(config)


def test_the_head_we_compare_with_is_the_newest_script() -> None:
    assert scripts().get_heads() == [migrate.HEAD]


def shape(path: Path) -> dict[str, Any]:
    """Columns with types, nullness and keys, foreign keys and indexes of every table."""
    with somebody_else(path) as connection:
        names = [
            name
            for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            if not name.startswith("sqlite_") and name != "alembic_version"
        ]
        return {
            name: {
                "columns": sorted(row[1:] for row in connection.execute(f"PRAGMA table_info({name})")),
                "foreign": sorted(row[2:] for row in connection.execute(f"PRAGMA foreign_key_list({name})")),
                "indexes": {
                    row[1]: (row[2], [at[2] for at in connection.execute(f"PRAGMA index_info({row[1]})")])
                    for row in connection.execute(f"PRAGMA index_list({name})")
                },
            }
            for name in names
        }


async def test_the_migrations_make_the_tables_the_code_writes_to(path: Path, tmp_path: Path, store: SqlStore) -> None:
    other = tmp_path / "other.sqlite3"
    engine = create_engine(f"sqlite:///{other}")
    tables.metadata.create_all(engine)
    engine.dispose()
    assert shape(path) == shape(other)


def test_a_row_is_the_domain_object_field_by_field() -> None:
    whole: list[tuple[Table, type[Any]]] = [
        (tables.machines, Machine),
        (tables.owners, Owner),
        (tables.machine_uses, Use),
        (tables.machine_work, Work),
    ]
    for table, kind in whole:
        assert [column.name for column in table.columns] == [field.name for field in fields(kind)]
    with_more: list[tuple[Table, type[Any]]] = [(tables.ledger, LedgerEntry), (tables.machine_transitions, Transition)]
    with_more += [(tables.signals, Signal), (tables.decisions, Decision)]
    for table, kind in with_more:
        assert {field.name for field in fields(kind)} <= {column.name for column in table.columns}


async def test_opening_again_changes_nothing(path: Path) -> None:
    machine = await filled(path)
    before = shape(path)
    async with a_store(path) as store:
        assert await store.machine(machine.id) == machine
    assert shape(path) == before
    with somebody_else(path) as connection:
        [(revision, at)] = connection.execute("SELECT revision, at FROM upgrades").fetchall()
    assert revision == migrate.HEAD
    assert at.startswith("2026-11-20 10:00:0")


@pytest.mark.fault(65)
@pytest.mark.fault(56)
async def test_a_database_of_a_newer_version_is_refused_and_left_as_it_is(path: Path) -> None:
    await filled(path)
    with somebody_else(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '0999'")
        connection.execute(
            "INSERT INTO upgrades (revision, program_version, at) VALUES ('0999', '7.8.9', '2027-01-01')"
        )
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    before = path.read_bytes()
    with pytest.raises(StoreTooNew, match=r"version 7\.8\.9 .*0999") as caught:
        await a_store(path).open()
    assert "upgrade" in caught.value.hint
    assert path.read_bytes() == before


async def test_the_database_of_another_program_is_refused(path: Path) -> None:
    path.parent.mkdir()
    with somebody_else(path) as connection:
        connection.execute("CREATE TABLE recipes (name)")
    with pytest.raises(StoreUnavailable, match="another program"):
        await a_store(path).open()


async def test_a_database_that_was_never_finished_is_finished(path: Path) -> None:
    path.parent.mkdir()
    path.touch()
    assert (await filled(path)).state is MachineState.READY


async def test_opening_leaves_the_programs_log_alone(path: Path) -> None:
    before = list(logging.root.handlers), logging.root.level
    await filled(path)
    assert (list(logging.root.handlers), logging.root.level) == before


# -- damage ----------------------------------------------------------------------------------------------------


@pytest.mark.fault(56)
@pytest.mark.parametrize("where", [0, 100, 4096 * 2 + 8], ids=["the header", "the schema", "a page of a table"])
async def test_a_damaged_file_is_refused_and_says_how_machines_are_still_stopped(path: Path, where: int) -> None:
    await filled(path)
    data = bytearray(path.read_bytes())
    data[where : where + 64] = b"\xa5" * 64
    path.write_bytes(data)
    with pytest.raises(StoreCorrupt) as caught:
        await a_store(path).open()
    assert str(path) in caught.value.message
    assert "comfyctl machines ls" in caught.value.hint
    assert "machines stop" in caught.value.hint
    assert path.read_bytes() == data


@pytest.mark.fault(56)
async def test_a_file_cut_short_is_refused(path: Path) -> None:
    await filled(path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(StoreCorrupt):
        await a_store(path).open()


@pytest.mark.fault(56)
@given(st.lists(st.tuples(st.floats(0, 0.9999), st.integers(0, 255)), min_size=1, max_size=30))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_whatever_bytes_are_flipped_only_our_errors_come_out(path: Path, flips: list[tuple[float, int]]) -> None:
    template = path.with_name("template")
    if not template.exists():
        await filled(path)
        shutil.copy(path, template)
    data = bytearray(template.read_bytes())
    for where, value in flips:
        data[int(where * len(data))] = value
    for old in path.parent.glob(f"{path.name}*"):
        old.unlink()
    path.write_bytes(data)
    store = a_store(path)
    try:
        await store.open()
        await store.machines(provider="runcomfy", account="x", open_only=False)
        await store.owners()
        await store.ledger()
    except LocalError:
        pass
    finally:
        await store.close()


@pytest.mark.fault(56)
@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("requested_at", "yesterday"),
        ("usd_per_hour", "cheap"),
        ("state", "confused"),
        ("before_ids", '"one"'),
        ("duration", "long"),
        ("asked_duration", "longer"),
    ],
)
async def test_a_row_with_nonsense_in_it_is_called_damaged(
    store: SqlStore, path: Path, column: str, value: object
) -> None:
    machine = await ready(store)
    with somebody_else(path) as connection:
        connection.execute(f"UPDATE machines SET {column} = ?", (value,))  # noqa: S608 - a name of ours
    with pytest.raises(StoreCorrupt):
        await store.machine(machine.id)


BUDGETS: Final = [Budget(period, Decimal(100)) for period in Period] + [Budget(Period.DAY, Decimal(100), user="ann")]
ANYTHING: Final[dict[str, Callable[[Store, MachineId], Awaitable[object]]]] = {
    "register_owner": lambda store, _: store.register_owner(an_owner()),
    "heartbeat": lambda store, _: store.heartbeat(ALICE, at=NOW),
    "sign_off": lambda store, _: store.sign_off(ALICE, at=NOW),
    "owners": lambda store, _: store.owners(),
    "add_machine": lambda store, _: store.add_machine(a_machine(), at=NOW, budgets=BUDGETS),
    "machine": lambda store, key: store.machine(key),
    "machines": lambda store, _: store.machines(provider="runcomfy", account="a"),
    "record": lambda store, key: store.record(key, MachineEvent.SILENT, at=NOW, by=ALICE),
    "change": lambda store, key: store.change(key, at=NOW, by=ALICE, kept_until=NOW),
    "take_over": lambda store, key: store.take_over(key, expected_owner=ALICE, new_owner=BOB, at=NOW, note=""),
    "story": lambda store, key: store.story(key),
    "boot_times": lambda store, _: store.boot_times(provider="runcomfy", server_type="medium"),
    "begin_use": lambda store, key: store.begin_use(Use(key, ALICE, "job", started_at=NOW)),
    "end_use": lambda store, key: store.end_use(key, "job", at=NOW),
    "uses": lambda store, _: store.uses(),
    "ask_duration": lambda store, key: store.ask_duration(
        key, total=timedelta(hours=1), at=NOW, by=ALICE, epoch=1, budgets=BUDGETS
    ),
    "budgets": lambda store, _: store.budgets(BUDGETS, now=NOW, run_id="r"),
    "first_alert": lambda store, _: store.first_alert("day", at=NOW),
    "put_work": lambda store, key: store.put_work(a_work(a_machine(id=key))),
    "works": lambda store, key: store.works(machine_ids=[key]),
    "signal": lambda store, _: store.signal(Signal(SignalKind.OPENED, "conjure", NOW)),
    "signals": lambda store, _: store.signals(since=NOW),
    "decide": lambda store, _: store.decide([Decision(NOW, "stop", "m", "idle")]),
    "decisions": lambda store, _: store.decisions(),
    "take_role": lambda store, _: store.take_role("fleet", ALICE, lease=timedelta(seconds=60)),
    "drop_role": lambda store, _: store.drop_role("fleet", ALICE),
    "close_bill": lambda store, key: store.close_bill(key, end=after(99), recorded_at=NOW, note=""),
    "unbilled": lambda store, _: store.unbilled(provider="runcomfy", account="a"),
    "post": lambda store, key: store.post([an_entry(a_machine(id=key))]),
    "ledger": lambda store, _: store.ledger(),
    "reserve_request": lambda store, _: store.reserve_request(
        "a", now=NOW, per_second=1, burst=5, reserve=2, urgent=False
    ),
    "hold_requests": lambda store, _: store.hold_requests("a", now=NOW, wait=timedelta(seconds=1)),
    "requests_held": lambda store, _: store.requests_held("a", now=NOW),
    "take_launch_lock": lambda store, _: store.take_launch_lock("a", owner_id=ALICE, now=NOW),
    "break_launch_lock": lambda store, _: store.break_launch_lock("a", holder=ALICE),
}
READING: Final = {"requests_held", "owners", "machine", "machines", "story", "boot_times", "uses", "ledger"}
READING_OF_POOLS: Final = {"budgets", "unbilled", "works", "signals", "decisions"}
WRITING: Final = set(ANYTHING) - READING - READING_OF_POOLS


def test_the_list_of_calls_is_whole() -> None:
    port = {name for name, _ in inspect.getmembers(Store, inspect.isfunction) if not name.startswith("_")}
    assert set(ANYTHING) == port - {"open", "close"}


@pytest.mark.parametrize("call", ANYTHING)
async def test_nothing_of_the_library_gets_out_when_tables_are_gone(store: SqlStore, path: Path, call: str) -> None:
    machine = await ready(store)
    with somebody_else(path) as connection:
        for table in tables.metadata.tables:
            connection.execute(f"DROP TABLE {table}")
    with pytest.raises(StoreCorrupt):
        await ANYTHING[call](store, machine.id)


@pytest.mark.parametrize("call", ANYTHING)
async def test_a_closed_store_says_so(store: SqlStore, call: str) -> None:
    machine = await ready(store)
    await store.close()
    await store.close()
    with pytest.raises(StoreUnavailable, match="not open"):
        await ANYTHING[call](store, machine.id)


async def test_a_closed_store_can_be_opened_again(store: SqlStore) -> None:
    machine = await ready(store)
    await store.close()
    await store.open()
    await store.open()
    assert await store.machine(machine.id) == machine


@pytest.mark.threat("S8")
async def test_values_stay_out_of_errors(store: SqlStore) -> None:
    machine = a_machine(server_id="secret-server")
    await store.add_machine(machine, at=NOW)
    with pytest.raises(LocalError) as caught:
        await store.add_machine(machine, at=NOW)
    told = [str(caught.value), str(caught.value.__cause__), str(caught.value.as_dict())]
    assert not any("secret-server" in text for text in told)


@pytest.mark.parametrize("text", ["\ud800 half a character", "a\x00nul", "'; DROP TABLE machines; --", "ünïcode 日本"])
@pytest.mark.threat("S8")
async def test_any_text_can_be_written(store: SqlStore, text: str) -> None:
    machine = a_machine(reason=text, stop_reason=text)
    await store.add_machine(machine, at=NOW, note=text)
    await store.change(machine.id, at=NOW, by=ALICE, note=text, stop_reason=text + text)
    assert len(await store.story(machine.id)) == 2
    found = await store.machine(machine.id)
    assert found is not None
    assert found.reason == text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")


async def test_a_value_of_the_wrong_kind_is_the_callers_mistake(store: SqlStore) -> None:
    machine = await ready(store)
    for fields_ in ({"kept_until": "tomorrow"}, {"server_id": 5}, {"usd_per_hour": 0.99}, {"duration": 600}):
        with pytest.raises(TypeError):
            await store.change(machine.id, at=NOW, by=ALICE, note="", epoch=None, **fields_)
    assert await store.machine(machine.id) == machine


async def test_a_change_and_its_story_are_one_transaction(store: SqlStore, path: Path) -> None:
    machine = await ready(store)
    with somebody_else(path) as connection:
        connection.execute(
            "CREATE TRIGGER broken BEFORE INSERT ON machine_transitions BEGIN SELECT RAISE(ABORT, 'not today'); END"
        )
    with pytest.raises(LocalError, match="not today"):
        await store.record(machine.id, MachineEvent.SILENT, at=NOW, by=ALICE)
    assert await store.machine(machine.id) == machine
    other = a_machine()
    with pytest.raises(LocalError, match="not today"):
        await store.add_machine(other, at=NOW)
    assert await store.machine(other.id) is None


async def test_what_happened_cannot_be_rewritten(store: SqlStore, path: Path) -> None:
    machine = await ready(store)
    await store.post([an_entry(machine)])
    with somebody_else(path) as connection:
        for table in ("ledger", "machine_transitions"):
            for statement in (f"UPDATE {table} SET note = 'x'", f"DELETE FROM {table}"):  # noqa: S608 - names of ours
                with pytest.raises(sqlite3.IntegrityError, match="only ever added to"):
                    connection.execute(statement)
    assert len(await store.ledger(machine_id=machine.id)) == 1


# -- a full disk, a lock, a foreign disk -----------------------------------------------------------------------


@pytest.mark.fault(54)
async def test_a_full_disk_refuses_the_write_and_keeps_what_was_there(store: SqlStore) -> None:
    machine = await ready(store)
    # The limit belongs to a connection, so it has to be set on the store's own.
    await store._read(lambda connection: connection.exec_driver_sql("PRAGMA max_page_count = 1"))
    refused: list[DiskFull] = []
    while not refused:
        try:
            await store.add_machine(a_machine(account="full", reason="x" * 4000), at=NOW)
        except DiskFull as error:
            refused.append(error)
    assert "machines stop" in refused[0].hint
    assert await store.machine(machine.id) == machine
    stopping = await store.record(machine.id, MachineEvent.STOP_ASKED, at=NOW, by=ALICE)
    assert stopping.state is MachineState.STOPPING
    written = await store.machines(provider="runcomfy", account="full")
    await store._read(lambda connection: connection.exec_driver_sql("PRAGMA max_page_count = 100000"))
    await store.add_machine(a_machine(account="full"), at=NOW)
    assert len(await store.machines(provider="runcomfy", account="full")) == len(written) + 1


@pytest.mark.fault(55)
async def test_a_locked_database_is_readable_and_loses_no_write(store: SqlStore, path: Path) -> None:
    machine = await ready(store)
    with somebody_else(path) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailable, match="locked by another program") as caught:
            await store.record(machine.id, MachineEvent.SILENT, at=after(60), by=ALICE)
        assert "close what holds it open" in caught.value.hint
        assert await store.machine(machine.id) == machine
        other.execute("ROLLBACK")
    lost = await store.record(machine.id, MachineEvent.SILENT, at=after(60), by=ALICE)
    assert lost == await store.machine(machine.id)
    assert [step.event for step in await store.story(machine.id)] == ["added", "listed", "answered", "silent"]


@pytest.mark.fault(55)
@pytest.mark.parametrize("call", sorted(WRITING))
async def test_every_write_says_that_it_was_locked_out(store: SqlStore, path: Path, call: str) -> None:
    machine = await ready(store)
    with somebody_else(path) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailable, match="locked"):
            await ANYTHING[call](store, machine.id)


@pytest.mark.fault(55)
async def test_opening_waits_for_a_lock_only_so_long(path: Path) -> None:
    path.parent.mkdir()
    with somebody_else(path) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StoreUnavailable, match="locked"):
            await a_store(path).open()
    assert (await filled(path)).state is MachineState.READY


# -- two stores, and the machine in memory -----------------------------------------------------------------------


async def test_two_stores_on_one_file_share_the_limit_and_the_lock(path: Path) -> None:
    async with a_store(path) as one, a_store(path) as other:
        waits = [
            await store.reserve_request("a", now=NOW, per_second=1, burst=5, reserve=2, urgent=False)
            for store in (one, other, one, other, one)
        ]
        assert [wait.total_seconds() for wait in waits] == [0, 0, 0, 1, 2]
        await one.hold_requests("a", now=NOW, wait=timedelta(seconds=100))
        urgent = await other.reserve_request("a", now=NOW, per_second=1, burst=5, reserve=2, urgent=True)
        assert urgent == timedelta(seconds=100)
        assert await one.take_launch_lock("a", owner_id=ALICE, now=NOW) == ALICE
        assert await other.take_launch_lock("a", owner_id=BOB, now=NOW) == ALICE
        machine = await ready(one)
        assert await other.machine(machine.id) == machine
        await other.take_over(machine.id, expected_owner=ALICE, new_owner=BOB, at=NOW, note="")
        with pytest.raises(LeaseLost):
            await one.change(machine.id, at=NOW, by=ALICE, epoch=machine.epoch, kept_until=NOW)


moments = st.integers(0, 10**9).map(lambda micros: NOW + timedelta(microseconds=micros))
facts = st.fixed_dictionaries(
    {},
    optional={
        "server_id": st.text(max_size=5, alphabet="abc'\"%é"),
        "ready_at": moments,
        "planned_stop_at": st.none() | moments,
        "duration": st.timedeltas(timedelta(0), timedelta(days=400)),
        "usd_per_hour": st.decimals(0, 1000, places=6),
        "stop_reason": st.text(max_size=5, alphabet="abc'\"%é"),
        "before_ids": st.lists(st.text(max_size=3, alphabet="ab,"), max_size=3).map(tuple),
    },
)
owners_or_nobody = st.sampled_from([ALICE, BOB, None])
steps = st.one_of(
    st.tuples(st.just("record"), st.sampled_from(list(MachineEvent)), facts),
    st.tuples(st.just("change"), st.none(), facts),
    st.tuples(st.just("take_over"), owners_or_nobody, st.none()),
)


@given(st.lists(st.tuples(moments, st.integers(0, 1), steps), max_size=12))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_the_stored_machine_is_the_one_folded_in_memory_and_its_story_leads_there(
    store: SqlStore, history: list[tuple[Any, int, tuple[str, Any, Any]]]
) -> None:
    machine = a_machine(id=MachineId(str(uuid4())))
    await store.add_machine(machine, at=NOW)
    states = [machine.state]
    for at, stale, (verb, word, changes) in history:
        epoch = machine.epoch - stale
        expected: Machine | None = None
        try:
            if verb == "record":
                expected = replace(machine.on(word, at=at), **changes)
                told = await store.record(machine.id, word, at=at, by=ALICE, epoch=epoch, changes=changes)
            elif verb == "change":
                expected = replace(machine, **changes)
                told = await store.change(machine.id, at=at, by=ALICE, epoch=epoch, **changes)
            else:
                stale = 0
                expected = replace(machine, owner_id=word, epoch=machine.epoch + 1)
                told = await store.take_over(
                    machine.id, expected_owner=machine.owner_id, new_owner=word, at=at, note=""
                )
        except LeaseLost:
            assert stale
        except IllegalTransition:
            assert expected is None
        else:
            assert not stale
            assert told == expected
            machine = told
            states.append(machine.state)
        assert await store.machine(machine.id) == machine
    story = await store.story(machine.id)
    assert [step.number for step in story] == list(range(1, len(story) + 1))
    assert [step.state for step in story] == states
    replayed = a_machine()
    for step in story:
        if step.event in set(MachineEvent):
            replayed = replayed.on(MachineEvent(step.event), at=step.at)
        assert replayed.state == step.state


async def test_a_transition_remembers_what_changed_with_it(store: SqlStore, path: Path) -> None:
    machine = await ready(store)
    await store.take_over(machine.id, expected_owner=ALICE, new_owner=OwnerId("carol"), at=NOW, note="")
    with somebody_else(path) as connection:
        changes = [row[0] for row in connection.execute("SELECT changes FROM machine_transitions ORDER BY number")]
    assert changes == [
        "{}",
        '{"server_id": "srv-1"}',
        '{"ready_at": "2026-03-29 01:00:39.123456"}',
        '{"owner_id": "carol", "epoch": "2"}',
    ]


# -- roles -------------------------------------------------------------------------------------------------


@pytest.mark.fault(64)
async def test_who_was_stopped_while_asking_for_a_role_cuts_nobody_elses_time(path: Path) -> None:
    """Invariant I19: the time is read when it is the call's turn, not when it was made."""
    clock, minute, go_on = SettableClock(), timedelta(seconds=60), threading.Event()
    async with (
        SqlStore(path, clock=clock, durable=False) as stopped,
        SqlStore(path, clock=clock, durable=False) as other,
    ):
        database = stopped._database
        held_up = asyncio.create_task(database.in_thread(go_on.wait))
        asked = asyncio.create_task(stopped.take_role("fleet", ALICE, lease=minute))
        await asyncio.sleep(0)
        clock.off += timedelta(minutes=10)
        epoch = await other.take_role("fleet", BOB, lease=minute)
        go_on.set()
        assert await asked is None
        await held_up
        clock.off += timedelta(seconds=59)
        assert await stopped.take_role("fleet", ALICE, lease=minute) is None
        assert await other.take_role("fleet", BOB, lease=minute) == epoch
