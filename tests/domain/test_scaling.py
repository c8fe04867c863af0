"""The plan: what it launches and stops, and what it never does."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runcomfy.domain.plan_view import (
    Backlog,
    BatchView,
    DemandView,
    Launch,
    Limits,
    MachineView,
    OfferView,
    Plan,
    PlanView,
    PresenceView,
    Stage,
    Stop,
)
from runcomfy.domain.scaling import CostPlan, batch_machines

NOW = 10_000.0
STANDARD = OfferView("standard", 1.75, room=50)
BRIDGE = OfferView("bridge", 2.625, boot_s=30, boot_p90_s=30, load_s=0, boot_billed=True, room=50)
OWN = OfferView("own", 0.0, boot_s=5, boot_p90_s=5, load_s=0, own=True)
EMPTY = PlanView(now=NOW, offers=(STANDARD,), limits=Limits(max_machines=10))


def waiting(count: int, service_s: float = 30.0, offers: tuple[str, ...] = ()) -> tuple[Backlog, ...]:
    return (Backlog("flux", count, NOW, service_s, offers),)


def idle(name: str, since: float, offer: OfferView = STANDARD) -> MachineView:
    return MachineView(
        name,
        offer.name,
        Stage.READY,
        launched_at=0,
        ready_at=180,
        free_at=NOW - since,
        idle_since=NOW - since,
        last_used=NOW - since,
        billed_since=180,
    )


def busy(name: str, for_s: float, offer: OfferView = STANDARD) -> MachineView:
    return replace(idle(name, 0, offer), jobs=1, idle_since=None, free_at=NOW + for_s)


def booting(name: str, for_s: float, offer: OfferView = STANDARD) -> MachineView:
    ready = NOW + for_s
    return MachineView(name, offer.name, Stage.BOOTING, ready - offer.boot_s, ready, ready + offer.load_s)


def plan(view: PlanView) -> Plan:
    return CostPlan().plan(view)


def launched(view: PlanView) -> dict[str, int]:
    found: dict[str, int] = {}
    for action in plan(view).actions:
        if isinstance(action, Launch):
            found[action.offer] = found.get(action.offer, 0) + action.count
    return found


def stopped(view: PlanView) -> list[str]:
    return [action.machine_id for action in plan(view).actions if isinstance(action, Stop)]


# -- waiting jobs --------------------------------------------------------------------------------------------------


def test_nothing_there_and_nothing_known_is_left_alone() -> None:
    assert plan(EMPTY) == Plan()


def test_with_no_type_to_be_had_at_all_nothing_is_launched_or_stopped() -> None:
    there = (idle("a", 1e6), booting("b", 30))
    assert plan(replace(EMPTY, offers=(), backlog=waiting(3), machines=there)) == Plan()


def test_a_job_that_waits_gets_a_machine() -> None:
    assert launched(replace(EMPTY, backlog=waiting(1))) == {"standard": 1}


def test_a_machine_on_its_way_answers_for_it() -> None:
    assert launched(replace(EMPTY, backlog=waiting(1), machines=(booting("a", 100),))) == {}


def test_many_jobs_are_spread_over_machines_since_starts_are_nearly_free() -> None:
    assert launched(replace(EMPTY, backlog=waiting(100, 300.0))) == {"standard": 10}


def test_a_short_queue_is_done_before_another_machine_could_be_there() -> None:
    assert launched(replace(EMPTY, backlog=waiting(3, 10.0), machines=(busy("a", 5),))) == {}


def test_every_launch_says_why_and_what_it_costs() -> None:
    (launch,) = plan(replace(EMPTY, backlog=waiting(20, 60.0), machines=(busy("a", 50),))).actions
    assert isinstance(launch, Launch)
    assert "20 jobs wait" in launch.why
    assert launch.expected_usd < 0  # the waiting spared is worth more than the starts


def test_a_busy_pool_gets_the_machines_that_its_rate_deserves() -> None:
    rate = DemandView(seen=500, rate_fast=0.2, rate_slow=0.2, service_s=30)
    view = replace(EMPTY, demand=rate, machines=(busy("a", 20), busy("b", 10)))
    assert launched(view)["standard"] >= 4


def test_jobs_only_run_where_they_fit() -> None:
    big = OfferView("big", 2.99, room=3)
    view = replace(EMPTY, offers=(STANDARD, big), machines=(idle("a", 1),), backlog=waiting(1, 30, ("big",)))
    assert launched(view) == {"big": 1}


def test_the_type_that_is_cheapest_for_the_job_wins_not_the_cheapest_by_the_hour() -> None:
    quick = OfferView("quick", 2.0, speed=0.4, room=3)
    assert launched(replace(EMPTY, offers=(STANDARD, quick), backlog=waiting(1))) == {"quick": 1}


def test_ones_own_machine_comes_first() -> None:
    assert launched(replace(EMPTY, offers=(STANDARD, OWN), backlog=waiting(1))) == {"own": 1}
    assert stopped(replace(EMPTY, offers=(STANDARD, OWN), machines=(idle("a", 1e6, OWN),))) == []


def test_a_bridge_is_rented_where_waiting_is_dear_and_not_where_it_is_cheap() -> None:
    both = replace(EMPTY, offers=(STANDARD, BRIDGE), backlog=waiting(1))
    assert launched(both) == {"bridge": 1}
    assert launched(replace(both, wait_usd_per_hour=0.05)) == {"standard": 1}


def test_the_cheaper_machine_takes_over_from_the_bridge() -> None:
    both = replace(EMPTY, offers=(STANDARD, BRIDGE))
    working = replace(busy("b", 20, BRIDGE), launched_at=NOW - 100, billed_since=NOW - 100)
    assert launched(replace(both, machines=(working,))) == {"standard": 1}
    there = (replace(idle("b", 5, BRIDGE)), idle("m", 1))
    assert stopped(replace(both, machines=there)) == ["b"]


def test_nothing_takes_over_from_a_bridge_that_is_let_go_itself() -> None:
    both = replace(EMPTY, offers=(STANDARD, BRIDGE), keep_alive_s=600.0)
    rented_long_ago = replace(idle("b", 599, BRIDGE), billed_since=NOW - 1e6)
    assert launched(replace(both, machines=(rented_long_ago,))) == {"standard": 1}
    let_go = replace(idle("b", 601, BRIDGE), billed_since=NOW - 1e6)
    [action] = plan(replace(both, machines=(let_go,))).actions
    assert isinstance(action, Stop)
    assert action.why == "kept for the 600 s that are set"


# -- letting go ----------------------------------------------------------------------------------------------------


def test_the_last_machine_is_kept_as_long_as_silences_say() -> None:
    short = DemandView(seen=300, silences=(400.0,) * 300)
    assert stopped(replace(EMPTY, demand=short, machines=(idle("a", 390),))) == []
    assert plan(replace(EMPTY, demand=short, machines=(idle("a", 390),))).look_at is not None
    assert stopped(replace(EMPTY, demand=short, machines=(idle("a", 1000),))) == ["a"]
    long = DemandView(seen=300, silences=(90_000.0,) * 300)
    assert stopped(replace(EMPTY, demand=long, machines=(idle("a", 200),))) == ["a"]


def test_a_keep_alive_that_the_user_set_is_kept() -> None:
    view = replace(EMPTY, keep_alive_s=600.0)
    assert stopped(replace(view, machines=(idle("a", 599),))) == []
    assert plan(replace(view, machines=(idle("a", 599),))).look_at == pytest.approx(NOW + 1)
    assert stopped(replace(view, machines=(idle("a", 601),))) == ["a"]


def test_a_keep_alive_that_the_user_set_is_not_exceeded_because_many_jobs_came_before() -> None:
    """Machines that another process left, and a burst before: the rate falls for ten minutes, and nothing comes."""
    burst = DemandView(seen=60, rate_fast=0.2, rate_slow=0.2, service_s=30.0, silent_since=NOW - 20)
    view = replace(EMPTY, keep_alive_s=10.0, demand=burst, limits=Limits(max_machines=2))
    assert stopped(replace(view, machines=(idle("a", 20), idle("b", 12)))) == ["a", "b"]
    assert plan(replace(view, machines=(idle("a", 20), idle("b", 7)))).actions == ()
    assert plan(replace(view, machines=(idle("a", 20), idle("b", 7)))).look_at == pytest.approx(NOW + 3)
    assert stopped(replace(view, machines=(idle("a", 20), busy("b", 5)))) == [], "there is work: the rate counts"
    least = Limits(max_machines=2, min_machines=1)
    assert stopped(replace(view, limits=least, machines=(idle("a", 20), idle("b", 12)))) == ["a"]


def test_machines_beside_others_go_much_earlier_the_one_used_longest_ago_first() -> None:
    machines = (idle("a", 60), idle("b", 90), busy("c", 20))
    assert stopped(replace(EMPTY, machines=machines)) == ["b", "a"]


def test_nothing_ready_is_stopped_while_its_only_other_is_on_its_way() -> None:
    assert stopped(replace(EMPTY, machines=(idle("a", 100), booting("b", 100)))) == []


def test_a_start_that_is_not_needed_any_more_is_taken_back_while_it_is_free() -> None:
    machines = (busy("a", 10), booting("b", 100))
    assert plan(replace(EMPTY, machines=machines)).look_at == pytest.approx(NOW + 80)
    assert stopped(replace(EMPTY, machines=(busy("a", 10), booting("b", 10)))) == ["b"]


def test_what_is_paid_for_is_used() -> None:
    hourly = replace(STANDARD, step_s=3600.0)
    machine = replace(idle("a", 3000), billed_since=NOW - 3300)
    view = replace(EMPTY, offers=(hourly,), machines=(machine,), keep_alive_s=60.0)
    assert stopped(view) == []
    look = plan(view).look_at
    assert look is not None
    assert NOW + 280 <= look <= NOW + 300
    assert stopped(replace(view, now=look)) == ["a"]


def test_a_launch_must_save_more_than_half_a_step() -> None:
    view = replace(EMPTY, backlog=waiting(12, 60.0), machines=(busy("a", 30),), wait_usd_per_hour=1.75)
    assert launched(view)
    assert launched(replace(view, offers=(replace(STANDARD, step_s=36_000.0),))) == {}


# -- signals -------------------------------------------------------------------------------------------------------


def test_somebody_who_is_there_gets_a_warm_machine() -> None:
    view = replace(EMPTY, presence=PresenceView(present=1, since=NOW, lead_s=300))
    found = plan(view)
    when = found.look_at if not found.actions else NOW
    assert when is not None
    assert launched(replace(view, now=when)) == {"standard": 1}
    assert when <= NOW + 300 - 210


def test_it_is_kept_while_they_are_there_and_given_up_after_a_long_silence() -> None:
    there = replace(EMPTY, presence=PresenceView(present=1, since=NOW - 4000))
    demand = DemandView(seen=300, silences=(90_000.0,) * 300, silent_since=NOW - 900, last_arrival=NOW - 930)
    assert stopped(replace(there, demand=demand, machines=(idle("a", 900),))) == []
    demand = replace(demand, silent_since=NOW - 1200)
    late = replace(there, demand=demand, machines=(idle("a", 1200),))
    assert stopped(late) == ["a"]
    assert launched(replace(late, machines=())) == {}


def test_after_they_left_it_lingers_and_goes() -> None:
    demand = DemandView(seen=10, silences=(400.0,) * 10, last_arrival=NOW - 100)
    left = replace(EMPTY, demand=demand, machines=(idle("a", 60),))
    assert stopped(replace(left, presence=PresenceView(left_at=NOW - 29))) == []
    assert stopped(replace(left, presence=PresenceView(left_at=NOW - 31))) == ["a"]


def test_it_lingers_no_longer_than_a_start_is_worth_once_silences_have_taught_it() -> None:
    for length, gone in ((90_000.0, True), (25.0, False)):  # whoever comes back within half a minute is waited for
        demand = DemandView(seen=300, silences=(length,) * 300, last_arrival=NOW - 100)
        left = replace(EMPTY, demand=demand, machines=(idle("a", 20),), presence=PresenceView(left_at=NOW - 20))
        assert stopped(left) == (["a"] if gone else [])


def test_who_often_comes_unannounced_is_waited_for() -> None:
    demand = DemandView(seen=300, silences=(400.0,) * 300, last_arrival=NOW - 100)
    left = replace(EMPTY, demand=demand, machines=(idle("a", 60),))
    assert stopped(replace(left, presence=PresenceView(left_at=NOW - 31, recall=0.3))) == []


def test_work_that_is_announced_launches_and_holds() -> None:
    (launch,) = plan(replace(EMPTY, presence=PresenceView(expected_until=NOW + 200))).actions
    assert isinstance(launch, Launch)
    assert launch.hold_s == 300
    assert stopped(replace(EMPTY, machines=(replace(idle("a", 5000), hold_until=NOW + 10),))) == []


def test_a_known_batch_gets_its_machines_in_time_and_none_is_kept_after_it() -> None:
    batch = PresenceView(batches=(BatchView(count=40, work_s=1200, at=NOW + 5000),))
    early = plan(replace(EMPTY, presence=batch))
    assert early.actions == ()
    assert early.look_at is not None
    assert launched(replace(EMPTY, now=early.look_at, presence=batch)) == {"standard": 10}
    soon = replace(EMPTY, now=early.look_at, presence=batch, machines=tuple(idle(f"m{n}", 9000) for n in range(10)))
    assert plan(soon).actions == ()
    done = DemandView(only_batches=True, silences=(400.0,) * 300)
    assert stopped(replace(EMPTY, demand=done, machines=(idle("a", 0), idle("b", 31)))) == ["b", "a"]


def test_of_two_batches_the_one_that_deserves_more_machines_decides() -> None:
    batches = (BatchView(30, 900.0, NOW), BatchView(2, 60.0, NOW))
    for known in (batches, batches[::-1]):
        found = plan(replace(EMPTY, presence=PresenceView(batches=known))).actions
        assert [(action.count, action.why.split(" come")[0]) for action in found if isinstance(action, Launch)] == [
            (10, "30 jobs")
        ]


def test_who_is_there_since_nobody_knows_when_gets_a_machine_and_keeps_it() -> None:
    view = replace(EMPTY, presence=PresenceView(present=1))
    assert launched(view) == {"standard": 1}
    assert stopped(replace(view, machines=(idle("a", 61),))) == []


def test_the_number_for_a_batch_balances_starts_against_waiting() -> None:
    assert batch_machines(100, 3000, STANDARD, 8.75, cap=1000) == 100  # 158, but never more than jobs
    assert batch_machines(10, 3000, STANDARD, 1.75, cap=1000) == 10
    assert batch_machines(4, 60, STANDARD, 1.75, cap=1000) == 2
    assert batch_machines(100, 3000, STANDARD, 8.75, cap=7) == 7
    assert batch_machines(100, 3000, STANDARD, 0.0, cap=7) == 1


# -- nobody sends work ---------------------------------------------------------------------------------------------


def lived(view: PlanView, hours: float, says: Callable[[float], PresenceView]) -> list[tuple[float, float]]:
    """Carry plans out for so long, in which `says` is all that happens; return each machine's first and last moment."""
    ends, machines, lives = view.now + hours * 3600, dict[str, MachineView](), dict[str, tuple[float, float]]()
    while view.now < ends:
        found = plan(replace(view, machines=tuple(machines.values()), presence=says(view.now)))
        for action in found.actions:
            if isinstance(action, Stop):
                lives[action.machine_id] = (machines.pop(action.machine_id).launched_at, view.now)
            elif isinstance(action, Launch):
                assert action.count == 1
                offer = next(offer for offer in view.offers if offer.name == action.offer)
                ready, name = view.now + offer.boot_s, f"{offer.name} {len(lives)} {view.now}"
                hold = ready + action.hold_s if action.hold_s else 0.0
                machines[name] = MachineView(name, offer.name, Stage.BOOTING, view.now, ready, ready, hold_until=hold)
        looks = [at for at in (found.look_at, *(m.ready_at for m in machines.values())) if at and at > view.now]
        # The fleet looks at least every now and then; what is later has happened by then.
        view = replace(view, now=min([*looks, view.now + 20.0]))
        for name, machine in machines.items():
            if machine.stage is Stage.BOOTING and machine.ready_at <= view.now:
                at = machine.ready_at
                ready_now = replace(machine, stage=Stage.READY, idle_since=at, billed_since=at, free_at=at)
                machines[name] = ready_now
    return [*lives.values(), *((machine.launched_at, ends) for machine in machines.values())]


