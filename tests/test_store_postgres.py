"""The database on a server: many who start at once, servers that end, addresses with secrets, poolers, culprits."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import closing
from datetime import timedelta
from typing import Any, Final
from urllib.parse import urlsplit

import psycopg
import pytest
from sqlalchemy import Connection, text

from runcomfy.adapters.clock import SystemClock
from runcomfy.adapters.stores.choose import store_from
from runcomfy.adapters.stores.database import Database
from runcomfy.adapters.stores.migrate import HEAD
from runcomfy.adapters.stores.postgres import PostgresServer, raw
from runcomfy.adapters.stores.postgres_listen import PostgresListener
from runcomfy.adapters.stores.sql import SqlStore
from runcomfy.adapters.stores.waking import UNHEARD
from runcomfy.domain.exceptions import (
    LocalError,
    StoreTooNew,
    StoreUnavailable,
)
from runcomfy.domain.secret import Secret
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.contracts.store import NOW, an_entry, ready
from runcomfy.testing.emulators.pooler import PoolerEmulator
from runcomfy.testing.in_thread import InThread, served
from runcomfy.testing.postgres import PostgresForTests

ONE: Final = text("SELECT 1")
A_MINUTE: Final = 60


@pytest.fixture(scope="module")
def own_server(postgres_server: PostgresForTests) -> Iterator[PostgresForTests]:
    """A server that a test may end."""
    if not postgres_server.own:
        pytest.skip("the server is somebody else's, and not ended for a test")
    with PostgresForTests() as server:
        yield server


def a_database(dsn: str, **options: Any) -> Database:
    return store_from(dsn, clock=LoopClock(), **options)


def one(connection: Connection) -> int:
    return int(connection.execute(ONE).scalar_one())


# -- coming up -------------------------------------------------------------------------------------------------

CHILD: Final = """
import asyncio, sys
import runcomfy.testing.contracts.store as words
from runcomfy.adapters.clock import SystemClock
from runcomfy.adapters.stores.choose import store_from
from runcomfy.adapters.stores.sql import SqlStore

async def main():
    store = SqlStore.over(store_from(sys.stdin.readline().strip(), clock=SystemClock()))
    print("ready", flush=True)
    sys.stdin.readline()
    async with store:
        await words.ready(store, account="shared")

