"""Ending what is ours and has nobody any more, and nothing else (I7)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runcomfy.application.reaper import EXECUTORS, is_queues, judge, lease_ends
from runcomfy.domain.exceptions import LaunchAmbiguous, MachineNotFound, ProviderError
from runcomfy.domain.lease import Use
from runcomfy.domain.machine import Machine, MachineState, OwnerId, Phase, Purpose, ServerId
from runcomfy.testing.clock import START, LoopClock
from runcomfy.testing.contracts.store import a_machine
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.programs import Program, Programs, discrepancies

pytestmark = pytest.mark.cloud(comfyui=False)


@pytest.fixture
async def reaper(programs: Programs) -> AsyncIterator[Program]:
    async with programs.start() as program:
        yield program


async def killed_while(programs: Programs, work: str, *, after: float | None = None, **intent: Any) -> None:
    """Let a program launch (and wait) and be killed, in the midst of it or when it is done."""
    async with programs.start() as program:
        wanted = program.intent(**intent)
        task: asyncio.Task[Any] = asyncio.create_task(
            program.launch(wanted) if work == "launch" else program.ready(wanted)
        )
        if after is None:
            await task
        else:
            await asyncio.sleep(after)
        await program.kill(task)


async def test_the_machine_of_a_killed_program_is_ended(
    cloud: RunComfyEmulator, programs: Programs, reaper: Program
) -> None:
    await killed_while(programs, "ready")
    assert cloud.billing
    done = await reaper.reaper.reap()
    assert [m.server_id for m in done.ended] == cloud.launched
    assert cloud.alive == []
    assert await discrepancies(cloud, reaper) == []
    assert (await reaper.reaper.reap()).ended == []


@pytest.mark.fault(12)
async def test_machines_of_the_living_and_of_strangers_are_left_alone(
    cloud: RunComfyEmulator, programs: Programs, reaper: Program
) -> None:
    strangers = [cloud.foreign("medium", duration=600), cloud.foreign("large")]
    await killed_while(programs, "ready")
    async with programs.start() as living:
        machine, _ = await living.ready()
        done = await reaper.reaper.reap()
        assert [m.server_id for m in done.ended] == [cloud.launched[0]]
        assert [v.machine.server_id for v in done.kept] == [machine.server_id]
        assert {r.server_id for r in done.foreign} == {s.server_id for s in strangers}
        assert cloud.billing == [machine.server_id]
        assert all(s.bills for s in strangers)
        await living.machines.stop(machine, reason="the test is over")


@pytest.mark.fault(2)
@pytest.mark.fault(4)
@pytest.mark.parametrize("after", [0.2, 3, 30, 100])
async def test_a_launch_whose_program_was_killed_before_the_answer_is_resolved(
    cloud: RunComfyEmulator, programs: Programs, reaper: Program, after: float
) -> None:
    cloud.next_call("POST servers", delay=200)
    await killed_while(programs, "launch", after=after)
    assert len(cloud.launched) == 1
    done = await reaper.reaper.reap()
    assert [m.server_id for m in done.ended] == cloud.launched
    assert cloud.alive == []


@pytest.mark.fault(1)
async def test_an_intention_that_was_never_sent_is_closed_after_the_window(
    cloud: RunComfyEmulator, programs: Programs, reaper: Program
) -> None:
    cloud.foreign("medium")
    async with programs.start() as victim:
        intent = replace(victim.intent(), before_ids=tuple(ServerId(i) for i in cloud.machines))
        await victim.store.add_machine(intent, at=victim.machines.clock.now())
        victim.die()
    began = asyncio.get_running_loop().time()
    done = await reaper.reaper.reap()
    assert asyncio.get_running_loop().time() - began >= 120
    assert [m.state for m in done.closed] == [MachineState.NEVER]
    assert (done.ended, done.unresolved) == ([], [])


async def test_without_waiting_an_open_launch_is_reported_and_later_resolved(
    cloud: RunComfyEmulator, programs: Programs, reaper: Program
) -> None:
    cloud.next_machine(unlisted_for=60, hidden_for=60)
    cloud.next_call("POST servers", delay=200)
    await killed_while(programs, "launch", after=5)
    done = await reaper.reaper.reap(wait=False)
    assert len(done.unresolved) == 1
    assert done.ended == []
    await asyncio.sleep(130)
    done = await reaper.reaper.reap(wait=False)
    assert [m.server_id for m in done.ended] == cloud.launched
    assert cloud.alive == []


async def test_the_next_launch_ends_what_an_earlier_one_left_before_it_begins(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    cloud.next_call("POST servers", delay=200)
    await killed_while(programs, "launch", after=5)
    async with programs.start() as other:
        machine = await other.launch()
        assert cloud.launched[1] == machine.server_id
        assert cloud.alive == [machine.server_id]
        await other.machines.stop(machine, reason="the test is over")


@pytest.mark.fault(12)
async def test_an_open_launch_that_two_machines_fit_is_reported_and_neither_is_touched(
    cloud: RunComfyEmulator, programs: Programs, reaper: Program
) -> None:
    cloud.next_call("POST servers", delay=200)
    await killed_while(programs, "launch", after=5)
    stranger = cloud.foreign("medium", duration=600)
    done = await reaper.reaper.reap()
    [(_, error)] = done.failed
    assert isinstance(error, LaunchAmbiguous)
    assert done.ended == []
    assert stranger.bills
    assert cloud.alive == cloud.launched
    await reaper.machines.provider.stop_machine(ServerId(cloud.launched[0]))


async def test_a_stop_that_was_never_seen_through_is_seen_through(
    cloud: RunComfyEmulator, programs: Programs, reaper: Program
) -> None:
    async with programs.start() as victim:
        machine, _ = await victim.ready()
        cloud.next_call("DELETE *", status=500, lasts=60, times=None)
        stop = asyncio.create_task(victim.machines.stop(machine, reason="over"))
        await asyncio.sleep(20)
        await victim.kill(stop)
    done = await reaper.reaper.reap()
    assert [m.server_id for m in done.ended] == cloud.launched
    assert await discrepancies(cloud, reaper) == []


async def test_a_stop_that_worked_before_its_program_was_killed_is_billed_until_then(
    cloud: RunComfyEmulator, programs: Programs, reaper: Program
) -> None:
    async with programs.start() as victim:
        machine, _ = await victim.ready(victim.intent(duration=timedelta(hours=3)))
        cloud.next_call("DELETE *", delay=20)
        stop = asyncio.create_task(victim.machines.stop(machine, reason="over"))
        await asyncio.sleep(10)
        await victim.kill(stop)
    await asyncio.sleep(3600)
    await reaper.reaper.reap()
    assert await discrepancies(cloud, reaper) == []


# -- machines that are kept --------------------------------------------------------------------------------


async def kept(programs: Programs, *, minutes: float = 30) -> Machine:
    async with programs.start() as starter:
        machine, report = await starter.ready(starter.intent(purpose=Purpose.DEV, duration=timedelta(minutes=minutes)))
        kept_until = starter.books.kept_until(machine, report)
        return await starter.books.hand_over(machine, kept_until=kept_until, note="up")


async def test_a_dev_server_is_kept_until_its_time_is_over_and_ended_if_it_runs_on(
    cloud: RunComfyEmulator, programs: Programs, reaper: Program
) -> None:
    cloud.next_machine(ignores_stop_time=True)
    machine = await kept(programs)
    done = await reaper.reaper.reap()
    assert [v.machine.id for v in done.kept] == [machine.id]
    assert "kept until" in done.kept[0].why
    await asyncio.sleep(1800)
    done = await reaper.reaper.reap()
    assert [m.id for m in done.ended] == [machine.id]
    assert cloud.alive == []
    assert await discrepancies(cloud, reaper) == []


async def test_a_dev_server_that_the_user_lets_run_longer_on_the_page_is_kept_longer(
    cloud: RunComfyEmulator, programs: Programs, reaper: Program
) -> None:
    machine = await kept(programs)
    assert machine.server_id is not None
    await reaper.machines.provider.change_duration(machine.server_id, total=timedelta(hours=2))
    await asyncio.sleep(1900)
    done = await reaper.reaper.reap()
    assert done.ended == []
    assert cloud.billing == [machine.server_id]
    current = await reaper.books.latest(machine.id)
    assert current is not None
    await reaper.machines.stop(await reaper.books.take_over(current, note="end"), reason="the test is over")


async def test_a_dev_server_that_is_gone_is_closed_in_the_books(
    cloud: RunComfyEmulator, programs: Programs, reaper: Program
) -> None:
    cloud.next_machine(vanishes_after=60)
    machine = await kept(programs)
    await asyncio.sleep(90)
    done = await reaper.reaper.reap()
    assert [m.id for m in done.closed] == [machine.id]
    assert (done.ended, done.kept) == ([], [])


@pytest.mark.fault(11)
async def test_a_dev_server_missing_from_one_list_by_mistake_stays(
    cloud: RunComfyEmulator, programs: Programs, reaper: Program
) -> None:
    machine = await kept(programs)
    cloud.next_call("GET servers", body=[], times=3)
    done = await reaper.reaper.reap()
    assert (done.ended, done.closed) == ([], [])
    row = await reaper.books.latest(machine.id)
    assert row is not None
    assert row.state is MachineState.READY
    await reaper.machines.stop(await reaper.books.take_over(row, note="end"), reason="the test is over")


async def test_a_machine_with_a_living_job_is_not_ended_when_its_time_is_over(
    cloud: RunComfyEmulator, programs: Programs, reaper: Program
) -> None:
    cloud.next_machine(ignores_stop_time=True)
    machine = await kept(programs)
    async with programs.start() as worker:
        await worker.store.begin_use(Use(machine.id, worker.owner.id, "job-1", START))
        await asyncio.sleep(2000)
        done = await reaper.reaper.reap()
        assert [v.why for v in done.kept] == ["job job-1 runs on it"]
        assert cloud.billing == [machine.server_id]
        worker.die()
    assert [m.id for m in (await reaper.reaper.reap()).ended] == [machine.id]


async def test_a_job_that_begins_while_the_reaper_looks_keeps_the_machine(
    cloud: RunComfyEmulator, programs: Programs, reaper: Program
) -> None:
    cloud.next_machine(ignores_stop_time=True)
    machine = await kept(programs)
    await asyncio.sleep(2000)
    async with programs.start() as worker:
        cloud.next_call("GET servers", delay=5, times=2)
        reap = asyncio.create_task(reaper.reaper.reap())
        await asyncio.sleep(7)  # it has judged, and waits for the second list
        await worker.store.begin_use(Use(machine.id, worker.owner.id, "job-1", START))
        done = await reap
        assert done.ended == []
        assert cloud.billing == [machine.server_id]
    await reaper.reaper.reap()


# -- machines that come back -------------------------------------------------------------------------------


@pytest.mark.fault(19)
async def test_a_machine_that_was_seen_gone_and_runs_again_is_ended_again_and_billed(
    cloud: RunComfyEmulator, programs: Programs, reaper: Program
) -> None:
    cloud.next_machine(ignores_delete=True, ignores_stop_time=True)
    async with programs.start() as owner:
        machine, _ = await owner.ready()
        cloud.next_call("GET servers/*", status=404, body={"message": "Server not found"}, times=1)
        cloud.next_call("GET servers", body=[], times=2)
        ended = await owner.machines.stop(machine, reason="over")  # the cloud says yes, and gone, and it is not
        assert ended.state is MachineState.STOPPED
    assert cloud.billing
    await asyncio.sleep(900)
    cloud.machines[cloud.launched[0]].traits.ignores_delete = False
    done = await reaper.reaper.reap()
    assert [m.server_id for m in done.ended] == cloud.launched
    assert cloud.alive == []
    assert await discrepancies(cloud, reaper) == []


async def test_a_machine_that_the_user_adopted_after_its_end_is_not_taken_for_one_that_came_back(
    cloud: RunComfyEmulator, programs: Programs, reaper: Program
) -> None:
    cloud.next_machine(ignores_delete=True)
    machine, _ = await reaper.ready(reaper.intent(duration=timedelta(hours=1)))
    cloud.next_call("GET servers/*", status=404, body={"message": "Server not found"}, times=1)
    cloud.next_call("GET servers", body=[], times=2)
    await reaper.machines.stop(machine, reason="over")
    [report] = await reaper.machines.provider.list_machines()
    adopted = await reaper.machines.adopt(report, purpose=Purpose.TAKEN, reason="the user said so")
    await reaper.books.hand_over(adopted, kept_until=report.stopping_at, note="adopted")
    await asyncio.sleep(5)
    done = await reaper.reaper.reap()
    assert done.ended == []
    assert cloud.billing
    cloud.machines[cloud.launched[0]].traits.ignores_delete = False
    row = await reaper.books.latest(adopted.id)
    assert row is not None
    await reaper.machines.stop(await reaper.books.take_over(row, note="end"), reason="the test is over")


async def test_a_machine_that_the_user_has_started_is_booked_as_ours_as_the_provider_tells_it(
    cloud: RunComfyEmulator, reaper: Program, clock: LoopClock
) -> None:
    machine, _ = await reaper.ready(reaper.intent(duration=timedelta(hours=1)))
    [report] = await reaper.machines.provider.list_machines()
    await reaper.machines.stop(machine, reason="over")
    rate = reaper.machines.settings.rates.find("medium")
    assert rate is not None
    ready = clock.now() - timedelta(minutes=5)
    seen = replace(report, server_id=ServerId("theirs"), ready_at=ready, workflow_version_id="v7")

    adopted = await reaper.machines.adopt(seen, purpose=Purpose.TAKEN, reason="the user said so")

    assert (adopted.server_type, adopted.duration, adopted.server_id) == ("medium", report.duration, "theirs")
    assert (adopted.usd_per_hour, adopted.rate_source) == (rate.usd_per_hour, f"{rate.plan}, {rate.source}")
    assert (adopted.provider, adopted.account) == (machine.provider, machine.account)
    assert (adopted.purpose, adopted.reason, adopted.owner_id) == (Purpose.TAKEN, "the user said so", reaper.owner.id)
    assert (adopted.state, adopted.requested_at, adopted.since) == (MachineState.READY, ready, clock.now())
    assert (adopted.workflow_version_id, adopted.kept_until) == ("v7", report.stopping_at)
    assert await reaper.store.machine(adopted.id) == adopted
    assert reaper.books.held[adopted.id] == adopted

    unknown = replace(
        seen, server_id=ServerId("odd"), server_type="", duration=None, ready_at=None, phase=Phase.STARTING
    )
    odd = await reaper.machines.adopt(unknown, purpose=Purpose.TAKEN, reason="the user said so")
    assert (odd.server_type, odd.duration, odd.usd_per_hour) == ("unknown", timedelta(0), Decimal(0))
    assert (odd.rate_source, odd.state) == ("no price known for this type", MachineState.BOOTING)
    assert odd.requested_at == clock.now()
    with pytest.raises(MachineNotFound, match="cannot be used"):
        await reaper.machines.adopt(replace(seen, addressable=False), purpose=Purpose.TAKEN, reason="")


# -- lists that cannot be trusted --------------------------------------------------------------------------


@pytest.mark.fault(10)
@pytest.mark.parametrize("failing", [0, 1])
async def test_a_list_that_fails_decides_nothing(
    cloud: RunComfyEmulator, programs: Programs, reaper: Program, failing: int
) -> None:
    await killed_while(programs, "ready")
    cloud.next_call("GET servers", status=500, times=20, skip=failing)
    with pytest.raises(ProviderError):
        await reaper.reaper.reap()
    assert not [call for call in cloud.calls if call.method == "DELETE"]
    cloud.behave()
    await reaper.reaper.reap()


@pytest.mark.fault(10)
async def test_a_second_page_that_repeats_the_first_decides_nothing(
    cloud: RunComfyEmulator, programs: Programs, reaper: Program
) -> None:
    await killed_while(programs, "ready")
    cloud.foreign("large")
    cloud.page_size = 1

    def first_again(page: dict[str, Any]) -> dict[str, Any]:
        first = next(iter(cloud.machines.values()))
        return {**page, "servers": [first.view(cloud.now())], "next": None}

    cloud.next_call("GET servers?page=2", change=first_again, times=20)
    with pytest.raises(ProviderError):
        await reaper.reaper.reap()
    assert not [call for call in cloud.calls if call.method == "DELETE"]
    cloud.behave()
    await reaper.reaper.reap()


async def test_a_machine_that_cannot_be_ended_does_not_keep_the_others_from_their_end(
    cloud: RunComfyEmulator, programs: Programs, reaper: Program
) -> None:
    await killed_while(programs, "ready")
    await killed_while(programs, "ready")
    stubborn, other = cloud.launched
    cloud.next_call(f"DELETE servers/{stubborn}", status=403, body={"message": "no"}, times=None)
    done = await reaper.reaper.reap()
    assert [m.server_id for m in done.ended] == [other]
    assert [m.server_id for m, _ in done.failed] == [stubborn]
    assert done.failed[0][1].code == "machine-stop-unconfirmed"
    cloud.behave()
    reaper.die()
    async with programs.start() as later:
        assert [m.server_id for m in (await later.reaper.reap()).ended] == [stubborn]


async def test_a_reap_that_is_broken_off_ends_what_it_began_to_end(
    cloud: RunComfyEmulator, programs: Programs, reaper: Program
) -> None:
    await killed_while(programs, "ready")
    reap = asyncio.create_task(reaper.reaper.reap())
    await asyncio.sleep(1.5)  # between the two lists it waits for a second
    assert any(call.method == "DELETE" for call in cloud.calls)
    assert cloud.alive
    reap.cancel()
    with suppress(asyncio.CancelledError):
        await reap
    assert cloud.alive == []
    assert await reaper.books.rows() == []


async def test_two_reapers_at_once_end_everything_once(
    cloud: RunComfyEmulator, programs: Programs, reaper: Program
) -> None:
    await killed_while(programs, "ready")
    await killed_while(programs, "ready")
    async with programs.start() as other:
        one, two = await asyncio.gather(reaper.reaper.reap(), other.reaper.reap())
    assert sorted(str(m.server_id) for m in one.ended + two.ended) == sorted(cloud.launched)
    assert (one.failed, two.failed) == ([], [])
    assert await discrepancies(cloud, reaper) == []


# -- the rule itself ---------------------------------------------------------------------------------------


@given(
    state=st.sampled_from(sorted(MachineState)),
    owner_lives=st.booleans(),
    uses=st.booleans(),
    time_left=st.booleans(),
)
def test_nothing_with_a_living_owner_or_job_is_ever_to_be_ended(
    state: MachineState, owner_lives: bool, uses: bool, time_left: bool
) -> None:
    machine = replace(a_machine(), state=state, kept_until=START if time_left else None)
    use = Use(machine.id, machine.owner_id, "job", START) if uses and machine.owner_id else None
    verdict = judge(machine, owner_lives=owner_lives, owner_pid=1, living_use=use, dev_time_left=time_left)
    if owner_lives or use is not None:
        assert not verdict.end
    elif not time_left or state is MachineState.STOPPING:
        assert verdict.end
    assert verdict.why


def test_what_becomes_of_a_machine_is_said_with_who_keeps_it() -> None:
    machine = replace(a_machine(), state=MachineState.READY)
    use = Use(machine.id, OwnerId("other"), "job-7", START)
    nobody: dict[str, Any] = {"owner_lives": False, "owner_pid": None, "living_use": None, "dev_time_left": False}

    def verdict(machine: Machine = machine, **changes: Any) -> tuple[bool, str]:
        found = judge(machine, **{**nobody, **changes})
        assert found.machine is machine
        return found.end, found.why

    kept = replace(machine, kept_until=START)
    assert verdict() == (True, "the process that rented it is gone")
    assert verdict(owner_lives=True, owner_pid=42, living_use=use) == (False, "process 42 holds it")
    assert verdict(living_use=use, spared="x") == (False, "job job-7 runs on it")
    stopping = replace(kept, state=MachineState.STOPPING)
    assert verdict(stopping, dev_time_left=True) == (True, "its stop was asked for and never seen through")
    until = f"kept until {START:%Y-%m-%d %H:%M:%S} UTC"
    assert verdict(kept, dev_time_left=True, spared="x") == (False, until)
    assert verdict(replace(kept, state=MachineState.REQUESTED), dev_time_left=True)[0]
    assert verdict(kept, spared="x") == (True, "it outlived the time it was to be kept")
    assert verdict(spared="a prompt") == (False, "a prompt")


def test_a_lease_ends_with_what_was_confirmed_or_with_what_the_provider_has_planned() -> None:
    machine = replace(a_machine(), ready_at=START, duration=timedelta(minutes=10), planned_stop_at=None)
    assert lease_ends(machine) == START + timedelta(minutes=10)
    assert lease_ends(replace(machine, planned_stop_at=START + timedelta(minutes=12))) == START + timedelta(minutes=12)
    assert lease_ends(replace(machine, planned_stop_at=START + timedelta(minutes=8))) == START + timedelta(minutes=10)
    assert lease_ends(replace(machine, ready_at=None)) is None


def test_machines_of_a_queue_are_told_by_their_purpose_or_their_reason() -> None:
    machine = replace(a_machine(), purpose=Purpose.RUN, reason="job 1")
    assert not is_queues(machine)
    assert is_queues(replace(machine, purpose=Purpose.POOL))
    assert is_queues(replace(machine, reason=f"{EXECUTORS}jobs"))


async def test_who_holds_a_machine_is_named_by_its_process(programs: Programs, reaper: Program) -> None:
    async with programs.start() as living:
        machine, _ = await living.ready()
        [kept] = (await reaper.reaper.reap()).kept
        assert kept.why == f"process {living.owner.pid} holds it"
        await living.machines.stop(machine, reason="the test is over")
