"""What plans are made of, as every store keeps it: work, signals, decisions, and the role of who plans."""

# ruff: noqa: D102, S101 - the names of the tests say what is shown, and asserts show it

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from uuid import uuid4

import pytest

from runcomfy.domain.decision import Decision
from runcomfy.domain.job import JobId
from runcomfy.domain.machine import MachineId
from runcomfy.domain.signal import Signal, SignalKind
from runcomfy.domain.work import Work
from runcomfy.ports.store import Store
from runcomfy.testing.contracts.store_words import ALICE, BOB, NOW, a_machine, a_work, after, an_owner

HOSTILE = '\'; DROP TABLE machine_work; -- \N{HIRAGANA LETTER A}\x1b[31m %s %(at)s :at "user"'
LEASE = timedelta(seconds=60)


class WorkContract:
    """Jobs' time on machines."""

    async def test_work_comes_back_exactly(self, store: Store) -> None:
        machine = a_machine()
        work = a_work(machine, HOSTILE, user=HOSTILE, project=HOSTILE, workflow=HOSTILE, attempt=2**40, cold=True)
        bare = Work(machine.id, work.job_id, 0, "w", "medium", after(1))
        for one in (work, bare):
            await store.put_work(one)
        assert list(await store.works(machine_ids=[machine.id])) == [work, bare]

    async def test_what_is_newer_replaces_what_was_known(self, store: Store) -> None:
        machine = a_machine()
        seated = a_work(machine, computing_at=None, computed_at=None, ended_at=None, outcome="")
        done = a_work(machine)
        again = replace(done, attempt=2, outcome="failed")
        for work in (seated, done, again, done):
            await store.put_work(work)
        assert list(await store.works(machine_ids=[machine.id])) == [done, again]

    async def test_work_is_found_by_machine_and_by_when_it_began(self, store: Store) -> None:
        one, two = a_machine(), a_machine()
        works = [a_work((one, two)[n % 2], f"{n}", began_at=after(n)) for n in (3, 1, 4, 0, 2)]
        for work in works:
            await store.put_work(work)
        ids = [one.id, two.id]

        async def names(**which: object) -> str:
            return "".join(work.job_id for work in await store.works(**which))  # type: ignore[arg-type]

        assert await names(machine_ids=ids) == "01234"
        assert await names(machine_ids=[one.id]) == "024"
        assert await names(machine_ids=ids, job_ids=[JobId("1"), JobId("4")]) == "14"
        assert await names(machine_ids=[one.id], job_ids=[JobId("1"), JobId("4")]) == "4"
        assert await names(machine_ids=ids, job_ids=[]) == ""
        assert await names(machine_ids=ids, since=after(1), until=after(4)) == "123"
        assert await names(machine_ids=ids, limit=2) == "34"
        assert await names(machine_ids=ids, until=after(3), limit=2) == "12"
        assert await names(machine_ids=ids, limit=0) == ""
        assert await names(machine_ids=[]) == ""
        assert set(works) <= set(await store.works(since=NOW))
        newest = await store.works(since=NOW, limit=3)
        assert list(newest) == list(await store.works(since=NOW))[-3:]

    async def test_very_many_machines_may_be_asked_about(self, store: Store) -> None:
        machine = a_machine()
        await store.put_work(a_work(machine))
        ids = [MachineId(f"{uuid4()}-{n}") for n in range(70_000)]
        assert len(await store.works(machine_ids=[*ids, machine.id], limit=5)) == 1
        assert len(await store.uses([*ids, machine.id])) == 0


