"""The pictures of :mod:`muco.data.scenes`: coloured shapes, and textured backgrounds."""

from __future__ import annotations

import math
from functools import cache
from itertools import product

from PIL import Image, ImageDraw, ImageFilter

COLORS = {
    "red": (219, 38, 40),
    "orange": (250, 132, 12),
    "yellow": (252, 214, 18),
    "green": (30, 150, 62),
    "blue": (28, 88, 220),
    "purple": (126, 42, 178),
    "pink": (242, 66, 164),
    "black": (34, 34, 40),
}
BACKGROUNDS = {
    "beige": (232, 218, 174),
    "gray": (192, 194, 198),
    "mint": (176, 226, 194),
    "azure": (168, 208, 242),
    "lilac": (208, 190, 234),
    "rose": (244, 192, 186),
}
SIZES = {"small": 0.44, "medium": 0.66, "large": 0.94}  # width of the object / width of its cell
SUPERSAMPLING = 4  # masks are drawn this many times larger, then averaged down for smooth edges


@cache
def sprite(color: str, shape: str, size: str, cell: int) -> Image.Image:
    """One object with a thin dark outline, RGBA, cell x cell px."""
    width = cell * SUPERSAMPLING
    whole = Image.new("L", (width, width))
    draw, middle, radius = ImageDraw.Draw(whole), width / 2, SIZES[size] * width / 2
    if shape in ("circle", "ring"):
        draw.circle((middle, middle), radius, fill=255)
        if shape == "ring":
            draw.circle((middle, middle), radius * 0.44, fill=0)
    else:
        draw.polygon([(middle + radius * x, middle + radius * y) for x, y in _corners(shape)], fill=255)
    outline = 2 * round(0.04 * SIZES[size] * width) + 1
    inside = whole.filter(ImageFilter.MinFilter(outline))
    fill = COLORS[color]
    sprite = Image.new("RGB", (cell, cell), tuple(int(0.62 * level) for level in fill))
    sprite.paste(fill, mask=inside.reduce(SUPERSAMPLING))
    sprite.putalpha(whole.reduce(SUPERSAMPLING))
    return sprite


def _corners(shape: str) -> list[tuple[float, float]]:
    """Corners of a shape within [-1, 1], y downwards."""
    if shape == "square":
        return [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)]
    if shape == "triangle":
        return [(0.0, -0.92), (1.0, 0.82), (-1.0, 0.82)]
    if shape == "star":
        angles = [(math.pi * k / 5, 1.0 if k % 2 == 0 else 0.45) for k in range(10)]
        return [(r * math.sin(a), 0.06 - r * math.cos(a)) for a, r in angles]
    assert shape == "heart", shape
    angles = [2 * math.pi * k / 72 for k in range(72)]
    heights = [13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a) for a in angles]
    return [(math.sin(a) ** 3, -(h + 2.5) / 16) for a, h in zip(angles, heights, strict=True)]


@cache
def background(color: str, texture: str, size: int) -> Image.Image:
    """The ground in two tones of one colour. Its pattern repeats every size / 6 px (14 px at 84)."""
    light = Image.new("RGB", (size, size), BACKGROUNDS[color])
    dark = Image.new("RGB", (size, size), tuple(int(0.86 * level) for level in BACKGROUNDS[color]))
    if texture == "shaded":
        return Image.composite(dark, light, Image.linear_gradient("L").resize((size, size)))
    width = size * SUPERSAMPLING
    mask, step = Image.new("L", (width, width)), width / 12  # half a period
    draw = ImageDraw.Draw(mask)
    if texture == "striped":
        for left in (k * step for k in range(-12, 12, 2)):
            draw.polygon([(left, 0), (left + step, 0), (left + step + width, width), (left + width, width)], fill=255)
    for row, column in product(range(13), repeat=2):
        if texture == "dotted" and (row + column) % 2 == 0:
            draw.circle((column * step, row * step), 0.36 * step, fill=255)
        if texture == "checkered" and (row + column) % 2 == 0 and max(row, column) < 12:
            draw.rectangle((column * step, row * step, (column + 1) * step - 1, (row + 1) * step - 1), fill=255)
    return Image.composite(dark, light, mask.reduce(SUPERSAMPLING))
