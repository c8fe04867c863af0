"""
The account under the names that CONJURE uses: `RunComfyAPIClient()` and what its methods return.

Nothing here speaks to the provider by itself. A machine that is launched is one of our books: it has an intent, a
budget and a time until which it is kept, `comfyctl machines` shows it, the guard ends it when nothing runs on it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import Enum
from pathlib import Path
from typing import Any, Final, Self, TypeVar, overload

import aiohttp

from runcomfy.adapters.config import load_settings
from runcomfy.adapters.dev_server_state import FILE_NAME, DevServerStateManager
from runcomfy.adapters.providers.runcomfy import RunComfyAPIClient as AccountClient
from runcomfy.application.finish import finish
from runcomfy.application.machines import Machines
from runcomfy.bootstrap import App
from runcomfy.conjure.attributes import TokenShown, told_span
from runcomfy.conjure.errors import also, builtin_errors
from runcomfy.conjure.office import Office, cloud_to_stop, log, open_office
from runcomfy.conjure.two_forms import TwoForms
from runcomfy.domain.exceptions import (
    CredentialsMissing,
    LocalError,
    MachineNotFound,
    ProviderError,
    RunComfyError,
    ValueInvalid,
)
from runcomfy.domain.machine import IllegalTransition, Machine, MachineReport, Phase, Purpose, ServerId
from runcomfy.domain.settings import CloudSettings, Settings
from runcomfy.ports.clock import Clock
from runcomfy.ports.limiter import Limiter

T = TypeVar("T")


class MachineStatus(Enum):
    """RunComfy's words for how a machine is."""

    STARTING = "Starting"
    READY = "Ready"
    STOPPING = "Stopping"
    DELETING = "Deleting"
    ERROR = "Error"


class ServerType(Enum):
    """RunComfy's names of machine types."""

    MEDIUM = "medium"
    LARGE = "large"
    EXTRA_LARGE = "extra-large"
    LARGE_2X = "2x-large"
    TURBO_2XL = "2xl-turbo"


_WORDS: Final = {
    Phase.STARTING: MachineStatus.STARTING.value,
    Phase.READY: MachineStatus.READY.value,
    Phase.STOPPING: MachineStatus.STOPPING.value,
    Phase.GONE: MachineStatus.DELETING.value,
    Phase.FAILED: MachineStatus.ERROR.value,
}


@dataclass
class MachineInfo:
    """What RunComfy says of a machine. Times are ISO 8601 with offset, durations seconds. `repr` hides its address."""

    server_id: str
    user_id: str = field(repr=False)
    server_type: str
    current_status: str
    estimated_duration: int
    main_service_url: str | None = field(default=None, repr=False)
    """None until it is ready. Who knows it can use the machine."""
    service_ready_at: str | None = None
    estimated_stopping_at: str | None = None

    @property
    def base_url(self) -> str | None:
        """The machine's address without a trailing slash; None until it is ready."""
        return self.main_service_url.rstrip("/") if self.main_service_url else None


@dataclass
class WorkflowInfo:
    """A workflow that is saved in the account's cloud."""

    workflow_id: str
    name: str
    version_id: str
    created_at: str
    updated_at: str


