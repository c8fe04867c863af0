"""
The smallest whole video and audio files, made by hand.

No encoder is at hand, so the files use what is: an MP4 carries JPEG pictures, a WEBM carries VP8 key frames (Pillow's
lossy WEBP is one), a FLAC, MP3 or Opus file carries silence. They are whole in structure and play where those codecs
are known; their metadata says that they were emulated.

Written after ISO/IEC 14496-12 and -14 (MP4), RFC 8794 and 9559 (Matroska), RFC 9639 (FLAC), ISO/IEC 11172-3 (MP3),
RFC 3533, 7845 and 6716 (Ogg, Opus).
"""

from __future__ import annotations

import hashlib
import io
import struct
import wave
import zlib
from collections.abc import Sequence

from PIL import Image

from runcomfy.testing.emulators.comfyui.nodes.pictures import jpeg
from runcomfy.testing.emulators.comfyui.nodes.values import EMULATION_NOTE

Tags = Sequence[tuple[str, str]]
"""Names and texts that are written into a file."""

TIMESCALE = 12800
"""Ticks per second of a video track, as ffmpeg chooses them for the usual rates."""
MATRIX = struct.pack(">9I", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)


def noted(tags: Tags) -> list[tuple[str, str]]:
    """Return the tags with the note that the file was emulated."""
    return [*tags, ("comment", EMULATION_NOTE)]


# --- MP4 --------------------------------------------------------------------------------------------------


