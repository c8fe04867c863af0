"""
The product for programs: `connect()`, in an async and a sync form.

The sync form has a thread with an event loop of its own, so it also works inside a running loop (though it blocks that
loop's thread while it waits, as any sync call does).

A program that ends in the middle of a job, because it runs in a daemon thread or its loop stands still, ends first
what was rented for it (`runcomfy.wiring.leaving`).
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakSet

from runcomfy.adapters.pool_variables import pool_overrides
from runcomfy.application.books import quiet
from runcomfy.application.finish import finish
from runcomfy.application.service import first_of
from runcomfy.bootstrap import App
from runcomfy.domain.durations import parse_duration
from runcomfy.domain.job import JobRequest, JobResult
from runcomfy.domain.progress import Progress
from runcomfy.domain.queued import JobEvent, NewJob, Pause, QueuedJob, QueueStatus
from runcomfy.wiring.leaving import asked_by, under_way

if TYPE_CHECKING:
    from runcomfy.application.cost_optimizer import Advice, CostOptimizer
    from runcomfy.application.costs import By, Report
    from runcomfy.application.costs_check import Checked
    from runcomfy.application.estimating import JobEstimate
    from runcomfy.application.job_queue import JobQueue, JobStory, Which
    from runcomfy.application.presence import Presence
    from runcomfy.domain.budget import BudgetState
    from runcomfy.domain.decision import Decision
    from runcomfy.domain.forecast import Forecast

T = TypeVar("T")
PathText = str | os.PathLike[str]
OnProgress = Callable[[Progress], None]
RUN_OPTIONS = ("image", "prompt", "seed", "sets", "out_dir", "server_url", "server_type", "timeout", "convert")
"""What says what to run, and where, beside the workflow."""
PLACE_OPTIONS = frozenset({"server_url", "server_type"})
"""What says where: in the queue that is its executors' business."""


def connect(
    *,
    server_url: str | None = None,
    tell: Callable[[str], None] | None = None,
    max_machines: int | None = None,
    min_machines: int | None = None,
    server_types: Sequence[str] | None = None,
    budget_run: Decimal | float | str | None = None,
    budget_hour: Decimal | float | str | None = None,
    budget_day: Decimal | float | str | None = None,
    budget_month: Decimal | float | str | None = None,
    wait_price: str | float | None = None,
    latency_target: timedelta | str | None = None,
    keep_alive: timedelta | str | None = None,
    **overrides: Any,
) -> Connector:
    """Return a connection to be entered with `async with` or `with`.

    Settings come from the environment and credentials.txt, as for the command line; `overrides` win over both, by
    their variable names (`RUNCOMFY_OUTPUT_DIR="out"`, `COMFYUI_AGENT_DATABASE="queue.db"`). `server_url` makes every
    job run on that ComfyUI: nothing is launched and nothing billed. `tell` takes sentences meant for the user (default:
    they are only logged).

    The others are the settings of a pool (`Connection.serve`) and the budgets in USD, which hold for everything that is
    launched over this connection: `comfyctl serve --help` explains each.
    """
    pool = {
        "max_machines": max_machines,
        "min_machines": min_machines,
        "server_types": server_types,
        "budget_run": budget_run,
        "budget_hour": budget_hour,
        "budget_day": budget_day,
        "budget_month": budget_month,
        "wait_price": wait_price,
        "latency_target": latency_target,
        "keep_alive": keep_alive,
    }
    return Connector(server_url, tell, {**overrides, **pool_overrides(pool)})


class Connector:
    """What `connect` returns: not open yet."""

    def __init__(
        self, server_url: str | None, tell: Callable[[str], None] | None, overrides: Mapping[str, Any]
    ) -> None:
        self._server_url, self._tell, self._overrides = server_url, tell or quiet, overrides
        self._async: Connection | None = None
        self._sync: SyncConnection | None = None

    def _make(self) -> Connection:
        return Connection(App(overrides=self._overrides, tell=self._tell), self._server_url)

    async def __aenter__(self) -> Connection:
        self._async = self._make()
        return self._async

    async def __aexit__(self, *_: object) -> None:
        if self._async is not None:
            await self._async.close()

    def __enter__(self) -> SyncConnection:
        self._sync = SyncConnection(self._make)
        return self._sync

    def __exit__(self, *_: object) -> None:
        if self._sync is not None:
            self._sync.close()


