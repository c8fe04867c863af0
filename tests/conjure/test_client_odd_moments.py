"""CONJURE's client where things are odd: other people's machines, answers that fail, ids that are none."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from runcomfy.bootstrap import App
from runcomfy.conjure.client import ConjureAPIClient
from runcomfy.domain.exceptions import RunComfyError
from runcomfy.domain.machine import Machine, MachineState, ServerId
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator


async def row_of(open_app: Callable[..., App], server_id: str) -> Machine | None:
    async with open_app() as app:
        machines, _ = await app.cloud()
        return await machines.books.row_of(ServerId(server_id))


async def test_a_machine_that_our_books_do_not_have_is_looked_at_without_a_trace_and_can_be_stopped(
    client: ConjureAPIClient, cloud: RunComfyEmulator, open_app: Callable[..., App]
) -> None:
    theirs, other = cloud.foreign("large"), cloud.foreign("large")
    assert (await client.get_machine_status(theirs.server_id)).current_status == "Ready"
    assert await row_of(open_app, theirs.server_id) is None
    assert await client.stop_machine(theirs.server_id) is True
    row = await row_of(open_app, theirs.server_id)
    assert row is not None
    assert row.state is MachineState.STOPPED
    assert (theirs.bills, other.bills) == (False, True)
    await client.stop_machine(other.server_id)


@pytest.mark.parametrize("server_id", ["", "  "])
async def test_an_id_that_is_none_stops_nothing_and_the_log_says_why(
    client: ConjureAPIClient, cloud: RunComfyEmulator, caplog: pytest.LogCaptureFixture, server_id: str
) -> None:
    stranger = cloud.foreign("large")
    assert await client.stop_machine(server_id) is False
    assert stranger.bills
    assert [record.message for record in caplog.records] == ["stop_failed"]
    assert not [call for call in cloud.calls if call.method == "DELETE"]
    await client.stop_machine(stranger.server_id)


async def test_a_look_at_a_machine_that_starts_does_not_call_it_ready(
    client: ConjureAPIClient, open_app: Callable[..., App]
) -> None:
    launched = await client.launch_machine(estimated_duration=600)
    assert (await client.get_machine_status(launched.server_id)).current_status == "Starting"
    row = await row_of(open_app, launched.server_id)
    assert row is not None
    assert (row.state, row.ready_at) == (MachineState.BOOTING, None)
    await client.stop_machine(launched.server_id)


async def test_waiting_goes_on_while_runcomfy_cannot_be_asked(
    client: ConjureAPIClient, cloud: RunComfyEmulator, caplog: pytest.LogCaptureFixture
) -> None:
    launched = await client.launch_machine(estimated_duration=600)
    cloud.next_call("GET servers/*", status=500, times=None, lasts=300, works=False)
    ready = await client.wait_for_machine_ready(launched.server_id)
    assert ready is not None
    assert ready.server_id == launched.server_id
    assert "machine_status_failed" in [record.message for record in caplog.records]
    await client.stop_machine(launched.server_id)


async def test_waiting_ends_where_runcomfy_refuses_to_be_asked(
    client: ConjureAPIClient, cloud: RunComfyEmulator
) -> None:
    launched = await client.launch_machine(estimated_duration=600)
    fault = cloud.next_call("GET servers/*", status=403, body={"message": "no"}, times=None, works=False)
    began = asyncio.get_running_loop().time()
    with pytest.raises(RuntimeError) as caught:
        await client.wait_for_machine_ready(launched.server_id)
    assert isinstance(caught.value, RunComfyError)
    assert asyncio.get_running_loop().time() - began < client.machine_timeout / 2
    cloud.forget_call(fault)
    await client.stop_machine(launched.server_id)
