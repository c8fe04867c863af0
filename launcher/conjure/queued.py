"""
Generations over the queue of `comfyctl serve`.

A job that is in the queue is durable: it outlives whoever asked for it, and this process. What is to follow from it is
written into the state folder beside, and done when the job ends; if this process ends first, the next one does it.

What the queue of this process does not work at (the user's own ComfyUI, while the queue runs over rented machines)
is run directly.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from launcher.backend import Backend
from launcher.conjure.engine import CLOUD, LOCAL, Engine, Made, Order, run_directly
from launcher.conjure.errors import error_of_job
from launcher.conjure.follow_up import FollowUp, follow_up
from launcher.views import error_of
from runcomfy.adapters.files import make_private_dir, write_atomically
from runcomfy.application.job_queue import workflow_id_of
from runcomfy.bootstrap import App
from runcomfy.domain.exceptions import JobNotFound, LocalError, RunComfyError, ServerUnreachable
from runcomfy.domain.job import JobId, Output, OutputKind
from runcomfy.domain.queued import NewJob, QueuedJob, QueueStatus

log = logging.getLogger("launcher.queued")

JOB_TYPE: Final = "CONJURE"
_CONNECT_SECONDS: Final = 3.0


class QueueEngine(Engine):
    """Runs orders over the backend's queue, on the event loop that serves it."""

    outlives_callers = True

    def __init__(self, backend: Backend) -> None:
        """On the backend's event loop."""
        super().__init__()
        self._backend = backend
        self._loop = asyncio.get_running_loop()
        self._resuming: set[asyncio.Task[None]] = set()

    @property
    def app(self) -> App:
        """The backend's."""
        return self._backend.app

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The backend's."""
        return self._loop

    def queues(self, where: str) -> bool:
        """Whether the queue of this process works at that place."""
        if "queue" not in self._backend.parts:
            return False
        rents = "pool" in self._backend.parts or self.app.queue_settings.where != "server"
        return rents == (where == CLOUD)

    async def run(self, order: Order) -> Made:
        """Put the job into the queue and wait for its end."""
        if not self.queues(order.where):
            return await run_directly(self.app, order, self.accepted)
        if order.where == LOCAL:
            await _must_listen(self.app.queue_settings.api_base_url)
        new = NewJob(
            order.request,
            workflow_id_of(order.request),
            job_type=JOB_TYPE,
            metadata={"conjure": {name: order.follow.get(name) for name in ("mode", "publish")}},
        )
        job = await self._backend.queue.enqueue(new)
        self.accepted(job.uid)
        # Should this process die in between, the job runs all the same, and its results are where jobs put them.
        await asyncio.to_thread(self._write, job.uid, order.follow)
        return await self._ended(job)

    async def _ended(self, job: QueuedJob) -> Made:
        try:
            return self._made(await self._backend.queue.wait(job))
        except (LocalError, asyncio.CancelledError):
            raise  # the job goes on
        except RunComfyError:
            await self.settled(job.uid)
            raise

    def _made(self, job: QueuedJob) -> Made:
        if job.status is not QueueStatus.DONE:
            raise error_of_job(error_of(job), job.uid)
        result = job.result
        return Made(
            job_id=job.uid,
            prompt_id=str(result.get("prompt_id") or ""),
            outputs={str(each.get("name", "")): _output(each) for each in result.get("outputs", ())},
            seeds={str(target): int(seed) for target, seed in dict(result.get("seeds", {})).items()},
            cost_usd=Decimal(str(result.get("cost_usd") or 0)),
        )

    # -- what follows, also after a restart ----------------------------------------------------------------

    @property
    def _pending(self) -> Path:
        return self.folder / "pending"

    def _write(self, job_id: JobId, follow: Mapping[str, Any]) -> None:
        make_private_dir(self._pending)
        write_atomically(self._pending / f"{job_id}.json", json.dumps(dict(follow)), durable=True)

    async def settled(self, job_id: str) -> None:
        """Forget what was to follow from a job: it was done, or never will be."""
        await asyncio.to_thread((self._pending / f"{job_id}.json").unlink, missing_ok=True)

    async def resume(self) -> None:
        """Take up what earlier processes have left undone; what can be done now is done in the background."""
        for job_id, follow in await asyncio.to_thread(self._left):
            task = asyncio.create_task(self._resume(job_id, follow), name="generation-resumed")
            self._resuming.add(task)
            task.add_done_callback(self._resuming.discard)

    def _left(self) -> list[tuple[JobId, FollowUp]]:
        found: list[tuple[JobId, FollowUp]] = []
        for path in sorted(self._pending.glob("*.json")):
            try:
                found.append((JobId(path.stem), FollowUp.of(json.loads(path.read_bytes()))))
            except (OSError, ValueError, TypeError):
                log.warning("follow_up_unreadable", extra={"fields": {"job": path.stem}})
        return found

    async def _resume(self, job_id: JobId, follow: FollowUp) -> None:
        try:
            job = await self._backend.queue.wait(job_id)
            if await asyncio.to_thread(_outdated, follow, job):
                await self.settled(job_id)  # something newer is there by now
                return
            await follow_up(self, self._made(job), follow)
        except (LocalError, asyncio.CancelledError):
            raise  # left for the next process
        except RunComfyError as error:
            if not isinstance(error, JobNotFound):
                log.warning("follow_up_failed", extra={"fields": {"job": job_id, "error": error.code}})
            await self.settled(job_id)

    async def close(self) -> None:
        """Stop waiting; jobs of the queue go on, and what follows from them is the next process's work."""
        tasks = list(self._resuming)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.end_work()


async def _must_listen(url: str) -> None:
    """Refuse what would only wait: nothing listens there. Raises ServerUnreachable.

    The queue would hold the job until somebody starts the ComfyUI, and whoever asked would learn nothing of it. One
    that is merely slow to answer gets the job.
    """
    parts = urlsplit(url)
    try:
        async with asyncio.timeout(_CONNECT_SECONDS):
            _, writer = await asyncio.open_connection(
                parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
            )
    except ConnectionRefusedError as error:
        raise ServerUnreachable(
            f"no ComfyUI answers at {parts.hostname}:{parts.port or ''}".rstrip(":"),
            hint="check that ComfyUI is running there and that the port is right",
        ) from error
    except (OSError, TimeoutError):
        return
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()


def _outdated(follow: FollowUp, job: QueuedJob) -> bool:
    """Whether a file at one of the places is younger than the job's results."""
    if job.end_time is None:
        return False
    for place in follow.publish:
        try:
            if (Path(follow.root) / place).stat().st_mtime > job.end_time.timestamp():
                return True
        except OSError:
            continue
    return False


def _output(facts: Mapping[str, Any]) -> Output:
    return Output(
        node=str(facts.get("node", "")),
        kind=OutputKind(str(facts.get("kind", OutputKind.FILE))),
        path=str(facts["path"]),
        size_bytes=int(facts["size_bytes"]),
        sha256=str(facts["sha256"]),
        name=str(facts.get("name", "")),
    )
