"""RunComfy's API client against an emulated cloud that does everything wrong that clouds do."""

from __future__ import annotations

import asyncio
import json
import logging
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult

from runcomfy.domain.exceptions import (
    AccessDenied,
    AnswerUnreadable,
    AuthRejected,
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
    WrongUrl,
)
from runcomfy.domain.machine import MachineReport, Phase, ServerId
from runcomfy.domain.secret import Secret
from runcomfy.domain.settings import CloudSettings
from runcomfy.runcomfy_client import RunComfyAPIClient
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.runcomfy import LEFT_OUT, RunComfyEmulator

pytestmark = pytest.mark.cloud(comfyui=False)

TEN_MINUTES = timedelta(minutes=10)
SOME_ID = ServerId("0f6b1c1e-7a53-4c0e-9d51-2f0c3f2b9a10")
CANARY_1, CANARY_2 = "canary-token-5f1c9a", "canary-token-77e0b3"
CANARY_USER = "canary-user-41d2"

Client = RunComfyAPIClient
Act = Callable[[Client], Coroutine[Any, Any, object]]


@pytest.fixture
async def client(cloud_settings: CloudSettings, clock: LoopClock) -> AsyncIterator[Client]:
    async with RunComfyAPIClient(cloud_settings, clock=clock) as client:
        yield client


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


ACTS: dict[str, Act] = {
    "workflows": lambda client: client.get_workflows(),
    "list": lambda client: client.list_machines(),
    "launch": launch,
    "status": lambda client: client.get_machine_status(SOME_ID),
    "duration": lambda client: client.change_duration(SOME_ID, total=TEN_MINUTES),
    "stop": lambda client: client.stop_machine(SOME_ID),
}
every_call = pytest.mark.parametrize("act", ACTS.values(), ids=ACTS.keys())
every_call_but_launch = pytest.mark.parametrize(
    "act", [act for name, act in ACTS.items() if name != "launch"], ids=[name for name in ACTS if name != "launch"]
)


def posts(cloud: RunComfyEmulator) -> int:
    return sum(call.method == "POST" and call.path == "servers" for call in cloud.calls)


# --- lists -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", ["servers", "data", "machines", "items"])
async def test_wrapped_lists_are_read(client: Client, cloud: RunComfyEmulator, wrap: str) -> None:
    stranger = cloud.foreign()
    cloud.next_call("GET servers", wrap=wrap)
    assert [report.server_id for report in await client.list_machines()] == [stranger.server_id]


async def test_a_list_wrapped_twice_is_read(client: Client, cloud: RunComfyEmulator) -> None:
    stranger = cloud.foreign()
    cloud.next_call("GET servers", change=lambda entries: {"data": {"servers": entries, "total": 1}})
    assert [report.server_id for report in await client.list_machines()] == [stranger.server_id]


async def test_pages_are_followed_to_the_last(client: Client, cloud: RunComfyEmulator) -> None:
    ids = [cloud.foreign().server_id for _ in range(5)]
    cloud.page_size = 2
    assert [report.server_id for report in await client.list_machines()] == ids


@pytest.mark.fault(10)
async def test_a_list_whose_second_page_fails_is_no_list(client: Client, cloud: RunComfyEmulator) -> None:
    for _ in range(3):
        cloud.foreign()
    cloud.page_size = 2
    cloud.next_call("GET servers?page=2", status=500, times=None)
    with pytest.raises(ProviderBusy):
        await client.list_machines()


@pytest.mark.fault(10)
async def test_a_page_that_repeats_the_first_makes_the_list_unreadable(client: Client, cloud: RunComfyEmulator) -> None:
    for _ in range(4):
        cloud.foreign()
    cloud.page_size = 2
    repeated = [machine.view(cloud.now()) for machine in list(cloud.machines.values())[:2]]
    cloud.next_call("GET servers?page=2", change=lambda page: {**page, "servers": repeated})
    with pytest.raises(AnswerUnreadable, match="repeats"):
        await client.list_machines()


