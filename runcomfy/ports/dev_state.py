"""The dev server's state file: a published snapshot of the store, and a hint to be verified before it is used."""

from __future__ import annotations

from typing import Protocol

from runcomfy.domain.dev_server import DevServerSnapshot
from runcomfy.domain.machine import ServerId


class DevServerFile(Protocol):
    """Where the snapshot is published."""

    async def publish(self, snapshot: DevServerSnapshot) -> None:
        """Write the snapshot whole, or leave what was there. Raises LocalError."""
        ...

    async def hint(self) -> ServerId | None:
        """Return the machine that the file names as running, if it can be read; it may be long gone."""
        ...

    async def clear(self) -> None:
        """Remove the file and its copies. Harmless if there is none."""
        ...
