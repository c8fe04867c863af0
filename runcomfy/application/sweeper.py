"""
Ends the prompts of cancelled jobs at the places served here.

There are two kinds: those that a run here has left behind, and those whose worker is gone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from datetime import timedelta
from typing import Any, Final, Protocol

from runcomfy.application.placing import PlaceFactory
from runcomfy.application.prompting import end_prompt
from runcomfy.domain.exceptions import LocalError, RunComfyError
from runcomfy.domain.queued import QueuedJob, RowId
from runcomfy.ports.jobs import JobStore

log = logging.getLogger("runcomfy.queue")

SWEEP_EVERY: Final = 5.0
END_WITHIN: Final = timedelta(seconds=60)
"""How long one try to see a cancelled prompt ended may take; there is another."""


class Places(Protocol):
    """Where prompts may be: an executor's station."""

    @property
    def at(self) -> PlaceFactory:
        """What one looks in with."""
        ...

    def places(self) -> Collection[str]:
        """Return the keys of the places that can be gone to."""
        ...


class Sweeper:
    """`run` for as long as the executor works."""

    def __init__(
        self,
        store: JobStore,
        station: Places,
        *,
        busy: Callable[[], Collection[RowId]],
        trouble: Callable[[LocalError], None],
    ) -> None:
        """`busy`: jobs that run here and see to their prompts themselves. `trouble` hears what the store refuses."""
        self._store, self._station, self._busy, self._trouble = store, station, busy, trouble

    async def run(self) -> None:
        """Look now and then what is to be ended."""
        while True:
            await asyncio.sleep(SWEEP_EVERY)
            places = self._station.places()
            if not places:
                continue
            try:
                rows = await self._store.to_end(places)
            except LocalError as error:
                self._trouble(error)
                continue
            busy = set(self._busy())
            await asyncio.gather(*(self._end(row) for row in rows if row.id not in busy))

    async def _end(self, row: QueuedJob) -> None:
        if row.prompt_id is None or row.place not in self._station.places():
            return
        nothing: Callable[[Any], None] = lambda _: None  # noqa: E731 - a name for its type
        try:
            async with (
                asyncio.timeout(END_WITHIN.total_seconds()),
                self._station.at(
                    job_id=row.uid, show=nothing, step=nothing, on_bill=nothing, prefer=row.place
                ) as place,
            ):
                if place.key == row.place:
                    await end_prompt(place.server, row.prompt_id, alone=place.alone)
                    await self._store.prompt_ended(row.id, row.prompt_id)
        except (RunComfyError, TimeoutError) as error:
            facts = {"job": row.uid, "error": getattr(error, "code", "timeout")}
            log.warning("prompt_not_ended", extra={"fields": facts})
