"""
Texts that must not be shown: tokens, and the address of a rented machine, which needs no token to be used.

Both types print as stars wherever Python prints values (repr, str, format, logging, tracebacks with locals).
`reveal()` is the only way out, so that a search for it finds every place where a secret leaves.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import urlsplit

_LOOPBACK = re.compile(r"^(localhost|127(\.\d{1,3}){3}|\[?::1\]?)$")


def is_loopback(host: str) -> bool:
    """Return whether `host` names this computer itself; nothing said to it travels."""
    return bool(_LOOPBACK.match(host))


@dataclass(frozen=True, slots=True)
class Secret:
    """A token. Compare and hash it like its text; it never prints."""

    _text: str = field(repr=False)

    def reveal(self) -> str:
        """Return the text itself; for the header it is sent in, and for nothing else."""
        return self._text

    def __bool__(self) -> bool:
        return bool(self._text)

    def __repr__(self) -> str:
        return "Secret('***')"

    def __str__(self) -> str:
        return "***"

    def __format__(self, spec: str) -> str:
        return format("***", spec)


@dataclass(frozen=True, slots=True)
class SecretUrl:
    """The address of a machine. RunComfy's machines ask for no token: who knows the address can use them."""

    _text: str = field(repr=False)

    def reveal(self) -> str:
        """Return the address without a trailing slash."""
        return self._text.rstrip("/")

    @property
    def masked(self) -> str:
        """The address without its secret first label, path and user part; loopback is shown as it is."""
        try:
            parts = urlsplit(self._text)
            host, port = parts.hostname or "", f":{parts.port}" if parts.port else ""
        except ValueError:  # not an address at all, such as one with port 99999
            return "***"
        if not host:
            return "***"
        if is_loopback(host):
            return f"{parts.scheme}://{host}{port}"
        label, _, rest = host.partition(".")
        tail = label.rpartition("-")[2] if "-" in label else ""
        shown = f"***-{tail}" if tail else "***"
        return f"{parts.scheme}://{shown}.{rest}{port}" if rest else f"{parts.scheme}://{shown}{port}"

    def __repr__(self) -> str:
        return f"SecretUrl('{self.masked}')"

    def __str__(self) -> str:
        return self.masked

    def __format__(self, spec: str) -> str:
        return format(self.masked, spec)
