"""
The database as a server: PostgreSQL, through psycopg 3.

One connection per thread that uses it, made again when it is found dead. A pooler in between (PgBouncer, Supavisor)
is recognised by the backend's number, which it cannot know beforehand: then nothing is set for the session, nothing
is prepared, and no calls are expected. Everything else is one code path with the file (`database.py`, `sql.py`).

The address holds a password, so it is kept as a Secret, and nothing of it but host, port and database is ever shown.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final
from urllib.parse import quote

import psycopg
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import Connection, Engine, QueuePool, create_engine, event, text
from sqlalchemy.exc import DisconnectionError, SQLAlchemyError

from runcomfy.adapters.stores.errors import STILL_STOPS
from runcomfy.adapters.stores.postgres_errors import COLLISIONS, code_of, server_error
from runcomfy.adapters.stores.postgres_listen import PostgresListener
from runcomfy.adapters.stores.waking import Listener
from runcomfy.domain.exceptions import RunComfyError, SettingInvalid, StoreUnavailable, foreign_text
from runcomfy.domain.secret import Secret

OLDEST: Final = 120000
"""PostgreSQL 12; older ones get no repairs any more (PostgreSQL's versioning policy)."""

TRANSACTION_POOLER_PORT: Final = 6543
"""Supabase's shared pooler in transaction mode (Supabase manual, "Connect to your database")."""

_ONE_STARTER: Final = 0x72756E636F6D6679
"""The advisory lock of whoever upgrades: "runcomfy" in ASCII."""

_SESSION: Final = """
SELECT backend, CASE WHEN backend = %(told)s THEN ARRAY[
    set_config('TimeZone', 'UTC', false),
    set_config('lock_timeout', %(lock)s, false),
    set_config('statement_timeout', %(statement)s, false),
    set_config('idle_in_transaction_session_timeout', %(idle)s, false)
] END FROM (SELECT pg_backend_pid() AS backend) AS me
"""

_TIME: Final = text("SELECT clock_timestamp()")

_OPEN_TRANSACTIONS: Final = text("""
SELECT pid, application_name, extract(epoch FROM clock_timestamp() - xact_start), state
FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND xact_start IS NOT NULL
  AND backend_type = 'client backend'
  AND clock_timestamp() - xact_start >= make_interval(secs => :seconds)
ORDER BY xact_start
""")


@dataclass(frozen=True, slots=True)
class OpenTransaction:
    """Somebody's transaction that has not ended: what it read, or worse, locked, holds up others."""

    pid: int
    """The server process; `SELECT pg_terminate_backend(PID)` ends it."""
    application: str
    """What the program calls itself; empty if it does not."""
    age: timedelta
    state: str
    """The server's word: `active`, `idle in transaction`, …"""


class PostgresServer:
    """One database on a server. Every method blocks and belongs into the thread that uses its connection."""

    def __init__(
        self,
        dsn: Secret,
        *,
        lock_timeout: timedelta = timedelta(seconds=10),
        statement_timeout: timedelta = timedelta(seconds=60),
        idle_timeout: timedelta = timedelta(seconds=60),
        opening_timeout: timedelta = timedelta(minutes=2),
        connect_timeout: timedelta = timedelta(seconds=10),
    ) -> None:
        """Nothing is connected to before it is used.

        `lock_timeout`: how long to wait for rows that another program locks. `statement_timeout`: how long one
        statement may take; migrations may take longer. `idle_timeout`: how long a transaction of ours may do nothing
        before the server ends it. `opening_timeout`: how long to wait for another process that upgrades.

        Raises SettingInvalid if the address cannot be read.
        """
        self._parameters = _parameters(dsn)
        self._secrets = _secrets(self._parameters)
        self._where = _where(self._parameters)
        self._opening_timeout = opening_timeout
        self._connect_timeout = connect_timeout
        self._session = {
            "lock": _milliseconds(lock_timeout),
            "statement": _milliseconds(statement_timeout),
            "idle": _milliseconds(idle_timeout),
        }
        ports = str(self._parameters.get("port", "")).split(",")
        self._expects_pooler = str(TRANSACTION_POOLER_PORT) in ports

    @property
    def where(self) -> str:
        """Host, port and database; neither user nor password."""
        return self._where

    @property
    def changes_seen_by_polling(self) -> timedelta | None:
        """The server calls."""
        return None

    def written_ago(self) -> float | None:
        """Nobody looks: the server calls."""
        return None

    @property
    def shareable(self) -> bool:
        """Every connection reaches the same data."""
        return True

    @property
    def errors(self) -> tuple[type[Exception], ...]:
        """Also what the driver raises where it is used directly, and the system's word on sockets."""
        return (SQLAlchemyError, psycopg.Error, OSError)

    def error(self, error: Exception) -> RunComfyError:
        """Return what an error of the server, or of the way to it, means."""
        return server_error(error, self.where, secrets=self._secrets)

    def try_again(self, error: Exception) -> bool:
        """Whether the server ended the transaction so that others could go on."""
        return code_of(error) in COLLISIONS

    @contextmanager
    def opening(self) -> Iterator[None]:
        """Nothing has to be made before the tables, which `upgrading` guards."""
        yield

    def upgrading(self, connection: Connection) -> None:
        """Wait until nobody else upgrades; lasts until the transaction ends, which may take its time."""
        connection.exec_driver_sql(
            f"SET LOCAL lock_timeout = '{_milliseconds(self._opening_timeout)}'; SET LOCAL statement_timeout = 0; "
            "SET LOCAL idle_in_transaction_session_timeout = 0"
        )
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_ONE_STARTER})")

    def engine(self) -> Engine:
        """Return an engine with one connection, which is made again when it is found dead."""
        # hide_parameters: values (a machine's id is part of its address) stay out of error texts.
        engine = create_engine(
            "postgresql+psycopg://",
            creator=self.connect,
            poolclass=QueuePool,
            pool_size=1,
            max_overflow=0,
            hide_parameters=True,
            use_native_hstore=False,
        )
        event.listen(engine, "checkout", _must_live)
        return engine

    def reading(self, engine: Engine) -> Engine:
        """Each statement stands for itself, and costs one way there and back instead of three."""
        return engine.execution_options(isolation_level="AUTOCOMMIT")

    def writing(self) -> AbstractContextManager[None]:
        """Many write at once; the server sees to it."""
        return nullcontext()

    def check(self, connection: Connection) -> None:
        """Raise StoreUnavailable if the server is too old, or keeps text in which not every name can be written."""
        info = raw(connection).info
        if info.server_version < OLDEST:
            raise StoreUnavailable(
                f"the server of {self.where} is PostgreSQL {info.server_version // 10000}: too old",
                hint=f"upgrade it to {OLDEST // 10000} or newer; {STILL_STOPS}",
            )
        encoding = info.parameter_status("server_encoding")
        if encoding not in (None, "UTF8"):
            raise StoreUnavailable(
                f"the database {self.where} keeps text as {foreign_text(encoding, 40)}, which cannot hold every name",
                hint="make one that can: createdb --encoding=UTF8 --template=template0 NAME",
            )

    def time(self, connection: Connection) -> datetime | None:
        """Return the time on the server."""
        at: datetime = connection.execute(_TIME).scalar_one()
        return at

    def version(self, connection: Connection) -> Callable[[], int]:
        """Nobody asks a server for changes: it calls."""
        raise NotImplementedError("a server calls when something changed")

    def changes(self, connection: Connection) -> int | None:
        """Who waits hears of changes from the server, whoever made them."""
        return None

    def listen(self, changed: Callable[[], None]) -> Listener:
        """Begin to call `changed` when the server says that a job may be claimable, or that a connection was lost."""
        return PostgresListener(self.connect, changed, expects_pooler=self._expects_pooler)

    def open_transactions(
        self, connection: Connection, *, older_than: timedelta = timedelta(0)
    ) -> list[OpenTransaction]:
        """Return the transactions of others in this database, oldest first; what they ask for is not looked at.

        Without the right to see other users' work (`pg_read_all_stats`) only this user's own are seen.
        """
        found = connection.execute(_OPEN_TRANSACTIONS, {"seconds": older_than.total_seconds()})
        return [
            OpenTransaction(pid, foreign_text(application or "", 80), timedelta(seconds=float(age)), str(state or ""))
            for pid, application, age, state in found
        ]

    def connect(self) -> psycopg.Connection[Any]:
        """Return a new connection, set up for this program."""
        connection = psycopg.connect(**self._connection_parameters())
        try:
            told = connection.info.backend_pid
            row = connection.execute(
                _SESSION, {"told": -1 if self._expects_pooler else told, **self._session}
            ).fetchone()
            if row is None or row[0] != told or self._expects_pooler:
                connection.prepare_threshold = None  # the next statement may meet another server process
            connection.autocommit = False
        except BaseException:
            connection.close()
            raise
        return connection

    def _connection_parameters(self) -> dict[str, Any]:
        ours = {
            "application_name": f"comfyctl {socket.gethostname()} {os.getpid()}"[:63],
            "connect_timeout": max(2, round(self._connect_timeout.total_seconds())),
            # A server that vanished without a word is noticed in about a minute.
            "keepalives_idle": 30,
            "keepalives_interval": 10,
            "keepalives_count": 3,
            "tcp_user_timeout": 60_000,
        }
        return {**ours, **self._parameters, "client_encoding": "utf8", "autocommit": True}


