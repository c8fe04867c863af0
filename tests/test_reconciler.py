"""The reconciler: our books against the provider's list, again and again; what belongs to a live job is spared."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime, timedelta

import pytest

from runcomfy.application.own_machine import keep_lease
from runcomfy.application.reaper import EXECUTORS, Reaper
from runcomfy.application.reconciler import Reconciler
from runcomfy.domain.exceptions import LeaseLost, MachineLost
from runcomfy.domain.machine import Machine, Purpose
from runcomfy.domain.place_key import machine_key
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.past import Past
from runcomfy.testing.programs import Killed, Program, Programs, discrepancies

pytestmark = pytest.mark.cloud(comfyui=False)


@asynccontextmanager
async def reconciling(programs: Programs) -> AsyncIterator[tuple[Program, Reconciler]]:
    async with programs.start() as program:
        reconciler = Reconciler(program.machines)
        task = asyncio.create_task(reconciler.run())
        try:
            yield program, reconciler
        finally:
            task.cancel()
            await asyncio.wait({task})


async def dead_ones_machine(programs: Programs, *, purpose: Purpose = Purpose.RUN, reason: str = "a test") -> Machine:
    async with programs.start() as victim:
        intent = replace(victim.intent(purpose=purpose), reason=reason)
        machine, _ = await victim.ready(intent)
        await victim.kill()
    return machine


async def test_what_the_dead_leave_is_ended_within_a_period_and_said(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    async with reconciling(programs) as (program, _):
        for _ in range(2):
            await dead_ones_machine(programs)
            await asyncio.sleep(60)
            assert cloud.alive == []
        assert sum("it cost $" in said for said in program.said) == 2
        assert await discrepancies(cloud, program) == []
        assert await program.billed() == cloud.total_usd


@pytest.mark.fault(12)
async def test_strangers_are_reported_once_and_left_alone(cloud: RunComfyEmulator, programs: Programs) -> None:
    stranger = cloud.foreign("large")
    async with reconciling(programs) as (program, reconciler):
        await asyncio.sleep(300)
        assert stranger.bills
        assert sum(stranger.server_id in said for said in program.said) == 1
        assert reconciler.last is not None
        assert [report.server_id for report in reconciler.last.foreign] == [stranger.server_id]


@pytest.mark.fault(29)
async def test_a_provider_that_cannot_be_asked_is_asked_again(cloud: RunComfyEmulator, programs: Programs) -> None:
    await dead_ones_machine(programs)
    cloud.next_call("GET servers", status=503, times=None, lasts=200)
    async with reconciling(programs) as (program, _):
        await asyncio.sleep(150)
        assert cloud.billing
        assert sum("could not be looked through" in said for said in program.said) <= 2
        await asyncio.sleep(200)
        assert cloud.alive == []


@pytest.mark.fault(11)
async def test_one_empty_list_ends_no_books(cloud: RunComfyEmulator, programs: Programs) -> None:
    async with programs.start() as owner:
        machine, _ = await owner.ready()
        async with reconciling(programs):
            cloud.next_call("GET servers", body=[], times=1)
            await asyncio.sleep(120)
            row = await owner.store.machine(machine.id)
            assert row is not None
            assert row.is_open
        await owner.machines.stop(row, reason="the test is over")


# -- what belongs to a live job ------------------------------------------------------------------------------


def prompts(*machines: Machine) -> set[str]:
    return {machine_key(machine.id) for machine in machines}


@pytest.mark.parametrize("purpose", [Purpose.RUN, Purpose.POOL])
async def test_where_a_queued_jobs_prompt_may_run_the_machine_lives_to_the_end_of_its_lease(
    cloud: RunComfyEmulator, programs: Programs, purpose: Purpose
) -> None:
    cloud.next_machine(ignores_stop_time=True)
    machine = await dead_ones_machine(programs, purpose=purpose)

    async def places() -> Collection[str]:
        return prompts(machine)

    async with programs.start() as program:
        program.machines.prompt_places = places
        done = await Reaper(program.machines).reap(wait=False)
        assert done.ended == []
        assert [verdict.machine.id for verdict in done.kept] == [machine.id]
        assert "the prompt of a queued job" in done.kept[0].why
        await asyncio.sleep(605)
        done = await Reaper(program.machines).reap(wait=False)
        assert [ended.id for ended in done.ended] == [machine.id]
        assert await discrepancies(cloud, program) == []


@pytest.mark.parametrize(
    ("purpose", "reason", "kept"),
    [(Purpose.POOL, "planned", True), (Purpose.RUN, f"{EXECUTORS}jobs", True), (Purpose.RUN, "job 1", False)],
)
async def test_without_the_queue_a_queues_machines_live_to_the_end_of_their_lease(
    cloud: RunComfyEmulator, programs: Programs, purpose: Purpose, reason: str, kept: bool
) -> None:
    await dead_ones_machine(programs, purpose=purpose, reason=reason)

    async def unreadable() -> None:
        return None

    async with programs.start() as program:
        program.machines.prompt_places = unreadable
        await Reaper(program.machines).reap(wait=False)
        assert bool(cloud.billing) is kept
        await asyncio.sleep(700)
        await Reaper(program.machines).reap(wait=False)
        assert cloud.alive == []
        assert await program.billed() == cloud.total_usd


async def test_the_queue_is_not_asked_where_nothing_is_to_be_ended(cloud: RunComfyEmulator, programs: Programs) -> None:
    async def asked() -> Collection[str]:
        raise AssertionError("a question to another database, for nothing")

    async with programs.start() as owner, programs.start() as program:
        machine, _ = await owner.ready()
        program.machines.prompt_places = asked
        done = await Reaper(program.machines).reap(wait=False)
        assert (done.ended, done.failed, cloud.billing) == ([], [], [machine.server_id])
        await owner.machines.stop(machine, reason="the test is over")


async def test_whoever_takes_a_spared_machine_over_keeps_it(cloud: RunComfyEmulator, programs: Programs) -> None:
    machine = await dead_ones_machine(programs, purpose=Purpose.POOL)

    async def places() -> Collection[str]:
        return prompts(machine)

    async with programs.start() as heir, reconciling(programs) as (program, reconciler):
        program.machines.prompt_places = places
        taken = await heir.books.take_over(machine, note="went on with it")
        keeper = asyncio.create_task(keep_lease(heir.machines, taken))
        reconciler.hurry()
        await asyncio.sleep(3_600)
        assert cloud.billing == [machine.server_id]
        keeper.cancel()
        latest = await heir.store.machine(machine.id)
        assert latest is not None
        await heir.machines.stop(latest, reason="the test is over")
        assert await heir.billed() == cloud.total_usd


async def test_machines_that_the_caller_is_about_to_take_over_are_spared(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    mine, another = await dead_ones_machine(programs), await dead_ones_machine(programs)
    async with programs.start() as program:
        reconciler = Reconciler(program.machines, spare=lambda machine: machine.id == mine.id)
        done = await reconciler.once()
        assert [machine.id for machine in done.ended] == [another.id]
        assert cloud.billing == [mine.server_id]
        assert reconciler.last is done
        done = await Reconciler(program.machines).once()
        assert [machine.id for machine in done.ended] == [mine.id]


async def test_rounds_that_are_over_are_not_remembered(programs: Programs) -> None:
    """A service reconciles for months."""
    async with reconciling(programs) as (_, reconciler):
        for _ in range(3):
            await asyncio.sleep(1)
            assert not reconciler._rounds
            reconciler.hurry()


# -- two controllers, and clocks -------------------------------------------------------------------------------


@pytest.mark.fault(63)
async def test_two_reconcilers_end_a_machine_once(cloud: RunComfyEmulator, programs: Programs) -> None:
    await dead_ones_machine(programs)
    async with reconciling(programs) as (one, _), reconciling(programs) as (two, _):
        await asyncio.sleep(120)
        assert cloud.alive == []
        assert await discrepancies(cloud, one) == []
        assert await two.billed() == cloud.total_usd


@pytest.mark.fault(64)
async def test_a_stale_owner_that_wakes_finds_its_machine_gone_and_touches_nothing(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    async with programs.start() as stale:
        machine, _ = await stale.ready()
        programs.processes.dead.add(stale.owner.id)  # for ten minutes it does not move
        async with reconciling(programs):
            await asyncio.sleep(600)
        programs.processes.dead.discard(stale.owner.id)
        assert cloud.alive == []
        asked = len([call for call in cloud.calls if call.method != "GET"])
        with pytest.raises(MachineLost):
            await keep_lease(stale.machines, machine)
        with pytest.raises(LeaseLost):
            await stale.machines.extend(machine, total=timedelta(hours=1))
        await stale.machines.stop(machine, reason="it thinks that it still has it")
        assert len([call for call in cloud.calls if call.method != "GET"]) == asked
        assert await discrepancies(cloud, stale) == []


class SleepyClock(LoopClock):
    """The wall clock of a computer that slept: the loop's time stood still meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.slept = timedelta(0)

    def now(self) -> datetime:
        return super().now() + self.slept


