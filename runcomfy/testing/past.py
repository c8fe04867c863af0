"""Books with a past: machines and jobs written down as if they had run, weeks of them in no time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal
from itertools import count

from runcomfy.application.books import Books
from runcomfy.domain.job import JobId
from runcomfy.domain.machine import Machine, MachineEvent, MachineId, MachineState, Purpose, ServerId
from runcomfy.domain.work import Work


class Past:
    """Writes into the books of one account. Nothing is asked of any provider."""

    def __init__(self, books: Books) -> None:
        self.books = books
        self._numbers: Iterator[int] = count(1)

    async def machine(
        self, ready: datetime, ran: timedelta, *, server_type: str = "medium", posts: bool = True
    ) -> Machine:
        """Write down a machine that became ready then, ran so long, and is gone.

        `posts`: with its bill; without, as a version left it that wrote bills by themselves and died before it could.
        """
        books, number = self.books, next(self._numbers)
        asked, end = ready - timedelta(minutes=3), ready + ran
        rate = books.settings.rates.find(server_type)
        machine = Machine(
            id=MachineId(f"machine-{number}"),
            provider=books.provider,
            account=books.account,
            purpose=Purpose.POOL,
            server_type=server_type,
            duration=ran,
            usd_per_hour=rate.usd_per_hour if rate is not None else Decimal(1),
            rate_source="made up",
            requested_at=asked,
            since=asked,
            owner_id=books.owner.id,
        )
        store, by, server_id = books.store, books.owner.id, ServerId(f"srv-{number}")
        if not posts:
            times = {"ready_at": ready, "stop_asked_at": end, "stop_accepted_at": end, "gone_at": end, "since": end}
            left = replace(machine, state=MachineState.STOPPED, server_id=server_id, **times)  # type: ignore[arg-type]
            await store.add_machine(left, at=end)
            return left
        await store.add_machine(machine, at=asked)
        await store.record(machine.id, MachineEvent.LISTED, at=asked, by=by, changes={"server_id": server_id})
        await store.record(machine.id, MachineEvent.ANSWERED, at=ready, by=by, changes={"ready_at": ready})
        await store.record(machine.id, MachineEvent.STOP_ASKED, at=end, by=by, changes={"stop_accepted_at": end})
        return await store.record(machine.id, MachineEvent.GONE, at=end, by=by)

    async def job(
        self,
        machine: Machine,
        second: float,
        seconds: float,
        *,
        workflow: str = "portrait",
        user: str = "",
        project: str = "",
        cold: bool = False,
    ) -> Work:
        """Write down a job that computed from `second` after ready on, so long, and took two seconds to be fetched."""
        if machine.ready_at is None:
            raise ValueError("the machine was never ready")
        begin = machine.ready_at + timedelta(seconds=second)
        end = begin + timedelta(seconds=seconds)
        work = Work(
            machine_id=machine.id,
            job_id=JobId(f"job-{next(self._numbers)}"),
            attempt=1,
            workflow=workflow,
            server_type=machine.server_type,
            began_at=begin,
            user=user,
            project=project,
            computing_at=begin,
            computed_at=end,
            ended_at=end + timedelta(seconds=2),
            outcome="done",
            cold=cold,
        )
        await self.books.store.put_work(work)
        return work
