"""What is learned of arrivals, and which signals are believed."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runcomfy.domain.demand import FAST_S, SILENCES_KEPT, SLOW_S, Demand, SignalScore


def test_nothing_is_known_before_anything_came() -> None:
    view = Demand(service_s=40).view(1000)
    assert (view.seen, view.rate_fast, view.rate_slow, view.silences) == (0, 0, 0, ())
    assert (view.service_s, view.waits_per_cold, view.last_arrival) == (40, None, None)


def test_a_steady_stream_has_its_rate() -> None:
    demand = Demand()
    for second in range(0, 6000, 10):
        demand.arrived(second)
    view = demand.view(6000)
    assert view.rate_fast == pytest.approx(0.1, rel=0.06)
    assert view.rate_slow == pytest.approx(0.1, rel=0.02)
    assert view.seen == 600


def test_rates_fade_while_nothing_comes() -> None:
    demand = Demand()
    demand.arrived(0, 9)
    assert demand.view(0).rate_fast == pytest.approx(9 / FAST_S)
    assert demand.view(FAST_S).rate_fast == pytest.approx(9 / FAST_S / math.e)
    assert demand.view(SLOW_S).rate_slow == pytest.approx(9 / SLOW_S / math.e)


def test_measured_run_times_win_over_predicted_ones() -> None:
    demand = Demand()
    demand.arrived(0, 1, 100.0)
    assert demand.view(1).service_s == 100
    demand.served(20)
    assert demand.view(2).service_s == 20
    for _ in range(50):
        demand.served(20)
    assert demand.view(3).service_cv2 < 0.1


def test_a_silence_lasts_from_the_last_work_to_the_next() -> None:
    demand = Demand()
    demand.work_came(5)  # no silence was begun
    demand.went_silent(10)
    demand.went_silent(20)  # said again: it still began at 10
    assert demand.view(50).silent_since == 10
    demand.work_came(70)
    demand.work_came(90)
    assert demand.view(100).silences == (60,)
    assert demand.view(100).silent_since is None


def test_old_silences_are_forgotten() -> None:
    demand = Demand()
    for number in range(SILENCES_KEPT + 10):
        demand.went_silent(10 * number)
        demand.work_came(10 * number + 5)
    assert len(demand.view(1e6).silences) == SILENCES_KEPT


def test_waiting_is_told_by_cold_start() -> None:
    demand = Demand()
    demand.waited(500)  # before any cold start: of something else
    demand.cold_start(0)
    demand.waited(210)
    demand.waited(190)
    assert demand.view(1).waits_per_cold == pytest.approx(400)


def test_jobs_that_are_sent_together_are_a_group() -> None:
    demand = Demand()
    for minute in range(20):
        for second in range(3):
            demand.arrived(60 * minute + second)
    view = demand.view(1200)
    assert view.group == pytest.approx(3)
    assert view.rate_session == pytest.approx(3 / 58)
    calm = Demand()
    for minute in range(20):
        calm.arrived(60 * minute)
    assert calm.view(1200).group == 1


def test_whoever_waits_for_a_result_meets_nobody() -> None:
    alone, random = Demand(), Demand()
    for number in range(200):
        alone.work_came(60 * number)
        alone.arrived(60 * number, 1, 30.0)
        alone.served(30)
        alone.went_silent(60 * number + 30)
        random.arrived(60 * number, 1, 30.0)  # always while the one before still runs
        random.served(30)
    assert alone.view(12_000).overlap < 0.3
    assert random.view(12_000).overlap > 1.5


def test_a_known_batch_says_nothing_of_what_is_to_come() -> None:
    demand = Demand()
    demand.arrived(0, 100, 30.0, batch=True)
    assert demand.view(0).rate_fast == 0
    assert demand.view(0).only_batches
    demand.arrived(10)
    assert not demand.view(10).only_batches
    demand.went_silent(100)
    demand.work_came(200)
    demand.arrived(200, 5, batch=True)
    assert demand.view(200).only_batches


@given(st.lists(st.tuples(st.floats(0, 1000), st.integers(0, 5)), max_size=60))
def test_rates_are_never_negative_and_jobs_are_counted(steps: list[tuple[float, int]]) -> None:
    demand, now = Demand(), 0.0
    for gap, count in steps:
        now += gap
        demand.arrived(now, count)
    view = demand.view(now + 1)
    assert view.seen == sum(count for _, count in steps)
    assert view.rate_fast >= 0
    assert view.rate_slow >= 0
    assert view.group >= 1


def test_a_source_that_is_followed_by_work_is_precise() -> None:
    scores = SignalScore()
    for day in range(20):
        scores.said("conjure", 86_400 * day)
        scores.work_came(86_400 * day + 240)
    score = scores.score("conjure")
    assert score.precision == 1
    assert score.recall == pytest.approx(1)
    assert score.lead_s == pytest.approx(240)
    assert scores.lead_s(300) == pytest.approx(240, abs=5)
    assert scores.pays("conjure", 1000)


def test_a_source_that_cries_wolf_is_not_believed_for_long() -> None:
    scores = SignalScore()
    assert scores.pays("wolf", 1000)
    for day in range(10):
        scores.said("wolf", 86_400 * day, 86_400 * day + 900)
        scores.work_came(86_400 * day + 40_000)
    assert not scores.pays("wolf", 1000)
    assert scores.score("wolf").precision < 0.3
    assert scores.score("wolf").recall == 0
    assert scores.pays("another", 1000)


def test_a_source_that_left_before_work_came_was_wrong() -> None:
    scores = SignalScore(trust=0.0, free_s=180.0)
    scores.said("ann", 0)
    scores.left("ann", 600)
    scores.work_came(700)
    assert scores.score("ann").precision == 0
    assert scores.score("ann").vain_s == 420


def test_one_signal_said_again_is_one_signal() -> None:
    scores = SignalScore()
    for minute in range(10):
        scores.said("ann", 60 * minute, 60 * minute + 900)
    scores.work_came(660, "ann")
    assert scores.score("ann").said == 1
    assert scores.score("ann").lead_s == 660


def test_recall_is_the_share_of_works_that_were_announced() -> None:
    scores = SignalScore()
    for number in range(200):
        if number % 2:
            scores.said("ann", 1000 * number)
        scores.work_came(1000 * number + 300)
    assert scores.score("ann").recall == pytest.approx(0.5, abs=0.03)
    assert [score.source for score in scores.scores()] == ["ann"]


@given(st.lists(st.tuples(st.sampled_from(["said", "left", "work"]), st.sampled_from(["a", "b"]), st.floats(0, 500))))
def test_scores_are_shares(events: list[tuple[str, str, float]]) -> None:
    scores, now = SignalScore(), 0.0
    for what, source, gap in events:
        now += gap
        if what == "said":
            scores.said(source, now, now + 300)
        elif what == "left":
            scores.left(source, now)
        else:
            scores.work_came(now, source)
    for score in scores.scores():
        assert 0 <= score.precision <= 1
        assert -1e-9 <= score.recall <= 1 + 1e-9
        assert 0 <= score.vain_s <= now + 300
