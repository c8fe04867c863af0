"""
RunComfy's serverless API under the names that CONJURE uses: `ServerlessRunComfyClient()` and what its methods return.

Each method may be called in any event loop; nothing that is bound to one outlives a call. A request that this client
submitted is cancelled when its caller stops waiting for it. A process that is killed outright cancels nothing: the
request then ends by itself, and costs what it would have cost.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import Enum
from pathlib import Path
from typing import Any, Final

from runcomfy.adapters.clock import SystemClock
from runcomfy.adapters.config import load_settings
from runcomfy.adapters.data_uri import png_data_uri
from runcomfy.adapters.files import DISK, local_error
from runcomfy.adapters.providers.runcomfy_serverless import unavailable
from runcomfy.adapters.providers.runcomfy_serverless_wire import read_files
from runcomfy.adapters.results import DiskResults
from runcomfy.application.faultpoints import entered
from runcomfy.application.finish import finish
from runcomfy.application.serverless_run import ServerlessOrder, ServerlessRuns, Waited
from runcomfy.conjure.attributes import TokenShown, told_span
from runcomfy.conjure.errors import builtin_errors
from runcomfy.conjure.serverless_runs import (
    IMAGE,
    MAX_SEED,
    MESH,
    STEPS_FLUX,
    STEPS_PARTPACKER,
    conjure_overrides,
    serverless_api,
)
from runcomfy.domain.exceptions import OutputMissing, RequestNotFound, ValueInvalid, foreign_text
from runcomfy.domain.job import JobId
from runcomfy.domain.serverless import (
    RequestId,
    RequestResult,
    RequestState,
    Submitted,
    Wanted,
    find_file,
    outcome,
)
from runcomfy.domain.settings import CloudSettings, Settings
from runcomfy.ports.clock import Clock
from runcomfy.ports.serverless import Serverless

FILES: Final[Mapping[str, tuple[Wanted, str]]] = {
    "flux_image": (IMAGE, "flux.png"),
    "mesh_model": (MESH, "partpacker_result_0.glb"),
}
"""What `download_outputs` calls the results -> which they are, and the names they get."""
RANDOM_SEEDS: Final = (1, 10**9)
_SHARED_FILE: Final = 0o644

_log = logging.getLogger("runcomfy.conjure")


class RequestStatus(Enum):
    """RunComfy's words for where a request stands."""

    IN_QUEUE = "in_queue"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"


@dataclass
class ServerlessRequest:
    """A request. Times are ISO 8601 with offset; `cost_estimate` is USD, estimated: RunComfy tells no charges."""

    request_id: str
    deployment_id: str
    status: RequestStatus
    queue_position: int | None = None
    outputs: dict[str, Any] | None = None
    error_message: str | None = None
    created_at: str | None = None
    finished_at: str | None = None
    cost_estimate: float | None = None


