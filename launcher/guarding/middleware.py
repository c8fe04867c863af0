"""
Stands in front of every route, as plain ASGI: refuses before anything is read, counts what is read, and puts on every
answer, errors included, the headers that keep it safe.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs

from launcher.guarding import rules
from launcher.guarding.answers import proof_messages, redirect_messages, refusal_messages, secured, words_messages
from launcher.guarding.proving import PROOF_PATH, challenge_in, proof_of
from launcher.guarding.rules import Head, Refusal
from runcomfy.domain.exceptions import TooManyRequests

if TYPE_CHECKING:
    from launcher.guarding.guard import Guard

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

PRINCIPAL: Final = "runcomfy.principal"
CHUNK_TIMEOUT_S: Final = 20.0
"""How long a body may say nothing."""
BODY_TIMEOUT_S: Final = 600.0
"""How long a body may take in all: 64 MB at 1 Mbit/s."""

DRAINED_MOST: Final = 64 * 1024**2
DRAIN_TIMEOUT_S: Final = 10.0
DRAIN_PAUSE_S: Final = 2.0
"""What is still read, and thrown away, of a body that is too large: most clients read no answer before they have sent
everything, and a connection that is closed under them tells them nothing."""

_TOO_LARGE: Final = Refusal(413, "body-too-large", "the request is larger than allowed")
_TOO_SLOW: Final = Refusal(408, "body-too-slow", "the request's body did not come in time")
_NO_LENGTH: Final = Refusal(400, "bad-request", "the request's Content-Length cannot be read")
_NO_CHALLENGE: Final = Refusal(400, "bad-request", "the address holds no challenge of 64 hexadecimal digits")
_TOO_LONG: Final = Refusal(414, "address-too-long", "the request's address is too long")
_CODE_WORDS: Final = (
    "This login address was used already, or it is older than ten minutes. comfyctl page prints a fresh one, on the "
    "computer where the service runs (programs: POST /session/code with the token)."
)


class _BodyRefused(Exception):
    """Ends the reading of a body; the answer was decided by the guard."""


class GuardMiddleware:
    """The guard, as the outermost layer of an application."""

    def __init__(self, app: App, guard: Guard) -> None:
        self._app = app
        self._guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or let the request through."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            # There are no WebSockets here. Closing before the handshake is answered with 403.
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        exchange = _Exchange(scope, receive, send)
        if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > rules.LONGEST_TARGET:
            await exchange.refuse(_TOO_LONG)
            return
        head = head_of(scope)
        # The code must not be in the address any more when the server writes its access log.
        code = _take_code(scope, head)
        found = self._guard.admit(head)
        if isinstance(found, Refusal):
            await exchange.refuse(found)
        elif head.path == PROOF_PATH and head.method == "GET":
            await self._prove(head, scope["query_string"], exchange)
        elif code is not None:
            await self._log_in(head, code, exchange)
        else:
            scope[PRINCIPAL] = found
            await self._pass_on(head, exchange)

    async def _prove(self, head: Head, query: bytes, exchange: _Exchange) -> None:
        challenge = challenge_in(query)
        if challenge is None:
            await exchange.refuse(_NO_CHALLENGE)
        else:
            port = (head.server or ("", 0))[1]
            await exchange.answer(proof_messages(proof_of(self._guard.token, challenge, port)))

    async def _log_in(self, head: Head, code: str, exchange: _Exchange) -> None:
        try:
            session = self._guard.trade(code)
        except TooManyRequests as error:
            await exchange.refuse(Refusal(429, error.code, error.message, error.hint))
            return
        if session is not None:
            cookie = self._guard.cookie_of(session, secure=head.scheme == "https")
            await exchange.answer(redirect_messages("/", cookie))
        elif self._guard.has_session(head):  # an old address opened again: still logged in
            await exchange.answer(redirect_messages("/", None))
        else:
            await exchange.answer(words_messages(403, "Not logged in", _CODE_WORDS))

    async def _pass_on(self, head: Head, exchange: _Exchange) -> None:
        try:
            length = rules.declared_length(head)
        except ValueError:
            await exchange.refuse(_NO_LENGTH)
            return
        exchange.most = self._guard.max_body(head.path, rules.content_type(head))
        if length is not None and length > exchange.most:
            await exchange.refuse(_TOO_LARGE)
            return
        try:
            await self._app(exchange.scope, exchange.receive, exchange.send)
        except Exception:
            if exchange.refusal is None:
                raise
        if exchange.refusal is not None:
            await exchange.refuse(exchange.refusal)


class _Exchange:
    """One request and its answer: counts the body, completes the headers, replaces an answer that came too late."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.most = 0
        self.refusal: Refusal | None = None
        self._receive = receive
        self._send = send
        self._read = 0
        self._whole = False
        self._until: float | None = None
        self._started = False

    async def receive(self) -> Message:
        """Return the next part of the body. Raises when it is too much or too slow."""
        if self._whole:  # what comes now is only that the client left; that may take as long as it likes
            return await self._receive()
        if self.refusal is not None:
            raise _BodyRefused
        loop = asyncio.get_running_loop()
        if self._until is None:
            self._until = loop.time() + BODY_TIMEOUT_S
        try:
            async with asyncio.timeout(min(CHUNK_TIMEOUT_S, max(0.0, self._until - loop.time()))):
                message = await self._receive()
        except TimeoutError:
            self.refusal = _TOO_SLOW
            raise _BodyRefused from None
        if message["type"] != "http.request":
            return message
        self._read += len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        if self._read > self.most:
            self.refusal = _TOO_LARGE
            raise _BodyRefused
        return message

    async def send(self, message: Message) -> None:
        """Send a part of the application's answer, unless the guard has decided on another one."""
        if self.refusal is not None and not self._started:
            return
        if message["type"] == "http.response.start":
            self._started = True
            message = {**message, "headers": secured(message.get("headers", ()), self.scope["path"])}
        await self._send(message)

    async def refuse(self, refusal: Refusal) -> None:
        """Answer with a refusal, unless an answer has begun."""
        # What is left of the body is not read, or not all of it: the connection cannot be used again.
        extra = [(b"connection", b"close")] if refusal.status in (408, 413) else []
        await self.answer(refusal_messages(refusal, extra=extra), drains=refusal.status == 413)

    async def answer(self, messages: list[Message], *, drains: bool = False) -> None:
        """Send an answer of the guard's own, unless one has begun; `drains`: end it when the body was sent, too."""
        self.refusal = None
        if self._started:
            return
        for message in messages:
            await self.send({**message, "more_body": True} if drains and "body" in message else message)
        if drains:
            await self._drain()
            await self.send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _drain(self) -> None:
        """Throw away what the client still sends, within limits."""
        names = {name for name, _ in self.scope["headers"]}
        if self._whole or (b"expect" in names and not self._read):  # it waits for a word before it sends
            return
        left = DRAINED_MOST
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_TIMEOUT_S):
                while left > 0:
                    async with asyncio.timeout(DRAIN_PAUSE_S):
                        message = await self._receive()
                    left -= len(message.get("body", b""))
                    if message["type"] != "http.request" or not message.get("more_body", False):
                        return


def head_of(scope: Scope) -> Head:
    """Return what the guard looks at of an ASGI request."""
    server, client = scope.get("server"), scope.get("client")
    return Head(
        method=scope["method"],
        path=scope["path"],
        scheme=scope.get("scheme", "http"),
        headers=tuple((k.decode("latin-1").lower(), v.decode("latin-1")) for k, v in scope["headers"]),
        server=(str(server[0]).lower(), server[1] or 0) if server else None,
        peer=client[0] if client else None,
    )


def _take_code(scope: Scope, head: Head) -> str | None:
    """Take a one-time code out of the request's address, where there is one."""
    if b"code=" not in scope["query_string"] or head.path != "/":
        return None
    query = bytes(scope["query_string"]).decode("latin-1")
    scope["query_string"] = b""
    if head.method != "GET":
        return None
    try:
        fields = parse_qs(query, max_num_fields=20)
    except ValueError:
        return ""
    return fields.get("code", [""])[0]
