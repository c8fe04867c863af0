"""Claims with limits and in a fair order, against the same rules written down plainly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runcomfy.adapters.stores import jobs_claim
from runcomfy.adapters.stores.choose import store_from
from runcomfy.adapters.stores.jobs import SqlJobs
from runcomfy.domain.queued import ClaimLimits, QueuedJob
from runcomfy.testing.contracts.jobs_words import ALICE, LEASE, StoryClock, a_job

LETTERS = st.sampled_from("abc")
A_JOB: st.SearchStrategy[dict[str, Any]] = st.builds(
    dict, workflow_id=LETTERS, job_type=LETTERS, user=LETTERS, priority=st.sampled_from([1, 50, 50, 50, 99])
)
A_LIMIT = st.dictionaries(st.sampled_from(["a", "b", "*"]), st.integers(0, 3), max_size=2)
LIMITS = st.builds(
    ClaimLimits,
    workflow=A_LIMIT,
    job_type=st.dictionaries(LETTERS, st.integers(0, 3), max_size=2),
    user=st.none() | st.integers(1, 3),
    fair_users=st.booleans(),
)


class Plainly:
    """The rules, without a thought for how long they take."""

    def __init__(self, limits: ClaimLimits) -> None:
        self.limits = limits
        self.running: list[QueuedJob] = []

    def may_start(self, job: QueuedJob) -> bool:
        workflows = Counter(other.workflow_id for other in self.running)
        types = Counter(other.job_type for other in self.running)
        users = Counter(other.user for other in self.running)
        workflow = self.limits.workflow.get(job.workflow_id, self.limits.workflow.get("*"))
        kind = self.limits.job_type.get(job.job_type)
        return (
            (workflow is None or workflows[job.workflow_id] < workflow)
            and (kind is None or types[job.job_type] < kind)
            and (self.limits.user is None or users[job.user] < self.limits.user)
        )

    def claim(self, pending: Sequence[QueuedJob], count: int) -> list[int]:
        waiting = list(pending)
        chosen: list[int] = []
        while len(chosen) < count:
            users = Counter(job.user for job in self.running)

            def turn(job: QueuedJob, users: Counter[str] = users) -> tuple[int, int, int]:
                return (job.priority, users[job.user] if self.limits.fair_users else 0, job.id)

            able = sorted((job for job in waiting if self.may_start(job)), key=turn)
            if not able:
                break
            waiting.remove(able[0])
            self.running.append(able[0])
            chosen.append(able[0].id)
        return chosen


@given(
    st.lists(A_JOB, max_size=25),
    LIMITS,
    st.lists(st.integers(1, 5), min_size=1, max_size=5),
    st.sampled_from([1, 2, 5, 200]),
    st.sets(st.integers(0, 24), max_size=5),
)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
async def test_claims_are_what_the_rules_say(
    queue: SqlJobs,
    new: list[dict[str, Any]],
    limits: ClaimLimits,
    counts: list[int],
    at_once: int,
    not_yet: set[int],
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs_claim, "_AT_ONCE", at_once)
        await queue.run(lambda connection: connection.exec_driver_sql("DELETE FROM jobs"))
        added = await queue.add([a_job(**fields) for fields in new])
        later = [added[n].id for n in not_yet if n < len(added)]
        await queue.run(
            lambda connection: [
                connection.exec_driver_sql("UPDATE jobs SET not_before = '9999-01-01' WHERE id = ?", (number,))
                for number in later
            ]
        )
        plainly = Plainly(limits)
        waiting = [job for job in added if job.id not in later]
        for count in counts:
            claimed = await queue.claim(ALICE, count=count, lease=LEASE, limits=limits)
            ids = [job.id for job in claimed]
            assert ids == plainly.claim(waiting, count)
            waiting = [job for job in waiting if job.id not in ids]


@pytest.fixture
async def queue() -> Any:
    clock = StoryClock()
    async with SqlJobs(store_from(":memory:", clock=clock, wake_interval=timedelta(seconds=1))) as store:
        yield store
