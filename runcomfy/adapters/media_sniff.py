"""
Telling what a file is by its first bytes. Names and Content-Type headers have no say: both are written by strangers.

Formats on the allow-list get a checker that reads them to their end. A few more are known by their signature alone:
they are kept as files, unchecked, with the right ending.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from runcomfy.adapters import media_audio, media_mesh, media_video
from runcomfy.adapters.media_source import Corrupt, Source
from runcomfy.domain.job import OutputKind
from runcomfy.ports.results import Media

FILE, IMAGE, MESH, VIDEO, AUDIO = (
    OutputKind.FILE,
    OutputKind.IMAGE,
    OutputKind.MESH,
    OutputKind.VIDEO,
    OutputKind.AUDIO,
)

Check = Callable[[Source], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Sniffed:
    """What the first bytes say."""

    kind: OutputKind
    mime: str
    extension: str
    words: str
    """For people: `a PNG picture`."""
    picture: str = ""
    """Pillow's name of a picture format that is checked to the last pixel."""
    check: Callable[[Source], Media] | None = None
    """Reads other formats to their end. Raises Corrupt."""
    also: frozenset[OutputKind] = field(default=frozenset())
    """Kinds that it may turn out to be, or that it may stand for, beside its own."""


def _checked(kind: OutputKind, mime: str, extension: str, words: str, check: Check) -> Sniffed:
    return Sniffed(kind, mime, extension, words, check=lambda source: Media(kind, mime, extension, check(source)))


def _known(mime: str, extension: str, words: str, *stands_for: OutputKind) -> Sniffed:
    return Sniffed(FILE, mime, extension, words, also=frozenset(stands_for))


def _mp4(source: Source) -> Media:
    pictures, details = media_video.check_mp4(source)
    if not pictures:
        return Media(AUDIO, "audio/mp4", ".m4a", details)
    if media_video.mp4_brand(source.head) == "qt  ":
        return Media(VIDEO, "video/quicktime", ".mov", details)
    return Media(VIDEO, "video/mp4", ".mp4", details)


def _matroska(source: Source) -> Media:
    pictures, doc_type, details = media_video.check_matroska(source)
    kind, word = (VIDEO, "video") if pictures else (AUDIO, "audio")
    if doc_type == "webm":
        return Media(kind, f"{word}/webm", ".webm", details)
    return Media(kind, f"{word}/x-matroska", ".mkv" if pictures else ".mka", details)


def _ogg(source: Source) -> Media:
    details = media_audio.check_ogg(source)
    if "theora" in details["codecs"]:
        return Media(VIDEO, "video/ogg", ".ogv", details)
    return Media(AUDIO, "audio/ogg", ".opus" if details["codecs"] == ["opus"] else ".ogg", details)


def _check_text(source: Source) -> Mapping[str, Any]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    characters = 0
    try:
        for piece in source.pieces(0, source.size):
            if b"\0" in piece:
                raise Corrupt("it goes on as something else (a zero byte)")
            characters += len(decoder.decode(piece))
        characters += len(decoder.decode(b"", final=True))
    except UnicodeDecodeError as error:
        raise Corrupt(f"it is not valid UTF-8 ({error.reason})") from error
    return {"characters": characters}


PNG: Final = Sniffed(IMAGE, "image/png", ".png", "a PNG picture", "PNG")
JPEG: Final = Sniffed(IMAGE, "image/jpeg", ".jpg", "a JPEG picture", "JPEG")
GIF: Final = Sniffed(IMAGE, "image/gif", ".gif", "a GIF picture", "GIF", also=frozenset({VIDEO}))
WEBP: Final = Sniffed(IMAGE, "image/webp", ".webp", "a WEBP picture", "WEBP", also=frozenset({VIDEO}))
GLB: Final = _checked(MESH, "model/gltf-binary", ".glb", "a GLB mesh", media_mesh.check_glb)
GLTF: Final = _checked(MESH, "model/gltf+json", ".gltf", "a glTF mesh", media_mesh.check_gltf)
PLY: Final = _checked(MESH, "model/ply", ".ply", "a PLY mesh", media_mesh.check_ply)
STL: Final = _checked(MESH, "model/stl", ".stl", "an STL mesh", media_mesh.check_binary_stl)
TEXT_STL: Final = _checked(MESH, "model/stl", ".stl", "an STL mesh", media_mesh.check_text_stl)
OBJ: Final = _checked(MESH, "model/obj", ".obj", "an OBJ mesh", media_mesh.check_obj)
MP4: Final = Sniffed(VIDEO, "video/mp4", ".mp4", "an MP4 video", check=_mp4, also=frozenset({AUDIO}))
MATROSKA: Final = Sniffed(VIDEO, "video/webm", ".webm", "a WEBM video", check=_matroska, also=frozenset({AUDIO}))
OGG: Final = Sniffed(AUDIO, "audio/ogg", ".ogg", "OGG sound", check=_ogg, also=frozenset({VIDEO}))
FLAC: Final = _checked(AUDIO, "audio/flac", ".flac", "FLAC sound", media_audio.check_flac)
WAV: Final = _checked(AUDIO, "audio/wav", ".wav", "WAV sound", media_audio.check_wav)
MP3: Final = _checked(AUDIO, "audio/mpeg", ".mp3", "MP3 sound", media_audio.check_mp3)
TEXT: Final = _checked(OutputKind.TEXT, "text/plain", ".txt", "text", _check_text)
HTML: Final = Sniffed(OutputKind.TEXT, "text/html", ".txt", "a web page (HTML)")
"""Set aside as .txt: nobody should open a stranger's page by clicking on it."""
UNKNOWN: Final = Sniffed(FILE, "application/octet-stream", ".bin", "a file of an unknown format")

