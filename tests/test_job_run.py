"""One run of a job by itself: whether it may go back, what it costs the job, and which end is written down."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from runcomfy.application.job_run import EXCUSED_DELAY, EXCUSES, FLAPS_EXCUSED, JobRun, Why
from runcomfy.application.journal import EarlierPrompt
from runcomfy.application.placing import OWN_MACHINE, POOL_MACHINE, Place
from runcomfy.application.seat import Seat
from runcomfy.domain.exceptions import (
    BudgetExceeded,
    JobFileInvalid,
    LeaseLost,
    LocalError,
    MachineLost,
    NodeFailed,
    PromptRemoved,
    ServerRestarted,
    ServerUnreachable,
    StoreUnavailable,
    WorkerDead,
)
from runcomfy.domain.job import JobRequest, PromptId
from runcomfy.domain.queued import Ending, Outcome, QueueStatus, Reason
from runcomfy.testing.contracts.jobs_words import a_job, put, take
from runcomfy.testing.workers import Worker


class Told(Seat):
    """A seat that says what the test wants."""

    void = server_gone = flapped = waited = unpaid = outran = False
    server_stays = True

    def __init__(self, **says: bool) -> None:
        self.__dict__.update(says)


async def a_run(worker: Worker, **fields: Any) -> JobRun:
    await put(worker.store, a_job(**fields))
    return JobRun(worker.executor._bench, await take(worker.store, worker.id))


def at(run: JobRun, kind: str = POOL_MACHINE, *, outlives: bool = True, **says: bool) -> JobRun:
    nowhere: Any = None
    run._place = Place(nowhere, kind, alone=True, key="machine:1", seat=Told(**says), outlives=outlives)
    return run


async def test_a_run_is_cut_for_the_first_reason_unless_its_claim_or_its_user_is_gone(worker: Worker) -> None:
    row = (await a_run(worker)).row
    for reasons, counts, word in (
        ([Why.DRAIN], Why.DRAIN, "put-back"),
        ([Why.TAKEN_BACK, Why.DRAIN], Why.TAKEN_BACK, "put-back"),
        ([Why.DRAIN, Why.CANCELLED], Why.CANCELLED, "cancelled"),
        ([Why.CANCELLED, Why.DRAIN], Why.CANCELLED, "cancelled"),
        ([Why.CANCELLED, Why.LOST], Why.LOST, "discarded"),
    ):
        run = JobRun(worker.executor._bench, row)
        assert (run.cancel.is_set(), run._left_as()) == (False, "")
        for why in reasons:
            run.cut(why)
        assert (run.why, run.cancel.is_set(), run._left_as()) == (counts, True, word)
        run.journal.done = run.row
        assert run._left_as() == "done"  # the result stands


async def test_a_run_can_go_back_while_nothing_of_it_is_on_its_way(worker: Worker) -> None:
    run = await a_run(worker)

    def goes_back() -> bool:
        return run.can_go_back

    assert goes_back()
    run.journal.touched = True
    assert not goes_back()  # it is being sent
    run.journal.sent = PromptId("p")
    assert goes_back()
    run.ending = True
    assert not goes_back()
    run.ending, run._asked_back = False, True
    assert not goes_back()
    assert not await run.take_back()
    run._asked_back = False
    run.cut(Why.DRAIN)
    assert not goes_back()
    fresh = await a_run(worker)
    assert await fresh.take_back()
    assert (fresh.why, await fresh.take_back()) == (Why.TAKEN_BACK, False)


async def test_a_server_stays_where_its_keeper_says_so_and_what_is_never_reached_is_not_ours_to_end(
    worker: Worker,
) -> None:
    run = await a_run(worker)
    assert run._server_stays
    assert at(run, "server")._server_stays
    assert at(run)._server_stays
    assert not at(run, server_stays=False)._server_stays
    assert at(run, outlives=False)._server_stays
    run.cut(Why.DRAIN)
    assert not at(run, outlives=False)._server_stays
    assert at(run)._server_stays
    assert not at(run, OWN_MACHINE)._server_stays  # it ends with this process
    assert at(run, "server")._server_stays


async def test_a_prompt_may_run_on_where_it_was_sent_to_a_machine_that_is_not_seen_gone(worker: Worker) -> None:
    run = at(await a_run(worker))
    assert not at(run)._may_run_on
    run.journal.touched = True
    assert at(run)._may_run_on
    assert not at(run, server_gone=True)._may_run_on
    assert not at(run, "server")._may_run_on
    assert at(run, void=True)._leaves(ServerUnreachable("silent"))
    assert at(run, void=True)._keeps(ServerUnreachable("silent"))
    assert not at(run)._leaves(NodeFailed("it burst"))
    run._withdrawn = True
    assert at(run)._leaves(NodeFailed("it burst"))  # it is nowhere
    assert not run._keeps(ServerUnreachable("silent"))


async def test_machines_that_fail_a_job_before_it_has_sent_anything_cost_it_nothing_three_times(worker: Worker) -> None:
    lost = MachineLost("it is gone")
    run = at(await a_run(worker))
    for number in range(1, EXCUSES + 1):
        excused = run._excused(lost)
        assert excused is not None
        assert (excused.outcome, excused.delay, excused.keeps_prompt) == (Outcome.PUT_BACK, EXCUSED_DELAY, False)
        assert excused.error == lost.as_dict()
        assert run._bench.excused[run.row.id] == number
    assert run._excused(lost) is None
    assert run.row.id not in run._bench.excused
    assert run._excused(lost) is not None
    assert run._excused(NodeFailed("it burst")) is None  # no fault of the machine
    assert run.row.id not in run._bench.excused
    assert at(run, "server")._excused(lost) is None
    run._place = None
    assert run._excused(lost) is None
    run = at(run)
    run.journal.touched = True
    assert run._excused(lost) is None  # it may have died of the job


async def test_machines_that_flap_under_a_job_cost_it_nothing_six_times(worker: Worker) -> None:
    lost = MachineLost("it was not Ready")
    run = at(await a_run(worker), flapped=True)
    run.journal.touched = True
    for _ in range(FLAPS_EXCUSED):
        excused = run._excused(lost)
        assert excused == Ending(Outcome.PUT_BACK, error=lost.as_dict(), delay=EXCUSED_DELAY, keeps_prompt=True)
    assert run._excused(lost) is None


async def test_a_job_that_waited_its_turn_or_whose_machine_nobody_pays_goes_back_at_no_cost(worker: Worker) -> None:
    run = at(await a_run(worker), waited=True)
    run.journal.touched, run.journal.sent = True, PromptId("p")
    lost = MachineLost("it is gone")
    for _ in range(9):
        excused = run._excused(lost)
        assert excused == Ending(Outcome.PUT_BACK, error=lost.as_dict(), keeps_prompt=True)
        assert run._bench.excused[run.row.id] == 1
    restarted = run._excused(ServerRestarted("it forgot"))
    assert restarted is not None
    assert not restarted.keeps_prompt
    broke = BudgetExceeded("no more today", hint="wait")
    assert at(run)._excused(broke) is None
    unpaid = at(run, unpaid=True)._excused(broke)
    assert unpaid == Ending(Outcome.PUT_BACK, error=broke.as_dict(), keeps_prompt=True)


async def test_what_a_request_leaves_open_the_row_and_the_settings_say(worker: Worker) -> None:
    run = await a_run(worker, user="ann", project="film")
    asked, settings = await run._request(), worker.executor.settings
    assert (asked.job_id, asked.user, asked.project) == (run.row.uid, "ann", "film")
    assert (asked.timeout, asked.out_dir) == (settings.job_timeout, settings.jobs_finished)
    assert asked.earlier_outputs == {}
    own = JobRequest("image_invert", user="ben", project="book", timeout=timedelta(seconds=7), out_dir="/out")
    run.row = replace(run.row, request=own, user="", project="")
    asked = await run._request()
    assert (asked.user, asked.project, asked.out_dir) == ("ben", "book", "/out")
    assert asked.timeout == timedelta(seconds=7)
    run.row = replace(run.row, request=None)
    with pytest.raises(JobFileInvalid, match="nothing of what to run"):
        await run._request()


async def test_a_machine_that_was_ended_with_its_lease_did_not_die_of_the_job(worker: Worker) -> None:
    """And one that did is counted, whether the job is tried again or has failed."""
    row = (await a_run(worker)).row
    for limit, outcome in ((None, Outcome.REQUEUED), (0, Outcome.FAILED)):
        for outran in (False, True):
            run = at(JobRun(worker.executor._bench, replace(row, retry_limit=limit)), outran=outran)
            run.journal.touched = True
            ending = await run._ending(MachineLost("it is gone"))
            assert (ending.outcome, ending.killed_machine) == (outcome, not outran)
            assert ending.end_prompt == (outcome is Outcome.REQUEUED)  # it may run on there until that is seen gone


EARLIER = EarlierPrompt(PromptId("p"), "machine:1", accepted=True)


async def test_a_job_under_which_machines_die_is_taken_out_with_the_reason_and_what_may_still_run_is_ended(
    worker: Worker,
) -> None:
    row = replace((await a_run(worker)).row, kill_count=worker.executor.settings.kill_limit - 1)
    lost, dead = MachineLost("it is gone"), WorkerDead("its worker is dead")
    for error, stays, end_prompt in ((lost, True, False), (dead, True, True), (dead, False, False)):
        run = at(JobRun(worker.executor._bench, row), server_stays=stays)
        run.journal.touched = True
        assert await run._ending(error) == Ending(
            Outcome.QUARANTINED,
            error=error.as_dict(),
            reason=Reason.QUARANTINED,
            killed_machine=True,
            end_prompt=end_prompt,
        )
    run = at(JobRun(worker.executor._bench, row), outran=True)
    run.journal.touched = True
    assert (await run._ending(lost)).outcome is Outcome.REQUEUED  # it was ended at the end of its lease
    # The second death counts also if the first is only known of by what the server has forgotten.
    run = at(JobRun(worker.executor._bench, replace(row, kill_count=0)))
    run.journal.touched = run.journal.killed = True
    assert (await run._ending(lost)).outcome is Outcome.QUARANTINED


async def test_what_is_tried_again_waits_as_long_as_was_drawn_and_says_why(worker: Worker) -> None:
    bench = replace(worker.executor._bench, draw=lambda low, high: high)
    row = (await a_run(worker)).row
    burst = NodeFailed("it burst")
    for tried, times in ((0, 1), (1, 2)):
        run = at(JobRun(bench, replace(row, retries_attempted=tried)))
        run.journal.touched = True
        assert await run._ending(burst) == Ending(
            Outcome.REQUEUED, error=burst.as_dict(), delay=bench.policy.first * times
        )
    run = at(JobRun(bench, replace(row, retry_limit=0)))
    run.journal.touched = True
    assert await run._ending(burst) == Ending(Outcome.FAILED, error=burst.as_dict())
    # The server died under an earlier prompt, and this attempt fails by itself: that death counts all the same.
    for limit, outcome in ((None, Outcome.REQUEUED), (0, Outcome.FAILED)):
        run = at(JobRun(bench, replace(row, retry_limit=limit)))
        run.journal.killed = True
        ending = await run._ending(burst)
        assert (ending.outcome, ending.killed_machine, ending.end_prompt) == (outcome, True, False)


async def test_the_prompt_of_an_earlier_attempt_is_not_forgotten_by_a_run_that_never_got_to_it(worker: Worker) -> None:
    row = (await a_run(worker)).row
    burst = NodeFailed("it burst")
    for limit in (None, 0):
        for earlier, gone, touched in (
            (EARLIER, False, False),
            (EARLIER, True, False),
            (EARLIER, False, True),
            (None, False, False),
        ):
            run = at(JobRun(worker.executor._bench, replace(row, retry_limit=limit)), server_gone=gone)
            run.journal._earlier, run.journal.touched = earlier, touched
            assert (await run._ending(burst)).end_prompt == (earlier is not None and not gone and not touched)


async def test_a_run_that_this_computer_or_the_database_ends_is_put_back_at_no_cost(worker: Worker) -> None:
    row, queue = (await a_run(worker)).row, worker.queue
    silent, refused = ServerUnreachable("silent"), StoreUnavailable("locked")
    for error, pauses in ((refused, []), (silent, [silent.code])):
        run = at(JobRun(worker.executor._bench, row), "server")
        run.journal.touched = run.journal.killed = True
        assert await run._ending(error) == Ending(
            Outcome.PUT_BACK, error=error.as_dict(), keeps_prompt=True, killed_machine=error is silent
        )
        assert [pause.reason for pause in await queue.pauses()] == pauses
    run = at(JobRun(worker.executor._bench, row), "server")
    run._asked_back = run.journal.touched = True
    assert await run._ending(PromptRemoved("it is not there")) == Ending(Outcome.PUT_BACK)  # taken back by ourselves
    assert not run._keeps(silent)
    run = at(JobRun(worker.executor._bench, row), "server")
    run.journal.touched = True
    assert (await run._ending(PromptRemoved("it is not there"))).error is not None  # somebody else did


async def test_only_a_run_with_which_its_job_has_ended_for_good_counts_as_failed(worker: Worker) -> None:
    run = await a_run(worker)
    burst = NodeFailed("it burst")
    for outcome, failed in (
        (Outcome.FAILED, True),
        (Outcome.REQUEUED, False),
        (Outcome.QUARANTINED, True),
        (Outcome.PUT_BACK, False),
    ):
        run._tell_ending(Ending(outcome), burst, None)
        assert run.failed == failed


@pytest.mark.fault(55)
async def test_a_run_that_does_not_count_is_over_also_if_the_database_cannot_say_whose_the_job_is(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refusal says nothing against the claim: only what is read does."""
    run = await a_run(worker)
    troubles: list[LocalError | None] = []
    run._bench = replace(run._bench, trouble=troubles.append)

    async def refused(_: Any) -> None:
        raise StoreUnavailable("locked")

    await run._insist_on_claim()
    with monkeypatch.context() as locked:
        locked.setattr(run._bench.store, "job", refused, raising=False)
        await run._insist_on_claim()
        await run._discard()
    assert [type(trouble) for trouble in troubles] == [StoreUnavailable] * 2
    assert "another worker has taken it over" in worker.said[-1]
    await worker.queue.cancel(run.row.id)
    with pytest.raises(LeaseLost):
        await run._insist_on_claim()
    await run._discard()
    assert worker.said[-1].endswith(": cancelled")


@pytest.mark.fault(55)
async def test_an_end_that_cannot_be_written_down_leaves_the_claim_open_for_the_next_worker(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped:
        fresh = False

    async def refused(*_: Any, **__: Any) -> None:
        raise StoreUnavailable("locked")

    run = await a_run(worker)
    assert (run.unwritten, run.failed) == (False, False)
    monkeypatch.setattr(run.journal, "_pulse", Stopped())
    with monkeypatch.context() as locked:
        locked.setattr(run._bench.store, "finish", refused, raising=False)
        await run._conclude(NodeFailed("it burst"))
    assert (run.unwritten, run.failed) == (True, False)
    assert "could not be written down" in worker.said[-1]
    assert (await worker.queue.job(run.row.id)).status is QueueStatus.PROCESSING
    again = JobRun(worker.executor._bench, replace(run.row, retry_limit=0))
    await again._conclude(NodeFailed("it burst"))
    assert (again.unwritten, again.failed) == (False, True)
