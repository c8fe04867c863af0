"""
One ComfyUI server under the names that CONJURE uses: `ComfyUIWorkflowClient()`, to which each call names the server.

Sending, watching and fetching are the product's own; a prompt is sent exactly once, the truth is asked for by polling
even if the socket is silent, a result counts only when it has been decoded. Each call opens a connection of its own, so
that it works in whatever event loop CONJURE is in.
"""

from __future__ import annotations

import asyncio
import copy
import random
import tempfile
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any, Final, Self, overload
from uuid import uuid4

import aiohttp

from runcomfy.adapters.clock import SystemClock
from runcomfy.adapters.comfyui.client import ComfyUIWorkflowClient as ServerClient
from runcomfy.adapters.config import load_settings
from runcomfy.adapters.media import inspect
from runcomfy.application.prompting import find_prompt
from runcomfy.application.watcher import Watcher
from runcomfy.conjure.attributes import told_span
from runcomfy.conjure.errors import builtin_errors
from runcomfy.conjure.files import FLUX_IMAGE, MESH, RENDER, Verified, copy_picture, publish
from runcomfy.conjure.office import log
from runcomfy.conjure.progress_tracker import STAGED, FluxMeshProgressTracker, progress_tracker
from runcomfy.conjure.two_forms import TwoForms
from runcomfy.domain.exceptions import RunComfyError, ServerUnreachable, WorkflowInvalid, foreign_text
from runcomfy.domain.job import FileRef, OutputKind, PromptId
from runcomfy.domain.progress import HistoryEntry, NodeLabel, Progress, ServerEvent
from runcomfy.domain.secret import SecretUrl
from runcomfy.domain.settings import ComfySettings, Settings
from runcomfy.ports.clock import Clock

KEPT_LABELS: Final = 64
"""Of so many prompts it is remembered how their nodes are called."""

_RESULTS: Final = (
    ("Generated Image", "24", "images", OutputKind.IMAGE),
    ("Generated Mesh", "33", "3d", OutputKind.MESH),
)


class ExecutionStatus(Enum):
    """How a prompt is."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"


@dataclass
class PromptExecution:
    """What is known of a prompt. `status` is a value of `ExecutionStatus`, times are ISO 8601 in UTC."""

    prompt_id: str
    status: str
    client_id: str | None = None
    queued_at: str | None = None
    started_at: str | None = None
    completed_at: str | None = None
    error_message: str | None = None
    outputs: dict[str, Any] | None = None


@dataclass
class GeneratedResult:
    """A file that a prompt made, by the server's names."""

    filename: str
    subfolder: str
    type: str
    url: str = field(repr=False)
    local_path: str | None = None


