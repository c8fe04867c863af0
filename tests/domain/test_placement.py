"""Which job goes to which machine, and which one comes back: the rules, and that nobody starves under them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from runcomfy.domain.placement import BackWhy, Pending, Placement, Second, Spot, place, take_back
from runcomfy.domain.queued import RowId


@dataclass(frozen=True)
class Knows:
    """Fixed expectations."""

    run: float = 10.0
    load: float = 0.0
    of: dict[str, float] = field(default_factory=dict)

    def run_s(self, workflow: str, server_type: str) -> float:
        return self.of.get(f"{workflow} on {server_type}", self.of.get(workflow, self.run))

    def load_s(self, workflow: str, server_type: str) -> float:
        return self.load


def job(
    number: int, workflow: str = "w", *, priority: int = 50, bound: str | None = None, delayed: float = 0
) -> Pending:
    return Pending(RowId(number), priority, workflow, bound, delayed)


def spot(name: str, *, seats: int = 2, taken: int = 0, free: float = 0.0, warm: str = "", **more: object) -> Spot:
    base = Spot(name, "medium", 1.75, seats, taken, free, warm=frozenset(warm.split()))
    return replace(base, **more)  # type: ignore[arg-type]


def placed(
    jobs: Sequence[Pending], *spots: Spot, knows: Knows | None = None, patience: float = 60
) -> list[tuple[int, str]]:
    result = place(jobs, spots, knows or Knows(), patience_s=patience)
    return [(int(one.job), one.machine) for one in result.placements]


# -- where ---------------------------------------------------------------------------------------------------------


def test_a_warm_machine_comes_first() -> None:
    assert placed([job(1)], spot("cold"), spot("warm", warm="w")) == [(1, "warm")]


def test_then_the_earliest_end_then_the_price() -> None:
    fast, slow = spot("fast", server_type="large"), spot("slow")
    knows = Knows(of={"w on large": 5})
    assert placed([job(1)], slow, fast, knows=knows) == [(1, "fast")]
    assert placed([job(1)], spot("dear", usd_per_hour=3.0), spot("cheap")) == [(1, "cheap")]


def test_an_idle_machine_comes_before_a_seat_behind_somebody() -> None:
    busy = spot("busy", seats=1, taken=1, free=1.0, warm="w")
    assert placed([job(1)], busy, spot("idle")) == [(1, "idle")]


def test_unless_the_models_take_longer_to_load_there_than_the_wait_is_here() -> None:
    busy = spot("busy", seats=1, taken=1, free=3.0, warm="w")
    assert placed([job(1)], busy, spot("idle"), knows=Knows(load=30)) == [(1, "busy")]
    assert placed([job(1)], replace(busy, free_s=40), spot("idle"), knows=Knows(load=30)) == [(1, "idle")]


def test_every_idle_machine_has_one_before_any_has_two() -> None:
    result = placed([job(n) for n in range(4)], spot("a"), spot("b"), spot("c"))
    assert sorted(machine for _, machine in result[:3]) == ["a", "b", "c"]
    assert len(result) == 4


def test_a_seat_behind_others_is_not_given_while_a_machine_starts_that_begins_earlier() -> None:
    busy, coming = spot("busy", seats=1, taken=1, free=100), spot("coming", ready_s=20)
    result = place([job(1)], [busy, coming], Knows(), patience_s=60)
    assert (result.placements, result.delayed) == ((), frozenset({1}))
    assert placed([job(1)], busy, replace(coming, ready_s=200)) == [(1, "busy")]
    assert placed([job(1, delayed=60)], busy, coming) == [(1, "busy")]


def test_only_so_many_are_held_for_it_as_it_begins_earlier() -> None:
    busy, coming = spot("busy", seats=1, taken=1, free=25), spot("coming", ready_s=20)
    result = place([job(1), job(2)], [busy, coming], Knows(), patience_s=60)
    assert result.placements == (Placement(RowId(2), "busy"),)
    assert result.delayed == {1}


# -- who -----------------------------------------------------------------------------------------------------------


def test_one_that_the_machine_is_warm_for_may_pass() -> None:
    machine = spot("m", seats=1, warm="b")
    result = place([job(1, "a"), job(2, "b")], [machine], Knows(), patience_s=60)
    assert result.placements == (Placement(RowId(2), "m"),)
    assert result.delayed == {1}


def test_but_not_for_ever() -> None:
    assert placed([job(1, "a", delayed=60), job(2, "b")], spot("m", seats=1, warm="b")) == [(1, "m")]


def test_and_not_across_priorities() -> None:
    assert placed([job(1, "a", priority=10), job(2, "b")], spot("m", seats=1, warm="b")) == [(1, "m")]


def test_nobody_passes_on_to_a_machine_that_is_not_his_best() -> None:
    both = spot("x", seats=1, warm="b"), spot("y", seats=1, warm="a b")
    assert sorted(placed([job(1, "a"), job(2, "b")], *both)) == [(1, "y"), (2, "x")]


def test_what_has_its_prompt_somewhere_goes_there_full_or_not() -> None:
    full = spot("full", seats=0, taken=2, usable=False)
    assert placed([job(1), job(2, bound="full"), job(3, bound="elsewhere")], full) == [(2, "full")]


# -- properties ----------------------------------------------------------------------------------------------------

WORKFLOWS = st.sampled_from(["a", "b", "c"])
SPOTS = st.lists(
    st.builds(
        Spot,
        id=st.uuids().map(str),
        server_type=st.sampled_from(["medium", "large"]),
        usd_per_hour=st.floats(0.5, 5),
        seats=st.integers(0, 2),
        taken=st.integers(0, 2),
        free_s=st.floats(0, 100),
        ready_s=st.sampled_from([0.0, 0.0, 0.0, 10.0]),
        warm=st.frozensets(WORKFLOWS),
        usable=st.booleans(),
    ).map(lambda one: one if one.taken else replace(one, free_s=0.0)),
    max_size=6,
)
JOBS = st.lists(
    st.tuples(st.sampled_from([1, 50, 99]), WORKFLOWS, st.sampled_from([0.0, 30.0, 60.0])), max_size=12
).map(
    lambda jobs: [
        Pending(RowId(n), priority, workflow, delayed_s=delayed)
        for n, (priority, workflow, delayed) in enumerate(sorted(jobs, key=lambda one: one[0]))
    ]
)


@given(JOBS, SPOTS, st.sampled_from([0.0, 30.0]))
def test_no_seat_is_given_twice_and_nobody_passes_a_more_urgent_one(
    jobs: list[Pending], spots: list[Spot], load: float
) -> None:
    result = place(jobs, spots, Knows(load=load), patience_s=60)
    by_id, of = {one.id: one for one in spots}, {one.id: one for one in jobs}
    went = [one.job for one in result.placements]
    assert len(set(went)) == len(went)
    for one in spots:
        given_ = sum(placement.machine == one.id for placement in result.placements)
        assert given_ <= one.seats
    assert all(by_id[one.machine].open for one in result.placements)
    left = [one for one in jobs if one.id not in went]
    if went and left:
        assert max(of[one].priority for one in went) <= min(one.priority for one in left)
    assert not result.delayed & set(went)


@given(JOBS, SPOTS)
def test_where_loading_costs_nothing_nobody_waits_while_a_machine_is_idle(
    jobs: list[Pending], spots: list[Spot]
) -> None:
    result = place(jobs, spots, Knows(), patience_s=60)
    used = {one.machine for one in result.placements}
    idle = [one for one in spots if one.open and one.taken == 0 and one.id not in used]
    if idle:
        assert len(result.placements) == len(jobs)
        behind = [one.machine for one in result.placements]
        taken = {one.id: one.taken for one in spots}
        assert all(taken[machine] == 0 for machine in behind)
        assert len(set(behind)) == len(behind)


@given(st.integers(0, 2**32), st.integers(1, 3), st.floats(0, 1))
def test_everybody_is_chosen_within_bounded_rounds(seed: int, machines: int, starting: float) -> None:
    """Jobs for which machines are warm keep coming, and there is often a machine that is just about to start."""
    patience, window, rounds = 5, 4, 80
    draw = Random(seed)
    warm = {f"m{n}": frozenset(draw.sample("abc", draw.randint(0, 2))) for n in range(machines)}
    taken = dict.fromkeys(warm, 2)
    queue = [(n, draw.choice("abc")) for n in range(6)]
    latest = {n: _rounds_for(n, window, patience) for n, _ in queue}
    since: dict[int, int] = {}
    for now in range(rounds):
        number = 6 + now
        latest[number] = now + _rounds_for(len(queue), window, patience)
        queue.append((number, draw.choice("abc")))
        if busy := [name for name in warm if taken[name]]:
            taken[draw.choice(busy)] -= 1
        spots = [
            Spot(name, "medium", 1.0, 2 - taken[name], taken[name], 20.0 * taken[name], warm=warm[name])
            for name in warm
        ]
        if draw.random() < starting:
            spots.append(Spot("coming", "medium", 1.0, 2, ready_s=1.0))
        head = [Pending(RowId(n), 50, workflow, delayed_s=now - since.get(n, now)) for n, workflow in queue[:window]]
        result = place(head, spots, Knows(), patience_s=patience)
        for delayed in result.delayed:
            since.setdefault(int(delayed), now)
        for one in result.placements:
            taken[one.machine] += 1
            queue = [waiting for waiting in queue if waiting[0] != one.job]
        assert all(now < latest[n] for n, _ in queue)


def _rounds_for(ahead: int, window: int, patience: int) -> int:
    """The jobs that are looked at together have gone after the patience and a round for each of them."""
    return (ahead // window + 1) * (patience + window + 1)


# -- taking back ---------------------------------------------------------------------------------------------------


def second(number: int, machine: str, *, priority: int = 50, begins: float = 50.0, workflow: str = "w") -> Second:
    return Second(RowId(number), priority, workflow, machine, begins)


def back(seconds: list[Second], unplaced: list[Pending], *spots: Spot, load: float = 0.0) -> dict[int, BackWhy]:
    return {int(n): why for n, why in take_back(seconds, unplaced, spots, Knows(load=load), gain_s=2.0).items()}


FULL = spot("m", seats=0, taken=2, free=60)


def test_a_more_urgent_one_takes_the_seat_of_the_least_urgent() -> None:
    waiting = [second(1, "m", priority=50), second(2, "n", priority=70, begins=80), second(3, "o", priority=70)]
    full = [replace(FULL, id=name) for name in "mno"]
    assert back(waiting, [job(9, priority=10)], *full) == {3: BackWhy.URGENT}
    assert back(waiting, [job(9, priority=10), job(8, priority=60)], *full) == {3: BackWhy.URGENT, 2: BackWhy.URGENT}
    assert back(waiting, [job(9, priority=70)], *full) == {}


def test_not_while_a_seat_is_free() -> None:
    assert back([second(1, "m")], [job(9, priority=10)], FULL, spot("n", seats=1, taken=1)) == {}


def test_not_for_one_whose_prompt_is_elsewhere() -> None:
    assert back([second(1, "m")], [job(9, priority=10, bound="x")], FULL) == {}


def test_an_idle_machine_takes_the_one_it_helps_most() -> None:
    waiting = [second(1, "m", begins=20), second(2, "n", begins=80)]
    spots = FULL, replace(FULL, id="n"), spot("idle")
    assert back(waiting, [], *spots) == {2: BackWhy.IDLE}
    assert back([second(1, "m", begins=1.5)], [], *spots) == {}
    assert back(waiting, [], *spots, load=90) == {}


def test_a_machine_that_takes_no_jobs_gives_back_what_waits() -> None:
    draining = replace(FULL, usable=False)
    assert back([second(1, "m"), second(2, "gone")], [], draining) == {1: BackWhy.DRAINS, 2: BackWhy.DRAINS}
