"""
Sends requests to RunComfy's API, for the client of the machines and for that of serverless requests.

What is sent again: a call that was not answered, or that the server could not do, with growing random pauses. A call
that must be made `once` is sent again only when it surely did not arrive. A token that is refused gives way to the
other one. Each attempt keeps to the account's rate and has its own total deadline and a limit to what it reads.

The token is sent to where a call says, and no redirect is followed. What a call is and what its answer means is said by
the client that makes it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final, TypeVar

import aiohttp
import backoff
from yarl import URL

from runcomfy.adapters.providers.limits import DEFAULT_RETRY_AFTER, LocalLimiter, retry_after
from runcomfy.adapters.providers.runcomfy_errors import Answer, Failure, Veil, unreadable
from runcomfy.domain.exceptions import (
    AccessDenied,
    CredentialsMalformed,
    InsecureUrl,
    ProviderBusy,
    RateLimited,
    RunComfyError,
    SettingInvalid,
)
from runcomfy.domain.secret import is_loopback
from runcomfy.domain.settings import CloudSettings
from runcomfy.ports.clock import Clock
from runcomfy.ports.limiter import Limiter

T = TypeVar("T")

MAX_BODY_BYTES: Final = 8 * 1024**2
"""More than any list of machines needs; an endless answer must not fill the memory."""

CONNECT_TIMEOUT: Final = timedelta(seconds=10)
"""Shorter than a request's deadline, so that "never connected" can be told from "sent, and no answer"."""

MAX_PAUSE: Final = timedelta(seconds=30)

_log = logging.getLogger("runcomfy.provider")


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Call:
    """One thing we want from RunComfy."""

    method: str
    template: str
    """The path as it is logged: with names instead of ids."""
    what: str
    """In words, after "could not"."""
    url: URL
    body: bytes | None = None
    """JSON."""
    about: Mapping[str, str] = field(default_factory=dict)
    """The ids that the log is to name."""
    urgent: bool = False
    once: bool = False
    """It costs money: whatever may have arrived is not sent again."""
    attempts: int | None = None
    """How often to try at most; None: as the settings say."""
    leaving: Callable[[], None] = _nothing
    """Called when a try of it is about to leave: it may have waited for its turn until then."""
    denied: Callable[[], None] = _nothing
    """Called when the try that left last never arrived, or was answered with an error."""

    @property
    def name(self) -> str:
        """The call as errors name it."""
        return f"{self.method} {self.template}"


