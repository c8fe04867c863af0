"""
RunComfy's Server API: rent, look, prolong, stop. Keeps `runcomfy.ports.provider.Provider`.

What is retried: reads, changes of duration and stops, when no answer came or the answer was a server's error, with
growing random pauses; every call, when the connection could not even be made, or when RunComfy answered 429. A launch
is never sent again once it may have arrived. Each attempt has its own total deadline and a limit to what it reads.
Whether the world is as an answer says is for the application to find out.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from types import TracebackType
from typing import Any, Final, Self, TypeVar
from urllib.parse import quote

import aiohttp
import backoff
from yarl import URL

from runcomfy.adapters.providers import runcomfy_wire as wire
from runcomfy.adapters.providers.limits import DEFAULT_RETRY_AFTER, LocalLimiter, retry_after
from runcomfy.adapters.providers.runcomfy_errors import Answer, Failure, Veil, facts_of, judge, unreadable, wrong_path
from runcomfy.domain.balance import Balance
from runcomfy.domain.exceptions import (
    AccessDenied,
    CredentialsMalformed,
    CredentialsMissing,
    InsecureUrl,
    LaunchRefused,
    LaunchUnclear,
    MachineNotFound,
    ProviderBusy,
    ProviderError,
    RateLimited,
    RunComfyError,
    SettingInvalid,
    WrongUrl,
)
from runcomfy.domain.machine import CloudWorkflow, MachineReport, Phase, ServerId
from runcomfy.domain.secret import is_loopback
from runcomfy.domain.settings import CloudSettings
from runcomfy.ports.clock import Clock
from runcomfy.ports.limiter import Limiter

T = TypeVar("T")

MAX_BODY_BYTES: Final = 8 * 1024**2
"""More than any list of machines needs; an endless answer must not fill the memory."""

MAX_PAGES: Final = 100
CONNECT_TIMEOUT: Final = timedelta(seconds=10)
"""Shorter than a request's deadline, so that "never connected" can be told from "sent, and no answer"."""

BALANCE_KEPT: Final = timedelta(minutes=1)
"""How long a balance is told again: nobody needs it younger, and stops and launches need the requests."""

MAX_PAUSE: Final = timedelta(seconds=30)

_log = logging.getLogger("runcomfy.provider")


@dataclass(frozen=True, slots=True)
class _Call:
    """One thing we want from RunComfy."""

    method: str
    template: str
    """The path as it is logged: with names instead of ids."""
    what: str
    """In words, after "could not"."""
    server_id: ServerId | None = None
    query: str = ""
    body: Mapping[str, Any] | None = None
    urgent: bool = False
    launch: bool = False
    attempts: int | None = None
    """How often to try at most; None: as the settings say."""
    site: str = ""
    """Another address than the API's."""

    @property
    def name(self) -> str:
        return f"{self.method} {self.template}"