_AAC: Final = _known("audio/aac", ".aac", "AAC sound", AUDIO)
_SVG: Final = _known("image/svg+xml", ".svg", "an SVG drawing", IMAGE, OutputKind.TEXT)
_COLLADA: Final = _known("model/vnd.collada+xml", ".dae", "a COLLADA model", MESH)
_TEXT_FBX: Final = _known("application/octet-stream", ".fbx", "an FBX model", MESH)

_BY_START: Final[tuple[tuple[bytes, Sniffed], ...]] = (
    (b"\x89PNG\r\n\x1a\n", PNG),
    (b"\xff\xd8\xff", JPEG),
    (b"GIF87a", GIF),
    (b"GIF89a", GIF),
    (media_mesh.GLB_MAGIC, GLB),
    (b"ply\n", PLY),
    (b"ply\r\n", PLY),
    (media_video.EBML, MATROSKA),
    (b"OggS", OGG),
    (b"fLaC", FLAC),
    (b"Kaydara FBX Binary", _known("application/octet-stream", ".fbx", "an FBX model", MESH)),
    (b"BM", _known("image/bmp", ".bmp", "a BMP picture", IMAGE)),
    (b"II*\0", _known("image/tiff", ".tif", "a TIFF picture", IMAGE)),
    (b"MM\0*", _known("image/tiff", ".tif", "a TIFF picture", IMAGE)),
    (b"v/1\x01", _known("image/x-exr", ".exr", "an EXR picture", IMAGE)),
    (b"#?RADIANCE", _known("image/vnd.radiance", ".hdr", "an HDR picture", IMAGE)),
    (b"\xff\xf1", _AAC),
    (b"\xff\xf9", _AAC),
    (b"8BPS", _known("image/vnd.adobe.photoshop", ".psd", "a Photoshop picture", IMAGE)),
    (b"\xff\x0a", _known("image/jxl", ".jxl", "a JPEG XL picture", IMAGE)),
    (b"\0\0\0\x0cJXL ", _known("image/jxl", ".jxl", "a JPEG XL picture", IMAGE)),
    (b"PK\x03\x04", _known("application/zip", ".zip", "a ZIP archive", MESH)),
    (b"\x1f\x8b", _known("application/gzip", ".gz", "a GZIP archive", MESH)),
    (b"\x93NUMPY", _known("application/octet-stream", ".npy", "a NumPy array")),
    (b"%PDF-", _known("application/pdf", ".pdf", "a PDF document")),
    (b"FORM", _known("audio/aiff", ".aiff", "AIFF sound", AUDIO)),
    (b"MThd", _known("audio/midi", ".mid", "a MIDI file", AUDIO)),
)

_RIFF: Final[Mapping[bytes, Sniffed]] = {
    b"WEBP": WEBP,
    b"WAVE": WAV,
    b"AVI ": _known("video/x-msvideo", ".avi", "an AVI video", VIDEO),
}

_PICTURE_BRANDS: Final = frozenset({"avif", "avis", "heic", "heix", "mif1", "msf1"})
_AVIF: Final = _known("image/avif", ".avif", "an AVIF or HEIC picture", IMAGE)


def sniff(source: Source, expected: OutputKind | None = None) -> Sniffed:
    """Tell what a file is. `expected` decides where text may be read as more than text. Nothing is checked here."""
    head = source.head
    found = next((sniffed for start, sniffed in _BY_START if head.startswith(start)), None)
    if found is None and head[:4] in {b"RIFF", b"RF64"}:
        found = _RIFF.get(head[8:12])
    if found is not None and not (found.kind is FILE and looks_like_text(source)):
        return found
    if looks_like_text(source):
        return HTML if _is_html(head) else _text(source, expected)
    if media_video.is_mp4(head):
        return _AVIF if media_video.mp4_brand(head) in _PICTURE_BRANDS else MP4
    if media_audio.is_mp3(source):
        return MP3
    return STL if media_mesh.is_binary_stl(source) else UNKNOWN


def _text(source: Source, expected: OutputKind | None) -> Sniffed:
    if expected is OutputKind.TEXT:
        return TEXT
    start = source.head.removeprefix(codecs.BOM_UTF8).lstrip()
    if start.startswith(b"; FBX"):
        return _TEXT_FBX
    first = _first_element(source.head)
    if first.startswith((b"<svg", b"<collada")):
        return _SVG if first.startswith(b"<svg") else _COLLADA
    if start.startswith(b"{") and (b'"asset"' in start or expected is MESH):
        return GLTF
    return {"obj": OBJ, "stl": TEXT_STL}.get(media_mesh.is_text_mesh(source.head), TEXT)


def looks_like_text(source: Source) -> bool:
    """Whether the first bytes are UTF-8 without a zero byte."""
    head = source.head
    if b"\0" in head:
        return False
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head, source.size <= len(head))
    except UnicodeDecodeError:
        return False
    return True


_HTML_STARTS: Final = (b"<!doctype html", b"<html", b"<head", b"<body", b"<title", b"<script")


def _is_html(head: bytes) -> bool:
    return _first_element(head).startswith(_HTML_STARTS)


def _first_element(head: bytes) -> bytes:
    """Return the text, in small letters, from its first element on; comments and the XML line are passed over."""
    start = head.removeprefix(codecs.BOM_UTF8).lstrip().lower()
    while start.startswith((b"<!--", b"<?xml", b"<!doctype svg")):
        start = start.partition(b"-->" if start.startswith(b"<!--") else b">")[2].lstrip()
    return start