@pytest.mark.parametrize("silent", [None, NOW - 5_000, NOW + 7.0])
@pytest.mark.parametrize("keep_alive_s", [None, 0.0, 120.0, 7_200.0])
@pytest.mark.parametrize("price", [1.75, 8.75, 35.0])
def test_who_is_there_and_sends_nothing_gets_one_machine_and_no_other(
    price: float, keep_alive_s: float | None, silent: float | None
) -> None:
    """A machine is held while somebody is there, within limits; once it was given up, no other follows."""
    view = replace(EMPTY, wait_usd_per_hour=price, keep_alive_s=keep_alive_s, demand=DemandView(silent_since=silent))
    there = PresenceView(present=1, since=NOW)
    [(launched_at, ended_at)] = lived(view, 8, lambda _: there)
    assert launched_at - NOW <= 300 - 180
    assert ended_at - NOW >= max(300.0, keep_alive_s or 0.0)
    assert ended_at - NOW <= max(3 * 3_600, keep_alive_s or 0.0)


@pytest.mark.parametrize("keep_alive_s", [None, 0.0, 120.0, 1_200.0])
def test_who_comes_back_gets_another_machine(keep_alive_s: float | None) -> None:
    def says(now: float) -> PresenceView:
        if now < NOW + 900:
            return PresenceView(present=1, since=NOW)
        if now < NOW + 7_200:
            return PresenceView(left_at=NOW + 900)
        return PresenceView(present=1, since=NOW + 7_200)

    first, second = lived(replace(EMPTY, keep_alive_s=keep_alive_s), 8, says)
    assert NOW + 900 <= first[1] <= NOW + 900 + max(60.0, keep_alive_s or 0.0)
    assert NOW + 7_200 <= second[0] <= NOW + 7_500


