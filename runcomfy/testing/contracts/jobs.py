"""
What every database of a queue must do, as tests: `class TestMine(JobStoreContract)` with these fixtures.

`clock`: a `StoryClock`. `jobs`: an open, empty store that goes by it. `again`: opens the same database once more, or
skips. `sql`: runs a statement through a plain driver, or skips. Needs pytest and virtual time.
"""

# ruff: noqa: D102, S101 - the names of the tests say what is shown, and asserts show it

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest

from runcomfy.domain.exceptions import LeaseLost
from runcomfy.domain.machine import OwnerId
from runcomfy.domain.queued import QUEUE_SCOPE, Ending, EventKind, Outcome, QueueStatus, WorkerId
from runcomfy.ports.jobs import JobStore
from runcomfy.testing.contracts.jobs_by_hand import ByHandContract
from runcomfy.testing.contracts.jobs_claims import ClaimsContract, LimitsContract
from runcomfy.testing.contracts.jobs_ends import EndsContract, OrdersContract, ReapingContract, StepsContract
from runcomfy.testing.contracts.jobs_taking_in import AddingContract, JobFilesContract
from runcomfy.testing.contracts.jobs_words import (
    ALICE,
    BOB,
    DAY,
    DONE,
    HERE,
    LEASE,
    Opened,
    StoryClock,
    a_file,
    a_job,
    a_prompt,
    an_owner,
    failing,
    kinds,
    put,
    seen,
    submit,
    take,
    take_all,
)


