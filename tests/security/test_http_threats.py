"""Threats S1, S3 to S5, S10, S13 and S14 against the whole API as `comfyctl serve` runs it."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import stat
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
from yarl import URL

from launcher.guarding.guard import COOKIE
from runcomfy.adapters.log import configure_logging, unconfigure_logging
from runcomfy.testing import samples
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.web import Answer, Web, serving_web

CANARY = "canary-prompt-5f1d"
JSON = "application/json"
DATA = f"data:image/png;base64,{base64.b64encode(samples.png()).decode()}"


def graph(prefix: str = "out", seconds: float = 0.05) -> dict[str, Any]:
    inputs = {"seconds": seconds, "steps": 1, "previews": False, "seed": 1}
    return {
        "1": {"class_type": "EmulatorDelay", "inputs": inputs},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": prefix}},
    }


@pytest.fixture
async def idle(tmp_path: Path, clock: LoopClock) -> AsyncIterator[Web]:
    """An API whose jobs only wait."""
    async with serving_web(tmp_path, clock) as api:
        yield api


async def done(api: Web, body: dict[str, Any]) -> Any:
    made = await api.post("/jobs", body)
    assert made.status == 201, made
    return await api.ended(made.json["id"])


async def state_of(api: Web) -> dict[str, Any]:
    """Everything a request could have changed."""
    jobs = (await api.get("/jobs")).json
    return {
        "jobs": [(job["id"], job["status"], job["priority"]) for job in jobs["jobs"]],
        "paused": (await api.get("/queue")).json["paused"],
        "presence": (await api.get("/presence")).json["signals"],
        "uploads": await asyncio.to_thread(lambda: sorted(str(path) for path in (api.state / "uploads").rglob("*"))),
        "serving": (await api.get("/health")).status,
    }


# --- S5: who is let in --------------------------------------------------------------------------------------

CHANGES: list[tuple[str, str, Any]] = [
    ("POST", "/jobs", {"workflow": graph()}),
    ("DELETE", "/jobs/{job}", None),
    ("PATCH", "/jobs/{job}", {"priority": 1}),
    ("POST", "/jobs/{job}/retry", None),
    ("POST", "/jobs/{job}/again", {}),
    ("POST", "/queue/pause", {}),
    ("POST", "/queue/resume", None),
    ("POST", "/presence", {"event": "opened"}),
    ("POST", "/machines/m/stop", {"confirm": True}),
    ("POST", "/session/code", None),
]
CONJURES_CHANGES: list[tuple[str, str, Any]] = [
    ("POST", "/shutdown", None),
    ("POST", "/flux/generate", {"prompt": "a cat"}),
    ("POST", "/state/set/generation_mode", {"value": "cloud"}),
    ("POST", "/state/update", {"updates": {"a": 1}}),
    ("POST", "/local_comfyui/flux_mesh_unified", None),
]
FORGED: list[tuple[str, dict[str, str]]] = [
    ("foreign host", {"Host": "evil.example"}),
    ("rebound name at our port", {"Host": "evil.example:{port}"}),
    ("origin null", {"Origin": "null"}),
    ("foreign origin", {"Origin": "https://evil.example"}),
    ("another port's page", {"Origin": "http://127.0.0.1:1"}),
    ("cross-site", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}),
    ("same-site", {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"}),
]


async def send(api: Web, method: str, path: str, body: Any, headers: dict[str, str], *, token: bool) -> Answer:
    given = {name: value.format(port=URL(api.address).port) for name, value in headers.items()}
    kind = given.pop("Content-Type", "application/json")
    data = json.dumps(body).encode() if body is not None else None
    return await api.ask(method, path, token=token, data=data, headers={**given, "Content-Type": kind})


@pytest.mark.parametrize(("name", "headers"), FORGED, ids=[name for name, _ in FORGED])
@pytest.mark.threat("S5")
async def test_what_a_foreign_page_sends_changes_nothing(idle: Web, name: str, headers: dict[str, str]) -> None:
    job = (await idle.post("/jobs", {"workflow": graph()})).json["id"]
    before = await state_of(idle)
    for method, path, body in [*CHANGES, *CONJURES_CHANGES]:
        for token in (True, False):
            answer = await send(idle, method, path.format(job=job), body, headers, token=token)
            assert 400 <= answer.status < 500, (name, method, path, answer)
            assert "Access-Control-Allow-Origin" not in answer.headers
    assert await state_of(idle) == before


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", "multipart/form-data; boundary=x"])
@pytest.mark.threat("S5")
async def test_forms_and_texts_change_nothing(idle: Web, kind: str) -> None:
    job = (await idle.post("/jobs", {"workflow": graph()})).json["id"]
    before = await state_of(idle)
    for method, path, body in [*CHANGES, *CONJURES_CHANGES]:
        answer = await send(idle, method, path.format(job=job), body, {"Content-Type": kind}, token=False)
        assert 400 <= answer.status < 500, (method, path, answer)
    if not kind.startswith("multipart"):
        for method, path, body in [*CHANGES, *CONJURES_CHANGES]:
            answer = await send(idle, method, path.format(job=job), body or {}, {"Content-Type": kind}, token=True)
            assert answer.status == 415, (method, path, answer)
    assert await state_of(idle) == before


@pytest.mark.threat("S5")
async def test_without_the_token_or_with_a_wrong_one_nothing_changes(idle: Web) -> None:
    job = (await idle.post("/jobs", {"workflow": graph()})).json["id"]
    before = await state_of(idle)
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Cookie": f"{COOKIE}=wrong"}):
        for method, path, body in CHANGES:
            answer = await send(idle, method, path.format(job=job), body, headers, token=False)
            assert answer.status == 401, (method, path, answer)
        for path in ("/jobs", f"/jobs/{job}", "/events", "/metrics", "/machines", "/costs", "/openapi.json", "/queue"):
            assert (await idle.ask("GET", path, token=False, headers=headers)).status == 401
    assert await state_of(idle) == before


@pytest.mark.threat("S5")
async def test_every_route_there_is_needs_somebody(idle: Web) -> None:
    """A route that is added later is closed, too: the list is the application's own."""
    paths = (await idle.get("/openapi.json")).json["paths"]
    open_ones = set()
    for path, methods in paths.items():
        for method in methods:
            filled = path.replace("{", "").replace("}", "")
            answer = await idle.ask(method.upper(), filled, token=False, headers={"X-Forwarded-For": "8.8.8.8"})
            if answer.status not in (401, 403):
                open_ones.add(path)
    assert open_ones <= {"/", "/assets/{name}"}
    assert len(paths) > 30


