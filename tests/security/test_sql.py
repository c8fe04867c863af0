"""Threat S8: whatever stands in names, tags and keys, the database takes it for text and for nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
import pytest_asyncio

from runcomfy.adapters.stores.choose import store_from
from runcomfy.adapters.stores.jobs import SqlJobs
from runcomfy.domain.exceptions import RunComfyError
from runcomfy.domain.job import JobId, JobRequest
from runcomfy.domain.queued import NewJob, WorkerId
from runcomfy.domain.secret import Secret
from runcomfy.testing.clock import LoopClock

HOSTILE = [
    "'; DROP TABLE jobs; --", "' OR '1'='1", '" OR 1=1 --', "x'); DELETE FROM jobs WHERE ('1'='1", "%", "_", "%%",
    "\\", "\\'", "''", "NULL", "null", "1; ATTACH DATABASE '/tmp/x' AS x", "$1", ":user", ":user_1", "?", "?1", "{}",
    "{0}", "%s", "%(user)s", "--", "/* */", "`jobs`", "[jobs]", "jobs.user", "x\ny", "ünï'ço\"dé", "\U0001f4a3'",
    "' || ''", "CAST('1' AS int)", "sqlite_master", "pg_sleep(10)", "'; SELECT pg_sleep(10); --", "0x27", "%27",
    "&apos;",
]  # fmt: skip


@pytest_asyncio.fixture(params=["memory", "postgres"])
async def jobs(request: pytest.FixtureRequest, clock: LoopClock) -> AsyncIterator[SqlJobs]:
    where = ":memory:" if request.param == "memory" else request.getfixturevalue("postgres_dsn")
    async with SqlJobs(store_from(Secret(where), clock=clock, durable=False)) as jobs:
        yield jobs


def job(words: str, number: int) -> NewJob:
    request = JobRequest({"1": {"class_type": words, "inputs": {words: words}}}, prompt=words)
    named: dict[str, Any] = dict.fromkeys(("config_name", "user", "project", "idempotency_key"), words)
    return NewJob(request, workflow_id=f"{words}{number}", job_type=words, metadata={words: words}, **named)


@pytest.mark.threat("S8")
async def test_hostile_words_of_a_job_are_kept_found_again_and_nothing_else_happens(jobs: SqlJobs) -> None:
    put = await jobs.add([job(words, number) for number, words in enumerate(HOSTILE)])
    assert len(put) == len(HOSTILE)
    for words, row in zip(HOSTILE, put, strict=True):
        assert (row.workflow_id, row.job_type) == (f"{words}{HOSTILE.index(words)}", words)
        assert dict(row.metadata)[words] == words
        found = await jobs.newest(user=words, limit=len(HOSTILE))
        assert [one.id for one in found] == [row.id], f"by user {words!r}"
        by_workflow = await jobs.newest(workflow_id=row.workflow_id, limit=len(HOSTILE))
        assert [one.id for one in by_workflow] == [row.id]
        assert list(await jobs.known_files([words])) == [words]
    assert set(await jobs.known_keys(HOSTILE)) == set(HOSTILE)
    assert sum((await jobs.counts()).values()) == len(HOSTILE)


@pytest.mark.threat("S8")
async def test_hostile_keys_name_no_job_and_change_none(jobs: SqlJobs) -> None:
    (row,) = await jobs.add([job("plain", 1)])
    for words in HOSTILE:
        assert await jobs.job(JobId(words)) is None
        for change in (jobs.cancel, jobs.retry):
            with pytest.raises(RunComfyError):
                await change(JobId(words), by=words)
        await jobs.pause(scope=words, reason=words, message=words, by=words)
        assert await jobs.claim(WorkerId(words), count=0, lease=timedelta(seconds=1), places=[words]) == []
    assert {pause.scope for pause in await jobs.pauses()} == set(HOSTILE)
    for words in HOSTILE:
        assert [pause.scope for pause in await jobs.resume(scope=words)] == [words]
    assert await jobs.job(row.id) == row
