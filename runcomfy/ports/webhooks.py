"""
Where it is kept what must still be told to other programs.

Every method that changes something is durable when it returns, or raises a `LocalError` and changed nothing. `epoch` is
the caller's hold on the role `webhooks` of the same database: LeaseLost is raised if it holds the role no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Protocol

from runcomfy.domain.webhook import Delivery

WEBHOOKS = "webhooks"
"""The role of who delivers: one process of the database at a time."""


class WebhookBook(Protocol):
    """Messages that wait, and how far the event log was read for them."""

    async def read_to(self) -> tuple[str, int]:
        """Return the name of the queue, the same for ever, and the number of the last event that was looked at."""
        ...

    async def take_in(self, deliveries: Sequence[Delivery], *, read_to: int, epoch: int) -> None:
        """Write down messages and how far the log was read, together. What is known already stays as it is."""
        ...

    async def due(self, *, limit: int) -> Sequence[Delivery]:
        """Return messages whose time has come, of each address the oldest one only."""
        ...

    async def next_due(self) -> datetime | None:
        """Return when the next message is due; None if there is none."""
        ...

    async def put_off(self, delivery: Delivery, *, wait: timedelta, last: str, epoch: int) -> None:
        """Write down that a try failed, and how long until the next one."""
        ...

    async def end(self, delivery: Delivery, *, epoch: int) -> None:
        """Forget a message: it has arrived, or was given up."""
        ...

    async def end_all(self, url: str, *, epoch: int) -> int:
        """Forget every message for an address; return how many there were."""
        ...