def raw(connection: Connection) -> psycopg.Connection[Any]:
    """Return the driver's own connection."""
    driver: psycopg.Connection[Any] = connection.connection.dbapi_connection  # type: ignore[assignment]
    return driver


def _must_live(driver: Any, record: object, proxy: object) -> None:
    """Have the pool make a new connection if the server has hung up meanwhile: told without asking it."""
    connection: psycopg.Connection[Any] = driver
    try:
        # What can be read although nothing was asked is a last word, or the end.
        while not connection.closed and _readable(connection.pgconn.socket):
            connection.pgconn.consume_input()
            while connection.pgconn.notifies() is not None:
                pass
    except (psycopg.Error, OSError, ValueError):
        raise DisconnectionError from None
    if connection.closed:
        raise DisconnectionError


def _readable(handle: int) -> bool:
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        return bool(poll.poll(0))
    return bool(select.select([handle], [], [], 0)[0])


def _parameters(dsn: Secret) -> dict[str, Any]:
    """Read an address. What cannot be read is not quoted: any part of it may be the password."""
    written = dsn.reveal().strip().replace("postgresql+psycopg://", "postgresql://", 1)
    found: dict[str, Any] | None = None
    with suppress(psycopg.Error):  # whose text quotes it
        found = conninfo_to_dict(written)
    if found is None:
        raise _unreadable("it is not written as one")
    hosts = str(found.get("host") or "").split(",")
    if any("@" in str(found.get(name, "")) for name in ("host", "port", "dbname")):
        raise _unreadable("it has an @ too many")
    if not all(port.isdigit() or not port for port in str(found.get("port") or "").split(",")):
        raise _unreadable("its port is not a number")
    if any(host != quote(host, safe="/:.-_~%[]") for host in hosts if not host.startswith("/")):
        raise _unreadable("its host is not a name")
    return {name: value for name, value in found.items() if value is not None}


def _unreadable(why: str) -> SettingInvalid:
    return SettingInvalid(
        f"the database's address cannot be read: {why}",
        hint="write postgresql://USER:PASSWORD@HOST:5432/DATABASE; in the password, write @ as %40, / as %2F, "
        ": as %3A, ? as %3F, # as %23 and % as %25",
    )


def _secrets(parameters: dict[str, Any]) -> frozenset[str]:
    """Return what must not be shown, as it is and as it may have been written."""
    plain = [str(parameters[name]) for name in ("password", "sslpassword") if parameters.get(name)]
    return frozenset({*plain, *(quote(word, safe="") for word in plain)})


def _where(parameters: dict[str, Any]) -> str:
    hosts = str(parameters.get("host") or parameters.get("hostaddr") or os.environ.get("PGHOST") or "localhost")
    ports = str(parameters.get("port") or os.environ.get("PGPORT") or "5432")
    name = parameters.get("dbname") or os.environ.get("PGDATABASE") or parameters.get("user") or ""
    return f"postgresql://{foreign_text(hosts, 120)}:{ports}/{foreign_text(name, 80)}"


def _milliseconds(length: timedelta) -> str:
    return str(max(1, length // timedelta(milliseconds=1)))
