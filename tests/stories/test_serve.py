"""A team's day with `comfyctl serve`: machines when they pay, none when not, budgets, deaths, two services at once."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import pytest
import pytest_asyncio

from runcomfy.application.service import ServeOptions
from runcomfy.domain.budget import Budget, Period
from runcomfy.domain.exceptions import BudgetExceeded
from runcomfy.domain.machine import Purpose
from runcomfy.domain.queued import FLEET_SCOPE, QueueStatus
from runcomfy.domain.settings import CloudSettings
from runcomfy.testing.clock import START, LoopClock
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.emulators.runcomfy.machines import Bill
from runcomfy.testing.serving import Served, Services

pytestmark = pytest.mark.cloud(boot_time=120)
SHORT = timedelta(minutes=2)
"""How long machines are kept in stories that are not about that."""
USERS = ("ann", "ben", "cat")


@pytest.fixture
def clock(request: pytest.FixtureRequest) -> LoopClock:
    """The story's time; `evening` begins half an hour before midnight."""
    return LoopClock(START + timedelta(hours=13.5)) if "evening" in request.fixturenames else LoopClock()


@pytest.fixture
def evening() -> float:
    """Seconds until midnight when the story begins."""
    return 1_800.0


@pytest_asyncio.fixture
async def services(
    cloud: RunComfyEmulator, cloud_settings: CloudSettings, clock: LoopClock, tmp_path: Path
) -> AsyncIterator[Services]:
    async with Services(cloud, cloud_settings, clock, tmp_path) as services:
        yield services


async def processing(services: Services) -> int:
    return (await services.queue.counts())[QueueStatus.PROCESSING]


async def done(services: Services) -> int:
    return (await services.queue.counts())[QueueStatus.DONE]


async def most_alive(cloud: RunComfyEmulator, until: asyncio.Task[None]) -> int:
    most = 0
    while not until.done():
        most = max(most, len(cloud.alive))
        await asyncio.sleep(5)
    return most


async def test_thirty_jobs_of_three_users_over_up_to_four_machines(services: Services, cloud: RunComfyEmulator) -> None:
    """Invariants I1, I2, I9, I11, I25: launched when that pays, shared, gone when not; the bill is what we say."""
    async with services.start(max_machines=4) as served:

        async def the_day() -> None:
            for number in range(30):
                await services.put(number, seconds=80, user=USERS[number % 3])
                await asyncio.sleep(14 if number % 10 else 150)
            await services.all_ended()

        ended = asyncio.create_task(the_day())
        watching = asyncio.create_task(most_alive(cloud, ended))
        await ended
        assert 2 <= await watching <= 4
        assert len(cloud.launched) < 12  # thirty jobs shared them
        await services.when(lambda: not cloud.alive, "what is not needed is gone", within=2 * 3_600)
        decisions = await services.books.decisions()
        assert Counter(d.action for d in decisions)["launch"] == len(cloud.launched)
        assert Counter(d.action for d in decisions)["stop"] == len(cloud.launched)
        assert all(d.why and d.by and d.expected_usd is not None for d in decisions)
        assert next(d for d in decisions if d.action == "launch").why in " ".join(served.said)
    assert await services.complaints() == []
    assert [record.outcome for record in services.ran()] == ["success"] * 30
    works = await services.books.works()
    assert Counter(work.user for work in works if work.outcome == "done") == {"ann": 10, "ben": 10, "cat": 10}
    assert {work.outcome for work in works} <= {"done", "put-back"}  # some were better begun elsewhere
    assert abs(await services.spent() - cloud.total_usd) < Decimal("0.01")
    assert {machine.purpose for machine in await services.machines()} == {Purpose.POOL}


async def test_stopped_in_good_order_it_ends_its_machines_and_keeps_the_jobs(
    services: Services, cloud: RunComfyEmulator
) -> None:
    async with services.start(max_machines=2, keep_alive=SHORT) as served:
        for number in range(6):
            await services.put(number, seconds=150)
        await services.when(lambda: _some(processing(services)), "jobs run")
        await served.end()
        assert cloud.alive == []
        counts = await services.queue.counts()
        assert (counts[QueueStatus.PROCESSING], counts[QueueStatus.FAILED]) == (0, 0)
    async with services.start(max_machines=2, once=True, keep_alive=SHORT) as served:
        assert served.task is not None
        await served.task
        assert cloud.alive == []
    assert await services.complaints() == []


async def _some(count: asyncio.Future[int] | object) -> bool:
    return bool(await count)  # type: ignore[misc]


