"""A pool whose account is refused, sold out, out of money or out of reach; after each story its bill is our ledger."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest

from runcomfy.application.machine_pool import MachinePool
from runcomfy.domain.exceptions import (
    BudgetExceeded,
    NoCapacity,
    OutOfCredit,
    ProviderBusy,
    ServerUnreachable,
    StopUnconfirmed,
)
from runcomfy.domain.machine import MachineState
from runcomfy.domain.secret import Secret
from runcomfy.domain.settings import CloudSettings
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.programs import Programs
from runcomfy.testing.rented_pools import RunningPool, told, until


@pytest.fixture
def programs(keepers: Programs) -> Programs:
    return keepers


@pytest.mark.fault(26)
async def test_a_token_that_is_revoked_mid_run_stops_launches_and_no_job(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    async with told(cloud, programs) as pool:
        machine = await pool.usable()
        lease = pool.lease(machine)
        cloud.revoke(1)
        await asyncio.sleep(30)
        assert not lease.void
        assert pool.pool.room("medium") == 0
        assert "token" in pool.pool.why_no_room("medium")
        with pytest.raises(NoCapacity, match="token"):
            await pool.launch()
        pool.done(lease)  # its results are kept
        await asyncio.sleep(700)
        assert cloud.billing == []  # by its lease
        assert cloud.books[cloud.launched[0]].seconds == 600
        cloud.behave()  # the user has put in the new one
        await pool.empty(within=120)
        assert pool.pool.room("medium") == 4


@pytest.mark.fault(26)
async def test_the_second_token_goes_on_where_the_first_is_refused(
    cloud: RunComfyEmulator, cloud_settings: CloudSettings, programs: Programs
) -> None:
    cloud.second_token = "emulated-token-2"
    settings = replace(programs.settings.cloud, tokens=(*programs.settings.cloud.tokens, Secret(cloud.second_token)))
    programs.settings = replace(programs.settings, cloud=settings)
    async with told(cloud, programs) as pool:
        machine = await pool.usable()
        cloud.revoke(1)
        await asyncio.sleep(900)
        assert machine.takes_jobs
        assert pool.pool.room("medium") == 3


@pytest.mark.fault(26)
async def test_a_pool_that_may_not_end_its_machines_says_so_and_they_end_by_their_lease(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    async with programs.start() as program:
        pool = RunningPool(program, MachinePool(program.machines, program.placer.comfyui))
        await pool.usable()
        cloud.revoke(1)
        with pytest.raises(StopUnconfirmed, match="could not be stopped"):
            await pool.close()
        assert len(cloud.billing) == 1
        await asyncio.sleep(600)
        assert cloud.billing == []
        assert cloud.books[cloud.launched[0]].seconds == 600


@pytest.mark.fault(27)
async def test_a_type_that_is_sold_out_rests_and_another_one_may_be_launched(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    async with told(cloud, programs) as pool:
        cloud.next_call("POST servers", status=409, body={"message": "InsufficientInstanceCapacity"})
        with pytest.raises(NoCapacity):
            await pool.launch()
        assert list(pool.machines) == []
        assert pool.pool.room("medium") == 0
        assert "possible again in" in pool.pool.why_no_room("medium")
        assert pool.pool.room("large") == 4
        await pool.usable("large")
        assert pool.pool.room("medium") == 1  # stock comes back sooner than a defect is mended
        await pool.usable("medium")
        assert pool.pool.room("medium") == 2


@pytest.mark.fault(27)
async def test_an_account_without_money_launches_nothing_of_any_type_until_it_has_some(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    async with told(cloud, programs) as pool:
        machine = await pool.usable()
        lease = pool.lease(machine)
        cloud.balance_usd = Decimal(0)
        with pytest.raises(OutOfCredit):
            await pool.launch()
        assert pool.pool.room("large") == pool.pool.room("medium") == 0
        assert "nothing is launched" in pool.pool.why_no_room("large")
        calls = len([call for call in cloud.calls if call.method == "POST" and call.path == "servers"])
        with pytest.raises(NoCapacity):
            await pool.launch("large")
        assert len([call for call in cloud.calls if call.method == "POST" and call.path == "servers"]) == calls
        cloud.balance_usd = Decimal(25)
        await asyncio.sleep(600)
        assert pool.pool.room("large") == 1
        await pool.usable("large")
        assert not lease.void
        pool.done(lease)


@pytest.mark.fault(25)
async def test_a_cloud_that_says_too_many_requests_is_left_alone_for_a_while(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    async with told(cloud, programs) as pool:
        machine = await pool.usable()
        lease = pool.lease(machine)
        cloud.next_call("*", status=429, headers={"Retry-After": "20"}, times=None, lasts=150)
        await asyncio.sleep(900)
        assert not lease.void
        assert machine.takes_jobs
        pool.done(lease)


@pytest.mark.fault(28)
@pytest.mark.fault(27)
async def test_a_price_above_the_cap_is_refused_and_a_cheaper_type_is_launched(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    cloud_settings = replace(programs.settings.cloud, max_usd_per_hour=Decimal("1.00"))
    programs.settings = replace(programs.settings, cloud=cloud_settings)
    async with told(cloud, programs) as pool:
        with pytest.raises(BudgetExceeded, match=r"\$1.75 per hour, more than the limit of \$1.00"):
            await pool.launch("large")
        assert cloud.launched == []
        await pool.usable("medium")


@pytest.mark.fault(29)
async def test_a_cloud_that_is_down_for_two_hours_costs_no_more_than_what_was_paid_ahead(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    programs.settings = replace(programs.settings, cloud=replace(programs.settings.cloud, max_retries=1))
    async with told(cloud, programs) as pool:
        machine = await pool.usable()
        lease = pool.lease(machine)
        await asyncio.sleep(250)
        cloud.next_call("*", status=503, times=None, lasts=7200)
        await asyncio.sleep(60)
        assert not lease.void
        pool.done(lease)  # what runs there finishes
        with pytest.raises(ProviderBusy):
            await pool.launch()
        assert pool.pool.room("large") == 0
        await asyncio.sleep(1200)
        assert cloud.billing == []
        assert cloud.books[cloud.launched[0]].seconds == 600
        assert machine.machine.state is not MachineState.STOPPED  # nobody has told us
        await asyncio.sleep(6500)
        await pool.empty(within=600)
        said = [sentence for sentence in pool.program.said if "cannot be looked at now" in sentence]
        assert len(said) == 1  # and not with every try


@pytest.mark.fault(29)
async def test_a_network_of_our_own_that_is_down_is_not_held_against_the_machines(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    async with told(cloud, programs) as pool:
        machine = await pool.usable()
        lease = pool.lease(machine)
        emulated = cloud.machines[cloud.launched[0]]
        assert emulated.comfyui is not None
        server: Any = emulated.comfyui
        await server.kill()
        cloud.next_call("*", status=503, times=None, lasts=150)
        await asyncio.sleep(20)
        pool.failed(lease, ServerUnreachable("no answer for two minutes"))
        await asyncio.sleep(60)
        assert machine.suspect
        assert not machine.draining
        await server.start(port=server.port)
        await until(lambda: machine.takes_jobs, within=300, what="it to be trusted again")
        assert len(cloud.launched) == 1
