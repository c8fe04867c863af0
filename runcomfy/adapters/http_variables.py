"""
The variables of the HTTP API and the page.

What opens a door (the address listened on, names that are let in, private addresses, who is told of jobs) counts from
the environment only: a credentials file that lies in a foreign folder must not open anything.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Final

from runcomfy.adapters.setting_kinds import (
    BYTES,
    DURATION,
    SWITCH,
    Kind,
    Variable,
    number,
    refuse,
    several,
    shown,
    text_of,
    web_address,
)

_HOST_NAME: Final = re.compile(r"(?=.{1,253}\Z)[a-z0-9_]([a-z0-9_-]{0,62})(\.[a-z0-9_]([a-z0-9_-]{0,62}))*\.?")


def _host(value: object) -> str:
    """Return a host name or address, in lower case, without brackets."""
    text = str(value).strip().lower()
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    try:
        return str(ipaddress.ip_address(bare))
    except ValueError:
        if bare == text and _HOST_NAME.fullmatch(text):
            return text.rstrip(".")
    raise refuse(f"{shown(value)} is neither the name of a host nor an address") from None


def _hosts(value: object) -> tuple[str, ...]:
    return several(value, _host, "host")


def _webhook(value: object) -> str:
    """Return an address that is told of every job. It may hold a secret, so no error repeats it."""
    text = str(value).strip()
    parts = web_address(text)
    if parts.username is not None or parts.password is not None:
        raise refuse("has a user name or password inside")
    if any(c.isspace() or not c.isprintable() for c in text):
        raise refuse("has characters inside that no address has")
    return text


HOST: Final = text_of("host", "write 127.0.0.1, or the name or address to listen on", _host, place=True)
HOSTS: Final = text_of("host names", "write names with commas between them", _hosts, into=tuple[str, ...], place=True)
OPENING: Final = Kind(SWITCH.annotation, SWITCH.unit, SWITCH.hint, place=True)
WEBHOOK: Final = text_of("address", "write an address that begins with https://", _webhook, secret=True, place=True)

HTTP_VARIABLES: Final = (
    Variable(
        "RUNCOMFY_HTTP_HOST",
        HOST,
        "http.host",
        "Where the HTTP API listens; anywhere but on loopback every request needs the token.",
    ),
    Variable("RUNCOMFY_HTTP_PORT", number(0, 65535, "port"), "http.port", "Its port; 0 takes any that is free."),
    Variable(
        "RUNCOMFY_HTTP_CONJURE_OPEN",
        OPENING,
        "http.conjure_open",
        "Whether CONJURE's own endpoints answer on loopback without the token.",
    ),
    Variable(
        "RUNCOMFY_HTTP_CONJURE_ANYWHERE",
        OPENING,
        "http.conjure_anywhere",
        "Whether requests without the token may name pictures and meshes outside of CONJURE's folder.",
    ),
    Variable(
        "RUNCOMFY_HTTP_ALLOWED_HOSTS",
        HOSTS,
        "http.allowed_hosts",
        "Names, with commas between them, that a request's Host may have beside those of loopback.",
    ),
    Variable("RUNCOMFY_HTTP_MAX_BODY", BYTES, "http.max_body_bytes", "The largest request without files."),
    Variable(
        "RUNCOMFY_HTTP_MAX_UPLOAD", BYTES, "http.max_upload_bytes", "The largest file that is sent in or fetched."
    ),
    Variable(
        "RUNCOMFY_HTTP_MAX_WAITING",
        number(1, 10_000_000, "jobs"),
        "http.max_waiting",
        "How many jobs of one client may wait at once.",
    ),
    Variable(
        "RUNCOMFY_HTTP_MAX_PER_MINUTE",
        number(1, 1_000_000, "jobs"),
        "http.max_per_minute",
        "How many jobs one client may put in per minute.",
    ),
    Variable("RUNCOMFY_HTTP_SESSION", DURATION, "http.session", "How long the page stays logged in."),
    Variable(
        "RUNCOMFY_HTTP_STALLED",
        DURATION,
        "http.stalled",
        "How long a client may take nothing of a file or another answer before it is given up.",
    ),
    Variable(
        "RUNCOMFY_HTTP_ALLOW_PRIVATE",
        OPENING,
        "http.allow_private",
        "Whether webhooks and the addresses of pictures may point at this computer or a private network.",
    ),
    Variable("RUNCOMFY_WEBHOOK_URL", WEBHOOK, "http.webhook_url", "An address that is told of the end of every job."),
)