class ServerlessRunComfyClient(TokenShown):
    """One deployment, as CONJURE makes its client: settings come from the environment or credentials.txt.

    Errors are the product's own and a `RuntimeError` (or `ValueError`, `TimeoutError`, `FileNotFoundError` where that
    fits), too.
    """

    def __init__(self, *, settings: Settings | None = None, clock: Clock | None = None) -> None:
        """Nothing is sent yet, and nothing has to be set yet. Raises SettingInvalid (a value that cannot be used)."""
        self._settings = settings or load_settings()
        self._clock = clock or SystemClock()
        self._known: dict[str, Submitted] = {}
        """Requests of this client that were not seen to end, by id."""
        mine = self._settings.serverless
        self.base_url: str = self._settings.cloud.base_url
        self.user_id: str = self._settings.cloud.user_id
        self._tokens = self._settings.cloud.tokens
        self.deployment_id: str = mine.deployment_id
        self.max_retries: int = self._settings.cloud.max_retries
        self.poll_interval: float = mine.poll_interval.total_seconds()
        self.request_timeout: float = mine.request_timeout.total_seconds()
        self.default_steps_flux: int = mine.steps_flux
        self.default_steps_partpacker: int = mine.steps_partpacker

    def __repr__(self) -> str:
        return f"ServerlessRunComfyClient({self.base_url!r})"

    def as_told(self) -> Settings:
        """Return the settings with what callers have written into the attributes since. Raises SettingInvalid."""
        mine = self._settings.serverless
        return replace(
            self._settings,
            cloud=self._account(),
            serverless=replace(
                mine,
                deployment_id=self.deployment_id,
                poll_interval=told_span("poll_interval", self.poll_interval, mine.poll_interval),
                request_timeout=told_span("request_timeout", self.request_timeout, mine.request_timeout),
            ),
        )

    def _account(self) -> CloudSettings:
        return replace(
            self._settings.cloud,
            base_url=str(self.base_url).rstrip("/"),
            user_id=self.user_id,
            tokens=self._tokens,
            max_retries=self.max_retries,
        )

    def is_available(self) -> bool:
        """Return whether a deployment and a token are set. Asks nobody."""
        mine = replace(self._settings.serverless, deployment_id=self.deployment_id)
        return unavailable(mine, self._account()) is None

    # --- what is sent -------------------------------------------------------------------------------------

    def encode_image_to_base64(self, image_path: str | os.PathLike[str]) -> str:
        """Return the picture as a PNG data URI, its pixels unchanged. Blocks.

        Raises InputFileMissing (a FileNotFoundError), InputFileInvalid.
        """
        with builtin_errors(ValueError):
            return png_data_uri(image_path, max_pixels=self._settings.files.max_input_pixels)

    def build_conjure_overrides(
        self,
        prompt: str,
        render_image_path: str | os.PathLike[str],
        seed: int | None = None,
        steps_flux: int = STEPS_FLUX,
        steps_partpacker: int = STEPS_PARTPACKER,
    ) -> dict[str, Any]:
        """Return what is laid over the deployment's graph: nodes 16, 40, 41, 42, and 43 and 44 if they differ.

        Without a seed a random one is drawn: the very same inputs twice bring no new file. Raises as
        `encode_image_to_base64`, and ValueInvalid.
        """
        with builtin_errors(ValueError):
            if not isinstance(prompt, str):
                raise ValueInvalid("the prompt is not a text", hint="give a text")
            chosen = random.SystemRandom().randint(*RANDOM_SEEDS) if seed is None else _seed(seed)
            return conjure_overrides(
                prompt,
                self.encode_image_to_base64(render_image_path),
                chosen,
                steps_flux=steps_flux,
                steps_partpacker=steps_partpacker,
            )

    async def submit_request(
        self,
        prompt: str,
        render_image_path: str | os.PathLike[str],
        seed: int | None = None,
        steps_flux: int = STEPS_FLUX,
        steps_partpacker: int = STEPS_PARTPACKER,
    ) -> ServerlessRequest:
        """Submit a request, once. Raises RequestUnclear if it may run although no clear answer came."""
        given = (prompt, render_image_path, seed, steps_flux, steps_partpacker)
        overrides = await asyncio.to_thread(self.build_conjure_overrides, *given)
        with builtin_errors():
            async with serverless_api(self.as_told(), self._clock) as api:
                submitted = await self._runs(api).submit(ServerlessOrder((), overrides))
        self._known[submitted.request_id] = submitted
        return ServerlessRequest(submitted.request_id, self.deployment_id, RequestStatus.IN_QUEUE)

    # --- looking ------------------------------------------------------------------------------------------

    async def get_request_status(self, request_id: str) -> ServerlessRequest:
        """Return where a request stands; `completed` says only that it is over."""
        with builtin_errors():
            async with serverless_api(self.as_told(), self._clock) as api:
                report = await api.status(self._submitted(request_id))
        return ServerlessRequest(
            request_id, self.deployment_id, _status(report.state), queue_position=report.queue_position
        )

    async def get_request_result(self, request_id: str) -> ServerlessRequest:
        """Return the result as far as there is one."""
        with builtin_errors():
            async with serverless_api(self.as_told(), self._clock) as api:
                result = await api.result(self._submitted(request_id))
                cost = await self._cost(self._runs(api), Waited(result, None, self._clock.now()))
        return self._told(result, cost)

    async def wait_for_completion(self, request_id: str, timeout: float | None = None) -> ServerlessRequest:
        """Return the request when it is over, whether it succeeded, failed or was cancelled.

        `timeout` is seconds, None: RUNCOMFY_REQUEST_TIMEOUT. A request of this client is cancelled when the wait ends
        otherwise. Raises JobTimeout (a TimeoutError).
        """
        request = self._submitted(request_id)
        limit = timedelta(seconds=timeout) if timeout is not None else None
        with builtin_errors():
            async with serverless_api(self.as_told(), self._clock) as api:
                runs = self._runs(api)
                wait = runs.wait_or_cancel if request_id in self._known else runs.wait
                waited = await wait(request, timeout=limit)
                self._known.pop(request_id, None)
                cost = await self._cost(runs, waited)
        return self._told(waited.result, cost)

    async def cancel_request(self, request_id: str) -> bool:
        """Ask for a request to end; False: it was over already, or is not known."""
        with builtin_errors():
            async with serverless_api(self.as_told(), self._clock) as api:
                return await api.cancel(self._submitted(request_id))

    # --- results ------------------------------------------------------------------------------------------

    async def download_outputs(self, request: ServerlessRequest, output_dir: str | os.PathLike[str]) -> dict[str, str]:
        """Fetch the results into `output_dir`, verified; return their paths under `flux_image` and `mesh_model`.

        What is there under their names is replaced, whole. A result that the request did not bring is left out.
        Raises DownloadFailed, OutputCorrupt, LocalError.
        """
        result = RequestResult(
            RequestId(request.request_id), RequestState.SUCCEEDED, tuple(read_files(request.outputs or {}))
        )
        target = Path(output_dir)
        found: dict[str, str] = {}
        with builtin_errors():
            folder = await self._results().open_folder(
                JobId(f"request-{foreign_text(request.request_id, 60)}"), under=str(target), again=True
            )
            try:
                async with serverless_api(self.as_told(), self._clock) as api:
                    for name, (wanted, file_name) in FILES.items():
                        try:
                            file = find_file(result, wanted)
                        except OutputMissing as error:
                            _log.warning(
                                "serverless_output_missing", extra={"fields": {"output": name, "why": str(error)}}
                            )
                            continue
                        partial = folder.partial()
                        await api.fetch(file, partial)
                        await folder.inspect(partial, expected=wanted.kind)
                        place = target / file_name
                        await asyncio.to_thread(entered(_put, "results.put"), partial, place)
                        found[name] = str(place)
            finally:
                await finish(folder.abandon())
        return found

    # --- parts --------------------------------------------------------------------------------------------

    def _runs(self, api: Serverless) -> ServerlessRuns:
        return ServerlessRuns(api, self._results(), self.as_told(), self._clock)

    def _results(self) -> DiskResults:
        return entered(DiskResults(self._settings.files, disk=entered(DISK, "disk")), "results")

    def _submitted(self, request_id: str) -> Submitted:
        if request_id not in self._known and not _is_id(request_id):
            raise RequestNotFound(
                f"{foreign_text(request_id, 60)!r} cannot be the id of a request", hint="take it from a submit's answer"
            )
        return self._known.get(request_id, Submitted(RequestId(request_id)))

    async def _cost(self, runs: ServerlessRuns, waited: Waited) -> float | None:
        result = waited.result
        if result.created_at is None or result.finished_at is None:
            return None
        estimate = await runs.cost_of(waited, begun=result.created_at)
        return float(estimate.usd) if estimate is not None else None

    def _told(self, result: RequestResult, cost: float | None) -> ServerlessRequest:
        error = outcome(result) if result.state.over else None
        return ServerlessRequest(
            request_id=result.request_id,
            deployment_id=self.deployment_id,
            status=_status(result.state),
            outputs=dict(result.outputs) or None,
            error_message=None if error is None else f"{error.message}; {error.hint}" if error.hint else error.message,
            created_at=_iso(result.created_at),
            finished_at=_iso(result.finished_at),
            cost_estimate=cost,
        )


def _status(state: RequestState) -> RequestStatus:
    """A word that nobody knows is not the end."""
    return RequestStatus.IN_PROGRESS if state is RequestState.UNKNOWN else RequestStatus(state.value)


def _seed(seed: Any) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise ValueInvalid(
            f"seed = {foreign_text(seed, 60)!r} is not a whole number from 0 to {MAX_SEED}", hint="leave it out"
        )
    return seed


def _is_id(text: object) -> bool:
    return isinstance(text, str) and 0 < len(text) <= 200 and text.isascii() and not set(text) & set("/\\?#% \t\r\n")


def _iso(at: datetime | None) -> str | None:
    return at.astimezone(UTC).isoformat() if at is not None else None


def _put(partial: str, place: Path) -> None:
    try:
        Path(partial).chmod(_SHARED_FILE)  # the add-on that reads it may run as another user
        DISK.replace(partial, str(place))
        DISK.fsync_directory(str(place.parent))
    except OSError as error:
        raise local_error(error, place, "write") from error
