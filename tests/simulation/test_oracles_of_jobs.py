"""The judge of jobs at the end of a simulated day: which word each broken promise about a job gets."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from runcomfy.domain.machine import OwnerId
from runcomfy.domain.queued import EventKind, QueuedJob, QueueStatus, Reason
from runcomfy.testing.clock import START
from runcomfy.testing.emulators.comfyui.process import RunRecord
from runcomfy.testing.simulation.harm import Blow
from runcomfy.testing.simulation.load import KINDS, Order
from runcomfy.testing.simulation.oracles_jobs import LATE_MOST, JobsOracle
from runcomfy.testing.simulation.violations import Found

ZERO = START.timestamp()
KIND = {kind.name: kind for kind in KINDS}
ORDER = Order(1, KIND["picture"], 0.0, 30.0, "ann", 50, 2, accepted_at=1.0)
TOKEN = "canary-token"


class Day:
    """A judge of a day that has ended, and of which a test tells what came of it."""

    def __init__(self, folder: Path) -> None:
        self.events: list[EventKind] = []
        finished, state = folder / "finished", folder / "state"
        for each in (finished, state):
            each.mkdir()
        self.dead: set[OwnerId] = set()
        self.lines: list[Any] = []
        self.finished, self.state = finished, state
        services = SimpleNamespace(
            queue=SimpleNamespace(show=self._show),
            processes=SimpleNamespace(dead=self.dead),
            queue_settings=SimpleNamespace(jobs_finished=str(finished)),
            settings=SimpleNamespace(files=SimpleNamespace(state_dir=str(state))),
        )
        world: Any = SimpleNamespace(
            clock=SimpleNamespace(now=lambda: START),
            seconds=0.0,
            services=services,
            cloud=SimpleNamespace(token=TOKEN, machines={}, on_call=[], calls=[]),
            trace=SimpleNamespace(lines=self.lines),
            folder=folder,
            acknowledged={},
            stream=Random,
        )
        world.own = cache(lambda kind: kind(world))
        self.found = Found()
        self.oracle = JobsOracle(world, self.found)
        self.world = world

    async def _show(self, _: QueuedJob) -> Any:
        return SimpleNamespace(events=[SimpleNamespace(kind=kind) for kind in self.events])

    @property
    def said(self) -> list[str]:
        return [violation.invariant for violation in self.found.all]


@pytest.fixture
def day(tmp_path: Path) -> Day:
    return Day(tmp_path)


def a_row(status: QueueStatus = QueueStatus.DONE, **given: Any) -> Any:
    plain: dict[str, Any] = {
        "reason": None,
        "worker_id": None,
        "result": {},
        "end_time": None,
        "ended": status.value != "processing",
    }
    return SimpleNamespace(**{**plain, "status": status, "config_name": "job-1", **given})


def a_run(started: float, ended: float | None, outcome: str = "success", **given: Any) -> RunRecord:
    end = None if ended is None else ZERO + ended
    return RunRecord("prompt", None, 1, 0.0, ZERO + started, end, outcome, **given)


@pytest.mark.parametrize(
    ("row", "events", "kind", "said"),
    [
        (a_row(), [EventKind.DONE], "picture", []),
        (a_row(), [EventKind.DONE, EventKind.RETRIED, EventKind.DONE], "picture", []),
        (a_row(), [EventKind.DONE, EventKind.DONE], "picture", ["I10", "I11"]),
        (a_row(), [], "picture", ["I10", "I10"]),
        (a_row(), [EventKind.FAILED], "picture", ["I10"]),
        (a_row(QueueStatus.FAILED, reason="node-failed"), [EventKind.FAILED], "picture", []),
        (a_row(QueueStatus.FAILED), [EventKind.FAILED], "picture", ["I10"]),
        (a_row(), [EventKind.DONE], "fails", ["I15"]),
        (a_row(QueueStatus.PROCESSING, worker_id="alive"), [], "picture", ["I25"]),
        (a_row(QueueStatus.PROCESSING, worker_id="dead"), [], "picture", ["I20"]),
    ],
)
def test_a_job_ends_once_in_one_way_and_its_log_says_the_same(
    day: Day, row: Any, events: Sequence[EventKind], kind: str, said: list[str]
) -> None:
    day.events = list(events)
    day.dead.add(OwnerId("dead"))
    asyncio.run(day.oracle._judge_row(replace(ORDER, kind=KIND[kind]), row))
    assert day.said == said


def test_what_no_server_may_run_was_not_run_and_what_nobody_cancelled_is_not_cancelled(day: Day) -> None:
    runs = [("server", a_run(0, 30))]
    day.oracle._judge_runs(replace(ORDER, kind=KIND["refused"]), a_row(), runs)
    assert day.said == ["I14"]
    cancelled = a_row(QueueStatus.FAILED, reason=Reason.CANCELLED)
    day.oracle._judge_runs(replace(ORDER, cancelled_at=20.0), cancelled, runs)
    assert day.said == ["I14"]
    day.oracle._judge_runs(ORDER, cancelled, runs)
    assert day.said == ["I14", "I17"]


def test_what_is_done_has_its_result_and_what_is_cancelled_has_none(day: Day) -> None:
    target = day.finished / "job-1.png"
    order = replace(ORDER, target=target)
    cancelled = a_row(QueueStatus.FAILED, reason=Reason.CANCELLED)
    day.oracle._judge_files(order, cancelled, set())
    assert day.said == []
    target.write_bytes(b"x")
    day.oracle._judge_files(order, cancelled, set())
    assert day.said == ["I17"]
    day.oracle._judge_files(order, a_row(), set())
    assert day.said == ["I17", "I15"]
    lost = {"path": str(day.finished / "none.png"), "size_bytes": 1, "sha256": ""}
    day.oracle._judge_files(replace(order, number=2), a_row(result={"outputs": [lost]}), set())
    assert day.said == ["I17", "I15", "I15"]
    day.oracle._judge_files(replace(order, number=3, cancelled_at=2.0), a_row(result={"outputs": [lost]}), set())
    assert day.said[3:] == ["I17", "I15"]


def test_a_file_among_the_results_that_is_no_jobs_is_a_second_effect(day: Day) -> None:
    (day.finished / ".partial").write_bytes(b"x")
    result = day.finished / "job-1.png"
    result.write_bytes(b"x")
    rows = {"job-1": a_row(result={"outputs": [{"path": str(result)}]})}
    day.oracle._judge_strays(rows)
    assert day.said == []
    (day.finished / "job-1 (2).png").write_bytes(b"x")
    day.oracle._judge_strays(rows)
    assert day.said == ["I11"]


def test_a_persons_prompt_is_not_interrupted(day: Day, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [("server", a_run(0, 30)), ("server", a_run(40, 50, "interrupted"))]
    monkeypatch.setattr(day.oracle, "_all_runs", lambda: records)
    day.oracle._judge_by_hand()
    assert day.said == []
    day.oracle.harm.by_hand.add("prompt")
    day.oracle._judge_by_hand()
    assert day.said == ["I8"]


def test_the_token_is_said_nowhere_and_in_no_file_and_state_is_private(day: Day) -> None:
    (day.world.folder / "machines").mkdir()
    (day.world.folder / "machines" / "the cloud's own").write_text(TOKEN)
    day.lines.append(SimpleNamespace(at=1.0, who="service-1", sentence="all is well"))
    (day.state / "state.json").write_text("{}")
    (day.state / "state.json").chmod(0o600)
    day.oracle._judge_secrets()
    assert day.said == []
    day.lines.append(SimpleNamespace(at=2.0, who="service-1", sentence=f"it is {TOKEN}"))
    (day.state / "log").write_text(f"Bearer {TOKEN}")
    (day.state / "state.json").chmod(0o644)
    day.oracle._judge_secrets()
    assert day.said == ["I24", "I24", "I24"]


@pytest.mark.parametrize(
    ("late", "blows", "order", "said"),
    [
        (1.0, [], ORDER, []),
        (LATE_MOST + 1, [], ORDER, ["I18"]),
        (LATE_MOST + 1, [Blow(45, "a socket is closed", 31.0, 40.0)], ORDER, ["I18"]),
        (LATE_MOST + 1, [Blow(29, "the API is down", 31.0, 40.0)], ORDER, []),
        (LATE_MOST + 1, [], replace(ORDER, cancelled_at=5.0), []),
    ],
)
def test_a_result_is_known_some_looks_later_whatever_sockets_do(
    day: Day, monkeypatch: pytest.MonkeyPatch, late: float, blows: list[Blow], order: Order, said: list[str]
) -> None:
    monkeypatch.setattr(day.oracle, "_runs", lambda: {1: [("server", a_run(0, 30))]})
    day.world.acknowledged["job-1"] = order
    day.oracle.harm.blows.extend(blows)
    ended = SimpleNamespace(timestamp=lambda: ZERO + 30 + late)
    day.oracle.judge_lateness({"job-1": a_row(end_time=ended)})
    assert day.said == said