class LookingContract:
    """Lists, counts, the event log."""

    async def test_lists_are_in_the_order_people_expect(self, jobs: JobStore) -> None:
        added = await put(jobs, *(a_job(priority=p) for p in (50, 10, 50, 90)))
        ids = [job.id for job in added]
        assert [job.id for job in await jobs.jobs()] == ids
        assert [job.id for job in await jobs.jobs(newest_first=True, limit=2)] == [ids[3], ids[2]]
        pending = [ids[1], ids[0], ids[2], ids[3]]
        assert [job.id for job in await jobs.jobs(status=QueueStatus.PENDING)] == pending
        turned = await jobs.jobs(status=QueueStatus.PENDING, newest_first=True)
        assert [job.id for job in turned] == pending[::-1]
        assert list(await jobs.jobs(status=QueueStatus.DONE)) == list(await jobs.jobs(limit=0)) == []

    async def test_jobs_of_a_folder(self, jobs: JobStore) -> None:
        for path in ("/jobs/a/1.yaml", "/jobs/a/b/2.yaml", "/jobs/ab/3.yaml", "/jobs/%/4.yaml", "C:\\jobs\\5.yaml"):
            await jobs.ingest(a_file(path.replace("\\", "/").rsplit("/")[-1], path, source_path=path))

        async def names(folder: str) -> list[str]:
            return [job.config_name for job in await jobs.jobs(source_dir=folder)]

        assert await names("/jobs/a") == await names("/jobs/a/") == ["1.yaml", "2.yaml"]
        assert await names("/jobs/%") == ["4.yaml"]
        assert await names("C:\\jobs") == ["5.yaml"]
        assert await names("/job") == []

    async def test_counts_name_every_status(self, jobs: JobStore) -> None:
        assert dict(await jobs.counts()) == dict.fromkeys(QueueStatus, 0)
        await put(jobs, a_job(), a_job(), a_job())
        job = await take(jobs)
        await jobs.finish(job.id, job.token, DONE)
        await take(jobs)
        assert [(await jobs.counts())[status] for status in QueueStatus] == [1, 1, 1, 0]

    async def test_results_of_jobs_that_are_done_are_read_once(self, jobs: JobStore) -> None:
        await put(jobs, *(a_job(workflow_id=name) for name in ("mesh", "other", "mesh")))
        first, second, third = await take_all(jobs)
        for number, job in enumerate((first, second)):
            nodes = [{"node_id": "1", "seconds": number}]
            await jobs.finish(job.id, job.token, Ending(Outcome.DONE, result={"nodes": nodes}))
        await jobs.finish(third.id, third.token, failing(Outcome.FAILED))

        found = {past.id: past for past in await jobs.past_results()}
        assert set(found) == {first.id, second.id}
        assert [past.id for past in await jobs.past_results(workflow="mesh")] == [first.id]
        assert [past.id for past in await jobs.past_results(limit=1)] == [second.id]
        assert (found[first.id].workflow_id, found[first.id].result["nodes"][0]["seconds"]) == ("mesh", 0)
        assert abs(found[first.id].ended_at - jobs.now()) <= timedelta(seconds=1)

        known = {(past.id, past.ended_at) for past in found.values()}
        assert list(await jobs.past_results(known=known)) == []
        await asyncio.sleep(60)
        await jobs.retry(first.id)
        again = await take(jobs)
        assert again.id == first.id
        await jobs.finish(again.id, again.token, Ending(Outcome.DONE, result={"nodes": []}))
        assert [past.id for past in await jobs.past_results(known=known)] == [again.id]

    async def test_what_waits_is_counted_by_kind(self, jobs: JobStore) -> None:
        mesh = {"workflow_id": "mesh", "user": "ann", "project": "film"}
        first, *_ = await put(jobs, a_job(**mesh), a_job(**mesh), a_job(user="bob"), a_job(**mesh))
        await asyncio.sleep(60)
        await put(jobs, a_job(user="bob"), a_job(user="bob"))
        job = await take(jobs)
        assert job.id == first.id
        groups = {(w.workflow_id, w.user, w.project): w for w in await jobs.backlog()}
        assert {kind: waiting.count for kind, waiting in groups.items()} == {
            ("mesh", "ann", "film"): 2,
            ("image_invert", "bob", ""): 3,
        }
        bobs = groups["image_invert", "bob", ""].oldest_at
        assert bobs is not None
        assert first.created_at is not None
        assert abs(bobs - first.created_at).total_seconds() <= 1

    async def test_what_cannot_be_claimed_now_does_not_count_as_waiting(self, jobs: JobStore) -> None:
        await put(jobs, a_job(), a_job(), a_job())
        later = await take(jobs)
        await jobs.finish(later.id, later.token, failing(Outcome.REQUEUED, delay=timedelta(minutes=2)))
        there = await submit(jobs, await take(jobs))
        await jobs.finish(there.id, there.token, Ending(Outcome.PUT_BACK, keeps_prompt=True))
        assert [waiting.count for waiting in await jobs.backlog()] == [1]
        assert [waiting.count for waiting in await jobs.backlog(places=[HERE])] == [2]
        await asyncio.sleep(121)
        assert [waiting.count for waiting in await jobs.backlog(places=[HERE])] == [3]

    async def test_arrivals_are_told_once_and_in_order(self, jobs: JobStore) -> None:
        assert list(await jobs.arrivals()) == []
        first, second = await put(jobs, a_job(user="ann"), a_job(project="film"))
        await asyncio.sleep(60)
        job = await take(jobs)
        await jobs.finish(job.id, job.token, DONE)
        (third,) = await put(jobs, a_job(workflow_id="mesh"))
        told = await jobs.arrivals()
        assert [(a.id, a.uid, a.workflow_id, a.user, a.project) for a in told] == [
            (j.id, j.uid, j.workflow_id, j.user, j.project) for j in (first, second, third)
        ]
        assert [a.ended_at is not None for a in told] == [True, False, False]
        assert told[0].at is not None
        assert told[2].at is not None
        assert 59 <= (told[2].at - told[0].at).total_seconds() <= 61
        assert [a.id for a in await jobs.arrivals(after=first.id)] == [second.id, third.id]
        assert [a.id for a in await jobs.arrivals(limit=1)] == [third.id]

    async def test_a_name_goes_before_a_number(self, jobs: JobStore) -> None:
        first, second = await put(jobs, a_job(), a_job())
        (named,) = await put(jobs, a_job(config_name=str(first.id)))
        found = await jobs.job(str(first.id))
        assert found is not None
        assert found.id == named.id
        other = await jobs.job(str(second.id))
        assert other is not None
        assert other.id == second.id

    async def test_events_are_numbered_in_the_order_of_what_happened(self, jobs: JobStore) -> None:
        await put(jobs, a_job(), a_job())
        one, two = await take(jobs), await take(jobs)
        await jobs.finish(two.id, two.token, DONE)
        await jobs.finish(one.id, one.token, DONE)
        events = await jobs.events()
        numbers = [event.number for event in events]
        assert numbers == sorted(set(numbers))
        assert [(event.kind, event.job_id, event.token) for event in events[2:]] == [
            (EventKind.CLAIMED, one.id, 1),
            (EventKind.CLAIMED, two.id, 1),
            (EventKind.DONE, two.id, 1),
            (EventKind.DONE, one.id, 1),
        ]
        assert [event.worker_id for event in events[2:]] == [ALICE] * 4
        assert await jobs.events(after=numbers[3]) == events[4:]
        assert await jobs.events(limit=2) == events[:2]
        assert await jobs.events(after=numbers[0], job_id=one.id) == [events[2], events[5]]

    async def test_a_reader_of_the_log_misses_nothing_while_others_write(self, jobs: JobStore, again: Opened) -> None:
        heard: list[int] = []
        over = False

        async def listen() -> None:
            while True:
                ending = over
                found = await jobs.events(after=heard[-1] if heard else 0, limit=7)
                heard.extend(event.number for event in found)
                if ending and not found:
                    return
                await asyncio.sleep(0)

        async with again() as one, again() as two:
            reader = asyncio.ensure_future(listen())

            async def write(store: JobStore, name: str) -> None:
                for _ in range(8):
                    await put(store, a_job(), a_job())
                    for job in await store.claim(WorkerId(name), count=2, lease=LEASE):
                        await store.finish(job.id, job.token, DONE)

            await asyncio.gather(write(one, "1"), write(two, "2"), write(one, "3"))
            over = True
            await reader
        assert heard == [event.number for event in await jobs.events(limit=10_000)]
        assert len(heard) == 3 * 8 * 2 * 3

    async def test_a_note_that_is_repeated_is_written_once(self, jobs: JobStore) -> None:
        (job,) = await put(jobs)
        for _ in range(3):
            await jobs.note(EventKind.FILE_REFUSED, data={"file": "a.yaml", "line": 3}, by="monitor")
            await jobs.note(EventKind.NOTE, job_id=job.id, data={"text": "x"})
        await jobs.note(EventKind.FILE_REFUSED, data={"file": "a.yaml", "line": 4}, by="monitor")
        refused = [event for event in await jobs.events() if event.kind is EventKind.FILE_REFUSED]
        assert [event.data["line"] for event in refused] == [3, 4]
        assert [event.worker_id for event in refused] == ["monitor"] * 2
        assert (await kinds(jobs, job)).count(EventKind.NOTE) == 1
        assert await seen(jobs, job) == job


