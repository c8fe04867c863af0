"""
One job, from request to verified files.

    prepare   parse, bind, check input files, make the folder: everything that can be refused before money is spent
    place     a given server, the dev server, or a machine of its own (`placing`)
    check     the machine's node list against the graph
    upload, submit, watch
    fetch, verify, commit (`delivery`)
    settle    leave the place; what was rented for this job is seen gone

What a job of the queue writes down on the way is its journal's business (`journal`); with one, a prompt that an
earlier attempt had sent is gone on with (`prompting`), and check, upload and submit are left out.

A job never raises for what can go wrong with it: the result says what happened. Cancelling (`cancel` set) interrupts
the prompt, ends what was rented, and yields a result that says so.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final
from uuid import uuid4

from runcomfy.application.delivery import deliver, promised
from runcomfy.application.faultpoints import faultpoint
from runcomfy.application.finish import finish
from runcomfy.application.journal import Journal, NoJournal, Publish
from runcomfy.application.own_machine import total_of
from runcomfy.application.placing import Place, PlaceFactory, Placer, Show, owed
from runcomfy.application.prompting import Prompting
from runcomfy.application.run_record import RunRecord
from runcomfy.application.watcher import Ended, Watcher
from runcomfy.domain.binding import BoundWorkflow, bind, fit_seeds
from runcomfy.domain.exceptions import (
    DeadlineExceeded,
    Interrupted,
    JobTimeout,
    LaunchAmbiguous,
    LaunchUnclear,
    LeaseLost,
    LocalError,
    PreflightFailed,
    RunComfyError,
    StopUnconfirmed,
    ValueInvalid,
    foreign_text,
)
from runcomfy.domain.job import PICTURE_FORMATS, BillLine, JobId, JobRequest, JobResult, JobStatus, Output
from runcomfy.domain.out_file import checked_out_file
from runcomfy.domain.preflight import Problem, preflight
from runcomfy.domain.progress import NodeLabel, Progress, Step
from runcomfy.domain.settings import Settings
from runcomfy.domain.sidecar import Sidecar
from runcomfy.domain.workflow import Workflow
from runcomfy.ports.clock import Clock
from runcomfy.ports.comfyui import ComfyUI
from runcomfy.ports.results import JobFolder, ResultFile, Results

log = logging.getLogger("runcomfy.orchestrator")

EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""No more open files or memory."""

