"""
Draw `render.png`, the picture that the demo and the examples send to ComfyUI.

A helmet, three-quarter view, as an artist would export it from a modelling program: grey metal under three lights
on a transparent ground. It is described as a distance field and walked along each ray (sphere tracing, Hart 1996),
in plain Python: about two minutes on one core. Run it again only to change the picture:

    python examples/make_render.py [SIZE]
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

from PIL import Image

Vec = tuple[float, float, float]

SIZE = 1024
FAR = 7.0
EYE = 4.2
"""Distance of the camera from the middle of the helmet; it looks along -z."""
YAW, PITCH = math.radians(-33.0), math.radians(9.0)
KEY = (-0.52, 0.62, 0.59)
RIM = (0.88, 0.33, -0.34)


def smooth_min(a: float, b: float, k: float) -> float:
    """Return the union of two solids whose seam is rounded over a width of `k`."""
    h = max(k - abs(a - b), 0.0) / k
    return min(a, b) - h * h * k * 0.25


def smooth_max(a: float, b: float, k: float) -> float:
    """Return the intersection of two solids with a rounded edge; with `-b`, what is left of a cut by `b`."""
    return -smooth_min(-a, -b, k)


def ellipsoid(x: float, y: float, z: float, rx: float, ry: float, rz: float) -> float:
    k0 = math.sqrt((x / rx) ** 2 + (y / ry) ** 2 + (z / rz) ** 2)
    k1 = math.sqrt((x / rx**2) ** 2 + (y / ry**2) ** 2 + (z / rz**2) ** 2)
    return k0 * (k0 - 1.0) / k1 if k1 > 1e-9 else -min(rx, ry, rz)


def box(x: float, y: float, z: float, bx: float, by: float, bz: float, r: float) -> float:
    qx, qy, qz = abs(x) - bx + r, abs(y) - by + r, abs(z) - bz + r
    outside = math.sqrt(max(qx, 0.0) ** 2 + max(qy, 0.0) ** 2 + max(qz, 0.0) ** 2)
    return outside + min(max(qx, qy, qz), 0.0) - r


def capsule(x: float, y: float, z: float, a: Vec, b: Vec, ra: float, rb: float) -> float:
    """A rod from `a` to `b` whose radius goes from `ra` to `rb`."""
    bx, by, bz = b[0] - a[0], b[1] - a[1], b[2] - a[2]
    px, py, pz = x - a[0], y - a[1], z - a[2]
    t = min(max((px * bx + py * by + pz * bz) / (bx * bx + by * by + bz * bz), 0.0), 1.0)
    return math.sqrt((px - bx * t) ** 2 + (py - by * t) ** 2 + (pz - bz * t) ** 2) - (ra + (rb - ra) * t)


def torus_x(x: float, y: float, z: float, big: float, small: float) -> float:
    """A ring around the x axis."""
    q = math.sqrt(y * y + z * z) - big
    return math.sqrt(q * q + x * x) - small


def helmet(x: float, y: float, z: float) -> tuple[float, int]:
    """Return the distance to the helmet and what stands nearest: 0 shell, 1 dark trim, 2 visor."""
    x = abs(x)
    skull = ellipsoid(x, y - 0.22, z + 0.08, 0.74, 0.80, 0.94)
    brow = box(x, y - 0.24, z - 0.60, 0.60, 0.11, 0.30, 0.09)
    jaw = box(x * 0.95 + z * 0.16, y + 0.50 + z * 0.12, z - 0.34, 0.46, 0.27, 0.48, 0.15)
    shell = smooth_min(smooth_min(skull, brow, 0.22), jaw, 0.16)
    crest = box(x, y - 0.76 + 0.28 * z * z, z + 0.10, 0.075, 0.34, 0.86, 0.06)
    shell = smooth_min(shell, crest, 0.12)
    shell = smooth_max(shell, -box(x, y + 0.02 - 0.14 * x, z - 0.90, 0.60, 0.125, 0.40, 0.05), 0.05)
    # Panel seams and the vents of the jaw are cuts, so that light finds edges to catch.
    shell = (
        smooth_max(shell, -(abs(math.sqrt((y - 0.30) ** 2 + (z + 0.12) ** 2) - 0.60) - 0.013), 0.02)
        if x > 0.42
        else shell
    )
    for level in (0.40, 0.52, 0.64):
        shell = smooth_max(shell, -box(x - 0.20, y + level, z - 0.88, 0.13, 0.026, 0.22, 0.02), 0.02)
    horn = capsule(x, y, z, (0.55, 0.58, 0.10), (1.02, 1.10, -0.34), 0.15, 0.085)
    horn = smooth_min(horn, capsule(x, y, z, (1.02, 1.10, -0.34), (1.08, 1.52, -0.86), 0.085, 0.012), 0.05)
    shell = smooth_min(shell, horn, 0.14)
    cheek = torus_x(x - 0.74, y - 0.06, z - 0.02, 0.235, 0.065)
    hub = ellipsoid(x - 0.74, y - 0.06, z - 0.02, 0.10, 0.16, 0.16)
    pipe = capsule(x, y, z, (0.66, -0.12, 0.10), (0.44, -0.66, 0.56), 0.060, 0.060)
    collar = math.sqrt(x * x + (z + 0.10) ** 2)
    ridges = 0.025 * math.cos(y * 44.0)
    neck = max(abs(collar - 0.46 + ridges) - 0.10, abs(y + 0.92) - 0.26)
    trim = min(cheek, hub, pipe, neck * 0.8)
    visor = ellipsoid(x, y + 0.0, z - 0.10, 0.60, 0.30, 0.76)
    if visor < shell and visor < trim:
        return visor, 2
    return (shell, 0) if shell < trim else (trim, 1)


def normal_at(x: float, y: float, z: float) -> Vec:
    e = 0.0012
    gx = helmet(x + e, y, z)[0] - helmet(x - e, y, z)[0]
    gy = helmet(x, y + e, z)[0] - helmet(x, y - e, z)[0]
    gz = helmet(x, y, z + e)[0] - helmet(x, y, z - e)[0]
    length = math.sqrt(gx * gx + gy * gy + gz * gz) or 1.0
    return gx / length, gy / length, gz / length


def rotated(v: Vec) -> Vec:
    """Turn a direction or point of the camera into the helmet's own frame."""
    x, y, z = v
    y, z = y * math.cos(PITCH) - z * math.sin(PITCH), y * math.sin(PITCH) + z * math.cos(PITCH)
    return x * math.cos(YAW) + z * math.sin(YAW), y, -x * math.sin(YAW) + z * math.cos(YAW)


