"""
One serverless request from submit to verified files.

    submit -> look until it is over -> read the result -> fetch -> inspect -> commit, all files or none

Rule 1: what was submitted and is not over when its caller leaves (Ctrl+C, a limit of time, an error) is cancelled.
Rule 2: a submit that was not clearly answered is told as that (RequestUnclear), and not repeated.
Rule 3: silence is not failure. Gateways in front of RunComfy answer 502 to 504 while a request runs on, and a status
        has been seen to say `in_progress` long after the result was there; so looking goes on, and the result is
        looked at now and then whatever the status says.

A process that is killed outright cancels nothing. The request then runs to its own end, which is its only cost: there
is no machine that would stay on, so there is no lease to run out.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Final

from runcomfy.application.finish import finish
from runcomfy.domain.exceptions import (
    AnswerUnreadable,
    JobTimeout,
    OutputCorrupt,
    ProviderBusy,
    RateLimited,
    RequestNotFound,
    RunComfyError,
)
from runcomfy.domain.job import JobId, Output
from runcomfy.domain.serverless import (
    DeploymentView,
    Estimate,
    Overrides,
    RemoteFile,
    RequestReport,
    RequestResult,
    RequestState,
    Submitted,
    Wanted,
    estimate,
    find_file,
    outcome,
    price_of,
)
from runcomfy.domain.settings import Settings
from runcomfy.ports.clock import Clock
from runcomfy.ports.results import JobFolder, ResultFile, Results
from runcomfy.ports.serverless import Serverless

Heard = Callable[[RequestReport], None]

PROBE_EVERY: Final = 12
"""Looks after which the result is read although the status says that the request runs (a client of the real service
does it that often)."""
SILENCE: Final = timedelta(minutes=5)
"""How long RunComfy may say nothing that can be read before a request is given up."""
PRICE_WITHIN: Final = timedelta(seconds=10)
"""How long results wait for what is only needed to estimate their cost."""
CANCEL_WITHIN: Final = timedelta(seconds=30)
"""How long leaving may take: who presses Ctrl+C waits for it."""

_log = logging.getLogger("runcomfy.serverless")


@dataclass(frozen=True, slots=True)
class ServerlessOrder:
    """What to run, and which of its results are wanted."""

    wanted: Sequence[Wanted]
    overrides: Overrides = field(default_factory=dict)
    graph: Mapping[str, Any] | None = None
    """A whole graph in the place of the deployment's; then there are no overrides."""
    timeout: timedelta | None = None
    """From the submit on; None: as the settings say."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the manifest is to say beside."""


@dataclass(frozen=True, slots=True)
class Waited:
    """A request that is over."""

    result: RequestResult
    running_from: datetime | None
    """When it was first seen to run."""
    over_at: datetime


@dataclass(frozen=True, slots=True)
class ServerlessDone:
    """A request whose results are here."""

    job_id: JobId
    request: Submitted
    result: RequestResult
    outputs: Mapping[str, Output]
    """By the names in the order."""
    cost: Estimate | None
    """None: costs are not tracked, or the hardware's price is not known."""


