"""
What must hold of machines and money whatever fails, one story each, on the path of pool and service.

The emulated cloud is the oracle: its own books, its machines, the calls that reached it, and the run logs of the
ComfyUI servers on its machines. Where a promise is meant for every moment, the story looks at every moment.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import pytest

from runcomfy.adapters.balance_file import BalanceFile
from runcomfy.cost_optimizer import By, CostOptimizer
from runcomfy.domain.budget import Budget, Period
from runcomfy.domain.exceptions import BudgetExceeded, LocalError, MachineLost
from runcomfy.domain.machine import Machine, Purpose, ServerId
from runcomfy.domain.money import total
from runcomfy.domain.queued import QueueStatus
from runcomfy.domain.secret import Secret
from runcomfy.testing.clock import SettableClock
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.emulators.runcomfy.machines import EmulatedMachine, Stage
from runcomfy.testing.pool_keepers import LIFE_OF_A_CALL, Watching, dies, keeping, kept
from runcomfy.testing.programs import Program, Programs
from runcomfy.testing.rented_pools import RunningPool, gaps, running_pool, until
from runcomfy.testing.serving import Services

pytestmark = pytest.mark.cloud(boot_time=30)

PRICE: Final = Decimal("0.99")
"""USD per hour of a medium machine."""
LAUNCH, STOP, LONGER = "POST servers", "DELETE servers/*", "POST servers/*/update-estimated-duration"


def rows_on_disk(database: Path) -> list[dict[str, Any]]:
    """What another process reads of the machines: committed rows and nothing else."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute("SELECT * FROM machines ORDER BY requested_at")]


def launches_asked(cloud: RunComfyEmulator) -> int:
    return sum((call.method, call.path) == ("POST", "servers") for call in cloud.calls)


def busy_on(machine: EmulatedMachine) -> list[str]:
    """The prompts that compute on a machine now, by its own log."""
    server = machine.comfyui
    log = server.run_log if isinstance(server, ComfyUIEmulator) else ()
    return [record.prompt_id for record in log if record.ended is None]


# -- machines and money ------------------------------------------------------------------------------------


@pytest.mark.invariant("I1")
async def test_i1_intent_first(cloud: RunComfyEmulator, keepers: Programs) -> None:
    """The intent is committed before the request leaves, with all that is needed; the answer is a second commit."""
    seen: list[dict[str, Any]] = []

    def arrived(answer: Any) -> Any:
        seen.extend(row for row in rows_on_disk(keepers.database) if row["state"] == "requested")
        return answer

    cloud.next_call(LAUNCH, times=None, change=arrived)
    async with kept(cloud, keepers) as pool:
        await asyncio.gather(pool.usable(), pool.usable("large"))
        assert len(seen) == len(cloud.launched) == 2
        for row, kind in zip(seen, ("medium", "large"), strict=True):
            assert row["id"]
            assert row["server_id"] is None
            facts = (row["provider"], row["server_type"], row["purpose"], row["reason"])
            assert facts == ("runcomfy", kind, "pool", "jobs wait")
            assert Decimal(row["usd_per_hour"]) == cloud.rates[kind]
            assert row["duration"] == keepers.settings.cloud.run_lease // timedelta(microseconds=1)
            assert row["owner_id"] == pool.program.owner.id
        assert {row["server_id"] for row in rows_on_disk(keepers.database)} == set(cloud.launched)


