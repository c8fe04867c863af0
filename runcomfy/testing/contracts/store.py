"""
What every store must do, as tests: `class TestMine(StoreContract)` with a fixture `store` that gives an open one.

Each test writes rows of its own and looks at nothing else, so a store may be shared between them. `RacesContract` is
for databases that two processes can use: it wants a second open store, the fixture `rival`, over the same database.
Needs pytest.
"""

# ruff: noqa: S101 - the names of the tests say what is shown, and asserts show it

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import uuid4

import pytest

from runcomfy.domain.exceptions import LeaseLost, LocalError
from runcomfy.domain.lease import Use
from runcomfy.domain.machine import IllegalTransition, MachineEvent, MachineId, MachineState, OwnerId, Purpose, ServerId
from runcomfy.ports.store import Store
from runcomfy.testing.contracts.store_money import BudgetsContract, LedgerContract, RacesContract
from runcomfy.testing.contracts.store_signals import DecisionsContract, RolesContract, SignalsContract, WorkContract
from runcomfy.testing.contracts.store_words import ALICE, BOB, NOW, a_machine, after, an_entry, an_owner, ready

__all__ = [
    "ALICE",
    "BOB",
    "NOW",
    "RacesContract",
    "StoreContract",
    "a_machine",
    "after",
    "an_entry",
    "an_owner",
    "ready",
]


class OwnersContract:
    """Processes that may hold machines."""

    async def test_an_owner_is_found_as_it_was_registered(self, store: Store) -> None:
        owner = an_owner()
        await store.register_owner(owner)
        assert await store.owners([owner.id]) == {owner.id: owner}

    async def test_a_heartbeat_is_kept(self, store: Store) -> None:
        owner = an_owner()
        await store.register_owner(owner)
        await store.heartbeat(owner.id, at=after(15))
        assert (await store.owners([owner.id]))[owner.id].heartbeat_at == after(15)

    async def test_who_signed_off_is_found_only_by_name(self, store: Store) -> None:
        owner = an_owner()
        await store.register_owner(owner)
        assert owner.id in await store.owners()
        await store.sign_off(owner.id, at=after(9))
        assert owner.id not in await store.owners()
        assert (await store.owners([owner.id]))[owner.id].ended_at == after(9)

    async def test_those_are_left_out_who_are_named_so(self, store: Store) -> None:
        before = set(await store.owners())
        one, two = an_owner(), an_owner()
        await store.register_owner(one)
        await store.register_owner(two)
        assert set(await store.owners(but={one.id})) == before | {two.id}
        assert set(await store.owners(but={one.id, OwnerId("never-heard-of")})) == before | {two.id}
        assert set(await store.owners(but={one.id, two.id})) == before
        many = [OwnerId(f"gone-{n:05}") for n in range(6_000)]  # more than fit into a statement
        assert set(await store.owners(but=[*many, two.id])) == before | {one.id}

    async def test_nobody_is_found_by_no_name_or_an_unknown_one(self, store: Store) -> None:
        await store.register_owner(an_owner())
        assert await store.owners([]) == {}
        assert await store.owners([OwnerId("never-heard-of")]) == {}

    async def test_an_unknown_owner_cannot_say_that_it_lives(self, store: Store) -> None:
        with pytest.raises(LocalError):
            await store.heartbeat(OwnerId("never-heard-of"), at=NOW)


