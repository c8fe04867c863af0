"""
Reading a multipart body as it comes: fields into memory, files straight to where they are kept.

Nothing is spooled twice, and a file that is too large is noticed while it arrives. What is begun and not finished is
taken back, however the reading ends.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from launcher.errors import TooLarge
from runcomfy.domain.exceptions import BadInput, foreign_text

FIELDS_MOST: Final = 100
FILES_MOST: Final = 64
NAME_MOST: Final = 200
HEADERS_MOST: Final = 8 * 1024


class Sink(Protocol):
    """Takes a file as it arrives."""

    async def write(self, data: bytes) -> None:
        """Take the next bytes. Raises TooLarge, LocalError."""
        ...

    async def abort(self) -> None:
        """Keep nothing of it. Harmless when repeated."""
        ...


OpenSink = Callable[[str, str], Awaitable[Sink]]
"""(field name, file name) -> where the file goes."""


@dataclass(slots=True)
class Form:
    """What a multipart body held."""

    fields: dict[str, str] = field(default_factory=dict)
    files: list[tuple[str, Sink]] = field(default_factory=list)
    """(field name, file), whole."""

    async def abort(self) -> None:
        """Keep none of the files."""
        for _, sink in self.files:
            await sink.abort()


@dataclass(slots=True)
class _Part:
    headers: dict[bytes, bytes] = field(default_factory=dict)
    name: str = ""
    file_name: str | None = None
    sink: Sink | None = None
    value: bytearray = field(default_factory=bytearray)


class _Reader:
    """Turns the parser's callbacks into steps that may wait."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, bytes]] = []
        self.whole = False
        self._name, self._value, self._size = b"", b"", 0
        self.headers: list[dict[bytes, bytes]] = []

    def callbacks(self) -> dict[str, Callable[..., None]]:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_name,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": lambda: self.steps.append(("head", b"")),
            "on_part_data": lambda data, start, end: self.steps.append(("data", data[start:end])),
            "on_part_end": lambda: self.steps.append(("end", b"")),
            "on_end": self._end,
        }

    def _begin(self) -> None:
        self.headers.append({})
        self._size = 0

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]
        self._count(end - start)

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]
        self._count(end - start)

    def _count(self, size: int) -> None:
        self._size += size
        if self._size > HEADERS_MOST:
            raise _unreadable("a part's headers are too long")

    def _header_end(self) -> None:
        self.headers[-1][self._name.lower()] = self._value
        self._name, self._value = b"", b""

    def _end(self) -> None:
        self.whole = True


async def read_form(request: Request, open_sink: OpenSink, *, field_most: int) -> Form:
    """Read a whole multipart body. `field_most`: bytes that all fields together may have.

    Raises BadInput (it cannot be read, or is cut off), TooLarge, and what the sinks raise; no file is kept then.
    """
    _, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary")
    if not boundary:
        raise _unreadable("its Content-Type names no boundary")
    form, reader = Form(), _Reader()
    opened: list[Sink] = []
    part = _Part()
    size = 0
    try:
        parser = MultipartParser(boundary, reader.callbacks())  # type: ignore[arg-type]
        async for chunk in request.stream():
            parser.write(chunk)
            steps, reader.steps = reader.steps, []
            for step, data in steps:
                if step == "head":
                    part = _part(reader.headers.pop(0))
                    if part.file_name is not None:
                        if len(opened) >= FILES_MOST:
                            raise TooLarge(f"more than {FILES_MOST} files at once")
                        part.sink = await open_sink(part.name, part.file_name)
                        opened.append(part.sink)
                elif step == "data":
                    size += len(data) if part.sink is None else 0
                    if size > field_most:
                        raise TooLarge(f"the fields have more than {field_most} bytes together")
                    await _take(part, data)
                else:
                    _finish(form, part)
        parser.finalize()
        if not reader.whole:
            raise _unreadable("it ends before its last boundary")
    except BaseException as error:
        for sink in opened:
            await sink.abort()
        if isinstance(error, FormParserError):
            raise _unreadable(foreign_text(error)) from error
        if isinstance(error, ClientDisconnect):
            raise _unreadable("the client left before it was whole") from error
        raise
    return form


async def _take(part: _Part, data: bytes) -> None:
    if part.sink is not None:
        await part.sink.write(data)
    else:
        part.value += data


def _finish(form: Form, part: _Part) -> None:
    if part.sink is not None:
        form.files.append((part.name, part.sink))
        return
    if part.name in form.fields:
        raise BadInput(f"the field {foreign_text(part.name, 80)!r} is there twice", hint="send each field once")
    if len(form.fields) >= FIELDS_MOST:
        raise TooLarge(f"more than {FIELDS_MOST} fields")
    try:
        form.fields[part.name] = part.value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _unreadable(f"the field {foreign_text(part.name, 80)!r} is not UTF-8") from error


def _part(headers: dict[bytes, bytes]) -> _Part:
    _, options = parse_options_header(headers.get(b"content-disposition", b""))
    name = options.get(b"name")
    if name is None:
        raise _unreadable("a part has no name")
    text = name.decode("utf-8", "replace")
    if not 0 < len(text) <= NAME_MOST or not text.isprintable():
        raise _unreadable("a part has a name that cannot be used")
    file_name = options.get(b"filename")
    return _Part(headers, text, None if file_name is None else file_name.decode("utf-8", "replace"))


def _unreadable(why: str) -> BadInput:
    return BadInput(f"the multipart body cannot be read: {why}", hint="send multipart/form-data as RFC 7578 has it")