@pytest.mark.fault(60)
async def test_after_a_sleep_everything_is_looked_at_first(cloud: RunComfyEmulator, programs: Programs) -> None:
    programs.clock = clock = SleepyClock()
    programs.settings = replace(
        programs.settings, pool=replace(programs.settings.pool, reconcile_every=timedelta(hours=1))
    )
    async with reconciling(programs) as (program, _):
        await asyncio.sleep(10)
        await dead_ones_machine(programs)
        clock.slept = timedelta(hours=8)
        await asyncio.sleep(30)
        assert cloud.alive == []
        assert any("the clock moved" in said for said in program.said)


# -- a machine that goes away --------------------------------------------------------------------------------


@pytest.mark.fault(22)
@pytest.mark.fault(68)
@pytest.mark.cloud(comfyui=True)
async def test_a_machine_that_goes_away_ends_what_runs_on_it_at_once(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    cloud.next_machine(vanishes_after=120)
    async with programs.start() as program:
        loop = asyncio.get_running_loop()
        place = program.placer.at(
            server_url=None,
            server_type="medium",
            job_id="00000000-0000-4000-8000-000000000001",  # type: ignore[arg-type]
            show=lambda _: None,
            step=lambda _: None,
        )
        began = 0.0

        async def job() -> None:
            nonlocal began
            async with place:
                began = loop.time()
                await asyncio.sleep(3_600)

        with pytest.raises(MachineLost):
            await job()
        assert 0 < loop.time() - began < 120 + 30
        assert await discrepancies(cloud, program) == []
        ours, bill = await program.billed(), cloud.total_usd
        assert bill <= ours <= bill + cloud.machines[cloud.launched[0]].usd_per_hour * 30 / 3600


async def test_a_machine_that_is_stopped_on_the_providers_page_is_lost_at_once(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    async with programs.start() as program, programs.start() as other:
        machine, _ = await program.ready()
        keeper = asyncio.create_task(keep_lease(program.machines, machine))
        await asyncio.sleep(100)
        await other.machines.provider.stop_machine(machine.server_id)  # type: ignore[arg-type]
        await asyncio.wait_for(asyncio.wait({keeper}), timeout=30)
        with pytest.raises(MachineLost):
            keeper.result()
        latest = await program.books.latest(machine.id)
        assert latest is not None
        if latest.is_open:
            await program.machines.stop(latest, reason="it is lost")
        assert await discrepancies(cloud, program) == []


# -- bills -------------------------------------------------------------------------------------------------


async def test_who_dies_when_a_stop_was_accepted_leaves_no_bill_open(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    """Invariant I9: the ledger is closed with the write that says so, whoever owns the machine by then."""
    victims: list[Program] = []

    def die(point: str) -> None:
        if victims and point == "before store.close_bill":
            victims[0].drop_dead()

    async with programs.start(visit=die) as victim:
        victims.append(victim)
        machine, _ = await victim.ready()
        await asyncio.sleep(300)
        with pytest.raises(Killed):
            await victim.machines.stop(machine, reason="the job is done")
    async with programs.start() as program:
        assert await program.billed() == cloud.total_usd > 0
        await Reaper(program.machines).reap()
        assert await discrepancies(cloud, program) == []


async def test_a_bill_that_is_not_in_the_ledger_is_written_by_the_next_round(
    cloud: RunComfyEmulator, programs: Programs, clock: LoopClock
) -> None:
    """Invariant I9: also where nobody lists, stops or takes over anything any more."""
    async with programs.start() as program:
        left = await Past(program.books).machine(clock.now() - timedelta(hours=9), timedelta(seconds=50), posts=False)
        assert await program.billed() == 0
        reconciler = Reconciler(program.machines)
        assert [machine.id for machine in (await reconciler.once()).billed] == [left.id]
        [entry] = await program.store.ledger(machine_id=left.id)
        assert entry.ended_at - entry.started_at == timedelta(seconds=50)
        assert entry.note == "ready until the stop was accepted, written later"
        assert sum("was not in the ledger; it is now" in sentence for sentence in program.said) == 1
        assert (await reconciler.once()).billed == []
        assert cloud.launched == []
