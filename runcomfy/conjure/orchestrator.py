"""
CONJURE's image and mesh in one run, under the names that CONJURE uses: `RunComfyOrchestrator()` and `FluxMeshJob`.

A job is run by the product's own engine: checked before a machine is rented, watched, its results decoded, what was
rented seen gone, costs from the ledger. Here it only gets its inputs from CONJURE's files and its results copied to
CONJURE's places. Prompt and render are read, never written.
"""

from __future__ import annotations

import asyncio
import copy
import json
import random
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from decimal import ROUND_HALF_UP, Decimal
from enum import Enum
from pathlib import Path
from typing import Any, Final, Self, overload
from uuid import uuid4

import workflows
from runcomfy.adapters.clock import SystemClock
from runcomfy.adapters.config import load_settings
from runcomfy.application.journal import NoJournal
from runcomfy.application.orchestrator import LoadWorkflow
from runcomfy.application.orchestrator import RunComfyOrchestrator as JobRunner
from runcomfy.application.placing import Placer
from runcomfy.bootstrap import App
from runcomfy.conjure.client import ConjureAPIClient, MachineInfo
from runcomfy.conjure.dev_server_state import DevServerStateManager
from runcomfy.conjure.errors import also, builtin_errors
from runcomfy.conjure.files import (
    FLUX_IMAGE,
    MESH,
    MODELS,
    RENDER,
    Verified,
    copy_picture,
    publish,
    read_graph,
    read_prompt,
)
from runcomfy.conjure.office import Office, log, open_office
from runcomfy.conjure.progress_tracker import FLUX_MESH, FluxMeshProgressTracker, progress_tracker
from runcomfy.conjure.two_forms import TwoForms
from runcomfy.conjure.workflow_client import ConjureWorkflowClient, set_prompt
from runcomfy.domain.exceptions import RunComfyError, ValueInvalid, WorkflowNotJson, foreign_text
from runcomfy.domain.job import JobId, JobRequest, JobResult, Output, OutputKind
from runcomfy.domain.job import JobStatus as EndStatus
from runcomfy.domain.progress import Progress
from runcomfy.domain.settings import Settings
from runcomfy.ports.clock import Clock
from runcomfy.ports.results import Results
from runcomfy.wiring.leaving import under_way

CONJURES_WORKFLOW: Final = Path("runcomfy", "workflows", "generate_flux_mesh.json")
"""Where CONJURE keeps it, relative to the working directory; the same graph ships with this product."""
UNKNOWN_USD_PER_HOUR: Final = Decimal(1)
"""What CONJURE estimates for a machine type that it does not know."""
FORGET_AFTER: Final = 1_000
"""How many jobs are remembered at most; ended ones go first."""


class JobStatus(Enum):
    """How a job is."""

    PENDING = "pending"
    STARTING = "starting"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


ENDED: Final = frozenset({JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED})


@dataclass
class FluxMeshJob:
    """One image with its mesh. Times are ISO 8601 in UTC, costs USD; `generated_*_url` hold paths of this computer."""

    job_id: str
    status: JobStatus
    prompt: str
    input_image_path: str | None = None
    server_id: str | None = None
    comfyui_url: str | None = None
    """Empty even while the job runs: who knows a machine's address can use it, and jobs are shown to people."""
    prompt_id: str | None = None
    client_id: str | None = None
    created_at: str | None = None
    started_at: str | None = None
    completed_at: str | None = None
    generated_image_url: str | None = None
    generated_mesh_url: str | None = None
    result_files: dict[str, str] | None = None
    error_message: str | None = None
    machine_cost_estimate: float | None = None
    actual_machine_cost: float | None = None
    """What the ledger says that the job's machine cost; None until it has ended."""

    def to_dict(self) -> dict[str, Any]:
        """Return the job as CONJURE shows it; `progress_summary` as `/workflow/progress` has it."""
        names = (
            "job_id status prompt input_image_path created_at started_at completed_at generated_image_url "
            "generated_mesh_url result_files error_message machine_cost_estimate actual_machine_cost"
        )
        shown = {name: getattr(self, name) for name in names.split()}
        shown["status"] = self.status.value
        shown["progress_summary"] = progress_tracker.get_workflow_summary(self.prompt_id) if self.prompt_id else None
        return shown


