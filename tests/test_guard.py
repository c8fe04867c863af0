"""The guard: ends what outlives its lease or its idle time, whoever owns it, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runcomfy.application.guard import GUARD, Guard, end_of
from runcomfy.application.own_machine import keep_lease
from runcomfy.domain.exceptions import MachineLost, StoreUnavailable
from runcomfy.domain.lease import Use
from runcomfy.domain.machine import Machine, MachineState, Purpose
from runcomfy.domain.settings import CloudSettings
from runcomfy.testing.clock import START, LoopClock
from runcomfy.testing.contracts.store import a_machine
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.programs import Program, Programs, discrepancies, settings_for

PERIOD = timedelta(seconds=30)
LEASE = timedelta(minutes=10)
without_comfyui = pytest.mark.cloud(comfyui=False)


@pytest.fixture
def programs(cloud: RunComfyEmulator, cloud_settings: CloudSettings, clock: LoopClock, tmp_path: Path) -> Programs:
    settings = settings_for(cloud_settings, tmp_path / "state")
    return Programs(cloud, replace(settings, pool=replace(settings.pool, guard=True)), clock)


class Guarding:
    """A guard at work in a program of its own."""

    def __init__(self, program: Program, guard: Guard, task: asyncio.Task[None]) -> None:
        self.program, self.guard, self.task = program, guard, task

    @property
    def said(self) -> list[str]:
        return self.program.said


@asynccontextmanager
async def guarding(programs: Programs, period: timedelta = PERIOD) -> AsyncIterator[Guarding]:
    async with programs.start() as program:
        guard = Guard(program.machines, program.dev, period=period)
        task = asyncio.create_task(guard.run())
        try:
            yield Guarding(program, guard, task)
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            await guard.close()


def billed_seconds(cloud: RunComfyEmulator, server_id: str) -> float:
    return float(cloud.books[server_id].seconds)


async def killed_when_ready(programs: Programs, purpose: Purpose = Purpose.RUN) -> Machine:
    async with programs.start() as victim:
        machine, _ = await victim.ready(victim.intent(purpose=purpose))
        await victim.kill()
    return machine


# -- leases ------------------------------------------------------------------------------------------------


@pytest.mark.fault(23)
@without_comfyui
@pytest.mark.parametrize("purpose", [Purpose.RUN, Purpose.POOL])
async def test_a_machine_whose_provider_ignores_its_lease_is_ended_within_a_period(
    cloud: RunComfyEmulator, programs: Programs, purpose: Purpose
) -> None:
    cloud.next_machine(ignores_stop_time=True)
    machine = await killed_when_ready(programs, purpose)
    async with guarding(programs) as guard:
        await asyncio.wait_for(guard.task, timeout=3600)
        assert cloud.alive == []
        assert LEASE <= timedelta(seconds=billed_seconds(cloud, cloud.launched[0])) <= LEASE + PERIOD
        assert await discrepancies(cloud, guard.program) == []
        story = await guard.program.store.story(machine.id)
        assert any("guard: it outlived its lease" in step.note for step in story)
        assert await guard.program.billed() == cloud.total_usd


@pytest.mark.fault(26)
@without_comfyui
async def test_an_end_that_failed_is_tried_again_soon_however_long_the_period_is(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    """I5: the token is refused when the lease is over, and accepted again half an hour later."""
    cloud.next_machine(ignores_stop_time=True)
    await killed_when_ready(programs)
    async with guarding(programs, period=timedelta(hours=2)) as guard:
        cloud.next_call(status=401, times=None, lasts=timedelta(minutes=30))
        await asyncio.wait_for(guard.task, timeout=6 * 3600)
        assert cloud.alive == []
        assert billed_seconds(cloud, cloud.launched[0]) < LEASE.total_seconds() + 30 * 60 + 120


@without_comfyui
async def test_where_the_provider_keeps_its_word_the_guard_only_closes_the_books(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    await killed_when_ready(programs)
    async with guarding(programs) as guard:
        await asyncio.wait_for(guard.task, timeout=3600)
        assert not any(call.method == "DELETE" for call in cloud.calls)
        assert await guard.program.billed() == cloud.total_usd
        assert billed_seconds(cloud, cloud.launched[0]) == LEASE.total_seconds()


@pytest.mark.fault(62)
@without_comfyui
async def test_a_hung_owner_that_does_not_renew_loses_its_machine(cloud: RunComfyEmulator, programs: Programs) -> None:
    cloud.next_machine(ignores_stop_time=True)
    async with programs.start() as hung, guarding(programs) as guard:
        machine, _ = await hung.ready()
        await asyncio.sleep((LEASE + PERIOD).total_seconds() + 20)
        assert cloud.alive == []
        assert any(f"machine {machine.server_id} is ended" in said for said in guard.said)
        with pytest.raises(MachineLost):  # it wakes, and finds out before it does anything
            await keep_lease(hung.machines, machine)


@without_comfyui
async def test_a_machine_whose_lease_is_renewed_is_never_ended(cloud: RunComfyEmulator, programs: Programs) -> None:
    async with programs.start() as owner, guarding(programs) as guard:
        machine, _ = await owner.ready()
        keeper = asyncio.create_task(keep_lease(owner.machines, machine))
        await asyncio.sleep(6 * LEASE.total_seconds())
        assert not keeper.done()
        assert cloud.billing == [machine.server_id]
        assert not any("ending" in said for said in guard.said)
        keeper.cancel()
        latest = await owner.store.machine(machine.id)
        assert latest is not None
        await owner.machines.stop(latest, reason="the test is over")
        assert await owner.billed() == cloud.total_usd


@pytest.mark.fault(24)
@without_comfyui
async def test_a_renewal_that_worked_and_was_not_heard_of_protects_a_living_owner(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    async with programs.start() as owner, guarding(programs):
        machine, _ = await owner.ready()
        await asyncio.sleep(300)
        await owner.machines.provider.change_duration(machine.server_id, total=3 * LEASE)  # type: ignore[arg-type]
        await asyncio.sleep((LEASE + PERIOD).total_seconds())
        assert cloud.billing == [machine.server_id]  # the provider's word is asked before anything is done
        await owner.machines.stop(machine, reason="the test is over")


@without_comfyui
async def test_a_machine_that_came_up_after_its_owner_died_is_billed_and_ended(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    cloud.next_machine(ignores_stop_time=True)
    async with programs.start() as victim:
        await victim.launch()
        await victim.kill()
    async with guarding(programs) as guard:
        await asyncio.wait_for(guard.task, timeout=3600)
        assert LEASE.total_seconds() <= billed_seconds(cloud, cloud.launched[0]) <= (LEASE + PERIOD).total_seconds()
        assert await guard.program.billed() == cloud.total_usd > 0


@without_comfyui
async def test_a_machine_that_never_comes_up_is_ended_after_the_boot_limit(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    cloud.next_machine(stuck=True)
    async with programs.start() as victim:
        await victim.launch()
        await victim.kill()
    async with guarding(programs) as guard:
        await asyncio.sleep(1700)
        assert cloud.alive == cloud.launched
        await asyncio.wait_for(guard.task, timeout=3600)
        assert cloud.alive == []


@pytest.mark.fault(2)
@without_comfyui
async def test_a_launch_that_was_never_answered_is_resolved_and_ended(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    cloud.next_machine(ignores_stop_time=True)
    cloud.next_call("POST servers", delay=900)
    async with programs.start() as victim:
        task = asyncio.create_task(victim.launch())
        await asyncio.sleep(5)
        await victim.kill(task)
    async with guarding(programs) as guard:
        await asyncio.wait_for(guard.task, timeout=2 * 3600)
        assert billed_seconds(cloud, cloud.launched[0]) <= (LEASE + PERIOD).total_seconds()
        assert await guard.program.billed() == cloud.total_usd


@without_comfyui
async def test_a_stop_that_its_process_did_not_see_through_is_seen_through(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    async with programs.start() as victim:
        machine, _ = await victim.ready()
        cloud.next_call("DELETE *", works=False, status=500, times=None)
        task = asyncio.create_task(victim.machines.stop(machine, reason="done"))
        await asyncio.sleep(20)
        await victim.kill(task)
        cloud.behave()
    async with guarding(programs) as guard:
        await asyncio.wait_for(guard.task, timeout=300)
        assert cloud.alive == []


# -- when it leaves, and what it does without books ------------------------------------------------------------


@without_comfyui
async def test_it_stays_while_somebody_could_launch_and_leaves_with_the_last(programs: Programs) -> None:
    async with guarding(programs) as guard:
        async with programs.start():
            await asyncio.sleep(1000)
            assert not guard.task.done()
        await asyncio.wait_for(guard.task, timeout=PERIOD.total_seconds() + 5)


@without_comfyui
async def test_guards_do_not_wait_for_each_other(programs: Programs) -> None:
    async with guarding(programs) as guard, programs.start() as other:
        again = replace(other.owner, command=f"comfyctl {GUARD}", id=type(other.owner.id)("another-guard"))
        await other.store.register_owner(again)
        other.die()
        await asyncio.wait_for(guard.task, timeout=PERIOD.total_seconds() + 5)


@pytest.mark.fault(55)
@without_comfyui
async def test_without_its_books_it_ends_what_it_knew_of(
    cloud: RunComfyEmulator, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud.next_machine(ignores_stop_time=True)
    await killed_when_ready(programs)
    async with guarding(programs) as guard:
        await asyncio.sleep(60)
        disk = guard.program.store

        async def locked(*_: object, **__: object) -> None:
            raise StoreUnavailable("the database is locked")

        with monkeypatch.context() as broken:
            for name in ("machines", "machine", "owners", "take_over", "record", "change", "uses", "close_bill"):
                broken.setattr(disk, name, locked, raising=False)
            await asyncio.sleep(LEASE.total_seconds() + PERIOD.total_seconds())
            assert cloud.billing == []
            assert billed_seconds(cloud, cloud.launched[0]) <= (LEASE + PERIOD).total_seconds()
            assert not guard.task.done()  # what it does not know it goes on asking for
            await asyncio.sleep(10 * PERIOD.total_seconds())
            about = [line for line in guard.said if str(cloud.launched[0]) in line]
            assert about
            assert len(about) == len(set(about))  # each thing is said once, however often it is tried to write it down
        await asyncio.wait_for(guard.task, timeout=300)
        assert await guard.program.billed() == cloud.total_usd


@without_comfyui
async def test_machines_that_are_not_ours_are_none_of_its_business(cloud: RunComfyEmulator, programs: Programs) -> None:
    stranger = cloud.foreign("large", duration=60, ignores_stop_time=True)
    await killed_when_ready(programs)
    async with guarding(programs) as guard:
        await asyncio.wait_for(guard.task, timeout=3600)
    assert stranger.bills


# -- the dev server's idle time ------------------------------------------------------------------------------


async def dev_server(program: Program) -> Machine:
    machine, _, _ = await program.dev.start(server_type="medium", duration=timedelta(hours=4))
    return machine


async def test_an_idle_dev_server_is_warned_of_and_then_ended(cloud: RunComfyEmulator, programs: Programs) -> None:
    async with guarding(programs) as guard:
        async with programs.start() as program:
            machine = await dev_server(program)
            await asyncio.sleep(7 * 60)
            status = await program.dev.status()
            assert status is not None
            assert status.ends_idle_in is not None
            assert timedelta(minutes=2) < status.ends_idle_in <= timedelta(minutes=3)
            assert not any("WARNING" in said for said in guard.said)
            await asyncio.sleep(100)
            assert sum("WARNING" in said for said in guard.said) == 1
            assert cloud.billing == [machine.server_id]
        await asyncio.wait_for(guard.task, timeout=300)
        assert cloud.alive == []
        assert 600 <= billed_seconds(cloud, cloud.launched[0]) <= 600 + PERIOD.total_seconds()
        story = await guard.program.store.story(machine.id)
        assert any("CONJURE_IDLE_TIMEOUT" in step.note for step in story)


async def test_a_use_begins_the_idle_time_anew(cloud: RunComfyEmulator, programs: Programs, clock: LoopClock) -> None:
    async with programs.start() as program, guarding(programs):
        machine = await dev_server(program)
        await asyncio.sleep(500)
        await program.store.begin_use(Use(machine.id, program.owner.id, "job-1", clock.now()))
        await asyncio.sleep(1500)  # as long as a job runs there is no idle time
        assert cloud.billing == [machine.server_id]
        await program.store.end_use(machine.id, "job-1", at=clock.now())
        await asyncio.sleep(590)
        assert cloud.billing == [machine.server_id]
        await asyncio.sleep(60)
        assert cloud.billing == []


async def test_a_job_of_a_dead_process_keeps_no_dev_server(
    cloud: RunComfyEmulator, programs: Programs, clock: LoopClock
) -> None:
    async with programs.start() as program, guarding(programs):
        machine = await dev_server(program)
        async with programs.start() as victim:
            await victim.store.begin_use(Use(machine.id, victim.owner.id, "job-1", clock.now()))
            await victim.kill()
        await asyncio.sleep(700)
        assert cloud.billing == []


async def test_while_somebody_monitors_it_is_not_ended(cloud: RunComfyEmulator, programs: Programs) -> None:
    async with programs.start() as program, guarding(programs):
        machine = await dev_server(program)
        async with program.dev.monitored(machine):
            await asyncio.sleep(2 * 3600)
            assert cloud.billing == [machine.server_id]
            status = await program.dev.status()
            assert status is not None
            assert (status.monitored, status.jobs_running, status.ends_idle_in) == (True, 0, None)
        await asyncio.sleep(700)
        assert cloud.billing == []


@pytest.mark.fault(69)
async def test_a_prompt_that_was_sent_by_hand_keeps_the_dev_server(cloud: RunComfyEmulator, programs: Programs) -> None:
    async with programs.start() as program, guarding(programs):
        machine = await dev_server(program)
        found = await program.dev.find()
        assert found is not None
        assert found[1].url is not None
        server = program.placer.comfyui(found[1].url)
        steps = {"steps": 2000, "seconds_per_step": 1.0, "preview": False, "seed": 1}
        graph = {
            "1": {"class_type": "ProbeSteps", "inputs": steps},
            "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "by-hand"}},
        }
        await server.submit(graph, prompt_id="7d1f2b86-2b10-4e39-bb0b-52a5a39d8d11")  # type: ignore[arg-type]
        await asyncio.sleep(1500)
        assert cloud.billing == [machine.server_id]
        await asyncio.sleep(500 + 700)
        assert cloud.billing == []


@pytest.mark.fault(39)
@pytest.mark.fault(69)
async def test_a_prompt_that_waits_at_a_dead_worker_keeps_no_dev_server(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    async with programs.start() as program, guarding(programs):
        machine = await dev_server(program)
        found = await program.dev.find()
        assert found is not None
        assert found[1].url is not None
        comfyui = cloud.machines[cloud.launched[0]].comfyui
        assert isinstance(comfyui, ComfyUIEmulator)
        comfyui.kill_worker()
        server = program.placer.comfyui(found[1].url)
        graph = {
            "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}},
            "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "by-hand"}},
        }
        await server.submit(graph, prompt_id="7d1f2b86-2b10-4e39-bb0b-52a5a39d8d11")  # type: ignore[arg-type]
        await asyncio.sleep(900)
        assert cloud.billing == [machine.server_id]  # once it is taken for use
        await asyncio.sleep(400)
        assert cloud.billing == []


async def test_a_job_that_comes_at_the_last_moment_keeps_it(
    cloud: RunComfyEmulator, programs: Programs, clock: LoopClock
) -> None:
    async with programs.start() as program, guarding(programs):
        machine = await dev_server(program)
        assert machine.ready_at is not None
        left = machine.ready_at + timedelta(seconds=600) - clock.now()
        await asyncio.sleep(left.total_seconds() - 0.5)
        await program.store.begin_use(Use(machine.id, program.owner.id, "job-1", clock.now()))
        await asyncio.sleep(900)
        assert cloud.billing == [machine.server_id]
        await program.dev.shutdown()


async def test_what_the_user_let_run_longer_on_the_providers_page_runs_longer(
    cloud: RunComfyEmulator, programs: Programs, clock: LoopClock
) -> None:
    programs.settings = replace(programs.settings, app=replace(programs.settings.app, idle_timeout=timedelta(days=1)))
    async with programs.start() as program, guarding(programs) as guard:
        machine, _, _ = await program.dev.start(server_type="medium", duration=timedelta(hours=1))
        await program.machines.provider.change_duration(machine.server_id, total=timedelta(hours=2))  # type: ignore[arg-type]
        await asyncio.sleep(1.5 * 3600)
        assert cloud.billing == [machine.server_id]
        row = await guard.program.store.machine(machine.id)
        assert row is not None
        assert row.duration == timedelta(hours=2)
        await asyncio.sleep(3600)
        assert cloud.billing == []
        assert await program.billed() == cloud.total_usd


# -- clocks ------------------------------------------------------------------------------------------------


class SetClock(LoopClock):
    """A wall clock that somebody sets."""

    def __init__(self) -> None:
        super().__init__()
        self.off = timedelta(0)

    def now(self) -> datetime:
        return super().now() + self.off


@pytest.mark.fault(68)
async def test_an_idle_dev_server_that_was_stopped_on_the_website_is_closed_in_our_books_and_not_asked_to_stop(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    async with programs.start() as starter:
        await starter.dev.start(server_type="medium", duration=timedelta(hours=3))
    async with guarding(programs) as guard:
        await asyncio.sleep(60)
        (rented,) = cloud.machines.values()
        cloud.end_by_hand(rented)
        await asyncio.wait_for(guard.task, timeout=4 * 3600)
        assert await guard.program.books.rows() == []
        assert not any(call.method == "DELETE" for call in cloud.calls)
        [entry] = await guard.program.store.ledger()
        assert rented.gone_at is not None
        assert entry.ended_at is not None
        assert rented.gone_at <= entry.ended_at <= guard.program.machines.clock.now()


@pytest.mark.fault(60)
@without_comfyui
@pytest.mark.parametrize("jump", [timedelta(days=1), timedelta(days=-1)])
async def test_a_clock_that_is_set_ends_no_machine_of_a_living_owner(
    cloud: RunComfyEmulator, programs: Programs, jump: timedelta
) -> None:
    programs.clock = clock = SetClock()
    async with programs.start() as owner, guarding(programs):
        machine, _ = await owner.ready()
        keeper = asyncio.create_task(keep_lease(owner.machines, machine))
        await asyncio.sleep(100)
        clock.off = jump
        await asyncio.sleep(1500)
        assert cloud.billing == [machine.server_id]
        assert not keeper.done()
        keeper.cancel()
        latest = await owner.store.machine(machine.id)
        assert latest is not None
        await owner.machines.stop(latest, reason="the test is over")


@pytest.mark.fault(60)
async def test_a_clock_that_was_set_is_believed_after_a_while(programs: Programs, clock: LoopClock) -> None:
    programs.clock = moved = SetClock()
    async with programs.start() as program:
        guard = await looked(program)
        moved.off = timedelta(days=1)
        for minutes, believed in ((0, False), (29, False), (2, True)):
            await asyncio.sleep(60 * minutes)
            guard._watch_clock()
            assert (guard._now(owner_lives=True) == moved.now()) is believed


# -- between a look and its deed ---------------------------------------------------------------------------


async def looked(program: Program) -> Guard:
    """Return a guard that has read the books, and does nothing by itself."""
    guard = Guard(program.machines, program.dev, period=PERIOD)
    await guard._read()
    return guard


@without_comfyui
async def test_a_machine_that_somebody_took_in_hand_since_the_guard_looked_is_theirs_to_end(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    cloud.next_machine(ignores_stop_time=True)
    await killed_when_ready(programs)
    await asyncio.sleep(2 * LEASE.total_seconds())
    async with programs.start() as other, programs.start() as program:
        guard = await looked(program)
        [row] = guard._rows
        theirs = await other.books.take_over(row, note="it is mine by now")
        await guard._end(row, "its lease is over")
        assert program.said == []
        assert cloud.billing == [theirs.server_id]
        await other.machines.stop(theirs, reason="the test is over")
        await guard._end(row, "its lease is over")  # it has ended by now
        assert program.said == []
        assert len([call for call in cloud.calls if call.method == "DELETE"]) == 1


@without_comfyui
async def test_a_machine_whose_lease_was_renewed_since_the_guard_looked_is_kept_whoever_cannot_be_asked(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    async with programs.start() as owner, programs.start() as program:
        machine, _ = await owner.ready()
        guard = await looked(program)
        [row] = guard._rows
        machine = await owner.machines.extend(machine, total=timedelta(hours=1))
        away = cloud.next_call("GET servers/*", status=500, times=None)
        await guard._end(row, "its lease is over")
        assert cloud.forget_call(away)
        assert program.said == []
        assert cloud.billing == [machine.server_id]
        await owner.machines.stop(machine, reason="the test is over")
        assert await discrepancies(cloud, owner) == []


async def test_an_idle_dev_server_that_a_job_took_in_the_moment_of_its_end_is_given_back(
    cloud: RunComfyEmulator, programs: Programs, clock: LoopClock
) -> None:
    async with programs.start() as owner, programs.start() as program:
        machine = await dev_server(owner)
        guard = await looked(program)
        [row] = guard._rows
        await owner.store.begin_use(Use(machine.id, owner.owner.id, "job-1", clock.now()))
        await guard._end(row, "nothing ran on it for 600 s (CONJURE_IDLE_TIMEOUT)")
        assert cloud.billing == [machine.server_id]
        found = await owner.store.machine(machine.id)
        assert found is not None
        assert (found.owner_id, found.kept_until) == (None, machine.kept_until)
        await owner.dev.shutdown()
        assert await discrepancies(cloud, owner) == []


# -- the rule --------------------------------------------------------------------------------------------------


@given(
    state=st.sampled_from(MachineState),
    lives=st.booleans(),
    ready=st.none() | st.integers(0, 600),
    duration=st.integers(1, 7200),
    asked=st.none() | st.integers(1, 7200),
)
def test_the_time_of_a_machine_is_never_before_its_confirmed_lease(
    state: MachineState, lives: bool, ready: int | None, duration: int, asked: int | None
) -> None:
    machine = replace(
        a_machine(),
        state=state,
        requested_at=START,
        ready_at=START + timedelta(seconds=ready) if ready is not None else None,
        planned_stop_at=None,
        duration=timedelta(seconds=duration),
        asked_duration=timedelta(seconds=asked) if asked is not None else None,
    )
    end = end_of(machine, owner_lives=lives, boot_timeout=timedelta(minutes=30))
    if state is MachineState.REQUESTED:
        assert end is None
    elif end is not None and state is not MachineState.STOPPING:
        since = machine.ready_at or START
        if machine.ready_at is not None:
            assert end.at >= since + machine.duration
        if lives and asked is not None and machine.ready_at is not None:
            assert end.at >= since + timedelta(seconds=asked)
        if machine.ready_at is None:
            assert end.at >= START + timedelta(minutes=30)
