"""
Keepers of a pool, one after the other: each takes over what the last one left, reconciles, watches and pays.

A keeper is wired as the service wires its pool, without a queue: a story gives out seats itself. It can die at any call
of the store or the provider; the next one shows what is left. `Watching` looks at the emulated cloud again and again
while a story goes on, so that a promise is held at every moment and not only at its end.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Final

from runcomfy.application.machine_pool import MachinePool, takes_over
from runcomfy.application.reconciler import Reconciler
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.programs import Program, Programs
from runcomfy.testing.rented_pools import RunningPool, gaps

LIFE_OF_A_CALL: Final = 5.0
"""Seconds for which the cloud keeps back the answer to a call during which a keeper dies."""

Story = Callable[[RunningPool], Awaitable[None]]


def expect(true: object, words: str) -> None:
    """Raise AssertionError with the words if something is not so."""
    if not true:
        raise AssertionError(words)


@asynccontextmanager
async def keeping(program: Program) -> AsyncIterator[RunningPool]:
    """Keep the account's pool for the block, as the service does; what is rented is ended then."""
    pool = MachinePool(program.machines, program.placer.comfyui)
    await pool.adopt()
    reconciling = asyncio.create_task(Reconciler(program.machines, spare=takes_over).run(), name="reconciler")
    running = RunningPool(program, pool)
    try:
        yield running
    finally:
        reconciling.cancel()
        await asyncio.wait({reconciling})
        await running.close()


@asynccontextmanager
async def kept(cloud: RunComfyEmulator, programs: Programs, *, within: float = 1.0) -> AsyncIterator[RunningPool]:
    """Keep a pool for the block; at its end nothing runs, and the ledger is the cloud's bill.

    `within` so many seconds of each machine: more than one only where nobody tells when it ended.
    """
    async with programs.start() as program:
        async with keeping(program) as pool:
            yield pool
        expect(not cloud.alive, f"left running: {cloud.alive}")
        wrong = {name: gap for name, gap in (await gaps(cloud, program)).items() if abs(gap) > within}
        expect(not wrong, f"seconds that our ledger has beyond the cloud's bill: {wrong}")
        expect(not await program.books.rows(), "the books are not closed")


async def dies(programs: Programs, point: str, story: Story, *, time: int = 1, within: float = 3_600.0) -> Program:
    """Have a keeper tell a story that ends, as by `kill -9`, when it reaches a point for the how-manieth time.

    `before provider.launch_machine` and `after store.add_machine` are points; `during provider.stop_machine` is while
    the cloud has done what it was asked for and has not answered yet. Raises TimeoutError if the point never comes.
    """
    when, _, call = point.partition(" ")
    place = f"{'before' if when == 'during' else when} {call}"
    reached = asyncio.Event()
    died: list[Program] = []
    visits = 0

    def visit(at: str) -> None:
        nonlocal visits
        visits += at == place
        if died and at == place and visits == time:
            reached.set()
            if when != "during":
                died[0].drop_dead()

    async with programs.start(visit=visit) as program:
        died.append(program)
        pool = MachinePool(program.machines, program.placer.comfyui)
        await pool.adopt()
        running = RunningPool(program, pool)
        telling = asyncio.ensure_future(story(running))
        try:
            async with asyncio.timeout(within):
                await reached.wait()
            if when == "during":
                await asyncio.sleep(LIFE_OF_A_CALL / 2)
        finally:
            await program.kill(telling, running.task)
    return died[0]


@dataclass
class Watching:
    """Looks at something every few seconds of a story's time, and remembers what it complained about."""

    look: Callable[[], list[str]]
    every: float = 1.0
    complaints: list[str] = field(default_factory=list)
    looks: int = 0

    @asynccontextmanager
    async def during(self) -> AsyncIterator[Watching]:
        """Look for the block; at its end there must be nothing to complain about."""
        task = asyncio.create_task(self._watch(), name="watching")
        try:
            yield self
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        expect(self.looks > 0, "nobody looked")
        expect(not self.complaints, "\n".join(self.complaints))

    async def _watch(self) -> None:
        while True:
            self.complaints += [said for said in self.look() if said not in self.complaints]
            self.looks += 1
            await asyncio.sleep(self.every)
