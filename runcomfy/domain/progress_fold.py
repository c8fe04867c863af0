"""
What a prompt is doing and how it ended, from everything heard and read about it.

One fold serves both sources: the socket's messages and the readings of queue and history. It makes up for what the
server's protocol leaves open:

Rule 1: a prompt has ended when the history knows it. `executing` without a node says "read the history now";
        `execution_success` alone says nothing, for the history may still be empty when it arrives.
Rule 2: a prompt that two readings in a row find neither in the queue nor in the history is gone. Whether it was removed
        or the server lost its memory is told by the connection: a restart breaks it.
Rule 3: an `execution_error` of type `ExecutionBlocked` ends nothing; the prompt goes on without that branch.
Rule 4: percent never goes back and is 100 only after success. Repeated, late, foreign and senseless messages are
        harmless.
Rule 5: silence counts as "stuck" only while something could have been heard. With no socket there is only the queue,
        which cannot tell a slow node from a stuck one; then the longer `blind` limit holds.

Nothing here waits, reads a clock or raises: `now` is a number of seconds on any clock that only goes forward.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final

from runcomfy.domain.altered import replace
from runcomfy.domain.exceptions import foreign_text
from runcomfy.domain.progress import (
    HistoryEntry,
    NodeLabel,
    NodeText,
    Preview,
    Progress,
    QueueView,
    Said,
    ServerEvent,
    SocketDown,
    SocketUp,
    Step,
)

BLOCKED: Final = "ExecutionBlocked"
"""The exception type of a branch that was blocked on purpose (ComfyUI server reference, failures)."""
ABSENCES: Final = 2
"""Readings in a row that must miss a prompt before it counts as gone."""
IDLE_READINGS: Final = 3
"""Readings in a row with prompts waiting and none running before the worker may count as dead: between two prompts
the server is idle for a moment, a garbage collection stretches it to 0.4 s."""
UNFINISHED: Final = 99.0
"""The most percent a prompt can have before it ended."""
MOST_NODES, MOST_OUTPUTS = 20_000, 1_000
"""What is kept of a prompt: a hostile server could name new nodes for ever."""
TRACEBACK_LINES: Final = 30
"""Lines kept of a node's traceback: its cause stands at the end."""

_EMPTY: Final[Mapping[str, Any]] = MappingProxyType({})


def _nothing() -> Mapping[str, Any]:
    return _EMPTY


class Ending(StrEnum):
    """Why nothing more is to be waited for."""

    SUCCESS = "success"
    ERROR = "error"
    INTERRUPTED = "interrupted"
    REMOVED = "removed"
    RESTARTED = "restarted"
    WORKER_DEAD = "worker-dead"
    STUCK = "stuck"
    UNREACHABLE = "unreachable"


@dataclass(frozen=True, slots=True)
class Limits:
    """Patience, in seconds."""

    stall: float = 900.0
    blind: float = 3600.0
    """As `stall`, where nothing can be heard."""
    unreachable: float = 120.0
    worker_dead: float = 20.0


@dataclass(frozen=True, slots=True)
class Polled:
    """The server was asked. The queue was read before the history; None means "not read" or "not in it"."""

    queue: QueueView | None = None
    history: HistoryEntry | None = None


@dataclass(frozen=True, slots=True)
class PollFailed:
    """The server was asked and did not answer."""

    reason: str = ""
    broke: bool = False
    """The connection was refused or broken, as happens when a server restarts; False: it only kept silent."""
    asked_at: float | None = None


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""


WatchEvent = ServerEvent | Polled | PollFailed | Tick


@dataclass(frozen=True, slots=True)
class Failure:
    """Which node raised what. All of it is foreign text."""

    node_id: str = ""
    node_class: str = ""
    exception_type: str = ""
    message: str = ""
    traceback: tuple[str, ...] = ()
    """The last lines of it."""


