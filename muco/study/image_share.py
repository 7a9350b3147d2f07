"""The study of where more turns pay: how dear the image is, and what training starts from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from muco.study.base import PLAIN, SINGLE, plain_scenes, steps
from muco.study.design import Column, Equal, Point, Run, Study

# how dear an image is: visual tokens of a picture of 84 px, and layers that it passes through; steps of k = 7
IMAGES: dict[str, tuple[dict[str, int], int]] = {
    "9 tokens, depth 1": ({"patch": 14, "vision_depth": 1}, 240),
    "9 tokens, depth 6": ({"patch": 14, "vision_depth": 6}, 220),
    "36 tokens, depth 4": ({"patch": 7, "vision_depth": 4}, 180),
}
WARMED = {"warm_up": {"steps": 200}, "trainer": {"max_steps": 1, "warmup_steps": 0, "learning_rate": 0.0}}
FROZEN = {"model": {"vision": "frozen"}}
SCRATCH, TEXT, SEEING = "from scratch", "text warmed up", "pre-trained, vision frozen"


def _pair(image: str, start: str, first: str | None, recipe: dict[str, Any]) -> Iterator[Run]:
    """k = 7, and k = 1 at equal seconds."""
    seven = f"{image}, {start}, k = 7"
    yield Run(seven, recipe, start=first)
    yield Run(f"{image}, {start}, k = 1", recipe | SINGLE, start=first, equal=Equal(seven, "seconds"))


def _runs() -> Iterator[Run]:
    for image, (sizes, count) in IMAGES.items():
        model = {"model": {"tiny": sizes, "vision": "trained"}}
        yield from _pair(image, SCRATCH, None, model | steps(count))
        yield Run(f"{image}, text", model | WARMED, shown=False)
        yield from _pair(image, TEXT, f"{image}, text", steps(count))
        start = f"{image}, {SCRATCH}, k = 7"
        yield from _pair(image, SEEING, start, FROZEN | steps(count, learning_rate=5e-4))


IMAGE_SHARE = Study(
    name="image-share",
    question="Where do seven turns pay at equal seconds, by how dear the image is and by what training starts from?",
    base=PLAIN | {"loss": {"symmetric": True}},
    runs=tuple(_runs()),
    columns=(
        Column("image to caption", ("image_to_caption",)),
        Column("answer", ("answer",)),
        Column("within", ("within",)),
    ),
    prepare=plain_scenes,
    compared=tuple(
        (f"{image}, {start}, k = 7", f"{image}, {start}, k = 1")
        for start in (SCRATCH, TEXT, SEEING)
        for image in IMAGES
    )
    + tuple(
        (f"{image}, {SEEING}, k = {k}", f"{image}, {SCRATCH}, k = 7")  # what training made of its start
        for image in IMAGES
        for k in (7, 1)
    ),
    points=tuple(
        Point(start, f"{image}, {start}, k = 7", f"{image}, {start}, k = 1", image)
        for start in (SCRATCH, TEXT, SEEING)
        for image in IMAGES
    ),
    notes=(
        "Above zero seven isolated turns are better than one at equal seconds. To the left the image takes most of a "
        "step and six more turns cost little, as with large models and large images: 1.2 times the operations of one "
        "turn with Qwen2-VL-2B (`muco study flops`).",
        "From scratch: random weights. Text warmed up: 200 steps of next-token prediction on the texts, which teaches "
        "the model to give all texts nearly the same vector. Pre-trained, vision frozen: training continues from the "
        "run 'from scratch, k = 7' of the same image and seed, with the vision tower frozen. Starts are shared by both "
        "runs of a pair and not counted.",
        "The pre-trained start favours k = 7: it was trained with k = 7, on the batches that k = 7 then sees again. "
        "The last rows of differences compare both with the start.",
        "All train in both directions, query to target and target to query, by which more is learnt in the same time.",
        "The dearer the image, the fewer steps fit in a time; near chance on both sides a difference says nothing, so "
        "look at the table beside the plot. More steps: --scale 3.",
        "A step's seconds are taken alone, batch and optimizer included.",
    ),
)
