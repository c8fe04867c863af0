"""Small rules that everything rests on, each at its edge: where mutants had survived."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from math import inf
from typing import Any

import pytest

from runcomfy.domain.exceptions import RequestFailed, ValueInvalid
from runcomfy.domain.health import Breaker, BreakerRules
from runcomfy.domain.job import JobId, JobResult, JobStatus, Output, OutputKind, PromptId
from runcomfy.domain.keep_alive import worth_of_start
from runcomfy.domain.machine import MachineId
from runcomfy.domain.marked import Branch, Leaf, Problem, joined, plain, what_it_is
from runcomfy.domain.moment import FARTHEST, moment
from runcomfy.domain.out_file import checked_out_file
from runcomfy.domain.pacing import TokenBucket
from runcomfy.domain.place_key import server_key
from runcomfy.domain.queued import Barred
from runcomfy.domain.secret import Secret, SecretUrl
from runcomfy.domain.serverless import Fault, error_of, estimate
from runcomfy.domain.sidecar import fits_range
from runcomfy.domain.staffing import OVERLOAD_S, Staffing
from runcomfy.domain.time_left import Span
from runcomfy.domain.work import Work
from runcomfy.domain.workflow import canonical_sha256
from runcomfy.domain.workflow_io import _extension

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)


# -- secrets -------------------------------------------------------------------------------------------------------


def test_a_secret_prints_as_stars_however_it_is_printed() -> None:
    secret = Secret("abc")
    assert (repr(secret), str(secret), f"{secret}", f"{secret:>5}") == ("Secret('***')", "***", "***", "  ***")
    assert (bool(secret), bool(Secret(""))) == (True, False)


def test_a_machines_address_prints_masked_and_is_revealed_without_its_slash() -> None:
    url = SecretUrl("https://abc-comfyui.runcomfy.com/")
    assert (f"{url}", f"{url:>40}") == (url.masked, url.masked.rjust(40))
    assert "abc" not in repr(url) + str(url)
    assert url.reveal() == "https://abc-comfyui.runcomfy.com"


# -- what `--json` prints --------------------------------------------------------------------------------------------


def test_a_result_is_printed_with_these_names() -> None:
    output = Output("9", OutputKind.IMAGE, "/out/a.png", 3, "ab" * 32, name="picture", remote_name="x.png")
    result = JobResult(
        JobId("job"),
        JobStatus.DONE,
        prompt_id=PromptId("prompt"),
        outputs=(output,),
        seeds={"3.seed": 7},
        cost_usd=Decimal("0.000001"),
        timings={"boot": 1.23456789},
    )
    shown: dict[str, Any] = {
        "job_id": "job",
        "status": "done",
        "prompt_id": "prompt",
        "outputs": [{"node": "9", "kind": "image", "path": "/out/a.png", "size_bytes": 3, "sha256": "ab" * 32}],
        "seeds": {"3.seed": 7},
        "cost_usd": "0.000001",
        "timings": {"boot": 1.234568},
    }
    assert result.as_dict() == shown
    failed = JobResult(JobId("job"), JobStatus.FAILED, cost_usd=Decimal("1E-7"), error={"code": "x"}).as_dict()
    assert (failed["error"], failed["cost_usd"], failed["status"]) == ({"code": "x"}, "0.0000001", "failed")


# -- money and time --------------------------------------------------------------------------------------------------


def test_a_start_is_worth_what_is_billed_before_work_and_the_waiting_at_the_machines_price() -> None:
    def worth(price: float) -> float:
        return worth_of_start(load_s=30, billed_boot_s=20, usd_per_hour=price, wait_usd_per_hour=4, waits_s=100)

    assert worth(2.0) == 30 + 20 + 200
    assert worth(0.5) == 30 + 20 + 800
    assert worth(0.0) == worth(-1.0) == inf


def test_a_moment_is_an_age_a_day_or_a_time() -> None:
    assert moment(" 90m ", now=NOON) == NOON - timedelta(minutes=90)
    assert moment("2026-04-01", now=NOON) == datetime(2026, 4, 1, tzinfo=UTC)
    there = datetime(2026, 4, 1, 14, tzinfo=timezone(timedelta(hours=2)))
    at = moment("2026-04-01T14:00+02:00", now=NOON)
    assert (at, at.utcoffset()) == (there, timedelta(0))
    assert moment("1d", now=NOON, whole_days=True) == datetime(2026, 4, 30, tzinfo=UTC)
    assert moment("23h", now=NOON, whole_days=True) == NOON - timedelta(hours=23)
    assert moment("1d", now=NOON) == NOON - timedelta(days=1)


def test_a_moment_is_at_most_a_hundred_years_away() -> None:
    assert moment((NOON - FARTHEST).isoformat(), now=NOON) == NOON - FARTHEST
    with pytest.raises(ValueInvalid, match="farther away"):
        moment((NOON - FARTHEST - timedelta(seconds=1)).isoformat(), now=NOON)
    with pytest.raises(ValueInvalid, match="is no time"):
        moment("soon", now=NOON)


def test_what_a_job_worked_ends_with_its_computing_or_its_row_or_now() -> None:
    def work(computed_at: datetime | None = None, ended_at: datetime | None = None) -> Work:
        begun = Work(MachineId("m"), JobId("j"), 1, "w", "medium", NOON, computing_at=NOON)
        return replace(begun, computed_at=computed_at, ended_at=ended_at)

    minute = timedelta(minutes=1)
    assert work(computed_at=NOON + minute, ended_at=NOON + 2 * minute).busy(NOON + 9 * minute) == minute
    assert work(ended_at=NOON + 2 * minute).busy(NOON + 9 * minute) == 2 * minute
    assert work(ended_at=NOON + 2 * minute).busy(None) == 2 * minute
    assert work().busy(NOON + 3 * minute) == 3 * minute
    assert work().busy(None) == timedelta(0)
    assert work().busy(NOON - minute) == timedelta(0)


def test_ranges_that_do_not_depend_on_each_other_add_up_like_errors_do() -> None:
    assert Span(7, 10, 14).plus(Span(16, 20, 23)) == Span(25, 30, 35)
    assert Span(0, 1, 2).plus(Span(0, 1, 2)).low == pytest.approx(2 - 2**0.5)


def test_a_request_costs_between_its_run_and_the_time_it_is_kept_warm() -> None:
    told = estimate(
        Decimal(3600),
        created_at=NOON,
        running_from=NOON + timedelta(seconds=10),
        finished_at=NOON + timedelta(seconds=30),
        keep_warm=timedelta(seconds=60),
    )
    assert [told.low_usd, told.usd, told.high_usd] == [Decimal(20), Decimal(30), Decimal(90)]
    assert told.as_dict() == {
        "estimate": True,
        "usd": str(told.usd),
        "low_usd": str(told.low_usd),
        "high_usd": str(told.high_usd),
        "usd_per_hour": "3600",
        "note": "estimated from the request's times; RunComfy's dashboard has the charge",
    }
    never_ran = estimate(
        Decimal(3600), created_at=NOON, running_from=None, finished_at=NOON + timedelta(seconds=30), keep_warm=None
    )
    assert never_ran.low_usd == never_ran.usd == never_ran.high_usd == 30


def test_an_error_that_nobody_knows_keeps_its_code_and_words() -> None:
    error = error_of(Fault(code=99_999, name="Odd", words="it broke"), details={"request_id": "r"})
    assert isinstance(error, RequestFailed)
    assert "(code 99999): it broke" in error.message
    assert error.details == {
        "request_id": "r",
        "runcomfy_code": 99_999,
        "runcomfy_error": "Odd",
        "runcomfy_words": "it broke",
    }
    assert "without saying why" in error_of(Fault(), details={}).message


# -- health, pace, queues ----------------------------------------------------------------------------------------------


def test_only_a_launch_after_a_rest_is_the_trial() -> None:
    rules = BreakerRules(limit=1)
    assert not Breaker().began(0.0).trial
    opened = Breaker().failed(0.0, "ill", rules)
    assert not opened.began(rules.rest_s - 1).trial
    trial = opened.began(rules.rest_s)
    assert trial.trial
    again = trial.failed(rules.rest_s, "ill", rules)
    assert (again.trial, again.rests, again.rests_until) == (False, 2, 3 * rules.rest_s)


def test_after_a_trial_that_went_well_one_failure_opens_it_again() -> None:
    rules = BreakerRules(limit=3)
    opened = Breaker(rests_until=10.0, rests=1, failures=7, trial=True)
    usable = opened.usable(rules)
    assert (usable.failures, usable.rests_until, usable.trial) == (2, None, False)
    assert usable.failed(20.0, "ill", rules).rests_until is not None


def test_a_reserve_leaves_one_token_to_everybody() -> None:
    bucket = TokenBucket(per_second=1.0, burst=2, reserve=9)
    assert bucket.take(0.0, urgent=False) == 0.0
    assert bucket.take(0.0, urgent=False) > 0
    assert bucket.take(0.0, urgent=True) == 0.0


def test_those_are_barred_whose_user_or_project_is() -> None:
    assert not Barred()
    assert Barred(users=frozenset({"a"}))
    assert Barred(projects=frozenset({"a"}))


def test_jobs_that_come_together_wait_for_half_of_those_beside_them() -> None:
    calm: dict[str, Any] = {
        "rate": 0.001, "seen": 1e9, "service_s": 100.0, "service_cv2": 1.0, "usd_per_hour": 1.0,
        "wait_usd_per_hour": 1.0,
    }  # fmt: skip
    alone, five = (Staffing(**calm, group=group)._queue_at(2, 0.001) for group in (1.0, 5.0))
    assert five - alone == pytest.approx(0.1 * (5 / 2 - 1) / 2)


def test_a_queue_out_of_balance_grows_by_what_comes_too_much() -> None:
    told = Staffing(1.0, 1e9, 10.0, 0.0, 1.0, 1.0, overlap=0.0)
    assert told._queue_at(4, 1.0) == pytest.approx((10 - 4) / 10 * OVERLOAD_S / 2)
    assert told._queue_at(0, 1.0) == OVERLOAD_S / 2


# -- names and numbers ---------------------------------------------------------------------------------------------


def test_a_number_may_lie_on_a_limit() -> None:
    assert fits_range(5, 5, 5)
    assert not fits_range(6, None, 5)
    assert not fits_range(4, 5, None)
    assert fits_range("many", 5, 5)


def test_an_ending_is_that_of_the_last_part_of_a_name() -> None:
    assert _extension("a.b\\c") == ""
    assert _extension("a\\b.PNG") == ".png"
    assert _extension("a/.hidden") == ""


def test_a_graph_has_the_digest_of_its_shortest_writing() -> None:
    shortest = b'{"1":{"class_type":"A","inputs":{"x":[1,2]}}}'
    graph = {"1": {"inputs": {"x": [1, 2]}, "class_type": "A"}}
    assert canonical_sha256(graph) == hashlib.sha256(shortest).hexdigest()


def test_a_public_server_is_told_apart_by_sixteen_digits() -> None:
    key = server_key("https://secret-name.example.com:8443/proxy/", "host")
    digest = hashlib.sha256(b"secret-name.example.com:8443/proxy").hexdigest()
    assert key.endswith(f":8443#{digest[:16]}")
    assert "secret" not in key


@pytest.mark.parametrize(("text", "absolute"), [("C:/out/a.png", True), ("1:/out/a.png", False), ("é:/a.png", False)])
def test_a_drive_is_one_letter_and_a_colon(text: str, absolute: bool) -> None:
    if absolute:
        assert checked_out_file(text, "C:/out", "C:/out").replace("\\", "/") == "C:/out/a.png"
    else:
        with pytest.raises(ValueInvalid) as caught:
            checked_out_file(text, "/out/jobs", "/elsewhere")
        assert caught.value.details["field"] == "outputs.file_path"


# -- job files -----------------------------------------------------------------------------------------------------


def test_what_stands_there_is_said_by_its_kind() -> None:
    assert what_it_is(Branch(1, ())) == "names with values"
    assert what_it_is(Leaf(1, "", quoted=False)) == "nothing"
    assert what_it_is(Leaf(1, "a", quoted=True)) == "the text 'a'"
    assert what_it_is(Leaf(1, "a")) == "a"
    assert len(what_it_is(Leaf(1, "a" * 300))) <= 60


def test_five_problems_are_told_in_full_and_more_are_counted() -> None:
    problems = [Problem(line, f"f{line}", "odd", "mend it") for line in range(1, 7)]
    assert "more" not in joined(problems[:5])[0]
    assert joined(problems)[0].endswith("; and 1 more")
    assert joined(problems)[1] == "mend it"
    assert problems[0].as_dict() == {"line": 1, "field": "f1", "message": "odd", "hint": "mend it"}


def test_a_value_that_cannot_be_used_is_named_by_its_place() -> None:
    problems: list[Problem] = []
    assert plain(Leaf(7, ".inf"), "inputs.cfg", problems) is None
    assert [(problem.line, problem.field) for problem in problems] == [(7, "inputs.cfg")]
