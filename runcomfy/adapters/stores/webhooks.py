"""The queue's database as `WebhookBook`: two small tables beside the event log, on SQLite and PostgreSQL."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import Connection, Row, bindparam, delete, func, select, update

from runcomfy.adapters.stores import tables
from runcomfy.adapters.stores.jobs import SqlJobs
from runcomfy.adapters.stores.roles import must_hold
from runcomfy.adapters.stores.sql_parts import insert_or_leave
from runcomfy.domain.webhook import Delivery
from runcomfy.ports.webhooks import WEBHOOKS

_hooks, _cursor = tables.webhooks, tables.webhook_cursor
_earlier = _hooks.alias("earlier")

_DUE: Final = (
    select(_hooks)
    .where(
        _hooks.c.due_at <= bindparam("now"),
        ~select(_earlier.c.event)
        .where(
            _earlier.c.url == _hooks.c.url,
            _earlier.c.event < _hooks.c.event,
            _earlier.c.due_at <= bindparam("now"),
        )
        .exists(),
    )
    .order_by(_hooks.c.due_at, _hooks.c.event)
)
_NEXT: Final = select(func.min(_hooks.c.due_at, type_=_hooks.c.due_at.type))


class SqlWebhooks:
    """Keeps what must still be told in the database of a queue, which stays the caller's."""

    def __init__(self, jobs: SqlJobs) -> None:
        self._jobs = jobs

    async def read_to(self) -> tuple[str, int]:
        """Return the name of the queue and the number of the last event that was looked at."""

        def work(connection: Connection) -> tuple[str, int]:
            row = connection.execute(select(_cursor)).one()
            return str(row.queue), int(row.read_to)

        return await self._jobs.look(work)

    async def take_in(self, deliveries: Sequence[Delivery], *, read_to: int, epoch: int) -> None:
        """Write down messages and how far the log was read."""
        rows = [tables.values_of(delivery) for delivery in deliveries]

        def work(connection: Connection) -> None:
            must_hold(connection, WEBHOOKS, epoch)
            for row in rows:
                connection.execute(insert_or_leave(connection, _hooks), row)
            connection.execute(update(_cursor).values(read_to=read_to))

        await self._jobs.run(work)

    async def due(self, *, limit: int) -> Sequence[Delivery]:
        """Return messages whose time has come, of each address the oldest one only."""
        now = self._jobs.now()

        def work(connection: Connection) -> list[Delivery]:
            return [_delivery_of(row) for row in connection.execute(_DUE.limit(limit), {"now": now})]

        return await self._jobs.look(work)

    async def next_due(self) -> datetime | None:
        """Return when the next message is due."""

        def work(connection: Connection) -> datetime | None:
            found: datetime | None = connection.execute(_NEXT).scalar()
            return found

        return await self._jobs.look(work)

    async def put_off(self, delivery: Delivery, *, wait: timedelta, last: str, epoch: int) -> None:
        """Write down that a try failed."""
        due_at = self._jobs.now() + wait

        def work(connection: Connection) -> None:
            must_hold(connection, WEBHOOKS, epoch)
            this = update(_hooks).where(_hooks.c.event == delivery.event, _hooks.c.url == delivery.url)
            connection.execute(this.values(due_at=due_at, tries=delivery.tries + 1, last=last))

        await self._jobs.run(work)

    async def end(self, delivery: Delivery, *, epoch: int) -> None:
        """Forget a message."""

        def work(connection: Connection) -> None:
            must_hold(connection, WEBHOOKS, epoch)
            connection.execute(delete(_hooks).where(_hooks.c.event == delivery.event, _hooks.c.url == delivery.url))

        await self._jobs.run(work)

    async def end_all(self, url: str, *, epoch: int) -> int:
        """Forget every message for an address."""

        def work(connection: Connection) -> int:
            must_hold(connection, WEBHOOKS, epoch)
            return connection.execute(delete(_hooks).where(_hooks.c.url == url)).rowcount

        return await self._jobs.run(work)


def _delivery_of(row: Row[*tuple[Any, ...]]) -> Delivery:
    return Delivery(*row)
