"""Whatever JSON a cloud sends, reading it ends in our words or in `Unreadable`, never in a crash."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runcomfy.adapters.providers import runcomfy_wire as wire
from runcomfy.adapters.providers.runcomfy_errors import Answer, Veil, judge, words_of
from runcomfy.domain.exceptions import FOREIGN_TEXT_LIMIT, ProviderError
from runcomfy.domain.machine import Phase, ServerId
from runcomfy.domain.secret import Secret

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.just(10**400),
    st.floats(),
    st.text(max_size=30),
    st.sampled_from(
        ["Ready", "2026-11-20T10:00:00.25Z", "http://[", "https://a-comfyui.runcomfy.com", "0", "-1", "1e999"]
    ),
)
names = st.one_of(
    st.text(max_size=10),
    st.sampled_from(
        [
            "server_id",
            "user_id",
            "server_type",
            "estimated_duration",
            "current_status",
            "main_service_url",
            "servers",
            "service_ready_at",
            "estimated_stopping_at",
            "workflow_version_id",
            "server",
            "data",
            "items",
            "version_id",
            "next",
            "next_page",
            "total",
            "page",
            "pages",
            "pagination",
            "has_more",
            "workflow_name",
            "balance_usd",
            "currency",
            "id",
            "message",
            "error",
            "detail",
        ]
    ),
)
anything = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(names, inner, max_size=6)),
    max_leaves=20,
)
machines = st.fixed_dictionaries({"server_id": st.from_regex(r"\A[a-z0-9][a-z0-9-]{0,30}\Z")}, optional={}).flatmap(
    lambda base: st.dictionaries(names, anything, max_size=8).map(lambda extra: {**extra, **base})
)


@given(anything)
def test_any_json_is_read_or_unreadable(payload: Any) -> None:
    readers: list[Callable[[Any], object]] = [
        wire.read_page,
        wire.read_single,
        lambda value: wire.read_single(value, expected=ServerId("s")),
        lambda value: wire.read_machines(wire.read_page(value).entries),
        lambda value: wire.read_workflows(wire.read_page(value).entries),
        wire.read_money,
        wire.read_user_id,
    ]
    for read in readers:
        with suppress(wire.Unreadable):
            read(payload)


@given(machines)
def test_a_machine_with_an_id_is_always_seen(payload: dict[str, Any]) -> None:
    report = wire.read_machine(payload)
    assert report.server_id == payload["server_id"]
    assert report.duration is None or report.duration > timedelta(0)
    assert len(report.status) <= FOREIGN_TEXT_LIMIT
    for at in (report.ready_at, report.stopping_at):
        assert at is None or at.utcoffset() == timedelta(0)


@given(st.lists(machines, max_size=6))
def test_no_machine_of_a_list_is_lost(entries: list[dict[str, Any]]) -> None:
    payload = wire.read_json(json.dumps(entries).encode())
    reports = wire.read_machines(wire.read_page(payload).entries)
    assert {report.server_id for report in reports} == {entry["server_id"] for entry in entries}
    assert len(reports) == len({report.server_id for report in reports})


@given(st.binary(max_size=300))
def test_any_bytes_are_json_or_unreadable(body: bytes) -> None:
    with suppress(wire.Unreadable):
        wire.read_json(body)


@pytest.mark.parametrize("body", [b"[" * 100_000, b"9" * 10_000, b"\xff\xfe", b"", b"  ", b"{"])
def test_hostile_json_is_unreadable(body: bytes) -> None:
    with pytest.raises(wire.Unreadable):
        wire.read_json(body)


@given(st.integers(100, 599), st.one_of(st.binary(max_size=200), anything), st.booleans(), st.text(max_size=30))
def test_any_refusal_becomes_one_of_our_errors(status: int, body: Any, launch: bool, location: str) -> None:
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    answer = Answer(status, body, {"Location": location})
    veil = Veil([Secret("s3cret")], "user-9")
    failure = judge(answer, what="list machines", call="GET /servers", veil=veil, launch=launch)
    assert isinstance(failure.error, ProviderError)
    assert failure.error.details["status"] == status
    assert len(failure.error.details["body"]) <= FOREIGN_TEXT_LIMIT
    # A launch that was refused for certain is one that RunComfy's API itself refused.
    assert failure.arrived or status >= 400


@given(st.text(), st.sampled_from(["s3cret", "user-9"]), st.text())
def test_a_veil_hides_what_it_knows(before: str, secret: str, after: str) -> None:
    shown = Veil([Secret("s3cret")], "user-9")(f"{before}{secret}{after}")
    assert secret not in shown


@pytest.mark.parametrize(
    "text",
    [
        "https://0f6b1c1e-comfyui.runcomfy.com/view?x=1",
        "wss:0f6b1c1e-comfyui.runcomfy.com",
        r"https:\/\/0f6b1c1e-comfyui.runcomfy.com",
        '"main_service_url": "https://0f6b1c1e.example"',
    ],
)
def test_a_veil_hides_machines_addresses(text: str) -> None:
    assert "0f6b1c1e" not in Veil([], "")(text)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"message": "no"}', "no"),
        (b'{"error": {"message": "deep"}}', "deep"),
        (b'{"detail": [{"message": "a"}, {"message": "b"}]}', "a; b"),
        (b'{"code": 7}', '{"code": 7}'),
        (b"plain", "plain"),
        (b"<html>page</html>", ""),
    ],
)
def test_the_words_of_a_refusal_are_found(body: bytes, words: str) -> None:
    assert words_of(Answer(400, body)) == words


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("2026-11-20T10:00:00.250000Z", datetime(2026, 11, 20, 10, 0, 0, 250_000, UTC)),
        ("2026-11-20T12:00:00+02:00", datetime(2026, 11, 20, 10, tzinfo=UTC)),
        ("2026-11-20T10:00:00", datetime(2026, 11, 20, 10, tzinfo=UTC)),
        ("2026-11-20T10:00:00.123456789Z", datetime(2026, 11, 20, 10, 0, 0, 123_456, UTC)),
        ("0001-01-01T00:00:00+23:00", None),
        ("20 Nov", None),
    ],
)
def test_times_are_read_in_utc(text: str, at: datetime | None) -> None:
    assert wire.read_machine({"server_id": "s", "service_ready_at": text}).ready_at == at


@pytest.mark.fault(13)
@pytest.mark.parametrize(
    ("status", "stops", "ready"),
    [
        ("Ready", "2026-11-20T10:30:00.250000Z", datetime(2026, 11, 20, 10, 0, 0, 250_000, UTC)),
        ("Starting", "2026-11-20T10:30:00.250000Z", None),
        ("Ready", None, None),
        ("Ready", "2000-01-01T00:00:00Z", datetime(2000, 1, 1, tzinfo=UTC)),
    ],
)
def test_a_ready_time_that_is_left_out_is_told_by_the_stop_time_and_the_duration(
    status: str, stops: str | None, ready: datetime | None
) -> None:
    entry = {"server_id": "s", "current_status": status, "estimated_duration": 1800, "estimated_stopping_at": stops}
    assert wire.read_machine(entry).ready_at == ready


@pytest.mark.parametrize("value", [1800, 1800.0, "1800"])
def test_durations_are_seconds(value: object) -> None:
    assert wire.read_machine({"server_id": "s", "estimated_duration": value}).duration == timedelta(minutes=30)


def test_an_id_may_be_a_number_and_the_phase_is_case_blind() -> None:
    report = wire.read_machine({"server_id": 42, "current_status": "rEaDy"})
    assert (report.server_id, report.phase) == ("42", Phase.READY)
