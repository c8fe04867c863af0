"""
One HTTP exchange with a ComfyUI server, and the only place where HTTP becomes our errors.

A rented machine may send anything: endless bodies, one byte a second, redirects elsewhere, a splash page. So every
exchange has a total deadline and a size limit, no redirect is followed, no cookie is kept and no `Origin` is sent.
Errors name the server by its masked address only; the client library's own texts hold the real one and stay inside.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import unquote, urlsplit, urlunsplit

import aiohttp
import backoff
from yarl import URL

from runcomfy.adapters.comfyui.wire import Unreadable, read_json
from runcomfy.domain.exceptions import (
    AnswerUnreadable,
    NotComfyUI,
    ProviderError,
    ServerUnreachable,
    SettingInvalid,
    foreign_text,
)
from runcomfy.domain.secret import SecretUrl
from runcomfy.domain.settings import ComfySettings

RETRY_FACTOR_SECONDS: Final = 0.2
RETRY_CAP_SECONDS: Final = 5.0
_HEADERS: Final = {
    # ComfyUI compresses only if asked; without it a small answer cannot grow large here.
    "Accept-Encoding": "identity",
    "User-Agent": "runcomfy-orchestrator",
}


class Address:
    """Where a server is: every URL is made here, and the masked form that may be shown."""

    def __init__(self, url: str | SecretUrl) -> None:
        """Raises SettingInvalid for anything but http(s)://host[:port][/prefix]."""
        text = url.reveal() if isinstance(url, SecretUrl) else url.strip()
        try:
            parts = urlsplit(text)
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port, parts = None, None, urlsplit("")
        if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment or port == 0:
            shown = url.masked if isinstance(url, SecretUrl) else foreign_text(text.rpartition("@")[2], 120)
            raise SettingInvalid(
                f"{shown!r} is not the address of a ComfyUI server",
                hint="write it as http://host:8188 or https://host, without anything behind it",
            )
        self.authorization = _basic(parts.username, parts.password or "") if parts.username else ""
        """The header for a server behind a password that the address carries; empty if it carries none."""
        where = f"[{host}]" if ":" in host else host
        where = where if port is None else f"{where}:{port}"
        # ComfyUI itself is rooted at "/"; a prefix is what a reverse proxy in front of it may want.
        prefix = parts.path.rstrip("/")
        self._root = urlunsplit((parts.scheme, where, prefix, "", ""))
        self._socket = urlunsplit(("wss" if parts.scheme == "https" else "ws", where, prefix, "", ""))
        self.masked: str = url.masked if isinstance(url, SecretUrl) else f"{parts.scheme}://{where}"

    def http(self, path: str) -> URL:
        """The URL of a path that is percent-encoded already."""
        return URL(self._root + path, encoded=True)

    def socket(self, client_id: str) -> str:
        """The URL of the socket for a client id."""
        return f"{self._socket}/ws?clientId={client_id}"

    def __repr__(self) -> str:
        return f"Address({self.masked})"


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole HTTP answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def is_html(self) -> bool:
        """Whether this is a page for people."""
        return is_html(self.headers) or self.body[:256].lstrip().lower().startswith((b"<!doctype", b"<html"))


def is_html(headers: Mapping[str, str]) -> bool:
    """Whether an answer calls itself a page."""
    return headers.get("Content-Type", "").partition(";")[0].strip().lower() in ("text/html", "application/xhtml+xml")