@pytest.mark.parametrize("keep_alive_s", [None, 0.0, 120.0])
def test_work_that_was_announced_and_does_not_come_costs_one_start(keep_alive_s: float | None) -> None:
    def says(now: float) -> PresenceView:
        return PresenceView(expected_until=NOW + 600) if now < NOW + 600 else PresenceView()

    [(launched_at, ended_at)] = lived(replace(EMPTY, keep_alive_s=keep_alive_s), 4, says)
    assert launched_at == NOW
    assert ended_at >= NOW + 600


# -- limits --------------------------------------------------------------------------------------------------------


def test_reasons_against_launching_win() -> None:
    view = replace(EMPTY, backlog=waiting(50), presence=PresenceView(present=3, expected_until=NOW + 100))
    assert launched(replace(view, limits=Limits(max_machines=10, why_not="the budget is used up"))) == {}


def test_the_minimum_is_kept_and_made() -> None:
    assert launched(replace(EMPTY, limits=Limits(max_machines=5, min_machines=3))) == {"standard": 3}
    machines = (idle("a", 1e5), idle("b", 1e5), idle("c", 1e5))
    assert len(stopped(replace(EMPTY, machines=machines, limits=Limits(max_machines=5, min_machines=2)))) == 1


def test_a_breaker_that_is_open_is_respected() -> None:
    assert launched(replace(EMPTY, offers=(replace(STANDARD, room=0),), backlog=waiting(5))) == {}


