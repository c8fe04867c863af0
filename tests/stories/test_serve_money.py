"""What `comfyctl serve` owes whoever pays: every machine billed once, every job's outcome told, no cut that costs."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest

from runcomfy.application.service import ServeOptions
from runcomfy.domain.budget import Budget, Period
from runcomfy.domain.queued import QueueStatus
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.serving import Services

pytestmark = pytest.mark.cloud(boot_time=120)
SHORT = timedelta(minutes=2)
LEASE_USD = Decimal("0.165")
"""Ten minutes of a medium machine."""


class _SlowToLeave:
    """Runs jobs that stay at their machine for a while after their result was committed."""

    def __init__(self, inner: Any, seconds: float) -> None:
        self._inner, self._seconds = inner, seconds

    async def run(self, request: Any, *, at: Any, **options: Any) -> Any:
        @asynccontextmanager
        async def lingering(**where: Any) -> AsyncIterator[Any]:
            async with at(**where) as place:
                yield place
                await asyncio.sleep(self._seconds)

        return await self._inner.run(request, at=lingering, **options)


async def test_a_job_whose_result_is_committed_is_done_whoever_looks_at_it_before_it_has_left(
    services: Services, cloud: RunComfyEmulator
) -> None:
    """The claim ends with the result; who looks at what is held then must not take that for a user's cancel."""
    async with services.start(works=False, max_machines=1, keep_alive=SHORT) as served:
        inner = served.app.orchestrator()
        served.app.orchestrator = lambda: _SlowToLeave(inner, 5.0)  # type: ignore[method-assign,assignment,return-value]
        served.begin(ServeOptions(once=True, guard=False))
        for number in range(4):
            await services.put(number, seconds=30)
        assert served.task is not None
        await served.task
    works = await services.books.works()
    assert Counter(work.outcome for work in works) == {"done": 4}
    assert await services.complaints() == []


async def test_a_job_that_a_budget_cuts_waits_unharmed_until_the_budget_allows(
    services: Services, cloud: RunComfyEmulator
) -> None:
    """Invariants I6, I8: it costs no retry and is nobody's fault; nothing is launched only to be cut again."""
    budget = Budget(Period.HOUR, hard=LEASE_USD * Decimal("2.2"))
    async with services.start(max_machines=1, budgets=[budget], keep_alive=SHORT) as served:
        for number in range(2):
            await services.put(number, seconds=700)
        await services.when(lambda: _some_done(services, 1), "the first job is done", within=1_200)
        await services.when(lambda: not cloud.alive, "the budget pays no longer", within=1_200)
        await asyncio.sleep(3_600 - asyncio.get_running_loop().time() - 60)
        assert len(cloud.launched) == 1
        [job] = [job for job in await services.queue.list() if job.status is QueueStatus.PENDING]
        assert (job.retries_attempted, job.kill_count) == (0, 0)
        [said] = [sentence for sentence in served.said if "put back into the queue" in sentence]
        assert "was ended at the end of what was paid" in said
        assert budget.hard is not None
        assert cloud.total_usd <= budget.hard
        await services.all_ended(within=2_400)
        assert len(cloud.launched) == 2
    assert Counter(work.outcome for work in await services.books.works()) == {"done": 2, "put-back": 1}
    assert await services.complaints() == []


async def _some_done(services: Services, count: int) -> bool:
    return (await services.queue.counts())[QueueStatus.DONE] >= count


async def test_a_budget_that_is_smaller_than_a_lease_says_so(services: Services, cloud: RunComfyEmulator) -> None:
    budget = Budget(Period.DAY, hard=Decimal("0.10"), user="ann")
    async with services.start(max_machines=1, budgets=[budget]) as served:
        await services.put(1, user="ann")
        await asyncio.sleep(600)
        [said] = [sentence for sentence in served.said if "no machine is launched" in sentence]
        assert "the budget per day of user ann is $0.1000: one lease of a medium machine costs $0.1650, more" in said
        assert cloud.launched == []
        assert (await services.queue.counts())[QueueStatus.PENDING] == 1
        await served.end()


async def test_one_that_slept_and_is_told_to_stop_ends_its_machines_if_nobody_else_serves(
    services: Services, cloud: RunComfyEmulator
) -> None:
    """Invariants I9, I25: the role was over, and there is nobody to whom the machines could be left."""
    async with services.start(max_machines=2, keep_alive=SHORT) as served:
        for number in range(4):
            await services.put(number, seconds=300)
        await services.when(lambda: len(services.ran()) >= 2, "two prompts compute")
        served.sleep()
        await asyncio.sleep(90)
        served.stop.set()
        served.wake()
        await served.end()
        assert cloud.alive == []
    assert await services.differences() == []
    assert (await services.queue.counts())[QueueStatus.FAILED] == 0


@pytest.mark.fault(16)
async def test_machines_that_are_not_ready_for_a_while_are_no_fault_of_the_jobs_on_them(
    services: Services, cloud: RunComfyEmulator
) -> None:
    """Nothing died: no job is taken out of the queue for it, and none has to pay with a retry."""
    for _ in range(2):
        cloud.next_machine(flaps=45)
    async with services.start(max_machines=1, keep_alive=SHORT):
        for number in range(2):
            await services.put(number, seconds=60)
        await services.all_ended(within=4_000)
    jobs = await services.queue.list()
    assert {job.status for job in jobs} == {QueueStatus.DONE}
    assert {(job.kill_count, job.retries_attempted) for job in jobs} == {(0, 0)}
    assert await services.complaints() == []


@pytest.mark.fault(24)
async def test_a_provider_that_prolongs_no_lease_is_named_and_its_end_is_no_death(
    services: Services, cloud: RunComfyEmulator
) -> None:
    """A job longer than a lease cannot be done there; it fails by its retries, and the reason was told."""
    cloud.next_call("POST servers/*/update-estimated-duration", status=200, works=False, times=None)
    async with services.start(max_machines=1, keep_alive=SHORT) as served:
        await services.put(1, seconds=900)
        await services.all_ended(within=9_000)
        said = [sentence for sentence in served.said if "RunComfy did not prolong machine" in sentence]
        assert len(said) == len(cloud.launched) == 3
    [job] = await services.queue.list()
    assert (job.status, job.reason, job.kill_count) == (QueueStatus.FAILED, "machine-lost", 0)
