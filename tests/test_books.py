"""What the books of machines hold: what was wanted, what is held and until when, types, prices and budgets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest

from runcomfy.application.books import Books, dearer
from runcomfy.domain.budget import Budget, BudgetState, Period
from runcomfy.domain.exceptions import BudgetExceeded, LeaseLost, ValueInvalid
from runcomfy.domain.machine import MachineReport, MachineState, OwnerId, Phase, Purpose, ServerId
from runcomfy.domain.money import show_usd
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.past import Past
from runcomfy.testing.programs import Programs

pytestmark = pytest.mark.cloud(comfyui=False)


@pytest.fixture
async def books(programs: Programs) -> AsyncIterator[Books]:
    async with programs.start(in_memory=True) as program:
        yield program.books


def told(books: Books) -> list[str]:
    said: list[str] = []
    books.tell = said.append
    return said


async def test_what_is_to_be_rented_is_written_as_it_was_wanted(books: Books, clock: LoopClock) -> None:
    rate = books.price("large")
    wanted: dict[str, Any] = {
        "purpose": Purpose.POOL,
        "server_type": "large",
        "duration": timedelta(minutes=10),
        "reason": "jobs wait",
        "for_user": "ann",
        "for_project": "film",
    }
    machine = books.intent(**wanted)
    assert {name: getattr(machine, name) for name in wanted} == wanted
    assert (machine.provider, machine.account) == (books.provider, books.account)
    assert (machine.usd_per_hour, machine.rate_source) == (rate.usd_per_hour, f"{rate.plan}, {rate.source}")
    assert machine.requested_at == machine.since == clock.now()
    assert machine.owner_id == machine.run_id == books.owner.id
    assert machine.workflow_version_id == books.settings.cloud.workflow_version_id
    another = books.intent(**wanted, version_id="v-2")
    assert (another.workflow_version_id, another.id != machine.id) == ("v-2", True)
    for duration in (timedelta(0), timedelta(seconds=-1)):
        with pytest.raises(ValueInvalid, match="longer than nothing"):
            books.intent(**{**wanted, "duration": duration})
    await books.add_intent(machine)
    assert await books.store.machine(machine.id) == machine
    [added] = await books.store.story(machine.id)
    assert (added.event, added.note, added.at) == ("added", "jobs wait", clock.now())


async def test_a_type_may_cost_as_much_as_the_limit_and_one_that_nobody_knows_is_said_to_be_that(
    books: Books,
) -> None:
    said = told(books)
    usd = books.price("large").usd_per_hour
    table = books.settings.rates
    rates = {**table.rates, "new-one": replace(table.rates["large"], server_type="new-one")}
    books.settings = replace(
        books.settings,
        cloud=replace(books.settings.cloud, max_usd_per_hour=usd),
        rates=replace(table, rates=rates),
    )
    assert books.price("large").usd_per_hour == usd
    assert said == []
    assert books.price("new-one").server_type == "new-one"
    assert said == ["note: RunComfy does not document the machine type new-one; it may be refused"]
    with pytest.raises(BudgetExceeded) as dear:
        books.price("2xl-turbo")
    dearest = table.rates["2xl-turbo"].usd_per_hour
    assert dear.value.details == {"usd_per_hour": str(dearest), "cap_usd_per_hour": str(usd)}
    with pytest.raises(ValueInvalid, match="no price is known"):
        books.price("none")


async def test_a_launch_must_show_when_the_window_since_it_left_is_over(books: Books, clock: LoopClock) -> None:
    window = books.settings.cloud.visibility_window.total_seconds()
    intent = books.intent(purpose=Purpose.RUN, server_type="medium", duration=timedelta(minutes=10), reason="a test")
    await asyncio.sleep(window - 1)
    assert not books.must_be_visible(intent)
    await asyncio.sleep(1)
    assert books.must_be_visible(intent)  # of one of which nothing is known but when it was wanted
    owner = replace(books.owner, heartbeat_at=clock.now() - timedelta(seconds=10))
    books.presume_asked(intent, None)
    assert books.must_be_visible(intent)
    books.presume_asked(intent, owner)  # it may have left as late as its owner's last sign of life
    await asyncio.sleep(window - 11)
    assert not books.must_be_visible(intent)
    await asyncio.sleep(1)
    assert books.must_be_visible(intent)
    books.presume_asked(intent, replace(owner, heartbeat_at=clock.now() + timedelta(hours=1)))
    await asyncio.sleep(window)
    assert books.must_be_visible(intent)  # a clock that runs ahead makes nobody wait longer
    books.asked(intent)
    assert not books.must_be_visible(intent)
    await asyncio.sleep(window)
    assert books.must_be_visible(intent)
    books.asked(intent)
    books.forget(intent)
    assert books.must_be_visible(intent)


async def test_a_machine_of_the_provider_is_the_open_one_of_our_rows_or_the_newest(
    books: Books, clock: LoopClock
) -> None:
    server_id = ServerId("srv-1")
    assert await books.row_of(server_id) is None
    past = Past(books)
    older = await past.machine(clock.now() - timedelta(hours=5), timedelta(minutes=5))
    newer = await past.machine(clock.now() - timedelta(hours=3), timedelta(minutes=5))
    assert await books.row_of(ServerId(str(older.server_id))) == older
    assert await books.row_of(ServerId(str(newer.server_id))) == newer


async def test_a_machine_of_nobody_lives_until_its_planned_stop(books: Books, clock: LoopClock) -> None:
    hour = timedelta(hours=1)
    now = clock.now()
    intent = books.intent(purpose=Purpose.DEV, server_type="medium", duration=hour, reason="a test")
    machine = replace(intent, ready_at=now - timedelta(minutes=5))
    report = MachineReport(ServerId("s"), Phase.READY, "Ready")
    assert books.kept_until(machine, report) == now + timedelta(minutes=55)
    assert books.kept_until(replace(machine, ready_at=None), report) == now + hour
    default = books.settings.cloud.duration
    assert books.kept_until(replace(machine, duration=timedelta(0)), report) == now - timedelta(minutes=5) + default
    planned = replace(machine, planned_stop_at=now + 2 * hour)
    assert books.kept_until(planned, report) == now + 2 * hour
    assert books.kept_until(planned, replace(report, stopping_at=now + 3 * hour)) == now + 3 * hour


async def test_what_is_held_is_open_and_ours(books: Books) -> None:
    machine = books.intent(purpose=Purpose.RUN, server_type="medium", duration=timedelta(minutes=10), reason="a test")
    books.hold(machine)
    assert books.held == {machine.id: machine}
    books.hold(replace(machine, state=MachineState.STOPPED))
    assert books.held == {}
    books.hold(replace(machine, owner_id=OwnerId("somebody")))
    assert books.held == {}
    books.hold(machine)
    books.forget(machine)
    assert books.held == {}
    assert await books.latest(machine.id) is None
    books.hold(machine)
    assert await books.latest(machine.id) == machine  # the store does not know it yet
    await books.add_intent(machine)
    answered = replace(machine, server_id=ServerId("s-1"))
    books.hold(answered)
    assert await books.latest(machine.id) == answered  # its answer could not be written down
    books.hold(replace(answered, epoch=answered.epoch + 1))
    assert await books.latest(machine.id) == machine


@pytest.mark.parametrize(("real", "taken"), [("Medium", False), ("med ium", False), ("", False), ("large", True)])
async def test_the_type_that_a_machine_really_has_is_booked_with_its_price(
    books: Books, real: str, taken: bool
) -> None:
    said = told(books)
    machine = books.intent(purpose=Purpose.RUN, server_type="medium", duration=timedelta(minutes=10), reason="a test")
    await books.add_intent(machine)
    after = await books.note_type(machine, MachineReport(ServerId("s"), Phase.READY, "Ready", server_type=real))
    if not taken:
        assert (after, said) == (machine, [])
        assert dearer(machine, after) is None
        return
    rate = books.price("large")
    assert (after.server_type, after.usd_per_hour) == ("large", rate.usd_per_hour)
    assert after.rate_source == f"{rate.plan}, {rate.source}"
    assert await books.store.machine(machine.id) == after
    assert sum("is a large in place of medium, booked at $" in line for line in said) == 1
    failed = dearer(machine, replace(after, server_id=ServerId("s")))
    assert failed is not None
    assert failed.details == {"server_id": "s", "asked": "medium", "got": "large"}
    assert dearer(after, machine) is None


async def test_a_type_without_a_price_is_said_once_and_proves_nothing(books: Books) -> None:
    said = told(books)
    machine = books.intent(purpose=Purpose.RUN, server_type="medium", duration=timedelta(minutes=10), reason="a test")
    report = MachineReport(ServerId("s"), Phase.READY, "Ready", server_type="medium-v2")
    assert [await books.note_type(machine, report) for _ in range(2)] == [machine, machine]
    assert len(said) == 1
    assert "a medium-v2, of which no price is known" in said[0]


async def test_a_budget_that_is_nearly_used_up_is_told_once_per_window(books: Books, clock: LoopClock) -> None:
    said = told(books)
    now = clock.now()

    def state(budget: Budget, committed: str) -> BudgetState:
        return BudgetState(budget, budget.window(now), Decimal(committed))

    day = Budget(Period.DAY, hard=Decimal(10))
    assert day.alerts_at is not None
    await books.alert([state(day, str(day.alerts_at - Decimal("0.01"))), state(Budget(Period.DAY), "99")])
    assert said == []
    for _ in range(2):
        await books.alert([state(day, str(day.alerts_at))])
    [sentence] = said
    assert sentence.startswith(f"BUDGET: {show_usd(day.alerts_at)} of $10.00 per day is spent or committed")
    assert "; resets 2026-" in sentence
    run = Budget(Period.RUN, soft=Decimal(1))
    for run_id in ("a", "a", "b"):
        await books.alert([state(run, "2")], run_id=run_id)
    assert said[1:] == ["BUDGET: $2.00 per run is spent or committed (alert at $1.00)"] * 2


async def test_who_was_quicker_keeps_the_machine(programs: Programs) -> None:
    async with programs.start() as one, programs.start() as two:
        intent = one.intent()
        await one.books.add_intent(intent)
        taken = await two.books.try_take_over(intent, note="mine now")
        assert taken is not None
        assert (taken.owner_id, two.books.held) == (two.owner.id, {intent.id: taken})
        assert await one.books.try_take_over(intent, note="mine") is None
        with pytest.raises(LeaseLost):
            await one.books.change(intent, note="too late", kept_until=None)
        left = await two.books.hand_over(taken, kept_until=two.books.clock.now(), note="nobody's")
        assert (left.owner_id, left.kept_until, two.books.held) == (None, two.books.clock.now(), {})
        mine = await one.books.take_over(left, note="mine again")
        assert (mine.owner_id, one.books.held) == (one.owner.id, {intent.id: mine})
        notes = [step.note for step in await one.store.story(intent.id)]
        assert notes == ["a test", "mine now", "nobody's", "nobody's", "mine again"]
