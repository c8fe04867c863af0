"""What answers prove: the edges that the search through the protocol has no need of."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest

from runcomfy.domain.evidence import (
    AfterLook,
    Launched,
    Whereabouts,
    after_look,
    entry_of,
    may_be_it,
    needs_new_name,
    what_was_started,
    whereabouts,
)
from runcomfy.domain.job import PromptId
from runcomfy.domain.machine import Machine, MachineId, MachineReport, Phase, Purpose, ServerId
from runcomfy.domain.progress import HistoryEntry, QueueView
from runcomfy.domain.progress_fold import Polled

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)
OURS = Machine(
    id=MachineId("m"),
    provider="cloud",
    account="a",
    purpose=Purpose.RUN,
    server_type="medium",
    duration=timedelta(minutes=10),
    usd_per_hour=Decimal(1),
    rate_source="",
    requested_at=NOON,
    since=NOON,
    workflow_version_id="v1",
    before_ids=(ServerId("old"),),
)
FITS = MachineReport(
    ServerId("new"), Phase.READY, "Ready", "medium", duration=timedelta(minutes=10), workflow_version_id="v1"
)

TYPES = ("medium", "large")


@pytest.mark.parametrize(
    "report",
    [
        FITS,
        replace(FITS, server_type="MEDIUM"),
        replace(FITS, server_type="?"),
        replace(FITS, server_type="gpu-48gb"),
        replace(FITS, server_type="", duration=None, workflow_version_id=""),  # what is not told contradicts nothing
        replace(FITS, phase=Phase.UNKNOWN),
        replace(FITS, phase=Phase.STOPPING),
    ],
)
def test_what_is_new_and_of_the_kind_may_be_it(report: MachineReport) -> None:
    assert may_be_it(OURS, [report], (), types=TYPES) == ([report], [])


@pytest.mark.parametrize(
    "report",
    [
        replace(FITS, duration=timedelta(minutes=11)),
        replace(FITS, workflow_version_id="v2"),
        replace(FITS, addressable=False),
    ],
)
def test_what_differs_a_little_leaves_a_doubt(report: MachineReport) -> None:
    assert may_be_it(OURS, [report], (), types=TYPES) == ([], [report])


@pytest.mark.parametrize(
    "report",
    [
        replace(FITS, server_id=ServerId("old")),
        replace(FITS, server_id=ServerId("known")),
        replace(FITS, server_id=ServerId("mistaken")),
        replace(FITS, phase=Phase.GONE),
        replace(FITS, server_type="large"),
        replace(FITS, server_type=" Large"),
    ],
)
def test_what_was_there_or_is_known_or_is_of_another_type_is_not_it(report: MachineReport) -> None:
    ours = replace(OURS, server_id=ServerId("mistaken"))
    assert may_be_it(ours, [report], {ServerId("known")}, types=TYPES) == ([], [])


def test_a_machine_that_starts_is_taken_only_when_no_second_one_can_appear() -> None:
    starts = replace(FITS, phase=Phase.STARTING)
    assert what_was_started([starts], [], late_lists=0) is Launched.LOOK_AGAIN
    assert what_was_started([starts], [], late_lists=1) is Launched.TAKE
    assert what_was_started([FITS], [FITS], late_lists=0) is Launched.TAKE


def test_two_machines_are_ambiguous_at_once_and_a_doubtful_one_after_two_late_lists() -> None:
    assert what_was_started([FITS, FITS], [], late_lists=0) is Launched.AMBIGUOUS
    assert [what_was_started([], [FITS], late_lists=lists) for lists in (0, 1, 2, 3)] == [
        Launched.LOOK_AGAIN,
        Launched.LOOK_AGAIN,
        Launched.AMBIGUOUS,
        Launched.AMBIGUOUS,
    ]
    assert [what_was_started([], [], late_lists=lists) for lists in (1, 2)] == [Launched.LOOK_AGAIN, Launched.NOTHING]


def test_an_entry_that_says_gone_is_no_entry() -> None:
    gone, there = replace(FITS, phase=Phase.GONE), replace(FITS, phase=Phase.STOPPING)
    assert entry_of(ServerId("new"), [gone]) is None
    assert entry_of(ServerId("new"), [gone, there]) is there
    assert entry_of(ServerId("other"), [there]) is None


@pytest.mark.parametrize(
    ("phase", "known", "visible", "means"),
    [
        (Phase.GONE, True, False, AfterLook.CLOSE),
        (Phase.GONE, True, True, AfterLook.CLOSE),
        (Phase.GONE, False, True, AfterLook.MISTAKEN),
        (Phase.GONE, False, False, AfterLook.WAIT),
        (None, True, True, AfterLook.WAIT),
        (Phase.STOPPING, True, True, AfterLook.WAIT),
        (Phase.UNKNOWN, True, True, AfterLook.WAIT),
        (Phase.READY, False, False, AfterLook.RUNS),
        (Phase.STARTING, True, True, AfterLook.RUNS),
        (Phase.FAILED, True, True, AfterLook.RUNS),
    ],
)
def test_only_gone_closes_the_books_and_what_is_not_shown_yet_is_not_gone(
    phase: Phase | None, known: bool, visible: bool, means: AfterLook
) -> None:
    assert after_look(phase, known=known, must_be_visible=visible) is means


def test_a_prompt_is_held_ended_or_missed() -> None:
    name = PromptId("p")
    ended = HistoryEntry(name, {}, "error")
    nothing = QueueView(running=(), pending=())
    assert whereabouts(Polled(QueueView(running=("p",), pending=()), None), name) is Whereabouts.HELD
    assert whereabouts(Polled(QueueView(running=("q",), pending=("p",)), None), name) is Whereabouts.HELD
    assert whereabouts(Polled(nothing, ended), name) is Whereabouts.ENDED
    assert whereabouts(Polled(nothing, None), name) is Whereabouts.MISSED
    assert whereabouts(Polled(None, None), name) is Whereabouts.MISSED


def test_only_a_prompt_that_never_arrived_keeps_its_name() -> None:
    assert not needs_new_name(accepted=False, unwanted=False, lost=False)
    assert needs_new_name(accepted=True, unwanted=False, lost=False)
    assert needs_new_name(accepted=False, unwanted=True, lost=False)
    assert needs_new_name(accepted=False, unwanted=False, lost=True)
