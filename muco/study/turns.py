"""Two questions on a start that can answer: what more turns per image gain, and what a turn should see."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from muco.data import open_data
from muco.data.jsonl import write_jsonl
from muco.data.scenes import CELLS, write_scenes
from muco.sizes import TinyConfig
from muco.study.base import BASE, COMPOUNDED, SCENES, rows_of, steps
from muco.study.design import Column, Curve, Equal, Grid, Run, Study

SEED = 3  # of the scenes, on which no choice was made before
ANSWERED, ANSWER_STEPS, ANSWER_BATCH = 10_000, 3000, 64  # scenes and steps by which the start learns to answer
SIX = 8_000  # scenes of six objects, with questions of one kind
HELD_OUT = 250  # dev scenes, and test scenes
STEPS = {32: 400, 128: 200, 512: 60}  # of the run whose seconds others get, by images per step
MARGIN = 5.0  # points
RATES = {f"{rate:g}": {"trainer": {"learning_rate": rate}} for rate in (3e-4, 1e-3, 3e-3)}
START = {
    "model": {"path": "{base}", "vision": "trained"},
    "data": {"train": [{"path": "{train}"}]},
    "loss": {"symmetric": True},
}
THE_START = Run("the start", {"trainer": {"max_steps": 1, "warmup_steps": 0, "learning_rate": 0.0}}, fixed=True)
MEASURE = "answer"
COLUMNS = (
    Column("answer", (MEASURE,)),
    Column("after a quarter", ("quarter",)),
    Column("plateau", ("plateau",)),
    Column("rise", ("rise",)),
    Column("image to caption", ("image_to_caption",)),
    Column("within", ("within",)),
)
RULES = (
    "The measure is 'answer': hit@1 among 100 answers, mean over the kinds of questions of held-out scenes, at the end "
    "of equal seconds of training.",
    "Each run has the best of three learning rates, by one training on the dev scenes with a seed of its own; then "
    "eight other seeds count, on test scenes that nothing was chosen on. Nothing else is tuned.",
    f"The intervals of all differences hold together with 95 % (Bonferroni). Two runs are equal if theirs lies within "
    f"± {MARGIN:g} points.",
)
SPREAD = 10.0  # of a difference from seed to seed, in points: the pilot of 2026-11-29, docs/log.md
OBJECT = re.compile(r"an? (\w+ \w+ \w+) at ([a-z ]+?)(?=,| and )", re.IGNORECASE)
BACKGROUND = re.compile(r"on a (\w+ \w+) background")
NOTHING = "nothing"
NOTES = (
    "Every run starts from the same file, a Qwen2-VL of 1.1 M parameters that learnt to answer the questions of other "
    "scenes by next-token prediction, without `<|emb|>`; `data/start/generative.json` says how well it answers. The "
    "row 'the start' is what it scores as it is.",
    "Rates are constant after a short rise, so that every point of a curve is a training of that length. After a "
    "quarter: the measure after a quarter of the steps. Plateau: its mean over the last quarter; rise: by how much "
    "that is above the mean over the quarter before.",
    "A step has its images at once; the gradient cache would compute the same in less memory.",
    "Every model is scored with one question at a time, whatever its training; hit@1 in %, of answers among 100. Seeds "
    "differ in the order of samples, turns and wordings.",
    "Within: the right one of a scene's own seven targets. Near chance (14.3 %) a model does not read its questions, "
    "and its row says little about turns.",
)


def images(count: int) -> dict[str, Any]:
    """That many per step, and the steps of a run with seven turns; others get their steps by its seconds."""
    return {"batch": {"size": count}, **steps(STEPS.get(count, 0), lr_scheduler_type="constant_with_warmup")}


def scenes_and_start(folder: Path, scale: float) -> None:
    """Writes ``train``, ``dev`` and ``test.jsonl``, ``one-kind-…`` too, and ``start``, which learnt on other scenes."""
    from muco.study.generative import learn_to_answer, write_tiny
    from muco.training.build import texts_of

    counts = {"train": SCENES, "others": ANSWERED, "six": SIX, "other six": ANSWERED // 5}
    counts = {name: max(64, round(count * scale)) for name, count in counts.items()}
    held_out = min(HELD_OUT, max(32, round(HELD_OUT * scale)))
    scenes = {"dev": held_out, "test": held_out, "seed": SEED}
    write_scenes(folder, train=counts["train"] + counts["others"], **scenes)
    write_scenes(folder / "six", train=counts["six"] + counts["other six"], objects=(6,), **scenes)
    rows, six = rows_of(folder / "train.jsonl"), [*_one_kind(folder, "train")]
    write_jsonl(folder / "train.jsonl", rows[: counts["train"]])
    write_jsonl(folder / "one-kind-train.jsonl", six[: counts["six"]])
    write_jsonl(folder / "others.jsonl", [*rows[counts["train"] :], *six[counts["six"] :]])
    for split in ("dev", "test"):
        write_jsonl(folder / f"one-kind-{split}.jsonl", _one_kind(folder, split))
    others = open_data(folder / "others.jsonl")
    write_tiny(folder / "untrained", [*texts_of([others])], TinyConfig(), SEED)
    learn_to_answer(
        folder / "untrained",
        folder / "start",
        others,
        open_data(folder / "dev.jsonl"),
        steps=max(2, round(ANSWER_STEPS * scale)),
        batch_size=ANSWER_BATCH,
        seed=SEED,
    )


def _one_kind(folder: Path, split: str) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(rows_of(folder / "six" / f"{split}.jsonl")):
        yield questions_of_one_kind(row, number) | {"image": f"six/{row['image']}", "id": f"six-{row['id']}"}


def questions_of_one_kind(row: dict[str, Any], number: int) -> dict[str, Any]:
    """The row with a question for each of its six objects and one for an empty cell, all "What is at …?".

    Answers say what is there and on what background, but not where: question and answer have no word in common by which
    an order of questions could be told.
    """
    caption = next(turn["target"] for turn in row["turns"] if turn["kind"] == "retrieval")
    there = {place: thing for thing, place in OBJECT.findall(caption)}
    empty = [cell for cell in CELLS if cell not in there]
    asked = there | {empty[number % len(empty)]: NOTHING}
    (background,) = BACKGROUND.findall(caption)
    turns = [
        {
            "query": [f"What is at {place}?", f"Describe the object at {place}."],
            "target": f"{thing} on {background}",
            "kind": "local",
        }
        for place, thing in sorted(asked.items())
    ]
    return row | {"turns": turns}


_SEVEN = "k = 7, 32 images"
_ONES = tuple(f"k = 1, {count} images" for count in (32, 64, 128))

TURNS = Study(
    name="turns",
    question="Do several turns per image pay, against one turn of as many or more images, in equal seconds?",
    base=BASE | START,
    runs=(
        THE_START,
        Run(_SEVEN, images(32)),
        *(
            Run(f"k = {k}, 32 images", images(32) | {"turns": {"limit": k}}, equal=Equal(_SEVEN, "seconds"))
            for k in (4, 2)
        ),
        *(
            Run(name, images(count) | {"turns": {"limit": 1}}, equal=Equal(_SEVEN, "seconds"))
            for name, count in zip(_ONES, (32, 64, 128), strict=True)
        ),
    ),
    columns=COLUMNS,
    prepare=scenes_and_start,
    compared=(
        *((_SEVEN, name) for name in _ONES),
        *((f"k = {k}, 32 images", _ONES[0]) for k in (4, 2)),
    ),
    notes=NOTES,
    seeds=8,
    registered=(
        f"{RULES[0]} The seconds are those of {STEPS[32]} steps with seven turns of 32 images.",
        *RULES[1:],
        "Seven turns pay if all three intervals of their differences from one turn, at 32, 64 and 128 images, lie "
        "above 0.",
    ),
    margin=MARGIN,
    grid=Grid(RATES),
    curve=Curve(MEASURE, points=6, reach=30.0),
    spread=SPREAD,
)

_ISOLATED, _COMPOUNDED = "isolated, 32 images", "compounded, 32 images"
_NO_LEAK = "compounded, one order per batch, own other targets are negatives"
_QUERIES = "compounded queries, isolated targets"
_ONE = "{data}/one-kind"
_KIND = {"data": {"train": [{"path": f"{_ONE}-train.jsonl"}]}}


def _modes(what: str, recipe: Mapping[str, Any], **run: Any) -> tuple[Run, Run]:
    """Isolated turns, and compounded ones in the same seconds."""
    isolated = f"isolated, {what}"
    return (
        Run(isolated, recipe, **run),
        Run(f"compounded, {what}", {**recipe, **COMPOUNDED}, equal=Equal(isolated, "seconds"), **run),
    )


COMPOUNDING = Study(
    name="compounding",
    question="Should a turn see the turns before it (compounded, the paper) or only the image and itself (isolated)?",
    base=BASE | START,
    runs=(
        THE_START,
        *_modes("32 images", images(32)),
        Run(
            _NO_LEAK,
            images(32) | {"turns": {"mode": "compounded", "order": "batch"}, "loss": {"mask_same_image": False}},
            equal=Equal(_ISOLATED, "seconds"),
        ),
        Run(
            _QUERIES,
            images(32) | {"turns": {"mode": "compounded", "targets": "isolated"}},
            equal=Equal(_ISOLATED, "seconds"),
        ),
        *_modes("questions of one kind", images(32) | _KIND, test=f"{_ONE}-test.jsonl", dev=f"{_ONE}-dev.jsonl"),
        *_modes("128 images", images(128)),
        *_modes("512 images", images(512)),
    ),
    columns=COLUMNS,
    prepare=scenes_and_start,
    compared=(
        *((f"isolated, {what}", f"compounded, {what}") for what in ("32 images", "128 images", "512 images")),
        ("isolated, questions of one kind", "compounded, questions of one kind"),
        (_ISOLATED, _NO_LEAK),
        (_ISOLATED, _QUERIES),
    ),
    notes=NOTES,
    seeds=8,
    registered=(
        f"{RULES[0]} Runs of one number of images per step have equal seconds, those of "
        f"{', '.join(f'{count} steps at {size}' for size, count in STEPS.items())} images.",
        *RULES[1:],
        "Isolated turns are better at a number of images if the interval lies above 0 there, compounded ones if it "
        "lies below.",
        f"The leak is the cause of a difference if '{_NO_LEAK}' equals isolated turns within the margin. If it is "
        "below them, the mismatch of training and test is: only one compounded turn in seven is read as in the test.",
    ),
    margin=MARGIN,
    grid=Grid(RATES),
    curve=Curve(MEASURE, points=6, reach=30.0),
    spread=SPREAD,
)
