"""Faults of the catalogue on the path of the pool: those that `test_pool_faults` and `test_pool_account` leave out.

Each story keeps a pool as the service does (taking over, reconciling, watching, paying), lets the cloud or the computer
misbehave, and ends with nothing running and our ledger equal to the cloud's own bill to the second.
"""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import pytest
from alembic import command
from sqlalchemy import create_engine

from runcomfy.adapters.providers.runcomfy import RunComfyAPIClient
from runcomfy.adapters.stores import migrate
from runcomfy.application.machine_pool import MachinePool
from runcomfy.domain.exceptions import ProviderError, StopUnconfirmed
from runcomfy.domain.machine import MachineState, Purpose
from runcomfy.domain.queued import QueueStatus
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.pool_keepers import LIFE_OF_A_CALL, dies, keeping, kept
from runcomfy.testing.programs import Programs
from runcomfy.testing.rented_pools import RunningPool, until
from runcomfy.testing.serving import Services

pytestmark = pytest.mark.cloud(boot_time=30)


async def launches(pool: RunningPool) -> None:
    await pool.usable()


# -- killed around a launch --------------------------------------------------------------------------------


@pytest.mark.fault(1)
async def test_killed_before_the_launch_left_nothing_was_started_and_the_intent_is_closed(
    cloud: RunComfyEmulator, keepers: Programs
) -> None:
    """I1, I20."""
    await dies(keepers, "before provider.launch_machine", launches)
    async with kept(cloud, keepers) as pool:
        [intent] = await pool.program.books.rows()
        assert (intent.state, intent.purpose) == (MachineState.REQUESTED, Purpose.POOL)
        window = keepers.settings.cloud.visibility_window + keepers.settings.pool.reconcile_every
        await asyncio.sleep(window.total_seconds() + 60)
        assert await pool.program.books.rows() == []
        assert cloud.launched == []
        await pool.usable()
        assert len(cloud.launched) == 1


@pytest.mark.fault(2)
@pytest.mark.fault(3)
@pytest.mark.parametrize("when", ["during", "after"])
async def test_killed_before_the_launch_was_written_down_its_machine_is_found_and_ended(
    cloud: RunComfyEmulator, keepers: Programs, when: str
) -> None:
    """I3, I20: one machine, in our books as soon as it can bill, ended since nothing runs there."""
    cloud.next_call("POST servers", delay=LIFE_OF_A_CALL)
    await dies(keepers, f"{when} provider.launch_machine", launches)
    [left] = cloud.alive
    async with kept(cloud, keepers) as pool:
        await until(lambda: not cloud.alive, within=400, what="its end")
        [row] = [row for row in await pool.program.books.rows(open_only=False) if row.server_id == left]
        assert "never answered" in row.stop_reason
        limit = keepers.settings.pool.reconcile_every.total_seconds() + 30
        assert cloud.books[left].seconds <= limit
        assert cloud.launched == [left]


# -- launches that are not answered as they should be ------------------------------------------------------


LOST: Final[Mapping[str, Mapping[str, Any]]] = {
    "4 not answered": {"reply": "never"},
    "4 hung up": {"reply": "lost"},
    "5 says 500": {"status": 500, "works": True},
    "5 says 502": {"status": 502, "works": True, "body": "<html>Bad Gateway</html>"},
    "6 nothing": {"reply": "empty"},
    "6 half": {"reply": "truncated"},
    "6 a page": {"reply": "html"},
}


@pytest.mark.fault(4)
@pytest.mark.fault(5)
@pytest.mark.fault(6)
@pytest.mark.parametrize("fault", LOST.values(), ids=LOST.keys())
async def test_a_launch_that_worked_and_was_not_answered_so_is_the_pools_machine_and_the_only_one(
    cloud: RunComfyEmulator, keepers: Programs, fault: Mapping[str, Any]
) -> None:
    """I3: looked for before anything is repeated, while another machine of the pool is at work."""
    async with kept(cloud, keepers) as pool:
        busy = await pool.usable()
        lease = pool.lease(busy)
        cloud.next_call("POST servers", **fault)
        second = await pool.usable()
        assert second.machine.server_id == cloud.launched[1]
        await pool.run(second, 20)
        assert len(cloud.launched) == 2
        assert not lease.void
        pool.done(lease)