def dot(a: Vec, b: Vec) -> float:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def shadow(p: Vec, n: Vec, light: Vec) -> float:
    """Return how much of the key light arrives, soft at the edges."""
    seen, t = 1.0, 0.05
    for _ in range(14):
        d = helmet(
            p[0] + n[0] * 0.02 + light[0] * t, p[1] + n[1] * 0.02 + light[1] * t, p[2] + n[2] * 0.02 + light[2] * t
        )[0]
        if d < 0.002:
            return 0.0
        seen = min(seen, 9.0 * d / t)
        t += max(d, 0.04)
        if t > 2.2:
            break
    return seen


def occlusion(p: Vec, n: Vec) -> float:
    """Return how open the place is: 1 in the open, towards 0 in a corner."""
    closed = 0.0
    for i, step in enumerate((0.03, 0.09, 0.18, 0.32)):
        closed += (step - helmet(p[0] + n[0] * step, p[1] + n[1] * step, p[2] + n[2] * step)[0]) / (1.6**i)
    return min(max(1.0 - 1.35 * closed, 0.0), 1.0)


def studio(d: Vec) -> float:
    """Return what a mirror sees in direction `d`: two soft boxes over a dark floor."""
    sky = 0.5 + 0.5 * d[1]
    strip = math.exp(-(((d[1] - 0.55) / 0.16) ** 2)) * (0.6 + 0.4 * math.tanh(-3.0 * d[0]))
    side = math.exp(-(((d[0] - 0.80) / 0.13) ** 2)) * max(0.0, 1.0 - abs(d[1]))
    return 0.05 + 0.22 * sky * sky + 0.95 * strip + 0.55 * side


