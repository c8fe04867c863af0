"""Contract of a queue's database: who gets which job, and that nobody else does."""

# ruff: noqa: D102, S101 - the names of the tests say what is shown, and asserts show it

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Any

import pytest

from runcomfy.domain.queued import Barred, ClaimLimits, Ending, EventKind, Outcome, Phase, QueueStatus, WorkerId
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
    THERE,
    Opened,
    StoryClock,
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


class ClaimsContract:
    """Claiming without limits."""

    async def test_jobs_are_claimed_by_priority_and_then_by_age(self, jobs: JobStore) -> None:
        last, first, second, urgent = await put(jobs, a_job(priority=99), a_job(), a_job(), a_job(priority=1))
        claimed = await jobs.claim(ALICE, count=3, lease=LEASE)
        assert [job.id for job in claimed] == [urgent.id, first.id, second.id]
        assert [job.id for job in await take_all(jobs)] == [last.id]
        assert await take_all(jobs) == []

    async def test_a_claim_says_who_until_when_and_under_which_token(self, jobs: JobStore) -> None:
        (waiting,) = await put(jobs)
        now = jobs.now()
        job = await take(jobs, ALICE)
        assert (job.status, job.worker_id, job.token) == (QueueStatus.PROCESSING, ALICE, waiting.token + 1)
        assert job.lease_expires_at is not None
        assert job.start_time is not None
        assert abs(job.lease_expires_at - now - LEASE) <= timedelta(seconds=1)
        assert abs(job.start_time - now) <= timedelta(seconds=1)
        assert job == await seen(jobs, job)
        (attempt,) = await jobs.attempts(job.id)
        assert (attempt.token, attempt.run, attempt.worker_id, attempt.outcome) == (job.token, 1, ALICE, None)
        assert await kinds(jobs, job) == [EventKind.ENQUEUED, EventKind.CLAIMED]

    async def test_many_workers_of_two_processes_never_get_one_job_twice(self, jobs: JobStore, again: Opened) -> None:
        put_in = {job.id for job in await jobs.add([a_job(priority=1 + n % 5) for n in range(60)])}
        async with AsyncExitStack() as stack:
            stores = [jobs, await stack.enter_async_context(again()), await stack.enter_async_context(again())]
            claimed: list[int] = []

            async def work(store: JobStore, name: str) -> None:
                while found := await store.claim(WorkerId(name), count=2, lease=LEASE):
                    for job in found:
                        claimed.append(job.id)
                        await store.finish(job.id, job.token, DONE)

            await asyncio.gather(*(work(store, f"{n}-{m}") for n, store in enumerate(stores) for m in range(3)))
        assert sorted(claimed) == sorted(put_in)
        assert (await jobs.counts())[QueueStatus.DONE] == len(put_in)

    async def test_nothing_is_claimed_by_asking_for_none(self, jobs: JobStore) -> None:
        await put(jobs)
        assert list(await jobs.claim(ALICE, count=0, lease=LEASE)) == []

    async def test_a_job_that_waits_is_claimed_when_its_time_has_come(self, jobs: JobStore) -> None:
        await put(jobs)
        job = await take(jobs)
        await jobs.finish(job.id, job.token, failing(Outcome.REQUEUED, delay=timedelta(seconds=10)))
        assert await take_all(jobs) == []
        await asyncio.sleep(9)
        assert await take_all(jobs) == []
        await asyncio.sleep(2)
        assert (await take(jobs)).token == job.token + 1

    @pytest.mark.parametrize("hours", [1, 24, 24 * 365])
    @pytest.mark.fault(60)
    async def test_a_clock_set_back_holds_no_job_that_waits(
        self, jobs: JobStore, clock: StoryClock, hours: int
    ) -> None:
        await put(jobs)
        job = await take(jobs)
        await jobs.finish(job.id, job.token, failing(Outcome.REQUEUED, delay=timedelta(minutes=10)))
        clock.jump(-timedelta(hours=hours))
        assert (await take(jobs)).id == job.id

    async def test_a_prompt_that_may_run_is_for_workers_that_reach_its_place(self, jobs: JobStore) -> None:
        await put(jobs)
        job = await submit(jobs, await take(jobs, ALICE, places=[HERE]))
        await plan(jobs, dead=[ALICE])
        assert await take_all(jobs, BOB, places=[THERE]) == []
        assert await take_all(jobs, BOB) == []
        back = await take(jobs, CAROL, places=[THERE, HERE])
        assert (back.id, back.phase, back.place, back.prompt_id) == (job.id, Phase.SUBMITTED, HERE, job.prompt_id)

    async def test_after_the_grace_others_take_it_too(self, jobs: JobStore) -> None:
        await put(jobs)
        job = await submit(jobs, await take(jobs, ALICE, places=[HERE]))
        await plan(jobs, dead=[ALICE])
        await asyncio.sleep(GRACE.total_seconds() - 2)
        assert await take_all(jobs, BOB, places=[THERE]) == []
        await asyncio.sleep(3)
        taken = await take(jobs, BOB, places=[THERE])
        assert (taken.phase, taken.place, taken.prompt_id) == (Phase.SUBMITTED, HERE, job.prompt_id)

    @pytest.mark.fault(60)
    async def test_a_clock_set_back_makes_no_grace_longer(self, jobs: JobStore, clock: StoryClock) -> None:
        await put(jobs)
        await submit(jobs, await take(jobs, ALICE, places=[HERE]))
        await plan(jobs, dead=[ALICE])
        clock.jump(-DAY)
        await plan(jobs)
        await asyncio.sleep(GRACE.total_seconds() + 1)
        assert len(await take_all(jobs, BOB, places=[THERE])) == 1

    async def test_a_job_without_a_prompt_is_for_everybody(self, jobs: JobStore) -> None:
        await put(jobs)
        await take(jobs, ALICE, places=[HERE])
        await plan(jobs, dead=[ALICE])
        assert (await take(jobs, BOB, places=[THERE])).phase is Phase.NONE

    async def test_one_row_can_be_claimed_by_its_number(self, jobs: JobStore) -> None:
        first, second = await put(jobs, a_job(), a_job())
        assert [job.id for job in await jobs.claim(ALICE, count=5, lease=LEASE, only=second.id)] == [second.id]
        assert list(await jobs.claim(BOB, count=5, lease=LEASE, only=second.id)) == []
        limits = ClaimLimits(workflow={"*": 2})
        assert list(await jobs.claim(BOB, count=1, lease=LEASE, only=second.id, limits=limits)) == []
        assert [job.id for job in await jobs.claim(BOB, count=1, lease=LEASE, only=first.id, limits=limits)] == [
            first.id
        ]


