"""`comfyctl machines`: what the account runs, whose it is and why; stop, adopt, reap, show."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runcomfy.cli.main import call, comfyctl
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator

pytestmark = pytest.mark.cloud(comfyui=False, now=None, boot_time=0, delete_takes=0, rate_limit=False)

Command = Callable[..., Any]


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def comfy(cloud: RunComfyEmulator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command in a thread of its own, as a process of its own would, and returns (code, stdout, stderr)."""
    fast = {
        "RUNCOMFY_POLL_INTERVAL": "0.2",
        "RUNCOMFY_VISIBILITY_WINDOW": "1",
        "RUNCOMFY_REQUESTS_PER_SECOND": "100",
        "RUNCOMFY_BURST": "100",
        "RUNCOMFY_COMFYUI_TIMEOUT": "1",
    }
    for name, value in {**cloud.environment(), **fast}.items():
        monkeypatch.setenv(name, value)

    async def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = await asyncio.to_thread(call, comfyctl, list(arguments))
        out, err = capsys.readouterr()
        return code, out, err

    return run


async def listed(comfy: Command) -> list[dict[str, Any]]:
    code, out, err = await comfy("machines", "ls", "--json")
    assert code == 0, err
    rows: list[dict[str, Any]] = json.loads(out)
    return rows


async def test_an_empty_account_is_said_to_be_empty(comfy: Command) -> None:
    assert (await comfy("machines", "ls"))[1] == "the account runs no machine, and our books have none open\n"


@pytest.mark.fault(12)
async def test_a_strangers_machine_is_listed_and_not_touched_by_looking_and_reaping(
    cloud: RunComfyEmulator, comfy: Command
) -> None:
    stranger = cloud.foreign("large")
    [row] = await listed(comfy)
    assert (row["server_id"], row["ours"], row["type"]) == (stranger.server_id, False, "large")
    assert "never touched" in row["why"]
    code, out, _ = await comfy("machines", "reap")
    assert code == 0
    assert f"{stranger.server_id}: not ours, left alone (large, Ready)" in out
    assert "nothing to end" in out
    assert (await comfy("machines", "ls"))[1].splitlines()[-1] == "0 of ours, none bills; spent $0.00"
    assert {recorded.method for recorded in cloud.calls} == {"GET"}


async def test_a_machine_is_adopted_listed_as_ours_kept_and_stopped(cloud: RunComfyEmulator, comfy: Command) -> None:
    stranger = cloud.foreign("large")
    code, out, err = await comfy("machines", "adopt", stranger.server_id)
    assert code == 0, err
    assert "is ours now; it is kept until" in out
    [row] = await listed(comfy)
    assert row["ours"]
    assert row["why"].startswith("kept until")
    code, out, _ = await comfy("machines", "reap")
    assert "left alone, kept until" in out
    code, out, err = await comfy("machines", "stop", stranger.server_id)
    assert code == 0, err
    assert ": stopped; it cost $" in out
    assert cloud.alive == []
    assert not stranger.bills
    assert await listed(comfy) == []
    code, out, _ = await comfy("machines", "show", stranger.server_id)
    assert code == 0
    for word in ("added", "answered", "taken-over", "stop-asked", "gone"):
        assert word in out


@pytest.mark.fault(13)
async def test_an_adopted_machine_whose_stop_time_nobody_knows_is_kept_all_the_same(
    cloud: RunComfyEmulator, comfy: Command
) -> None:
    stranger = cloud.foreign("large", fields={"estimated_stopping_at": None, "estimated_duration": None})
    assert (await comfy("machines", "adopt", stranger.server_id))[0] == 0
    _, out, _ = await comfy("machines", "reap")
    assert "left alone, kept until" in out
    assert stranger.bills
    await comfy("machines", "stop", stranger.server_id)


async def test_a_strangers_machine_can_be_stopped_by_its_id(cloud: RunComfyEmulator, comfy: Command) -> None:
    stranger, other = cloud.foreign("large"), cloud.foreign("large")
    code, _, err = await comfy("machines", "stop", stranger.server_id)
    assert code == 0, err
    assert not stranger.bills
    assert other.bills


async def test_an_id_that_the_account_does_not_have_is_said_so(cloud: RunComfyEmulator, comfy: Command) -> None:
    for verb in ("stop", "adopt", "show"):
        code, _, err = await comfy("machines", verb, "no-such-machine")
        assert code == 4
        assert "no machine no-such-machine [machine-not-found]" in err
        assert "comfyctl machines ls" in err


@pytest.mark.fault(54)
@pytest.mark.fault(56)
async def test_with_a_damaged_database_machines_are_still_listed_and_stopped(
    cloud: RunComfyEmulator, comfy: Command, state: Path
) -> None:
    stranger = cloud.foreign("large")
    await asyncio.to_thread(state.mkdir, parents=True)
    await asyncio.to_thread((state / "runcomfy.sqlite3").write_bytes, b"this is no database" * 100)
    code, out, err = await comfy("machines", "ls")
    assert code == 0
    assert stranger.server_id in out
    assert "not ours" not in out
    assert "0 of ours" not in out
    assert "unknown" in out
    assert "store-corrupt" in err
    code, out, _ = await comfy("machines", "ls", "--json")
    assert code == 0
    [row] = json.loads(out)
    assert row["ours"] is None
    code, _, err = await comfy("machines", "stop", stranger.server_id)
    assert code == 0, err
    assert not stranger.bills
    code, out, _ = await comfy("machines", "ls")
    assert code == 0
    assert "our books have none open" not in out
    code, _, err = await comfy("machines", "reap")  # what is ours cannot be told
    assert code == 9
    assert "comfyctl machines stop ID" in err


