"""
Which addresses this server may be sent to by somebody else's words: public ones, and no others.

Rule 1: a name is resolved once, by `PublicResolver`, and the connection goes to the addresses that were looked at. A
        second question could be answered differently (DNS rebinding).
Rule 2: one address that is not public is enough to refuse a name.
Rule 3: what is not surely public is not public. In IPv6 that is all but 2000::/3, and none of the ranges in it that
        carry an IPv4 address inside.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from runcomfy.domain.exceptions import AddressRefused, foreign_text
from runcomfy.domain.settings import HttpSettings

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Host and port -> addresses. Raises OSError."""
IsPublic = Callable[[Address], bool]

_LONGEST: Final = 2048

_NOT_PUBLIC_4: Final = tuple(
    map(
        ipaddress.IPv4Network,
        (
            "0.0.0.0/8",
            "10.0.0.0/8",
            "100.64.0.0/10",
            "127.0.0.0/8",
            "169.254.0.0/16",
            "172.16.0.0/12",
            "192.0.0.0/24",
            "192.0.2.0/24",
            "192.31.196.0/24",
            "192.52.193.0/24",
            "192.88.99.0/24",
            "192.168.0.0/16",
            "192.175.48.0/24",
            "198.18.0.0/15",
            "198.51.100.0/24",
            "203.0.113.0/24",
            "224.0.0.0/3",
        ),
    )
)
"""IANA's registry of special addresses. Python's `is_global` reads it, but differently from version to version."""
_PUBLIC_6: Final = ipaddress.IPv6Network("2000::/3")
_NOT_PUBLIC_6: Final = tuple(
    map(
        ipaddress.IPv6Network,
        (
            "2001::/23",  # Teredo (an IPv4 address inside), ORCHID, benchmarks
            "2001:db8::/32",
            "2002::/16",  # 6to4: an IPv4 address inside
            "3fff::/20",
        ),
    )
)


def is_public(address: Address) -> bool:
    """Whether an address is one of the public internet, and holds no other address inside."""
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in _NOT_PUBLIC_4)
    return (
        address in _PUBLIC_6 and address.scope_id is None and not any(address in network for network in _NOT_PUBLIC_6)
    )


def never(address: Address) -> bool:
    """Whether nothing can be sent there, even where private addresses are allowed."""
    return address.is_unspecified or address.is_multicast


def checked_url(text: str, *, allow_private: bool, public: IsPublic = is_public) -> URL:
    """Return an address that may be used, as far as can be told without resolving its name.

    Raises AddressRefused; the message repeats no more than the host, for the rest may hold a secret.
    """
    refused = AddressRefused(
        "the address cannot be used: it must begin with https:// or http://, name a host, and hold no password",
        hint="give an address such as https://example.org/picture.png",
    )
    if len(text) > _LONGEST or not text.isprintable() or re.search(r"[\s\\]", text):
        raise refused
    try:
        url = URL(text)
        host, _ = url.raw_host, url.port
    except ValueError:
        raise refused from None
    if url.scheme not in ("http", "https") or not host or url.user is not None or url.password is not None:
        raise refused
    try:
        host.encode("idna")  # an empty label, or one of more than 63 characters: no resolver takes it
    except UnicodeError:
        raise refused from None
    if allow_private:
        return url
    name = host.lower().rstrip(".")
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        # 127.1, 0x7f.1, 2130706433: a C library takes them for addresses, so they are none that a person means.
        odd = re.fullmatch(r"(0x[0-9a-f]*|[0-9]+)", name.rpartition(".")[2]) is not None
        local = name == "localhost" or name.endswith((".localhost", ".local", ".internal", ".home.arpa"))
        if odd or local or "%" in name:
            raise not_public(host) from None
    else:
        if not public(address):
            raise not_public(host)
    return url


def check_webhook_url(url: str, http: HttpSettings) -> str:
    """Return the address that a job's end is told to, or raise AddressRefused. Its name is looked up only later."""
    return str(checked_url(url, allow_private=http.allow_private))


def not_public(host: str) -> AddressRefused:
    """Return the error of a host that is not of the public internet."""
    return AddressRefused(
        f"{foreign_text(host, 80)} is not an address of the public internet",
        hint="set RUNCOMFY_HTTP_ALLOW_PRIVATE=true if addresses of this computer and its networks may be used",
        details={"host": foreign_text(host, 80)},
    )


class PublicResolver(AbstractResolver):
    """Resolves names for one connector; refuses what is not public. What it returns is what is connected to."""

    def __init__(self, *, allow_private: bool, resolve: Resolve | None = None, public: IsPublic = is_public) -> None:
        self._allow_private = allow_private
        self._resolve = resolve or system_resolve
        self._public = public

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Return the addresses of a name. Raises AddressRefused, OSError."""
        found = []
        for text in await self._resolve(host, port):
            address = ipaddress.ip_address(text)
            if never(address) or not (self._allow_private or self._public(address)):
                raise not_public(host)
            kind = socket.AF_INET if address.version == 4 else socket.AF_INET6
            if family in (socket.AF_UNSPEC, kind):
                flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
                found.append(ResolveResult(hostname=host, host=text, port=port, family=kind, proto=0, flags=flags))
        if not found:
            raise OSError(f"no address for {foreign_text(host, 80)}")
        return found

    async def close(self) -> None:
        """Nothing is held."""


async def system_resolve(host: str, port: int) -> Sequence[str]:
    """Return what the system says, each address once. Raises OSError."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError as error:
        raise OSError(f"no name that can be looked up: {foreign_text(host, 80)}") from error
    return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))


def outbound_session(
    *, allow_private: bool, timeout: aiohttp.ClientTimeout, resolve: Resolve | None = None, public: IsPublic = is_public
) -> aiohttp.ClientSession:
    """Return a session that reaches public addresses only, remembers nothing and uses nothing of the environment.

    No cookies, no proxies, no netrc; nothing is unpacked. The caller passes `allow_redirects=False` and looks at every
    address itself with `checked_url`: a connector does not resolve literal addresses.
    """
    resolver = PublicResolver(allow_private=allow_private, resolve=resolve, public=public)
    connector = aiohttp.TCPConnector(resolver=resolver, use_dns_cache=False, force_close=True, limit=0)
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
        auto_decompress=False,
        timeout=timeout,
        headers={"Accept-Encoding": "identity", "User-Agent": "runcomfy-orchestrator"},
    )
