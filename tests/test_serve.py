"""`comfyctl serve` as people meet it: its options, its words, its end; and what installed packages add to it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path

import pytest

from runcomfy.adapters.pool_variables import pool_overrides
from runcomfy.application.fleet_offers import wait_usd_per_hour
from runcomfy.application.role import Role
from runcomfy.application.service import ServeOptions, Service, first_of
from runcomfy.bootstrap import App
from runcomfy.cli.main import COMMANDS, call, comfyctl
from runcomfy.cli.serve_work import Asked, _ended, cost_line
from runcomfy.domain.budget import Period
from runcomfy.domain.exceptions import DiskFull, RunComfyError, SettingInvalid, ValueInvalid
from runcomfy.domain.lease import Owner
from runcomfy.domain.machine import OwnerId
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.in_thread import InThread, served

ROOT = Path(__file__).resolve().parents[1]
JOINED: list[str] = []
"""What the part of the fake package did."""


@asynccontextmanager
async def part(app: App, options: ServeOptions) -> AsyncIterator[None]:
    JOINED.append(f"joined {isinstance(app, App)} {options.once}")
    yield
    JOINED.append("left")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package that was installed beside ours: a command, one that would replace ours, one that is broken, a part."""
    folder = tmp_path / "installed"
    info = folder / "our_friend-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: our-friend\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[runcomfy.commands]\nhello = our_friend:hello\nrun = our_friend:hello\nbroken = our_friend:nothing\n"
        "strange = our_friend:number\n[runcomfy.serve]\nfriend = our_friend:part\n"
    )
    (folder / "our_friend.py").write_text(
        "import click, sys\nnumber = 7\n"
        "@click.command()\ndef hello():\n    click.echo('hello from a friend')\n"
        "def part(app, options):\n    return sys.modules['our_friend_part'].part(app, options)\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setitem(sys.modules, "our_friend_part", sys.modules[__name__])
    JOINED.clear()
    yield folder
    sys.modules.pop("our_friend", None)


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[InThread[RunComfyEmulator]]:
    """A user with an account at an emulated cloud, in a folder of the test's; nothing may be left on."""
    with served(
        lambda: RunComfyEmulator(boot_time=0.2, delete_takes=0.2, comfyui_speed=20.0, rate_limit=False)
    ) as cloud:
        for name, value in cloud.emulator.environment().items():
            monkeypatch.setenv(name, value)
        for name, value in (("POLL_INTERVAL", "0.1"), ("REQUESTS_PER_SECOND", "1000"), ("BURST", "1000")):
            monkeypatch.setenv(f"RUNCOMFY_{name}", value)
        monkeypatch.chdir(tmp_path)
        yield cloud
        assert cloud.call(lambda c: list(c.alive)) == []


# -- options -------------------------------------------------------------------------------------------------


def test_options_win_over_settings() -> None:
    asked = Asked(max_machines=4, budget_day="20", server_types=("medium", "large"), keep_alive="0")
    assert asked.overrides() == {
        "RUNCOMFY_POOL_MAX_MACHINES": "4",
        "RUNCOMFY_BUDGET_DAY": "20",
        "RUNCOMFY_POOL_SERVER_TYPES": "medium,large",
        "RUNCOMFY_KEEP_ALIVE": "0",
    }
    app = App(overrides=asked.overrides())
    assert app.settings.pool.max_machines == 4
    assert app.pool_types() == ("medium", "large")
    [budget] = app.settings.budgets
    assert (budget.period, budget.hard) == (Period.DAY, Decimal(20))
    assert pool_overrides({"budget_day": 2.5, "max_machines": None}) == {"RUNCOMFY_BUDGET_DAY": "2.5"}


@pytest.mark.parametrize("arguments", [["--budget-day", ""], ["--budget-run", "  "], ["--server-type", ""]])
def test_an_empty_option_is_refused_and_never_means_no_limit(
    arguments: list[str], account: InThread[RunComfyEmulator], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(comfyctl, ["serve", "--once", *arguments]) == 2
    assert f"{arguments[0]} is empty" in capsys.readouterr().err
    assert call(comfyctl, ["run", "text2img", "--budget", ""]) == 2


@pytest.mark.parametrize(
    ("words", "usd"),
    [("batch", 2.0), ("normal", 10.0), ("person waiting", 40.0), ("Person-Waiting", 40.0), ("8.75", 8.75), ("$3", 3.0)],
)
def test_the_price_of_waiting_in_words(words: str, usd: float) -> None:
    assert wait_usd_per_hour(words, 2.0) == usd


@pytest.mark.parametrize("words", ["", "cheap", "-1", "nan", "inf", "1e9"])
def test_what_is_no_price_of_waiting(words: str) -> None:
    with pytest.raises(ValueInvalid):
        wait_usd_per_hour(words, 2.0)


@pytest.mark.parametrize(
    "arguments",
    [["--max-machines", "0"], ["--budget-day", "nothing"], ["--wait-price", "cheap"], ["--server-type", "a b"]],
)
def test_options_that_make_no_sense_are_refused(
    account: InThread[RunComfyEmulator], capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert call(comfyctl, ["serve", *arguments]) in (2, 3)
    assert "error: " in capsys.readouterr().err
    assert account.call(lambda c: list(c.launched)) == []


@pytest.mark.parametrize(
    ("ids", "words"),
    [([], "no machine"), ([None], "no machine"), ([None, "a"], "1 machine"), (["a", "b"], "2 machines")],
)
def test_a_launch_that_was_refused_is_no_machine_that_cost(ids: list[str | None], words: str) -> None:
    assert cost_line(Decimal("0.0031"), ids) == f"this run has cost $0.0031 ({words})"


async def test_an_executor_of_its_own_does_not_take_the_pools_place(tmp_path: Path) -> None:
    app = App(queue={"where": "pool", "database": str(tmp_path / "queue.db")})
    async with app:
        with pytest.raises(SettingInvalid, match="one process keeps"):
            await app.executor()


def test_the_first_error_of_ours_is_the_one_that_is_told() -> None:
    ours = RunComfyError("ours")
    group = BaseExceptionGroup("", [ExceptionGroup("", [OSError("other")]), ExceptionGroup("", [ours])])
    assert first_of(group) is ours


# -- what packages add ---------------------------------------------------------------------------------------


def test_a_package_adds_commands_and_replaces_none(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(comfyctl, ["hello"]) == 0
    assert capsys.readouterr().out == "hello from a friend\n"
    assert call(comfyctl, ["--help"]) == 0
    shown = capsys.readouterr().out
    assert "Added by installed packages" in shown
    assert "our-friend" in shown
    assert call(comfyctl, ["run", "--help"]) == 0
    assert "hello" not in capsys.readouterr().out
    assert call(comfyctl, ["broken"]) == 1
    assert call(comfyctl, ["strange"]) == 1
    assert call(comfyctl, ["nobody"]) == 2


def test_help_loads_no_package(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (package / "our_friend.py").write_text("raise RuntimeError('loaded')\n")
    assert call(comfyctl, ["--help"]) == 0
    assert "hello" in capsys.readouterr().out
    assert "our_friend" not in sys.modules


def test_every_command_of_the_table_is_one() -> None:
    for name in COMMANDS:
        assert comfyctl.get_command(None, name) is not None  # type: ignore[arg-type]


@pytest.mark.processes
@pytest.mark.usefixtures("package")
def test_once_with_a_part_that_joins(
    account: InThread[RunComfyEmulator], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _put(tmp_path, 2)
    assert call(comfyctl, ["serve", "--once", "--no-guard", "--no-monitor", "--budget-day", "5"]) == 0
    said = capsys.readouterr().out
    assert "budgets: $5.00 per day" in said
    assert "launching a medium machine ($0.99/h)" in said
    assert said.count(": done in ") == 2
    assert JOINED == ["joined True True", "left"]
    assert len(account.call(lambda c: list(c.launched))) == 1


@pytest.mark.processes
def test_a_budget_that_allows_nothing_is_an_exit_code_of_its_own(
    account: InThread[RunComfyEmulator], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _put(tmp_path, 1)
    assert call(comfyctl, ["serve", "--once", "--no-guard", "--budget-run", "0.01"]) == 8
    shown = capsys.readouterr()
    assert "no machine is launched: the budget per run is $0.0100" in shown.out
    assert "the budget per run" in shown.err
    assert account.call(lambda c: list(c.launched)) == []


class OnlyAsked(Role):
    """A role that another process has once, and that cannot be asked for afterwards."""

    asked = 0

    async def take(self) -> bool:
        self.asked += 1
        self.epoch = 1 if self.asked > 1 else None
        if self.asked in (3, 4):
            raise DiskFull("the disk is full")
        return False


async def test_a_role_that_cannot_be_asked_for_is_not_said_to_be_anothers() -> None:
    said: list[str] = []
    clock = LoopClock()
    owner = Owner(OwnerId("me"), "host", 1, 0.0, "comfyctl serve", clock.now(), clock.now())
    role = OnlyAsked("fleet", None, owner, clock=clock, processes=None)  # type: ignore[arg-type]
    service = Service(role, lambda: None, None, tell=said.append)  # type: ignore[arg-type, return-value]
    stop = asyncio.Event()
    task = asyncio.create_task(service.run(stop))
    await asyncio.sleep(18)
    assert role.asked == 4
    assert [line.split(" ")[0] for line in said] == ["another", "whether"]
    assert "the disk is full" in said[1]
    role.epoch = None
    stop.set()
    await task
    assert not service.serving.is_set()
    assert "had no machines" in _ended(served=False, left=0)


def _put(folder: Path, count: int, *, seconds: float = 1.0) -> None:
    from runcomfy.domain.job import JobRequest
    from runcomfy.testing.queue_programs import drawing

    async def put() -> None:
        async with App(launches=False) as app:
            queue = await app.job_queue()
            for number in range(count):
                await queue.enqueue(
                    JobRequest(drawing(seconds, number), out_file=str(folder / "jobs" / "finished" / f"{number}.png"))
                )

    asyncio.run(put())


# -- signals -------------------------------------------------------------------------------------------------


@pytest.mark.processes
@pytest.mark.fault(61)
@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends processes without asking")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_ends_the_machines(
    account: InThread[RunComfyEmulator], tmp_path: Path, number: signal.Signals
) -> None:
    _put(tmp_path, 3, seconds=2_000)
    command = [
        sys.executable,
        "-m",
        "runcomfy.cli.main",
        "serve",
        "--no-guard",
        "--no-http",
        "--json",
        "--max-machines",
        "2",
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COMFYUI_AGENT_DRAIN_SECONDS": "1"}
    with subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            _wait(lambda: bool(account.call(lambda c: list(c.billing))), process)
            _wait(lambda: "processing" in _counts(tmp_path), process)
            process.send_signal(number)
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 0, err.decode()
    lines = [json.loads(line)["message"] for line in out.decode().splitlines()]
    assert any("stopped: the machines are ended" in line for line in lines), lines
    assert any("is ended; it cost $" in line for line in lines), lines
    assert any(re.fullmatch(r"this run has cost \$[\d.]+ \((1 machine|2 machines)\)", line) for line in lines), lines
    assert account.call(lambda c: list(c.alive)) == []
    assert _counts(tmp_path) == {"pending": 3}


def _wait(condition: object, process: subprocess.Popen[bytes]) -> None:
    assert callable(condition)
    for _ in range(600):
        if condition():
            return
        assert process.poll() is None, "it left"
        time.sleep(0.1)
    pytest.fail("it did not begin")


def _counts(folder: Path) -> dict[str, int]:
    async def counts() -> dict[str, int]:
        async with App(launches=False) as app:
            found = await (await app.job_queue()).counts()
            return {str(status): count for status, count in found.items() if count}

    return asyncio.run(counts())
