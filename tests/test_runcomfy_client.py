"""RunComfy's API client against an emulated cloud: launching, pace, settings, and what it says."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from runcomfy.domain.exceptions import (
    AccessDenied,
    AnswerUnreadable,
    CredentialsMalformed,
    CredentialsMissing,
    InsecureUrl,
    LaunchRefused,
    LaunchUnclear,
    NoCapacity,
    OutOfCredit,
    ProviderBusy,
    ProviderError,
    RateLimited,
    RunComfyError,
    SettingInvalid,
)
from runcomfy.domain.machine import MachineReport, ServerId
from runcomfy.domain.secret import Secret
from runcomfy.domain.settings import CloudSettings
from runcomfy.runcomfy_client import RunComfyAPIClient
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator

pytestmark = pytest.mark.cloud(comfyui=False)

TEN_MINUTES = timedelta(minutes=10)
SOME_ID = ServerId("0f6b1c1e-7a53-4c0e-9d51-2f0c3f2b9a10")
CANARY_1, CANARY_2 = "canary-token-5f1c9a", "canary-token-77e0b3"
CANARY_USER = "canary-user-41d2"

Client = RunComfyAPIClient


@pytest.fixture
def client(cloud_client: RunComfyAPIClient) -> RunComfyAPIClient:
    return cloud_client


async def launch(client: Client, server_type: str = "large") -> MachineReport:
    version = client._settings.workflow_version_id
    return await client.launch_machine(server_type=server_type, duration=TEN_MINUTES, workflow_version_id=version)


async def get_ready(client: Client) -> MachineReport:
    server_id = (await launch(client)).server_id
    await asyncio.sleep(200)
    report = await client.get_machine_status(server_id)
    assert report is not None
    assert report.usable
    return report


def posts(cloud: RunComfyEmulator) -> int:
    return sum(call.method == "POST" and call.path == "servers" for call in cloud.calls)


# --- launching ---------------------------------------------------------------------------------------------


async def test_a_launch_asks_for_what_the_reference_names(client: Client, cloud: RunComfyEmulator) -> None:
    report = await launch(client)
    assert cloud.calls[-1].body == {
        "workflow_version_id": cloud.workflows[0]["version_id"],
        "server_type": "large",
        "estimated_duration": 600,
    }
    await client.stop_machine(report.server_id)


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 500, "works": True},
        {"status": 502, "body": "<html>Bad gateway</html>", "works": True},
        {"status": 504, "works": True},
        {"status": 408, "works": True},
        {"status": 302, "headers": {"Location": "/login"}},
        {"status": 204, "body": b""},
        {"body": {"ok": True}},
        {"body": []},
        {"body": "null"},
        {"change": lambda seen: {**seen, "server_id": None}},
        {"delay": 31.0},
    ],
    ids=lambda fault: ", ".join(f"{name}" for name in fault),
)
async def test_a_launch_without_a_clear_answer_is_unclear(
    client: Client, cloud: RunComfyEmulator, fault: dict[str, Any]
) -> None:
    cloud.next_call("POST servers", **fault)
    with pytest.raises(LaunchUnclear) as caught:
        await launch(client)
    assert posts(cloud) == 1
    assert caught.value.details["cause"]
    assert not caught.value.retryable
    await client.stop_machine(ServerId(cloud.launched[0]))


async def test_a_launch_that_never_left_is_not_unclear(
    cloud: RunComfyEmulator, cloud_settings: CloudSettings, clock: LoopClock
) -> None:
    await cloud.stop()  # nobody listens any more
    async with RunComfyAPIClient(cloud_settings, clock=clock) as client:
        with pytest.raises(ProviderBusy):
            await launch(client)
    assert cloud.launched == []


async def test_a_launch_that_was_rate_limited_is_sent_again(client: Client, cloud: RunComfyEmulator) -> None:
    cloud.next_call("POST servers", status=429)
    report = await launch(client)
    assert posts(cloud) == 2
    assert cloud.launched == [report.server_id]
    await client.stop_machine(report.server_id)


@pytest.mark.fault(27)
@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (402, {"message": "nope"}, OutOfCredit),
        (402, "", OutOfCredit),
        (400, {"error": "Insufficient balance"}, OutOfCredit),
        (403, {"message": "You are out of credits"}, OutOfCredit),
        (400, {"error": {"code": 10001, "message": "InsufficientFunds"}}, OutOfCredit),
        (403, {"detail": [{"reason": "quota exceeded"}]}, OutOfCredit),
        (503, {"message": "No capacity for this machine type"}, NoCapacity),
        (409, {"message": "no A100 machines available right now"}, NoCapacity),
        (400, {"error_message": "out of stock"}, NoCapacity),
        (500, {"message": "InsufficientInstanceCapacity"}, NoCapacity),
        (400, {"message": "server_type is not valid"}, LaunchRefused),
        (422, {"detail": "estimated_duration too long"}, LaunchRefused),
        (404, {"message": "unknown version"}, LaunchRefused),
        (403, {"message": "premium plan needed"}, AccessDenied),
    ],
)
async def test_a_refused_launch_says_why_and_starts_nothing(
    client: Client, cloud: RunComfyEmulator, status: int, body: Any, error: type[RunComfyError]
) -> None:
    cloud.next_call("POST servers", status=status, body=body)
    with pytest.raises(ProviderError) as caught:
        await launch(client)
    assert type(caught.value) is error
    assert caught.value.details["status"] == status
    assert cloud.launched == []
    if isinstance(body, dict) and isinstance(body.get("message"), str):
        assert body["message"] in caught.value.message  # the provider's own words
    assert caught.value.hint or error is LaunchRefused


# --- retries, limits, time ---------------------------------------------------------------------------------


@pytest.mark.fault(31)
async def test_a_connection_that_breaks_for_ever_ends_in_one_error(
    client: Client, cloud: RunComfyEmulator, caplog: pytest.LogCaptureFixture
) -> None:
    cloud.next_call("*", reply="reset", times=None)
    with pytest.raises(ProviderBusy) as caught:
        await client.list_machines()
    assert [record.message for record in caplog.records].count("provider_call") == 4  # one and three retries
    assert caught.value.retryable


@pytest.mark.fault(32)
async def test_an_answer_that_drips_ends_at_the_deadline(
    client: Client, cloud: RunComfyEmulator, looptime: float
) -> None:
    cloud.foreign()
    cloud.next_call("GET servers", reply="drip", times=None)
    with pytest.raises(ProviderBusy, match="within 30 s"):
        await client.list_machines()
    assert 4 * 30 <= looptime < 4 * 30 + 1 + 2 + 4 + 1


@pytest.mark.fault(32)
async def test_an_answer_without_an_end_is_cut_off(client: Client, cloud: RunComfyEmulator) -> None:
    cloud.next_call("GET servers", reply="endless", times=None)
    with pytest.raises(AnswerUnreadable, match="does not end"):
        await client.list_machines()


@pytest.mark.fault(25)
@pytest.mark.parametrize(
    ("value", "least", "most"),
    [
        ("7", 7, 8),
        ("2.5", 2.5, 3.5),
        ("Fri, 20 Nov 2026 10:00:09 GMT", 8, 10),
        (None, 5, 6),
        ("-3", 5, 6),
        ("soon", 5, 6),
        ("nan", 5, 6),
        ("inf", 5, 6),
        ("Fri, 20 Nov 2020 10:00:00 GMT", 5, 6),
        ("864000", 60, 61),
        ("Mon, 30 Nov 2026 10:00:00 GMT", 60, 61),
        ("9" * 400, 5, 6),
    ],
)
async def test_retry_after_is_obeyed_within_reason(
    client: Client, cloud: RunComfyEmulator, looptime: float, value: str | None, least: float, most: float
) -> None:
    headers = {"Date": "Fri, 20 Nov 2026 10:00:00 GMT"} | ({} if value is None else {"Retry-After": value})
    cloud.next_call("GET servers", status=429, headers=headers)
    await client.list_machines()
    assert least <= looptime <= most


@pytest.mark.fault(25)
async def test_a_date_is_read_by_the_providers_own_clock(
    client: Client, cloud: RunComfyEmulator, looptime: float
) -> None:
    headers = {"Date": "Fri, 20 Nov 2026 12:00:00 GMT", "Retry-After": "Fri, 20 Nov 2026 12:00:20 GMT"}
    cloud.next_call("GET servers", status=503, headers=headers)
    await client.list_machines()
    assert 20 <= looptime <= 22


@pytest.mark.fault(25)
async def test_endless_429_ends_as_rate_limited(client: Client, cloud: RunComfyEmulator) -> None:
    cloud.next_call("*", status=429, times=None)
    with pytest.raises(RateLimited) as caught:
        await client.list_machines()
    assert caught.value.retryable
    assert len(cloud.calls) == 4


async def test_the_client_keeps_to_the_accounts_rate(client: Client, cloud: RunComfyEmulator, looptime: float) -> None:
    cloud.burst, cloud._tokens_left = 5, 5.0
    for _ in range(20):
        await client.list_machines()
    assert len(cloud.calls) == 20  # never refused
    assert 16 <= looptime <= 18  # a burst of five, two of them reserved, then one a second


async def test_calls_that_stop_machines_pass_the_queue(
    client: Client, cloud: RunComfyEmulator, looptime: float
) -> None:
    waiting = [asyncio.create_task(client.list_machines()) for _ in range(30)]
    await asyncio.sleep(0.1)
    await client.stop_machine(SOME_ID)
    await client.list_machines(urgent=True)
    assert looptime < 1
    await asyncio.gather(*waiting)
    assert looptime > 20


# --- settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["http://api.runcomfy.net", "http://127.0.0.1.evil.example", "http://10.0.0.1"])
@pytest.mark.threat("S18")
def test_a_token_does_not_travel_unencrypted(clock: LoopClock, address: str) -> None:
    with pytest.raises(InsecureUrl):
        RunComfyAPIClient(CloudSettings(base_url=address), clock=clock)


@pytest.mark.parametrize(
    "address", ["", "api.runcomfy.net", "ftp://api.runcomfy.net", "https://", "https://[", "https://u@h"]
)
def test_an_address_that_is_none_is_refused(clock: LoopClock, address: str) -> None:
    with pytest.raises(SettingInvalid):
        RunComfyAPIClient(CloudSettings(base_url=address), clock=clock)


@pytest.mark.parametrize("token", ["two words", "line\nbreak", "t\u00f6ken", "\x7f"])
def test_a_token_that_cannot_be_sent_is_refused(clock: LoopClock, token: str) -> None:
    with pytest.raises(CredentialsMalformed) as caught:
        RunComfyAPIClient(CloudSettings(tokens=(Secret(token),)), clock=clock)
    assert token not in str(caught.value)


@pytest.mark.parametrize("missing", [{"tokens": ()}, {"user_id": ""}])
async def test_without_credentials_nothing_is_sent(
    cloud: RunComfyEmulator, cloud_settings: CloudSettings, clock: LoopClock, missing: dict[str, Any]
) -> None:
    async with RunComfyAPIClient(replace(cloud_settings, **missing), clock=clock) as client:
        with pytest.raises(CredentialsMissing):
            await client.list_machines()
    assert cloud.calls == []


def test_accounts_are_told_apart_without_naming_the_user(clock: LoopClock) -> None:
    one = RunComfyAPIClient(CloudSettings(user_id=CANARY_USER), clock=clock)
    same = RunComfyAPIClient(CloudSettings(user_id=CANARY_USER, base_url="https://api.runcomfy.net/"), clock=clock)
    other = RunComfyAPIClient(CloudSettings(user_id="b"), clock=clock)
    elsewhere = RunComfyAPIClient(
        CloudSettings(user_id=CANARY_USER, base_url="https://beta-api.runcomfy.net"), clock=clock
    )
    assert one.account == same.account
    assert len({one.account, other.account, elsewhere.account}) == 3
    assert CANARY_USER not in one.account


async def test_odd_user_ids_stay_one_part_of_the_path(
    cloud: RunComfyEmulator, cloud_settings: CloudSettings, clock: LoopClock
) -> None:
    cloud.user_id = "a/b?c#d é"
    async with RunComfyAPIClient(replace(cloud_settings, user_id=cloud.user_id), clock=clock) as client:
        assert list(await client.list_machines()) == []


# --- beside the port ---------------------------------------------------------------------------------------


async def test_the_owner_of_a_token_is_told_where_it_is_known(client: Client, cloud: RunComfyEmulator) -> None:
    assert await client.whoami() == cloud.user_id
    faults: list[dict[str, Any]] = [{"status": 401}, {"status": 500}, {"body": {"id": 7}}, {"reply": "html"}]
    for fault in faults:
        cloud.next_call("GET me", **fault)
        assert await client.whoami() is None


async def test_the_host_can_be_examined_without_a_token(client: Client, cloud: RunComfyEmulator) -> None:
    cloud.revoke(1)
    await client.probe_host()  # the token is not looked at
    assert cloud.calls[-1].token is None
    cloud.next_call("*", status=503)
    with pytest.raises(ProviderBusy):
        await client.probe_host()
    await cloud.stop()
    with pytest.raises(ProviderBusy):
        await client.probe_host()


async def test_a_stop_may_be_accepted_without_a_body(client: Client, cloud: RunComfyEmulator) -> None:
    machine = cloud.foreign()
    for status in (202, 204):
        cloud.next_call("DELETE *", status=status, body=b"")
        assert await client.stop_machine(ServerId(machine.server_id)) is True


async def test_a_no_with_status_200_does_not_end_a_bill(client: Client, cloud: RunComfyEmulator) -> None:
    machine = cloud.foreign()
    no = {"error_code": 500001, "error_message": "cannot stop it now"}
    cloud.next_call("DELETE *", works=False, times=None, change=lambda seen: {**seen, **no})
    with pytest.raises(AnswerUnreadable):
        await client.stop_machine(ServerId(machine.server_id))


async def test_a_cancelled_launch_is_in_the_log(
    client: Client, cloud: RunComfyEmulator, caplog: pytest.LogCaptureFixture
) -> None:
    cloud.next_call("POST servers", reply="never")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(launch(client), 5)
    (said,) = [record.fields for record in caplog.records if record.message == "provider_call"]  # type: ignore[attr-defined]
    assert said["error"] == "cancelled"
    await client.stop_machine(ServerId(cloud.launched[0]))


async def test_a_duration_is_rounded_up_to_seconds(client: Client, cloud: RunComfyEmulator) -> None:
    machine = await get_ready(client)
    await client.change_duration(machine.server_id, total=timedelta(seconds=700, microseconds=1))
    assert cloud.calls[-1].body == {"update_estimated_duration": 701}
    await client.stop_machine(machine.server_id)


async def test_a_change_before_ready_is_refused_in_the_providers_words(client: Client, cloud: RunComfyEmulator) -> None:
    server_id = (await launch(client)).server_id
    with pytest.raises(ProviderError, match="Server is not ready"):
        await client.change_duration(server_id, total=TEN_MINUTES)
    await client.stop_machine(server_id)


# --- the log -----------------------------------------------------------------------------------------------


async def test_every_call_is_logged_once_with_its_facts(
    client: Client, cloud: RunComfyEmulator, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="runcomfy.provider")
    cloud.next_call("GET servers/*", status=500)
    cloud.next_call("GET servers/*", reply="truncated")
    assert await client.get_machine_status(SOME_ID) is None
    fields = [record.fields for record in caplog.records if record.message == "provider_call"]  # type: ignore[attr-defined]
    seconds = [field.pop("seconds") for field in fields]
    assert all(isinstance(second, float) for second in seconds)
    same = {"method": "GET", "path": "/prod/api/users/{user_id}/servers/{server_id}", "server_id": SOME_ID}
    assert fields == [
        {**same, "attempt": 1, "status": 500},
        {**same, "attempt": 2, "error": "ClientPayloadError"},
        {**same, "attempt": 3, "status": 404},
    ]


async def test_foreign_text_is_cut_and_cleaned(client: Client, cloud: RunComfyEmulator) -> None:
    cloud.next_call("POST servers", status=400, body={"message": "\x1b[31mred\x07 " + "long " * 1000})
    with pytest.raises(LaunchRefused) as caught:
        await launch(client)
    assert "\x1b" not in caught.value.message
    assert len(caught.value.message) < 400
    assert len(caught.value.details["body"]) <= 256