@dataclass(frozen=True, slots=True)
class Run:
    """How far the prompt is."""

    running: bool = False
    queue_position: int | None = None
    node: str | None = None
    value: float | None = None
    maximum: float | None = None
    shares: Mapping[str, float] = field(default_factory=_nothing)
    """Node of the workflow -> how much of it is done, 0 to 1."""
    inner: Mapping[str, float] = field(default_factory=_nothing)
    """The same for nodes that others expanded into."""
    cached: frozenset[str] = frozenset()
    active: frozenset[str] = frozenset()
    """Nodes of the workflow that the server last said to be running, those that others expanded into as theirs."""
    percent: float = 0.0


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was said about the end, before the history confirms it."""

    succeeded: bool = False
    interrupted: bool = False
    failure: Failure | None = None
    marked: bool = False
    """The end marker was seen: `executing` without a node."""
    outputs: Mapping[str, Any] = field(default_factory=_nothing)
    """What `executed` messages delivered; used only if the history was deleted after a heard success."""


@dataclass(frozen=True, slots=True)
class Health:
    """What is known about the connection and the server. Stamps are seconds on the caller's clock."""

    socket: bool | None = None
    """None: nothing is known yet."""
    broke: bool = False
    """Whether a connection broke or was refused since the prompt was submitted."""
    heard: bool = False
    """Whether the socket that is open now has said anything about this prompt."""
    heard_at: float = 0.0
    moved_at: float = 0.0
    """When something last changed for this prompt."""
    down_at: float = 0.0
    """Since when the socket is down, if it is."""
    unreachable_since: float | None = None
    idle_since: float | None = None
    idle_readings: int = 0
    absent: int = 0


@dataclass(frozen=True, slots=True)
class WatchState:
    """Everything known about one prompt."""

    prompt_id: str
    began: float
    labels: Mapping[str, NodeLabel] = field(default_factory=_nothing)
    limits: Limits = field(default_factory=Limits)
    run: Run = field(default_factory=Run)
    evidence: Evidence = field(default_factory=Evidence)
    health: Health = field(default_factory=Health)
    history: HistoryEntry | None = None
    ending: Ending | None = None
    preview: bytes | None = None
    """The picture of the event that was folded last, if it was one."""
    note: str = ""
    """What a node last said about itself."""


def watching(
    prompt_id: str, labels: Mapping[str, NodeLabel], *, now: float, limits: Limits | None = None
) -> WatchState:
    """Return the state of a prompt that was just submitted."""
    health = Health(heard_at=now, moved_at=now)
    return WatchState(prompt_id, now, labels, limits or Limits(), health=health)


def fold(state: WatchState, event: WatchEvent, now: float) -> WatchState:
    """Return what is known after `event`. A state that has ended stays as it is."""
    if state.ending is not None:
        return state
    if state.preview is not None:
        state = replace(state, preview=None)
    match event:
        case Said():
            state = _said(state, event, now)
        case Preview() | NodeText():
            state = _shown(state, event, now)
        case Polled():
            state = _polled(state, event, now)
        case PollFailed():
            state = _poll_failed(state, event, now)
        case SocketUp():
            before = state.health
            health = replace(before, socket=True, heard=False, unreachable_since=None)
            if before.socket is False:
                # What was missed while nothing could be heard is no sign of a stall; the silence before it still is,
                # or a socket that breaks, or is renewed, again and again would hide a stuck prompt for ever.
                health = replace(health, moved_at=now - max(0.0, before.down_at - before.moved_at))
            state = replace(state, health=health)
        case SocketDown():
            down_at = state.health.down_at if state.health.socket is False else now
            broke = state.health.broke or event.lost
            health = replace(state.health, socket=False, heard=False, broke=broke, down_at=down_at)
            state = replace(state, health=health)
        case Tick():
            pass
    return state if state.ending is not None else _judge(state, now)


# --- what the socket says ---------------------------------------------------------------------------------


def _said(state: WatchState, said: Said, now: float) -> WatchState:
    data = said.data
    about = data.get("prompt_id")
    if about is None:
        # Sent once when a socket opens while a prompt of its client runs; it does not say which one.
        node = data.get("node")
        if said.type != "executing" or not isinstance(node, str) or not state.run.running:
            return state
    elif about != state.prompt_id:
        return state
    run, evidence = _progressed(state, said.type, data), _evidence(state.evidence, said.type, data)
    moved = run is not state.run or evidence is not state.evidence
    health = replace(
        state.health,
        heard=True,
        heard_at=now,
        moved_at=now if moved else state.health.moved_at,
        unreachable_since=None,
        idle_since=None,
        idle_readings=0,
        absent=0,
    )
    return replace(state, run=run, evidence=evidence, health=health)


