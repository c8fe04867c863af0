"""
Pictures without a model: depth from brightness, a stand-in for a diffusion model, backgrounds taken away, previews.

The stand-in lights the depth picture as a relief of two metals under a studio light. Which metals, panels and scratches
follows from the prompt and the seed; the shape follows the depth picture, and its brightness with it, so that whatever
is built from the result still follows the picture that went in. All noise comes from `random.Random` and all work is
integer work of Pillow's on 8-bit pictures, so equal inputs give equal pixels. It takes about 0.15 s for 512x512.
"""

from __future__ import annotations

import colorsys
import io
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

from runcomfy.testing.emulators.comfyui.nodes.values import stable_random

RGB = tuple[int, int, int]

PREVIEW_SIZE = 128
"""Longer side of a sampler's preview, in pixels: enough to see what it will be, small on the wire."""

HUES = {
    "red": 0.0, "scarlet": 0.99, "crimson": 0.97, "rust": 0.04, "copper": 0.055, "orange": 0.075, "bronze":
    0.09, "gold": 0.12, "golden": 0.12, "amber": 0.11, "yellow": 0.14, "lime": 0.25, "green": 0.34, "emerald":
    0.39, "jade": 0.42, "turquoise": 0.47, "teal": 0.48, "cyan": 0.51, "bluish": 0.58, "azure": 0.58, "blue":
    0.60, "indigo": 0.68, "violet": 0.75, "purple": 0.78, "magenta": 0.86, "pink": 0.92,
}  # fmt: skip
PALE = frozenset({"grey", "gray", "dark-grey", "white", "black", "chrome", "cromatic", "silver", "steel", "monochrome"})


# --- depth ------------------------------------------------------------------------------------------------