async def test_what_our_books_have_ended_is_not_called_a_strangers(cloud: RunComfyEmulator, comfy: Command) -> None:
    stranger = cloud.foreign("large", ignores_delete=True, listed_after=3600)
    cloud.next_call("GET servers/*", status=404, body={"message": "Server not found"}, times=1, skip=1)
    await comfy("machines", "adopt", stranger.server_id)
    cloud.next_call("GET servers/*", status=404, body={"message": "Server not found"}, times=None)
    code = asyncio.create_task(comfy("machines", "stop", stranger.server_id))
    await asyncio.sleep(0)
    cloud.next_call("GET servers", body=[], times=2)
    assert (await code)[0] == 0
    [row] = await listed(comfy)
    assert row["ours"]
    assert "runs again" in row["why"]
    stranger.traits.ignores_delete = False
    cloud.behave()
    assert (await comfy("machines", "reap"))[0] == 0
    assert not stranger.bills


async def test_a_dev_server_that_still_starts_is_not_called_unusable(cloud: RunComfyEmulator, comfy: Command) -> None:
    machine = cloud.foreign("large")
    assert (await comfy("machines", "adopt", machine.server_id))[0] == 0
    machine.traits.fields = {"current_status": "Starting"}
    code, out, err = await comfy("dev", "status")
    assert code == 0, err
    assert out.splitlines()[-1] == "still starting, which is free; `comfyctl dev start` waits for it"
    machine.traits.fields = {}
    await comfy("machines", "stop", machine.server_id)


async def test_a_dev_server_that_is_not_usable_is_ended_and_the_command_fails(
    cloud: RunComfyEmulator, comfy: Command
) -> None:
    code, _, err = await comfy("dev", "start", "--no-interactive")
    assert code == 4
    assert "[machine-failed]" in err
    assert len(cloud.launched) == 1
    assert cloud.alive == []


async def test_a_restart_of_what_has_no_price_stops_nothing(cloud: RunComfyEmulator, comfy: Command) -> None:
    stranger = cloud.foreign("huge")
    assert (await comfy("machines", "adopt", stranger.server_id))[0] == 0
    code, _, err = await comfy("dev", "restart", "--no-interactive")
    assert code == 2
    assert "no price is known" in err
    assert stranger.bills
    await comfy("machines", "stop", stranger.server_id)


async def test_every_machine_is_listed_with_what_it_does_and_costs(cloud: RunComfyEmulator, comfy: Command) -> None:
    stranger = cloud.foreign("large")
    await comfy("machines", "adopt", stranger.server_id)
    code, out, err = await comfy("machines", "ls")
    assert code == 0, err
    header, line, total = out.splitlines()
    assert header.split("  ")[0] == "machine"
    assert re.search(r"  idle \d+s  ", line)
    assert "$1.75/h" in line
    assert "kept until" in line
    assert total.startswith("1 of ours, 1 bills $1.75 per hour; spent $")
    code, out, _ = await comfy("machines", "show", stranger.server_id, "--json")
    [story] = json.loads(out)
    assert [step["event"] for step in story["steps"]][:2] == ["added", "answered"]
    assert story["works"] == []
    await comfy("machines", "stop", stranger.server_id)
    code, out, _ = await comfy("machines", "show", stranger.server_id)
    assert "it cost $" in out


async def test_a_wrong_budget_keeps_nobody_from_stopping_and_an_empty_id_is_refused(
    cloud: RunComfyEmulator, comfy: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = cloud.foreign("large")
    monkeypatch.setenv("RUNCOMFY_BUDGET_DAY", "twenty")
    monkeypatch.setenv("RUNCOMFY_POOL_MIN_MACHINES", "99")
    for arguments in (("machines", "ls"), ("machines", "reap"), ("guard", "--once")):
        code, _, err = await comfy(*arguments)
        assert code == 0, err
        assert "RUNCOMFY_BUDGET_DAY" in err
        assert "ignored here" in err
    assert (await comfy("machines", "stop", ""))[0] == 2
    code, out, _ = await comfy("machines", "stop", stranger.server_id)
    assert code == 0
    assert f"{stranger.server_id}: stopped" in out
    assert (await comfy("serve", "--once"))[0] == 3


async def test_who_watches_an_account_that_cannot_be_asked_is_told_so_at_once(
    cloud: RunComfyEmulator, comfy: Command
) -> None:
    cloud.next_call("GET servers", status=401, times=None)
    code, out, err = await comfy("machines", "ls", "--watch")
    assert code != 0
    assert out == ""
    assert "RUNCOMFY_API_TOKEN" in err


async def test_the_story_of_a_machine_names_for_whom_it_was_and_what_ran_on_it(
    cloud: RunComfyEmulator, comfy: Command
) -> None:
    stranger = cloud.foreign("large")
    await comfy("machines", "adopt", stranger.server_id)
    code, out, err = await comfy("machines", "show", stranger.server_id)
    assert code == 0, err
    assert re.search(r"ready; \$1\.75 per hour, .*; stops ", out.splitlines()[1])
    await comfy("machines", "stop", stranger.server_id)