class ConjureWorkflowClient:
    """`ComfyUIWorkflowClient()` as CONJURE makes it. File places are relative to the working directory."""

    def __init__(
        self,
        output_dir: str | Path = "data/generated_models",
        *,
        settings: Settings | None = None,
        clock: Clock | None = None,
        tracker: FluxMeshProgressTracker | None = None,
    ) -> None:
        """Nothing is sent. `output_dir` is the folder of models; pictures have a fixed place. Raises SettingInvalid."""
        self._settings = settings or load_settings()
        self._clock = clock or SystemClock()
        self._tracker = tracker or progress_tracker
        self._labels: OrderedDict[str, dict[str, NodeLabel]] = OrderedDict()
        comfy = self._settings.comfy
        self.output_dir = Path(output_dir)
        self.execution_timeout: float = comfy.execution_timeout.total_seconds()
        self.poll_interval: float = comfy.poll_interval.total_seconds()
        self.max_retries: int = comfy.max_retries

    def __repr__(self) -> str:
        return f"ComfyUIWorkflowClient({str(self.output_dir)!r})"

    def as_told(self) -> ComfySettings:
        """Return the settings with what callers have written into the attributes since. Raises SettingInvalid."""
        comfy = self._settings.comfy
        return replace(
            comfy,
            execution_timeout=told_span("execution_timeout", self.execution_timeout, comfy.execution_timeout),
            poll_interval=told_span("poll_interval", self.poll_interval, comfy.poll_interval),
            max_retries=self.max_retries,
        )

    # -- before it is sent ---------------------------------------------------------------------------------

    def prepare_flux_mesh_workflow(
        self, workflow_data: Mapping[str, Any], image_base64: str, prompt: str
    ) -> dict[str, Any]:
        """Return a copy of the workflow with new seeds, and with the prompt, if one is given.

        A picture cannot be put into a workflow as text: it is uploaded when the workflow is executed.
        """
        graph = copy.deepcopy(dict(workflow_data))
        draw = random.SystemRandom()
        for node_id, name, highest in (("3", "noise_seed", 2**64 - 1), ("32", "seed", 2**31 - 1)):
            if node_id in graph and name in graph[node_id].get("inputs", {}):
                graph[node_id]["inputs"][name] = draw.randint(0, highest)
        if prompt:
            set_prompt(graph, prompt)
        if image_base64:
            log.info(
                "picture_not_in_workflow", extra={"fields": {"why": "it is uploaded when the workflow is executed"}}
            )
        return graph

    async def upload_image(self, comfyui_url: str, image_path: str | Path) -> str:
        """Put a picture into the server's input folder; return the name it got there.

        Raises FileNotFoundError, RuntimeError.
        """
        with builtin_errors():
            async with self._server(comfyui_url) as server:
                with tempfile.TemporaryDirectory(prefix="comfyctl-") as folder:
                    still = Path(folder, "picture" + (Path(image_path).suffix or ".png"))
                    await copy_picture(Path(image_path), still, max_pixels=self._settings.files.max_input_pixels)
                    return await server.upload(str(still))

    async def submit_workflow(self, comfyui_url: str, workflow: Mapping[str, Any]) -> tuple[str, str]:
        """Send a workflow; return the prompt's id and the client id that hears of it. Raises RuntimeError."""
        client_id, prompt_id = f"conjure_{uuid4().hex[:8]}", PromptId(str(uuid4()))
        with builtin_errors():
            async with self._server(comfyui_url, client_id) as server:
                sent = await server.submit(workflow, prompt_id=prompt_id)
        self._remember(sent.prompt_id, workflow)
        return sent.prompt_id, client_id

    # -- while it runs -------------------------------------------------------------------------------------

    async def wait_for_completion_websocket(self, comfyui_url: str, prompt_id: str, client_id: str) -> PromptExecution:
        """Wait until a prompt has ended, hearing of it over the socket. Never raises: what went wrong is its status."""
        return await self._wait(comfyui_url, prompt_id, client_id, hear=True)

    async def wait_for_completion_polling(self, comfyui_url: str, prompt_id: str) -> PromptExecution:
        """Wait until a prompt has ended, by asking. Never raises: what went wrong is its status."""
        return await self._wait(comfyui_url, prompt_id, None, hear=False)

    async def _wait(self, url: str, prompt_id: str, client_id: str | None, *, hear: bool) -> PromptExecution:
        execution = PromptExecution(
            prompt_id, ExecutionStatus.RUNNING.value, client_id=client_id, queued_at=self._now()
        )

        def show(progress: Progress) -> None:
            self._tracker.observe(prompt_id, progress, client_id=client_id or "")

        try:
            settings = self.as_told()
            limit = settings.execution_timeout.total_seconds()
            async with asyncio.timeout(limit), self._server(url, client_id) as server:
                watcher = Watcher(server, settings, clock=self._clock)
                name = PromptId(prompt_id)
                listening: AbstractAsyncContextManager[AsyncIterator[ServerEvent]]
                listening = server.listen(name) if hear else nullcontext(_Silence())
                async with listening as events:
                    found = None if hear else await find_prompt(server, name)
                    labels = self._labels.get(prompt_id, {})
                    ended = await watcher.watch(name, labels, events=events, on_progress=show, found=found)
        except (RunComfyError, TimeoutError) as error:
            return self._failed(execution, error)
        except asyncio.CancelledError:
            self._tracker.handle_workflow_completion(prompt_id, success=False, error_message="nobody waits any more")
            raise
        execution.status = ExecutionStatus.COMPLETED.value
        execution.started_at = ended.started_at.isoformat() if ended.started_at else execution.queued_at
        execution.completed_at = self._now()
        execution.outputs = dict(ended.outputs)
        self._tracker.handle_workflow_completion(prompt_id)
        return execution

    def _failed(self, execution: PromptExecution, error: Exception) -> PromptExecution:
        late = f"not done after {self.execution_timeout:g} s"
        text = error.message if isinstance(error, RunComfyError) else late
        execution.status = ExecutionStatus.FAILED.value
        execution.completed_at = self._now()
        execution.error_message = foreign_text(text)
        self._tracker.handle_workflow_completion(execution.prompt_id, success=False, error_message=text)
        return execution

    async def execute_workflow(
        self,
        comfyui_url: str,
        workflow: Mapping[str, Any],
        use_websocket: bool = True,
        workflow_name: str = "generate_flux_mesh",
        upload_input_image: bool = True,
    ) -> PromptExecution:
        """Upload CONJURE's render as the input, send the workflow and wait until it has ended. Never raises."""
        execution = PromptExecution("", ExecutionStatus.QUEUED.value, queued_at=self._now())
        try:
            graph = _copy_of(workflow)
            if upload_input_image and "16" in graph:
                graph["16"]["inputs"]["image"] = await self.upload_image(comfyui_url, RENDER)
            execution.prompt_id, execution.client_id = await self.submit_workflow(comfyui_url, graph)
        except RunComfyError as error:
            return self._failed(execution, error)
        self._tracker.start_workflow_tracking(
            workflow_name, execution.prompt_id, execution.client_id, staged=workflow_name in STAGED
        )
        return await self._wait(comfyui_url, execution.prompt_id, execution.client_id, hear=use_websocket)

    # -- afterwards ----------------------------------------------------------------------------------------

    async def get_execution_history(self, comfyui_url: str, prompt_id: str) -> dict[str, Any] | None:
        """Return what the server remembers of a prompt that ended, in its own form; else None. Raises RuntimeError."""
        with builtin_errors():
            async with self._server(comfyui_url) as server:
                entry = await server.history(PromptId(prompt_id))
        return _as_history(entry) if entry is not None else None

    async def download_results(
        self, comfyui_url: str, execution_result: PromptExecution | Mapping[str, Any]
    ) -> dict[str, str]:
        """Fetch picture and mesh to CONJURE's places; return what is there now, under its names. Never raises.

        A file that cannot be fetched whole, or is not what it should be, is left out, said in the log, and what was at
        its place stays.
        """
        found = execution_result.outputs if isinstance(execution_result, PromptExecution) else execution_result
        outputs: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
        places = {"24": FLUX_IMAGE, "33": self.output_dir / MESH}
        done: dict[str, str] = {}
        try:
            async with self._server(comfyui_url) as server:
                for name, node_id, key, kind in _RESULTS:
                    if (file := _first_file(outputs, node_id, key)) is None:
                        continue
                    try:
                        await self._fetch(server, file, places[node_id], kind)
                    except ServerUnreachable:
                        raise  # the next one would be waited for as long
                    except RunComfyError as error:
                        _say_not_fetched(error)
                    else:
                        done[name] = str(places[node_id])
        except RunComfyError as error:
            _say_not_fetched(error)
        return done

    async def _fetch(self, server: ServerClient, file: FileRef, place: Path, kind: OutputKind) -> None:
        with tempfile.TemporaryDirectory(prefix="comfyctl-") as folder:
            fetched = Path(folder, "result")
            facts = await server.fetch(file, str(fetched))
            pixels = self._settings.files.max_output_pixels
            await asyncio.to_thread(lambda: inspect(fetched, max_pixels=pixels, expected=kind))
            await asyncio.to_thread(publish, {place: Verified(str(fetched), facts.size_bytes, facts.sha256)})

    # -- parts ---------------------------------------------------------------------------------------------

    def _server(self, url: str | None, client_id: str | None = None) -> ServerClient:
        # None is what CONJURE has of a machine that is not ready.
        return ServerClient(SecretUrl(url or ""), self.as_told(), clock=self._clock, client_id=client_id)

    def _now(self) -> str:
        return self._clock.now().isoformat()

    def _remember(self, prompt_id: str, workflow: Mapping[str, Any]) -> None:
        self._labels[prompt_id] = labels_of(workflow)
        while len(self._labels) > KEPT_LABELS:
            self._labels.popitem(last=False)