def depth_map(picture: Image.Image, resolution: int = 512) -> Image.Image:
    """Return a depth-like RGB picture, near is bright: the brightness, stretched to full contrast and smoothed.

    The shorter side becomes `resolution`, both rounded to multiples of 64, as the real preprocessors do.
    """
    scale = resolution / min(picture.size)
    size = tuple(max(64, round(side * scale / 64) * 64) for side in picture.size)
    grey = picture.convert("RGB").convert("L").resize((size[0], size[1]), Image.Resampling.BOX)
    grey = ImageOps.autocontrast(grey, cutoff=(0.5, 0.5))
    broad = grey.filter(ImageFilter.BoxBlur(max(1, resolution // 96)))
    fine = grey.filter(ImageFilter.BoxBlur(1))
    return Image.blend(broad, fine, 0.5).convert("RGB")


# --- noise ------------------------------------------------------------------------------------------------


def white_noise(numbers: random.Random, size: tuple[int, int]) -> Image.Image:
    """Return a grey picture of independent random pixels."""
    return Image.frombytes("L", size, numbers.randbytes(size[0] * size[1]))


def cloud_noise(numbers: random.Random, size: tuple[int, int], cells: Sequence[int]) -> Image.Image:
    """Return smooth noise: one layer for each number of cells, each half as strong as the one before."""
    total = Image.new("L", size, 128)
    for strength, cell in enumerate(cells):
        layer = white_noise(numbers, (cell, cell)).resize(size, Image.Resampling.BICUBIC)
        total = Image.blend(total, layer, 0.62 / (1 + 0.55 * strength))
    return total


def panels(numbers: random.Random, size: tuple[int, int]) -> tuple[Image.Image, Image.Image]:
    """Return a mosaic of plates with differing greys, and the seams between them (white on black)."""
    width, height = size
    mosaic = Image.new("L", size, numbers.randrange(256))
    boxes = [(0, 0, width, height)]
    while boxes:
        left, top, right, bottom = boxes.pop()
        wide, high = right - left, bottom - top
        if max(wide, high) < size[0] // 6 or (max(wide, high) < size[0] // 3 and numbers.random() < 0.35):
            mosaic.paste(numbers.randrange(256), (left, top, right, bottom))
            continue
        if wide >= high:
            cut = left + round(wide * (0.3 + 0.4 * numbers.random()))
            boxes += [(left, top, cut, bottom), (cut, top, right, bottom)]
        else:
            cut = top + round(high * (0.3 + 0.4 * numbers.random()))
            boxes += [(left, top, right, cut), (left, cut, right, bottom)]
    edges = ImageChops.difference(mosaic, mosaic.filter(ImageFilter.MaxFilter(3)))
    return mosaic, edges.point([0 if value < 3 else 255 for value in range(256)])


def bent(picture: Image.Image, numbers: random.Random) -> Image.Image:
    """Return the picture turned and drawn out of square, so that straight seams run across a shape at angles."""
    width, height = picture.size

    def moved(x: int, y: int) -> tuple[float, float]:
        return x + (numbers.random() - 0.5) * width * 0.5, y + (numbers.random() - 0.5) * height * 0.5

    quad = (*moved(0, 0), *moved(0, height), *moved(width, height), *moved(width, 0))
    turned = picture.transform(picture.size, Image.Transform.QUAD, quad, Image.Resampling.BILINEAR)
    return ImageChops.lighter(turned, Image.new(turned.mode, turned.size, 0))


# --- colour -----------------------------------------------------------------------------------------------


def _shade(hue: float, saturation: float, value: float) -> RGB:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1.0, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def palettes(prompt: str, numbers: random.Random) -> tuple[list[RGB], list[RGB]]:
    """Return two ramps from dark to bright: what the prompt's words ask for, the rest by chance."""
    words = re.findall(r"[a-z-]+", prompt.lower())
    named = [HUES[word] for word in words if word in HUES]
    first = named[0] if named else numbers.random()
    second = named[1] if len(named) > 1 else first + 0.35 * (numbers.random() - 0.5)
    first += 0.03 * (numbers.random() - 0.5)
    rich = (0.22 if any(word in PALE for word in words) else 0.55) + 0.15 * numbers.random()

    def ramp(hue: float, saturation: float) -> list[RGB]:
        return [
            _shade(hue + 0.04, min(1.0, saturation * 1.3), 0.03),
            _shade(hue + 0.02, min(1.0, saturation * 1.2), 0.24),
            _shade(hue, saturation, 0.55),
            _shade(hue - 0.02, saturation * 0.65, 0.83),
            _shade(hue - 0.04, saturation * 0.15, 1.0),
        ]

    return ramp(first, rich * 0.55), ramp(second, rich)


def graded(grey: Image.Image, ramp: Sequence[RGB]) -> Image.Image:
    """Return a grey picture coloured by a ramp."""
    bands = []
    for band in range(3):
        table = []
        for value in range(256):
            place = value / 255 * (len(ramp) - 1)
            index = min(int(place), len(ramp) - 2)
            rest = place - index
            table.append(round(ramp[index][band] * (1 - rest) + ramp[index + 1][band] * rest))
        bands.append(grey.point(table))
    return Image.merge("RGB", bands)


# --- the stand-in for a diffusion model -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Look:
    """Everything that prompt and seed decide, so that it can be told apart from what the depth decides."""

    light: tuple[int, int]
    """Where the light comes from: -1, 0 or 1 in x and y."""
    bands: int
    """How many reflections run across the metal."""
    plates: Image.Image
    seams: Image.Image
    clouds: Image.Image
    grain: Image.Image
    metals: tuple[list[RGB], list[RGB]]


def look_of(prompt: str, seed: int, steps: int, size: tuple[int, int]) -> Look:
    """Draw the dice for a prompt and a seed."""
    by_words = stable_random("prompt", prompt)
    numbers = stable_random("render", prompt, seed, steps)
    plates, seams = panels(numbers, size)
    shape = stable_random("bend", seed).randrange(2**32)
    return Look(
        light=(by_words.choice((-1, 1)), 1),
        bands=by_words.randrange(3, 6),
        plates=bent(plates, random.Random(shape)),
        seams=bent(seams, random.Random(shape)),
        clouds=cloud_noise(numbers, size, (5, 11, 23, 47)),
        grain=white_noise(numbers, size),
        metals=palettes(prompt, by_words),
    )


def lit(height: Image.Image, light: tuple[int, int], reach: int) -> Image.Image:
    """Return how a surface of these heights is lit from one side; 128 is flat. `reach` is the width of its slopes."""
    x, y = light[0] * reach, light[1] * reach
    towards, away = ImageChops.offset(height, x, y), ImageChops.offset(height, -x, -y)
    slopes = ImageChops.subtract(height, towards, 2, 64)
    return ImageChops.add(slopes, ImageChops.subtract(away, height, 2, 64), 1, 0)


def curve(points: Sequence[tuple[int, int]]) -> list[int]:
    """Return a table for `Image.point` that runs straight between points."""
    table = []
    for value in range(256):
        right = next((i for i, (x, _) in enumerate(points) if x >= value), len(points) - 1)
        (x0, y0), (x1, y1) = points[max(right - 1, 0)], points[right]
        share = 0.0 if x1 == x0 else (value - x0) / (x1 - x0)
        table.append(min(max(round(y0 + (y1 - y0) * min(max(share, 0.0), 1.0)), 0), 255))
    return table


def reflections(bands: int) -> list[int]:
    """Return a table that lays soft stripes over the heights, as chrome mirrors a room."""
    table = []
    for value in range(256):
        place = value * bands / 256 % 1.0
        rise = min(place / 0.35, 1.0)
        fall = min((1.0 - place) / 0.65, 1.0)
        level = min(rise, fall)
        table.append(round(96 + 96 * level * level * (3 - 2 * level)))
    return table


def _soft(picture: Image.Image, by: Image.Image, strength: float) -> Image.Image:
    """Return the picture made darker or brighter by a grey one around 128."""
    return Image.blend(picture, ImageChops.soft_light(picture, by), strength)


def studio(size: tuple[int, int], ramp: Sequence[RGB]) -> Image.Image:
    """Return the background: darker to the edges, a little light from below."""
    grey = Image.linear_gradient("L").resize(size, Image.Resampling.BILINEAR)
    round_ = ImageOps.invert(Image.radial_gradient("L").resize(size, Image.Resampling.BILINEAR))
    level = ImageChops.add(grey.point([v // 15 for v in range(256)]), round_.point([v // 15 for v in range(256)]))
    return graded(level, ramp)


def render(
    depth: Image.Image | None, prompt: str, seed: int, steps: int, width: int, height: int, strength: float = 1.0
) -> Image.Image:
    """Return an RGB picture of a thing that has the shape of `depth` and the look of `prompt` and `seed`.

    Without a depth picture the shape comes from the seed too. `strength` is how far the depth is followed, 0 to 1.
    """
    size = (width, height)
    look = look_of(prompt, seed, steps, size)
    shape = look.clouds if depth is None else depth.convert("L").resize(size, Image.Resampling.BICUBIC)
    if depth is not None and strength < 1.0:
        shape = Image.blend(look.clouds, shape, 0.5 + 0.5 * max(strength, 0.0))
    surface = ImageChops.subtract(
        Image.blend(shape, look.clouds, 0.07), look.seams.point([v // 22 for v in range(256)])
    )
    broad = lit(shape.filter(ImageFilter.BoxBlur(max(1, width // 64))), look.light, max(2, width // 48))
    fine = lit(surface.filter(ImageFilter.BoxBlur(1)), look.light, max(1, width // 256))

    level = shape.point(curve([(0, 4), (40, 26), (128, 92), (205, 158), (235, 205), (255, 238)]))
    level = _soft(level, surface.filter(ImageFilter.BoxBlur(2)).point(reflections(look.bands)), 0.55)
    level = _soft(level, broad.point(curve([(0, 0), (100, 60), (128, 128), (156, 205), (255, 255)])), 0.75)
    level = _soft(level, fine.point(curve([(0, 0), (112, 40), (128, 128), (146, 220), (255, 255)])), 0.60)
    level = _soft(level, look.plates.point([96 + v // 4 for v in range(256)]), 0.45)
    level = ImageChops.subtract(level, ImageChops.multiply(look.seams, shape).point([v // 5 for v in range(256)]))
    glint = ImageChops.multiply(broad.point(curve([(0, 0), (150, 0), (190, 150), (255, 255)])), shape)
    level = ImageChops.screen(level, glint.point([v * 2 // 3 for v in range(256)]))
    scatter = max(8, 44 - steps)
    level = _soft(level, look.grain.point([128 + (v - 128) * scatter // 256 for v in range(256)]), 0.8)

    dark, bright = look.metals
    coats = look.plates.point(curve([(0, 0), (196, 0), (204, 235), (255, 235)])).filter(ImageFilter.BoxBlur(1))
    colours = Image.composite(graded(level, bright), graded(level, dark), coats)
    subject = shape.point(curve([(0, 0), (14, 0), (44, 255), (255, 255)])).filter(ImageFilter.BoxBlur(1))
    return Image.composite(colours, studio(size, dark), subject)


# --- after and around it ----------------------------------------------------------------------------------


def _reached(dark: Image.Image) -> Image.Image:
    """Return the part of a mask (white is dark ground) that is joined to its border, coarsely: 128 cells across."""
    cells = dark.resize((128, 128), Image.Resampling.BOX).point([255 if value > 100 else 0 for value in range(256)])
    framed = ImageOps.expand(cells, 1, 255)
    ImageDraw.floodfill(framed, (0, 0), 128)
    joined = framed.crop((1, 1, 129, 129)).point([255 if value == 128 else 0 for value in range(256)])
    return joined.filter(ImageFilter.MaxFilter(5)).resize(dark.size, Image.Resampling.NEAREST)


def without_background(picture: Image.Image) -> Image.Image:
    """Return the picture with an alpha channel: the dark that reaches in from the border becomes transparent.

    Near is bright in everything this emulator draws, so far is what is clearly darker than the whole. A picture that
    is dark all over is kept whole.
    """
    rgb = picture.convert("RGB")
    grey = rgb.convert("L").filter(ImageFilter.BoxBlur(3))
    counts = grey.histogram()
    mean = sum(value * count for value, count in enumerate(counts)) / max(1, sum(counts))
    edge = max(30, min(round(mean * 0.45), 60))
    dark = grey.point(curve([(0, 255), (edge - 4, 255), (edge + 4, 0), (255, 0)]))
    ground = ImageChops.multiply(dark, _reached(dark)).filter(ImageFilter.MedianFilter(5))
    result = rgb.convert("RGBA")
    if ground.histogram()[255] < ground.width * ground.height:
        result.putalpha(ImageChops.invert(ground))
    return result


def preview_frame(final: Image.Image, seed: int, step: int, steps: int) -> Image.Image:
    """Return what a sampler would show after `step` of `steps`: the picture coming out of the noise."""
    small = final.convert("RGB")
    small.thumbnail((PREVIEW_SIZE, PREVIEW_SIZE), Image.Resampling.BOX)
    numbers = stable_random("preview", seed)
    noise = Image.frombytes("RGB", small.size, numbers.randbytes(small.width * small.height * 3))
    done = step / max(1, steps)
    return Image.blend(noise, small.filter(ImageFilter.BoxBlur(round(4 * (1 - done)))), 0.15 + 0.85 * done)


def jpeg(picture: Image.Image, quality: int = 90) -> bytes:
    """Return the picture as a JPEG file."""
    data = io.BytesIO()
    picture.convert("RGB").save(data, format="JPEG", quality=quality)
    return data.getvalue()