@pytest.mark.invariant("I2")
async def test_i2_every_billed_machine_has_an_owner_row(cloud: RunComfyEmulator, keepers: Programs) -> None:
    """Whatever is listed for longer than one reconcile period is in our books, once, or was told to be foreign."""
    period = keepers.settings.pool.reconcile_every + timedelta(seconds=30)
    told: list[list[str]] = []
    unowned_since: dict[str, float] = {}

    def look() -> list[str]:
        now, found = asyncio.get_running_loop().time(), []
        ours = [row["server_id"] for row in rows_on_disk(keepers.database) if row["state"] not in ("stopped", "never")]
        sentences = " ".join(said for program in told for said in program)
        for machine in cloud.machines.values():
            name = machine.server_id
            if machine.stage in (Stage.GONE, Stage.DELETING) or not machine.is_listed(cloud.now()):
                continue
            count = ours.count(name) if not machine.foreign else int(name in sentences and "not ours" in sentences)
            if count == 1:
                unowned_since.pop(name, None)
            elif count > 1:
                found.append(f"{name} is {count} times in our books")
            elif now - unowned_since.setdefault(name, now) > period.total_seconds():
                found.append(f"{name} is in nobody's books for more than {period}")
        return found

    async with keepers.start():
        pass  # makes the database
    async with Watching(look, every=5).during():
        await dies(keepers, "after provider.launch_machine", _usable)  # in no row by its id
        cloud.foreign("large", duration=7_200)
        async with keepers.start() as program:
            told.append(program.said)
            async with keeping(program) as pool:
                cloud.next_call(LAUNCH, reply="lost")
                await pool.usable()
                cloud.foreign("medium", duration=7_200)
                cloud.next_machine(unlisted_for=60, hidden_for=60)
                cloud.next_call(LAUNCH, status=502, works=True)
                await pool.usable()
                await asyncio.sleep(2 * period.total_seconds())
    assert cloud.alive == []


async def _usable(pool: RunningPool) -> None:
    await pool.usable()


@pytest.mark.invariant("I3")
async def test_i3_an_ambiguous_launch_is_a_launch(cloud: RunComfyEmulator, keepers: Programs) -> None:
    """What was not answered is looked for past the visibility window before anything is launched again."""
    window = keepers.settings.cloud.visibility_window.total_seconds()
    async with kept(cloud, keepers) as pool:
        cloud.next_machine(unlisted_for=window - 10, hidden_for=window - 10)
        cloud.next_call(LAUNCH, reply="lost")
        found = await pool.usable()
        assert launches_asked(cloud) == len(cloud.launched) == 1
        assert found.machine.server_id == cloud.launched[0]

        cloud.next_call(LAUNCH, reply="lost", works=False)  # this one started nothing
        asked_at = asyncio.get_running_loop().time()
        again = asyncio.create_task(pool.usable())
        await asyncio.sleep(window - 5)
        assert launches_asked(cloud) == 2
        machine = await again
        assert launches_asked(cloud) == 3
        assert machine.machine.server_id == cloud.launched[1]
        assert asyncio.get_running_loop().time() - asked_at > window
        assert len(cloud.launched) == 2


@pytest.mark.invariant("I4")
async def test_i4_stop_until_seen_gone(cloud: RunComfyEmulator, keepers: Programs) -> None:
    """A yes that does nothing, a 404, a failing list, an empty list: our books close when it is gone, not before."""

    def look() -> list[str]:
        closed = {row["server_id"] for row in rows_on_disk(keepers.database) if row["state"] == "stopped"}
        return [f"{name} runs, and our books are closed" for name in closed & set(cloud.billing)]

    async with kept(cloud, keepers) as pool, Watching(look).during():
        for _ in range(3):
            cloud.next_machine(ignores_delete=True, ignores_stop_time=True)
        machines = [await pool.usable() for _ in range(3)]
        for machine in machines:
            pool.pool.drain(machine.id, why="no job waits any more")
        await asyncio.sleep(30)
        cloud.next_call(STOP, status=404, works=False, times=6)
        cloud.next_call("GET servers", body=[], times=1)
        await asyncio.sleep(60)
        cloud.next_call("GET servers*", status=500, times=None, lasts=60)
        await asyncio.sleep(90)
        cloud.next_call("GET servers/*", status=404, times=None)
        await asyncio.sleep(60)
        cloud.behave()  # both at once, twice, would be proof
        cloud.next_call("GET servers", body=[], times=2)
        await asyncio.sleep(60)
        assert cloud.billing == cloud.launched
        for name in cloud.launched:
            cloud.machines[name].traits.ignores_delete = False
        await pool.empty(within=300)


