"""
Designs that were thought of and rejected, each one change away from ours, and why we thought somebody may want it.

`REJECTED` names the model, the change, and the invariant that breaks; `rejected.txt` beside this file tells the
shortest story of each. A design is accepted again when its story is not found any more: the tests say so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from runcomfy.domain.protocol.launch import Launches
from runcomfy.domain.protocol.lease import Leases
from runcomfy.domain.protocol.search import Counterexample, Searched, search
from runcomfy.domain.protocol.stop import Stops
from runcomfy.domain.protocol.submit import Submits

OURS: Final[dict[str, Callable[[], Any]]] = {
    "launch, two tries beside a stranger": lambda: Launches(tries=(2,), strangers=1),
    "launch, two processes": lambda: Launches(tries=(1, 1), strangers=0),
    "stop": Stops,
    "submit": Submits,
    "lease": Leases,
}
"""The protocol as it is, in the scopes that every check searches."""

LARGER: Final[dict[str, Callable[[], Any]]] = {
    "launch, three tries beside a stranger, three faults": lambda: Launches(tries=(3,), faults=3, strangers=1),
    "launch, two processes beside a stranger": lambda: Launches(tries=(1, 1), strangers=1),
    "launch, two processes, one of them twice": lambda: Launches(tries=(2, 1), strangers=0),
    "stop, six faults": lambda: Stops(faults=6),
    "submit, four faults": lambda: Submits(faults=4),
    "lease, four minutes": lambda: Leases(horizon=4),
}
"""Larger scopes, which take minutes."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A design, and what it breaks."""

    model: Callable[..., Any]
    change: str
    invariant: str
    """How the invariant's name begins."""
    scope: tuple[tuple[str, Any], ...] = ()

    def searched(self) -> Searched:
        """Search the design."""
        return search(self.model(**dict(self.scope), **{self.change: True}))


_ALONE: Final = (("tries", (2,)), ("strangers", 1))
_TWO: Final = (("tries", (1, 1)), ("strangers", 0))

REJECTED: Final = (
    Rejected(Launches, "intent_after_the_call", "I1", _ALONE),
    Rejected(Launches, "retries_without_looking", "I3", _ALONE),
    Rejected(Launches, "does_not_wait_for_the_window", "I3", _ALONE),
    Rejected(Launches, "counts_early_lists", "I3", _ALONE),
    Rejected(Launches, "believes_one_list", "I3", _ALONE),
    Rejected(Launches, "notes_nothing_before", "I7", _ALONE),
    Rejected(Launches, "takes_what_is_near", "I7", _ALONE),
    Rejected(Launches, "launches_without_the_lock", "I2", _TWO),
    Rejected(Launches, "forgets_what_others_left", "I2", _TWO),
    Rejected(Stops, "believes_404", "I4"),
    Rejected(Stops, "believes_its_status", "I4"),
    Rejected(Stops, "believes_one_list", "I4"),
    Rejected(Stops, "takes_a_failed_list_for_empty", "I4"),
    Rejected(Stops, "believes_a_yes", "I4"),
    Rejected(Stops, "keeps_the_bill_closed", "I4 I9"),
    Rejected(Stops, "gives_up", "I20 I25"),
    Rejected(Stops, "needs_the_disk", "I20 I25"),
    Rejected(Stops, "asks_no_fence", "I7 I8"),
    Rejected(Stops, "wishes_once", "I7 I8"),
    Rejected(Stops, "stops_what_it_cannot_write", "I7 I8"),
    Rejected(Submits, "sends_again_without_looking", "I13"),
    Rejected(Submits, "believes_one_miss", "I13"),
    Rejected(Submits, "reads_the_history_first", "I13"),
    Rejected(Submits, "takes_a_new_name_each_time", "I12"),
    Rejected(Submits, "takes_no_answer_for_a_miss", "I12"),
    Rejected(Submits, "writes_after_sending", "I12"),
    Rejected(Submits, "sends_without_a_fence", "I12"),
    Rejected(Submits, "commits_without_a_fence", "I11"),
    Rejected(Leases, "believes_what_it_asked_for", "I5"),
    Rejected(Leases, "adds_to_what_is_left", "I5"),
    Rejected(Leases, "renews_without_the_role", "I5"),
    Rejected(Leases, "counts_from_the_answer", "I19"),
    Rejected(Leases, "decides_without_an_epoch", "I19"),
    Rejected(Leases, "keeps_its_epoch_for_the_next", "I19"),
)


def told(rejected: Rejected, against: Counterexample | None) -> str:
    """Return how a design goes wrong, as `rejected.txt` tells it."""
    name = rejected.model.__name__.lower()
    return f"{name}: {rejected.change.replace('_', ' ')}\n{against or 'is not rejected any more'}\n"