def _copy_of(workflow: Any) -> dict[str, Any]:
    """Return a copy of a graph; its picture node, if it has one, can be given a picture. Raises WorkflowInvalid."""
    if isinstance(workflow, Mapping):
        graph: dict[str, Any] = copy.deepcopy(dict(workflow))
        node = graph.get("16", {})
        if isinstance(node, dict) and isinstance(node.setdefault("inputs", {}), dict):
            return graph
    raise WorkflowInvalid("that is no workflow in API format", hint="export it with ComfyUI's `Export (API)`")


def set_prompt(graph: dict[str, Any], prompt: str) -> None:
    """Put a prompt into both texts of the node that reads it, where the workflow has it."""
    inputs = graph.get("34", {}).get("inputs")
    if isinstance(inputs, dict):
        for name in ("clip_l", "t5xxl"):
            if name in inputs:
                inputs[name] = prompt


def labels_of(workflow: Mapping[str, Any]) -> dict[str, NodeLabel]:
    """Return how the nodes of a graph are called."""
    found = {}
    for node_id, node in workflow.items():
        if isinstance(node, Mapping):
            title = node.get("_meta", {}).get("title", "") if isinstance(node.get("_meta"), Mapping) else ""
            found[str(node_id)] = NodeLabel(foreign_text(title), foreign_text(node.get("class_type", "")))
    return found


