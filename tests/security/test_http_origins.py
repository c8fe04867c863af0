"""Threat S5 at the door of the HTTP API: foreign names and pages, and what they can make a browser send."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runcomfy.domain.settings import HttpSettings

HERE = "127.0.0.1:8000"
Paths = list[tuple[str, str]]


def asked(method: str, body: Any = None) -> dict[str, Any]:
    return {} if method == "GET" else {"body": {} if body is None else body}


FOREIGN_HOSTS = [
    "evil.example",
    "evil.example:8000",
    "127.0.0.1:8001",
    "127.0.0.1",
    "localhost:80",
    "127.0.0.1.evil.example:8000",
    "localhost.evil.example:8000",
    "127.0.0.1:8000@evil.example",
    "user@127.0.0.1:8000",
    "2130706433:8000",
    "0x7f.1:8000",
    "127.1:8000",
    "0.0.0.0:8000",
    "[::ffff:127.0.0.1]:8000",
    "192.168.1.5:8000",
    "127.0.0.1:8000, evil.example",
    "",
    "127.0.0.1:8000/",
    "127.0.0.1:port",
]
BAD_ORIGINS = [
    "null",
    "",
    "http://evil.example",
    "https://127.0.0.1:8000",
    "http://127.0.0.1",
    "http://127.0.0.1:8001",
    "http://localhost:8000",
    "http://127.0.0.1:8000.evil.example",
    "http://127.0.0.1:8000@evil.example",
    "file://",
    "chrome-extension://abc",
    "http://[::1",
    "127.0.0.1:8000",
]


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
@pytest.mark.threat("S5")
async def test_a_foreign_host_is_refused_whatever_else_is_right(door: Any, host: str) -> None:
    cookie = await door.log_in()
    for headers in (door.bearer, {"Cookie": cookie}, {}):
        for method, path in (("GET", "/"), ("GET", "/jobs"), ("POST", "/jobs"), ("POST", "/shutdown")):
            answer = await door.ask(method, path, headers, host=host, **asked(method))
            assert answer.status in (400, 403)
    assert door.done == []


async def test_no_host_and_two_hosts_are_refused(door: Any) -> None:
    assert (await door.ask("GET", "/jobs", door.bearer, host=None)).status == 400
    assert (await door.ask("GET", "/jobs", [*door.bearer.items(), ("Host", HERE)])).status == 400


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:8000", "LOCALHOST:8000", "[::1]:8000", "127.0.0.2:8000"])
async def test_loopbacks_own_names_are_let_in(door: Any, host: str) -> None:
    assert (await door.ask("GET", "/jobs", door.bearer, host=host)).status == 200


async def test_a_name_that_was_allowed_is_let_in_also_behind_a_proxy_with_tls(guarded: Any, tmp_path: Path) -> None:
    door = guarded(tmp_path / "state", HttpSettings(allowed_hosts=("studio.example",)))
    for host in ("studio.example", "studio.example:443", "studio.example:8000"):
        assert (await door.ask("GET", "/jobs", door.bearer, host=host)).status == 200
    origin = {**door.bearer, "Origin": "https://studio.example"}
    assert (await door.ask("POST", "/jobs", origin, host="studio.example", body={})).status == 200
    assert (await door.ask("POST", "/jobs", origin, host="studio.example:8443", body={})).status == 403
    assert (await door.ask("GET", "/jobs", door.bearer, host="x.studio.example")).status == 403


async def test_bound_to_an_address_that_address_is_let_in(guarded: Any, tmp_path: Path) -> None:
    door = guarded(tmp_path / "state", bound_host="0.0.0.0")  # noqa: S104 - nothing is bound
    here: dict[str, Any] = {"server": ("192.168.1.5", 8000), "peer": "192.168.1.7"}
    assert (await door.ask("GET", "/jobs", door.bearer, host="192.168.1.5:8000", **here)).status == 200
    assert (await door.ask("GET", "/jobs", door.bearer, host="192.168.1.6:8000", **here)).status == 403
    assert (await door.ask("GET", "/jobs", door.bearer, host="rebound.example:8000", **here)).status == 403


@pytest.mark.parametrize("origin", BAD_ORIGINS)
@pytest.mark.threat("S5")
async def test_a_foreign_origin_is_refused_whatever_else_is_right(door: Any, origin: str) -> None:
    cookie = await door.log_in()
    for headers in (door.bearer, {"Cookie": cookie}, {}):
        for method, path in (("GET", "/jobs"), ("POST", "/jobs"), ("POST", "/flux/generate"), ("GET", "/")):
            answer = await door.ask(method, path, {**headers, "Origin": origin}, **asked(method))
            assert answer.status == 403
            assert answer.header("access-control-allow-origin") is None
    assert door.done == []


@pytest.mark.threat("S5")
async def test_no_preflight_succeeds(door: Any) -> None:
    wish = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    for origin in ("http://evil.example", "null", f"http://{HERE}"):
        for headers in (dict[str, str](), door.bearer):
            answer = await door.ask("OPTIONS", "/jobs", {**headers, **wish, "Origin": origin})
            assert answer.status == 403
            assert not [name for name, _ in answer.headers if name.startswith("access-control-")]


@pytest.mark.threat("S5")
async def test_there_are_no_web_sockets(door: Any) -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/events", "headers": [(b"host", HERE.encode())], "query_string": b""}
    await door.web(scope, receive, send)
    assert [message["type"] for message in sent] == ["websocket.close"]


@pytest.mark.parametrize(
    "kind",
    [
        "application/x-www-form-urlencoded",
        "text/plain",
        "text/plain;charset=UTF-8",
        "TEXT/PLAIN; application/json",
        "text/json",
        "application/octet-stream",
        "application/jsonp",
        "",
    ],
)
@pytest.mark.threat("S5")
async def test_what_changes_state_is_json_or_multipart(door: Any, conjures: Paths, kind: str) -> None:
    cookie, own = await door.log_in(), {"Origin": f"http://{HERE}"}
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        for headers in (door.bearer, {"Cookie": cookie, **own}):
            answer = await door.ask(method, "/jobs", {**headers, "Content-Type": kind}, body=b'{"a": 1}')
            assert answer.status == 415
    for _, path in [each for each in conjures if each[0] == "POST"]:
        assert (await door.ask("POST", path, {"Content-Type": kind}, body=b'{"a": 1}')).status in (401, 415)
    assert door.done == []


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", "multipart/form-data; boundary=x"])
async def test_an_empty_form_is_a_form_too(door: Any, kind: str) -> None:
    answer = await door.ask("POST", "/shutdown", {"Content-Type": kind, "Content-Length": "0"})
    assert answer.status == 401
    assert door.done == []


async def test_files_need_the_token_also_at_conjures_endpoints(door: Any) -> None:
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    assert (await door.ask("POST", "/flux/depth", kind, body=b"--x--")).status == 401
    assert (await door.ask("POST", "/uploads", kind, body=b"--x--")).status == 401
    assert door.done == []
    assert (await door.ask("POST", "/uploads", {**door.bearer, **kind}, body=b"--x--")).status == 200