@pytest.mark.fault(10)
@pytest.mark.parametrize(
    "marks",
    [
        {"has_more": True},
        {"next_cursor": "abc"},
        {"next": True},
        {"total": 7},
        {"pagination": {"total": 7}},
        {"pages": 2},
        {"next": "https://elsewhere.example/prod/api/users/u/servers?page=2"},
        {"next": "/another/path?page=2"},
    ],
    ids=str,
)
async def test_a_part_of_a_list_is_no_list(client: Client, cloud: RunComfyEmulator, marks: dict[str, Any]) -> None:
    cloud.foreign()
    cloud.next_call("GET servers*", change=lambda entries: {"servers": entries, **marks}, times=None)
    with pytest.raises(AnswerUnreadable):
        await client.list_machines()


@pytest.mark.parametrize("number", [{"page": 1, "pages": 2}, {"next_page": 2}], ids=str)
async def test_page_numbers_are_followed(client: Client, cloud: RunComfyEmulator, number: dict[str, int]) -> None:
    ids = [cloud.foreign().server_id for _ in range(2)]
    cloud.next_call("GET servers", change=lambda entries: {"servers": entries[:1], **number})
    cloud.next_call("GET servers?page=2", change=lambda entries: {"servers": entries[1:], "page": 2, "pages": 2})
    assert [report.server_id for report in await client.list_machines()] == ids


async def test_a_list_without_an_end_is_given_up(client: Client, cloud: RunComfyEmulator) -> None:
    pages = iter(range(10_000))
    cloud.rate_limit = False
    cloud.next_call(
        "GET servers*", times=None, change=lambda _: {"servers": [{"server_id": f"s{next(pages)}"}], "next_page": 2}
    )
    with pytest.raises(AnswerUnreadable, match="without an end"):
        await client.list_machines()


@pytest.mark.parametrize(
    "entry", [{}, {"server_id": None}, {"server_id": ["x"]}, {"server_id": "../../etc"}, None, "x"]
)
async def test_a_list_in_which_a_machine_cannot_be_told_is_no_list(
    client: Client, cloud: RunComfyEmulator, entry: object
) -> None:
    cloud.foreign()
    cloud.next_call("GET servers", change=lambda entries: [*entries, entry], times=None)
    with pytest.raises(AnswerUnreadable):
        await client.list_machines()


async def test_a_machine_listed_twice_counts_once_as_the_living_one(client: Client, cloud: RunComfyEmulator) -> None:
    cloud.foreign()
    cloud.next_call("GET servers", change=lambda entries: [{**entries[0], "current_status": "Stopped"}, *entries])
    (report,) = await client.list_machines()
    assert report.phase is Phase.READY


# --- machine objects ---------------------------------------------------------------------------------------


@pytest.mark.fault(13)
@pytest.mark.parametrize(
    ("word", "phase"),
    [
        ("READY", Phase.READY),
        ("starting", Phase.STARTING),
        ("Initializing", Phase.STARTING),
        ("Deleting", Phase.STOPPING),
        ("Stopping", Phase.STOPPING),
        ("Stopped", Phase.GONE),
        ("Terminated", Phase.GONE),
        ("Error", Phase.FAILED),
        ("Hibernating", Phase.UNKNOWN),
        ("", Phase.UNKNOWN),
    ],
)
async def test_status_words(client: Client, cloud: RunComfyEmulator, word: str, phase: Phase) -> None:
    machine = cloud.foreign(status=word)
    report = await client.get_machine_status(ServerId(machine.server_id))
    assert report is not None
    assert report.phase is phase
    assert report.status == word