@pytest.mark.invariant("I5")
async def test_i5_leases(cloud: RunComfyEmulator, keepers: Programs) -> None:
    """No machine is ever paid ahead by more than a lease; when all of ours are dead, the bill ends with it."""
    lease = timedelta(minutes=4)
    keepers.settings = replace(keepers.settings, cloud=replace(keepers.settings.cloud, run_lease=lease))

    def look() -> list[str]:
        ahead = {m.server_id: m.stops_at - cloud.now() for m in cloud.machines.values() if m.bills and m.stops_at}
        return [f"{name} is paid {left} ahead" for name, left in ahead.items() if left > lease + timedelta(seconds=1)]

    async def story(pool: RunningPool) -> None:
        machines = [await pool.usable() for _ in range(3)]
        lease_ = pool.lease(machines[0])
        await asyncio.sleep(700)
        assert not lease_.void
        await pool.launch()

    async with Watching(look).during():
        await dies(keepers, "during provider.launch_machine", story, time=4)
        assert len(cloud.billing) == 3
        died_at = cloud.now()
        await asyncio.sleep(30 + lease.total_seconds() + 5)
        assert cloud.billing == []
    for name in cloud.launched:
        bill = cloud.books[name]
        assert bill.ended_at is not None
        assert bill.ended_at - max(died_at, bill.ready_at or died_at) <= lease
    async with keepers.start() as later:  # whoever comes later closes the books, as they were paid
        async with keeping(later):
            await asyncio.sleep(200)
        assert await later.books.rows() == []
        # The launch that nobody heard of is gone before anybody looked: no list can tell that it ever was.
        assert set(await gaps(cloud, later)) <= {cloud.launched[3]}


@pytest.mark.invariant("I6")
async def test_i6_budget(cloud: RunComfyEmulator, keepers: Programs) -> None:
    """Billed so far, every live lease and every open launch stay below the cap, also where two spend what is left."""
    cap = Decimal("0.40")
    keepers.settings = replace(keepers.settings, budgets=(Budget(Period.DAY, hard=cap),))

    def committed() -> Decimal:
        spent = Decimal(0)
        for machine in cloud.machines.values():
            seconds = machine.seconds(cloud.now())
            if machine.stage in (Stage.STARTING, Stage.READY):
                seconds = Decimal(machine.estimated_duration)
            spent += seconds * machine.usd_per_hour / 3600
        return spent

    def look() -> list[str]:
        return [f"${committed():.4f} are committed"] if committed() > cap else []

    async def one(pool: RunningPool) -> None:
        while True:
            try:
                await pool.usable()
            except BudgetExceeded as error:
                assert "0.40" in error.message  # noqa: PT017 - it is how the loop ends
                return

    async with Watching(look).during(), keepers.start() as first, keepers.start() as second:
        async with running_pool(first) as here, running_pool(second) as there:
            await asyncio.gather(one(here), one(there))
            assert len(cloud.launched) == int(cap / (PRICE / 6))  # leases of ten minutes: not one more, not one less
            await asyncio.sleep(1_500)  # renewed as far as it goes
            assert cloud.billing == []
            assert committed() > PRICE / 6
            await one(there)  # what the two did not use up is left for a third, and no more
        assert await gaps(cloud, first) == {}
    assert len(cloud.launched) == 3
    assert cloud.total_usd <= cap


@pytest.mark.fault(63)
@pytest.mark.fault(12)
@pytest.mark.invariant("I7")
async def test_i7_no_friendly_fire(cloud: RunComfyEmulator, keepers: Programs, tmp_path: Path) -> None:
    """Not a stranger's, not a kept one's, not another keeper's machine is stopped or prolonged, whatever lists say."""
    elsewhere = Programs(
        cloud,
        replace(keepers.settings, files=replace(keepers.settings.files, state_dir=str(tmp_path / "b"))),
        keepers.clock,
    )
    async with keepers.start() as user, elsewhere.start() as other_host:
        dev, *_ = await user.dev.start(server_type="medium", duration=timedelta(hours=1))
        run, _ = await user.ready(user.intent(duration=timedelta(hours=1)))
        theirs, _ = await other_host.ready(other_host.intent(duration=timedelta(hours=1), purpose=Purpose.POOL))
        stranger = cloud.foreign("medium", duration=7_200)
        others = {dev.server_id, run.server_id, theirs.server_id, stranger.server_id}
        before = len(cloud.calls)
        async with keepers.start() as program, keeping(program) as pool:
            cloud.next_machine(flaps=20)
            await pool.launch()
            await pool.usable()
            cloud.next_call("GET servers", body=[], times=2)
            await asyncio.sleep(120)
            cloud.next_call(LAUNCH, reply="lost")
            await pool.usable("large")
            await asyncio.sleep(60)
        touched = [
            f"{call.method} {call.path}"
            for call in cloud.calls[before:]
            if call.method != "GET" and any(str(name) in call.path for name in others)
        ]
        assert touched == []
        assert others - {stranger.server_id} == set(cloud.billing)
        await user.dev.shutdown()
        await _stopped(user, run)
        await _stopped(other_host, theirs)
    assert cloud.alive == []


