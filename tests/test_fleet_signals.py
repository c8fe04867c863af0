"""What the fleet is told of people and work to come: heeded, scored by what follows, and remembered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest
import pytest_asyncio

from runcomfy.application.fleet_demand import BATCH_LATE
from runcomfy.domain.plan_view import DemandView, Stage
from runcomfy.testing.clock import SettableClock
from runcomfy.testing.contracts.jobs_words import a_job, put
from runcomfy.testing.fleet_office import HOURS, MINUTES, Office, an_office, now


@pytest.fixture
def clock() -> SettableClock:
    return SettableClock()


@pytest_asyncio.fixture
async def office(clock: SettableClock, tmp_path: Path) -> AsyncIterator[Office]:
    async with an_office(clock, tmp_path) as office:
        yield office


# -- signals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_alive", [None, timedelta(0), timedelta(minutes=2)])
async def test_who_is_there_has_one_machine_and_not_one_after_the_other(
    office: Office, keep_alive: timedelta | None
) -> None:
    """Whoever is there and sends nothing is not worth a machine for ever, nor a new one every few minutes."""
    async with office.running(keep_alive=keep_alive, plan_every=timedelta(minutes=1)):
        async with office.presence.here("conjure", lasts=timedelta(minutes=15)):
            await asyncio.sleep(310)
            assert [machine.stage for machine in office.pool.machines] == [Stage.READY]
            await asyncio.sleep(6 * HOURS)
        assert len(office.pool.asked) == 1
        [(ended_at, why)] = office.pool.drained
        assert 20 * MINUTES <= ended_at - office.pool.asked[0][0] <= 60 * MINUTES
        assert why == "somebody is there, but silent for long"
        await put(office.jobs)
        await asyncio.sleep(10)
        assert len(office.pool.asked) == 2


async def test_work_that_is_about_to_come_has_a_machine_launched_and_held(office: Office) -> None:
    async with office.running():
        await office.presence.intent("conjure", lasts=timedelta(minutes=4))
        await asyncio.sleep(30)
        assert len(office.pool.asked) == 1
        assert office.pool.holds[0] > 0
        await asyncio.sleep(office.pool.boots + office.pool.holds[0] - 60)
        assert [machine.stage for machine in office.pool.machines] == [Stage.READY]
        await asyncio.sleep(2 * HOURS)
        assert (office.pool.machines, len(office.pool.asked)) == ((), 1)


async def test_a_batch_finds_its_machines_there_and_leaves_none(office: Office) -> None:
    began = now()
    async with office.running(plan_every=timedelta(minutes=1)):
        at = office.clock.now() + timedelta(hours=2)
        await office.presence.batch(40, "night", work=timedelta(hours=1), at=at)
        await asyncio.sleep(1.5 * HOURS)
        assert office.pool.asked == []
        await asyncio.sleep(0.5 * HOURS)
        assert len(office.pool.asked) == 4
        first = office.pool.asked[0][0] - began
        assert 2 * HOURS - 400 <= first <= 2 * HOURS - 200
        assert [machine.stage for machine in office.pool.machines] == [Stage.READY] * 4
        await put(office.jobs, *(a_job() for _ in range(40)))
        await asyncio.gather(*(office.work_off(seconds=90) for _ in range(4)), return_exceptions=True)
        await asyncio.sleep(5 * MINUTES)
        assert (office.pool.machines, len(office.pool.asked)) == ((), 4)
    reasons = [one.why for one in await office.decisions("stop")]
    assert len(reasons) == 4
    assert all(why == "the batch is done" or "machines are enough" in why for why in reasons)


async def test_a_source_that_never_brings_work_is_not_heeded_and_that_is_said_once(office: Office) -> None:
    async with office.running(plan_every=timedelta(minutes=1)):
        launched = []
        for _ in range(8):
            await office.presence.opened("cron", lasts=timedelta(minutes=30))
            await asyncio.sleep(1 * HOURS)
            launched.append(len(office.pool.asked))
        assert launched[0] == 1
        assert launched[-1] == launched[-3] < 8
        [sentence] = [s for s in office.said if "not heeded" in s]
        assert sentence.startswith("signals of cron are not heeded for now")
        await office.presence.opened("conjure")
        await asyncio.sleep(5 * MINUTES)
        assert len(office.pool.asked) == launched[-1] + 1  # another source is believed


async def test_signals_are_scored_by_the_work_that_follows(office: Office) -> None:
    async with office.running(plan_every=timedelta(minutes=1)) as fleet:
        for _ in range(6):
            await office.presence.opened("conjure", lasts=timedelta(minutes=30))
            await asyncio.sleep(5 * MINUTES)
            await put(office.jobs)
            await office.work_off()
            await office.presence.left("conjure")
            await asyncio.sleep(1 * HOURS)
        view = await fleet.view()
        assert view.presence.recall > 0.9
        assert view.presence.lead_s == pytest.approx(5 * MINUTES, abs=30)
        assert len(office.pool.asked) == 6
        assert not [s for s in office.said if "not heeded" in s]


async def test_what_is_announced_holds_until_its_time_is_over_or_it_is_taken_back(office: Office) -> None:
    signals = (await office.fleet())._with.signals
    began = now()

    def seen() -> tuple[int, float | None, float | None, float | None]:
        view = signals.view(now(), worth_s=1e9)
        times = (None if at is None else round(at - began) for at in (view.since, view.left_at, view.expected_until))
        return (view.present, *times)  # type: ignore[return-value]

    def next_change() -> float | None:
        at = signals.next_change(now())
        return None if at is None else round(at - began)

    assert (await signals.hear(), seen(), next_change()) == (0, (0, None, None, None), None)
    assert signals.view(now(), worth_s=1e9).recall == 1.0
    await office.presence.opened("conjure:ann", lasts=timedelta(seconds=600), user="ann")
    await asyncio.sleep(60)
    await office.presence.opened("conjure:ben", lasts=timedelta(seconds=120), user="ben")
    assert [await signals.hear(), await signals.hear()] == [2, 0]
    assert (seen(), next_change()) == ((2, 0, None, None), 180)
    await asyncio.sleep(121)
    assert (seen(), next_change()) == ((1, 0, None, None), 600)
    await office.presence.opened("conjure:ben", lasts=timedelta(seconds=100), user="ben")  # back again: counted anew
    await office.presence.opened("conjure:ann", lasts=timedelta(seconds=100), user="ann")  # still there
    await signals.hear()
    assert (seen(), next_change()) == ((2, 0, None, None), 281)
    await office.presence.left("conjure:ann")
    await signals.hear()
    assert (seen(), next_change()) == ((1, 181, None, None), 281)
    await asyncio.sleep(110)
    assert (seen(), next_change()) == ((0, None, 281, None), None)
    await office.presence.intent("conjure:ann", lasts=timedelta(seconds=240))
    await signals.hear()
    assert (seen(), next_change()) == ((0, None, 281, 531), 531)
    await office.presence.left("conjure:ann")
    await signals.hear()
    assert (seen(), next_change()) == ((0, None, 291, None), None)


async def test_a_batch_is_waited_for_job_by_job_and_for_ten_minutes_after_its_time(office: Office) -> None:
    signals = (await office.fleet())._with.signals
    began, at = now(), office.clock.now() + timedelta(seconds=100)
    await office.presence.batch(3, "night", work=timedelta(seconds=90), at=at, user="ann")
    await signals.hear()

    def batches() -> list[tuple[int, float, float]]:
        return [(b.count, b.work_s, round(b.at - began)) for b in signals.view(now(), worth_s=1e9).batches]

    assert batches() == [(3, 90.0, 100)]
    assert signals.next_change(now()) == pytest.approx(began + 100)
    assert not signals.batched(now())
    assert not signals.work_came(now(), "ben", after_silence=True)  # not announced by him
    assert signals.work_came(now(), "ann", after_silence=False)
    assert (batches(), signals.batched(now())) == ([(2, 60.0, 100)], True)
    await asyncio.sleep(BATCH_LATE + 99)
    assert (batches(), signals.batched(now() - 99), signals.batched(now())) == ([(2, 60.0, 100)], True, False)
    assert signals.work_came(now(), "ann", after_silence=True)
    await asyncio.sleep(2)
    assert batches() == []
    await office.presence.batch(1, "night", work=timedelta(0), at=office.clock.now(), user="ann")
    await signals.hear()
    assert signals.work_came(now(), "ann", after_silence=True)
    assert batches() == []  # all of it came
    assert not signals.work_came(now(), "ann", after_silence=True)
    assert not signals.batched(now())


# -- what is remembered --------------------------------------------------------------------------------------


def close(left: float | None, right: float | None, *, within: float) -> bool:
    if left is None or right is None:
        return left is right
    return abs(left - right) <= within + 0.05 * max(abs(left), abs(right))


def alike(before: DemandView, after: DemandView) -> None:
    assert before.seen == after.seen
    assert close(before.rate_fast, after.rate_fast, within=1e-5)
    assert close(before.rate_slow, after.rate_slow, within=1e-5)
    assert close(before.service_s, after.service_s, within=0.1)
    assert close(before.last_arrival, after.last_arrival, within=1)
    assert close(before.silent_since, after.silent_since, within=30)
    assert close(before.waits_per_cold, after.waits_per_cold, within=30)
    assert close(before.group, after.group, within=0.1)
    assert close(before.rate_session, after.rate_session, within=1e-4)
    # How long it had been silent before the very first work nobody knows any more.
    silences = before.silences[len(before.silences) - len(after.silences) :]
    assert len(before.silences) - len(after.silences) in (0, 1)
    assert len(after.silences) >= 4
    assert all(close(one, other, within=40) for one, other in zip(silences, after.silences, strict=True))


@pytest.mark.parametrize("at_work", [False, True])
async def test_a_restart_forgets_nothing(office: Office, at_work: bool) -> None:
    async with office.running() as first:
        await office.presence.opened("conjure", lasts=timedelta(hours=1), user="ann")
        await asyncio.sleep(5 * MINUTES)
        for minutes in (3.0, 9.0, 40.0, 4.0, 120.0):
            await put(office.jobs, a_job(user="ann"), a_job(user="ann"))
            await office.work_off(seconds=20.0 + minutes)
            await asyncio.sleep(minutes * MINUTES)
        await office.presence.opened("conjure", lasts=timedelta(hours=1), user="ann")
        if at_work:
            await put(office.jobs, a_job(user="ann"))
        await asyncio.sleep(70)  # until history is read again, too
        before = await first.view()
    second = await office.fleet()
    await second.begin()
    after = await second.view()
    alike(before.demand, after.demand)
    assert before.presence.present == after.presence.present == 1
    assert close(before.presence.since, after.presence.since, within=1)
    assert close(before.presence.lead_s, after.presence.lead_s, within=1)
    assert close(before.presence.recall, after.presence.recall, within=0.01)
    assert before.backlog == after.backlog
    assert before.offers == after.offers
