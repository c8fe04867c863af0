"""One simulated day, from its first job to its verdict."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from decimal import Decimal
from typing import Final
from unittest.mock import patch

from alembic import command

from runcomfy.testing.clock import START
from runcomfy.testing.remembered import Remembered
from runcomfy.testing.simulation.faults import harass
from runcomfy.testing.simulation.load import feed
from runcomfy.testing.simulation.loop import MemoryLoop
from runcomfy.testing.simulation.oracles import Violation, judge, watch
from runcomfy.testing.simulation.pace import slower
from runcomfy.testing.simulation.seeded import seeded
from runcomfy.testing.simulation.switches import SWITCHES
from runcomfy.testing.simulation.trace import Trace
from runcomfy.testing.simulation.world import DAY, World

LOGGER: Final = "runcomfy"
NOISE: Final = (
    "asyncio",
    "aiohttp.server",
    "aiohttp.web",
    "aiohttp.internal",
    "websockets.client",
    "runcomfy.emulator",
)

MIGRATIONS: Final = Remembered(command.upgrade)
"""Empty databases are made anew each day, from the statements of the first."""


@dataclass(frozen=True, slots=True)
class Day:
    """What one seed came to."""

    seed: int
    hours: float
    violations: Sequence[Violation]
    jobs: int
    machines: int
    faults: int
    kills: int
    ledger_usd: Decimal
    """By our books."""
    bill_usd: Decimal
    """By the cloud's."""
    steps: int
    """Turns of the loop."""
    seconds: float
    """Processor time."""
    digest: str
    """Of the trace."""
    trace: Trace = field(repr=False)
    broken: str = ""
    """The invariant that was broken on purpose."""

    @property
    def command(self) -> str:
        """What to type to see this day again."""
        hours = "" if self.hours == DAY.total_seconds() / 3_600 else f" --hours {self.hours:g}"
        broken = f" --break {self.broken}" if self.broken else ""
        return f"comfyctl simulate --seed {self.seed}{hours}{broken} --trace"

    def count(self, *invariants: str) -> int:
        """Return how often these invariants were broken."""
        found = Counter(violation.invariant for violation in self.violations)
        return sum(found[name] for name in invariants)

    def report(self) -> Iterator[str]:
        """Yield the lines that tell what went wrong: the first broken invariant, and the story of whom it concerns."""
        first = self.violations[0]
        yield f"seed {self.seed}: {first.invariant} is broken: {first.what}"
        yield from (f"  and {other.invariant}: {other.what}" for other in self.violations[1:10])
        if len(self.violations) > 10:
            yield f"  and {len(self.violations) - 10} more"
        if first.subject:
            yield f"the story of {first.subject}:"
            yield from (f"  {line}" for line in self.trace.story(first.subject))
        yield f"again, with every event: {self.command}"


class _Telling(logging.Handler):
    """Writes what the programs log into the trace."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.INFO)
        self._tell = world.trace.tell

    def emit(self, record: logging.LogRecord) -> None:
        fields = getattr(record, "fields", {})
        words = " ".join(f"{name}={value}" for name, value in fields.items() if name not in ("job", "machine"))
        self._tell("log", f"{record.msg} {words}".rstrip(), job=fields.get("job"), machine=fields.get("machine"))


@contextmanager
def _told(world: World) -> Iterator[None]:
    """Have the log go into the trace and nowhere else, for the block."""
    logger = logging.getLogger(LOGGER)
    before = logger.level, logger.propagate, list(logger.handlers)
    # Of connections and tasks that programs left behind when they were killed.
    noise = [log for log in map(logging.getLogger, NOISE) if not log.disabled]
    logger.handlers, logger.propagate = [_Telling(world)], False
    logger.setLevel(logging.INFO)
    for log in noise:
        log.disabled = True
    try:
        yield
    finally:
        logger.setLevel(before[0])
        _, logger.propagate, logger.handlers = before
        for log in noise:
            log.disabled = False


def simulate(seed: int, *, length: timedelta = DAY, broken: str = "") -> Day:
    """Live through the day of a seed, and judge it. `broken`: an invariant to break on purpose (`SWITCHES`)."""
    began = time.process_time()
    loop = MemoryLoop()
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", ResourceWarning)  # killed programs close nothing
        stack.enter_context(_rarely_collecting())
        stack.enter_context(seeded(seed, now=loop.time, began=START.timestamp()))
        stack.enter_context(slower())
        stack.enter_context(patch.object(command, "upgrade", MIGRATIONS.upgrade))
        stack.callback(loop.close)
        stack.callback(asyncio.set_event_loop, None)
        asyncio.set_event_loop(loop)
        world = World(seed, loop, length=length)
        stack.enter_context(_told(world))
        switch = SWITCHES[broken] if broken else _nothing
        stack.callback(gc.collect)
        stack.callback(_sweep, loop)
        violations, ledger_usd, bill_usd = loop.run_until_complete(_live(world, switch))
    return Day(
        seed=seed,
        hours=length.total_seconds() / 3_600,
        violations=violations,
        jobs=world.tally.jobs,
        machines=len(world.cloud.launched),
        faults=world.tally.faults,
        kills=world.tally.kills,
        ledger_usd=ledger_usd,
        bill_usd=bill_usd,
        steps=loop.steps,
        seconds=time.process_time() - began,
        digest=world.trace.digest,
        trace=world.trace,
        broken=broken,
    )


async def _live(
    world: World, switch: Callable[[World], AbstractContextManager[object]]
) -> tuple[Sequence[Violation], Decimal, Decimal]:
    async with world:
        with switch(world):
            await world.start_guard()
            await world.start_service()
            watching = world.loop.create_task(watch(world), name="oracles")
            busy = [
                world.loop.create_task(work, name=name)
                for name, work in (("load", feed(world)), ("faults", harass(world)))
            ]
            try:
                await asyncio.gather(*busy)
                await asyncio.sleep(max(0.0, world.length.total_seconds() - world.seconds))
            finally:
                for task in (*busy, watching):
                    task.cancel()
                await asyncio.wait({*busy, watching})
            if not watching.cancelled() and (error := watching.exception()) is not None:
                raise error
            violations = [*(Violation("I20", words) for words in world.deaths), *await judge(world)]
        for violation in violations:
            world.trace.tell("oracle", f"{violation.invariant}: {violation.what}")
        return violations, await world.services.spent(), world.cloud.total_usd


def _sweep(loop: MemoryLoop) -> None:
    """End what killed programs have left behind: nothing of it has an effect any more."""
    for _ in range(8):
        tasks = asyncio.all_tasks(loop)
        if not tasks:
            return
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.wait(tasks, timeout=1))
        for task in tasks:
            if task.done() and not task.cancelled():
                task.exception()


@contextmanager
def _rarely_collecting() -> Iterator[None]:
    """Look for garbage in circles once, at the end, and only among what is new: a day's objects live until then."""
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    if not frozen:
        gc.freeze()
    gc.set_threshold(400_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        if not frozen:
            gc.unfreeze()


def _nothing(_: World) -> AbstractContextManager[object]:
    return nullcontext()