class Running:
    """A job under way: iterate over its progress, await its result, cancel it."""

    def __init__(self, start: Callable[[OnProgress, asyncio.Event], Coroutine[Any, Any, JobResult]]) -> None:
        self._cancel = asyncio.Event()
        # Only the newest snapshots matter to somebody who reads slowly.
        self._news: asyncio.Queue[Progress | None] = asyncio.Queue(maxsize=256)
        self._task = asyncio.create_task(start(self._put, self._cancel))
        self._task.add_done_callback(lambda _: self._put(None))

    def _put(self, item: Progress | None) -> None:
        if self._news.full():
            self._news.get_nowait()
        self._news.put_nowait(item)

    def cancel(self) -> None:
        """End the job in good order: the prompt is interrupted, what was rented is ended; await the result."""
        self._cancel.set()

    async def ended(self) -> None:
        """Return when the job is over and what was rented is ended, whatever came of it."""
        await asyncio.wait({self._task})
        if not self._task.cancelled():
            self._task.exception()  # heard: whoever wants it awaits the job itself

    def __await__(self) -> Generator[Any, None, JobResult]:
        return self._task.__await__()

    async def __aiter__(self) -> AsyncIterator[Progress]:
        while (item := await self._news.get()) is not None:
            yield item


class Connection:
    """Runs jobs. Several may run at once."""

    def __init__(self, app: App, server_url: str | None) -> None:
        self.app = app
        self._server_url = server_url
        self._orchestrator = app.orchestrator()
        self._started: WeakSet[Running] = WeakSet()
        self.queue = Queue(app, self._request)
        self.presence: Presence = app.presence()
        """Say that somebody is there, or that work comes: whoever serves the queue has a machine warm by then."""

    async def serve(
        self, stop: asyncio.Event | None = None, *, once: bool = False, monitor: bool = False, guard: bool = True
    ) -> None:
        """Work off the queue over a pool of rented machines, as `comfyctl serve` does, until `stop` is set.

        `once`: until everything is worked off. `monitor`: take up job files, too. `guard`: start the small process
        that ends machines if this one dies. Machines are ended before this returns, also when it is cancelled.

        Raises BudgetExceeded (with `once`: what waits gets no machine), ConfigurationError, LocalError.
        """
        from runcomfy.application.service import ServeOptions

        with under_way():
            await self.app.serve(ServeOptions(monitor=monitor, once=once, guard=guard), stop or asyncio.Event())

    @asynccontextmanager
    async def serving(self, *, monitor: bool = False, guard: bool = True) -> AsyncIterator[None]:
        """Serve beside the block; at its end running jobs go on for a while, and the machines are ended.

        If serving breaks, the block is cancelled and the error raised.
        """
        stop = asyncio.Event()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.serve(stop, monitor=monitor, guard=guard), name="serving")
                try:
                    yield
                finally:
                    stop.set()
        except BaseExceptionGroup as errors:
            raise first_of(errors) from errors

    async def costs(self) -> CostOptimizer:
        """Return what answers questions about the account's money: reports, forecasts, estimates, budgets, advice.

        Raises ConfigurationError (there are no credentials), LocalError.
        """
        return await self.app.costs()

    async def close(self) -> None:
        """Cancel started jobs that still run, wait for their ends, and close every connection. A dev server stays."""
        try:
            await finish(self._end_started())
        finally:
            await self.app.close()

    async def _end_started(self) -> None:
        for job in (jobs := list(self._started)):
            job.cancel()
        for job in jobs:
            await job.ended()

    async def run(
        self,
        workflow: PathText | Mapping[str, Any],
        *,
        image: PathText | None = None,
        prompt: str | None = None,
        seed: int | None = None,
        sets: Mapping[str, Any] | None = None,
        out_dir: PathText | None = None,
        server_url: str | None = None,
        server_type: str | None = None,
        timeout: timedelta | str | float | None = None,
        convert: str | None = None,
        on_progress: OnProgress | None = None,
        check: bool = True,
    ) -> JobResult:
        """Run a workflow and return its result with verified files.

        `timeout` counts from when the machine is ready; a timedelta, seconds, or text such as `10m`. With `check`
        a job that did not succeed raises its error (`RunComfyError`); without it, look at `result.status`.
        """
        request = self._request(workflow, image, prompt, seed, sets, out_dir, server_url, server_type, timeout, convert)
        with under_way():
            return checked(await self._orchestrator.run(request, on_progress=on_progress), check)

    def start(self, workflow: PathText | Mapping[str, Any], *, check: bool = True, **options: Any) -> Running:
        """Start a workflow (options as for `run`) and return it while it runs."""
        if unknown := set(options) - set(RUN_OPTIONS):
            raise TypeError(f"unknown options: {', '.join(sorted(unknown))}")
        request = self._request(workflow, *(options.get(name) for name in RUN_OPTIONS))

        async def work(on_progress: OnProgress, cancel: asyncio.Event) -> JobResult:
            with under_way():
                return checked(await self._orchestrator.run(request, on_progress=on_progress, cancel=cancel), check)

        job = Running(work)
        self._started.add(job)
        return job

    def _request(
        self,
        workflow: PathText | Mapping[str, Any],
        image: PathText | None,
        prompt: str | None,
        seed: int | None,
        sets: Mapping[str, Any] | None,
        out_dir: PathText | None,
        server_url: str | None,
        server_type: str | None,
        timeout: timedelta | str | float | None,
        convert: str | None,
    ) -> JobRequest:
        if isinstance(timeout, str):
            timeout = parse_duration(timeout)
        elif timeout is not None and not isinstance(timeout, timedelta):
            timeout = timedelta(seconds=timeout)
        return JobRequest(
            workflow=workflow if isinstance(workflow, Mapping) else os.fspath(workflow),
            image=os.fspath(image) if image is not None else None,
            prompt=prompt,
            seed=seed,
            sets=dict(sets or {}),
            out_dir=os.fspath(out_dir) if out_dir is not None else None,
            server_url=server_url or self._server_url,
            server_type=server_type,
            timeout=timeout,
            convert=convert,
        )


