"""Contract of a queue's database: what a run writes down, how it ends, and what becomes of lost workers."""

# ruff: noqa: D102, S101 - the names of the tests say what is shown, and asserts show it

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from runcomfy.domain.exceptions import DiskFull, JobBusy, JobNotFound, LeaseLost
from runcomfy.domain.job import PromptId
from runcomfy.domain.machine import OwnerId
from runcomfy.domain.queued import Ending, EventKind, Outcome, Phase, QueueStatus, WorkerId
from runcomfy.ports.jobs import JobStore
from runcomfy.testing.contracts.jobs_words import (
    ALICE,
    BOB,
    CAROL,
    DAY,
    DONE,
    GRACE,
    HERE,
    LEASE,
    StoryClock,
    a_job,
    a_prompt,
    failing,
    kinds,
    plan,
    put,
    seen,
    submit,
    take,
    take_all,
)


class StepsContract:
    """What a worker writes between claim and end."""

    async def test_the_prompt_is_written_down_before_it_is_sent(self, jobs: JobStore) -> None:
        await put(jobs)
        job, prompt = await take(jobs), a_prompt()
        ahead = await jobs.write_ahead(job.id, job.token, place=HERE, prompt_id=prompt, counts_as_run=True)
        assert (ahead.phase, ahead.place, ahead.prompt_id, ahead.run_count) == (Phase.SUBMITTING, HERE, prompt, 1)
        assert ahead == await seen(jobs, job)
        other = a_prompt()
        await jobs.accepted(job.id, job.token, prompt_id=other)
        after = await seen(jobs, job)
        assert (after.phase, after.prompt_id, after.run_count) == (Phase.SUBMITTED, other, 1)
        (attempt,) = await jobs.attempts(job.id)
        assert (attempt.place, attempt.prompt_id, attempt.run) == (HERE, other, 1)
        assert (await kinds(jobs, job))[2:] == [EventKind.SUBMITTING, EventKind.SUBMITTED]

    async def test_the_next_worker_goes_on_with_the_prompt_and_the_run(self, jobs: JobStore) -> None:
        await put(jobs)
        first = await submit(jobs, await take(jobs, ALICE))
        await asyncio.sleep(7)
        await plan(jobs, dead=[ALICE])
        second = await take(jobs, BOB, places=[HERE])
        assert (second.phase, second.prompt_id, second.token) == (Phase.SUBMITTED, first.prompt_id, first.token + 1)
        assert second.start_time == first.start_time
        await jobs.attached(second.id, second.token)
        done = await jobs.finish(second.id, second.token, DONE)
        assert (done.run_count, done.retries_attempted) == (1, 0)
        assert done.duration == pytest.approx(7, abs=0.1)
        assert [attempt.run for attempt in await jobs.attempts(done.id)] == [1, 1]
        assert EventKind.ATTACHED in await kinds(jobs, done)

    async def test_a_prompt_found_where_nobody_knew_whether_it_arrived_is_there(self, jobs: JobStore) -> None:
        await put(jobs)
        job = await take(jobs)
        await jobs.write_ahead(job.id, job.token, place=HERE, prompt_id=a_prompt(), counts_as_run=True)
        await plan(jobs, dead=[ALICE])
        again = await take(jobs, BOB, places=[HERE])
        assert again.phase is Phase.SUBMITTING
        await jobs.attached(again.id, again.token)
        assert (await seen(jobs, again)).phase is Phase.SUBMITTED

    async def test_a_prompt_that_a_restarted_server_forgot_costs_another_run(self, jobs: JobStore) -> None:
        await put(jobs)
        await submit(jobs, await take(jobs, ALICE))
        await plan(jobs, dead=[ALICE])
        job = await take(jobs, BOB, places=[HERE])
        await jobs.prompt_gone(job.id, job.token, lost=True)
        gone = await seen(jobs, job)
        assert (gone.phase, gone.place, gone.prompt_id) == (Phase.NONE, None, None)
        await submit(jobs, job)
        done = await jobs.finish(job.id, job.token, DONE)
        assert (done.run_count, done.retries_attempted) == (2, 0)
        assert [attempt.run for attempt in await jobs.attempts(job.id)] == [1, 2]
        assert EventKind.PROMPT_LOST in await kinds(jobs, job)

    async def test_a_prompt_that_never_arrived_is_sent_again_in_the_same_run(self, jobs: JobStore) -> None:
        await put(jobs)
        job, prompt = await take(jobs), a_prompt()
        await jobs.write_ahead(job.id, job.token, place=HERE, prompt_id=prompt, counts_as_run=True)
        await plan(jobs, dead=[ALICE])
        job = await take(jobs, BOB, places=[HERE])
        await jobs.prompt_gone(job.id, job.token, lost=False)
        await jobs.write_ahead(job.id, job.token, place=HERE, prompt_id=prompt, counts_as_run=False)
        assert (await jobs.finish(job.id, job.token, DONE)).run_count == 1

    async def test_no_step_of_a_worker_counts_that_lost_its_lease(self, jobs: JobStore) -> None:
        await put(jobs)
        old = await submit(jobs, await take(jobs, ALICE))
        await plan(jobs, dead=[ALICE])
        new = await take(jobs, BOB, places=[HERE])
        with pytest.raises(LeaseLost, match="bob"):
            await jobs.write_ahead(old.id, old.token, place="x", prompt_id=a_prompt(), counts_as_run=True)
        with pytest.raises(LeaseLost):
            await jobs.accepted(old.id, old.token, prompt_id=a_prompt())
        with pytest.raises(LeaseLost):
            await jobs.attached(old.id, old.token)
        with pytest.raises(LeaseLost):
            await jobs.prompt_gone(old.id, old.token, lost=False)
        assert await seen(jobs, new) == new

    async def test_progress_is_kept_for_who_holds_the_job_and_told_to_nobody(self, jobs: JobStore) -> None:
        await put(jobs)
        job = await take(jobs, ALICE)
        events = len(await jobs.events())
        await jobs.report(BOB, {job.id: (90.0, "not mine")})
        await jobs.report(ALICE, {job.id: (41.5, "step 5 of 12")})
        now = await seen(jobs, job)
        assert (now.progress, now.message) == (41.5, "step 5 of 12")
        assert len(await jobs.events()) == events
        await jobs.report(ALICE, {job.id: (float("nan"), "?")})
        assert (await seen(jobs, job)).progress == 0