class SignalsContract:
    """What clients told."""

    async def test_signals_come_back_exactly_and_oldest_first(self, store: Store) -> None:
        source = f"{HOSTILE}{uuid4()}"
        full = Signal(SignalKind.BATCH, source, after(9), after(99), 2**40, timedelta(hours=9), after(60), user=HOSTILE)
        told = [full, Signal(SignalKind.LEFT, source, after(5)), Signal(SignalKind.OPENED, source, after(7), after(8))]
        for signal in told:
            await store.signal(signal)

        async def mine(since: float) -> list[Signal]:
            return [signal for signal in await store.signals(since=after(since)) if signal.source == source]

        assert await mine(0) == [told[1], told[2], told[0]]
        assert await mine(7) == [told[2], told[0]]
        assert await mine(9.000001) == []

    async def test_what_is_said_twice_is_kept_twice_in_its_order(self, store: Store) -> None:
        source = str(uuid4())
        for kind in (SignalKind.OPENED, SignalKind.LEFT, SignalKind.OPENED):
            await store.signal(Signal(kind, source, NOW))
        kinds = [signal.kind for signal in await store.signals(since=NOW) if signal.source == source]
        assert kinds == [SignalKind.OPENED, SignalKind.LEFT, SignalKind.OPENED]


class DecisionsContract:
    """What plans decided."""

    async def test_the_newest_decisions_come_oldest_first(self, store: Store) -> None:
        later = NOW + timedelta(days=400)
        made = [
            Decision(later + timedelta(seconds=n), "launch", HOSTILE, f"{HOSTILE}{n}", Decimal("0.10") * n, ALICE)
            for n in range(5)
        ]
        made.append(Decision(later, "stop", "m", "idle"))
        await store.decide(made[:3])
        await store.decide([])
        await store.decide(made[3:])
        assert list(await store.decisions(limit=6)) == made
        assert list(await store.decisions(limit=2)) == made[-2:]
        since = await store.decisions(since=later + timedelta(seconds=3))
        assert [decision for decision in since if decision.what == HOSTILE][-2:] == made[3:5]
        assert made[5] not in since


class RolesContract:
    """What one process of the database does at a time."""

    async def test_a_role_has_one_holder_until_its_lease_is_over(self, store: Store) -> None:
        role = f"role-{uuid4()}"
        assert await store.take_role(role, ALICE, now=NOW, lease=LEASE) == 1
        assert await store.take_role(role, BOB, now=after(59), lease=LEASE) is None
        assert await store.take_role(role, ALICE, now=after(59), lease=LEASE) == 1
        assert await store.take_role(role, BOB, now=after(60), lease=LEASE) is None
        assert await store.take_role(role, BOB, now=after(119), lease=LEASE) == 2
        assert await store.take_role(role, ALICE, now=after(120), lease=LEASE) is None

    async def test_a_role_that_is_given_up_is_free(self, store: Store) -> None:
        role = f"role-{uuid4()}"
        await store.drop_role(role, ALICE)
        await store.take_role(role, ALICE, now=NOW, lease=LEASE)
        await store.drop_role(role, BOB)
        assert await store.take_role(role, BOB, now=after(1), lease=LEASE) is None
        await store.drop_role(role, ALICE)
        assert await store.take_role(role, BOB, now=after(1), lease=LEASE) == 2

    async def test_a_role_of_a_process_that_signed_off_is_free(self, store: Store) -> None:
        role, owner = f"role-{uuid4()}", an_owner()
        await store.register_owner(owner)
        await store.take_role(role, owner.id, now=NOW, lease=LEASE)
        assert await store.take_role(role, BOB, now=after(1), lease=LEASE) is None
        await store.sign_off(owner.id, at=after(2))
        assert await store.take_role(role, BOB, now=after(3), lease=LEASE) == 2

    @pytest.mark.fault(60)
    async def test_a_clock_that_was_set_back_holds_a_role_no_longer_than_a_lease(self, store: Store) -> None:
        role = f"role-{uuid4()}"
        await store.take_role(role, ALICE, now=NOW + timedelta(days=1), lease=LEASE)
        assert await store.take_role(role, BOB, now=NOW, lease=LEASE) is None
        assert await store.take_role(role, BOB, now=after(61), lease=LEASE) == 2