class MachinesContract:
    """Machines, who holds them, and what happened to them."""

    async def test_every_field_comes_back_exactly(self, store: Store) -> None:
        machine = a_machine(
            purpose=Purpose.DEV,
            duration=timedelta(days=3, microseconds=7),
            usd_per_hour=Decimal("0.1234567890123456789"),
            workflow_version_id="v1",
            reason="«für» 日本 '; DROP TABLE machines; --",
            before_ids=(ServerId("a"), ServerId("b,c")),
            server_id=ServerId("srv"),
            ready_at=after(0.000001),
            planned_stop_at=after(1),
            kept_until=after(2),
            stop_asked_at=after(3),
            stop_reason="because",
            stop_accepted_at=after(4),
            gone_at=after(5),
            last_used_at=after(6),
            epoch=5,
            run_id="run '--",
            for_project="a project",
            for_user="ann",
            asked_duration=timedelta(hours=2),
            draining="it is slow",
        )
        await store.add_machine(machine, at=NOW)
        assert await store.machine(machine.id) == machine

    async def test_an_unknown_machine_is_none(self, store: Store) -> None:
        assert await store.machine(MachineId("never-heard-of")) is None

    async def test_the_same_machine_is_not_added_twice(self, store: Store) -> None:
        machine = await ready(store)
        with pytest.raises(LocalError):
            await store.add_machine(replace(machine, state=MachineState.REQUESTED), at=NOW)
        assert await store.machine(machine.id) == machine

    async def test_machines_of_an_account_come_oldest_first(self, store: Store) -> None:
        account = f"account-{uuid4()}"
        for at in (after(20), after(10), after(30)):
            await store.add_machine(a_machine(account=account, requested_at=at), at=at)
        await store.add_machine(a_machine(), at=NOW)
        await store.add_machine(a_machine(account=account, provider="other"), at=NOW)
        found = await store.machines(provider="runcomfy", account=account)
        assert [machine.requested_at for machine in found] == [after(10), after(20), after(30)]

    async def test_closed_machines_are_shown_only_when_asked_for(self, store: Store) -> None:
        machine = await ready(store)
        never = a_machine(account=machine.account)
        await store.add_machine(never, at=NOW)
        await store.record(never.id, MachineEvent.REFUSED, at=after(1), by=ALICE)
        open_ones = await store.machines(provider="runcomfy", account=machine.account)
        everything = await store.machines(provider="runcomfy", account=machine.account, open_only=False)
        assert [m.id for m in open_ones] == [machine.id]
        assert {m.id for m in everything} == {machine.id, never.id}

    async def test_since_shows_what_was_open_then_or_later(self, store: Store) -> None:
        account = f"account-{uuid4()}"
        living = await ready(store, account=account)
        for end in (60, 120):
            machine = await ready(store, account=account)
            await store.record(
                machine.id, MachineEvent.GONE, at=after(end), by=ALICE, changes={"stop_reason": f"{end}"}
            )
        never = a_machine(account=account)
        await store.add_machine(never, at=NOW)
        await store.record(never.id, MachineEvent.REFUSED, at=after(1), by=ALICE)

        async def reasons(since: float) -> set[str]:
            found = await store.machines(provider="runcomfy", account=account, since=after(since))
            assert living.id in {machine.id for machine in found}
            return {str(machine.stop_reason or machine.state) for machine in found}

        assert await reasons(0) == {"ready", "60", "120", "never"}
        assert await reasons(60) == {"ready", "60", "120"}
        assert await reasons(61) == {"ready", "120"}
        assert await reasons(121) == {"ready"}

    async def test_what_a_pool_says_of_its_machines_changes_like_any_fact(self, store: Store) -> None:
        machine = await ready(store)
        fields: dict[str, Any] = {"run_id": "r", "for_project": "p", "for_user": "u", "draining": "sick"}
        told = await store.change(machine.id, at=after(50), by=ALICE, asked_duration=timedelta(hours=1), **fields)
        assert told == replace(machine, asked_duration=timedelta(hours=1), **fields)
        seen = await store.record(
            machine.id, MachineEvent.SILENT, at=after(51), by=ALICE, changes={"asked_duration": None, "draining": ""}
        )
        assert (seen.asked_duration, seen.draining, seen.for_user) == (None, "", "u")
        assert await store.machine(machine.id) == seen

    async def test_an_event_and_its_facts_are_written_together(self, store: Store) -> None:
        machine = a_machine()
        await store.add_machine(machine, at=NOW, note="for a job")
        changes: dict[str, Any] = {"server_id": ServerId("srv-9"), "planned_stop_at": after(600)}
        told = await store.record(machine.id, MachineEvent.LISTED, at=after(3), by=ALICE, changes=changes, note="seen")
        expected = replace(machine.on(MachineEvent.LISTED, at=after(3)), **changes)
        assert told == expected == await store.machine(machine.id)
        first, second = await store.story(machine.id)
        assert (first.number, first.state, first.note) == (1, "requested", "for a job")
        assert (second.number, second.event, second.state) == (2, "listed", "booting")
        assert (second.at, second.by, second.note, second.machine_id) == (after(3), ALICE, "seen", machine.id)

    async def test_what_cannot_happen_changes_nothing(self, store: Store) -> None:
        machine = a_machine()
        await store.add_machine(machine, at=NOW)
        with pytest.raises(IllegalTransition):
            await store.record(machine.id, MachineEvent.ANSWERED, at=after(1), by=ALICE, changes={"ready_at": after(1)})
        assert await store.machine(machine.id) == machine
        assert len(await store.story(machine.id)) == 1

    async def test_fields_change_without_an_event(self, store: Store) -> None:
        machine = await ready(store)
        told = await store.change(machine.id, at=after(50), by=BOB, kept_until=after(999), note="kept for the day")
        assert told == replace(machine, kept_until=after(999)) == await store.machine(machine.id)
        last = (await store.story(machine.id))[-1]
        assert (last.state, last.by, last.note) == ("ready", BOB, "kept for the day")

    @pytest.mark.parametrize("name", ["nonsense", "id", "state", "since", "owner_id", "epoch"])
    async def test_only_facts_can_be_changed_by_name(self, store: Store, name: str) -> None:
        machine = await ready(store)
        fields: Mapping[str, Any] = {name: "x"}
        with pytest.raises(TypeError):
            await store.change(machine.id, at=NOW, by=ALICE, note="", epoch=None, **fields)
        with pytest.raises(TypeError):
            await store.record(machine.id, MachineEvent.SILENT, at=NOW, by=ALICE, changes=fields)
        assert await store.machine(machine.id) == machine

    async def test_a_machine_nobody_added_cannot_change(self, store: Store) -> None:
        with pytest.raises(LocalError):
            await store.record(MachineId("never-heard-of"), MachineEvent.LISTED, at=NOW, by=ALICE)

    async def test_a_new_owner_outdates_what_the_old_one_knows(self, store: Store) -> None:
        machine = await ready(store)
        taken = await store.take_over(machine.id, expected_owner=ALICE, new_owner=BOB, at=after(50), note="alice died")
        assert taken == replace(machine, owner_id=BOB, epoch=machine.epoch + 1) == await store.machine(machine.id)
        with pytest.raises(LeaseLost):
            await store.record(machine.id, MachineEvent.STOP_ASKED, at=after(51), by=ALICE, epoch=machine.epoch)
        with pytest.raises(LeaseLost):
            await store.change(machine.id, at=after(51), by=ALICE, epoch=machine.epoch, kept_until=after(1))
        assert await store.machine(machine.id) == taken
        assert len(await store.story(machine.id)) == 4
        stopping = await store.record(machine.id, MachineEvent.STOP_ASKED, at=after(52), by=BOB, epoch=taken.epoch)
        assert stopping.state is MachineState.STOPPING

    async def test_only_one_of_two_takes_a_machine_over(self, store: Store) -> None:
        machine = await ready(store)
        await store.take_over(machine.id, expected_owner=ALICE, new_owner=BOB, at=NOW, note="")
        with pytest.raises(LeaseLost):
            await store.take_over(machine.id, expected_owner=ALICE, new_owner=OwnerId("carol"), at=NOW, note="")

    async def test_a_machine_can_be_left_to_nobody_and_found_again(self, store: Store) -> None:
        machine = await ready(store)
        left = await store.take_over(machine.id, expected_owner=ALICE, new_owner=None, at=NOW, note="kept")
        assert left.owner_id is None
        found = await store.take_over(machine.id, expected_owner=None, new_owner=BOB, at=NOW, note="used")
        assert (found.owner_id, found.epoch) == (BOB, machine.epoch + 2)

    async def test_boot_times_are_the_newest_of_that_type(self, store: Store) -> None:
        kind = f"type-{uuid4()}"
        for start, boot in ((0, 40), (100, 50), (200, 60)):
            machine = a_machine(server_type=kind, requested_at=after(start))
            await store.add_machine(machine, at=after(start))
            await store.record(machine.id, MachineEvent.LISTED, at=after(start), by=ALICE)
            seen = after(start + boot)
            await store.record(machine.id, MachineEvent.ANSWERED, at=seen, by=ALICE, changes={"ready_at": seen})
        await store.add_machine(a_machine(server_type=kind), at=NOW)
        times = await store.boot_times(provider="runcomfy", server_type=kind, limit=2)
        assert times == [timedelta(seconds=60), timedelta(seconds=50)]
        assert await store.boot_times(provider="runcomfy", server_type="never-rented") == []

    async def test_a_time_without_a_zone_is_not_stored(self, store: Store) -> None:
        machine = a_machine(requested_at=NOW.replace(tzinfo=None))
        with pytest.raises((TypeError, ValueError)):
            await store.add_machine(machine, at=NOW)
        assert await store.machine(machine.id) is None


