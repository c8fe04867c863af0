"""Where the prompts of queued jobs that have not ended may still run: what whoever ends machines must know."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from sqlalchemy import Connection, select

from runcomfy.adapters.stores.database import Database
from runcomfy.adapters.stores.tables import jobs
from runcomfy.domain.queued import Phase, QueueStatus

_PLACES: Final = (
    select(jobs.c.place)
    .where(
        jobs.c.phase != Phase.NONE,
        jobs.c.place.is_not(None),
        jobs.c.status.in_([QueueStatus.PENDING, QueueStatus.PROCESSING]),
    )
    .distinct()
)


async def prompt_places(database: Database) -> Collection[str]:
    """Return the keys of those places. Raises LocalError."""

    def work(connection: Connection) -> Collection[str]:
        return {str(place) for (place,) in connection.execute(_PLACES)}

    return await database.read(work)
