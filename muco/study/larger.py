"""The studies of turns and of their order once more, for a GPU: a larger model, larger pictures, more objects."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from muco.study.base import BASE, COMPOUNDED, PLAIN, SEED, SINGLE, steps, write_sets
from muco.study.design import Equal, Run
from muco.study.pretraining import EVALUATED, ORDER, TURNS

PICTURE = 168  # px, that is 36 visual tokens
OBJECTS = (4, 5, 6)
_LANGUAGE = {"width": 384, "layers": 8, "heads": 6, "kv_heads": 2, "feed_forward": 1024}
_VISION = {"vision_width": 384, "vision_depth": 6, "vision_heads": 6, "vision_mlp_ratio": 4}
LARGER = PLAIN | {
    "model": {"tiny": _LANGUAGE | _VISION | {"max_pixels": PICTURE * PICTURE}, "vision": "trained"},
    "trainer": BASE["trainer"] | {"learning_rate": 3e-4, "dataloader_num_workers": 2},
}
_ABOUT = (
    "A model of 27 million parameters; pictures of 168 px, 36 visual tokens, with four to six objects. 600 steps of 32 "
    "images with seven turns from random weights, unless a row says otherwise."
)


def larger_scenes(folder: Path, scale: float) -> None:
    """``train.jsonl`` and ``test.jsonl`` of larger pictures with more objects."""
    write_sets(folder, scale, SEED, train=10_000, size=PICTURE, objects=OBJECTS)


def _orders(*names: str) -> tuple[Run, ...]:
    """Runs of the smaller study that are made again."""
    return tuple(replace(ORDER.run(name), recipe={**ORDER.run(name).recipe, **steps(600)}) for name in names)


_SEVEN, _ONE_IMAGE = "k = 7", "k = 1, equal images"
_MORE_IMAGES: dict[str, Any] = SINGLE | {"batch": {"size": 7 * 32}}
TURNS_LARGER = replace(
    TURNS,
    name="turns-larger",
    question="What do seven turns per image buy a larger model on larger pictures with more objects?",
    base=LARGER,
    runs=(
        Run(_SEVEN, steps(600)),
        Run("k = 7, compounded (the paper)", steps(600) | COMPOUNDED),
        Run(_ONE_IMAGE, steps(600) | SINGLE),
        Run("k = 1, equal seconds", SINGLE, equal=Equal(_SEVEN, "seconds")),
        Run("k = 1, 7 × the images", steps(600) | _MORE_IMAGES),
    ),
    prepare=larger_scenes,
    compared=tuple(
        (_SEVEN, other)
        for other in (_ONE_IMAGE, "k = 1, equal seconds", "k = 1, 7 × the images", "k = 7, compounded (the paper)")
    ),
    notes=(_ABOUT, EVALUATED),
)

_PAPER = "compounded, per sample (the paper)"
_FEWER = ("compounded, 8 per batch", "compounded, one per batch")
ORDER_LARGER = replace(
    ORDER,
    name="order-larger",
    question="How much does the order of compounded turns give away to a larger model on larger pictures?",
    base=LARGER,
    runs=_orders("isolated turns", _PAPER, *_FEWER),
    prepare=larger_scenes,
    compared=tuple((name, _PAPER) for name in ("isolated turns", *_FEWER)),
    notes=(_ABOUT, *ORDER.notes[1:]),
)
