"""Each invariant broken on purpose turns a simulated day red, with that invariant alone; unbroken it is green."""

from __future__ import annotations

from datetime import timedelta

import pytest

from runcomfy.testing.simulation.run import Day, simulate
from runcomfy.testing.simulation.switches import SWITCHES, Switch

IN_THE_GATE = ("I3", "I17", "I20")
"""One of machines, one of clients, one of deaths; the others only at night: each costs a second or two.

I20's day unbroken once never ended: a job whose prompt waited at a machine that drained was claimed and taken back for
ever, before anybody had looked for the prompt.
"""
JUDGED_ELSEWHERE = {"I21"}


def _lived(monkeypatch: pytest.MonkeyPatch, switch: Switch) -> Day:
    monkeypatch.setitem(SWITCHES, "tried", switch)
    return simulate(switch.seed, length=timedelta(hours=switch.hours), broken="tried")


def _all() -> list[object]:
    return [name if name in IN_THE_GATE else pytest.param(name, marks=pytest.mark.campaign) for name in SWITCHES]


def test_every_invariant_that_a_day_judges_has_its_switch() -> None:
    every = {f"I{number}" for number in range(1, 26)}
    assert set(SWITCHES) == every - JUDGED_ELSEWHERE
    assert all(switch.invariant == name for name, switch in SWITCHES.items())
    assert all(switch.words for switch in SWITCHES.values())


@pytest.mark.parametrize("name", _all())
def test_a_broken_invariant_turns_the_day_red_with_just_that(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    day = _lived(monkeypatch, SWITCHES[name])
    assert {violation.invariant for violation in day.violations} == {name}, [str(each) for each in day.violations]


@pytest.mark.parametrize("name", _all())
def test_the_same_day_is_green_with_nothing_broken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    day = _lived(monkeypatch, SWITCHES[name].whole())
    assert day.violations == [], [str(each) for each in day.violations]
    assert day.jobs
