"""
What earlier attempts of a job cost: its time at rented machines before the attempt that runs now.

A result tells the whole job's cost. What the attempts before have cost is in the machines' books only, for their
processes may be gone: from each row of machine time, divided among the jobs that were at the machine meanwhile, just
as the time of the running attempt is. A machine's idle time is nobody's here; `domain.shares` shares that out, too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timedelta
from fractions import Fraction
from itertools import pairwise
from typing import Final, NamedTuple

from runcomfy.domain.job import BillLine, JobId
from runcomfy.domain.machine import Machine, MachineId
from runcomfy.domain.money import billed_interval, meter, seconds_between
from runcomfy.domain.queued import Outcome
from runcomfy.domain.work import Work

_TICK: Final = timedelta(microseconds=1)


class _Stay(NamedTuple):
    machine_id: MachineId
    job_id: JobId
    start: datetime
    end: datetime
    earlier: bool
    """Whether it is an earlier attempt of the job in question."""


def earlier_bill(
    job_id: JobId, attempt: int, works: Iterable[Work], machines: Mapping[MachineId, Machine], *, now: datetime
) -> tuple[BillLine, ...]:
    """Return a line for each machine at which attempts of the job before `attempt` were, in the order of their coming.

    `works` are all rows of these machines, and every row of jobs that have one without an end: such an attempt, whose
    process died, lasts until the job's next one begins. So does one that is closed as lost where the next one comes
    to the same machine: its prompt went on.
    """
    stays = list(_stays(job_id, attempt, works, machines, now=now))
    lines = []
    for machine_id in dict.fromkeys(stay.machine_id for stay in stays if stay.earlier):
        machine = machines[machine_id]
        there = [stay for stay in stays if stay.machine_id == machine_id]
        if time := _share(there):
            start = min(stay.start for stay in there if stay.earlier)
            lines.append(
                BillLine(
                    what=f"{machine.server_type} (earlier attempts of this job)",
                    seconds=seconds_between(start, start + time),
                    usd_per_hour=machine.usd_per_hour,
                    amount_usd=meter(start, start + time, machine.usd_per_hour),
                )
            )
    return tuple(lines)


def _stays(
    job_id: JobId, attempt: int, works: Iterable[Work], machines: Mapping[MachineId, Machine], *, now: datetime
) -> Iterator[_Stay]:
    """Yield who was at which of the machines and when, cut to what is billed."""
    rows: dict[JobId, list[Work]] = defaultdict(list)
    for work in works:
        rows[work.job_id].append(work)
    for job, own in rows.items():
        own.sort(key=lambda work: (work.began_at, work.attempt))
        for work, following in zip(own, [*own[1:], None], strict=True):
            machine = machines.get(work.machine_id)
            billed = billed_interval(machine, now=now) if machine is not None else None
            if billed is None:
                continue
            start, end = max(work.began_at, billed[0]), min(_left_at(work, following) or now, billed[1])
            if end > start:
                yield _Stay(work.machine_id, job, start, end, earlier=job == job_id and work.attempt < attempt)


def _left_at(work: Work, following: Work | None) -> datetime | None:
    """Return when a job left a machine; None: it is there yet, as far as is known."""
    ended = work.ended_at or work.computed_at
    if following is None:
        return ended
    went_on = work.outcome == Outcome.LOST and following.machine_id == work.machine_id
    return following.began_at if ended is None or went_on else ended


def _share(stays: Iterable[_Stay]) -> timedelta:
    """Return the time of the earlier attempts at one machine; what several jobs were there for is in equal parts."""
    stays = list(stays)
    own = [stay for stay in stays if stay.earlier]
    # A machine may have had thousands of jobs; few of them were there at the same time.
    stays = [stay for stay in stays if any(stay.start < mine.end and stay.end > mine.start for mine in own)]
    edges = sorted({edge for stay in stays for edge in (stay.start, stay.end)})
    ticks = Fraction(0)
    for start, end in pairwise(edges):
        there = [stay for stay in stays if stay.start < end and stay.end > start]
        if any(stay.earlier for stay in there):
            ticks += Fraction((end - start) // _TICK, len({stay.job_id for stay in there}))
    return timedelta(microseconds=round(ticks))
