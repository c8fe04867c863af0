"""What happens to our own programs in a simulated day: they die, sleep, meet each other, and cannot write."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from runcomfy.domain.exceptions import DiskFull, LocalError, StoreUnavailable
from runcomfy.testing.programs import Killed
from runcomfy.testing.simulation.harm import Harm

if TYPE_CHECKING:
    from runcomfy.testing.serving import Served

PATIENCE: Final = 900.0
AWAY: Final = (1.0, 5.0, 20.0, 60.0, 240.0, 900.0)
"""Seconds until a killed service is started again."""

CALLS: Final = (
    "store.add_machine",
    "provider.launch_machine",
    "store.record",
    "provider.list_machines",
    "provider.stop_machine",
    "store.ask_duration",
    "provider.change_duration",
    "store.change",
    "store.close_bill",
    "store.take_over",
    "jobs.claim",
    "jobs.write_ahead",
    "comfyui.submit",
    "jobs.accepted",
    "comfyui.history",
    "comfyui.fetch",
    "jobs.finish",
    "jobs.renew",
    "jobs.reap",
    "comfyui.cancel",
    "comfyui.withdraw",
    "jobs.prompt_gone",
    "jobs.prompt_ended",
)
NUMBERS: Final = {
    "before provider.launch_machine": 1,
    "after provider.launch_machine": 3,
    "before store.record": 3,
}
"""Rows of the catalogue that a death at a certain place is; any other is a death of its own (22 says no more of it)."""
READS: Final = frozenset(
    {
        "owners",
        "machine",
        "machines",
        "story",
        "boot_times",
        "uses",
        "works",
        "signals",
        "decisions",
        "unbilled",
        "ledger",
        "budgets",
        "job",
        "jobs",
        "past_results",
        "counts",
        "newest",
        "jobs_with",
        "backlog",
        "arrivals",
        "known_files",
        "known_keys",
        "attempts",
        "events",
        "told",
        "settled",
        "pauses",
        "holds",
        "to_end",
    }
)
"""What works without room on the disk."""


def _one(harm: Harm) -> Served:
    return harm.draw.choice(harm.serving())


async def killed_now(harm: Harm) -> None:
    """A service dies as by `kill -9`, and comes back."""
    victim, after = _one(harm), harm.draw.choice(AWAY)
    harm.note(61, f"a service is killed, and comes back after {after:.0f} s", lasts=after)
    await harm.world.kill_and_restart(victim, timedelta(seconds=after))


async def killed_at_call(harm: Harm) -> None:
    """A service dies right before or after one of its next calls."""
    victim, after = _one(harm), harm.draw.choice(AWAY)
    place = f"{harm.draw.choice(('before', 'after'))} {harm.draw.choice(CALLS)}"
    harm.note(NUMBERS.get(place, 2), f"a service will die {place}, and come back after {after:.0f} s", lasts=PATIENCE)

    def visit(visited: str) -> None:
        if visited == place and victim in harm.world.served and not victim.app.killed.is_set():
            harm.world.trace.tell("fault", f"a service dies {place}")
            victim.app.killed.set()
            harm.spawn(harm.world.kill_and_restart(victim, timedelta(seconds=after)))
            raise Killed

    _look(harm, victim, visit, PATIENCE)


def _look(harm: Harm, victim: Served, visit: object, seconds: float) -> None:
    """Have every call of a service looked at for a while; the newest look is the one that counts."""
    victim.app.visit = visit  # type: ignore[assignment]

    def undo() -> None:
        if victim.app.visit is visit:
            victim.app.visit = _pass_by

    harm.later(seconds, undo)


def _pass_by(_: str) -> None:
    pass


async def sleeps(harm: Harm) -> None:
    """A service sleeps, as by SIGSTOP or a closed lid, and wakes."""
    victim, seconds = _one(harm), harm.draw.choice((10.0, 45.0, 150.0, 900.0))
    harm.note(64 if seconds > 100 else 62, f"a service sleeps for {seconds:.0f} s", lasts=seconds + 120.0)
    victim.sleep()

    def wake() -> None:
        harm.woken[id(victim)] = harm.world.seconds
        harm.world.trace.tell("fault", "a service wakes up")
        victim.wake()

    harm.later(seconds, wake)


async def second_service(harm: Harm) -> None:
    """A second service is started; later one of the two is gone, in good order or not."""
    seconds = harm.draw.choice((30.0, 600.0, 2_400.0))
    newer = await harm.world.start_service()
    dies, which = harm.draw.random() < 0.5, harm.draw.random() < 0.5
    harm.note(63, f"a second service for {seconds:.0f} s, then one {'dies' if dies else 'stops'}", lasts=seconds)

    def end() -> None:
        services = harm.world.served
        if newer not in services or len(services) < 2:
            return
        victim = newer if which else next(each for each in services if each is not newer)
        victim.wake()
        harm.spawn(harm.world.kill(victim) if dies else harm.world.stop(victim))

    harm.later(seconds, end)


async def stopped_politely(harm: Harm) -> None:
    """A service is told to stop, as by one SIGTERM, and started again later."""
    victim, after = _one(harm), harm.draw.choice(AWAY)
    harm.note(61, f"a service is stopped in good order, and started again {after:.0f} s later", lasts=600.0 + after)

    async def round_trip() -> None:
        await harm.world.stop(victim)
        await asyncio.sleep(after)
        await harm.world.start_service()

    harm.spawn(round_trip())


async def guard_killed(harm: Harm) -> None:
    """The guard dies, and comes back."""
    guard, after = harm.world.guard, harm.draw.choice(AWAY)
    if guard is None:
        return
    harm.note(61, f"the guard is killed, and comes back after {after:.0f} s", lasts=after)
    harm.spawn(guard.kill_and_restart(timedelta(seconds=after)))


async def store_locked(harm: Harm) -> None:
    """The database is locked for a while: nothing can be written, or read."""
    await _store_trouble(harm, 55, "locked", StoreUnavailable("the database is locked"), everything=True)


async def store_full(harm: Harm) -> None:
    """There is no room on the disk for a while: nothing can be written."""
    await _store_trouble(harm, 54, "full", DiskFull("no space left on device"), everything=False)


async def _store_trouble(harm: Harm, number: int, word: str, error: LocalError, *, everything: bool) -> None:
    victim, seconds = _one(harm), harm.draw.choice((5.0, 40.0, 70.0, 200.0))
    harm.note(number, f"its database is {word} for {seconds:.0f} s", lasts=seconds + 30.0)
    until = harm.world.seconds + seconds

    def visit(place: str) -> None:
        when, _, call = place.partition(" ")
        port, _, name = call.partition(".")
        concerned = port in ("store", "jobs") and (everything or name not in READS)
        if when == "before" and concerned and name not in ("open", "close", "changed") and harm.world.seconds < until:
            raise type(error)(error.message)

    _look(harm, victim, visit, seconds)


async def store_unheard(harm: Harm) -> None:
    """Something is written, and the connection breaks before the answer."""
    victim, call = _one(harm), harm.draw.choice([each for each in CALLS if not each.startswith(("prov", "comf"))])
    times = [harm.draw.choice((1, 1, 3))]
    harm.note(55, f"{times[0]} answers of {call} will be lost", lasts=PATIENCE)

    def visit(place: str) -> None:
        if place == f"after {call}" and times[0] > 0:
            times[0] -= 1
            raise StoreUnavailable("the connection broke")

    _look(harm, victim, visit, PATIENCE)
