"""What can go wrong in a simulated day: it is in the catalogue, it strikes, it ends by itself."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import closing
from datetime import timedelta
from typing import TypeVar

import pytest

from runcomfy.testing.clock import START
from runcomfy.testing.simulation.faults import EVERY, FAULTS, Fault
from runcomfy.testing.simulation.harm import harm_of
from runcomfy.testing.simulation.load import KINDS, number_of, orders
from runcomfy.testing.simulation.loop import MemoryLoop
from runcomfy.testing.simulation.seeded import seeded
from runcomfy.testing.simulation.world import World

T = TypeVar("T")


def within(story: Callable[[World], Awaitable[T]], *, seed: int = 1, hours: float = 2.0) -> T:
    """Tell a story in a world of its own."""
    loop = MemoryLoop()
    asyncio.set_event_loop(loop)

    async def told() -> T:
        async with World(seed, loop, length=timedelta(hours=hours)) as world:
            return await story(world)

    try:
        with seeded(seed, now=loop.time, began=START.timestamp()):
            return loop.run_until_complete(told())
    finally:
        asyncio.set_event_loop(None)
        loop.close()


def test_every_fault_has_rows_of_the_catalogue_and_words() -> None:
    for fault in FAULTS:
        assert fault.words.endswith("."), fault.name
        assert fault.weight > 0
        assert fault.numbers
        assert all(1 <= number <= 74 for number in fault.numbers)
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    assert len({number for fault in FAULTS for number in fault.numbers}) >= 45


def test_there_are_720_of_them_in_a_day_that_ends_calmly() -> None:
    assert pytest.approx(720) == 21 * 3_600 / EVERY


def test_the_jobs_of_a_day_are_the_seeds_alone() -> None:
    def of(seed: int) -> list[tuple[object, ...]]:
        with closing(MemoryLoop()) as loop:
            draw = World(seed, loop).stream("load")
        return [(o.at, o.kind.name, o.seconds, o.user, o.key, o.cancel_after) for o in orders(draw, 75_600.0)]

    assert of(3) == of(3)
    assert of(3) != of(4)
    kinds = Counter(each[1] for seed in range(40) for each in of(seed))
    assert set(kinds) == {kind.name for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_graph_says_which_job_it_belongs_to(kind: object) -> None:
    assert number_of(kind.graph(17, 30.0)) == 17  # type: ignore[attr-defined]
    assert number_of({"1": {"class_type": "SaveImage", "inputs": {"filename_prefix": "by-hand"}}}) is None


def test_what_was_armed_for_calls_is_taken_back_when_nobody_calls() -> None:
    async def story(world: World) -> tuple[int, int]:
        harm = harm_of(world)
        armed = [fault for fault in FAULTS if fault.name in ("launch unheard", "launch error", "too many", "no stock")]
        for fault in armed:
            await fault.deal(harm)
        before = len(world.cloud._faults._faults)
        await asyncio.sleep(1_000)
        return before, len(world.cloud._faults._faults)

    assert within(story) == (4, 0)


def test_calm_ends_everything_that_lasts() -> None:
    async def story(world: World) -> tuple[bool, object, object, list[object]]:
        harm = harm_of(world)
        served = await world.start_service()
        by_name = {fault.name: fault for fault in FAULTS}
        for name in ("store locked", "sleeps", "list paged", "token refused", "late machine", "provider down"):
            await by_name[name].deal(harm)
        assert not served.app.awake.is_set()
        await harm.calm()
        return (
            served.app.awake.is_set(),
            served.app.visit("before store.change"),
            world.cloud.page_size,
            [*world.cloud._faults._faults, *world.cloud._next_traits, *world.cloud._revoked],
        )

    assert within(story) == (True, None, None, [])


def _deals_alone(fault: Fault) -> bool:
    return fault.needs is Fault.__dataclass_fields__["needs"].default


@pytest.mark.parametrize("fault", [f for f in FAULTS if _deals_alone(f)], ids=lambda fault: fault.name)
def test_a_blow_is_written_down_and_told(fault: Fault) -> None:
    async def story(world: World) -> tuple[list[int], list[str]]:
        harm = harm_of(world)
        if fault.name == "guard killed":
            await world.start_guard()
        await fault.deal(harm)
        told = [line.sentence for line in world.trace.lines if line.who == "fault"]
        numbers = [blow.number for blow in harm.blows]
        await harm.calm()
        return numbers, told

    numbers, told = within(story)
    assert numbers
    assert set(numbers) <= set(fault.numbers)
    assert told


def test_machines_and_servers_are_hit_only_where_there_are_some() -> None:
    async def story(world: World) -> list[object]:
        harm = harm_of(world)
        return [harm.machines(), harm.ready(), harm.comfyuis(), harm.serving()]

    assert within(story) == [[], [], [], []]
