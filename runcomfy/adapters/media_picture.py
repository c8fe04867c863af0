"""
Pictures: PNG, JPEG, GIF and WEBP, from the size in the header to the last pixel.

Rule 1: nothing is decoded before the header's size is known and allowed.
Rule 2: what decoders forgive is checked here by hand: PNG checksums and the exact amount of pixel data (Pillow shows a
picture with half its rows as whole, the rest black), a JPEG's end marker, the block structure of GIF and WEBP.
Rule 3: Pillow is only ever offered the format that was found; its parsers for other formats are never reached.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from runcomfy.adapters.files import is_exhausted, open_new
from runcomfy.adapters.media_source import CHUNK, Corrupt, Source

if TYPE_CHECKING:
    from PIL import Image

ANIMATION_PIXELS: Final = 400_000_000
"""How many pixels of an animation are decoded, all frames together: some seconds. Later frames are checked by
structure only, and the details say how many were decoded."""
JPEG_FULL_PIXELS: Final = 32_000_000
"""Larger JPEG pictures are read in full and decoded at an eighth of their size."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a picture says of itself, its structure checked."""

    format: str
    """Pillow's name: PNG, JPEG, GIF, WEBP."""
    width: int
    height: int
    frames: int = 1
    proven: bool = False
    """Every pixel was already shown to be there, without decoding (PNG)."""

    @property
    def pixels(self) -> int:
        """Pixels of one frame."""
        return self.width * self.height


class TooManyPixels(Corrupt):
    """The header promises more pixels than are allowed."""

    def __init__(self, width: int, height: int, limit: int) -> None:
        super().__init__(
            f"it has {width} x {height} pixels ({width * height / 1e6:.0f} megapixels; "
            f"{limit / 1e6:g} megapixels are allowed)"
        )
        self.width = width
        self.height = height


def _checked(width: int, height: int, limit: int) -> None:
    if width < 1 or height < 1:
        raise Corrupt(f"it says it is {width} x {height} pixels")
    if width * height > limit:
        raise TooManyPixels(width, height, limit)


def read_header(source: Source, form: str, *, max_pixels: int, whole: bool = True) -> Header:
    """Read size and structure. `whole` False stops at the size, which is quick for any file. Raises Corrupt."""
    return _READERS[form](source, max_pixels, whole)


# --- PNG (W3C PNG specification, third edition) ------------------------------------------------------------

_CHANNELS: Final = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_DEPTHS: Final = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_ADAM7: Final = ((0, 8, 0, 8), (4, 8, 0, 8), (0, 4, 4, 8), (2, 4, 0, 4), (0, 2, 2, 4), (1, 2, 0, 2), (0, 1, 1, 2))
"""x start, x step, y start, y step of each pass."""
_MAX_FILTER: Final = 4