def times(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False)


@st.composite
def offers(draw: st.DrawFn) -> OfferView:
    return OfferView(
        name="",
        usd_per_hour=draw(times(0.5, 9)),
        boot_s=draw(times(5, 300)),
        boot_p90_s=draw(times(5, 600)),
        load_s=draw(times(0, 90)),
        boot_billed=draw(st.booleans()),
        step_s=draw(st.sampled_from([1.0, 60.0, 600.0, 3600.0])),
        minimum_s=draw(st.sampled_from([0.0, 60.0, 900.0])),
        speed=draw(times(0.2, 3)),
        room=draw(st.integers(0, 6)),
    )


@st.composite
def machines(draw: st.DrawFn, names: list[str], number: int) -> MachineView:
    kind = draw(st.sampled_from(["idle", "busy", "booting", "booting with work", "loading", "draining"]))
    ago = draw(times(0, 20_000))
    coming = NOW + draw(times(-30, 300))
    base = MachineView(
        f"m{number}",
        draw(st.sampled_from(names)),
        Stage.READY,
        launched_at=NOW - 25_000,
        ready_at=NOW - 24_000,
        free_at=NOW,
        last_used=NOW - ago,
        hold_until=draw(st.sampled_from([0.0, NOW + 50])),
        billed_since=NOW - draw(times(20_000, 24_000)),
    )
    match kind:
        case "idle":
            return replace(base, idle_since=NOW - ago, free_at=NOW - ago)
        case "busy":
            return replace(base, jobs=draw(st.integers(1, 2)), free_at=NOW + draw(times(0, 300)))
        case "booting" | "booting with work":
            work = int(kind != "booting")
            return replace(base, stage=Stage.BOOTING, ready_at=coming, free_at=coming, jobs=work, billed_since=None)
        case "loading":
            return replace(base, free_at=NOW + 20)
        case _:
            return replace(base, stage=Stage.DRAINING, jobs=draw(st.integers(0, 1)))


