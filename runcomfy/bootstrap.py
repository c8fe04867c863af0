"""
The one place that picks concrete adapters.

`App` wires one process: settings, the store, the account's provider, ComfyUI clients, the results folder. Everything
that needs the cloud is opened when it is first needed, so that a job on a given server needs neither credentials nor a
database.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import workflows
from runcomfy.adapters.clock import SystemClock
from runcomfy.adapters.config import load_settings
from runcomfy.adapters.dev_server_file import PublishedDevServer
from runcomfy.adapters.dev_server_state import DevServerStateManager
from runcomfy.adapters.workflow_files import WorkflowFiles
from runcomfy.application.books import Books, quiet
from runcomfy.application.dev_server import DevServer
from runcomfy.application.machines import Machines
from runcomfy.application.orchestrator import RunComfyOrchestrator
from runcomfy.application.owner import OwnerSession
from runcomfy.application.placing import Placer
from runcomfy.domain.exceptions import ValueInvalid, foreign_text
from runcomfy.domain.machine import Machine
from runcomfy.domain.secret import SecretUrl
from runcomfy.domain.settings import Settings
from runcomfy.ports.clock import Clock
from runcomfy.ports.comfyui import ComfyUI
from runcomfy.ports.provider import Provider
from runcomfy.ports.store import Store

STORE_NAME = "runcomfy.sqlite3"
Tell = Callable[[str], None]


class App:
    """One process of the product. `async with App(...) as app:`; what is open is closed when the block is left."""

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        overrides: Mapping[str, Any] | None = None,
        clock: Clock | None = None,
        tell: Tell = quiet,
        launches: bool = True,
    ) -> None:
        """Nothing is opened yet. `launches=False`: the workflow version id, which launching needs, may be missing."""
        self._overrides = dict(overrides or {})
        self.settings = settings or load_settings(overrides=self._overrides)
        self.clock = clock or SystemClock()
        self.tell = tell
        self._launches = launches
        self._stack = AsyncExitStack()
        self._opening = asyncio.Lock()
        self._cloud: tuple[Machines, DevServer] | None = None
        self._given: dict[str, ComfyUI] = {}

    async def __aenter__(self) -> App:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close clients, sign off as an owner, close the store."""
        given, self._given = list(self._given.values()), {}
        for server in given:
            await server.close()
        await self._stack.aclose()

    # -- the cloud -----------------------------------------------------------------------------------------

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
        from runcomfy.adapters.processes import ProcessTable
        from runcomfy.adapters.stores.sql import SqlStore

        settings = self.settings
        if not self._has_credentials():
            # Read once more for the error that names every missing value with the place to set it.
            settings = load_settings(overrides=self._overrides, require_cloud=True, require_version=self._launches)
        folder = Path(settings.files.state_dir)
        path = Path(":memory:") if in_memory else folder / STORE_NAME
        store = await self._stack.enter_async_context(SqlStore(path, clock=self.clock, durable=settings.files.durable))
        provider = await self._provider(store, settings)
        processes = ProcessTable()
        session = await self._stack.enter_async_context(OwnerSession(store, processes, self.clock))
        books = Books(
            store, self.clock, settings, session.owner, provider=provider.name, account=provider.account, tell=self.tell
        )
        machines = Machines(provider, processes, books)
        manager = DevServerStateManager(folder / "dev_server_state.json", copies=settings.files.state_copies)
        return machines, DevServer(machines, PublishedDevServer(manager), self.comfyui)

    def _has_credentials(self) -> bool:
        cloud = self.settings.cloud
        return bool(cloud.user_id and cloud.tokens and (cloud.workflow_version_id or not self._launches))

    async def _provider(self, store: Store, settings: Settings) -> Provider:
        from runcomfy.adapters.providers.runcomfy import RunComfyAPIClient
        from runcomfy.application.limiter import StoreLimiter

        cloud = settings.cloud
        account = RunComfyAPIClient(cloud, clock=self.clock).account  # known without asking anybody
        limiter = StoreLimiter(store, account, cloud, self.clock)
        return await self._stack.enter_async_context(RunComfyAPIClient(cloud, clock=self.clock, limiter=limiter))

    def held(self) -> list[Machine]:
        """Return what this process has rented and not ended, as far as it knows."""
        return list(self._cloud[0].books.held.values()) if self._cloud is not None else []

    # -- ComfyUI -------------------------------------------------------------------------------------------

    def comfyui(self, url: SecretUrl) -> ComfyUI:
        """Return a new client of the ComfyUI at `url`; whoever asked closes it."""
        from runcomfy.adapters.log import register_secret

        register_secret(url)  # who knows a rented machine's address can use it
        return self._client(url)

    def _client(self, url: SecretUrl) -> ComfyUI:
        from runcomfy.adapters.comfyui.client import ComfyUIWorkflowClient

        return ComfyUIWorkflowClient(url, self.settings.comfy, clock=self.clock)

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

    # -- jobs ----------------------------------------------------------------------------------------------

    def orchestrator(self) -> RunComfyOrchestrator:
        """Return what runs jobs."""
        from runcomfy.adapters.log import redact
        from runcomfy.adapters.results import DiskResults

        return RunComfyOrchestrator(
            settings=self.settings,
            clock=self.clock,
            results=DiskResults(self.settings.files),
            placer=Placer(self.comfyui, self.given_server, self.cloud, tell=self.tell),
            load_workflow=self.workflow_files(),
            random_int=random.SystemRandom().randint,
            veil=redact,
        )

    @staticmethod
    def workflow_files() -> WorkflowFiles:
        """Return what loads workflows, shipped ones and files."""
        return WorkflowFiles(workflows.names, workflows.load)
