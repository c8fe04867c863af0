"""`comfyctl dev`, its script and its manager: what they say of a dev server that starts, idles, fails or ends."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from runcomfy.cli import dev_server, monitor
from runcomfy.cli.main import call
from runcomfy.cli.words import show_time
from runcomfy.dev_server_startup import DevServerManager, main
from runcomfy.testing.comfyui_clients import a_client, an_id
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.in_thread import InThread, served
from runcomfy.testing.programs import Program, Programs, start_dev
from runcomfy.testing.worker_stories import picture

HOUR = timedelta(hours=1)
NONE_RUNS = "there is no active development server\n"
Account = InThread[RunComfyEmulator]
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch) -> Iterator[Account]:
    """An account at an emulated cloud, as commands find it; nothing may bill at the end of the test."""
    quick = {
        "RUNCOMFY_POLL_INTERVAL": "0.1",
        "RUNCOMFY_VISIBILITY_WINDOW": "1",
        "RUNCOMFY_REQUESTS_PER_SECOND": "1000",
        "RUNCOMFY_BURST": "1000",
    }
    with served(
        lambda: RunComfyEmulator(boot_time=0.2, delete_takes=0.1, comfyui_speed=20, rate_limit=False)
    ) as running:
        for name, value in {**running.emulator.environment(), **quick}.items():
            monkeypatch.setenv(name, value)
        yield running
        assert running.call(lambda cloud: list(cloud.billing)) == []


def launched(account: Account) -> int:
    return account.call(lambda cloud: len(cloud.launched))


# -- starting ----------------------------------------------------------------------------------------------


def test_a_dev_server_for_no_time_is_refused_before_anything_is_rented(comfy: Command, account: Account) -> None:
    code, _, err = comfy("dev", "start", "--duration", "0")
    assert code == 2
    assert "a dev server cannot run for no time" in err
    assert launched(account) == 0


def test_who_asks_for_another_type_than_runs_is_told_what_replaces_it(comfy: Command, account: Account) -> None:
    assert "replaces it" not in comfy("dev", "start")[2]
    assert "replaces it" not in comfy("dev", "start", "--server-type", "medium")[2]
    code, out, err = comfy("dev", "start", "--server-type", "large")
    assert code == 0
    assert out.startswith("dev server reused: medium machine")
    assert "a medium dev server was there already; `comfyctl dev restart --server-type large` replaces it" in err
    assert launched(account) == 1
    comfy("dev", "shutdown")


def test_a_warm_up_that_fails_says_why_and_leaves_the_dev_server_up(
    comfy: Command, account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert comfy("dev", "start")[0] == 0
    monkeypatch.setenv("COMFYUI_EXECUTION_TIMEOUT", "0.001")
    code, out, _ = comfy("dev", "start", "--warm-up")
    assert code == 0
    warm_up = out.splitlines()[-1]
    assert warm_up.startswith("  warm-up  failed (")
    assert warm_up.endswith("); the dev server stays up")
    assert account.call(lambda cloud: list(cloud.billing))
    comfy("dev", "shutdown")


# -- looking -----------------------------------------------------------------------------------------------


async def test_a_dev_server_that_is_coming_up_has_no_address_and_no_uptime_yet(
    program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    starting = asyncio.create_task(start_dev(program))
    await asyncio.sleep(60)
    status = await program.dev.status()
    assert status is not None
    facts = dev_server._facts(status, show_url=True)
    assert (facts["Status"], facts["Base URL"], facts["Uptime"]) == ("Starting", None, None)
    dev_server._print_status(status, facts, HOUR, HOUR)
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "still starting, which is free; `comfyctl dev start` waits for it"
    assert not any(line.strip().startswith(("Base URL", "Uptime")) for line in said)
    await starting
    await program.dev.shutdown()


@pytest.mark.parametrize("guarded", [True, False])
async def test_the_status_warns_of_an_end_that_is_near_and_else_of_what_idling_costs(
    programs: Programs, capsys: pytest.CaptureFixture[str], guarded: bool
) -> None:
    programs.settings = replace(programs.settings, pool=replace(programs.settings.pool, guard=guarded))
    async with programs.start() as program:
        machine, _, _ = await start_dev(program)
        await asyncio.sleep(5 * 60)

        async def said(idle_after: timedelta, warning: timedelta) -> str:
            status = await program.dev.status()
            assert status is not None
            dev_server._print_status(status, dev_server._facts(status, show_url=False), idle_after, warning)
            return capsys.readouterr().out.splitlines()[-1]

        near, far, short = timedelta(hours=2), timedelta(seconds=1), timedelta(minutes=2)
        warning = "WARNING: it is idle, and ended in " if guarded else "healthy"
        assert (await said(HOUR, near)).startswith(warning)
        assert (await said(HOUR, far)) == "healthy"
        idles = await said(short, far)
        assert idles.startswith("nothing ran on it for 5m")
        assert idles.endswith("`comfyctl dev shutdown` ends that")
        async with program.dev.monitored(machine):  # whoever looks keeps it: nothing is about to end
            assert (await said(HOUR, near)) == "healthy"
        await program.dev.shutdown()


# -- watching ----------------------------------------------------------------------------------------------


async def watching(program: Program, stop: asyncio.Event) -> bool:
    return await monitor.watch_dev_server(program.machines, program.dev, a_client, stop)


async def test_where_there_is_no_dev_server_watching_is_over_at_once(
    program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await watching(program, asyncio.Event()) is True
    assert capsys.readouterr().out == NONE_RUNS


async def test_watching_tells_what_runs_what_waits_and_a_stop_that_was_put_off(
    program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    _, report, _ = await start_dev(program)
    assert report.url is not None
    stop = asyncio.Event()
    looking = asyncio.create_task(watching(program, stop))
    await asyncio.sleep(10)
    before = capsys.readouterr().out.splitlines()
    assert len(before) == 1, "what does not change is not said again at once"
    assert before[0].startswith("idle; $")
    async with a_client(report.url) as client:
        first, second = an_id(), an_id()
        await client.submit(picture(40, name="first"), prompt_id=first)
        await client.submit(picture(50, name="second"), prompt_id=second)
        await asyncio.sleep(15)
    extended = await program.dev.extend(by=HOUR)
    await asyncio.sleep(120)
    stop.set()
    assert await looking is False
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"running prompt {first} for 0s, 1 waiting; $")
    assert any(line.startswith(f"running prompt {first} for 10s, 1 waiting; $") for line in said)
    assert any(line.startswith(f"running prompt {second} for 0s, 0 waiting; $") for line in said)
    assert said[-1].startswith("idle; $")
    assert said[-1].endswith(f"stops {show_time(extended.planned_stop_at)}")
    assert not before[0].endswith(f"stops {show_time(extended.planned_stop_at)}")
    await program.dev.shutdown()


def test_a_watched_dev_server_that_ends_by_itself_is_said_to_be_gone_and_not_left_running(
    comfy: Command, account: Account, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(monitor, "LOOK_EVERY", 0.05)
    monkeypatch.setattr(monitor, "ASK_PROVIDER_EVERY", 0.05)
    assert comfy("dev", "start")[0] == 0
    file = tmp_path / "state" / "dev_server_state.json"
    first = json.loads(file.read_text(encoding="utf-8"))["server_id"]

    def ends_once_it_is_watched(cloud: RunComfyEmulator) -> None:
        """Once the second is up, only who watches asks for it."""
        second = next((machine for machine in cloud.machines.values() if machine.server_id != first), None)
        if second is not None and second.bills and file.exists() and second.server_id in file.read_text("utf-8"):
            asked.append(len(cloud.calls))
            if asked[-1] >= asked[0] + 4:
                cloud.end_by_hand(second)
                return
        asyncio.get_running_loop().call_later(0.05, ends_once_it_is_watched, cloud)

    asked: list[int] = []
    account.call(ends_once_it_is_watched)
    code, out, _ = comfy("dev", "restart", "--monitor", "--no-interactive")
    assert code == 0
    assert out.splitlines()[-1] == "the dev server is gone"
    assert "left running" not in out


# -- the script and the manager ----------------------------------------------------------------------------


def left(account: Account) -> timedelta:
    """Return how long the one machine that bills runs, from its start."""

    def look(cloud: RunComfyEmulator) -> timedelta:
        [machine] = [machine for machine in cloud.machines.values() if machine.bills]
        assert machine.stops_at is not None
        return machine.stops_at - machine.launched_at

    return account.call(look)


def test_the_script_prolongs_the_dev_server_called_outside_of_a_loop_and_in_one(
    comfy: Command, account: Account, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert comfy("dev", "start", "--duration", "1h")[0] == 0
    first = left(account)
    assert call(dev_server.script, ["--extend", "600"], name=dev_server.SCRIPT) == 0
    assert timedelta(seconds=590) <= left(account) - first <= timedelta(seconds=610)
    monkeypatch.setattr(sys, "argv", ["dev_server_startup.py", "--extend", "1200"])

    async def program() -> None:
        await main()

    with pytest.raises(SystemExit) as ended:
        asyncio.run(program())
    assert ended.value.code == 0
    assert timedelta(seconds=1790) <= left(account) - first <= timedelta(seconds=1810)
    assert launched(account) == 1
    assert capsys.readouterr().out.count("now stops at") == 2
    comfy("dev", "shutdown")


def test_a_programs_manager_launches_describes_replaces_and_stops_the_dev_server(
    account: Account, capsys: pytest.CaptureFixture[str]
) -> None:
    async def program() -> None:
        manager = DevServerManager()
        await manager.show_status()
        assert capsys.readouterr().out == NONE_RUNS
        assert await manager.get_status() is None
        assert await manager.launch_server("large", 1800, interactive=False) is True
        status = await manager.get_status()
        assert status is not None
        assert (status.machine.server_type, status.usable) == ("large", True)
        capsys.readouterr()
        await manager.show_status()
        said = capsys.readouterr().out.splitlines()
        assert "healthy" in said
        assert NONE_RUNS.strip() not in said
        assert await manager.restart_server() is True
        first, second = account.call(lambda cloud: list(cloud.machines.values()))
        assert [machine.bills for machine in (first, second)] == [False, True]
        assert (second.server_type, second.estimated_duration) == ("large", 1800)
        assert await manager.shutdown_server() is True
        assert not second.bills

    asyncio.run(program())


def test_what_a_programs_manager_cannot_do_is_false_and_said(
    account: Account, capsys: pytest.CaptureFixture[str]
) -> None:
    assert asyncio.run(DevServerManager().launch_server("quantum", None)) is False
    assert "no price is known" in capsys.readouterr().err
    assert launched(account) == 0