def _progressed(state: WatchState, kind: str, data: Mapping[str, Any]) -> Run:
    run = state.run
    if len(run.shares) + len(run.inner) > MOST_NODES:
        return run
    match kind:
        case "execution_start":
            return run if run.running else replace(run, running=True, queue_position=None)
        case "execution_cached":
            nodes = frozenset(node for node in _list(data.get("nodes")) if isinstance(node, str))
            if nodes <= run.cached:
                return run
            shares = {**run.shares, **{_shown_as(state, node, None): 1.0 for node in nodes}}
            return _advanced(state, replace(run, running=True, cached=run.cached | nodes, shares=shares))
        case "executing":
            node = data.get("node")
            if not isinstance(node, str):
                return run
            shown = _shown_as(state, node, data.get("display_node"))
            if run.running and run.node == shown:
                return run
            return replace(run, running=True, queue_position=None, node=shown, value=None, maximum=None)
        case "progress":
            return _steps(state, data)
        case "progress_state":
            return _all_nodes(state, data)
        case "executed":
            node = data.get("node")
            if not isinstance(node, str) or run.shares.get(node) == 1.0:
                return run
            if _shown_as(state, node, data.get("display_node")) != node:
                return run
            return _advanced(state, replace(run, running=True, shares={**run.shares, node: 1.0}))
    return run


def _steps(state: WatchState, data: Mapping[str, Any]) -> Run:
    run, node = state.run, data.get("node")
    value, maximum = _number(data.get("value")), _number(data.get("max"))
    if value is None or maximum is None or maximum <= 0:
        return run
    shown = _shown_as(state, node, None) if isinstance(node, str) else run.node
    if shown is None or (shown == run.node and value == run.value and maximum == run.maximum):
        return run
    shares = run.shares
    if shown == node:
        # A node that has reported its last step still has to end.
        share = min(value / maximum, 0.99)
        shares = {**shares, shown: max(share, shares.get(shown, 0.0))}
    run = replace(run, running=True, node=shown, value=value, maximum=maximum, shares=shares)
    return _advanced(state, run)


def _all_nodes(state: WatchState, data: Mapping[str, Any]) -> Run:
    run = state.run
    shares, inner = dict(run.shares), dict(run.inner)
    expanded: dict[str, list[float]] = {}
    active: set[str] = set()
    for node, entry in _dict(data.get("nodes")).items():
        if not isinstance(node, str) or not isinstance(entry, Mapping):
            continue
        value, maximum = _number(entry.get("value")), _number(entry.get("max"))
        share = min(value / maximum, 0.99) if value is not None and maximum is not None and maximum > 0 else 0.0
        if entry.get("state") == "finished":
            share = 1.0
        shown = _shown_as(state, node, entry.get("display_node_id"))
        if entry.get("state") == "running":
            active.add(shown)
        if shown == node:
            shares[node] = max(share, shares.get(node, 0.0))
        else:
            inner[node] = max(share, inner.get(node, 0.0))
            expanded.setdefault(shown, []).append(inner[node])
    for shown, parts in expanded.items():
        # More parts may follow, so all of those known do not make the whole.
        shares[shown] = max(shares.get(shown, 0.0), 0.9 * sum(parts) / (len(parts) + 1))
    if run.running and shares == run.shares and inner == run.inner and active == run.active:
        return run
    run = replace(run, running=True, queue_position=None, shares=shares, inner=inner, active=frozenset(active))
    return _advanced(state, run)


def _advanced(state: WatchState, run: Run) -> Run:
    """Count the percent anew; it never goes back."""
    total = len(state.labels) or len(run.shares)
    done = sum(share for node, share in run.shares.items() if not state.labels or node in state.labels)
    percent = min(100.0 * done / total, UNFINISHED) if total else 0.0
    return replace(run, percent=max(percent, run.percent))


def _shown_as(state: WatchState, node: str, display: Any) -> str:
    """The node of the workflow that `node` belongs to: nodes can expand into others (`"1.0.0.1"` of `"1"`)."""
    if isinstance(display, str) and display:
        return display
    if node in state.labels:
        return node
    parent = node.partition(".")[0]
    return parent if parent in state.labels else node


