"""Money, as every store keeps it: budgets that hold, bills that are closed once, a ledger that is only added to."""

# ruff: noqa: D102, S101 - the names of the tests say what is shown, and asserts show it

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal
from functools import partial
from itertools import pairwise
from uuid import uuid4

import pytest

from runcomfy.domain.budget import Budget, BudgetState, Period
from runcomfy.domain.exceptions import BudgetExceeded, LeaseLost, LocalError
from runcomfy.domain.machine import Machine, MachineEvent, MachineId
from runcomfy.domain.money import LedgerEntry, meter
from runcomfy.ports.store import Store
from runcomfy.testing.contracts.store_words import ALICE, BOB, NOW, a_machine, a_work, after, an_entry, ready

SIX = Decimal(6)
"""USD per hour: ten minutes are one dollar."""
DAY_AFTER = NOW + timedelta(days=1)


def usd(text: str) -> Decimal:
    """Return an amount."""
    return Decimal(text)


def per_day(hard: str, *, user: str | None = None, project: str | None = None) -> Budget:
    """Return a hard cap per day."""
    return Budget(Period.DAY, usd(hard), user=user, project=project)


async def spent(store: Store, budget: Budget, account: str, *, now: datetime = NOW, run_id: str = "") -> Decimal:
    """Return what is committed of one account."""
    [state] = await store.budgets([budget], now=now, run_id=run_id, provider="runcomfy", account=account)
    return state.committed


