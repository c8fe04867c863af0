"""
What the answers of a cloud and of a ComfyUI prove, and what they do not.

Both sides lie now and then: an answer is lost, a list is empty by mistake, something new is not shown yet. So one word
is never enough, and the rules for how many are stand here alone: the code that asks goes by them, and so does the
search through everything that can happen (`runcomfy.domain.protocol`), which shows that they suffice.

    launched    what an unanswered launch started (I3): the one machine that is new, unknown and of its kind
    gone        a machine is gone when its status and two full lists say so (I4)
    prompts     a prompt is not on a server when queue and history were missed twice in a row (I12, I13)

Nothing is asked here, and nothing waited for.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from enum import Enum, auto
from typing import Final

from runcomfy.domain.job import PromptId
from runcomfy.domain.machine import Machine, MachineReport, Phase, ServerId
from runcomfy.domain.progress_fold import Polled

LISTS_THAT_AGREE: Final = 2
"""Full lists in a row that must miss a machine: one may be empty by mistake."""
LOOKS_THAT_MISS: Final = 2
"""Searches in a row that must miss a prompt: what a dead process had sent may be read late."""


class Launched(Enum):
    """What is known of what an unanswered launch started."""

    TAKE = auto()
    """One machine, and it is ours."""
    NOTHING = auto()
    AMBIGUOUS = auto()
    """It cannot be told: reported, and no machine is touched."""
    LOOK_AGAIN = auto()


def same_type(one: str, other: str) -> bool:
    """Whether two names of machine types differ in their spelling alone."""
    return _plain(one) == _plain(other)


def _plain(server_type: str) -> str:
    """Return a type's name without what spellings differ in."""
    return "".join(letter for letter in server_type.casefold() if letter.isalnum())


def may_be_it(
    machine: Machine, reports: Sequence[MachineReport], known: Collection[ServerId], *, types: Collection[str]
) -> tuple[list[MachineReport], list[MachineReport]]:
    """Return the reports that may be what a launch started: new since it, not `known` as another, of the same kind.

    The second list has those that are new and of its type but differ otherwise: likely somebody else's, yet with them
    around it cannot be said that nothing was started.

    `types`: those with a price; one of another of them is somebody else's. What is not told contradicts nothing, and a
    type's name that nobody knows tells nothing: clouds rename things (fault 13).
    """
    others = {_plain(name) for name in types} - {_plain(machine.server_type)}
    new = [
        report
        for report in reports
        if report.server_id not in machine.before_ids
        and report.server_id not in known
        and report.server_id != machine.server_id
        and report.phase is not Phase.GONE
        and _plain(report.server_type) not in others
    ]
    exact = [
        report
        for report in new
        if report.addressable  # what cannot be asked about can be neither taken nor ended
        and report.duration in (None, machine.duration)
        and report.workflow_version_id in ("", machine.workflow_version_id)
    ]
    return exact, [report for report in new if report not in exact]


def what_was_started(exact: Sequence[MachineReport], near: Sequence[MachineReport], *, late_lists: int) -> Launched:
    """Judge the last list that was read, by what `may_be_it` says of it.

    `late_lists`: how many were read when everything that was started must have been visible, this one included. A
    machine that can bill is taken at once; one that starts only then, since a second one may still appear, and
    starting costs nothing.
    """
    if len(exact) == 1 and (late_lists or exact[0].phase is not Phase.STARTING):
        return Launched.TAKE
    if len(exact) > 1:
        return Launched.AMBIGUOUS
    if late_lists >= LISTS_THAT_AGREE and not exact:
        return Launched.AMBIGUOUS if near else Launched.NOTHING
    return Launched.LOOK_AGAIN


def entry_of(server_id: ServerId, listed: Sequence[MachineReport]) -> MachineReport | None:
    """Return what a full list says of a machine that is there; None if it is not, or is said to be gone."""
    return next((one for one in listed if one.server_id == server_id and one.phase is not Phase.GONE), None)


class AfterLook(Enum):
    """What a look at a machine means that is being stopped."""

    CLOSE = auto()
    """It is gone."""
    MISTAKEN = auto()
    """It never was: the launch may have been answered with an id that means nothing. Gone, unless another is found."""
    RUNS = auto()
    """It bills, whatever was said before."""
    WAIT = auto()


def after_look(phase: Phase | None, *, known: bool, must_be_visible: bool) -> AfterLook:
    """Judge where the provider says a machine is. None: it could not be found out, which is not "gone".

    `known`: whether the provider has ever shown it, or said yes to its stop.
    """
    if phase is Phase.GONE and known:
        return AfterLook.CLOSE
    if phase is Phase.GONE and must_be_visible:
        return AfterLook.MISTAKEN
    if phase in (Phase.READY, Phase.STARTING, Phase.FAILED):
        return AfterLook.RUNS
    return AfterLook.WAIT


class Whereabouts(Enum):
    """Where a prompt is, by one search."""

    HELD = auto()
    """It waits or runs."""
    ENDED = auto()
    MISSED = auto()
    """Neither in the queue nor, afterwards, in the history: it may still be on its way."""


def whereabouts(found: Polled, prompt_id: PromptId) -> Whereabouts:
    """Judge one search. The queue was read first: a prompt that ends in between is then in the history."""
    if found.history is not None:
        return Whereabouts.ENDED
    queue = found.queue
    if queue is not None and (prompt_id in queue.running or prompt_id in queue.pending):
        return Whereabouts.HELD
    return Whereabouts.MISSED


def needs_new_name(*, accepted: bool, unwanted: bool, lost: bool) -> bool:
    """Whether a prompt that is on no server any more may have run, so that what follows it is another one.

    One that never arrived is sent again under its id; so that is no second run, even if it arrives after all.
    """
    return accepted or unwanted or lost