class ConjureAPIClient(TokenShown):
    """`RunComfyAPIClient()` as CONJURE makes it. Credentials come from the environment or credentials.txt.

    Every method may be called in any event loop. Errors are the product's own and a `RuntimeError` (or `ValueError`,
    `TimeoutError` where that fits), too.
    """

    def __init__(self, *, office: Office = open_office, settings: Settings | None = None) -> None:
        """Nothing is sent yet. Raises SettingInvalid."""
        self._office = office
        self._settings = settings or load_settings()
        cloud = self._settings.cloud
        self.base_url: str = cloud.base_url
        self.user_id: str = cloud.user_id
        self._tokens = cloud.tokens
        self.default_server_type: str = cloud.server_type
        self.default_duration: int = _seconds(cloud.duration)
        self.max_retries: int = cloud.max_retries
        self.poll_interval: float = cloud.poll_interval.total_seconds()
        self.machine_timeout: float = _seconds(cloud.boot_timeout)

    def __repr__(self) -> str:
        return f"RunComfyAPIClient({self.base_url!r})"

    def as_told(self) -> Settings:
        """Return the settings with what callers have written into the attributes since. Raises SettingInvalid."""
        cloud = self._settings.cloud
        told = replace(
            cloud,
            base_url=str(self.base_url).rstrip("/"),
            user_id=self.user_id,
            tokens=self._tokens,
            server_type=_text(self.default_server_type),
            duration=told_span("default_duration", self.default_duration, cloud.duration, whole=True),
            max_retries=self.max_retries,
            poll_interval=told_span("poll_interval", self.poll_interval, cloud.poll_interval),
            boot_timeout=told_span("machine_timeout", self.machine_timeout, cloud.boot_timeout, whole=True),
        )
        return self._settings if told == cloud else replace(self._settings, cloud=told)

    def is_available(self) -> bool:
        """Say whether token and user id are set; nobody is asked."""
        return bool(self.api_token and self.user_id)

    # -- machines ------------------------------------------------------------------------------------------

    async def launch_machine(
        self,
        server_type: str | None = None,
        estimated_duration: float | None = None,
        workflow_version_id: str | None = None,
    ) -> MachineInfo:
        """Launch one machine and return RunComfy's first word about it; `wait_for_machine_ready` waits for it.

        It is kept, without a process, for as long as its start may take and `estimated_duration` (seconds) after that;
        the guard ends it sooner when nothing runs on it. Every call launches one; `get_or_create_ready_machine` takes
        what is there. A launch that failed has ended what it may have started.

        Raises ValueError (no version id is given or set), RuntimeError (refused, or over budget).
        """
        version = self._version(workflow_version_id)
        kind = _text(server_type) or _text(self.default_server_type)
        seconds = self.default_duration if estimated_duration is None else estimated_duration
        with builtin_errors():
            async with self._office(self.as_told()) as app:
                machines, _ = await app.cloud()
                machine = await self._launch(app, machines, kind, timedelta(seconds=seconds), version)
                return self._of_machine(machine)

    def _version(self, given: str | None) -> str:
        version = given or self._settings.cloud.workflow_version_id
        if not version:
            missing = CredentialsMissing(
                "no workflow version id is given, and none is set",
                hint="set RUNCOMFY_WORKFLOW_VERSION_ID, or write version_id into credentials.txt",
            )
            raise also(missing, ValueError)
        return version

    async def _launch(
        self, app: App, machines: Machines, server_type: str, duration: timedelta, version: str
    ) -> Machine:
        intent = machines.books.intent(
            purpose=Purpose.DEV,
            server_type=server_type,
            duration=duration,
            reason="launched through CONJURE's client",
            version_id=version,
        )
        await app.start_guard()
        try:
            async with machines.launch_lock():
                machine = await machines.launch(intent)
            kept_until = app.clock.now() + machines.settings.cloud.boot_timeout + duration
            return await finish(machines.books.hand_over(machine, kept_until=kept_until, note="left to CONJURE"))
        except BaseException:
            await finish(machines.settle(intent, reason="its launch was broken off"))
            raise

    async def get_machine_status(self, server_id: str) -> MachineInfo:
        """Return what RunComfy says of a machine. Raises RuntimeError if it knows none of that id."""
        with builtin_errors():
            async with self._office(self.as_told()) as app:
                machines, _ = await app.cloud()
                report = await machines.provider.get_machine_status(ServerId(server_id))
                if report is None:
                    raise MachineNotFound("RunComfy knows no machine of that id", details={"server_id": server_id})
                await _note(machines, report)
                return self._of_report(report)

    async def wait_for_machine_ready(self, server_id: str, timeout: float | None = None) -> MachineInfo | None:
        """Wait until the machine is Ready with an address; None if it failed, or was not ready in time (seconds).

        A machine that failed, or was not ready within `machine_timeout`, is ended. One that is not waited for that
        long, because `timeout` is shorter, goes on starting.
        """
        with builtin_errors():
            limit = self.as_told().cloud.boot_timeout.total_seconds()
            patience = limit if timeout is None else timeout
            async with self._office(self.as_told()) as app:
                machines, _ = await app.cloud()
                loop = asyncio.get_running_loop()
                began = loop.time()
                while True:
                    report = await _asked(machines, ServerId(server_id))
                    if report is not None and report.usable:
                        await _note(machines, report)
                        return self._of_report(report)
                    over = report is not None and report.phase in (Phase.FAILED, Phase.GONE, Phase.STOPPING)
                    late = loop.time() - began >= patience
                    if over or late:
                        if over or patience >= limit:
                            await self._end(machines, server_id, reason="it never became ready")
                        return None
                    await asyncio.sleep(min(self.poll_interval, max(patience - (loop.time() - began), 0.01)))

    async def get_or_create_ready_machine(
        self, workflow_name: str = "generate_flux_mesh", server_type: str | None = None
    ) -> MachineInfo:
        """Return the dev server if it runs, or launch it and wait until ComfyUI answers there.

        `workflow_name` is not looked at: which workflow a machine comes with is the version id's business.

        Raises ValueError (no version id is set), RuntimeError, TimeoutError; what was launched is stopped again then.
        """
        self._version(None)
        with builtin_errors():
            async with self._office(self.as_told()) as app:
                _, dev = await app.cloud()
                await app.start_guard()
                _, report, _ = await dev.start(
                    server_type=_text(server_type) or _text(self.default_server_type),
                    duration=timedelta(seconds=self.default_duration),
                )
                return self._of_report(report)

    async def stop_machine(self, server_id: str) -> bool:
        """Stop a machine of the account and look until it is gone. True: it is. False: not known, or not seen gone.

        Nothing is raised for what can go wrong; the log says it, and `comfyctl machines ls` whether it still runs.
        """
        try:
            async with self._office(self.as_told()) as app:
                machines = await cloud_to_stop(app)
                stopped = await self._end(machines, server_id, reason="stop asked for by CONJURE")
                if stopped is None:
                    return False
                with suppress(LocalError):
                    await asyncio.to_thread(self._forget, server_id)
                return not stopped.is_open or stopped.stop_accepted_at is not None
        except RunComfyError as error:
            log.error("stop_failed", extra={"fields": {"error": error.code, "server_id": server_id}})
            return False

    async def _end(self, machines: Machines, server_id: str, *, reason: str) -> Machine | None:
        """End a machine whoever has it; None if neither our books nor the account have it."""
        if not server_id.strip():
            raise ValueInvalid("the machine's id is empty", hint="`comfyctl machines ls` lists the machines")
        wanted = ServerId(server_id)
        row = await machines.books.row_of(wanted)
        if row is not None and row.is_open:
            row = await machines.books.take_over(row, note=reason)  # each call is a process of its own to the books
        else:
            report = await machines.provider.get_machine_status(wanted, urgent=True)
            if report is None or report.phase is Phase.GONE:
                return row
            row = await machines.adopt(report, purpose=Purpose.TAKEN, reason=reason)
        return await finish(machines.stop(row, reason=reason))

    def _forget(self, server_id: str) -> None:
        """Take back what the state file says of a machine that is stopped."""
        files = self._settings.files
        manager = DevServerStateManager(Path(files.state_dir) / FILE_NAME, copies=files.state_copies)
        state = manager.load_server_state()
        if state is not None and state.server_id == server_id:
            manager.clear_server_state()

    async def list_machines(self) -> list[MachineInfo]:
        """Return every machine of the account; an empty list, and a line in the log, if it cannot be asked."""

        async def ask(machines: Machines) -> list[MachineInfo]:
            return [self._of_report(report) for report in await machines.provider.list_machines()]

        return await self._or_empty("list_machines_failed", ask)

    async def get_workflows(self) -> list[WorkflowInfo]:
        """Return the account's workflows; an empty list, and a line in the log, if it cannot be asked."""

        async def ask(machines: Machines) -> list[WorkflowInfo]:
            found = await machines.provider.get_workflows()
            return [WorkflowInfo(w.workflow_id, w.name, w.version_id, w.created_at, w.updated_at) for w in found]

        return await self._or_empty("list_workflows_failed", ask)

    async def _or_empty(self, failure: str, ask: Callable[[Machines], Awaitable[list[T]]]) -> list[T]:
        try:
            async with self._office(self.as_told()) as app:
                machines, _ = await app.cloud()
                return await ask(machines)
        except RunComfyError as error:
            log.error(failure, extra={"fields": {"error": error.code}})
            return []

    # -- forms ---------------------------------------------------------------------------------------------

    def _of_report(self, report: MachineReport) -> MachineInfo:
        return MachineInfo(
            server_id=report.server_id,
            user_id=self.user_id,
            server_type=report.server_type,
            current_status=_WORDS.get(report.phase, report.status),
            estimated_duration=_seconds(report.duration) if report.duration else self.default_duration,
            main_service_url=report.url.reveal().rstrip("/") if report.url else None,
            service_ready_at=_stamp(report.ready_at),
            estimated_stopping_at=_stamp(report.stopping_at),
        )

    def _of_machine(self, machine: Machine) -> MachineInfo:
        return MachineInfo(
            server_id=str(machine.server_id or ""),
            user_id=self.user_id,
            server_type=machine.server_type,
            current_status=MachineStatus.STARTING.value,
            estimated_duration=_seconds(machine.duration),
        )


