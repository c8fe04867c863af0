"""
What ran when, folded from the snapshots of a job's progress.

The server says which node it has begun and which ones have ended; how long each took follows from when that was heard.
What cannot be known is left open rather than guessed:

Rule 1: a node begins when it is first named as the one that runs, and ends when it is first told among those that have
        ended; where the server never tells that, when another node took its place. A late word corrects the guess.
Rule 2: if one snapshot brings the end of nodes that nobody saw running, messages were missed: the nodes that begin or
        end with it have no `seconds`.
Rule 3: cached nodes took no time.
Rule 4: a prompt that has to be sent again begins the nodes anew; the steps are those of the whole job.

Nothing here reads a clock or raises: senseless and repeated snapshots are harmless, and time never goes back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Final

from runcomfy.domain.exceptions import foreign_text
from runcomfy.domain.progress import NodeLabel, Progress, Step

MOST_NODES: Final = 5_000
"""Nodes that are kept: a workflow has some hundreds, a server that makes names up has no end."""

_BEFORE: Final = frozenset({Step.PLACING, Step.LAUNCHING, Step.BOOTING, Step.CHECKING, Step.UPLOADING, Step.QUEUED})
_AFTER: Final = frozenset({Step.FETCHING, Step.STOPPING, Step.FINISHED})


@dataclass(frozen=True, slots=True)
class NodeTime:
    """When a node ran, in seconds since the job began."""

    node_id: str
    title: str
    class_type: str
    started_s: float
    seconds: float | None = None
    """None while it runs, and where its beginning or end was missed."""
    cached: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return it as it appears in manifests and results."""
        return {
            "node_id": self.node_id,
            "title": self.title,
            "class_type": self.class_type,
            "started_s": round(self.started_s, 3),
            "seconds": None if self.seconds is None else round(self.seconds, 3),
            "cached": self.cached,
        }


@dataclass(frozen=True, slots=True)
class StepTime:
    """When a part of the job began, in seconds since the job began."""

    step: Step
    started_s: float


@dataclass(frozen=True, slots=True)
class Pace:
    """How far the node that runs says to be, and when it said so."""

    node_id: str
    value: float
    maximum: float
    at_s: float


def _none() -> Mapping[str, NodeTime]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Timeline:
    """What is known until now. `seen` returns the next one."""

    by_id: Mapping[str, NodeTime] = field(default_factory=_none)
    """In the order of their beginning."""
    steps: tuple[StepTime, ...] = ()
    """Each change from one step to another, in order."""
    running: frozenset[str] = frozenset()
    """Nodes that were begun and are not known to have ended."""
    done: frozenset[str] = frozenset()
    """Nodes that were told among those that have ended, or were left behind."""
    pace: Pace | None = None
    at_s: float = 0.0
    """Up to when it tells."""
    _told: frozenset[str] = frozenset()
    """Nodes that the server itself has told to have ended."""
    _current: str | None = None
    _unsure: frozenset[str] = frozenset()
    """Nodes whose beginning was missed."""

    @property
    def nodes(self) -> tuple[NodeTime, ...]:
        """Every node that was begun or cached, by when it began."""
        return tuple(sorted(self.by_id.values(), key=lambda node: node.started_s))

    @property
    def step(self) -> Step | None:
        """The step that the job is at."""
        return self.steps[-1].step if self.steps else None

    @property
    def step_since_s(self) -> float:
        """When the step began that the job is at."""
        return self.steps[-1].started_s if self.steps else 0.0

    def as_list(self) -> list[dict[str, Any]]:
        """Return the nodes as they appear in manifests and results."""
        return [node.as_dict() for node in self.nodes]

    def seen(self, progress: Progress, at_s: float) -> Timeline:
        """Return the timeline after a snapshot that was taken `at_s` seconds after the job began."""
        at_s = max(self.at_s, at_s) if math.isfinite(at_s) else self.at_s
        line = self._stepped(progress.step, at_s)
        if progress.step is Step.RUNNING:
            return line._ran(progress, at_s)
        if progress.step in _AFTER and line.running:
            return line._all_over(at_s)
        return line

    def _stepped(self, step: Step, at_s: float) -> Timeline:
        before = self.step
        if before is step:
            return replace(self, at_s=at_s)
        steps = (*self.steps, StepTime(step, at_s))
        if step in _BEFORE and self.by_id:
            return Timeline(steps=steps, at_s=at_s)
        return replace(self, steps=steps, at_s=at_s)

    def _ran(self, progress: Progress, at_s: float) -> Timeline:
        nodes, unsure = dict(self.by_id), set(self._unsure)
        fresh = progress.done - self._told
        cached = fresh & progress.cached
        for node in sorted(cached):
            if node not in nodes and len(nodes) < MOST_NODES:
                nodes[node] = _node(node, progress, at_s, seconds=0.0, cached=True)
        # A cached one may be told as running for a moment, and is told to have ended: that makes no gap.
        missed = {node for node in fresh - cached if node not in nodes}
        current = progress.node_id if progress.node_id is not None else self._current
        for node in sorted(missed - {current}):
            if len(nodes) < MOST_NODES:
                nodes[node] = _node(node, progress, at_s)
        gap = bool(missed - {current})
        for node in fresh - cached - missed:
            known = nodes[node]
            if not known.cached:
                nodes[node] = replace(known, seconds=None if gap or node in unsure else at_s - known.started_s)
        began = current is not None and current not in nodes and len(nodes) < MOST_NODES
        if began and current is not None:
            nodes[current] = _node(current, progress, at_s)
            if gap:
                unsure.add(current)
        left = self._current if self._current != current else None
        if left is not None and left not in progress.done and left in nodes and nodes[left].seconds is None:
            # Nobody says that it has ended; should it go on beside the new one, the word that it ended comes later.
            known = nodes[left]
            nodes[left] = replace(known, seconds=None if gap or left in unsure else at_s - known.started_s)
        done = self.done | progress.done | ({left} if left is not None else set())
        done = done - {current} if current is not None and current not in progress.done else done
        return replace(
            self,
            by_id=nodes,
            running=frozenset({current} if current is not None and current not in done else ()),
            done=frozenset(done),
            pace=self._paced(progress, current, at_s),
            _told=self._told | progress.done,
            _current=current,
            _unsure=frozenset(unsure),
        )

    def _paced(self, progress: Progress, current: str | None, at_s: float) -> Pace | None:
        value, maximum = progress.value, progress.maximum
        if current is None or value is None or maximum is None:
            return None
        if not (math.isfinite(value) and math.isfinite(maximum) and maximum > 0 and value >= 0):
            return None
        pace = self.pace
        if pace is not None and (pace.node_id, pace.value, pace.maximum) == (current, value, maximum):
            return pace
        return Pace(current, min(value, maximum), maximum, at_s)

    def _all_over(self, at_s: float) -> Timeline:
        """End what still runs: the prompt has ended."""
        nodes = dict(self.by_id)
        for node in self.running:
            if node in nodes and nodes[node].seconds is None and node not in self._unsure:
                nodes[node] = replace(nodes[node], seconds=at_s - nodes[node].started_s)
        return replace(self, by_id=nodes, running=frozenset(), done=self.done | self.running, pace=None)


def _node(
    node_id: str, progress: Progress, at_s: float, *, seconds: float | None = None, cached: bool = False
) -> NodeTime:
    label = progress.labels.get(node_id) or NodeLabel()
    title = label.title or label.class_type or (progress.node_title if node_id == progress.node_id else "")
    return NodeTime(
        foreign_text(node_id, 120), foreign_text(title, 120), foreign_text(label.class_type, 120), at_s, seconds, cached
    )
