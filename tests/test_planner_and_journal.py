"""The planner and the journal of a worker by themselves: whose jobs are taken back, and which commit counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from runcomfy.adapters.stores.jobs import SqlJobs
from runcomfy.application.heartbeat import Pulse
from runcomfy.application.planner import PLANNER, Planner
from runcomfy.application.store_journal import StoreJournal
from runcomfy.domain.exceptions import DiskFull, LocalError, ServerRestarted, StoreUnavailable
from runcomfy.domain.job import Output, OutputKind, PromptId
from runcomfy.domain.machine import OwnerId
from runcomfy.domain.queued import EventKind, Phase, QueuedJob, QueueStatus, WorkerId
from runcomfy.testing.contracts.jobs_words import HERE, a_job, an_owner, put, seen, submit, take
from runcomfy.testing.contracts.jobs_words import kinds as kinds_of
from runcomfy.testing.worker_stories import NoPulse
from runcomfy.testing.workers import Workers


class Planning:
    """A planner of one process, and what was heard of it."""

    def __init__(self, workers: Workers, store: Any, name: str, **changes: Any) -> None:
        self.said: list[str] = []
        self.troubles: list[LocalError | None] = []
        self.back: list[list[QueuedJob]] = []
        settings = replace(workers.queue_settings, **changes)
        self.planner = Planner(
            store,
            settings,
            an_owner(name),
            workers.processes,
            tell=self.said.append,
            trouble=self.troubles.append,
            after=self._after,
        )

    async def _after(self, back: Any) -> None:
        self.back.append(list(back))


class Refusing:
    """A database that refuses some calls a number of times; a refused `finish` may have been kept all the same."""

    def __init__(self, store: SqlJobs, *, kept: bool = True, error: type[LocalError] = StoreUnavailable, **times: int):
        self._store, self._kept, self._error = store, kept, error
        self.left = times

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        if name not in self.left:
            return found

        async def call(*args: Any, **kwargs: Any) -> Any:
            if self.left[name] <= 0:
                return await found(*args, **kwargs)
            self.left[name] -= 1
            if self._kept and name == "finish":
                await found(*args, **kwargs)
            raise self._error("locked")

        return call


async def test_a_planner_takes_the_role_and_the_jobs_of_the_dead_and_counts_each_that_is_set_aside(
    workers: Workers,
) -> None:
    async with workers.open() as store:
        for name in ("gone", "old", "new"):
            await store.register_owner(an_owner(name))
        old, new = (Planning(workers, store, name, lost_limit=2) for name in ("old", "new"))
        assert (old.planner.epoch, new.planner.epoch) == (None, None)
        assert await old.planner.round() == []
        await new.planner.round()
        assert (old.planner.epoch, new.planner.epoch) == (1, None)
        jobs = await put(store, *(a_job(config_name=f"{number}.yaml") for number in range(2)))
        for lost in (1, 2):
            for _ in jobs:
                await take(store, WorkerId("gone"))
            workers.processes.dead |= {OwnerId("gone"), OwnerId("old")}
            back = await new.planner.round()
            assert new.planner.epoch == 2  # the dead one's role, at once
            assert [job.lost_count for job in back] == [lost, lost]
            assert new.back[-1] == list(back)
            assert new.planner.set_aside == (0 if lost == 1 else 2)
        assert {(await seen(store, job)).reason for job in jobs} == {"quarantined"}
        assert [sentence.partition(":")[0] for sentence in new.said] == ["0.yaml", "1.yaml"] * 2
        assert "its worker is gone" in new.said[0]
        assert "vanished 2 times" in new.said[-1]
        assert (old.said, new.troubles) == ([], [None, None])
        await new.planner.stop()
        assert new.planner.epoch is None
        third = await store.take_role(PLANNER, OwnerId("gone"), lease=workers.queue_settings.lease)
        assert third == 3  # it was given up, and need not run out


async def test_a_planner_without_its_database_tells_and_goes_on_with_its_role(workers: Workers) -> None:
    async with workers.open() as store:
        await store.register_owner(an_owner("me"))
        refusing = Refusing(store, reap=1)
        mine = Planning(workers, refusing, "me")
        assert await mine.planner.round() == []
        assert await mine.planner.round() == []
        assert [type(trouble) for trouble in mine.troubles] == [StoreUnavailable, type(None)]
        assert mine.back == [[], []]
        assert mine.planner.epoch == 1


PICTURE = Output("2", OutputKind.IMAGE, "/out/knight.png", 7, "5e", name="knight")


def journal_of(store: Any, row: QueuedJob, pulse: Pulse, **told: Any) -> StoreJournal:
    usual: dict[str, Any] = {
        "leaves": lambda _: True,
        "here": lambda: HERE,
        "reached": lambda: None,
        "trouble": lambda _: None,
        "leaving": lambda: False,
        "kill_limit": 2,
    }
    return StoreJournal(store, row, pulse, **{**usual, **told})


async def committing(store: Any, row: QueuedJob, *, leaving: bool = False, stale: bool = False) -> Any:
    """Commit a result; return the journal, what was published, and what was told of the database."""
    pulse = NoPulse()
    pulse.fresh = not stale
    told: list[LocalError | None] = []
    published: list[str] = []
    journal = journal_of(store, row, pulse, trouble=told.append, leaving=lambda: leaving)
    error: LocalError | None = None
    try:
        await journal.commit(lambda: published.append("named"), (PICTURE,), {"seeds": {"1": 2}})
    except LocalError as refused:
        error = refused
    return journal, published, told, error


@pytest.mark.fault(55)
async def test_whether_an_unheard_commit_counts_is_asked_until_it_is_known(workers: Workers, looptime: float) -> None:
    async with workers.open() as store:
        row = await submit(store, await put_and_take(store))
        began = float(looptime)
        journal, published, told, error = await committing(Refusing(store, finish=1, attempts=7), row, stale=True)
        assert error is None
        assert looptime - began == pytest.approx(0.25 + 0.5 + 1 + 2 + 4 + 5 + 5, abs=0.2)
        assert (journal.done.status, journal.done.id, published) == (QueueStatus.DONE, row.id, ["named"])
        assert journal.done.result == {"seeds": {"1": 2}, "outputs": [{**PICTURE.as_dict(), "name": "knight"}]}
        assert [type(trouble) for trouble in told] == [StoreUnavailable] * 8
        # Whoever must leave before it is known lets the names stand.
        row = await submit(store, await put_and_take(store))
        journal, published, told, error = await committing(Refusing(store, finish=1, attempts=9), row, leaving=True)
        assert (journal.done, published, error, len(told)) == (None, ["named"], None, 2)


@pytest.mark.fault(55)
async def test_a_commit_that_does_not_count_is_tried_again_while_the_lease_holds_and_then_refused(
    workers: Workers, looptime: float
) -> None:
    async with workers.open() as store:
        row = await submit(store, await put_and_take(store))
        for error in (StoreUnavailable, DiskFull):
            refusing = Refusing(store, finish=1, kept=False, error=error)
            journal, published, told, refused = await committing(refusing, row, stale=True)
            assert (type(refused), journal.done, published) == (error, None, [])
            assert (await seen(store, row)).status is QueueStatus.PROCESSING
        began = float(looptime)
        journal, published, told, refused = await committing(Refusing(store, finish=2, kept=False), row)
        assert (refused, journal.done.status, published) == (None, QueueStatus.DONE, ["named"])
        assert looptime - began == pytest.approx(0.75, abs=0.2)
        assert [type(trouble) for trouble in told] == [StoreUnavailable, StoreUnavailable, type(None)]


async def put_and_take(store: SqlJobs) -> QueuedJob:
    await put(store, a_job())
    return await take(store)


async def test_a_run_that_goes_on_with_a_prompt_has_it_on_the_server_and_counts_no_second_run(workers: Workers) -> None:
    async with workers.open() as store:
        row = await submit(store, await put_and_take(store))
        reached: list[str] = []
        journal = journal_of(store, row, NoPulse(), reached=lambda: reached.append("reached"))
        assert (journal.touched, journal.sent, journal.prompt_id) == (False, None, row.prompt_id)
        await journal.attached()
        assert (journal.touched, journal.sent, reached) == (True, row.prompt_id, ["reached"])
        assert (await kinds_of(store, row))[-1] is EventKind.ATTACHED
        assert (await seen(store, row)).run_count == 1


@pytest.mark.parametrize(
    ("accepted", "lost", "here", "excused", "kill_limit", "renamed", "killed"),
    [
        pytest.param(True, True, HERE, False, 2, True, True, id="died under it"),
        pytest.param(True, True, HERE, False, 1, True, True, id="and once too often"),
        pytest.param(True, True, HERE, True, 2, True, False, id="not Ready for a while"),
        pytest.param(True, True, "server:there:8188", False, 2, True, False, id="elsewhere"),
        pytest.param(True, False, HERE, False, 2, True, False, id="ended"),
        pytest.param(False, True, HERE, False, 2, True, True, id="perhaps sent"),
        pytest.param(False, False, HERE, False, 2, False, False, id="never sent"),
    ],
)
async def test_a_prompt_that_is_on_no_server_is_sent_again_under_its_name_only_if_it_never_was_there(
    workers: Workers, accepted: bool, lost: bool, here: str, excused: bool, kill_limit: int, renamed: bool, killed: bool
) -> None:
    async with workers.open() as store:
        row = await put_and_take(store)
        if accepted:
            row = await submit(store, row)
        else:
            row = await store.write_ahead(
                row.id,
                row.token,
                place=HERE,
                prompt_id=PromptId("00000000-0000-4000-8000-00000000cafe"),
                counts_as_run=True,
            )
        journal = journal_of(store, row, NoPulse(), here=lambda: here, excused=lambda: excused, kill_limit=kill_limit)
        assert journal.earlier is not None
        raised = False
        try:
            await journal.gone(lost=lost)
        except ServerRestarted as error:
            raised = error.details == {"prompt_id": row.prompt_id}
        assert raised == (kill_limit == 1)
        assert (journal.prompt_id != row.prompt_id, journal.killed) == (renamed, killed)
        known: object = journal.earlier
        assert known is None
        left = await seen(store, row)
        assert (left.phase, left.prompt_id) == (Phase.NONE, None)
