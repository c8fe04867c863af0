"""What `comfyctl serve --once` leaves undone it names; what a crash leaves behind holds nobody up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import pytest
import pytest_asyncio

from runcomfy.domain.exceptions import BudgetExceeded, JobBusy, NoCapacity, OutOfCredit, WorkflowFailed
from runcomfy.domain.job import JobRequest
from runcomfy.domain.machine import MachineState
from runcomfy.domain.queued import QUEUE_SCOPE, Ending, Outcome, QueueStatus, WorkerId
from runcomfy.domain.settings import CloudSettings
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.queue_programs import failing
from runcomfy.testing.serving import Services

pytestmark = pytest.mark.cloud(boot_time=30)
LEASE = timedelta(minutes=1)


@pytest_asyncio.fixture
async def services(
    cloud: RunComfyEmulator, cloud_settings: CloudSettings, clock: LoopClock, tmp_path: Path
) -> AsyncIterator[Services]:
    async with Services(cloud, cloud_settings, clock, tmp_path) as services:
        yield services


async def test_once_waits_for_a_job_that_is_to_be_tried_again_later(services: Services) -> None:
    await services.put(1, seconds=5)
    store = await services._onlooker.job_store()
    [job] = await store.claim(WorkerId("an earlier one"), count=1, lease=LEASE)
    later = Ending(Outcome.REQUEUED, error={"code": "x", "message": "y"}, delay=timedelta(minutes=3))
    await store.finish(job.id, job.token, later)
    async with services.start(once=True) as served:
        assert served.task is not None
        await served.task
    assert (await services.queue.counts())[QueueStatus.DONE] == 1


async def test_once_with_a_paused_queue_says_what_it_leaves(services: Services, cloud: RunComfyEmulator) -> None:
    await services.put(1)
    await services.queue.pause("lunch")
    async with services.start(once=True) as served:
        task, served.task = served.task, None
        assert task is not None
        with pytest.raises(JobBusy, match="1 job is left undone, paused: lunch"):
            await task
    assert cloud.launched == []  # nothing may be begun, so nothing is paid for


@pytest.mark.parametrize("why", ["no money", "no machine starts"])
async def test_once_ends_when_no_machine_can_be_had(services: Services, cloud: RunComfyEmulator, why: str) -> None:
    if why == "no money":
        cloud.balance_usd = Decimal(0)
    else:
        for _ in range(8):
            cloud.next_machine(fails=True)
    await services.put(1)
    async with services.start(once=True) as served:
        task, served.task = served.task, None
        assert task is not None
        with pytest.raises(OutOfCredit if why == "no money" else NoCapacity) as caught:
            await asyncio.wait_for(task, 1_000)
    assert caught.value.exit_code == 4
    assert cloud.alive == []
    assert (await services.queue.counts())[QueueStatus.PENDING] == 1
    assert [line for line in served.said if line.startswith("1 job is left undone: ")]


async def test_once_does_not_wait_for_a_budget_that_paused_the_queue_elsewhere(
    services: Services, cloud: RunComfyEmulator
) -> None:
    """Executors without a pool pause until the budget's window turns, which may be a month away."""
    await services.put(1)
    store = await services._onlooker.job_store()
    day = timedelta(days=1)
    await store.pause(scope=QUEUE_SCOPE, reason="budget-exceeded", message="used up", retry_in=day, by="w")
    async with services.start(once=True) as served:
        task, served.task = served.task, None
        assert task is not None
        with pytest.raises(BudgetExceeded, match="1 job is left undone, paused: used up"):
            await asyncio.wait_for(task, 600)
    assert cloud.launched == []


async def test_once_says_that_jobs_failed(services: Services) -> None:
    await services.put(1, seconds=5)
    await services.queue.enqueue(JobRequest(failing()), retry_limit=0)
    async with services.start(once=True) as served:
        task, served.task = served.task, None
        assert task is not None
        with pytest.raises(WorkflowFailed, match="1 job failed in this run"):
            await task
    assert (await services.queue.counts())[QueueStatus.DONE] == 1