class LimitsContract:
    """Claiming with limits, and in a fair order."""

    async def test_a_workflow_has_no_more_jobs_at_work_than_it_may(self, jobs: JobStore) -> None:
        wanted = ["video"] * 4 + ["image"] * 2 + ["mesh"] * 3
        await put(jobs, *(a_job(workflow_id=name) for name in wanted))
        limits = ClaimLimits(workflow={"video": 2, "*": 1})
        claimed = await take_all(jobs, limits=limits)
        assert [job.workflow_id for job in claimed] == ["video", "video", "image", "mesh"]
        assert await take_all(jobs, BOB, limits=limits) == []
        await jobs.finish(claimed[1].id, claimed[1].token, DONE)
        await jobs.finish(claimed[3].id, claimed[3].token, failing(Outcome.FAILED))
        assert [job.workflow_id for job in await take_all(jobs, BOB, limits=limits)] == ["video", "mesh"]

    async def test_a_workflow_with_no_room_at_all_stands_aside(self, jobs: JobStore) -> None:
        await put(jobs, *(a_job(workflow_id=name) for name in ("a", "b", "c")))
        limits = ClaimLimits(workflow={"*": 0, "c": 1})
        assert [job.workflow_id for job in await take_all(jobs, limits=limits)] == ["c"]

    @pytest.mark.parametrize("more", [{}, {"user": 9}, {"fair_users": True}, {"place": 3}])
    async def test_whose_budget_is_used_up_waits_and_nobody_behind_them(
        self, jobs: JobStore, more: dict[str, Any]
    ) -> None:
        ann = [a_job(user="ann", priority=1, workflow_id=f"w{n % 3}") for n in range(250)]
        film = [a_job(user="cat", project="film", priority=2) for _ in range(3)]
        others = [a_job(user="ben", project="web"), a_job(user="", workflow_id="w1")]
        added = await put(jobs, *ann, *film, *others)
        barred = Barred(users=frozenset({"ann", "d'oh\0"}), projects=frozenset({"film"}))
        waiting = await jobs.jobs(status=QueueStatus.PENDING, limit=10, barred=barred)
        assert [job.id for job in waiting] == [job.id for job in added[-2:]]
        one = await jobs.claim(ALICE, count=1, lease=LEASE, only=added[0].id, limits=ClaimLimits(barred=barred))
        assert list(one) == []
        claimed = await jobs.claim(
            ALICE, count=3, lease=LEASE, places=[HERE], limits=ClaimLimits(barred=barred, **more)
        )
        assert sorted(job.id for job in claimed) == sorted(job.id for job in added[-2:])
        free = await jobs.claim(BOB, count=2, lease=LEASE, places=[HERE], limits=ClaimLimits(barred=Barred()))
        assert [job.id for job in free] == [job.id for job in added[:2]]

    async def test_job_types_and_users_are_counted_over_all_workers(self, jobs: JobStore) -> None:
        await put(jobs, *(a_job(job_type=kind, user=user) for user in ("ann", "ben") for kind in ("T2I", "T2V", "T2I")))
        limits = ClaimLimits(job_type={"T2I": 3}, user=2)
        first = await take_all(jobs, ALICE, limits=limits)
        assert [(job.user, job.job_type) for job in first] == [
            ("ann", "T2I"),
            ("ann", "T2V"),
            ("ben", "T2I"),
            ("ben", "T2V"),
        ]
        assert await take_all(jobs, BOB, limits=limits) == []

    async def test_a_machine_has_no_more_jobs_than_it_may_whoever_sends_them(self, jobs: JobStore) -> None:
        await put(jobs, *(a_job() for _ in range(5)))
        limits = ClaimLimits(place=2)
        claimed = await jobs.claim(ALICE, count=1, lease=LEASE, places=[HERE], limits=limits)
        claimed = [*claimed, *await jobs.claim(BOB, count=3, lease=LEASE, places=[HERE], limits=limits)]
        assert len(claimed) == 2
        assert len(await jobs.claim(CAROL, count=5, lease=LEASE, places=[THERE], limits=limits)) == 2
        await jobs.finish(claimed[0].id, claimed[0].token, DONE)
        assert len(await jobs.claim(BOB, count=5, lease=LEASE, places=[HERE], limits=limits)) == 1

    async def test_a_prompt_that_runs_on_a_full_machine_waits_for_room(self, jobs: JobStore) -> None:
        await put(jobs, a_job(), a_job(), a_job())
        limits = ClaimLimits(place=1)
        await submit(jobs, await take(jobs, ALICE, places=[HERE], limits=limits))
        await plan(jobs, dead=[ALICE])
        back = await take(jobs, BOB, places=[HERE], limits=limits)
        assert back.phase is Phase.SUBMITTED
        assert await take_all(jobs, CAROL, places=[HERE], limits=limits) == []

    async def test_in_a_fair_order_nobody_waits_behind_all_of_somebody_elses(self, jobs: JobStore) -> None:
        await put(jobs, *(a_job(user="ann") for _ in range(30)))
        await put(jobs, a_job(user="ben"), a_job(user="ben"), a_job(user="cid"))
        limits = ClaimLimits(fair_users=True)
        claimed = await jobs.claim(ALICE, count=6, lease=LEASE, limits=limits)
        assert [job.user for job in claimed] == ["ann", "ben", "cid", "ann", "ben", "ann"]
        assert [job.user for job in await jobs.claim(BOB, count=1, lease=LEASE, limits=limits)] == ["ann"]

    async def test_priority_goes_before_fairness(self, jobs: JobStore) -> None:
        await put(jobs, *(a_job(user="ann", priority=10) for _ in range(3)), a_job(user="ben"))
        claimed = await take_all(jobs, limits=ClaimLimits(fair_users=True, user=2))
        assert [(job.user, job.priority) for job in claimed] == [("ann", 10), ("ann", 10), ("ben", 50)]

    async def test_a_long_line_without_room_hides_nothing_behind_it(self, jobs: JobStore) -> None:
        await jobs.add([a_job(workflow_id="video", user="ann") for _ in range(1_500)])
        (behind,) = await put(jobs, a_job(user="ben", priority=60))
        limits = ClaimLimits(workflow={"video": 1})
        assert [job.workflow_id for job in await take_all(jobs, limits=limits)] == ["video", "image_invert"]
        assert (await seen(jobs, behind)).status is QueueStatus.PROCESSING

    @pytest.mark.parametrize("kind", ["workflow", "user", "place", "fair"])
    async def test_two_processes_never_take_the_last_room_twice(self, jobs: JobStore, again: Opened, kind: str) -> None:
        options: dict[str, Any] = {
            "workflow": {"workflow": {"*": 3}},
            "user": {"user": 3},
            "place": {"place": 3},
            "fair": {"fair_users": True, "user": 3},
        }
        limits = ClaimLimits(**options[kind])
        await jobs.add([a_job() for _ in range(20)])
        async with again() as other:
            claims = [
                store.claim(worker, count=1, lease=LEASE, places=[HERE], limits=limits)
                for store, worker in ((jobs, ALICE), (other, BOB))
                for _ in range(5)
            ]
            claimed = [job for found in await asyncio.gather(*claims) for job in found]
        assert len(claimed) == 3

    async def test_a_job_put_back_gives_its_room_back(self, jobs: JobStore) -> None:
        await put(jobs, a_job(), a_job())
        limits = ClaimLimits(workflow={"*": 1})
        job = await take(jobs, limits=limits)
        await jobs.finish(job.id, job.token, Ending(Outcome.PUT_BACK))
        assert (await take(jobs, BOB, limits=limits)).id == job.id
