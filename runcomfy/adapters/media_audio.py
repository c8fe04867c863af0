"""
Sound: FLAC, OGG (Opus, Vorbis), WAV and MP3, followed frame by frame or page by page to the last one.

Nothing is decoded. FLAC and OGG carry checksums and counts, which are compared; WAV carries lengths; MP3 is a chain of
frames, each of which says where the next begins.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Mapping
from typing import Any, Final

from runcomfy.adapters.media_source import CHUNK, Corrupt, Source

# --- WAV (RIFF; RF64 for more than 4 GB) -------------------------------------------------------------------

_OPEN_LENGTH: Final = 0xFFFFFFFF
"""Written where the length was not known, by programs that write to a pipe."""


def check_wav(source: Source) -> Mapping[str, Any]:
    """Check that a WAV file's parts fill it and its sound data is there. Raises Corrupt."""
    end = int.from_bytes(source.at(4, 4), "little") + 8
    if end - 8 == _OPEN_LENGTH:
        end = source.size
    if end > source.size:
        raise Corrupt(f"it is cut off: {end} bytes are promised, the file has {source.size}")
    details: dict[str, Any] = {}
    rate = data = 0
    offset = 12
    while offset + 8 <= end:
        kind, length = struct.unpack("<4sI", source.at(offset, 8))
        offset += 8
        if length == _OPEN_LENGTH and kind == b"data":
            length = end - offset
        if offset + length > end:
            raise Corrupt("it is cut off: one of its parts is longer than the file")
        if kind == b"fmt ":
            _, channels, sample_rate, rate = struct.unpack("<HHII", source.at(offset, 12))
            details = {"channels": channels, "sample_rate": sample_rate}
        elif kind == b"data":
            data += length
        offset += length + (length & 1)
    if not rate or not data:
        raise Corrupt("it has no sound data" if rate else "its format description is missing")
    return details | {"seconds": round(data / rate, 3)}


# --- OGG (RFC 3533; Opus: RFC 7845) ------------------------------------------------------------------------

_FLIP: Final = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_LAST_PAGE: Final = 4
_CODECS: Final = (
    (b"OpusHead", "opus"),
    (b"\x01vorbis", "vorbis"),
    (b"\x7fFLAC", "flac"),
    (b"Speex   ", "speex"),
    (b"\x80theora", "theora"),
)
_OPUS_RATE: Final = 48_000