def _say_not_fetched(error: RunComfyError) -> None:
    log.error("result_not_fetched", extra={"fields": {"error": error.code, "message": error.message}})


def _first_file(outputs: Mapping[str, Any], node_id: str, key: str) -> FileRef | None:
    node = outputs.get(node_id)
    files = node.get(key) if isinstance(node, Mapping) else None
    file = files[0] if isinstance(files, list) and files else None
    if not isinstance(file, Mapping) or not isinstance(file.get("filename"), str):
        return None
    return FileRef(file["filename"], str(file.get("subfolder") or ""), str(file.get("type") or "output"))


def _as_history(entry: HistoryEntry) -> dict[str, Any]:
    status = {
        "status_str": entry.status,
        "completed": entry.status == "success",
        "messages": [[kind, dict(data)] for kind, data in entry.messages],
    }
    return {"outputs": dict(entry.outputs), "status": status}


class _Silence:
    """Stands in for the events of a socket that is not wanted."""

    def __aiter__(self) -> _Silence:
        return self

    async def __anext__(self) -> ServerEvent:
        await asyncio.Event().wait()
        raise StopAsyncIteration


class ComfyUIWorkflowClient(ServerClient, metaclass=TwoForms):
    """One ComfyUI server: with its address and settings our client of it, else CONJURE's (`ConjureWorkflowClient`)."""

    conjure_form = ConjureWorkflowClient

    @overload
    def __new__(cls, output_dir: str | Path = ...) -> ConjureWorkflowClient: ...  # type: ignore[misc]
    @overload
    def __new__(
        cls,
        url: str | SecretUrl,
        settings: ComfySettings,
        *,
        clock: Clock,
        http: aiohttp.ClientSession | None = None,
        client_id: str | None = None,
    ) -> Self: ...
    def __new__(cls, *arguments: Any, **wiring: Any) -> Any:
        """Return the form that the arguments mean."""
        if cls is ComfyUIWorkflowClient and len(arguments) < 2 and wiring.keys() <= {"output_dir"}:
            return ConjureWorkflowClient(*arguments, **wiring)
        return super().__new__(cls)
