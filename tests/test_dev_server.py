"""The one warm dev server: started once however many ask, taken over from the dead, found, prolonged, stopped."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from contextlib import suppress
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from runcomfy.domain.exceptions import (
    BudgetExceeded,
    LocalError,
    MachineNotFound,
    OutOfCredit,
    ProviderError,
    StopUnconfirmed,
)
from runcomfy.domain.lease import Use
from runcomfy.domain.machine import Machine, MachineState, Purpose
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.programs import Program, Programs, discrepancies
from runcomfy.testing.programs import start_dev as start

HOUR = timedelta(hours=1)
ROOT = Path(__file__).parents[1]


def published(programs: Programs) -> dict[str, Any] | None:
    file = programs.folder / "dev_server_state.json"
    return json.loads(file.read_text()) if file.exists() else None


# -- starting ----------------------------------------------------------------------------------------------


async def test_a_dev_server_is_started_published_described_and_stopped(
    cloud: RunComfyEmulator, programs: Programs, program: Program, looptime: float
) -> None:
    machine, report, reused = await start(program)
    assert not reused
    assert looptime < 200
    assert machine.owner_id is None
    assert machine.kept_until == report.stopping_at
    state = published(programs)
    assert state is not None
    assert state["server_id"] == machine.server_id

    await asyncio.sleep(600)
    status = await program.dev.status()
    assert status is not None
    assert status.usable
    assert [layer.ok for layer in status.layers] == [True, True]
    assert status.idle is not None
    assert timedelta(minutes=9) < status.idle < timedelta(minutes=11)
    assert abs(status.cost_usd - Decimal("0.99") / 6) < Decimal("0.01")

    [ended] = await program.dev.shutdown()
    assert ended.state is MachineState.STOPPED
    assert published(programs) is None
    assert await program.dev.status() is None
    assert await discrepancies(cloud, program) == []


async def test_a_second_start_takes_what_runs(cloud: RunComfyEmulator, programs: Programs, program: Program) -> None:
    first, _, _ = await start(program)
    async with programs.start() as other:
        second, _, reused = await other.dev.start(server_type="large", duration=HOUR)
    assert reused
    assert second.id == first.id
    assert len(cloud.launched) == 1
    await program.dev.shutdown()


@pytest.mark.parametrize("later", [0, 0.5, 3, 60, 179])
async def test_starts_at_once_end_with_one_machine(cloud: RunComfyEmulator, programs: Programs, later: float) -> None:
    async def one(delay: float) -> tuple[Machine, bool]:
        async with programs.start() as program:
            await asyncio.sleep(delay)
            machine, _, reused = await start(program)
            return machine, reused

    started = await asyncio.gather(one(0), one(later), one(later))
    assert len({machine.server_id for machine, _ in started}) == 1
    assert sorted(reused for _, reused in started) == [False, True, True]
    assert len(cloud.launched) == 1
    async with programs.start() as program:
        await program.dev.shutdown()


@pytest.mark.fault(4)
async def test_starts_at_once_end_with_one_machine_also_if_the_answer_is_lost(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    cloud.next_call("POST servers", reply="lost")
    async with programs.start() as one, programs.start() as two:
        first, second = await asyncio.gather(start(one), start(two))
        assert first[0].server_id == second[0].server_id
        assert len(cloud.launched) == 1
        await two.dev.shutdown()


@pytest.mark.parametrize("after", [30, 200])
async def test_a_start_whose_starter_dies_is_taken_over_by_the_one_that_waits(
    cloud: RunComfyEmulator, programs: Programs, after: float
) -> None:
    cloud.next_machine(comfyui="502", comfyui_for=60)
    async with programs.start() as two:
        async with programs.start() as one:
            first = asyncio.create_task(start(one))
            await asyncio.sleep(10)
            second = asyncio.create_task(start(two))
            await asyncio.sleep(after - 10)
            await one.kill(first)
        machine, _, reused = await second
        assert reused
        assert machine.server_id == cloud.launched[0]
        assert len(cloud.launched) == 1
        assert machine.owner_id is None
        await two.dev.shutdown()
        assert await discrepancies(cloud, two) == []


async def test_a_start_after_a_start_that_was_killed_goes_on_with_its_machine(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    async with programs.start() as one:
        first = asyncio.create_task(start(one))
        await asyncio.sleep(100)
        await one.kill(first)
    before = asyncio.get_running_loop().time()
    async with programs.start() as two:
        machine, _, _ = await start(two)
        assert asyncio.get_running_loop().time() - before < 100  # not a whole start again
        assert cloud.launched == [machine.server_id]
        await two.dev.shutdown()


async def test_a_start_after_one_that_was_killed_unanswered_goes_on_with_its_machine(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    """Invariant I3: what the unanswered launch started is found and adopted, not ended for another one."""
    cloud.next_call("POST servers", delay=60)
    async with programs.start() as one:
        first = asyncio.create_task(start(one))
        await asyncio.sleep(30)
        assert len(cloud.launched) == 1
        await one.kill(first)
    async with programs.start() as two:
        machine, _, _ = await start(two)
        assert cloud.launched == [machine.server_id]
        await two.dev.shutdown()


async def test_a_run_ends_what_a_killed_start_left(cloud: RunComfyEmulator, programs: Programs) -> None:
    async with programs.start() as one:
        first = asyncio.create_task(start(one))
        await asyncio.sleep(100)
        await one.kill(first)
    async with programs.start() as two:
        done = await two.reaper.reap()
    assert [m.server_id for m in done.ended] == cloud.launched
    assert cloud.alive == []


@pytest.mark.fault(15)
@pytest.mark.parametrize("manner", ["refused", "502", "html"])
async def test_ready_without_comfyui_is_waited_out(
    cloud: RunComfyEmulator, program: Program, manner: str, looptime: float
) -> None:
    cloud.next_machine(comfyui=manner, comfyui_for=90)
    waits: list[str] = []
    await start(program, on_wait=waits.append)
    assert 270 <= looptime <= 290
    assert waits
    await program.dev.shutdown()


@pytest.mark.fault(15)
@pytest.mark.parametrize("manner", ["refused", "502", "html"])
async def test_ready_without_comfyui_for_too_long_is_stopped(
    cloud: RunComfyEmulator, program: Program, manner: str
) -> None:
    cloud.next_machine(comfyui=manner)
    with pytest.raises(ProviderError) as caught:
        await start(program)
    assert caught.value.code == "machine-failed"
    assert cloud.alive == []
    assert await program.books.rows() == []
    assert await discrepancies(cloud, program) == []


@pytest.mark.fault(14)
async def test_a_start_that_never_gets_ready_is_stopped(cloud: RunComfyEmulator, programs: Programs) -> None:
    cloud.next_machine(stuck=True)
    async with programs.start(boot_timeout=timedelta(minutes=6)) as program:
        with pytest.raises(Exception, match="was not ready after"):
            await start(program)
    assert cloud.alive == []


@pytest.mark.fault(16)
async def test_a_dev_server_that_flaps_is_waited_for_and_not_doubled(cloud: RunComfyEmulator, program: Program) -> None:
    cloud.next_machine(flaps=40)
    machine, _, _ = await start(program)
    await asyncio.sleep(45)
    assert cloud.machines[cloud.launched[0]].word(cloud.now()) == "Starting"
    again, _, reused = await start(program)
    assert reused
    assert again.id == machine.id
    assert len(cloud.launched) == 1
    await program.dev.shutdown()


@pytest.mark.fault(16)
async def test_breaking_off_a_wait_for_a_flapping_dev_server_leaves_it_as_it_was(
    cloud: RunComfyEmulator, program: Program
) -> None:
    cloud.next_machine(flaps=40)
    machine, report, _ = await start(program)
    await asyncio.sleep(45)
    again = asyncio.create_task(start(program))
    await asyncio.sleep(5)
    again.cancel()
    with suppress(asyncio.CancelledError):
        await again
    row = await program.books.latest(machine.id)
    assert row is not None
    assert (row.state, row.owner_id, row.kept_until) == (MachineState.READY, None, report.stopping_at)
    assert cloud.billing == [machine.server_id]
    await program.dev.shutdown()


@pytest.mark.fault(22)
async def test_a_dev_server_that_went_away_is_replaced(cloud: RunComfyEmulator, program: Program) -> None:
    cloud.next_machine(vanishes_after=120)
    first, _, _ = await start(program)
    await asyncio.sleep(300)
    second, _, reused = await start(program)
    assert not reused
    assert second.id != first.id
    assert cloud.billing == [second.server_id]
    await program.dev.shutdown()


async def test_a_dev_server_whose_comfyui_has_died_is_replaced(cloud: RunComfyEmulator, program: Program) -> None:
    first, _, _ = await start(program)
    comfyui = cloud.machines[cloud.launched[0]].comfyui
    assert comfyui is not None
    await comfyui.stop()
    second, _, reused = await start(program)
    assert not reused
    assert second.id != first.id
    assert cloud.billing == [second.server_id]
    await program.dev.shutdown()


async def test_a_dev_server_whose_comfyui_has_died_is_not_ended_under_a_job(
    cloud: RunComfyEmulator, programs: Programs, program: Program, clock: LoopClock
) -> None:
    first, _, _ = await start(program)
    comfyui = cloud.machines[cloud.launched[0]].comfyui
    assert comfyui is not None
    await comfyui.stop()
    async with programs.start() as worker:
        await worker.store.begin_use(Use(first.id, worker.owner.id, "job-7", clock.now()))
        with pytest.raises(ProviderError, match="job-7 uses it"):
            await start(program)
        assert cloud.billing == [first.server_id]
    await program.dev.shutdown()


@pytest.mark.fault(27)
async def test_a_start_that_is_refused_leaves_nothing(cloud: RunComfyEmulator, programs: Programs) -> None:
    cloud.next_call("POST servers", status=402, body={"message": "Insufficient balance"})
    async with programs.start() as program:
        with pytest.raises(OutOfCredit):
            await start(program)
        assert await program.books.rows() == []
    assert published(programs) is None


async def test_a_budget_refuses_a_start_even_before_the_cloud_is_asked(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    async with programs.start(max_usd_per_hour=Decimal("0.50")) as program:
        with pytest.raises(BudgetExceeded) as caught:
            await start(program)
    assert caught.value.exit_code == 8
    assert cloud.calls == []


@pytest.mark.parametrize("after", [0, 0.001, 1, 2, 3, 5, 30, 100, 180.2, 181, 184, 185.01, 185.05, 185.2, 186, 195])
async def test_a_start_that_is_broken_off_at_any_moment_leaves_nothing_or_a_dev_server(
    cloud: RunComfyEmulator, programs: Programs, after: float
) -> None:
    async with programs.start() as program:
        task = asyncio.create_task(start(program))
        await asyncio.wait({task}, timeout=after)
        finished = task.done()
        task.cancel()
        await asyncio.wait({task})
    async with programs.start() as later:
        rows = await later.books.rows()
        if finished:
            assert [row.kept_until is not None for row in rows] == [True]
            await later.dev.shutdown()
        assert cloud.alive == []
        assert await later.books.rows() == []
        assert published(programs) is None
        assert await discrepancies(cloud, later) == []


@pytest.mark.parametrize("after", [0.5, 2, 30, 181, 186])
async def test_a_start_that_is_killed_at_any_moment_is_repaired_by_a_reap(
    cloud: RunComfyEmulator, programs: Programs, after: float
) -> None:
    async with programs.start() as program:
        task = asyncio.create_task(start(program))
        await asyncio.wait({task}, timeout=after)
        await program.kill(task)
    async with programs.start() as later:
        await later.reaper.reap()
        if rows := await later.books.rows():
            assert [row.kept_until is not None for row in rows] == [True]
            await later.dev.shutdown()
        assert cloud.alive == []
        assert await later.books.rows() == []


# -- what runs already -------------------------------------------------------------------------------------


async def test_a_machine_that_only_the_state_file_names_is_taken_up(
    cloud: RunComfyEmulator, programs: Programs, program: Program
) -> None:
    first, _, _ = await start(program)
    (programs.folder / "runcomfy.sqlite3").rename(programs.folder / "lost.sqlite3")
    for leftover in programs.folder.glob("runcomfy.sqlite3-*"):
        leftover.unlink()
    async with programs.start() as other:
        again, _, reused = await start(other)
        assert reused
        assert again.purpose is Purpose.TAKEN
        assert again.server_id == first.server_id
        assert (await other.reaper.reap()).ended == []
        await other.dev.shutdown()
    assert cloud.alive == []


async def test_a_state_file_that_names_a_machine_long_gone_is_not_believed(
    cloud: RunComfyEmulator, programs: Programs, program: Program
) -> None:
    await start(program)
    stale = (programs.folder / "dev_server_state.json").read_text()
    await program.dev.shutdown()
    (programs.folder / "dev_server_state.json").write_text(stale)
    assert await program.dev.find() is None
    assert await program.dev.status() is None
    assert published(programs) is None


async def test_a_status_of_a_machine_that_is_starting_says_so(cloud: RunComfyEmulator, programs: Programs) -> None:
    async with programs.start() as one, programs.start() as two:
        task = asyncio.create_task(start(one))
        await asyncio.sleep(60)
        status = await two.dev.status()
        assert status is not None
        assert status.report is not None
        assert status.report.status == "Starting"
        assert not status.usable
        await task
        await two.dev.shutdown()


async def test_a_dev_server_is_prolonged_and_kept_as_long(cloud: RunComfyEmulator, program: Program) -> None:
    machine, report, _ = await start(program)
    assert report.stopping_at is not None
    longer = await program.dev.extend(by=timedelta(minutes=30))
    assert longer.kept_until == report.stopping_at + timedelta(minutes=30)
    longer = await program.dev.extend(by=timedelta(minutes=30))
    assert longer.duration == timedelta(hours=2)
    await asyncio.sleep(4500)
    assert (await program.reaper.reap()).ended == []
    assert cloud.billing == [machine.server_id]
    await program.dev.shutdown()


async def test_prolonging_nothing_says_so(cloud: RunComfyEmulator, program: Program) -> None:
    with pytest.raises(MachineNotFound):
        await program.dev.extend(by=timedelta(minutes=30))


# -- ending ------------------------------------------------------------------------------------------------


async def test_a_shutdown_of_nothing_is_no_error(cloud: RunComfyEmulator, program: Program) -> None:
    assert await program.dev.shutdown() == []


async def test_a_shutdown_ends_the_start_of_another_process_and_that_one_gives_up(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    async with programs.start() as one, programs.start() as two:
        task = asyncio.create_task(start(one))
        await asyncio.sleep(60)
        await two.dev.shutdown()
        with pytest.raises((LocalError, ProviderError)):
            await task
        assert cloud.alive == []
        assert len(cloud.launched) == 1
        assert await two.books.rows() == []


@pytest.mark.fault(26)
async def test_a_shutdown_with_a_revoked_token_says_what_may_still_bill(
    cloud: RunComfyEmulator, program: Program
) -> None:
    machine, _, _ = await start(program)
    cloud.revoke(1)
    with pytest.raises(ProviderError) as caught:
        await program.dev.shutdown()
    assert isinstance(caught.value, StopUnconfirmed)
    assert str(machine.server_id) in caught.value.message
    cloud.behave()
    await program.dev.shutdown()


async def test_without_books_a_shutdown_goes_by_the_state_file(
    cloud: RunComfyEmulator, programs: Programs, program: Program
) -> None:
    await start(program)
    async with programs.start(in_memory=True) as without_books:
        [ended] = await without_books.dev.shutdown()
    assert ended.server_id == cloud.launched[0]
    assert cloud.alive == []


# -- the script --------------------------------------------------------------------------------------------


@pytest.mark.processes
class TestTheScript:
    """`python runcomfy/dev_server_startup.py`: from any directory, as a file and as a module, without stdin."""

    @staticmethod
    def call(arguments: list[str], cloud_url: str, folder: Path, *, closed: bool = False) -> Any:
        environment = {
            **os.environ,
            "RUNCOMFY_API_BASE_URL": cloud_url,
            "RUNCOMFY_USER_ID": "emulated-user",
            "RUNCOMFY_API_TOKEN": "emulated-token-1",
            "RUNCOMFY_WORKFLOW_VERSION_ID": "b8e2f6d4-3a91-4d07-9c55-0f4e7a1d2002",
            "RUNCOMFY_STATE_DIR": str(folder / "state"),
            "RUNCOMFY_CREDENTIALS_FILE": os.devnull,
            "RUNCOMFY_MAX_RETRIES": "0",
        }
        elsewhere = folder / "elsewhere"
        elsewhere.mkdir(exist_ok=True)

        def close_stdin() -> None:
            os.close(0)

        return subprocess.run(
            [sys.executable, *arguments],
            cwd=elsewhere,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            stdin=None if closed else subprocess.DEVNULL,
            preexec_fn=close_stdin if closed else None,
        )

    @pytest.mark.parametrize("how", ["file", "module"])
    async def test_it_tells_the_status_from_any_directory(
        self, cloud: RunComfyEmulator, tmp_path: Path, how: str
    ) -> None:
        script = (
            [str(ROOT / "runcomfy" / "dev_server_startup.py")]
            if how == "file"
            else ["-m", "runcomfy.dev_server_startup"]
        )
        done = await asyncio.to_thread(self.call, [*script, "--status"], cloud.url, tmp_path)
        assert (done.returncode, done.stdout) == (0, "there is no active development server\n"), done.stderr

    @pytest.mark.skipif(os.name == "nt", reason="closing stdin before the start is done the Unix way")
    async def test_it_starts_and_stops_without_any_stdin(self, cloud: RunComfyEmulator, tmp_path: Path) -> None:
        cloud.boot_time = 0.1
        script = str(ROOT / "runcomfy" / "dev_server_startup.py")
        for verb in (["--no-interactive"], ["--no-interactive", "--status"], ["--no-interactive", "--shutdown"]):
            done = await asyncio.to_thread(self.call, [script, *verb], cloud.url, tmp_path, closed=True)
            assert done.returncode == 0, done.stderr
        assert len(cloud.launched) == 1
        assert cloud.alive == []


def test_a_picture_is_there_for_the_warm_up(tmp_path: Path) -> None:
    from runcomfy.cli.dev_server import _grey_picture

    with Image.open(_grey_picture(str(tmp_path))) as picture:
        assert picture.size == (512, 512)


# -- what changed while nobody looked --------------------------------------------------------------------------


@pytest.mark.fault(68)
async def test_a_dev_server_that_was_stopped_on_the_website_is_forgotten_by_whoever_looks(
    cloud: RunComfyEmulator, programs: Programs, program: Program
) -> None:
    await start(program)
    await asyncio.sleep(600)
    (rented,) = cloud.machines.values()
    cloud.end_by_hand(rented)
    await asyncio.sleep(600)
    assert await program.dev.find() is None
    assert published(programs) is None
    assert await program.dev.rows() == []
    [entry] = await program.store.ledger()
    assert entry.ended_at is not None  # nobody tells when it went: billed until it was missed
    assert rented.gone_at is not None
    assert rented.gone_at <= entry.ended_at <= program.machines.clock.now()


async def test_a_stop_time_that_was_changed_on_the_website_is_taken_over_by_whoever_looks(
    cloud: RunComfyEmulator, program: Program
) -> None:
    machine, report, _ = await start(program)
    (rented,) = cloud.machines.values()
    rented.estimated_duration += 1_800
    found = await program.dev.find()
    assert found is not None
    assert report.stopping_at is not None
    assert found[0].kept_until == report.stopping_at + timedelta(minutes=30)
    assert found[0].id == machine.id
    await program.dev.shutdown()


async def test_while_one_process_ends_it_another_that_looks_leaves_it_alone(
    cloud: RunComfyEmulator, programs: Programs, program: Program
) -> None:
    """What is not there any more is the owner's to close, as long as there is one."""
    machine, _, _ = await start(program)
    taken = await program.books.try_take_over(machine, note="mine for the moment")
    assert taken is not None
    (rented,) = cloud.machines.values()
    cloud.end_by_hand(rented)
    await asyncio.sleep(120)
    async with programs.start() as other:
        assert await other.dev.find() is None
        [row] = await other.books.rows()
        assert row.owner_id == taken.owner_id
    await program.machines.gone_unasked(taken, note="seen by its owner")
    assert await program.books.rows() == []
