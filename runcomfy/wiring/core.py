"""
What everything else of an `App` stands on: settings, the books, the account's provider, ComfyUI, the queue's database.

Everything that needs the cloud is opened when it is first needed, so that a job on a given server needs neither
credentials nor a database.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Collection, Mapping
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import unquote, urlsplit

import workflows
from runcomfy.adapters.clock import SystemClock
from runcomfy.adapters.config import load_settings
from runcomfy.adapters.dev_server_file import PublishedDevServer
from runcomfy.adapters.dev_server_state import DevServerStateManager
from runcomfy.adapters.files import DISK
from runcomfy.adapters.workflow_files import WorkflowFiles
from runcomfy.application.books import Books, quiet
from runcomfy.application.dev_server import DevServer
from runcomfy.application.faultpoints import entered
from runcomfy.application.live import Live
from runcomfy.application.machines import Machines
from runcomfy.application.orchestrator import RunComfyOrchestrator
from runcomfy.application.owner import OwnerSession
from runcomfy.application.placing import Placer
from runcomfy.domain.exceptions import RunComfyError, SettingInvalid, ValueInvalid, foreign_text
from runcomfy.domain.machine import Machine
from runcomfy.domain.secret import Secret, SecretUrl
from runcomfy.domain.settings import QueueSettings, Settings
from runcomfy.ports.clock import Clock
from runcomfy.ports.comfyui import ComfyUI
from runcomfy.ports.processes import Processes
from runcomfy.ports.provider import Provider
from runcomfy.ports.store import Store

if TYPE_CHECKING:
    from runcomfy.adapters.stores.database import Database
    from runcomfy.adapters.stores.jobs import SqlJobs
    from runcomfy.adapters.stores.sql import SqlStore
    from runcomfy.application.monitor import Monitor
    from runcomfy.application.time_left import TimeLeftBook

STORE_NAME = "runcomfy.sqlite3"
DATABASE_URL = "RUNCOMFY_DATABASE_URL"
"""Puts the machines' books, and the queue unless it has a database of its own, on a PostgreSQL."""
QUEUE_PREFIX = "COMFYUI_AGENT_"
Tell = Callable[[str], None]