class UsesContract:
    """Jobs on machines."""

    async def test_a_use_is_seen_until_it_ends(self, store: Store) -> None:
        machine = await ready(store)
        use = Use(machine.id, ALICE, f"job-{uuid4()}", started_at=after(60))
        await store.begin_use(use)
        assert list(await store.uses([machine.id])) == [use]
        assert use in await store.uses()
        await store.end_use(machine.id, use.job_id, at=after(90))
        assert list(await store.uses([machine.id])) == []
        assert use not in await store.uses()
        after_use = await store.machine(machine.id)
        assert after_use is not None
        assert after_use.last_used_at == after(90)

    async def test_ending_twice_counts_once(self, store: Store) -> None:
        machine = await ready(store)
        await store.begin_use(Use(machine.id, ALICE, "job", started_at=NOW))
        await store.end_use(machine.id, "job", at=after(90))
        await store.end_use(machine.id, "job", at=after(900))
        await store.end_use(machine.id, "another", at=after(900))
        after_use = await store.machine(machine.id)
        assert after_use is not None
        assert after_use.last_used_at == after(90)

    async def test_uses_of_other_machines_are_left_alone(self, store: Store) -> None:
        one, other = await ready(store), await ready(store)
        await store.begin_use(Use(one.id, ALICE, "job", started_at=NOW))
        await store.begin_use(Use(other.id, ALICE, "job", started_at=NOW))
        await store.end_use(one.id, "job", at=after(1))
        assert [use.machine_id for use in await store.uses([one.id, other.id])] == [other.id]
        assert list(await store.uses([])) == []

    @pytest.mark.parametrize(
        "events",
        [
            [MachineEvent.REFUSED],
            [MachineEvent.LISTED, MachineEvent.STOP_ASKED],
            [MachineEvent.LISTED, MachineEvent.GONE],
        ],
        ids=["never", "stopping", "stopped"],
    )
    async def test_no_job_starts_on_a_machine_that_ends(self, store: Store, events: list[MachineEvent]) -> None:
        machine = a_machine()
        await store.add_machine(machine, at=NOW)
        for event in events:
            await store.record(machine.id, event, at=NOW, by=ALICE)
        with pytest.raises(LeaseLost):
            await store.begin_use(Use(machine.id, ALICE, "job", started_at=NOW))
        assert list(await store.uses([machine.id])) == []

    async def test_a_job_that_comes_back_uses_its_machine_under_its_new_owner(self, store: Store) -> None:
        machine = await ready(store)
        await store.begin_use(Use(machine.id, ALICE, "job", started_at=NOW))
        again = Use(machine.id, BOB, "job", started_at=after(5))
        await store.begin_use(again)
        assert list(await store.uses([machine.id])) == [again]

    async def test_signing_off_ends_the_owners_uses_and_nobody_elses(self, store: Store) -> None:
        machine, owner = await ready(store), an_owner()
        await store.register_owner(owner)
        await store.begin_use(Use(machine.id, owner.id, "mine", started_at=NOW))
        await store.begin_use(Use(machine.id, BOB, "bobs", started_at=NOW))
        await store.sign_off(owner.id, at=after(70))
        assert [use.job_id for use in await store.uses([machine.id])] == ["bobs"]
        seen = await store.machine(machine.id)
        assert seen is not None
        assert seen.last_used_at == after(70)


