"""What the API client makes of odd lists and machine objects; of a part of a list it makes nothing."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from runcomfy.domain.exceptions import (
    AnswerUnreadable,
    ProviderBusy,
)
from runcomfy.domain.machine import Phase, ServerId
from runcomfy.runcomfy_client import RunComfyAPIClient
from runcomfy.testing.emulators.runcomfy import LEFT_OUT, RunComfyEmulator

pytestmark = pytest.mark.cloud(comfyui=False)

TEN_MINUTES = timedelta(minutes=10)
SOME_ID = ServerId("0f6b1c1e-7a53-4c0e-9d51-2f0c3f2b9a10")
CANARY_1, CANARY_2 = "canary-token-5f1c9a", "canary-token-77e0b3"
CANARY_USER = "canary-user-41d2"

Client = RunComfyAPIClient


@pytest.fixture
def client(cloud_client: RunComfyAPIClient) -> RunComfyAPIClient:
    return cloud_client


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
        {"error": "upstream timeout"},
        {"error_code": 500001},
        {"success": False},
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
    "entry", [{}, {"server_id": None}, {"server_id": ["x"]}, {"server_id": "  "}, {"server_id": " x "}, None, "x"]
)
async def test_a_list_in_which_a_machine_cannot_be_told_is_no_list(
    client: Client, cloud: RunComfyEmulator, entry: object
) -> None:
    cloud.foreign()
    cloud.next_call("GET servers", change=lambda entries: [*entries, entry], times=None)
    with pytest.raises(AnswerUnreadable):
        await client.list_machines()


@pytest.mark.parametrize("strange", ["../../evil", "a b", "x" * 300, "\x1b[2J", "ümlaut/.."])
async def test_an_id_that_cannot_be_used_spoils_no_list_is_shown_under_another_name_and_logged_once(
    client: Client, cloud: RunComfyEmulator, caplog: pytest.LogCaptureFixture, strange: str
) -> None:
    stranger = cloud.foreign()
    entry = {"server_id": strange, "server_type": "large", "current_status": "Ready"}
    cloud.next_call("GET servers", change=lambda entries: [entry, *entries], times=None)
    lists = [await client.list_machines() for _ in range(2)]
    assert lists[0] == lists[1]
    odd, known = lists[0]
    assert (known.server_id, known.addressable) == (stranger.server_id, True)
    assert (odd.phase, odd.server_type, odd.addressable) == (Phase.READY, "large", False)
    assert odd.server_id.startswith("unusable-id-")
    assert [record.getMessage() for record in caplog.records].count("provider_machine_id_unusable") == 1
    assert strange not in caplog.text


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