class Exchange:
    """HTTP with one server. Uses the session it was given, or owns one."""

    def __init__(
        self, url: str | SecretUrl, settings: ComfySettings, http: aiohttp.ClientSession | None = None
    ) -> None:
        self.address = Address(url)
        self.settings = settings
        self._given = http
        self._own: aiohttp.ClientSession | None = None
        self._closed = False
        self._timeout = settings.request_timeout.total_seconds()
        retry = backoff.on_exception(
            backoff.expo,
            (ServerUnreachable, AnswerUnreadable),
            max_tries=settings.max_retries + 1,
            factor=RETRY_FACTOR_SECONDS,
            max_value=RETRY_CAP_SECONDS,
            jitter=backoff.full_jitter,
            logger=None,
        )
        self._ask_again: Callable[..., Awaitable[Answer]] = retry(self._ask_well)
        self._read_again: Callable[..., Awaitable[Any]] = retry(self._read_well)

    @property
    def session(self) -> aiohttp.ClientSession:
        """The session in use."""
        if self._given is not None:
            return self._given
        if self._own is None or self._own.closed:
            if self._closed:
                raise ServerUnreachable("this client was closed", hint="make a new client")
            self._own = aiohttp.ClientSession(
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None),
                trust_env=False,
            )
        return self._own

    async def close(self) -> None:
        """Close the session if it is ours."""
        self._closed = True
        if self._own is not None:
            await self._own.close()
            self._own = None

    # --- whole answers ------------------------------------------------------------------------------------

    async def read(self, path: str) -> Any:
        """GET a JSON answer; repeated within one request timeout when it fails, since reading changes nothing.

        Raises ServerUnreachable, NotComfyUI, AnswerUnreadable.
        """
        async with self.deadline(self._timeout):
            return await self._read_again(path)

    async def ask(self, method: str, path: str, *, repeat: bool = True, **request: Any) -> Answer:
        """Return the answer whatever its status; a 5xx or 429 counts as no answer, but for a HEAD that is not known.

        `repeat` says that a second copy of this request does no harm.
        """
        async with self.deadline(self._timeout):
            return await (self._ask_again if repeat else self._ask_well)(method, path, **request)

    async def _ask_well(self, method: str, path: str, **request: Any) -> Answer:
        answer = await self.once(method, path, **request)
        self.refuse_strangers(answer.status, answer.headers)
        unknown = method == "HEAD" and answer.status == 501  # what stands in between lets none through, also later
        if (answer.status >= 500 and not unknown) or answer.status == 429:
            raise self.busy(answer)
        return answer

    async def _read_well(self, path: str) -> Any:
        answer = await self._ask_well("GET", path)
        if answer.status != 200:
            raise self.not_comfyui(f"answers {answer.status} to a question every ComfyUI answers")
        return self.json(answer)

    def json(self, answer: Answer) -> Any:
        """The JSON in an answer. Raises NotComfyUI for a page, AnswerUnreadable for anything else."""
        try:
            return read_json(answer.body, lenient=True)
        except Unreadable as error:
            if answer.is_html:
                raise self.not_comfyui("answers with a web page") from None
            raise AnswerUnreadable(
                f"the answer of {self.address.masked} cannot be read: {error}",
                hint="something between here and ComfyUI may change what it sends",
            ) from None

    async def once(self, method: str, path: str, **request: Any) -> Answer:
        """Make one exchange and read its whole body, at most `max_frame_bytes`. No deadline of its own."""
        limit = self.settings.max_frame_bytes
        async with self.open(method, path, **request) as response:
            body = bytearray()
            async for chunk in response.content.iter_any():
                body += chunk
                if len(body) > limit:
                    raise AnswerUnreadable(
                        f"{self.address.masked} sends more than {limit} bytes where a short answer was expected",
                        hint="raise the frame limit if the workflows really are that large",
                    )
            return Answer(response.status, response.headers, bytes(body))

    @asynccontextmanager
    async def open(self, method: str, path: str, **request: Any) -> AsyncIterator[aiohttp.ClientResponse]:
        """Make a request; inside the block, everything HTTP can do wrong becomes our errors."""
        headers = {**_HEADERS, **request.pop("headers", {})}
        if self.address.authorization:
            headers["Authorization"] = self.address.authorization
        try:
            async with self.session.request(
                method,
                self.address.http(path),
                headers=headers,
                allow_redirects=False,
                **request,
            ) as response:
                try:
                    yield response
                except BaseException:
                    # What is left of the body is not wanted, and must not be waited for.
                    response.close()
                    raise
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            translated = self._translate(error)
            if translated is None:
                raise
            raise translated from None

    @asynccontextmanager
    async def deadline(self, seconds: float) -> AsyncIterator[None]:
        """Bound everything inside, however slowly it drips."""
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            raise ServerUnreachable(
                f"{self.address.masked} did not answer within {seconds:g} s",
                hint="check that the machine is up and reachable from here",
                details={"kind": "timeout"},
            ) from None

    # --- errors -------------------------------------------------------------------------------------------

    def _translate(self, error: Exception) -> ProviderError | None:
        """Return our error for the library's; None for one of the operating system that is not about the network."""
        masked = self.address.masked
        if isinstance(error, aiohttp.ClientConnectorCertificateError | aiohttp.ClientSSLError):
            return NotComfyUI(
                f"the certificate of {masked} is not valid for it",
                hint="check the address; an unencrypted or unverified connection is never tried instead",
                details={"kind": "tls"},
            )
        if isinstance(error, TimeoutError):
            what, kind = "did not answer in time", "timeout"
        elif isinstance(error, aiohttp.ClientConnectorDNSError):
            what, kind = "has a name that cannot be resolved", "dns"
        elif isinstance(error, aiohttp.ClientConnectorError):
            what, kind = "refuses connections", "refused"
        elif isinstance(error, aiohttp.ServerConnectionError | aiohttp.ClientOSError):
            what, kind = "broke the connection", "reset"
        elif isinstance(error, aiohttp.ClientPayloadError):
            what, kind = "broke off in the middle of its answer", "cut"
        elif isinstance(error, aiohttp.ClientError):
            return self.not_comfyui("does not answer in HTTP", kind="not-http")
        elif isinstance(error, ConnectionError):
            what, kind = "broke the connection", "reset"
        else:
            return None
        return ServerUnreachable(
            f"{masked} {what}",
            hint="check that ComfyUI is running there and that the port is right",
            details={"kind": kind},
        )

    def refuse_strangers(self, status: int, headers: Mapping[str, str]) -> None:
        """Raise NotComfyUI for answers that never come from ComfyUI itself."""
        if 300 <= status < 400 and status != 304:
            raise self.not_comfyui(f"redirects elsewhere ({status}), and redirects are not followed")
        if status in (401, 403, 407) and not is_json(headers):
            raise self.not_comfyui(f"asks who we are ({status}): something in front of ComfyUI guards it")

    def busy(self, answer: Answer) -> ServerUnreachable:
        """The error for a 5xx or 429."""
        return ServerUnreachable(
            f"{self.address.masked} answered {answer.status}",
            hint="look into ComfyUI's log on that machine",
            details={"kind": "status", "status": answer.status},
        )

    def not_comfyui(self, what: str, *, kind: str = "stranger") -> NotComfyUI:
        """The error for something else that answers."""
        return NotComfyUI(
            f"{self.address.masked} {what}",
            hint="give the address that ComfyUI's own page has in the browser",
            details={"kind": kind},
        )


def _basic(user: str, password: str) -> str:
    pair = f"{unquote(user)}:{unquote(password)}".encode()
    return "Basic " + base64.b64encode(pair).decode("ascii")


def is_json(headers: Mapping[str, str]) -> bool:
    """Whether an answer calls itself JSON."""
    return headers.get("Content-Type", "").partition(";")[0].strip().lower() == "application/json"