class ServerlessRuns:
    """Runs requests of one deployment."""

    def __init__(self, api: Serverless, results: Results, settings: Settings, clock: Clock) -> None:
        self._api, self._results, self._settings, self._clock = api, results, settings, clock
        self._deployment: DeploymentView | None = None
        self._asked_deployment = False

    async def run(
        self, order: ServerlessOrder, *, job_id: JobId, submitted: Heard | None = None, heard: Heard | None = None
    ) -> ServerlessDone:
        """Run a request and return its verified files.

        `submitted` is told once that RunComfy has taken the request in, `heard` of every look.

        Raises the request's error (`domain.serverless.CODES`), RequestUnclear, JobTimeout, OutputMissing,
        OutputCorrupt, DownloadFailed, LocalError.
        """
        settings = self._settings
        folder = await self._results.open_folder(job_id, under=settings.files.output_dir)
        begun = self._clock.now()
        try:
            request = await self.submit(order)
            if submitted is not None:
                submitted(RequestReport(request.request_id, RequestState.IN_QUEUE))
            try:
                waited = await self.wait_or_cancel(request, timeout=order.timeout, heard=heard)
                if (error := outcome(waited.result)) is not None:
                    raise error
                files = await self._fetched(order.wanted, waited.result, folder)
                cost = await self.cost_of(waited, begun=begun)
                outputs = await folder.commit(files, self._manifest(job_id, order, request, waited, cost))
            except RunComfyError as error:
                error.details.setdefault("request_id", request.request_id)
                raise
        finally:
            await finish(folder.abandon())
        named = {output.name: output for output in outputs}
        return ServerlessDone(job_id, request, waited.result, named, cost)

    async def submit(self, order: ServerlessOrder) -> Submitted:
        """Submit an order. Cancelled meanwhile, it waits for the answer, and cancels what it brought."""
        sending = asyncio.ensure_future(self._api.submit(order.overrides, graph=order.graph))
        try:
            return await asyncio.shield(sending)
        except asyncio.CancelledError:
            await finish(self._take_back(sending))
            raise

    async def _take_back(self, sending: asyncio.Future[Submitted]) -> None:
        await asyncio.wait({sending})
        if sending.cancelled():
            return
        if (error := sending.exception()) is not None:
            _log.warning("serverless_submit_left", extra={"fields": {"error": getattr(error, "code", repr(error))}})
            return
        await self.end(sending.result())

    async def wait_or_cancel(
        self, request: Submitted, *, timeout: timedelta | None = None, heard: Heard | None = None
    ) -> Waited:
        """Wait for a request; whatever else ends the wait, a cancellation included, ends the request."""
        try:
            return await self.wait(request, timeout=timeout, heard=heard)
        except RequestNotFound:
            raise
        except BaseException:
            await finish(self.end(request))
            raise

    async def end(self, request: Submitted) -> bool:
        """Cancel a request; whether RunComfy said yes. Never raises, never takes longer than `CANCEL_WITHIN`."""
        accepted, why = False, ""
        try:
            async with asyncio.timeout(CANCEL_WITHIN.total_seconds()):
                accepted = await self._api.cancel(request)
        except RunComfyError as error:
            why = error.code
        except TimeoutError:
            why = "no answer"
        fields = {"request_id": request.request_id, "accepted": accepted} | ({"error": why} if why else {})
        _log.log(logging.WARNING if why else logging.INFO, "serverless_cancelled", extra={"fields": fields})
        return accepted

    async def wait(self, request: Submitted, *, timeout: timedelta | None = None, heard: Heard | None = None) -> Waited:
        """Return the result of a request when it is over, well or not.

        Raises JobTimeout, RequestNotFound, AuthRejected, AccessDenied, and what RunComfy's silence is: ProviderBusy,
        RateLimited, AnswerUnreadable, after `SILENCE`. The request goes on then.
        """
        allowed = timeout if timeout is not None else self._settings.serverless.request_timeout
        limit = asyncio.timeout(allowed.total_seconds())
        look = _Look(self._api, request, self._settings, self._clock, heard)
        try:
            async with limit:
                return await look.until_over()
        except TimeoutError:
            if not limit.expired():
                raise
            word = look.last.word or look.last.state.value if look.last else "unknown"
            raise JobTimeout(
                f"the request {request.request_id} was not over after {allowed.total_seconds():g} s; it was {word!r}",
                hint="RUNCOMFY_REQUEST_TIMEOUT allows more; a cold start takes 3 to 5 minutes",
                details={"request_id": request.request_id, "status": word},
            ) from None

    # --- results ------------------------------------------------------------------------------------------

    async def _fetched(self, wanted: Sequence[Wanted], result: RequestResult, folder: JobFolder) -> list[ResultFile]:
        chosen = [(each, find_file(result, each)) for each in wanted]  # all, before the first is fetched
        return [await self._one(each, file, folder) for each, file in chosen]

    async def _one(self, wanted: Wanted, file: RemoteFile, folder: JobFolder) -> ResultFile:
        for last in (False, True):
            partial = folder.partial()
            fetched = await self._api.fetch(file, partial)
            try:
                media = await folder.inspect(partial, expected=wanted.kind)
            except OutputCorrupt as error:
                if last:
                    raise
                _log.warning("output_corrupt", extra={"fields": {"node": wanted.node, "why": str(error)}})
                continue
            return ResultFile(
                partial=partial,
                node=wanted.node,
                media=media,
                size_bytes=fetched.size_bytes,
                sha256=fetched.sha256,
                name=wanted.name,
                file_name=wanted.file,
                remote_name=file.filename,
            )
        raise AssertionError("the last fetch neither returned nor raised")

    def _manifest(
        self, job_id: JobId, order: ServerlessOrder, request: Submitted, waited: Waited, cost: Estimate | None
    ) -> dict[str, Any]:
        result = waited.result
        return {
            "job_id": job_id,
            "status": "done",
            "where": "serverless",
            "request_id": request.request_id,
            "deployment_id": self._settings.serverless.deployment_id,
            "created_at": result.created_at,
            "finished_at": result.finished_at,
            "cost_estimate": cost.as_dict() if cost is not None else None,
            **order.facts,
        }

    # --- money --------------------------------------------------------------------------------------------

    async def cost_of(self, waited: Waited, *, begun: datetime) -> Estimate | None:
        """Return what a request may have cost. RunComfy's own times count; ours stand in where it gives none."""
        if not self._settings.serverless.cost_tracking:
            return None
        price, view = await self._price()
        if price is None:
            return None
        result = waited.result
        told = result.created_at is not None and result.finished_at is not None
        return estimate(
            price,
            created_at=result.created_at if told and result.created_at else begun,
            # Seen by our clock; only the span until the end is taken from it, for the two clocks may differ.
            running_from=_running_from(waited, told=told),
            finished_at=result.finished_at if told and result.finished_at else waited.over_at,
            keep_warm=view.keep_warm if view is not None else None,
        )

    async def _price(self) -> tuple[Decimal | None, DeploymentView | None]:
        """Return the hardware's price in USD per hour, and what is known of the deployment."""
        if not self._asked_deployment:
            self._asked_deployment = True
            with suppress(RunComfyError, TimeoutError):  # an estimate is no reason to fail, or to wait for long
                async with asyncio.timeout(PRICE_WITHIN.total_seconds()):
                    self._deployment = await self._api.deployment()
        view, set_price = self._deployment, self._settings.serverless.usd_per_hour
        if set_price is not None or view is None:
            return set_price, view
        return price_of(view.hardware, self._settings.rates), view