@st.composite
def views(draw: st.DrawFn) -> PlanView:
    types = tuple(replace(draw(offers()), name=f"t{number}") for number in range(draw(st.integers(1, 3))))
    names = [offer.name for offer in types]
    there = tuple(draw(machines(names, number)) for number in range(draw(st.integers(0, 6))))
    backlog = tuple(
        Backlog(
            f"w{number}",
            draw(st.integers(1, 80)),
            NOW - draw(times(0, 900)),
            draw(times(1, 300)),
            tuple(draw(st.lists(st.sampled_from(names), max_size=2, unique=True))),
            draw(st.booleans()),
        )
        for number in range(draw(st.integers(0, 3)))
    )
    rate = draw(st.sampled_from([0.0, 0.001, 0.02, 0.3]))
    silent = draw(st.none() | times(0, 5000))
    demand = DemandView(
        seen=draw(st.integers(0, 500)),
        rate_fast=rate,
        rate_slow=rate,
        service_s=draw(times(1, 200)),
        service_cv2=draw(times(0, 3)),
        silences=tuple(draw(st.lists(times(1, 50_000), max_size=10))),
        waits_per_cold=draw(st.none() | times(0, 3000)),
        last_arrival=NOW - 20,
        silent_since=None if silent is None or backlog else NOW - silent,
        only_batches=draw(st.booleans()),
        group=draw(times(1, 5)),
        rate_session=draw(st.sampled_from([0.0, 0.05])),
    )
    present = draw(st.integers(0, 2))
    presence = PresenceView(
        present=present,
        left_at=None if present else draw(st.none() | st.just(NOW - 100)),
        expected_until=draw(st.none() | st.just(NOW + 100)),
        batches=draw(st.sampled_from([(), (BatchView(20, 600, NOW + 100),), (BatchView(20, 0, NOW + 9000),)])),
        since=NOW - draw(times(0, 4000)) if present else None,
        recall=draw(times(0, 1)),
    )
    limits = Limits(
        max_machines=draw(st.integers(0, 8)),
        min_machines=draw(st.integers(0, 3)),
        budget_s=draw(st.none() | times(0, 5000)),
        why_not=draw(st.sampled_from(["", "", "the budget is used up"])),
    )
    price = draw(st.sampled_from([0.0, 1.75, 8.75, 35.0]))
    keep_alive_s = draw(st.sampled_from([None, None, 0.0, 600.0]))
    return PlanView(NOW, types, there, backlog, demand, presence, limits, price, keep_alive_s)


