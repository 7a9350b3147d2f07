"""The study of signals beyond the paper: false negatives, learnt temperatures, and how sources share a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from muco.data.jsonl import write_jsonl
from muco.study.base import BASE, MULTI_TURN, SCENES, classification, rows_of, scenes_in_two_stages, steps
from muco.study.design import Column, Run, Study

SOURCES = {"answers": "{data}/answers.jsonl", "captions": "{data}/captions.jsonl"}
PAIRS = {  # single pairs of both sources, of which each has half of every batch
    "data": {"train": [{"path": path, "weight": 1.0} for path in SOURCES.values()]},
    "turns": {"limit": 1},
    "batch": {"size": 64},
    **steps(150, learning_rate=5e-4),
}
UNMARKED: dict[str, Any] = {"mask_identical_targets": False}
NOTHING, MARKED = "equal answers are negatives", "equal answers are marked (the default)"
OWN, GUIDE = "own scores, margin 0.1", "guide, margin 0.05"
SIGNALS_OF_LOSS = {
    NOTHING: UNMARKED,
    OWN: UNMARKED | {"weighting": {"false_negative_margin": 0.1}},
    GUIDE: UNMARKED | {"guide": {"model": "{start}", "margin": 0.05}},
    MARKED: {},
    "one learnt temperature": {"learn_temperature": "one"},
    "a learnt temperature per source": {"learn_temperature": "per_source"},
}
ORDERS = {
    "groups of 16 of one source": {"batch": {"size": 64, "group": 16}},
    "one source per batch": {"data": PAIRS["data"] | {"one_source": True}},
}


def scenes_of_two_sources(folder: Path, scale: float) -> None:
    """Half of the scenes with all turns (``pretrain.jsonl``), a quarter with a question that has one of 8 answers
    (``answers.jsonl``), a quarter with the caption (``captions.jsonl``), and both turns of held-out scenes
    (``test-both.jsonl``).
    """
    scenes_in_two_stages(folder, scale)
    half = max(64, round(SCENES * scale)) // 2
    rows = rows_of(folder / "train.jsonl")[half:]
    write_jsonl(folder / "answers.jsonl", (classification(row, 1) for row in rows[::2]))
    write_jsonl(folder / "captions.jsonl", (row | {"turns": _caption(row)} for row in rows[1::2]))
    held_out = rows_of(folder / "test.jsonl")
    both = (row | {"turns": [*classification(row, 1)["turns"], *_caption(row)]} for row in held_out)
    write_jsonl(folder / "test-both.jsonl", both)


def _caption(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [turn for turn in row["turns"] if turn["kind"] == "retrieval"]


SIGNALS = Study(
    name="signals",
    question="What do signals beyond the paper gain where they should: on false negatives, and on two unlike sources?",
    base=BASE,
    runs=(
        Run("pre-trained", MULTI_TURN | steps(300), shown=False),
        *(Run(name, PAIRS | {"loss": loss}, start="pre-trained") for name, loss in SIGNALS_OF_LOSS.items()),
        *(Run(name, PAIRS | order, start="pre-trained") for name, order in ORDERS.items()),
    ),
    columns=(
        Column("answer", ("answer/classification",)),
        Column("image to caption", ("image_to_caption",)),
        Column("caption to image", ("caption_to_image",)),
    ),
    test="{data}/test-both.jsonl",
    prepare=scenes_of_two_sources,
    compared=(
        *((name, NOTHING) for name in (OWN, GUIDE, MARKED)),
        *((name, MARKED) for name in ("one learnt temperature", "a learnt temperature per source", *ORDERS)),
    ),
    notes=(
        "150 steps of 64 single pairs, after 300 steps of multi-turn pre-training: half are questions with one of 8 "
        "answers, so that every eighth negative of a question is a right answer; half are captions.",
        "The first three rows do not know that equal answers are equal; the others do. The guide is the pre-trained "
        "model itself. Margins were not tuned.",
        "hit@1 of an answer is among all 8.",
    ),
)