asyncio.run(main())
"""


def a_process(*words: str) -> subprocess.Popen[str]:
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *words], text=True, **pipes)


@pytest.mark.processes
@pytest.mark.fault(63)
async def test_four_processes_that_start_at_once_upgrade_once(postgres_server: PostgresForTests) -> None:
    dsn = postgres_server.database(empty=True)
    processes = [a_process("-W", "error", "-c", CHILD) for _ in range(4)]
    for word in (dsn, "go"):
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(word + "\n")
            process.stdin.flush()
        if word == dsn:
            for process in processes:
                assert process.stdout is not None
                assert process.stdout.readline().strip() == "ready", process.communicate()[1]
    for process in processes:
        _, words = process.communicate(timeout=A_MINUTE)
        assert process.returncode == 0, words
    async with a_database(dsn) as database:
        store = SqlStore.over(database)
        assert len(await store.machines(provider="runcomfy", account="shared")) == 4
        upgrades = await database.read(
            lambda connection: connection.execute(text("SELECT revision FROM upgrades")).scalars().all()
        )
        assert upgrades == [HEAD]
    postgres_server.drop(dsn)


async def test_who_waits_too_long_for_another_who_upgrades_says_so(postgres_server: PostgresForTests) -> None:
    dsn = postgres_server.database(empty=True)
    kind = PostgresServer(Secret(dsn), opening_timeout=timedelta(milliseconds=50))
    engine = PostgresServer(Secret(dsn)).engine()
    with engine.begin() as connection:
        kind.upgrading(connection)
        with pytest.raises(StoreUnavailable, match="locked by another program") as caught:
            await Database(kind, clock=LoopClock()).open()
    assert "comfyctl doctor" in caught.value.hint
    engine.dispose()
    async with Database(kind, clock=LoopClock()) as database:
        assert await database.read(one) == 1
    postgres_server.drop(dsn)


@pytest.mark.fault(65)
async def test_a_database_of_a_newer_version_is_refused(postgres_dsn: str) -> None:
    with psycopg.connect(postgres_dsn) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
        connection.execute(
            "INSERT INTO upgrades (revision, program_version, at) VALUES ('9999', '99.0', current_timestamp)"
        )
    with pytest.raises(StoreTooNew, match=r"version 99\.0") as caught:
        await a_database(postgres_dsn).open()
    assert str(urlsplit(postgres_dsn).password) not in caught.value.message


async def test_other_programs_may_have_tables_beside_ours_but_not_in_their_place(
    postgres_server: PostgresForTests,
) -> None:
    dsn = postgres_server.database(empty=True)
    with psycopg.connect(dsn) as connection:
        connection.execute("CREATE TABLE customers (name text)")
    async with a_database(dsn) as database:
        assert await database.read(one) == 1
    postgres_server.drop(dsn)
    for table in ("jobs", "alembic_version"):
        dsn = postgres_server.database(empty=True)
        with psycopg.connect(dsn) as connection:
            connection.execute(f"CREATE TABLE {table} (version_num text)".encode())
            connection.execute("CREATE SCHEMA runcomfy")
        with pytest.raises(StoreUnavailable, match=f"another program .*{table}") as caught:
            await a_database(dsn).open()
        assert "?options=-csearch_path%3Druncomfy" in caught.value.hint
        async with a_database(dsn + "?options=-csearch_path%3Druncomfy") as database:
            assert await SqlStore.over(database).owners() == {}
        postgres_server.drop(dsn)


async def test_the_session_is_what_the_store_counts_on(postgres_dsn: str) -> None:
    def work(connection: Connection) -> dict[str, str]:
        names = ["TimeZone", "statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"]
        names += ["synchronous_commit", "client_encoding"]
        found = {name: str(connection.execute(text(f"SHOW {name}")).scalar_one()) for name in names}
        return {**found, "application_name": raw(connection).info.parameter_status("application_name") or ""}

    async with a_database(postgres_dsn, busy_timeout=timedelta(seconds=7)) as database:
        found = await database.write(work)
    assert found.pop("application_name").startswith("comfyctl ")
    assert found == {
        "TimeZone": "UTC",
        "statement_timeout": "1min",
        "lock_timeout": "7s",
        "idle_in_transaction_session_timeout": "1min",
        "synchronous_commit": "on",
        "client_encoding": "UTF8",
    }


async def test_a_database_that_cannot_hold_every_name_is_refused(postgres_server: PostgresForTests) -> None:
    with psycopg.connect(postgres_server.dsn(), autocommit=True) as connection:
        connection.execute("CREATE DATABASE latin ENCODING LATIN1 LOCALE 'C' TEMPLATE template0")
    with pytest.raises(StoreUnavailable, match="LATIN1") as caught:
        await a_database(postgres_server.dsn("latin")).open()
    assert "UTF8" in caught.value.hint
    postgres_server.drop("latin")


@pytest.mark.parametrize(
    "statement",
    ["UPDATE ledger SET note = 'cheaper'", "DELETE FROM machine_transitions", "TRUNCATE ledger", "DELETE FROM ledger"],
)
async def test_the_server_refuses_to_rewrite_the_books(postgres_dsn: str, statement: str) -> None:
    async with a_database(postgres_dsn) as database:
        store = SqlStore.over(database)
        machine = await ready(store)
        await store.post([an_entry(machine)])
        with pytest.raises(LocalError, match="only ever added to"):
            await database.write(lambda connection: connection.execute(text(statement)))
        assert len(await store.ledger()) == 1
        assert len(await store.story(machine.id)) == 3


# -- a server that ends ----------------------------------------------------------------------------------------


async def test_a_server_that_was_restarted_meanwhile_is_not_noticed(own_server: PostgresForTests) -> None:
    async with SqlStore.over(a_database(own_server.database())) as store:
        machine = await ready(store)
        await asyncio.to_thread(own_server.restart)
        assert await store.machine(machine.id) == machine
        await asyncio.to_thread(own_server.restart)
        await store.change(machine.id, at=NOW, by=machine.owner_id or machine.id, note="after the restart")  # type: ignore[arg-type]
        assert (await store.story(machine.id))[-1].note == "after the restart"


async def test_a_server_that_is_down_is_said_and_used_again_when_it_is_back(own_server: PostgresForTests) -> None:
    async with a_database(own_server.database()) as database:
        sibling = database.sibling()
        assert await asyncio.to_thread(sibling.read, one) == 1
        await asyncio.to_thread(own_server.crash)
        try:
            for call in (database.read, database.write):
                with pytest.raises(StoreUnavailable, match="does not answer") as caught:
                    await call(one)
                assert "comfyctl machines stop" in caught.value.hint
            with pytest.raises(StoreUnavailable, match="does not answer"):
                await asyncio.to_thread(sibling.write, one)
        finally:
            await asyncio.to_thread(own_server.go_on)
        assert await database.write(one) == 1
        assert await database.read(one) == 1
        assert await asyncio.to_thread(sibling.write, one) == 1
        await asyncio.to_thread(sibling.close)


async def test_a_connection_that_ends_in_the_middle_is_said_and_made_again(postgres_dsn: str) -> None:
    def give_up(connection: Connection) -> None:
        connection.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))

    async with a_database(postgres_dsn) as database:
        for call in (database.read, database.write):
            with pytest.raises(StoreUnavailable, match="shut down"):
                await call(give_up)
            assert await call(one) == 1


@pytest.mark.looptime(False)
async def test_who_waits_for_changes_hears_of_them_again_after_a_restart(own_server: PostgresForTests) -> None:
    dsn = own_server.database()
    async with a_database(dsn) as waiting:
        mark = 0
        while not waiting.wakes_at_once:
            mark = await waiting.changed(timeout=UNHEARD, seen=mark)
        await asyncio.to_thread(own_server.restart)
        # It is woken when the line is lost, and again when there is a new one.
        before = mark
        while mark < before + 2:
            mark = await waiting.changed(timeout=timedelta(seconds=A_MINUTE), seen=mark)
        waits = asyncio.create_task(waiting.changed(timeout=timedelta(seconds=A_MINUTE), seen=mark))
        async with a_database(dsn) as other:
            await other.write(lambda connection: connection.execute(text("NOTIFY runcomfy_jobs")))
            assert await waits > mark


# -- collisions ------------------------------------------------------------------------------------------------


async def test_two_who_lock_each_other_out_both_get_through(postgres_dsn: str) -> None:
    """The server ends one of them; it is done again, and nobody hears of it."""
    met = threading.Barrier(2, timeout=A_MINUTE)
    tries: list[str] = []

    def locking(first: str, second: str) -> Callable[[Connection], str]:
        def work(connection: Connection) -> str:
            tries.append(first)
            lock = text("UPDATE accounts SET launch_lock_owner = :first WHERE account = :name")
            connection.execute(lock, {"first": first, "name": first})
            if tries.count(first) == 1:
                met.wait()
            connection.execute(lock, {"first": first, "name": second})
            return first

        return work

    async with a_database(postgres_dsn) as here, a_database(postgres_dsn) as there:
        await here.write(
            lambda connection: connection.execute(
                text("INSERT INTO accounts (account, urgent_until) VALUES ('a', '[]'), ('b', '[]')")
            )
        )
        done = await asyncio.gather(here.write(locking("a", "b")), there.write(locking("b", "a")))
    assert list(done) == ["a", "b"]
    assert len(tries) >= 3, "one was ended and done again"


async def test_rows_that_somebody_keeps_locked_are_waited_for_only_so_long(postgres_dsn: str) -> None:
    async with SqlStore.over(a_database(postgres_dsn, busy_timeout=timedelta(milliseconds=50))) as store:
        machine = await ready(store)
        with psycopg.connect(postgres_dsn) as somebody:
            somebody.execute("UPDATE machines SET reason = 'by hand'")
            with pytest.raises(StoreUnavailable, match="locked by another program") as caught:
                await store.change(machine.id, at=NOW, by=machine.owner_id or machine.id, note="")  # type: ignore[arg-type]
            somebody.rollback()
        assert "comfyctl doctor" in caught.value.hint
        assert (await store.machine(machine.id)) == machine


async def test_the_culprit_of_a_long_transaction_is_named(postgres_dsn: str) -> None:
    kind = PostgresServer(Secret(postgres_dsn))
    with psycopg.connect(postgres_dsn, application_name="a browser of\x1b databases") as somebody:
        pid = somebody.info.backend_pid
        somebody.execute("SELECT 'the secret prompt of somebody'")
        async with Database(kind, clock=LoopClock()) as database:
            [found] = await database.read(kind.open_transactions)
            none = await database.read(lambda connection: kind.open_transactions(connection, older_than=timedelta(1)))
    assert found.pid == pid
    assert found.application.startswith("a browser of")
    assert found.state == "idle in transaction"
    assert timedelta(0) <= found.age < timedelta(minutes=1)
    assert "secret prompt" not in repr(found)
    assert none == []


# -- poolers ---------------------------------------------------------------------------------------------------


@pytest.fixture
def pooler(postgres_dsn: str) -> Iterator[InThread[PoolerEmulator]]:
    parts = urlsplit(postgres_dsn)
    with served(lambda: PoolerEmulator(str(parts.hostname), int(parts.port or 5432))) as pooler:
        yield pooler


@pytest.fixture
def pooled_dsn(postgres_dsn: str, pooler: InThread[PoolerEmulator]) -> str:
    parts = urlsplit(postgres_dsn)
    netloc = f"{parts.username}:{parts.password}@127.0.0.1:{pooler.emulator.port}"
    return parts._replace(netloc=netloc).geturl()


async def test_behind_a_transaction_pooler_everything_works_but_waiting_is_short(
    pooled_dsn: str, postgres_dsn: str, pooler: InThread[PoolerEmulator]
) -> None:
    async with a_database(pooled_dsn) as database:
        store = SqlStore.over(database)
        machine = await ready(store)
        assert await store.machine(machine.id) == machine
        assert (await database.read(lambda connection: raw(connection).prepare_threshold)) is None
        loop = asyncio.get_running_loop()
        for _ in range(3):
            began = loop.time()
            await database.changed(timeout=timedelta(hours=1), seen=0)
            assert loop.time() - began == pytest.approx(UNHEARD.total_seconds())
        assert not database.wakes_at_once


def test_a_pooler_that_passes_no_call_on_is_recognised_by_trying(pooled_dsn: str) -> None:
    heard = threading.Event()
    listener = PostgresListener(PostgresServer(Secret(pooled_dsn)).connect, heard.set, patience=timedelta(seconds=0.3))
    listener.join(timeout=A_MINUTE)
    assert listener.deaf
    assert not listener.hears
    assert not heard.is_set()
    listener.stop()
    listener.stop()


def test_on_the_port_of_a_known_pooler_no_call_is_waited_for() -> None:
    def never() -> psycopg.Connection[Any]:
        raise AssertionError("nobody should connect")

    listener = PostgresListener(never, lambda: None, expects_pooler=True)
    assert listener.deaf
    listener.stop()
    kind = PostgresServer(Secret("postgresql://u:p@aws-0-eu-central-1.pooler.supabase.com:6543/postgres"))
    told = kind.listen(lambda: None)
    assert not told.hears
    told.stop()


@pytest.mark.looptime(False)
async def test_a_cut_line_is_made_again(pooled_dsn: str, pooler: InThread[PoolerEmulator]) -> None:
    async with a_database(pooled_dsn) as database:
        for _ in range(3):
            await asyncio.to_thread(pooler.call, PoolerEmulator.cut)
            assert await database.read(one) == 1
            await asyncio.to_thread(pooler.call, PoolerEmulator.cut)
            assert await database.write(one) == 1


async def test_a_long_line_is_gone_over_as_seldom_as_can_be(pooled_dsn: str, pooler: InThread[PoolerEmulator]) -> None:
    async with a_database(pooled_dsn) as database:
        await database.write(one)

        async def ways(*calls: Coroutine[Any, Any, int]) -> int:
            before = pooler.call(lambda emulator: emulator.round_trips)
            assert await asyncio.gather(*calls) == [1] * len(calls)
            return pooler.call(lambda emulator: emulator.round_trips) - before

        assert await ways(database.read(one)) == 1
        assert await ways(database.write(one)) == 3
        # Each has a savepoint and its statement; begin and commit are everybody's.
        assert await ways(*(database.write(one) for _ in range(20))) <= 3 + 2 + 2 * 19


# -- the server of the tests -----------------------------------------------------------------------------------


@pytest.mark.processes
async def test_a_test_run_that_is_killed_leaves_no_server_behind(postgres_server: PostgresForTests) -> None:
    if not postgres_server.own:
        pytest.skip("the server is somebody else's")
    script = (
        "import sys\nfrom runcomfy.testing.postgres import PostgresForTests\n"
        "server = PostgresForTests(fsync=False)\nserver.start()\n"
        "print(server.dsn(), flush=True)\nsys.stdin.readline()\n"
    )
    run = a_process("-c", script)
    assert run.stdout is not None
    dsn = run.stdout.readline().strip()
    with closing(psycopg.connect(dsn)) as connection:
        run.kill()
        run.communicate(timeout=A_MINUTE)
        # The server ends: what was open hears of it, whatever it was doing.
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT pg_sleep(60)")
    with pytest.raises(psycopg.OperationalError, match="refused"):
        psycopg.connect(dsn)


async def test_a_fresh_database_has_our_tables_and_nobody_elses_rows(postgres_server: PostgresForTests) -> None:
    dsns = [postgres_server.database() for _ in range(2)]
    async with SqlStore.over(a_database(dsns[0])) as store:
        machine = await ready(store)
    async with SqlStore.over(store_from(dsns[1], clock=SystemClock())) as store:
        assert await store.machine(machine.id) is None
    for dsn in dsns:
        postgres_server.drop(dsn)