def applied(view: PlanView, found: Plan) -> PlanView:
    """Return the view at the same moment after the plan was carried out."""
    gone = {action.machine_id for action in found.actions if isinstance(action, Stop)}
    there = [machine for machine in view.machines if machine.id not in gone]
    known = {offer.name: offer for offer in view.offers}
    for action in found.actions:
        if isinstance(action, Launch):
            offer = known[action.offer]
            ready = view.now + offer.boot_s
            hold = ready + action.hold_s if action.hold_s else 0.0
            there += [
                MachineView(
                    f"new-{offer.name}-{len(there)}-{number}",
                    offer.name,
                    Stage.BOOTING,
                    view.now,
                    ready,
                    ready + offer.load_s,
                    hold_until=hold,
                    billed_since=view.now if offer.boot_billed else None,
                )
                for number in range(action.count)
            ]
            known[offer.name] = replace(offer, room=offer.room - action.count)
    return replace(view, machines=tuple(there), offers=tuple(known[offer.name] for offer in view.offers))


Check = Callable[[PlanView, Plan], None]


@settings(max_examples=settings().max_examples * 2, deadline=None)
@given(views())
def test_hard_limits_win(view: PlanView) -> None:
    found = plan(view)
    launches = [action for action in found.actions if isinstance(action, Launch)]
    count = sum(launch.count for launch in launches)
    if view.limits.why_not:
        assert not launches
    assert all(launch.count > 0 and launch.why for launch in launches)
    assert not launches or len(view.machines) + count <= view.limits.max_machines
    for offer in view.offers:
        assert sum(launch.count for launch in launches if launch.offer == offer.name) <= offer.room
    if view.limits.budget_s is not None:
        cheapest = min(offer.usd_per_hour for offer in view.offers)
        price = {offer.name: offer.usd_per_hour * max(offer.minimum_s, offer.load_s) for offer in view.offers}
        assert sum(price[x.offer] * x.count for x in launches) / cheapest <= view.limits.budget_s + 1e-6


