"""
Hearing what the server calls, in a thread and on a connection of its own.

Whether a call arrives is not believed but tried: after LISTEN another connection sends one, and only when that was
heard, those who wait may rely on being called. Behind a pooler that hands out another server process for every
transaction it never arrives; then the thread ends, and they look again by themselves.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final
from uuid import uuid4

import psycopg

CHANNEL: Final = "runcomfy_jobs"
"""What the triggers of the `jobs` table call on."""

_TRIAL_TIMEOUT: Final = timedelta(seconds=5)
"""A call takes milliseconds; over a long line with TLS for the second connection, a second."""

_AGAIN_FIRST: Final = timedelta(seconds=0.5)
_AGAIN_MOST: Final = timedelta(seconds=30)
"""Waits before a lost connection is made again, doubled each time."""

_Selector: Final = getattr(selectors, "PollSelector", selectors.SelectSelector)
"""Unlike the usual one it takes no file handle: where none is left, the thread still has to wait for better times."""


class PostgresListener:
    """Keeps `runcomfy.adapters.stores.waking.Listener`."""

    def __init__(
        self,
        connect: Callable[[], psycopg.Connection[Any]],
        changed: Callable[[], None],
        *,
        expects_pooler: bool = False,
        patience: timedelta = _TRIAL_TIMEOUT,
    ) -> None:
        """`patience`: how long the call that is made to try it may take."""
        self._connect = connect
        self._patience = patience.total_seconds()
        self._changed = changed
        self._hears = False
        self._deaf = expects_pooler
        # The socket pair ends a wait at once, without a thread that wakes up to look whether it should end.
        self._stopped, self._stop = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="store listener", daemon=True)
        if not self._deaf:
            self._thread.start()

    @property
    def hears(self) -> bool:
        """Whether a change would be heard now."""
        return self._hears

    @property
    def deaf(self) -> bool:
        """Whether calls never arrive here (a transaction pooler is in between): it was given up."""
        return self._deaf

    def stop(self) -> None:
        """End the thread; blocks until it has ended. Harmless when repeated."""
        self._stop.close()
        self.join()
        self._stopped.close()

    def join(self, *, timeout: float | None = None) -> None:
        """Wait until the thread has ended: stopped, or given up."""
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _run(self) -> None:
        wait = _AGAIN_FIRST
        while True:
            try:
                with contextlib.closing(self._connect()) as connection:
                    connection.autocommit = True
                    connection.execute(f"LISTEN {CHANNEL}")
                    if self._tried(connection):
                        wait = _AGAIN_FIRST
                        self._listen(connection)
                    return
            except (psycopg.Error, OSError):
                # What is wrong with the server, those who use it hear from their own connection.
                if self._hears:
                    self._hears = False
                    self._changed()  # who waits must look by himself now
            if self._ended(within=wait):
                return
            wait = min(wait * 2, _AGAIN_MOST)

    def _tried(self, connection: psycopg.Connection[Any]) -> bool:
        """Whether a call from another connection arrives."""
        word = str(uuid4())
        with contextlib.closing(self._connect()) as other:
            other.autocommit = True
            other.execute("SELECT pg_notify(%s, %s)", (CHANNEL, word))
        until = time.monotonic() + self._patience
        while (left := until - time.monotonic()) > 0:
            if word in self._calls(connection):
                return True
            if self._waited(connection, within=left):
                return False
        self._deaf = True
        return False

    def _listen(self, connection: psycopg.Connection[Any]) -> None:
        """Pass on every call; return when the listener is stopped. Raises psycopg.Error if the connection ends."""
        self._changed()  # whatever happened before it could be heard
        self._hears = True
        while not self._waited(connection):
            if self._calls(connection):
                self._changed()

    def _calls(self, connection: psycopg.Connection[Any]) -> list[str]:
        """Return what was called and not read yet, without waiting."""
        connection.pgconn.consume_input()
        calls: list[str] = []
        while (call := connection.pgconn.notifies()) is not None:
            calls.append(call.extra.decode())
        return calls

    def _waited(self, connection: psycopg.Connection[Any], *, within: float | None = None) -> bool:
        """Wait until the connection can be read or the time is over; return whether the listener was stopped."""
        return self._wait(connection.pgconn.socket, within)

    def _ended(self, *, within: timedelta) -> bool:
        return self._wait(None, within.total_seconds())

    def _wait(self, handle: int | None, seconds: float | None) -> bool:
        with _Selector() as selector:
            selector.register(self._stopped, selectors.EVENT_READ)
            if handle is not None:
                selector.register(handle, selectors.EVENT_READ)
            return any(key.fileobj is self._stopped for key, _ in selector.select(seconds))
