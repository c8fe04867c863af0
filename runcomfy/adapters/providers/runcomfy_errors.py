"""
What RunComfy's refusals mean, and what of them may be shown.

No document lists the errors of the Server API, so the status decides first, then a few words that leave no doubt, and
the provider's own text goes into the message. Pure: the client fetches, this module judges.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import quote, urlsplit

from runcomfy.domain.exceptions import (
    AccessDenied,
    AnswerUnreadable,
    AuthRejected,
    NoCapacity,
    OutOfCredit,
    ProviderBusy,
    ProviderError,
    RateLimited,
    RunComfyError,
    WrongUrl,
    foreign_text,
)
from runcomfy.domain.secret import Secret

_GATEWAY: Final = ("missing authentication token", "invalid key=value pair")
"""The AWS gateway in front of the API answers 403 with one of these to a path it does not know."""

_NO_CREDIT: Final = re.compile(
    r"insufficient[\s_-]*(funds?|balance|credits?)|out of (funds?|credits?|money)|payment required|\bquota\b"
    r"|not enough (funds?|balance|credits?|money)|\b(no|low|negative|zero) (balance|credits?)\b|\bbalance\b",
    re.IGNORECASE,
)
_NO_CAPACITY: Final = re.compile(
    r"\bcapacity\b|InsufficientInstanceCapacity|out of stock|no stock|sold out"
    r"|\b(no|not enough|insufficient)\b[^.]{0,40}\b(gpus?|machines?|servers?|instances?|resources)\b"
    r"|\bno\b[^.]{0,40}\bavailable\b",
    re.IGNORECASE,
)
_WORDS: Final = ("message", "Message", "error_message", "error", "detail", "details", "errors", "reason")
_MACHINE_ADDRESS: Final = re.compile(r"(https?:\\?/\\?/)?[\w.-]*-comfyui\.[^\s\"'<>\\,]+", re.IGNORECASE)
_ADDRESS_FIELD: Final = re.compile(r"(\"main_service_url\"\s*:\s*\")[^\"]*", re.IGNORECASE)
_READ_FOR_WORDS: Final = 8192
_LOOKED_THROUGH: Final = 2048
"""Of a text that is shown; more than is left of it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer, read whole."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_html(self) -> bool:
        """Whether it is a page: RunComfy's API sends none, but proxies and CDNs do."""
        return self.body[:512].lstrip().lower().startswith((b"<!doctype", b"<html"))


class Failure(Exception):
    """One attempt failed.

    Attributes:
        error: what the caller gets to see.
        again: whether another attempt may go better.
        arrived: whether the request may have reached RunComfy and had its effect.
        other_token: whether the other token is worth trying.
    """

    def __init__(self, error: RunComfyError, *, again: bool, arrived: bool, other_token: bool = False) -> None:
        super().__init__(error.message)
        self.error, self.again, self.arrived, self.other_token = error, again, arrived, other_token