@settings(max_examples=settings().max_examples * 2, deadline=None)
@given(views())
def test_only_what_may_go_is_stopped(view: PlanView) -> None:
    there = {machine.id: machine for machine in view.machines}
    types = {offer.name: offer for offer in view.offers}
    stops = [action for action in plan(view).actions if isinstance(action, Stop)]
    for stop in stops:
        machine, offer = there[stop.machine_id], types[there[stop.machine_id].offer]
        assert stop.why
        assert machine.jobs == 0
        assert machine.stage is not Stage.DRAINING
        assert machine.stage is Stage.BOOTING or machine.idle_since is not None
        assert machine.hold_until <= view.now
        if machine.billed_since is not None:
            used = view.now - machine.billed_since
            assert used >= offer.minimum_s - 10
            if offer.step_s > 60:
                assert math.ceil(used / offer.step_s - 1e-9) * offer.step_s - used <= 10 + 1e-6
    alive = sum(machine.stage is not Stage.DRAINING for machine in view.machines)
    assert not stops or alive - len(stops) >= view.limits.min_machines


@settings(max_examples=settings().max_examples * 2, deadline=None)
@given(views())
def test_a_plan_carried_out_is_not_taken_back(view: PlanView) -> None:
    first = plan(view)
    assert plan(view) == first
    assert first.look_at is None or first.look_at > view.now
    after = applied(view, first)
    second = plan(after)
    fresh = {machine.id for machine in after.machines} - {machine.id for machine in view.machines}
    assert not [a for a in second.actions if isinstance(a, Stop) and a.machine_id in fresh]
    # A bridge that goes may make room for the cheaper machine, but nothing is rented again that was just ended.
    types = {machine.id: machine.offer for machine in view.machines}
    ended = {types[action.machine_id] for action in first.actions if isinstance(action, Stop)}
    assert not [a for a in second.actions if isinstance(a, Launch) and a.offer in ended]


@settings(max_examples=100, deadline=None)
@given(views())
def test_nothing_comes_of_nothing(view: PlanView) -> None:
    nothing = replace(
        view,
        machines=(),
        backlog=(),
        demand=DemandView(),
        presence=PresenceView(),
        limits=replace(view.limits, min_machines=0),
    )
    assert plan(nothing) == Plan()
