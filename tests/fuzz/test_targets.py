"""
Every reader of what comes from outside, on inputs changed by chance: an error of ours or a sound result, in time.

The campaign (`make fuzz`) does the same under coverage guidance, a million times.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.fuzzing import running
from benchmarks.fuzzing.all_targets import TARGETS, beginnings
from benchmarks.fuzzing.mutate import mutated
from benchmarks.fuzzing.target import limited

EXAMPLES = 2_000 if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else 100


@pytest.fixture(autouse=True, scope="module")
def _loop_closed() -> Iterator[None]:
    yield
    running.close()


@cache
def _beginnings(name: str) -> list[tuple[str, bytes]]:
    return beginnings(TARGETS[name])


@pytest.mark.fault(48)
@pytest.mark.parametrize("name", TARGETS)
def test_nothing_from_outside_breaks_its_reader(name: str) -> None:
    target = TARGETS[name]

    for _, data in _beginnings(name):
        with limited():
            target.run(data)

    @settings(max_examples=EXAMPLES, database=None)
    @given(st.integers(0, 2**48))
    def changed(number: int) -> None:
        chance = random.Random(number)
        data = chance.choice(_beginnings(name))[1]
        for _ in range(1 + number % 2):
            data = mutated(data, chance, is_json=target.is_json, words=target.words, max_bytes=target.max_bytes)
        try:
            with limited():
                target.run(data)
        except BaseException as error:
            error.add_note(f"{name}: {data!r}")
            raise

    changed()


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_has_something_to_begin_with(name: str) -> None:
    assert TARGETS[name].share > 0
    assert any(data for _, data in _beginnings(name))