class ConjureOrchestrator:
    """`RunComfyOrchestrator()` as CONJURE makes it. File places are relative to the working directory."""

    def __init__(
        self,
        workflow_path: str | Path = "runcomfy/workflows/generate_flux_mesh.json",
        *,
        settings: Settings | None = None,
        office: Office = open_office,
        clock: Clock | None = None,
        tracker: FluxMeshProgressTracker | None = None,
    ) -> None:
        """Nothing is opened or sent. Raises SettingInvalid."""
        self._settings = settings or load_settings()
        self._office = office
        self._clock = clock or SystemClock()
        self._tracker = tracker or progress_tracker
        self.workflow_path = Path(workflow_path)
        self.runcomfy_client = ConjureAPIClient(office=office, settings=self._settings)
        self.comfyui_client = ConjureWorkflowClient(settings=self._settings, clock=self._clock, tracker=self._tracker)
        state_file = Path(self._settings.files.state_dir) / "dev_server_state.json"
        self.dev_server_manager = DevServerStateManager(state_file, copies=self._settings.files.state_copies)
        self.active_jobs: dict[str, FluxMeshJob] = {}
        self.machine_pool: dict[str, MachineInfo] = {}
        """The machines that `get_or_create_machine` gave, by id."""
        app = self._settings.app
        self.prefer_dev_server = True
        self.auto_shutdown: bool = app.auto_shutdown
        self.machine_reuse: bool = app.machine_reuse
        self.idle_timeout: float = app.idle_timeout.total_seconds()
        self.cost_per_hour: dict[str, float] = {
            name: float(rate.usd_per_hour) for name, rate in self._settings.rates.rates.items()
        }

    # -- the workflow --------------------------------------------------------------------------------------

    def load_workflow(self) -> dict[str, Any]:
        """Return the graph. CONJURE's own, where its file is not there, is the one that ships with this product.

        Raises FileNotFoundError, ValueError (not a graph).
        """
        try:
            data: bytes | str = read_graph(self.workflow_path)
        except RunComfyError as error:
            if self.workflow_path != CONJURES_WORKFLOW:
                raise also(error, FileNotFoundError) from error
            data = workflows.load(FLUX_MESH)[0]
        try:
            graph = json.loads(data)
        except (ValueError, RecursionError):
            graph = None
        if not isinstance(graph, dict):
            shown = foreign_text(self.workflow_path, 500)
            raise also(WorkflowNotJson(f"{shown} is not a workflow", hint="save it in API format"), ValueError)
        return graph

    def prepare_workflow_inputs(self, workflow: Mapping[str, Any], use_conjure_data: bool = True) -> dict[str, Any]:
        """Return a copy of the graph, with the user's prompt in it if there is one. Raises RuntimeError."""
        graph = copy.deepcopy(dict(workflow))
        if use_conjure_data:
            with builtin_errors():
                prompt = read_prompt()
            if prompt:
                set_prompt(graph, prompt)
        return graph

    def estimate_cost(self, machine_type: str | Enum, estimated_duration_seconds: float = 300) -> float:
        """Return what a machine of a type costs for so long, in USD to four decimals.

        By the rate table (`comfyctl config`), not by the rates in CONJURE's source, which are not RunComfy's prices.
        """
        rate = self._settings.rates.find(str(machine_type.value if isinstance(machine_type, Enum) else machine_type))
        usd_per_hour = rate.usd_per_hour if rate else UNKNOWN_USD_PER_HOUR
        usd = usd_per_hour * Decimal(str(estimated_duration_seconds)) / 3600
        return float(usd.quantize(Decimal("0.0001"), ROUND_HALF_UP))

    # -- machines ------------------------------------------------------------------------------------------

    async def get_or_create_machine(self) -> MachineInfo:
        """Return the dev server if it answers, or launch it and wait for it. Raises RuntimeError, TimeoutError.

        Jobs need no machine from here: each takes the dev server, or one of its own that ends with it.
        """
        info = await self.runcomfy_client.get_or_create_ready_machine(FLUX_MESH)
        self.machine_pool[info.server_id] = info
        return info

    async def shutdown_idle_machines(self) -> list[str]:
        """Stop the dev server if `auto_shutdown` is on and nothing ran there for `idle_timeout`; return what ended."""
        if not self.auto_shutdown:
            return []
        with builtin_errors():
            async with self._office(self._as_told()) as app:
                _, dev = await app.cloud()
                status = await dev.status()
                idle = status.idle if status is not None else None
                if idle is None or idle < timedelta(seconds=self.idle_timeout):
                    return []
                ended = [str(machine.server_id) for machine in await dev.shutdown(reason="idle")]
        for server_id in ended:
            self.machine_pool.pop(server_id, None)
        return ended

    # -- jobs ----------------------------------------------------------------------------------------------

    async def create_job(self, job_name: str = "flux_mesh_generation") -> FluxMeshJob:
        """Return a new job with the user's prompt and render. Raises RuntimeError if the prompt cannot be read.

        `job_name` is for people; ids are made here.
        """
        with builtin_errors():
            prompt = await asyncio.to_thread(read_prompt)
        job = FluxMeshJob(
            job_id=str(uuid4()),
            status=JobStatus.PENDING,
            prompt=prompt,
            input_image_path=str(RENDER),
            created_at=self._now(),
            machine_cost_estimate=self.estimate_cost(self._settings.cloud.server_type),
        )
        self.active_jobs[job.job_id] = job
        self._make_room()
        log.info("conjure_job", extra={"fields": {"job": job.job_id, "name": foreign_text(job_name, 80)}})
        return job

    async def execute_job(self, job: FluxMeshJob) -> FluxMeshJob:
        """Run a job and return it, with results or with what went wrong. Never raises but for being cancelled."""
        job.status, job.started_at = JobStatus.STARTING, self._now()
        try:
            with under_way():
                await self._run(job)
        except RunComfyError as error:
            self._fail(job, error.message)
        except asyncio.CancelledError:
            self._fail(job, "cancelled")
            job.status = JobStatus.CANCELLED
            raise
        except Exception as error:  # noqa: BLE001 - the contract: a job says what went wrong
            log.exception("conjure_job_defect", extra={"fields": {"job": job.job_id}})
            self._fail(job, f"unexpected {type(error).__name__}: {error}")
        job.completed_at = self._now()
        return job

    async def execute_flux_mesh_generation(self, job_name: str = "conjure_flux_mesh") -> FluxMeshJob:
        """Make a job of the user's prompt and render, run it, and return it. Never raises but for being cancelled."""
        try:
            job = await self.create_job(job_name)
        except RunComfyError as error:
            job = FluxMeshJob(str(uuid4()), JobStatus.FAILED, "", created_at=self._now())
            self.active_jobs[job.job_id] = job
            self._fail(job, error.message)
            return job
        return await self.execute_job(job)

    async def _run(self, job: FluxMeshJob) -> None:
        if not job.prompt.strip():
            raise ValueInvalid("there is no prompt", hint="write one into data/generated_text/userPrompt.txt")
        with tempfile.TemporaryDirectory(prefix="comfyctl-") as folder:
            picture = Path(folder, "render.png")
            given = Path(job.input_image_path or RENDER)
            await copy_picture(given, picture, max_pixels=self._settings.files.max_input_pixels)
            async with self._office(self._as_told()) as app:
                result = await self._in_engine(app, job, str(picture))
        self._settle(job, result)
        if result.exception is not None and result.status is not EndStatus.DONE:
            return
        job.result_files = await asyncio.to_thread(self._put, result)
        job.generated_image_url = job.result_files.get("Generated Image")
        job.generated_mesh_url = job.result_files.get("Generated Mesh")
        job.status = JobStatus.COMPLETED

    def _as_told(self) -> Settings:
        """Return the settings with what callers have written into the attributes since."""
        client: Any = self.runcomfy_client  # callers may have put something of their own there
        comfy: Any = self.comfyui_client
        told = client.as_told() if isinstance(client, ConjureAPIClient) else self._settings
        settings = comfy.as_told() if isinstance(comfy, ConjureWorkflowClient) else told.comfy
        reuse = bool(self.machine_reuse and self.prefer_dev_server)
        app = replace(told.app, machine_reuse=reuse, auto_shutdown=bool(self.auto_shutdown))
        return replace(told, app=app, comfy=settings)

    async def _in_engine(self, app: App, job: FluxMeshJob, picture: str) -> JobResult:
        journal = NoJournal(random.SystemRandom().randint, asyncio.to_thread)
        job.prompt_id = str(journal.prompt_id)
        self._tracker.start_workflow_tracking(FLUX_MESH, job.prompt_id, job.client_id or "")

        def show(progress: Progress) -> None:
            job.status = JobStatus.RUNNING
            self._tracker.observe(str(journal.prompt_id), progress)

        request = await asyncio.to_thread(self._request, job, picture)
        return await app.live.observing(app.orchestrator()).run(request, on_progress=show, journal=journal)

    def _request(self, job: FluxMeshJob, picture: str) -> JobRequest:
        graph = self.load_workflow()
        job_id = JobId(job.job_id)
        if graph == json.loads(workflows.load(FLUX_MESH)[0]):
            return JobRequest(FLUX_MESH, image=picture, prompt=job.prompt, job_id=job_id)
        set_prompt(graph, job.prompt)
        return JobRequest(graph, image=picture, job_id=job_id)

    def _settle(self, job: FluxMeshJob, result: JobResult) -> None:
        """Take over what the engine says of a job, but for its results."""
        job.actual_machine_cost = float(result.cost_usd)
        if result.prompt_id:
            self._tracker.name_also(str(job.prompt_id), str(result.prompt_id))
            job.prompt_id = str(result.prompt_id)
        if result.status is EndStatus.DONE:
            self._tracker.handle_workflow_completion(str(job.prompt_id))
            if result.exception is not None:  # whole results, and a machine that was not seen gone
                job.error_message = foreign_text(result.exception)
            return
        self._fail(job, str(result.exception or "the job ended without results"))
        if result.status is EndStatus.CANCELLED:
            job.status = JobStatus.CANCELLED

    def _put(self, result: JobResult) -> dict[str, str]:
        """Copy the results to CONJURE's places; return them by CONJURE's names."""
        places = {"Generated Image": FLUX_IMAGE, "Generated Mesh": MODELS / MESH}
        found = {"Generated Image": _output(result, "24", OutputKind.IMAGE)}
        found["Generated Mesh"] = _output(result, "33", OutputKind.MESH)
        there = {name: output for name, output in found.items() if output is not None}
        publish({places[name]: Verified(each.path, each.size_bytes, each.sha256) for name, each in there.items()})
        return {name: str(places[name]) for name in there}

    def _fail(self, job: FluxMeshJob, message: str) -> None:
        job.status, job.error_message, job.completed_at = JobStatus.FAILED, foreign_text(message), self._now()
        if job.prompt_id:
            self._tracker.handle_workflow_completion(job.prompt_id, success=False, error_message=message)

    # -- asking --------------------------------------------------------------------------------------------

    def get_job_status(self, job_id: str) -> FluxMeshJob | None:
        """Return the job, or None if it is not known (any more)."""
        return self.active_jobs.get(job_id)

    def get_all_jobs(self) -> list[FluxMeshJob]:
        """Return every job that is remembered, oldest first."""
        return list(self.active_jobs.values())

    def get_active_jobs(self) -> list[FluxMeshJob]:
        """Return the jobs that have not ended."""
        return [job for job in self.active_jobs.values() if job.status not in ENDED]

    async def cleanup_job(self, job_id: str) -> bool:
        """Forget a job; whether there was one. A job that runs goes on."""
        return self.active_jobs.pop(job_id, None) is not None

    async def get_cost_summary(self) -> dict[str, Any]:
        """Return the costs of the jobs that are remembered, in USD, and how many machines of ours may run.

        `comfyctl costs` has the whole ledger.
        """
        jobs = self.get_all_jobs()
        machines = len(self.machine_pool)
        with suppress(RunComfyError):  # without an account, or books, there are those that were given out here
            async with self._office(self._as_told()) as app:
                cloud, _ = await app.cloud()
                machines = len(await cloud.books.rows())
        return {
            "total_jobs": len(jobs),
            "active_jobs": len(self.get_active_jobs()),
            "total_estimated_cost": _sum(job.machine_cost_estimate for job in jobs),
            "total_actual_cost": _sum(job.actual_machine_cost for job in jobs),
            "active_machines": machines,
            "cost_per_hour_rates": dict(self.cost_per_hour),
        }

    def _now(self) -> str:
        return self._clock.now().isoformat()

    def _make_room(self) -> None:
        while len(self.active_jobs) > FORGET_AFTER:
            ended = (key for key, job in self.active_jobs.items() if job.status in ENDED)
            key = next(ended, None)
            if key is None:
                return
            del self.active_jobs[key]


