"""`comfyctl page`: a fresh address, from a service that runs and proves to be ours."""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from launcher.announced import FOLDER, announce, announced, lives, sweep
from launcher.guarding.kept_secrets import TOKEN_FILE
from launcher.guarding.proving import PROOF_PATH, proof_of
from launcher.page_command import fresh_address
from runcomfy.adapters.processes import ProcessTable
from runcomfy.domain.exceptions import LocalError
from runcomfy.domain.secret import Secret
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.web import Web, serving_web


def only_file(state: Path) -> Path:
    (file,) = (state / FOLDER).iterdir()
    return file


def ended_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def port_of(api: Web) -> int:
    return int(api.address.rpartition(":")[2])


async def test_the_address_logs_in_one_browser_once(api: Web) -> None:
    address = await fresh_address()
    assert address.startswith(api.address + "/?code=")
    async with aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as browser:
        async with browser.get(address) as answer:
            assert answer.status == 200
            assert "code=" not in str(answer.url)
        async with browser.get(f"{api.address}/session") as answer:
            assert (await answer.json())["kind"] == "session"
    async with aiohttp.ClientSession() as another, another.get(address) as answer:
        assert answer.status == 403


async def test_where_a_service_listens_is_written_down_for_its_user_while_it_does(
    tmp_path: Path, clock: LoopClock
) -> None:
    async with serving_web(tmp_path, clock) as api:
        file = only_file(api.state)
        facts = json.loads(file.read_text(encoding="utf-8"))
        assert (facts["host"], facts["port"]) == ("127.0.0.1", port_of(api))
        if sys.platform != "win32":
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
            assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
        assert api.token not in file.read_text(encoding="utf-8")
    assert list((tmp_path / "state" / FOLDER).iterdir()) == []


async def test_it_says_when_no_service_runs(api: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other").mkdir(mode=0o700)
    monkeypatch.setenv("RUNCOMFY_STATE_DIR", str(tmp_path / "other"))
    with pytest.raises(LocalError, match="no service listens with this state folder"):
        await fresh_address()
    assert not (tmp_path / "other" / TOKEN_FILE).exists(), "asking makes no token"


async def test_what_a_killed_service_left_behind_is_told_and_cleared_away(api: Web, clock: LoopClock) -> None:
    file = only_file(api.state)
    facts = json.loads(file.read_text(encoding="utf-8"))
    pid = await asyncio.to_thread(ended_process)
    file.write_text(json.dumps({**facts, "pid": pid}), encoding="utf-8")
    with pytest.raises(LocalError, match=rf"process {pid}\) has ended"):
        await fresh_address()
    # The pid was handed out again: its process began at another time.
    file.write_text(json.dumps({**facts, "process_started": facts["process_started"] - 60}), encoding="utf-8")
    with pytest.raises(LocalError, match="has ended"):
        await fresh_address()
    newer = announce(api.state, "127.0.0.1", port_of(api) + 1, now=clock.now())
    assert [service.file for service in sweep(api.state)] == [newer]
    assert list(newer.parent.iterdir()) == [newer]


async def test_one_that_listens_where_our_service_was_is_never_sent_the_token(api: Web, clock: LoopClock) -> None:
    only_file(api.state).unlink()
    for answer in ({"proof": secrets.token_hex(32)}, {"proof": 7}, {"path": "/?code=evil"}, None):
        async with stranger(answer) as (port, heard):
            file = announce(api.state, "127.0.0.1", port, now=clock.now())
            with pytest.raises(LocalError, match="is not our service"):
                await fresh_address()
            assert len(heard) == 1
            assert heard[0].startswith(f"GET {PROOF_PATH}?challenge=")
            assert api.token not in "".join(heard)
            assert "authorization" not in heard[0].lower()
            file.unlink()


async def test_a_proof_cannot_be_passed_on_from_the_real_service(api: Web, clock: LoopClock) -> None:
    """A stranger asks the real service at its own port what it was asked itself."""
    only_file(api.state).unlink()

    async def ask_the_real_one(request: str) -> Any:
        path = request.split()[1]
        return (await api.get(path, token=False)).json

    async with stranger(ask_the_real_one) as (port, heard):
        announce(api.state, "127.0.0.1", port, now=clock.now())
        with pytest.raises(LocalError, match="is not our service"):
            await fresh_address()
        assert len(heard) == 1


async def test_one_that_hangs_up_after_the_proof_is_not_called_again(api: Web, clock: LoopClock) -> None:
    """By the second call another program could listen there."""
    only_file(api.state).unlink()

    async def prove(request: str) -> Any:
        challenge = request.split()[1].partition("challenge=")[2]
        return {"proof": proof_of(Secret(api.token), challenge, where[0])}

    where: list[int] = []
    async with stranger(prove) as (port, heard):
        where.append(port)
        announce(api.state, "127.0.0.1", port, now=clock.now())
        with pytest.raises(LocalError, match="does not answer"):
            await fresh_address()
        assert len(heard) == 1


async def test_a_service_that_lives_is_found_beside_what_does_not_answer(api: Web) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        silent = free.getsockname()[1]
    announce(api.state, "127.0.0.1", silent, now=datetime.fromisoformat("2100-01-01T00:00:00+00:00"))
    (api.state / FOLDER / "junk.json").write_text("not json", encoding="utf-8")
    (api.state / FOLDER / "list.json").write_text("[]", encoding="utf-8")
    assert [each.port for each in announced(api.state)] == [silent, port_of(api)]
    assert (await fresh_address()).startswith(api.address + "/?code=")


async def test_of_another_computers_service_nothing_is_asked_and_nothing_removed(api: Web) -> None:
    file = only_file(api.state)
    facts = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**facts, "computer": "elsewhere"}), encoding="utf-8")
    with pytest.raises(LocalError, match="another computer"):
        await fresh_address()
    assert sweep(api.state) == []
    assert file.exists()


def test_this_process_lives(tmp_path: Path) -> None:
    announce(tmp_path, "::1", 8000, now=datetime.fromisoformat("2026-11-01T00:00:00+00:00"))
    (service,) = announced(tmp_path)
    assert service.address == "http://[::1]:8000"
    assert service.process.host == ProcessTable().host
    assert lives(service)


@pytest.mark.parametrize("challenge", ["", "x" * 64, "ab" * 31, "ab" * 33, f"{'ab' * 32}&challenge={'cd' * 32}"])
async def test_only_a_whole_challenge_is_answered(api: Web, challenge: str) -> None:
    answer = await api.get(f"{PROOF_PATH}?challenge={challenge}", token=False)
    assert answer.status == 400
    assert (await api.get(PROOF_PATH, token=False)).status == 400
    assert (await api.post(PROOF_PATH, {}, token=False)).status == 401
    headers = {"Host": "evil.example"}
    assert (await api.get(f"{PROOF_PATH}?challenge={'ab' * 32}", token=False, headers=headers)).status == 403


@asynccontextmanager
async def stranger(answer: Any) -> AsyncIterator[tuple[int, list[str]]]:
    """Another program at a port: gives its port and the requests it has heard; it hangs up after each."""
    heard: list[str] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = (await reader.readuntil(b"\r\n\r\n")).decode()
        heard.append(request)
        said = await answer(request) if callable(answer) else answer
        body = json.dumps(said).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(body), body))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], heard