@pytest.mark.threat("S5")
async def test_the_page_logs_in_with_its_address_and_only_there(idle: Web) -> None:
    async with aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as browser:
        async with browser.get(idle.page, allow_redirects=False) as answer:
            assert (answer.status, answer.headers["Location"]) == (303, "/")
        async with browser.get(f"{idle.address}/session") as answer:
            assert (await answer.json())["kind"] == "session"
        own = {"Origin": idle.address}
        async with browser.post(f"{idle.address}/jobs", json={"workflow": graph()}, headers=own) as answer:
            assert answer.status == 201
        async with browser.post(f"{idle.address}/jobs", json={"workflow": graph()}) as answer:
            assert answer.status == 403
    again = await idle.ask("GET", URL(idle.page).path_qs, token=False)
    assert again.status == 403
    assert len((await idle.get("/jobs")).json["jobs"]) == 1


# --- S14: floods --------------------------------------------------------------------------------------------


@pytest.mark.threat("S14")
async def test_a_flood_over_conjures_endpoints_stops_at_the_cap(tmp_path: Path, clock: LoopClock) -> None:
    async with serving_web(tmp_path, clock, max_per_minute=5) as api:
        asked = [
            asyncio.create_task(api.ask("POST", "/flux/generate", token=False, json={"prompt": f"cat {n}"}))
            for n in range(40)
        ]
        done_now, waiting = await asyncio.wait(asked, timeout=30)
        refused = [task.result() for task in done_now if task.result().status == 429]
        assert len(refused) >= 35
        assert all(int(answer.headers["Retry-After"]) >= 1 for answer in refused)
        assert len((await api.get("/jobs")).json["jobs"]) <= 5
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


# --- S1: names that lead elsewhere --------------------------------------------------------------------------

ELSEWHERE = [
    "../../http_token",
    "..%2f..%2fhttp_token",
    "%2e%2e/%2e%2e/http_token",
    "..%5c..%5chttp_token",
    "%2fetc%2fpasswd",
    "-1",
    "1",
    "999999999999999999999",
    "0%00",
    "0/../../../http_token",
    "manifest.json",
    "C:%5cx",
    "CON",
    "~",
    "٠",
    "0 ",
    "1e0",
    "x" * 4_000,
]


@pytest.mark.threat("S1")
async def test_no_output_thumbnail_input_or_asset_leads_elsewhere(api: Web) -> None:
    job = await done(api, {"workflow": graph()})
    base = f"{api.address}/jobs/{job['id']}"
    places = [f"{base}/outputs/{{}}", f"{base}/outputs/{{}}/thumbnail", f"{base}/inputs/{{}}", f"{base}/{{}}"]
    places += [f"{api.address}/jobs/{{}}/outputs/0", f"{api.address}/jobs/{{}}", f"{api.address}/assets/{{}}"]
    for place in places:
        for name in ELSEWHERE:
            if name in ("1", "٠") and "/jobs/{}" in place:
                continue  # the job's number
            url = URL(place.format(name), encoded=name.isascii())
            async with api.http.get(url, headers={"Authorization": f"Bearer {api.token}"}) as answer:
                body = await answer.read()
            assert 400 <= answer.status < 500 or name == "0/../../../http_token", (place, name, answer.status)
            assert api.token.encode() not in body
            assert b"root:" not in body


