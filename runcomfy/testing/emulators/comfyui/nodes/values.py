"""
What travels along the links of the emulated nodes, and how it is written into files.

The real server passes tensors and models; here a picture is a Pillow picture, a model is the name of its file, and a
conditioning is its text. Values are never changed after they were made: the server keeps them in its node cache.
Shapes and `str()` follow the tensors of the real server, since failures show their inputs as text.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import struct
import sys
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, PngImagePlugin

from runcomfy.testing.emulators.comfyui.nodes.base import NodeContext, SavePath

EMULATION_NOTE = "runcomfy-testing: no GPU model ran"
"""Written into every file that has a place for it, so that nobody takes it for the work of a model."""

SUMMARY_THRESHOLD = 1000
EDGE_ITEMS = 3
LINE_WIDTH = 80
"""How PyTorch prints tensors: whole up to 1000 elements, else three at each end, in lines of 80 characters."""


def tensor_text(shape: Sequence[int], value: Callable[[tuple[int, ...]], float]) -> str:
    """Return what PyTorch prints for a tensor of that shape, reading only the elements that are shown."""
    total = 1
    for size in shape:
        total *= size
    summarize = total > SUMMARY_THRESHOLD

    def shown(size: int) -> list[int | None]:
        if summarize and size > 2 * EDGE_ITEMS:
            return [*range(EDGE_ITEMS), None, *range(size - EDGE_ITEMS, size)]
        return list(range(size))

    def indices(depth: int, prefix: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if depth == len(shape):
            yield prefix
            return
        for one in shown(shape[depth]):
            if one is not None:
                yield from indices(depth + 1, (*prefix, one))

    numbers = {index: value(index) for index in indices(0, ())}
    whole = all(number == int(number) for number in numbers.values())
    texts = {index: f"{number:.0f}." if whole else f"{number:.4f}" for index, number in numbers.items()}
    width = max((len(text) for text in texts.values()), default=1)

    def vector(prefix: tuple[int, ...], indent: int) -> str:
        cells = [" ..." if i is None else texts[*prefix, i].rjust(width) for i in shown(shape[-1])]
        per_line = max(1, (LINE_WIDTH - indent) // (width + 2))
        lines = [", ".join(cells[i : i + per_line]) for i in range(0, len(cells), per_line)]
        return "[" + (",\n" + " " * (indent + 1)).join(lines) + "]"

    def block(prefix: tuple[int, ...], indent: int) -> str:
        depth = len(prefix)
        if depth == len(shape) - 1:
            return vector(prefix, indent)
        parts = ["..." if i is None else block((*prefix, i), indent + 1) for i in shown(shape[depth])]
        return "[" + ("," + "\n" * (len(shape) - depth - 1) + " " * (indent + 1)).join(parts) + "]"

    return f"tensor({block((), len('tensor('))})"


@dataclass(frozen=True, slots=True)
class Images:
    """An IMAGE: one or more pictures of one size, RGB or RGBA."""

    frames: tuple[Image.Image, ...]

    @property
    def width(self) -> int:
        """Pixels."""
        return self.frames[0].width

    @property
    def height(self) -> int:
        """Pixels."""
        return self.frames[0].height

    def map(self, change: Callable[[Image.Image], Image.Image]) -> Images:
        """Return the batch with every picture changed. One that occurs many times is changed once."""
        done: dict[int, Image.Image] = {}
        for frame in self.frames:
            if id(frame) not in done:
                done[id(frame)] = change(frame)
        return Images(tuple(done[id(frame)] for frame in self.frames))

    def __str__(self) -> str:
        channels = len(self.frames[0].getbands())

        def value(index: tuple[int, ...]) -> float:
            number, y, x, channel = index
            pixel: Any = self.frames[number].getpixel((x, y))
            return float(pixel[channel] if isinstance(pixel, tuple) else pixel) / 255

        return tensor_text((len(self.frames), self.height, self.width, channels), value)


@dataclass(frozen=True, slots=True)
class Masks:
    """A MASK: one or more grey pictures of one size; 255 is 1.0."""

    frames: tuple[Image.Image, ...]

    def __str__(self) -> str:
        def value(index: tuple[int, ...]) -> float:
            number, y, x = index
            pixel: Any = self.frames[number].getpixel((x, y))
            return float(pixel) / 255

        return tensor_text((len(self.frames), self.frames[0].height, self.frames[0].width), value)


@dataclass(frozen=True, slots=True)
class Latents:
    """A LATENT: the size in pixels, and the pictures that decoding will show, once a sampler has worked."""

    width: int
    height: int
    batch_size: int
    pictures: Images | None = None

    def __str__(self) -> str:
        shape = (self.batch_size, 4, self.height // 8, self.width // 8)
        return f"{{'samples': {tensor_text(shape, lambda _: 0.0)}, 'downscale_ratio_spacial': 8}}"


@dataclass(frozen=True, slots=True)
class Model:
    """A MODEL, CLIP, VAE, control net or session: what it would have been loaded from."""

    kind: str
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Conditioning:
    """A CONDITIONING: the text it would have been made from."""

    text: str
    guidance: float = 0.0


@dataclass(frozen=True, slots=True)
class Audio:
    """An AUDIO: silence of that length."""

    samples: int
    rate: int
    channels: int


@dataclass(frozen=True, slots=True)
class Video:
    """A VIDEO: pictures and their rate."""

    images: Images
    fps: float
    audio: Audio | None = None


@dataclass(frozen=True, slots=True)
class Voxels:
    """A VOXEL: a ball in a cube of `resolution` cells each way."""

    resolution: int


@dataclass(frozen=True, slots=True)
class File3D:
    """A FILE_3D: a model file in memory."""

    data: bytes
    extension: str = "glb"


def stable_random(*parts: object) -> random.Random:
    """Return a generator that gives the same numbers for the same parts on every platform and version."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return random.Random(int.from_bytes(digest, "big"))


