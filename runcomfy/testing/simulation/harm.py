"""
What is wrong at the moment in a simulated day, and since when: what every blow leaves behind ends by itself.

Blows tell it whom they hit, so that an oracle can tell what was done to a machine from what was done by us.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.emulators.runcomfy.faults import CallFault
from runcomfy.testing.emulators.runcomfy.machines import EmulatedMachine, Stage

if TYPE_CHECKING:
    from runcomfy.testing.serving import Served
    from runcomfy.testing.simulation.world import World

Undo = Callable[[], Any]


@dataclass(slots=True)
class Blow:
    """Something that went wrong."""

    number: int
    """In the catalogue of faults."""
    words: str
    at: float
    """Second of the day."""
    until: float
    """When its direct effects end at the latest."""
    machine: str | None = None
    """The provider's id of the machine it hit; None: not one machine."""


class Harm:
    """Everything that goes wrong in one world. `harm_of(world)` returns it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.draw: Random = world.stream("faults")
        self.blows: list[Blow] = []
        self._by_number: dict[int, list[Blow]] = {}
        self._sorted: list[Blow] = []
        """Those that are in it."""
        self.reached: Counter[str] = Counter()
        """How often each fault of the table struck."""
        self.woken: dict[int, float] = {}
        """Second at which a service (by `id`) woke up last."""
        self.by_hand: set[str] = set()
        """Prompts that a person began on our machines."""
        self.doubled: set[str] = set()
        """Machines whose server may have queued a prompt twice by itself."""
        self.empty_list: CallFault | None = None
        """The last list that was to be empty by mistake."""
        self.clock_set: list[float] = []
        """Seconds at which the computer's clock was set."""
        self.disturbed = False
        """Whether a blow of this moment is being dealt."""
        self._undone: dict[int, tuple[asyncio.TimerHandle, Undo]] = {}
        self._next = 0
        self._tasks: set[asyncio.Task[Any]] = set()

    # -- dealing blows -------------------------------------------------------------------------------------

    def note(self, number: int, words: str, *, lasts: float = 0.0, machine: str | None = None) -> None:
        """Write a blow down."""
        now = self.world.seconds
        self.blows.append(Blow(number, words, now, now + lasts, machine))
        self.world.trace.tell("fault", f"{number}: {words}", machine=machine)

    def later(self, seconds: float, undo: Undo) -> None:
        """Undo something so much later, or when calm begins."""
        self._next += 1
        number = self._next

        def now() -> None:
            del self._undone[number]
            undo()

        self._undone[number] = (self.world.loop.call_later(seconds, now), undo)

    def spawn(self, work: Any) -> None:
        """Do something in a task of its own."""
        task = self.world.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[Any]) -> None:
        """Keep what went wrong with a blow itself: a day in which half of one was dealt has shown nothing."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.world.deaths.append(f"a blow failed with {type(error).__name__}: {error}")

    async def calm(self) -> None:
        """Let everything that lasts be over, and wait for what is being done."""
        for timer, undo in list(self._undone.values()):
            timer.cancel()
            undo()
        self._undone.clear()
        self.world.cloud.behave()
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    # -- whom to hit ---------------------------------------------------------------------------------------

    def machines(self) -> list[EmulatedMachine]:
        """Return our machines that exist."""
        return [m for m in self.world.cloud.machines.values() if not m.foreign and m.stage is not Stage.GONE]

    def ready(self) -> list[EmulatedMachine]:
        """Return our machines that are Ready and bill."""
        return [m for m in self.machines() if m.stage is Stage.READY]

    def comfyuis(self, *, busy: bool = False) -> list[tuple[EmulatedMachine, ComfyUIEmulator]]:
        """Return ComfyUI servers that live, with their machines; `busy`: that compute."""
        return [
            (machine, machine.comfyui)
            for machine in self.ready()
            if isinstance(machine.comfyui, ComfyUIEmulator)
            and machine.comfyui.alive
            and (not busy or machine.comfyui.process.current is not None)
        ]

    def serving(self) -> list[Served]:
        """Return services that run and are awake."""
        return [served for served in self.world.served if served.app.awake.is_set()]

    # -- asking afterwards ---------------------------------------------------------------------------------

    def between(self, start: float, end: float, *, machine: str | None = None) -> Iterator[Blow]:
        """Yield what was wrong in an interval: anywhere, or with that machine or with no single one."""
        for blow in self.blows:
            if blow.at <= end and blow.until >= start and (machine is None or blow.machine in (None, machine)):
                yield blow

    def any_of(self, numbers: Iterable[int], start: float, end: float) -> bool:
        """Return whether one of these kinds was wrong in an interval, anywhere."""
        sorted_in = len(self._sorted)
        if self.blows[sorted_in - 1 : sorted_in] != self._sorted[-1:]:
            self._by_number, self._sorted = {}, []  # some were taken away
        for blow in self.blows[len(self._sorted) :]:
            self._by_number.setdefault(blow.number, []).append(blow)
            self._sorted.append(blow)
        return any(
            blow.at <= end and blow.until >= start for number in numbers for blow in self._by_number.get(number, ())
        )

    def hit(self, machine: str, *, before: float, within: float) -> bool:
        """Return whether that machine itself was hit in the time before."""
        return any(b.machine == machine and b.at <= before and b.until >= before - within for b in self.blows)


def harm_of(world: World) -> Harm:
    """Return what is wrong in a world."""
    return world.own(Harm)
