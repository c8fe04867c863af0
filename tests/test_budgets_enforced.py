"""Budgets are kept where money is committed: at the launch and at every extension, by however many processes (I6)."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import pytest

from runcomfy.application.own_machine import OwnMachine, keep_lease
from runcomfy.application.purse import ASK_AGAIN, Purse
from runcomfy.cli.main import call, comfyctl
from runcomfy.domain.budget import Budget, Period
from runcomfy.domain.exceptions import BudgetExceeded, ProviderError
from runcomfy.domain.machine import MachineState, Purpose
from runcomfy.domain.queued import Barred
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.programs import Program, Programs, discrepancies

pytestmark = pytest.mark.cloud(comfyui=False)

LEASE_USD = Decimal("0.165")
"""Ten minutes of a medium machine at $0.99 per hour."""


def capped(programs: Programs, *budgets: Budget) -> None:
    programs.settings = replace(programs.settings, budgets=budgets)


@pytest.mark.threat("S14")
async def test_a_launch_that_would_pass_a_hard_budget_is_refused_and_nothing_is_sent(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    capped(programs, Budget(Period.DAY, hard=LEASE_USD - Decimal("0.001")))
    async with programs.start() as program:
        with pytest.raises(BudgetExceeded, match="per day") as refused:
            await program.launch()
        assert refused.value.exit_code == 8
        assert "resets" in refused.value.hint or "reset" in refused.value.hint
        assert not any(call.method == "POST" for call in cloud.calls)
        assert await program.books.rows(open_only=False) == []


async def test_two_processes_cannot_both_pass_the_last_dollar(cloud: RunComfyEmulator, programs: Programs) -> None:
    capped(programs, Budget(Period.DAY, hard=LEASE_USD * Decimal("1.5")))
    async with programs.start() as one, programs.start() as two:
        done = await asyncio.gather(one.launch(), two.launch(), return_exceptions=True)
        assert sum(isinstance(outcome, BudgetExceeded) for outcome in done) == 1
        assert len(cloud.launched) == 1
        for program in (one, two):
            for machine in program.books.held.copy().values():
                await program.machines.stop(machine, reason="the test is over")


async def test_a_soft_budget_is_told_once_per_window(cloud: RunComfyEmulator, programs: Programs) -> None:
    capped(programs, Budget(Period.DAY, soft=LEASE_USD))
    async with programs.start() as program:
        machines = [await program.launch() for _ in range(3)]
        assert len(cloud.launched) == 3
        alerts = [said for said in program.said if said.startswith("BUDGET")]
        assert len(alerts) == 1
        assert "per day" in alerts[0]
        await asyncio.sleep(14 * 3600)  # until midnight
        another = await program.launch()
        assert sum(said.startswith("BUDGET") for said in program.said) == 2
        for machine in [*machines, another]:
            await program.machines.stop(machine, reason="the test is over")


async def test_a_lease_is_renewed_to_the_end_of_the_budget_and_no_second_more(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    cloud.next_machine(ignores_stop_time=True)  # nobody but us ends it
    capped(programs, Budget(Period.RUN, hard=LEASE_USD * 2))
    async with programs.start() as program:
        own = OwnMachine(program.machines, program.placer.comfyui)
        own.intend("medium", reason="a test")
        async with program.machines.launch_lock():
            machine = await program.machines.launch(own._intent)  # type: ignore[arg-type]
        machine, _ = await program.machines.wait_ready(machine)
        with pytest.raises(BudgetExceeded, match="at the end of what was paid"):
            await keep_lease(program.machines, machine)
        assert any("is not prolonged" in said for said in program.said)
        latest = await program.store.machine(machine.id)
        assert latest is not None
        await program.machines.stop(latest, reason="the budget is used up")
        assert cloud.total_usd <= LEASE_USD * 2
        assert cloud.total_usd >= LEASE_USD
        assert await program.billed() == cloud.total_usd


async def test_a_refused_extension_leaves_the_lease_as_it_is(cloud: RunComfyEmulator, programs: Programs) -> None:
    capped(programs, Budget(Period.HOUR, hard=LEASE_USD + Decimal("0.01")))
    async with programs.start() as program:
        machine, _ = await program.ready()
        before = len(cloud.calls)
        with pytest.raises(BudgetExceeded):
            await program.machines.extend(machine, total=timedelta(minutes=20))
        assert len(cloud.calls) == before
        row = await program.store.machine(machine.id)
        assert row is not None
        assert (row.duration, row.asked_duration) == (timedelta(minutes=10), None)
        assert cloud.machines[cloud.launched[0]].estimated_duration == 600
        shorter = await program.machines.extend(machine, total=timedelta(minutes=5))  # always allowed
        assert shorter.duration == timedelta(minutes=5)
        await program.machines.stop(shorter, reason="the test is over")


@pytest.mark.fault(24)
async def test_an_extension_that_was_not_heard_of_counts_until_it_is_known(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    day = Budget(Period.DAY, hard=Decimal(10))
    capped(programs, day)
    async with programs.start(max_retries=0) as program:
        machine, _ = await program.ready()
        cloud.next_call("POST servers/*/update-estimated-duration", reply="lost", times=None)
        with pytest.raises(ProviderError):
            await program.machines.extend(machine, total=timedelta(hours=1))
        row = await program.store.machine(machine.id)
        assert row is not None
        assert (row.duration, row.asked_duration) == (timedelta(minutes=10), timedelta(hours=1))
        [state, *_] = await program.store.budgets([day], now=program.machines.clock.now())
        assert state.committed >= Decimal("0.99")
        cloud.behave()
        known = await program.machines.extend(row, total=timedelta(minutes=20))
        assert known.asked_duration is None
        await program.machines.stop(known, reason="the test is over")


@pytest.mark.fault(24)
async def test_an_extension_that_was_never_granted_counts_no_longer_than_its_machine_lives(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    """The provider ends it at its old time, and every launch looks first what is gone: nobody is held up for ever."""
    day = Budget(Period.DAY, hard=LEASE_USD * 3)
    capped(programs, day)
    async with programs.start() as other:
        async with programs.start(max_retries=0) as program:
            machine, _ = await program.ready()
            cloud.next_call("POST servers/*/update-estimated-duration", works=False, status=502, times=None)
            with pytest.raises(ProviderError):
                await program.machines.extend(machine, total=timedelta(minutes=25))
            cloud.behave()
        with pytest.raises(BudgetExceeded):
            await other.launch()
        await asyncio.sleep(605)
        assert cloud.alive == []
        await other.reaper.reap()
        [state, *_] = await other.store.budgets([day], now=other.machines.clock.now())
        assert LEASE_USD <= state.committed <= LEASE_USD + Decimal("0.01")
        await other.machines.stop(await other.launch(), reason="the test is over")


async def test_a_launch_that_is_tried_again_is_checked_again(
    cloud: RunComfyEmulator, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    capped(programs, Budget(Period.DAY, hard=LEASE_USD * 2))
    async with programs.start() as program, programs.start() as other:
        add, adds = program.books.add_intent, 0

        async def counted(machine: object) -> None:
            nonlocal adds
            adds += 1
            if adds == 2:  # meanwhile another process has spent what was left
                rival = other.intent(duration=timedelta(minutes=20))
                await other.books.add_intent(rival)
            await add(machine)  # type: ignore[arg-type]

        monkeypatch.setattr(program.books, "add_intent", counted)
        cloud.next_call("POST servers", works=False, status=502)
        with pytest.raises(BudgetExceeded):
            await program.launch()
        assert adds == 2
        assert cloud.launched == []
        states = {row.state for row in await program.books.rows(open_only=False) if row.owner_id == program.owner.id}
        assert states == {MachineState.NEVER}


async def test_budgets_of_users_and_projects_count_what_is_theirs(cloud: RunComfyEmulator, programs: Programs) -> None:
    capped(programs, Budget(Period.DAY, hard=LEASE_USD, user="*"))
    async with programs.start() as program:

        def intent(user: str) -> object:
            return program.books.intent(
                purpose=Purpose.RUN,
                server_type="medium",
                duration=timedelta(minutes=10),
                reason="a test",
                for_user=user,
            )

        ann = await program.launch(intent("ann"))  # type: ignore[arg-type]
        with pytest.raises(BudgetExceeded, match="user ann"):
            await program.launch(intent("ann"))  # type: ignore[arg-type]
        bob = await program.launch(intent("bob"))  # type: ignore[arg-type]
        nobody = await program.launch(intent(""))  # type: ignore[arg-type]
        for machine in (ann, bob, nobody):
            await program.machines.stop(machine, reason="the test is over")


@pytest.mark.fault(2)
async def test_a_launch_whose_outcome_is_open_counts_as_if_it_had_worked(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    capped(programs, Budget(Period.DAY, hard=LEASE_USD * Decimal("1.5")))
    async with programs.start() as victim:
        cloud.next_call("POST servers", delay=3_000)
        task = asyncio.create_task(victim.launch())
        await asyncio.sleep(5)
        await victim.kill(task)
    async with programs.start() as other:
        with pytest.raises(BudgetExceeded):
            await other.books.add_intent(other.intent())
        await other.reaper.reap()
        assert cloud.alive == []
        machine = await other.launch()  # what it had started was free, and is gone
        await other.machines.stop(machine, reason="the test is over")
        assert await discrepancies(cloud, other) == []


async def test_the_run_command_refuses_what_its_budget_cannot_pay(
    cloud: RunComfyEmulator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name, value in {**cloud.environment(), "RUNCOMFY_POLL_INTERVAL": "0.2"}.items():
        monkeypatch.setenv(name, value)
    picture = tmp_path / "in.png"
    from PIL import Image

    Image.new("RGB", (32, 32)).save(picture)
    arguments = ["run", "image_invert", "--image", str(picture), "--budget", "0.10", "--user", "ann"]
    code = await asyncio.to_thread(call, comfyctl, [*arguments, "--out", str(tmp_path / "out")])
    assert code == 8
    shown = capsys.readouterr()
    assert "the budget per run is $0.1000" in shown.err
    assert "launching" not in shown.out + shown.err
    assert cloud.launched == []


async def test_a_budget_is_no_word_for_the_queue() -> None:
    assert await asyncio.to_thread(call, comfyctl, ["run", "image_invert", "--queue", "--budget", "1"]) == 2


# -- looking ahead -------------------------------------------------------------------------------------------


def purse_of(
    program: Program, *budgets: Budget, said: list[str] | None = None, woken: list[int] | None = None
) -> Purse:
    return Purse(
        program.store,
        budgets,
        program.books.clock,
        run_id=program.owner.id,
        tell=(said if said is not None else []).append,
        wake=lambda: (woken if woken is not None else []).append(1),
    )


async def test_nothing_may_be_launched_that_a_budget_or_a_refusal_of_the_last_minute_forbids(
    programs: Programs, clock: LoopClock
) -> None:
    async with programs.start(in_memory=True) as program:
        purse = purse_of(program, Budget(Period.DAY, hard=Decimal(1)), Budget(Period.MONTH, hard=Decimal(2)))
        assert (purse.forbids(Decimal(9)), purse.seconds(1.0)) == (None, None)  # nothing was read yet
        await purse.refresh()
        assert purse.forbids(Decimal(1)) is None
        assert (purse.seconds(2.0), purse.seconds(0.0)) == (1_800.0, None)
        over = purse.forbids(Decimal("1.5"), "medium")
        assert over is not None
        assert (over.details["budget"], over.details["wanted_usd"], over.details["lease_usd"]) == ("day", "1.5", "1.5")
        assert "lease_usd" not in (purse.short_of(Decimal("1.5")) or over).details
        purse.refused(over)
        assert (purse.refusal, purse.forbids(Decimal(0))) == (over, over)
        await asyncio.sleep(ASK_AGAIN - 1)
        assert purse.forbids(Decimal(0)) is over
        await asyncio.sleep(1)
        assert purse.forbids(Decimal(0)) is None
        purse.refused(over)
        purse.allowed()
        assert purse.forbids(Decimal(0)) is None
        soon = {"budget": "hour", "resets_at": (clock.now() + timedelta(seconds=5)).isoformat()}
        purse.refused(BudgetExceeded("no", hint="wait", details=soon))
        await asyncio.sleep(4)
        assert purse.refusal is not None
        await asyncio.sleep(1)
        assert purse.refusal is None  # a new window: asked at once


async def test_jobs_wait_whose_user_or_project_is_out_of_money_and_that_is_said_once(
    cloud: RunComfyEmulator, programs: Programs
) -> None:
    said, woken = list[str](), list[int]()
    async with programs.start(in_memory=True) as program:
        budgets = (Budget(Period.DAY, hard=LEASE_USD, user="*"), Budget(Period.DAY, hard=LEASE_USD, project="film"))
        purse = purse_of(program, *budgets, said=said, woken=woken)
        assert not purse.allows("bob", "")  # nobody knows yet
        assert not purse.allows("bob", "")
        assert (woken, purse.knows([("bob", "")]), purse.used_up("bob", "")) == ([1], False, None)
        for user, project in (("ann", ""), ("", "film")):
            intent = program.books.intent(
                purpose=Purpose.RUN,
                server_type="medium",
                duration=timedelta(minutes=10),
                reason="a test",
                for_user=user,
                for_project=project,
            )
            await program.launch(intent)
        await purse.refresh([("ann", "book"), ("eve", "film")])
        assert [purse.allows(*who) for who in (("bob", ""), ("ann", "book"), ("eve", "film"))] == [True, False, False]
        assert purse.knows([("bob", ""), ("ann", "book"), ("eve", "film")])
        assert purse.barred() == Barred(users=frozenset({"ann"}), projects=frozenset({"film"}))
        why = purse.used_up("ann", "book")
        assert why is not None
        assert (why.details["budget"], why.details["wanted_usd"]) == ("day of user ann", "0")
        await purse.refresh()  # who has no money left is asked about again without a job
        assert not purse.allows("ann", "book")
        assert not purse.knows([("bob", "")])
        assert sorted(sentence.partition(":")[0] for sentence in said) == [
            "jobs of project film wait",
            "jobs of user ann wait",
        ]
        assert "the budget per day of user ann is $0.1650, $0.1650 is spent or committed; it resets at " in "".join(
            said
        )
        assert purse.forbids(Decimal(100)) is None  # budgets of somebody bind nobody else's machines
        for machine in program.books.held.copy().values():
            await program.machines.stop(machine, reason="the test is over")


async def test_a_budget_that_says_no_is_news_once_per_window(programs: Programs) -> None:
    def no(budget: str, resets_at: str | None) -> BudgetExceeded:
        return BudgetExceeded(f"no more this {budget}", hint="wait", details={"budget": budget, "resets_at": resets_at})

    async with programs.start(in_memory=True) as program:
        purse = purse_of(program)
        today, tomorrow = "2026-05-02T00:00:00+00:00", "2026-05-03T00:00:00+00:00"
        asked = [no("day", today), no("day", today), no("day", tomorrow), no("hour", today), no("run", None)]
        assert [purse.news(error) for error in asked] == [True, False, True, True, True]
        assert [purse.news(BudgetExceeded("other", hint="wait")) for _ in range(2)] == [True, False]
        assert purse.allows("anybody", "anything")  # no budget names anybody
        assert purse.knows([("anybody", "anything")])