class _Scanlines:
    """Inflates the pixel data of one frame, keeps none of it, and counts that every row is there."""

    def __init__(self, width: int, height: int, bits: int, interlaced: bool) -> None:
        passes = _ADAM7 if interlaced else ((0, 1, 0, 1),)
        sizes = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, dx, y, dy in passes]
        self._passes = [(1 + (w * bits + 7) // 8, h) for w, h in sizes if w > 0 and h > 0]
        self._left = [stride * rows for stride, rows in self._passes]
        self._pass = 0
        self._inflate = zlib.decompressobj()
        self.fed = False

    def feed(self, data: bytes) -> None:
        """Take a piece of the compressed stream."""
        self.fed = True
        while data and self._pass < len(self._passes) and not self._inflate.eof:
            self._count(self._unpack(data))
            data = self._inflate.unconsumed_tail

    def _unpack(self, data: bytes) -> bytes:
        try:
            return self._inflate.decompress(data, CHUNK)
        except zlib.error as error:
            raise Corrupt(f"its pixel data cannot be unpacked ({error})") from error

    def _count(self, rows: bytes) -> None:
        while rows and self._pass < len(self._passes):
            stride, _ = self._passes[self._pass]
            left = self._left[self._pass]
            # Rows start where what is left is a multiple of the row's length; each starts with its filter's number.
            filters = rows[left % stride : left : stride]
            if filters and max(filters) > _MAX_FILTER:
                raise Corrupt("its pixel data is damaged (a row with an unknown filter)")
            taken = min(left, len(rows))
            self._left[self._pass] = left - taken
            rows = rows[taken:]
            if left == taken:
                self._pass += 1

    def finish(self) -> None:
        """Say that the stream is over."""
        # The unpacker may have taken all bytes in and still hold back some that did not fit the last piece.
        while self._pass < len(self._passes) and (rows := self._unpack(b"")):
            self._count(rows)
        if self._pass < len(self._passes):
            missing = sum(self._left)
            raise Corrupt(f"its pixel data is cut off: {missing} bytes of rows are missing")


def _png_chunks(source: Source) -> Iterator[tuple[bytes, int, int]]:
    """Yield (type, offset of data, length) up to and including IEND."""
    offset = 8
    while True:
        length, kind = struct.unpack(">I4s", source.at(offset, 8))
        if not kind.isalpha() or not kind.isascii():
            raise Corrupt(f"it is damaged at byte {offset} (no chunk begins there)")
        if offset + 12 + length > source.size:
            raise Corrupt(f"it is cut off inside its {kind.decode()} part")
        yield kind, offset + 8, length
        if kind == b"IEND":
            return
        offset += 12 + length


class _PngWalk:
    """One pass over the chunks of a PNG file."""

    def __init__(self, source: Source, max_pixels: int) -> None:
        self._source = source
        kind, offset, length = next(_png_chunks(source))
        if kind != b"IHDR" or length != 13:
            raise Corrupt("its header is missing")
        fields = struct.unpack(">IIBBBBB", source.at(offset, 13))
        self.width, self.height, depth, color, compression, filtering, interlace = fields
        if depth not in _DEPTHS.get(color, ()) or compression or filtering or interlace > 1:
            raise Corrupt("its header holds values that PNG does not have")
        _checked(self.width, self.height, max_pixels)
        self._bits = depth * _CHANNELS[color]
        self._interlaced = bool(interlace)
        self._palette_needed = color == 3
        self._lines: _Scanlines | None = _Scanlines(self.width, self.height, self._bits, self._interlaced)
        self._budget = max(ANIMATION_PIXELS, self.width * self.height)
        self.frames = 0

    def run(self) -> None:
        main = False
        for kind, offset, length in _png_chunks(self._source):
            crc = zlib.crc32(kind)
            feeding = kind in {b"IDAT", b"fdAT"}
            skip = 4 if kind == b"fdAT" else 0
            for piece in self._source.pieces(offset, length):
                crc = zlib.crc32(piece, crc)
                if feeding and self._lines:
                    self._lines.feed(piece[skip:])
                    skip = 0
            if crc != int.from_bytes(self._source.at(offset + length, 4), "big"):
                raise Corrupt(f"it is damaged: the checksum of its {kind.decode()} part is wrong")
            main = main or kind == b"IDAT"
            if kind == b"fcTL":
                self._next_frame(self._source.at(offset, length))
            elif kind == b"PLTE":
                self._palette_needed = False
        if not main:
            raise Corrupt("it has no pixel data")
        if self._palette_needed:
            raise Corrupt("its palette is missing")
        if self._lines:
            self._lines.finish()

    def _next_frame(self, control: bytes) -> None:
        """An animation's next frame: the one before must be whole, its pixels within the picture."""
        if len(control) != 26:
            raise Corrupt("its animation is damaged")
        width, height, x, y = struct.unpack(">IIII", control[4:20])
        if not width or not height or x + width > self.width or y + height > self.height:
            raise Corrupt("its animation has a frame outside the picture")
        if self._lines and self._lines.fed:
            self._lines.finish()
        self.frames += 1
        self._budget -= width * height
        self._lines = _Scanlines(width, height, self._bits, self._interlaced) if self._budget >= 0 else None


def _read_png(source: Source, max_pixels: int, whole: bool) -> Header:
    walk = _PngWalk(source, max_pixels)
    if whole:
        walk.run()
    return Header("PNG", walk.width, walk.height, frames=max(1, walk.frames), proven=whole)


# --- JPEG (ITU-T T.81) -------------------------------------------------------------------------------------

_FRAME_MARKERS: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_START_OF_SCAN: Final = 0xDA
_BARE_MARKERS: Final = frozenset({0x01, *range(0xD0, 0xD8)})


def _read_jpeg(source: Source, max_pixels: int, whole: bool) -> Header:
    offset, size = 2, None
    while True:
        lead, marker = source.at(offset, 2)
        if lead != 0xFF:
            raise Corrupt(f"it is damaged at byte {offset} (no segment begins there)")
        if marker == 0xFF or marker in _BARE_MARKERS:
            offset += 1 if marker == 0xFF else 2
            continue
        length = int.from_bytes(source.at(offset + 2, 2), "big")
        if marker in _FRAME_MARKERS:
            height, width = struct.unpack(">HH", source.at(offset + 5, 4))
            _checked(width, height, max_pixels)
            size = (width, height)
            if not whole:
                break
        offset += 2 + length
        if marker == _START_OF_SCAN:
            break
    if size is None:
        raise Corrupt("its header is missing")
    if whole:
        # Each block of 8 x 8 pixels takes at least one bit in the file.
        if source.size * 512 < size[0] * size[1]:
            raise Corrupt("it promises more pixels than its bytes can hold")
        _find_end_of_jpeg(source, offset)
    return Header("JPEG", *size)


def _find_end_of_jpeg(source: Source, offset: int) -> None:
    # Inside pixel data FF is always followed by 00 or a restart marker, so this cannot be found by accident.
    before = b""
    for piece in source.pieces(offset, source.size - offset):
        if b"\xff\xd9" in before + piece:
            return
        before = piece[-1:]
    raise Corrupt("it is cut off: its end marker is missing")


# --- GIF (CompuServe GIF89a) -------------------------------------------------------------------------------


class _GifWalk:
    """One pass over the blocks of a GIF file."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.width, self.height, flags = struct.unpack("<HHB", source.at(6, 5))
        self._offset = 13 + self._table(flags)
        self.frames = 0

    @staticmethod
    def _table(flags: int) -> int:
        return 3 << ((flags & 7) + 1) if flags & 0x80 else 0

    def run(self, max_pixels: int) -> None:
        while True:
            kind = self._source.at(self._offset, 1)
            self._offset += 1
            if kind == b";":
                break
            if kind == b"!":
                self._offset += 1
            elif kind == b",":
                x, y, width, height, flags = struct.unpack("<HHHHB", self._source.at(self._offset, 9))
                # A frame that sticks out makes the picture larger for the decoder.
                _checked(max(self.width, x + width), max(self.height, y + height), max_pixels)
                self._offset += 10 + self._table(flags)
                self.frames += 1
            else:
                raise Corrupt(f"it is damaged at byte {self._offset - 1} (no block begins there)")
            self._skip()
        if not self.frames:
            raise Corrupt("it has no picture in it")

    def _skip(self) -> None:
        while length := self._source.at(self._offset, 1)[0]:
            self._offset += 1 + length
        self._offset += 1


def _read_gif(source: Source, max_pixels: int, whole: bool) -> Header:
    walk = _GifWalk(source)
    _checked(walk.width, walk.height, max_pixels)
    if whole:
        walk.run(max_pixels)
    return Header("GIF", walk.width, walk.height, frames=max(1, walk.frames))


# --- WEBP (RFC 9649) ---------------------------------------------------------------------------------------


def _read_webp(source: Source, max_pixels: int, whole: bool) -> Header:
    size = _webp_size(source)
    _checked(*size, max_pixels)
    frames = 0
    if whole:
        end = int.from_bytes(source.at(4, 4), "little") + 8
        if end > source.size:
            raise Corrupt(f"it is cut off: {end} bytes are promised, the file has {source.size}")
        offset = 12
        while offset < end:
            kind, length = struct.unpack("<4sI", source.at(offset, 8))
            offset += 8 + length + (length & 1)
            # The last chunk's padding byte is left out by some writers.
            if offset - (length & 1) > end:
                raise Corrupt("it is damaged: one of its parts is longer than the file")
            frames += kind == b"ANMF"
    return Header("WEBP", *size, frames=max(1, frames))


def _webp_size(source: Source) -> tuple[int, int]:
    kind = source.at(12, 4)
    if kind == b"VP8X":
        data = source.at(24, 6)
        return int.from_bytes(data[:3], "little") + 1, int.from_bytes(data[3:], "little") + 1
    if kind == b"VP8L" and source.at(20, 1) == b"\x2f":
        bits = int.from_bytes(source.at(21, 4), "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 " and source.at(23, 3) == b"\x9d\x01\x2a":
        width, height = struct.unpack("<HH", source.at(26, 4))
        return width & 0x3FFF, height & 0x3FFF
    raise Corrupt("its header is damaged")


_READERS: Final = {"PNG": _read_png, "JPEG": _read_jpeg, "GIF": _read_gif, "WEBP": _read_webp}


# --- decoding ----------------------------------------------------------------------------------------------


def decode(file: BinaryIO, header: Header) -> dict[str, Any]:
    """Decode every pixel, of every frame within ANIMATION_PIXELS; return mode and number of frames decoded.

    Raises Corrupt. Needs memory for one or two frames: the caller has checked the size.
    """
    from PIL import Image as Images

    file.seek(0)
    try:
        with Images.open(file, formats=[header.format]) as picture:
            if picture.size != (header.width, header.height):
                raise Corrupt("its header contradicts itself")
            mode = picture.mode
            if header.format == "JPEG" and header.pixels > JPEG_FULL_PIXELS:
                # Reads every byte of pixel data, and keeps one pixel of 64: a cut is seen, the memory is not needed.
                picture.draft(mode, (1, 1))
            picture.load()
            frames = 1
            most = max(1, ANIMATION_PIXELS // header.pixels)
            while frames < min(header.frames, most):
                picture.seek(frames)
                picture.load()
                frames += 1
    except Corrupt:
        raise
    except MemoryError as error:
        raise Corrupt("it takes more memory to decode than is allowed") from error
    except Exception as error:
        if is_exhausted(error):
            raise
        raise Corrupt(f"it cannot be decoded ({str(error) or type(error).__name__})") from error
    return {"mode": mode, "frames_decoded": frames}


def convert(file: BinaryIO, header: Header, target: str, to: str) -> None:
    """Write the picture in another format (png, jpg, webp) to `target`, a new file.

    Colour profile and EXIF go along. An animation stays one in WEBP, and becomes its first frame elsewhere.
    Transparency is laid on white for JPEG, which has none. Raises Corrupt, OSError (disk).
    """
    from PIL import Image as Images

    file.seek(0)
    with open_new(target) as out:
        try:
            with Images.open(file, formats=[header.format]) as picture:
                kept = {key: picture.info[key] for key in ("icc_profile", "exif") if picture.info.get(key)}
                if to == "jpg":
                    _on_white(picture).save(out, "JPEG", quality=95, subsampling=0, **kept)
                elif to == "webp":
                    picture.save(out, "WEBP", quality=92, method=4, save_all=header.frames > 1, **kept)
                else:
                    _as_still(picture).save(out, "PNG", **kept)
        except OSError as error:
            # Pillow reports what it cannot do as OSError without a number; the disk's errors have one.
            if error.errno is not None:
                raise
            raise Corrupt(str(error)) from error
        except MemoryError as error:
            raise Corrupt("it takes more memory than is allowed") from error
        except Exception as error:
            raise Corrupt(str(error) or type(error).__name__) from error


def _as_still(picture: Image.Image) -> Image.Image:
    if picture.mode in {"CMYK", "YCbCr", "LAB", "HSV"}:
        return picture.convert("RGB")
    return picture.copy()


def _on_white(picture: Image.Image) -> Image.Image:
    from PIL import Image as Images

    if picture.mode in {"RGB", "L"} and "transparency" not in picture.info:
        return picture
    if picture.mode.startswith("I"):
        # 16 bits per pixel: JPEG has 8, and a plain conversion would clip instead of scale.
        return picture.point(lambda value: value * (1 / 257)).convert("L")
    clear = picture.convert("RGBA")
    white = Images.new("RGBA", clear.size, "white")
    return Images.alpha_composite(white, clear).convert("RGB")
