"""
The generation service on RunComfy's serverless API: requests to a deployment, no machine of one's own.

    ServerlessEngine               runs a generation's order as one request
    ServerlessGenerationService    CONJURE's service over it

What a call does with its picture, its results, the mesh it keeps and the files at CONJURE's places is what the other
services do (`generating`). A picture with depth, and picture and mesh in one, are requests of the deployment's own
workflow with CONJURE's values laid over it. A picture from words alone, and a mesh of a picture that no run has made,
are other graphs of the same nodes, sent along with the request.

The bill of a request is RunComfy's to tell, and its API does not; `cost` is an estimate here, and `cost_estimate` says
between what it may lie.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Hashable, Mapping
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar, Final, TypeVar
from uuid import uuid4

import workflows
from launcher.conjure.engine import Engine, Made, Order, shared_engine
from launcher.conjure.generating import Unified
from launcher.conjure.parameters import FLUX_IMAGE, FLUX_MESH, IMAGE_TO_MESH
from launcher.conjure.services import MachineGenerationService
from runcomfy.adapters.data_uri import png_data_uri
from runcomfy.adapters.providers.runcomfy_serverless import unavailable
from runcomfy.application.serverless_run import ServerlessDone, ServerlessOrder
from runcomfy.bootstrap import App
from runcomfy.conjure.progress_tracker import STAGED, progress_tracker
from runcomfy.conjure.serverless_runs import (
    IMAGE,
    MAX_SEED,
    MESH,
    STEPS_FLUX,
    STEPS_PARTPACKER,
    conjure_overrides,
    serverless_runs,
)
from runcomfy.domain.binding import into_range
from runcomfy.domain.exceptions import RunComfyError, ValueInvalid, foreign_text
from runcomfy.domain.job import JobId, JobRequest
from runcomfy.domain.progress import Progress, Step
from runcomfy.domain.serverless import RequestReport, RequestState

T = TypeVar("T")

SERVERLESS: Final = "serverless"
PRIMITIVES: Final[Mapping[str, str]] = {"3.steps": "44", "32.steps": "43", "3.noise_seed": "42"}
"""Inputs of generate_flux_mesh that are nodes of their own in the deployment's workflow."""
MESH_SEED_MAX: Final = 2**31 - 1
_KEPT_ESTIMATES: Final = 256


