"""
Who may use the HTTP API: one token for everything, a session for the page, CONJURE's programs on this computer.

`Guard` knows the secrets and decides; `middleware` stands in front of every route and asks it. What jobs a client may
put in besides (budgets, queue) is left to the queue.
"""

from __future__ import annotations

import asyncio
import hmac
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from fastapi import FastAPI, Request

from launcher.guarding import rules
from launcher.guarding.kept_secrets import TOKEN_FILE, kept_secret, new_token
from launcher.guarding.middleware import PRINCIPAL, GuardMiddleware
from launcher.guarding.rates import PerMinute
from launcher.guarding.rules import Head, Refusal
from launcher.guarding.sessions import Sessions
from runcomfy.adapters.log import register_secret
from runcomfy.domain.exceptions import TooManyRequests
from runcomfy.domain.secret import Secret, is_loopback
from runcomfy.domain.settings import HttpSettings
from runcomfy.ports.clock import Clock

COOKIE: Final = "runcomfy_session"
_CODES_PER_MINUTE: Final = 20
"""Wrong codes that are looked at; nobody guesses 256 bits, and nobody shall fill the log trying."""

_NO_TOKEN: Final = Refusal(
    401,
    "token-missing",
    "this needs the token, or the page's session",
    "send Authorization: Bearer with the text of the file http_token, or open the address that `comfyctl page` prints",
)
_WRONG_TOKEN: Final = Refusal(
    401, "token-refused", "the token is not the right one", "it is in the file http_token of the state folder"
)
_NOT_OURS: Final = Refusal(403, "foreign-origin", "a session changes something only from its own page")


@dataclass(frozen=True, slots=True)
class Principal:
    """Who sent a request."""

    kind: Literal["token", "session", "conjure", "anybody"]
    """`conjure`: a program on this computer without a token; `anybody`: the page's own files need nobody."""
    name: str
    """What its jobs are counted under."""


_TOKEN: Final = Principal("token", "token")
_SESSION: Final = Principal("session", "page")
_CONJURE: Final = Principal("conjure", "conjure")
_ANYBODY: Final = Principal("anybody", "")