# --- S10: what a machine or a client says is data -----------------------------------------------------------

NASTY = "<img src=x onerror=alert(1)>\x1b[31m\u202e\"'`</script><script>alert(2)</script>"


@pytest.mark.threat("S10")
async def test_names_are_shown_as_data_only(api: Web) -> None:
    plain = NASTY.replace("\x1b", "").replace("\u202e", "")
    job = await done(api, {"workflow": graph(prefix=plain), "user": plain, "project": plain, "prompt": None})
    (output,) = job["outputs"]
    for path in ("/jobs", f"/jobs/{job['id']}", "/costs", "/workflows", "/machines"):
        answer = await api.get(path)
        assert answer.headers["Content-Type"].startswith("application/json")
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "sandbox" in answer.headers["Content-Security-Policy"]
    for path in (job["urls"]["log"], job["urls"]["manifest"], "/metrics"):
        answer = await api.get(path)
        assert not answer.headers["Content-Type"].startswith("text/html")
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert b"\x1b" not in answer.body
    saved = await api.get(f"{output['url']}?download=1")
    assert saved.headers["Content-Type"] == "image/png"
    assert "sandbox" in saved.headers["Content-Security-Policy"]
    assert "<" not in saved.headers["Content-Disposition"]
    assert set(saved.headers["Content-Disposition"]) <= {chr(code) for code in range(32, 127)}


@pytest.mark.threat("S15")
async def test_control_characters_in_words_of_clients_reach_no_terminal(
    idle: Web, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = idle.app.settings
    whole = replace(settings, app=replace(settings.app, log_level="DEBUG"))
    await asyncio.to_thread(configure_logging, whole, console=True)
    try:
        for name in ("user", "project", "workflow", "job_type", "server_type", "webhook_url"):
            answer = await idle.post("/jobs", {"workflow": graph(), name: NASTY})
            assert answer.status in (404, 422), answer
            assert b"\x1b" not in answer.body
        assert (await idle.get(f"/jobs/{quote(NASTY, safe='')}")).status == 404
        logging.getLogger("runcomfy.http").warning("said", extra={"fields": {"words": NASTY}})
    finally:
        unconfigure_logging()
    log = await asyncio.to_thread(lambda: b"".join(p.read_bytes() for p in (idle.state / "logs").glob("*.log")))
    assert b"onerror" in log
    assert b"\x1b" not in log
    assert "\x1b" not in "".join(capfd.readouterr())


# --- S3, S4, S13: what is left behind -----------------------------------------------------------------------


@pytest.fixture
def _open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("_open_umask")
@pytest.mark.threat("S3")
@pytest.mark.threat("S4")
@pytest.mark.threat("S13")
async def test_nothing_secret_is_left_behind_and_what_is_left_is_private(
    comfyui_server: ComfyUIEmulator, tmp_path: Path, clock: LoopClock, capfd: pytest.CaptureFixture[str]
) -> None:
    async with serving_web(tmp_path, clock, comfyui=comfyui_server.url) as api:
        await asyncio.to_thread(configure_logging, api.app.settings, console=True)
        code = URL(api.page).query["code"]
        async with api.http.get(api.page, allow_redirects=False) as answer:
            session = answer.cookies[COOKIE].value
        await done(api, {"workflow": "image_invert", "image": DATA, "prompt": None})
        await done(api, {"workflow": graph(), "metadata": {"note": CANARY}})
        hook = await api.post("/jobs", {"workflow": graph(), "webhook_url": "https://hooks.example/T/secret-in-path"})
        await api.ended(hook.json["id"])
        for forged in ({"Authorization": f"Bearer {api.token}x"}, {"Cookie": f"{COOKIE}={session}x"}):
            await api.ask("GET", "/jobs", token=False, headers=forged)
        broken = await api.ask("POST", "/jobs", data=f'{{"workflow": "{CANARY}"', headers={"Content-Type": JSON})
        assert broken.status in (400, 422)
        said = [(await api.get(path)).body for path in ("/jobs", f"/jobs/{hook.json['id']}", "/metrics", "/session")]
        token, state = api.token, api.state

    def left() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    files = await asyncio.to_thread(left)
    shown = capfd.readouterr()
    for secret in (token, code, session):
        assert [path.name for path, content in files.items() if secret.encode() in content] == (
            ["http_token"] if secret == token else []
        )
        assert secret not in shown.out + shown.err
        assert all(secret.encode() not in body for body in said)
    logs = b"".join(content for path, content in files.items() if path.parent.name == "logs")
    assert logs
    assert CANARY.encode() not in logs
    assert b"secret-in-path" not in logs
    if sys.platform != "win32":
        loose = [path for path in files if path.is_relative_to(state) and stat.S_IMODE(path.stat().st_mode) & 0o077]
        folders = [path for path in state.rglob("*") if path.is_dir()] + [state]
        assert loose == []
        assert [path for path in folders if stat.S_IMODE(path.stat().st_mode) & 0o077] == []
