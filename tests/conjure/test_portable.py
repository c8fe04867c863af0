"""
What CONJURE's own tests ask of the dev server's modules, and a replacement has to answer: the file saved and read, the
active flag, the file cleared, a server that answers and one that does not, and `await main()`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from aiohttp import web

from runcomfy import dev_server_startup, dev_server_state
from runcomfy.conjure import dev_server_state as room
from runcomfy.dev_server_startup import DevServerManager, main
from runcomfy.dev_server_state import DevServerState, DevServerStateManager
from runcomfy.domain.exceptions import CredentialsMissing


@pytest.fixture
def manager(tmp_path: Path) -> DevServerStateManager:
    path = tmp_path / "temporary.json"
    path.touch()  # as `NamedTemporaryFile(delete=False)` leaves it: there, and empty
    return DevServerStateManager(str(path))


def a_state(**changes: Any) -> DevServerState:
    facts: dict[str, Any] = {
        "server_id": "a-server",
        "user_id": "a-user",
        "base_url": "https://a-server-comfyui.runcomfy.com",
        "status": "running",
        "launch_time": "2025-08-13T10:00:00Z",
        "workflow_version": "a-version",
        "server_type": "medium",
    }
    return DevServerState(**{**facts, **changes})


# -- the six -----------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(manager: DevServerStateManager) -> None:
    state = a_state(total_cost=0.25, session_cost=0.15)
    manager.save_server_state(state)
    loaded = manager.load_server_state()
    assert loaded is not None
    for name in ("server_id", "user_id", "base_url", "status", "total_cost", "session_cost", "server_type"):
        assert getattr(loaded, name) == getattr(state, name)


def test_a_server_is_active_while_it_runs(manager: DevServerStateManager) -> None:
    assert not manager.has_active_server()
    state = a_state()
    manager.save_server_state(state)
    assert manager.has_active_server()
    state.status = "stopped"
    manager.save_server_state(state)
    assert not manager.has_active_server()


def test_what_is_cleared_is_gone(manager: DevServerStateManager) -> None:
    manager.save_server_state(a_state())
    manager.clear_server_state()
    assert not manager.has_active_server()
    assert not manager.state_file_path.exists()


def stand_in(monkeypatch: pytest.MonkeyPatch, answer: Callable[[str], int]) -> list[str]:
    """Put something in the place of httpx, as CONJURE's tests do; return the addresses it is asked for."""
    asked: list[str] = []

    class AsyncClient:
        def __init__(self, **_: Any) -> None:
            pass

        async def __aenter__(self) -> AsyncClient:
            return self

        async def __aexit__(self, *_: object) -> None:
            pass

        async def get(self, url: str, **_: Any) -> SimpleNamespace:
            asked.append(url)
            return SimpleNamespace(status_code=answer(url))

    module = ModuleType("httpx")
    module.AsyncClient = AsyncClient  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "httpx", module)
    return asked


async def test_a_server_that_answers_is_healthy(
    manager: DevServerStateManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = stand_in(monkeypatch, lambda url: 200)
    state = a_state()
    assert await manager.check_server_health(state) is True
    assert state.health_status == "healthy"
    assert asked == ["https://a-server-comfyui.runcomfy.com/queue"]


async def test_a_server_that_answers_with_an_error_is_unhealthy(
    manager: DevServerStateManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = stand_in(monkeypatch, lambda url: 500)
    state = a_state()
    assert await manager.check_server_health(state) is False
    assert state.health_status == "unhealthy"
    assert len(asked) == 2


class Pretender:
    """Stands in for the manager at the public door."""

    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
    up = True

    def __getattr__(self, verb: str) -> Any:
        async def call(*arguments: Any, **options: Any) -> bool:
            self.calls.append((verb, arguments, options))
            return self.up

        return call


@pytest.mark.parametrize(
    ("arguments", "call"),
    [
        (["--status"], ("show_status", (), {})),
        (["--shutdown"], ("shutdown_server", (), {})),
        (["--restart", "--no-interactive"], ("restart_server", (), {"interactive": False})),
        (
            ["--server-type", "medium", "--duration", "1800"],
            ("launch_server", (), {"server_type": "medium", "duration": 1800, "interactive": True}),
        ),
        ([], ("launch_server", (), {"server_type": None, "duration": None, "interactive": True})),
    ],
)
@pytest.mark.parametrize("up", [True, False])
async def test_main_can_be_awaited_and_works_through_the_doors_manager(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], call: tuple[Any, ...], up: bool
) -> None:
    monkeypatch.setattr(sys, "argv", ["dev_server_startup.py", *arguments])
    monkeypatch.setattr(dev_server_startup, "DevServerManager", Pretender)
    monkeypatch.setattr(Pretender, "calls", [])
    monkeypatch.setattr(Pretender, "up", up)
    with pytest.raises(SystemExit) as left:
        await main()
    assert Pretender.calls == [call]
    assert left.value.code == (0 if up or arguments == ["--status"] else 1)


def test_main_may_be_run_by_asyncio_while_somebody_stands_in_for_the_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["dev_server_startup.py", "--status"])
    monkeypatch.setattr(dev_server_startup, "DevServerManager", Pretender)
    monkeypatch.setattr(Pretender, "calls", [])
    awaited: Any = main()
    with pytest.raises(SystemExit) as left:
        asyncio.run(awaited)
    assert (left.value.code, Pretender.calls) == (0, [("show_status", (), {})])


# -- what else the contract says of these modules ----------------------------------------------------------


async def test_main_in_a_loop_refuses_what_it_does_not_know(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["dev_server_startup.py", "--colour", "red"])
    with pytest.raises(SystemExit) as left:
        await main()
    assert left.value.code == 2
    assert "--colour" in capsys.readouterr().err