class SharedByProcessesContract:
    """The account's rate limit and launch lock."""

    async def reserve(self, store: Store, account: str, *, now: datetime = NOW, urgent: bool = False) -> float:
        wait = await store.reserve_request(account, now=now, per_second=1.0, burst=5, reserve=2, urgent=urgent)
        return wait.total_seconds()

    async def test_a_burst_is_free_and_then_one_goes_per_second(self, store: Store) -> None:
        account = f"account-{uuid4()}"
        assert [await self.reserve(store, account) for _ in range(6)] == [0, 0, 0, 1, 2, 3]
        assert await self.reserve(store, f"account-{uuid4()}") == 0

    async def test_who_comes_when_the_bucket_is_full_again_does_not_wait(self, store: Store) -> None:
        account = f"account-{uuid4()}"
        for _ in range(5):
            await self.reserve(store, account)
        assert await self.reserve(store, account, now=after(5)) == 0

    async def test_urgent_ones_pass_those_who_wait(self, store: Store) -> None:
        account = f"account-{uuid4()}"
        for _ in range(30):
            await self.reserve(store, account)
        assert [await self.reserve(store, account, urgent=True) for _ in range(2)] == [0, 0]
        assert await self.reserve(store, account, urgent=True) > 0

    async def test_urgent_ones_may_have_the_whole_burst(self, store: Store) -> None:
        account = f"account-{uuid4()}"
        assert [await self.reserve(store, account, urgent=True) for _ in range(6)] == [0, 0, 0, 0, 0, 1]

    async def test_a_hold_holds_everybody(self, store: Store) -> None:
        account = f"account-{uuid4()}"
        await store.hold_requests(account, now=NOW, wait=timedelta(seconds=30))
        await store.hold_requests(account, now=NOW, wait=timedelta(seconds=10))
        assert await self.reserve(store, account, now=after(1)) == 29
        assert await self.reserve(store, account, now=after(1), urgent=True) == 29
        assert await self.reserve(store, account, now=after(1)) > 29
        assert await store.requests_held(account, now=after(10)) == timedelta(seconds=20)
        assert await self.reserve(store, account, now=after(60)) == 0
        assert await store.requests_held(account, now=after(60)) == timedelta(0)

    async def test_a_hold_of_no_length_holds_nobody(self, store: Store) -> None:
        account = f"account-{uuid4()}"
        await store.hold_requests(account, now=NOW, wait=timedelta(seconds=-5))
        assert await self.reserve(store, account) == 0

    @pytest.mark.parametrize("jump", [timedelta(days=1), timedelta(days=-1)])
    async def test_a_clock_that_jumps_blocks_nobody(self, store: Store, jump: timedelta) -> None:
        account = f"account-{uuid4()}"
        for _ in range(5):
            await self.reserve(store, account)
        assert await self.reserve(store, account, now=NOW + jump) <= 10
        assert await self.reserve(store, account, now=NOW + timedelta(seconds=1)) <= 10

    @pytest.mark.parametrize("jump", [timedelta(days=1), timedelta(days=-1)])
    async def test_a_hold_does_not_grow_with_a_clock_that_jumps(self, store: Store, jump: timedelta) -> None:
        account = f"account-{uuid4()}"
        await store.hold_requests(account, now=NOW, wait=timedelta(seconds=30))
        assert await store.requests_held(account, now=NOW + jump) <= timedelta(seconds=30)
        assert await self.reserve(store, account, now=NOW + jump) <= 40
        await store.hold_requests(account, now=NOW + jump, wait=timedelta(seconds=30))
        assert await self.reserve(store, account) <= 70

    async def test_one_owner_at_a_time_may_launch(self, store: Store) -> None:
        account = f"account-{uuid4()}"
        assert await store.take_launch_lock(account, owner_id=ALICE, now=NOW) == ALICE
        assert await store.take_launch_lock(account, owner_id=ALICE, now=after(1)) == ALICE
        assert await store.take_launch_lock(account, owner_id=BOB, now=after(86400)) == ALICE
        assert await store.take_launch_lock(f"account-{uuid4()}", owner_id=BOB, now=NOW) == BOB

    async def test_the_launch_lock_is_broken_only_for_who_has_it(self, store: Store) -> None:
        account = f"account-{uuid4()}"
        await store.break_launch_lock(account, holder=ALICE)
        await store.take_launch_lock(account, owner_id=ALICE, now=NOW)
        await store.break_launch_lock(account, holder=BOB)
        assert await store.take_launch_lock(account, owner_id=BOB, now=NOW) == ALICE
        await store.break_launch_lock(account, holder=ALICE)
        assert await store.take_launch_lock(account, owner_id=BOB, now=NOW) == BOB


class StoreContract(
    OwnersContract,
    MachinesContract,
    UsesContract,
    WorkContract,
    SignalsContract,
    DecisionsContract,
    RolesContract,
    BudgetsContract,
    LedgerContract,
    SharedByProcessesContract,
):
    """Everything `runcomfy.ports.store.Store` promises."""
