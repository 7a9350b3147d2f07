"""The built-in data set: small pictures of shapes, each with seven questions of the kinds that M3T has.

A scene is two or three objects (up to six on request) in a 3 x 3 grid on a coloured, textured background. The objects
of one scene differ in colour *and* in shape, and exactly one of them is the largest, so that "the red object" or "the
largest object" always means one object. Picture, questions and answers all follow from the :class:`Scene`, and the
caption says everything that the picture shows: two scenes with the same caption are the same picture.

How many scenes of two or three objects there are (``number_of_scenes``)::

    backgrounds x textures   6 * 5 = 30
    two objects              36 cells *  56 colours *  30 shapes *  6 sizes =     362 880
    three objects            84 cells * 336 colours * 120 shapes * 15 sizes =  50 803 200
    together                 30 * 51 166 080                                = 1 534 982 400

Held-out captions never occur in training: the SHA-256 of its caption puts a scene into train (18 of 20), dev or test
(1 of 20 each), whatever the seed. Within one written data set all captions are distinct.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from itertools import combinations, count, permutations, product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from muco.base.files import make_folder, writing
from muco.dialogue import Turn
from muco.errors import DataError, OutputError

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
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring")
SIZES = {"small": 0.44, "medium": 0.66, "large": 0.94}  # width of the object / width of its cell
PLACES = {  # texture -> where the hero of the creative turn walks
    "plain": "through the desert",
    "striped": "along the shore",
    "dotted": "through falling snow",
    "checkered": "across the rooftops",
    "shaded": "into the mist",
}
TEXTURES = tuple(PLACES)
CELLS = (
    *("top left", "top center", "top right"),
    *("middle left", "center", "middle right"),
    *("bottom left", "bottom center", "bottom right"),
)

# The words of the creative turn: none of them names what it stands for, so they have to be learnt by heart.
HEROES = dict(zip(SHAPES, ["juggler", "builder", "climber", "sailor", "poet", "dancer"], strict=True))
TEMPERS = dict(zip(COLORS, ["brave", "merry", "cheerful", "patient", "calm", "proud", "gentle", "silent"], strict=True))
TIMES = dict(zip(BACKGROUNDS, ["noon", "midnight", "sunrise", "daybreak", "dusk", "sunset"], strict=True))
SPLITS = ("train", "dev", "test")
SUPERSAMPLING = 4  # masks are drawn this many times larger, then averaged down for smooth edges
MIN_SIZE = 24  # px; below it a small object has no shape any more
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}  # objects of a scene; no more, for all differ in shape
USUAL = (2, 3, 3)  # numbers of objects, one of which is drawn: two of three scenes have three


@dataclass(frozen=True)
class SceneObject:
    """One shape; ``cell`` is an index into :data:`CELLS`, in reading order."""

    color: str
    shape: str
    size: str
    cell: int

    @property
    def place(self) -> str:
        return CELLS[self.cell]


@dataclass(frozen=True)
class Scene:
    """Objects in reading order, on a background. No two share a cell, a colour or a shape; one is the largest."""

    objects: tuple[SceneObject, ...]
    background: str
    texture: str

    @property
    def main(self) -> SceneObject:
        return max(self.objects, key=lambda thing: SIZES[thing.size])


@cache
def _choices(n: int) -> tuple[list[tuple[Any, ...]], ...]:
    """All cells, colours, shapes and sizes that n objects can have; exactly one of the sizes is the largest."""
    sizes = [own for own in product(SIZES, repeat=n) if own.count(max(own, key=SIZES.__getitem__)) == 1]
    cells = list(combinations(range(len(CELLS)), n))
    return cells, list(permutations(COLORS, n)), list(permutations(SHAPES, n)), sizes


def number_of_scenes() -> int:
    """How many different scenes of two or three objects, and so captions, exist."""
    arrangements = sum(math.prod(map(len, _choices(n))) for n in set(USUAL))
    return len(BACKGROUNDS) * len(TEXTURES) * arrangements


def describe(seed: int, index: int, objects: Sequence[int] = USUAL) -> Scene:
    """The scene with this number; the same arguments always give the same scene.

    ``objects`` are numbers of objects, 2 to 6, each as often as it shall be drawn.
    """
    rng = np.random.default_rng([seed, index])

    def pick(options):
        return options[int(rng.integers(len(options)))]

    cells, colors, shapes, sizes = map(pick, _choices(pick(objects)))
    things = tuple(map(SceneObject, colors, shapes, sizes, cells))
    return Scene(things, background=pick(tuple(BACKGROUNDS)), texture=pick(TEXTURES))


# Texts ---------------------------------------------------------------------------------------------------------------


def caption(scene: Scene) -> str:
    """One sentence with everything the picture shows; different for every scene. At most 29 words for three objects."""
    objects = [f"a {thing.size} {thing.color} {thing.shape} at {thing.place}" for thing in scene.objects]
    return f"{_listed(objects)}, on a {scene.texture} {scene.background} background.".capitalize()


def turns(scene: Scene) -> list[Turn]:
    """The seven turns in the order of M3T; every answer follows from picture and question, from neither alone.

    The two local turns ask about two different objects, which the caption's hash chooses.
    """
    main, n = scene.main, len(scene.objects)
    first = _digest(scene)[-1] % n
    here, there = scene.objects[first], scene.objects[(first + 1) % n]
    # Sets are listed in a fixed order: the answer tells what is there, not where.
    shapes = _listed([shape for shape in SHAPES if any(thing.shape == shape for thing in scene.objects)])
    colors = _listed([color for color in COLORS if any(thing.color == color for thing in scene.objects)])
    return [
        Turn(
            ["What is the largest object, and on what background?", "Name the main object and its background."],
            f"{main.color} {main.shape} on {scene.texture} {scene.background}",
            "classification",
        ),
        Turn(
            ["How many shapes are there, and which?", "Count and name the shapes.", "Which shapes are shown?"],
            f"{NUMBERS[n]} shapes on {scene.texture} {scene.background}: {shapes}",
            "global",
        ),
        Turn(
            ["Which colors are used?", "Describe the palette.", "List all colors."],
            f"{colors} on {scene.background}",
            "global",
        ),
        Turn(
            [f"What is at {here.place}?", f"Describe the object at {here.place}.", f"What do you see at {here.place}?"],
            f"{here.size} {here.color} {here.shape}",
            "local",
        ),
        Turn(
            [f"Where is the {there.color} object, and what is it?", f"Find and name the {there.color} object."],
            f"a {there.size} {there.shape} at {there.place}",
            "local",
        ),
        Turn(
            ["Tell a very short story.", "Imagine a tale about this.", "What story could this tell?"],
            f"At {TIMES[scene.background]} a {TEMPERS[main.color]} {HEROES[main.shape]} walks {PLACES[scene.texture]}.",
            "creative",
        ),
        Turn(
            ["Write a detailed caption.", "Describe the whole picture in detail.", "What does the picture show?"],
            caption(scene),
            "retrieval",
        ),
    ]


def _listed(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"


def _digest(scene: Scene) -> bytes:
    return hashlib.sha256(caption(scene).encode()).digest()


def split_of(scene: Scene) -> str:
    """ "train", "dev" or "test": where this scene belongs in every data set, whatever its seed."""
    bucket = int.from_bytes(_digest(scene)[:4]) % 20
    return {0: "dev", 1: "test"}.get(bucket, "train")


# Pictures ------------------------------------------------------------------------------------------------------------


def render(scene: Scene, size: int = 84) -> Image.Image:
    """The picture, RGB, size x size px. Every object lies inside its own cell of size // 3 px.

    At 84 px a cell is 28 px wide: one visual token of a model with patches of 14 px merged 2 x 2.
    """
    picture = _background(scene.background, scene.texture, size).copy()
    for thing in scene.objects:
        sprite = _sprite(thing.color, thing.shape, thing.size, size // 3)
        row, column = divmod(thing.cell, 3)
        picture.paste(sprite, (column * size // 3, row * size // 3), sprite)
    return picture


@cache
def _sprite(color: str, shape: str, size: str, cell: int) -> Image.Image:
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
def _background(color: str, texture: str, size: int) -> Image.Image:
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


# Files ---------------------------------------------------------------------------------------------------------------


def write_scenes(
    folder: str | Path,
    *,
    train: int = 20000,
    test: int = 500,
    dev: int = 500,
    seed: int = 0,
    size: int = 84,
    objects: Sequence[int] = USUAL,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes images and ``train.jsonl``, ``train_pairs.jsonl`` (caption to image), ``dev.jsonl``, ``test.jsonl``.

    The same arguments give the same bytes. ``folder`` must not exist, or be empty; afterwards it is complete or is not
    there. Only a hard kill leaves the hidden ``.<name>-…`` folder beside it.

    Args:
        train, test, dev: Numbers of scenes.
        size: Width and height of the pictures in px.
        objects: Numbers of objects, 2 to 6, each as often as it shall be drawn.
        progress: Called with (images written, images in all) after every image.
    Raises:
        OutputError: If the folder holds anything, or is a file.
        DataError: If a number is negative, the size is too small, or a scene cannot have so many objects.
    """
    wanted = {"train": train, "dev": dev, "test": test}
    for name, value in (*wanted.items(), ("seed", seed)):
        if value < 0:
            raise DataError(f"scenes: {name} is {value}; it must be 0 or more")
    if size < MIN_SIZE:
        raise DataError(f"scenes: size is {size} px; it must be at least {MIN_SIZE} px")
    if not objects or not set(objects) <= set(NUMBERS):
        raise DataError(f"scenes: objects is {list(objects)}; pass numbers from 2 to 6")
    final = Path(folder).resolve()
    _refuse_used(final)
    with writing(final), ExitStack() as stack:
        make_folder(final.parent)
        partial = stack.enter_context(tempfile.TemporaryDirectory(dir=final.parent, prefix=f".{final.name}-"))
        made = Path(partial) / "scenes"  # a level below, for the permissions that the user's umask gives
        _write(made, _drawn(wanted, seed, objects), size, progress, total=sum(wanted.values()))
        _refuse_used(final)
        made.replace(final)
    return Path(folder)


