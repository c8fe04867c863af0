"""
The search: breadth first through everything that can happen, so that the first story found is a shortest one.

Besides states that break an invariant it finds dead ends: states from which, with no further fault, the end is never
reached. What a model leaves out is for its own module to say.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

S = TypeVar("S", bound=Hashable)

NO_WAY_OUT = "I20 I25"
"""Named where nothing is broken yet, and yet no step without a fault leads to the end."""


class Step(NamedTuple):
    """One thing that can happen in a state."""

    words: str
    after: Hashable
    fault: bool = False


class Model(Protocol[S]):
    """What can happen, and what must not."""

    def start(self) -> S:
        """Return the state it begins in."""
        ...

    def steps(self, state: S) -> Iterable[Step]:
        """Return everything that can happen next."""
        ...

    def broken(self, state: S) -> str:
        """Return the invariant that a state breaks; empty if none."""
        ...

    def ended(self, state: S) -> bool:
        """Whether everything has come to its end: nothing of it waits, runs or bills unseen."""
        ...


@dataclass(frozen=True, slots=True)
class Counterexample:
    """How it goes wrong."""

    invariant: str
    story: tuple[str, ...]

    def __str__(self) -> str:
        """Return the story with its steps numbered; a fault is marked by an exclamation mark."""
        lines = [f"{number:3}. {words}" for number, words in enumerate(self.story, 1)]
        return "\n".join([*lines, f"     breaks {self.invariant}"])


@dataclass(frozen=True, slots=True)
class Searched:
    """What a search found."""

    states: int
    steps: int
    against: Counterexample | None


class TooLarge(Exception):
    """The model has more states than the search may look at: it proves nothing."""


def search(model: Model[S], *, most: int = 2_000_000) -> Searched:
    """Look at every state that can be reached; stop at the first that breaks an invariant.

    Raises TooLarge.
    """
    first = model.start()
    numbers: dict[S, int] = {first: 0}
    came: list[tuple[int, str]] = [(-1, "")]
    before: list[list[int]] = [[]]
    """Of each state: those from which a step that is no fault leads to it."""
    ends: list[int] = []
    waiting: deque[S] = deque([first])
    steps = 0

    def story(number: int) -> tuple[str, ...]:
        words: list[str] = []
        while number > 0:
            number, said = came[number]
            words.append(said)
        return tuple(reversed(words))

    while waiting:
        state = waiting.popleft()
        here = numbers[state]
        if invariant := model.broken(state):
            return Searched(len(numbers), steps, Counterexample(invariant, story(here)))
        if model.ended(state):
            ends.append(here)
        for words, reached, fault in model.steps(state):
            steps += 1
            after: S = reached  # type: ignore[assignment]  # a tuple cannot be generic in Python 3.11's NamedTuple
            number = numbers.get(after)
            if number is None:
                number = numbers[after] = len(came)
                if number >= most:
                    raise TooLarge(f"more than {most} states")
                came.append((here, f"! {words}" if fault else words))
                before.append([])
                waiting.append(after)
            if not fault:
                before[number].append(here)
    stuck = _first_without(ends, before)
    dead_end = None if stuck is None else Counterexample(NO_WAY_OUT, story(stuck))
    return Searched(len(numbers), steps, dead_end)


def _first_without(ends: list[int], before: list[list[int]]) -> int | None:
    """Return the first state from which none of the ends can be reached."""
    lead = [False] * len(before)
    waiting = deque(ends)
    for end in ends:
        lead[end] = True
    while waiting:
        for number in before[waiting.popleft()]:
            if not lead[number]:
                lead[number] = True
                waiting.append(number)
    return next((number for number, leads in enumerate(lead) if not leads), None)
