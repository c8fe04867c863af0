"""Faults of the catalogue on the path of the pool: those that `test_pool_faults` has no story of.

Each story keeps a pool as the service does (taking over, reconciling, watching, paying), lets the cloud or the computer
misbehave, and ends with nothing running and our ledger equal to the cloud's own bill to the second.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final

import pytest

from runcomfy.application.machine_pool import MachinePool
from runcomfy.domain.exceptions import StopUnconfirmed
from runcomfy.domain.machine import MachineState, Purpose
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.pool_keepers import LIFE_OF_A_CALL, dies, kept
from runcomfy.testing.programs import Programs
from runcomfy.testing.rented_pools import RunningPool, until

pytestmark = pytest.mark.cloud(boot_time=30)


async def launches(pool: RunningPool) -> None:
    await pool.usable()


# -- killed around a launch --------------------------------------------------------------------------------


@pytest.mark.fault(1)
async def test_killed_before_the_launch_left_nothing_was_started_and_the_intent_is_closed(
    cloud: RunComfyEmulator, keepers: Programs
) -> None:
    """I1, I20."""
    await dies(keepers, "before provider.launch_machine", launches)
    async with kept(cloud, keepers) as pool:
        [intent] = await pool.program.books.rows()
        assert (intent.state, intent.purpose) == (MachineState.REQUESTED, Purpose.POOL)
        window = keepers.settings.cloud.visibility_window + keepers.settings.pool.reconcile_every
        await asyncio.sleep(window.total_seconds() + 60)
        assert await pool.program.books.rows() == []
        assert cloud.launched == []
        await pool.usable()
        assert len(cloud.launched) == 1


@pytest.mark.fault(2)
@pytest.mark.fault(3)
@pytest.mark.parametrize("when", ["during", "after"])
async def test_killed_before_the_launch_was_written_down_its_machine_is_found_and_ended(
    cloud: RunComfyEmulator, keepers: Programs, when: str
) -> None:
    """I3, I20: one machine, in our books as soon as it can bill, ended since nothing runs there."""
    cloud.next_call("POST servers", delay=LIFE_OF_A_CALL)
    await dies(keepers, f"{when} provider.launch_machine", launches)
    [left] = cloud.alive
    async with kept(cloud, keepers) as pool:
        await until(lambda: not cloud.alive, within=400, what="its end")
        [row] = [row for row in await pool.program.books.rows(open_only=False) if row.server_id == left]
        assert "never answered" in row.stop_reason
        limit = keepers.settings.pool.reconcile_every.total_seconds() + 30
        assert cloud.books[left].seconds <= limit
        assert cloud.launched == [left]


# -- launches that are not answered as they should be ------------------------------------------------------


LOST: Final[Mapping[str, Mapping[str, Any]]] = {
    "4 not answered": {"reply": "never"},
    "4 hung up": {"reply": "lost"},
    "5 says 500": {"status": 500, "works": True},
    "5 says 502": {"status": 502, "works": True, "body": "<html>Bad Gateway</html>"},
    "6 nothing": {"reply": "empty"},
    "6 half": {"reply": "truncated"},
    "6 a page": {"reply": "html"},
}


@pytest.mark.fault(4)
@pytest.mark.fault(5)
@pytest.mark.fault(6)
@pytest.mark.parametrize("fault", LOST.values(), ids=LOST.keys())
async def test_a_launch_that_worked_and_was_not_answered_so_is_the_pools_machine_and_the_only_one(
    cloud: RunComfyEmulator, keepers: Programs, fault: Mapping[str, Any]
) -> None:
    """I3: looked for before anything is repeated, while another machine of the pool is at work."""
    async with kept(cloud, keepers) as pool:
        busy = await pool.usable()
        lease = pool.lease(busy)
        cloud.next_call("POST servers", **fault)
        second = await pool.usable()
        assert second.machine.server_id == cloud.launched[1]
        await pool.run(second, 20)
        assert len(cloud.launched) == 2
        assert not lease.void
        pool.done(lease)


@pytest.mark.fault(7)
async def test_two_launches_answered_with_one_id_are_two_machines_of_the_pool(
    cloud: RunComfyEmulator, keepers: Programs
) -> None:
    """I2: each has a row of its own, each works, both are ended."""
    async with kept(cloud, keepers) as pool:
        first = await pool.usable()
        cloud.next_machine(answers_as=cloud.launched[0])
        second = await pool.usable()
        assert [first.machine.server_id, second.machine.server_id] == cloud.launched
        await pool.run(second, 20)


# -- other people's machines -------------------------------------------------------------------------------


@pytest.mark.fault(12)
async def test_machines_of_other_people_are_reported_once_and_never_touched(
    cloud: RunComfyEmulator, keepers: Programs
) -> None:
    """I7: also one of our type that appears while a launch of ours is not answered, and while ours are ended."""
    strangers = [cloud.foreign("medium", duration=7_200), cloud.foreign("large", duration=7_200)]
    async with kept(cloud, keepers) as pool:
        await pool.usable()
        cloud.next_call("POST servers", reply="lost")
        strangers.append(cloud.foreign("large", duration=7_200))
        await pool.usable()
        await asyncio.sleep(200)
        said = pool.program.said
        for stranger in strangers:
            assert sum("is not ours and left alone" in s and stranger.server_id in s for s in said) == 1
        assert len(pool.machines) == 2
    ids = {stranger.server_id for stranger in strangers}
    touched = [call for call in cloud.calls if call.method != "GET" and any(name in call.path for name in ids)]
    assert touched == []
    assert all(stranger.bills for stranger in strangers)


# -- stops that misbehave ----------------------------------------------------------------------------------


def stops(cloud: RunComfyEmulator) -> int:
    return sum(call.method == "DELETE" for call in cloud.calls)


@pytest.mark.fault(18)
async def test_a_stop_that_says_500_and_worked_is_seen_in_the_list_without_an_alarm(
    cloud: RunComfyEmulator, keepers: Programs
) -> None:
    """I4: the yes was not heard, so that its end is reckoned from what was seen last."""
    async with kept(cloud, keepers, within=5) as pool:
        machine = await pool.usable()
        cloud.next_call("DELETE servers/*", status=500, works=True, times=None)
        pool.pool.drain(machine.id, why="no job waits any more")
        await pool.empty(within=60)
        cloud.behave()
        assert not [sentence for sentence in pool.program.said if "still bill" in sentence]


@pytest.mark.fault(19)
async def test_a_stop_that_says_yes_and_does_nothing_is_sent_again_until_the_machine_is_gone(
    cloud: RunComfyEmulator, keepers: Programs
) -> None:
    """I4: with an alarm after five minutes; what it billed meanwhile is in our ledger; its place is not given away."""
    cloud.next_machine(ignores_delete=True, ignores_stop_time=True)
    async with kept(cloud, keepers) as pool:
        machine = await pool.usable()
        pool.pool.drain(machine.id, why="no job waits any more")
        await asyncio.sleep(400)
        assert cloud.billing == cloud.launched
        assert stops(cloud) >= 5
        assert pool.pool.room("medium") == 3
        assert [sentence for sentence in pool.program.said if cloud.launched[0] in sentence]
        cloud.machines[cloud.launched[0]].traits.ignores_delete = False
        await pool.empty(within=200)
        assert cloud.books[cloud.launched[0]].seconds > 390


@pytest.mark.fault(20)
async def test_a_stop_that_says_404_of_a_machine_that_is_listed_is_not_believed(
    cloud: RunComfyEmulator, keepers: Programs
) -> None:
    """I4."""
    async with kept(cloud, keepers) as pool:
        machine = await pool.usable()
        cloud.next_call("DELETE servers/*", status=404, works=False, times=None, lasts=90)
        pool.pool.drain(machine.id, why="no job waits any more")
        await asyncio.sleep(80)
        assert cloud.billing == cloud.launched
        [row] = await pool.program.books.rows()
        assert row.is_open
        await pool.empty(within=200)
        assert stops(cloud) >= 3


@pytest.mark.fault(21)
@pytest.mark.parametrize("obeys", [True, False], ids=["lease obeyed", "lease ignored"])
async def test_stops_that_fail_for_an_hour_are_repeated_and_no_lease_is_renewed_meanwhile(
    cloud: RunComfyEmulator, keepers: Programs, obeys: bool
) -> None:
    """I4, I5: it ends with its lease, or when the stop works again; nobody gives up before."""
    cloud.next_machine(ignores_stop_time=not obeys)
    async with kept(cloud, keepers) as pool:
        machine = await pool.usable()
        cloud.next_call("DELETE servers/*", status=500, times=None)
        pool.pool.drain(machine.id, why="no job waits any more")
        await asyncio.sleep(900 if obeys else 3_600)
        assert not [call for call in cloud.calls if call.path.endswith("update-estimated-duration")]
        if obeys:
            assert cloud.books[cloud.launched[0]].seconds == keepers.settings.cloud.run_lease.total_seconds()
            assert list(pool.machines) == []
        else:
            assert cloud.billing == cloud.launched
            before = stops(cloud)
            await asyncio.sleep(400)
            assert stops(cloud) > before
        cloud.behave()
        await pool.empty(within=1_800)


@pytest.mark.fault(21)
async def test_a_pool_that_ends_while_no_stop_is_allowed_says_what_may_bill_and_the_next_ends_it(
    cloud: RunComfyEmulator, keepers: Programs
) -> None:
    """I4: the wish to stop is durable."""
    cloud.next_machine(ignores_stop_time=True)
    async with keepers.start() as program:
        pool = RunningPool(program, MachinePool(program.machines, program.placer.comfyui))
        await pool.usable()
        cloud.revoke(1)
        with pytest.raises(StopUnconfirmed):
            await pool.close()
    assert cloud.billing == cloud.launched
    keepers.processes.dead.add(pool.program.owner.id)
    cloud.behave()
    async with kept(cloud, keepers):
        await until(lambda: not cloud.alive, within=120, what="its end")
