"""How long a run will take: from own history, by what is closest, with a range as wide as the history is thin."""

from __future__ import annotations

import math
import random
from datetime import UTC, datetime, timedelta
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runcomfy.domain.estimate import Basis, History, predict, quantile, run_seconds
from runcomfy.domain.job import JobId
from runcomfy.domain.machine import MachineId
from runcomfy.domain.work import Work

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)
numbers = count()


def run(
    seconds: float,
    workflow: str = "portrait",
    server_type: str = "medium",
    *,
    cold: bool = False,
    outcome: str = "done",
) -> Work:
    number = next(numbers)
    began = NOON + timedelta(seconds=number)
    return Work(
        MachineId("m"), JobId(f"job-{number}"), 1, workflow, server_type, began,
        computing_at=began, computed_at=began + timedelta(seconds=seconds), outcome=outcome, cold=cold,
    )  # fmt: skip


def test_without_any_history_there_is_no_number() -> None:
    assert predict([], "portrait", "medium") is None
    assert predict([run(5, outcome="failed")], "portrait", "medium") is None


def test_many_runs_on_the_type_are_told_as_they_are() -> None:
    found = predict([run(seconds) for seconds in range(10, 31)], "portrait", "medium")
    assert found is not None
    assert (found.p50_s, found.mean_s) == (20, 20)
    assert (found.p10_s, found.p90_s) == pytest.approx((11.2, 28.8))  # of 21 runs the 2.2nd from either end
    assert (found.runs, found.basis) == (21, Basis.SAME)
    assert found.cv2 == pytest.approx(sum((s - 20) ** 2 for s in range(10, 31)) / 21 / 400)
    assert found.words == "21 runs of it on this type"


def test_one_run_gives_a_wide_range_and_more_of_the_same_narrow_it() -> None:
    widths = []
    for times in (1, 2, 5, 9, 10):
        found = predict([run(20)] * times, "portrait", "medium")
        assert found is not None
        assert found.p10_s <= 20 <= found.p90_s
        widths.append(found.p90_s / found.p10_s)
    assert widths[0] > 4
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] == 1


@pytest.mark.parametrize("times", [1, 3, 9, 10, 40])
@pytest.mark.parametrize("spread", [0.1, 0.3, 0.6])
def test_a_range_holds_for_four_of_five_runs_to_come(times: int, spread: float) -> None:
    chance = random.Random(times)
    held = 0
    for _ in range(300):
        found = predict([run(chance.lognormvariate(3, spread)) for _ in range(times)], "portrait", "medium")
        assert found is not None
        held += found.p10_s <= chance.lognormvariate(3, spread) <= found.p90_s
    assert held >= 300 * 0.74


def test_warm_runs_are_asked_for_and_cold_ones_answer_where_there_are_no_others() -> None:
    history = History([run(60, cold=True), run(20), run(20), run(90, "video", cold=True)])
    warm, cold = history.predict("portrait", "medium"), history.predict("portrait", "medium", cold=True)
    only_cold = history.predict("video", "medium")
    assert warm is not None
    assert cold is not None
    assert only_cold is not None
    assert (warm.p50_s, warm.cold) == (20, False)
    assert (cold.p50_s, cold.cold) == (60, True)
    assert (only_cold.p50_s, only_cold.cold) == (90, True)
    assert history.cold_extra_s("medium") == 40
    assert history.cold_extra_s("large") is None


def test_a_type_it_has_not_run_on_is_scaled_by_what_ran_on_both() -> None:
    works = [run(20, "upscale", "medium"), run(10, "upscale", "large"), run(60, "portrait", "medium")]
    found = predict(works, "portrait", "large")
    assert found is not None
    assert found.p50_s == pytest.approx(30)
    assert (found.basis, found.runs) == (Basis.SCALED, 1)


def test_two_types_may_be_linked_by_a_third() -> None:
    history = History(
        [
            run(40, "a", "medium"),
            run(20, "a", "large"),
            run(20, "b", "large"),
            run(5, "b", "turbo"),
            run(80, "c", "medium"),
        ]
    )
    assert history.speed("turbo", than="medium") == pytest.approx(1 / 8)
    found = history.predict("c", "turbo")
    assert found is not None
    assert found.p50_s == pytest.approx(10)


def test_without_a_link_the_range_is_wider_and_it_says_so() -> None:
    works = [run(20) for _ in range(30)]
    near, far = predict(works, "portrait", "medium"), predict(works, "portrait", "large")
    assert near is not None
    assert far is not None
    assert far.basis is Basis.UNSCALED
    assert far.p90_s >= 3 * near.p90_s
    assert far.p10_s <= near.p10_s / 3
    assert "not known" in far.words


def test_a_workflow_that_was_never_run_gets_all_that_others_took_as_its_range() -> None:
    works = [run(2, "a"), run(400, "b"), run(30, "c"), run(9_000, "slow", "small")]
    found = predict(works, "new", "medium")
    assert found is not None
    assert found.basis is Basis.OTHERS
    assert found.p10_s <= 2
    assert 400 <= found.p90_s < 9_000 * 5
    assert found.runs == 3  # those on the type itself, where there are some
    elsewhere = predict(works, "new", "turbo")
    assert elsewhere is not None
    assert elsewhere.runs == 4


def test_runs_that_were_not_seen_to_their_end_do_not_count() -> None:
    begun = Work(MachineId("m"), JobId("j"), 1, "portrait", "medium", NOON, computing_at=NOON)
    assert run_seconds(begun) is None
    assert run_seconds(run(10, outcome="put-back")) is None
    assert run_seconds(run(-5)) == 0.001  # a clock that was set back
    assert run_seconds(run(10, outcome="")) == 10  # its result is still being fetched


def test_only_the_newest_runs_count() -> None:
    found = predict([*(run(500) for _ in range(400)), *(run(10) for _ in range(100))], "portrait", "medium")
    assert found is not None
    assert (found.p50_s, found.runs) == (10, 100)


durations = st.floats(min_value=-10, max_value=1e6, allow_nan=False)
kinds = st.sampled_from(["a", "b", "c"])


@given(st.lists(st.tuples(durations, kinds, kinds, st.booleans()), max_size=30), kinds, kinds, st.booleans())
def test_a_prediction_is_in_order_finite_and_the_same_each_time(
    told: list[tuple[float, str, str, bool]], workflow: str, server_type: str, cold: bool
) -> None:
    works = [run(seconds, name, of, cold=loaded) for seconds, name, of, loaded in told]
    found = predict(works, workflow, server_type, cold=cold)
    assert found == predict(list(reversed(works)), workflow, server_type, cold=cold)
    assert (found is None) == (not works)
    if found is not None:
        assert 0 < found.p10_s <= found.p50_s <= found.p90_s
        assert found.mean_s > 0
        assert found.cv2 >= 0
        assert all(math.isfinite(value) for value in (found.p10_s, found.p50_s, found.p90_s, found.mean_s, found.cv2))
        assert 1 <= found.runs <= len(works)


@given(st.lists(durations, min_size=1), st.floats(0, 1), st.floats(0, 1))
def test_quantiles_rise_and_stay_within_the_values(values: list[float], one: float, other: float) -> None:
    low, high = sorted((one, other))
    slack = 1e-9 * max(abs(value) for value in values)
    assert min(values) - slack <= quantile(values, low) <= quantile(values, high) + slack
    assert quantile(values, high) <= max(values) + slack
    with pytest.raises(ValueError, match="no values"):
        quantile([], low)
