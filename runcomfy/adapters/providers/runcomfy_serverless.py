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

import asyncio
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Final, Self, TypeVar
from urllib.parse import quote

import aiohttp
import backoff
from yarl import URL

from runcomfy.adapters.providers import runcomfy_serverless_wire as wire
from runcomfy.adapters.providers.limits import DEFAULT_RETRY_AFTER, LocalLimiter, retry_after
from runcomfy.adapters.providers.runcomfy import CONNECT_TIMEOUT, MAX_PAUSE, agent, checked_root
from runcomfy.adapters.providers.runcomfy_errors import Answer, Failure, Veil, facts_of, judge, unreadable
from runcomfy.adapters.providers.runcomfy_serverless_files import download
from runcomfy.domain.exceptions import (
    AccessDenied,
    AuthRejected,
    CredentialsMalformed,
    CredentialsMissing,
    DeploymentUnusable,
    InputFileInvalid,
    ProviderBusy,
    ProviderError,
    RateLimited,
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

MAX_ANSWER_BYTES: Final = 8 * 1024**2
MAX_SUBMIT_BYTES: Final = 10 * 1024**2
"""The gateway in front of RunComfy takes bodies up to this size (AWS API Gateway, quotas)."""

_log = logging.getLogger("runcomfy.provider")


@dataclass(frozen=True, slots=True)
class _Call:
    """One thing we want from RunComfy."""

    method: str
    template: str
    """The path as it is logged: with names instead of ids."""
    what: str
    """In words, after "could not"."""
    url: URL
    body: bytes | None = None
    submit: bool = False
    request_id: str = ""
    urgent: bool = False
    attempts: int | None = None

    @property
    def name(self) -> str:
        return f"{self.method} {self.template}"


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
        self._settings, self._cloud, self._clock = settings, cloud, clock
        self._files = files or ComfySettings()
        self._root = checked_root(cloud.base_url)
        if reason := unavailable(settings, cloud):
            raise reason
        for token in cloud.tokens:
            if not token.reveal().isascii() or not token.reveal().isprintable() or " " in token.reveal():
                raise CredentialsMalformed(
                    "the RunComfy API token has characters that no token has",
                    hint="copy it again from RunComfy's profile page, in one line and without blanks",
                )
        self._limiter: Limiter = limiter or LocalLimiter(
            per_second=cloud.requests_per_second, burst=cloud.burst, reserve=cloud.stop_reserve
        )
        self._http, self._owns_http = http, http is None
        self._agent = agent()
        self._token = 0
        self._veil = Veil(cloud.tokens, cloud.user_id)
        self._words_seen: set[str] = set()
        self._base = f"/prod/{settings.api_version}/deployments"
        self._deployment = quote(settings.deployment_id, safe="")

    async def close(self) -> None:
        """End the connections, unless the session was passed in. Harmless when repeated."""
        if self._owns_http and self._http is not None:
            http, self._http = self._http, None
            await http.close()

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
        call = self._call("POST", "inference", "submit a request", body=body, submit=True)
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
            self._session(),
            file,
            destination,
            settings=self._files,
            api=self._root,
            hosts=self._settings.file_hosts,
            agent=self._agent,
        )

    async def deployment(self) -> DeploymentView | None:
        """See the port. The call is documented for v2 only."""
        url = URL(f"{str(self._root).rstrip('/')}/prod/v2/deployments/{self._deployment}", encoded=True)
        call = _Call("GET", "/prod/v2/deployments/{deployment}", "look at the deployment", url, attempts=2)
        try:
            return await self._request(call, wire.read_deployment)
        except RequestNotFound as error:
            raise self._no_deployment(error) from None
        except (AuthRejected, AccessDenied, DeploymentUnusable):
            raise
        except ProviderError:
            return None

    # --- machinery ----------------------------------------------------------------------------------------

    def _call(self, method: str, end: str, what: str, *, request_id: str = "", **options: Any) -> _Call:
        template = f"{self._base}/{{deployment}}/{end}"
        path = template.replace("{deployment}", self._deployment).replace("{request}", quote(request_id, safe=""))
        url = URL(f"{str(self._root).rstrip('/')}{path}", encoded=True)
        return _Call(method, template, what, url, request_id=request_id, **options)

    def _about(self, request: Submitted, verb: str, method: str, told: str, *, urgent: bool = False) -> _Call:
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

    async def _request(self, call: _Call, read: Callable[[Any], T]) -> T:
        """Make a call until it is answered or not worth repeating, and read the answer."""
        pauses = backoff.expo(base=2, factor=1, max_value=MAX_PAUSE.total_seconds())
        next(pauses)  # backoff's generators begin with an empty step
        attempts = call.attempts or self._cloud.max_retries + 1
        refused: dict[int, RunComfyError] = {}
        attempt = 0
        while True:
            attempt += 1
            token = self._token
            await self._limiter.wait_turn(urgent=call.urgent)
            try:
                return await self._attempt(call, read, attempt, token)
            except Failure as failure:
                if failure.other_token:
                    refused[token] = failure.error
                    others = [index for index in range(len(self._cloud.tokens)) if index not in refused]
                    if not others:
                        raise failure.error from None
                    self._token = others[0]
                    attempt -= 1  # another token is not another try
                    continue
                if not failure.again or attempt >= attempts or (call.submit and failure.arrived):
                    raise _final(call, failure) from None
                if not isinstance(failure.error, RateLimited):  # there the limiter makes us wait
                    await asyncio.sleep(backoff.full_jitter(next(pauses)))

    async def _attempt(self, call: _Call, read: Callable[[Any], T], attempt: int, token: int) -> T:
        """One exchange, and what its answer means. Raises Failure."""
        answer = await self._exchange(call, attempt=attempt, token=token)
        if answer.status in (429, 503):
            asked = retry_after(answer.headers, now=self._clock.now(), cap=self._cloud.retry_after_cap)
            if answer.status == 429 or asked is not None:
                await self._limiter.hold(DEFAULT_RETRY_AFTER if asked is None else asked)
        facts = facts_of(answer, call=call.name, veil=self._veil)
        if call.request_id:
            facts["request_id"] = call.request_id
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

    def _refusal(self, call: _Call, fault: Fault, facts: Mapping[str, Any]) -> Failure:
        """Return what an error code of RunComfy's means for this call."""
        hidden = Fault(fault.code, self._veil(fault.name), self._veil(fault.words))
        error = error_of(hidden, details=facts)
        if isinstance(error, RequestNotFound) and not call.request_id:
            error = self._no_deployment(error)
        sure = fault.code in REFUSALS
        if not sure and isinstance(error, RequestFailed):
            busy = ProviderBusy(error.message, hint=error.hint, details=error.details)
            return Failure(busy, again=True, arrived=True)
        return Failure(error, again=False, arrived=not sure, other_token=isinstance(error, AuthRejected | AccessDenied))

    def _judged(self, call: _Call, answer: Answer, facts: Mapping[str, Any]) -> Failure:
        """Return what a status other than a success means."""
        if answer.status == 404 and not answer.is_html:
            details = dict(facts)
            missing = RequestNotFound(
                f"RunComfy knows no request {call.request_id} of this deployment (HTTP 404)",
                hint="it may be too old, or RUNCOMFY_DEPLOYMENT_ID another deployment's",
                details=details,
            )
            return Failure(missing if call.request_id else self._no_deployment(missing), again=False, arrived=False)
        failure = judge(answer, what=call.what, call=call.name, veil=self._veil)
        if isinstance(failure.error, AccessDenied):
            failure.error.hint = CODES[403003][2]
        if call.request_id:
            failure.error.details["request_id"] = call.request_id
        return failure

    def _no_deployment(self, error: RunComfyError) -> DeploymentUnusable:
        return DeploymentUnusable(
            "RunComfy knows no deployment with the id that is set", hint=CODES[404001][2], details=error.details
        )

    async def _exchange(self, call: _Call, *, attempt: int, token: int) -> Answer:
        """One HTTP exchange; the only place where HTTP becomes our errors. Logs it. Raises Failure."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        fields: dict[str, Any] = {"method": call.method, "path": call.template, "attempt": attempt}
        if call.request_id:
            fields["request_id"] = call.request_id
        try:
            answer = await self._send(call, token)
        except (aiohttp.ClientError, OSError, _TooLong) as error:
            failure = self._failure(call, error)
            fields |= {"seconds": round(loop.time() - started, 3), "error": type(error).__name__}
            _log.warning("serverless_call", extra={"fields": fields})
            raise failure from None
        except asyncio.CancelledError:  # it may have arrived all the same
            fields |= {"seconds": round(loop.time() - started, 3), "error": "cancelled"}
            _log.warning("serverless_call", extra={"fields": fields})
            raise
        fields |= {"seconds": round(loop.time() - started, 3), "status": answer.status}
        _log.log(logging.INFO if answer.status < 400 else logging.WARNING, "serverless_call", extra={"fields": fields})
        return answer

    async def _send(self, call: _Call, token: int) -> Answer:
        """Send a request and read its whole answer within the deadline. Raises what HTTP raises."""
        deadline = self._cloud.request_timeout.total_seconds()
        connect = min(CONNECT_TIMEOUT.total_seconds(), deadline / 2)
        headers = {
            "Accept": "application/json",
            "User-Agent": self._agent,
            "Authorization": f"Bearer {self._cloud.tokens[token].reveal()}",
        }
        if call.body is not None:
            headers["Content-Type"] = "application/json"
        async with (
            asyncio.timeout(deadline),
            self._session().request(
                call.method,
                call.url,
                data=call.body,
                headers=headers,
                allow_redirects=False,
                raise_for_status=False,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect),
            ) as response,
        ):
            body = bytearray()
            async for chunk in response.content.iter_chunked(65536):
                body += chunk
                if len(body) > MAX_ANSWER_BYTES:
                    raise _TooLong
            return Answer(response.status, bytes(body), response.headers)

    def _session(self) -> aiohttp.ClientSession:
        if self._http is None:
            # No cookies, no proxy from the environment, no token by default: results are fetched over it, too.
            self._http = aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar(), trust_env=False)
        return self._http

    def _failure(self, call: _Call, error: Exception) -> Failure:
        """Return what a failed exchange means, and whether the request may have arrived."""
        facts: dict[str, Any] = {"call": call.name, "error": type(error).__name__}
        if call.request_id:
            facts["request_id"] = call.request_id
        passes = "this is usually the network or RunComfy itself, and passes"
        # The order matters: the first three are kinds of those that follow.
        if isinstance(error, aiohttp.ClientSSLError):
            told: RunComfyError = unreadable("its certificate cannot be trusted", what=call.what, facts=facts)
            return Failure(told, again=False, arrived=False)
        if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
            told = ProviderBusy(f"RunComfy cannot be reached to {call.what}", hint=passes, details=facts)
            return Failure(told, again=True, arrived=False)
        if isinstance(error, TimeoutError):
            seconds = self._cloud.request_timeout.total_seconds()
            told = ProviderBusy(f"RunComfy did not {call.what} within {seconds:g} s", hint=passes, details=facts)
        elif isinstance(error, aiohttp.ClientResponseError | _TooLong):
            reason = "it does not end" if isinstance(error, _TooLong) else "it is not HTTP"
            told = unreadable(reason, what=call.what, facts=facts)
        else:
            told = ProviderBusy(f"the connection broke while RunComfy was to {call.what}", hint=passes, details=facts)
        return Failure(told, again=True, arrived=True)


class _TooLong(Exception):
    """A body beyond `MAX_ANSWER_BYTES`."""


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


def _final(call: _Call, failure: Failure) -> RunComfyError:
    """Return what the caller of a failed call is told; of a submit, whether it may run all the same."""
    error = failure.error
    if not call.submit or not failure.arrived:
        return error
    return RequestUnclear(
        f"the request was sent and not clearly answered ({error.message}); it may run, and be billed, once",
        hint="RunComfy has no list to find it in; it ends by itself. Look at the deployment's page before another run",
        details={**error.details, "cause": error.code},
    )