@pytest.mark.fault(7)
async def test_two_launches_answered_with_one_id_are_two_machines_of_the_pool(
    cloud: RunComfyEmulator, keepers: Programs
) -> None:
    """I2: each has a row of its own, each works, both are ended."""
    async with kept(cloud, keepers) as pool:
        first = await pool.usable()
        cloud.next_machine(answers_as=cloud.launched[0])
        second = await pool.usable()
        assert [first.machine.server_id, second.machine.server_id] == cloud.launched
        await pool.run(second, 20)


# -- other people's machines -------------------------------------------------------------------------------


@pytest.mark.fault(12)
async def test_machines_of_other_people_are_reported_once_and_never_touched(
    cloud: RunComfyEmulator, keepers: Programs
) -> None:
    """I7: also one of our type that appears while a launch of ours is not answered, and while ours are ended."""
    strangers = [cloud.foreign("medium", duration=7_200), cloud.foreign("large", duration=7_200)]
    async with kept(cloud, keepers) as pool:
        await pool.usable()
        cloud.next_call("POST servers", reply="lost")
        strangers.append(cloud.foreign("large", duration=7_200))
        await pool.usable()
        await asyncio.sleep(200)
        said = pool.program.said
        for stranger in strangers:
            assert sum("is not ours and left alone" in s and stranger.server_id in s for s in said) == 1
        assert len(pool.machines) == 2
    ids = {stranger.server_id for stranger in strangers}
    touched = [call for call in cloud.calls if call.method != "GET" and any(name in call.path for name in ids)]
    assert touched == []
    assert all(stranger.bills for stranger in strangers)


# -- stops that misbehave ----------------------------------------------------------------------------------


def stops(cloud: RunComfyEmulator) -> int:
    return sum(call.method == "DELETE" for call in cloud.calls)


@pytest.mark.fault(18)
async def test_a_stop_that_says_500_and_worked_is_seen_in_the_list_without_an_alarm(
    cloud: RunComfyEmulator, keepers: Programs
) -> None:
    """I4: the yes was not heard, so that its end is reckoned from what was seen last."""
    async with kept(cloud, keepers, within=5) as pool:
        machine = await pool.usable()
        cloud.next_call("DELETE servers/*", status=500, works=True, times=None)
        pool.pool.drain(machine.id, why="no job waits any more")
        await pool.empty(within=60)
        cloud.behave()
        assert not [sentence for sentence in pool.program.said if "still bill" in sentence]


@pytest.mark.fault(19)
async def test_a_stop_that_says_yes_and_does_nothing_is_sent_again_until_the_machine_is_gone(
    cloud: RunComfyEmulator, keepers: Programs
) -> None:
    """I4: with an alarm after five minutes; what it billed meanwhile is in our ledger; its place is not given away."""
    cloud.next_machine(ignores_delete=True, ignores_stop_time=True)
    async with kept(cloud, keepers) as pool:
        machine = await pool.usable()
        pool.pool.drain(machine.id, why="no job waits any more")
        await asyncio.sleep(400)
        assert cloud.billing == cloud.launched
        assert stops(cloud) >= 5
        assert pool.pool.room("medium") == 3
        assert [sentence for sentence in pool.program.said if cloud.launched[0] in sentence]
        cloud.machines[cloud.launched[0]].traits.ignores_delete = False
        await pool.empty(within=200)
        assert cloud.books[cloud.launched[0]].seconds > 390


@pytest.mark.fault(20)
async def test_a_stop_that_says_404_of_a_machine_that_is_listed_is_not_believed(
    cloud: RunComfyEmulator, keepers: Programs
) -> None:
    """I4."""
    async with kept(cloud, keepers) as pool:
        machine = await pool.usable()
        cloud.next_call("DELETE servers/*", status=404, works=False, times=None, lasts=90)
        pool.pool.drain(machine.id, why="no job waits any more")
        await asyncio.sleep(80)
        assert cloud.billing == cloud.launched
        [row] = await pool.program.books.rows()
        assert row.is_open
        await pool.empty(within=200)
        assert stops(cloud) >= 3


