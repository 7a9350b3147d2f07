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
from PIL import Image

from muco.base.files import make_folder, writing
from muco.data.m3t import KINDS
from muco.data.scene_pictures import BACKGROUNDS, COLORS, SIZES, background, sprite
from muco.dialogue import Turn
from muco.errors import DataError, OutputError

SHAPES = ("circle", "square", "triangle", "star", "heart", "ring")
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
    """The scene with this number, always the same; ``objects`` are as for :func:`write_scenes`."""
    rng = np.random.default_rng([seed, index])

    def pick(options):
        return options[int(rng.integers(len(options)))]

    cells, colors, shapes, sizes = map(pick, _choices(pick(objects)))
    things = tuple(map(SceneObject, colors, shapes, sizes, cells))
    return Scene(things, background=pick(tuple(BACKGROUNDS)), texture=pick(TEXTURES))


def caption(scene: Scene) -> str:
    """One sentence with everything the picture shows; different for every scene. At most 29 words for three objects."""
    objects = [f"a {thing.size} {thing.color} {thing.shape} at {thing.place}" for thing in scene.objects]
    return f"{_listed(objects)}, on a {scene.texture} {scene.background} background.".capitalize()


def turns(scene: Scene) -> list[Turn]:
    """The seven turns in M3T's order of kinds; every answer follows from picture and question, from neither alone.

    The two local turns ask about two different objects, which the caption's hash chooses.
    """
    main, n = scene.main, len(scene.objects)
    first = _digest(scene)[-1] % n
    here, there = scene.objects[first], scene.objects[(first + 1) % n]
    # Sets are listed in a fixed order: the answer tells what is there, not where.
    shapes = _listed([shape for shape in SHAPES if any(thing.shape == shape for thing in scene.objects)])
    colors = _listed([color for color in COLORS if any(thing.color == color for thing in scene.objects)])
    asked = [
        ["What is the largest object, and on what background?", "Name the main object and its background."],
        ["How many shapes are there, and which?", "Count and name the shapes.", "Which shapes are shown?"],
        ["Which colors are used?", "Describe the palette.", "List all colors."],
        [f"What is at {here.place}?", f"Describe the object at {here.place}.", f"What do you see at {here.place}?"],
        [f"Where is the {there.color} object, and what is it?", f"Find and name the {there.color} object."],
        ["Tell a very short story.", "Imagine a tale about this.", "What story could this tell?"],
        ["Write a detailed caption.", "Describe the whole picture in detail.", "What does the picture show?"],
    ]
    answers = [
        f"{main.color} {main.shape} on {scene.texture} {scene.background}",
        f"{NUMBERS[n]} shapes on {scene.texture} {scene.background}: {shapes}",
        f"{colors} on {scene.background}",
        f"{here.size} {here.color} {here.shape}",
        f"a {there.size} {there.shape} at {there.place}",
        f"At {TIMES[scene.background]} a {TEMPERS[main.color]} {HEROES[main.shape]} walks {PLACES[scene.texture]}.",
        caption(scene),
    ]
    return [Turn(*turn) for turn in zip(asked, answers, KINDS, strict=True)]


def _listed(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"


def _digest(scene: Scene) -> bytes:
    return hashlib.sha256(caption(scene).encode()).digest()


def split_of(scene: Scene) -> str:
    """ "train", "dev" or "test": where this scene belongs in every data set, whatever its seed."""
    bucket = int.from_bytes(_digest(scene)[:4]) % 20
    return {0: "dev", 1: "test"}.get(bucket, "train")


def render(scene: Scene, size: int = 84) -> Image.Image:
    """The picture, RGB, size x size px. Every object lies inside its own cell of size // 3 px.

    At 84 px a cell is 28 px wide: one visual token of a model with patches of 14 px merged 2 x 2.
    """
    picture = background(scene.background, scene.texture, size).copy()
    for thing in scene.objects:
        shape = sprite(thing.color, thing.shape, thing.size, size // 3)
        row, column = divmod(thing.cell, 3)
        picture.paste(shape, (column * size // 3, row * size // 3), shape)
    return picture


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
        objects: Numbers of objects, 2 to 6, each as often as it should be drawn.
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
    with writing(final):
        make_folder(final.parent)
        with tempfile.TemporaryDirectory(dir=final.parent, prefix=f".{final.name}-") as partial:
            made = Path(partial) / "scenes"  # a level below, for the permissions that the user's umask gives
            for done in _write(made, _drawn(wanted, seed, objects), size):
                if progress is not None:
                    progress(done, sum(wanted.values()))
            _refuse_used(final)
            made.replace(final)
    return Path(folder)


def _refuse_used(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder} already exists and is not an empty folder; remove it or choose another")


def _write(folder: Path, drawn: Iterable[tuple[str, int, Scene]], size: int) -> Iterator[int]:
    """Writes scenes; yields how many there are after each."""
    for split in SPLITS:
        (folder / "images" / split).mkdir(parents=True)
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(open(folder / f"{name}.jsonl", "w", encoding="utf-8", newline="\n"))
            for name in (*SPLITS, "train_pairs")
        }
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
            yield done


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