async def _stopped(program: Program, machine: Machine) -> None:
    latest = await program.store.machine(machine.id)
    assert latest is not None
    await program.machines.stop(latest, reason="the test is over")


@pytest.mark.fault(22)
@pytest.mark.invariant("I8")
async def test_i8_never_stop_a_busy_machine(cloud: RunComfyEmulator, services: Services) -> None:
    """No machine is asked to stop while a prompt computes there; a job whose machine died is done on another one."""
    hit: list[str] = []

    def asked_to_stop(answer: Any) -> Any:
        hit.extend(p for m in cloud.machines.values() if m.stage is Stage.DELETING for p in busy_on(m))
        return answer

    cloud.next_call(STOP, times=None, change=asked_to_stop)
    cloud.next_machine(vanishes_after=45)
    async with services.start(max_machines=2, keep_alive=timedelta(seconds=30)):
        for number in range(4):
            await services.put(number, seconds=60)
        await services.all_ended(within=1_800)
        await services.when(lambda: not cloud.alive, "nothing is left", within=600)
    jobs = await services.queue.list()
    assert {job.status for job in jobs} == {QueueStatus.DONE}
    assert hit == []
    outcomes = sorted(record.outcome for record in services.ran())
    assert outcomes.count("success") == 4
    assert "lost" in outcomes


async def test_i8_a_machine_that_drains_is_ended_when_its_last_job_has_left(
    cloud: RunComfyEmulator, keepers: Programs
) -> None:
    """Whatever is wanted of it meanwhile: it is even prolonged for as long as the job runs."""
    async with kept(cloud, keepers) as pool:
        machine = await pool.usable()
        first, second = pool.lease(machine), pool.lease(machine, compute=False)
        pool.pool.drain(machine.id, why="no job waits any more")
        await asyncio.sleep(400)
        pool.done(first)
        await asyncio.sleep(400)
        assert not second.void
        assert "DELETE" not in {call.method for call in cloud.calls}
        assert cloud.billing == cloud.launched
        pool.done(second)
        await pool.empty(within=30)


@pytest.mark.invariant("I9")
async def test_i9_ledger_is_the_bill(cloud: RunComfyEmulator, services: Services, tmp_path: Path) -> None:
    """To the second per machine; and what each job cost adds up to the ledger, to the cent (also I25)."""
    began = services.clock.now()
    cloud.next_call(LAUNCH, reply="lost")
    cloud.next_call(LONGER, reply="lost", works=True)
    async with services.start(max_machines=2, keep_alive=timedelta(seconds=30), cloud={"run_lease": LEASE}) as served:
        for number in range(6):
            await services.put(number, seconds=50, user=("ann", "ben")[number % 2])
        await services.all_ended(within=1_800)
        await services.when(lambda: not cloud.alive, "nothing is left", within=300)
        machines, _ = await served.app.cloud()
        money = CostOptimizer(machines.books, machines.provider, BalanceFile(tmp_path / "balance", durable=False))
        ledger = total(await services.books.ledger())
        for by in By:
            report = await money.report(began, by=by)
            assert abs(sum((row.usd for row in report.rows), Decimal(0)) - ledger) < Decimal("0.01"), by
    assert await services.complaints() == []
    assert abs(ledger - cloud.total_usd) < Decimal("0.01")