@pytest.mark.fault(13)
@pytest.mark.parametrize(
    "fields",
    [
        dict.fromkeys(
            ["user_id", "server_type", "estimated_duration", "current_status", "main_service_url", "service_ready_at"]
        ),
        {"server_type": 7, "estimated_duration": "soon", "main_service_url": [1], "service_ready_at": 12, "extra": {}},
        {"main_service_url": "javascript:alert(1)", "estimated_stopping_at": "9999-12-31T23:59:59-23:00"},
        {"main_service_url": "http://[::1", "service_ready_at": "yesterday", "estimated_duration": 1e300},
        {"estimated_duration": True, "current_status": ["Ready"], "user_id": {"a": None}},
        dict.fromkeys(["estimated_duration", "main_service_url", "service_ready_at"], LEFT_OUT),
    ],
)
async def test_odd_fields_do_not_hide_a_machine(
    client: Client, cloud: RunComfyEmulator, fields: dict[str, Any]
) -> None:
    machine = cloud.foreign(fields=fields)
    (report,) = await client.list_machines()
    assert report.server_id == machine.server_id
    assert await client.get_machine_status(report.server_id) == report
    assert not report.usable


async def test_a_wrapped_machine_is_read(client: Client, cloud: RunComfyEmulator) -> None:
    machine = cloud.foreign()
    for wrap in ("server", "data", "machine"):
        cloud.next_call("GET servers/*", wrap=wrap)
        report = await client.get_machine_status(ServerId(machine.server_id))
        assert report is not None
        assert report.usable


async def test_an_answer_about_another_machine_is_not_taken(client: Client, cloud: RunComfyEmulator) -> None:
    machine, other = cloud.foreign(), cloud.foreign()
    cloud.next_call("*", change=lambda seen: {**seen, "server_id": other.server_id}, works=False, times=None)
    for act in (client.get_machine_status, client.stop_machine):
        with pytest.raises(AnswerUnreadable, match="another machine"):
            await act(ServerId(machine.server_id))


async def test_an_unknown_word_is_logged_once(
    client: Client, cloud: RunComfyEmulator, caplog: pytest.LogCaptureFixture
) -> None:
    cloud.foreign(status="Hibernating")
    await client.list_machines()
    await client.list_machines()
    assert [record.message for record in caplog.records].count("provider_status_unknown") == 1


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
    ids=str,
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
@every_call_but_launch
@pytest.mark.parametrize("reply", ["reset", "lost", "truncated"])
async def test_a_broken_connection_is_tried_again(
    client: Client, cloud: RunComfyEmulator, act: Act, reply: str
) -> None:
    cloud.next_call("*", reply=reply, times=2)
    try:
        await act(client)
    except ProviderError as error:
        assert error.code == "machine-not-found"  # noqa: PT017 - the emulator's honest answer to a change of duration
    assert len(cloud.calls) >= 3  # aiohttp repeats some by itself


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


# --- tokens, addresses -------------------------------------------------------------------------------------


@pytest.mark.fault(26)
@every_call
@pytest.mark.cloud(second_token="the-other-one")
async def test_the_second_token_takes_over_and_stays(client: Client, cloud: RunComfyEmulator, act: Act) -> None:
    await client.list_machines()
    cloud.revoke(1)
    try:
        await act(client)
    except ProviderError as error:
        assert error.code == "machine-not-found"  # noqa: PT017 - the emulator's honest answer to a change of duration
    await client.list_machines()
    assert [call.token for call in cloud.calls] == [1, 1, 2, 2]
    assert len(cloud.launched) == (1 if act is launch else 0)
    for server_id in cloud.launched:
        await client.stop_machine(ServerId(server_id))


@pytest.mark.fault(26)
@pytest.mark.cloud(second_token="the-other-one")
async def test_a_403_tries_the_second_token_too(client: Client, cloud: RunComfyEmulator) -> None:
    cloud.next_call("GET servers", status=403, body={"message": "User is not authorized to access this resource"})
    await client.list_machines()
    assert [call.token for call in cloud.calls] == [1, 2]


@pytest.mark.fault(26)
@pytest.mark.cloud(second_token="the-other-one")
async def test_when_both_tokens_are_revoked_it_says_so(client: Client, cloud: RunComfyEmulator) -> None:
    cloud.revoke(1)
    cloud.revoke(2)
    with pytest.raises(AuthRejected, match="token"):
        await client.list_machines()
    assert len(cloud.calls) == 2