@pytest.mark.fault(21)
@pytest.mark.parametrize("obeys", [True, False], ids=["lease obeyed", "lease ignored"])
async def test_stops_that_fail_for_an_hour_are_repeated_and_no_lease_is_renewed_meanwhile(
    cloud: RunComfyEmulator, keepers: Programs, obeys: bool
) -> None:
    """I4, I5: it ends with its lease, or when the stop works again; nobody gives up before."""
    cloud.next_machine(ignores_stop_time=not obeys)
    async with kept(cloud, keepers) as pool:
        machine = await pool.usable()
        cloud.next_call("DELETE servers/*", status=500, times=None)
        pool.pool.drain(machine.id, why="no job waits any more")
        await asyncio.sleep(900 if obeys else 3_600)
        assert not [call for call in cloud.calls if call.path.endswith("update-estimated-duration")]
        if obeys:
            assert cloud.books[cloud.launched[0]].seconds == keepers.settings.cloud.run_lease.total_seconds()
            assert list(pool.machines) == []
        else:
            assert cloud.billing == cloud.launched
            before = stops(cloud)
            await asyncio.sleep(400)
            assert stops(cloud) > before
        cloud.behave()
        await pool.empty(within=1_800)


@pytest.mark.fault(21)
async def test_a_pool_that_ends_while_no_stop_is_allowed_says_what_may_bill_and_the_next_ends_it(
    cloud: RunComfyEmulator, keepers: Programs
) -> None:
    """I4: the wish to stop is durable."""
    cloud.next_machine(ignores_stop_time=True)
    async with keepers.start() as program:
        pool = RunningPool(program, MachinePool(program.machines, program.placer.comfyui))
        await pool.usable()
        cloud.revoke(1)
        with pytest.raises(StopUnconfirmed):
            await pool.close()
    assert cloud.billing == cloud.launched
    keepers.processes.dead.add(pool.program.owner.id)
    cloud.behave()
    async with kept(cloud, keepers):
        await until(lambda: not cloud.alive, within=120, what="its end")


# -- the network -------------------------------------------------------------------------------------------


@pytest.fixture
def foreign_certificate(tmp_path: Path) -> ssl.SSLContext:
    """What a server says who is not the one that was called: signed by nobody we know, for another name."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("there is no openssl to make a certificate with")
    made = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1")
    files = ("-subj", "/CN=elsewhere.invalid", "-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "cert.pem"))
    subprocess.run([openssl, *made, *files], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    return context


@pytest.mark.fault(30)
async def test_to_a_server_that_cannot_prove_to_be_the_cloud_nothing_is_said_and_nothing_is_launched(
    keepers: Programs, foreign_certificate: ssl.SSLContext
) -> None:
    """Not a word, no intent left open, and it is said why."""
    heard: list[bytes] = []

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.read(4_096))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]")
        writer.close()

    async with await asyncio.start_server(listen, "127.0.0.1", 0, ssl=foreign_certificate) as server:
        port = server.sockets[0].getsockname()[1]
        cloud_settings = replace(keepers.settings.cloud, base_url=f"https://127.0.0.1:{port}", max_retries=1)
        keepers.settings = replace(keepers.settings, cloud=cloud_settings)
        async with keepers.start() as program, keeping(program) as pool:
            with pytest.raises(ProviderError, match="certificate"):
                await pool.launch()
            await asyncio.sleep(100)
            assert await program.books.rows(open_only=False) == []
            assert [said for said in program.said if "certificate" in said]
    assert heard == []


async def stays(pool: RunningPool) -> None:
    await pool.usable()
    await asyncio.sleep(1_000)


# -- the computer and the process --------------------------------------------------------------------------


@pytest.mark.fault(61)
async def test_told_twice_to_leave_it_leaves_at_once_ends_its_machines_and_no_job_has_failed(
    cloud: RunComfyEmulator, services: Services
) -> None:
    """I8: on the user's order; the job goes back, not to failed, and the next start does it."""
    async with services.start(max_machines=1) as served:
        job = await services.put(1, seconds=900)
        await services.when(lambda: bool(services.ran()), "it computes", within=120)
        served.stop.set()
        await asyncio.sleep(20)
        assert cloud.billing == cloud.launched  # after the first word it goes on
        left_at = asyncio.get_running_loop().time()
        served.leave.set()
        await served.end()
        assert asyncio.get_running_loop().time() - left_at < 60
        assert cloud.alive == []
    assert (await services.queue.counts())[QueueStatus.FAILED] == 0
    async with services.start(max_machines=1, keep_alive=timedelta(seconds=10)):
        assert (await services.queue.wait(job)).status is QueueStatus.DONE
    assert await services.differences() == []


