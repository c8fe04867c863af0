"""The fleet's launches: what fails, what budgets and pauses forbid, and what machines cost and take."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import pytest
import pytest_asyncio

from runcomfy.application.fleet import _worth_s
from runcomfy.application.fleet_failing import FAILED_FIRST, FAILED_MOST, GIVEN_UP_AFTER
from runcomfy.application.fleet_offers import UNKNOWN_RUN, FleetOffers, wait_usd_per_hour
from runcomfy.application.job_queue import host_scope
from runcomfy.domain.budget import Budget, Period
from runcomfy.domain.exceptions import (
    AuthRejected,
    BudgetExceeded,
    LaunchRefused,
    NoCapacity,
    RunComfyError,
    ValueInvalid,
)
from runcomfy.domain.machine import Machine, MachineEvent, MachineId, Purpose, ServerId
from runcomfy.domain.plan_view import OfferView
from runcomfy.domain.queued import FLEET_SCOPE, QUEUE_SCOPE, EventKind
from runcomfy.testing.clock import SettableClock
from runcomfy.testing.contracts.jobs_words import a_job, put
from runcomfy.testing.fleet_office import ACCOUNT, HOURS, MINUTES, Office, an_office
from runcomfy.testing.programs import settings_for


@pytest.fixture
def clock() -> SettableClock:
    return SettableClock()


@pytest_asyncio.fixture
async def office(clock: SettableClock, tmp_path: Path) -> AsyncIterator[Office]:
    async with an_office(clock, tmp_path) as office:
        yield office


# -- launches that fail --------------------------------------------------------------------------------------


def gaps(asked: Sequence[tuple[float, str]]) -> list[float]:
    return [round(later - earlier) for (earlier, _), (later, _) in itertools.pairwise(asked)]


@pytest.mark.fault(27)
async def test_what_cannot_be_launched_is_asked_for_less_and_less_often(office: Office) -> None:
    office.pool.fails["medium"] = NoCapacity("no medium machine is to be had")
    await put(office.jobs)
    async with office.running():
        await asyncio.sleep(1 * HOURS)
        waits = gaps(office.pool.asked)
        doubled = [FAILED_FIRST * 2**n for n in range(5)]
        assert all(wanted <= waited <= wanted + 25 for wanted, waited in zip(doubled, waits[:5], strict=True))
        assert all(FAILED_MOST <= waited <= FAILED_MOST + 25 for waited in waits[5:])
        assert len([s for s in office.said if "could not be launched" in s]) == 1
        assert [one.why for one in await office.decisions("refused")] == [
            "provider-no-capacity: no medium machine is to be had"
        ]
        [pause] = await office.jobs.pauses()
        assert (pause.scope, pause.message) == (FLEET_SCOPE, "no medium machine is to be had")

        office.pool.fails.clear()
        await asyncio.sleep(FAILED_MOST + 200)
        assert len(office.pool.machines) == 1
        assert await office.jobs.pauses() == []
        asked = len(office.pool.asked)
        office.pool.fails["medium"] = NoCapacity("none again")
        office.pool.lose(office.pool.machines[0])
        await asyncio.sleep(60)
        assert gaps(office.pool.asked[asked:])[0] <= FAILED_FIRST + 25  # what worked in between counts


@pytest.mark.fault(27)
async def test_another_type_is_taken_where_one_is_sold_out(office: Office) -> None:
    office.pool.fails["medium"] = NoCapacity("none left")
    await put(office.jobs)
    async with office.running(types=("medium", "large")):
        await asyncio.sleep(60)
        assert [machine.machine.server_type for machine in office.pool.machines] == ["large"]


async def test_a_machine_is_waited_for_while_any_type_may_still_be_had(office: Office) -> None:
    """`serve --once` ends by that."""
    office.pool.fails |= {"medium": NoCapacity("none left"), "large": LaunchRefused("no")}
    async with office.running(types=("medium", "large")) as fleet:
        await asyncio.sleep(5)
        assert (office.pool.asked, fleet.stuck()) == ([], None)
        await put(office.jobs)
        await asyncio.sleep(FAILED_FIRST)
        assert {name for _, name in office.pool.asked} == {"medium", "large"}
        assert fleet.stuck() is None  # one of them has failed for good, the other one a few times only
        await asyncio.sleep(60)
        assert isinstance(fleet.stuck(), NoCapacity)
        office.pool.fails.clear()
        await asyncio.sleep(FAILED_MOST)
        assert fleet.stuck() is None
    assert len(office.pool.machines) == 1


@pytest.mark.parametrize(
    ("error", "launches"),
    [(NoCapacity("none left"), GIVEN_UP_AFTER), (AuthRejected("no"), 1), (LaunchRefused("no"), 1)],
)
async def test_how_often_a_launch_fails_before_it_is_given_up(
    office: Office, error: RunComfyError, launches: int
) -> None:
    office.pool.fails["medium"] = error
    await put(office.jobs)
    async with office.running() as fleet:
        for _ in range(100):
            await asyncio.sleep(1)
            if fleet.stuck() is not None:
                break
        assert (fleet.stuck(), len(office.pool.asked)) == (error, launches)
    [said] = [line for line in office.said if "could not be launched" in line]
    assert said.endswith("; it is tried again") == (launches > 1)  # `serve --once` leaves where it is given up


async def test_machines_that_never_become_usable_are_not_waited_for_either(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their launches are answered; the pool says when it has had enough of them."""
    monkeypatch.setattr(office.pool, "why_no_room", lambda name: f"{name} is not launched: it did not start")
    await put(office.jobs)
    async with office.running() as fleet:
        await asyncio.sleep(5)
        [machine] = office.pool.machines
        monkeypatch.setattr(office.pool, "room", lambda _: 0)
        assert fleet.stuck() is None
        office.pool.lose(machine)
        await asyncio.sleep(5)
        stuck = fleet.stuck()
        assert isinstance(stuck, NoCapacity)
        assert stuck.message == "medium is not launched: it did not start"
        monkeypatch.setattr(office.pool, "pausing", lambda _: True)
        assert fleet.stuck() is None  # the pool takes breath only