class BudgetsContract:
    """Caps, checked where the intent is written (I6)."""

    async def test_within_a_cap_the_intent_is_written_and_the_states_are_told(self, store: Store) -> None:
        machine, budget = a_machine(usd_per_hour=SIX), per_day("1.00")
        [state] = await store.add_machine(machine, at=NOW, budgets=[budget])
        assert state == BudgetState(budget, budget.window(NOW), usd("1"))
        assert await store.machine(machine.id) == machine
        assert await spent(store, budget, machine.account) == usd("1")

    async def test_above_it_nothing_is_written(self, store: Store) -> None:
        first = a_machine(usd_per_hour=SIX)
        budgets = [per_day("1.50"), Budget(Period.MONTH, usd("100"))]
        await store.add_machine(first, at=NOW, budgets=budgets)
        second = a_machine(usd_per_hour=SIX, account=first.account)
        with pytest.raises(BudgetExceeded, match=r"\$1\.50.*\$1\.00 is spent") as caught:
            await store.add_machine(second, at=NOW, budgets=budgets)
        assert "resets at" in caught.value.hint
        assert await store.machine(second.id) is None
        assert list(await store.story(second.id)) == []
        assert await spent(store, budgets[0], first.account) == usd("1")

    async def test_what_is_over_counts_in_its_window_and_not_in_the_next(self, store: Store) -> None:
        machine = await ready(store, usd_per_hour=SIX)
        gone = after(40 + 1800)
        await store.record(machine.id, MachineEvent.GONE, at=gone, by=ALICE, changes={"stop_accepted_at": gone})
        assert await spent(store, per_day("9"), machine.account, now=after(3600)) == usd("3")
        assert await spent(store, per_day("9"), machine.account, now=DAY_AFTER) == 0
        assert await spent(store, Budget(Period.HOUR), machine.account, now=after(120)) == usd("3")
        assert await spent(store, Budget(Period.HOUR), machine.account, now=after(3602)) == 0
        new = a_machine(usd_per_hour=SIX, account=machine.account)
        with pytest.raises(BudgetExceeded):
            await store.add_machine(new, at=after(3600), budgets=[per_day("3.99")])
        await store.add_machine(new, at=DAY_AFTER, budgets=[per_day("1.00")])

    async def test_what_never_ran_counts_nothing(self, store: Store) -> None:
        machine = a_machine(usd_per_hour=SIX)
        await store.add_machine(machine, at=NOW)
        await store.record(machine.id, MachineEvent.REFUSED, at=NOW, by=ALICE)
        gone = a_machine(usd_per_hour=SIX, account=machine.account)
        await store.add_machine(gone, at=NOW)
        for event in (MachineEvent.LISTED, MachineEvent.GONE):
            await store.record(gone.id, event, at=NOW, by=ALICE)
        assert await spent(store, per_day("9"), machine.account) == 0

    async def test_other_accounts_do_not_count_and_without_a_name_all_do(self, store: Store) -> None:
        run = f"run-{uuid4()}"
        one, two = (a_machine(usd_per_hour=SIX, run_id=run) for _ in range(2))
        budget = Budget(Period.RUN, usd("1"))
        for machine in (one, two):
            await store.add_machine(machine, at=NOW, budgets=[budget])
        assert await spent(store, budget, one.account, run_id=run) == usd("1")
        [both] = await store.budgets([budget], now=NOW, run_id=run)
        assert both.committed == usd("2")
        assert await store.budgets([], now=NOW) == []

    async def test_a_run_is_counted_however_long_ago_it_began(self, store: Store) -> None:
        run, budget = f"run-{uuid4()}", Budget(Period.RUN, usd("1.50"))
        old = await ready(store, usd_per_hour=SIX, run_id=run)
        await store.record(old.id, MachineEvent.GONE, at=after(40 + 600), by=ALICE)
        now = NOW + timedelta(days=99)
        assert await spent(store, budget, old.account, now=now, run_id=run) == usd("1")
        new = a_machine(usd_per_hour=SIX, run_id=run, account=old.account)
        with pytest.raises(BudgetExceeded, match="budget per run"):
            await store.add_machine(new, at=now, budgets=[budget])
        await store.add_machine(replace(new, run_id=f"run-{uuid4()}"), at=now, budgets=[budget])

    async def test_users_and_projects_count_by_their_busy_seconds(self, store: Store) -> None:
        machine = await ready(store, usd_per_hour=SIX, for_user="carol", for_project="p")
        whose = [per_day("9", user=name) for name in ("ann", "o'bob", "carol")] + [per_day("9", project="p")]

        async def shares() -> list[Decimal]:
            now = after(60)
            states = await store.budgets(whose, now=now, provider="runcomfy", account=machine.account)
            return [state.committed for state in states]

        assert await shares() == [0, 0, usd("1"), usd("1")]
        await store.put_work(a_work(machine, "1", user="ann", computing_at=after(40), computed_at=after(49)))
        await store.put_work(
            a_work(machine, "2", user="o'bob", project="p", computing_at=after(49), computed_at=after(52))
        )
        await store.put_work(a_work(machine, "3", user="carol", computing_at=None, computed_at=None, ended_at=None))
        assert await shares() == [usd("0.75"), usd("0.25"), 0, usd("0.25")]
        anns = a_machine(usd_per_hour=SIX, account=machine.account, for_user="ann")
        with pytest.raises(BudgetExceeded, match="user ann"):
            await store.add_machine(anns, at=after(60), budgets=[per_day("1.74", user="ann")])
        await store.add_machine(anns, at=after(60), budgets=[per_day("1.75", user="ann")])

    async def test_a_longer_time_is_asked_for_within_the_budgets(self, store: Store) -> None:
        machine = await ready(store, usd_per_hour=SIX)
        budget, total = per_day("2.00"), timedelta(minutes=20)
        asked, [state] = await store.ask_duration(
            machine.id, total=total, at=after(60), by=ALICE, epoch=1, budgets=[budget]
        )
        assert asked == replace(machine, asked_duration=total) == await store.machine(machine.id)
        assert state.committed == usd("2")
        last = (await store.story(machine.id))[-1]
        assert (last.by, last.state) == (ALICE, "ready")
        with pytest.raises(BudgetExceeded):
            await store.ask_duration(
                machine.id, total=total + timedelta(seconds=1), at=after(61), by=ALICE, epoch=1, budgets=[budget]
            )
        assert await store.machine(machine.id) == asked
        assert len(await store.story(machine.id)) == last.number
        again, states = await store.ask_duration(machine.id, total=total, at=after(62), by=ALICE, epoch=1)
        assert (again, list(states)) == (asked, [])

    async def test_who_lost_the_machine_asks_for_nothing(self, store: Store) -> None:
        machine = await ready(store)
        taken = await store.take_over(machine.id, expected_owner=ALICE, new_owner=BOB, at=NOW, note="")
        with pytest.raises(LeaseLost):
            await store.ask_duration(machine.id, total=timedelta(hours=1), at=NOW, by=ALICE, epoch=machine.epoch)
        assert await store.machine(machine.id) == taken
        with pytest.raises(LocalError):
            await store.ask_duration(MachineId("nobody"), total=timedelta(hours=1), at=NOW, by=ALICE, epoch=1)

    async def test_an_alert_is_given_once(self, store: Store) -> None:
        key = f"day of user 'ann'; -- {uuid4()} 2026-03-29"
        assert await store.first_alert(key, at=NOW)
        assert not await store.first_alert(key, at=after(1))
        assert await store.first_alert(f"{key}!", at=after(1))