class RunComfyAPIClient:
    """One RunComfy account.

    Use it as `async with RunComfyAPIClient(settings, clock=clock) as cloud:`, or call `close()` at the end. An HTTP
    session may be passed in and then stays the caller's to close. Without a limiter this client keeps to the
    account's rate by itself, which is right only while no other process uses the account.
    """

    def __init__(
        self,
        settings: CloudSettings,
        *,
        clock: Clock,
        limiter: Limiter | None = None,
        http: aiohttp.ClientSession | None = None,
    ) -> None:
        """Nothing is sent yet.

        Raises:
            InsecureUrl: the token would travel unencrypted.
            SettingInvalid: the base address is none.
            CredentialsMalformed: a token that cannot be sent.
        """
        self._settings = settings
        self._root = checked_root(settings.base_url)
        for token in settings.tokens:
            if not token.reveal().isascii() or not token.reveal().isprintable() or " " in token.reveal():
                raise CredentialsMalformed(
                    "the RunComfy API token has characters that no token has",
                    hint="copy it again from RunComfy's profile page, in one line and without blanks",
                )
        self._clock = clock
        self._limiter: Limiter = limiter or LocalLimiter(
            per_second=settings.requests_per_second, burst=settings.burst, reserve=settings.stop_reserve
        )
        self._http = http
        self._owns_http = http is None
        self._agent = agent()
        self._token = 0
        self._veil = Veil(settings.tokens, settings.user_id)
        self._words_seen: set[str] = set()
        self._balance: Balance | None = None
        self._balance_asked: float | None = None

    @property
    def name(self) -> str:
        """`runcomfy`."""
        return "runcomfy"

    @property
    def account(self) -> str:
        """A digest of the API's address and the user id."""
        return hashlib.sha256(f"{self._root}\n{self._settings.user_id}".encode()).hexdigest()[:16]

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

    async def get_workflows(self) -> Sequence[CloudWorkflow]:
        """Return the workflows saved in the account."""
        call = _Call("GET", "/prod/api/users/{user_id}/workflows", "list the account's workflows")
        return wire.read_workflows(await self._get_whole_list(call, key="version_id"))

    async def list_machines(self, *, urgent: bool = False) -> Sequence[MachineReport]:
        """Return every machine the account has; never a part of the list."""
        call = _Call("GET", "/prod/api/users/{user_id}/servers", "list the account's machines", urgent=urgent)
        entries = await self._get_whole_list(call, key="server_id")
        with self._reading(call):
            reports = wire.read_machines(entries)
        for report in reports:
            self._notice(report)
        return reports

    async def launch_machine(self, *, server_type: str, duration: timedelta, workflow_version_id: str) -> MachineReport:
        """Ask once for one machine and return RunComfy's first word about it.

        Raises `LaunchUnclear` whenever the request may have arrived and no clear answer came. Every other error means
        that nothing was started: `LaunchRefused`, `NoCapacity`, `OutOfCredit` (RunComfy said no), `RateLimited`,
        `ProviderBusy` (it could not be reached).
        """
        body = wire.launch_body(server_type=server_type, duration=duration, workflow_version_id=workflow_version_id)
        call = _Call("POST", "/prod/api/users/{user_id}/servers", "launch a machine", body=body, launch=True)
        report = await self._request(call, lambda answer: wire.read_single(wire.read_json(answer.body)))
        self._notice(report)
        return report

    async def get_machine_status(self, server_id: ServerId, *, urgent: bool = False) -> MachineReport | None:
        """Return what RunComfy says about a machine; None if it answers that it knows none (404)."""
        call = _Call("GET", _SERVER, "look at a machine", server_id=server_id, urgent=urgent)
        report = await self._request(call, _about(server_id))
        if report is not None:
            self._notice(report)
        return report

    async def change_duration(self, server_id: ServerId, *, total: timedelta) -> MachineReport:
        """Set the machine's running time, counted from its ready time; a total in the past ends it at once."""
        body = wire.duration_body(total)
        template = f"{_SERVER}/update-estimated-duration"
        call = _Call("POST", template, "change a machine's duration", server_id=server_id, body=body)
        report = await self._request(call, _about(server_id))
        if report is None:
            raise MachineNotFound(f"RunComfy knows no machine {server_id}", details={"server_id": server_id})
        self._notice(report)
        return report

    async def stop_machine(self, server_id: ServerId) -> bool:
        """Ask for the machine to be stopped; True: accepted, and from now on it bills no longer. False: not known."""
        call = _Call("DELETE", _SERVER, "stop a machine", server_id=server_id, urgent=True)

        def read(answer: Answer) -> bool:
            if answer.status in (202, 204) and not answer.body.strip():
                return True
            if answer.status != 404:
                wire.refuse_errors(wire.read_json(answer.body))  # else a "no" with status 200 would end the bill
            return _about(server_id)(answer) is not None

        return await self._request(call, read)

    async def balance(self) -> Balance | None:
        """Return the account's money; None if RunComfy does not say. The endpoint is not documented.

        Asked at most once a minute, also where there was no answer; every failure of the provider is None.
        """
        now = asyncio.get_running_loop().time()
        if self._balance_asked is None or now - self._balance_asked >= BALANCE_KEPT.total_seconds():
            self._balance_asked, self._balance = now, None
            call = _Call("GET", "/prod/v2/balance", "read the balance", attempts=1)
            with suppress(ProviderError):
                usd = await self._request(call, lambda answer: wire.read_money(wire.read_json(answer.body)))
                self._balance = Balance(usd, self._clock.now()) if usd is not None else None
        return self._balance

    # --- beside the port ----------------------------------------------------------------------------------

    async def whoami(self) -> str | None:
        """Return the user id that belongs to the token; None if RunComfy does not say (not documented).

        Asked at www.runcomfy.com, where RunComfy's own command line asks, if the API is RunComfy's; else at the API.
        """
        site = "https://www.runcomfy.com" if (self._root.host or "").endswith(".runcomfy.net") else ""
        call = _Call("GET", "/api/auth/me", "ask who the token belongs to", attempts=1, site=site)
        try:
            return await self._request(call, lambda answer: wire.read_user_id(wire.read_json(answer.body)))
        except ProviderError:
            return None

    async def probe_host(self) -> None:
        """Find out, without a token, whether RunComfy's API answers at the base address.

        A path that the gateway knows is refused for want of a token; one it does not know is refused with other words.
        Raises WrongUrl, AnswerUnreadable (something else answers there) or ProviderBusy (nobody does).
        """
        path = "/prod/api/users/{user_id}/workflows"
        call = _Call("GET", path, "find RunComfy's API")
        await self._limiter.wait_turn(urgent=False)
        try:
            answer = await self._exchange(call, attempt=1, token=None)
        except Failure as failure:
            raise failure.error from None
        facts = facts_of(answer, call=call.name, veil=self._veil)
        if answer.status == 404:
            raise wrong_path(facts)
        if answer.status >= 300:
            error = judge(answer, what=call.what, call=call.name, veil=self._veil).error
            if isinstance(error, WrongUrl | ProviderBusy):
                raise error
        with self._reading(call, facts):
            payload = wire.read_json(answer.body)
            if answer.status < 300 and not isinstance(payload, list):
                raise wire.Unreadable("it answers without a token, and with something else")

    # --- machinery ----------------------------------------------------------------------------------------

    async def _get_whole_list(self, call: _Call, *, key: str) -> list[Mapping[str, Any]]:
        """Fetch a list with all its pages. A part of it, or a page that repeats another, raises AnswerUnreadable."""
        entries: list[Mapping[str, Any]] = []
        seen: set[str] = set()
        query = call.query
        for _ in range(MAX_PAGES):
            page = await self._request(
                replace(call, query=query), lambda answer: wire.read_page(wire.read_json(answer.body))
            )
            keys = {str(entry[key]) for entry in page.entries if entry.get(key)}
            with self._reading(call):
                if keys & seen:
                    raise wire.Unreadable("a page of the list that repeats an earlier one")
                seen |= keys
                entries.extend(page.entries)
                if page.next is None:
                    if page.total is not None and page.total != len(entries):
                        raise wire.Unreadable(f"{len(entries)} entries of a list of {page.total}")
                    return entries
                query = self._next_query(page.next, call)
        raise unreadable("a list without an end", what=call.what, facts={"call": call.name})

    def _next_query(self, following: str | int, call: _Call) -> str:
        """Return the query of the next page. It must be the same path at the same host: the token goes along."""
        if isinstance(following, int):
            return f"page={following}"
        here = self._url(call)
        try:
            there = here.join(URL(following, encoded=True))
        except ValueError:
            raise wire.Unreadable("a part of a list, with its rest at an address that is none") from None
        if there.origin() != here.origin() or there.raw_path != here.raw_path or not there.raw_query_string:
            raise wire.Unreadable("a part of a list, with its rest at another address")
        return there.raw_query_string

    async def _request(self, call: _Call, read: Callable[[Answer], T]) -> T:
        """Make a call until it is answered or not worth repeating, and read the answer."""
        settings = self._settings
        if not settings.user_id or not settings.tokens:
            missing = "user id" if settings.tokens else "API token"
            raise CredentialsMissing(
                f"no RunComfy {missing} is set",
                hint="set RUNCOMFY_USER_ID and RUNCOMFY_API_TOKEN, or write them into credentials.txt",
            )
        pauses = backoff.expo(base=2, factor=1, max_value=MAX_PAUSE.total_seconds())
        next(pauses)  # backoff's generators begin with an empty step
        attempts = settings.max_retries + 1 if call.attempts is None else call.attempts
        refused: dict[int, RunComfyError] = {}
        attempt = 0
        while True:
            attempt += 1
            token = self._token
            await self._limiter.wait_turn(urgent=call.urgent)
            try:
                result = await self._attempt(call, read, attempt, token)
            except Failure as failure:
                if failure.other_token:
                    refused[token] = failure.error
                    self._token = self._other_token(refused, token)
                    attempt -= 1  # another token is not another try
                    continue
                if not failure.again or attempt >= attempts or (call.launch and failure.arrived):
                    raise _final(call, failure) from None
                if not isinstance(failure.error, RateLimited):  # there the limiter makes us wait
                    await asyncio.sleep(backoff.full_jitter(next(pauses)))
            else:
                return result

    def _other_token(self, refused: Mapping[int, RunComfyError], token: int) -> int:
        """Return a token that this call was not refused with; if there is none, raise the refusal that says most."""
        for index in range(len(self._settings.tokens)):
            if index not in refused:
                _log.warning("provider_token_changed", extra={"fields": {"refused": token + 1, "now": index + 1}})
                return index
        denied = [index for index, error in refused.items() if isinstance(error, AccessDenied)]
        self._token = min(denied or refused)
        raise refused[self._token]

    async def _attempt(self, call: _Call, read: Callable[[Answer], T], attempt: int, token: int) -> T:
        """One exchange, and what its answer means. Raises Failure."""
        answer = await self._exchange(call, attempt=attempt, token=token)
        if answer.status in (429, 503):
            asked = retry_after(answer.headers, now=self._clock.now(), cap=self._settings.retry_after_cap)
            if answer.status == 429 or asked is not None:
                await self._limiter.hold(DEFAULT_RETRY_AFTER if asked is None else asked)
        facts = facts_of(answer, call=call.name, veil=self._veil)
        unknown = answer.status == 404 and not answer.is_html
        if 200 <= answer.status < 300 or (unknown and call.server_id is not None):
            try:
                return read(answer)
            except wire.Unreadable as error:
                raise Failure(unreadable(error, what=call.what, facts=facts), again=True, arrived=True) from None
        if unknown and not call.launch:
            raise Failure(wrong_path(facts), again=False, arrived=False)
        raise judge(answer, what=call.what, call=call.name, veil=self._veil, launch=call.launch)

    async def _exchange(self, call: _Call, *, attempt: int, token: int | None) -> Answer:
        """One HTTP exchange; the only place where HTTP becomes our errors. Logs it. Raises Failure."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        fields: dict[str, Any] = {"method": call.method, "path": call.template, "attempt": attempt}
        if call.server_id is not None:
            fields["server_id"] = call.server_id
        try:
            answer = await self._send(call, token)
        except (aiohttp.ClientError, OSError, _TooLong) as error:
            failure = self._failure(call, error)
            fields |= {"seconds": round(loop.time() - started, 3), "error": type(error).__name__}
            _log.warning("provider_call", extra={"fields": fields})
            raise failure from None
        except asyncio.CancelledError:  # it may have arrived all the same
            fields |= {"seconds": round(loop.time() - started, 3), "error": "cancelled"}
            _log.warning("provider_call", extra={"fields": fields})
            raise
        fields |= {"seconds": round(loop.time() - started, 3), "status": answer.status}
        _log.log(logging.INFO if answer.status < 400 else logging.WARNING, "provider_call", extra={"fields": fields})
        return answer

    async def _send(self, call: _Call, token: int | None) -> Answer:
        """Send a request and read its whole answer within the deadline. Raises what HTTP raises."""
        deadline = self._settings.request_timeout.total_seconds()
        connect = min(CONNECT_TIMEOUT.total_seconds(), deadline / 2)
        headers = {"Accept": "application/json", "User-Agent": self._agent}
        if token is not None:
            headers["Authorization"] = f"Bearer {self._settings.tokens[token].reveal()}"
        if self._http is None:
            # No cookies, no proxy from the environment, no redirects: the token goes where the settings say. (aiohttp
            # itself repeats GET and DELETE once when the connection breaks under them; that is harmless with both.)
            self._http = aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar(), trust_env=False)
        async with (
            asyncio.timeout(deadline),
            self._http.request(
                call.method,
                self._url(call),
                json=call.body,
                headers=headers,
                allow_redirects=False,
                raise_for_status=False,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect),
            ) as response,
        ):
            body = bytearray()
            async for chunk in response.content.iter_chunked(65536):
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise _TooLong
            return Answer(response.status, bytes(body), response.headers)

    def _failure(self, call: _Call, error: Exception) -> Failure:
        """Return what a failed exchange means, and whether the request may have arrived."""
        facts = {"call": call.name, "error": type(error).__name__}
        passes = "this is usually the network or RunComfy itself, and passes"
        # The order matters: the first three are kinds of those that follow.
        if isinstance(error, aiohttp.ClientSSLError):
            told: RunComfyError = unreadable("its certificate cannot be trusted", what=call.what, facts=facts)
            return Failure(told, again=False, arrived=False)
        if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
            told = ProviderBusy(f"RunComfy cannot be reached to {call.what}", hint=passes, details=facts)
            return Failure(told, again=True, arrived=False)
        if isinstance(error, TimeoutError):
            seconds = self._settings.request_timeout.total_seconds()
            told = ProviderBusy(f"RunComfy did not {call.what} within {seconds:g} s", hint=passes, details=facts)
        elif isinstance(error, aiohttp.ClientResponseError | _TooLong):
            reason = "it does not end" if isinstance(error, _TooLong) else "it is not HTTP"
            told = unreadable(reason, what=call.what, facts=facts)
        else:
            told = ProviderBusy(f"the connection broke while RunComfy was to {call.what}", hint=passes, details=facts)
        return Failure(told, again=True, arrived=True)

    def _url(self, call: _Call) -> URL:
        path = call.template.replace("{user_id}", quote(self._settings.user_id, safe=""))
        path = path.replace("{server_id}", quote(call.server_id or "", safe=""))
        root = call.site or str(self._root).rstrip("/")
        return URL(f"{root}{path}{'?' if call.query else ''}{call.query}", encoded=True)

    @contextmanager
    def _reading(self, call: _Call, facts: Mapping[str, Any] | None = None) -> Iterator[None]:
        try:
            yield
        except wire.Unreadable as error:
            raise unreadable(error, what=call.what, facts=facts or {"call": call.name}) from None

    def _notice(self, report: MachineReport) -> None:
        """Log a status word that we do not know, once."""
        if report.phase is Phase.UNKNOWN and report.status not in self._words_seen and len(self._words_seen) < 100:
            self._words_seen.add(report.status)
            fields = {"status": self._veil(report.status), "server_id": report.server_id}
            _log.warning("provider_status_unknown", extra={"fields": fields})


_SERVER: Final = "/prod/api/users/{user_id}/servers/{server_id}"


class _TooLong(Exception):
    """A body beyond `MAX_BODY_BYTES`."""


def agent() -> str:
    """Say honestly who asks."""
    try:
        return f"runcomfy-orchestrator/{version('runcomfy-orchestrator')}"
    except PackageNotFoundError:  # run from a copy that was never installed
        return "runcomfy-orchestrator"


def checked_root(base_url: str) -> URL:
    """Return the API's address. Raises SettingInvalid (it is none), InsecureUrl (the token would travel in clear)."""
    hint = "set RUNCOMFY_API_BASE_URL to https://api.runcomfy.net or https://beta-api.runcomfy.net"
    try:
        url = URL(base_url.strip().rstrip("/"))
        host, port = url.host, url.port
    except ValueError:
        host, port, url = None, None, URL()
    if not host or port is None or url.scheme not in ("http", "https") or url.query_string or url.fragment or url.user:
        raise SettingInvalid("RUNCOMFY_API_BASE_URL is not an address of an API", hint=hint)
    if url.scheme == "http" and not is_loopback(host):
        raise InsecureUrl("RUNCOMFY_API_BASE_URL begins with http: the token would travel unencrypted", hint=hint)
    return url


def _about(server_id: ServerId) -> Callable[[Answer], MachineReport | None]:
    """Return a reader of answers about that machine: None for 404."""

    def read(answer: Answer) -> MachineReport | None:
        if answer.status == 404:
            return None
        return wire.read_single(wire.read_json(answer.body), expected=server_id)

    return read


def _final(call: _Call, failure: Failure) -> RunComfyError:
    """Return what the caller of a failed call is told; of a launch, whether a machine may run."""
    error = failure.error
    if not call.launch:
        return error
    if failure.arrived:
        return LaunchUnclear(
            f"the launch was sent and not clearly answered ({error.message}); a machine may have been started",
            hint="look with `comfyctl machines ls` before launching again",
            details={**error.details, "cause": error.code},
        )
    if type(error) is ProviderError:
        return LaunchRefused(error.message, hint=error.hint, details=error.details)
    return error
