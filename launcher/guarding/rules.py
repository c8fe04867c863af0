"""
What a request must look like before anything of ours reads it, as functions of its head alone.

A browser sends requests for every page that is open in it, also to this computer. What tells them apart: `Host` (a page
that rebinds its own name to 127.0.0.1 still says its own name), `Origin` and `Sec-Fetch-Site` (a page cannot forge
them), and the type of the body (what a page may send elsewhere without being asked is a form or plain text).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from launcher.guarding.proving import PROOF_PATH
from runcomfy.domain.secret import is_loopback

SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
MOST_HEADERS: Final = 100
MOST_HEADER_BYTES: Final = 32 * 1024
LONGEST_TARGET: Final = 8 * 1024
"""Of path and query; what a page needs is far shorter."""
JSON: Final = "application/json"
FILES: Final = "multipart/form-data"

_SIMPLE: Final = frozenset({"application/x-www-form-urlencoded", "text/plain", FILES})
"""Types that a page may send anywhere without being asked (Fetch Standard, CORS-safelisted request headers)."""

_CONJURE: Final = (
    ("GET", re.compile(r"/health|/mode|/state|/workflow/progress(/[^/]{1,200})?")),
    (
        "POST",
        re.compile(
            r"/shutdown|/flux/generate|/flux/depth|/partpacker/generate_3d"
            r"|/(?:serverless|local_comfyui)/flux_mesh_unified"
            r"|/blender/(?:render_gesture_camera|import_mesh)"
            r"|/state/update|/state/set/[^/]{1,200}|/process_conversation|/execute_instruction"
        ),
    ),
)
"""The endpoints that CONJURE's own programs call; they send no token."""

WILDCARDS: Final = frozenset({"0.0.0.0", "::", ""})  # noqa: S104 - so that nothing is taken for one
"""What is bound to mean every address; no request is for them."""

_FORWARDED: Final = ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-real-ip")


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not let in."""

    status: int
    code: str
    message: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Head:
    """What comes before a request's body."""

    method: str
    path: str
    scheme: str
    headers: tuple[tuple[str, str], ...]
    """Names in lower case."""
    server: tuple[str, int] | None = None
    """The address and port that the connection arrived at."""
    peer: str | None = None
    """The address it came from."""

    def all(self, name: str) -> list[str]:
        """Return every value of a header."""
        return [value for key, value in self.headers if key == name]

    def one(self, name: str) -> str | None:
        """Return a header's value; None if it is missing, or there several times."""
        found = self.all(name)
        return found[0] if len(found) == 1 else None


def is_conjures(head: Head) -> bool:
    """Whether this is one of CONJURE's own endpoints."""
    method = "GET" if head.method == "HEAD" else head.method
    return any(method == m and path.fullmatch(head.path) for m, path in _CONJURE)


def is_public(head: Head) -> bool:
    """Whether this is the page itself, which holds nothing but the program, or a question who this is."""
    if head.path == PROOF_PATH:
        return head.method == "GET"
    return head.method in ("GET", "HEAD") and (head.path == "/" or head.path.startswith("/assets/"))


# --- where it came from -----------------------------------------------------------------------------------


def split_host(text: str) -> tuple[str, int | None] | None:
    """Return name (in lower case, an address without brackets) and port of a `Host` header; None if it is none."""
    match = re.fullmatch(r"(\[[0-9a-f:.]{2,45}\]|[a-z0-9_.-]{1,253})(?::([0-9]{1,5}))?", text.lower())
    if match is None:
        return None
    return match[1].strip("[]").removesuffix("."), int(match[2]) if match[2] else None


def names_loopback(host: str) -> bool:
    """Whether a host's name or address is this computer's own, whoever resolves it."""
    return is_loopback(host)


def peer_is_loopback(peer: str | None) -> bool:
    """Whether a connection came from this computer."""
    if peer is None:
        return False
    try:
        address = ipaddress.ip_address(peer)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def host_refused(head: Head, *, allowed: Iterable[str], bound_host: str) -> Refusal | None:
    """Return why a request's `Host` is not one of ours."""
    text = head.one("host")
    found = split_host(text) if text is not None else None
    if found is None:
        return Refusal(400, "bad-request", "the request has no Host header, or one that cannot be read")
    name, port = found
    if name in allowed:
        return None
    server, served_port = head.server or ("", None)
    default = 443 if head.scheme == "https" else 80
    # Beside loopback: the name that was bound to, and the very address that the connection arrived at.
    own = names_loopback(name) or name in {bound_host, server} - WILDCARDS
    if own and (port or default) == (served_port or default):
        return None
    return Refusal(
        403,
        "foreign-host",
        "the request is for another host",
        hint="use the address that `comfyctl serve` printed, or add the name to RUNCOMFY_HTTP_ALLOWED_HOSTS",
    )


