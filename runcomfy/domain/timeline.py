"""
What ran when, folded from the snapshots of a job's progress.

The server says which node it has begun and which ones have ended; how long each took follows from when that was heard.
What cannot be known is left open rather than guessed:

Rule 1: a node begins when it is first named as one that runs, and ends when it is first told among those that have
        ended. Where the server never tells that, it ends when another node takes its place, unless it is told to go
        on beside that one. A late word corrects the guess.
Rule 2: if one snapshot brings the end of nodes that nobody saw running, messages were missed: the nodes that begin or
        end with it have no `seconds`.
        The same holds for the node that runs when a prompt that others began is gone on with.
Rule 3: cached nodes took no time.
Rule 4: a prompt that has to be sent again begins the nodes anew; the steps are those of the whole job.

Nothing here reads a clock or raises: senseless and repeated snapshots are harmless, and time never goes back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from runcomfy.domain.altered import replace
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


def _none() -> Mapping[str, Any]:
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
    _active: frozenset[str] = frozenset()
    _since: Mapping[str, float] = field(default_factory=_none)
    """When each node was last taken up."""
    _spent: Mapping[str, float] = field(default_factory=_none)
    """What a node that was taken up again had taken before."""
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
        if progress.step is Step.RUNNING:
            line = self if self.step is Step.RUNNING else self._stepped(progress.step, at_s)
            return line._ran(progress, at_s)
        line = self._stepped(progress.step, at_s)
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
        current = progress.node_id if progress.node_id is not None else self._current
        fresh = progress.done - self._told
        same = current == self._current and progress.active == self._active
        if not fresh and same and self._known(current):
            return replace(self, pace=self._paced(progress, current, at_s), at_s=at_s)
        running = progress.active | frozenset(node for node in (current,) if node is not None)
        running -= progress.done
        draft = _Draft(self, progress, at_s)
        draft.end(fresh, running)
        for node in sorted(self.running - running):
            draft.leave(node)
        for node in sorted(running, key=lambda node: (node == current, node)):
            draft.take_up(node, again=node not in self.running)
        return replace(
            self,
            by_id=draft.nodes,
            running=running,
            done=(self.done | progress.done | self.running) - running,
            pace=self._paced(progress, current, at_s),
            at_s=at_s,
            _told=self._told | progress.done,
            _current=current,
            _active=progress.active,
            _since=draft.since,
            _spent=draft.spent,
            _unsure=frozenset(draft.unsure),
        )

    def _known(self, node: str | None) -> bool:
        return node is None or node in self.by_id or len(self.by_id) >= MOST_NODES

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
                nodes[node] = replace(nodes[node], seconds=self._spent.get(node, 0.0) + at_s - self._since[node])
        return replace(self, by_id=nodes, running=frozenset(), done=self.done | self.running, pace=None)


class _Draft:
    """The nodes of the next timeline, while it is made."""

    def __init__(self, line: Timeline, progress: Progress, at_s: float) -> None:
        self._progress, self._at_s = progress, at_s
        self.nodes, self.since, self.spent = dict(line.by_id), dict(line._since), dict(line._spent)
        self.unsure = set(line._unsure)
        self._gap = False
        queued = len(line.steps) > 1 and line.steps[-2].step is Step.QUEUED
        self._late = progress.joined and line._current is None and not queued
        """Whether the node that is first heard of may have run for long."""

    def end(self, fresh: frozenset[str], running: frozenset[str]) -> None:
        """Take in which nodes are told to have ended, besides those of which that is known."""
        cached = fresh & self._progress.cached
        for node in sorted(cached):
            self._add(node, seconds=0.0, cached=True)
        missed = {node for node in fresh - cached if node not in self.nodes}
        self._gap = bool(missed - running - {self._progress.node_id})
        for node in sorted(missed):
            self._add(node)
            self.unsure.add(node)
        for node in fresh - cached - missed:
            if node in self.since and not self.nodes[node].cached:
                self._close(node)

    def leave(self, node: str) -> None:
        """Another node runs in its place. Should this one go on all the same, the word that it ended comes later."""
        if node in self.since and self.nodes[node].seconds is None and not self.nodes[node].cached:
            self._close(node)

    def take_up(self, node: str, *, again: bool) -> None:
        """A node runs, for the first time or again (one that had to wait for inputs it asked for)."""
        if node not in self.nodes:
            self._add(node)
            if self._gap or self._late:
                self.unsure.add(node)
        elif again and node in self.since and not self.nodes[node].cached:
            self.spent[node] = self.nodes[node].seconds or 0.0
            self.nodes[node] = replace(self.nodes[node], seconds=None)
            self.since[node] = self._at_s

    def _add(self, node: str, *, seconds: float | None = None, cached: bool = False) -> None:
        if node in self.nodes or len(self.nodes) >= MOST_NODES:
            return
        self.nodes[node] = _node(node, self._progress, self._at_s, seconds=seconds, cached=cached)
        self.since[node] = self._at_s

    def _close(self, node: str) -> None:
        known = self.spent.get(node, 0.0) + self._at_s - self.since[node]
        seconds = None if self._gap or node in self.unsure else known
        self.nodes[node] = replace(self.nodes[node], seconds=seconds)


def _node(
    node_id: str, progress: Progress, at_s: float, *, seconds: float | None = None, cached: bool = False
) -> NodeTime:
    label = progress.labels.get(node_id) or NodeLabel()
    title = label.title or label.class_type or (progress.node_title if node_id == progress.node_id else "")
    return NodeTime(
        foreign_text(node_id, 120), foreign_text(title, 120), foreign_text(label.class_type, 120), at_s, seconds, cached
    )