def _evidence(evidence: Evidence, kind: str, data: Mapping[str, Any]) -> Evidence:
    match kind:
        case "executing" if "node" in data and data["node"] is None:
            return evidence if evidence.marked else replace(evidence, marked=True)
        case "execution_success":
            return evidence if evidence.succeeded else replace(evidence, succeeded=True)
        case "execution_interrupted":
            if evidence.interrupted:
                return evidence
            return replace(evidence, interrupted=True, failure=evidence.failure or _failure(data))
        case "execution_error" if data.get("exception_type") != BLOCKED:
            return evidence if evidence.failure is not None else replace(evidence, failure=_failure(data))
        case "executed":
            node, output = data.get("node"), data.get("output")
            kept = evidence.outputs
            if isinstance(node, str) and isinstance(output, Mapping) and node not in kept and len(kept) < MOST_OUTPUTS:
                return replace(evidence, outputs={**kept, node: output})
    return evidence


def _failure(data: Mapping[str, Any]) -> Failure:
    def text(key: str) -> str:
        value = data.get(key)
        return value if isinstance(value, str) else ""

    lines = _last_lines(data.get("traceback"))
    return Failure(text("node_id"), text("node_type"), text("exception_type"), text("exception_message"), lines)


def _last_lines(traceback: Any) -> tuple[str, ...]:
    """Return the end of a traceback (a list of texts of one or more lines), where the cause stands."""
    entries = traceback[-TRACEBACK_LINES:] if isinstance(traceback, list) else []
    lines = [line for entry in entries if isinstance(entry, str) for line in entry[:4_096].splitlines()]
    return tuple(foreign_text(line) for line in lines[-TRACEBACK_LINES:] if line.strip())


def _shown(state: WatchState, event: Preview | NodeText, now: float) -> WatchState:
    health = replace(state.health, heard=True, heard_at=now, moved_at=now, unreachable_since=None)
    if isinstance(event, Preview):
        return replace(state, health=health, preview=event.image)
    return replace(state, health=health, note=event.text)


# --- what the server answers ------------------------------------------------------------------------------


def _polled(state: WatchState, polled: Polled, now: float) -> WatchState:
    health = replace(state.health, unreachable_since=None)
    if polled.history is not None:
        return _ended(replace(state, health=health), polled.history)
    if polled.queue is None:
        return replace(state, health=health)
    if state.prompt_id in polled.queue.running:
        return _seen_running(state, health, now)
    if state.prompt_id in polled.queue.pending:
        return _seen_waiting(state, health, polled.queue, now)
    health = replace(health, absent=health.absent + 1, idle_since=None, idle_readings=0)
    state = replace(state, health=health)
    return _gone(state) if health.absent >= ABSENCES else state


def _seen_running(state: WatchState, health: Health, now: float) -> WatchState:
    run, evidence = state.run, state.evidence
    if not run.running or run.queue_position is not None:
        run = replace(run, running=True, queue_position=None)
        health = replace(health, moved_at=now)
    if evidence.marked:
        # The queue was read after the marker and knows better: a stray message.
        evidence = replace(evidence, marked=False)
    health = replace(health, absent=0, idle_since=None, idle_readings=0)
    return replace(state, run=run, evidence=evidence, health=health)


def _seen_waiting(state: WatchState, health: Health, queue: QueueView, now: float) -> WatchState:
    position = queue.pending.index(state.prompt_id)
    run = state.run
    moved = position != run.queue_position
    if moved:
        run = replace(run, queue_position=position)
    if queue.running:
        idle_since, readings = None, 0
    elif moved or health.idle_since is None:
        idle_since, readings = now, 1
    else:
        idle_since, readings = health.idle_since, health.idle_readings + 1
    health = replace(
        health,
        absent=0,
        moved_at=now if moved else health.moved_at,
        idle_since=idle_since,
        idle_readings=readings,
    )
    evidence = replace(state.evidence, marked=False) if state.evidence.marked else state.evidence
    return replace(state, run=run, evidence=evidence, health=health)


def _poll_failed(state: WatchState, failed: PollFailed, now: float) -> WatchState:
    since = state.health.unreachable_since
    if since is None:
        since = now if failed.asked_at is None else min(failed.asked_at, now)
    health = replace(
        state.health,
        broke=state.health.broke or failed.broke,
        unreachable_since=since,
        idle_since=None,
        idle_readings=0,
    )
    return replace(state, health=health)


# --- the end ----------------------------------------------------------------------------------------------


