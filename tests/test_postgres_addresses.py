"""A server's address, which holds a password, and its errors: what is said of them, and what never is."""

from __future__ import annotations

import sys
from typing import Final
from urllib.parse import quote, urlsplit

import psycopg
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from psycopg import errors
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from runcomfy.adapters.stores.choose import is_server, store_from
from runcomfy.adapters.stores.database import Database
from runcomfy.adapters.stores.postgres import PostgresServer
from runcomfy.adapters.stores.postgres_errors import server_error
from runcomfy.adapters.stores.sql import SqlStore
from runcomfy.domain.exceptions import (
    DiskFull,
    LocalError,
    SettingInvalid,
    StoreCorrupt,
    StoreUnavailable,
)
from runcomfy.domain.secret import Secret
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.contracts.store import NOW, a_machine, ready


def a_database(dsn: str) -> Database:
    return store_from(dsn, clock=LoopClock())


def with_password(dsn: str, word: str) -> str:
    parts = urlsplit(dsn)
    return parts._replace(netloc=f"{parts.username}:{quote(word, safe='')}@{parts.hostname}:{parts.port}").geturl()


def everything_said(error: BaseException | None) -> str:
    """What a user, a log or a bug report could show of it: the error and those it came from."""
    said: list[str] = []
    while error is not None:
        said += [repr(error), str(error), str(getattr(error, "hint", ""))]
        error = error.__cause__ or error.__context__
    return "\n".join(said)


async def test_a_wrong_password_is_said_and_not_shown(postgres_dsn: str) -> None:
    word = "geheim/mit@zeichen"
    with pytest.raises(StoreUnavailable, match="does not accept this user and password") as caught:
        await a_database(with_password(postgres_dsn, word)).open()
    said = everything_said(caught.value)
    assert word not in said
    assert quote(word, safe="") not in said
    assert "settings" in caught.value.hint
    assert urlsplit(postgres_dsn).path.strip("/") in caught.value.message


async def test_a_server_that_is_not_there_and_a_database_that_is_not_are_said(postgres_dsn: str) -> None:
    nobody = urlsplit(postgres_dsn)._replace(netloc="user:geheim@127.0.0.1:1").geturl()
    with pytest.raises(StoreUnavailable, match=r"postgresql://127\.0\.0\.1:1/\w+ does not answer") as caught:
        await a_database(nobody).open()
    assert "geheim" not in everything_said(caught.value)
    missing = urlsplit(postgres_dsn)._replace(path="/nowhere").geturl()
    with pytest.raises(StoreUnavailable, match="does not exist") as caught:
        await a_database(missing).open()
    assert "createdb" in caught.value.hint


PIECES: Final = st.text(alphabet="abcdefgh", min_size=6, max_size=12).map(lambda word: f"Zq{word}")
ODD: Final = st.text(alphabet="@:/?#[]%=&+ '\\\"", min_size=1, max_size=3)


@given(words=st.lists(PIECES, min_size=2, max_size=3), odd=ODD)
@example(words=["Zqabcdef", "Zqghabcd"], odd="@")
@example(words=["Zqabcdef", "Zqghabcd"], odd="/")
@example(words=["Zqabcdef", "Zqghabcd"], odd="?")
@example(words=["Zqabcdef", "Zqghabcd"], odd="%")
@settings(max_examples=150)
def test_no_piece_of_a_password_is_shown_however_it_was_written(words: list[str], odd: str) -> None:
    """A password with an odd character that was not written as %40 splits the address in the wrong place."""
    shown, failed = "", None
    try:
        kind = PostgresServer(Secret(f"postgresql://user:{odd.join(words)}@127.0.0.1:1/db"))
        shown = kind.where + repr(kind)
        kind.connect().close()
    except (SettingInvalid, psycopg.Error, UnicodeError) as error:
        failed = error
    assert failed is not None
    shown += everything_said(failed)
    assert not [word for word in words if word in shown]


