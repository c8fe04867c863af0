"""
RunComfy's serverless API: submit, look, cancel, fetch. Keeps `runcomfy.ports.serverless.Serverless`.

What is retried: looking, cancelling and downloading, when no answer came or the answer was a server's error, with
growing random pauses; every call, when the connection could not even be made, or when RunComfy answered 429. A submit
is never sent again once it may have arrived: it has no key that would make it one request, so a second would run, and
be billed, beside the first. Waiting for a request is the application's work.

The token is sent to the API's own address only: the addresses that answers carry are followed if they are there, and
results are fetched without it, from RunComfy's hosts, over redirects to nowhere.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any, Final, Self, TypeVar
from urllib.parse import quote

import aiohttp
from yarl import URL

from runcomfy.adapters.providers import runcomfy_serverless_wire as wire
from runcomfy.adapters.providers.runcomfy_errors import Answer, Failure, facts_of, judge, unreadable
from runcomfy.adapters.providers.runcomfy_sending import Call, Sender, checked_root
from runcomfy.adapters.providers.runcomfy_serverless_files import download
from runcomfy.domain.exceptions import (
    AccessDenied,
    AuthRejected,
    CredentialsMissing,
    DeploymentUnusable,
    InputFileInvalid,
    ProviderBusy,
    ProviderError,
    RequestFailed,
    RequestNotFound,
    RequestUnclear,
    RunComfyError,
    SettingInvalid,
)
from runcomfy.domain.serverless import (
    CODES,
    REFUSALS,
    DeploymentView,
    Fault,
    Overrides,
    RemoteFile,
    RequestReport,
    RequestResult,
    Submitted,
    error_of,
)
from runcomfy.domain.settings import CloudSettings, ComfySettings, ServerlessSettings
from runcomfy.ports.clock import Clock
from runcomfy.ports.comfyui import Fetched
from runcomfy.ports.limiter import Limiter

T = TypeVar("T")

MAX_SUBMIT_BYTES: Final = 10 * 1024**2
"""The gateway in front of RunComfy takes bodies up to this size (AWS API Gateway, quotas)."""

_log = logging.getLogger("runcomfy.provider")


class RunComfyServerless:
    """One serverless deployment of one account. Use it with `async with`, or call `close()` at the end."""

    def __init__(
        self,
        settings: ServerlessSettings,
        cloud: CloudSettings,
        *,
        clock: Clock,
        files: ComfySettings | None = None,
        limiter: Limiter | None = None,
        http: aiohttp.ClientSession | None = None,
    ) -> None:
        """Nothing is sent yet. `cloud` has the token and the API's address, `files` the limits of downloads.

        Raises CredentialsMissing (no token), CredentialsMalformed, SettingInvalid (no deployment, a bad address),
        InsecureUrl.
        """
        self._settings = settings
        self._files = files or ComfySettings()
        self._root = checked_root(cloud.base_url)
        if reason := unavailable(settings, cloud):
            raise reason
        self._sender = Sender(cloud, event="serverless_call", clock=clock, limiter=limiter, http=http)
        self._veil = self._sender.veil
        self._words_seen: set[str] = set()
        self._base = f"/prod/{settings.api_version}/deployments"
        self._deployment = quote(settings.deployment_id, safe="")

    async def close(self) -> None:
        """End the connections, unless the session was passed in. Harmless when repeated."""
        await self._sender.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # --- the port -----------------------------------------------------------------------------------------

    async def submit(self, overrides: Overrides | None = None, *, graph: Mapping[str, Any] | None = None) -> Submitted:
        """See the port. One of the two is always sent, though a document calls both optional: another demands one.

        Raises InputFileInvalid if the request would be larger than the gateway takes.
        """
        wanted = {"overrides": overrides or {}} if graph is None else {"workflow_api_json": graph}
        body = json.dumps(wanted, ensure_ascii=False).encode("utf-8", "replace")
        if len(body) > MAX_SUBMIT_BYTES:
            raise _too_large(len(body))
        call = self._call("POST", "inference", "submit a request", body=body, once=True)
        return await self._request(call, wire.read_submitted)

    async def status(self, request: Submitted) -> RequestReport:
        """See the port."""
        call = self._about(request, "status", "GET", request.status_url)
        report = await self._request(call, lambda body: wire.read_status(body, expected=request.request_id))
        if report.state == "unknown" and report.word not in self._words_seen and len(self._words_seen) < 100:
            self._words_seen.add(report.word)
            _log.warning("serverless_status_unknown", extra={"fields": {"status": self._veil(report.word)}})
        return report

    async def result(self, request: Submitted) -> RequestResult:
        """See the port."""
        call = self._about(request, "result", "GET", request.result_url)
        return await self._request(call, lambda body: wire.read_result(body, expected=request.request_id))

    async def cancel(self, request: Submitted) -> bool:
        """See the port. It passes the queue of other calls: what runs costs money."""
        call = self._about(request, "cancel", "POST", request.cancel_url, urgent=True)
        try:
            return await self._request(call, wire.read_cancelled)
        except RequestNotFound:
            return False

    async def fetch(self, file: RemoteFile, destination: str) -> Fetched:
        """See the port."""
        return await download(
            self._sender.session(),
            file,
            destination,
            settings=self._files,
            api=self._root,
            hosts=self._settings.file_hosts,
            agent=self._sender.agent,
        )

    async def deployment(self) -> DeploymentView | None:
        """See the port. The call is documented for v2 only."""
        url = URL(f"{str(self._root).rstrip('/')}/prod/v2/deployments/{self._deployment}", encoded=True)
        call = Call("GET", "/prod/v2/deployments/{deployment}", "look at the deployment", url, attempts=2)
        try:
            return await self._request(call, wire.read_deployment)
        except RequestNotFound as error:
            raise self._no_deployment(error) from None
        except (AuthRejected, AccessDenied, DeploymentUnusable):
            raise
        except ProviderError:
            return None

    # --- machinery ----------------------------------------------------------------------------------------

    def _call(self, method: str, end: str, what: str, *, request_id: str = "", **options: Any) -> Call:
        template = f"{self._base}/{{deployment}}/{end}"
        path = template.replace("{deployment}", self._deployment).replace("{request}", quote(request_id, safe=""))
        url = URL(f"{str(self._root).rstrip('/')}{path}", encoded=True)
        about = {"request_id": request_id} if request_id else {}
        return Call(method, template, what, url, about=about, **options)

    def _about(self, request: Submitted, verb: str, method: str, told: str, *, urgent: bool = False) -> Call:
        """Return a call about a request, at the address RunComfy gave for it if that is at the API itself."""
        what = {"status": "look at a request", "result": "read a request's result", "cancel": "cancel a request"}[verb]
        end = f"requests/{{request}}/{verb}"
        call = self._call(method, end, what, request_id=request.request_id, urgent=urgent)
        url = self._followed(told, request, verb)
        return replace(call, url=url) if url is not None else call

    def _followed(self, told: str, request: Submitted, verb: str) -> URL | None:
        try:
            url = URL(told, encoded=True) if told else None
            if url is None or url.origin() != self._root.origin():
                return None
        except ValueError:
            return None
        fits = url.raw_path.startswith("/prod/") and url.raw_path.endswith(f"/requests/{request.request_id}/{verb}")
        return url if fits and ".." not in url.raw_path and not url.user else None

    async def _request(self, call: Call, read: Callable[[Any], T]) -> T:
        """Make a call until it is answered or not worth repeating, and read the answer."""
        try:
            return await self._sender.request(call, lambda answer: self._meaning(call, read, answer))
        except Failure as failure:
            failure.error.details.update(call.about)
            raise _final(call, failure) from None

    def _meaning(self, call: Call, read: Callable[[Any], T], answer: Answer) -> T:
        """Read an answer. Raises Failure if it is none, or a refusal."""
        facts = facts_of(answer, call=call.name, veil=self._veil)
        payload: Any = None
        flaw: wire.Unreadable | None = None
        try:
            payload = wire.read_json(answer.body)
        except wire.Unreadable as error:
            flaw = error
        fault = wire.read_refusal(payload)
        if fault is not None and answer.status != 429 and (answer.status < 500 or fault.code in CODES):
            raise self._refusal(call, fault, facts)
        if not 200 <= answer.status < 300:
            raise self._judged(call, answer, facts)
        try:
            if flaw is not None:
                raise flaw
            return read(payload)
        except wire.Unreadable as error:
            raise Failure(unreadable(error, what=call.what, facts=facts), again=True, arrived=True) from None

    def _refusal(self, call: Call, fault: Fault, facts: Mapping[str, Any]) -> Failure:
        """Return what an error code of RunComfy's means for this call."""
        hidden = Fault(fault.code, self._veil(fault.name), self._veil(fault.words))
        error = error_of(hidden, details=facts)
        if isinstance(error, RequestNotFound) and not call.about:
            error = self._no_deployment(error)
        sure = fault.code in REFUSALS
        if not sure and isinstance(error, RequestFailed):
            busy = ProviderBusy(error.message, hint=error.hint, details=error.details)
            return Failure(busy, again=True, arrived=True)
        return Failure(error, again=False, arrived=not sure, other_token=isinstance(error, AuthRejected | AccessDenied))

    def _judged(self, call: Call, answer: Answer, facts: Mapping[str, Any]) -> Failure:
        """Return what a status other than a success means."""
        if answer.status == 404 and not answer.is_html:
            missing = RequestNotFound(
                f"RunComfy knows no request {call.about.get('request_id')} of this deployment (HTTP 404)",
                hint="it may be too old, or RUNCOMFY_DEPLOYMENT_ID another deployment's",
                details=facts,
            )
            return Failure(missing if call.about else self._no_deployment(missing), again=False, arrived=False)
        failure = judge(answer, what=call.what, call=call.name, veil=self._veil)
        if isinstance(failure.error, AccessDenied):
            failure.error.hint = CODES[403003][2]
        return failure

    def _no_deployment(self, error: RunComfyError) -> DeploymentUnusable:
        return DeploymentUnusable(
            "RunComfy knows no deployment with the id that is set", hint=CODES[404001][2], details=error.details
        )


