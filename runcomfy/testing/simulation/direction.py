"""
A day that is told what is to happen, instead of drawing it: for showing one thing soon.

`direct(world, Direction(...))` before the day begins; `feed` and `harass` go by it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from runcomfy.testing.simulation.load import Order
    from runcomfy.testing.simulation.world import World

Happening = Callable[["World"], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Direction:
    """What is wanted and what goes wrong, and when: seconds of the day."""

    orders: Callable[[], list[Order]]
    happens: tuple[tuple[float, Happening], ...] = ()
    """In order of time."""


_directed: WeakKeyDictionary[World, Direction] = WeakKeyDictionary()


def direct(world: World, direction: Direction) -> None:
    """Have this happen in the world, and nothing else."""
    _directed[world] = direction


def direction_of(world: World) -> Direction | None:
    """Return what was told of a world; None: it draws."""
    return _directed.get(world)
