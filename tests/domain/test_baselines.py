"""What others would do: each policy by its own numbers, at the second."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from runcomfy.application.replay import Arrival, Outcome, World, replay
from runcomfy.domain.baselines import BASELINES, BreakEven, FixedTimeout, Keda, Knative, ScaleToZero
from runcomfy.domain.plan_view import Policy


def over(policy: Policy, stream: Sequence[Arrival], *, most: int = 32, wait_price: float = 5.0) -> Outcome:
    return replay(policy, stream, World(max_machines=most).at_wait_price(wait_price))


ONE = [Arrival(600.0, 20.0)]


def test_scale_to_zero_rents_for_every_job_that_waits() -> None:
    outcome = over(ScaleToZero(), [Arrival(0.0, 20.0)] * 5)
    assert outcome.launches == 5
    assert outcome.billed_s == 5 * 50


def test_a_fixed_timeout_keeps_one_machine_and_adds_for_what_would_take_longer_than_a_start() -> None:
    few = [Arrival(0.0, 30.0), Arrival(1.0, 30.0), Arrival(2.0, 30.0)]
    assert over(FixedTimeout(), few).launches == 1
    assert over(FixedTimeout(), [Arrival(0.0, 30.0)] * 20).launches == 3  # 600 s of work, 210 s for a start
    assert over(FixedTimeout(idle_s=77.0), ONE).billed_s == 50 + 77


@pytest.mark.parametrize(("wait_price", "kept_s"), [(1.0, 240.0), (5.0, 1080.0), (20.0, 4230.0)])
def test_break_even_keeps_the_last_machine_as_long_as_its_start_costs(wait_price: float, kept_s: float) -> None:
    assert over(BreakEven(), ONE, wait_price=wait_price).billed_s == 50 + kept_s


def test_break_even_lets_further_machines_go_earlier() -> None:
    outcome = over(BreakEven(), [Arrival(0.0, 30.0)] * 20)
    # Three run seven, seven and six jobs. The third spares 30/2 s of waiting and the second 30/1 s, at 5 times.
    assert outcome.billed_s == 3 * 30 + 600 + (30 + 5 * 15) + (30 + 5 * 30) + 1080


def test_knative_goes_to_zero_after_the_stable_window_and_the_grace_period() -> None:
    class Whole(Knative):
        target = 1.0

    idle = over(Whole(), ONE).billed_s - 50
    assert 60 + 30 <= idle <= 60 + 30 + 2 * 2


def test_knative_wants_two_machines_for_one_job_since_each_is_to_be_seven_tenths_busy() -> None:
    assert over(Knative(), ONE).launches == 2


def test_knative_panics_at_a_burst_and_does_not_scale_down_meanwhile() -> None:
    burst = [Arrival(float(number % 3), 30.0) for number in range(30)]
    outcome = over(Knative(), burst)
    assert outcome.most_machines == 32  # 30 at once over a target of 0.7 is 43, and 32 are allowed
    assert outcome.waits[-1] < 220
    assert min(outcome.waits) > 205  # the first tick comes with the first job


def test_knative_never_lets_more_than_half_go_at_once() -> None:
    burst = [Arrival(0.0, 20.0) for _ in range(8)]
    late = [Arrival(210.0 + 20.0 * number, 15.0) for number in range(30)]
    outcome = over(Knative(), [*burst, *late], most=8)
    assert outcome.most_machines == 8
    assert outcome.billed_s < 8 * 900


def test_keda_looks_at_the_queue_every_30_s_and_keeps_the_last_machine_for_the_cooldown() -> None:
    polled = over(Keda(), [Arrival(601.0, 20.0)])
    assert polled.waits == (29.0 + 210.0,)
    idle = polled.billed_s - 50
    # The cooldown counts from the last poll that saw work.
    assert 300 - 30 <= idle <= 300 + 30
    assert over(Keda(), [Arrival(600.0, 20.0)]).waits == (210.0,)


def test_keda_doubles_at_most_and_does_not_scale_down_for_five_minutes() -> None:
    outcome = over(Keda(), [Arrival(600.0, 400.0)] * 20)
    starts = sorted({round(wait) for wait in outcome.waits})
    assert starts == [210, 225, 240, 255]  # 1, then 5, 10, 20 machines, every 15 s
    assert outcome.billed_s >= 20 * (430 + 200)


def test_every_baseline_obeys_the_most_and_the_fewest_machines() -> None:
    for make in BASELINES.values():
        stream = [Arrival(float(number), 50.0) for number in range(12)]
        assert over(make(), stream, most=2).most_machines <= 2
        kept = replay(make(), ONE, World(min_machines=1))
        assert kept.billed_s > 3600


def test_a_baseline_is_made_afresh_for_every_run() -> None:
    for name, make in BASELINES.items():
        assert make() is not make() or name in ("scale-to-zero", "fixed-5-min", "break-even")
        assert make().name == name
        assert over(make(), ONE) == over(make(), ONE)