class LeasesContract:
    """Renewing, also from another thread."""

    async def test_all_leases_of_a_worker_are_renewed_and_nobody_elses(self, jobs: JobStore) -> None:
        await put(jobs, *(a_job() for _ in range(4)))
        mine = await jobs.claim(ALICE, count=3, lease=LEASE)
        yours = await take(jobs, BOB)
        await jobs.finish(mine[0].id, mine[0].token, DONE)
        await asyncio.sleep(20)
        held = {job.id: job.token for job in mine[1:]}
        assert await jobs.renew(ALICE, lease=LEASE) == held == await jobs.holds(ALICE)
        assert await seen(jobs, yours) == yours
        renewed = (await seen(jobs, mine[1])).lease_expires_at
        assert renewed is not None
        assert abs(renewed - jobs.now() - LEASE) <= timedelta(seconds=1)

    async def test_renewing_is_a_sign_of_life(self, jobs: JobStore) -> None:
        await jobs.register_owner(an_owner("alice"))
        await asyncio.sleep(15)
        await jobs.renew(ALICE, lease=LEASE)
        owner = (await jobs.owners())[OwnerId("alice")]
        assert abs(owner.heartbeat_at - jobs.now()) < timedelta(seconds=1)

    async def test_another_thread_renews_while_the_loop_does_something_else(self, jobs: Any, clock: StoryClock) -> None:
        await put(jobs, a_job(), a_job())
        job = await take(jobs, ALICE)
        clock.now()  # from here on it can be asked in a thread
        renewer = jobs.renewer(ALICE, lease=LEASE)

        def beat() -> object:
            try:
                return renewer()
            finally:
                renewer.close()

        assert await asyncio.to_thread(beat) == {job.id: job.token}


