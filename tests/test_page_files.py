"""The page's files over HTTP: to everybody, as they were built, kept by browsers as long as they are right."""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from launcher.web_app import ROUTERS
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.web import Web, serving_web

BUILT = Path(__file__).parents[1] / "launcher" / "dashboard"


async def test_the_page_is_given_to_everybody_and_asked_for_each_time(api: Web) -> None:
    answer = await api.get("/", token=False)
    assert answer.status == 200
    assert answer.body == await asyncio.to_thread((BUILT / "index.html").read_bytes)
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert answer.headers["Cache-Control"] == "no-cache"
    again = await api.get("/", token=False, headers={"If-None-Match": answer.headers["ETag"]})
    assert (again.status, again.body) == (304, b"")
    assert (await api.get("/", token=False, headers={"If-None-Match": '"another"'})).status == 200


async def test_what_the_page_names_is_there_and_is_kept_for_ever(api: Web) -> None:
    html = (await api.get("/", token=False)).body.decode()
    kinds = {"js": "text/javascript; charset=utf-8", "css": "text/css; charset=utf-8", "svg": "image/svg+xml"}
    named = re.findall(r'(?:src|href)="(/assets/[^"]*)"', html)
    assert {path.rpartition(".")[2] for path in named} == set(kinds)
    for path in named:
        answer = await api.get(path, token=False)
        assert answer.status == 200
        assert answer.headers["Content-Type"] == kinds[path.rpartition(".")[2]]
        assert "immutable" in answer.headers["Cache-Control"]
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        head = await api.ask("HEAD", path, token=False)
        assert (head.status, head.body) == (200, b"")
        assert int(head.headers["Content-Length"]) == len(answer.body)


@pytest.mark.threat("S10")
async def test_the_page_may_load_nothing_from_elsewhere(api: Web) -> None:
    policy = (await api.get("/", token=False)).headers["Content-Security-Policy"]
    rules = {name: rest.split() for name, _, rest in (part.strip().partition(" ") for part in policy.split(";"))}
    assert rules["default-src"] in (["'none'"], ["'self'"])
    own = {"'self'", "'none'"}
    # What a person drops, and the pictures inside a mesh, are shown under addresses of these kinds; nothing runs there.
    assert set(rules.pop("img-src")) == {"'self'", "blob:", "data:"}
    assert {source for sources in rules.values() for source in sources} <= own
    for name in ("frame-ancestors", "base-uri", "form-action"):
        assert rules[name] == ["'none'"], "these do not fall back to default-src"


@pytest.mark.parametrize(
    "path",
    [
        "/assets/../index.html",
        "/assets/..%2findex.html",
        "/assets/%2e%2e/sources.sha256",
        "/assets/..%5c..%5cpart.py",
        "/assets/sources.sha256",
        "/assets//etc/passwd",
        "/assets/%00",
        "/assets/",
    ],
)
@pytest.mark.threat("S1")
async def test_no_address_reaches_another_file(api: Web, path: str) -> None:
    from yarl import URL

    async with api.http.get(URL(api.address + path, encoded=True), allow_redirects=False) as answer:
        body = await answer.read()
        assert answer.status in (307, 401, 404), body
        assert b"import" not in body
        assert b"root:" not in body


async def test_jobs_that_wait_are_listed_as_they_will_be_begun(tmp_path: Path, clock: LoopClock) -> None:
    async with serving_web(tmp_path, clock) as api:
        graph = {"1": {"class_type": "SaveImage", "inputs": {"filename_prefix": "x"}}}
        made: list[Any] = [(await api.post("/jobs", {"workflow": graph, "priority": n})).json for n in (50, 30, 50, 10)]
        first = await api.ask("PATCH", f"/jobs/{made[2]['id']}", json={"first": True})
        assert first.status == 200
        listed = (await api.get("/jobs?order=queue")).json
        assert [job["number"] for job in listed["jobs"]] == [made[n]["number"] for n in (2, 3, 1, 0)]
        assert listed["next"] is None
        assert len((await api.get("/jobs?order=queue&limit=2")).json["jobs"]) == 2
        newest = (await api.get("/jobs?status=pending")).json["jobs"]
        assert [job["number"] for job in newest] == [job["number"] for job in reversed(made)]


# -- where answers are made ----------------------------------------------------------------------------------


def test_every_answer_is_made_in_the_loop() -> None:
    """FastAPI runs plain functions in threads of its own: slower than the request, and unseen by virtual time."""

    def calls(dependant: Dependant) -> Iterator[Any]:
        yield dependant.call
        for inner in dependant.dependencies:
            yield from calls(inner)

    routes = [route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)]
    assert len(routes) > 30
    found = [(route.path, call) for route in routes for call in calls(route.dependant)]
    assert [(path, call) for path, call in found if not inspect.iscoroutinefunction(call)] == []