async def test_a_day_whose_budget_is_used_up_waits_for_midnight(
    services: Services, cloud: RunComfyEmulator, evening: float
) -> None:
    """Invariant I6: nothing is launched above the cap, jobs wait unharmed, and the next day they go on."""
    budget = Budget(Period.DAY, hard=Decimal("0.40"))
    async with services.start(max_machines=3, budgets=[budget], keep_alive=SHORT) as served:
        for number in range(7):
            await services.put(number, seconds=300)
        await asyncio.sleep(evening - 900)
        waiting = await services.queue.counts()
        assert waiting[QueueStatus.PENDING] > 0
        assert waiting[QueueStatus.FAILED] == waiting[QueueStatus.PROCESSING] == 0
        assert cloud.alive == []
        assert cloud.total_usd <= Decimal("0.40")
        launched = len(cloud.launched)
        refused = [sentence for sentence in served.said if "no machine is launched" in sentence]
        assert len(refused) == 1
        assert "2026-11-21 00:00 UTC" in refused[0]
        [pause] = await services.queue.pauses()
        assert (pause.scope, pause.reason) == (FLEET_SCOPE, "no-machine")
        assert "budget per day is $0.40" in pause.message.replace("0.4000", "0.40")
        assert Counter(d.action for d in await services.books.decisions(limit=10_000))["refused"] == 1

        await asyncio.sleep(evening - asyncio.get_running_loop().time() - 120)
        assert len(cloud.launched) == launched
        await asyncio.sleep(300)
        assert len(cloud.launched) > launched
        assert await services.queue.pauses() == []
        before = await done(services)
        await services.when(lambda: _more_done(services, before), "the next day goes on", within=1_800)
        assert (await services.queue.counts())[QueueStatus.FAILED] == 0
        await served.end()
        for day in range(2):
            spent = sum((bill.usd for bill in _ended_on(cloud, day)), Decimal(0))
            assert spent <= Decimal("0.40")
    assert await services.differences() == []


async def _more_done(services: Services, than: int) -> bool:
    return await done(services) > than


def _ended_on(cloud: RunComfyEmulator, day: int) -> list[Bill]:
    date = (START + timedelta(days=day)).date()
    return [bill for bill in cloud.books.values() if bill.ended_at is not None and bill.ended_at.date() == date]


async def test_whose_own_budget_is_used_up_waits_and_others_go_on(
    services: Services, cloud: RunComfyEmulator, evening: float
) -> None:
    budgets = [Budget(Period.DAY, hard=Decimal("0.20"), user="ann")]
    async with services.start(max_machines=1, budgets=budgets, keep_alive=timedelta(minutes=2)) as served:
        for number in range(8):
            await services.put(number, seconds=200, user="ann", priority=1)
        for number in range(8, 12):
            await services.put(number, seconds=60, user="ben", priority=99)
        await services.when(lambda: _is_done(services, "ben", 4), "ben's jobs are done", within=2_400)
        await services.when(lambda: not cloud.alive, "nobody else needs a machine", within=900)
        launched = len(cloud.launched)
        await asyncio.sleep(evening - asyncio.get_running_loop().time() - 120)
        jobs = [job for job in await services.queue.list() if job.user == "ann"]
        assert {job.status for job in jobs} == {QueueStatus.DONE, QueueStatus.PENDING}
        assert all(job.retries_attempted == 0 for job in jobs)
        assert len(cloud.launched) == launched
        said = [sentence for sentence in served.said if "jobs of user ann wait" in sentence]
        assert len(said) == 1
        assert "resets at 2026-11-21 00:00 UTC" in said[0]
        before = await done(services)
        await services.when(lambda: _more_done(services, before), "the next day hers go on", within=1_800)
        await served.end()
    assert await services.differences() == []


async def _is_done(services: Services, user: str, count: int) -> bool:
    jobs = [job for job in await services.queue.list() if job.user == user]
    return sum(job.status is QueueStatus.DONE for job in jobs) == count


@pytest.mark.fault(2)
async def test_killed_in_the_middle_the_next_one_goes_on_with_the_machines(
    services: Services, cloud: RunComfyEmulator
) -> None:
    """Invariants I3, I11, I12, I20: machines are adopted, prompts gone on with, each result is committed once."""
    async with services.start(max_machines=2, keep_alive=SHORT) as first:
        for number in range(6):
            await services.put(number, seconds=200)
        await services.when(lambda: _ran(services, 2), "two prompts compute")
        launched = list(cloud.launched)
        await first.kill()
    assert cloud.alive == launched
    async with services.start(max_machines=2, keep_alive=SHORT) as second:
        await services.all_ended()
        adopted = [sentence for sentence in second.said if "went on with" in sentence]
        assert len(adopted) == len(launched)
        await services.when(lambda: not cloud.alive, "everything is gone", within=2 * 3_600)
    assert set(launched) <= set(cloud.launched)
    assert await services.complaints() == []
    assert [record.outcome for record in services.ran()] == ["success"] * 6
    results = [job.result for job in await services.queue.list()]
    before = [line for result in results for line in result["bill"] if "earlier attempts" in line["what"]]
    assert len(before) >= 2  # the jobs know what they had cost before the service was killed
    assert sum(Decimal(result["cost_usd"]) for result in results) <= cloud.total_usd


