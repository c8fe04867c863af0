"""Contract of a queue's database: the published statements work as written, and what users write is obeyed."""

# ruff: noqa: D102, S101, S608 - the names of the tests say what is shown, and asserts show it

from __future__ import annotations

import asyncio
from datetime import UTC, timedelta

import pytest

from runcomfy.domain.exceptions import LeaseLost
from runcomfy.domain.queued import EventKind, Ingested, Outcome, Phase, QueueStatus
from runcomfy.ports.jobs import JobStore
from runcomfy.testing.contracts.jobs_words import (
    ALICE,
    BOB,
    DONE,
    GRACE,
    HERE,
    LEASE,
    RunSql,
    StoryClock,
    a_file,
    a_job,
    failing,
    kinds,
    plan,
    put,
    seen,
    submit,
    take,
    take_all,
)

NAME = "T2I_20250809123001_1_knight.yaml"

PENDING = "SELECT id, config_name, priority FROM jobs WHERE status='pending' ORDER BY priority, id;"
PROCESSING = "SELECT id, config_name, worker_id, lease_expires_at FROM jobs WHERE status='processing';"
FINISHED = "SELECT id, config_name, duration FROM jobs WHERE status='done' ORDER BY end_time DESC LIMIT 20;"
FAILURES = """SELECT id, config_name, retries_attempted, run_count, error_trace
FROM jobs
WHERE status='failed'
ORDER BY end_time DESC;"""
BEYOND = """SELECT id, config_name, retries_attempted, COALESCE(retry_limit, 2) AS limit_used
FROM jobs
WHERE status='failed' AND retries_attempted >= COALESCE(retry_limit, 2);"""
GOD_MODE = f"UPDATE jobs SET priority=1 WHERE config_name='{NAME}';"
ORPHANS = """UPDATE jobs
SET status='pending', worker_id=NULL, lease_expires_at=NULL
WHERE status='processing' AND lease_expires_at < CURRENT_TIMESTAMP;"""

PUBLISHED_COLUMNS = (
    *("id", "config_name", "job_type", "workflow_id", "priority", "status", "retries_attempted", "run_count"),
    *("retry_limit", "start_time", "end_time", "duration", "error_trace", "metadata", "worker_id", "lease_expires_at"),
)


