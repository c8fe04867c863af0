"""The life of a machine: what ends a bill, and what does not."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runcomfy.domain.machine import (
    NEXT,
    OPEN,
    IllegalTransition,
    Machine,
    MachineEvent,
    MachineId,
    MachineReport,
    MachineState,
    Phase,
    Purpose,
    ServerId,
)
from runcomfy.domain.money import billed_interval, cost_of
from runcomfy.domain.secret import SecretUrl

S, E = MachineState, MachineEvent
NOW = datetime(2026, 11, 20, 10, 0, tzinfo=UTC)


def a_machine(state: MachineState = S.REQUESTED, **fields: datetime) -> Machine:
    machine = Machine(
        id=MachineId("m"),
        provider="runcomfy",
        account="a",
        purpose=Purpose.RUN,
        server_type="medium",
        duration=timedelta(minutes=10),
        usd_per_hour=Decimal("3.60"),
        rate_source="test",
        requested_at=NOW,
        since=NOW,
        state=state,
    )
    return replace(machine, **fields)  # type: ignore[arg-type]


def later(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def test_every_state_can_be_reached_from_a_request() -> None:
    reached, new = set[MachineState](), {S.REQUESTED}
    while new:
        reached |= new
        new = {after for (before, _), after in NEXT.items() if before in reached} - reached
    assert reached == set(S)


def test_every_event_means_something_somewhere() -> None:
    assert {event for _, event in NEXT} == set(E)


@pytest.mark.parametrize("state", S)
@pytest.mark.parametrize("event", E)
def test_every_state_has_an_answer_to_every_event(state: MachineState, event: MachineEvent) -> None:
    machine = a_machine(state)
    if (state, event) in NEXT:
        after = machine.on(event, at=later(5))
        assert after.state is NEXT[state, event]
        assert after.since == (later(5) if after.state is not state else NOW)
    else:
        with pytest.raises(IllegalTransition, match=f"{event} while {state}"):
            machine.on(event, at=later(5))


def test_an_open_machine_can_be_asked_to_stop_unless_it_was_never_answered() -> None:
    assert {state for state, event in NEXT if event is E.STOP_ASKED} == OPEN - {S.REQUESTED}
    assert {state for state, event in NEXT if event is E.GONE} == OPEN - {S.REQUESTED}


@pytest.mark.parametrize("state", S)
def test_a_machine_that_was_ready_bills_until_it_is_said_to_be_gone(state: MachineState) -> None:
    machine = a_machine(state, ready_at=NOW)
    assert machine.bills is (state is not S.STOPPED)
    assert machine.is_open is (state in OPEN)


@given(st.lists(st.sampled_from(list(E)), max_size=30))
def test_only_the_providers_word_ends_a_bill(events: list[MachineEvent]) -> None:
    machine, said_gone = a_machine(), False
    for number, event in enumerate(events, start=1):
        try:
            machine = machine.on(event, at=later(number))
        except IllegalTransition:
            continue
        if event is E.ANSWERED and machine.ready_at is None:
            machine = replace(machine, ready_at=later(number))
        if event is E.GONE:
            said_gone = True
        elif event is E.LISTED:
            said_gone = False
        if machine.ready_at is not None:
            assert machine.bills is not said_gone
            assert (machine.gone_at is not None) is said_gone


@given(st.lists(st.sampled_from([E.STOP_ASKED, E.SILENT, E.ANSWERED]), max_size=10))
def test_neither_silence_nor_our_wish_ends_a_bill(events: list[MachineEvent]) -> None:
    machine = a_machine(S.READY, ready_at=NOW)
    for event in events:
        if (machine.state, event) in NEXT:
            machine = machine.on(event, at=later(1))
    assert machine.bills
    assert billed_interval(machine, now=later(3600)) == (NOW, later(3600))
    assert cost_of(machine, now=later(3600)) == Decimal("3.60")


def test_a_yes_to_the_stop_closes_the_bill_and_seeing_the_machine_again_opens_it() -> None:
    machine = a_machine(S.READY, ready_at=NOW).on(E.STOP_ASKED, at=later(100))
    machine = replace(machine, stop_accepted_at=later(101)).on(E.GONE, at=later(130))
    assert cost_of(machine, now=later(9999)) == Decimal("0.101")
    machine = machine.on(E.LISTED, at=later(200))
    assert (machine.state, machine.gone_at, machine.stop_accepted_at) == (S.STOPPING, None, None)
    assert machine.bills
    assert cost_of(machine, now=later(9999)) == Decimal("9.999")


def test_a_machine_that_went_away_unasked_is_billed_until_it_was_seen_gone() -> None:
    machine = a_machine(S.READY, ready_at=NOW).on(E.GONE, at=later(50))
    assert billed_interval(machine, now=later(9999)) == (NOW, later(50))


def test_a_launch_that_was_written_off_and_shows_up_is_alive() -> None:
    machine = a_machine().on(E.ABSENT, at=later(120))
    assert not machine.is_open
    assert machine.on(E.LISTED, at=later(300)).state is S.BOOTING


def test_the_first_wish_to_stop_is_the_one_remembered() -> None:
    machine = a_machine(S.READY).on(E.STOP_ASKED, at=later(1)).on(E.STOP_ASKED, at=later(2))
    assert (machine.stop_asked_at, machine.since) == (later(1), later(1))


def test_a_machine_never_ready_costs_nothing() -> None:
    assert billed_interval(a_machine(S.BOOTING), now=later(999)) is None
    assert cost_of(a_machine(S.BOOTING), now=later(999)) == 0
    assert not a_machine(S.BOOTING).bills


def test_a_machine_is_usable_when_it_is_ready_and_has_an_address() -> None:
    url = SecretUrl("https://x-comfyui.example.com")
    report = MachineReport(ServerId("s"), Phase.READY, "Ready", url=url)
    assert report.usable
    assert not replace(report, url=None).usable
    assert not replace(report, phase=Phase.STARTING).usable