@pytest.mark.parametrize(
    ("dsn", "where"),
    [
        ("postgresql://ann:pw@db.example.com/queue", "postgresql://db.example.com:5432/queue"),
        ("postgres://ann:pw@db.example.com:6543/queue?sslmode=require", "postgresql://db.example.com:6543/queue"),
        ("postgresql+psycopg://ann:pw@[::1]:5433/queue", "postgresql://::1:5433/queue"),
        ("postgresql://ann:pw@one:5432,two:5433/queue", "postgresql://one,two:5432,5433/queue"),
        ("postgresql:///queue?host=/var/run/postgresql&user=ann&password=pw", "postgresql:///var/run/postgresql:5432/queue"),
    ],
)  # fmt: skip
def test_an_address_is_shown_by_host_and_name(dsn: str, where: str) -> None:
    database = store_from(dsn, clock=LoopClock())
    assert database.where == where
    assert is_server(dsn)


@pytest.mark.parametrize(
    "dsn", ["postgresql://u:p@h:notaport/d", "postgresql://u:p@h/d?nonsense", "postgres://u:p@ho st/d"]
)
def test_an_address_that_cannot_be_read_is_refused(dsn: str) -> None:
    with pytest.raises(SettingInvalid, match="cannot be read"):
        store_from(dsn, clock=LoopClock())


def test_what_is_no_address_is_a_path_and_other_servers_are_refused() -> None:
    assert store_from("some/where.sqlite3", clock=LoopClock()).where.endswith("where.sqlite3")
    with pytest.raises(SettingInvalid, match="mysql") as caught:
        store_from(Secret("mysql://u:geheim@h/d"), clock=LoopClock())
    assert "geheim" not in everything_said(caught.value)


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "runcomfy.adapters.stores.postgres", raising=False)
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(SettingInvalid, match="driver is not installed") as caught:
        store_from("postgresql://u:p@h/d", clock=LoopClock())
    assert "runcomfy-orchestrator[postgres]" in caught.value.hint


@pytest.mark.fault(54)
@pytest.mark.parametrize(
    ("state", "ours"),
    [
        ("53100", DiskFull),
        ("53200", StoreUnavailable),
        ("53300", StoreUnavailable),
        ("55P03", StoreUnavailable),
        ("57014", StoreUnavailable),
        ("57P01", StoreUnavailable),
        ("25006", StoreUnavailable),
        ("42501", StoreUnavailable),
        ("28P01", StoreUnavailable),
        ("40P01", StoreUnavailable),
        ("58030", StoreUnavailable),
        ("08006", StoreUnavailable),
        ("XX001", StoreCorrupt),
        ("XX002", StoreCorrupt),
        ("42P01", StoreCorrupt),
        ("42703", StoreCorrupt),
        ("23505", LocalError),
        ("22003", LocalError),
        ("P0001", LocalError),
    ],
)
def test_every_state_has_a_word_and_a_way_out(state: str, ours: type[LocalError]) -> None:
    orig = errors.lookup(state)("something\x1b[31m went wrong with geheim")
    for error in (orig, OperationalError("(hidden)", None, orig)):
        told = server_error(error, "postgresql://h:5432/d", secrets=["geheim"])
        assert type(told) is ours
        assert "\x1b" not in told.message
        assert "geheim" not in told.message
        if ours is not LocalError:
            assert "postgresql://h:5432/d" in told.message
            assert "comfyctl machines" in told.hint


@pytest.mark.fault(54)
async def test_a_full_disk_of_the_server_harms_nothing_that_was_there(postgres_dsn: str) -> None:
    """The server itself says 53100, as it does when it cannot extend a file."""
    async with SqlStore.over(a_database(postgres_dsn)) as store, a_database(postgres_dsn) as database:
        machine = await ready(store)
        await database.write(
            lambda connection: connection.execute(
                text(
                    "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
                    "RAISE EXCEPTION 'could not extend file' USING ERRCODE = '53100'; END $$; "
                    "CREATE TRIGGER full_disk BEFORE INSERT ON machines EXECUTE FUNCTION full_disk()"
                )
            )
        )
        with pytest.raises(DiskFull) as caught:
            await store.add_machine(a_machine(), at=NOW)
        assert "free some space" in caught.value.hint
        assert await store.machine(machine.id) == machine