class Veil:
    """Takes out of foreign text what must not be shown: tokens, the user id, machines' addresses."""

    def __init__(self, tokens: Iterable[Secret], user_id: str) -> None:
        texts = {token.reveal() for token in tokens} | {user_id}
        hidden = {form for text in texts if text for form in (text, quote(text, safe=""), json.dumps(text)[1:-1])}
        self._hidden = sorted(hidden, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        """Return the text, safe to show: one line, cut, with stars where a secret was."""
        # What cannot be seen goes first: a secret with an invisible character in it would be whole again without it.
        text = foreign_text(text[:_LOOKED_THROUGH], _LOOKED_THROUGH)
        for secret in self._hidden:
            text = text.replace(secret, "***")
        text = _ADDRESS_FIELD.sub(r"\1***", text)
        return foreign_text(_MACHINE_ADDRESS.sub("***-comfyui", text))

    def __repr__(self) -> str:
        return "Veil(***)"


def words_of(answer: Answer) -> str:
    """Return what the answer says in words, or its raw text."""
    text = answer.body[:_READ_FOR_WORDS].decode("utf-8", "replace")
    try:
        payload = json.loads(text)
    except (ValueError, RecursionError):
        return "" if answer.is_html else text
    return _find_words(payload) or text


def _find_words(payload: Any, depth: int = 0) -> str:
    if isinstance(payload, str):
        return payload
    if depth > 3:
        return ""
    if isinstance(payload, list):
        return "; ".join(filter(None, (_find_words(item, depth + 1) for item in payload[:3])))
    if isinstance(payload, dict):
        for name in _WORDS:
            if name in payload and (words := _find_words(payload[name], depth + 1)):
                return words
    return ""


def facts_of(answer: Answer, *, call: str, veil: Veil) -> dict[str, Any]:
    """Return what is kept of an answer for whoever looks into the matter: the raw status and the beginning."""
    body = veil(answer.body[:_READ_FOR_WORDS].decode("utf-8", "replace"))
    return {"call": call, "status": answer.status, "body": body}


def judge(answer: Answer, *, what: str, call: str, veil: Veil, launch: bool = False) -> Failure:
    """Return what an answer other than a success means.

    `what` is the call in words, `call` its method and path without ids; `veil` hides what must not be shown. With
    `launch` a server's error counts as a refusal if its words leave no doubt that nothing was started.
    """
    status, words = answer.status, words_of(answer)
    facts = facts_of(answer, call=call, veil=veil)
    said = f": {veil(words)}" if words.strip() else ""
    if 300 <= status < 400:
        return Failure(_redirect(answer, facts, veil), again=False, arrived=True)
    if status == 401:
        error: ProviderError = AuthRejected(
            f"RunComfy does not accept the token (HTTP 401){said}",
            hint="copy the token from RunComfy's profile page into RUNCOMFY_API_TOKEN; it may have been rotated",
            details=facts,
        )
        return Failure(error, again=False, arrived=False, other_token=True)
    if status == 429:
        error = RateLimited(
            "RunComfy says that the account sends too many requests (HTTP 429)",
            hint="about one request a second is allowed for all programs of the account together",
            details=facts,
        )
        return Failure(error, again=True, arrived=False)
    if status == 403 and any(text in words.lower() for text in _GATEWAY):
        return Failure(wrong_path(facts), again=False, arrived=False)
    plain = f"RunComfy refused to {what} (HTTP {status}){said}"
    in_words = bool(said) and not answer.is_html
    may_be_refusal = (400 <= status < 500 and status not in (408, 425)) or (launch and in_words)
    if may_be_refusal and (refusal := _refusal(status, words, plain, facts)):
        return Failure(refusal, again=False, arrived=False)
    if status >= 500 or status in (408, 425) or status < 300:
        error = ProviderBusy(
            f"RunComfy could not {what} now (HTTP {status}){said}",
            hint="this is RunComfy's trouble and usually passes; try again in a few minutes",
            details=facts,
        )
        return Failure(error, again=True, arrived=True)
    if status == 403:
        error = AccessDenied(
            plain,
            hint="check RUNCOMFY_USER_ID (it stands in the address of RunComfy's dashboard) and the account's plan",
            details=facts,
        )
        return Failure(error, again=False, arrived=False, other_token=True)
    return Failure(ProviderError(plain, details=facts), again=False, arrived=False)


def _redirect(answer: Answer, facts: Mapping[str, Any], veil: Veil) -> WrongUrl:
    try:
        target = urlsplit(answer.headers.get("Location", "")).hostname or "the same host"
    except ValueError:
        target = "an address that is none"
    return WrongUrl(
        f"a redirect to {veil(target)} answered instead of RunComfy's API (HTTP {answer.status})",
        hint="check RUNCOMFY_API_BASE_URL; redirects are not followed, because the token would travel along",
        details=facts,
    )


def _refusal(status: int, words: str, plain: str, facts: Mapping[str, Any]) -> ProviderError | None:
    if _NO_CAPACITY.search(words):
        return NoCapacity(plain, hint="try another machine type, or the same one later", details=facts)
    if status == 402 or _NO_CREDIT.search(words):
        return OutOfCredit(plain, hint="add credit to the account on RunComfy's billing page", details=facts)
    return None


def wrong_path(facts: Mapping[str, Any]) -> WrongUrl:
    """Say that the address is wrong, not the token, whatever the gateway's words suggest."""
    return WrongUrl(
        "RunComfy's gateway does not know this address; the token was not looked at",
        hint="check RUNCOMFY_API_BASE_URL: https://api.runcomfy.net or https://beta-api.runcomfy.net, without a path",
        details=facts,
    )


def unreadable(reason: object, *, what: str, facts: Mapping[str, Any]) -> AnswerUnreadable:
    """Say that an answer makes no sense."""
    return AnswerUnreadable(
        f"the answer to “{what}” is not what RunComfy's API sends: {reason}",
        hint="something else may answer in its place (a proxy, a network's login page); check RUNCOMFY_API_BASE_URL",
        details=facts,
    )
