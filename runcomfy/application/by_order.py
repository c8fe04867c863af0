"""What a person orders to be done with one machine, whoever started it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from runcomfy.domain.exceptions import LeaseLost, MachineNotFound, foreign_text
from runcomfy.domain.lease import OWNER_SILENT_AFTER
from runcomfy.domain.machine import Machine, MachineState, Purpose, ServerId

if TYPE_CHECKING:
    from runcomfy.application.machines import Machines


async def stop_whosever(cloud: Machines, server_id: str, *, note: str) -> Machine:
    """Stop a machine by the provider's id and return it when it was seen gone.

    One of another process is taken over first, one that our books do not have is taken into them. Raises
    MachineNotFound, StopUnconfirmed, ProviderError, LocalError.
    """
    machine = await open_row(cloud, server_id)
    if machine is None:
        machine = await taken(cloud, server_id, note=note)
    return await stop_by_order(cloud, machine, note=note)


async def stop_by_order(cloud: Machines, machine: Machine, *, note: str) -> Machine:
    """Stop a machine of our books, whoever holds it, and return it as it is when its stop came to an end.

    Of two that were ordered to at once, one has it stopped and the other waits for that; it takes the machine back if
    that one dies or is still at it after 90 s. Raises StopUnconfirmed, ProviderError, LocalError.
    """
    me = cloud.books.owner.id
    while machine.is_open:
        try:
            if machine.owner_id != me:
                machine = await cloud.books.take_over(machine, note=note)
            machine = await cloud.stop(machine, reason=note)
            if machine.owner_id == me:
                return machine
        except LeaseLost:
            machine = await cloud.books.latest(machine.id) or machine
        machine = await _left_to_another(cloud, machine)
    return machine


async def _left_to_another(cloud: Machines, machine: Machine) -> Machine:
    """Wait for the end of a machine that another living process is stopping; return it as the books have it then."""
    loop = asyncio.get_running_loop()
    until = loop.time() + OWNER_SILENT_AFTER.total_seconds()
    while machine.state is MachineState.STOPPING and machine.owner_id is not None and loop.time() < until:
        owner = (await cloud.store.owners([machine.owner_id])).get(machine.owner_id)
        if owner is None or not cloud.processes.lives(owner, now=cloud.clock.now()):
            break
        await asyncio.sleep(cloud.settings.cloud.poll_interval.total_seconds())
        machine = await cloud.books.latest(machine.id) or machine
    return machine


async def open_row(cloud: Machines, server_id: str) -> Machine | None:
    """Return the machine as our books have it open; None if they do not."""
    row = await cloud.books.row_of(ServerId(server_id))
    return row if row is not None and row.is_open else None


async def taken(cloud: Machines, server_id: str, *, note: str) -> Machine:
    """Take a machine that the account runs, and that is not in our books, into them, with us as its owner.

    Raises MachineNotFound, ProviderError, LocalError.
    """
    wanted = ServerId(server_id)
    report = next((r for r in await cloud.provider.list_machines(urgent=True) if r.server_id == wanted), None)
    if report is None:
        report = await cloud.provider.get_machine_status(wanted, urgent=True)
    if report is None:
        raise MachineNotFound(
            f"the account has no machine {foreign_text(server_id, 60)}",
            hint="`comfyctl machines ls` lists what it has; a machine that is gone bills no longer",
        )
    return await cloud.adopt(report, purpose=Purpose.TAKEN, reason=note)