class LedgerContract:
    """What was spent."""

    async def test_entries_come_back_in_the_order_of_writing(self, store: Store) -> None:
        machine = await ready(store)
        entries = [
            an_entry(machine, started_at=after(60), amount_usd=Decimal("0.000001")),
            an_entry(machine, job_id="job", note="a note", amount_usd=Decimal("12345678901234.567890")),
            an_entry(machine, started_at=after(30), usd_per_hour=Decimal("2.5")),
        ]
        await store.post(entries[:2])
        await store.post([])
        await store.post(entries[2:])
        assert list(await store.ledger(machine_id=machine.id)) == entries
        assert [entry for entry in await store.ledger() if entry.machine_id == machine.id] == entries

    async def test_a_posting_is_written_whole_or_not_at_all(self, store: Store) -> None:
        machine = await ready(store)
        with pytest.raises(LocalError):
            await store.post([an_entry(machine), an_entry(a_machine())])
        assert list(await store.ledger(machine_id=machine.id)) == []

    async def test_since_leaves_out_what_ended_before(self, store: Store) -> None:
        machine = await ready(store)
        entries = [an_entry(machine, started_at=after(n), ended_at=after(n + 60)) for n in (0, 60, 120)]
        await store.post(entries)
        assert list(await store.ledger(machine_id=machine.id, since=after(60))) == entries[1:]
        later = await store.ledger(since=after(179))
        assert [entry for entry in later if entry.machine_id == machine.id] == entries[2:]
        assert list(await store.ledger(machine_id=machine.id, since=after(180))) == []

    async def test_a_bill_is_brought_up_to_a_moment_and_no_second_is_written_twice(self, store: Store) -> None:
        machine = await ready(store, usd_per_hour=SIX)

        async def close(end: float) -> LedgerEntry | None:
            return await store.close_bill(machine.id, end=after(end), recorded_at=after(700), note="stopped")

        first = await close(100)
        assert first is not None
        assert (first.started_at, first.ended_at, first.amount_usd) == (after(40), after(100), usd("0.1"))
        assert (first.recorded_at, first.note, first.usd_per_hour, first.job_id) == (after(700), "stopped", SIX, None)
        assert await close(100) is None
        assert await close(70) is None
        second = await close(160)
        assert second is not None
        assert (second.started_at, second.ended_at) == (after(100), after(160))
        assert list(await store.ledger(machine_id=machine.id)) == [first, second]

    async def test_a_machine_that_was_never_ready_has_no_bill(self, store: Store) -> None:
        machine = a_machine()
        await store.add_machine(machine, at=NOW)
        assert await store.close_bill(machine.id, end=after(100), recorded_at=NOW, note="") is None
        with pytest.raises(LocalError):
            await store.close_bill(MachineId("nobody"), end=after(100), recorded_at=NOW, note="")
        early = await ready(store)
        assert await store.close_bill(early.id, end=after(40), recorded_at=NOW, note="") is None
        assert list(await store.ledger(machine_id=early.id)) == []

    async def test_a_bill_goes_on_from_what_was_posted(self, store: Store) -> None:
        machine = await ready(store)
        await store.post([an_entry(machine, started_at=after(40), ended_at=after(90))])
        entry = await store.close_bill(machine.id, end=after(100), recorded_at=after(100), note="")
        assert entry is not None
        assert entry.started_at == after(90)

    @pytest.mark.parametrize("accepted", [True, False])
    async def test_a_bill_is_closed_with_the_write_that_ends_it(self, store: Store, accepted: bool) -> None:
        """Invariant I9: whoever dies after that write, or loses the machine, leaves no bill open."""
        machine = await ready(store, usd_per_hour=SIX)
        await store.record(machine.id, MachineEvent.STOP_ASKED, at=after(90), by=ALICE)
        assert list(await store.ledger(machine_id=machine.id)) == []
        if accepted:
            await store.change(machine.id, at=after(101), by=ALICE, stop_accepted_at=after(100))
        await store.record(machine.id, MachineEvent.GONE, at=after(120), by=ALICE, changes={"gone_at": after(110)})
        [entry] = await store.ledger(machine_id=machine.id)
        ended, words = (after(100), "the stop was accepted") if accepted else (after(110), "gone")
        assert (entry.started_at, entry.ended_at, entry.note) == (after(40), ended, f"ready until {words}")
        assert entry.amount_usd == meter(after(40), ended, SIX)
        assert await store.close_bill(machine.id, end=ended, recorded_at=after(130), note="") is None

    async def test_a_bill_that_was_opened_again_goes_on(self, store: Store) -> None:
        machine = await ready(store, usd_per_hour=SIX)
        await store.record(machine.id, MachineEvent.STOP_ASKED, at=after(90), by=ALICE)
        await store.change(machine.id, at=after(100), by=ALICE, stop_accepted_at=after(100))
        await store.change(machine.id, at=after(105), by=ALICE, stop_accepted_at=None)
        await store.change(machine.id, at=after(130), by=ALICE, stop_accepted_at=after(130))
        _is_whole(machine, [(e.started_at, e.ended_at) for e in await store.ledger(machine_id=machine.id)])

    async def test_a_bill_that_the_ledger_does_not_reach_is_found(self, store: Store) -> None:
        machine = await ready(store, account=f"account-{uuid4()}")
        where = partial(store.unbilled, provider=machine.provider, account=machine.account)
        assert list(await where()) == []
        await store.record(machine.id, MachineEvent.STOP_ASKED, at=after(90), by=ALICE)
        await store.change(machine.id, at=after(100), by=ALICE, stop_accepted_at=after(100))
        assert list(await where()) == []
        # written by an older version, which posted by itself: this one can write no such machine
        left = a_machine(account=machine.account, ready_at=after(40), stop_accepted_at=after(100))
        await store.add_machine(left, at=NOW)
        assert [found.id for found in await where()] == [left.id]
        assert list(await where(since=after(1))) == []
        await store.post([an_entry(left, started_at=after(40), ended_at=after(99))])
        assert [found.id for found in await where(since=NOW)] == [left.id]
        await store.close_bill(left.id, end=after(100), recorded_at=after(200), note="")
        assert list(await where()) == []


