"""
What goes wrong in a simulated day: one blow every two minutes on average, drawn by weight from `FAULTS`.

A fault names its rows of the catalogue (`docs/reliability.md`), what it is in words, and whom it needs: one that has
nobody to hit at the moment is not drawn. What a blow leaves behind ends by itself, and with the calm at the latest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from runcomfy.testing.simulation import faults_comfyui as c
from runcomfy.testing.simulation import faults_programs as o
from runcomfy.testing.simulation import faults_provider as p
from runcomfy.testing.simulation.direction import direction_of
from runcomfy.testing.simulation.harm import Harm, harm_of

if TYPE_CHECKING:
    from runcomfy.testing.simulation.world import World

EVERY: Final = 105.0
"""Seconds between two blows on average: 720 in the 21 hours of a day that are not calm."""
SPAN: Final = timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that can go wrong."""

    numbers: tuple[int, ...]
    """Rows of the catalogue."""
    deal: Callable[[Harm], Awaitable[None]]
    weight: float = 1.0
    needs: Callable[[Harm], object] = lambda harm: True
    """Whether there is anybody to hit."""

    @property
    def name(self) -> str:
        """What it is called in tables."""
        return self.deal.__name__.replace("_", " ")

    @property
    def words(self) -> str:
        """What it does, in a sentence."""
        return (self.deal.__doc__ or "").split("\n")[0]


def _computing(harm: Harm) -> object:
    return harm.comfyuis(busy=True)


def _two_at_most(harm: Harm) -> bool:
    return len(harm.world.served) == 1


FAULTS: Final[tuple[Fault, ...]] = (
    # the cloud
    Fault((4, 6), p.launch_unheard, 3),
    Fault((5,), p.launch_error, 2),
    Fault((8,), p.launch_in_vain, 1),
    Fault((4,), p.launch_late, 1),
    Fault((7,), p.launch_same_id, 0.5, Harm.machines),
    Fault((27,), p.no_stock, 1),
    Fault((31, 32, 74), p.call_unheard, 6),
    Fault((31,), p.call_error, 6),
    Fault((25,), p.too_many, 4),
    Fault((26,), p.token_refused, 0.5),
    Fault((29, 74), p.provider_down, 0.5),
    Fault((31,), p.slow_answers, 2),
    Fault((11,), p.list_empty, 3),
    Fault((10,), p.list_paged, 2),
    Fault((13,), p.strange_words, 2, Harm.machines),
    Fault((11,), p.unlisted, 2, Harm.machines),
    Fault((9,), p.late_machine, 2),
    Fault((14, 15), p.bad_start, 2),
    Fault((16,), p.flapping, 1.5, Harm.ready),
    Fault((19,), p.ignores_stop, 2, Harm.machines),
    Fault((18, 20, 21), p.stop_fails, 2),
    Fault((23,), p.ignores_lease, 1.5, Harm.machines),
    Fault((24,), p.longer_fails, 3),
    Fault((22,), p.crash, 1, Harm.ready),
    Fault((68,), p.deleted_by_hand, 1, Harm.machines),
    Fault((12,), p.foreign_machine, 1),
    # ComfyUI
    Fault((34,), c.submit_unheard, 4, Harm.comfyuis),
    Fault((35,), c.submit_twice, 2, Harm.comfyuis),
    Fault((37,), c.prompt_vanishes, 2, Harm.comfyuis),
    Fault((42,), c.no_outputs, 1.5, Harm.comfyuis),
    Fault((41,), c.gpu_fails, 1.5, Harm.comfyuis),
    Fault((39, 40), c.stuck, 2, _computing),
    Fault((73,), c.slow_gpu, 1, Harm.comfyuis),
    Fault((43,), c.late_history, 1, Harm.comfyuis),
    Fault((69,), c.by_hand, 1.5, Harm.comfyuis),
    Fault((31, 48, 74), c.bad_read, 5, Harm.comfyuis),
    Fault((37,), c.empty_queue_answer, 2, _computing),
    Fault((49,), c.cut_result, 3, Harm.comfyuis),
    Fault((50,), c.page_for_result, 1.5, Harm.comfyuis),
    Fault((51, 52), c.corrupt_result, 2, Harm.comfyuis),
    Fault((44, 45, 46, 47), c.bad_socket, 5, Harm.comfyuis),
    Fault((48,), c.bad_frame, 2, Harm.comfyuis),
    Fault((38,), c.restart, 2, Harm.comfyuis),
    Fault((45,), c.hang, 2, Harm.comfyuis),
    Fault((39,), c.worker_dies, 0.5, Harm.comfyuis),
    # our own programs
    Fault((61,), o.killed_now, 2, Harm.serving),
    Fault((1, 2, 3), o.killed_at_call, 4, Harm.serving),
    Fault((62, 64), o.sleeps, 2, Harm.serving),
    Fault((63,), o.second_service, 0.7, _two_at_most),
    Fault((61,), o.stopped_politely, 0.3, Harm.serving),
    Fault((61,), o.guard_killed, 1),
    Fault((55,), o.store_locked, 2, Harm.serving),
    Fault((54,), o.store_full, 1.5, Harm.serving),
    Fault((55,), o.store_unheard, 2, Harm.serving),
)


async def harass(
    world: World, *, faults: Sequence[Fault] = FAULTS, every: float = EVERY, until: float | None = None
) -> None:
    """Let things go wrong until second `until` (the calm), on average every so many seconds; then end their effects."""
    harm = harm_of(world)
    end = world.calm_at if until is None else until
    told = direction_of(world)
    for at, happen in told.happens if told is not None else ():
        await asyncio.sleep(max(0.0, at - world.seconds))
        world.tally.faults += 1
        await happen(world)
    while told is None:
        wait = harm.draw.expovariate(1 / every)
        if world.seconds + wait >= end:
            break
        await asyncio.sleep(wait)
        able = [fault for fault in faults if fault.needs(harm)]
        if not able:
            continue
        fault = harm.draw.choices(able, [each.weight for each in able])[0]
        harm.reached[fault.name] += 1
        world.tally.faults += 1
        await fault.deal(harm)
    await asyncio.sleep(max(0.0, end - world.seconds))
    await harm.calm()
    world.trace.tell("world", "from here on nothing goes wrong")