class Sender:
    """Sends the calls of one account. `close()` ends its connections."""

    def __init__(
        self,
        settings: CloudSettings,
        *,
        event: str,
        clock: Clock,
        limiter: Limiter | None,
        http: aiohttp.ClientSession | None,
    ) -> None:
        """Nothing is sent yet. Every exchange is logged as `event`.

        Without a limiter this sender keeps to the account's rate by itself. A session that is passed in stays the
        caller's to close.

        Raises CredentialsMalformed for a token that cannot be sent.
        """
        for token in settings.tokens:
            if not token.reveal().isascii() or not token.reveal().isprintable() or " " in token.reveal():
                raise CredentialsMalformed(
                    "the RunComfy API token has characters that no token has",
                    hint="copy it again from RunComfy's profile page, in one line and without blanks",
                )
        self._settings, self._event, self._clock = settings, event, clock
        self._limiter: Limiter = limiter or LocalLimiter(
            per_second=settings.requests_per_second, burst=settings.burst, reserve=settings.stop_reserve
        )
        self._http, self._owns_http = http, http is None
        self._token = 0
        self.agent = _agent()
        self.veil = Veil(settings.tokens, settings.user_id)

    async def close(self) -> None:
        """End the connections, unless the session was passed in. Harmless when repeated."""
        if self._owns_http and self._http is not None:
            http, self._http = self._http, None
            await http.close()

    def session(self) -> aiohttp.ClientSession:
        """Return what requests are sent over; it adds no token by itself."""
        if self._http is None:
            # No cookies, no proxy from the environment: the token goes where the settings say. (aiohttp itself repeats
            # GET and DELETE once when the connection breaks under them; that is harmless with both.)
            self._http = aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar(), trust_env=False)
        return self._http

    async def request(self, call: Call, read: Callable[[Answer], T]) -> T:
        """Make a call until it is answered or not worth repeating, and read the answer; there must be a token.

        `read` raises Failure for an answer that is no success, and so does this, once it gives up.
        """
        pauses = backoff.expo(base=2, factor=1, max_value=MAX_PAUSE.total_seconds())
        next(pauses)  # backoff's generators begin with an empty step
        attempts = self._settings.max_retries + 1 if call.attempts is None else call.attempts
        refused: dict[int, Failure] = {}
        attempt, arrived = 0, False
        while True:
            attempt += 1
            token = self._token
            await self._limiter.wait_turn(urgent=call.urgent)
            call.leaving()
            try:
                return await self._attempt(call, read, attempt, token)
            except Failure as failure:
                if not failure.arrived or failure.error.details.get("status") is not None:
                    call.denied()
                if failure.other_token:
                    refused[token] = failure
                    self._token = self._other_token(refused, token)
                    attempt -= 1  # another token is not another try
                    continue
                arrived = arrived or failure.arrived
                if not failure.again or attempt >= attempts or (call.once and failure.arrived):
                    failure.error.details["arrived"] = arrived  # any of its tries
                    raise
                if not isinstance(failure.error, RateLimited):  # there the limiter makes us wait
                    await asyncio.sleep(backoff.full_jitter(next(pauses)))

    async def ask_without_token(self, call: Call) -> Answer:
        """Send a call once, without a token. Raises Failure if there is no answer."""
        await self._limiter.wait_turn(urgent=call.urgent)
        return await self._exchange(call, attempt=1, token=None)

    def _other_token(self, refused: Mapping[int, Failure], token: int) -> int:
        """Return a token that this call was not refused with; if there is none, raise the refusal that says most."""
        for index in range(len(self._settings.tokens)):
            if index not in refused:
                _log.warning("provider_token_changed", extra={"fields": {"refused": token + 1, "now": index + 1}})
                return index
        denied = [index for index, failure in refused.items() if isinstance(failure.error, AccessDenied)]
        self._token = min(denied or refused)
        raise refused[self._token]

    async def _attempt(self, call: Call, read: Callable[[Answer], T], attempt: int, token: int) -> T:
        """One exchange, and what its answer means. Raises Failure."""
        answer = await self._exchange(call, attempt=attempt, token=token)
        if answer.status in (429, 503):
            asked = retry_after(answer.headers, now=self._clock.now(), cap=self._settings.retry_after_cap)
            if answer.status == 429 or asked is not None:
                await self._limiter.hold(DEFAULT_RETRY_AFTER if asked is None else asked)
        return read(answer)

    async def _exchange(self, call: Call, *, attempt: int, token: int | None) -> Answer:
        """One HTTP exchange; the only place where HTTP becomes our errors. Logs it. Raises Failure."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        fields: dict[str, Any] = {"method": call.method, "path": call.template, "attempt": attempt, **call.about}
        try:
            answer = await self._send(call, token)
        except (aiohttp.ClientError, OSError, _TooLong) as error:
            failure = self._failure(call, error)
            fields |= {"seconds": round(loop.time() - started, 3), "error": type(error).__name__}
            _log.warning(self._event, extra={"fields": fields})
            raise failure from None
        except asyncio.CancelledError:  # it may have arrived all the same
            fields |= {"seconds": round(loop.time() - started, 3), "error": "cancelled"}
            _log.warning(self._event, extra={"fields": fields})
            raise
        fields |= {"seconds": round(loop.time() - started, 3), "status": answer.status}
        _log.log(logging.INFO if answer.status < 400 else logging.WARNING, self._event, extra={"fields": fields})
        return answer

    async def _send(self, call: Call, token: int | None) -> Answer:
        """Send a request and read its whole answer within the deadline. Raises what HTTP raises."""
        deadline = self._settings.request_timeout.total_seconds()
        connect = min(CONNECT_TIMEOUT.total_seconds(), deadline / 2)
        headers = {"Accept": "application/json", "User-Agent": self.agent}
        if token is not None:
            headers["Authorization"] = f"Bearer {self._settings.tokens[token].reveal()}"
        if call.body is not None:
            headers["Content-Type"] = "application/json"
        async with (
            asyncio.timeout(deadline),
            self.session().request(
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
                if len(body) > MAX_BODY_BYTES:
                    raise _TooLong
            return Answer(response.status, bytes(body), response.headers)

    def _failure(self, call: Call, error: Exception) -> Failure:
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


class _TooLong(Exception):
    """A body beyond `MAX_BODY_BYTES`."""


@cache
def _agent() -> str:
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
