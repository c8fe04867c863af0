"""Contract of a queue's database: jobs that programs put in, and those that job files ask for."""

# ruff: noqa: D102, S101 - the names of the tests say what is shown, and asserts show it

from __future__ import annotations

import asyncio
import math
from datetime import timedelta
from typing import Any

import pytest

from runcomfy.domain.exceptions import IdempotencyConflict, NameTaken, ValueInvalid
from runcomfy.domain.job import JobRequest
from runcomfy.domain.queued import EventKind, Ingested, NewJob, Outcome, Phase, QueueStatus
from runcomfy.ports.jobs import JobStore
from runcomfy.testing.contracts.jobs_words import (
    ALICE,
    BOB,
    DONE,
    HERE,
    Opened,
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


class AddingContract:
    """Jobs that programs put in."""

    async def test_every_field_comes_back_exactly(self, jobs: JobStore) -> None:
        request = JobRequest(
            {"3": {"class_type": "KSampler", "inputs": {"seed": 2**60, "latent_image": ["5", 0]}}},
            image="cat.png",
            prompt="«für» 日本 '; DROP TABLE jobs; --",
            seed=2**63,
            sets={"3.steps": 20, "5.text": "@file", "flag": True, "none": None, "many": [1, 2.5, {"a": []}]},
            timeout=timedelta(minutes=7, microseconds=5),
            convert="webp",
            inputs={"31_seed": 5, "prompt": "x\ny"},
            input_names={"prompt": "6.text"},
            required_inputs=("prompt", "31_seed"),
            out_file="/jobs/finished/image/cat.png",
        )
        new = NewJob(
            request,
            "wf",
            config_name="cat.yaml",
            job_type="T2I",
            priority=20,
            retry_limit=5,
            metadata={"creator": "cli", "nested": {"a": [1, None]}},
            user="ann",
            project="p",
            idempotency_key="order-17",
        )
        (job,) = await put(jobs, new)
        assert job == await jobs.job("cat.yaml") == await jobs.job(job.uid) == await jobs.job(job.id)
        assert job.request == request
        assert (job.config_name, job.job_type, job.workflow_id, job.priority) == ("cat.yaml", "T2I", "wf", 20)
        assert (job.retry_limit, job.metadata, job.user, job.project) == (5, new.metadata, "ann", "p")
        assert (job.status, job.run_count, job.retries_attempted, job.token) == (QueueStatus.PENDING, 0, 0, 0)
        assert job.created_at is not None
        assert await kinds(jobs, job) == [EventKind.ENQUEUED]

    async def test_jobs_without_a_name_get_one_each(self, jobs: JobStore) -> None:
        added = await jobs.add([a_job(workflow_id="../my flow.json") for _ in range(200)])
        assert len({job.config_name for job in added}) == len({job.uid for job in added}) == 200
        assert [job.id for job in added] == sorted(job.id for job in added)
        assert all(job.config_name.startswith(".._my_flow.json_20") for job in added)
        assert list(await jobs.add([])) == []

    async def test_a_priority_nobody_gave_is_the_queues_own(self, jobs: JobStore) -> None:
        added = await jobs.add([a_job(), a_job(priority=-3), a_job(priority=5000)], default_priority=70)
        assert [job.priority for job in added] == [70, 1, 999]

    async def test_ten_thousand_at_once(self, jobs: JobStore) -> None:
        added = await jobs.add([a_job() for _ in range(10_000)])
        assert len(added) == 10_000
        assert (await jobs.counts())[QueueStatus.PENDING] == 10_000
        assert [job.id for job in await jobs.claim(ALICE, count=3, lease=timedelta(60))] == [j.id for j in added[:3]]

    async def test_a_name_is_given_once(self, jobs: JobStore) -> None:
        await put(jobs, a_job(config_name="cat"))
        with pytest.raises(NameTaken, match="cat"):
            await put(jobs, a_job(), a_job(config_name="cat"))
        with pytest.raises(NameTaken, match="dog"):
            await put(jobs, a_job(config_name="dog"), a_job(config_name="dog"))
        assert (await jobs.counts())[QueueStatus.PENDING] == 1

    async def test_two_jobs_may_want_one_file(self, jobs: JobStore) -> None:
        """Whoever delivers second finds the name taken and gets a number; nothing is refused for it."""
        await put(jobs, a_job(config_name="first", out_file="/out/a.png"), a_job(out_file="/out/a.png"))
        word, _ = await jobs.ingest(a_file("cat.yaml", out_file="/out/a.png"))
        assert word is Ingested.NEW
        assert (await jobs.counts())[QueueStatus.PENDING] == 3

    async def test_the_same_key_and_body_is_the_same_job(self, jobs: JobStore) -> None:
        new = a_job(idempotency_key="k", inputs={"a": 1, "b": 2})
        (first,) = await put(jobs, new)
        same = a_job(idempotency_key="k", inputs={"b": 2, "a": 1})
        assert await put(jobs, same, a_job(idempotency_key="other"), new) == [
            first,
            *await put(jobs, a_job(idempotency_key="other")),
            first,
        ]
        job = await take(jobs)
        done = await jobs.finish(job.id, job.token, DONE)
        assert await put(jobs, new) == [done]
        assert (await kinds(jobs, first)).count(EventKind.ENQUEUED) == 1

    @pytest.mark.parametrize(
        "other",
        [{"inputs": {"a": 2}}, {"workflow_id": "x"}, {"user": "ben"}, {"priority": 1}, {"metadata": {"a": 1}}],
        ids=lambda other: next(iter(other)),
    )
    async def test_the_same_key_with_another_body_is_an_error(self, jobs: JobStore, other: dict[str, Any]) -> None:
        (first,) = await put(jobs, a_job(idempotency_key="k", inputs={"a": 1}))
        with pytest.raises(IdempotencyConflict, match=first.uid):
            await put(jobs, a_job(), a_job(**{"idempotency_key": "k", "inputs": {"a": 1}, **other}))
        assert (await jobs.counts())[QueueStatus.PENDING] == 1

    async def test_known_keys_are_told(self, jobs: JobStore) -> None:
        await put(jobs, a_job(idempotency_key="a\0b"), a_job(idempotency_key="c"), a_job())
        assert set(await jobs.known_keys(["a\0b", "c", "d"])) == {"a\0b", "c"}
        assert set(await jobs.known_keys([])) == set()

    async def test_a_key_is_remembered_by_the_next_process(self, jobs: JobStore, again: Opened) -> None:
        (first,) = await put(jobs, a_job(idempotency_key="k"))
        async with again() as later:
            assert await put(later, a_job(idempotency_key="k")) == [first]

    async def test_processes_that_come_with_one_key_at_once_get_one_job(self, jobs: JobStore, again: Opened) -> None:
        async with again() as other:
            for number in range(5):
                new = a_job(idempotency_key=f"k{number}", config_name=f"n{number}" if number % 2 else "")
                asked = [put(store, new) for store in (jobs, other, jobs, other)]
                answers = await asyncio.gather(*asked)
                assert len({answer[0].id for answer in answers}) == 1
        assert (await jobs.counts())[QueueStatus.PENDING] == 5

    @pytest.mark.parametrize(
        "value", [math.nan, math.inf, {1, 2}, object()], ids=["nan", "infinity", "a set", "an object"]
    )
    async def test_what_cannot_be_written_down_is_not_accepted(self, jobs: JobStore, value: object) -> None:
        with pytest.raises(ValueInvalid):
            await put(jobs, a_job(), a_job(inputs={"x": value}))
        assert (await jobs.counts())[QueueStatus.PENDING] == 0

    @pytest.mark.parametrize("text", ["a\0b", "\ud800 half", "ünï 日本 🐈"], ids=["nul", "surrogate", "unicode"])
    async def test_any_text_is_accepted(self, jobs: JobStore, text: str) -> None:
        new = a_job(config_name=text, user=text, metadata={"m": text}, inputs={"i": text}, idempotency_key=text)
        (job,) = await put(jobs, new)
        assert job.request == new.request
        found = await jobs.job(text)
        assert found is not None
        assert found.id == job.id
        assert await put(jobs, new) == [job]
        job = await take(jobs)
        await jobs.report(ALICE, {job.id: (1, text)})
        error = {"code": "x", "message": text, "hint": "", "details": {"d": text}}
        ending = failing(Outcome.FAILED, result={"r": text}, trace="")
        ending = type(ending)(Outcome.FAILED, error=error, result={"r": text})
        failed = await jobs.finish(job.id, job.token, ending)
        assert failed == await seen(jobs, job)
        assert failed.result == {"r": text}


class JobFilesContract:
    """What becomes of a job file that is looked at."""

    async def test_a_new_file_is_put_in(self, jobs: JobStore) -> None:
        word, job = await jobs.ingest(a_file("cat.yaml", "1", priority=20), default_priority=70)
        assert (word, job.status, job.priority, job.config_name) == (Ingested.NEW, QueueStatus.PENDING, 20, "cat.yaml")
        assert (job.source_path, job.content_sha256) == ("/jobs/processing/image/cat.yaml", "1")
        (told,) = await jobs.events(job_id=job.id)
        assert (told.kind, told.data) == (EventKind.ENQUEUED, {"file": job.source_path})
        assert (await jobs.ingest(a_file("dog.yaml"), default_priority=70))[1].priority == 70

    async def test_the_same_content_is_never_run_twice(self, jobs: JobStore) -> None:
        await jobs.ingest(a_file())
        assert (await jobs.ingest(a_file()))[0] is Ingested.SAME
        job = await take(jobs)
        assert (await jobs.ingest(a_file()))[0] is Ingested.SAME
        await jobs.finish(job.id, job.token, failing(Outcome.FAILED))
        word, same = await jobs.ingest(a_file())
        assert (word, same.status) == (Ingested.SAME, QueueStatus.FAILED)
        assert await take_all(jobs) == []

    async def test_a_waiting_job_gets_the_new_content(self, jobs: JobStore) -> None:
        _, before = await jobs.ingest(a_file(content="1", priority=20, inputs={"a": 1}, out_file="/o/1.png"))
        new = a_file(content="2", priority=10, inputs={"a": 2}, job_type="T2V", metadata={"v": 2}, out_file="/o/2.png")
        word, after = await jobs.ingest(new)
        assert (word, after.id, after.request, after.priority) == (Ingested.UPDATED, before.id, new.request, 10)
        assert (after.job_type, after.metadata, after.content_sha256) == ("T2V", {"v": 2}, "2")
        assert await kinds(jobs, after) == [EventKind.ENQUEUED, EventKind.UPDATED]

    async def test_a_prompt_of_the_old_content_is_not_gone_on_with(self, jobs: JobStore) -> None:
        await jobs.ingest(a_file(content="1"))
        await submit(jobs, await take(jobs))
        await plan(jobs, dead=[ALICE])
        word, job = await jobs.ingest(a_file(content="2"))
        assert (word, job.phase, job.place) == (Ingested.UPDATED, Phase.ENDING, HERE)

    async def test_a_done_job_takes_only_the_priority(self, jobs: JobStore) -> None:
        await jobs.ingest(a_file(content="1", inputs={"a": 1}))
        job = await take(jobs)
        done = await jobs.finish(job.id, job.token, DONE)
        word, after = await jobs.ingest(a_file(content="2", priority=3, inputs={"a": 2}))
        assert (word, after.status, after.priority, after.request) == (
            Ingested.PRIORITY,
            QueueStatus.DONE,
            3,
            done.request,
        )
        assert after.result == done.result
        assert (await jobs.ingest(a_file(content="2")))[0] is Ingested.SAME
        assert await take_all(jobs) == []

    async def test_a_failed_job_runs_again_with_new_content(self, jobs: JobStore) -> None:
        await jobs.ingest(a_file(content="1"))
        for outcome in (Outcome.REQUEUED, Outcome.FAILED):
            job = await take(jobs)
            await jobs.finish(job.id, job.token, failing(outcome))
        word, again = await jobs.ingest(a_file(content="2", inputs={"a": 2}))
        assert (word, again.status, again.retries_attempted) == (Ingested.AGAIN, QueueStatus.PENDING, 0)
        assert (again.error_trace, again.reason, again.run_count) == (None, "", 2)
        taken = await take(jobs)
        assert taken.request == a_file(inputs={"a": 2}).request

    @pytest.mark.parametrize("outcome", [Outcome.DONE, Outcome.FAILED])
    async def test_what_was_changed_while_it_ran_is_taken_up_after(self, jobs: JobStore, outcome: Outcome) -> None:
        await jobs.ingest(a_file(content="1", inputs={"a": 1}))
        job = await take(jobs)
        for _ in range(2):
            word, held = await jobs.ingest(a_file(content="2", inputs={"a": 2}))
            assert (word, held.status, held.held_sha256) == (Ingested.HELD, QueueStatus.PROCESSING, "2")
            assert held.request == job.request
        assert (await kinds(jobs, job)).count(EventKind.HELD) == 1
        assert (await jobs.known_files(["cat.yaml"]))["cat.yaml"][:2] == ("1", "2")
        ended = await jobs.finish(job.id, job.token, DONE if outcome is Outcome.DONE else failing(outcome))
        assert (ended.ended, ended.held_sha256) == (True, "2")
        word, again = await jobs.ingest(a_file(content="2", inputs={"a": 2}))
        assert (word, again.status, again.held_sha256, again.content_sha256) == (
            Ingested.AGAIN,
            QueueStatus.PENDING,
            "",
            "2",
        )
        taken = await take(jobs)
        assert taken.request == a_file(inputs={"a": 2}).request
        await jobs.finish(taken.id, taken.token, DONE)
        assert (await jobs.ingest(a_file(content="2", inputs={"a": 2})))[0] is Ingested.SAME

    async def test_what_was_changed_and_changed_back_runs_once(self, jobs: JobStore) -> None:
        await jobs.ingest(a_file(content="1"))
        job = await take(jobs)
        await jobs.ingest(a_file(content="2"))
        word, back = await jobs.ingest(a_file(content="1"))
        assert (word, back.held_sha256) == (Ingested.SAME, "")
        await jobs.finish(job.id, job.token, DONE)
        assert (await jobs.ingest(a_file(content="1")))[0] is Ingested.SAME

    async def test_a_cancelled_job_is_not_revived_by_its_file(self, jobs: JobStore) -> None:
        _, job = await jobs.ingest(a_file(content="1"))
        await jobs.cancel(job.id)
        word, same = await jobs.ingest(a_file(content="2"))
        assert (word, same.status) == (Ingested.CANCELLED, QueueStatus.FAILED)
        assert (await jobs.ingest(a_file(content="1")))[0] is Ingested.SAME
        assert await take_all(jobs) == []
        await jobs.retry(job.id)
        assert (await jobs.ingest(a_file(content="2")))[0] is Ingested.UPDATED

    async def test_a_name_belongs_to_one_file(self, jobs: JobStore) -> None:
        _, mine = await jobs.ingest(a_file(content="1"))
        elsewhere = a_file(content="2", source_path="/jobs/processing/video/cat.yaml")
        word, job = await jobs.ingest(elsewhere)
        assert (word, job) == (Ingested.TAKEN, mine)
        copied = a_file(content="1", source_path="/jobs/processing/video/cat.yaml")
        assert (await jobs.ingest(copied))[0] is Ingested.SAME
        await put(jobs, a_job(config_name="dog.yaml"))
        assert (await jobs.ingest(a_file("dog.yaml")))[0] is Ingested.TAKEN

    async def test_known_files_are_told_by_name(self, jobs: JobStore) -> None:
        await jobs.ingest(a_file("a.yaml", "1"))
        await jobs.ingest(a_file("b.yaml", "2", source_path="/jobs/processing/video/b.yaml"))
        assert await jobs.known_files(["a.yaml", "b.yaml", "never"]) == {
            "a.yaml": ("1", "", QueueStatus.PENDING, "/jobs/processing/image/a.yaml"),
            "b.yaml": ("2", "", QueueStatus.PENDING, "/jobs/processing/video/b.yaml"),
        }
        assert await jobs.known_files([]) == {}
        assert len(await jobs.known_files([f"{n}.yaml" for n in range(3_000)] + ["a.yaml"])) == 1

    async def test_two_processes_that_see_one_file_put_it_in_once(self, jobs: JobStore, again: Opened) -> None:
        async with again() as other:
            for name in ("a.yaml", "b.yaml", "c.yaml", "d.yaml", "e.yaml"):
                answers = await asyncio.gather(*(store.ingest(a_file(name)) for store in (jobs, other, jobs, other)))
                assert sorted(word for word, _ in answers) == sorted([Ingested.NEW, *[Ingested.SAME] * 3])

    async def test_a_worker_that_is_gone_changes_nothing_about_it(self, jobs: JobStore) -> None:
        await jobs.ingest(a_file(content="1"))
        await take(jobs, BOB)
        await jobs.ingest(a_file(content="2"))
        await plan(jobs, dead=[BOB])
        word, job = await jobs.ingest(a_file(content="2"))
        assert (word, job.status, job.content_sha256, job.held_sha256) == (
            Ingested.UPDATED,
            QueueStatus.PENDING,
            "2",
            "",
        )
