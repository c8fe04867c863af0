"""Threats S3 and S5: the page's session: how it begins, what it may do, how it ends."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from launcher.guarding.guard import COOKIE
from launcher.guarding.sessions import CODE_LIFE
from runcomfy.domain.settings import HttpSettings

HERE = "127.0.0.1:8000"


async def test_a_code_is_traded_for_a_session_and_leaves_the_address(door: Any) -> None:
    code = door.guard.new_code()
    answer = await door.ask("GET", f"/?code={code}")
    assert (answer.status, answer.header("location")) == (303, "/")
    cookie = answer.header("set-cookie") or ""
    name, *attributes = cookie.split("; ")
    assert name.startswith(f"{COOKIE}=")
    assert attributes == ["Max-Age=43200", "Path=/", "HttpOnly", "SameSite=Strict"]
    assert code not in str(answer.headers)
    assert len(name.partition("=")[2]) >= 43, "256 bits"
    assert answer.header("referrer-policy") == "no-referrer"
    assert door.scopes[-1]["query_string"] == b"", "so that no access log can show it"
    assert (await door.ask("GET", "/session", {"Cookie": name})).json()["kind"] == "session"


async def test_over_tls_the_cookie_stays_there(guarded: Any, tmp_path: Path) -> None:
    door = guarded(tmp_path / "state", HttpSettings(allowed_hosts=("studio.example",)))
    answer = await door.ask("GET", f"/?code={door.guard.new_code()}", host="studio.example", scheme="https")
    assert (answer.header("set-cookie") or "").endswith("; Secure")


@pytest.mark.threat("S5")
async def test_a_code_works_once_and_not_for_long(door: Any) -> None:
    code = door.guard.new_code()
    assert (await door.ask("GET", f"/?code={code}")).status == 303
    for used in (code, "", "wrong", code + "x", code[:-1]):
        answer = await door.ask("GET", f"/?code={used}")
        assert answer.status == 403
        assert answer.header("set-cookie") is None
        assert code.encode() not in answer.body
    late = door.guard.new_code()
    await asyncio.sleep(CODE_LIFE.total_seconds() + 1)
    assert (await door.ask("GET", f"/?code={late}")).status == 403
    assert door.done == []


async def test_looking_at_a_link_does_not_use_it_up(door: Any) -> None:
    code = door.guard.new_code()
    assert (await door.ask("HEAD", f"/?code={code}")).status != 303
    assert (await door.ask("GET", f"/?code={code}", host="evil.example")).status == 403
    assert (await door.ask("GET", f"/?code={code}")).status == 303


async def test_who_is_logged_in_may_open_an_old_address(door: Any) -> None:
    cookie = await door.log_in()
    answer = await door.ask("GET", "/?code=used", {"Cookie": cookie})
    assert (answer.status, answer.header("set-cookie")) == (303, None)


async def test_guessing_codes_is_slow(door: Any) -> None:
    statuses = [(await door.ask("GET", f"/?code=guess{n}")).status for n in range(30)]
    assert statuses == [403] * 20 + [429] * 10


@pytest.mark.threat("S5")
async def test_a_session_changes_something_only_from_its_own_page(door: Any) -> None:
    cookie = {"Cookie": await door.log_in()}
    for method in ("POST", "PATCH", "DELETE", "PUT"):
        assert (await door.ask(method, "/jobs/1", cookie, body={})).status == 403
    assert door.done == []
    for proof in ({"Origin": f"http://{HERE}"}, {"Sec-Fetch-Site": "same-origin"}):
        assert (await door.ask("POST", "/jobs", {**cookie, **proof}, body={})).json() == {"who": "session"}
    assert (await door.ask("GET", "/jobs", cookie)).status == 200


async def test_a_session_ends_by_itself_and_by_logging_out(door: Any) -> None:
    cookie, own = await door.log_in(), {"Origin": f"http://{HERE}"}
    other = await door.log_in()
    answer = await door.ask("POST", "/session/logout", {"Cookie": cookie, **own})
    assert answer.status == 204
    assert "Max-Age=0" in (answer.header("set-cookie") or "")
    assert (await door.ask("GET", "/jobs", {"Cookie": cookie})).status == 401
    assert (await door.ask("GET", "/jobs", {"Cookie": other})).status == 200
    await asyncio.sleep(timedelta(hours=12).total_seconds() + 1)
    assert (await door.ask("GET", "/jobs", {"Cookie": other})).status == 401


@pytest.mark.parametrize("cookie", ["", "x", "x" * 4_000, '"{}"', "{}; runcomfy_session=other", "{}x"])
async def test_no_other_cookie_is_a_session(door: Any, cookie: str) -> None:
    real = (await door.log_in()).partition("=")[2]
    headers = {"Cookie": f"{COOKIE}={cookie.format(real)}"}
    assert (await door.ask("GET", "/jobs", headers)).status == 401


async def test_only_the_token_gets_another_code(door: Any) -> None:
    cookie = await door.log_in()
    own = {"Cookie": cookie, "Origin": f"http://{HERE}"}
    assert (await door.ask("POST", "/session/code", own)).status == 403
    answer = await door.ask("POST", "/session/code", door.bearer)
    assert answer.header("cache-control") == "no-store"
    assert (await door.ask("GET", answer.json()["path"])).status == 303