def unavailable(settings: ServerlessSettings, cloud: CloudSettings) -> RunComfyError | None:
    """Return why serverless requests cannot be made with these settings; None if they can. Nobody is asked."""
    if not settings.deployment_id.strip():
        return SettingInvalid(
            "no serverless deployment is set",
            hint="copy its id from RunComfy's deployments page into RUNCOMFY_DEPLOYMENT_ID",
            details={"setting": "RUNCOMFY_DEPLOYMENT_ID"},
        )
    if not any(cloud.tokens):
        return CredentialsMissing(
            "no RunComfy API token is set",
            hint="set RUNCOMFY_API_TOKEN, or write it into credentials.txt",
            details={"missing": ["RUNCOMFY_API_TOKEN"]},
        )
    return None


def _too_large(size: int) -> RunComfyError:
    return InputFileInvalid(
        f"the request is {size / 1e6:.1f} MB; RunComfy takes {MAX_SUBMIT_BYTES / 1e6:.1f} MB",
        hint="a data URI of up to 256 KB per picture is advised; send a smaller picture, or its public https address",
        details={"size_bytes": size, "limit_bytes": MAX_SUBMIT_BYTES},
    )


def _final(call: Call, failure: Failure) -> RunComfyError:
    """Return what the caller of a failed call is told; of a submit, whether it may run all the same."""
    error = failure.error
    if not call.once or not failure.arrived:
        return error
    return RequestUnclear(
        f"the request was sent and not clearly answered ({error.message}); it may run, and be billed, once",
        hint="RunComfy has no list to find it in; it ends by itself. Look at the deployment's page before another run",
        details={**error.details, "cause": error.code},
    )
