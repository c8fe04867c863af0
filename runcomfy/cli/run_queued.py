"""`comfyctl run --queue`: put the job into the queue, show how it goes, print what a run prints."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any, Final

from runcomfy.cli.queue_work import open_queue
from runcomfy.cli.runner import Interrupts
from runcomfy.domain.exceptions import Interrupted, JobTimeout, LocalError, RunComfyError, ValueInvalid, foreign_text
from runcomfy.domain.job import BillLine, JobResult, JobStatus, Output, OutputKind
from runcomfy.domain.progress import Progress, Step
from runcomfy.domain.queued import QueuedJob, QueueStatus
from runcomfy.domain.settings import QueueSettings

if TYPE_CHECKING:
    from runcomfy.application.job_queue import JobQueue
    from runcomfy.domain.job import JobRequest
    from runcomfy.domain.time_left import TimeLeft

NOBODY: Final = "nobody works on the queue: `comfyctl agent execute` in another terminal, or on another host, does"


async def run_queued(
    interrupts: Interrupts, request: JobRequest, options: dict[str, Any], where: dict[str, Any], *, as_json: bool
) -> int:
    """Put the job in and follow it. Ctrl+C leaves it where it is."""
    from runcomfy.cli.output import show_error, show_json, tell
    from runcomfy.cli.progress_display import Display
    from runcomfy.cli.run import show_result

    interrupts.listens, interrupts.answer = True, ""
    async with open_queue(interrupts, where, quiet=as_json, makes=True) as app:
        request = without_place(request, app.queue_settings)
        queue = await app.job_queue()
        # Its worker may run in another folder: results belong where this command would have put them.
        request = replace(request, out_dir=request.out_dir or app.settings.files.output_dir)
        job = await queue.enqueue(request, priority=options["priority"], idempotency_key=options["key"])
        interrupts.last_words = lambda: left_behind(job)
        with Display(silent=as_json) as display:
            display.attach(interrupts)
            if not as_json:
                display.tell(f"{job.config_name} is in the queue (number {job.id}, priority {job.priority})")
                if not job.ended and not await queue.workers():
                    display.tell(NOBODY)
            error: RunComfyError | None = None
            try:
                async for seen in until_pressed(queue, job, interrupts):
                    job = seen
                    display(progress_of(job, await app.time_left().of(job, None)))
            except LocalError as caught:  # we can look no more; the job goes on
                error = caught
        if error is not None or not job.ended:
            error = error or Interrupted("this command no longer follows the job", hint=left_behind(job)[1])
            for line in left_behind(job):
                tell(line)
            if as_json:
                facts = {"job_id": job.uid, "status": str(job.status), "config_name": job.config_name}
                show_json({**facts, "error": error.as_dict()})
            elif not isinstance(error, Interrupted):
                show_error(error)
            return error.exit_code
    return show_result(result_of(job), as_json=as_json)


def without_place(request: JobRequest, settings: QueueSettings) -> JobRequest:
    """Return the request without a place of its own: executors run jobs where they were started.

    Raises ValueInvalid if another place is named than the queue's own.
    """
    same = settings.where == "server" and (request.server_url or "").rstrip("/") == settings.api_base_url.rstrip("/")
    if request.server_url is not None and not same:
        raise ValueInvalid(
            "--server does not say where a job of the queue runs: its executors do",
            hint="leave it out, and start an executor there: `comfyctl agent execute --server URL`",
        )
    if request.server_type is not None:
        raise ValueInvalid(
            "--server-type does not say what a job of the queue runs on: its executors do",
            hint="leave it out, and set COMFYUI_AGENT_SERVER_TYPE for `comfyctl agent execute --cloud`",
        )
    return replace(request, server_url=None)


def left_behind(job: QueuedJob) -> list[str]:
    """Return what is said of a job that goes on without us."""
    return [
        f"{job.config_name} stays in the queue ({job.status}); this command only watched it",
        f"`comfyctl queue show {job.config_name}` finds it, `comfyctl queue cancel {job.config_name}` ends it",
    ]


async def until_pressed(queue: JobQueue, job: QueuedJob, interrupts: Interrupts) -> AsyncIterator[QueuedJob]:
    """Yield the job as it changes until it has ended, or until Ctrl+C."""
    steps = queue.follow(job)
    pressed = asyncio.ensure_future(interrupts.event.wait())
    try:
        while True:
            step = asyncio.ensure_future(anext(steps, None))
            await asyncio.wait({step, pressed}, return_when=asyncio.FIRST_COMPLETED)
            if not step.done():
                step.cancel()
                await asyncio.wait({step})
                return
            seen = step.result()
            if seen is None:
                return
            yield seen
    finally:
        pressed.cancel()


def progress_of(job: QueuedJob, left: TimeLeft | None = None) -> Progress:
    """Return a queued job as the progress of a run, with how long it still takes where that is known."""
    if job.status is QueueStatus.PROCESSING:
        message = job.message or "taken up by a worker"
        if left is not None:
            message = f"{message}, {left.words}"
        return Progress(Step.RUNNING, percent=job.progress, message=message)
    if job.status is QueueStatus.PENDING:
        again = f", after {job.run_count} runs" if job.run_count else ""
        return Progress(Step.QUEUED, message=f"waits in the queue at priority {job.priority}{again}")
    return Progress(Step.FINISHED, percent=100.0, message=str(job.status))


def result_of(job: QueuedJob) -> JobResult:
    """Return what came of a queued job that has ended, as a run returns it."""
    facts = job.result
    error = None if job.status is QueueStatus.DONE else error_of(job)
    status = JobStatus.DONE
    if error is not None:
        status = JobStatus.FAILED
        if job.cancelled:
            status = JobStatus.CANCELLED
        elif job.reason == JobTimeout.code:
            status = JobStatus.TIMEOUT
    return JobResult(
        job_id=job.uid,
        status=status,
        prompt_id=job.prompt_id,
        outputs=tuple(_output(output) for output in facts.get("outputs") or ()),
        seeds={str(name): int(seed) for name, seed in (facts.get("seeds") or {}).items()},
        cost_usd=_decimal(facts.get("cost_usd")),
        timings={str(name): float(seconds) for name, seconds in (facts.get("timings") or {}).items()},
        bill=tuple(_bill_line(line) for line in facts.get("bill") or ()),
        error=error.as_dict() if error is not None else None,
        exit_code=error.exit_code if error is not None else 0,
        exception=error,
    )


def error_of(job: QueuedJob) -> RunComfyError:
    """Return the error a failed job ended with, of the class that its reason names."""
    if job.cancelled:
        return Interrupted("the job was cancelled", hint=f"`comfyctl queue retry {job.config_name}` runs it again")
    kind = _classes().get(job.reason, RunComfyError)
    lines = [line for line in (job.error_trace or "").strip().splitlines() if line.strip()]
    return kind(
        foreign_text(lines[0], 600) if lines else f"the job failed ({job.reason or 'no reason is known'})",
        hint=f"`comfyctl queue show {job.config_name}` has every attempt and its error",
        details={"reason": job.reason, "run_count": job.run_count},
    )


def _classes() -> dict[str, type[RunComfyError]]:
    found: dict[str, type[RunComfyError]] = {}
    waiting: list[type[RunComfyError]] = [RunComfyError]
    while waiting:
        kind = waiting.pop()
        found[kind.code] = kind
        waiting += kind.__subclasses__()
    return found


def _output(facts: dict[str, Any]) -> Output:
    return Output(
        node=str(facts["node"]),
        kind=OutputKind(facts["kind"]),
        path=str(facts["path"]),
        size_bytes=int(facts["size_bytes"]),
        sha256=str(facts["sha256"]),
    )


def _bill_line(facts: dict[str, Any]) -> BillLine:
    return BillLine(
        what=str(facts["what"]),
        seconds=_decimal(facts["seconds"]),
        usd_per_hour=_decimal(facts["usd_per_hour"]),
        amount_usd=_decimal(facts["amount_usd"]),
    )


def _decimal(value: object) -> Decimal:
    try:
        return Decimal(str(value or 0))
    except InvalidOperation:
        return Decimal(0)