class Core:
    """One process of the product, without what works for a queue."""

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        overrides: Mapping[str, Any] | None = None,
        clock: Clock | None = None,
        tell: Tell = quiet,
        launches: bool = True,
        queue: Mapping[str, Any] | None = None,
        queue_config: str | os.PathLike[str] | None = None,
        processes: Processes | None = None,
    ) -> None:
        """Nothing is opened yet. `launches=False`: the workflow version id, which launching needs, may be missing.

        `overrides` may hold the queue's variables, too. `queue`: field of `QueueSettings` -> value that wins over
        everything; None counts as not given. `queue_config`: the project's configuration file. `processes` knows
        which processes live; left out, this computer's own table.
        """
        given = dict(overrides or {})
        self._queue_overrides = {name: given.pop(name) for name in list(given) if name.startswith(QUEUE_PREFIX)}
        self._queue_overrides |= {name: value for name, value in (queue or {}).items() if value is not None}
        self._queue_config = queue_config
        self._database_url = str(given.pop(DATABASE_URL, "") or os.environ.get(DATABASE_URL, "")).strip()
        self._overrides = given
        self.settings = settings or load_settings(overrides=self._overrides)
        self.clock = clock or SystemClock()
        self.tell = tell
        self.live = Live(self.clock)
        """What the jobs of this process are doing."""
        self._time_left: TimeLeftBook | None = None
        self._launches = launches
        self._processes = processes
        self._monitor: Monitor | None = None
        self._stack = AsyncExitStack()
        self._opening = asyncio.Lock()
        self._cloud: tuple[Machines, DevServer] | None = None
        self._books: SqlStore | None = None
        self._given: dict[str, ComfyUI] = {}
        self._queue_settings: QueueSettings | None = None
        self._opening_jobs = asyncio.Lock()
        self._jobs: SqlJobs | None = None
        self._jobs_database: Database | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def processes(self) -> Processes:
        """What knows which processes live."""
        if self._processes is None:
            from runcomfy.adapters.processes import ProcessTable

            self._processes = ProcessTable()
        return self._processes

    async def close(self) -> None:
        """Close clients, sign off as an owner, close the store."""
        given, self._given = list(self._given.values()), {}
        for server in given:
            await server.close()
        await self._stack.aclose()

    def _say(self, sentence: str) -> None:
        self.tell(sentence)  # whoever listens may change

    # -- the cloud ---------------------------------------------------------------------------------------------

    async def cloud(self, *, in_memory: bool = False) -> tuple[Machines, DevServer]:
        """Return what rents and ends machines, opened on first use.

        `in_memory` keeps no books: only for stopping and listing machines when the database cannot be used.

        Raises ConfigurationError (credentials), LocalError (the store).
        """
        async with self._opening:
            if self._cloud is None:
                self._cloud = await self._open_cloud(in_memory=in_memory)
            return self._cloud

    async def _open_cloud(self, *, in_memory: bool) -> tuple[Machines, DevServer]:
        from runcomfy.adapters.stores.sql import SqlStore

        settings = self.settings
        if not self._has_credentials():
            # Read once more for the error that names every missing value with the place to set it.
            settings = load_settings(overrides=self._overrides, require_cloud=True, require_version=self._launches)
        folder = Path(settings.files.state_dir)
        if in_memory:
            store = await self._stack.enter_async_context(entered(SqlStore.over(self._database(":memory:")), "store"))
        else:
            store = await self._open_books()
        provider = await self._provider(store, settings)
        session = await self._stack.enter_async_context(OwnerSession(store, self.processes, self.clock))
        books = Books(
            store, self.clock, settings, session.owner, provider=provider.name, account=provider.account, tell=self.tell
        )
        machines = Machines(provider, self.processes, books, prompt_places=self._prompt_places)
        self._stack.push_async_callback(machines.close)
        manager = DevServerStateManager(
            folder / "dev_server_state.json", copies=settings.files.state_copies, disk=entered(DISK, "disk")
        )
        return machines, DevServer(machines, entered(PublishedDevServer(manager), "dev_file"), self.comfyui)

    async def books(self) -> Store:
        """Return the machines' books, opened on first use; no account is needed for that. Raises LocalError."""
        async with self._opening:
            return await self._open_books()

    async def _open_books(self) -> SqlStore:
        from runcomfy.adapters.stores.sql import SqlStore

        if self._books is None:
            database = self._database(self._machines_database(Path(self.settings.files.state_dir)))
            self._books = await self._stack.enter_async_context(entered(SqlStore.over(database), "store"))
        return self._books

    def _machines_database(self, folder: Path) -> str:
        from runcomfy.adapters.stores.choose import is_server

        if not self._database_url:
            return str(folder / STORE_NAME)
        if not is_server(self._database_url):
            raise SettingInvalid(
                f"{DATABASE_URL} is not the address of a PostgreSQL",
                hint="write postgresql://user:password@host/name, or leave it out: the books are then a file",
                details={"setting": DATABASE_URL},
            )
        return self._database_url

    def _database(self, name: str, **options: Any) -> Database:
        from runcomfy.adapters.log import register_secret
        from runcomfy.adapters.stores.choose import is_server, store_from

        if is_server(name):
            register_secret(Secret(name))
            with suppress(ValueError):  # what cannot be read is refused below
                password = urlsplit(name).password or ""
                for text in filter(None, {password, unquote(password)}):
                    register_secret(Secret(text))
        return store_from(Secret(name), clock=self.clock, durable=self.settings.files.durable, **options)

    def _has_credentials(self) -> bool:
        cloud = self.settings.cloud
        return bool(cloud.user_id and cloud.tokens and (cloud.workflow_version_id or not self._launches))

    async def _provider(self, store: Store, settings: Settings) -> Provider:
        from runcomfy.adapters.providers.runcomfy import RunComfyAPIClient
        from runcomfy.application.limiter import StoreLimiter

        cloud = settings.cloud
        account = RunComfyAPIClient(cloud, clock=self.clock).account  # known without asking anybody
        limiter = StoreLimiter(store, account, cloud, self.clock)
        provider = entered(RunComfyAPIClient(cloud, clock=self.clock, limiter=limiter), "provider")
        return await self._stack.enter_async_context(provider)

    async def _prompt_places(self) -> Collection[str] | None:
        """Return where prompts of the queue may still run; None if that cannot be found out."""
        from runcomfy.adapters.stores.job_places import prompt_places

        try:
            if not self.queue_exists:
                return None  # a machine of a queue belongs to a queue that is somewhere else
            await self.job_store()
            if self._jobs_database is None:
                return None
            return await entered(prompt_places, "jobs.prompt_places")(self._jobs_database)
        except RunComfyError as error:
            self._say(f"the queue cannot be read ({error.message}): machines of queues are left alone for now")
            return None

    def held(self) -> list[Machine]:
        """Return what this process has rented and not ended, as far as it knows."""
        return list(self._cloud[0].books.held.values()) if self._cloud is not None else []

    # -- ComfyUI -----------------------------------------------------------------------------------------------

    def comfyui(self, url: SecretUrl) -> ComfyUI:
        """Return a new client of the ComfyUI at `url`; whoever asked closes it."""
        from runcomfy.adapters.log import register_secret

        register_secret(url)  # who knows a rented machine's address can use it
        return self._client(url)

    def _client(self, url: SecretUrl) -> ComfyUI:
        from runcomfy.adapters.comfyui.client import ComfyUIWorkflowClient

        return entered(ComfyUIWorkflowClient(url, self.settings.comfy, clock=self.clock), "comfyui")

    def given_server(self, url: str) -> ComfyUI:
        """Return the client of a server that the user named; kept warm until the app is closed."""
        parts = urlsplit(url if len(url) < 2_000 else "")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueInvalid(
                f"{foreign_text(url, 80)!r} is not the address of a ComfyUI server",
                hint="write it as http://host:8188 or https://host",
            )
        if url not in self._given:
            self._given[url] = self._client(SecretUrl(url))
        return self._given[url]

    # -- the queue's database ----------------------------------------------------------------------------------

    @property
    def queue_settings(self) -> QueueSettings:
        """The queue's settings, read on first use. Raises SettingInvalid."""
        if self._queue_settings is None:
            from runcomfy.adapters.agent_config import load_queue_settings

            self._queue_settings = load_queue_settings(
                settings=self.settings,
                env={**os.environ, DATABASE_URL: self._database_url},
                config_file=self._queue_config,
                overrides=self._queue_overrides,
            )
        return self._queue_settings

    @property
    def queue_where(self) -> str:
        """What the queue's database is called, without secrets."""
        from runcomfy.adapters.agent_variables import database_shown

        return database_shown(self.queue_settings.database)

    @property
    def queue_exists(self) -> bool:
        """Whether there is a database to look into; one on a server is taken to be there.

        So is one whose folder is a file, or may not be looked into: opening it says what is wrong.
        """
        from runcomfy.adapters.stores.choose import is_server

        name = self.queue_settings.database
        if is_server(name):
            return True
        path = Path(name.reveal())
        try:
            above = next((each for each in (path, *path.parents) if each.exists()), None)
        except OSError:
            return True
        return above is not None and (above == path or not above.is_dir())

    async def job_store(self) -> SqlJobs:
        """Return the queue's database, opened on first use. Raises LocalError, SettingInvalid."""
        from runcomfy.adapters.stores.jobs import SqlJobs

        async with self._opening_jobs:
            if self._jobs is None:
                settings = self.queue_settings
                database = self._database(settings.database.reveal(), wake_interval=settings.wake_interval)
                self._jobs_database = database
                self._jobs = await self._stack.enter_async_context(entered(SqlJobs(database), "jobs"))
            return self._jobs

    # -- jobs --------------------------------------------------------------------------------------------------

    def orchestrator(self) -> RunComfyOrchestrator:
        """Return what runs jobs."""
        from runcomfy.adapters.log import redact
        from runcomfy.adapters.results import DiskResults

        return RunComfyOrchestrator(
            settings=self.settings,
            clock=self.clock,
            results=entered(DiskResults(self.settings.files, disk=entered(DISK, "disk")), "results"),
            placer=self._placer(),
            load_workflow=self.workflow_files(),
            random_int=random.SystemRandom().randint,
            veil=redact,
        )

    def _placer(self) -> Placer:
        return Placer(self.comfyui, self.given_server, self.cloud, tell=self._say)

    @staticmethod
    def workflow_files() -> WorkflowFiles:
        """Return what loads workflows, shipped ones and files."""
        return WorkflowFiles(workflows.names, workflows.load)