@pytest.mark.fault(26)
async def test_a_revoked_only_token_is_rejected(client: Client, cloud: RunComfyEmulator) -> None:
    machine = await launch(client)
    cloud.revoke(1)
    with pytest.raises(AuthRejected) as caught:
        await client.stop_machine(machine.server_id)
    assert "RUNCOMFY_API_TOKEN" in caught.value.hint
    cloud.behave()
    await client.stop_machine(machine.server_id)


async def test_a_strangers_user_id_is_denied(
    cloud: RunComfyEmulator, cloud_settings: CloudSettings, clock: LoopClock
) -> None:
    async with RunComfyAPIClient(replace(cloud_settings, user_id="somebody"), clock=clock) as client:
        with pytest.raises(AccessDenied) as caught:
            await client.list_machines()
    assert "RUNCOMFY_USER_ID" in caught.value.hint


@every_call
async def test_the_gateways_403_means_a_wrong_address(
    cloud: RunComfyEmulator, cloud_settings: CloudSettings, clock: LoopClock, act: Act
) -> None:
    wrong = replace(cloud_settings, base_url=cloud.url + "/prod/api")
    async with RunComfyAPIClient(wrong, clock=clock) as client:
        with pytest.raises(WrongUrl):
            await act(client)
        with pytest.raises(WrongUrl):
            await client.probe_host()
    assert [call.token for call in cloud.calls] == [1, None]


@pytest.fixture
async def elsewhere() -> AsyncIterator[tuple[str, list[str]]]:
    """Another host, and the requests that arrive there."""
    arrived: list[str] = []

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        arrived.append(request.path)
        return web.json_response([])

    runner = web.ServerRunner(web.Server(answer, access_log=None))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://localhost:{runner.addresses[0][1]}", arrived
    await runner.cleanup()


@pytest.mark.fault(33)
@every_call
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_never_followed(
    client: Client, cloud: RunComfyEmulator, elsewhere: tuple[str, list[str]], act: Act, status: int
) -> None:
    address, arrived = elsewhere
    cloud.next_call("*", status=status, works=False, headers={"Location": f"{address}/prod/api"}, times=None)
    with pytest.raises(LaunchUnclear if act is launch else WrongUrl) as caught:
        await act(client)
    assert "redirect to localhost" in caught.value.message
    assert arrived == []
    assert len(cloud.calls) == 1


@pytest.mark.fault(33)
async def test_a_redirect_loop_ends_at_its_first_turn(client: Client, cloud: RunComfyEmulator) -> None:
    cloud.next_call("GET servers", status=302, headers={"Location": "servers"}, times=None)
    with pytest.raises(WrongUrl, match="redirect to the same host"):
        await client.list_machines()
    assert len(cloud.calls) == 1


@pytest.mark.fault(74)
@every_call
@pytest.mark.parametrize(
    "body",
    [
        "<!DOCTYPE html><html><body>Please log in to the hotel's network</body></html>",
        "Welcome",
        {"status": "login required"},
        {},
        "true",
        "",
    ],
    ids=str,
)
async def test_a_portal_that_says_200_to_everything_is_not_believed(
    client: Client, cloud: RunComfyEmulator, act: Act, body: Any
) -> None:
    cloud.next_call("*", status=200, body=body or b"", works=False, times=None)
    with pytest.raises(LaunchUnclear if act is launch else AnswerUnreadable):
        await act(client)
    with pytest.raises(AnswerUnreadable):
        await client.probe_host()


@pytest.mark.fault(74)
async def test_a_page_that_says_404_does_not_mean_that_a_machine_is_gone(
    client: Client, cloud: RunComfyEmulator
) -> None:
    cloud.next_call("*", status=404, body="<html>Not found</html>", times=None)
    for act in (client.get_machine_status, client.stop_machine):
        with pytest.raises(ProviderError):
            await act(SOME_ID)


async def test_a_page_is_not_retried_for_ever_but_one_is_forgiven(client: Client, cloud: RunComfyEmulator) -> None:
    cloud.next_call("GET servers", reply="html")
    assert list(await client.list_machines()) == []


