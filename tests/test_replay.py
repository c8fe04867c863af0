"""The replay: what the world does to a policy, to the second and the cent; and what a policy may know."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from inspect import signature
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runcomfy.application.replay import (
    BRIDGE,
    STANDARD,
    Arrival,
    Presence,
    Told,
    World,
    replay,
    sessions_of,
)
from runcomfy.application.replay_report import PLAN, best_of, compare, policies, solve_wait_price, tune
from runcomfy.application.replay_streams import STREAMS, Trace, draw, read_trace
from runcomfy.domain.baselines import BASELINES, FixedTimeout, ScaleToZero
from runcomfy.domain.exceptions import ValueInvalid
from runcomfy.domain.plan_view import Extend, Launch, OfferView, Plan, PlanView, Stop
from runcomfy.domain.scaling import CostPlan

SAMPLE = Path(__file__).parent / "data" / "traces" / "azure_code_2023_day.csv"
A_CENT_A_SECOND = OfferView("standard", 36.0)


def day() -> tuple[Arrival, ...]:
    with SAMPLE.open(newline="", encoding="utf-8") as lines:
        return read_trace(lines).jobs


@dataclass
class Scripted:
    """Does what the test says, and remembers what it was shown."""

    answer: Callable[[PlanView], Plan]
    seen: list[PlanView] = field(default_factory=list)
    name: str = "scripted"

    def plan(self, view: PlanView) -> Plan:
        self.seen.append(view)
        return self.answer(view)


def one_machine(view: PlanView) -> Plan:
    """Rent one when somebody waits, and keep it."""
    return Plan((Launch("standard", 1, "work", 0.0),) if view.backlog and not view.machines else ())


# -- the provider's rules --------------------------------------------------------------------------------------


def test_a_cold_job_waits_for_boot_and_load_and_pays_load_and_run() -> None:
    outcome = replay(ScaleToZero(), [Arrival(1000.0, 20.0)], World(offers=(A_CENT_A_SECOND,)))
    assert outcome.waits == (210.0,)
    assert outcome.billed_s == 50.0
    assert outcome.usd == pytest.approx(0.50)
    assert outcome.cold_share == 1.0
    assert outcome.cost == pytest.approx(0.50 + 8.75 * 210 / 3600)


def test_what_idles_is_billed_until_it_is_ended() -> None:
    outcome = replay(FixedTimeout(), [Arrival(0.0, 20.0)], World(offers=(A_CENT_A_SECOND,)))
    assert outcome.billed_s == 30 + 20 + 300
    assert outcome.busy_s == 20


@pytest.mark.parametrize(
    ("offer", "billed"),
    [
        (replace(A_CENT_A_SECOND, step_s=60.0), 60.0),
        (replace(A_CENT_A_SECOND, step_s=25.0), 50.0),
        (replace(A_CENT_A_SECOND, minimum_s=600.0), 600.0),
        (replace(A_CENT_A_SECOND, boot_billed=True), 230.0),
        (replace(A_CENT_A_SECOND, boot_s=30.0, load_s=0.0, boot_billed=True), 50.0),
    ],
    ids=["step", "just a step", "minimum", "boot billed", "bridge"],
)
def test_billing_follows_the_offer(offer: OfferView, billed: float) -> None:
    assert replay(ScaleToZero(), [Arrival(0.0, 20.0)], World(offers=(offer,))).billed_s == billed


def test_models_may_be_loaded_only_when_the_first_job_comes() -> None:
    def early(view: PlanView) -> Plan:
        if not view.demand.seen:
            return Plan((Launch("standard", 1, "somebody is there", 0.0),) if not view.machines else ())
        return Plan()

    stream, world = [Arrival(1000.0, 20.0)], World(presence=Presence())
    assert replay(Scripted(early), stream, world).waits == (0.0,)
    late = replay(Scripted(early), stream, replace(world, load_ahead=False))
    assert late.waits == (30.0,)
    assert late.cold == 1


def test_jobs_are_taken_in_order_by_the_machine_used_last() -> None:
    def two(view: PlanView) -> Plan:
        missing = 2 - len(view.machines)
        return Plan((Launch("standard", missing, "two", 0.0),) if view.backlog and missing else ())

    # Both run one; the one that ends last is used again, and the other stays idle.
    stream = [Arrival(0.0, 50.0), Arrival(0.0, 80.0), Arrival(400.0, 10.0), Arrival(500.0, 10.0), Arrival(600.0, 1.0)]
    policy = Scripted(two)
    outcome = replay(policy, stream, World(max_machines=2))
    assert outcome.waits == (0.0, 0.0, 0.0, 210.0, 210.0)
    last = policy.seen[-1]
    assert sorted(machine.last_used or 0.0 for machine in last.machines) == [260.0, 601.0]


def test_a_cheaper_machine_takes_a_job_before_a_dearer_one() -> None:
    dear = replace(STANDARD, name="dear", usd_per_hour=9.0)

    def both(view: PlanView) -> Plan:
        if view.machines or not view.backlog:
            return Plan()
        return Plan((Launch("dear", 1, "one", 0.0), Launch("standard", 1, "another", 0.0)))

    policy = Scripted(both)
    replay(policy, [Arrival(0.0, 10.0), Arrival(0.0, 5.0), Arrival(300.0, 1.0)], World(offers=(STANDARD, dear)))
    running = [m.offer for view in policy.seen if view.now == 300.0 for m in view.machines if m.jobs]
    assert running == ["standard"]


def test_machines_are_never_more_than_the_most() -> None:
    stream = [Arrival(0.0, 100.0) for _ in range(20)]
    outcome = replay(ScaleToZero(), stream, World(max_machines=3))
    assert outcome.most_machines == 3
    assert outcome.jobs == len(outcome.waits) == 20


def test_what_is_busy_cannot_be_ended() -> None:
    def hasty(view: PlanView) -> Plan:
        starts = () if view.machines else (Launch("standard", 1, "work", 0.0),) if view.backlog else ()
        return Plan((*starts, *(Stop(m.id, "hasty") for m in view.machines if m.jobs)))

    assert replay(Scripted(hasty), [Arrival(0.0, 500.0)], World()).busy_s == 500.0


def test_a_machine_that_is_not_ready_yet_can_be_taken_back_for_nothing() -> None:
    def changes_its_mind(view: PlanView) -> Plan:
        if view.now < 100:
            return Plan((Launch("standard", 1, "", 0.0),) if not view.machines else (), 100.0)
        if view.now < 150:
            return Plan(tuple(Stop(m.id, "never mind") for m in view.machines), 150.0)
        return ScaleToZero().plan(view)

    policy = Scripted(changes_its_mind)
    outcome = replay(policy, [Arrival(0.0, 20.0)], World())
    assert outcome.launches == 2
    assert outcome.waits == (150.0 + 210.0,)
    assert outcome.billed_s == 50.0


def test_a_policy_that_leaves_jobs_alone_is_told_so() -> None:
    idler = Scripted(lambda view: Plan((), view.now + 60), name="idler")
    with pytest.raises(ValueInvalid, match="idler never ran 2 of 2 jobs"):
        replay(idler, [Arrival(0.0, 20.0), Arrival(5.0, 20.0)], World())


def test_holds_and_extensions_reach_the_view() -> None:
    def held(view: PlanView) -> Plan:
        if not view.machines:
            return Plan((Launch("standard", 1, "intent", 0.0, hold_s=300.0),) if view.backlog else ())
        return Plan((Extend(view.machines[0].id, 5000.0, "still wanted"),) if view.now > 250 else ())

    policy = Scripted(held)
    replay(policy, [Arrival(0.0, 10.0), Arrival(300.0, 1.0), Arrival(310.0, 1.0)], World())
    holds = [view.machines[0].hold_until for view in policy.seen if view.machines]
    assert holds[0] == 180.0 + 300.0
    assert holds[-1] == 5000.0


def test_a_machine_that_nobody_ends_is_billed_until_patience_ends() -> None:
    outcome = replay(Scripted(one_machine), [Arrival(0.0, 20.0)], World())
    assert outcome.billed_s == 30 + 20 + 6 * 3600


# -- what a policy may know --------------------------------------------------------------------------------------


def test_run_times_are_predicted_from_those_that_ended() -> None:
    stream = [Arrival(0.0, 100.0, "ann", "a"), Arrival(1000.0, 300.0, "ann", "a"), Arrival(2000.0, 7.0, "ann", "b")]
    policy = Scripted(one_machine)
    replay(policy, stream, World())
    at_arrival = {view.now: view for view in policy.seen if view.now in (0.0, 1000.0, 2000.0)}
    assert at_arrival[0.0].backlog[0].service_s == 30.0  # believed until one was seen
    second = at_arrival[1000.0].machines[0]
    assert second.free_at == 1000.0 + 100.0  # the mean of what ended, not the 300 s that it will take
    third = at_arrival[2000.0].machines[0]
    assert third.free_at == 2000.0 + 200.0  # a workflow that never ran: the mean of all
    assert third.warm == {"a", "b"}


def test_a_view_never_speaks_of_the_future() -> None:
    stream = day()[:40]
    for cut in (5, 17, 30):
        whole, part = Scripted(one_machine), Scripted(one_machine)
        replay(whole, stream, World())
        replay(part, stream[:cut], World())
        before = stream[cut].at
        assert [v for v in whole.seen if v.now < before] == [v for v in part.seen if v.now < before]


def test_waiting_jobs_are_told_by_kind_with_the_oldest() -> None:
    stream = [Arrival(0.0, 5.0, "", "a"), Arrival(3.0, 5.0, "", "b"), Arrival(4.0, 5.0, "", "a")]
    policy = Scripted(one_machine)
    replay(policy, stream, World())
    shown = next(view for view in policy.seen if view.now == 4.0)
    assert [(kind.workflow, kind.count, kind.oldest_at) for kind in shown.backlog] == [("a", 2, 0.0), ("b", 1, 3.0)]


def test_silences_and_cold_starts_are_learned() -> None:
    policy = Scripted(one_machine)
    replay(policy, [Arrival(0.0, 10.0), Arrival(1000.0, 10.0)], World())
    known = policy.seen[-1].demand
    assert known.seen == 2
    assert known.silences == (780.0,)
    assert known.waits_per_cold == 210.0


def test_the_plan_of_serve_is_what_is_replayed() -> None:
    from runcomfy.bootstrap import App

    assert policies()[PLAN] is CostPlan
    assert "CostPlan" in App.fleet.__code__.co_names
    assert signature(CostPlan).parameters["knobs"].default is None


# -- signals ------------------------------------------------------------------------------------------------------


def test_a_session_ends_after_a_silence_that_counts_from_the_last_job_s_end() -> None:
    stream = [
        Arrival(0.0, 500.0, "ann"),
        Arrival(100.0, 10.0, "bob"),
        Arrival(1400.0, 10.0, "ann"),  # 900 s after her job ended
        Arrival(1400.0, 10.0, "bob"),  # 1,290 s after his
    ]
    sessions, of_job = sessions_of(stream, 900.0)
    assert [(session.user, session.began_at, session.jobs) for session in sessions] == [
        ("ann", 0.0, 2), ("bob", 100.0, 1), ("bob", 1400.0, 1),
    ]  # fmt: skip
    assert of_job == [0, 1, 0, 2]


def test_clients_say_ahead_that_somebody_comes_and_when_they_left() -> None:
    policy = Scripted(one_machine)
    replay(policy, [Arrival(1000.0, 20.0, "ann"), Arrival(1100.0, 20.0, "ann")], World(presence=Presence(lead_s=250.0)))
    first = policy.seen[0]
    assert (first.now, first.presence.present, first.presence.since) == (750.0, 1, 750.0)
    assert all(view.presence.present == 1 for view in policy.seen if view.now < 1250.0)
    left = next(view for view in policy.seen if not view.presence.present)
    assert left.now == left.presence.left_at == 1250.0  # Ready at 1180, loaded at 1210, two jobs of 20 s
    assert left.presence.recall == 1.0
    assert left.presence.lead_s < 300.0


def test_two_users_are_both_there() -> None:
    policy = Scripted(one_machine)
    replay(policy, [Arrival(1000.0, 20.0, "ann"), Arrival(1010.0, 20.0, "bob")], World(presence=Presence()))
    assert max(view.presence.present for view in policy.seen) == 2


def test_without_presence_nothing_is_said() -> None:
    policy = Scripted(one_machine)
    replay(policy, [Arrival(1000.0, 20.0, "ann")], World())
    assert all(view.presence.present == 0 and view.presence.left_at is None for view in policy.seen)


def test_recall_leaves_sessions_unannounced_by_a_seed() -> None:
    stream = [Arrival(10_000.0 * number, 20.0, "ann") for number in range(200)]

    def announced(recall: float, seed: int) -> list[float]:
        policy = Scripted(one_machine)
        replay(policy, stream, World(presence=Presence(recall=recall, seed=seed)))
        return [view.now for view in policy.seen if view.now % 10_000 == 9_700]

    assert len(announced(0.7, 0)) == pytest.approx(139, abs=20)
    assert announced(0.7, 0) == announced(0.7, 0) != announced(0.7, 1)
    assert announced(0.0, 0) == []


def test_signals_that_were_really_told_hold_until_they_run_out_or_somebody_left() -> None:
    told = (
        Told(100.0, "conjure", 1000.0),
        Told(500.0, "conjure", 1400.0),  # said again
        Told(2000.0, "conjure", 2900.0),
        Told(2100.0, "conjure", 2100.0),  # left
    )
    policy = Scripted(one_machine)
    replay(policy, [Arrival(5000.0, 1.0)], World(told=told))
    seen = [(view.now, view.presence.present) for view in policy.seen]
    assert (100.0, 1) in seen
    assert (1000.0, 1) in seen
    assert (1400.0, 0) in seen
    assert (2000.0, 1) in seen
    assert (2100.0, 0) in seen


def test_a_bridge_shortens_the_wait() -> None:
    def over_the_bridge(view: PlanView) -> Plan:
        return Plan((Launch("bridge", 1, "somebody waits", 0.0),) if view.backlog and not view.machines else ())

    outcome = replay(Scripted(over_the_bridge), [Arrival(0.0, 20.0)], World(offers=(STANDARD, BRIDGE)))
    assert outcome.waits == (30.0,)


# -- the whole -----------------------------------------------------------------------------------------------------


def random_stream(seed: int, jobs: int) -> list[Arrival]:
    chance = random.Random(seed)
    at, stream = 0.0, []
    for _ in range(jobs):
        at += chance.choice((0.0, 2.0, 15.0, 60.0, 400.0, 3000.0))
        stream.append(Arrival(at, chance.choice((1.0, 10.0, 45.0, 200.0)), chance.choice("abc"), chance.choice("xy")))
    return stream


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000), jobs=st.integers(1, 20), times=st.sampled_from((0.3, 1.0, 5.0, 20.0)))
def test_every_job_runs_once_and_no_policy_beats_the_bound(seed: int, jobs: int, times: float) -> None:
    stream = random_stream(seed, jobs)
    for world in (
        World(max_machines=4).at_wait_price(times),
        World(offers=(STANDARD, BRIDGE), presence=Presence(gap_s=600.0)).at_wait_price(times),
    ):
        best = best_of(stream, world)
        assert best.bound_usd <= best.schedule_usd + 1e-9 <= best.zero_wait_usd + 2e-9
        for policy in policies().values():
            outcome = replay(policy(), stream, world)
            assert len(outcome.waits) == jobs
            assert outcome.busy_s == pytest.approx(sum(job.service_s for job in stream))
            assert outcome.billed_s >= outcome.busy_s
            assert min(outcome.waits) >= 0
            assert outcome.cost >= best.bound_usd - 1e-9


def test_the_same_stream_gives_the_same_outcome() -> None:
    stream = day()
    world = World(offers=(STANDARD, BRIDGE), presence=Presence(recall=0.7, seed=3))
    for policy in policies().values():
        assert replay(policy(), stream, world) == replay(policy(), stream, world)


def test_the_plan_beats_what_others_do_on_the_sample() -> None:
    silent = compare(day(), World(), policies())
    told = compare(day(), World(presence=Presence()), policies([PLAN]))
    others = [silent.outcomes[name].cost for name in BASELINES]
    assert silent.outcomes[PLAN].cost < 1.1 * min(others)
    assert told.outcomes[PLAN].cost < 0.6 * min(others)


def test_p95_is_by_nearest_rank() -> None:
    outcome = replace(replay(ScaleToZero(), [Arrival(0.0, 1.0)], World()), waits=tuple(float(n) for n in range(1, 21)))
    assert (outcome.wait(0.5), outcome.wait(0.95), outcome.wait(1.0)) == (10.0, 19.0, 20.0)


# -- streams ---------------------------------------------------------------------------------------------------------


def trace_of(users: dict[str, int]) -> Trace:
    chance = random.Random(0)
    jobs = [Arrival(float(chance.randrange(86_400)), 30.0, user) for user, count in users.items() for _ in range(count)]
    return Trace(tuple(sorted(jobs, key=lambda job: job.at)))


def test_draws_are_the_same_for_the_same_seed_and_others_for_another() -> None:
    trace = trace_of({f"u{number}": 200 - number for number in range(100)})
    for stream in STREAMS:
        assert draw(trace, stream, seed=1, count=3) == draw(trace, stream, seed=1, count=3)
        drawn = {tuple(draw(trace, stream, seed=seed)[0]) for seed in range(8)}
        assert len(drawn) > 1


def test_streams_are_what_they_are_called() -> None:
    trace = trace_of({f"u{number}": 200 - number for number in range(100)})
    heavy, solo = draw(trace, "heavy", seed=5, count=3), draw(trace, "solo", seed=5, count=3)
    assert {len(jobs) for jobs in heavy} < {200, 199, 198, 197}
    assert len({jobs[0].user for jobs in solo}) == 3
    assert all(188 < len(jobs) <= 196 for jobs in solo)
    team, video = draw(trace, "team", seed=5)[0], draw(trace, "video", seed=5)[0]
    assert len({job.user for job in team}) == 10
    assert [job.at for job in team] == [job.at for job in video]
    assert [6 * job.service_s for job in team] == [job.service_s for job in video]


def test_a_trace_is_read_by_its_header() -> None:
    lines = ["user,kind,service_s,arrival_s\n", "ann,t2i,3.5,20\n", "bob,i2i,0,5\n", "bob,i2i,4,10\n"]
    trace = read_trace(lines)
    assert trace.jobs == (Arrival(10.0, 4.0, "bob", "i2i"), Arrival(20.0, 3.5, "ann", "t2i"))
    assert trace.left_out == 1


def test_run_times_can_be_said_for_a_trace_without_them() -> None:
    assert read_trace(["arrival_s\n", "1\n"], service_s=12.0).jobs == (Arrival(1.0, 12.0),)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["service_s\n", "1\n"], "no column arrival_s"),
        ([], "no column arrival_s"),
        (["arrival_s\n", "1\n"], "no column service_s"),
        (["arrival_s,service_s\n", "1,2\n", "x,2\n"], "line 3 of the trace: arrival_s is 'x'"),
        (["arrival_s,service_s\n", "1,nan\n"], "line 2 of the trace: service_s is 'nan'"),
        (["arrival_s,service_s\n", "1e18,5\n"], "line 2 of the trace: arrival_s is '1e18'"),
        (["arrival_s,service_s\n", "1,5\n", "2,1e18\n"], "line 3 of the trace: service_s is '1e18'"),
        (["arrival_s,service_s\n", "1,inf\n"], "line 2 of the trace: service_s is 'inf'"),
        (["arrival_s,service_s\n", "-1,2\n"], "arrival_s is '-1'"),
        (["arrival_s,service_s\n", "1\n"], "service_s is None"),
        (["arrival_s,service_s\n", "1,0\n"], "no job that ran"),
    ],
)
def test_a_trace_that_cannot_be_read_says_where(lines: Sequence[str], words: str) -> None:
    with pytest.raises(ValueInvalid, match=words):
        read_trace(lines)


def test_there_is_no_other_stream_and_no_other_policy() -> None:
    with pytest.raises(ValueInvalid, match="no stream 'studio'"):
        draw(trace_of({"a": 3}), "studio")
    with pytest.raises(ValueInvalid, match="no policy 'magic'"):
        policies(["plan", "magic"])


# -- what is recommended -----------------------------------------------------------------------------------------------


def test_the_price_of_waiting_is_solved_for() -> None:
    history = [Arrival(900.0 * number, 30.0, "ann") for number in range(60)]
    found = solve_wait_price(history, 60.0)
    assert found.met
    assert found.outcome.wait(0.95) <= 60.0
    batch = replay(CostPlan(), history, World().at_wait_price(0.5))
    assert batch.wait(0.95) > 60.0  # it had to be solved for
    assert found.outcome.usd > batch.usd


def test_a_target_that_no_price_keeps_is_not_met() -> None:
    lonely = [Arrival(86_400.0 * number, 30.0, "ann") for number in range(5)]
    found = solve_wait_price(lonely, 10.0)
    assert not found.met
    assert found.outcome.wait(0.95) > 10.0
    assert not solve_wait_price([], 10.0).met


def test_nothing_is_recommended_where_nothing_is_better() -> None:
    lonely = [Arrival(86_400.0 * number, 30.0, "ann") for number in range(8)]
    assert tune(lonely, World(max_machines=1, keep_alive_s=60.0)).recommended == []


def test_a_keep_alive_that_is_too_long_and_machines_that_are_too_few_are_told() -> None:
    lonely = [Arrival(20_000.0 * number, 30.0, "ann") for number in range(20)]
    tuned = tune(lonely, World(keep_alive_s=7200.0, max_machines=1))
    keep = next(one for one in tuned.recommended if one.setting == "keep_alive")
    assert keep.now == "7200s"
    assert keep.saves_share > 0.03
    crowd = [Arrival(20_000.0 * day + second, 120.0, "ann") for day in range(4) for second in range(30)]
    tuned = tune(crowd, World(max_machines=1).at_wait_price(20))
    assert [(one.setting, one.now) for one in tuned.recommended if one.setting == "max_machines"] == [
        ("max_machines", "1")
    ]
