"""Who asks for a role that somebody else has, and how often he asks about the dead."""

from __future__ import annotations

import asyncio
from pathlib import Path

from runcomfy.adapters.stores.sql import SqlStore
from runcomfy.application.role import Role
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.programs import EmulatedProcesses, Mortal


async def test_a_process_that_waits_for_a_role_asks_about_each_dead_one_once(clock: LoopClock) -> None:
    """Every crash leaves its owner's row behind, and a standby asks every few seconds."""
    processes, calls = EmulatedProcesses(), list[str]()
    async with SqlStore(Path(":memory:"), clock=clock, durable=False) as store:
        watched = Mortal(store, asyncio.Event(), calls.append)
        holder, standby, *dead = [processes.me(now=clock.now()) for _ in range(7)]
        for owner in (holder, standby, *dead):
            await store.register_owner(owner)
        processes.dead |= {owner.id for owner in dead}
        assert await Role("fleet", store, holder, clock=clock, processes=processes).take()

        waits = Role("fleet", watched, standby, clock=clock, processes=processes)
        for _ in range(4):
            assert not await waits.take()
        assert calls.count("before drop_role") == len(dead)

        processes.dead.add(holder.id)
        assert await waits.take()
