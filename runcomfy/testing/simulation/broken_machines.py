"""How promises about machines and money are broken on purpose (`switches.py`)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from runcomfy.adapters.providers import runcomfy_sending
from runcomfy.adapters.providers.runcomfy import RunComfyAPIClient
from runcomfy.adapters.stores import sql_money
from runcomfy.application import launching, pool_renewal
from runcomfy.application.books import Books
from runcomfy.application.ending import Ending, Look
from runcomfy.application.launching import Launching
from runcomfy.application.pool_renewal import Renewal
from runcomfy.application.reaper import Reaper
from runcomfy.application.role import Role
from runcomfy.domain import renewal
from runcomfy.domain.evidence import Launched
from runcomfy.domain.exceptions import LaunchUnclear, LocalError
from runcomfy.domain.machine import Machine, Phase

if TYPE_CHECKING:
    from runcomfy.testing.simulation.world import World


@contextmanager
def instead(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Put what `make` makes of a function in its place, for the block."""
    with patch.object(owner, name, make(getattr(owner, name))):
        yield


@contextmanager
def intent_late(_: World) -> Iterator[None]:
    """Write the intent when the launch has been answered."""
    owed: list[tuple[Books, Machine]] = []
    write = Books.add_intent

    async def later(self: Books, machine: Machine, *_: Any, **__: Any) -> None:
        owed.append((self, machine))

    def launch(real: Any) -> Any:
        async def launched(self: Any, **given: Any) -> Any:
            try:
                return await real(self, **given)
            finally:
                while owed:
                    await write(*owed.pop())

        return launched

    with instead(Books, "add_intent", lambda _: later), instead(RunComfyAPIClient, "launch_machine", launch):
        yield


@contextmanager
def unheard_is_nothing(_: World) -> Iterator[None]:
    """Close the intent of a launch that was not answered at once, as if nothing had been started."""
    with patch.object(launching, "what_was_started", lambda *_, **__: Launched.NOTHING):
        yield


@contextmanager
def launch_again(_: World) -> Iterator[None]:
    """Send a launch that was not answered again."""

    def launch(real: Any) -> Any:
        async def launched(self: Any, **given: Any) -> Any:
            with suppress(LaunchUnclear):
                return await real(self, **given)
            return await real(self, **given)

        return launched

    with instead(RunComfyAPIClient, "launch_machine", launch):
        yield


@contextmanager
def stop_believed(_: World) -> Iterator[None]:
    """Take every machine that is asked to stop for gone."""

    async def gone(self: Ending, machine: Machine) -> Look:
        return Look(Phase.GONE)

    with patch.object(Ending, "look", gone):
        yield


@contextmanager
def long_lease(_: World) -> Iterator[None]:
    """Pay ten hours ahead."""

    def longer(used_s: float, lease: timedelta) -> timedelta:
        return renewal.total_for(used_s, lease) + timedelta(hours=10)

    with patch.object(pool_renewal, "total_for", longer):
        yield


@contextmanager
def no_budget(_: World) -> Iterator[None]:
    """Let no budget refuse anything."""

    def allowed(real: Any) -> Any:
        return lambda *given, **named: (None, real(*given, **named)[1])

    with instead(sql_money, "refusal", allowed):
        yield


@contextmanager
def stops_strangers(_: World) -> Iterator[None]:
    """Stop what the account lists and our books do not know."""

    def reap(real: Any) -> Any:
        async def reaped(self: Reaper, **given: Any) -> Any:
            report = await real(self, **given)
            for stranger in report.foreign:
                await self._machines.provider.stop_machine(stranger.server_id)
            return report

        return reaped

    with instead(Reaper, "reap", reap):
        yield


@contextmanager
def stops_busy(_: World) -> Iterator[None]:
    """End machines that have jobs, when leases are looked at."""

    def look(real: Any) -> Any:
        async def round_(self: Renewal) -> None:
            await real(self)
            for member in list(self._members):
                if member.pooled.leases:
                    self._members.end(member, "for no reason")

        return round_

    with instead(Renewal, "round", look):
        yield


@contextmanager
def bill_short(_: World) -> Iterator[None]:
    """Say that each stop was accepted four minutes before it was."""

    def change(real: Any) -> Any:
        async def changed(self: Books, machine: Machine, **given: Any) -> Any:
            accepted = given.get("stop_accepted_at")
            if accepted is not None:
                given["stop_accepted_at"] = accepted - timedelta(minutes=4)
            return await real(self, machine, **given)

        return changed

    with instead(Books, "change_softly", change):
        yield


@contextmanager
def role_for_all(_: World) -> Iterator[None]:
    """Give the role to everybody who asks."""

    async def take(self: Role) -> bool:
        self.epoch, self._until = 1, asyncio.get_running_loop().time() + self._lease.total_seconds()
        return True

    with patch.object(Role, "take", take):
        yield


@contextmanager
def no_retry_after(_: World) -> Iterator[None]:
    """Read no Retry-After."""
    with (
        patch.object(runcomfy_sending, "retry_after", lambda *_, **__: None),
        patch.object(runcomfy_sending, "DEFAULT_RETRY_AFTER", timedelta(seconds=0.1)),
    ):
        yield


@contextmanager
def disk_ignored(_: World) -> Iterator[None]:
    """Launch although the intent could not be written."""

    def add(real: Any) -> Any:
        async def added(self: Books, machine: Machine, *given: Any, **named: Any) -> Any:
            with suppress(LocalError):
                return await real(self, machine, *given, **named)

        return added

    with instead(Books, "add_intent", add):
        yield


@contextmanager
def says_token(_: World) -> Iterator[None]:
    """Say the token when a machine is launched."""

    def launch(real: Any) -> Any:
        async def launched(self: Launching, intent: Machine, **given: Any) -> Any:
            token = self._cloud.tokens[0].reveal()
            self._books.tell(f"launching with {token}")
            return await real(self, replace(intent), **given)

        return launched

    with instead(Launching, "launch", launch):
        yield