def _output(result: JobResult, node: str, kind: OutputKind) -> Output | None:
    """Return the result of a node, or, in another workflow, the first of its kind."""
    of_kind = [output for output in result.outputs if output.kind is kind]
    return next((output for output in of_kind if output.node == node), of_kind[0] if of_kind else None)


def _sum(amounts: Any) -> float:
    return float(round(sum((Decimal(str(amount)) for amount in amounts if amount is not None), Decimal(0)), 4))


class RunComfyOrchestrator(JobRunner, metaclass=TwoForms):
    """What runs jobs: with its wiring (keywords) our engine, else CONJURE's form of it (`ConjureOrchestrator`)."""

    conjure_form = ConjureOrchestrator

    @overload
    def __new__(cls, workflow_path: str | Path = ...) -> ConjureOrchestrator: ...  # type: ignore[misc]
    @overload
    def __new__(
        cls,
        *,
        settings: Settings,
        clock: Clock,
        results: Results,
        placer: Placer,
        load_workflow: LoadWorkflow,
        random_int: Callable[[int, int], int],
        veil: Callable[[str], str] = ...,
    ) -> Self: ...
    def __new__(cls, *arguments: Any, **wiring: Any) -> Any:
        """Return the form that the arguments mean."""
        if cls is RunComfyOrchestrator and wiring.keys() <= {"workflow_path"}:
            return ConjureOrchestrator(*arguments, **wiring)
        return super().__new__(cls)