async def test_jobs_of_a_machine_that_went_with_its_service_start_anew_at_once(
    services: Services, cloud: RunComfyEmulator, clock: LoopClock
) -> None:
    """Invariant I12; and what the dead process had begun costs no busy time beyond its life."""
    cloud.next_machine(vanishes_after=60)
    await services.put(1, seconds=100)
    async with services.start(max_machines=1) as served:
        await services.when(lambda: bool(cloud.billing), "the prompt computes")
        await asyncio.sleep(30)
        died = clock.now()
        await served.kill()
    await services.when(lambda: not cloud.alive, "the machine is gone, too")
    async with services.start(max_machines=1, once=True) as served:
        began = asyncio.get_running_loop().time()
        assert served.task is not None
        await served.task
        assert asyncio.get_running_loop().time() - began < 250  # and not the five minutes that a worker is waited for
    works = await services.books.works()
    lost = [work for work in works if work.outcome == "lost"]
    assert lost
    assert all(work.ended_at is not None and work.ended_at <= died for work in lost)
    assert (await services.queue.counts())[QueueStatus.DONE] == 1


@pytest.mark.fault(2)
async def test_a_service_goes_on_with_the_machine_of_a_launch_that_nobody_heard_the_answer_of(
    services: Services, cloud: RunComfyEmulator
) -> None:
    """Invariant I3: adopted, one machine."""
    cloud.next_call("POST servers", delay=60)
    await services.put(1, seconds=10)
    async with services.start(max_machines=1) as served:
        await services.when(lambda: bool(cloud.launched), "a machine is launched")
        await served.kill()
    async with services.start(max_machines=1, once=True) as served:
        assert served.task is not None
        await served.task
    assert len(cloud.launched) == 1
    assert await services.complaints() == []


async def test_once_with_nothing_to_do_sees_the_end_of_what_a_crash_left(
    services: Services, cloud: RunComfyEmulator
) -> None:
    """Invariant I20: it leaves when a round of the reconciler came through, however little else there was to do."""
    await services.put(1, seconds=10)
    cloud.next_call("DELETE *", delay=60)
    async with services.start(max_machines=1, keep_alive=timedelta(seconds=1)) as served:
        await services.when(lambda: any(call.method == "DELETE" for call in cloud.calls), "a stop is asked for")
        await served.kill()
    async with services.start(max_machines=1, once=True) as served:
        assert served.task is not None
        await served.task
    assert await services.machines(open_only=True) == []
    assert await services.complaints() == []


@pytest.mark.fault(4)
async def test_a_machine_found_ready_is_billed_though_its_finder_dies_and_it_is_gone_before_anybody_looks(
    services: Services, cloud: RunComfyEmulator
) -> None:
    """Invariant I9: what was seen to bill is written down with its id, for a pool that finds nothing any more."""
    cloud.next_call("POST servers", reply="lost", works=True)
    cloud.next_machine(boot_time=1)
    found = asyncio.Event()
    async with services.start(cloud={"run_lease": LEASE}, max_machines=1) as finder:

        def dies(place: str) -> None:
            if place == "after store.record" and cloud.billing:
                services.processes.dead |= finder.app.own.ids
                finder.app.killed.set()
                found.set()

        finder.app.visit = dies
        await services.put(1, seconds=5)
        await found.wait()
        await finder.kill()
    [row] = await services.machines()
    assert row.state is MachineState.BOOTING
    await asyncio.sleep(2 * LEASE.total_seconds())
    assert cloud.alive == [], "its lease has ended it"
    async with services.start(cloud={"run_lease": LEASE}, max_machines=1, once=True) as later:
        assert later.task is not None
        await later.task
        assert "went on with" in " ".join(later.said), "the pool has judged it, not the reaper"
    assert len(cloud.books) == 2
    assert await services.complaints() == []