def _ended(state: WatchState, entry: HistoryEntry) -> WatchState:
    said: dict[str, Mapping[str, Any]] = dict(entry.messages)
    evidence = state.evidence
    if entry.status != "success":
        if "execution_interrupted" in said:
            failure = _failure(said["execution_interrupted"])
            return _closed(state, Ending.INTERRUPTED, entry, replace(evidence, failure=failure))
        if "execution_error" in said:
            failure = _failure(said["execution_error"])
            return _closed(state, Ending.ERROR, entry, replace(evidence, failure=failure))
        if evidence.interrupted:
            return _closed(state, Ending.INTERRUPTED, entry, evidence)
        if entry.status or evidence.failure is not None:
            return _closed(state, Ending.ERROR, entry, replace(evidence, failure=evidence.failure or Failure()))
    return _closed(state, Ending.SUCCESS, entry, evidence)


def _gone(state: WatchState) -> WatchState:
    evidence = state.evidence
    if evidence.interrupted:
        return _closed(state, Ending.INTERRUPTED, None, evidence)
    if evidence.failure is not None:
        return _closed(state, Ending.ERROR, None, evidence)
    if evidence.succeeded and evidence.marked:
        # Somebody deleted the history between the end and our reading; the end itself was heard.
        return _closed(state, Ending.SUCCESS, None, evidence)
    return _closed(state, Ending.RESTARTED if state.health.broke else Ending.REMOVED, None, evidence)


def _closed(state: WatchState, ending: Ending, entry: HistoryEntry | None, evidence: Evidence) -> WatchState:
    run = replace(state.run, percent=100.0) if ending is Ending.SUCCESS else state.run
    if entry is not None:
        cached = _dict(dict(entry.messages).get("execution_cached")).get("nodes")
        nodes = frozenset(node for node in _list(cached) if isinstance(node, str))
        run = replace(run, cached=run.cached | nodes)
    return replace(state, ending=ending, history=entry, evidence=evidence, run=run)


def _judge(state: WatchState, now: float) -> WatchState:
    """End what silence, idleness or time has ended."""
    health, limits = state.health, state.limits
    if health.unreachable_since is not None:
        if now - health.unreachable_since >= limits.unreachable:
            return replace(state, ending=Ending.UNREACHABLE)
        return state
    if health.idle_since is not None and health.idle_readings >= IDLE_READINGS:
        if now - health.idle_since >= limits.worker_dead:
            return replace(state, ending=Ending.WORKER_DEAD)
        return state
    if state.run.running:
        hearing = health.socket is True and health.heard
        limit = limits.stall if hearing else max(limits.stall, limits.blind)
        if now - health.moved_at >= limit:
            return replace(state, ending=Ending.STUCK)
    return state


# --- for people -------------------------------------------------------------------------------------------


def progress_of(state: WatchState) -> Progress:
    """Return what a person is told; `elapsed` and `expected` are the caller's to fill in."""
    run = state.run
    step = Step.RUNNING if run.running or state.ending is Ending.SUCCESS else Step.QUEUED
    label = state.labels.get(run.node) if run.node is not None else None
    # A node that the workflow does not have is named by the server, and a title may come out of a stranger's file.
    title = foreign_text((label.title or label.class_type) if label is not None else (run.node or ""))
    done = frozenset(n for n, share in run.shares.items() if share == 1.0 and (not state.labels or n in state.labels))
    return Progress(
        step=step,
        percent=run.percent,
        message=_message(state, title),
        node_id=run.node,
        node_title=title,
        value=run.value,
        maximum=run.maximum,
        nodes_done=len(done),
        nodes_total=len(state.labels),
        queue_position=run.queue_position,
        preview=state.preview,
        done=done,
        cached=run.cached,
        active=run.active,
        labels=state.labels,
    )


def _message(state: WatchState, title: str) -> str:
    run = state.run
    if state.health.unreachable_since is not None:
        return "the server does not answer; waiting for it"
    if state.ending is Ending.SUCCESS:
        return "done"
    if not run.running:
        if run.queue_position:
            return f"waiting, {run.queue_position} ahead"
        return "waiting"
    if run.value is not None and run.maximum is not None:
        return f"{title} {run.value:g}/{run.maximum:g}".strip()
    return title or "running"


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _dict(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else _EMPTY


def _number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
