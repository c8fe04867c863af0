"""`comfyctl guard`: the small process that ends what outlives its lease when everything else is dead."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import click

from runcomfy.cli.runner import Interrupts, run_async

if TYPE_CHECKING:
    from datetime import timedelta

    from runcomfy.adapters.folder_lock import FolderLock
    from runcomfy.application.guard import Guard


@click.command()
@click.option("--once", is_flag=True, help="Look once, see what is to be ended to its end, and leave.")
@click.option("--period", metavar="TIME", help="Time between two looks (default: RUNCOMFY_GUARD_PERIOD).")
def guard(once: bool, period: str | None) -> int:
    """End every machine of ours that outlives its lease, and a dev server that is idle for too long.

    `comfyctl serve` and `comfyctl dev start` start it by themselves; it lives on when they are killed, and leaves with
    the last machine. There is one per account and state folder. A busy machine whose owner renews its lease is never
    touched, nor is one that is not ours.
    """
    return run_async(lambda interrupts: _guard(interrupts, once=once, period=period), stays=True)


async def _guard(interrupts: Interrupts, *, once: bool, period: str | None) -> int:
    from runcomfy.adapters.guard_process import guard_lock
    from runcomfy.adapters.processes import ProcessTable
    from runcomfy.application.finish import finish
    from runcomfy.application.guard import GUARD, Guard
    from runcomfy.bootstrap import App
    from runcomfy.cli.app import load

    settings = load(require_cloud=True, launches=False, to_stop=True)
    every = _period(period) or settings.pool.guard_period
    processes = ProcessTable(command=f"comfyctl {GUARD}")
    async with App(settings, tell=_say, launches=False, processes=processes) as app:
        machines, dev = await app.cloud()
        looks = Guard(machines, dev, period=every)
        if once:
            await looks.once()
            await finish(looks.close())
            return 0
        interrupts.answer = "the guard leaves; machines end by their leases"
        return await _stay(looks, guard_lock(settings, machines.provider.account))


async def _stay(looks: Guard, lock: FolderLock) -> int:
    """Guard while there is something to guard, as the only one."""
    from runcomfy.application.finish import finish
    from runcomfy.domain.exceptions import FolderWatched

    while True:
        try:
            await asyncio.to_thread(lock.take)
        except FolderWatched:
            _say("another guard looks after this account")
            return 0
        try:
            _say("guarding")
            await looks.run()
        finally:
            await finish(looks.close())
            lock.release()
        # Whoever came in between found the lock held and started no guard of its own: look once more without it.
        if not await looks.needed():
            _say("no machine of ours is open: the guard leaves")
            return 0


def _period(text: str | None) -> timedelta | None:
    from runcomfy.domain.durations import parse_duration
    from runcomfy.domain.exceptions import ValueInvalid

    if text is None:
        return None
    if not (span := parse_duration(text)):
        raise ValueInvalid("a guard that never looks guards nothing", hint="write for example --period 30s")
    return span


def _say(sentence: str) -> None:
    """Write a line with its time: a detached guard's output is a file."""
    from runcomfy.adapters.clock import SystemClock

    click.echo(f"{SystemClock().now():%Y-%m-%d %H:%M:%S} {sentence}")