async def _asked(machines: Machines, server_id: ServerId) -> MachineReport | None:
    """Return RunComfy's word of a machine; None if it knows none (yet), or cannot be asked just now."""
    try:
        return await machines.provider.get_machine_status(server_id)
    except ProviderError as error:
        if not error.retryable:
            raise
        log.warning("machine_status_failed", extra={"fields": {"error": error.code, "server_id": server_id}})
        return None


async def _note(machines: Machines, report: MachineReport) -> None:
    """Write into our books that a machine is ready, and until when; what cannot be written keeps nobody waiting."""
    if report.phase is not Phase.READY:
        return
    with suppress(LocalError, IllegalTransition):
        row = await machines.books.row_of(report.server_id)
        if row is None or not row.is_open:
            return
        row = await machines.ready(row, report)
        if row.kept_until is not None and report.stopping_at not in (None, row.kept_until):
            await machines.books.change(row, note="ready", kept_until=report.stopping_at)


def _seconds(span: timedelta) -> int:
    return int(span.total_seconds())


def _stamp(moment: datetime | None) -> str | None:
    return moment.isoformat() if moment is not None else None


def _text(given: object) -> str:
    """Return the word for a machine type, given as a word or as a `ServerType`."""
    return str(given.value if isinstance(given, Enum) else given or "").strip()


class RunComfyAPIClient(AccountClient, metaclass=TwoForms):
    """One RunComfy account: with settings the client of its API, without arguments CONJURE's (`ConjureAPIClient`)."""

    conjure_form = ConjureAPIClient

    @overload
    def __new__(cls) -> ConjureAPIClient: ...  # type: ignore[misc]
    @overload
    def __new__(
        cls,
        settings: CloudSettings,
        *,
        clock: Clock,
        limiter: Limiter | None = None,
        http: aiohttp.ClientSession | None = None,
    ) -> Self: ...
    def __new__(cls, *arguments: Any, **wiring: Any) -> Any:
        """Return the form that the arguments mean."""
        if cls is RunComfyAPIClient and not arguments and not wiring:
            return ConjureAPIClient()
        return super().__new__(cls)