LEASE: Final = timedelta(minutes=3)


# -- the process -------------------------------------------------------------------------------------------

POINTS: Final[Sequence[str]] = (
    "before store.add_machine", "after store.add_machine", "before provider.launch_machine",
    "during provider.launch_machine", "after provider.launch_machine", "after store.record",
    "before store.ask_duration", "after store.ask_duration",
    "during provider.change_duration", "after provider.change_duration",
    "before provider.stop_machine", "during provider.stop_machine", "after provider.stop_machine",
    "before store.close_bill", "after store.close_bill",
)  # fmt: skip
"""Durable writes and remote calls of a machine's life in a pool."""


async def a_life(pool: RunningPool) -> None:
    """Launched, used, prolonged, drained, gone."""
    machine = await pool.usable()
    await pool.run(machine, 130)
    pool.pool.drain(machine.id, why="no job waits any more")
    await pool.empty()


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.invariant("I20")
async def test_i20_crash_anywhere(cloud: RunComfyEmulator, keepers: Programs, point: str) -> None:
    """Dead at any write or call: the next keeper has it in hand within a round, and ledger and bill end up equal."""
    settings = keepers.settings
    keepers.settings = replace(settings, cloud=replace(settings.cloud, run_lease=timedelta(minutes=3)))
    if point.startswith("during "):
        call = {"launch_machine": LAUNCH, "change_duration": LONGER, "stop_machine": STOP}[point.partition(".")[2]]
        cloud.next_call(call, delay=LIFE_OF_A_CALL)
    await dies(keepers, point, a_life)
    left = cloud.alive
    unheard = 5 if "stop" in point else 1
    async with kept(cloud, keepers, within=unheard) as pool:
        await asyncio.sleep(settings.pool.reconcile_every.total_seconds() + 15)
        rows = {row.server_id: row for row in await pool.program.books.rows()}
        for name in left:
            assert name not in cloud.alive or rows[ServerId(name)].owner_id == pool.program.owner.id
        # A launch of which nobody knows whether it left is closed when its machine would have to be visible.
        await asyncio.sleep(settings.cloud.visibility_window.total_seconds())
    assert len(cloud.launched) <= 1


@pytest.mark.fault(60)
@pytest.mark.parametrize("days", [1, -1])
@pytest.mark.invariant("I21")
async def test_i21_a_clock_that_jumps_decides_nothing(cloud: RunComfyEmulator, keepers: Programs, days: int) -> None:
    """A day to or fro: no machine is ended, no lease given up, none is paid longer ahead than a lease."""
    keepers.clock = clock = SettableClock()

    def look() -> list[str]:
        lease = keepers.settings.cloud.run_lease + timedelta(seconds=1)
        paid = {m.server_id: m.stops_at - cloud.now() for m in cloud.machines.values() if m.bills and m.stops_at}
        return [f"{name} is paid {left} ahead" for name, left in paid.items() if left > lease]

    async with kept(cloud, keepers) as pool, Watching(look).during():
        machine, idle = await pool.usable(), await pool.usable()
        lease = pool.lease(machine)
        clock.off = timedelta(days=days)
        await asyncio.sleep(800)
        assert not lease.void
        assert machine.takes_jobs
        assert idle.takes_jobs
        assert cloud.billing == cloud.launched
        clock.off = timedelta(0)
        await asyncio.sleep(100)
        assert not lease.void
        pool.done(lease)


@pytest.mark.fault(25)
@pytest.mark.invariant("I22")
async def test_i22_stops_have_a_share_of_the_rate_of_their_own(cloud: RunComfyEmulator, keepers: Programs) -> None:
    """While everything else queues up for the account's requests, a stop goes out; a 429 is obeyed."""
    async with kept(cloud, keepers) as pool:
        machine = await pool.usable()
        provider = pool.program.machines.provider
        questions = [asyncio.create_task(provider.get_workflows()) for _ in range(60)]
        await asyncio.sleep(0.1)
        before, at = len(cloud.calls), cloud.now()
        pool.pool.drain(machine.id, why="no job waits any more")
        await until(lambda: any(call.method == "DELETE" for call in cloud.calls[before:]), within=10, what="the stop")
        assert cloud.now() - at < timedelta(seconds=10)
        assert sum(not question.done() for question in questions) > 20
        await asyncio.gather(*questions)

        cloud.next_call("*", status=429, headers={"Retry-After": "25"})
        before = len(cloud.calls)
        await provider.get_workflows()
        refused_at = cloud.calls[before].at
        early = [call for call in cloud.calls if timedelta(0) < call.at - refused_at < timedelta(seconds=20)]
        assert early == []


