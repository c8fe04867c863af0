"""How many machines a rate deserves; the special functions are held against published values."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runcomfy.domain.list_schedule import Waiting
from runcomfy.domain.staffing import Staffing, erlang_c, gamma_p, gamma_quantile, normal_quantile

TEAM = Staffing(rate=0.05, seen=50, service_s=30, service_cv2=0.6, usd_per_hour=1.75, wait_usd_per_hour=8.75, group=1.0)


@pytest.mark.parametrize(
    ("machines", "load", "waits"),
    [
        (1, 0.5, 0.5),  # one server: the load
        (2, 1.0, 1 / 3),  # two: 2 rho^2 / (1 + rho)
        (10, 8.0, 0.4092),  # tables of Erlang's C formula
        (3, 2.0, 4 / 9),
        (5, 0.0, 0.0),
        (2, 2.0, 1.0),
    ],
)
def test_erlangs_formula(machines: int, load: float, waits: float) -> None:
    assert erlang_c(machines, load) == pytest.approx(waits, abs=5e-5)


def test_large_systems_are_told_by_the_limit_law() -> None:
    for load, machines in ((199.9, 210), (199.9, 220)):
        assert erlang_c(machines, load + 0.2) == pytest.approx(erlang_c(machines, load), abs=0.015)


@pytest.mark.parametrize(
    ("shape", "x", "share"),
    [(1, 1, 1 - math.exp(-1)), (2, 2, 1 - 3 * math.exp(-2)), (0.5, 0.5, math.erf(math.sqrt(0.5))), (3, 10, 0.9972306)],
)
def test_the_incomplete_gamma_function(shape: float, x: float, share: float) -> None:
    assert gamma_p(shape, x) == pytest.approx(share, abs=1e-7)


def test_quantiles_of_the_normal_law() -> None:
    assert normal_quantile(0.975) == pytest.approx(1.959964, abs=1e-6)
    assert normal_quantile(0.5) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("shape", "share", "x"), [(1, 0.5, math.log(2)), (2, 0.95, 4.743865), (5, 0.1, 2.432591)])
def test_quantiles_of_the_gamma_law(shape: float, share: float, x: float) -> None:
    assert gamma_quantile(shape, share) == pytest.approx(x, abs=1e-5)


@given(st.floats(0.3, 400), st.floats(0.02, 0.98))
def test_a_gamma_quantile_has_its_share_below_it(shape: float, share: float) -> None:
    assert gamma_p(shape, gamma_quantile(shape, share)) == pytest.approx(share, abs=1e-3)


def test_more_is_deserved_where_more_comes_or_waiting_is_dearer() -> None:
    assert TEAM.best(1, 50) < replace(TEAM, rate=0.2).best(1, 50)
    assert replace(TEAM, wait_usd_per_hour=1.75).best(1, 50) <= TEAM.best(1, 50)
    assert TEAM.best(1, 50) <= replace(TEAM, wait_usd_per_hour=35).best(1, 50)


def test_jobs_that_come_together_deserve_machines_together() -> None:
    calm = replace(TEAM, rate=0.02, wait_usd_per_hour=35)
    assert calm.best(1, 20) < replace(calm, group=4.0).best(1, 20)


def test_people_who_wait_for_each_other_need_fewer_machines() -> None:
    busy = replace(TEAM, rate=0.03, wait_usd_per_hour=35)
    assert replace(busy, overlap=0.1).best(1, 20) < busy.best(1, 20) <= replace(busy, overlap=2.0).best(1, 20)


def test_nothing_comes_nothing_is_deserved() -> None:
    idle = replace(TEAM, rate=0.0)
    assert idle.queue(1) == 0
    assert idle.best(1, 10) == 1
    assert idle.fewest(7) == 1


@given(st.floats(0.001, 2), st.integers(0, 500), st.floats(1, 200), st.floats(0, 3), st.integers(1, 40))
def test_the_queue_is_shorter_with_more_machines(
    rate: float, seen: int, service_s: float, cv2: float, machines: int
) -> None:
    staffing = replace(TEAM, rate=rate, seen=seen, service_s=service_s, service_cv2=cv2)
    assert staffing.queue(machines) >= staffing.queue(machines + 1) - 1e-9
    assert staffing.queue(machines) >= 0


@given(st.floats(0.001, 1), st.floats(1, 100), st.integers(1, 20), st.integers(0, 20))
def test_what_is_found_is_no_dearer_than_where_it_began(rate: float, service_s: float, near: int, more: int) -> None:
    staffing = replace(TEAM, rate=rate, service_s=service_s)
    best, fewest = staffing.best(near, near + more), staffing.fewest(near)
    assert near <= best <= near + more
    assert 1 <= fewest <= near
    assert staffing.cost(best) <= staffing.cost(near)
    assert staffing.cost(fewest) <= staffing.cost(near)


@given(st.lists(st.floats(0, 300), min_size=1, max_size=12), st.integers(1, 40), st.floats(1, 60), st.integers(0, 5))
def test_waiting_jobs_go_to_the_machine_that_is_free_first(
    free: list[float], count: int, service_s: float, extra: int
) -> None:
    machines, total = sorted([*free, *[210.0] * extra]), 0.0
    for _ in range(count):
        machines.sort()
        total += machines[0]
        machines[0] += service_s
    assert Waiting(free, count, service_s).total(extra, 210.0) == pytest.approx(total)


@given(st.lists(st.floats(0, 300), min_size=1, max_size=8), st.integers(100, 400), st.floats(5, 60))
def test_many_jobs_are_poured_and_nearly_as_exact(free: list[float], count: int, service_s: float) -> None:
    machines, total = list(free), 0.0
    for _ in range(count):
        machines.sort()
        total += machines[0]
        machines[0] += service_s
    assert Waiting(free, count, service_s).total() == pytest.approx(total, rel=0.03, abs=count * service_s)


def test_without_machines_jobs_wait_for_ever_and_one_is_always_worth_it() -> None:
    waiting = Waiting([], 3, 30)
    assert waiting.total() == math.inf
    assert waiting.best_extra(5, 210, 1e12) == 1
    assert waiting.best_extra(0, 210, 0) == 0
    assert Waiting([], 0, 30).total() == 0
