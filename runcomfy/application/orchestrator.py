"""
One job, from request to verified files.

    prepare   parse, bind, check input files, make the folder: everything that can be refused before money is spent
    place     a given server, the dev server, or a machine of its own (`placing`)
    check     the machine's node list against the graph
    upload, submit, watch
    fetch, verify, commit (`delivery`)
    settle    leave the place; what was rented for this job is seen gone

A job never raises for what can go wrong with it: the result says what happened. Cancelling (`cancel` set) interrupts
the prompt, ends what was rented, and yields a result that says so.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from decimal import Decimal
from typing import Any
from uuid import uuid4

from runcomfy.application.delivery import deliver, promised
from runcomfy.application.faultpoints import faultpoint
from runcomfy.application.finish import finish
from runcomfy.application.placing import Place, Placer
from runcomfy.application.watcher import Ended, Watcher
from runcomfy.domain.binding import BoundWorkflow, bind, fit_seeds
from runcomfy.domain.exceptions import (
    DeadlineExceeded,
    Interrupted,
    JobTimeout,
    LocalError,
    PreflightFailed,
    RunComfyError,
    StopUnconfirmed,
    ValueInvalid,
)
from runcomfy.domain.job import PICTURE_FORMATS, BillLine, JobId, JobRequest, JobResult, JobStatus, Output, PromptId
from runcomfy.domain.preflight import Problem, preflight
from runcomfy.domain.progress import NodeLabel, Progress, Step
from runcomfy.domain.settings import Settings
from runcomfy.domain.sidecar import Sidecar
from runcomfy.domain.workflow import Workflow
from runcomfy.ports.clock import Clock
from runcomfy.ports.comfyui import ComfyUI
from runcomfy.ports.results import JobFolder, Results

log = logging.getLogger("runcomfy.orchestrator")

Show = Callable[[Progress], None]
LoadWorkflow = Callable[[str], tuple[str | bytes, str | None, str]]
"""Takes a shipped name or a path; returns the graph's JSON, the sidecar's TOML if there is one, and a name."""

CANCEL_WITHIN = timedelta(seconds=15)
"""How long the server may take to be told that a prompt is no longer wanted; it may be the server that hangs."""


def _nobody(_: Progress) -> None:
    pass


def _since(started: float, show: Show) -> Show:
    """Return `show` with every snapshot's elapsed time counted from when the job began."""

    def shown(progress: Progress) -> None:
        show(replace(progress, elapsed=timedelta(seconds=asyncio.get_running_loop().time() - started)))

    return shown


@dataclass(frozen=True, slots=True)
class Prepared:
    """A job that has passed every check that needs no machine."""

    job_id: JobId
    request: JobRequest
    workflow: Workflow
    sidecar: Sidecar | None
    bound: BoundWorkflow
    out_dir: str


@dataclass(slots=True)
class _Run:
    """What is known of a job while it runs, for its result whatever happens."""

    job_id: JobId
    show: Show
    started: float
    seeds: Mapping[str, int] = field(default_factory=dict)
    prompt_id: PromptId | None = None
    outputs: tuple[Output, ...] = ()
    folder: str | None = None
    bill: tuple[BillLine, ...] = ()
    timings: dict[str, float] = field(default_factory=dict)
    place: Place | None = None
    _step: str | None = None
    _since: float = 0.0

    def step(self, name: str) -> None:
        """Begin a step; the one before ends here."""
        now = asyncio.get_running_loop().time()
        if self._step is not None:
            self.timings[self._step] = self.timings.get(self._step, 0.0) + now - self._since
        self._step, self._since = name, now
        faultpoint(f"job.{name}")

    def owe(self, bill: tuple[BillLine, ...]) -> None:
        """Take the bill of a machine that was rented for this job."""
        self.bill = bill

    def end(self) -> None:
        """End the last step and take the total."""
        self.step("")
        self.timings.pop("", None)
        self._step = None
        self.timings["total"] = asyncio.get_running_loop().time() - self.started