@pytest.mark.fault(62)
async def test_a_service_that_stands_still_for_half_a_minute_keeps_role_machines_and_jobs(
    cloud: RunComfyEmulator, services: Services
) -> None:
    """I5: leases are renewed with a margin of several looks."""
    async with services.start(max_machines=1, cloud={"run_lease": timedelta(minutes=3)}) as served:
        job = await services.put(1, seconds=400)
        await services.when(lambda: bool(services.ran()), "it computes", within=120)
        for _ in range(4):
            await asyncio.sleep(45)
            served.sleep()
            await asyncio.sleep(30)
            served.wake()
        assert (await services.queue.wait(job)).run_count == 1
        assert not [said for said in served.said if "the role was lost" in said]
        assert len(cloud.launched) == 1
    assert await services.complaints() == []


@pytest.mark.fault(64)
@pytest.mark.parametrize("took_over", [False, True], ids=["launched by it", "taken over by it"])
async def test_a_keeper_that_wakes_when_another_has_its_machines_touches_none_of_them(
    cloud: RunComfyEmulator, keepers: Programs, took_over: bool
) -> None:
    """I19: whatever it still wants, the machines are another one's by now."""
    if took_over:
        await dies(keepers, "before provider.change_duration", stays)
    async with keepers.start() as slept:
        stale = RunningPool(slept, MachinePool(slept.machines, slept.placer.comfyui))
        await stale.pool.adopt()
        machine = stale.machines[0] if took_over else await stale.launch()
        await until(lambda: machine.takes_jobs, within=120, what="it to be usable")
        stale.task.cancel()  # it stands still from now on
        async with kept(cloud, keepers) as pool:
            [row] = await pool.program.books.rows()
            assert row.owner_id == pool.program.owner.id
            before = len(cloud.calls)
            stale.pool.drain(machine.id, why="no job waits any more")
            await until(lambda: not stale.machines, within=30, what="it to let go")
            assert "DELETE" not in {call.method for call in cloud.calls[before:]}
            assert cloud.billing == cloud.launched


@pytest.mark.fault(65)
async def test_a_machine_of_the_release_before_is_found_in_the_upgraded_books_and_ended(
    cloud: RunComfyEmulator, cloud_client: RunComfyAPIClient, keepers: Programs, clock: LoopClock
) -> None:
    """An older program rented it and died; whoever serves first after the upgrade ends it, and the bill is complete."""
    keepers.folder.mkdir(parents=True, mode=0o700)
    version = keepers.settings.cloud.workflow_version_id
    lease = timedelta(minutes=10)
    report = await cloud_client.launch_machine(server_type="medium", duration=lease, workflow_version_id=version)
    engine = create_engine(f"sqlite:///{keepers.database}")
    with engine.begin() as connection:
        config = migrate._config()
        config.attributes["connection"] = connection
        command.upgrade(config, "0002")
        values = OLD_MACHINE | {
            "account": cloud_client.account,
            "server_id": report.server_id,
            "requested_at": f"{clock.now():%Y-%m-%d %H:%M:%S.%f}",
            "since": f"{clock.now():%Y-%m-%d %H:%M:%S.%f}",
        }
        names = ", ".join(values)
        connection.exec_driver_sql(
            f"INSERT INTO machines ({names}) VALUES ({', '.join('?' * len(values))})",  # noqa: S608 - our own names
            tuple(values.values()),
        )
    engine.dispose()
    keepers.database.chmod(0o600)
    await asyncio.sleep(60)
    assert cloud.billing == [report.server_id]
    async with kept(cloud, keepers):
        await until(lambda: not cloud.billing, within=60, what="its end")
    assert cloud.books[report.server_id].seconds > 30


OLD_MACHINE: Final = {
    "id": "old", "provider": "runcomfy", "purpose": "run", "server_type": "medium", "duration": 600_000_000,
    "usd_per_hour": "0.99", "rate_source": "a table", "state": "booting", "workflow_version_id": "", "reason": "a job",
    "owner_id": None, "epoch": 1, "before_ids": "[]", "stop_reason": "",
}  # fmt: skip
"""A row of the machines as the release before pools wrote it."""