@pytest.mark.fault(26)
async def test_a_token_that_is_refused_is_refused_for_every_type(office: Office) -> None:
    office.pool.fails |= dict.fromkeys(("medium", "large"), AuthRejected("the token is not accepted"))
    await put(office.jobs)
    async with office.running(types=("medium", "large")):
        await asyncio.sleep(FAILED_FIRST - 2)
        assert len(office.pool.asked) == 1
        await asyncio.sleep(10 * MINUTES)
        assert len(office.pool.asked) < 8
        assert len([s for s in office.said if "could not be launched" in s]) == 1


# -- budgets -------------------------------------------------------------------------------------------------


async def test_a_budget_that_allows_nothing_is_said_once_and_can_be_seen(office: Office) -> None:
    budget = Budget(Period.DAY, hard=Decimal("0.05"))
    await put(office.jobs, a_job(), a_job())
    async with office.running(budgets=[budget]) as fleet:
        await asyncio.sleep(2 * HOURS)
        assert office.pool.asked == []
        [sentence] = [s for s in office.said if "no machine is launched" in s]
        assert "the budget per day is $0.0500" in sentence
        assert "waiting until it resets does not help" in sentence  # it is smaller than a lease
        [refused] = await office.decisions("refused")
        assert (refused.what, refused.expected_usd) == ("medium", Decimal(0))
        assert "the budget per day" in refused.why
        [pause] = await office.jobs.pauses()
        assert (pause.scope, pause.reason) == (FLEET_SCOPE, "no-machine")
        assert "the budget per day" in pause.message
        stuck = fleet.stuck()
        assert isinstance(stuck, BudgetExceeded)
        assert await fleet.left() == 2
    assert await office.jobs.pauses() == []  # nobody plans any more


async def test_whose_budget_is_used_up_is_told_so_and_no_machine_is_launched_for_them(office: Office) -> None:
    nothing = Budget(Period.DAY, hard=Decimal(0), user="ann")
    await put(office.jobs, a_job(user="ann"))
    async with office.running(budgets=[nothing]) as fleet:
        await asyncio.sleep(30)
        stuck = fleet.stuck()
        assert isinstance(stuck, BudgetExceeded)
        assert stuck.details["budget"] == "day of user ann"
        assert fleet.barred().users == {"ann"}
        assert office.pool.asked == []
        await put(office.jobs, a_job(user="ben"))
        await asyncio.sleep(30)
        assert fleet.stuck() is None
        assert set(office.pool.whose) == {("ben", "")}


async def test_a_pause_that_somebody_else_asked_for_stands_whatever_the_fleet_says(office: Office) -> None:
    elsewhere = "host:another computer"

    async def scopes() -> set[str]:
        return {pause.scope for pause in await office.jobs.pauses()}

    await office.jobs.pause(scope=elsewhere, reason="by-hand", message="at lunch", by="ann")
    office.pool.fails["medium"] = NoCapacity("none left")
    await put(office.jobs)
    async with office.running():
        await asyncio.sleep(30)
        assert await scopes() == {elsewhere, FLEET_SCOPE}
        office.pool.fails.clear()
        await asyncio.sleep(5 * MINUTES)
        assert await scopes() == {elsewhere}
        office.pool.fails["medium"] = NoCapacity("none left")
        office.pool.lose(office.pool.machines[0])
        await asyncio.sleep(30)
        assert await scopes() == {elsewhere, FLEET_SCOPE}
    assert await scopes() == {elsewhere}
    assert office.role is not None
    resumed = [event.data["by"] for event in await office.jobs.events() if event.kind is EventKind.RESUMED]
    assert set(resumed) == {office.role.owner.id}