def _refuse_used(folder: Path) -> None:
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise OutputError(f"{folder} already exists and is not an empty folder; remove it or choose another")


def _write(
    folder: Path,
    drawn: Iterable[tuple[str, int, Scene]],
    size: int,
    progress: Callable[[int, int], None] | None,
    *,
    total: int,
) -> None:
    with ExitStack() as stack:
        files = {}
        for name in (*SPLITS, "train_pairs"):
            if name in SPLITS:
                (folder / "images" / name).mkdir(parents=True)
            files[name] = stack.enter_context(open(folder / f"{name}.jsonl", "w", encoding="utf-8", newline="\n"))
        for done, (split, number, scene) in enumerate(drawn, start=1):
            image = f"images/{split}/{number:05d}.png"
            render(scene, size).save(folder / image, compress_level=1)
            asked = [
                {"query": [wording.text for wording in turn.query], "target": turn.target[0].text, "kind": turn.kind}
                for turn in turns(scene)
            ]
            row = {"image": image, "turns": asked, "id": f"{split}-{number:05d}"}
            files[split].write(json.dumps(row) + "\n")
            if split == "train":
                pair = {"query": caption(scene), "target": {"image": image}, "kind": "text-to-image"}
                files["train_pairs"].write(json.dumps({"turns": [pair], "id": f"pair-{number:05d}"}) + "\n")
            if progress is not None:
                progress(done, total)


def _drawn(wanted: dict[str, int], seed: int, objects: Sequence[int]) -> Iterator[tuple[str, int, Scene]]:
    """Distinct scenes as (split, number within it, scene), until every split has what it wants."""
    seen: dict[str, set[Scene]] = {split: set() for split in SPLITS}
    for index in count():
        if all(len(seen[split]) == wanted[split] for split in SPLITS):
            return
        scene = describe(seed, index, objects)
        split = split_of(scene)
        if len(seen[split]) < wanted[split] and scene not in seen[split]:
            seen[split].add(scene)
            yield split, len(seen[split]) - 1, scene
