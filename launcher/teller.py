"""
What is said of jobs, machines and money now, put together from the queue, the running jobs and the books.

One per process. Jobs are put together without asking anybody; machines and money are asked for rarely, however many
clients want to know. What it looks like is decided in `views`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary, ref

from launcher.views import Json, detail_view, event_view, job_view, live_progress, progress_view, time_left_view, usd
from runcomfy.domain.job import JobId
from runcomfy.domain.money import meter
from runcomfy.domain.progress import Step
from runcomfy.domain.queued import JobEvent, QueuedJob, QueueStatus

if TYPE_CHECKING:
    from launcher.glances import Glances
    from runcomfy.application.job_queue import JobStory
    from runcomfy.application.live import LiveJob
    from runcomfy.bootstrap import App

NOT_AT_A_MACHINE: Final = frozenset({Step.PLACING, Step.LAUNCHING, Step.BOOTING})


class Teller:
    """Says what there is to say. Made once per app (`teller_of`); belongs to its event loop."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._since: dict[JobId, datetime] = {}
        """When the jobs that run here came to their machines."""
        self._glances: Glances | None = None
        app.live.subscribe(self._heard)

    # -- jobs ----------------------------------------------------------------------------------------------

    async def job(self, job: QueuedJob) -> Json:
        """Return a job as it is now."""
        live = self._live(job)
        left = None if job.ended else await self._app.time_left().of(job, live)
        return job_view(job, live, left, cost_usd=self.cost_so_far(job, live))

    async def jobs(self, jobs: Sequence[QueuedJob]) -> list[Json]:
        """Return jobs as they are now."""
        return [await self.job(job) for job in jobs]

    async def detail(self, story: JobStory) -> Json:
        """Return everything that is known of a job."""
        job, live = story.job, self._live(story.job)
        left = None if job.ended else await self._app.time_left().of(job, live)
        return detail_view(story, live, left, cost_usd=self.cost_so_far(job, live))

    async def event(self, event: JobEvent, job: Json | None) -> Json:
        """Return a line of the log, with its job."""
        return event_view(event) | {"job": job}

    async def progress(self, job: QueuedJob, live: LiveJob | None) -> Json:
        """Return how far a job is."""
        left = await self._app.time_left().of(job, live)
        return {
            "id": job.uid,
            "number": job.id,
            "progress": live_progress(job.uid, live) if live is not None else progress_view(job, None),
            "time_left": time_left_view(left, begun=True) if left is not None else None,
            "cost_usd": usd(self.cost_so_far(job, live)),
        }

    def _live(self, job: QueuedJob) -> LiveJob | None:
        return self._app.live.job(job.uid) if job.status is QueueStatus.PROCESSING else None

    # -- what it costs -------------------------------------------------------------------------------------

    def _heard(self, live: LiveJob) -> None:
        if live.over:
            self._since.pop(live.uid, None)
        elif live.server_type and live.progress.step not in NOT_AT_A_MACHINE:
            self._since.setdefault(live.uid, self._app.clock.now())

    def cost_so_far(self, job: QueuedJob, live: LiveJob | None) -> Decimal | None:
        """Return what a running job has cost, in USD: its machine's price for the time it is at the machine.

        With what earlier attempts of it have cost. A round figure on purpose: what others at the machine take over of
        it is known when it is over. None: it runs in another process, or on a server that costs nothing here.
        """
        if live is None or job.status is not QueueStatus.PROCESSING or not live.server_type:
            return None
        rate = self._app.settings.rates.find(live.server_type)
        if rate is None:
            return None
        now = self._app.clock.now()
        since = self._since.get(live.uid)
        here = meter(since, now, rate.usd_per_hour) if since is not None and since < now else Decimal(0)
        return live.progress.earlier_usd + here

    # -- machines and money --------------------------------------------------------------------------------

    @property
    def glances(self) -> Glances:
        """Machines and money, asked for rarely."""
        from launcher.glances import Glances

        if self._glances is None:
            self._glances = Glances(self._app)
        return self._glances

    async def machines(self) -> Mapping[str, Any]:
        """Return the machines as `GET /machines` does. Raises LocalError."""
        return await self.glances.machines()

    async def money(self) -> Mapping[str, Any]:
        """Return the money as `GET /costs/now` does. Raises RunComfyError."""
        return await self.glances.money()


_TELLERS: WeakKeyDictionary[App, ref[Teller]] = WeakKeyDictionary()
"""Held weakly, for a teller holds its app: it lives as long as the app, which holds who listens to its jobs."""


def teller_of(app: App) -> Teller:
    """Return the app's teller; the hub's and the routes' are the same one."""
    held = _TELLERS.get(app)
    found = held() if held is not None else None
    if found is None:
        found = Teller(app)
        _TELLERS[app] = ref(found)
    return found
