"""Every call of the API client against broken connections, revoked tokens, wrong addresses, portals, redirects."""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from datetime import timedelta
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult

from runcomfy.domain.exceptions import (
    AccessDenied,
    AnswerUnreadable,
    AuthRejected,
    LaunchUnclear,
    ProviderBusy,
    ProviderError,
    RunComfyError,
    WrongUrl,
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
Act = Callable[[Client], Coroutine[Any, Any, object]]


@pytest.fixture
def client(cloud_client: RunComfyAPIClient) -> RunComfyAPIClient:
    return cloud_client


async def launch(client: Client, server_type: str = "large") -> MachineReport:
    version = client._settings.workflow_version_id
    return await client.launch_machine(server_type=server_type, duration=TEN_MINUTES, workflow_version_id=version)


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


# --- connections ---


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
@pytest.mark.threat("S18")
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


# --- secrets ---


@pytest.mark.cloud(token=CANARY_1, second_token=CANARY_2, user_id=CANARY_USER)
@pytest.mark.threat("S3")
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