class RolesContract:
    """What one process of the database does at a time, and processes themselves."""

    async def test_a_role_has_one_holder(self, jobs: JobStore) -> None:
        one, two = OwnerId("one"), OwnerId("two")
        epoch = await jobs.take_role("planner", one, lease=LEASE)
        assert epoch is not None
        assert await jobs.take_role("planner", two, lease=LEASE) is None
        await asyncio.sleep(40)
        assert await jobs.take_role("planner", one, lease=LEASE) == epoch
        await asyncio.sleep(40)
        assert await jobs.take_role("planner", two, lease=LEASE) is None
        assert await jobs.take_role("monitor", two, lease=LEASE) is not None

    async def test_a_holder_that_is_silent_is_followed_by_another(self, jobs: JobStore) -> None:
        one, two = OwnerId("one"), OwnerId("two")
        epoch = await jobs.take_role("planner", one, lease=LEASE)
        assert epoch is not None
        await asyncio.sleep(61)
        assert await jobs.take_role("planner", two, lease=LEASE) == epoch + 1
        assert await jobs.take_role("planner", one, lease=LEASE) is None

    async def test_a_role_that_is_given_up_is_free_and_the_epoch_goes_on(self, jobs: JobStore) -> None:
        one, two = OwnerId("one"), OwnerId("two")
        epoch = await jobs.take_role("planner", one, lease=LEASE)
        assert epoch is not None
        await jobs.drop_role("planner", two)
        assert await jobs.take_role("planner", two, lease=LEASE) is None
        await jobs.drop_role("planner", one)
        assert await jobs.take_role("planner", two, lease=LEASE) == epoch + 1
        await jobs.drop_role("planner", two)
        assert await jobs.take_role("planner", two, lease=LEASE) == epoch + 2

    async def test_a_holder_that_signed_off_has_lost_it(self, jobs: JobStore) -> None:
        await jobs.register_owner(an_owner("one"))
        epoch = await jobs.take_role("planner", OwnerId("one"), lease=LEASE)
        assert epoch is not None
        await jobs.sign_off(OwnerId("one"))
        assert await jobs.take_role("planner", OwnerId("two"), lease=LEASE) == epoch + 1

    @pytest.mark.fault(60)
    async def test_a_clock_set_back_makes_no_hold_longer(self, jobs: JobStore, clock: StoryClock) -> None:
        await jobs.take_role("planner", OwnerId("one"), lease=LEASE)
        clock.jump(-DAY)
        assert await jobs.take_role("planner", OwnerId("two"), lease=LEASE) is None
        await asyncio.sleep(61)
        assert await jobs.take_role("planner", OwnerId("two"), lease=LEASE) is not None

    async def test_of_many_who_ask_at_once_one_gets_it(self, jobs: JobStore, again: Opened) -> None:
        async with again() as other:
            asked = [
                store.take_role("planner", OwnerId(f"{n}"), lease=LEASE)
                for n, store in enumerate((jobs, other, jobs, other))
            ]
            epochs = await asyncio.gather(*asked)
        assert len([epoch for epoch in epochs if epoch is not None]) == 1

    async def test_processes_are_known_until_they_sign_off(self, jobs: JobStore) -> None:
        owner = an_owner("one")
        await jobs.register_owner(owner)
        await jobs.register_owner(owner)
        await jobs.register_owner(an_owner("two"))
        assert (await jobs.owners())[owner.id] == owner
        await jobs.sign_off(owner.id)
        assert set(await jobs.owners()) == {"two"}
        assert set(await jobs.owners(but=[owner.id])) == {"two"}
        assert await jobs.owners(but=[OwnerId("two")]) == {}
        assert (await jobs.owners([owner.id]))[owner.id].ended_at is not None


