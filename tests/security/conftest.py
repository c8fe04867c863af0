"""A guarded application whose every route tells what it did; what CONJURE asks for, and what is no business of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI, Request

from launcher.guarding.guard import Guard
from launcher.routes import session
from runcomfy.domain.settings import HttpSettings
from runcomfy.testing.clock import LoopClock

HERE = "127.0.0.1:8000"
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


def _told_of_its_body(headers: list[tuple[str, str]], length: int) -> list[tuple[str, str]]:
    """Add what a client says of a JSON body, unless the headers say otherwise."""
    names = {name.lower() for name, _ in headers}
    said = {"Content-Length": str(length), "Content-Type": "application/json"}
    return [*headers, *((name, value) for name, value in said.items() if name.lower() not in names)]


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
            given = _told_of_its_body(given, len(parts[0]))
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


def _guarded(folder: Path, http: HttpSettings | None = None, *, bound_host: str = "127.0.0.1") -> Guarded:
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
def guarded() -> Callable[..., Guarded]:
    """`guarded(folder, HttpSettings(…), bound_host=…)`: another application."""
    return _guarded


@pytest.fixture
def door(tmp_path: Path) -> Guarded:
    """An application on loopback, with everything as it is when nothing is set."""
    return _guarded(tmp_path / "state")


@pytest.fixture
def conjures() -> list[tuple[str, str]]:
    """What CONJURE asks for."""
    return CONJURES


@pytest.fixture
def others() -> list[tuple[str, str]]:
    """What is none of CONJURE's."""
    return OTHERS
