"""
A transport that gives the answers of a script: the clients' own code runs from aiohttp's surface on.

An input is a text: what is asked on its first line, then answers, one for each request, the last one again and again.

    list_machines
    200 Content-Type: application/json
    [{"server_id": "a"}]
    %%
    503 Retry-After: 5|Date: Sun, 22 Nov 2026 12:00:00 GMT
    busy

What stands at a separator cannot be in a body; a body that is not text is no trouble.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from benchmarks.fuzzing.target import TOKEN, Broken, demand, without_secrets

SEPARATOR: Final = b"\n%%\n"
_BREAKS: Final = re.compile(r"[\r\n\0]")
MOST_REQUESTS: Final = 400
"""A client that asks more often for one call would ask for ever."""


class NoAnswer(aiohttp.ServerDisconnectedError):
    """What a client sees of a connection that breaks."""


@dataclass(frozen=True, slots=True)
class Script:
    """One input, read."""

    ask: str
    answers: Sequence[Scripted]

    @classmethod
    def read(cls, data: bytes) -> Script:
        """Read an input; every input is one."""
        first, _, rest = data.partition(b"\n")
        parts = rest.split(SEPARATOR)[:16]
        return cls(first[:40].decode("latin-1").strip(), [Scripted.read(part) for part in parts])


@dataclass(frozen=True, slots=True)
class Scripted:
    """One answer. Status 0: the connection breaks; body cut behind a length that the headers promise."""

    status: int
    headers: CIMultiDictProxy[str]
    body: bytes

    @classmethod
    def read(cls, part: bytes) -> Scripted:
        """Read one answer; what is none is a body with status 200."""
        head, _, body = part.partition(b"\n")
        words = head.decode("utf-8", "surrogateescape")
        number, _, rest = words.partition(" ")
        if not (len(number) == 3 and number.isascii() and number.isdigit()):
            return cls(200, CIMultiDictProxy(CIMultiDict()), part)
        headers = CIMultiDict[str]()
        for line in rest.split("|"):
            name, colon, value = line.partition(":")
            if colon and name.strip() and not any(c in value for c in "\r\n\0"):
                headers.add(name.strip(), value.strip())
        return cls(int(number), CIMultiDictProxy(headers), body)


def script(ask: str, *answers: tuple[int, str, bytes]) -> bytes:
    """Write an input: what is asked, and (status, headers, body) for each answer."""
    parts = [f"{status:03} {headers}".rstrip().encode() + b"\n" + body for status, headers, body in answers]
    return ask.encode() + b"\n" + SEPARATOR.join(parts)


class _Content:
    def __init__(self, answer: Scripted) -> None:
        self._answer = answer

    def iter_any(self) -> _Parts:
        return self.iter_chunked(max(1, len(self._answer.body) // 2))

    def iter_chunked(self, size: int) -> _Parts:
        body = self._answer.body
        length = self._answer.headers.get("Content-Length", "")
        cut = length.isascii() and length.isdigit() and len(length) < 18 and int(length) > len(body)
        return _Parts([body[start : start + size] for start in range(0, len(body), size)], cut=cut)


class _Parts:
    """A body piece by piece; no generator, for nobody may be left to close it."""

    def __init__(self, parts: list[bytes], *, cut: bool) -> None:
        self._parts, self._cut = iter(parts), cut

    def __aiter__(self) -> _Parts:
        return self

    async def __anext__(self) -> bytes:
        part = next(self._parts, None)
        if part is not None:
            return part
        if self._cut:
            raise aiohttp.ClientPayloadError("not enough data")
        raise StopAsyncIteration


class _Response:
    """What the clients use of aiohttp's response."""

    def __init__(self, answer: Scripted) -> None:
        self.status, self.headers, self.content = answer.status, answer.headers, _Content(answer)
        length = answer.headers.get("Content-Length", "")
        self.content_length = int(length) if length.isascii() and length.isdigit() and len(length) < 18 else None

    def close(self) -> None:
        """Nothing is held."""


class _Request:
    def __init__(self, session: ScriptedSession, method: str) -> None:
        self._session, self._method = session, method

    async def __aenter__(self) -> _Response:
        await asyncio.sleep(0)
        answer = self._session.next_answer()
        if answer.status < 100:
            raise NoAnswer("the connection broke")
        if self._method == "HEAD":
            answer = Scripted(answer.status, answer.headers, b"")
        return _Response(answer)

    async def __aexit__(self, *_: object) -> None:
        return None


@dataclass(slots=True)
class ScriptedSession:
    """Stands where an `aiohttp.ClientSession` is passed in."""

    answers: Sequence[Scripted]
    home: str
    """The only host that a token may be sent to."""
    asked: list[str] = field(default_factory=list)
    closed: bool = False

    def next_answer(self) -> Scripted:
        """Return the answer to the next request."""
        if len(self.asked) > MOST_REQUESTS:
            raise Broken(f"{MOST_REQUESTS} requests for one call")
        return self.answers[min(len(self.asked), len(self.answers)) - 1]

    def request(self, method: str, url: Any, *, headers: Any = None, **options: Any) -> _Request:
        """Take a request."""
        target = URL(url)
        self.asked.append(f"{method} {target}")
        told = repr(dict(headers or {}))
        if TOKEN in told:
            demand(target.host == self.home, f"the token was sent to {target.host}")
        else:
            without_secrets(told, "the headers")
        demand(options.get("allow_redirects") is False, "redirects would be followed")
        broken = any(_BREAKS.search(f"{name}{value}") for name, value in dict(headers or {}).items())
        demand(not broken, "a header can be broken out of")
        return _Request(self, method)

    def get(self, url: Any, **options: Any) -> _Request:
        """Take a GET."""
        return self.request("GET", url, **options)

    async def close(self) -> None:
        """Nothing is held."""
        self.closed = True
