"""Threat S5 at the door of the HTTP API: who is let in, by which proof, and to what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.guarding.guard import COOKIE
from runcomfy.domain.settings import HttpSettings

Paths = list[tuple[str, str]]


def asked(method: str, body: Any = None) -> dict[str, Any]:
    return {} if method == "GET" else {"body": {} if body is None else body}


async def test_without_token_nothing_of_ours_answers(door: Any, others: Paths) -> None:
    for method, path in others:
        answer = await door.ask(method, path, **asked(method))
        assert answer.status == 401, (method, path)
        assert answer.header("www-authenticate") == "Bearer"
        assert answer.json()["error"]["code"] == "token-missing"
    assert door.done == []


async def test_the_token_opens_everything(door: Any, others: Paths) -> None:
    for method, path in others:
        answer = await door.ask(method, path, door.bearer, **asked(method))
        assert answer.status in (200, 204), (method, path)


@pytest.mark.parametrize(
    "authorization",
    ["Bearer", "Bearer ", "Bearer wrong", "Basic {}", "bearer  x {}", "{}", "Token {}", "Bearer {}x", "Bearer \xff"],
)
async def test_a_wrong_token_is_refused_even_where_none_is_needed(door: Any, authorization: str) -> None:
    headers = {"Authorization": authorization.format(door.guard.token.reveal())}
    for path in ("/", "/health", "/jobs"):
        answer = await door.ask("GET", path, headers)
        assert answer.status == 401
    assert door.done == []


async def test_two_tokens_are_none(door: Any) -> None:
    twice = [*door.bearer.items(), *door.bearer.items()]
    assert (await door.ask("GET", "/jobs", twice)).status == 401


async def test_a_token_in_the_address_or_body_or_cookie_opens_nothing(door: Any) -> None:
    token = door.guard.token.reveal()
    for path in (f"/jobs?token={token}", f"/jobs?access_token={token}", f"/?code={token}"):
        assert (await door.ask("GET", path)).status in (401, 403)
    assert (await door.ask("POST", "/jobs", body={"token": token})).status == 401
    assert (await door.ask("GET", "/jobs", {"Cookie": f"{COOKIE}={token}"})).status == 401
    assert door.done == []


async def test_conjures_own_endpoints_answer_its_programs(door: Any, conjures: Paths) -> None:
    for method, path in conjures:
        answer = await door.ask(method, path, **asked(method))
        assert (answer.status, answer.json()) == (200, {"who": "conjure"}), (method, path)
        if method == "POST":  # `requests.post(url)`, and aiohttp's
            assert (await door.ask(method, path, {"Content-Length": "0"})).status == 200
            octets = {"Content-Length": "0", "Content-Type": "application/octet-stream"}
            assert (await door.ask(method, path, octets)).status == 200


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({"peer": "192.168.1.7"}, 401),
        ({"peer": "::ffff:192.168.1.7"}, 401),
        ({"headers": {"X-Forwarded-For": "8.8.8.8"}}, 401),
        ({"headers": {"Forwarded": "for=8.8.8.8"}}, 401),
        ({"headers": {"Via": "1.1 proxy"}}, 401),
        ({"host": "evil.example"}, 403),
        ({"host": "evil.example:8000"}, 403),
        ({"headers": {"Origin": "null"}}, 403),
        ({"headers": {"Origin": "http://evil.example"}}, 403),
        ({"headers": {"Origin": "http://127.0.0.1:8001"}}, 403),
        ({"headers": {"Sec-Fetch-Site": "cross-site"}}, 403),
        ({"headers": {"Sec-Fetch-Site": "same-site"}}, 403),
        ({"headers": {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}}, 403),
    ],
)
@pytest.mark.threat("S5")
async def test_conjures_endpoints_answer_nobody_else(
    door: Any, conjures: Paths, options: dict[str, Any], status: int
) -> None:
    for method, path in conjures:
        assert (await door.ask(method, path, **asked(method), **options)).status == status, (method, path)
    assert door.done == []


async def test_a_link_that_a_person_follows_does_not_make_them_conjure(door: Any) -> None:
    followed = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert (await door.ask("GET", "/state", followed)).status == 401
    assert (await door.ask("GET", "/", followed)).status == 200, "but they may open the page"
    posted = await door.ask("POST", "/shutdown", {**followed, "Origin": "http://evil.example"}, body={})
    assert posted.status == 403


async def test_a_setting_closes_conjures_endpoints(guarded: Any, tmp_path: Path, conjures: Paths) -> None:
    door = guarded(tmp_path / "state", HttpSettings(conjure_open=False))
    for method, path in conjures:
        assert (await door.ask(method, path, **asked(method))).status == 401, (method, path)
    assert door.done == []
    for method, path in conjures:
        assert (await door.ask(method, path, door.bearer, **asked(method))).status == 200, (method, path)


@pytest.mark.parametrize("bound_host", ["0.0.0.0", "192.168.1.5", "::", "box.example"])  # noqa: S104 - nothing is bound
@pytest.mark.threat("S5")
async def test_bound_elsewhere_everything_needs_the_token(
    guarded: Any, tmp_path: Path, bound_host: str, conjures: Paths, others: Paths
) -> None:
    door = guarded(tmp_path / "state", bound_host=bound_host)
    assert bound_host in door.guard.announcement()
    from_outside: dict[str, Any] = {"server": ("192.168.1.5", 8000), "peer": "192.168.1.7"}
    for method, path in [*conjures, *others]:
        answer = await door.ask(method, path, **asked(method), host="192.168.1.5:8000", **from_outside)
        assert answer.status == 401, (method, path)
        assert (await door.ask(method, path, **asked(method))).status == 401, (method, path)
    assert door.done == []


def test_on_loopback_there_is_nothing_to_announce(door: Any) -> None:
    assert door.guard.announcement() == ""
