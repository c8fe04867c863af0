"""What a person orders to be done with one machine, whoever started it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from runcomfy.domain.exceptions import MachineNotFound, foreign_text
from runcomfy.domain.machine import Machine, Purpose, ServerId

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
    elif machine.owner_id != cloud.books.owner.id:
        machine = await cloud.books.take_over(machine, note=note)
    return await cloud.stop(machine, reason=note)


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