@pytest.mark.parametrize("whose", ["everybody's", "this computer's"])
async def test_a_paused_queue_gets_no_machine_and_keeps_none(office: Office, whose: str) -> None:
    """Surprise bills: nothing may be begun, so nothing is to be paid for."""
    await put(office.jobs)
    async with office.running() as fleet:
        await asyncio.sleep(30)
        assert len(office.pool.asked) == 1
        assert office.role is not None
        scope = QUEUE_SCOPE if whose == "everybody's" else host_scope(office.role.owner)
        await office.jobs.pause(scope=scope, reason="by-hand", message="at lunch", by="ann")
        await asyncio.sleep(5 * HOURS)
        assert not office.pool.machines
        assert len(office.pool.asked) == 1
        assert await fleet.left() == 1
        await office.jobs.resume(scope=scope, by="ann")
        await asyncio.sleep(30)
        assert len(office.pool.asked) == 2


async def test_machines_are_launched_again_when_a_pause_ends_by_itself(office: Office) -> None:
    await office.jobs.pause(scope=QUEUE_SCOPE, reason="x", message="y", retry_in=timedelta(hours=1), by="ann")
    await put(office.jobs)
    async with office.running():
        await asyncio.sleep(HOURS - 60)
        assert office.pool.asked == []
        await asyncio.sleep(2 * MINUTES)
        assert len(office.pool.asked) == 1


async def test_a_launch_is_for_the_one_user_and_project_that_wait(office: Office) -> None:
    await put(office.jobs, a_job(user="ann", project="film"))
    async with office.running():
        await asyncio.sleep(10)
    assert office.pool.whose == [("ann", "film")]
    await put(office.jobs, a_job(user="ben", project="film"))
    office.pool.lose(office.pool.machines[0])
    async with office.running():
        await asyncio.sleep(10)
    assert set(office.pool.whose[1:]) == {("", "film")}


# -- what machines cost and take -------------------------------------------------------------------------------


async def test_a_spared_cold_start_is_worth_its_load_and_the_waiting_at_the_machines_price(office: Office) -> None:
    offer = OfferView("medium", 2.0, boot_s=100.0, load_s=20.0)
    assert _worth_s(offer, 4.0, None) == 20 + 2 * 120
    assert _worth_s(offer, 4.0, 50.0) == 20 + 2 * 50
    assert _worth_s(replace(offer, usd_per_hour=0.0), 0.0, 50.0) == 20


@pytest.mark.parametrize(
    ("words", "usd"),
    [("batch", 2.0), (" Person-Waiting ", 40.0), ("person_waiting", 40.0), ("8.75", 8.75), (" $3 ", 3.0), ("0", 0.0)],
)
def test_waiting_has_a_price_in_words_or_usd(words: str, usd: float) -> None:
    assert wait_usd_per_hour(words, 2.0) == usd


@pytest.mark.parametrize("words", ["much", "-1", "nan", "1e6", ""])
def test_what_is_no_price_of_waiting_is_refused(words: str) -> None:
    with pytest.raises(ValueInvalid, match="is no price of waiting"):
        wait_usd_per_hour(words, 2.0)


async def test_how_long_starts_take_is_learned_from_three_of_ones_own(office: Office, tmp_path: Path) -> None:
    programs = settings_for(ACCOUNT, tmp_path)
    offers = FleetOffers(office.books, programs, office.clock, provider="runcomfy", types=("medium", "large", "medium"))
    assert (offers.types, offers.reference) == (("medium", "large"), "medium")
    usual = offers.boot_s("medium")
    owner = (await office.a_role(timedelta(days=1))).owner
    for number, seconds in enumerate((50, 60, 100)):
        assert await offers.refresh(at_once=True)
        assert (offers.boot_s("medium"), offers.own_starts) == (usual, {})
        at = office.clock.now() - timedelta(hours=1)
        row = Machine(
            id=MachineId(f"machine-{number}"),
            provider="runcomfy",
            account="test",
            purpose=Purpose.POOL,
            server_type="medium",
            duration=timedelta(hours=1),
            usd_per_hour=Decimal(1),
            rate_source="test",
            requested_at=at,
            since=at,
            owner_id=owner.id,
        )
        await office.books.add_machine(row, at=at)
        listed, changes = {"server_id": ServerId(f"s-{number}")}, {"ready_at": at + timedelta(seconds=seconds)}
        await office.books.record(row.id, MachineEvent.LISTED, at=at, by=owner.id, changes=listed)
        await office.books.record(row.id, MachineEvent.ANSWERED, at=at, by=owner.id, changes=changes)
    assert not await offers.refresh()  # what was read a moment ago is believed
    assert await offers.refresh(at_once=True)
    assert (offers.boot_s("medium"), offers.boot_s("large"), offers.own_starts) == (60, usual, {"medium": 3})
    [medium, large] = offers.views(lambda name: {"medium": 2, "large": -1}[name])
    assert (medium.name, medium.room, medium.boot_s) == ("medium", 2, 60.0)
    assert medium.boot_p90_s == pytest.approx(92)
    assert (large.name, large.room) == ("large", 0)
    assert (offers.boot_s("unheard-of"), offers.run_s("flux"), offers.load_s("flux", "medium")) == (60, UNKNOWN_RUN, 0)
