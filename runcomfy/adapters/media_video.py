"""
Video containers: MP4 and its kin, WEBM and Matroska, walked box by box.

Nothing is decoded: a container is whole if its parts fill the file exactly, a track and its media data are there, and
the tables that find the samples point into the file. That is what a cut or mixed-up download breaks.
"""

from __future__ import annotations

import math
import struct
import sys
from array import array
from collections.abc import Iterator, Mapping
from typing import Any, Final

from runcomfy.adapters.media_source import CHUNK, Corrupt, Source

# --- MP4 (ISO/IEC 14496-12) --------------------------------------------------------------------------------

_DEEPEST: Final = 6
_TOP_BOXES: Final = frozenset({b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp", b"pnot"})


def is_mp4(head: bytes) -> bool:
    """Whether a file begins like MP4 or QuickTime (which may leave out its type box)."""
    return head[4:8] in _TOP_BOXES and b"\0" in head[:64]


def mp4_brand(head: bytes) -> str:
    """Return the file's main brand (`isom`, `qt  `, `M4A `, `avif`), empty if it does not say."""
    return head[8:12].decode("latin-1") if head[4:8] == b"ftyp" else ""


class _Mp4:
    def __init__(self, source: Source) -> None:
        self._source = source
        self.handlers: set[str] = set()
        self.details: dict[str, Any] = {}

    def boxes(self, start: int, end: int, *, top: bool = False) -> Iterator[tuple[bytes, int, int]]:
        """Yield (type, start of content, end) for each box between two offsets, which they must fill exactly."""
        offset = start
        while offset < end:
            if end - offset < 8:
                if not top and not any(self._source.at(offset, end - offset)):
                    return  # QuickTime ends some lists with four zero bytes
                raise Corrupt("it is cut off inside a header")
            size, kind = struct.unpack(">I4s", self._source.at(offset, 8))
            content = offset + 8
            if size == 1:
                (size,) = struct.unpack(">Q", self._source.at(content, 8))
                content += 8
            elif size == 0 and top:
                size = end - offset
            if size < content - offset or offset + size > end:
                raise Corrupt(
                    f"it is cut off or damaged: its part {_name(kind)} at byte {offset} does not fit the file"
                )
            yield kind, content, offset + size
            offset += size

    def check(self) -> None:
        tracks = media = 0
        for kind, start, end in self.boxes(0, self._source.size, top=True):
            if kind == b"moov":
                tracks += self._movie(start, end)
            elif kind == b"moof" or (kind == b"mdat" and end > start):
                media += 1
            elif not all(32 <= byte < 127 or byte == 0xA9 for byte in kind):
                raise Corrupt(f"it is damaged at byte {start - 8} (no part begins there)")
        if not tracks:
            raise Corrupt("the description of its tracks (moov) is missing: it was not written to its end, or cut off")
        if not media:
            raise Corrupt("it has no media data")

    def _movie(self, start: int, end: int) -> int:
        tracks = 0
        for kind, content, stop in self.boxes(start, end):
            if kind == b"mvhd":
                self._duration(content)
            elif kind == b"trak":
                tracks += 1
                self._inside(content, stop)
        return tracks

    def _duration(self, content: int) -> None:
        version = self._source.at(content, 1)[0]
        scale, length = struct.unpack(
            ">IQ" if version else ">II", self._source.at(content + (20 if version else 12), 12 if version else 8)
        )
        if scale and length not in {0, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF}:
            self.details["seconds"] = round(length / scale, 3)

    def _inside(self, start: int, end: int, depth: int = 0) -> None:
        """Walk down one track: mdia, minf, stbl."""
        if depth > _DEEPEST:
            raise Corrupt("its parts are nested absurdly deep")
        for kind, content, stop in self.boxes(start, end):
            if kind in {b"mdia", b"minf", b"stbl"}:
                self._inside(content, stop, depth + 1)
            elif kind == b"hdlr":
                self.handlers.add(self._source.at(content + 8, 4).decode("latin-1"))
            elif kind == b"tkhd":
                width, height = struct.unpack(">II", self._source.at(stop - 8, 8))
                if width and height:
                    self.details |= {"width": width >> 16, "height": height >> 16}
            elif kind == b"stsz":
                size, count = struct.unpack(">II", self._source.at(content + 4, 8))
                self._sizes(content + 12, stop, size, count)
            elif kind in {b"stco", b"co64"}:
                self._offsets(content + 8, stop, self._count(content + 4), "I" if kind == b"stco" else "Q")

    def _count(self, offset: int) -> int:
        return int.from_bytes(self._source.at(offset, 4), "big")

    def _table(self, start: int, stop: int, count: int, code: str) -> Iterator[array[int]]:
        size = 4 if code == "I" else 8
        if start + count * size > stop:
            raise Corrupt("a table of its samples is longer than the part it is in")
        for piece in self._source.pieces(start, count * size):
            values = array(code, piece)
            if sys.byteorder == "little":
                values.byteswap()
            yield values

    def _sizes(self, start: int, stop: int, size: int, count: int) -> None:
        total = size * count if size else sum(sum(values) for values in self._table(start, stop, count, "I"))
        if total > self._source.size:
            raise Corrupt("it is cut off: its samples are longer than the file")
        if count:
            self.details["samples"] = max(count, self.details.get("samples", 0))

    def _offsets(self, start: int, stop: int, count: int, code: str) -> None:
        for values in self._table(start, stop, count, code):
            if max(values) >= self._source.size:
                raise Corrupt("it is cut off: a sample lies behind the end of the file")


def _name(kind: bytes) -> str:
    return kind.decode("latin-1")


def check_mp4(source: Source) -> tuple[bool, Mapping[str, Any]]:
    """Check an MP4 or QuickTime file; return whether it has a picture track, and details. Raises Corrupt."""
    walk = _Mp4(source)
    walk.check()
    return "vide" in walk.handlers or not walk.handlers & {"soun"}, walk.details


# --- WEBM and Matroska (RFC 8794 EBML, RFC 9559) -----------------------------------------------------------

EBML: Final = b"\x1a\x45\xdf\xa3"
_DOC_TYPE: Final = 0x4282
_SEGMENT: Final = 0x18538067
_INFO: Final = 0x1549A966
_SCALE: Final = 0x2AD7B1
_DURATION: Final = 0x4489
_TRACKS: Final = 0x1654AE6B
_TRACK: Final = 0xAE
_TRACK_TYPE: Final = 0x83
_VIDEO: Final = 0xE0
_WIDTH: Final = 0xB0
_HEIGHT: Final = 0xBA
_CLUSTER: Final = 0x1F43B675
_BLOCKS: Final = frozenset({0xA3, 0xA0})
_IN_CLUSTER: Final = frozenset({0xE7, 0xA3, 0xA0, 0xAB, 0xA7, 0x5854, 0xEC, 0xBF, 0xAF})
_PICTURE_TRACK: Final = 1


class _Matroska:
    def __init__(self, source: Source) -> None:
        self._source = source
        # A block holds a frame or some milliseconds of sound; fewer than 32 bytes each are only sent to keep us busy.
        self._left = min(4_000_000, 50_000 + source.size // 32)
        self._scale = 1_000_000
        self._window = (0, b"")
        self.doc_type = ""
        self.track_types: list[int] = []
        self.clusters = 0
        self.blocks = 0
        self.details: dict[str, Any] = {}

    def _at(self, offset: int, count: int) -> bytes:
        """Read a few bytes; a window makes millions of short reads cheap."""
        start, window = self._window
        if not start <= offset or offset + count > start + len(window):
            start, window = offset, self._source.at(offset, min(CHUNK // 16, max(count, self._source.size - offset)))
            self._window = (start, window)
        return window[offset - start : offset - start + count]

    def _element(self, offset: int, end: int) -> tuple[int, int, int | None]:
        """Return (id, start of content, its size or None for unknown)."""
        self._left -= 1
        if self._left < 0:
            raise Corrupt("it has an absurd number of parts")
        if offset >= self._source.size:
            raise Corrupt("it ends too early")
        room = self._source.size - offset
        raw = self._at(offset, min(12, room))
        id_length = 9 - raw[0].bit_length()
        if id_length > 4 or len(raw) <= id_length:
            raise Corrupt(f"it is damaged at byte {offset} (no part begins there)")
        size_length = 9 - raw[id_length].bit_length()
        if size_length > 8 or len(raw) < id_length + size_length:
            raise Corrupt(f"it is damaged or cut off at byte {offset}")
        size = int.from_bytes(raw[id_length : id_length + size_length], "big") & ((1 << 7 * size_length) - 1)
        content = offset + id_length + size_length
        if size == (1 << 7 * size_length) - 1:
            return int.from_bytes(raw[:id_length], "big"), content, None
        if content + size > end:
            raise Corrupt(f"it is cut off: its part at byte {offset} does not fit the file")
        return int.from_bytes(raw[:id_length], "big"), content, size

    def _children(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        offset = start
        while offset < end:
            identity, content, size = self._element(offset, end)
            if size is None:
                raise Corrupt("it leaves the length of one of its parts open where that is not allowed")
            yield identity, content, content + size
            offset = content + size

    def check(self) -> None:
        end = self._source.size
        _, content, size = self._element(0, end)
        if size is None:
            raise Corrupt("its header is damaged")
        for identity, start, stop in self._children(content, content + size):
            if identity == _DOC_TYPE:
                self.doc_type = self._source.at(start, min(stop - start, 32)).rstrip(b"\0").decode("latin-1")
        if self.doc_type not in {"webm", "matroska"}:
            raise Corrupt("its header names neither WEBM nor Matroska")
        offset = content + size
        identity, content, size = self._element(offset, end)
        while identity != _SEGMENT:
            if size is None:
                raise Corrupt("its header is damaged")
            identity, content, size = self._element(content + size, end)
        self._segment(content, end if size is None else content + size)
        if not self.track_types:
            raise Corrupt("the description of its tracks is missing")
        if not self.blocks:
            raise Corrupt("it has no media data")

    def _segment(self, start: int, end: int) -> None:
        offset = start
        while offset < end:
            identity, content, size = self._element(offset, end)
            if identity == _CLUSTER:
                self.clusters += 1
                offset = self._cluster(content, end if size is None else content + size, open_end=size is None)
                continue
            if size is None:
                raise Corrupt("it leaves the length of one of its parts open where that is not allowed")
            if identity == _INFO:
                self._info(content, content + size)
            elif identity == _TRACKS:
                self._tracks(content, content + size)
            offset = content + size

    def _cluster(self, start: int, end: int, *, open_end: bool) -> int:
        """Count a cluster's blocks; return where it ends (an open one ends where something else begins)."""
        offset = start
        while offset < end:
            identity, content, size = self._element(offset, end)
            if open_end and identity not in _IN_CLUSTER:
                return offset
            if size is None:
                raise Corrupt("it leaves the length of one of its parts open where that is not allowed")
            self.blocks += identity in _BLOCKS and size > 4
            offset = content + size
        return offset

    def _info(self, start: int, end: int) -> None:
        duration = 0.0
        for identity, content, stop in self._children(start, end):
            if identity == _SCALE and 0 < stop - content <= 8:
                self._scale = int.from_bytes(self._source.at(content, stop - content), "big")
            elif identity == _DURATION and stop - content in {4, 8}:
                (duration,) = struct.unpack(
                    ">f" if stop - content == 4 else ">d", self._source.at(content, stop - content)
                )
        if math.isfinite(duration) and 0 < duration * self._scale < 1e18:
            self.details["seconds"] = round(duration * self._scale / 1e9, 3)

    def _tracks(self, start: int, end: int) -> None:
        for identity, content, stop in self._children(start, end):
            if identity == _TRACK:
                self._track(content, stop)

    def _track(self, start: int, end: int) -> None:
        for identity, content, stop in self._children(start, end):
            if identity == _TRACK_TYPE and stop > content:
                self.track_types.append(self._source.at(content, 1)[0])
            elif identity == _VIDEO:
                for inner, where, until in self._children(content, stop):
                    if inner in {_WIDTH, _HEIGHT} and until - where <= 4:
                        value = int.from_bytes(self._source.at(where, until - where), "big")
                        self.details["width" if inner == _WIDTH else "height"] = value


def check_matroska(source: Source) -> tuple[bool, str, Mapping[str, Any]]:
    """Check a WEBM or Matroska file; return whether it has a picture track, its type and details. Raises Corrupt."""
    walk = _Matroska(source)
    walk.check()
    return _PICTURE_TRACK in walk.track_types, walk.doc_type, walk.details | {"blocks": walk.blocks}