class ServerlessEngine(Engine):
    """Runs orders as serverless requests, on the loop of another engine and beside its work."""

    def __init__(self, base: Engine, estimates: OrderedDict[str, Mapping[str, Any]]) -> None:
        """`base`: whose loop, settings and fixed places these are; `estimates`: where what requests cost is noted."""
        super().__init__()
        self._base = base
        self.publishing = base.publishing
        self.outlives_callers = base.outlives_callers
        self._estimates = estimates

    @property
    def app(self) -> App:
        """The product, as this process has it."""
        return self._base.app

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """Where the work runs."""
        return self._base.loop

    async def once(self, key: Hashable, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Do work, or join the same work, of this service object or another."""
        return await self._base.once(key, work)

    async def run(self, order: Order) -> Made:
        """Run the order as one request, and cancel it if nobody wants it any more. Its id is the request's."""
        app, request = self.app, order.request
        settings = app.settings
        wanted = await asyncio.to_thread(order_of, request, max_pixels=settings.files.max_input_pixels)
        wanted = replace(wanted, timeout=settings.serverless.request_timeout, facts={"workflow": request.workflow})
        told = _Told(str(request.workflow))

        def submitted(report: RequestReport) -> None:
            self.accepted(report.request_id)
            told.begin(report.request_id)

        try:
            async with serverless_runs(settings, app.clock) as runs:
                done = await runs.run(wanted, job_id=JobId(str(uuid4())), submitted=submitted, heard=told.hear)
        except BaseException as error:
            told.end(error.message if isinstance(error, RunComfyError) else type(error).__name__)
            raise
        told.end(None)
        return self._made(done, request)

    def _made(self, done: ServerlessDone, request: JobRequest) -> Made:
        request_id = str(done.request.request_id)
        if done.cost is not None:
            self._estimates[request_id] = done.cost.as_dict()
            while len(self._estimates) > _KEPT_ESTIMATES:
                self._estimates.popitem(last=False)
        return Made(
            job_id=request_id,
            prompt_id="",
            outputs=dict(done.outputs),
            seeds=seeds_of(request),
            cost_usd=done.cost.usd if done.cost is not None else Decimal(0),
        )

    @property
    def folder(self) -> Path:
        """Where services keep what they know."""
        return self._base.folder


class _Told:
    """What CONJURE's progress endpoints show of a request."""

    def __init__(self, workflow: str) -> None:
        self._workflow, self._id = workflow, ""

    def begin(self, request_id: str) -> None:
        """The request has been taken in."""
        self._id = request_id
        progress_tracker.start_workflow_tracking(self._workflow, request_id, "", staged=self._workflow in STAGED)

    def hear(self, report: RequestReport) -> None:
        """A look at the request."""
        progress_tracker.observe(self._id, progress_of(report), workflow_name=self._workflow)

    def end(self, error: str | None) -> None:
        """The request is over, and its results are here, or it has failed."""
        if self._id:
            progress_tracker.handle_workflow_completion(self._id, success=error is None, error_message=error or "")


def seeds_of(request: JobRequest) -> dict[str, int]:
    """Return the seeds that a request is sent with, by their targets in our workflows."""
    seed = request.seed or 0
    if request.workflow == IMAGE_TO_MESH:
        return {"32.seed": into_range(seed, 0, MESH_SEED_MAX)}
    return {"3.noise_seed": into_range(seed, 0, MAX_SEED)}


def order_of(request: JobRequest, *, max_pixels: int) -> ServerlessOrder:
    """Return the request that does what a job asks. Blocks: it reads the picture.

    Raises InputFileMissing, InputFileInvalid, ValueInvalid.
    """
    image = png_data_uri(request.image, max_pixels=max_pixels) if request.image is not None else ""
    if request.workflow == FLUX_MESH:
        overrides = conjure_overrides(request.prompt or "", image, seeds_of(request)["3.noise_seed"])
        for target, value in request.sets.items():
            node, _, name = target.partition(".")
            if target in PRIMITIVES:
                node, name = PRIMITIVES[target], "value"
            overrides.setdefault(node, {"inputs": {}})["inputs"][name] = value
        return ServerlessOrder((IMAGE, MESH), overrides)
    if request.workflow not in (FLUX_IMAGE, IMAGE_TO_MESH):
        raise ValueInvalid(
            f"the workflow {foreign_text(request.workflow, 60)!r} does not run on a serverless deployment",
            hint="run it on a machine",
        )
    values = {**request.sets, **seeds_of(request)}
    if request.workflow == FLUX_IMAGE:
        values |= {"34.clip_l": request.prompt or "", "34.t5xxl": request.prompt or ""}
    else:
        values["16.image"] = image
    graph: dict[str, Any] = json.loads(workflows.load(request.workflow)[0])
    for target, value in values.items():
        node, _, name = target.partition(".")
        graph[node]["inputs"][name] = value
    return ServerlessOrder((IMAGE if request.workflow == FLUX_IMAGE else MESH,), graph=graph)


def progress_of(report: RequestReport) -> Progress:
    """Return what is known of a request's progress: whether it waits or runs, and behind how many."""
    if report.state in (RequestState.IN_QUEUE, RequestState.UNKNOWN):
        return Progress(Step.QUEUED, message="waits for an instance", queue_position=report.queue_position)
    if report.state.over:
        return Progress(Step.FETCHING, percent=100.0, message="fetching results")
    return Progress(Step.RUNNING, message="runs on an instance")


class ServerlessGenerationService(MachineGenerationService):
    """Generates with requests to a serverless deployment of RunComfy's (RUNCOMFY_DEPLOYMENT_ID).

    `cost` in its answers is an estimate, and `cost_estimate` says between what it may lie.
    """

    mode: ClassVar[str] = SERVERLESS
    where: ClassVar[str] = SERVERLESS
    fixed_places: ClassVar[bool] = True

    def __init__(self, engine: Engine | None = None, *, root: str | None = None) -> None:
        """`engine`: on whose loop requests are made; `root`: see `MachineGenerationService`."""
        super().__init__(engine, root=root)
        self._estimates: OrderedDict[str, Mapping[str, Any]] = OrderedDict()

    @property
    def _engine(self) -> Engine:
        return ServerlessEngine(self._given or shared_engine(), self._estimates)

    def availability(self) -> tuple[bool, str]:
        """Return whether a deployment and a token are set, and if not, what is missing. Asks nobody."""
        try:
            settings = self._engine.app.settings
        except RunComfyError as error:
            return False, error.message
        reason = unavailable(settings.serverless, settings.cloud)
        if reason is None:
            return True, ""
        return False, f"{reason.message}: {reason.hint}"

    # -- how calls are made --------------------------------------------------------------------------------

    def _completed(self, asked: Unified) -> Unified:
        """Return it with the steps of the settings; None: the deployment's workflow has them, they need not be sent."""
        settings = self._engine.app.settings.serverless
        flux, mesh = asked.steps_flux, asked.steps_partpacker
        if flux is None and settings.steps_flux != STEPS_FLUX:
            flux = settings.steps_flux
        if mesh is None and settings.steps_partpacker != STEPS_PARTPACKER:
            mesh = settings.steps_partpacker
        return replace(asked, steps_flux=flux, steps_partpacker=mesh)

    def _told(self, answer: dict[str, Any]) -> dict[str, Any]:
        """Return an answer with what is known of its cost, said to be an estimate."""
        if not answer.get("success"):
            return answer
        estimate = self._estimates.get(str(answer.get("job_id")))
        known = dict(estimate) if estimate is not None and not answer.get("reused") else None
        return {**answer, "cost_estimate": known}


class ServerlessRunComfyService(ServerlessGenerationService):
    """The same under the name that CONJURE has for it in its `runcomfy` package."""