class EndsContract:
    """Every way an attempt can end."""

    async def test_done(self, jobs: JobStore) -> None:
        await put(jobs)
        job = await submit(jobs, await take(jobs))
        await asyncio.sleep(4.5)
        done = await jobs.finish(job.id, job.token, DONE)
        assert done == await seen(jobs, job)
        assert (done.status, done.progress, done.result, done.error_trace) == (QueueStatus.DONE, 100, DONE.result, None)
        assert (done.worker_id, done.lease_expires_at, done.phase, done.reason) == (None, None, Phase.NONE, "")
        assert done.duration == pytest.approx(4.5, abs=0.1)
        assert done.end_time is not None
        assert done.ended
        (attempt,) = await jobs.attempts(job.id)
        assert (attempt.outcome, attempt.result) == (Outcome.DONE, DONE.result)
        assert attempt.ended_at is not None
        assert (await kinds(jobs, job))[-1] is EventKind.DONE

    async def test_failed_for_good(self, jobs: JobStore) -> None:
        await put(jobs)
        job = await submit(jobs, await take(jobs))
        failed = await jobs.finish(job.id, job.token, failing(Outcome.FAILED))
        assert failed == await seen(jobs, job)
        assert (failed.status, failed.reason, failed.phase) == (QueueStatus.FAILED, "node-failed", Phase.NONE)
        assert (failed.run_count, failed.retries_attempted) == (1, 0)
        assert failed.error_trace is not None
        for word in ("node-failed: node 7 broke", "hint: look at node 7", "node: 7", "line 2"):
            assert word in failed.error_trace
        (attempt,) = await jobs.attempts(job.id)
        assert (attempt.outcome, attempt.error_code) == (Outcome.FAILED, "node-failed")
        assert attempt.error_trace == failed.error_trace
        assert await take_all(jobs) == []

    async def test_failed_and_tried_again(self, jobs: JobStore) -> None:
        await put(jobs)
        job = await submit(jobs, await take(jobs))
        again = await jobs.finish(job.id, job.token, failing(Outcome.REQUEUED, delay=timedelta(seconds=5)))
        assert again == await seen(jobs, job)
        assert (again.status, again.retries_attempted, again.run_count) == (QueueStatus.PENDING, 1, 1)
        assert again.not_before == pytest.approx(jobs.now() + timedelta(seconds=5), abs=timedelta(seconds=1))
        assert (again.end_time, again.worker_id, again.phase, again.place) == (None, None, Phase.NONE, None)
        assert "node 7 broke" in (again.error_trace or "")
        assert (await kinds(jobs, job))[-1] is EventKind.REQUEUED
        await asyncio.sleep(6)
        second = await submit(jobs, await take(jobs))
        assert "node 7 broke" in (second.error_trace or "")
        done = await jobs.finish(second.id, second.token, DONE)
        assert (done.run_count, done.retries_attempted, done.error_trace) == (2, 1, None)
        assert [attempt.run for attempt in await jobs.attempts(job.id)] == [1, 2]

    async def test_a_run_counts_also_if_it_never_came_to_the_server(self, jobs: JobStore) -> None:
        await put(jobs)
        job = await take(jobs)
        again = await jobs.finish(job.id, job.token, failing(Outcome.REQUEUED))
        assert (again.run_count, again.retries_attempted) == (1, 1)
        job = await take(jobs)
        assert (await jobs.finish(job.id, job.token, failing(Outcome.FAILED))).run_count == 2

    async def test_a_limit_of_two_means_three_runs(self, jobs: JobStore) -> None:
        await put(jobs)
        for _ in range(2):
            job = await take(jobs)
            await jobs.finish(job.id, job.token, failing(Outcome.REQUEUED))
        job = await take(jobs)
        failed = await jobs.finish(job.id, job.token, failing(Outcome.FAILED))
        assert (failed.run_count, failed.retries_attempted) == (3, 2)

    async def test_put_back_costs_nothing_and_forgets_the_prompt(self, jobs: JobStore) -> None:
        await put(jobs)
        job = await take(jobs)
        back = await jobs.finish(job.id, job.token, Ending(Outcome.PUT_BACK, delay=timedelta(seconds=3)))
        assert (back.status, back.run_count, back.retries_attempted) == (QueueStatus.PENDING, 0, 0)
        assert back.reason == ""
        assert await take_all(jobs) == []
        await asyncio.sleep(4)
        assert (await take(jobs)).phase is Phase.NONE
        assert [attempt.outcome for attempt in await jobs.attempts(job.id)] == [Outcome.PUT_BACK, None]

    async def test_put_back_with_a_prompt_that_runs_on_keeps_it_for_the_next(self, jobs: JobStore) -> None:
        await put(jobs)
        job = await submit(jobs, await take(jobs, places=[HERE]))
        back = await jobs.finish(job.id, job.token, Ending(Outcome.PUT_BACK, keeps_prompt=True))
        assert (back.phase, back.place, back.prompt_id) == (Phase.SUBMITTED, HERE, job.prompt_id)
        assert await take_all(jobs, BOB, places=["server:elsewhere"]) == []
        again = await take(jobs, BOB, places=[HERE])
        assert (await jobs.finish(again.id, again.token, DONE)).run_count == 1

    async def test_put_back_is_open_to_others_after_the_grace(self, jobs: JobStore) -> None:
        await put(jobs)
        job = await submit(jobs, await take(jobs, places=[HERE]))
        await jobs.finish(job.id, job.token, Ending(Outcome.PUT_BACK, keeps_prompt=True))
        await plan(jobs)
        await asyncio.sleep(GRACE.total_seconds() + 1)
        await plan(jobs)
        assert (await take(jobs, BOB)).id == job.id

    async def test_quarantined(self, jobs: JobStore) -> None:
        await put(jobs)
        job = await submit(jobs, await take(jobs))
        ended = await jobs.finish(job.id, job.token, failing(Outcome.QUARANTINED, killed_machine=True))
        assert (ended.status, ended.reason, ended.kill_count) == (QueueStatus.FAILED, "quarantined", 1)
        assert (await kinds(jobs, job))[-1] is EventKind.QUARANTINED

    async def test_machines_that_died_are_counted_until_it_is_done(self, jobs: JobStore) -> None:
        await put(jobs)
        job = await take(jobs)
        again = await jobs.finish(job.id, job.token, failing(Outcome.REQUEUED, killed_machine=True))
        assert again.kill_count == 1
        job = await take(jobs)
        assert job.kill_count == 1
        assert (await jobs.finish(job.id, job.token, DONE)).kill_count == 0

    @pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.CANCELLED, Outcome.QUARANTINED])
    async def test_a_prompt_that_is_no_longer_wanted_is_to_be_ended(self, jobs: JobStore, outcome: Outcome) -> None:
        await put(jobs)
        job = await submit(jobs, await take(jobs))
        ended = await jobs.finish(job.id, job.token, failing(outcome, end_prompt=True))
        assert (ended.status, ended.phase, ended.prompt_id) == (QueueStatus.FAILED, Phase.ENDING, job.prompt_id)
        assert [found.id for found in await jobs.to_end([HERE])] == [job.id]
        assert list(await jobs.to_end(["server:elsewhere"])) == list(await jobs.to_end([])) == []
        await jobs.prompt_ended(job.id, PromptId("another"))
        assert len(await jobs.to_end([HERE])) == 1
        assert ended.prompt_id is not None
        await jobs.prompt_ended(job.id, ended.prompt_id)
        await jobs.prompt_ended(job.id, ended.prompt_id)
        assert list(await jobs.to_end([HERE])) == []
        assert (await kinds(jobs, job)).count(EventKind.PROMPT_ENDED) == 1

    async def test_a_retry_after_a_timeout_has_the_old_prompt_ended_first(self, jobs: JobStore) -> None:
        await put(jobs)
        job = await submit(jobs, await take(jobs))
        await jobs.finish(job.id, job.token, failing(Outcome.REQUEUED, end_prompt=True))
        assert list(await jobs.to_end([HERE])) == []  # it waits: whoever claims it ends the prompt
        again = await take(jobs, BOB, places=[HERE])
        assert (again.phase, again.prompt_id) == (Phase.ENDING, job.prompt_id)
        failed = await jobs.finish(again.id, again.token, failing(Outcome.FAILED))
        assert failed.phase is Phase.ENDING  # nobody has seen it end

    async def test_the_prompt_seen_ended_by_who_claimed_the_job_is_forgotten(self, jobs: JobStore) -> None:
        await put(jobs)
        job = await submit(jobs, await take(jobs))
        await jobs.finish(job.id, job.token, failing(Outcome.REQUEUED, end_prompt=True))
        again = await take(jobs, BOB, places=[HERE])
        await jobs.prompt_gone(again.id, again.token, lost=False)
        assert (await kinds(jobs, job))[-1] is EventKind.PROMPT_ENDED
        await submit(jobs, again)
        assert (await jobs.finish(again.id, again.token, DONE)).run_count == 2

    @pytest.mark.fault(64)
    async def test_the_result_of_a_worker_that_comes_too_late_is_discarded(self, jobs: JobStore) -> None:
        await put(jobs)
        old = await take(jobs, ALICE)
        await asyncio.sleep(62)
        assert [job.id for job in await plan(jobs)] == [old.id]
        new = await take(jobs, BOB)
        named: list[str] = []
        with pytest.raises(LeaseLost):
            await jobs.finish(old.id, old.token, DONE, publish=lambda: named.append("too late"))
        assert named == []
        assert await seen(jobs, new) == new
        assert [a.outcome for a in await jobs.attempts(old.id)] == [Outcome.DISCARDED, None]
        assert (await kinds(jobs, old))[-1] is EventKind.DISCARDED
        assert (await jobs.finish(new.id, new.token, DONE)).status is QueueStatus.DONE

    async def test_an_answer_that_was_lost_on_the_way_is_given_again(self, jobs: JobStore) -> None:
        await put(jobs)
        job = await take(jobs)
        done = await jobs.finish(job.id, job.token, DONE)
        named: list[str] = []
        assert await jobs.finish(job.id, job.token, DONE) == done
        assert await jobs.finish(job.id, job.token, DONE, publish=lambda: named.append("again")) == done
        assert named == []
        with pytest.raises(LeaseLost):
            await jobs.finish(job.id, job.token, failing(Outcome.FAILED))
        assert (await kinds(jobs, job)).count(EventKind.DONE) == 1

    async def test_results_get_their_names_in_the_moment_they_count(self, jobs: JobStore) -> None:
        await put(jobs)
        job = await take(jobs)
        named: list[str] = []
        done = await jobs.finish(job.id, job.token, DONE, publish=lambda: named.append("a.png"))
        assert (done.status, named) == (QueueStatus.DONE, ["a.png"])

    @pytest.mark.parametrize(
        "error", [DiskFull("no room"), OSError("no"), ValueError("no")], ids=lambda e: type(e).__name__
    )
    async def test_results_that_cannot_be_named_do_not_count(self, jobs: JobStore, error: Exception) -> None:
        await put(jobs)
        job = await take(jobs)

        def publish() -> None:
            raise error

        with pytest.raises(type(error)) as caught:
            await jobs.finish(job.id, job.token, DONE, publish=publish)
        assert caught.value is error
        assert await seen(jobs, job) == job
        assert [a.outcome for a in await jobs.attempts(job.id)] == [None]
        assert (await jobs.finish(job.id, job.token, DONE)).status is QueueStatus.DONE

    async def test_many_that_end_at_once_each_get_their_own_answer(self, jobs: JobStore) -> None:
        await jobs.add([a_job() for _ in range(40)])
        claimed = await take_all(jobs)
        await jobs.cancel(claimed[7].id)
        endings = [DONE if n % 3 else failing(Outcome.FAILED) for n in range(40)]
        asked = [jobs.finish(job.id, job.token, ending) for job, ending in zip(claimed, endings, strict=True)]
        answers = await asyncio.gather(*asked, jobs.finish(claimed[3].id, 99, DONE), return_exceptions=True)
        for n, answer in enumerate(answers):
            if n in (7, 40):
                assert isinstance(answer, LeaseLost)
            else:
                assert not isinstance(answer, BaseException)
                assert answer == await seen(jobs, claimed[n])
                assert answer.status is (QueueStatus.DONE if n % 3 else QueueStatus.FAILED)

    async def test_who_gives_up_waiting_takes_nobody_with_him(self, jobs: JobStore) -> None:
        await jobs.add([a_job() for _ in range(5)])
        claimed = await take_all(jobs)
        tasks = [asyncio.ensure_future(jobs.finish(job.id, job.token, DONE)) for job in claimed]
        await asyncio.sleep(0)
        tasks[0].cancel()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(answer).__name__ for answer in answers[1:]] == ["QueuedJob"] * 4

    async def test_no_worker_can_end_an_attempt_as_lost(self, jobs: JobStore) -> None:
        await put(jobs)
        job = await take(jobs)
        with pytest.raises(ValueError, match="lost"):
            await jobs.finish(job.id, job.token, Ending(Outcome.LOST))