def origin_refused(head: Head, *, allowed: Iterable[str]) -> Refusal | None:
    """Return why a request is taken to come from a foreign page."""
    refusal = Refusal(403, "foreign-origin", "the request comes from another page")
    origins = head.all("origin")
    if len(origins) > 1:
        return refusal
    if origins:
        try:
            origin = urlsplit(origins[0])
            where = split_host(origin.netloc)
        except ValueError:
            return refusal
        host = split_host(head.one("host") or "")
        if where is None or host is None or origin.scheme not in ("http", "https") or where[0] != host[0]:
            return refusal
        # Before an allowed name there may be a proxy that ends TLS: then the browser's scheme is not ours.
        if origin.scheme != head.scheme and host[0] not in allowed:
            return refusal
        default = 443 if origin.scheme == "https" else 80
        if (where[1] or default) != (host[1] or default):
            return refusal
    site = head.one("sec-fetch-site")
    if site is not None and site not in ("same-origin", "none") and not _is_navigation(head):
        return refusal
    return None


def _is_navigation(head: Head) -> bool:
    """Whether a person followed a link to here; the page they came from does not see the answer."""
    return (
        head.method == "GET" and head.one("sec-fetch-mode") == "navigate" and head.one("sec-fetch-dest") == "document"
    )


def surely_same_origin(head: Head) -> bool:
    """Whether the browser says that our own page sent this (`origin_refused` has looked at what `Origin` holds)."""
    return bool(head.all("origin")) or head.one("sec-fetch-site") == "same-origin"


def conjure_may(head: Head) -> bool:
    """Whether a request can be CONJURE's: from this computer, to this computer, not by a page, and plain JSON."""
    host = split_host(head.one("host") or "")
    if host is None or not names_loopback(host[0]) or not peer_is_loopback(head.peer):
        return False
    if any(head.all(name) for name in _FORWARDED):  # a proxy on this computer speaks for somebody else
        return False
    if head.one("sec-fetch-site") not in (None, "same-origin", "none"):
        return False
    return head.method in SAFE_METHODS or content_type(head) == JSON or _is_empty(head)


# --- what it carries --------------------------------------------------------------------------------------


def content_type(head: Head) -> str:
    """Return the type of the body without parameters, in lower case; empty if it is not said."""
    return ",".join(head.all("content-type")).partition(";")[0].strip().lower()


def has_body(head: Head) -> bool:
    """Whether a body is announced."""
    return bool(head.all("transfer-encoding")) or head.all("content-length") not in ([], ["0"])


def _is_empty(head: Head) -> bool:
    """Whether there is no body, and no page could have sent the request as a form without fields."""
    return not has_body(head) and content_type(head) not in _SIMPLE


def body_refused(head: Head) -> Refusal | None:
    """Return why a body is of no type that is taken: only JSON and multipart are, which no plain form can send."""
    if head.method in SAFE_METHODS:
        return None
    if content_type(head) in (JSON, FILES) or _is_empty(head):
        return None
    return Refusal(
        415,
        "content-type-refused",
        "a request that changes something is JSON or multipart",
        hint="send Content-Type: application/json",
    )


def size_refused(head: Head) -> Refusal | None:
    """Return why the head is larger than any of ours needs to be."""
    if len(head.headers) > MOST_HEADERS or sum(len(k) + len(v) for k, v in head.headers) > MOST_HEADER_BYTES:
        return Refusal(431, "headers-too-large", "the request's headers are too many or too long")
    return None


def declared_length(head: Head) -> int | None:
    """Return how long the body says it is. Raises ValueError for several lengths, or one that is no number."""
    found = head.all("content-length")
    if not found:
        return None
    if len(set(found)) > 1 or not re.fullmatch(r"[0-9]{1,18}", found[0]):
        raise ValueError("Content-Length")
    return int(found[0])


def bearer(head: Head) -> str | None:
    """Return the token that the request carries; empty if the header holds no such thing, None if there is none."""
    found = head.all("authorization")
    if not found:
        return None
    scheme, _, token = found[0].partition(" ")
    return token.strip() if len(found) == 1 and scheme.lower() == "bearer" else ""


def cookie(head: Head, name: str) -> str | None:
    """Return a cookie's value; None if there is none, or several of that name."""
    pairs = [part.strip().partition("=") for value in head.all("cookie") for part in value.split(";")]
    found = [value for key, _, value in pairs if key == name]
    return found[0] if len(found) == 1 else None
