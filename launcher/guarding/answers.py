"""The headers that every answer carries, and the answers the guard gives itself."""

from __future__ import annotations

import json
from collections.abc import Iterable, MutableMapping
from html import escape
from typing import Any, Final

from launcher.guarding.rules import Refusal

PAGE_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self'; "
    "font-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""For the page: nothing from elsewhere, and no script or style but its own files. Pictures that were dropped on it, or
that lie inside a mesh, have addresses that begin with blob: or data:."""

DATA_POLICY: Final = "default-src 'none'; sandbox; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
"""For everything else: shown by itself in a tab, it may do nothing."""

_ALWAYS: Final = (
    (b"x-frame-options", b"DENY"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), microphone=(), geolocation=()"),
)

Headers = list[tuple[bytes, bytes]]


def secured(headers: Iterable[tuple[bytes, bytes]], path: str) -> Headers:
    """Return an answer's headers with those that keep it safe; nothing is opened to other origins."""
    of_page = path == "/" or path.startswith("/assets/")
    fixed = {name for name, _ in _ALWAYS}
    kept = [
        (name, value)
        for name, value in ((name.lower(), value) for name, value in headers)
        if name not in fixed and not name.startswith(b"access-control-") and name != b"server"
    ]
    there = {name for name, _ in kept}
    kept += _ALWAYS
    if b"content-security-policy" not in there:
        kept.append((b"content-security-policy", (PAGE_POLICY if of_page else DATA_POLICY).encode()))
    if b"cache-control" not in there:
        kept.append((b"cache-control", b"no-cache" if of_page else b"no-store"))
    return kept


def refusal_messages(refusal: Refusal, *, extra: Iterable[tuple[bytes, bytes]] = ()) -> list[MutableMapping[str, Any]]:
    """Return the two ASGI messages of a refusal, in the form that every error of the API has."""
    error = {"code": refusal.code, "message": refusal.message, "hint": refusal.hint, "details": {}}
    body = json.dumps({"detail": refusal.message, "error": error}).encode()
    headers = [(b"content-type", b"application/json"), *extra]
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    return _messages(refusal.status, headers, body)


def proof_messages(proof: str) -> list[MutableMapping[str, Any]]:
    """Return the messages that prove who this is."""
    return _messages(200, [(b"content-type", b"application/json")], json.dumps({"proof": proof}).encode())


def redirect_messages(location: str, cookie: str | None) -> list[MutableMapping[str, Any]]:
    """Return the messages that send a browser elsewhere on this server, with a cookie."""
    headers = [(b"location", location.encode())]
    if cookie is not None:
        headers.append((b"set-cookie", cookie.encode()))
    return _messages(303, headers, b"")


def words_messages(status: int, title: str, words: str) -> list[MutableMapping[str, Any]]:
    """Return the messages of a small page that says something to a person."""
    body = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        f'<meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
        f"<h1>{escape(title)}</h1><p>{escape(words)}</p></html>"
    ).encode()
    return _messages(status, [(b"content-type", b"text/html; charset=utf-8")], body)


def _messages(status: int, headers: Headers, body: bytes) -> list[MutableMapping[str, Any]]:
    length = (b"content-length", str(len(body)).encode())
    return [
        {"type": "http.response.start", "status": status, "headers": [*headers, length]},
        {"type": "http.response.body", "body": body},
    ]