def prompt_text(context: NodeContext) -> str | None:
    """Return the graph as it is written into files; None under `--disable-metadata`."""
    return json.dumps(context.prompt) if context.save_metadata else None


def graph_metadata(context: NodeContext) -> dict[str, str]:
    """Return what the real server writes into files, by key: the graph and the caller's `extra_pnginfo`, as JSON."""
    prompt = prompt_text(context)
    if prompt is None:
        return {}
    extra = context.extra_data.get("extra_pnginfo")
    more = {str(key): json.dumps(value) for key, value in extra.items()} if isinstance(extra, dict) else {}
    return {"prompt": prompt} | more


def _png_info(context: NodeContext) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    for key, value in graph_metadata(context).items():
        info.add_text(key, value)
    info.add_text("emulator", EMULATION_NOTE)
    return info


def png_bytes(picture: Image.Image, context: NodeContext, *, compress_level: int = 4) -> bytes:
    """Return a PNG file with the graph, the caller's `extra_pnginfo`, and the note that this is an emulation."""
    data = io.BytesIO()
    picture.save(data, format="PNG", pnginfo=_png_info(context), compress_level=compress_level)
    return data.getvalue()


def deep_png_bytes(picture: Image.Image, context: NodeContext, levels: Sequence[int]) -> bytes:
    """Return the same with 16 bits a channel, which Pillow does not write in colour.

    `levels` has the 16-bit value of each 8-bit colour value; alpha is spread evenly.
    """
    picture = picture if picture.mode in {"RGB", "RGBA"} else picture.convert("RGB")
    channels = len(picture.getbands())
    deep = array("H", map(levels.__getitem__, picture.tobytes()))
    if channels == 4:
        deep[3::4] = array("H", (value * 257 for value in picture.getchannel("A").tobytes()))
    if sys.byteorder == "little":
        deep.byteswap()
    rows, length = deep.tobytes(), picture.width * channels * 2
    lines = b"".join(b"\0" + rows[start : start + length] for start in range(0, len(rows), length))
    colour_type = 6 if channels == 4 else 2
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", picture.width, picture.height, 16, colour_type, 0, 0, 0)),
        *((kind, data) for kind, data, *_ in _png_info(context).chunks),
        (b"IDAT", zlib.compress(lines, 4)),
        (b"IEND", b""),
    ]
    packed = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def temp_prefix(context: NodeContext, stem: str = "ComfyUI") -> str:
    """Return the prefix of preview files: five letters, the same for one node of one server."""
    letters = stable_random(context.folders.temp, context.node_id)
    return f"{stem}_temp_" + "".join(letters.choices("abcdefghijklmnopqrstupvxyz", k=5))


def write_files(target: SavePath, files: Sequence[tuple[str, bytes]], kind: str) -> list[dict[str, str]]:
    """Write files beside each other; return their references. Blocks: call it on the executor."""
    for name, data in files:
        (target.folder / name).write_bytes(data)
    return [target.reference(name, kind) for name, _ in files]