def _ogg_checksum(page: bytes) -> int:
    """OGG's checksum is zlib's polynomial with every bit order turned round, starting from zero instead of ones."""
    value = zlib.crc32(page.translate(_FLIP), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{value:032b}"[::-1], 2)


def check_ogg(source: Source) -> Mapping[str, Any]:
    """Check every page of an OGG file: checksum, order, and that each stream has its last page. Raises Corrupt."""
    expected: dict[int, int] = {}
    open_streams: set[int] = set()
    codecs: list[str] = []
    rate, position = 0, 0
    offset = 0
    while offset < source.size:
        head = source.at(offset, 27)
        magic, version, flags, granule, serial, number, checksum, segments = struct.unpack("<4sBBqIIIB", head)
        if magic != b"OggS" or version:
            raise Corrupt(f"it is damaged at byte {offset} (no page begins there)")
        lengths = source.at(offset + 27, segments)
        page = source.at(offset, 27 + segments + sum(lengths))
        if _ogg_checksum(page[:22] + b"\0\0\0\0" + page[26:]) != checksum:
            raise Corrupt(f"it is damaged: the checksum of the page at byte {offset} is wrong")
        if expected.setdefault(serial, 0) != number:
            raise Corrupt("a part of it is missing: its pages are not in order")
        if len(expected) > 64:
            raise Corrupt("it has an absurd number of streams")
        if number == 0:
            open_streams.add(serial)
            body = page[27 + segments :]
            codec = next((name for mark, name in _CODECS if body.startswith(mark)), "unknown")
            codecs.append(codec)
            if codec == "vorbis":
                rate = int.from_bytes(body[12:16], "little")
            elif codec == "opus":
                rate = _OPUS_RATE
        expected[serial] = number + 1 & 0xFFFFFFFF
        if flags & _LAST_PAGE:
            open_streams.discard(serial)
        position = max(position, granule)
        offset += len(page)
    if open_streams:
        raise Corrupt("it is cut off: its last page is missing")
    details: dict[str, Any] = {"codecs": codecs}
    return details | ({"seconds": round(position / rate, 3)} if rate and position > 0 else {})


# --- FLAC (RFC 9639) ---------------------------------------------------------------------------------------

_STREAMINFO_BYTES: Final = 34
_FRAME_START: Final = re.compile(rb"\xff[\xf8\xf9]")
_SUM_BUDGET: Final = 1 << 20
"""Bytes of sound whose checksums are computed: some tenths of a second. The last frame is always among them."""

_LONGEST_FRAME: Final = 4 << 20
"""65,535 samples of 8 channels with 32 bits each are half of it."""


def _table(polynomial: int, bits: int) -> list[int]:
    made = []
    for byte in range(256):
        value = byte << (bits - 8)
        for _ in range(8):
            value = value << 1 ^ (polynomial if value >> (bits - 1) & 1 else 0)
        made.append(value & (1 << bits) - 1)
    return made


_CRC8: Final = _table(0x07, 8)
_CRC16: Final = _table(0x8005, 16)


def _crc8(data: bytes) -> int:
    value = 0
    for byte in data:
        value = _CRC8[value ^ byte]
    return value


def _crc16(data: bytes) -> int:
    value = 0
    for byte in data:
        value = (value << 8 & 0xFF00) ^ _CRC16[value >> 8 ^ byte]
    return value


def check_flac(source: Source) -> Mapping[str, Any]:
    """Check a FLAC file's description, the order of its frames and their checksums. Raises Corrupt."""
    offset, last, first = 4, False, True
    rate = channels = total = block = 0
    while not last:
        head = source.at(offset, 4)
        last, kind, length = head[0] >> 7 == 1, head[0] & 0x7F, int.from_bytes(head[1:], "big")
        if first:
            if kind or length != _STREAMINFO_BYTES:
                raise Corrupt("its description is missing")
            info = source.at(offset + 4, length)
            block = int.from_bytes(info[:2], "big")
            packed = int.from_bytes(info[10:18], "big")
            rate, channels, total = packed >> 44, (packed >> 41 & 7) + 1, packed & (1 << 36) - 1
            first = False
        if offset + 4 + length > source.size:
            raise Corrupt("it is cut off inside its description")
        offset += 4 + length
    if not rate:
        raise Corrupt("its description is damaged")
    samples = _Flac(source, offset, block).run()
    if total and samples < total:
        raise Corrupt(f"it is cut off: {total} samples are promised, frames for {samples} are there")
    return {"channels": channels, "sample_rate": rate, "seconds": round((total or samples) / rate, 3)}


class _Flac:
    """Finds the frames of a FLAC file by their start marks; a mark is believed if its header's checksum fits."""

    def __init__(self, source: Source, start: int, block: int) -> None:
        self._source = source
        self._start = start
        self._block = block
        self._budget = _SUM_BUDGET

    def run(self) -> int:
        """Return the number of samples that frames stand for."""
        if self._start >= self._source.size:
            raise Corrupt("it has no sound data")
        samples, begin = 0, self._start
        header = self._header(begin)
        if header is None:
            raise Corrupt("no frame begins where its sound data begins")
        at = begin + 2
        while True:
            at = self._next_mark(at)
            following = self._header(at) if at < self._source.size else None
            if at < self._source.size and (following is None or following[0] != samples + header[1]):
                at += 1
                continue
            samples += header[1]
            self._check_sum(begin, at)
            if following is None:
                return samples
            begin, header, at = at, following, at + 2

    def _next_mark(self, offset: int) -> int:
        """Return where the next start mark is, or the file's end."""
        while offset < self._source.size:
            count = min(CHUNK // 64, self._source.size - offset)
            found = _FRAME_START.search(self._source.at(offset, count))
            if found:
                return offset + found.start()
            # The mark's first byte may be the last one here.
            offset += max(1, count - 1) if offset + count < self._source.size else count
        return self._source.size

    def _header(self, offset: int) -> tuple[int, int] | None:
        """Return (first sample, samples) of a frame, None if no frame begins here."""
        raw = self._source.at(offset, min(16, self._source.size - offset))
        if len(raw) < 6 or raw[0] != 0xFF or raw[1] & 0xFE != 0xF8 or not raw[2] >> 4 or raw[2] & 0xF == 0xF:
            return None
        number, used = _coded_number(raw[4:])
        if not used:
            return None
        end = 4 + used
        code = raw[2] >> 4
        extra = {6: 1, 7: 2}.get(code, 0)
        rate_extra = {12: 1, 13: 2, 14: 2}.get(raw[2] & 0xF, 0)
        if (
            len(raw) <= end + extra + rate_extra
            or _crc8(raw[: end + extra + rate_extra]) != raw[end + extra + rate_extra]
        ):
            return None
        if extra:
            size = int.from_bytes(raw[end : end + extra], "big") + 1
        else:
            size = 192 if code == 1 else 576 << (code - 2) if code < 6 else 256 << (code - 8)
        # With blocks of one size the header counts frames, otherwise samples.
        return (number if raw[1] & 1 else number * self._block), size

    def _check_sum(self, begin: int, end: int) -> None:
        length = end - begin
        if not 8 <= length <= _LONGEST_FRAME:
            raise Corrupt("one of its frames is damaged or cut off")
        if end < self._source.size and length > self._budget:
            return
        self._budget -= length
        frame = self._source.at(begin, length)
        if _crc16(frame[:-2]) != int.from_bytes(frame[-2:], "big"):
            raise Corrupt(f"it is damaged or cut off: the checksum of the frame at byte {begin} is wrong")


def _coded_number(raw: bytes) -> tuple[int, int]:
    """Read a number coded like a character of UTF-8, up to 7 bytes; return it and its length, 0 if there is none."""
    lead = raw[0]
    if lead < 0x80:
        return lead, 1
    length = 8 - (lead ^ 0xFF).bit_length()
    if length < 2 or length > 7 or len(raw) < length:
        return 0, 0
    value = lead & (0x7F >> length)
    for byte in raw[1:length]:
        if byte >> 6 != 2:
            return 0, 0
        value = value << 6 | byte & 0x3F
    return value, length


# --- MP3 (ISO/IEC 11172-3, 13818-3) ------------------------------------------------------------------------

_V1_L1: Final = (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448)
_V1_L2: Final = (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384)
_V1_L3: Final = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_V2_L1: Final = (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256)
_V2_L23: Final = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_RATES: Final = (44_100, 48_000, 32_000)
_FEWEST_FRAMES: Final = 2
_TAG_BYTES: Final = 128


def _mp3_frame(head: bytes) -> tuple[int, int, int] | None:
    """Return (bytes, samples, samples per second) of the frame that begins with these 4 bytes."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    version, layer = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3)
    bitrate, rate_code, padding = head[2] >> 4, head[2] >> 2 & 3, head[2] >> 1 & 1
    if version == 1 or layer == 4 or bitrate in {0, 15} or rate_code == 3:
        return None
    full = version == 3
    rate = _RATES[rate_code] >> (0 if full else 1 if version == 2 else 2)
    kbits = ((_V1_L1, _V1_L2, _V1_L3) if full else (_V2_L1, _V2_L23, _V2_L23))[layer - 1][bitrate]
    if layer == 1:
        return (12_000 * kbits // rate + padding) * 4, 384, rate
    samples = 576 if layer == 3 and not full else 1152
    return samples * 125 * kbits // rate + padding, samples, rate


def _after_tag(source: Source) -> int:
    """Return where the sound begins: after the ID3v2 tag, if there is one."""
    head = source.at(0, min(10, source.size))
    if head[:3] != b"ID3" or len(head) < 10:
        return 0
    length = 0
    for byte in head[6:10]:
        if byte & 0x80:
            raise Corrupt("its tag is damaged")
        length = length << 7 | byte
    return 10 + length + (10 if head[5] & 0x10 else 0)


def is_mp3(source: Source) -> bool:
    """Whether the file begins with an ID3 tag, or with two MP3 frames one after the other."""
    if source.head.startswith(b"ID3"):
        return True
    first = _mp3_frame(source.head[:4])
    return first is not None and _mp3_frame(source.head[first[0] : first[0] + 4]) is not None


def check_mp3(source: Source) -> Mapping[str, Any]:
    """Follow an MP3 file from frame to frame to its end. Raises Corrupt."""
    offset = _after_tag(source)
    end = source.size
    if end - offset > _TAG_BYTES and source.at(end - _TAG_BYTES, 3) == b"TAG":
        end -= _TAG_BYTES
    for piece in source.pieces(offset, end - offset):  # some writers pad the tag with zeros
        zeros = len(piece) - len(piece.lstrip(b"\0"))
        offset += zeros
        if zeros < len(piece):
            break
    frames = samples = 0
    promised: tuple[int, int] | None = None
    rate, begin = 0, offset
    while offset < end:
        head = source.at(offset, min(4, end - offset))
        found = _mp3_frame(head)
        if found is None:
            if frames and (head[:3] in {b"APE", b"LYR"} or not any(head)):
                break
            raise Corrupt(f"it is damaged at byte {offset} (no frame begins there)")
        length, count, rate = found
        if offset + length > end:
            raise Corrupt("it is cut off inside its last frame")
        if not frames:
            promised = _xing(source.at(offset, length))
        frames += 1
        samples += count
        offset += length
    if frames < _FEWEST_FRAMES:
        raise Corrupt("it has no sound data")
    # The frame that holds the counts is not counted by every writer.
    if promised and (frames < promised[0] or offset - begin + 4096 < promised[1]):
        raise Corrupt(f"it is cut off: {promised[0]} frames are promised, {frames} are there")
    return {"sample_rate": rate, "seconds": round(samples / rate, 3)}


def _xing(frame: bytes) -> tuple[int, int] | None:
    """Return the frames and bytes that the first frame promises, if it does."""
    at = next((found for mark in (b"Xing", b"Info") if 0 <= (found := frame.find(mark)) < 64), -1)
    if at < 0 or len(frame) < at + 16:
        return None
    flags, *numbers = struct.unpack(">III", frame[at + 4 : at + 16])
    frames = numbers.pop(0) if flags & 1 else 0
    return frames, numbers.pop(0) if flags & 2 else 0