class ByHandContract:
    """A user with a database shell."""

    async def test_the_published_columns_come_first_and_have_their_names(self, jobs: JobStore, sql: RunSql) -> None:
        await put(jobs)
        columns = ", ".join(PUBLISHED_COLUMNS)
        (row,) = sql(f"SELECT {columns} FROM jobs")
        (whole,) = sql("SELECT * FROM jobs")
        assert whole[: len(PUBLISHED_COLUMNS)] == row

    async def test_the_published_questions_are_answered(self, jobs: JobStore, sql: RunSql) -> None:
        names = ["b", "a", "c", "d", "e"]
        added = await put(jobs, *(a_job(config_name=name, priority=20 + n // 2) for n, name in enumerate(names)))
        assert [name for _, name, _ in sql(PENDING)] == names
        first = await take(jobs, ALICE)
        ((_, name, worker, lease),) = sql(PROCESSING)
        assert (name, worker) == ("b", "alice")
        assert lease is not None
        await asyncio.sleep(2)
        await jobs.finish(first.id, first.token, DONE)
        ((number, name, duration),) = sql(FINISHED)
        assert (number, name) == (added[0].id, "b")
        assert duration == pytest.approx(2, abs=0.1)
        for _ in range(3):
            job = await take(jobs)
            outcome = Outcome.FAILED if job.retries_attempted == 2 else Outcome.REQUEUED
            await jobs.finish(job.id, job.token, failing(outcome))
        other = await take(jobs)
        await jobs.finish(other.id, other.token, failing(Outcome.FAILED))
        failures = {name: (retries, runs, trace) for _, name, retries, runs, trace in sql(FAILURES)}
        assert failures["a"][:2] == (2, 3)
        assert failures["c"][:2] == (0, 1)
        assert "node 7 broke" in failures["a"][2]
        assert sql(BEYOND) == [(added[1].id, "a", 2, 2)]

    async def test_a_priority_set_by_hand_is_obeyed_at_the_next_claim(self, jobs: JobStore, sql: RunSql) -> None:
        await put(jobs, a_job(config_name="other"), a_job(config_name=NAME))
        sql(GOD_MODE)
        assert [job.config_name for job in await take_all(jobs)] == [NAME, "other"]

    async def test_orphans_are_freed_by_the_published_statement(
        self, jobs: JobStore, sql: RunSql, clock: StoryClock
    ) -> None:
        clock.follow_the_wall()
        await put(jobs, a_job(), a_job())
        old = await submit(jobs, await take(jobs, ALICE, places=[HERE]))
        living = await take(jobs, BOB)
        sql(ORPHANS)
        assert await seen(jobs, living) == living
        assert (await seen(jobs, old)).status is QueueStatus.PROCESSING
        clock.jump(-timedelta(minutes=3))
        await jobs.renew(ALICE, lease=LEASE)
        clock.jump(timedelta(minutes=3))
        sql(ORPHANS)
        assert (await seen(jobs, old)).status is QueueStatus.PENDING
        assert await seen(jobs, living) == living
        with pytest.raises(LeaseLost):
            await jobs.finish(old.id, old.token, DONE)
        new = await take(jobs, BOB, places=[HERE])
        assert (new.id, new.token, new.phase, new.prompt_id) == (old.id, old.token + 1, Phase.SUBMITTED, old.prompt_id)
        assert [a.outcome for a in await jobs.attempts(old.id)] == [Outcome.DISCARDED, None]

    async def test_an_orphan_freed_by_hand_waits_for_who_reaches_its_prompt(self, jobs: JobStore, sql: RunSql) -> None:
        await put(jobs)
        job = await submit(jobs, await take(jobs, ALICE, places=[HERE]))
        sql("UPDATE jobs SET status='pending', worker_id=NULL, lease_expires_at=NULL")
        assert await take_all(jobs, BOB) == []
        await plan(jobs)
        await asyncio.sleep(GRACE.total_seconds() + 1)
        again = await take(jobs, BOB)
        assert (again.id, again.prompt_id) == (job.id, job.prompt_id)
        assert [a.outcome for a in await jobs.attempts(job.id)] == [Outcome.LOST, None]

    async def test_the_shortest_row_that_a_user_can_write_is_a_job(self, jobs: JobStore, sql: RunSql) -> None:
        sql("INSERT INTO jobs (config_name, job_type, workflow_id, status) VALUES ('by hand', 'T2I', 'wf', 'pending')")
        sql("INSERT INTO jobs (config_name, job_type, workflow_id, status) VALUES ('second', 'T2I', 'wf', 'pending')")
        job = await take(jobs)
        assert (job.config_name, job.priority, job.request, job.metadata) == ("by hand", 50, None, {})
        assert (job.run_count, job.retries_attempted, job.token) == (0, 0, 1)
        assert len(job.uid) == 36
        assert await jobs.job(job.uid) == job
        assert (await jobs.finish(job.id, job.token, DONE)).run_count == 1
        assert len({job.uid for job in await jobs.jobs()}) == 2

    async def test_a_status_that_does_not_exist_is_refused(self, jobs: JobStore, sql: RunSql) -> None:
        await put(jobs)
        with pytest.raises(Exception, match=r"(?i)check"):
            sql("UPDATE jobs SET status='sleeping'")

    @pytest.mark.parametrize("outcome", [Outcome.DONE, Outcome.FAILED])
    async def test_an_ended_job_set_to_pending_runs_again(self, jobs: JobStore, sql: RunSql, outcome: Outcome) -> None:
        await put(jobs)
        job = await submit(jobs, await take(jobs))
        ending = DONE if outcome is Outcome.DONE else failing(outcome, end_prompt=True)
        await jobs.finish(job.id, job.token, ending)
        sql("UPDATE jobs SET status='pending'")
        again = await take(jobs, places=[HERE])
        assert (again.token, again.reason, again.end_time) == (job.token + 1, "", None)
        assert again.phase is (Phase.NONE if outcome is Outcome.DONE else Phase.ENDING)
        done = await jobs.finish(again.id, again.token, DONE)
        assert (done.status, done.run_count) == (QueueStatus.DONE, 2)
        assert [a.outcome for a in await jobs.attempts(job.id)] == [outcome, Outcome.DONE]

    async def test_a_running_job_set_to_failed_is_taken_from_its_worker(self, jobs: JobStore, sql: RunSql) -> None:
        await put(jobs)
        job = await submit(jobs, await take(jobs))
        sql("UPDATE jobs SET status='failed'")
        assert await jobs.renew(ALICE, lease=LEASE) == {}
        with pytest.raises(LeaseLost):
            await jobs.finish(job.id, job.token, DONE)
        assert [found.id for found in await jobs.to_end([HERE])] == [job.id]
        assert job.prompt_id is not None
        await jobs.prompt_ended(job.id, job.prompt_id)
        assert (await seen(jobs, job)).phase is Phase.NONE
        assert (await jobs.retry(job.id)).status is QueueStatus.PENDING

    async def test_a_row_that_was_deleted_is_lost_to_its_worker(self, jobs: JobStore, sql: RunSql) -> None:
        await put(jobs)
        job = await take(jobs)
        sql("DELETE FROM jobs")
        with pytest.raises(LeaseLost, match="deleted"):
            await jobs.finish(job.id, job.token, DONE)
        (new,) = await put(jobs)
        assert new.id != job.id

    async def test_numbers_given_out_again_by_hand_stop_nobody(self, jobs: JobStore, sql: RunSql) -> None:
        await put(jobs)
        job = await take(jobs)
        await jobs.finish(job.id, job.token, DONE)
        sql("UPDATE jobs SET status='pending', token=0")
        again = await take(jobs)
        assert (await jobs.finish(again.id, again.token, DONE)).status is QueueStatus.DONE
        assert [a.outcome for a in await jobs.attempts(job.id)] == [Outcome.DONE]

    async def test_what_is_emptied_by_hand_means_the_default(self, jobs: JobStore, sql: RunSql) -> None:
        first, _ = await put(jobs, a_job(priority=60), a_job(priority=55))
        sql(
            "UPDATE jobs SET priority=NULL, retries_attempted=NULL, run_count=NULL, retry_limit=NULL, metadata=NULL, "
            f"start_time=NULL WHERE id={first.id}"
        )
        job = await take(jobs)
        assert (job.id, job.priority, job.retries_attempted, job.run_count) == (first.id, 50, 0, 0)
        job = await submit(jobs, job)
        again = await jobs.finish(job.id, job.token, failing(Outcome.REQUEUED))
        assert (again.run_count, again.retries_attempted) == (1, 1)
        sql(
            "INSERT INTO jobs (config_name, job_type, workflow_id, priority, status) "
            "VALUES ('by hand', 'T2I', 'wf', NULL, 'pending')"
        )
        assert sql("SELECT priority FROM jobs WHERE config_name='by hand'") == [(50,)]

    @pytest.mark.parametrize("form", ["%Y-%m-%dT%H:%M:%S+00:00", "%Y-%m-%d %H:%M:%S.%f", "%Y-%m-%dT%H:%M:%SZ"])
    async def test_a_lease_is_understood_however_it_is_written(
        self, jobs: JobStore, sql: RunSql, clock: StoryClock, form: str
    ) -> None:
        await put(jobs, a_job(), a_job())
        short, long = await take(jobs, ALICE), await take(jobs, BOB)
        now = clock.now().astimezone(UTC)
        sql(f"UPDATE jobs SET lease_expires_at='{now - timedelta(seconds=5):{form}}' WHERE id={short.id}")
        sql(f"UPDATE jobs SET lease_expires_at='{now + timedelta(seconds=30):{form}}' WHERE id={long.id}")
        assert [job.id for job in await plan(jobs)] == [short.id]
        lease = (await seen(jobs, long)).lease_expires_at
        assert lease is not None
        assert abs(lease - now - timedelta(seconds=30)) <= timedelta(seconds=1)

    async def test_no_lease_is_one_that_ran_out(self, jobs: JobStore, sql: RunSql) -> None:
        await put(jobs)
        job = await take(jobs)
        sql("UPDATE jobs SET lease_expires_at=NULL")
        assert [found.id for found in await plan(jobs)] == [job.id]

    async def test_a_row_set_to_processing_by_hand_comes_back(self, jobs: JobStore, sql: RunSql) -> None:
        (job,) = await put(jobs)
        sql("UPDATE jobs SET status='processing'")
        assert [found.id for found in await plan(jobs)] == [job.id]
        assert (await take(jobs)).id == job.id

    async def test_a_request_nobody_can_read_is_none(self, jobs: JobStore, sql: RunSql) -> None:
        await put(jobs, *(a_job() for _ in range(4)))
        for number, text in enumerate(["{", "[]", '{"workflow": "x", "from_the_future": 1}', '{"timeout": "long"}'], 1):
            sql(f"UPDATE jobs SET request='{text}' WHERE id=(SELECT min(id) FROM jobs) + {number - 1}")
        assert [job.request for job in await take_all(jobs)] == [None] * 4

    async def test_metadata_that_is_no_table_is_kept_as_it_is(self, jobs: JobStore, sql: RunSql) -> None:
        (job,) = await put(jobs)
        sql("UPDATE jobs SET metadata='mine'")
        assert (await seen(jobs, job)).metadata == {"text": "mine"}
        await take(jobs)
        assert sql("SELECT metadata FROM jobs") == [("mine",)]

    async def test_a_job_file_adopts_the_row_that_was_written_for_it(self, jobs: JobStore, sql: RunSql) -> None:
        sql("INSERT INTO jobs (config_name, job_type, workflow_id, status) VALUES ('cat.yaml', 'x', 'x', 'pending')")
        sql("INSERT INTO jobs (config_name, job_type, workflow_id, status) VALUES ('old.yaml', 'x', 'x', 'done')")
        word, job = await jobs.ingest(a_file("cat.yaml"))
        assert (word, job.workflow_id, job.request) == (Ingested.UPDATED, "image_invert", a_file().request)
        assert (await jobs.ingest(a_file("old.yaml")))[0] is Ingested.PRIORITY
        assert [job.config_name for job in await take_all(jobs)] == ["cat.yaml"]

    async def test_what_was_told_is_not_rewritten(self, jobs: JobStore, sql: RunSql) -> None:
        (job,) = await put(jobs)
        for statement in ("UPDATE job_events SET kind='x'", "DELETE FROM job_events"):
            with pytest.raises(Exception, match="only ever added to"):
                sql(statement)
        assert await kinds(jobs, job) == [EventKind.ENQUEUED]