class Guard:
    """Token, sessions and limits of one server."""

    def __init__(self, token: Secret, http: HttpSettings, *, bound_host: str, clock: Clock) -> None:
        self.token = token
        self.http = http
        self.bound_host = bound_host
        self._clock = clock
        self._sessions = Sessions(http.session)
        self._codes = PerMinute(_CODES_PER_MINUTE, _loop_time)
        self._jobs = PerMinute(http.max_per_minute, _loop_time)

    @classmethod
    def open(cls, state_dir: str | Path, http: HttpSettings, *, bound_host: str, clock: Clock) -> Guard:
        """Return the guard of a state folder; its token is made now if there is none. Blocks.

        Raises CredentialsMalformed (others can read the token), LocalError, DiskFull.
        """
        token = kept_secret(token_file(state_dir), new_token, what="the token of the HTTP API")
        return cls(token, http, bound_host=bound_host, clock=clock)

    def install(self, web: FastAPI) -> None:
        """Stand in front of an application: in front of its error pages too."""
        inner = web.build_middleware_stack
        # `add_middleware` would leave what answers a failed request outside of the guard.
        web.build_middleware_stack = lambda: GuardMiddleware(inner(), self)  # type: ignore[method-assign]

    # --- what is open -------------------------------------------------------------------------------------

    @property
    def on_loopback(self) -> bool:
        """Whether only this computer can connect."""
        return is_loopback(self.bound_host)

    @property
    def conjure_open(self) -> bool:
        """Whether CONJURE's endpoints answer without the token."""
        return self.http.conjure_open and self.on_loopback

    def announcement(self) -> str:
        """Return what must be said at the start; empty if everything is as safe as it can be."""
        if self.on_loopback:
            return ""
        return (
            f"listening on {self.bound_host}: other computers can connect. Every request needs the token, CONJURE's "
            "endpoints included, and what is said travels unencrypted: put a proxy that speaks TLS in front"
        )

    def max_body(self, path: str, kind: str) -> int:
        """Return how many bytes a body of this type may have."""
        if kind == rules.FILES:
            return self.http.max_upload_bytes * _FILES_AT_ONCE + self.http.max_body_bytes
        if path == "/jobs":  # a picture may stand in the JSON itself, as base64
            return self.http.max_upload_bytes * 4 // 3 + self.http.max_body_bytes
        return self.http.max_body_bytes

    # --- who it is ----------------------------------------------------------------------------------------

    def admit(self, head: Head) -> Principal | Refusal:
        """Return who sent a request, or why it is not let in. Says nothing of its body but the type."""
        allowed = self.http.allowed_hosts
        refusal = (
            rules.size_refused(head)
            or rules.host_refused(head, allowed=allowed, bound_host=self.bound_host)
            or rules.origin_refused(head, allowed=allowed)
        )
        if refusal is not None:
            return refusal
        if head.method == "OPTIONS" and head.all("access-control-request-method"):
            return Refusal(403, "foreign-origin", "no other page may use this")
        found = self._who(head)
        if isinstance(found, Refusal):
            return found
        return rules.body_refused(head) or found

    def _who(self, head: Head) -> Principal | Refusal:
        given = rules.bearer(head)
        if given is not None:
            right = hmac.compare_digest(given.encode("utf-8", "surrogatepass"), self.token.reveal().encode())
            return _TOKEN if right else _WRONG_TOKEN
        if self.has_session(head):
            if head.method in rules.SAFE_METHODS or rules.surely_same_origin(head):
                return _SESSION
            return _NOT_OURS
        if rules.is_public(head):
            return _ANYBODY
        if self.conjure_open and rules.is_conjures(head) and rules.conjure_may(head):
            return _CONJURE
        return _NO_TOKEN

    def has_session(self, head: Head) -> bool:
        """Whether the request carries an open session."""
        value = rules.cookie(head, COOKIE)
        return value is not None and self._sessions.is_open(value, now=self._clock.now())

    # --- logging in ---------------------------------------------------------------------------------------

    def new_code(self) -> str:
        """Return a code that logs the page in once, within ten minutes; for the address `/?code=…`."""
        code = self._sessions.new_code(now=self._clock.now())
        register_secret(code)
        return code

    def trade(self, code: str) -> str | None:
        """Return a new session for a code; None if it is wrong, used or too old. Raises TooManyRequests."""
        if wait_s := self._codes.take("codes"):
            raise TooManyRequests("too many login codes were tried", details={"retry_after_s": wait_s})
        return self._sessions.trade(code, now=self._clock.now())

    def cookie_of(self, session: str, *, secure: bool) -> str:
        """Return the header that hands a session to the browser."""
        seconds = int(self.http.session.total_seconds())
        attributes = f"; Max-Age={seconds}; Path=/; HttpOnly; SameSite=Strict" + ("; Secure" if secure else "")
        return f"{COOKIE}={session}{attributes}"

    def log_out(self, head: Head) -> str:
        """End the request's session, if it has one; return the header that takes the cookie back."""
        value = rules.cookie(head, COOKIE)
        if value is not None:
            self._sessions.end(value, now=self._clock.now())
        return f"{COOKIE}=; Max-Age=0; Path=/; HttpOnly; SameSite=Strict"

    # --- limits -------------------------------------------------------------------------------------------

    @staticmethod
    def principal(kind: Literal["token", "session", "conjure"]) -> Principal:
        """Return who has sent what came in by this way; for programs beside HTTP, and tests."""
        return {"token": _TOKEN, "session": _SESSION, "conjure": _CONJURE}[kind]

    def principal_of(self, request: Request) -> Principal:
        """Return who sent a request that was let in."""
        principal: Principal = request.scope[PRINCIPAL]
        return principal

    def admit_jobs(self, principal: Principal, count: int = 1, *, waiting: int = 0) -> None:
        """Let a client put in so many jobs now; `waiting`: how many of its jobs wait already.

        Raises TooManyRequests: nothing was counted then.
        """
        if waiting + count > self.http.max_waiting:
            raise TooManyRequests(
                f"{waiting} jobs of this client wait already; at most {self.http.max_waiting} may",
                hint="wait until some are done, or raise RUNCOMFY_HTTP_MAX_WAITING",
                details={"retry_after_s": 60.0},
            )
        if wait_s := self._jobs.take(principal.name, count):
            raise TooManyRequests(
                f"more than {self.http.max_per_minute} jobs in a minute",
                hint=f"come again in {wait_s:.0f} s, or raise RUNCOMFY_HTTP_MAX_PER_MINUTE",
                details={"retry_after_s": round(wait_s, 1)},
            )


_FILES_AT_ONCE: Final = 4
"""As many of the largest files as one request may hold: what a workflow takes as inputs."""


def token_file(state_dir: str | Path) -> Path:
    """Return where the token lies."""
    return Path(state_dir) / TOKEN_FILE


def _loop_time() -> float:
    return asyncio.get_running_loop().time()
