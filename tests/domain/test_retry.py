"""What follows a failed run: a table over the whole error tree, and the limits."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runcomfy.domain import exceptions as tree
from runcomfy.domain.exceptions import RunComfyError
from runcomfy.domain.retry import (
    BUSY_FIRST,
    KINDS,
    PAUSE_FIRST,
    PAUSE_MOST,
    Decision,
    Fail,
    Kind,
    Pause,
    Quarantine,
    Retry,
    RetryPolicy,
    Scope,
    Stopped,
    StoreTrouble,
    growing,
    kind_of,
)

POLICY = RetryPolicy()


def most(_: float, high: float) -> float:
    return high


def decide(error: RunComfyError, policy: RetryPolicy = POLICY, **changes: Any) -> Decision:
    situation: dict[str, Any] = {
        "submitted": True,
        "server_stays": True,
        "retries_attempted": 0,
        "retry_limit": None,
        "kill_count": 0,
        "pauses": 0,
        "draw": most,
    }
    return policy.decide(error, **{**situation, **changes})


def family(root: type[RunComfyError] = RunComfyError) -> Iterator[type[RunComfyError]]:
    yield root
    for child in root.__subclasses__():
        if child.__module__ == tree.__name__:
            yield from family(child)


def by_code(kind: type[RunComfyError]) -> str:
    return kind.code


EVERY = sorted(set(family()), key=by_code)
WRONG = sorted(set(family(tree.BadInput)), key=by_code)


@pytest.mark.parametrize("error", EVERY, ids=by_code)
def test_every_error_of_the_tree_has_a_row_of_its_own(error: type[RunComfyError]) -> None:
    assert error in KINDS, f"say in runcomfy/domain/retry.py what follows {error.__name__}"
    for submitted in (False, True):
        assert decide(error(), submitted=submitted) is not None


def test_a_users_own_error_goes_by_its_base() -> None:
    class Melted(tree.GpuOutOfMemory):
        """The GPU is liquid."""

    assert kind_of(Melted()) is Kind.TRANSIENT
    assert isinstance(decide(Melted()), Retry)


@pytest.mark.parametrize("error", WRONG, ids=by_code)
def test_what_was_asked_for_wrongly_is_never_tried_again(error: type[RunComfyError]) -> None:
    assert decide(error(), submitted=False) == Fail("error")
    assert decide(error()) == Fail("error")


@pytest.mark.parametrize(
    "error",
    [
        tree.NodeFailed,
        tree.GpuOutOfMemory,
        tree.NodeStuck,
        tree.JobTimeout,
        tree.BootTimeout,
        tree.OutputMissing,
        tree.OutputCorrupt,
        tree.DownloadFailed,
        tree.PromptRemoved,
        RunComfyError,
    ],
)
def test_what_passes_is_tried_again_up_to_the_limit(error: type[RunComfyError]) -> None:
    assert isinstance(decide(error(), retries_attempted=0), Retry)
    assert isinstance(decide(error(), retries_attempted=1), Retry)
    last = decide(error(), retries_attempted=2)
    assert isinstance(last, Fail)
    assert last.why == "limit"


def test_limit_two_means_three_runs_and_a_jobs_own_limit_counts() -> None:
    def runs(retry_limit: int | None) -> int:
        retries = 0
        while isinstance(decide(tree.NodeFailed(), retries_attempted=retries, retry_limit=retry_limit), Retry):
            retries += 1
        return retries + 1

    assert [runs(limit) for limit in (None, 0, 1, 5)] == [3, 1, 2, 6]


def test_waits_double_up_to_the_most_and_are_drawn_below_that() -> None:
    policy = RetryPolicy(limit=99)
    waits = [decide(tree.NodeFailed(), policy, retries_attempted=n) for n in range(10)]
    seconds = [wait.delay.total_seconds() for wait in waits if isinstance(wait, Retry)]
    assert seconds == [5, 10, 20, 40, 80, 160, 320, 600, 600, 600]
    least = decide(tree.NodeFailed(), retries_attempted=1, draw=lambda low, _: low)
    assert least == Retry(timedelta(0))


@pytest.mark.parametrize("error", [tree.ServerRestarted, tree.WorkerDead, tree.MachineLost, tree.MachineFailed])
def test_a_job_that_kills_two_machines_is_quarantined(error: type[RunComfyError]) -> None:
    first = decide(error(), kill_count=0)
    assert isinstance(first, Retry)
    assert first.killed_machine
    assert isinstance(decide(error(), kill_count=1), Quarantine)


def test_a_machine_that_failed_before_the_job_got_there_is_not_the_jobs_fault() -> None:
    decision = decide(tree.MachineFailed(), submitted=False, kill_count=1)
    assert isinstance(decision, Retry)
    assert not decision.killed_machine


@pytest.mark.parametrize(
    "error",
    [
        tree.ConfigurationError,
        tree.CredentialsMissing,
        tree.AuthRejected,
        tree.AccessDenied,
        tree.OutOfCredit,
        tree.WrongUrl,
        tree.NotComfyUI,
        tree.ServerTooOld,
        tree.ServerUnreachable,
        tree.DiskFull,
    ],
)
def test_what_every_job_misses_pauses_this_computer_and_costs_the_job_nothing(error: type[RunComfyError]) -> None:
    retry_in = [
        pause.retry_in
        for pauses in range(7)
        if isinstance(pause := decide(error(), submitted=False, retries_attempted=2, pauses=pauses), Pause)
        and pause.scope is Scope.HOST
    ]
    assert len(retry_in) == 7
    assert retry_in[0] == PAUSE_FIRST
    assert retry_in[-1] == PAUSE_MOST
    assert retry_in == sorted(retry_in, key=lambda wait: wait or timedelta(0))


def test_a_budget_stops_the_whole_queue_until_its_window_turns_or_somebody_resumes_it() -> None:
    resets = datetime(2026, 3, 2, tzinfo=UTC)
    details = {"resets_at": resets.isoformat()}
    assert decide(tree.BudgetExceeded(), submitted=False) == Pause(Scope.QUEUE, None)
    assert decide(tree.BudgetExceeded(details={"resets_at": None})) == Pause(Scope.QUEUE, None)
    assert decide(tree.BudgetExceeded(details=details)) == Pause(Scope.QUEUE, None, until=resets)
    too_small = {**details, "lease_usd": "0.20"}  # one lease costs more than the budget: no window allows it
    assert decide(tree.BudgetExceeded(details=too_small)) == Pause(Scope.QUEUE, None)


@pytest.mark.parametrize("error", [tree.NoCapacity, tree.ProviderBusy, tree.RateLimited])
def test_a_provider_that_cannot_now_is_asked_again_soon(error: type[RunComfyError]) -> None:
    assert decide(error(), submitted=False, retries_attempted=2) == Pause(Scope.HOST, BUSY_FIRST)


@pytest.mark.fault(72)
def test_a_server_that_falls_silent_under_a_job_is_waited_for_with_its_prompt() -> None:
    error = tree.ServerUnreachable()
    assert decide(error, server_stays=True) == Pause(Scope.HOST, PAUSE_FIRST)
    assert POLICY.keeps_prompt(error, server_stays=True)


def test_a_machine_of_ones_own_that_falls_silent_is_left_and_the_job_tried_elsewhere() -> None:
    error = tree.ServerUnreachable()
    decision = decide(error, server_stays=False)
    assert isinstance(decision, Retry)
    assert decision.end_prompt
    assert not POLICY.keeps_prompt(error, server_stays=False)


def test_somebody_pressed_stop_on_the_server_and_is_obeyed() -> None:
    assert decide(tree.PromptInterrupted()) == Fail("error")


def test_a_prompt_that_may_still_run_must_be_seen_ended_before_the_next_run() -> None:
    for error in (tree.JobTimeout(), tree.NodeStuck()):
        for retries in (0, 2):
            decision = decide(error, retries_attempted=retries)
            assert isinstance(decision, (Retry, Fail))
            assert decision.end_prompt
    assert decide(tree.JobTimeout(), submitted=False, retries_attempted=2) == Fail("limit")


def test_our_own_stops_and_a_database_that_refuses_decide_nothing_about_the_job() -> None:
    assert decide(tree.Interrupted()) == decide(tree.LeaseLost()) == Stopped()
    for error in (tree.StoreUnavailable(), tree.StoreCorrupt(), tree.StoreTooNew()):
        assert decide(error) == StoreTrouble()
        assert POLICY.keeps_prompt(error, server_stays=True)
    assert POLICY.keeps_prompt(tree.LeaseLost(), server_stays=False)


@given(
    st.timedeltas(min_value=timedelta(milliseconds=1), max_value=timedelta(hours=1)),
    st.timedeltas(min_value=timedelta(milliseconds=1), max_value=timedelta(days=1)),
    st.integers(min_value=-5, max_value=10_000),
)
def test_a_growing_wait_never_passes_its_most(first: timedelta, top: timedelta, times: int) -> None:
    wait = growing(first, top, times)
    assert timedelta(0) < wait <= top
    assert growing(first, top, times + 1) >= wait


@given(
    st.sampled_from(EVERY),
    st.booleans(),
    st.booleans(),
    st.integers(0, 6),
    st.one_of(st.none(), st.integers(0, 6)),
    st.integers(0, 3),
)
def test_no_job_is_retried_beyond_its_limit_nor_after_two_kills(
    error: type[RunComfyError], submitted: bool, stays: bool, retries: int, limit: int | None, kills: int
) -> None:
    decision = decide(
        error(),
        submitted=submitted,
        server_stays=stays,
        retries_attempted=retries,
        retry_limit=limit,
        kill_count=kills,
    )
    if isinstance(decision, Retry):
        assert retries < (2 if limit is None else limit)
        assert timedelta(0) <= decision.delay <= timedelta(minutes=10)
        assert not (decision.killed_machine and kills + 1 >= 2)
    if isinstance(decision, Quarantine):
        assert submitted
        assert decision.killed >= 2