class Queue:
    """The queue of the project in the working directory: put jobs in, follow them, change their fate.

    Nothing here runs them: `comfyctl agent execute` does, in any process on any host of the same database. Where a job
    is asked for, a `QueuedJob`, its number, its uid or its config name will do.
    """

    def __init__(self, app: App, request: Callable[..., JobRequest]) -> None:
        self._app, self._request = app, request

    async def _open(self) -> JobQueue:
        return await self._app.job_queue()

    async def enqueue(
        self,
        workflow: PathText | Mapping[str, Any] | JobRequest | NewJob,
        *,
        idempotency_key: str | None = None,
        priority: int | None = None,
        job_type: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        user: str | None = None,
        project: str | None = None,
        retry_limit: int | None = None,
        config_name: str | None = None,
        out_file: PathText | None = None,
        inputs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> QueuedJob:
        """Put a job in; it is accepted, committed and flushed, when this returns.

        `options` are those of `Connection.run` that say what to run: image, prompt, seed, sets, out_dir, timeout,
        convert. `out_file` is the path of the one result, `inputs` are values by the names that job files use. Files
        are named from the working directory and kept by their absolute paths. Where it runs is its executor's business.

        With the same `idempotency_key` and the same body the same job comes back, whatever has become of it.

        Raises BadInput (it could never be run; NameTaken; IdempotencyConflict: same key, other body), LocalError.
        """
        queue = await self._open()
        what: JobRequest | NewJob
        if isinstance(workflow, JobRequest | NewJob):
            if options or out_file is not None or inputs is not None:
                raise TypeError("what to run is in the request; give it no further options")
            what = workflow
        else:
            if unknown := set(options) - set(RUN_OPTIONS) | set(options) & PLACE_OPTIONS:
                raise TypeError(f"unknown options: {', '.join(sorted(unknown))}")
            what = replace(
                self._request(workflow, *(options.get(name) for name in RUN_OPTIONS)),
                server_url=None,
                out_file=os.fspath(out_file) if out_file is not None else None,
                inputs=dict(inputs or {}),
            )
        return await queue.enqueue(
            what,
            idempotency_key=idempotency_key,
            priority=priority,
            job_type=job_type,
            metadata=metadata,
            user=user,
            project=project,
            retry_limit=retry_limit,
            config_name=config_name,
        )

    async def job(self, which: Which) -> QueuedJob:
        """Return a job as it is now. Raises JobNotFound."""
        return await (await self._open()).job(which)

    async def show(self, which: Which) -> JobStory:
        """Return a job with every attempt and every event. Raises JobNotFound."""
        return await (await self._open()).show(which)

    async def list(
        self, *, status: QueueStatus | None = None, limit: int | None = None, newest_first: bool = False
    ) -> Sequence[QueuedJob]:
        """Return jobs: pending ones in the order in which they will run, others by number."""
        return await (await self._open()).list(status=status, limit=limit, newest_first=newest_first)

    async def counts(self) -> Mapping[QueueStatus, int]:
        """Return how many jobs there are of each status."""
        return await (await self._open()).counts()

    async def wait(self, which: Which, *, timeout: timedelta | None = None) -> QueuedJob:
        """Return the job when it has ended: done, failed or cancelled. Raises JobNotFound, TimeoutError."""
        return await (await self._open()).wait(which, timeout=timeout)

    async def events(self, which: Which | None = None, *, after: int = 0) -> AsyncIterator[JobEvent]:
        """Replay and follow what happens to a job until it has ended, or to all jobs for ever."""
        async for event in (await self._open()).events(which, after=after):
            yield event

    async def follow(self, which: Which) -> AsyncIterator[QueuedJob]:
        """Yield the job as it is, and whenever its status or progress changes, until it has ended."""
        async for job in (await self._open()).follow(which):
            yield job

    async def cancel(self, which: Which) -> QueuedJob:
        """End a job for good; its prompt is interrupted by id. Raises JobNotFound."""
        return await (await self._open()).cancel(which)

    async def retry(self, which: Which) -> QueuedJob:
        """Let an ended job run again from the start. Raises JobNotFound, JobBusy."""
        return await (await self._open()).retry(which)

    async def set_priority(self, which: Which, priority: int) -> QueuedJob:
        """Change the priority, 1 (first) to 999. Raises JobNotFound."""
        return await (await self._open()).set_priority(which, priority)

    async def pause(self, message: str = "") -> Pause:
        """Let nothing further begin; what runs goes on."""
        return await (await self._open()).pause(message)

    async def resume(self) -> Sequence[Pause]:
        """End every pause and return them."""
        return await (await self._open()).resume()


def checked(result: JobResult, check: bool) -> JobResult:
    """Return the result, or raise the job's error if it has one and the caller wants it raised."""
    if check and result.exception is not None:
        raise result.exception
    return result


class SyncConnection:
    """The same for code without an event loop. Progress callbacks are called in the connection's own thread."""

    def __init__(self, make: Callable[[], Connection]) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="runcomfy-connection", daemon=True)
        self._thread.start()
        try:
            self._connection = self._call(self._made(make))
        except BaseException:
            self._end()
            raise
        self.queue = SyncQueue(self._connection.queue, self._call)
        self.costs = SyncCosts(self._connection.costs, self._call)

    @staticmethod
    async def _made(make: Callable[[], Connection]) -> Connection:
        return make()

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def run(self, workflow: PathText | Mapping[str, Any], **options: Any) -> JobResult:
        """Run a workflow; everything as in `Connection.run`. Ctrl+C ends the job in good order first."""
        work = asked_by(threading.current_thread(), self._connection.run(workflow, **options))
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            if not future.done():  # Ctrl+C, or what another handler of signals has raised
                # Cancelling interrupts the prompt and ends what was rented; wait for that, however long it takes.
                self._call(_jobs_cancelled())
            raise

    def close(self) -> None:
        """Close the connection and end its thread. Jobs that other threads have begun are cancelled before."""
        try:
            self._call(_jobs_cancelled())
            self._call(self._connection.close())
        finally:
            self._end()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class SyncQueue:
    """The queue for code without an event loop; the calls are those of `Queue`."""

    def __init__(self, queue: Queue, call: Callable[[Coroutine[Any, Any, Any]], Any]) -> None:
        self._queue, self._call = queue, call

    def enqueue(self, workflow: PathText | Mapping[str, Any] | JobRequest | NewJob, **options: Any) -> QueuedJob:
        """Put a job in; everything as in `Queue.enqueue`."""
        job: QueuedJob = self._call(self._queue.enqueue(workflow, **options))
        return job

    def job(self, which: Which) -> QueuedJob:
        """Return a job as it is now. Raises JobNotFound."""
        job: QueuedJob = self._call(self._queue.job(which))
        return job

    def list(self, **options: Any) -> Sequence[QueuedJob]:
        """Return jobs; everything as in `Queue.list`."""
        jobs: Sequence[QueuedJob] = self._call(self._queue.list(**options))
        return jobs

    def wait(self, which: Which, *, timeout: timedelta | None = None) -> QueuedJob:
        """Return the job when it has ended. Raises JobNotFound, TimeoutError."""
        job: QueuedJob = self._call(self._queue.wait(which, timeout=timeout))
        return job

    def events(self, which: Which | None = None, *, after: int = 0) -> Iterator[JobEvent]:
        """Replay and follow what happens to a job until it has ended, or to all jobs for ever."""
        events = self._queue.events(which, after=after)
        while (event := self._call(_next(events))) is not None:
            yield event

    def cancel(self, which: Which) -> QueuedJob:
        """End a job for good. Raises JobNotFound."""
        job: QueuedJob = self._call(self._queue.cancel(which))
        return job

    def retry(self, which: Which) -> QueuedJob:
        """Let an ended job run again. Raises JobNotFound, JobBusy."""
        job: QueuedJob = self._call(self._queue.retry(which))
        return job

    def set_priority(self, which: Which, priority: int) -> QueuedJob:
        """Change the priority. Raises JobNotFound."""
        job: QueuedJob = self._call(self._queue.set_priority(which, priority))
        return job


