"""
What is remembered of a run that is over, for those who learn from it how long the next one takes.

It is read from the queue's `result`, which is open to users and written by older versions, too: what makes no sense is
left out, never raised.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from heapq import heappop, heappush
from itertools import pairwise
from sys import intern
from typing import Any, Final

MOST_NODES: Final = 2_000
_ROUNDED_S: Final = 0.002
"""By how much times of a result may overlap because they were rounded."""
LONGEST_S: Final = 7 * 86_400.0
"""No node and no run is believed to take longer."""


@dataclass(frozen=True, slots=True)
class NodePast:
    """What one node took."""

    class_type: str
    seconds: float | None
    """Without the time in which nodes ran that began later, so that those of a run add up to what it took; None: its
    beginning or end was missed."""
    span_s: float | None
    """From its beginning to its end."""


@dataclass(frozen=True, slots=True)
class RunPast:
    """One run that was computed to its end."""

    workflow: str
    server_type: str
    """Empty: a server that was given."""
    place: str
    """Names the server; empty if that is not known."""
    ended_at: datetime
    nodes: Mapping[str, NodePast] = field(default_factory=dict)
    """Node -> what it took, without those that were cached."""
    cached: frozenset[str] = frozenset()
    computing_s: float | None = None
    """From the first node to the last."""
    before_s: float = 0.0
    """Checking, uploading and sending."""
    after_s: float = 0.0
    """Fetching."""
    cold: bool = False
    """Whether it was the first one known of the workflow at its place."""


def past_of(workflow: str, ended_at: datetime, result: Mapping[str, Any]) -> RunPast | None:
    """Return what a job's `result` tells of its run; None: nothing that could be learned from."""
    timings = result.get("timings")
    times = timings if isinstance(timings, Mapping) else {}
    if "attach" in times:  # it went on with a prompt that another worker had begun: what that took is not known
        return None
    nodes: dict[str, NodePast] = {}
    cached: set[str] = set()
    spans: dict[str, tuple[float, float]] = {}
    listed = result.get("nodes")
    for entry in listed[:MOST_NODES] if isinstance(listed, list) else ():
        if not isinstance(entry, Mapping) or not isinstance(node := entry.get("node_id"), str):
            continue
        if entry.get("cached") is True:
            cached.add(_shared(node))
            continue
        began, seconds, kind = _seconds(entry.get("started_s")), _seconds(entry.get("seconds")), entry.get("class_type")
        nodes[_shared(node)] = NodePast(_shared(kind), seconds, seconds)
        if began is not None and seconds is not None:
            spans[node] = began, began + seconds
    for node, seconds in _alone(spans).items():
        nodes[node] = replace(nodes[node], seconds=seconds)
    first = min((began for began, _ in spans.values()), default=0.0)
    last = max((ended for _, ended in spans.values()), default=0.0)
    computing = last - first if first < last else _seconds(times.get("execute"))
    if computing is None and not cached:
        return None
    server_type, place = result.get("server_type"), result.get("place")
    return RunPast(
        workflow=_shared(workflow),
        server_type=_shared(server_type),
        place=_shared(place),
        ended_at=ended_at,
        nodes=nodes,
        cached=frozenset(cached),
        computing_s=computing,
        before_s=_sum_of(times, ("check", "upload", "submit")),
        after_s=_sum_of(times, ("fetch", "commit")),
    )


def _shared(name: object) -> str:
    """Return a name as one object for all runs, of which many are kept; empty if it is none."""
    return intern(name) if type(name) is str else ""


def in_order(runs: Iterable[RunPast]) -> list[RunPast]:
    """Return runs by when they ended, and mark those that were the first of their workflow at their place."""
    seen: set[tuple[str, str]] = set()
    ordered: list[RunPast] = []
    for run in sorted(runs, key=lambda run: run.ended_at):
        here = (run.workflow, run.place)
        first = bool(run.place) and here not in seen
        seen.add(here)
        ordered.append(replace(run, cold=first) if first != run.cold else run)
    return ordered


def _alone(spans: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Return how long each was the one that had begun last, of those that ran (the shorter one, if at once)."""
    took = dict.fromkeys(spans, 0.0)
    begins = sorted(spans, key=lambda node: (spans[node][0], -spans[node][1]))
    if all(spans[node][1] <= spans[later][0] + _ROUNDED_S for node, later in pairwise(begins)):
        return {node: ended - began for node, (began, ended) in spans.items()}  # the usual case, at no cost
    moments = sorted({moment for span in spans.values() for moment in span})
    running: list[tuple[float, int, str]] = []
    next_one = 0
    for moment, after in pairwise(moments):
        while next_one < len(begins) and spans[begins[next_one]][0] <= moment:
            heappush(running, (-spans[begins[next_one]][0], -next_one, begins[next_one]))
            next_one += 1
        while running and spans[running[0][2]][1] <= moment:
            heappop(running)
        if running:
            took[running[0][2]] += after - moment
    return took


def _sum_of(times: Mapping[Any, Any], names: Sequence[str]) -> float:
    return sum(_seconds(times.get(name)) or 0.0 for name in names)


def _seconds(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value <= LONGEST_S else None