def _box(kind: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack(">I", 8 + len(body)) + kind + body


def _full(kind: bytes, *parts: bytes, version: int = 0, flags: int = 0) -> bytes:
    return _box(kind, struct.pack(">I", version << 24 | flags), *parts)


def _descriptor(tag: int, body: bytes) -> bytes:
    return bytes((tag, 0x80, 0x80, 0x80, len(body))) + body


def _jpeg_entry(width: int, height: int) -> bytes:
    """Return the sample description of JPEG pictures: `mp4v` with object type 0x6C."""
    decoder = _descriptor(0x04, bytes((0x6C, 0x11)) + bytes(11))
    elementary = _descriptor(0x03, struct.pack(">HB", 1, 0) + decoder + _descriptor(0x06, b"\x02"))
    visual = struct.pack(">6xH16xHHII4xH32sHh", 1, width, height, 0x480000, 0x480000, 1, b"", 24, -1)
    return _box(b"mp4v", visual, _full(b"esds", elementary))


def _metadata(tags: Tags) -> bytes:
    """Return the movie's tags, in the form that players of iTunes files read."""
    items = b""
    for name, text in tags:
        value = _box(b"data", struct.pack(">II", 1, 0), text.encode())
        if name == "comment":
            items += _box(b"\xa9cmt", value)
        else:
            named = _full(b"mean", b"com.apple.iTunes") + _full(b"name", name.encode())
            items += _box(b"----", named, value)
    handler = _full(b"hdlr", struct.pack(">I4s4s8xB", 0, b"mdir", b"appl", 0))
    return _box(b"udta", _full(b"meta", handler, _box(b"ilst", items)))


def _track(sizes: Sequence[int], ticks: int, size: tuple[int, int], offset: int) -> bytes:
    """Return the only track: pictures of these sizes in bytes, one after the other from `offset`."""
    count = len(sizes)
    length = count * ticks
    millis = length * 1000 // TIMESCALE
    table = _box(
        b"stbl",
        _full(b"stsd", struct.pack(">I", 1), _jpeg_entry(*size)),
        _full(b"stts", struct.pack(">III", 1, count, ticks)),
        _full(b"stsc", struct.pack(">IIII", 1, 1, count, 1)),
        _full(b"stsz", struct.pack(">II", 0, count), b"".join(struct.pack(">I", one) for one in sizes)),
        _full(b"stco", struct.pack(">II", 1, offset)),
    )
    reference = _full(b"dref", struct.pack(">I", 1), _full(b"url ", flags=1))
    media = _box(
        b"mdia",
        _full(b"mdhd", struct.pack(">IIIIHH", 0, 0, TIMESCALE, length, 0x55C4, 0)),
        _full(b"hdlr", struct.pack(">I4s12x", 0, b"vide"), b"VideoHandler\0"),
        _box(b"minf", _full(b"vmhd", bytes(8), flags=1), _box(b"dinf", reference), table),
    )
    header = struct.pack(">IIIII8xhhhH", 0, 0, 1, 0, millis, 0, 0, 0, 0)
    place = struct.pack(">II", size[0] << 16, size[1] << 16)
    return _box(b"trak", _full(b"tkhd", header, MATRIX, place, flags=3), media)


def mp4(frames: Sequence[Image.Image], fps: float, tags: Tags = ()) -> bytes:
    """Return an MP4 file of JPEG pictures, `moov` before `mdat`, as streaming wants it."""
    once = {id(frame): jpeg(frame) for frame in {id(frame): frame for frame in frames}.values()}
    samples = [once[id(frame)] for frame in frames]
    ticks = max(1, round(TIMESCALE / fps))
    kind = _box(b"ftyp", b"isom", struct.pack(">I", 0x200), b"isomiso2mp41")
    millis = len(frames) * ticks * 1000 // TIMESCALE

    def movie(offset: int) -> bytes:
        header = struct.pack(">IIIIIH10x", 0, 0, 1000, millis, 0x10000, 0x100)
        track = _track([len(one) for one in samples], ticks, frames[0].size, offset)
        return _box(
            b"moov", _full(b"mvhd", header, MATRIX, bytes(24), struct.pack(">I", 2)), track, _metadata(noted(tags))
        )

    # The offset is a number of fixed width, so writing it does not move what it points at.
    start = len(kind) + len(movie(0)) + 8
    return kind + movie(start) + _box(b"mdat", *samples)


# --- WEBM -------------------------------------------------------------------------------------------------


def _length(size: int) -> bytes:
    width = next(n for n in range(1, 9) if size < (1 << 7 * n) - 1)
    return (size | 1 << 7 * width).to_bytes(width, "big")


def _element(ident: int, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return ident.to_bytes((ident.bit_length() + 7) // 8, "big") + _length(len(body)) + body


def _number(ident: int, value: int) -> bytes:
    return _element(ident, value.to_bytes(max(1, (value.bit_length() + 7) // 8), "big"))


def vp8_frame(picture: Image.Image) -> bytes:
    """Return the picture as a VP8 key frame: the `VP8 ` chunk of a lossy WEBP file."""
    data = io.BytesIO()
    picture.convert("RGB").save(data, format="WEBP", quality=85)
    riff = data.getvalue()
    position = 12
    while riff[position : position + 4] != b"VP8 ":
        position += 8 + (int.from_bytes(riff[position + 4 : position + 8], "little") + 1) // 2 * 2
    size = int.from_bytes(riff[position + 4 : position + 8], "little")
    return riff[position + 8 : position + 8 + size]


def webm(frames: Sequence[Image.Image], fps: float, tags: Tags = ()) -> bytes:
    """Return a WEBM file of VP8 key frames; a new cluster every 30 s, since block times are 16 bits wide."""
    cache: dict[int, bytes] = {}
    width, height = frames[0].size
    header = _element(
        0x1A45DFA3,
        _number(0x4286, 1),
        _number(0x42F7, 1),
        _number(0x42F2, 4),
        _number(0x42F3, 8),
        _element(0x4282, b"webm"),
        _number(0x4287, 2),
        _number(0x4285, 2),
    )
    note = EMULATION_NOTE.encode()
    duration = struct.pack(">d", len(frames) * 1000 / fps)
    info = _element(
        0x1549A966,
        _number(0x2AD7B1, 1_000_000),
        _element(0x4D80, note),
        _element(0x5741, note),
        _element(0x4489, duration),
    )
    video = _element(0xE0, _number(0xB0, width), _number(0xBA, height))
    track = _element(
        0xAE,
        _number(0xD7, 1),
        _number(0x73C5, 1),
        _number(0x9C, 0),
        _element(0x86, b"V_VP8"),
        _number(0x83, 1),
        _number(0x23E383, round(1_000_000_000 / fps)),
        video,
    )
    simple = [
        _element(0x67C8, _element(0x45A3, n.upper().encode()), _element(0x4487, t.encode())) for n, t in noted(tags)
    ]
    described = _element(0x1254C367, _element(0x7373, _element(0x63C0), *simple))
    clusters: dict[int, list[bytes]] = {}
    for number, frame in enumerate(frames):
        at = round(number * 1000 / fps)
        start = at // 30_000 * 30_000
        if id(frame) not in cache:
            cache[id(frame)] = vp8_frame(frame)
        data = cache[id(frame)]
        clusters.setdefault(start, []).append(_element(0xA3, b"\x81" + struct.pack(">hB", at - start, 0x80), data))
    body = b"".join(_element(0x1F43B675, _number(0xE7, start), *blocks) for start, blocks in clusters.items())
    return header + _element(0x18538067, info, _element(0x1654AE6B, track), described, body)


# --- audio ------------------------------------------------------------------------------------------------


def wav(samples: int, rate: int, channels: int) -> bytes:
    """Return silence as a WAV file of 16 bits."""
    data = io.BytesIO()
    with wave.open(data, "wb") as out:
        out.setnchannels(channels)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(bytes(2 * channels * samples))
    return data.getvalue()


def _crc(data: bytes, polynomial: int, bits: int) -> int:
    """Return a checksum that takes the highest bit first and begins with zero."""
    top, mask, value = 1 << bits - 1, (1 << bits) - 1, 0
    for byte in data:
        value ^= byte << bits - 8
        for _ in range(8):
            value = (value << 1 ^ polynomial if value & top else value << 1) & mask
    return value


def _comments(tags: Tags) -> bytes:
    """Return Vorbis comments, as FLAC and Opus carry them."""
    vendor = EMULATION_NOTE.encode()
    entries = [f"{name}={text}".encode() for name, text in noted(tags)]
    body = struct.pack("<I", len(vendor)) + vendor + struct.pack("<I", len(entries))
    return body + b"".join(struct.pack("<I", len(entry)) + entry for entry in entries)


def _utf8_number(value: int) -> bytes:
    """Return a number in the way that UTF-8 writes code points, which FLAC borrows for frame numbers."""
    if value < 0x80:
        return bytes((value,))
    width = next(n for n in range(2, 8) if value < 1 << 5 * n + 1)
    lead = (0xFF00 >> width & 0xFF) | value >> 6 * (width - 1)
    return bytes((lead, *(0x80 | value >> 6 * i & 0x3F for i in range(width - 2, -1, -1))))


def flac(samples: int, rate: int, channels: int, tags: Tags = ()) -> bytes:
    """Return silence as a FLAC file of 16 bits: every block says "all samples are 0"."""
    block = 4096
    frames = bytearray()
    smallest, largest = 0xFFFFFF, 0
    for number, start in enumerate(range(0, samples, block)):
        size = min(block, samples - start)
        head = (
            bytes((0xFF, 0xF8, 0x70, (channels - 1) << 4 | 0x08)) + _utf8_number(number) + struct.pack(">H", size - 1)
        )
        head += bytes((_crc(head, 0x07, 8),))
        frame = head + b"\0\0\0" * channels
        frame += struct.pack(">H", _crc(frame, 0x8005, 16))
        smallest, largest = min(smallest, len(frame)), max(largest, len(frame))
        frames += frame
    if not frames:
        smallest = 0
    digest = hashlib.md5(usedforsecurity=False)
    for start in range(0, samples, 1 << 16):
        digest.update(bytes(2 * channels * min(1 << 16, samples - start)))
    packed = rate << 44 | (channels - 1) << 41 | 15 << 36 | samples
    info = struct.pack(">HH", block, block) + smallest.to_bytes(3, "big") + largest.to_bytes(3, "big")
    info += packed.to_bytes(8, "big") + digest.digest()
    comments = _comments(tags)
    blocks = b"\x00" + len(info).to_bytes(3, "big") + info + b"\x84" + len(comments).to_bytes(3, "big") + comments
    return b"fLaC" + blocks + bytes(frames)


MP3_RATES = {44100: 0, 48000: 1, 32000: 2}
MP3_FRAME_SAMPLES = 1152


def mp3(samples: int, rate: int, channels: int, tags: Tags = ()) -> bytes:
    """Return silence as an MP3 file; rates that MPEG-1 does not know become 48000 Hz, as an encoder would resample."""
    seconds = samples / rate
    if rate not in MP3_RATES:
        rate = 48000
    # 64 kbit/s; no reservoir: each frame stands alone, its side information of zeros meaning "no sound".
    header = bytes((0xFF, 0xFB, 5 << 4 | MP3_RATES[rate] << 2, 0xC0 if channels == 1 else 0x00))
    frame = header + bytes(144 * 64_000 // rate - 4)
    count = max(1, -(-round(seconds * rate) // MP3_FRAME_SAMPLES))
    body = b""
    for name, text in noted(tags):
        value = b"\x03" + name.encode() + b"\0" + text.encode() + b"\0"
        body += b"TXXX" + _syncsafe(len(value)) + b"\0\0" + value
    return b"ID3\x04\x00\x00" + _syncsafe(len(body)) + body + frame * count


def _syncsafe(size: int) -> bytes:
    return bytes(size >> shift & 0x7F for shift in (21, 14, 7, 0))


OPUS_SILENCE = b"\xfc\xff\xfe"
"""20 ms of stereo silence at full band."""
OPUS_FRAME_SAMPLES = 960
OPUS_PRE_SKIP = 312
OGG_LACES = 255


def _ogg_table() -> list[int]:
    return [_crc(bytes((value,)), 0x04C11DB7, 32) for value in range(256)]


_OGG_TABLE = _ogg_table()


def _ogg_crc(data: bytes) -> int:
    value = 0
    for byte in data:
        value = value << 8 & 0xFFFFFFFF ^ _OGG_TABLE[value >> 24 ^ byte]
    return value


def _ogg_pages(packets: Sequence[bytes], serial: int, first: int, granule: int, flags: int) -> list[bytes]:
    """Return pages for packets that share one; a packet of many segments runs over several."""
    laces = [part for packet in packets for part in [*[255] * (len(packet) // 255), len(packet) % 255]]
    data, taken = b"".join(packets), 0
    pages: list[bytes] = []
    for start in range(0, len(laces), OGG_LACES):
        part = laces[start : start + OGG_LACES]
        last = start + OGG_LACES >= len(laces)
        size = sum(part)
        kind = (flags & 2 if start == 0 else 1) | (flags & 4 if last else 0)
        position = granule if last else 0xFFFFFFFFFFFFFFFF
        head = struct.pack("<4sBBQIIIB", b"OggS", 0, kind, position, serial, first + len(pages), 0, len(part))
        page = head + bytes(part) + data[taken : taken + size]
        pages.append(page[:22] + struct.pack("<I", _ogg_crc(page)) + page[26:])
        taken += size
    return pages


def opus(samples: int, rate: int, channels: int, tags: Tags = ()) -> bytes:
    """Return silence as an Ogg Opus file in stereo, which players mix down themselves."""
    wanted = round(samples / rate * 48000)
    count = max(1, -(-(wanted + OPUS_PRE_SKIP) // OPUS_FRAME_SAMPLES))
    serial = zlib.crc32(f"{samples} {rate} {channels}".encode())
    pages = _ogg_pages([struct.pack("<8sBBHIhB", b"OpusHead", 1, 2, OPUS_PRE_SKIP, rate, 0, 0)], serial, 0, 0, 2)
    pages += _ogg_pages([b"OpusTags" + _comments(tags)], serial, len(pages), 0, 0)
    for start in range(0, count, 50):
        here = min(50, count - start)
        end = start + here == count
        granule = wanted + OPUS_PRE_SKIP if end else (start + here) * OPUS_FRAME_SAMPLES
        pages += _ogg_pages([OPUS_SILENCE] * here, serial, len(pages), granule, 4 if end else 0)
    return b"".join(pages)