class SyncCosts:
    """The account's money for code without an event loop; the calls are those of `CostOptimizer`."""

    def __init__(
        self, costs: Callable[[], Coroutine[Any, Any, CostOptimizer]], call: Callable[[Coroutine[Any, Any, Any]], Any]
    ) -> None:
        self._costs, self._call = costs, call

    def _money(self) -> CostOptimizer:
        money: CostOptimizer = self._call(self._costs())
        return money

    def report(self, since: datetime, until: datetime | None = None, by: By | str = "day") -> Report:
        """Return what was spent in [`since`, `until`); everything as in `CostOptimizer.report`."""
        report: Report = self._call(self._money().report(since, until, by))
        return report

    def forecast(self) -> tuple[Forecast, Forecast]:
        """Return what the day and the month (UTC) will have cost at their end."""
        day, month = self._call(self._money().forecast())
        return day, month

    def budgets(self) -> Sequence[BudgetState]:
        """Return how every budget stands now."""
        states: Sequence[BudgetState] = self._call(self._money().budgets())
        return states

    def estimate(self, workflow: str, **options: Any) -> JobEstimate:
        """Return what jobs will take and cost; everything as in `CostOptimizer.estimate`."""
        estimate: JobEstimate = self._call(self._money().estimate(workflow, **options))
        return estimate

    def advice(self) -> Sequence[Advice]:
        """Return what would save money."""
        advice: Sequence[Advice] = self._call(self._money().advice())
        return advice

    def decisions(self, **options: Any) -> Sequence[Decision]:
        """Return what the plan has decided and why; everything as in `CostOptimizer.decisions`."""
        decisions: Sequence[Decision] = self._call(self._money().decisions(**options))
        return decisions

    def check(self, *, since: datetime | None = None) -> Checked:
        """Compare the books with what the provider lists."""
        checked: Checked = self._call(self._money().check(since=since))
        return checked


async def _next(events: AsyncIterator[JobEvent]) -> JobEvent | None:
    return await anext(events, None)


async def _jobs_cancelled() -> None:
    """Cancel every job of the running loop, also one that was only just handed over, and wait for their ends."""
    tasks = [task for task in asyncio.all_tasks() if task.get_name().startswith("job-")]
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)


__all__ = ["Connection", "Connector", "Queue", "Running", "SyncConnection", "SyncCosts", "SyncQueue", "connect"]