LoadWorkflow = Callable[[str], tuple[str | bytes, str | None, str]]
"""Takes a shipped name or a path; returns the graph's JSON, the sidecar's TOML if there is one, and a name."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A job that has passed every check that needs no machine."""

    job_id: JobId
    request: JobRequest
    workflow: Workflow
    sidecar: Sidecar | None
    bound: BoundWorkflow
    out_dir: str
    files: frozenset[str] = frozenset()
    """Values of the request's inputs that are files of this computer."""


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

    async def prepare(self, request: JobRequest, *, random_int: Callable[[int, int], int] | None = None) -> Prepared:
        """Parse, bind and check everything that needs no machine. Writes and sends nothing. Raises BadInput.

        `random_int(low, high)` draws seeds, both ends included; left out, they come from the system.
        """
        if request.convert not in (None, *PICTURE_FORMATS):
            raise ValueInvalid(
                f"pictures cannot be converted to {request.convert!r}", hint=f"use one of {', '.join(PICTURE_FORMATS)}"
            )
        if request.out_file is not None and request.out_root is not None:
            checked_out_file(request.out_file, request.out_root, request.out_root)
        if isinstance(request.workflow, str):
            text, toml, name = await asyncio.to_thread(self._load_workflow, request.workflow)
            workflow = Workflow.parse(text, name=name)
            sidecar = Sidecar.parse(toml, name=name) if toml is not None else None
            if sidecar is not None:
                sidecar.check(workflow)
        else:
            workflow, sidecar = Workflow.parse(request.workflow), None
        texts = [value for value in request.inputs.values() if isinstance(value, str)]
        files = await self._results.files_among(texts) if texts else frozenset()
        bound = bind(workflow, sidecar, request, random_int=random_int or self._random_int, files=files)
        for upload in bound.uploads:
            await self._results.check_input(upload.path, kind=upload.kind)
        return Prepared(
            job_id=request.job_id or JobId(str(uuid4())),
            request=request,
            workflow=workflow,
            sidecar=sidecar,
            bound=bound,
            files=files,
            out_dir=request.out_dir or self._settings.files.output_dir,
        )

    async def run(
        self,
        request: JobRequest,
        *,
        on_progress: Show | None = None,
        cancel: asyncio.Event | None = None,
        journal: Journal | None = None,
        at: PlaceFactory | None = None,
    ) -> JobResult:
        """Do the job and return what came of it, when everything it rented is gone.

        Setting `cancel` ends it in good order: status `cancelled`. Cancelling the task does the same and then lets
        the cancellation go on. A job whose results were committed when it was told is done all the same.

        `journal`: what is written down on the way, and the prompt of an earlier attempt to go on with; a run that
        loses its hold on the job publishes nothing, leaves its prompt alone, and fails with `lease-lost`. `at` says
        where the job runs; left out, the request does.
        """
        loop = asyncio.get_running_loop()
        book: Journal = journal if journal is not None else NoJournal(self._random_int, asyncio.to_thread)
        uid = request.job_id or JobId(str(uuid4()))
        run = RunRecord(uid, on_progress, started=loop.time(), journal=book, drawn_for=book.prompt_id)
        request = replace(request, job_id=run.job_id)
        place = at or self._placer.at_request(request)
        work = asyncio.create_task(self._do(run, request, place, queued=journal is not None), name=f"job-{run.job_id}")
        waiter = asyncio.create_task(cancel.wait()) if cancel is not None else None
        error: Exception | None = None
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
        except asyncio.CancelledError as cancelled:
            error = _cut_short(run, cancelled)
        except Exception as caught:  # noqa: BLE001 - told below
            error = caught
        if error is not None and not isinstance(error, RunComfyError):
            log.error("job_defect", exc_info=error, extra={"fields": {"job": run.job_id}})
            defect, error = error, _unforeseen(error)
            error.__cause__ = defect
        return self._result(run, error)

    def _result(self, run: RunRecord, error: RunComfyError | None) -> JobResult:
        run.end()
        if isinstance(error, RunComfyError):
            veil_error(error, self._veil)
        bill = run.earlier + ((run.place.bill if run.place is not None else ()) or run.bill)
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
            cost_usd=total_of(bill),
            timings=dict(run.timings),
            folder=run.folder,
            bill=bill,
            nodes=run.timeline.nodes,
            server_type=run.server_type,
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

    async def _do(self, run: RunRecord, request: JobRequest, at: PlaceFactory, *, queued: bool) -> None:
        run.step("prepare")
        prepared = await self.prepare(request, random_int=run.journal.random_int)
        run.seeds = prepared.bound.seeds
        folder = await self._open_folder(prepared, queued=queued)
        run.folder = folder.path
        try:
            earlier = run.journal.earlier
            prefer = earlier.place if earlier is not None else None
            async with at(job_id=run.job_id, show=run.show, step=run.step, on_bill=run.owe, prefer=prefer) as place:
                run.place = place
                run.earlier = await self._placer.earlier(place, run.job_id)
                await self._within_timeout(run, prepared, place, folder)
                run.step("leave")
        except BaseException as error:
            if isinstance(error, LeaseLost) and not run.outputs:
                await finish(_keep_aside(folder, error))
            await finish(folder.abandon())
            if not run.outputs:
                run.folder = None
            raise
        finally:
            if run.outputs:
                await finish(self._tell_cost(run, folder))
        run.show(Progress(Step.FINISHED, percent=100.0, message="done"))

    async def _open_folder(self, prepared: Prepared, *, queued: bool) -> JobFolder:
        request, job_id = prepared.request, prepared.job_id
        if request.out_file is None:
            return await self._results.open_folder(job_id, under=prepared.out_dir, again=queued)
        return await self._results.open_beside(
            job_id, file=request.out_file, root=request.out_root, earlier=request.earlier_outputs
        )

    async def _tell_cost(self, run: RunRecord, folder: JobFolder) -> None:
        """Complete the manifest with what is known only when the place was left. The results are whole without it."""
        if run.place is None or not run.place.bill:
            return
        bill = run.earlier + run.place.bill
        facts = {
            "cost_usd": format(total_of(bill), "f"),
            "bill": [_shown(line) for line in bill],
            "timings": {name: round(seconds, 6) for name, seconds in run.timings.items()},
        }
        try:
            await folder.amend(facts)
        except LocalError as error:
            self._placer.tell(f"{error.message}; {error.hint}")

    async def _within_timeout(self, run: RunRecord, prepared: Prepared, place: Place, folder: JobFolder) -> None:
        """Do the job's work at its place. The timeout counts from when nobody of ours is ahead there any more.

        A machine's start has a limit of its own, and so has every job that comes before.
        """
        limit = prepared.request.timeout or self._settings.comfy.execution_timeout
        loop, works = asyncio.get_running_loop(), True
        what, hint = "the job was not done", "give it longer with --timeout, e.g. --timeout 30m"

        def begin() -> None:
            if works:
                deadline.reschedule(loop.time() + limit.total_seconds())

        try:
            async with asyncio.timeout(None) as deadline:
                place.seat.at_turn(begin)
                bound, ended = await self._executed(run, prepared, place)
                run.step("fetch")
                run.show(Progress(Step.FETCHING, percent=100.0, message="fetching the results"))
                what = "the job was computed, but its results were not here"
                hint = f"{hint}: fetching the results counts, too; or look why the machine sends them so slowly"
                files = await deliver(
                    promised(ended.outputs, bound), place.server, folder, convert=prepared.request.convert
                )
                await self._commit(run, prepared, bound, ended, place, folder, files)
        except TimeoutError as error:
            raise JobTimeout(
                f"{what} after {limit.total_seconds():.0f} s on the machine",
                hint=hint,
                details={"timeout_seconds": limit.total_seconds(), "prompt_id": run.prompt_id},
            ) from error
        finally:
            works = False

    async def _executed(self, run: RunRecord, prepared: Prepared, place: Place) -> tuple[BoundWorkflow, Ended]:
        """Have the workflow executed, or go on with the prompt that an earlier attempt had sent."""
        prompting = Prompting(
            place,
            run.journal,
            Watcher(place.server, self._settings.comfy, clock=self._clock),
            tell=self._placer.tell,
            named=run.name_prompt,
            on_progress=run.show,
        )
        if run.journal.earlier is not None:
            run.step("attach")
            if (found := await prompting.find_earlier()) is not None and run.prompt_id is not None:
                run.step("execute")
                run.joined = True
                ended = await prompting.attach(found, run.prompt_id, _labels(prepared.workflow, prepared.bound.graph))
                return await self._as_submitted(run, prepared.bound, place.server), ended
        if run.journal.prompt_id != run.drawn_for:
            # Another prompt: whoever attaches to it after a crash must find the seeds that it really has.
            prepared = self._drawn_anew(run, prepared)
        bound = await self._check(run, prepared, place.server)
        graph = await self._upload(run, bound, place.server)
        run.step("submit")
        labels = _labels(prepared.workflow, graph)
        return bound, await prompting.send(graph, labels, lambda: run.step("execute"))

    def _drawn_anew(self, run: RunRecord, prepared: Prepared) -> Prepared:
        draw = run.journal.random_int
        bound = bind(prepared.workflow, prepared.sidecar, prepared.request, random_int=draw, files=prepared.files)
        run.seeds, run.drawn_for = bound.seeds, run.journal.prompt_id
        return replace(prepared, bound=bound)

    async def _as_submitted(self, run: RunRecord, bound: BoundWorkflow, server: ComfyUI) -> BoundWorkflow:
        """Return the workflow with the seeds that the prompt was sent with: those that the node list's ranges moved."""
        if bound.free_seeds:
            info = await server.node_info({bound.graph[node_id]["class_type"] for node_id, _ in bound.free_seeds})
            bound = fit_seeds(bound, info)
            run.seeds = bound.seeds
        return bound

    async def _commit(
        self,
        run: RunRecord,
        prepared: Prepared,
        bound: BoundWorkflow,
        ended: Ended,
        place: Place,
        folder: JobFolder,
        files: Sequence[ResultFile],
    ) -> None:
        run.step("commit")

        async def through(publish: Publish, outputs: tuple[Output, ...]) -> None:
            facts = self._facts(run, prepared, bound, place, ended) | {"notes": list(folder.notes)}
            await run.journal.commit(publish, outputs, facts)

        run.outputs = await folder.commit(files, self._manifest(run, prepared, bound, place, ended), through=through)
        faultpoint("job.committed")

    async def _check(self, run: RunRecord, prepared: Prepared, server: ComfyUI) -> BoundWorkflow:
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

    async def _upload(self, run: RunRecord, bound: BoundWorkflow, server: ComfyUI) -> Mapping[str, Any]:
        if not bound.uploads:
            return bound.graph
        run.step("upload")
        names = {}
        for upload in bound.uploads:
            run.show(Progress(Step.UPLOADING, message="uploading the inputs"))
            names[upload] = await server.upload(upload.path, kind=upload.kind)
        return bound.with_uploads(names)

    def _facts(
        self, run: RunRecord, prepared: Prepared, bound: BoundWorkflow, place: Place, ended: Ended
    ) -> dict[str, Any]:
        """Return what a journal keeps of a job that is done, besides its outputs; costs and times are those so far."""
        bill = run.earlier + owed(place, now=self._clock.now())
        return {
            "prompt_id": run.prompt_id,
            "workflow": {"name": prepared.workflow.name, "sha256": bound.sha256},
            "seeds": dict(bound.seeds),
            "where": place.kind,
            "server_type": run.server_type,
            "place": place.key,
            "nodes": run.timeline.as_list(),
            "cached_nodes": sorted(ended.cached),
            "cost_usd": format(total_of(bill), "f"),
            "bill": [_shown(line) for line in bill],
            "timings": {name: round(seconds, 6) for name, seconds in run.timings.items()},
        }

    def _manifest(
        self, run: RunRecord, prepared: Prepared, bound: BoundWorkflow, place: Place, ended: Ended
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
            "server_type": run.server_type,
            "nodes": run.timeline.as_list(),
            "usd_per_hour": str(place.machine.usd_per_hour) if place.machine else None,
            "cached_nodes": sorted(ended.cached),
            "cost_usd": "0" if place.machine is None else None,
            "timings": {name: round(seconds, 6) for name, seconds in run.timings.items()},
            "committed_at": self._clock.now().isoformat(),
        }


