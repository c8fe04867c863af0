"""
The one place that picks concrete adapters.

`App` wires one process: settings, the store, the account's provider, ComfyUI clients, the results folder
(`wiring.core`), and what works off a queue (`wiring.serving`). Everything that needs the cloud is opened when it is
first needed, so that a job on a given server needs neither credentials nor a database.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from runcomfy.adapters.config import load_settings
from runcomfy.application.faultpoints import entered
from runcomfy.domain.job import JobRequest
from runcomfy.domain.settings import Settings
from runcomfy.ports.jobs import JobStore
from runcomfy.wiring.core import STORE_NAME
from runcomfy.wiring.serving import Serving

if TYPE_CHECKING:
    from runcomfy.adapters.stores.postgres import OpenTransaction
    from runcomfy.application.cost_optimizer import CostOptimizer
    from runcomfy.application.job_queue import JobQueue
    from runcomfy.application.presence import Presence
    from runcomfy.application.time_left import TimeLeftBook


def serves(settings: Settings | None = None) -> frozenset[str]:
    """Return what the API server works on beside HTTP, by `RUNCOMFY_SERVE`.

    `pool`: the queue over rented machines. `queue`: the queue on a ComfyUI of the user's. `none`: nothing; others do.
    Unset: `pool` if there is an account, else `none`. Raises SettingInvalid, ConfigurationError.
    """
    settings = settings or load_settings()
    said = settings.app.serves
    if not said:
        cloud = settings.cloud
        said = "pool" if cloud.user_id and cloud.tokens and cloud.workflow_version_id else "none"
    parts = {"pool": frozenset({"queue", "pool"}), "queue": frozenset({"queue"}), "none": frozenset[str]()}
    return parts[said]


class App(Serving):
    """One process of the product. `async with App(...) as app:`; what is open is closed when the block is left."""

    # -- the queue ---------------------------------------------------------------------------------------------

    async def job_queue(self, *, looks_often: bool = False) -> JobQueue:
        """Return the queue as programs use it; what is put in is checked as far as it can be without a machine.

        `looks_often`: it is read by many while this process writes, and is not to wait for that.
        """
        from runcomfy.adapters.stores.jobs import SqlJobs
        from runcomfy.adapters.stores.jobs_beside import JobsBeside
        from runcomfy.application.job_queue import JobQueue

        async def check(request: JobRequest) -> None:
            await self.orchestrator().prepare(request)

        store: JobStore = await self.job_store()
        if looks_often and isinstance(store, SqlJobs):
            store = await self._stack.enter_async_context(entered(JobsBeside(store), "jobs"))
        return JobQueue(store, self.queue_settings, check=check, processes=self.processes)

    async def open_transactions(self, *, older_than: timedelta) -> list[OpenTransaction] | None:
        """Return transactions of others that are open in the queue's database; None: it is a file."""
        await self.job_store()
        database = self._jobs_database
        look = getattr(database.kind, "open_transactions", None) if database is not None else None
        if database is None or look is None:
            return None
        read = entered(database.read, "jobs.open_transactions")
        found: list[OpenTransaction] = await read(lambda connection: look(connection, older_than=older_than))
        return found

    # -- what is known -----------------------------------------------------------------------------------------

    async def costs(self) -> CostOptimizer:
        """Return what answers questions about the account's money. Raises ConfigurationError, LocalError."""
        from runcomfy.adapters.balance_file import BalanceFile
        from runcomfy.application.cost_optimizer import CostOptimizer

        machines, _ = await self.cloud()
        files = self.settings.files
        balances = entered(BalanceFile(Path(files.state_dir), durable=files.durable), "balances")
        return CostOptimizer(machines.books, machines.provider, balances)

    def time_left(self) -> TimeLeftBook:
        """Return what tells how long jobs will still take; history is read when it is first asked."""
        from runcomfy.application.time_left import TimeLeftBook

        if self._time_left is None:
            self._time_left = TimeLeftBook(self.job_store, self.books, self.clock, has_books=self._has_books)
        return self._time_left

    def _has_books(self) -> bool:
        """Whether the machines' books are there: asking how long a job takes is no reason to make them."""
        return bool(self._database_url) or (Path(self.settings.files.state_dir) / STORE_NAME).exists()

    # -- signals -----------------------------------------------------------------------------------------------

    def presence(self, *, user: str = "") -> Presence:
        """Return what says that somebody is there, or that work comes."""
        from runcomfy.application.presence import Presence

        return Presence(self.books, self.clock, user=user)