def _running_from(waited: Waited, *, told: bool) -> datetime | None:
    if waited.running_from is None or not told or waited.result.finished_at is None:
        return waited.running_from
    return waited.result.finished_at - (waited.over_at - waited.running_from)


class _Look:
    """Looks at one request until it is over."""

    def __init__(
        self, api: Serverless, request: Submitted, settings: Settings, clock: Clock, heard: Heard | None
    ) -> None:
        self._api, self._request, self._clock, self._heard = api, request, clock, heard
        self._pause = settings.serverless.poll_interval.total_seconds()
        self._grace = settings.cloud.not_found_grace.total_seconds()
        self._loop = asyncio.get_running_loop()
        self._begun = self._loop.time()
        self._silent_since: float | None = None
        self._running_from: datetime | None = None
        self.last: RequestReport | None = None

    async def until_over(self) -> Waited:
        looks = 0
        while True:
            looks += 1
            report = await self._status()
            if (report is not None and report.state.over) or looks % PROBE_EVERY == 0:
                result = await self._result(report)
                if result is not None:
                    return Waited(result, self._running_from, self._clock.now())
            await asyncio.sleep(self._pause)

    async def _status(self) -> RequestReport | None:
        """Return where the request stands; None if that cannot be found out now."""
        try:
            report = await self._api.status(self._request)
        except RequestNotFound:
            if self._loop.time() - self._begun > self._grace:
                raise
            return None
        except (ProviderBusy, RateLimited, AnswerUnreadable) as error:
            self._silence(error)
            return None
        self._silent_since = None
        if report.state is RequestState.IN_PROGRESS and self._running_from is None:
            self._running_from = self._clock.now()
        self.last = report
        if self._heard is not None:
            self._heard(report)
        return report

    async def _result(self, report: RequestReport | None) -> RequestResult | None:
        """Return the result if there is a final one."""
        try:
            result = await self._api.result(self._request)
        except RequestNotFound:
            if report is not None and report.state is RequestState.CANCELED:
                return RequestResult(self._request.request_id, RequestState.CANCELED)
            if self._loop.time() - self._begun > self._grace:
                raise
            return None
        except (ProviderBusy, RateLimited, AnswerUnreadable) as error:
            if report is not None and report.state is RequestState.CANCELED:
                return RequestResult(self._request.request_id, RequestState.CANCELED)
            self._silence(error)
            return None
        if not result.state.over:
            return None
        if result.state is RequestState.COMPLETED and not result.files and not result.faults:
            return None  # the status call's word; how it ended is still to come
        return result

    def _silence(self, error: RunComfyError) -> None:
        now = self._loop.time()
        self._silent_since = now if self._silent_since is None else self._silent_since
        if now - self._silent_since >= SILENCE.total_seconds():
            error.details["request_id"] = self._request.request_id
            raise error
