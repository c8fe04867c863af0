"""Sentences about machines that more than one command says."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from runcomfy.domain.durations import show_span
from runcomfy.domain.machine import Machine, MachineState

__all__ = ["ended_well", "show_span", "show_time", "still_billing"]


def still_billing(held: Sequence[Machine]) -> list[str]:
    """Return what may still bill when the process leaves at once, and how to stop it."""
    if not held:
        return ["left at once; nothing that this command rented still runs"]
    return _bills("left at once. This may still run and bill:", held)


def ended_well(held: Sequence[Machine]) -> list[str]:
    """Return what an interrupted command says when it has ended what it rented, or what it could not end."""
    if not held:
        return ["cancelled; nothing that this command rented still runs"]
    return _bills("cancelled. This may still run and bill:", held)


def _bills(opening: str, held: Sequence[Machine]) -> list[str]:
    lines = [opening]
    for machine in held:
        if machine.state is MachineState.REQUESTED:
            lines.append(f"  a {machine.server_type} machine whose launch was not answered yet")
            continue
        lines.append(
            f"  {machine.server_type} machine {machine.server_id} at ${machine.usd_per_hour}/h: "
            f"stop it with `comfyctl machines stop {machine.server_id}`"
        )
    lines.append(
        "`comfyctl machines reap` ends those on which no job of the queue may still run; the others end at their "
        "lease, or with `comfyctl machines stop ID` at once."
    )
    return lines


def show_time(at: datetime | None) -> str:
    """Return a time in the user's own zone, to the second."""
    return at.astimezone().strftime("%Y-%m-%d %H:%M:%S") if at is not None else "-"
