"""When a machine is ill, when a type rests, and how far machines are paid ahead."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runcomfy.domain.exceptions import (
    AuthRejected,
    BootTimeout,
    BudgetExceeded,
    DiskFull,
    GpuOutOfMemory,
    JobTimeout,
    LaunchRefused,
    LaunchUnclear,
    MachineFailed,
    MachineLost,
    NoCapacity,
    NodeFailed,
    NodeStuck,
    OutOfCredit,
    ProviderBusy,
    RateLimited,
    RunComfyError,
    ServerRestarted,
    ServerUnreachable,
    WorkerDead,
)
from runcomfy.domain.health import (
    ONE_CRASH,
    Blame,
    Breaker,
    BreakerRules,
    Harm,
    Health,
    HealthRules,
    blame_of,
    harm_of,
)
from runcomfy.domain.renewal import is_due, lease_for, look_every, total_for

RULES = HealthRules()
BREAKS = BreakerRules()


# -- one machine -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "harm"),
    [
        (None, Harm.NOTHING),
        (NodeFailed(), Harm.NOTHING),
        (JobTimeout(), Harm.NOTHING),
        (DiskFull(), Harm.NOTHING),
        (GpuOutOfMemory(), Harm.GPU),
        (ServerRestarted(), Harm.KILLED),
        (NodeStuck(), Harm.KILLED),
        (WorkerDead(), Harm.DEAD),
        (ServerUnreachable(), Harm.SILENT),
        (MachineFailed(), Harm.SILENT),
        (MachineLost(), Harm.SILENT),
    ],
)
def test_what_the_end_of_a_job_says_of_its_machine(error: RunComfyError | None, harm: Harm) -> None:
    assert harm_of(error) is harm


def test_a_new_machine_is_well_and_one_bad_word_does_not_make_it_ill() -> None:
    assert Health().illness(0.0, RULES) == ""
    for harm in (Harm.NOTHING, Harm.KILLED, Harm.GPU, Harm.SILENT):
        assert Health().harmed(harm, "x", 1.0).illness(2.0, RULES) == ""
    assert Health().flipped(1.0, RULES).illness(2.0, RULES) == ""


def test_a_dead_worker_makes_it_ill_at_once_and_the_first_reason_is_kept() -> None:
    health = Health().harmed(Harm.DEAD, "nothing runs", 1.0).died("something else")
    assert health.illness(1e6, RULES) == "nothing runs"


def test_two_crashes_make_it_ill_two_jobs_that_died_of_one_do_not() -> None:
    health = Health().harmed(Harm.KILLED, "restarted", 100.0).harmed(Harm.KILLED, "restarted", 100.0 + ONE_CRASH)
    assert health.illness(200.0, RULES) == ""
    assert "jobs died on it 2 times" in health.harmed(Harm.KILLED, "restarted", 500.0).illness(500.0, RULES)


def test_gpu_failures_count_in_a_row() -> None:
    health = Health().harmed(Harm.GPU, "oom", 1.0).worked("w", 10.0, None, RULES).harmed(Harm.GPU, "oom", 2.0)
    assert health.illness(3.0, RULES) == ""
    assert "GPU failed 2 times" in health.harmed(Harm.GPU, "oom", 4.0).illness(4.0, RULES)


def test_slow_runs_count_in_a_row_and_only_where_it_is_known_what_is_usual() -> None:
    slow = Health().worked("mesh", 51.0, 10.0, RULES)
    assert slow.illness(0.0, RULES) == ""
    assert "mesh took 51 s, usually 10 s" in slow.worked("mesh", 51.0, 10.0, RULES).illness(0.0, RULES)
    assert slow.worked("mesh", 50.0, 10.0, RULES).worked("mesh", 51.0, 10.0, RULES).illness(0.0, RULES) == ""
    unknown = slow.worked("new", 500.0, None, RULES)
    assert unknown.illness(0.0, RULES) == ""
    assert unknown.worked("mesh", 51.0, 10.0, RULES).illness(0.0, RULES) != ""


def test_runs_of_a_few_seconds_say_nothing_about_speed() -> None:
    health = Health()
    for _ in range(10):
        health = health.worked("icon", 4.9, 0.1, RULES)
    assert health.illness(0.0, RULES) == ""


@given(st.lists(st.floats(0.1, 400.0), max_size=12), st.integers(1, 5), st.floats(10.0, 600.0))
def test_flips_make_it_ill_if_and_only_if_enough_lie_within_the_window(
    gaps: list[float], limit: int, window: float
) -> None:
    rules = HealthRules(flip_limit=limit, flip_window_s=window)
    health, now, times = Health(), 0.0, []
    for gap in gaps:
        now += gap
        times.append(now)
        health = health.flipped(now, rules)
        recent = [at for at in times if now - at < window]
        assert (health.illness(now, rules) != "") == (len(recent) >= limit)
        assert len(health.flips) <= limit


# -- types and accounts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "blame"),
    [
        (NoCapacity(), Blame.STOCK),
        (LaunchRefused(), Blame.REFUSED),
        (OutOfCredit(), Blame.ACCOUNT),
        (AuthRejected(), Blame.ACCOUNT),
        (BootTimeout(), Blame.TYPE),
        (MachineFailed(), Blame.TYPE),
        (ProviderBusy(), Blame.BUSY),
        (RateLimited(), Blame.BUSY),
        (LaunchUnclear(), Blame.BUSY),
        (BudgetExceeded(), Blame.NOBODY),
        (DiskFull(), Blame.NOBODY),
    ],
)
def test_whose_doing_a_launch_is_that_failed(error: RunComfyError, blame: Blame) -> None:
    assert blame_of(error) is blame


def test_it_rests_after_failures_in_a_row_and_twice_as_long_each_time_the_trial_fails() -> None:
    breaker, now, rests = Breaker(), 0.0, []
    for _ in range(2):
        breaker = breaker.failed(now, "no start", BREAKS)
        assert breaker.rests_until is None
    for _ in range(6):
        breaker = breaker.failed(now, "no start", BREAKS)
        assert breaker.room(now) == 0
        assert "no start; possible again in" in breaker.why_not(now)
        assert breaker.rests_until is not None
        rests.append(breaker.rests_until - now)
        now = breaker.rests_until
        assert breaker.room(now) == 1
        assert breaker.why_not(now) == ""
        breaker = breaker.began(now)
        assert breaker.room(now) == 0
        assert "one is being tried again" in breaker.why_not(now)
    assert rests == [600, 1200, 2400, 3600, 3600, 3600]


def test_below_the_limit_a_failure_makes_a_pause_that_grows_and_ends_by_itself_or_when_a_machine_is_usable() -> None:
    rules = replace(BREAKS, limit=12)
    breaker, now, pauses = Breaker(), 0.0, []
    for _ in range(8):
        breaker = breaker.failed(now, "no start", rules)
        assert breaker.pausing(now)
        assert breaker.room(now) == 0
        assert breaker.closed_until is not None
        pauses.append(breaker.closed_until - now)
        assert breaker.why_not(now) == f"no start; possible again in {pauses[-1]:.0f} s"
        assert breaker.usable(rules).room(now) is None
        now = breaker.closed_until
        assert breaker.room(now) is None
    assert pauses == [15, 30, 60, 120, 240, 240, 240, 240]


def test_a_trial_that_works_closes_it_but_the_next_failure_opens_it_again_until_a_job_went_well() -> None:
    opened = Breaker().failed(0.0, "sold out", BREAKS, rest_s=60.0)
    assert opened.rests_until == 60.0
    usable = opened.began(60.0).usable(BREAKS)
    assert usable.room(61.0) is None
    assert usable.failed(62.0, "ill", BREAKS).room(62.0) == 0
    worked = usable.worked()
    assert worked == Breaker()
    again = worked.failed(63.0, "ill", BREAKS)
    assert (again.rests_until, again.room(63.0 + BREAKS.pause_s(1))) == (None, None)


def test_a_trial_that_was_broken_off_may_be_made_again() -> None:
    breaker = Breaker().failed(0.0, "x", BREAKS, rest_s=1.0).began(2.0)
    assert breaker.room(2.0) == 0
    assert breaker.released().room(2.0) == 1


def test_failures_of_launches_that_were_under_way_already_make_no_rest_longer() -> None:
    breaker = Breaker().failed(0.0, "x", BREAKS, rest_s=60.0)
    assert breaker.failed(1.0, "x", BREAKS, rest_s=60.0).rests_until == 60.0


@given(
    st.lists(
        st.tuples(st.sampled_from(["fail", "stock", "began", "usable", "worked", "released"]), st.floats(0.0, 900.0)),
        max_size=40,
    )
)
def test_a_breaker_never_rests_longer_than_an_hour_and_always_lets_somebody_try(
    events: list[tuple[str, float]],
) -> None:
    breaker, now = Breaker(), 0.0
    for event, gap in events:
        now += gap
        match event:
            case "fail":
                breaker = breaker.failed(now, "x", BREAKS)
            case "stock":
                breaker = breaker.failed(now, "x", BREAKS, rest_s=BREAKS.stock_rest_s)
            case "began":
                breaker = breaker.began(now)
            case "usable":
                breaker = breaker.usable(BREAKS)
            case "worked":
                breaker = breaker.worked()
            case "released":
                breaker = breaker.released()
        assert breaker.room(now) in (None, 0, 1)
        assert (breaker.why_not(now) == "") == (breaker.room(now) != 0)
        later = now + BREAKS.rest_most_s + 1
        assert breaker.room(later) != 0 or breaker.trial
        assert breaker.released().room(later) != 0


# -- paying ahead ------------------------------------------------------------------------------------------


@given(
    st.integers(0, 5_000),
    st.floats(30.0, 3_600.0).map(lambda s: timedelta(seconds=round(s))),
    st.floats(0.05, 20.0),
)
def test_every_machine_gets_its_turn_within_half_a_lease_at_half_the_accounts_rate(
    machines: int, lease: timedelta, rate: float
) -> None:
    paid = lease_for(machines, lease=lease, requests_per_second=rate)
    assert paid >= lease
    takes_s = machines / (rate / 2)
    assert takes_s <= paid.total_seconds() / 2 + 1e-6
    if paid > lease:  # and not longer than that needs: it is what a dead process leaves behind
        assert paid.total_seconds() - 2 * takes_s < 1


def test_ten_minutes_do_for_150_machines_and_a_thousand_are_paid_67_minutes_ahead() -> None:
    ten = timedelta(minutes=10)
    assert lease_for(150, lease=ten, requests_per_second=1.0) == ten
    assert lease_for(151, lease=ten, requests_per_second=1.0) > ten
    assert lease_for(1000, lease=ten, requests_per_second=1.0) == timedelta(seconds=4000)


@pytest.mark.fault(62)
@given(st.integers(0, 5_000), st.floats(1.0, 3_600.0).map(lambda s: timedelta(seconds=s)))
def test_a_lease_is_over_only_after_more_than_three_looks_were_missed(machines: int, lease: timedelta) -> None:
    paid = lease_for(machines, lease=lease, requests_per_second=1.0)
    left_when_due = paid.total_seconds() / 2
    assert is_due(left_when_due, paid)
    assert not is_due(left_when_due + 0.001, paid)
    assert left_when_due > 3 * look_every(lease)


@given(st.floats(0.0, 1e6), st.integers(60, 7_200).map(lambda s: timedelta(seconds=s)))
def test_what_is_asked_for_is_a_total_in_whole_seconds_a_lease_from_now(used: float, lease: timedelta) -> None:
    total = total_for(used, lease)
    assert total.microseconds == 0
    assert abs((total - lease).total_seconds() - used) <= 0.5
