"""Threats S3 to S5 and S14 at the door of the HTTP API: what is refused is refused before anything was done."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI, Request

from launcher.guarding.guard import COOKIE, Guard, token_file
from launcher.guarding.middleware import CHUNK_TIMEOUT_S
from launcher.guarding.sessions import CODE_LIFE
from launcher.routes import session
from runcomfy.adapters.log import redact
from runcomfy.domain.exceptions import CredentialsMalformed, TooManyRequests
from runcomfy.domain.settings import HttpSettings
from runcomfy.testing.clock import LoopClock

HERE = "127.0.0.1:8000"
EVERYWHERE = "0.0.0.0"  # noqa: S104 - nothing is bound


@dataclass(frozen=True)
class Answered:
    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def header(self, name: str) -> str | None:
        found = [value for key, value in self.headers if key == name.lower()]
        return found[0] if found else None

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Guarded:
    """A guarded application whose every route tells what it did."""

    guard: Guard
    web: FastAPI
    done: list[str] = field(default_factory=list)
    scopes: list[Mapping[str, Any]] = field(default_factory=list)

    @property
    def bearer(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.guard.token.reveal()}"}

    async def ask(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str] | Iterable[tuple[str, str]] = (),
        *,
        host: str | None = HERE,
        body: Any = None,
        chunks: Iterable[bytes] | None = None,
        silent: bool = False,
        peer: str = "127.0.0.1",
        server: tuple[str, int] = ("127.0.0.1", 8000),
        scheme: str = "http",
    ) -> Answered:
        """Send one request as a server would hand it on. `silent`: the body never comes."""
        given = list(headers.items() if isinstance(headers, Mapping) else headers)
        if host is not None:
            given.append(("Host", host))
        parts = list(chunks) if chunks is not None else []
        if body is not None:
            parts = [body if isinstance(body, bytes) else json.dumps(body).encode()]
            names = {name.lower() for name, _ in given}
            if "content-length" not in names:
                given.append(("Content-Length", str(len(parts[0]))))
            if "content-type" not in names:
                given.append(("Content-Type", "application/json"))
        target, _, query = path.partition("?")
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": scheme,
            "path": target,
            "raw_path": target.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in given],
            "server": server,
            "client": (peer, 55_555),
        }
        self.scopes.append(scope)
        waiting = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
        if waiting:
            waiting[-1]["more_body"] = False
        elif not silent:
            waiting = [{"type": "http.request", "body": b"", "more_body": False}]
        sent: list[Any] = []

        async def receive() -> Any:
            if waiting:
                return waiting.pop(0)
            if silent:
                await asyncio.Event().wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        await self.web(scope, receive, send)
        start = [message for message in sent if message["type"] == "http.response.start"]
        assert len(start) == 1, "a request has one answer"
        found = tuple((key.decode("latin-1").lower(), value.decode("latin-1")) for key, value in start[0]["headers"])
        return Answered(start[0]["status"], found, b"".join(message.get("body", b"") for message in sent[1:]))

    async def log_in(self) -> str:
        """Return the cookie of a new session."""
        answer = await self.ask("GET", f"/?code={self.guard.new_code()}")
        assert answer.status == 303
        cookie = answer.header("set-cookie")
        assert cookie is not None
        return cookie.partition(";")[0]


def guarded(folder: Path, http: HttpSettings | None = None, *, bound_host: str = "127.0.0.1") -> Guarded:
    guard = Guard.open(folder, http or HttpSettings(), bound_host=bound_host, clock=LoopClock())
    web = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    web.state.backend = SimpleNamespace(guard=guard)
    found = Guarded(guard, web)
    web.include_router(session.router)

    @web.get("/broken")
    async def broken() -> None:
        raise RuntimeError("a defect")

    @web.api_route("/{path:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE"])
    async def anything(request: Request, path: str) -> dict[str, str]:
        await request.body()
        found.done.append(f"{request.method} /{path}")
        return {"who": guard.principal_of(request).kind}

    guard.install(web)
    return found


@pytest.fixture
def api(tmp_path: Path) -> Guarded:
    """An application on loopback, with everything as it is when nothing is set."""
    return guarded(tmp_path / "state")


CONJURES = [
    ("GET", "/health"),
    ("GET", "/mode"),
    ("GET", "/state"),
    ("GET", "/workflow/progress"),
    ("GET", "/workflow/progress/8a1f"),
    ("POST", "/shutdown"),
    ("POST", "/flux/generate"),
    ("POST", "/flux/depth"),
    ("POST", "/partpacker/generate_3d"),
    ("POST", "/serverless/flux_mesh_unified"),
    ("POST", "/local_comfyui/flux_mesh_unified"),
    ("POST", "/blender/render_gesture_camera"),
    ("POST", "/blender/import_mesh"),
    ("POST", "/state/update"),
    ("POST", "/state/set/mode"),
    ("POST", "/process_conversation"),
    ("POST", "/execute_instruction"),
]
OTHERS = [
    ("POST", "/jobs"),
    ("GET", "/jobs"),
    ("GET", "/jobs/1"),
    ("DELETE", "/jobs/1"),
    ("PATCH", "/jobs/1"),
    ("GET", "/jobs/1/outputs/0"),
    ("GET", "/jobs/1/events"),
    ("GET", "/events"),
    ("POST", "/uploads"),
    ("GET", "/machines"),
    ("POST", "/machines/m/stop"),
    ("GET", "/costs"),
    ("POST", "/costs/estimate"),
    ("POST", "/presence"),
    ("POST", "/queue/pause"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
    ("GET", "/session"),
    ("POST", "/session/code"),
    ("POST", "/session/logout"),
    ("GET", "/nothing-of-ours"),
    ("GET", "/assets"),
    ("GET", "/health/more"),
    ("POST", "/health"),
    ("PUT", "/flux/generate"),
    ("POST", "/state/set/a/b"),
    ("GET", "//state"),
    ("POST", "/"),
]


def asked(method: str, body: Any = None) -> dict[str, Any]:
    return {} if method == "GET" else {"body": {} if body is None else body}


# --- who ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path"), OTHERS)
async def test_without_token_nothing_of_ours_answers(api: Guarded, method: str, path: str) -> None:
    answer = await api.ask(method, path, **asked(method))
    assert answer.status == 401
    assert answer.header("www-authenticate") == "Bearer"
    assert answer.json()["error"]["code"] == "token-missing"
    assert api.done == []


@pytest.mark.parametrize(("method", "path"), OTHERS)
async def test_the_token_opens_everything(api: Guarded, method: str, path: str) -> None:
    answer = await api.ask(method, path, api.bearer, **asked(method))
    assert answer.status in (200, 204)


@pytest.mark.parametrize(
    "authorization",
    ["Bearer", "Bearer ", "Bearer wrong", "Basic {}", "bearer  x {}", "{}", "Token {}", "Bearer {}x", "Bearer \xff"],
)
async def test_a_wrong_token_is_refused_even_where_none_is_needed(api: Guarded, authorization: str) -> None:
    headers = {"Authorization": authorization.format(api.guard.token.reveal())}
    for path in ("/", "/health", "/jobs"):
        answer = await api.ask("GET", path, headers)
        assert answer.status == 401
    assert api.done == []


async def test_two_tokens_are_none(api: Guarded) -> None:
    twice = [*api.bearer.items(), *api.bearer.items()]
    assert (await api.ask("GET", "/jobs", twice)).status == 401


async def test_a_token_in_the_address_or_body_or_cookie_opens_nothing(api: Guarded) -> None:
    token = api.guard.token.reveal()
    for path in (f"/jobs?token={token}", f"/jobs?access_token={token}", f"/?code={token}"):
        assert (await api.ask("GET", path)).status in (401, 403)
    assert (await api.ask("POST", "/jobs", body={"token": token})).status == 401
    assert (await api.ask("GET", "/jobs", {"Cookie": f"{COOKIE}={token}"})).status == 401
    assert api.done == []


@pytest.mark.parametrize(("method", "path"), CONJURES)
async def test_conjures_own_endpoints_answer_its_programs(api: Guarded, method: str, path: str) -> None:
    answer = await api.ask(method, path, **asked(method))
    assert (answer.status, answer.json()) == (200, {"who": "conjure"})
    if method == "POST":  # `requests.post(url)`, and aiohttp's
        assert (await api.ask(method, path, {"Content-Length": "0"})).status == 200
        octets = {"Content-Length": "0", "Content-Type": "application/octet-stream"}
        assert (await api.ask(method, path, octets)).status == 200


@pytest.mark.parametrize(("method", "path"), CONJURES)
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
async def test_conjures_endpoints_answer_nobody_else(
    api: Guarded, method: str, path: str, options: dict[str, Any], status: int
) -> None:
    assert (await api.ask(method, path, **asked(method), **options)).status == status
    assert api.done == []


async def test_a_link_that_a_person_follows_does_not_make_them_conjure(api: Guarded) -> None:
    followed = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert (await api.ask("GET", "/state", followed)).status == 401
    assert (await api.ask("GET", "/", followed)).status == 200, "but they may open the page"
    posted = await api.ask("POST", "/shutdown", {**followed, "Origin": "http://evil.example"}, body={})
    assert posted.status == 403


@pytest.mark.parametrize(("method", "path"), CONJURES)
async def test_a_setting_closes_conjures_endpoints(tmp_path: Path, method: str, path: str) -> None:
    api = guarded(tmp_path / "state", HttpSettings(conjure_open=False))
    assert (await api.ask(method, path, **asked(method))).status == 401
    assert api.done == []
    assert (await api.ask(method, path, api.bearer, **asked(method))).status == 200


@pytest.mark.parametrize(("method", "path"), [*CONJURES, *OTHERS])
@pytest.mark.parametrize("bound_host", [EVERYWHERE, "192.168.1.5", "::", "box.example"])
async def test_bound_elsewhere_everything_needs_the_token(
    tmp_path: Path, bound_host: str, method: str, path: str
) -> None:
    api = guarded(tmp_path / "state", bound_host=bound_host)
    assert bound_host in api.guard.announcement()
    from_outside: dict[str, Any] = {"server": ("192.168.1.5", 8000), "peer": "192.168.1.7"}
    assert (await api.ask(method, path, **asked(method), host="192.168.1.5:8000", **from_outside)).status == 401
    assert (await api.ask(method, path, **asked(method))).status == 401
    assert api.done == []


def test_on_loopback_there_is_nothing_to_announce(api: Guarded) -> None:
    assert api.guard.announcement() == ""


# --- from where ---------------------------------------------------------------------------------------------

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
async def test_a_foreign_host_is_refused_whatever_else_is_right(api: Guarded, host: str) -> None:
    cookie = await api.log_in()
    for headers in (api.bearer, {"Cookie": cookie}, {}):
        for method, path in (("GET", "/"), ("GET", "/jobs"), ("POST", "/jobs"), ("POST", "/shutdown")):
            answer = await api.ask(method, path, headers, host=host, **asked(method))
            assert answer.status in (400, 403)
    assert api.done == []


async def test_no_host_and_two_hosts_are_refused(api: Guarded) -> None:
    assert (await api.ask("GET", "/jobs", api.bearer, host=None)).status == 400
    assert (await api.ask("GET", "/jobs", [*api.bearer.items(), ("Host", HERE)])).status == 400


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:8000", "LOCALHOST:8000", "[::1]:8000", "127.0.0.2:8000"])
async def test_loopbacks_own_names_are_let_in(api: Guarded, host: str) -> None:
    assert (await api.ask("GET", "/jobs", api.bearer, host=host)).status == 200


async def test_a_name_that_was_allowed_is_let_in_also_behind_a_proxy_with_tls(tmp_path: Path) -> None:
    api = guarded(tmp_path / "state", HttpSettings(allowed_hosts=("studio.example",)))
    for host in ("studio.example", "studio.example:443", "studio.example:8000"):
        assert (await api.ask("GET", "/jobs", api.bearer, host=host)).status == 200
    origin = {**api.bearer, "Origin": "https://studio.example"}
    assert (await api.ask("POST", "/jobs", origin, host="studio.example", body={})).status == 200
    assert (await api.ask("POST", "/jobs", origin, host="studio.example:8443", body={})).status == 403
    assert (await api.ask("GET", "/jobs", api.bearer, host="x.studio.example")).status == 403


async def test_bound_to_an_address_that_address_is_let_in(tmp_path: Path) -> None:
    api = guarded(tmp_path / "state", bound_host=EVERYWHERE)
    here: dict[str, Any] = {"server": ("192.168.1.5", 8000), "peer": "192.168.1.7"}
    assert (await api.ask("GET", "/jobs", api.bearer, host="192.168.1.5:8000", **here)).status == 200
    assert (await api.ask("GET", "/jobs", api.bearer, host="192.168.1.6:8000", **here)).status == 403
    assert (await api.ask("GET", "/jobs", api.bearer, host="rebound.example:8000", **here)).status == 403


@pytest.mark.parametrize("origin", BAD_ORIGINS)
async def test_a_foreign_origin_is_refused_whatever_else_is_right(api: Guarded, origin: str) -> None:
    cookie = await api.log_in()
    for headers in (api.bearer, {"Cookie": cookie}, {}):
        for method, path in (("GET", "/jobs"), ("POST", "/jobs"), ("POST", "/flux/generate"), ("GET", "/")):
            answer = await api.ask(method, path, {**headers, "Origin": origin}, **asked(method))
            assert answer.status == 403
            assert answer.header("access-control-allow-origin") is None
    assert api.done == []


async def test_no_preflight_succeeds(api: Guarded) -> None:
    wish = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    for origin in ("http://evil.example", "null", f"http://{HERE}"):
        for headers in ({}, api.bearer):
            answer = await api.ask("OPTIONS", "/jobs", {**headers, **wish, "Origin": origin})
            assert answer.status == 403
            assert not [name for name, _ in answer.headers if name.startswith("access-control-")]


async def test_there_are_no_web_sockets(api: Guarded) -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/events", "headers": [(b"host", HERE.encode())], "query_string": b""}
    await api.web(scope, receive, send)
    assert [message["type"] for message in sent] == ["websocket.close"]


# --- as what ------------------------------------------------------------------------------------------------


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
async def test_what_changes_state_is_json_or_multipart(api: Guarded, kind: str) -> None:
    cookie, own = await api.log_in(), {"Origin": f"http://{HERE}"}
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        for headers in (api.bearer, {"Cookie": cookie, **own}):
            answer = await api.ask(method, "/jobs", {**headers, "Content-Type": kind}, body=b'{"a": 1}')
            assert answer.status == 415
    for _, path in CONJURES[5:]:
        assert (await api.ask("POST", path, {"Content-Type": kind}, body=b'{"a": 1}')).status in (401, 415)
    assert api.done == []


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", "multipart/form-data; boundary=x"])
async def test_an_empty_form_is_a_form_too(api: Guarded, kind: str) -> None:
    answer = await api.ask("POST", "/shutdown", {"Content-Type": kind, "Content-Length": "0"})
    assert answer.status == 401
    assert api.done == []


async def test_files_need_the_token_also_at_conjures_endpoints(api: Guarded) -> None:
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    assert (await api.ask("POST", "/flux/depth", kind, body=b"--x--")).status == 401
    assert (await api.ask("POST", "/uploads", kind, body=b"--x--")).status == 401
    assert api.done == []
    assert (await api.ask("POST", "/uploads", {**api.bearer, **kind}, body=b"--x--")).status == 200


# --- how much -----------------------------------------------------------------------------------------------


async def test_a_body_that_says_it_is_too_large_is_not_read(api: Guarded) -> None:
    for headers in (api.bearer, {}):
        answer = await api.ask("POST", "/flux/generate", headers, body=b" " * (1024**2 + 1))
        assert answer.status == 413
        assert answer.header("connection") == "close"
    assert api.done == []


async def test_a_body_that_does_not_say_is_counted(api: Guarded) -> None:
    kind = {"Content-Type": "application/json", "Transfer-Encoding": "chunked"}
    chunks = [b" " * 65_536] * 17
    assert (await api.ask("POST", "/flux/generate", kind, chunks=chunks)).status == 413
    assert api.done == []
    assert (await api.ask("POST", "/flux/generate", kind, chunks=chunks[:16])).status == 200


async def test_a_body_that_lies_about_its_length_is_counted_too(api: Guarded) -> None:
    kind = {"Content-Type": "application/json", "Content-Length": "10"}
    assert (await api.ask("POST", "/flux/generate", kind, chunks=[b" " * 1024**2, b" "])).status == 413
    for length in ("-1", "1e9", "ten", "١٢"):
        with_length = [*api.bearer.items(), ("Content-Type", "application/json")]
        header = ("Content-Length", length.encode().decode("latin-1"))
        assert (await api.ask("POST", "/jobs", [*with_length, header])).status == 400
    assert api.done == []


async def test_files_and_pictures_in_json_may_be_as_large_as_set(tmp_path: Path) -> None:
    api = guarded(tmp_path / "state", HttpSettings(max_body_bytes=1_000, max_upload_bytes=30_000))
    multipart = {**api.bearer, "Content-Type": "multipart/form-data; boundary=x"}
    assert (await api.ask("POST", "/uploads", multipart, body=b" " * 121_000)).status == 200
    assert (await api.ask("POST", "/uploads", multipart, body=b" " * 121_001)).status == 413
    assert (await api.ask("POST", "/jobs", api.bearer, body=b" " * 41_000)).status == 200
    assert (await api.ask("POST", "/jobs", api.bearer, body=b" " * 41_001)).status == 413
    assert (await api.ask("POST", "/presence", api.bearer, body=b" " * 1_001)).status == 413


async def test_a_body_that_never_comes_is_not_waited_for(api: Guarded) -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    kind = {"Content-Type": "application/json", "Content-Length": "10"}
    assert (await api.ask("POST", "/flux/generate", kind, silent=True)).status == 408
    assert loop.time() - began == pytest.approx(CHUNK_TIMEOUT_S, abs=1)
    assert api.done == []


async def test_a_head_that_is_too_large_is_refused(api: Guarded) -> None:
    many = [(f"X-{n}", "1") for n in range(101)]
    assert (await api.ask("GET", "/health", many)).status == 431
    assert (await api.ask("GET", "/health", {"X": "1" * 33_000})).status == 431
    assert (await api.ask("GET", "/health?" + "a" * 9_000)).status == 414
    assert api.done == []


async def test_a_client_that_floods_is_stopped_at_the_cap_and_let_in_again_later(tmp_path: Path) -> None:
    guard = guarded(tmp_path / "state", HttpSettings(max_per_minute=10, max_waiting=50)).guard
    token, page = guard.principal("token"), guard.principal("session")
    for put_in in range(10):
        guard.admit_jobs(token, 1, waiting=put_in)
    for _ in range(100):
        with pytest.raises(TooManyRequests) as caught:
            guard.admit_jobs(token, 1, waiting=10)
        assert 0 < caught.value.details["retry_after_s"] <= 6
    guard.admit_jobs(page, 10)  # another client is not kept waiting by this one
    with pytest.raises(TooManyRequests):
        guard.admit_jobs(token, 1)
    await asyncio.sleep(6.1)
    guard.admit_jobs(token, 1)
    with pytest.raises(TooManyRequests):
        guard.admit_jobs(token, 1)
    await asyncio.sleep(3600)
    with pytest.raises(TooManyRequests, match="at most 50"):
        guard.admit_jobs(token, 1, waiting=50)
    with pytest.raises(TooManyRequests):
        guard.admit_jobs(token, 11)
    guard.admit_jobs(token, 10)  # what was refused was not counted


# --- the page's session -------------------------------------------------------------------------------------


async def test_a_code_is_traded_for_a_session_and_leaves_the_address(api: Guarded) -> None:
    code = api.guard.new_code()
    answer = await api.ask("GET", f"/?code={code}")
    assert (answer.status, answer.header("location")) == (303, "/")
    cookie = answer.header("set-cookie") or ""
    name, *attributes = cookie.split("; ")
    assert name.startswith(f"{COOKIE}=")
    assert attributes == ["Max-Age=43200", "Path=/", "HttpOnly", "SameSite=Strict"]
    assert code not in str(answer.headers)
    assert len(name.partition("=")[2]) >= 43, "256 bits"
    assert answer.header("referrer-policy") == "no-referrer"
    assert api.scopes[-1]["query_string"] == b"", "so that no access log can show it"
    assert (await api.ask("GET", "/session", {"Cookie": name})).json()["kind"] == "session"


async def test_over_tls_the_cookie_stays_there(tmp_path: Path) -> None:
    api = guarded(tmp_path / "state", HttpSettings(allowed_hosts=("studio.example",)))
    answer = await api.ask("GET", f"/?code={api.guard.new_code()}", host="studio.example", scheme="https")
    assert (answer.header("set-cookie") or "").endswith("; Secure")


async def test_a_code_works_once_and_not_for_long(api: Guarded) -> None:
    code = api.guard.new_code()
    assert (await api.ask("GET", f"/?code={code}")).status == 303
    for used in (code, "", "wrong", code + "x", code[:-1]):
        answer = await api.ask("GET", f"/?code={used}")
        assert answer.status == 403
        assert answer.header("set-cookie") is None
        assert code.encode() not in answer.body
    late = api.guard.new_code()
    await asyncio.sleep(CODE_LIFE.total_seconds() + 1)
    assert (await api.ask("GET", f"/?code={late}")).status == 403
    assert api.done == []


async def test_looking_at_a_link_does_not_use_it_up(api: Guarded) -> None:
    code = api.guard.new_code()
    assert (await api.ask("HEAD", f"/?code={code}")).status != 303
    assert (await api.ask("GET", f"/?code={code}", host="evil.example")).status == 403
    assert (await api.ask("GET", f"/?code={code}")).status == 303


async def test_who_is_logged_in_may_open_an_old_address(api: Guarded) -> None:
    cookie = await api.log_in()
    answer = await api.ask("GET", "/?code=used", {"Cookie": cookie})
    assert (answer.status, answer.header("set-cookie")) == (303, None)


async def test_guessing_codes_is_slow(api: Guarded) -> None:
    statuses = [(await api.ask("GET", f"/?code=guess{n}")).status for n in range(30)]
    assert statuses == [403] * 20 + [429] * 10


async def test_a_session_changes_something_only_from_its_own_page(api: Guarded) -> None:
    cookie = {"Cookie": await api.log_in()}
    for method in ("POST", "PATCH", "DELETE", "PUT"):
        assert (await api.ask(method, "/jobs/1", cookie, body={})).status == 403
    assert api.done == []
    for proof in ({"Origin": f"http://{HERE}"}, {"Sec-Fetch-Site": "same-origin"}):
        assert (await api.ask("POST", "/jobs", {**cookie, **proof}, body={})).json() == {"who": "session"}
    assert (await api.ask("GET", "/jobs", cookie)).status == 200


async def test_a_session_ends_by_itself_and_by_logging_out(api: Guarded) -> None:
    cookie, own = await api.log_in(), {"Origin": f"http://{HERE}"}
    other = await api.log_in()
    answer = await api.ask("POST", "/session/logout", {"Cookie": cookie, **own})
    assert answer.status == 204
    assert "Max-Age=0" in (answer.header("set-cookie") or "")
    assert (await api.ask("GET", "/jobs", {"Cookie": cookie})).status == 401
    assert (await api.ask("GET", "/jobs", {"Cookie": other})).status == 200
    await asyncio.sleep(timedelta(hours=12).total_seconds() + 1)
    assert (await api.ask("GET", "/jobs", {"Cookie": other})).status == 401


@pytest.mark.parametrize("cookie", ["", "x", "x" * 4_000, '"{}"', "{}; runcomfy_session=other", "{}x"])
async def test_no_other_cookie_is_a_session(api: Guarded, cookie: str) -> None:
    real = (await api.log_in()).partition("=")[2]
    headers = {"Cookie": f"{COOKIE}={cookie.format(real)}"}
    assert (await api.ask("GET", "/jobs", headers)).status == 401


async def test_only_the_token_gets_another_code(api: Guarded) -> None:
    cookie = await api.log_in()
    own = {"Cookie": cookie, "Origin": f"http://{HERE}"}
    assert (await api.ask("POST", "/session/code", own)).status == 403
    answer = await api.ask("POST", "/session/code", api.bearer)
    assert answer.header("cache-control") == "no-store"
    assert (await api.ask("GET", answer.json()["path"])).status == 303


# --- what an answer carries ---------------------------------------------------------------------------------


async def test_every_answer_is_sealed(api: Guarded) -> None:
    requests: list[tuple[str, str, dict[str, str]]] = [
        ("GET", "/", {}),
        ("GET", "/jobs", {}),
        ("GET", "/jobs", api.bearer),
        ("GET", "/?code=wrong", {}),
        ("POST", "/jobs", {**api.bearer, "Origin": "null"}),
        ("GET", "/assets/page.js", {}),
    ]
    for method, path, headers in requests:
        answer = await api.ask(method, path, headers)
        assert answer.header("x-frame-options") == "DENY"
        assert answer.header("x-content-type-options") == "nosniff"
        assert answer.header("referrer-policy") == "no-referrer"
        assert answer.header("cross-origin-resource-policy") == "same-origin"
        policy = answer.header("content-security-policy") or ""
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe-" not in policy
        assert ("sandbox" in policy) == (path not in ("/", "/assets/page.js") and "code" not in path)
        assert answer.header("cache-control") == ("no-store" if "sandbox" in policy else "no-cache")


async def test_an_answer_to_a_defect_is_sealed_too(api: Guarded) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    with pytest.raises(RuntimeError):
        await api.ask("GET", "/broken", api.bearer)
    scope = api.scopes[-1]

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    with pytest.raises(RuntimeError):
        await api.web(dict(scope), receive, send)
    assert sent[0]["status"] == 500
    assert (b"x-frame-options", b"DENY") in sent[0]["headers"]
    assert b"a defect" not in sent[1]["body"]


# --- the token's file ---------------------------------------------------------------------------------------


@pytest.fixture
def _open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions")
@pytest.mark.usefixtures("_open_umask")
def test_what_the_guard_writes_is_private_whatever_the_umask(tmp_path: Path) -> None:
    guarded(tmp_path / "made" / "state")
    found = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "made").rglob("*")}
    assert {mode for path, mode in found.items() if path.is_file()} == {0o600}
    assert {mode for path, mode in found.items() if path.is_dir()} == {0o700}
    assert [path.name for path in found if path.is_file()] == ["http_token"]


def test_the_token_stays_the_same_and_every_folder_has_its_own(tmp_path: Path) -> None:
    first, again = guarded(tmp_path / "a").guard, guarded(tmp_path / "a").guard
    assert first.token == again.token
    assert guarded(tmp_path / "b").guard.token != first.token
    assert len(first.token.reveal()) == 43


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions")
@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o666])
def test_a_token_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    token = guarded(tmp_path).guard.token.reveal()
    token_file(tmp_path).chmod(mode)
    with pytest.raises(CredentialsMalformed, match="others can read") as caught:
        guarded(tmp_path)
    assert "remove" in caught.value.hint
    assert token not in str(caught.value.as_dict())
    token_file(tmp_path).unlink()
    assert guarded(tmp_path).guard.token.reveal() != token


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights on Windows")
def test_a_link_that_was_planted_is_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("a" * 43)
    elsewhere.chmod(0o600)
    for target in (elsewhere, tmp_path / "nowhere"):
        (tmp_path / "state").mkdir(exist_ok=True)
        token_file(tmp_path / "state").symlink_to(target)
        with pytest.raises(CredentialsMalformed, match="not an ordinary file"):
            guarded(tmp_path / "state")
        token_file(tmp_path / "state").unlink()
    assert not (tmp_path / "nowhere").exists()
    assert elsewhere.read_text() == "a" * 43


@pytest.mark.parametrize("text", ["", "short", "two words " * 8, "\x00" * 50, "é" * 50])
def test_a_file_that_holds_no_token_is_refused(tmp_path: Path, text: str) -> None:
    tmp_path.joinpath("state").mkdir()
    path = token_file(tmp_path / "state")
    path.write_text(text, encoding="utf-8")
    path.chmod(0o600)
    with pytest.raises(CredentialsMalformed, match="unreadable"):
        guarded(tmp_path / "state")


async def test_secrets_show_nowhere(api: Guarded, caplog: pytest.LogCaptureFixture) -> None:
    code, cookie = api.guard.new_code(), (await api.log_in()).partition("=")[2]
    token = api.guard.token.reveal()
    with caplog.at_level(logging.DEBUG):
        answers = [
            await api.ask("GET", f"/?code={code}x"),
            await api.ask("GET", "/jobs", {"Authorization": f"Bearer {token}x"}),
            await api.ask("GET", "/jobs", {"Cookie": f"{COOKIE}={cookie}x"}),
            await api.ask("POST", "/jobs", api.bearer, body=b"{", chunks=None),
        ]
    shown = repr(api.guard) + repr(vars(api.guard)) + caplog.text + "".join(map(repr, answers))
    for secret in (token, code, cookie):
        assert secret not in shown
    assert redact(f"a line with {token} and {code}") == "a line with *** and ***"
