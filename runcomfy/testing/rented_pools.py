"""
A pool of machines of one program, running in a test: what stories ask it to do, and its books beside the cloud's own.

Times come from the running loop, so that it works under virtual time. A pool that is left running ends its machines
when the block is left, as the product does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from decimal import Decimal
from itertools import count

from runcomfy.application.machine_pool import MachinePool
from runcomfy.application.pooled import MachineLease, PooledMachine
from runcomfy.domain.exceptions import RunComfyError
from runcomfy.domain.job import JobId
from runcomfy.domain.machine import MachineId
from runcomfy.domain.money import seconds_between
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.programs import Program, Programs

_numbers = count(1)


class RunningPool:
    """A pool with its loops running."""

    def __init__(self, program: Program, pool: MachinePool) -> None:
        self.program, self.pool = program, pool
        self.task: asyncio.Task[None] = asyncio.create_task(pool.run(), name="pool")

    @property
    def machines(self) -> Sequence[PooledMachine]:
        """The pool's machines."""
        return self.pool.machines

    def machine(self, machine_id: MachineId) -> PooledMachine:
        """Return one of them. Raises StopIteration where it is gone."""
        return next(machine for machine in self.pool.machines if machine.id == machine_id)

    async def launch(self, server_type: str = "medium", *, why: str = "jobs wait") -> PooledMachine:
        """Rent a machine; it boots behind."""
        return self.machine(await self.pool.launch(server_type, why=why))

    async def usable(self, server_type: str = "medium", *, within: float = 600.0) -> PooledMachine:
        """Rent a machine and wait until jobs may go there."""
        machine = await self.launch(server_type)
        await until(lambda: machine.takes_jobs, within=within, what="the machine to be usable")
        return machine

    def lease(self, machine: PooledMachine, *, workflow: str = "portrait", compute: bool = True) -> MachineLease:
        """Take a seat for a new job, whose prompt computes from now on."""
        job_id = JobId(f"job-{next(_numbers)}")
        lease = self.pool.lease(machine, job_id=job_id, attempt=1, workflow=workflow, expected_s=30.0)
        if compute:
            self.pool.computing(lease)
        return lease

    def done(self, lease: MachineLease) -> None:
        """Let a job end well."""
        self.pool.computed(lease)
        self.pool.give_back(lease, outcome="done")

    def failed(self, lease: MachineLease, error: RunComfyError) -> None:
        """Let a job fail."""
        self.pool.give_back(lease, outcome="failed", error=error)

    async def run(self, machine: PooledMachine, seconds: float, *, workflow: str = "portrait") -> MachineLease:
        """Have a job computed there for so long."""
        lease = self.lease(machine, workflow=workflow)
        await asyncio.sleep(seconds)
        self.done(lease)
        return lease

    async def empty(self, *, within: float = 600.0) -> None:
        """Wait until the pool has no machine any more."""
        await until(lambda: not self.pool.machines, within=within, what="the pool to be empty")

    async def close(self, *, keep: bool = False) -> None:
        """End the pool as the product does."""
        try:
            await self.pool.close(keep=keep)
        finally:
            self.task.cancel()
            await asyncio.wait({self.task})
        if not self.task.cancelled() and (error := self.task.exception()) is not None:
            raise error


@asynccontextmanager
async def running_pool(program: Program, *, in_charge: Callable[[], bool] = lambda: True) -> AsyncIterator[RunningPool]:
    """Run a pool for the block; what it has rented is ended then."""
    running = RunningPool(program, MachinePool(program.machines, program.placer.comfyui, in_charge=in_charge))
    try:
        yield running
    finally:
        await running.close()


@asynccontextmanager
async def told(cloud: RunComfyEmulator, programs: Programs) -> AsyncIterator[RunningPool]:
    """Run a pool for a story. Raises AssertionError if something runs at its end, or the ledger is not the bill."""
    async with programs.start() as program:
        async with running_pool(program) as pool:
            yield pool
        left = {
            "running": list(cloud.alive),
            "seconds more than billed": await gaps(cloud, program),
            "held": dict(program.books.held),
            "open in the books": list(await program.books.rows()),
        }
    if any(left.values()):
        raise AssertionError(f"left at the end: {left}")


async def until(true: Callable[[], object], *, within: float, what: str, every: float = 0.5) -> None:
    """Wait until something is so. Raises AssertionError that names what did not happen."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + within
    while not true():
        if loop.time() >= deadline:
            raise AssertionError(f"waited {within:.0f} s for {what}")
        await asyncio.sleep(every)


async def gaps(cloud: RunComfyEmulator, program: Program) -> dict[str, Decimal]:
    """Return, by server id, how many seconds more than the cloud bills our ledger has; what agrees is left out."""
    rows = await program.books.rows(open_only=False)
    entries = await program.store.ledger()
    found = {}
    for server_id, bill in cloud.books.items():
        if bill.foreign:
            continue
        ids = {row.id for row in rows if row.server_id == server_id}
        ours = sum((seconds_between(e.started_at, e.ended_at) for e in entries if e.machine_id in ids), Decimal(0))
        if abs(ours - bill.seconds) >= 1:
            found[server_id] = ours - bill.seconds
    return found


async def story(program: Program, machine_id: MachineId) -> list[str]:
    """Return what happened to a machine, in words."""
    return [f"{step.event}: {step.note}" for step in await program.store.story(machine_id)]
