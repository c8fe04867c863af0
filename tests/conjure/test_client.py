"""CONJURE's client of the account, on the emulated cloud: its names and forms, and nothing our books do not know."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from runcomfy.bootstrap import App
from runcomfy.conjure.client import ConjureAPIClient
from runcomfy.domain.exceptions import CredentialsMissing, RunComfyError
from runcomfy.domain.machine import MachineState, Purpose, ServerId
from runcomfy.domain.settings import CloudSettings, Settings
from runcomfy.runcomfy_client import MachineInfo, MachineStatus, RunComfyAPIClient, ServerType, WorkflowInfo
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator

Make = Callable[..., ConjureAPIClient]


async def test_launch_wait_look_and_stop_as_conjure_does(
    client: ConjureAPIClient, cloud: RunComfyEmulator, open_app: Callable[..., App]
) -> None:
    launched = await client.launch_machine(server_type="large", estimated_duration=1800)
    assert (launched.server_type, launched.current_status) == ("large", MachineStatus.STARTING.value)
    assert (launched.estimated_duration, launched.base_url) == (1800, None)

    ready = await client.wait_for_machine_ready(launched.server_id)
    assert ready is not None
    assert (ready.server_id, ready.current_status) == (launched.server_id, "Ready")
    assert ready.main_service_url == ready.base_url
    assert ready.service_ready_at is not None
    assert ready.estimated_stopping_at is not None

    assert await client.get_machine_status(launched.server_id) == ready
    assert await client.list_machines() == [ready]
    async with open_app() as app:  # our books know it as well as any other machine
        machines, _ = await app.cloud()
        row = await machines.books.row_of(ServerId(launched.server_id))
        assert row is not None
        assert (row.purpose, row.state, row.owner_id) == (Purpose.DEV, MachineState.READY, None)
        assert row.kept_until is not None
        assert row.kept_until.isoformat() == ready.estimated_stopping_at

    assert await client.stop_machine(launched.server_id) is True
    assert await client.list_machines() == []
    assert await client.stop_machine(launched.server_id) is True  # it is gone, and stays so
    assert await client.stop_machine("never-heard-of") is False
    assert cloud.billing == []


async def test_a_ready_machine_is_taken_before_another_is_launched(client: ConjureAPIClient) -> None:
    first = await client.get_or_create_ready_machine("generate_flux_mesh")
    second = await client.get_or_create_ready_machine("generate_flux_mesh", "large")
    assert (first.server_id, first.base_url) == (second.server_id, second.base_url)
    assert first.base_url is not None
    assert len(await client.list_machines()) == 1
    await client.stop_machine(first.server_id)


async def test_without_a_version_id_nothing_is_launched(
    settings: Settings, open_app: Callable[..., App], cloud: RunComfyEmulator
) -> None:
    bare = replace(settings, cloud=replace(settings.cloud, workflow_version_id=""))
    client = ConjureAPIClient(office=open_app, settings=bare)
    with pytest.raises(ValueError, match="version id") as caught:
        await client.launch_machine()
    assert isinstance(caught.value, CredentialsMissing)
    with pytest.raises(ValueError, match="version id"):
        await client.get_or_create_ready_machine()
    assert cloud.launched == []
    version = str(cloud.workflows[0]["version_id"])
    launched = await client.launch_machine(ServerType.MEDIUM.value, 600, version)
    assert await client.stop_machine(launched.server_id)


async def test_what_goes_wrong_is_ours_and_a_runtime_error(client: ConjureAPIClient, cloud: RunComfyEmulator) -> None:
    with pytest.raises(RuntimeError) as caught:
        await client.get_machine_status("nobody-knows-it")
    assert isinstance(caught.value, RunComfyError)
    assert caught.value.code == "machine-not-found"
    with pytest.raises(RuntimeError) as caught:
        await client.launch_machine(server_type="quantum", estimated_duration=600)
    assert isinstance(caught.value, RunComfyError)
    assert cloud.billing == []


@pytest.mark.cloud(boot_time=10_000)
async def test_a_machine_that_never_gets_ready_is_none_and_is_ended(
    client: ConjureAPIClient, cloud: RunComfyEmulator
) -> None:
    launched = await client.launch_machine(estimated_duration=600)
    assert await client.wait_for_machine_ready(launched.server_id, timeout=30) is None
    assert [info.server_id for info in await client.list_machines()] == [launched.server_id]
    assert await client.wait_for_machine_ready(launched.server_id) is None
    await asyncio.sleep(60)
    assert await client.list_machines() == []


@pytest.mark.cloud(boot_time=10_000)
async def test_what_callers_write_into_the_attributes_counts_from_the_next_call_on(
    client: ConjureAPIClient, cloud: RunComfyEmulator
) -> None:
    loop = asyncio.get_running_loop()
    token, address = client.api_token, client.base_url
    client.api_token = "00000000-1111-4222-8333-444444444444"
    assert client.headers["Authorization"] == "Bearer 00000000-1111-4222-8333-444444444444"
    assert await client.list_machines() == []
    with pytest.raises(RuntimeError):
        await client.launch_machine()
    client.api_token = ""
    assert not client.is_available()
    client.api_token = token
    client.base_url, client.max_retries = "http://127.0.0.1:9", 0
    with pytest.raises(RuntimeError):
        await client.launch_machine()
    client.base_url = address
    client.default_server_type, client.default_duration = ServerType.LARGE.value, 900
    launched = await client.launch_machine()
    assert (launched.server_type, launched.estimated_duration) == ("large", 900)
    client.machine_timeout, client.poll_interval = 60, 1
    began = loop.time()
    assert await client.wait_for_machine_ready(launched.server_id) is None
    assert 60 <= loop.time() - began < 120
    assert cloud.billing == []
    for unusable in (float("nan"), float("inf"), 1e300, 10**400, 10**9_000, -1, True):
        client.machine_timeout = unusable
        with pytest.raises(RuntimeError, match="machine_timeout"):
            await client.wait_for_machine_ready(launched.server_id)
    assert await client.list_machines() == [], "never raises, and the log says why"


async def test_workflows_have_conjures_form(client: ConjureAPIClient, cloud: RunComfyEmulator) -> None:
    found = await client.get_workflows()
    assert found
    assert all(isinstance(one, WorkflowInfo) for one in found)
    assert found[0].version_id == cloud.workflows[0]["version_id"]


async def test_lists_that_cannot_be_read_are_empty_and_said(
    settings: Settings, open_app: Callable[..., App], caplog: pytest.LogCaptureFixture
) -> None:
    nowhere = replace(settings, cloud=replace(settings.cloud, base_url="http://127.0.0.1:9", max_retries=0))
    client = ConjureAPIClient(office=open_app, settings=nowhere)
    assert await client.list_machines() == []
    assert await client.get_workflows() == []
    assert [record.message for record in caplog.records].count("list_machines_failed") == 1


async def test_a_budget_keeps_conjure_from_launching_too(
    settings: Settings, open_app: Callable[..., App], cloud: RunComfyEmulator
) -> None:
    from decimal import Decimal

    tight = replace(settings, cloud=replace(settings.cloud, max_usd_per_hour=Decimal("0.01")))
    client = ConjureAPIClient(office=open_app, settings=tight)
    with pytest.raises(RuntimeError) as caught:
        await client.launch_machine(estimated_duration=600)
    assert isinstance(caught.value, RunComfyError)
    assert caught.value.code == "budget-exceeded"
    assert cloud.billing == []


def is_one(client: object) -> bool:
    return isinstance(client, RunComfyAPIClient)


def test_without_arguments_it_is_conjures_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RUNCOMFY_CREDENTIALS_FILE", "/dev/null")
    for name, value in {
        "RUNCOMFY_USER_ID": "11111111-2222-4333-8444-555555555555",
        "RUNCOMFY_API_TOKEN": "66666666-7777-4888-8999-000000000000",
        "RUNCOMFY_DEFAULT_SERVER_TYPE": "large",
        "RUNCOMFY_DEFAULT_DURATION": "1200",
        "RUNCOMFY_MACHINE_TIMEOUT": "900",
        "RUNCOMFY_POLL_INTERVAL": "7",
        "RUNCOMFY_MAX_RETRIES": "2",
    }.items():
        monkeypatch.setenv(name, value)
    client = RunComfyAPIClient()
    assert is_one(client)
    assert client.is_available()
    assert client.user_id == "11111111-2222-4333-8444-555555555555"
    assert (
        client.headers["Authorization"] == f"Bearer {client.api_token}" == "Bearer 66666666-7777-4888-8999-000000000000"
    )
    assert (client.default_server_type, client.default_duration) == ("large", 1200)
    assert (client.machine_timeout, client.poll_interval, client.max_retries) == (900, 7, 2)
    assert client.base_url.startswith("https://")
    assert "6666" not in repr(client)
    monkeypatch.delenv("RUNCOMFY_API_TOKEN")
    assert not RunComfyAPIClient().is_available()


async def test_with_settings_it_is_the_accounts_own_client(cloud_settings: CloudSettings, clock: LoopClock) -> None:
    async with RunComfyAPIClient(cloud_settings, clock=clock) as client:
        assert is_one(client)
        assert list(await client.list_machines()) == []


def test_a_machines_address_is_not_in_its_repr() -> None:
    info = MachineInfo("id", "user", "medium", "Ready", 3600, "https://secret-comfyui.example/", None, None)
    assert info.base_url == "https://secret-comfyui.example"
    assert "secret" not in repr(info)
    assert "user'" not in repr(info)
    assert timedelta(seconds=info.estimated_duration) == timedelta(hours=1)


async def test_a_machine_that_everybody_forgets_ends_with_its_time(
    client: ConjureAPIClient, cloud: RunComfyEmulator, open_app: Callable[..., App]
) -> None:
    """Whoever launched it is gone: it is kept for its time and not longer, and `machines reap` knows it."""
    from runcomfy.application.reaper import Reaper

    launched = await client.launch_machine(estimated_duration=7200)
    await client.wait_for_machine_ready(launched.server_id)
    async with open_app() as app:
        machines, _ = await app.cloud()
        spared = await Reaper(machines).reap()
        assert [verdict.machine.server_id for verdict in spared.kept] == [launched.server_id]
        await asyncio.sleep(7300)
        assert cloud.billing == []
        done = await Reaper(machines).reap()
        assert [machine.server_id for machine in (*done.ended, *done.closed)] == [launched.server_id]
        row = await machines.books.row_of(ServerId(launched.server_id))
        assert row is not None
        assert row.state is MachineState.STOPPED
