"""
What a file is, and whether it is whole: judged by its content, never by its name.

`inspect` is for results and raises OutputCorrupt; `check_input_image` is for files the user gives and raises
InputFileMissing or InputFileInvalid. Both block, so callers run them in a thread. The formats are told apart by
`media_sniff` and known by `media_picture`, `media_mesh`, `media_video` and `media_audio`; this module decides what runs
in a process of its own (`media_child`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Any, BinaryIO, Final

from runcomfy.adapters import media_child, media_picture
from runcomfy.adapters.files import is_exhausted, local_error, open_regular
from runcomfy.adapters.media_picture import Header, TooManyPixels
from runcomfy.adapters.media_sniff import HTML, TEXT, UNKNOWN, Sniffed, sniff
from runcomfy.adapters.media_source import Corrupt, Source
from runcomfy.domain.exceptions import InputFileInvalid, InputFileMissing, LocalError, OutputCorrupt, foreign_text
from runcomfy.domain.job import PICTURE_FORMATS, OutputKind
from runcomfy.ports.results import Media

INLINE_PIXELS: Final = 32_000_000
"""Stills up to this size are decoded in this process: at most 128 MB for a moment. Larger ones get a process of their
own, whose memory and time are limited."""
INLINE_ANIMATION_PIXELS: Final = 8_000_000
"""For GIF and WEBP, whose decoders hold several copies of the canvas."""
INLINE_BYTES: Final = 64 << 20

_BIG_DECODES: Final = threading.BoundedSemaphore(2)
_BIG_PIXELS: Final = 4_000_000
"""Pictures above this size are decoded two at a time, so that many jobs at once do not add up to gigabytes."""


def inspect(
    path: str | os.PathLike[str],
    *,
    max_pixels: int,
    expected: OutputKind | None = None,
    plain_text: bool = False,
) -> Media:
    """Decode a file and say what it is.

    `expected` is what it must be; None and FILE accept every kind. `plain_text` says that it is text which came as
    text (not as a file): then it may be empty, and may be about HTML. A link or a device is refused.

    Raises OutputCorrupt (broken, empty, a page of HTML, more than `max_pixels`, not of the expected kind) and
    LocalError (the file cannot be read).
    """
    try:
        with open_regular(path) as file:
            return _inspect(Source(file), path, max_pixels, expected, plain_text)
    except Corrupt as error:
        reason = foreign_text(error)
        raise OutputCorrupt(
            f"a result is not usable: {reason}",
            hint="run the job again; if it happens again, look at the node that writes this file",
            details={"reason": reason},
        ) from error
    except OSError as error:
        raise local_error(error, path, "read") from error


def _inspect(
    source: Source, path: str | os.PathLike[str], max_pixels: int, expected: OutputKind | None, plain_text: bool
) -> Media:
    if plain_text:
        return _check(source, TEXT, path, max_pixels)
    if not source.size:
        raise Corrupt("it is empty (0 bytes)")
    found = sniff(source, expected)
    wanted = _WANTED.get(expected or OutputKind.FILE, "a result")
    if found is HTML or expected not in {None, OutputKind.FILE, found.kind, *found.also}:
        raise Corrupt(f"it looks like {found.words} where {wanted} is expected")
    try:
        media = _check(source, found, path, max_pixels)
    except Corrupt as error:
        if found is TEXT and expected is not OutputKind.TEXT:
            # Many formats begin with readable lines; these are then files of a format that is not known here.
            return _check(source, UNKNOWN, path, max_pixels)
        raise Corrupt(f"it looks like {found.words}, but {error}") from error
    moving = media.details.get("frames", 0) > 1  # an animated picture is as good as a video
    if expected is OutputKind.VIDEO and media.kind in {OutputKind.AUDIO, OutputKind.IMAGE} and not moving:
        raise Corrupt(f"it looks like {found.words}, but has no moving pictures")
    if expected is OutputKind.AUDIO and media.kind is OutputKind.VIDEO:
        raise Corrupt(f"it looks like {found.words} where sound is expected")
    return media


_WANTED: Final = {
    OutputKind.IMAGE: "a picture",
    OutputKind.MESH: "a mesh",
    OutputKind.VIDEO: "a video",
    OutputKind.AUDIO: "sound",
    OutputKind.TEXT: "text",
}


def _check(source: Source, found: Sniffed, path: str | os.PathLike[str], max_pixels: int) -> Media:
    if found.check is not None:
        return found.check(source)
    details = _check_picture(source, found.picture, path, max_pixels) if found.picture else {}
    return Media(found.kind, found.mime, found.extension, details)


def _check_picture(source: Source, form: str, path: str | os.PathLike[str], max_pixels: int) -> Mapping[str, Any]:
    header = media_picture.read_header(source, form, max_pixels=max_pixels)
    details: dict[str, Any] = {"width": header.width, "height": header.height, "frames": header.frames}
    if _inline(header, source.size):
        return details | _decode_here(source.file, header)
    if header.proven:
        # Each row was counted and each checksum compared; decoding would only add the memory for all rows at once.
        return details
    return details | media_child.decode(path, header, size_bytes=source.size)


def _inline(header: Header, size_bytes: int) -> bool:
    moving = header.frames > 1 or header.format in {"GIF", "WEBP"}
    return header.pixels <= (INLINE_ANIMATION_PIXELS if moving else INLINE_PIXELS) and size_bytes <= INLINE_BYTES


def _decode_here(file: BinaryIO, header: Header) -> dict[str, Any]:
    if header.pixels <= _BIG_PIXELS:
        return media_picture.decode(file, header)
    with _BIG_DECODES:
        return media_picture.decode(file, header)


# --- what the user gives -----------------------------------------------------------------------------------

_ALSO_ACCEPTED: Final = {b"BM": "BMP", b"II*\0": "TIFF", b"MM\0*": "TIFF"}
"""Formats that ComfyUI loads too. They are the user's own files, so Pillow may try them."""


