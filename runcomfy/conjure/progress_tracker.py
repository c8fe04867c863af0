"""
How far each workflow is, under the names that CONJURE reads: stages with weights, and one bar from 0 to 100.

What ComfyUI reports is uneven: it says `executed` only of nodes with results, and nothing at all of a node it did not
have to run again. So a node counts as done as soon as another one runs after it, or one that needs its output runs;
a stage is done when its nodes are. The bar never goes back.

All methods may be called from any thread. What the tracker keeps is bounded: old workflows make room, ended ones first.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import cache
from typing import Any, Final

import workflows
from runcomfy.adapters.clock import SystemClock
from runcomfy.domain.exceptions import foreign_text
from runcomfy.domain.progress import Progress, Step
from runcomfy.ports.clock import Clock

MAX_WORKFLOWS: Final = 500
"""How many workflows are remembered; CONJURE runs one at a time."""
MAX_NODES: Final = 2_000
"""How many nodes of one workflow are remembered."""

FLUX_MESH: Final = "generate_flux_mesh"
STAGED: Final = frozenset({FLUX_MESH, "generate_flux_mesh2", "conjure_flux_mesh", "flux_mesh_generation"})
"""The names under which CONJURE runs the workflow that the stages describe."""

ENDED: Final = frozenset({"completed", "failed"})


@dataclass
class WorkflowStage:
    """One part of the workflow, as people would name it. Times are ISO 8601 in UTC."""

    stage_id: str
    name: str
    description: str
    nodes: list[str]
    weight: float
    """Its share of the bar; the stages' weights sum up to 1."""
    start_time: str | None = None
    end_time: str | None = None
    status: str = "pending"
    """`pending`, `running`, `completed`, `failed`."""


@dataclass
class NodeProgress:
    """What is known of one node."""

    node_id: str
    node_title: str
    class_type: str
    status: str = "pending"
    """`pending`, `executing`, `executed` (also a node that did not have to run again), `failed`."""
    start_time: str | None = None
    end_time: str | None = None
    progress_value: float | None = None
    progress_max: float | None = None
    """Both None while the node has not said how much it has to do."""


@dataclass
class WorkflowProgress:
    """What is known of one workflow. Times are ISO 8601 in UTC."""

    workflow_name: str
    prompt_id: str
    client_id: str
    overall_progress: float = 0.0
    """0 to 100."""
    current_stage: str | None = None
    """The name of the stage that runs."""
    status: str = "pending"
    start_time: str | None = None
    end_time: str | None = None
    stages: list[WorkflowStage] = field(default_factory=list)
    nodes: dict[str, NodeProgress] = field(default_factory=dict)
    error_message: str | None = None
    message: str = ""
    """What is being done, in words; also before the first node runs."""


def _stages() -> list[WorkflowStage]:
    """Return the stages of generate_flux_mesh in their order."""
    rows = (
        ("initialization", "Initialization", "Loading the models", "4 8 10 13 30 36", 0.15),
        ("input_processing", "Input processing", "Reading the image and finding its depth", "16 25", 0.10),
        ("text_encoding", "Text encoding", "Reading the prompt", "19 34", 0.05),
        ("controlnet_setup", "ControlNet setup", "Preparing the depth control", "14", 0.05),
        ("latent_generation", "Latent generation", "Preparing the empty picture", "6", 0.05),
        ("flux_sampling", "FLUX sampling", "Painting the picture", "3", 0.30),
        ("image_decoding", "Image decoding", "Decoding the picture", "7", 0.05),
        ("background_removal", "Background removal", "Cutting away the background", "37", 0.05),
        ("mesh_generation", "Mesh generation", "Building the mesh", "32", 0.15),
        ("export", "Export", "Saving the picture and the mesh", "24 33", 0.05),
    )
    return [WorkflowStage(key, name, text, nodes.split(), weight) for key, name, text, nodes, weight in rows]