def shade(p: Vec, view: Vec, part: int, lights: tuple[Vec, Vec]) -> Vec:
    n = normal_at(*p)
    key, rim = lights
    facing = max(-dot(n, view), 0.0)
    open_sky = occlusion(p, n)
    lit = max(dot(n, key), 0.0) * (shadow(p, n, key) if dot(n, key) > 0.0 else 0.0)
    edge = max(dot(n, rim), 0.0) * (1.0 - facing) ** 1.5
    mirror = (view[0] + 2 * facing * n[0], view[1] + 2 * facing * n[1], view[2] + 2 * facing * n[2])
    reflected = studio(mirror) * open_sky
    fresnel = 0.04 + 0.96 * (1.0 - facing) ** 5
    glint = max(dot(mirror, key), 0.0) ** 42 * lit
    base, gloss = (((0.30, 0.33, 0.37), 0.26), ((0.10, 0.105, 0.12), 0.24), ((0.03, 0.05, 0.08), 0.55))[part]
    fill = 0.11 * open_sky * (0.6 + 0.4 * n[1]) + 0.10 * facing * open_sky
    body = 0.92 * lit + fill
    gain = gloss + (1 - gloss) * fresnel
    return (
        base[0] * body * 1.04 + gain * reflected * 0.62 + 0.75 * glint + 0.62 * edge * 0.80,
        base[1] * body + gain * reflected * 0.66 + 0.74 * glint + 0.62 * edge * 0.92,
        base[2] * body * 0.99 + gain * reflected * 0.72 + 0.70 * glint + 0.62 * edge * 1.10,
    )


def trace(u: float, v: float, lights: tuple[Vec, Vec]) -> Vec | None:
    """Return the colour (linear light) seen through the point `u, v` of the picture, or nothing."""
    length = math.sqrt(u * u + v * v + 2.55**2)
    o, d = rotated((0.0, 0.10, EYE)), rotated((u / length, v / length, -2.55 / length))
    t = EYE - 1.9
    for _ in range(70):
        p = (o[0] + d[0] * t, o[1] + d[1] * t, o[2] + d[2] * t)
        distance, part = helmet(*p)
        if distance < 0.0007 * t:
            return shade(p, d, part, lights)
        t += distance * 0.85
        if t > FAR:
            return None
    return None


def tone(value: float) -> int:
    """Return the byte for a linear light: a soft shoulder (Reinhard), then the sRGB curve."""
    value = value * (1.0 + value / 3.2) / (1.0 + value)
    value = min(max(value * 1.22, 0.0), 1.0)
    encoded = 12.92 * value if value <= 0.0031308 else 1.055 * value ** (1 / 2.4) - 0.055
    return round(encoded * 255)


def draw(size: int) -> Image.Image:
    lights = (rotated(KEY), rotated(RIM))
    picture = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    pixels = picture.load()
    assert pixels is not None  # Pillow types it as None for closed pictures only
    for row in range(size):
        for column in range(size):
            u = (column + 0.5) / size * 2 - 1
            v = 1 - (row + 0.5) / size * 2
            colour = trace(u, v, lights)
            if colour is not None:
                pixels[column, row] = (tone(colour[0]), tone(colour[1]), tone(colour[2]), 255)
    return picture


def main() -> None:
    size = int(sys.argv[1]) if len(sys.argv) > 1 else SIZE
    # Half the points each way, then enlarged: the edges come out smooth, in a quarter of the time.
    # Premultiplied, since the colour of what is transparent must not run into the edges.
    small = draw(size // 2).convert("RGBa")
    picture = small.resize((size, size), Image.Resampling.BICUBIC).convert("RGBA")
    # ComfyUI's LoadImage looks at the colours alone: what is all but transparent is black there, too.
    alpha = picture.getchannel("A").point([0 if value < 24 else value for value in range(256)])
    ground = Image.new("RGBA", picture.size, (0, 0, 0, 0))
    picture = Image.composite(picture, ground, alpha.point([255 if value else 0 for value in range(256)]))
    target = Path(__file__).resolve().with_name("render.png")
    picture.save(target, optimize=True)
    print(f"{target}: {target.stat().st_size} bytes")
    # The copy that ships in the package, for the demo of an installed comfyctl; a trial in another size leaves it.
    shipped = target.parents[1] / "runcomfy" / "data" / target.name
    if size == SIZE and shipped.exists():
        shipped.write_bytes(target.read_bytes())


if __name__ == "__main__":
    main()
