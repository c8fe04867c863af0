"""No schedule is below the bound: tried against every schedule there is, where that is possible."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runcomfy.domain.clairvoyant import (
    Span,
    bracket,
    bracket_s,
    cheapest_predecessors,
    longest_wait,
    zero_wait,
)
from runcomfy.domain.plan_view import OfferView

RHOS = (0.0, 0.5, 1.0, 1.3, 2.0, 5.0, 20.0)


def in_order(pairs: Sequence[tuple[int, int]]) -> list[Span]:
    return sorted((Span(float(at), float(seconds)) for at, seconds in pairs), key=lambda job: job.at)


def spans(most: int, *, until: int, longest: int) -> st.SearchStrategy[list[Span]]:
    job = st.tuples(st.integers(0, until), st.integers(1, longest))
    return st.lists(job, min_size=1, max_size=most).map(in_order)


def pairings(ends: Sequence[float], begins: Sequence[float], start_s: float) -> float:
    """Return starts and idle time, by trying every predecessor for every job."""

    def cheapest(number: int, taken: frozenset[int]) -> float:
        if number == len(begins):
            return 0.0
        best = start_s + cheapest(number + 1, taken)
        for i, end in enumerate(ends):
            if i not in taken and i != number and end <= begins[number]:
                idle = min(start_s, begins[number] - end)
                best = min(best, idle + cheapest(number + 1, taken | {i}))
        return best

    return cheapest(0, frozenset())


def cheapest_by_starting_times(jobs: Sequence[Span], start_s: float, rho: float, patience: int) -> float:
    """Return J of the best schedule, by trying every whole second at which every job could begin.

    Knows nothing of chains, of who waits for whom, or of when waiting pays.
    """
    best = math.inf
    for waits in itertools.product(range(patience + 1), repeat=len(jobs)):
        begins = [job.at + wait for job, wait in zip(jobs, waits, strict=True)]
        ends = [begin + job.service_s for begin, job in zip(begins, jobs, strict=True)]
        if rho * sum(waits) < best:
            best = min(best, rho * sum(waits) + pairings(ends, begins, start_s))
    return best + sum(job.service_s for job in jobs)


def chains(numbers: tuple[int, ...]) -> Iterator[list[tuple[int, ...]]]:
    """Return every way to put jobs on machines, in every order."""
    for order in itertools.permutations(numbers):
        for cuts in itertools.product((False, True), repeat=len(order) - 1):
            machines: list[tuple[int, ...]] = []
            begin = 0
            for position, cut in enumerate((*cuts, True), start=1):
                if cut:
                    machines.append(order[begin:position])
                    begin = position
            if list(machines) == sorted(machines):  # which machine is which says nothing
                yield machines


def cheapest_by_chains(jobs: Sequence[Span], start_s: float, rho: float) -> float:
    """Return J of the best schedule in which nobody waits for nothing, by trying every one; for rho >= 1."""
    best = math.inf
    for machines in chains(tuple(range(len(jobs)))):
        cost = 0.0
        for machine in machines:
            free = -math.inf
            for number in machine:
                begin = max(jobs[number].at, free)
                cost += rho * (begin - jobs[number].at) + min(start_s, begin - free)
                free = begin + jobs[number].service_s
        best = min(best, cost)
    return best + sum(job.service_s for job in jobs)


@given(spans(3, until=12, longest=8), st.sampled_from(RHOS))
def test_no_schedule_at_all_is_cheaper(jobs: list[Span], rho: float) -> None:
    start_s = 4.0
    low, found, waitless = bracket_s(jobs, start_s=start_s, rho=rho)
    best = cheapest_by_starting_times(jobs, start_s, rho, patience=9)
    assert low <= best + 1e-6
    assert best <= found + 1e-6
    assert found <= waitless + 1e-6


@given(spans(5, until=40, longest=30), st.sampled_from((1.0, 1.3, 2.0, 5.0, 20.0)), st.sampled_from((5.0, 12.0)))
def test_no_chain_of_jobs_is_cheaper(jobs: list[Span], rho: float, start_s: float) -> None:
    low, found, waitless = bracket_s(jobs, start_s=start_s, rho=rho)
    best = cheapest_by_chains(jobs, start_s, rho)
    assert low <= best + 1e-6
    assert best <= found + 1e-6
    assert found <= waitless + 1e-6


@given(spans(3, until=10, longest=8), st.sampled_from((1.0, 1.3, 2.0, 5.0)))
def test_nobody_waits_for_nothing_in_the_best_schedule(jobs: list[Span], rho: float) -> None:
    assert cheapest_by_chains(jobs, 4.0, rho) == pytest.approx(cheapest_by_starting_times(jobs, 4.0, rho, patience=12))


@given(spans(6, until=60, longest=20), st.sampled_from((3.0, 10.0, 30.0)))
def test_taking_the_machine_that_became_idle_last_is_optimal_where_nobody_waits(
    jobs: list[Span], start_s: float
) -> None:
    ends = [job.at + job.service_s for job in jobs]
    assert zero_wait(jobs, start_s) == pytest.approx(pairings(ends, [job.at for job in jobs], start_s))


@given(st.data())
def test_predecessors_are_the_cheapest(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 5))
    cost = st.one_of(st.none(), st.integers(-3, 12))
    costs = [[data.draw(cost) if i != j else None for i in range(count)] for j in range(count)]
    edges = [[(float(c), i) for i, c in enumerate(row) if c is not None and c < 10] for row in costs]
    before = cheapest_predecessors(edges, 10.0)
    taken = [i for i in before if i >= 0]
    assert len(taken) == len(set(taken))

    def priced(choice: Sequence[int]) -> float:
        known = [{i: c for c, i in row} for row in edges]
        return sum(10.0 if i < 0 else known[j].get(i, math.inf) for j, i in enumerate(choice))

    every = itertools.product(range(-1, count), repeat=count)
    valid = (choice for choice in every if len({i for i in choice if i >= 0}) == sum(i >= 0 for i in choice))
    assert priced(before) == pytest.approx(min(priced(choice) for choice in valid))


def test_the_bound_is_tight() -> None:
    chance = random.Random(1)
    for rho, most in ((1.0, 0.02), (2.0, 0.005), (5.0, 0.0005), (20.0, 0.0005)):
        lows = bests = 0.0
        for _ in range(60):
            jobs = in_order([(chance.randrange(90), chance.randrange(3, 50)) for _ in range(5)])
            lows += bracket_s(jobs, start_s=30.0, rho=rho)[0]
            bests += cheapest_by_chains(jobs, 30.0, rho)
        assert 0 <= bests / lows - 1 <= most, f"{bests / lows - 1:.2%} at {rho}"


def test_parts_that_cannot_matter_to_each_other_are_bounded_alone() -> None:
    morning, evening = [Span(0, 30), Span(10, 20), Span(35, 5)], [Span(9000, 30), Span(9001, 30)]
    for rho in (1.0, 5.0):
        apart = [bracket_s(part, start_s=30.0, rho=rho) for part in (morning, evening)]
        together = bracket_s([*morning, *evening], start_s=30.0, rho=rho)
        assert together == pytest.approx([sum(ends) for ends in zip(*apart, strict=True)])


def test_one_job_costs_its_run_and_a_start() -> None:
    alone = bracket([Span(5.0, 60.0)], [OfferView("a", 3.6)], wait_usd_per_hour=18.0)
    assert alone.bound_usd == alone.schedule_usd == alone.zero_wait_usd == pytest.approx(0.09)
    assert alone.gap == 0


def test_waiting_a_moment_for_a_running_machine_beats_a_start_where_it_is_cheap() -> None:
    jobs = [Span(0.0, 100.0), Span(97.0, 50.0)]  # 3 s of overlap, or a start of 30 s
    low, found, waitless = bracket_s(jobs, start_s=30.0, rho=5.0)
    assert low == pytest.approx(150 + 30 + 5 * 3)
    assert found == pytest.approx(low)
    assert waitless == 150 + 2 * 30


@pytest.mark.parametrize("rho", [1.0, 1.5, 2.0, 5.0, 20.0])
def test_the_longest_wait_is_where_a_start_pays(rho: float) -> None:
    wait = longest_wait(30.0, rho)
    assert rho * wait == pytest.approx(30.0 + min(wait, 30.0))


def test_with_several_offers_each_figure_is_the_lowest() -> None:
    jobs = [Span(0.0, 60.0), Span(500.0, 60.0)]
    slow, fast = OfferView("slow", 1.8), OfferView("fast", 3.6, boot_s=10, load_s=0, boot_billed=True, speed=0.5)
    both = bracket(jobs, [slow, fast], wait_usd_per_hour=9.0)
    for offer in (slow, fast):
        assert both.bound_usd <= bracket(jobs, [offer], wait_usd_per_hour=9.0).bound_usd
    assert both.bound_usd > 0


def test_machines_of_ones_own_have_no_bound_but_zero() -> None:
    own = OfferView("own", 0.0, own=True)
    assert bracket([Span(0.0, 60.0)], [OfferView("a", 1.75), own], wait_usd_per_hour=9.0).bound_usd == 0
    assert bracket([], [OfferView("a", 1.75)], wait_usd_per_hour=9.0).bound_usd == 0