@cache
def _needs() -> Mapping[str, frozenset[str]]:
    """Return node -> every node whose output it needs, for generate_flux_mesh."""
    graph = json.loads(workflows.load(FLUX_MESH)[0])
    direct: dict[str, set[str]] = {
        node_id: {str(value[0]) for value in node["inputs"].values() if isinstance(value, list) and len(value) == 2}
        for node_id, node in graph.items()
    }

    def above(node_id: str) -> frozenset[str]:
        found: set[str] = set()
        waiting = [node_id]
        while waiting:
            for source in direct.get(waiting.pop(), set()) - found:
                found.add(source)
                waiting.append(source)
        return frozenset(found)

    return {node_id: above(node_id) for node_id in graph}


class FluxMeshProgressTracker:
    """Keeps how far workflows are, by the id of their prompt."""

    def __init__(self, *, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._lock = threading.RLock()
        self.workflow_stages: list[WorkflowStage] = _stages()
        self.node_to_stage: dict[str, str] = {
            node_id: stage.stage_id for stage in self.workflow_stages for node_id in stage.nodes
        }
        self.active_workflows: dict[str, WorkflowProgress] = {}
        """By prompt id, oldest first; ended ones stay until they are cleaned away. `summaries()` reads it safely."""
        self._names: dict[str, str] = {}
        """Another id of a workflow -> the id of its prompt."""

    # -- telling -------------------------------------------------------------------------------------------

    def start_workflow_tracking(
        self, workflow_name: str, prompt_id: str, client_id: str, *, staged: bool = True
    ) -> WorkflowProgress:
        """Begin with a workflow, or begin anew if the prompt is known; return a snapshot of it.

        `staged=False`: it is another workflow than the one the stages describe; its bar is what `observe` is told.
        """
        with self._lock:
            stages = [_fresh(stage) for stage in self.workflow_stages] if staged else []
            known = WorkflowProgress(
                workflow_name=workflow_name,
                prompt_id=prompt_id,
                client_id=client_id,
                status="running",
                start_time=self._now(),
                stages=stages,
            )
            self.active_workflows.pop(prompt_id, None)
            self.active_workflows[prompt_id] = known
            self._make_room()
            return _copy(known)

    def name_also(self, prompt_id: str, other: str) -> None:
        """Let a workflow be found by another id, too: that of its job."""
        with self._lock:
            if other and prompt_id in self.active_workflows:
                self._names[other] = prompt_id

    def update_node_progress(
        self,
        prompt_id: str,
        node_id: str | None,
        event_type: str,
        node_data: Mapping[str, Any] | None = None,
        progress_data: Mapping[str, Any] | None = None,
    ) -> WorkflowProgress | None:
        """Take in one message of ComfyUI: `executing`, `progress`, `executed` or `execution_cached`.

        `node_data` may hold `title` and `class_type`, `progress_data` holds `value` and `max`. Messages about prompts
        that are not tracked, or have ended, and about no node (ComfyUI's word for "all done") change nothing. Returns
        a snapshot of the workflow, None if it is not tracked.
        """
        with self._lock:
            known = self._known(prompt_id)
            if known is None:
                return None
            if known.status in ENDED or node_id is None:
                return _copy(known)
            node = self._node(known, str(node_id), node_data or {})
            if node is None:
                return _copy(known)
            if event_type == "executing":
                self._runs(known, node)
            elif event_type == "progress":
                self._runs(known, node)
                value, maximum = _number(progress_data, "value"), _number(progress_data, "max")
                if value is not None and maximum is not None and maximum > 0:
                    node.progress_value, node.progress_max = min(max(value, 0), maximum), maximum
            elif event_type in ("executed", "execution_cached"):
                self._done(node)
            self._count(known)
            return _copy(known)

    def observe(
        self, prompt_id: str, progress: Progress, *, workflow_name: str = FLUX_MESH, client_id: str = ""
    ) -> None:
        """Take in a snapshot of our own engine's progress; a prompt that is not tracked yet begins with it.

        A snapshot that says finished ends the workflow well; an end of another kind is told with
        `handle_workflow_completion`.
        """
        with self._lock:
            known = self._known(prompt_id)
            if known is None:
                self.start_workflow_tracking(workflow_name, prompt_id, client_id, staged=workflow_name in STAGED)
                known = self.active_workflows[prompt_id]
            if known.status in ENDED:
                return
            known.message = foreign_text(progress.message)
            if progress.step is Step.FINISHED:
                self.handle_workflow_completion(prompt_id, success=True)
                return
            everything = progress.nodes_total > 0 and progress.nodes_done >= progress.nodes_total
            if progress.step is Step.FETCHING or (progress.step is Step.RUNNING and everything):
                self._all_done(known)
            elif progress.step is Step.RUNNING and progress.node_id is not None:
                self._observe_node(known, progress)
            if not known.stages:
                known.overall_progress = max(known.overall_progress, min(max(progress.percent, 0.0), 100.0))
            self._count(known)

    def _observe_node(self, known: WorkflowProgress, progress: Progress) -> None:
        node = self._node(known, str(progress.node_id), {"title": progress.node_title})
        if node is None:
            return
        self._runs(known, node)
        if progress.value is not None and progress.maximum:
            node.progress_value = min(max(progress.value, 0), progress.maximum)
            node.progress_max = progress.maximum

    def handle_workflow_completion(
        self, prompt_id: str, success: bool = True, error_message: str | None = None
    ) -> None:
        """Say that a workflow ended. Told twice, the first word stays."""
        with self._lock:
            known = self._known(prompt_id)
            if known is None or known.status in ENDED:
                return
            now = self._now()
            if success:
                self._all_done(known)
                self._count(known)
                known.overall_progress, known.status = 100.0, "completed"
            else:
                known.status = "failed"
                known.error_message = foreign_text(error_message or "the workflow did not succeed")
                parts: list[WorkflowStage | NodeProgress] = [*known.stages, *known.nodes.values()]
                for part in parts:
                    if part.status in ("running", "executing"):
                        part.status, part.end_time = "failed", now
            known.end_time = now
            if success:
                known.current_stage = None

    # -- asking --------------------------------------------------------------------------------------------

    def get_workflow_progress(self, prompt_id: str) -> WorkflowProgress | None:
        """Return a snapshot of a workflow, or None if it is not known (any more)."""
        with self._lock:
            known = self._known(prompt_id)
            return _copy(known) if known is not None else None

    def get_workflow_summary(self, prompt_id: str) -> dict[str, Any] | None:
        """Return what CONJURE's `/workflow/progress` says of a workflow, or None if it is not known (any more)."""
        with self._lock:
            known = self._known(prompt_id)
            return _summary(known) if known is not None else None

    def summaries(self) -> list[dict[str, Any]]:
        """Return the summaries of all workflows that are remembered, oldest first."""
        with self._lock:
            return [_summary(known) for known in self.active_workflows.values()]

    def cleanup_completed_workflows(self, max_age_hours: float = 24) -> int:
        """Forget workflows that ended longer ago than that; return how many."""
        with self._lock:
            before = self._clock.now() - timedelta(hours=max_age_hours)
            old = [
                prompt_id
                for prompt_id, known in self.active_workflows.items()
                if known.status in ENDED and known.end_time and datetime.fromisoformat(known.end_time) <= before
            ]
            for prompt_id in old:
                del self.active_workflows[prompt_id]
            self._forget_names()
            return len(old)

    # -- folding -------------------------------------------------------------------------------------------

    def _now(self) -> str:
        return self._clock.now().isoformat()

    def _known(self, key: str) -> WorkflowProgress | None:
        return self.active_workflows.get(key) or self.active_workflows.get(self._names.get(key, ""))

    def _forget_names(self) -> None:
        self._names = {other: key for other, key in self._names.items() if key in self.active_workflows}

    def _make_room(self) -> None:
        if len(self.active_workflows) <= MAX_WORKFLOWS:
            return
        while len(self.active_workflows) > MAX_WORKFLOWS:
            ended = (key for key, known in self.active_workflows.items() if known.status in ENDED)
            del self.active_workflows[next(ended, next(iter(self.active_workflows)))]
        self._forget_names()

    def _node(self, known: WorkflowProgress, node_id: str, told: Mapping[str, Any]) -> NodeProgress | None:
        node_id = foreign_text(node_id)
        node = known.nodes.get(node_id)
        if node is None:
            if len(known.nodes) >= MAX_NODES:
                return None
            node = known.nodes[node_id] = NodeProgress(node_id, "", "")
        node.node_title = foreign_text(told.get("title") or told.get("node_title") or node.node_title)
        node.class_type = foreign_text(told.get("class_type") or node.class_type)
        return node

    def _runs(self, known: WorkflowProgress, node: NodeProgress) -> None:
        """A node runs: what ran before it is done, and so is everything it needs."""
        for other in known.nodes.values():
            if other is not node and other.status == "executing":
                self._done(other)
        for needed in _needs().get(node.node_id, frozenset()) if known.stages else ():
            if (found := self._node(known, needed, {})) is not None:
                self._done(found)
        if node.status == "pending":
            node.status, node.start_time = "executing", self._now()

    def _done(self, node: NodeProgress) -> None:
        if node.status in ("pending", "executing"):
            node.status, node.end_time = "executed", self._now()
            node.start_time = node.start_time or node.end_time

    def _all_done(self, known: WorkflowProgress) -> None:
        for node_id in {*known.nodes, *(node for stage in known.stages for node in stage.nodes)}:
            if (node := self._node(known, node_id, {})) is not None:
                self._done(node)

    def _count(self, known: WorkflowProgress) -> None:
        """Work out the stages and the bar from the nodes."""
        now, share, current = self._now(), 0.0, None
        for stage in known.stages:
            nodes = [known.nodes.get(node_id) for node_id in stage.nodes]
            parts = [_part(node) for node in nodes]
            share += stage.weight * sum(parts) / len(parts)
            if all(node is not None and node.status == "executed" for node in nodes):
                if stage.status != "completed":
                    stage.status, stage.end_time = "completed", now
                    stage.start_time = stage.start_time or now
            elif any(node is not None and node.status != "pending" for node in nodes):
                if stage.status == "pending":
                    stage.status, stage.start_time = "running", now
                if any(node is not None and node.status == "executing" for node in nodes):
                    current = stage.name
        known.current_stage = current or known.current_stage
        if known.stages:
            known.overall_progress = max(known.overall_progress, min(share * 100, 100.0))


progress_tracker: Final = FluxMeshProgressTracker()
"""The process's own; CONJURE's API server reads it."""


def _part(node: NodeProgress | None) -> float:
    """Return how much of a node is done, 0 to 1."""
    if node is None or node.status == "pending":
        return 0.0
    if node.status == "executed":
        return 1.0
    return (node.progress_value or 0.0) / node.progress_max if node.progress_max else 0.0


def _number(data: Mapping[str, Any] | None, name: str) -> float | None:
    value = (data or {}).get(name)
    return value if isinstance(value, int | float) and not isinstance(value, bool) and value == value else None


def _fresh(stage: WorkflowStage) -> WorkflowStage:
    return replace(stage, nodes=list(stage.nodes), start_time=None, end_time=None, status="pending")


def _copy(known: WorkflowProgress) -> WorkflowProgress:
    stages = [replace(stage, nodes=list(stage.nodes)) for stage in known.stages]
    return replace(known, stages=stages, nodes={key: replace(node) for key, node in known.nodes.items()})


def _summary(known: WorkflowProgress) -> dict[str, Any]:
    return {
        "prompt_id": known.prompt_id,
        "workflow_name": known.workflow_name,
        "overall_progress": round(known.overall_progress, 1),
        "status": known.status,
        "current_stage": known.current_stage,
        "start_time": known.start_time,
        "end_time": known.end_time,
        "stages": [
            {
                "name": stage.name,
                "description": stage.description,
                "status": stage.status,
                "nodes_total": len(stage.nodes),
                "nodes_completed": sum(
                    1 for node_id in stage.nodes if (node := known.nodes.get(node_id)) and node.status == "executed"
                ),
            }
            for stage in known.stages
        ],
        "error_message": known.error_message,
        "message": known.message,
    }