@pytest.mark.fault(30)
@every_call
async def test_a_host_without_tls_is_not_spoken_to_in_plain_text(
    cloud: RunComfyEmulator, cloud_settings: CloudSettings, clock: LoopClock, act: Act
) -> None:
    secure = replace(cloud_settings, base_url=cloud.url.replace("http:", "https:"))
    async with RunComfyAPIClient(secure, clock=clock) as client:
        with pytest.raises(AnswerUnreadable, match="certificate"):
            await act(client)
    assert cloud.calls == []


class NoSuchName(AbstractResolver):
    """A resolver that knows nobody."""

    async def resolve(self, host: str, port: int = 0, family: int = 0) -> list[ResolveResult]:
        raise OSError("Name or service not known")

    async def close(self) -> None:
        return


@pytest.mark.fault(30)
@every_call
async def test_a_name_that_does_not_resolve_is_a_provider_out_of_reach(clock: LoopClock, act: Act) -> None:
    settings = CloudSettings(user_id="u", tokens=(Secret("t"),), workflow_version_id="v")
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(resolver=NoSuchName())) as http,
        RunComfyAPIClient(settings, clock=clock, http=http) as client,
    ):
        with pytest.raises(ProviderBusy, match="cannot be reached"):
            await act(client)
        await client.close()
        assert not http.closed  # it was passed in: the caller's to close


# --- settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["http://api.runcomfy.net", "http://127.0.0.1.evil.example", "http://10.0.0.1"])
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


async def test_the_balance_is_told_where_it_is_known(client: Client, cloud: RunComfyEmulator) -> None:
    assert await client.balance() == Decimal(25)
    faults: list[dict[str, Any]] = [{"status": 404}, {"status": 500}, {"body": {"balance_usd": "many"}}, {"body": {}}]
    for fault in [*faults, {"reply": "html"}]:
        cloud.next_call("GET balance", **fault)
        assert await client.balance() is None


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


# --- secrets and the log -----------------------------------------------------------------------------------


@pytest.mark.cloud(token=CANARY_1, second_token=CANARY_2, user_id=CANARY_USER)
async def test_no_secret_leaves_by_log_error_or_repr(
    client: Client, cloud: RunComfyEmulator, cloud_settings: CloudSettings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    machine = cloud.foreign()
    machine.url = "https://canary-host-comfyui.runcomfy.com/canary-path"
    echo = f"who is {CANARY_USER} with Bearer {CANARY_1} or {CANARY_2} at {machine.url}?"
    faults: list[dict[str, Any]] = [
        {"status": status, "body": body}
        for status in (200, 301, 400, 401, 402, 403, 404, 409, 429, 500, 503)
        for body in (
            {"message": echo},
            {"error": {"message": json.dumps(machine.view(cloud.now()))}},
            echo * 50,
            "x" * 200 + echo,
            machine.view(cloud.now()),
        )
    ]
    faults += [{"reply": reply} for reply in ("reset", "never", "truncated", "html", "lost")]
    faults += [{"status": 302, "headers": {"Location": f"https://{CANARY_1}.example/{CANARY_2}"}}]
    shown: list[str] = [repr(client), repr(cloud_settings), str(cloud_settings)]
    for fault in faults:
        cloud.next_call("*", times=None, works=False, **fault)
        for act in ACTS.values():
            try:
                shown.append(repr(await act(client)))
            except RunComfyError as error:
                shown += [str(error), repr(error), error.hint, json.dumps(error.as_dict()), repr(error.__cause__)]
                shown += traceback.format_exception(error)
        cloud.behave()
    shown += [str(record.__dict__) for record in caplog.records if record.name.startswith("runcomfy")]
    assert len(shown) > 1000
    for secret in (CANARY_1, CANARY_2, "canary-host", "canary-path"):
        assert not [text for text in shown if secret in text]
    assert not [text for text in shown[3:] if CANARY_USER in text]  # settings show it: it is no secret, only not shown


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