@pytest.mark.fault(54)
@pytest.mark.invariant("I23")
async def test_i23_on_a_full_disk_nothing_is_launched_and_machines_are_stopped(
    cloud: RunComfyEmulator, keepers: Programs
) -> None:
    """And when there is room again, the books are completed: the ledger is the bill."""
    async with kept(cloud, keepers, within=5) as pool:
        idle, busy = await pool.usable(), await pool.usable()
        lease = pool.lease(busy)
        await _only_read(pool.program, True)
        before = launches_asked(cloud)
        with pytest.raises(LocalError):
            await pool.launch()
        assert launches_asked(cloud) == before
        pool.pool.drain(idle.id, why="no job waits any more")
        await until(lambda: len(cloud.billing) == 1, within=30, what="the stop")
        assert not lease.void
        await _only_read(pool.program, False)
        pool.done(lease)
        await asyncio.sleep(120)


async def _only_read(program: Program, on: bool) -> None:
    """Let every write of the program's store fail as on a full disk."""
    store: Any = program.store
    await store._read(lambda connection: connection.exec_driver_sql(f"PRAGMA query_only={'ON' if on else 'OFF'}"))


@pytest.mark.threat("S3")
@pytest.mark.threat("S4")
@pytest.mark.invariant("I24")
async def test_i24_no_secret_in_books_logs_and_words(
    cloud: RunComfyEmulator, keepers: Programs, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """After launches, failures and stops: no token anywhere, no address of a machine, nothing that others may read."""
    canary = "canary-4be1c7"
    cloud.token = canary
    keepers.settings = replace(keepers.settings, cloud=replace(keepers.settings.cloud, tokens=(Secret(canary),)))
    addresses: set[str] = set()
    with caplog.at_level("DEBUG", logger="runcomfy"):
        async with kept(cloud, keepers) as pool:
            cloud.next_machine(comfyui="502", comfyui_for=20)
            machine = await pool.usable()
            addresses |= {str(m.url).split("//")[1].strip("/") for m in cloud.machines.values() if m.url}
            cloud.next_call("*", status=500, times=3)
            lease = pool.lease(machine)
            cloud.revoke(1)
            await asyncio.sleep(30)
            cloud.behave()
            pool.failed(lease, MachineLost("it went away"))
            await asyncio.sleep(30)
            said = list(pool.program.said)
    assert addresses
    everything = "\n".join(
        [*said, caplog.text, *(json.dumps(r.__dict__, default=repr) for r in caplog.records)]
    ).encode()
    for path in sorted(keepers.folder.rglob("*")):
        if path.is_file():
            everything += path.read_bytes()
            assert path.stat().st_mode & 0o077 == 0, path
    for secret in (canary, *addresses):
        assert secret.encode() not in everything


@pytest.mark.invariant("I25")
async def test_i25_jobs_end_in_time_and_machines_go(cloud: RunComfyEmulator, services: Services) -> None:
    """With faults off: every job within queue, boot and three run times; every machine a minute after its timeout."""
    keep, run = timedelta(seconds=60), 40.0
    async with services.start(max_machines=2, keep_alive=keep):
        for number in range(6):
            await services.put(number, seconds=run)
        began = asyncio.get_running_loop().time()
        await services.all_ended(within=30 + 6 * 3 * run)
        await services.when(lambda: not cloud.billing, "every machine is gone", within=keep.total_seconds() + 60 + run)
        assert asyncio.get_running_loop().time() - began < 30 + 6 * 3 * run + keep.total_seconds() + 60
    assert await services.complaints() == []
