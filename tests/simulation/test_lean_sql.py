"""A lean connection says what SQLAlchemy says: the first time, when it asks SQLAlchemy itself, and ever after."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest
from sqlalchemy import Connection, StaticPool, bindparam, create_engine, func, insert, select, update
from sqlalchemy.exc import IntegrityError, NoResultFound, StatementError

from runcomfy.adapters.stores.tables import owners
from runcomfy.testing.lean_sql import LeanConnection

BEGAN = datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC)
_BY_ID = select(owners).where(owners.c.id == bindparam("key"))
_AMONG = select(owners.c.id).where(owners.c.id.in_(bindparam("ids", expanding=True))).order_by(owners.c.id)
_BEAT = update(owners).where(owners.c.id == bindparam("key"))


def _owner(name: str) -> dict[str, Any]:
    return {
        "id": name,
        "host": "here",
        "pid": 7,
        "process_started": 1.5,
        "command": "comfyctl",
        "started_at": BEGAN,
        "heartbeat_at": BEGAN,
        "ended_at": None,
    }


@pytest.fixture
def whole() -> Iterator[Connection]:
    engine = create_engine("sqlite://", poolclass=StaticPool)
    with engine.connect() as connection:
        owners.create(connection)
        connection.execute(insert(owners), [_owner(name) for name in "abc"])
        yield connection
    engine.dispose()


@pytest.fixture
def lean(whole: Connection) -> Connection:
    return cast("Connection", LeanConnection(whole))


def _queries() -> list[tuple[Any, dict[str, Any] | None]]:
    late = BEGAN + timedelta(seconds=1)
    return [
        (_BY_ID, {"key": "b"}),
        (_BY_ID, {"key": "nobody"}),
        (_AMONG, {"ids": ["c", "a", "nobody"]}),
        (_AMONG, {"ids": ["b"]}),
        (_AMONG, {"ids": []}),
        (select(owners.c.id, owners.c.heartbeat_at).where(owners.c.heartbeat_at < late).order_by(owners.c.id), None),
        (select(owners.c.id).where(owners.c.id.in_(["a", "c"]), owners.c.pid == 7).order_by(owners.c.id), None),
        (select(func.count(), func.max(owners.c.started_at)), None),
    ]


@pytest.mark.parametrize("number", range(len(_queries())))
def test_rows_are_the_same_each_time(whole: Connection, lean: Connection, number: int) -> None:
    for _ in range(4):
        query, given = _queries()[number]  # made anew, as the stores do with some
        theirs, ours = whole.execute(query, given).all(), lean.execute(query, given).all()

        assert [tuple(row) for row in ours] == [tuple(row) for row in theirs]
        assert [row._fields for row in ours] == [row._fields for row in theirs]


def test_literals_of_statements_that_read_alike_are_told_apart(lean: Connection) -> None:
    found = [lean.execute(select(owners.c.id).where(owners.c.id == name)).scalar() for name in "abcabc"]

    assert found == list("abcabc")


def test_what_is_written_is_read_again(lean: Connection) -> None:
    for seconds in range(3):
        at = BEGAN + timedelta(seconds=seconds)

        assert lean.execute(_BEAT, {"key": "b", "heartbeat_at": at}).rowcount == 1
        assert lean.execute(_BY_ID, {"key": "b"}).one().heartbeat_at == at
    assert lean.execute(_BEAT, {"key": "nobody", "heartbeat_at": BEGAN}).rowcount == 0


def test_mistakes_are_sqlalchemys(lean: Connection) -> None:
    for name in "de":
        lean.execute(insert(owners), _owner(name))
    for _ in range(3):
        with pytest.raises(IntegrityError):
            lean.execute(insert(owners), _owner("a"))
        with pytest.raises(IntegrityError):
            lean.exec_driver_sql("INSERT INTO owners (id) VALUES (:id)", {"id": "a"})
        with pytest.raises(NoResultFound):
            lean.execute(_BY_ID, {"key": "nobody"}).one()
        with pytest.raises(StatementError):
            lean.execute(_BY_ID, {})
        with pytest.raises(StatementError):
            lean.execute(_BEAT, {"key": "a", "heartbeat_at": BEGAN.replace(tzinfo=None)})