def _cut_short(run: RunRecord, cancelled: asyncio.CancelledError) -> Exception | None:
    """Return what a cancellation means: after the commit it came too late.

    What `finish` brought to its end meanwhile may have failed: that a machine may still bill, or a defect, is told.
    """
    broken = cancelled.__cause__
    if isinstance(broken, Exception):
        defect = not isinstance(broken, RunComfyError)
        if run.outputs or defect or isinstance(broken, StopUnconfirmed | LaunchUnclear | LaunchAmbiguous):
            return broken
    return None if run.outputs else Interrupted("the job was cancelled", hint="run it again when you like")


def _unforeseen(error: Exception) -> RunComfyError:
    """Return what an error means that nobody foresaw: this computer has run out of something, or a defect."""
    no_thread = isinstance(error, RuntimeError) and "start new thread" in str(error)
    if no_thread or isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in EXHAUSTED):
        return LocalError(
            f"this computer has no more open files, memory or threads: {foreign_text(error) or 'out of memory'}",
            hint="let this program have more (ulimit -n, ulimit -u), or give it less to do at once",
        )
    return RunComfyError(
        f"unexpected {type(error).__name__}: {error}",
        hint="this is a defect of the program; the log in the state directory has the details",
    )


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


def _labels(workflow: Workflow, graph: Mapping[str, Any]) -> dict[str, NodeLabel]:
    return {node_id: NodeLabel(workflow.title(node_id), str(node["class_type"])) for node_id, node in graph.items()}


def _shown(line: BillLine) -> dict[str, str]:
    return {
        "what": line.what,
        "seconds": str(line.seconds),
        "usd_per_hour": str(line.usd_per_hour),
        "amount_usd": str(line.amount_usd),
    }


async def _keep_aside(folder: JobFolder, error: LeaseLost) -> None:
    """Keep what was fetched under names that say that it does not count."""
    try:
        kept = await folder.set_aside()
    except LocalError as failed:
        log.warning("discarded_not_kept", extra={"fields": {"error": failed.code}})
        return
    if kept:
        error.details["kept"] = list(kept)


async def _settled(task: asyncio.Task[None]) -> None:
    await asyncio.wait({task})
