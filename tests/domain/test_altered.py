"""The quick `replace` does what that of `dataclasses` does, or refuses."""

from __future__ import annotations

import dataclasses
import pickle
from dataclasses import dataclass, field
from typing import Any

import pytest

from runcomfy.application.live import LiveJob
from runcomfy.domain.altered import replace
from runcomfy.domain.progress import Progress
from runcomfy.domain.progress_fold import Evidence, Health, Run, WatchState
from runcomfy.domain.timeline import NodeTime, Timeline


@pytest.mark.parametrize("kind", [Progress, Run, Evidence, Health, WatchState, Timeline, NodeTime, LiveJob])
def test_it_does_what_that_of_dataclasses_does(kind: type[Any]) -> None:
    """For every class of the way of a message, and every one of its fields."""
    names = [one.name for one in dataclasses.fields(kind)]
    value = kind(**{name: f"a {name}" for name in names})
    assert replace(value) == value
    for name in names:
        altered = replace(value, **{name: "another"})
        assert altered == dataclasses.replace(value, **{name: "another"})
        assert getattr(altered, name) == "another"
        assert getattr(value, name) == f"a {name}"
    every = {name: number for number, name in enumerate(names)}
    assert replace(value, **every) == kind(**every)


def test_what_it_makes_is_a_value_like_any_other() -> None:
    made = replace(Health(), heard=True)
    assert hash(made) == hash(Health(heard=True))
    assert pickle.loads(pickle.dumps(made)) == made  # noqa: S301 - our own
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.heard = False  # type: ignore[misc]


def test_a_field_that_is_none_is_refused() -> None:
    with pytest.raises(TypeError, match="Health has no field 'heared'"):
        replace(Health(), heared=True)  # type: ignore[call-arg]


@dataclass(frozen=True, slots=True)
class Checked:
    number: int

    def __post_init__(self) -> None:
        assert self.number > 0


@dataclass(frozen=True)
class Open:
    number: int


@dataclass(frozen=True, slots=True)
class Counting:
    number: int
    made: int = field(default=0, init=False)


@dataclass(frozen=True, slots=True)
class Loose(Open):
    other: int = 0


@pytest.mark.parametrize("value", [Checked(1), Open(1), Counting(1), Loose(1)])
def test_a_class_whose_values_are_more_than_their_slots_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="not a dataclass of slots alone"):
        replace(value, number=2)
