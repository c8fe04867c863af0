"""
Video and sound without encoders: whole, playable files of the formats that the real server's nodes write.

Pictures go in as Pillow can compress them: JPEG frames in MP4, and in WEBM the VP8 key frames that lossy WEBP consists
of. Sound is silence of the right length. All functions are pure: equal arguments give equal bytes. They know nothing
of nodes; what is written into a file's metadata comes from the caller.
"""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from PIL import Image

from runcomfy.testing.emulators.comfyui.nodes.values import EMULATION_NOTE, Audio
from runcomfy.testing.samples import box, checksum, element

Metadata = Mapping[str, str]
"""What the server was asked to do, by key: `prompt` and whatever the caller sent along, as JSON text."""

JPEG_QUALITY = 90
WEBP_QUALITY = 80
RATE_LIMIT = 1001
"""Frame rates are fractions; 1001 is the largest denominator in use (NTSC's 30000/1001)."""


def _jpeg(picture: Image.Image) -> bytes:
    data = io.BytesIO()
    picture.convert("RGB").save(data, format="JPEG", quality=JPEG_QUALITY)
    return data.getvalue()


def _vp8(picture: Image.Image) -> bytes:
    """Return a picture as one VP8 key frame: the `VP8 ` chunk of a lossy WEBP file."""
    data = io.BytesIO()
    picture.convert("RGB").save(data, format="WEBP", quality=WEBP_QUALITY)
    raw = data.getvalue()
    offset = 12
    while raw[offset : offset + 4] != b"VP8 ":
        offset += 8 + (size := int.from_bytes(raw[offset + 4 : offset + 8], "little")) + (size & 1)
    size = int.from_bytes(raw[offset + 4 : offset + 8], "little")
    return raw[offset + 8 : offset + 8 + size]


def _encoded(frames: Sequence[Image.Image], encode: Callable[[Image.Image], bytes]) -> list[bytes]:
    """Return each picture encoded. A picture that occurs many times is encoded once."""
    done: dict[int, bytes] = {}
    for frame in frames:
        if id(frame) not in done:
            done[id(frame)] = encode(frame)
    return [done[id(frame)] for frame in frames]


# --- MP4 (ISO/IEC 14496-12, 14496-14) ---------------------------------------------------------------------