def check_input_file(path: str | os.PathLike[str]) -> int:
    """Make sure a file can be sent: it is there, ordinary, readable and not empty; return its size in bytes.

    Raises InputFileMissing, InputFileInvalid.
    """
    with _open_input(path) as file:
        return os.fstat(file.fileno()).st_size


def check_input_image(path: str | os.PathLike[str], max_pixels: int) -> None:
    """Make sure a file is a whole picture that ComfyUI can load, before anything is paid.

    Too many pixels are seen in the header, without decoding. Raises InputFileMissing, InputFileInvalid.
    """
    with _open_input(path) as file:
        source = Source(file)
        try:
            found = sniff(source)
            if found.picture:
                media_picture.read_header(source, found.picture, max_pixels=max_pixels, whole=False)
                _check_picture(source, found.picture, path, max_pixels)
            elif form := next((name for magic, name in _ALSO_ACCEPTED.items() if source.head.startswith(magic)), ""):
                _decode_other(file, form, max_pixels)
            else:
                raise InputFileInvalid(
                    f"{_shown(path)} is not a picture: it looks like {found.words}",
                    hint="give a PNG, JPEG, WEBP or GIF file",
                )
        except TooManyPixels as error:
            raise InputFileInvalid(
                f"{_shown(path)} is too large: {error}",
                hint="make the picture smaller, or raise RUNCOMFY_MAX_INPUT_PIXELS",
                details={"width": error.width, "height": error.height, "max_pixels": max_pixels},
            ) from error
        except Corrupt as error:
            raise InputFileInvalid(
                f"{_shown(path)} is damaged: {foreign_text(error)}",
                hint="open it in a picture viewer and save it again, or take another file",
            ) from error
        except OSError as error:
            raise input_error(error, path) from error


def _open_input(path: str | os.PathLike[str]) -> BinaryIO:
    try:
        file = open_regular(path, follow=True)
    except (OSError, ValueError) as error:
        raise input_error(error, path) from error
    if not os.fstat(file.fileno()).st_size:
        file.close()
        raise InputFileInvalid(f"{_shown(path)} is empty (0 bytes)", hint="take another file, or make it again")
    return file


def input_error(error: Exception, path: str | os.PathLike[str]) -> InputFileMissing | InputFileInvalid | LocalError:
    """Return what an operating system error about an input file means."""
    if isinstance(error, OSError) and is_exhausted(error):
        return local_error(error, path, "read")
    if os.path.isdir(path):  # noqa: PTH112 - never raises, whatever the path holds
        return InputFileInvalid(f"{_shown(path)} is a folder, not a file", hint="give the file inside it")
    if isinstance(error, FileNotFoundError):
        return InputFileMissing(
            f"there is no file {_shown(path)}", hint="check the path; it is relative to this folder"
        )
    if isinstance(error, PermissionError):
        return InputFileMissing(f"{_shown(path)} cannot be read: no permission", hint="check the file's permissions")
    reason = foreign_text(getattr(error, "strerror", None) or error)
    return InputFileMissing(f"{_shown(path)} cannot be read: {reason}", hint="check the path, or take another file")


def _shown(path: str | os.PathLike[str]) -> str:
    return foreign_text(os.fspath(path), limit=512)


def _decode_other(file: BinaryIO, form: str, max_pixels: int) -> None:
    from PIL.BmpImagePlugin import BmpImageFile
    from PIL.TiffImagePlugin import TiffImageFile

    file.seek(0)
    try:
        # Not by `Image.open`: that has a limit of its own, and calls what is above it broken.
        with (BmpImageFile if form == "BMP" else TiffImageFile)(file) as picture:
            width, height = picture.size
            if width * height > max_pixels:
                raise TooManyPixels(width, height, max_pixels)
            picture.load()
    except Corrupt:
        raise
    except Exception as error:
        if is_exhausted(error):
            raise
        raise Corrupt(f"it cannot be decoded ({str(error) or type(error).__name__})") from error


def likely_extension(path: str | os.PathLike[str]) -> str:
    """Return the ending that fits the first bytes of a file, broken or not. Raises OSError."""
    with open_regular(path) as file:
        source = Source(file)
        return sniff(source).extension if source.size else UNKNOWN.extension


# --- converting --------------------------------------------------------------------------------------------

CONVERTIBLE: Final = PICTURE_FORMATS
"""Format -> file extension."""


def convert(path: str, target: str, to: str, *, max_pixels: int) -> Media:
    """Write the picture at `path` to the new file `target` in another format; return what was written, inspected.

    Raises OutputCorrupt (that format cannot hold it), OSError (the disk), LocalError (no process could be started).
    """
    with open_regular(path) as file:
        source = Source(file)
        header = media_picture.read_header(source, sniff(source).picture, max_pixels=max_pixels)
        try:
            if _inline(header, source.size):
                media_picture.convert(file, header, target, to)
            else:
                media_child.convert(path, header, target, to, size_bytes=source.size)
        except Corrupt as error:
            raise OutputCorrupt(
                f"a picture could not be converted to {to}: {foreign_text(error)}",
                hint="run without --convert, and convert the picture yourself",
            ) from error
    return inspect(target, max_pixels=max_pixels, expected=OutputKind.IMAGE)
