"""The protocol, searched through whole; and the designs that it is not, each with the story that speaks against it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import pytest

from runcomfy.domain import evidence
from runcomfy.domain.machine import MachineReport, MachineState, Phase
from runcomfy.domain.protocol import launch, rejected, stop, submit
from runcomfy.domain.protocol.launch import Launches
from runcomfy.domain.protocol.lease import Leases
from runcomfy.domain.protocol.rejected import LARGER, OURS, REJECTED, Rejected
from runcomfy.domain.protocol.search import NO_WAY_OUT, Step, TooLarge, search
from runcomfy.domain.protocol.stop import Stops
from runcomfy.domain.protocol.submit import Submits

STORIES = Path(rejected.__file__).with_suffix(".txt")


@pytest.mark.parametrize("name", OURS)
def test_no_order_of_steps_and_faults_breaks_an_invariant_or_leads_nowhere(name: str) -> None:
    searched = search(OURS[name]())
    assert searched.against is None, f"\n{searched.against}"
    assert searched.states > 3_000, "a search of so little shows nothing"


@pytest.mark.campaign
@pytest.mark.parametrize("name", LARGER)
def test_nor_does_it_in_larger_scopes(name: str) -> None:
    searched = search(LARGER[name](), most=20_000_000)
    print(f"{name}: {searched.states} states, {searched.steps} steps")
    assert searched.against is None, f"\n{searched.against}"


@pytest.mark.parametrize("design", REJECTED, ids=lambda one: f"{one.model.__name__}-{one.change}")
def test_a_rejected_design_breaks_the_invariant_that_it_was_rejected_for(design: Rejected) -> None:
    against = design.searched().against
    assert against is not None, "it is not rejected any more"
    assert against.invariant.startswith(design.invariant), f"\n{against}"
    if os.environ.get("UPDATE_DOCS") != "1":
        told = rejected.told(design, against)
        assert told in STORIES.read_text(encoding="utf-8"), f"UPDATE_DOCS=1 pytest tests/domain\n{told}"


def test_every_design_that_a_model_knows_is_listed() -> None:
    listed = {(one.model, one.change) for one in REJECTED}
    known = {
        (model, field.name)
        for model in (Launches, Stops, Submits, Leases)
        for field in fields(model)
        if field.type in (bool, "bool")
    }
    assert listed == known


def test_the_stories_beside_the_code_are_those_of_the_designs_and_no_others() -> None:
    if os.environ.get("UPDATE_DOCS") == "1":
        stories = [rejected.told(design, design.searched().against) for design in REJECTED]
        STORIES.write_text("\n".join(stories), encoding="utf-8")
    told = [block.splitlines()[0] for block in STORIES.read_text(encoding="utf-8").split("\n\n")]
    assert told == [rejected.told(design, None).splitlines()[0] for design in REJECTED]


# -- the model is tied to the code: what the code decides is what is searched --------------------------------------


def test_a_code_that_believes_one_list_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "LISTS_THAT_AGREE", 1)
    against = search(Launches(tries=(2,))).against
    assert against is not None
    assert against.invariant.startswith("I3")


def test_a_code_that_takes_silence_for_gone_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def hasty(phase: Phase | None, *, known: bool, must_be_visible: bool) -> evidence.AfterLook:
        phase = Phase.GONE if phase is None else phase
        return evidence.after_look(phase, known=known, must_be_visible=must_be_visible)

    monkeypatch.setattr(stop, "after_look", hasty)
    against = search(Stops()).against
    assert against is not None
    assert against.invariant.startswith("I4")


def test_a_code_that_sees_no_difference_between_machines_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def blind(machine: object, reports: list[MachineReport], known: object, *, types: object) -> object:
        return list(reports), []

    monkeypatch.setattr(launch, "may_be_it", blind)
    launch._fitting.cache_clear()
    try:
        against = search(Launches(tries=(2,))).against
    finally:
        launch._fitting.cache_clear()
    assert against is not None


def test_a_code_without_its_fence_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "is_held_by", lambda *_: True)
    against = search(Submits()).against
    assert against is not None
    assert against.invariant.startswith(("I11", "I12"))


# -- what a model says of one state ---------------------------------------------------------------------------------


def test_a_machine_that_no_intent_tells_of_breaks_the_protocol_also_when_its_request_was_answered() -> None:
    def alone(shown: str) -> launch.State:
        return launch.State((launch.Process(at="done"),), servers=(launch.Server(0, shown),))

    assert Launches().broken(alone("ready")).startswith("I1")
    assert Launches().broken(alone("gone")) == ""


def test_a_launch_that_nobody_has_looked_after_is_not_the_end() -> None:
    asked = launch.State((launch.Process(at="done"),), rows=(launch.Row(owner=None),))
    assert not Launches().ended(asked)
    known = asked._replace(rows=(launch.Row(owner=None, state=MachineState.NEVER),))
    assert Launches().ended(known)


def test_the_machine_that_a_dead_process_left_is_ended_before_another_is_launched() -> None:
    left = launch.State(
        (launch.Process(at="locked"),),
        rows=(launch.Row(owner=None, state=MachineState.BOOTING, server=0),),
        servers=(launch.Server(0, "ready"),),
        lock=0,
        faults=0,
        strangers=0,
    )
    [ends] = Launches().steps(left)
    assert isinstance(ends.after, launch.State)
    assert ends.after.servers[0].shown == "gone"
    assert ends.after.rows[0].state is MachineState.STOPPED
    [launches] = Launches().steps(ends.after)
    assert launches.words == "A may launch"


def test_writing_the_intent_after_the_call_leaves_a_machine_unknown_only_until_it_is_written() -> None:
    late = Launches(intent_after_the_call=True)
    after = launch.State((launch.Process(at="sent unwritten", row=0),), sent=(0,), lock=0, faults=0, strangers=0)
    assert late.broken(after).startswith("I1")
    [written] = [step.after for step in late.steps(after) if step.words == "A writes the intent"]
    assert isinstance(written, launch.State)
    assert late.broken(written) == ""
    assert written.processes[0].at == "sends"


# -- the search itself ---------------------------------------------------------------------------------------------


class Counter(NamedTuple):
    """Counts to where it breaks, or ends."""

    breaks_at: int = 99
    ends_at: int = 5

    def start(self) -> int:
        return 0

    def broken(self, state: int) -> str:
        return "I0: it broke" if state == self.breaks_at else ""

    def ended(self, state: int) -> bool:
        return state == self.ends_at

    def steps(self, state: int) -> Iterator[Step]:
        if state != self.ends_at:
            yield Step("one", state + 1)
            yield Step("two", min(state + 2, self.ends_at), fault=True)


def test_the_story_is_a_shortest_one_and_marks_faults() -> None:
    against = search(Counter(breaks_at=4)).against
    assert against is not None
    assert against.story == ("! two", "! two")
    assert str(against).splitlines()[-1] == "     breaks I0: it broke"


def test_a_state_that_only_a_fault_leads_out_of_is_a_dead_end() -> None:
    class OnlyByFault(Counter):
        def steps(self, state: int) -> Iterator[Step]:
            if state < 5:
                yield Step("on", state + 1, fault=state == 3)

    against = search(OnlyByFault()).against
    assert against is not None
    assert against.invariant == NO_WAY_OUT
    assert against.story == ()


def test_a_state_without_any_step_is_a_dead_end() -> None:
    class Fork(Counter):
        def steps(self, state: int) -> Iterator[Step]:
            if state == 0:
                yield Step("to the end", self.ends_at)
                yield Step("astray", 1)

    against = search(Fork()).against
    assert against is not None
    assert (against.invariant, against.story) == (NO_WAY_OUT, ("astray",))


def test_what_is_too_large_proves_nothing() -> None:
    with pytest.raises(TooLarge):
        search(Counter(ends_at=1_000), most=10)
