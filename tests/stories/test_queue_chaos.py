"""
Executors that are killed, frozen, woken and left without an answer at random over thirty jobs: nothing is lost and
nothing runs twice.

The seed decides who it hits, when, at which call, and whether the others can see it.
"""

from __future__ import annotations

import asyncio
from random import Random

import pytest

from runcomfy.domain.exceptions import StoreUnavailable
from runcomfy.domain.queued import QueueStatus
from runcomfy.testing.queue_programs import PUBLISHED, Program, QueuePrograms

JOBS = 30
WORKERS = 3
BLOWS = 18
CALLS = (
    "store.claim",
    "store.write_ahead",
    "store.accepted",
    "store.finish",
    "store.renew",
    "store.reap",
    "comfyui.submit",
    "comfyui.queue",
    "comfyui.history",
    "comfyui.fetch",
    "results.commit",
)


class Chaos:
    """What happens to the workers; replaces each that dies."""

    def __init__(self, programs: QueuePrograms, seed: int) -> None:
        self.programs, self.draw = programs, Random(seed)
        self.workers: list[Program] = []
        self.said: list[str] = []
        """What was done, for whoever reads a failure."""
        self._waking: list[asyncio.Task[None]] = []

    async def begin(self) -> None:
        for _ in range(WORKERS):
            await self.another()

    async def another(self) -> None:
        self.workers.append(await self.programs.start(slots=2, lost_limit=1_000))

    async def blow(self) -> None:
        """Hit one of them: now, or at one of its next calls."""
        victim = self.draw.choice(self.workers)
        if self.draw.random() < 0.25:
            self._lose_an_answer(victim)
            return
        where = "now"
        if self.draw.random() < 0.7:
            call = self.draw.choice(CALLS)
            where = self.draw.choice((f"before {call}", f"after {call}", PUBLISHED))
            reached = victim.fate.stop_at(where)
            try:
                async with asyncio.timeout(20):
                    await reached.wait()
            except TimeoutError:
                victim.fate.forget_stops()
                where = "now"
        if where != PUBLISHED and self.draw.random() < 0.3:
            await self._freeze(victim, where)
        else:
            await self._kill(victim, where)

    def _lose_an_answer(self, victim: Program) -> None:
        call = self.draw.choice([call for call in CALLS if call.startswith("store.")])
        self.said.append(f"lost the answer of {call} to {victim.id[:4]}")
        victim.fate.lose_answer(call, StoreUnavailable("the connection broke"))

    async def _kill(self, victim: Program, where: str) -> None:
        noticed = self.draw.random() < 0.6
        self.said.append(f"killed {victim.id[:4]} {where}{'' if noticed else ', unseen'}")
        self.workers.remove(victim)
        await victim.kill(noticed=noticed)
        await self.another()

    async def _freeze(self, victim: Program, where: str) -> None:
        seconds = self.draw.choice((5.0, 50.0, 150.0))
        self.said.append(f"froze {victim.id[:4]} {where} for {seconds:.0f} s")
        victim.freeze()

        async def wake() -> None:
            await asyncio.sleep(seconds)
            victim.wake()

        self._waking.append(asyncio.create_task(wake()))

    async def calm(self) -> None:
        """Let everybody who stands still wake up."""
        await asyncio.gather(*self._waking)


@pytest.mark.fault(64)
@pytest.mark.parametrize("seed", [1])
async def test_whoever_dies_or_sleeps_when_and_where_every_job_is_done_once(
    programs: QueuePrograms, seed: int, looptime: float
) -> None:
    """I20, I11, I12: within a lease, a reap and the time that the work takes."""
    chaos = Chaos(programs, seed)
    lengths = [chaos.draw.choice((0.5, 1.0, 3.0, 6.0)) for _ in range(JOBS)]
    jobs = [await programs.put(number, seconds=seconds) for number, seconds in enumerate(lengths)]
    await chaos.begin()
    for _ in range(BLOWS):
        await asyncio.sleep(chaos.draw.expovariate(1 / 6))
        await chaos.blow()
    last = float(looptime)

    for job in jobs:
        await programs.queue.wait(job)

    settings = programs.queue_settings
    patience = settings.lease + settings.reap_every
    assert looptime - last <= patience.total_seconds() + sum(lengths) + 2 * JOBS, chaos.said
    await chaos.calm()
    await asyncio.sleep(30)
    ends = [await programs.queue.job(job) for job in jobs]
    assert {job.status for job in ends} == {QueueStatus.DONE}, chaos.said
    assert {(job.run_count, job.retries_attempted) for job in ends} == {(1, 0)}, chaos.said
    # A worker that froze right before it sent a prompt sends it late; its server had it by then, and does nothing.
    worked = [record.prompt_id for record in programs.comfyui.run_log if record.nodes]
    assert len(worked) == len(set(worked)) == JOBS, chaos.said
    complaints = [what for what in await programs.complaints() if not what.startswith("prompt ")]
    assert complaints == [], chaos.said