def _ran(services: Services, count: int) -> bool:
    return len(services.ran()) >= count


async def test_killed_for_good_everything_ends_by_its_leases(services: Services, cloud: RunComfyEmulator) -> None:
    """Invariant I5."""
    async with services.start(max_machines=2, keep_alive=SHORT) as served:
        for number in range(4):
            await services.put(number, seconds=900)
        await services.when(lambda: _ran(services, 2), "two prompts compute")
        await served.kill()
        killed_at = asyncio.get_running_loop().time()
    await services.when(lambda: not cloud.alive, "the leases are over", within=3_600)
    assert asyncio.get_running_loop().time() - killed_at <= services.settings.cloud.run_lease.total_seconds() + 60


@pytest.mark.fault(63)
async def test_two_services_on_the_same_books_one_waits_and_takes_over(
    services: Services, cloud: RunComfyEmulator
) -> None:
    """Invariant I19."""
    async with (
        services.start(max_machines=2, keep_alive=SHORT) as first,
        services.start(works=False, max_machines=2, keep_alive=SHORT) as second,
    ):
        await asyncio.sleep(10)
        second.begin(ServeOptions(guard=False))
        for number in range(8):
            await services.put(number, seconds=200)
        await services.when(lambda: _ran(services, 2), "two prompts compute")
        assert [s for s in second.said if "takes over when that is gone" in s]
        assert not [s for s in first.said if "takes over when that is gone" in s]
        assert len(cloud.alive) <= 2
        assert {decision.by for decision in await services.books.decisions()} == {_owner(first)}
        await first.kill()
        await services.all_ended()
        await services.when(lambda: not cloud.alive, "the second one ends what is not needed any more")
        assert {decision.by for decision in await services.books.decisions()} == {_owner(first), _owner(second)}
    assert await services.complaints() == []
    assert [record.outcome for record in services.ran()] == ["success"] * 8
    assert cloud.alive == []


def _owner(served: Served) -> str:
    machines = served.app._cloud
    assert machines is not None
    return str(machines[0].books.owner.id)


@pytest.mark.fault(64)
async def test_a_service_that_slept_for_ten_minutes_finds_that_another_serves(
    services: Services, cloud: RunComfyEmulator
) -> None:
    """Invariants I11, I19: the stale one plans, renews and commits nothing; what it had is gone on with."""
    async with (
        services.start(max_machines=2, keep_alive=SHORT) as first,
        services.start(works=False, max_machines=2, keep_alive=SHORT) as second,
    ):
        await asyncio.sleep(10)
        second.begin(ServeOptions(guard=False))
        for number in range(8):
            await services.put(number, seconds=200)
        await services.when(lambda: _ran(services, 2), "two prompts compute")
        first.sleep()
        before = len(cloud.calls)
        await asyncio.sleep(600)
        assert len(cloud.calls) > before  # the second one's
        first.wake()
        await services.all_ended()
        assert [s for s in first.said if "the role was lost" in s]
        by_first = [d for d in await services.books.decisions() if d.by == _owner(first)]
        assert all((d.at - START).total_seconds() < 600 for d in by_first)
    assert await services.complaints() == []
    assert cloud.alive == []


async def test_once_works_off_what_is_there_and_leaves(services: Services, cloud: RunComfyEmulator) -> None:
    for number in range(3):
        await services.put(number, seconds=30)
    async with services.start(once=True) as served:
        assert served.task is not None
        await served.task
        assert await done(services) == 3
        assert cloud.alive == []
    async with services.start(once=True) as served:
        assert served.task is not None
        await served.task
    assert len(cloud.launched) == 1
    assert await services.complaints() == []


async def test_once_says_which_budget_kept_it_from_working(services: Services, cloud: RunComfyEmulator) -> None:
    await services.put(1)
    async with services.start(once=True, budgets=[Budget(Period.RUN, hard=Decimal("0.01"))]) as served:
        task, served.task = served.task, None
        assert task is not None
        with pytest.raises(BudgetExceeded, match="budget per run"):
            await task
    assert cloud.launched == []
    assert (await services.queue.counts())[QueueStatus.PENDING] == 1


async def test_somebody_who_is_there_finds_a_machine_warm(services: Services, cloud: RunComfyEmulator) -> None:
    async with services.start(max_machines=2) as served:
        presence = served.app.presence()
        await presence.opened("conjure", lasts=timedelta(hours=1))
        await asyncio.sleep(310)
        assert len(cloud.billing) == 1
        job = await services.queue.wait(await services.put(1, seconds=10))
        assert job.duration is not None
        assert job.duration < 15
        await presence.left("conjure")
        await services.when(lambda: not cloud.alive, "nobody is there, and nothing is kept", within=3_600)
    assert await services.complaints() == []
