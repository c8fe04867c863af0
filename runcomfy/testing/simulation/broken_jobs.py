"""How promises about jobs and results are broken on purpose (`switches.py`)."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch
from uuid import uuid4

from runcomfy.adapters import media
from runcomfy.adapters.comfyui.client import ComfyUIWorkflowClient
from runcomfy.adapters.comfyui.submit import Submission
from runcomfy.adapters.media_source import Corrupt
from runcomfy.adapters.stores.jobs import SqlJobs
from runcomfy.application.watcher import _Watch
from runcomfy.domain.queued import Ending, NewJob, Outcome, QueuedJob, QueueStatus, Reason
from runcomfy.domain.retry import RetryPolicy
from runcomfy.testing.simulation.broken_machines import instead
from runcomfy.testing.simulation.harm import harm_of
from runcomfy.testing.simulation.load import number_of

if TYPE_CHECKING:
    from runcomfy.testing.simulation.world import World


@contextmanager
def forgotten(_: World) -> Iterator[None]:
    """Lose the name and the key of every third job after it was accepted: whoever asked for it finds it no more."""

    def add(real: Any) -> Any:
        async def added(self: SqlJobs, jobs: Sequence[NewJob], **given: Any) -> Any:
            rows = await real(self, jobs, **given)
            for row in rows:
                if row.id % 3 == 0:
                    await self.run(lambda connection, row=row: _lose(connection, row))  # type: ignore[misc]
            return rows

        return added

    with instead(SqlJobs, "add", add):
        yield


def _lose(connection: Any, row: QueuedJob) -> None:
    from sqlalchemy import text

    lost = {"id": row.id, "name": f"nobody-asked-for-{row.id}", "key": None}
    connection.execute(text("UPDATE jobs SET config_name = :name, idempotency_key = :key WHERE id = :id"), lost)


@contextmanager
def published_twice(_: World) -> Iterator[None]:
    """Give the results of a job a second name when it is done."""

    def finish(real: Any) -> Any:
        async def finished(self: SqlJobs, *given: Any, **named: Any) -> Any:
            row = await real(self, *given, **named)
            if row.status is QueueStatus.DONE:
                for output in row.result.get("outputs", ()):
                    path = Path(output["path"])
                    shutil.copyfile(path, path.with_stem(f"{path.stem}-again"))
            return row

        return finished

    with instead(SqlJobs, "finish", finish):
        yield


@contextmanager
def on_two_machines(world: World) -> Iterator[None]:
    """Send each job's first prompt to another machine, too."""
    doubled: set[int | None] = set()

    def submit(real: Any) -> Any:
        async def submitted(self: Any, graph: Mapping[str, Any], *, prompt_id: Any) -> Any:
            answer = await real(self, graph, prompt_id=prompt_id)
            for _, comfyui in harm_of(world).comfyuis():
                process = comfyui.process
                held = {item[1] for item in (*process.queue.waiting, *process.queue.running.values())}
                if prompt_id not in held and number_of(graph) not in doubled:
                    doubled.add(number_of(graph))
                    again = str(uuid4())
                    outputs = [name for name, node in graph.items() if node["class_type"].startswith("Save")]
                    process.queue.put((process.counter, again, dict(graph), {}, outputs, {}))
                    process.counter += 1
            return answer

        return submitted

    with instead(ComfyUIWorkflowClient, "submit", submit):
        yield


@contextmanager
def submits_blindly(_: World) -> Iterator[None]:
    """Send a prompt again without having looked for it."""

    async def never(self: Submission) -> bool:
        return False

    with patch.object(Submission, "_was_queued", never):
        yield


@contextmanager
def tries_too_often(_: World) -> Iterator[None]:
    """Count the first twelve tries of a job for nothing."""

    def decide(real: Any) -> Any:
        def decided(self: RetryPolicy, error: Any, **given: Any) -> Any:
            return real(self, error, **{**given, "retries_attempted": max(0, given["retries_attempted"] - 12)})

        return decided

    with instead(RetryPolicy, "decide", decide):
        yield


@contextmanager
def takes_anything(_: World) -> Iterator[None]:
    """Find nothing wrong with a picture."""

    def check(real: Any) -> Any:
        def checked(*given: Any, **named: Any) -> Any:
            try:
                return real(*given, **named)
            except Corrupt:
                return {"width": 32, "height": 32}

        return checked

    with instead(media, "_check_picture", check):
        yield


@contextmanager
def ignores_keys(_: World) -> Iterator[None]:
    """Take every job for a new one."""

    def add(real: Any) -> Any:
        async def added(self: SqlJobs, jobs: Sequence[NewJob], **given: Any) -> Any:
            known = {row.config_name for row in await self.jobs()}
            fresh = [
                replace(job, idempotency_key=None, config_name=job.config_name if job.config_name not in known else "")
                for job in jobs
            ]
            return await real(self, fresh, **given)

        return added

    with instead(SqlJobs, "add", add):
        yield


@contextmanager
def forgets_cancels(_: World) -> Iterator[None]:
    """Answer a cancel as if it had been done."""

    def cancel(_: Any) -> Any:
        async def cancelled(self: SqlJobs, key: Any, *, by: str = "") -> Any:
            row = await self.job(key)
            return row and replace(row, status=QueueStatus.FAILED, reason=Reason.CANCELLED)

        return cancelled

    with instead(SqlJobs, "cancel", cancel):
        yield


@contextmanager
def never_polls(_: World) -> Iterator[None]:
    """Ask a server when its socket says that something has ended, and else 25 minutes later than is due."""

    def due(real: Any) -> Any:
        def when(self: Any) -> float:
            evidence = self.state.evidence
            told = evidence.succeeded or evidence.failure is not None or evidence.interrupted
            at: float = real(self)
            return at if told else at + 1_500.0

        return when

    with instead(_Watch, "_due", due):
        yield


@contextmanager
def never_reaps(_: World) -> Iterator[None]:
    """Take no job back from a dead process."""

    async def nothing(self: SqlJobs, *_: Any, **__: Any) -> Sequence[QueuedJob]:
        return ()

    with patch.object(SqlJobs, "reap", nothing):
        yield


@contextmanager
def passes_one_over(_: World) -> Iterator[None]:
    """Put the second job off for a day each time it is claimed."""

    def claim(real: Any) -> Any:
        async def claimed(self: SqlJobs, *given: Any, **named: Any) -> Any:
            rows: Collection[QueuedJob] = await real(self, *given, **named)
            for row in rows:
                if row.config_name == "job-2":
                    await self.finish(row.id, row.token, Ending(Outcome.REQUEUED, delay=timedelta(days=1)))
            return [row for row in rows if row.config_name != "job-2"]

        return claimed

    with instead(SqlJobs, "claim", claim):
        yield
