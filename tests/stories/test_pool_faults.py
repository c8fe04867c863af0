"""A pool of machines on a cloud that misbehaves; after each story its own bill is compared with our ledger."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest

from runcomfy.domain.exceptions import DiskFull, MachineLost, NoCapacity
from runcomfy.domain.machine import MachineId, MachineState
from runcomfy.domain.plan_view import Stage
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.programs import Programs
from runcomfy.testing.rented_pools import RunningPool, gaps, running_pool, story, told, until

NOTICED_WITHIN = 15
"""Seconds: one round of the status loop, and what it takes to ask twice at one request a second."""


@pytest.fixture
def programs(keepers: Programs) -> Programs:
    return keepers


async def words(pool: RunningPool, machine_id: MachineId) -> str:
    return "\n".join(await story(pool.program, machine_id))


# -- launches and lists ------------------------------------------------------------------------------------


@pytest.mark.fault(8)
async def test_a_launch_that_is_answered_with_an_id_that_never_shows_is_found_in_the_list(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    cloud.next_machine(answers_as="00000000-0000-4000-8000-000000000000")
    async with told(cloud, programs) as pool:
        machine = await pool.usable(within=400)
        assert machine.machine.server_id == cloud.launched[0]
        await pool.run(machine, 10)
        assert len(cloud.launched) == 1


@pytest.mark.fault(8)
async def test_a_launch_that_is_answered_and_started_nothing_is_given_up_and_counted_once(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    cloud.next_call("POST servers", works=False)
    async with told(cloud, programs) as pool:
        machine = await pool.launch()
        assert pool.pool.room("medium") == 3
        await pool.empty(within=400)
        await asyncio.sleep(15)
        assert pool.pool.room("medium") == 4
        assert cloud.launched == []
        assert "gone" in await words(pool, machine.id)


@pytest.mark.fault(9)
@pytest.mark.cloud(boot_time=70)
@pytest.mark.parametrize("traits", [{"unlisted_for": 115}, {"unlisted_for": 115, "hidden_for": 115}])
async def test_a_machine_that_is_listed_late_is_waited_for_and_billed_since_it_was_ready(
    cloud: RunComfyEmulator, programs: Programs, traits: dict[str, Any]
) -> None:
    cloud.next_machine(**traits)
    async with told(cloud, programs) as pool:
        machine = await pool.usable()
        assert machine.machine.server_id == cloud.launched[0]
        assert machine.machine.ready_at == cloud.machines[cloud.launched[0]].ready_at


@pytest.mark.fault(10)
@pytest.mark.parametrize(
    "fault",
    [{"status": 500}, {"change": lambda page: {**page, "servers": page["servers"][:0]}}, {"body": []}],
    ids=["fails", "empty", "bare"],
)
async def test_a_list_of_which_a_page_is_missing_decides_nothing(
    cloud: RunComfyEmulator, programs: Programs, fault: dict[str, Any]
) -> None:
    cloud.page_size = 1
    async with told(cloud, programs) as pool:
        first, second = await pool.usable(), await pool.usable()
        lease, other = pool.lease(first), pool.lease(second)
        cloud.next_call("GET servers?page=2", times=None, lasts=120, **fault)
        await asyncio.sleep(200)
        assert not lease.void
        assert not other.void
        assert [machine.takes_jobs for machine in pool.machines] == [True, True]
        pool.done(lease)
        pool.done(other)


@pytest.mark.fault(11)
@pytest.mark.parametrize("lists", [1, 2, 6])
async def test_an_empty_list_by_mistake_ends_nothing_and_voids_no_job(
    cloud: RunComfyEmulator, programs: Programs, lists: int
) -> None:
    async with told(cloud, programs) as pool:
        machines = [await pool.usable() for _ in range(3)]
        leases = [pool.lease(machine) for machine in machines]
        cloud.next_call("GET servers", body=[], times=lists)
        await asyncio.sleep(120)
        assert [lease.void for lease in leases] == [False] * 3
        assert [machine.takes_jobs for machine in machines] == [True] * 3
        assert len(cloud.billing) == 3
        for lease in leases:
            pool.done(lease)


@pytest.mark.fault(13)
async def test_a_word_nobody_knows_means_alive_and_billed_and_its_jobs_go_on(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    async with told(cloud, programs) as pool:
        machine = await pool.usable()
        lease = pool.lease(machine)
        cloud.machines[cloud.launched[0]].traits.status = "Humming"
        await asyncio.sleep(1300)
        assert not lease.void
        assert machine.takes_jobs
        assert cloud.billing == cloud.launched
        cloud.machines[cloud.launched[0]].traits.status = None
        pool.done(lease)


@pytest.mark.fault(13)
async def test_a_machine_that_never_says_a_word_that_is_known_is_replaced_and_what_it_billed_is_booked(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    cloud.next_machine(status="Humming")
    async with told(cloud, programs) as pool:
        machine = await pool.launch()
        await pool.empty(within=3000)
        assert 300 <= cloud.books[cloud.launched[0]].seconds <= 330
        assert "it bills, though RunComfy says 'Humming'" in await words(pool, machine.id)


@pytest.mark.fault(13)
async def test_a_ready_machine_that_shows_no_times_is_never_thought_to_be_paid_longer_than_at_its_launch(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    cloud.next_machine(fields={"service_ready_at": None, "estimated_stopping_at": 17, "estimated_duration": "ten"})
    async with programs.start() as program, running_pool(program) as pool:
        machine = await pool.usable()
        lease = pool.lease(machine)
        await asyncio.sleep(900)
        assert not lease.void  # RunComfy did prolong it, and does not say so
        assert not machine.takes_jobs
        pool.done(lease)
        await pool.empty(within=200)
        assert cloud.alive == []
        assert all(-6 <= gap <= 0 for gap in (await gaps(cloud, program)).values())  # ready is when we saw it


# -- starts that fail --------------------------------------------------------------------------------------


@pytest.mark.fault(14)
async def test_a_machine_that_starts_for_ever_is_ended_at_the_boot_limit_and_its_type_rests_after_three(
    cloud: RunComfyEmulator, programs: Programs, looptime: float
) -> None:
    for _ in range(3):
        cloud.next_machine(stuck=True)
    async with told(cloud, programs) as pool:
        machines = [await pool.launch() for _ in range(3)]
        await asyncio.sleep(1700)
        assert len(cloud.alive) == 3
        healthy = await pool.usable("large")  # a start that fails never holds up the others
        await until(lambda: len(cloud.alive) == 1, within=300, what="the stuck ones to be ended")
        assert pool.pool.room("medium") == 0
        assert "was not Ready after" in pool.pool.why_no_room("medium")
        with pytest.raises(NoCapacity, match="was not Ready after"):
            await pool.launch()
        assert pool.pool.room("large") > 0
        assert "ill: it was not Ready after 18" in await words(pool, machines[0].id)
        await pool.run(healthy, 30)
        await asyncio.sleep(600)
        assert pool.pool.room("medium") == 1  # one finds out whether it works again
        again = await pool.launch()
        assert pool.pool.room("medium") == 0
        await until(lambda: again.takes_jobs, within=300, what="the trial")
        assert pool.pool.room("medium") == 2


@pytest.mark.fault(15)
@pytest.mark.parametrize("manner", ["refused", "502", "html"])
async def test_a_ready_machine_whose_comfyui_never_answers_gets_no_job_and_is_replaced(
    cloud: RunComfyEmulator, programs: Programs, manner: str
) -> None:
    cloud.next_machine(comfyui=manner)
    async with told(cloud, programs) as pool:
        machine = await pool.launch()
        await until(lambda: bool(cloud.billing), within=200, what="Ready")
        await asyncio.sleep(100)
        assert (machine.stage, machine.takes_jobs) == (Stage.BOOTING, False)
        with pytest.raises(MachineLost):
            pool.lease(machine)
        await pool.empty(within=400)
        assert 300 <= cloud.books[cloud.launched[0]].seconds <= 315
        assert "ill: the machine is Ready but its ComfyUI is not" in await words(pool, machine.id)
        assert pool.pool.room("medium") == 0  # the next one could do no better
        await asyncio.sleep(15)
        assert pool.pool.room("medium") == 4


@pytest.mark.fault(15)
async def test_machines_whose_comfyui_never_answers_follow_each_other_more_and_more_slowly_and_that_is_said(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    for _ in range(6):
        cloud.next_machine(comfyui="502")
    launched = []
    async with told(cloud, programs) as pool:
        for _ in range(5):
            await until(lambda: pool.pool.room("medium") > 0, within=2000, what="the next launch to be allowed")
            launched.append((await pool.launch()).machine.requested_at)
            await pool.empty(within=700)
        breaks = sorted(each.at for each in await pool.program.store.decisions() if each.action == "breaker")
    pauses = [(after - ended).total_seconds() for after, ended in zip(launched[1:], breaks, strict=False)]
    assert [round(pause) for pause in pauses] == [15, 30, 600, 1200]
    said = [line for line in pool.program.said if "no other medium machine is launched" in line]
    assert [line.rpartition("for ")[2] for line in said] == ["15s", "30s", "10m 0s", "20m 0s", "40m 0s"]


@pytest.mark.fault(15)
async def test_a_comfyui_that_is_late_is_waited_for(cloud: RunComfyEmulator, programs: Programs) -> None:
    cloud.next_machine(comfyui="html", comfyui_for=90)
    async with told(cloud, programs) as pool:
        machine = await pool.usable()
        assert 90 <= cloud.books[cloud.launched[0]].seconds <= 96
        await pool.run(machine, 5)
        assert "usable: ComfyUI" in await words(pool, machine.id)


@pytest.mark.fault(16)
async def test_a_machine_that_flaps_loses_its_leases_each_time_and_is_replaced_when_it_does_so_too_often(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    cloud.next_machine(flaps=45)
    async with told(cloud, programs) as pool:
        machine = await pool.usable()
        first = pool.lease(machine)
        epoch = machine.epoch
        await until(lambda: first.void, within=45 + NOTICED_WITHIN, what="the flip to be seen")
        assert not machine.takes_jobs
        pool.failed(first, MachineLost("it was not Ready"))
        await until(lambda: machine.takes_jobs, within=45 + NOTICED_WITHIN, what="it to be usable again")
        assert machine.epoch > epoch
        second = pool.lease(machine)
        assert not second.void
        await until(lambda: second.void, within=45 + NOTICED_WITHIN, what="the second flip")
        pool.failed(second, MachineLost("it was not Ready"))
        await pool.empty(within=300)
        told_ = await words(pool, machine.id)
        assert told_.count("silent: not Ready any more (RunComfy says Starting)") == 3
        assert "stopped being Ready 3 times within 300 s" in told_


@pytest.mark.fault(16)
async def test_flips_that_lie_far_apart_are_borne(cloud: RunComfyEmulator, programs: Programs) -> None:
    cloud.next_machine(flaps=170)
    async with told(cloud, programs) as pool:
        machine = await pool.usable()
        await asyncio.sleep(170 * 7)
        assert machine.epoch >= 6
        assert cloud.billing == cloud.launched
        await until(lambda: machine.takes_jobs, within=200, what="it to be usable")


@pytest.mark.fault(17)
@pytest.mark.cloud(boot_time=60)
async def test_a_machine_that_gets_ready_after_its_stop_is_stopped_until_it_is_gone(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    cloud.next_machine(ignores_delete=True)
    async with told(cloud, programs) as pool:
        machine = await pool.launch()
        await asyncio.sleep(30)
        pool.pool.drain(machine.id, why="no job waits any more")
        await asyncio.sleep(400)
        assert cloud.billing == cloud.launched
        assert pool.pool.room("medium") == 3  # it still counts
        cloud.machines[cloud.launched[0]].traits.ignores_delete = False
        await pool.empty(within=200)
        assert cloud.books[cloud.launched[0]].seconds > 300


# -- machines that go away ---------------------------------------------------------------------------------


@pytest.mark.fault(22)
async def test_a_machine_that_vanishes_mid_job_is_noticed_at_once_and_the_others_work_on(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    cloud.next_machine(vanishes_after=400)
    async with programs.start() as program, running_pool(program) as pool:
        doomed, healthy = await pool.usable(), await pool.usable()
        lost, good = pool.lease(doomed), pool.lease(healthy)
        await until(lambda: len(cloud.billing) == 1, within=400, what="it to vanish", every=0.1)
        await until(lambda: lost.void, within=NOTICED_WITHIN, what="that to be noticed")
        assert not good.void
        pool.failed(lost, MachineLost("it went away"))
        await until(lambda: len(pool.machines) == 1, within=10, what="it to be let go")
        pool.done(good)
        assert pool.pool.room("medium") == 3
        await pool.close()
        assert cloud.alive == []
        [gap] = (await gaps(cloud, program)).values()
        assert 0 <= gap <= NOTICED_WITHIN  # nobody tells when it went: billed until it was missed


@pytest.mark.fault(68)
@pytest.mark.fault(22)
async def test_a_machine_that_the_user_deletes_on_the_website_is_let_go_and_not_asked_for_for_ever(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    async with programs.start() as program, running_pool(program) as pool:
        machine = await pool.usable()
        lease = pool.lease(machine)
        await asyncio.sleep(47)
        cloud._end(cloud.machines[cloud.launched[0]])
        await until(lambda: lease.void, within=NOTICED_WITHIN, what="that to be noticed")
        pool.failed(lease, MachineLost("it went away"))
        await pool.empty(within=30)
        calls = len(cloud.calls)
        await asyncio.sleep(300)
        assert len(cloud.calls) == calls
        [gap] = (await gaps(cloud, program)).values()
        assert 0 <= gap <= NOTICED_WITHIN
        assert await program.books.rows() == []
        assert pool.pool.room("medium") == 4


@pytest.mark.fault(68)
async def test_a_machine_that_is_deleted_while_it_starts_is_let_go(cloud: RunComfyEmulator, programs: Programs) -> None:
    async with told(cloud, programs) as pool:
        machine = await pool.launch()
        await asyncio.sleep(30)
        cloud._end(cloud.machines[cloud.launched[0]])
        await pool.empty(within=30)
        assert machine.epoch > 0


# -- paying ahead ------------------------------------------------------------------------------------------


RENEW = "POST servers/*/update-estimated-duration"


@pytest.mark.fault(24)
async def test_renewals_that_are_granted_and_not_answered_are_read_in_the_list(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    async with told(cloud, programs) as pool:
        machine = await pool.usable()
        lease = pool.lease(machine)
        cloud.next_call(RENEW, reply="lost", works=True, times=None)
        await asyncio.sleep(3000)
        assert not lease.void
        assert machine.takes_jobs
        pool.done(lease)


@pytest.mark.fault(24)
async def test_renewals_that_fail_for_a_while_are_tried_again_before_the_lease_is_over(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    async with told(cloud, programs) as pool:
        machine = await pool.usable()
        lease = pool.lease(machine)
        await asyncio.sleep(250)
        cloud.next_call(RENEW, status=500, times=None, lasts=200)
        await asyncio.sleep(900)
        assert not lease.void
        pool.done(lease)


@pytest.mark.fault(24)
@pytest.mark.fault(54)
@pytest.mark.invariant("I9")
async def test_a_longer_time_that_could_not_be_written_down_is_billed_all_the_same(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    """What was asked for is in the books, what was granted is not; then somebody deletes the machine."""
    full = mended = False

    def visit(place: str) -> None:
        nonlocal full
        full = not mended and (full or place == "after provider.change_duration")
        if full and place == "before store.change":
            raise DiskFull("no space left on device")

    async with programs.start(visit=visit) as program, running_pool(program) as pool:
        machine = await pool.usable()
        pool.lease(machine)
        cloud_machine = cloud.machines[cloud.launched[0]]
        first = cloud_machine.stops_at
        assert first is not None
        await until(lambda: program.machines.clock.now() > first, within=700, what="its first time to be over")
        await asyncio.sleep(60)
        row = await program.store.machine(machine.id)
        assert row is not None
        assert row.planned_stop_at == first
        cloud.end_by_hand(cloud_machine)
        await until(lambda: machine.gone, within=NOTICED_WITHIN, what="it to be seen gone")
        mended = True
        await pool.empty(within=30)
        assert all(0 <= gap <= NOTICED_WITHIN for gap in (await gaps(cloud, program)).values())


@pytest.mark.fault(22)
@pytest.mark.fault(54)
@pytest.mark.invariant("I9")
@pytest.mark.parametrize("by", ["adopt", "reap"])
async def test_a_machine_that_was_seen_gone_while_nothing_could_be_written_is_ended_in_the_books_and_not_gone_on_with(
    cloud: RunComfyEmulator, programs: Programs, by: str
) -> None:
    full = False

    def visit(place: str) -> None:
        if full and place in ("before store.record", "before store.change", "before store.close_bill"):
            raise DiskFull("no space left on device")

    async with programs.start(visit=visit) as program, running_pool(program) as pool:
        machine = await pool.usable()
        full = True
        cloud.end_by_hand(cloud.machines[cloud.launched[0]])
        await pool.empty(within=60)
        await asyncio.sleep(300)
        assert (await program.books.rows())[0].state is MachineState.READY
        full = False
        if by == "adopt":
            assert await pool.pool.adopt() == []
        else:
            await program.reaper.reap()
        assert pool.machines == ()
        row = await program.store.machine(machine.id)
        assert row is not None
        assert row.state is MachineState.STOPPED
        assert all(0 <= gap <= NOTICED_WITHIN for gap in (await gaps(cloud, program)).values())


@pytest.mark.fault(24)
async def test_a_yes_that_was_not_done_is_not_believed_and_the_bill_ends_with_what_was_confirmed(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    cloud.next_call(RENEW, works=False, times=None)
    async with told(cloud, programs) as pool:
        machine = await pool.usable()
        lease = pool.lease(machine)
        for _ in range(28):
            await asyncio.sleep(20)
            stops_at, shown = cloud.machines[cloud.launched[0]].stops_at, pool.pool.rows()[0].stops_at
            assert stops_at is not None
            assert shown is not None
            assert shown <= stops_at + timedelta(seconds=1)
        await until(lambda: lease.void, within=60, what="the machine to stop")
        pool.failed(lease, MachineLost("it went away"))
        await pool.empty(within=30)
        assert cloud.books[cloud.launched[0]].seconds == 600


@pytest.mark.fault(23)
@pytest.mark.parametrize("busy", [True, False], ids=["busy", "idle"])
async def test_a_machine_that_outlives_its_time_and_cannot_be_prolonged_is_ended_by_us_not_under_a_job(
    cloud: RunComfyEmulator, programs: Programs, busy: bool
) -> None:
    cloud.next_machine(ignores_stop_time=True)
    cloud.next_call(RENEW, works=False, times=None)
    async with told(cloud, programs) as pool:
        machine = await pool.usable()
        lease = pool.lease(machine) if busy else None
        await until(lambda: not machine.takes_jobs, within=700, what="its time to be over")
        if lease is not None:
            await asyncio.sleep(300)
            assert not lease.void
            pool.done(lease)
        await pool.empty(within=120)
        assert cloud.books[cloud.launched[0]].seconds <= (910 if busy else 605)
