"""
Each invariant broken on purpose: a simulation that stays green then proves nothing.

A switch wraps one port or one function of the product so that a promise is not kept, and tells the day what is to
happen so that it shows soon: who wants what, what goes wrong when. The same day without the break is green (`whole`).
What breaks is in words beside each; how is in `broken_machines.py` and `broken_jobs.py`.

I21 has none: services and clouds of a simulated day go by one clock, so no clock can jump. Its stories set clocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from runcomfy.testing.simulation import broken_jobs as jobs
from runcomfy.testing.simulation import broken_machines as machines
from runcomfy.testing.simulation import scenes
from runcomfy.testing.simulation.direction import Direction, direct

if TYPE_CHECKING:
    from runcomfy.testing.simulation.world import World

Break = Callable[["World"], AbstractContextManager[object]]


@dataclass(frozen=True, slots=True)
class Switch:
    """Breaks one invariant for the block in which it is entered, `with switch(world):`."""

    invariant: str
    words: str
    """What is done wrong."""
    breaks: Break
    scene: Direction
    seed: int = 1
    hours: float = 3.0

    def __call__(self, world: World) -> AbstractContextManager[object]:
        """Tell the day what is to happen, and break the invariant for the block."""
        return self._entered(world)

    @contextmanager
    def _entered(self, world: World) -> Iterator[None]:
        direct(world, self.scene)
        with self.breaks(world):
            yield

    def whole(self) -> Switch:
        """Return the same day with nothing broken."""
        return replace(self, words="nothing is broken", breaks=_nothing)


def _nothing(_: World) -> AbstractContextManager[object]:
    return nullcontext()


_ALL: Final[tuple[Switch, ...]] = (
    Switch("I1", "the launch intent is written after the launch", machines.intent_late, scenes.PLAIN),
    Switch("I2", "a launch that was not answered counts as nothing", machines.unheard_is_nothing, scenes.UNHEARD),
    Switch("I3", "a launch that was not answered is sent again at once", machines.launch_again, scenes.UNHEARD),
    Switch("I4", "a stop is believed when it is asked for", machines.stop_believed, scenes.DEAF_MACHINE),
    Switch("I5", "machines are paid ten hours ahead", machines.long_lease, scenes.PLAIN),
    Switch("I6", "budgets refuse nothing", machines.no_budget, scenes.BUDGET),
    Switch("I7", "what is in no row of ours is stopped", machines.stops_strangers, scenes.STRANGER),
    Switch("I8", "machines with jobs are ended", machines.stops_busy, scenes.PLAIN),
    Switch("I9", "a bill is closed at the planned stop of the launch", machines.bill_short, scenes.PLAIN),
    Switch("I10", "jobs are lost to those who were told that they are accepted", jobs.forgotten, scenes.PLAIN),
    Switch("I11", "results are published a second time under another name", jobs.published_twice, scenes.PLAIN),
    Switch("I12", "a prompt is sent to a second machine, too", jobs.on_two_machines, scenes.BUSY),
    Switch(
        "I13", "a submit that was not answered is repeated without a look", jobs.submits_blindly, scenes.LOST_SUBMIT
    ),
    Switch("I14", "failures are tried again twelve times too often", jobs.tries_too_often, scenes.FAILING),
    Switch("I15", "results are taken as they come", jobs.takes_anything, scenes.CORRUPT),
    Switch("I16", "keys of clients are ignored", jobs.ignores_keys, scenes.SAME_KEY),
    Switch("I17", "a cancel is answered and forgotten", jobs.forgets_cancels, scenes.CANCELLED),
    Switch("I18", "only the socket is believed", jobs.never_polls, scenes.SILENT_SOCKET),
    Switch("I19", "everybody gets the role", machines.role_for_all, scenes.TWO_SERVICES),
    Switch("I20", "jobs of dead processes are not taken back", jobs.never_reaps, scenes.KILLED),
    Switch("I22", "Retry-After is not read", machines.no_retry_after, scenes.TOO_MANY),
    Switch("I23", "a machine is launched although its intent could not be written", machines.disk_ignored, scenes.FULL),
    Switch("I24", "the token is said", machines.says_token, scenes.PLAIN),
    Switch("I25", "one job is passed over for ever", jobs.passes_one_over, scenes.PLAIN),
)

SWITCHES: Final[dict[str, Switch]] = {switch.invariant: switch for switch in _ALL}