async def test_main_in_a_loop_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["dev_server_startup.py", "--status"])
    with pytest.raises(SystemExit) as left:
        await main()
    assert left.value.code == 3
    assert "credentials-missing" in capsys.readouterr().err


def test_main_outside_a_loop_is_the_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["dev_server_startup.py", "--help"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0
    assert "--server-type" in capsys.readouterr().out


def test_without_credentials_the_manager_says_which_are_missing() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        DevServerManager()
    assert isinstance(caught.value, CredentialsMissing)
    assert "credentials.txt" in caught.value.hint


def test_the_manager_reads_conjures_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUNCOMFY_CREDENTIALS_FILE")
    folder = tmp_path / "runcomfy"
    folder.mkdir()
    lines = (
        'userID:"11111111-2222-4333-8444-555555555555"\n'
        'RUNCOMFY_API_TOKEN:"66666666-7777-4888-8999-000000000000"\n'
        'version_id: "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee"'
    )
    (folder / "credentials.txt").write_text(lines, encoding="utf-8")
    (folder / "credentials.txt").chmod(0o600)
    monkeypatch.chdir(tmp_path)
    manager = DevServerManager()
    assert manager.credentials == {
        "userID": "11111111-2222-4333-8444-555555555555",
        "RUNCOMFY_API_TOKEN": "66666666-7777-4888-8999-000000000000",
        "version_id": "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee",
    }
    assert manager.client.is_available()
    assert isinstance(manager.state_manager, DevServerStateManager)


@asynccontextmanager
async def a_server(answers: dict[str, int]) -> AsyncIterator[str]:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=answers.get(request.path, 404))

    app = web.Application()
    app.router.add_get("/{tail:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    ("answers", "health"),
    [({"/queue": 200}, "healthy"), ({"/": 200}, "healthy"), ({"/queue": 502, "/": 302}, "unhealthy")],
)
async def test_health_is_asked_over_the_network(
    manager: DevServerStateManager, answers: dict[str, int], health: str
) -> None:
    async with a_server(answers) as url:
        state = a_state(base_url=url)
        assert await manager.check_server_health(state) is (health == "healthy")
    saved = await asyncio.to_thread(manager.load_server_state)
    assert saved is not None
    assert saved.health_status == health
    assert saved.last_health_check == state.last_health_check is not None


@pytest.mark.parametrize("base_url", ["http://127.0.0.1:9", "", "file:///etc/passwd", "http://[broken"])
async def test_a_server_that_does_not_answer_is_unreachable_and_taken_out(
    manager: DevServerStateManager, base_url: str
) -> None:
    await asyncio.to_thread(manager.save_server_state, a_state(base_url=base_url))
    assert await manager.validate_and_cleanup_state() is False
    assert await asyncio.to_thread(manager.load_server_state) is None


async def test_a_server_that_answers_stays_in_the_file(manager: DevServerStateManager) -> None:
    assert await manager.validate_and_cleanup_state() is False
    async with a_server({"/queue": 200}) as url:
        await asyncio.to_thread(manager.save_server_state, a_state(base_url=url))
        assert await manager.validate_and_cleanup_state() is True
    assert await asyncio.to_thread(manager.has_active_server)


def test_a_broken_file_is_set_aside_and_not_deleted(manager: DevServerStateManager) -> None:
    manager.state_file_path.write_text("{broken", encoding="utf-8")
    assert manager.load_server_state() is None
    aside = list(manager.state_file_path.parent.glob("*.broken-*"))
    assert [path.read_text(encoding="utf-8") for path in aside] == ["{broken"]


@pytest.mark.parametrize("missing", ["server_id", "base_url", "status"])
def test_a_file_that_names_no_server_is_none_and_stays(manager: DevServerStateManager, missing: str) -> None:
    manager.save_server_state(a_state())
    facts = json.loads(manager.state_file_path.read_text(encoding="utf-8"))
    del facts[missing]
    manager.state_file_path.write_text(json.dumps(facts), encoding="utf-8")
    assert manager.load_server_state() is None
    assert manager.get_server_info() is None
    assert not manager.has_active_server()
    assert json.loads(manager.state_file_path.read_text(encoding="utf-8")) == facts


def test_costs_are_added_and_shown(manager: DevServerStateManager) -> None:
    manager.update_cost(1.0)
    assert manager.load_server_state() is None
    manager.save_server_state(a_state(total_cost=0.25, session_cost=0.25))
    manager.update_cost(0.5)
    info = manager.get_server_info()
    assert info is not None
    assert (info["total_cost"], info["session_cost"]) == ("$0.750", "$0.750")
    assert set(info) == {
        "server_id", "status", "base_url", "server_type", "uptime", "total_cost", "session_cost", "health_status",
        "last_health_check",
    }  # fmt: skip


async def test_the_modules_functions_speak_of_the_file_in_the_state_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = DevServerStateManager(tmp_path / "dev_server_state.json")
    monkeypatch.setattr(room, "dev_server_state", manager)
    assert isinstance(dev_server_state.dev_server_state, DevServerStateManager)
    assert dev_server_state.get_active_server() is None
    assert not dev_server_state.has_active_dev_server()
    assert await dev_server_state.validate_dev_server() is False
    async with a_server({"/queue": 200}) as url:
        manager.save_server_state(a_state(base_url=url))
        active = dev_server_state.get_active_server()
        assert active is not None
        assert active.server_id == "a-server"
        assert dev_server_state.has_active_dev_server()
        assert await dev_server_state.validate_dev_server() is True
    assert json.loads(manager.state_file_path.read_text(encoding="utf-8"))["health_status"] == "healthy"
