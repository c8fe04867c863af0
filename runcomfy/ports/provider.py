"""
A cloud that rents machines.

No method waits for a machine to boot or to go away; that is the application's patience. Every method may raise
`AuthRejected`, `AccessDenied`, `WrongUrl` (settings are wrong), `RateLimited` or `ProviderBusy` (after the adapter's
own retries; worth asking again later) and `AnswerUnreadable` (something else answers in the provider's place).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Protocol

from runcomfy.domain.balance import Balance
from runcomfy.domain.machine import CloudWorkflow, MachineReport, ServerId


class Provider(Protocol):
    """One account at one cloud."""

    @property
    def name(self) -> str:
        """The provider's name as users write it, for example `runcomfy`."""
        ...

    @property
    def account(self) -> str:
        """A digest that tells accounts apart without naming the user."""
        ...

    async def get_workflows(self) -> Sequence[CloudWorkflow]:
        """Return the workflows saved in the account. Repeating it is harmless."""
        ...

    async def list_machines(self, *, urgent: bool = False) -> Sequence[MachineReport]:
        """Return every machine the account has, of whatever owner and state; never a part of the list.

        A list that could not be read whole raises; it is never returned short or empty instead. `urgent` marks
        calls on the way to stopping a machine, which have a reserved share of the account's rate limit.
        """
        ...

    async def launch_machine(self, *, server_type: str, duration: timedelta, workflow_version_id: str) -> MachineReport:
        """Ask once for one machine and return the provider's first word about it; it is not ready yet.

        The provider has no idempotency: this method never sends the request again once it may have arrived.

        Raises:
            LaunchUnclear: the answer was lost or unreadable; a machine may have been started.
            LaunchRefused, NoCapacity, OutOfCredit: the provider said no; nothing was started.
        """
        ...

    async def get_machine_status(self, server_id: ServerId, *, urgent: bool = False) -> MachineReport | None:
        """Return what the provider says about a machine; None if it answers that it knows none (404).

        None alone proves nothing: right after a launch it means "not visible yet".
        """
        ...

    async def change_duration(self, server_id: ServerId, *, total: timedelta) -> MachineReport:
        """Set the machine's running time: the absolute total, counted from its ready time, not an increment.

        Repeating it is harmless. Raises MachineNotFound.
        """
        ...

    async def stop_machine(
        self,
        server_id: ServerId,
        *,
        leaving: Callable[[], None] | None = None,
        denied: Callable[[], None] | None = None,
    ) -> bool:
        """Ask once for the machine to be stopped (with retries where no answer came: stopping twice is harmless).

        `leaving` is called when a request is about to leave, which may be long after this call where there is a limit;
        `denied` if that one never arrived, or was answered with an error.

        True: the provider accepted, and bills no longer as of now. False: it answered that it knows no such machine.
        Neither means that the machine is gone: look until it is.
        """
        ...

    async def balance(self) -> Balance | None:
        """Return the account's money as told now or a minute ago; None if the provider does not say.

        A courtesy: nothing may depend on it, it is asked once and not retried, and what goes wrong is None.
        """
        ...