class RunComfyOrchestrator:
    """Runs jobs. Made by `runcomfy.bootstrap`; usable by many jobs at once."""

    def __init__(
        self,
        *,
        settings: Settings,
        clock: Clock,
        results: Results,
        placer: Placer,
        load_workflow: LoadWorkflow,
        random_int: Callable[[int, int], int],
        veil: Callable[[str], str] = str,
    ) -> None:
        """Nothing is opened. `veil` cuts secrets out of texts: a machine may echo its own address in an error."""
        self._settings = settings
        self._clock = clock
        self._results = results
        self._placer = placer
        self._load_workflow = load_workflow
        self._random_int = random_int
        self._veil = veil

    async def prepare(self, request: JobRequest) -> Prepared:
        """Parse, bind and check everything that needs no machine. Writes and sends nothing. Raises BadInput."""
        if request.convert not in (None, *PICTURE_FORMATS):
            raise ValueInvalid(
                f"pictures cannot be converted to {request.convert!r}", hint=f"use one of {', '.join(PICTURE_FORMATS)}"
            )
        if isinstance(request.workflow, str):
            text, toml, name = await asyncio.to_thread(self._load_workflow, request.workflow)
            workflow = Workflow.parse(text, name=name)
            sidecar = Sidecar.parse(toml, name=name) if toml is not None else None
            if sidecar is not None:
                sidecar.check(workflow)
        else:
            workflow, sidecar = Workflow.parse(request.workflow), None
        bound = bind(workflow, sidecar, request, random_int=self._random_int)
        for upload in bound.uploads:
            await self._results.check_input(upload.path, kind=upload.kind)
        return Prepared(
            job_id=request.job_id or JobId(str(uuid4())),
            request=request,
            workflow=workflow,
            sidecar=sidecar,
            bound=bound,
            out_dir=request.out_dir or self._settings.files.output_dir,
        )

    async def run(
        self, request: JobRequest, *, on_progress: Show | None = None, cancel: asyncio.Event | None = None
    ) -> JobResult:
        """Do the job and return what came of it, when everything it rented is gone.

        Setting `cancel` ends it in good order: status `cancelled`. Cancelling the task does the same and then lets
        the cancellation go on.
        """
        loop = asyncio.get_running_loop()
        show = _since(loop.time(), on_progress) if on_progress is not None else _nobody
        run = _Run(request.job_id or JobId(str(uuid4())), show, started=loop.time())
        request = replace(request, job_id=run.job_id)
        work = asyncio.create_task(self._do(run, request), name=f"job-{run.job_id}")
        waiter = asyncio.create_task(cancel.wait()) if cancel is not None else None
        error: BaseException | None = None
        try:
            await asyncio.wait({work, *([waiter] if waiter else [])}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()
            await asyncio.wait({work})
        except asyncio.CancelledError:
            work.cancel()
            await finish(_settled(work))
            raise
        finally:
            if waiter is not None:
                waiter.cancel()
        try:
            work.result()
        except asyncio.CancelledError:
            error = Interrupted("the job was cancelled", hint="run it again when you like")
        except RunComfyError as caught:
            error = caught
        except Exception as caught:
            log.exception("job_defect", extra={"fields": {"job": run.job_id}})
            error = RunComfyError(
                f"unexpected {type(caught).__name__}: {caught}",
                hint="this is a defect of the program; the log in the state directory has the details",
            )
            error.__cause__ = caught
        return self._result(run, error)

    def _result(self, run: _Run, error: BaseException | None) -> JobResult:
        run.end()
        if isinstance(error, RunComfyError):
            veil_error(error, self._veil)
        bill = (run.place.bill if run.place is not None else ()) or run.bill
        status, exit_code = JobStatus.DONE, 0
        if isinstance(error, RunComfyError):
            exit_code = error.exit_code
            status = JobStatus.FAILED
            if isinstance(error, Interrupted) or error.code == "prompt-interrupted":
                status = JobStatus.CANCELLED
            elif isinstance(error, DeadlineExceeded):
                status = JobStatus.TIMEOUT
            elif isinstance(error, StopUnconfirmed) and run.outputs:
                status = JobStatus.DONE  # the results are whole; the error says what may still bill
        result = JobResult(
            job_id=run.job_id,
            status=status,
            prompt_id=run.prompt_id,
            outputs=run.outputs,
            seeds=dict(run.seeds),
            cost_usd=sum((line.amount_usd for line in bill), Decimal(0)),
            timings=dict(run.timings),
            folder=run.folder,
            bill=bill,
            error=error.as_dict() if isinstance(error, RunComfyError) else None,
            exit_code=exit_code,
            exception=error if isinstance(error, RunComfyError) else None,
        )
        log.info(
            "job_ended",
            extra={
                "fields": {
                    "job": run.job_id,
                    "status": str(status),
                    "prompt": run.prompt_id,
                    "usd": format(result.cost_usd, "f"),
                    "error": result.error["code"] if result.error else None,
                    "seconds": {name: round(value, 3) for name, value in run.timings.items()},
                }
            },
        )
        return result

    # -- the story -----------------------------------------------------------------------------------------

    async def _do(self, run: _Run, request: JobRequest) -> None:
        run.step("prepare")
        prepared = await self.prepare(request)
        run.seeds = prepared.bound.seeds
        folder = await self._results.open_folder(run.job_id, under=prepared.out_dir)
        run.folder = folder.path
        try:
            async with self._placer.at(
                server_url=request.server_url,
                server_type=request.server_type,
                job_id=run.job_id,
                show=run.show,
                step=run.step,
                on_bill=run.owe,
            ) as place:
                run.place = place
                await self._within_timeout(run, prepared, place, folder)
                run.step("leave")
        except BaseException:
            await finish(folder.abandon())
            if not run.outputs:
                run.folder = None
            raise
        finally:
            if run.outputs:
                await finish(self._tell_cost(run, folder))
        run.show(Progress(Step.FINISHED, percent=100.0, message="done"))

    async def _tell_cost(self, run: _Run, folder: JobFolder) -> None:
        """Complete the manifest with what is known only when the place was left. The results are whole without it."""
        if run.place is None or not run.place.bill:
            return
        facts = {
            "cost_usd": format(run.place.cost_usd, "f"),
            "bill": [
                {
                    "what": line.what,
                    "seconds": str(line.seconds),
                    "usd_per_hour": str(line.usd_per_hour),
                    "amount_usd": str(line.amount_usd),
                }
                for line in run.place.bill
            ],
            "timings": {name: round(seconds, 6) for name, seconds in run.timings.items()},
        }
        try:
            await folder.amend(facts)
        except LocalError as error:
            self._placer.tell(f"{error.message}; {error.hint}")

    async def _within_timeout(self, run: _Run, prepared: Prepared, place: Place, folder: JobFolder) -> None:
        """Do the job's work at its place. The timeout counts from here: a machine's start has a limit of its own."""
        limit = prepared.request.timeout or self._settings.comfy.execution_timeout
        try:
            async with asyncio.timeout(limit.total_seconds()):
                bound = await self._check(run, prepared, place.server)
                graph = await self._upload(run, bound, place.server)
                ended = await self._execute(run, prepared, graph, place)
                run.step("fetch")
                run.show(Progress(Step.FETCHING, percent=100.0, message="fetching the results"))
                files = await deliver(
                    promised(ended.outputs, bound), place.server, folder, convert=prepared.request.convert
                )
                run.step("commit")
                run.outputs = await folder.commit(files, self._manifest(run, prepared, bound, place, ended))
        except TimeoutError as error:
            raise JobTimeout(
                f"the job was not done after {limit.total_seconds():.0f} s on the machine",
                hint="give it longer with --timeout, e.g. --timeout 30m",
                details={"timeout_seconds": limit.total_seconds(), "prompt_id": run.prompt_id},
            ) from error

    async def _check(self, run: _Run, prepared: Prepared, server: ComfyUI) -> BoundWorkflow:
        """Compare the graph with the server's node list; move seeds into the ranges it gives."""
        run.step("check")
        run.show(Progress(Step.CHECKING, message="checking the workflow against the machine's nodes"))
        info = await server.node_info(prepared.workflow.class_types)
        bound = fit_seeds(prepared.bound, info)
        run.seeds = bound.seeds
        problems = preflight(bound.graph, info, uploads=bound.waiting)
        if any(p.code == "unknown-class" for p in problems):
            # Only now is the whole list worth its price: it tells what an unknown class was meant to be.
            names = await server.class_names()
            problems = preflight(bound.graph, info, uploads=bound.waiting, class_names=names)
        if problems:
            raise refused(problems)
        return bound

    async def _upload(self, run: _Run, bound: BoundWorkflow, server: ComfyUI) -> Mapping[str, Any]:
        if not bound.uploads:
            return bound.graph
        run.step("upload")
        names = {}
        for upload in bound.uploads:
            run.show(Progress(Step.UPLOADING, message="uploading the inputs"))
            names[upload] = await server.upload(upload.path, kind=upload.kind)
        return bound.with_uploads(names)

    async def _execute(self, run: _Run, prepared: Prepared, graph: Mapping[str, Any], place: Place) -> Ended:
        """Submit and watch. A prompt that is no longer wanted is taken back before anything else happens."""
        run.step("submit")
        run.prompt_id = PromptId(str(uuid4()))
        labels = {
            node_id: NodeLabel(prepared.workflow.title(node_id), str(node["class_type"]))
            for node_id, node in graph.items()
        }
        watcher = Watcher(place.server, self._settings.comfy, clock=self._clock)
        try:
            async with place.server.listen(run.prompt_id) as events:
                submitted = await place.server.submit(graph, prompt_id=run.prompt_id)
                run.prompt_id = submitted.prompt_id
                run.step("execute")
                on_progress = None if run.show is _nobody else run.show
                return await watcher.watch(run.prompt_id, labels, events=events, on_progress=on_progress)
        except BaseException as error:
            if _may_still_run(error):
                await finish(self._take_back(run.prompt_id, place))
            raise

    async def _take_back(self, prompt_id: PromptId, place: Place) -> None:
        told = seen_gone = False
        try:
            async with asyncio.timeout(CANCEL_WITHIN.total_seconds()):
                told = await place.server.cancel(prompt_id, alone=place.alone)
                while told and place.kind != "own machine" and not seen_gone:
                    queue = await place.server.queue()
                    seen_gone = prompt_id not in (*queue.running, *queue.pending)
                    if not seen_gone:
                        await asyncio.sleep(0.25)
        except (RunComfyError, TimeoutError) as error:
            log.warning("prompt_not_taken_back", extra={"fields": {"prompt": prompt_id, "error": repr(error)}})
        if place.kind == "own machine" or seen_gone:
            return
        if told:
            self._placer.tell(f"prompt {prompt_id} was interrupted; it ends when its node next looks up")
        else:
            self._placer.tell(
                f"prompt {prompt_id} may still run on the server: it could not be interrupted without risk to others"
            )

    def _manifest(
        self, run: _Run, prepared: Prepared, bound: BoundWorkflow, place: Place, ended: Ended
    ) -> dict[str, Any]:
        """Return what the manifest says besides the files themselves."""
        return {
            "job_id": run.job_id,
            "prompt_id": run.prompt_id,
            "workflow": {"name": prepared.workflow.name, "sha256": bound.sha256},
            "inputs": [
                {"target": applied.target, "source": applied.source, "value": applied.value}
                for applied in bound.applied
            ],
            "seeds": dict(bound.seeds),
            "where": place.kind,
            "server_type": place.machine.server_type if place.machine else None,
            "usd_per_hour": str(place.machine.usd_per_hour) if place.machine else None,
            "cached_nodes": sorted(ended.cached),
            "cost_usd": "0" if place.machine is None else None,
            "timings": {name: round(seconds, 6) for name, seconds in run.timings.items()},
            "committed_at": self._clock.now().isoformat(),
        }


def veil_error(error: RunComfyError, veil: Callable[[str], str]) -> None:
    """Cut secrets out of everything an error says, in place."""

    def clean(value: Any) -> Any:
        if isinstance(value, str):
            return veil(value)
        if isinstance(value, Mapping):
            return {key: clean(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [clean(item) for item in value]
        return value

    error.message, error.hint = veil(error.message), veil(error.hint)
    error.details = clean(error.details)
    error.args = (error.message, *error.args[1:])


def refused(problems: list[Problem]) -> PreflightFailed:
    """Return the error that lists every reason why a graph cannot run on a server."""
    first = problems[0]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return PreflightFailed(
        f"{first.message}{more}",
        hint=first.hint,
        details={
            "problems": [
                {
                    "node_id": p.node_id,
                    "title": p.title,
                    "class_type": p.class_type,
                    "input": p.input_name,
                    "code": p.code,
                    "message": p.message,
                    "hint": p.hint,
                }
                for p in problems
            ]
        },
    )


def _may_still_run(error: BaseException) -> bool:
    """Whether the prompt may still wait or run after this error, so that it must be taken back."""
    if isinstance(error, RunComfyError):
        return error.code in ("node-stuck", "comfyui-unreachable", "worker-dead", "job-timeout")
    return True


async def _settled(task: asyncio.Task[None]) -> None:
    await asyncio.wait({task})