class OrdersContract:
    """What users ask for."""

    async def test_a_cancelled_job_runs_no_more(self, jobs: JobStore) -> None:
        (job,) = await put(jobs)
        cancelled = await jobs.cancel(job.id, by="ann")
        assert (cancelled.status, cancelled.reason, cancelled.cancelled) == (QueueStatus.FAILED, "cancelled", True)
        assert cancelled == await seen(jobs, job)
        assert await take_all(jobs) == []
        (*_, told) = await jobs.events(job_id=job.id)
        assert (told.kind, told.data) == (EventKind.CANCELLED, {"by": "ann"})
        assert await jobs.cancel(job.uid) == cancelled
        assert (await kinds(jobs, job)).count(EventKind.CANCELLED) == 1

    async def test_cancelling_takes_a_running_job_from_its_worker(self, jobs: JobStore) -> None:
        await put(jobs)
        job = await submit(jobs, await take(jobs, ALICE))
        cancelled = await jobs.cancel(job.config_name)
        assert (cancelled.phase, cancelled.place, cancelled.prompt_id) == (Phase.ENDING, HERE, job.prompt_id)
        assert await jobs.holds(ALICE) == await jobs.renew(ALICE, lease=LEASE) == {}
        with pytest.raises(LeaseLost, match="cancelled"):
            await jobs.finish(job.id, job.token, DONE)
        assert (await seen(jobs, job)).cancelled
        (attempt,) = await jobs.attempts(job.id)
        assert attempt.outcome is Outcome.DISCARDED
        assert [found.id for found in await jobs.to_end([HERE])] == [job.id]

    async def test_only_a_retry_starts_a_cancelled_job_again(self, jobs: JobStore) -> None:
        await put(jobs)
        job = await submit(jobs, await take(jobs, ALICE))
        await jobs.cancel(job.id)
        again = await jobs.retry(job.id, by="ann")
        assert (again.status, again.reason, again.phase) == (QueueStatus.PENDING, "", Phase.ENDING)
        taken = await take(jobs, BOB, places=[HERE])
        assert (taken.phase, taken.prompt_id) == (Phase.ENDING, job.prompt_id)
        assert taken.token > job.token

    async def test_a_retry_begins_from_the_start(self, jobs: JobStore) -> None:
        (job,) = await put(jobs)
        for outcome in (Outcome.REQUEUED, Outcome.FAILED):
            job = await take(jobs)
            await jobs.finish(job.id, job.token, failing(outcome, killed_machine=True))
        again = await jobs.retry(str(job.id))
        assert again == await seen(jobs, job)
        assert (again.status, again.retries_attempted, again.kill_count, again.run_count) == (
            QueueStatus.PENDING,
            0,
            0,
            2,
        )
        assert (again.error_trace, again.end_time, again.duration, again.result) == (None, None, None, {})
        assert (await take(jobs)).id == job.id

    async def test_a_retry_of_a_job_that_waits_lets_it_go_at_once(self, jobs: JobStore) -> None:
        await put(jobs)
        job = await take(jobs)
        await jobs.finish(job.id, job.token, failing(Outcome.REQUEUED, delay=timedelta(minutes=5)))
        again = await jobs.retry(job.id)
        assert (again.not_before, again.retries_attempted) == (None, 1)
        assert (await take(jobs)).id == job.id

    async def test_a_running_job_is_not_retried(self, jobs: JobStore) -> None:
        await put(jobs)
        job = await take(jobs)
        with pytest.raises(JobBusy):
            await jobs.retry(job.id)
        assert await seen(jobs, job) == job

    async def test_a_priority_counts_at_the_next_claim(self, jobs: JobStore) -> None:
        first, second = await put(jobs, a_job(), a_job())
        assert (await jobs.set_priority(second.config_name, -5, by="ann")).priority == 1
        assert (await jobs.set_priority(first.id, 10_000)).priority == 999
        assert [job.id for job in await take_all(jobs)] == [second.id, first.id]
        assert (await kinds(jobs, second))[1] is EventKind.PRIORITY

    @pytest.mark.parametrize("key", [4711, "4711", "nobody", "", "٤", 2**70, "9" * 30])
    async def test_an_unknown_job_is_unknown(self, jobs: JobStore, key: str | int) -> None:
        assert await jobs.job(key) is None
        for order in (jobs.cancel, jobs.retry):
            with pytest.raises(JobNotFound):
                await order(key)
        with pytest.raises(JobNotFound):
            await jobs.set_priority(key, 1)