class PausesContract:
    """Why nothing is claimed."""

    async def test_a_pause_says_why_since_when_and_until_when(self, jobs: JobStore) -> None:
        now = jobs.now()
        pause = await jobs.pause(
            scope=QUEUE_SCOPE, reason="disk-full", message="no room on /", retry_in=timedelta(minutes=1), by="alice"
        )
        assert (pause.scope, pause.reason, pause.message, pause.by) == ("queue", "disk-full", "no room on /", "alice")
        assert pause.until is not None
        assert abs(pause.until - now - timedelta(minutes=1)) < timedelta(seconds=1)
        assert list(await jobs.pauses()) == [pause]

    async def test_the_newer_words_count(self, jobs: JobStore) -> None:
        first = await jobs.pause(scope="queue", reason="a", message="1")
        await asyncio.sleep(5)
        await jobs.pause(scope="host:here", reason="c", message="3")
        second = await jobs.pause(scope="queue", reason="b", message="2")
        assert (second.reason, second.since) == ("b", first.since)
        assert [pause.reason for pause in await jobs.pauses()] == ["b", "c"]

    async def test_resuming_ends_one_or_all(self, jobs: JobStore) -> None:
        for scope in ("queue", "host:a", "host:b"):
            await jobs.pause(scope=scope, reason="asked", message="")
        assert [pause.scope for pause in await jobs.resume(scope="host:a")] == ["host:a"]
        assert len(await jobs.resume()) == 2
        assert list(await jobs.pauses()) == list(await jobs.resume()) == []
        told = [event.kind for event in await jobs.events()]
        assert told == [EventKind.PAUSED] * 3 + [EventKind.RESUMED] * 3

    async def test_a_pause_repeated_in_the_same_words_is_told_once(self, jobs: JobStore) -> None:
        for _ in range(3):
            await jobs.pause(scope="queue", reason="a", message="1", retry_in=timedelta(seconds=5))
        assert len(await jobs.events()) == 1

    async def test_running_jobs_go_on(self, jobs: JobStore) -> None:
        await put(jobs)
        job = await take(jobs)
        await jobs.pause(scope="queue", reason="asked", message="")
        assert (await jobs.finish(job.id, job.token, DONE)).status is QueueStatus.DONE


class WakingContract:
    """Hearing of changes."""

    @pytest.mark.parametrize("change", ["a new job", "put back", "resume", "retry"])
    async def test_who_waits_hears_of_work(self, jobs: JobStore, again: Opened, change: str) -> None:
        await put(jobs)
        job = await take(jobs)
        await jobs.cancel(job.id)

        async def make(store: JobStore) -> object:
            match change:
                case "a new job":
                    return await put(store)
                case "resume":
                    return await store.resume()
                case "retry":
                    return await store.retry(job.id)
            return await store.ingest(a_file())

        if change == "resume":
            await jobs.pause(scope="queue", reason="asked", message="")
        async with again() as other:
            mark = await jobs.changed(timeout=timedelta(0))
            waiting = asyncio.ensure_future(jobs.changed(timeout=timedelta(hours=1), seen=mark))
            await asyncio.sleep(1)
            mark = max(mark, await jobs.changed(timeout=timedelta(0), seen=mark))
            await make(other)
            async with asyncio.timeout(3000):
                await waiting

    async def test_nobody_waits_longer_than_asked(self, jobs: JobStore) -> None:
        await jobs.changed(timeout=timedelta(0))
        async with asyncio.timeout(60):
            for _ in range(3):
                await jobs.changed(timeout=timedelta(seconds=1), seen=10**9)


class TogetherContract:
    """What is written together is there together."""

    async def test_every_change_of_a_job_is_told(self, jobs: JobStore) -> None:
        _, job = await jobs.ingest(a_file())
        taken = await submit(jobs, await take(jobs))
        await jobs.ingest(a_file(content="2"))
        await jobs.finish(taken.id, taken.token, DONE)
        await jobs.set_priority(job.id, 3)
        await jobs.retry(job.id)
        await jobs.cancel(job.id)
        assert await kinds(jobs, job) == [
            EventKind.ENQUEUED,
            EventKind.CLAIMED,
            EventKind.SUBMITTING,
            EventKind.SUBMITTED,
            EventKind.HELD,
            EventKind.DONE,
            EventKind.PRIORITY,
            EventKind.RETRIED,
            EventKind.CANCELLED,
        ]

    async def test_what_is_refused_is_not_told(self, jobs: JobStore) -> None:
        await put(jobs)
        job = await take(jobs)
        events = await jobs.events()
        with pytest.raises(LeaseLost):
            await jobs.write_ahead(job.id, job.token + 1, place="x", prompt_id=a_prompt(), counts_as_run=True)
        assert await jobs.events() == events
        assert await take_all(jobs, BOB) == []
        assert await jobs.events() == events


class JobStoreContract(
    AddingContract,
    JobFilesContract,
    ClaimsContract,
    LimitsContract,
    StepsContract,
    EndsContract,
    OrdersContract,
    ReapingContract,
    LeasesContract,
    RolesContract,
    PausesContract,
    LookingContract,
    WakingContract,
    TogetherContract,
    ByHandContract,
):
    """Everything `runcomfy.ports.jobs.JobStore` promises."""