MATRIX = struct.pack(">9I", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
UNDEFINED_LANGUAGE = 0x55C4
MOVIE_SCALE = 1000
OBJECT_JPEG, OBJECT_MP3 = 0x6C, 0x6B
STREAM_VISUAL, STREAM_AUDIO = 0x11, 0x15


@dataclass(frozen=True, slots=True)
class _Track:
    """One track: its samples, and what the tables say of them."""

    handler: bytes
    samples: Sequence[bytes]
    scale: int
    """Time units in a second."""
    delta: int
    """Time units of a sample."""
    entry: bytes
    about: bytes
    """The media header box: vmhd or smhd."""
    size: tuple[int, int] = (0, 0)

    @property
    def length(self) -> int:
        """In units of the movie."""
        return len(self.samples) * self.delta * MOVIE_SCALE // self.scale

    def box(self, number: int, offset: int) -> bytes:
        """Return the trak box; `offset` is where the first sample stands in the file."""
        count = len(self.samples)
        tables = box(
            b"stbl",
            box(b"stsd", struct.pack(">II", 0, 1), self.entry),
            box(b"stts", struct.pack(">IIII", 0, 1, count, self.delta)),
            box(b"stsc", struct.pack(">IIIII", 0, 1, 1, count, 1)),
            box(b"stsz", struct.pack(">III", 0, 0, count), *(struct.pack(">I", len(one)) for one in self.samples)),
            box(b"stco", struct.pack(">III", 0, 1, offset)),
        )
        place = box(b"dinf", box(b"dref", struct.pack(">II", 0, 1), box(b"url ", struct.pack(">I", 1))))
        sound = self.handler == b"soun"
        header = struct.pack(">IIIIII8xHHHH", 3, 0, 0, number, 0, self.length, 0, 0, 0x100 if sound else 0, 0)
        return box(
            b"trak",
            box(b"tkhd", header, MATRIX, struct.pack(">II", self.size[0] << 16, self.size[1] << 16)),
            box(
                b"mdia",
                box(
                    b"mdhd",
                    struct.pack(">IIIIIHH", 0, 0, 0, self.scale, count * self.delta, UNDEFINED_LANGUAGE, 0),
                ),
                box(b"hdlr", struct.pack(">II4s12x", 0, 0, self.handler), b"\0"),
                box(b"minf", self.about, place, tables),
            ),
        )


def _elementary(kind: int, stream: int) -> bytes:
    """Return the esds box that names a codec."""
    # Buffer size and bit rates, 11 bytes, may be left at zero.
    body = struct.pack(">HB", 1, 0) + bytes([4, 13, kind, stream]) + bytes(11) + b"\x06\x01\x02"
    return box(b"esds", struct.pack(">I", 0), bytes([3, len(body)]), body)


def _picture_track(frames: Sequence[Image.Image], rate: Fraction) -> _Track:
    width, height = frames[0].size
    entry = box(
        b"mp4v",
        struct.pack(">6xH16xHHIIIH", 1, width, height, 0x480000, 0x480000, 0, 1),
        bytes(32),
        struct.pack(">HH", 24, 0xFFFF),
        _elementary(OBJECT_JPEG, STREAM_VISUAL),
    )
    about = box(b"vmhd", struct.pack(">I8x", 1))
    return _Track(b"vide", _encoded(frames, _jpeg), rate.numerator, rate.denominator, entry, about, (width, height))


def _sound_track(audio: Audio) -> _Track:
    shape = _mp3_shape(audio)
    entry = box(
        b"mp4a",
        struct.pack(">6xH8xHHII", 1, shape.channels, 16, 0, shape.rate << 16),
        _elementary(OBJECT_MP3, STREAM_AUDIO),
    )
    about = box(b"smhd", struct.pack(">I4x", 0))
    return _Track(b"soun", [shape.frame] * shape.frames, shape.rate, shape.samples, entry, about)


def _movie_tags(metadata: Metadata) -> bytes:
    keys, values = b"", b""
    for number, (key, value) in enumerate({**metadata, "encoder": EMULATION_NOTE}.items(), start=1):
        keys += box(b"mdta", key.encode())
        values += box(struct.pack(">I", number), box(b"data", struct.pack(">II", 1, 0), value.encode()))
    count = struct.pack(">II", 0, len(metadata) + 1)
    handler = box(b"hdlr", struct.pack(">II4s12x", 0, 0, b"mdta"), b"\0")
    return box(b"udta", box(b"meta", struct.pack(">I", 0), handler, box(b"keys", count, keys), box(b"ilst", values)))


def mp4(
    frames: Sequence[Image.Image], fps: float, *, audio: Audio | None = None, metadata: Metadata | None = None
) -> bytes:
    """Return an MP4 file of at least one picture, `fps` a second, with silent sound if there is `audio`."""
    rate = Fraction(fps).limit_denominator(RATE_LIMIT)
    tracks = [_picture_track(frames, rate)] + ([] if audio is None else [_sound_track(audio)])
    start = box(b"ftyp", b"isom", struct.pack(">I", 0x200), b"isomiso2mp41")
    tags = _movie_tags(metadata or {})

    def movie(offset: int) -> bytes:
        boxes = []
        for number, track in enumerate(tracks, start=1):
            boxes.append(track.box(number, offset))
            offset += sum(len(one) for one in track.samples)
        times = struct.pack(">IIIII", 0, 0, 0, MOVIE_SCALE, max(track.length for track in tracks))
        header = box(
            b"mvhd", times, struct.pack(">IH10x", 0x10000, 0x100), MATRIX, bytes(24), struct.pack(">I", len(tracks) + 1)
        )
        return box(b"moov", header, *boxes, tags)

    # The offsets are numbers of fixed size, so the movie is as long with the right ones.
    offset = len(start) + len(movie(0)) + 8
    return start + movie(offset) + box(b"mdat", *(one for track in tracks for one in track.samples))


# --- WEBM (RFC 8794 EBML, RFC 9559) -----------------------------------------------------------------------

CLUSTER_MS = 30_000
"""Times inside a cluster are 16 bits with a sign; a cluster holds half a minute."""


def _number(value: int) -> bytes:
    return value.to_bytes(max(1, (value.bit_length() + 7) // 8), "big")


def _webm_tags(metadata: Metadata) -> bytes:
    simple = [
        element(b"\x67\xc8", element(b"\x45\xa3", key.upper().encode()), element(b"\x44\x87", value.encode()))
        for key, value in {**metadata, "encoder": EMULATION_NOTE}.items()
    ]
    return element(b"\x12\x54\xc3\x67", element(b"\x73\x73", element(b"\x63\xc0"), *simple))


def webm(frames: Sequence[Image.Image], fps: float, *, metadata: Metadata | None = None) -> bytes:
    """Return a WEBM file of at least one picture, `fps` a second: VP8, whatever the node was told."""
    width, height = frames[0].size
    head = element(
        b"\x1a\x45\xdf\xa3",
        element(b"\x42\x86", b"\1"),
        element(b"\x42\xf7", b"\1"),
        element(b"\x42\xf2", b"\4"),
        element(b"\x42\xf3", b"\x08"),
        element(b"\x42\x82", b"webm"),
        element(b"\x42\x87", b"\2"),
        element(b"\x42\x85", b"\2"),
    )
    info = element(
        b"\x15\x49\xa9\x66",
        element(b"\x2a\xd7\xb1", _number(1_000_000)),
        element(b"\x4d\x80", EMULATION_NOTE.encode()),
        element(b"\x57\x41", EMULATION_NOTE.encode()),
        element(b"\x44\x89", struct.pack(">d", len(frames) * 1000 / fps)),
    )
    track = element(
        b"\xae",
        element(b"\xd7", b"\1"),
        element(b"\x73\xc5", b"\1"),
        element(b"\x83", b"\1"),
        element(b"\x9c", b"\0"),
        element(b"\x86", b"V_VP8"),
        element(b"\x23\xe3\x83", _number(round(1e9 / fps))),
        element(b"\xe0", element(b"\xb0", _number(width)), element(b"\xba", _number(height))),
    )
    clusters = _clusters(frames, fps)
    return head + element(
        b"\x18\x53\x80\x67", info, element(b"\x16\x54\xae\x6b", track), _webm_tags(metadata or {}), *clusters
    )


def _clusters(frames: Sequence[Image.Image], fps: float) -> list[bytes]:
    """Return the clusters. Every frame is a key frame."""
    groups: list[tuple[int, list[bytes]]] = []
    for number, data in enumerate(_encoded(frames, _vp8)):
        at = round(number * 1000 / fps)
        if not groups or at - groups[-1][0] > CLUSTER_MS:
            groups.append((at, []))
        head = b"\x81" + struct.pack(">hB", at - groups[-1][0], 0x80)
        groups[-1][1].append(element(b"\xa3", head, data))
    return [element(b"\x1f\x43\xb6\x75", element(b"\xe7", _number(start)), *blocks) for start, blocks in groups]


# --- FLAC (RFC 9639) --------------------------------------------------------------------------------------

FLAC_BLOCK = 4608
FLAC_BLOCK_CODE = 5
FLAC_SIZE_FOLLOWS = 7
STREAMINFO, VORBIS_COMMENT, LAST_BLOCK = 0, 4, 0x80
BYTES_PER_SAMPLE = 2


def _comments(metadata: Metadata) -> bytes:
    """Return Vorbis comments, as FLAC and Opus files carry them."""
    vendor = EMULATION_NOTE.encode()
    entries = [f"{key}={value}".encode() for key, value in metadata.items()]
    return (
        struct.pack("<I", len(vendor))
        + vendor
        + struct.pack("<I", len(entries))
        + b"".join(struct.pack("<I", len(entry)) + entry for entry in entries)
    )


def _coded(number: int) -> bytes:
    """Return a number coded like a character of UTF-8, up to 31 bits."""
    if number < 0x80:
        return bytes([number])
    tail = []
    lead_bits = 6
    while number >= 1 << lead_bits:
        tail.append(0x80 | number & 0x3F)
        number >>= 6
        lead_bits -= 1
    lead = (0xFF << lead_bits + 1) & 0xFF
    return bytes([lead | number, *reversed(tail)])


def _flac_frame(number: int, size: int, channels: int) -> bytes:
    whole = size == FLAC_BLOCK
    # The rate is the stream's (0), samples have 16 bits (4); channels are independent.
    codes = bytes([(FLAC_BLOCK_CODE if whole else FLAC_SIZE_FOLLOWS) << 4, (channels - 1) << 4 | 4 << 1])
    head = b"\xff\xf8" + codes + _coded(number) + (b"" if whole else struct.pack(">H", size - 1))
    head += bytes([checksum(head, 0x07, 8)])
    # A constant subframe: its type, then the one value.
    frame = head + b"\0\0\0" * channels
    return frame + checksum(frame, 0x8005, 16).to_bytes(2, "big")


def flac(audio: Audio, *, metadata: Metadata | None = None) -> bytes:
    """Return silence as a FLAC file with 16 bits a sample."""
    full, rest = divmod(audio.samples, FLAC_BLOCK)
    sizes = [FLAC_BLOCK] * full + ([rest] if rest else [])
    frames = [_flac_frame(number, size, audio.channels) for number, size in enumerate(sizes)]
    lengths = [len(frame) for frame in frames] or [0]
    digest = hashlib.md5(usedforsecurity=False)
    for size in sizes:
        digest.update(bytes(size * audio.channels * BYTES_PER_SAMPLE))
    packed = audio.rate << 44 | (audio.channels - 1) << 41 | 15 << 36 | audio.samples
    info = struct.pack(">HH", FLAC_BLOCK, FLAC_BLOCK)
    info += min(lengths).to_bytes(3, "big") + max(lengths).to_bytes(3, "big") + packed.to_bytes(8, "big")
    info += digest.digest()
    comments = _comments(metadata or {})
    blocks = struct.pack(">I", STREAMINFO << 24 | len(info)) + info
    blocks += struct.pack(">I", (LAST_BLOCK | VORBIS_COMMENT) << 24 | len(comments)) + comments
    return b"fLaC" + blocks + b"".join(frames)


# --- MP3 (ISO/IEC 11172-3, 13818-3; ID3v2.4) --------------------------------------------------------------

MP3_RATES = (44_100, 48_000, 32_000, 22_050, 24_000, 16_000, 11_025, 12_000, 8_000)
MP3_KBITS = 32
SAMPLES_V1, SAMPLES_V2 = 1152, 576


@dataclass(frozen=True, slots=True)
class _Mp3Shape:
    """A silent frame and how many of them make the sound."""

    frame: bytes
    frames: int
    rate: int
    samples: int
    """In a frame."""
    channels: int


def _mp3_shape(audio: Audio) -> _Mp3Shape:
    """Choose a rate that MP3 has: the sound's own, else the next one above, else the highest."""
    higher = sorted(rate for rate in MP3_RATES if rate >= audio.rate)
    rate = higher[0] if higher else max(MP3_RATES)
    version, code = divmod(MP3_RATES.index(rate), 3)
    first = version == 0
    samples = SAMPLES_V1 if first else SAMPLES_V2
    channels = min(audio.channels, 2)
    head = bytes(
        [
            0xFF,
            # Frame mark, version (MPEG 1, 2, 2.5), layer 3, no checksum.
            0xE0 | (3, 2, 0)[version] << 3 | 1 << 1 | 1,
            (1 if first else 4) << 4 | code << 2,
            0 if channels == 2 else 0xC0,
        ]
    )
    # No bits for any granule: the decoder puts out zeros.
    frame = head.ljust(samples * 125 * MP3_KBITS // rate, b"\0")
    wanted = -(-audio.samples * rate // audio.rate)
    # One more than the sound needs, since decoders swallow the encoder's delay.
    return _Mp3Shape(frame, -(-wanted // samples) + 1, rate, samples, channels)


def _synchsafe(number: int) -> bytes:
    return bytes(number >> shift & 0x7F for shift in (21, 14, 7, 0))


def mp3(audio: Audio, *, metadata: Metadata | None = None) -> bytes:
    """Return silence as an MP3 file of constant 32 kbit/s, at the nearest rate MP3 has."""
    texts = [(b"TXXX", key.encode() + b"\0" + value.encode() + b"\0") for key, value in (metadata or {}).items()]
    texts.append((b"TSSE", EMULATION_NOTE.encode() + b"\0"))
    tags = b"".join(kind + _synchsafe(len(body) + 1) + b"\0\0\x03" + body for kind, body in texts)
    shape = _mp3_shape(audio)
    return b"ID3\x04\0\0" + _synchsafe(len(tags)) + tags + shape.frame * shape.frames


# --- Opus in OGG (RFC 3533, RFC 6716, RFC 7845) -----------------------------------------------------------

OPUS_RATE = 48_000
OPUS_PACKET = 960
"""20 ms at 48 kHz, which is how Opus counts whatever went in."""
OPUS_PRE_SKIP = 312
OPUS_SILENCE = {1: b"\xf8\xff\xfe", 2: b"\xfc\xff\xfe"}
PACKETS_PER_PAGE = 50
FIRST_PAGE, LAST_PAGE, CONTINUED = 2, 4, 1
MOST_SEGMENTS = 255


@dataclass(slots=True)
class _Ogg:
    """Writes the pages of one stream."""

    serial: int
    pages: int = 0
    data: bytes = b""

    def page(self, lacing: Sequence[int], body: bytes, granule: int, flags: int) -> None:
        """Append one page."""
        head = struct.pack("<4sBBqIII", b"OggS", 0, flags, granule, self.serial, self.pages, 0)
        page = head + bytes([len(lacing), *lacing]) + body
        self.data += page[:22] + struct.pack("<I", checksum(page, 0x04C11DB7, 32)) + page[26:]
        self.pages += 1

    def packet(self, packet: bytes, flags: int = 0) -> None:
        """Append a header packet of any length, on pages of its own."""
        lacing = [255] * (len(packet) // 255) + [len(packet) % 255]
        for first in range(0, len(lacing), MOST_SEGMENTS):
            part = lacing[first : first + MOST_SEGMENTS]
            body, packet = packet[: sum(part)], packet[sum(part) :]
            # A page on which no packet ends has no position.
            granule = 0 if part[-1] < 255 else -1
            self.page(part, body, granule, flags | (CONTINUED if first else 0))


def opus(audio: Audio, *, metadata: Metadata | None = None) -> bytes:
    """Return silence as an Opus file in OGG."""
    channels = min(audio.channels, 2)
    tags = _comments(metadata or {})
    stream = _Ogg(serial=int.from_bytes(hashlib.sha256(tags).digest()[:4], "big"))
    stream.packet(b"OpusHead" + struct.pack("<BBHIHB", 1, channels, OPUS_PRE_SKIP, audio.rate, 0, 0), FIRST_PAGE)
    stream.packet(b"OpusTags" + tags)
    end = -(-audio.samples * OPUS_RATE // audio.rate) + OPUS_PRE_SKIP
    packets = -(-end // OPUS_PACKET)
    silence = OPUS_SILENCE[channels]
    for first in range(0, packets, PACKETS_PER_PAGE):
        count = min(PACKETS_PER_PAGE, packets - first)
        last = first + count == packets
        granule = end if last else (first + count) * OPUS_PACKET
        stream.page([len(silence)] * count, silence * count, granule, LAST_PAGE if last else 0)
    return stream.data
