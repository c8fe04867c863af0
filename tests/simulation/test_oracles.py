"""Oracles say what did not hold, once each, and hold nothing against us that nobody could have known."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runcomfy.domain.budget import Budget, Period
from runcomfy.testing.clock import START
from runcomfy.testing.emulators.comfyui.nodes.probes import picture_of
from runcomfy.testing.emulators.comfyui.process import RunRecord
from runcomfy.testing.emulators.runcomfy.cloud import CallRecord
from runcomfy.testing.simulation.harm import Blow
from runcomfy.testing.simulation.load import KINDS, Order
from runcomfy.testing.simulation.loop import MemoryLoop
from runcomfy.testing.simulation.oracles_cloud import CloudOracle
from runcomfy.testing.simulation.oracles_jobs import JobsOracle, _of_file
from runcomfy.testing.simulation.violations import Found, Violation
from runcomfy.testing.simulation.world import World


class Story:
    """Two oracles of a world in which nothing happens but what a test tells them."""

    def __init__(self) -> None:
        self.loop = MemoryLoop()
        self.world = World(1, self.loop)
        self.world.cloud = SimpleNamespace(on_call=[], launched=[], machines={}, calls=[])  # type: ignore[assignment]
        self.world.services = SimpleNamespace(observers=[])  # type: ignore[assignment]
        self.world.clock = SimpleNamespace(now=lambda: START + timedelta(seconds=self.loop.time()))  # type: ignore[assignment]
        self.found = Found()
        self.cloud, self.jobs = CloudOracle(self.world, self.found), JobsOracle(self.world, self.found)

    def at(self, seconds: float) -> None:
        """Let it be so late."""
        self.loop._seconds = seconds

    def call(self, method: str = "GET", path: str = "servers", **given: Any) -> None:
        """Have the cloud get a call now."""
        record = CallRecord(
            self.world.clock.now(), method, path, given.pop("body", None), 1, **{"status": 200, **given}
        )
        self.world.cloud.calls.append(record)
        for tell in self.world.cloud.on_call:
            tell(record)

    @property
    def said(self) -> list[str]:
        """Which invariants were said to be broken."""
        return [violation.invariant for violation in self.found.all]

    def runs(self, *spans: tuple[float, float], prompts: Sequence[str] = "abcdef") -> list[tuple[str, RunRecord]]:
        """Return runs of one job on servers of their own."""
        zero = START.timestamp()
        return [
            (f"server-{at}", RunRecord(prompts[at], None, 1, 0.0, zero + start, zero + end, "success"))
            for at, (start, end) in enumerate(spans)
        ]


@pytest.fixture
def story() -> Iterator[Story]:
    told = Story()
    yield told
    told.loop.close()


ORDER = Order(1, KINDS[0], 0.0, 30.0, "ann", 50, 2)
JOB: Any = SimpleNamespace(reason="")


def test_a_violation_is_said_once() -> None:
    found = Found()
    for seconds in (1, 2):
        found.add("I4", f"for {seconds} s", "machine-1", at=seconds, mark="asked")
    assert found.all == [Violation("I4", "for 1 s", "machine-1", 1)]
    assert str(found.all[0]) == "I4: for 1 s [machine-1]"


def test_a_call_a_second_is_allowed_and_a_flood_is_not(story: Story) -> None:
    for second in range(300):
        story.at(float(second))
        story.call()
    assert story.said == []
    for _ in range(20):
        story.call()
    assert story.said == ["I22"]


def test_what_the_http_client_repeats_where_a_connection_broke_is_one_call(story: Story) -> None:
    for second in range(60):
        story.at(float(second))
        story.call(reply="lost")
        story.call(reply="lost")
    assert story.said == []


@pytest.mark.parametrize(
    ("header", "after", "said"), [("30", 10, ["I22"]), ("30", 31, []), ("-5", 1, []), ("x", 1, [])]
)
def test_retry_after_holds_every_call(story: Story, header: str, after: float, said: list[str]) -> None:
    story.at(100.0)
    story.call(status=429, retry_after=header)
    story.at(100.0 + after + 0.5)
    story.call()
    assert story.said == said


def test_a_retry_after_of_days_is_obeyed_for_a_minute(story: Story) -> None:
    story.at(100.0)
    story.call(status=503, retry_after="864000")
    story.at(161.0)
    story.call()
    assert story.said == []


def test_a_program_that_died_with_the_retry_after_it_heard_is_excused(story: Story) -> None:
    story.at(100.0)
    story.call(status=429, retry_after="45")
    story.cloud.harm.blows.append(Blow(61, "killed", 101.0, 102.0))
    story.at(110.0)
    story.call()
    assert story.said == []


def test_a_lease_may_be_paid_ahead_and_no_more(story: Story) -> None:
    story.world.services.settings = SimpleNamespace(  # type: ignore[assignment]
        cloud=SimpleNamespace(run_lease=timedelta(minutes=10), requests_per_second=1.0)
    )
    story.cloud._check_lease({"estimated_duration": 600}, "estimated_duration", None, 0.0)
    assert story.said == []
    story.cloud._check_lease({"estimated_duration": 3_600}, "estimated_duration", None, 0.0)
    assert story.said == ["I5"]


def test_what_machines_may_still_cost_counts_against_a_budget(story: Story) -> None:
    def machine(**given: Any) -> Any:
        traits = SimpleNamespace(ignores_stop_time=False, ignores_delete=False)
        plain = {"foreign": False, "traits": traits, "ready_at": None, "billed_until": None, "gone_at": None}
        return SimpleNamespace(**{**plain, "estimated_duration": 600, "usd_per_hour": Decimal("0.99"), **given})

    story.world.budgets = [Budget(Period.HOUR, hard=Decimal("0.40"))]
    story.world.cloud.machines = {"a": machine(), "b": machine(), "c": machine(foreign=True)}
    story.cloud._check_budget([], START, 0.0)
    assert story.said == []
    story.world.cloud.machines["d"] = machine()
    story.cloud._check_budget([], START, 0.0)
    assert story.said == ["I6"]


def test_runs_of_a_job_one_after_the_other_are_fine_and_two_at_once_are_not(story: Story) -> None:
    story.jobs._judge_runs(ORDER, JOB, story.runs((0, 30), (30, 60)))
    assert story.said == []
    story.jobs._judge_runs(ORDER, JOB, story.runs((0, 30), (29, 60)))
    assert story.said == ["I12"]


def test_a_job_is_not_run_for_ever(story: Story) -> None:
    spans = [(60.0 * at, 60.0 * at + 30) for at in range(9)]
    story.jobs._judge_runs(ORDER, JOB, story.runs(*spans[:8], prompts=[str(at) for at in range(8)]))
    assert story.said == []
    story.jobs._judge_runs(ORDER, JOB, story.runs(*spans, prompts=[str(at) for at in range(9)]))
    assert story.said == ["I14"]


def test_a_prompt_that_is_begun_again_is_said_unless_its_server_doubled_it_or_somebody_woke(story: Story) -> None:
    twice = {1: story.runs((0, 30), (40, 70), prompts="aa")}
    story.jobs.harm.doubled.add("server-1")
    story.jobs._judge_repeats(twice)
    assert story.said == []
    story.jobs.harm.doubled.clear()
    story.jobs.harm.blows.append(Blow(64, "slept", 5.0, 50.0))
    story.jobs._judge_repeats(twice)
    assert story.said == []
    story.jobs.harm.blows.clear()
    story.jobs._judge_repeats(twice)
    assert story.said == ["I13"]


def test_nothing_is_sent_after_a_cancel(story: Story) -> None:
    zero = START.timestamp()
    sent = [("server", SimpleNamespace(at=zero + 40.0))]
    story.jobs._judge_submits(replace(ORDER, cancelled_at=50.0), sent)  # type: ignore[arg-type]
    assert story.said == []
    story.jobs._judge_submits(replace(ORDER, cancelled_at=20.0), sent)  # type: ignore[arg-type]
    assert story.said == ["I17"]


def test_a_result_must_be_whole_recorded_and_the_jobs_own(tmp_path: Path) -> None:
    path = tmp_path / "job-1.png"
    picture_of(7).frames[0].save(path)
    data = path.read_bytes()

    said = {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert _of_file(path, said, ORDER, {7}) == ""
    assert "another job's" in _of_file(path, said, ORDER, {8})
    assert "not the file" in _of_file(path, {**said, "sha256": "0"}, ORDER, {7})
    half = data[: len(data) // 2]
    path.write_bytes(half)
    assert "no picture" in _of_file(
        path, {"size_bytes": len(half), "sha256": hashlib.sha256(half).hexdigest()}, ORDER, {7}
    )
    path.unlink()
    assert "cannot be read" in _of_file(path, said, ORDER, {7})