class ReapingContract:
    """Leases that run out, workers that are gone, clocks that jump."""

    async def test_a_lease_that_is_renewed_is_not_taken(self, jobs: JobStore) -> None:
        await put(jobs)
        job = await take(jobs)
        for _ in range(8):
            await asyncio.sleep(15)
            assert await jobs.renew(ALICE, lease=LEASE) == {job.id: job.token}
            assert await plan(jobs) == []
        assert (await jobs.finish(job.id, job.token, DONE)).status is QueueStatus.DONE

    async def test_a_lease_that_ran_out_is_taken_back_and_costs_nothing(self, jobs: JobStore) -> None:
        await put(jobs)
        job = await submit(jobs, await take(jobs))
        await asyncio.sleep(58)
        assert await plan(jobs) == []
        await asyncio.sleep(4)
        (back,) = await plan(jobs)
        assert back == await seen(jobs, job)
        assert (back.status, back.worker_id, back.lost_count) == (QueueStatus.PENDING, None, 1)
        assert (back.run_count, back.retries_attempted, back.prompt_id) == (1, 0, job.prompt_id)
        assert await jobs.renew(ALICE, lease=LEASE) == {}
        assert (await kinds(jobs, job))[-1] is EventKind.LOST
        assert [attempt.outcome for attempt in await jobs.attempts(job.id)] == [Outcome.LOST]

    async def test_jobs_of_processes_that_are_gone_are_free_at_once(self, jobs: JobStore) -> None:
        await put(jobs, a_job(), a_job())
        mine, yours = await take(jobs, ALICE), await take(jobs, BOB)
        assert [job.id for job in await plan(jobs, dead=[ALICE, CAROL])] == [mine.id]
        assert await jobs.renew(BOB, lease=LEASE) == {yours.id: yours.token}
        assert (await take(jobs, CAROL)).id == mine.id

    async def test_a_job_that_loses_its_worker_three_times_is_quarantined(self, jobs: JobStore) -> None:
        await put(jobs)
        for _ in range(2):
            await submit(jobs, await take(jobs, places=[HERE]))
            assert [job.status for job in await plan(jobs, dead=[ALICE])] == [QueueStatus.PENDING]
        job = await take(jobs, places=[HERE])
        (ended,) = await plan(jobs, dead=[ALICE])
        assert ended == await seen(jobs, job)
        assert (ended.status, ended.reason, ended.lost_count) == (QueueStatus.FAILED, "quarantined", 3)
        assert ended.phase is Phase.ENDING
        assert "vanished 3 times" in (ended.error_trace or "")
        assert (await kinds(jobs, job))[-2:] == [EventKind.LOST, EventKind.QUARANTINED]
        assert (await jobs.attempts(job.id))[-1].outcome is Outcome.QUARANTINED
        again = await jobs.retry(job.id)
        assert again.lost_count == 0

    async def test_a_job_is_not_blamed_where_workers_vanish_without_it_as_well(self, jobs: JobStore) -> None:
        """Hosts that are taken away, one after the other, must not end a sound job."""
        await put(jobs, *(a_job(config_name=f"other-{number}") for number in range(3)))
        hosts = [WorkerId(f"host-{number}") for number in range(3)]
        for host in hosts:
            await take(jobs, host)
        await plan(jobs, dead=hosts)
        (sound,) = await jobs.add([a_job(config_name="sound", priority=1)])
        for _ in range(3):
            assert (await take(jobs)).id == sound.id
            await plan(jobs, dead=[ALICE])
        back = await seen(jobs, sound)
        assert (back.status, back.lost_count) == (QueueStatus.PENDING, 3)

    async def test_whoever_knows_that_a_place_is_gone_frees_its_jobs(self, jobs: JobStore) -> None:
        """Invariant I12: a machine that is gone is proof; nobody waits for a worker that would reach it."""
        await put(jobs)
        await submit(jobs, await take(jobs, places=[HERE]), HERE)
        await plan(jobs, dead=[ALICE])
        assert await take_all(jobs, BOB) == []
        assert await jobs.free_places([]) == 0
        assert await jobs.free_places(["machine:another"]) == 0
        assert await jobs.free_places([HERE]) == 1
        assert await jobs.free_places([HERE]) == 0
        assert len(await take_all(jobs, BOB)) == 1

    async def test_losses_count_only_in_a_row(self, jobs: JobStore) -> None:
        await put(jobs)
        for _ in range(2):
            await take(jobs)
            await plan(jobs, dead=[ALICE])
        job = await take(jobs)
        assert (await jobs.finish(job.id, job.token, failing(Outcome.REQUEUED))).lost_count == 0

    @pytest.mark.fault(60)
    async def test_a_clock_set_back_makes_no_lease_longer(self, jobs: JobStore, clock: StoryClock) -> None:
        await put(jobs)
        job = await take(jobs)
        clock.jump(-DAY)
        assert await plan(jobs) == []
        await asyncio.sleep(62)
        assert [found.id for found in await plan(jobs)] == [job.id]

    @pytest.mark.fault(60)
    async def test_a_clock_set_forward_takes_leases_and_harms_nobody(self, jobs: JobStore, clock: StoryClock) -> None:
        await put(jobs)
        old = await submit(jobs, await take(jobs))
        clock.jump(DAY)
        assert [job.id for job in await plan(jobs)] == [old.id]
        new = await take(jobs, BOB, places=[HERE])
        with pytest.raises(LeaseLost):
            await jobs.finish(old.id, old.token, DONE)
        assert (await jobs.finish(new.id, new.token, DONE)).run_count == 1

    @pytest.mark.fault(60)
    async def test_a_run_never_takes_less_than_no_time(self, jobs: JobStore, clock: StoryClock) -> None:
        await put(jobs)
        job = await take(jobs)
        clock.jump(-DAY)
        assert (await jobs.finish(job.id, job.token, DONE)).duration == 0

    @pytest.mark.fault(63)
    async def test_only_the_planner_reaps(self, jobs: JobStore) -> None:
        await put(jobs)
        await take(jobs)
        epoch = await jobs.take_role("planner", OwnerId("first"), lease=LEASE)
        assert epoch is not None
        await asyncio.sleep(61)
        later = await jobs.take_role("planner", OwnerId("second"), lease=LEASE)
        assert later == epoch + 1
        for stale in (epoch, 0, later + 1):
            with pytest.raises(LeaseLost):
                await jobs.reap(lease=LEASE, grace=GRACE, dead=[ALICE], epoch=stale)
        assert (await jobs.counts())[QueueStatus.PROCESSING] == 1
        assert len(await jobs.reap(lease=LEASE, grace=GRACE, dead=[ALICE], epoch=later)) == 1