class RacesContract:
    """Two processes on one database."""

    async def test_of_two_only_one_spends_the_last_dollar(self, store: Store, rival: Store) -> None:
        for n in range(8):
            account, budgets = f"account-{uuid4()}", [per_day("2.50"), Budget(Period.HOUR, usd("2.50"))]
            wanted = [a_machine(usd_per_hour=SIX, account=account, for_user=f"{n}") for _ in range(6)]
            answers = await asyncio.gather(
                *(
                    (store, rival)[number % 2].add_machine(machine, at=NOW, budgets=budgets)
                    for number, machine in enumerate(wanted)
                ),
                return_exceptions=True,
            )
            refused = [answer for answer in answers if isinstance(answer, BudgetExceeded)]
            assert len(refused) == 4, answers
            assert await spent(store, budgets[0], account) == usd("2")

    async def test_who_has_no_budgets_counts_for_those_who_have(self, store: Store, rival: Store) -> None:
        for _ in range(8):
            account, budget = f"account-{uuid4()}", per_day("1.50")
            free, capped = (a_machine(usd_per_hour=SIX, account=account) for _ in range(2))
            _, answer = await asyncio.gather(
                store.add_machine(free, at=NOW),
                rival.add_machine(capped, at=NOW, budgets=[budget]),
                return_exceptions=True,
            )
            committed = await spent(store, budget, account)
            if isinstance(answer, BudgetExceeded):
                assert committed == usd("1")
            else:  # it was first, and saw an account without machines
                assert answer[0].committed == usd("1")  # type: ignore[index]

    async def test_a_launch_and_a_longer_lease_do_not_both_pass(self, store: Store, rival: Store) -> None:
        for _ in range(8):
            machine, budget = await ready(store, usd_per_hour=SIX), per_day("2.00")
            new = a_machine(usd_per_hour=SIX, account=machine.account)
            longer = timedelta(minutes=20)
            answers = await asyncio.gather(
                store.ask_duration(machine.id, total=longer, at=after(60), by=ALICE, epoch=1, budgets=[budget]),
                rival.add_machine(new, at=after(60), budgets=[budget]),
                return_exceptions=True,
            )
            assert [isinstance(answer, BudgetExceeded) for answer in answers].count(True) == 1, answers
            assert await spent(store, budget, machine.account, now=after(60)) == usd("2")

    async def test_two_that_close_a_bill_write_it_once(self, store: Store, rival: Store) -> None:
        for _ in range(8):
            machine = await ready(store, usd_per_hour=SIX)
            ends = [after(100), after(100), after(130), after(130), after(90)]
            await asyncio.gather(
                *(
                    (store, rival)[n % 2].close_bill(machine.id, end=end, recorded_at=NOW, note="")
                    for n, end in enumerate(ends)
                )
            )
            _is_whole(machine, [(e.started_at, e.ended_at) for e in await store.ledger(machine_id=machine.id)])

    async def test_one_of_two_gives_an_alert(self, store: Store, rival: Store) -> None:
        for _ in range(8):
            key = str(uuid4())
            told = await asyncio.gather(*((store, rival)[n % 2].first_alert(key, at=NOW) for n in range(4)))
            assert sorted(told) == [False, False, False, True]

    async def test_one_of_two_takes_a_role(self, store: Store, rival: Store) -> None:
        for _ in range(8):
            role = f"role-{uuid4()}"
            epochs = await asyncio.gather(
                store.take_role(role, ALICE, now=NOW, lease=timedelta(seconds=60)),
                rival.take_role(role, BOB, now=NOW, lease=timedelta(seconds=60)),
            )
            assert sorted(epoch is None for epoch in epochs) == [False, True]


def _is_whole(machine: Machine, intervals: list[tuple[datetime, datetime]]) -> None:
    assert machine.ready_at is not None
    assert intervals[0][0] == machine.ready_at
    assert intervals[-1][1] == after(130)
    assert all(one[1] == two[0] for one, two in pairwise(intervals))
