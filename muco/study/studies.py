"""The studies by name. Each is data: the base recipe, the differences of its runs, the comparisons."""

from __future__ import annotations

from muco.errors import MucoError, did_you_mean
from muco.study import base
from muco.study.base import PLAIN, SCORES, steps
from muco.study.design import Column, Run, Study
from muco.study.signals import SIGNALS
from muco.study.true_sizes import QUESTION
from muco.study.turns import COMPOUNDING, TURNS

EVALUATED = (
    "Every model is scored with one question at a time, whatever its training; hit@1. At scale 1 or more there are 500 "
    "held-out scenes; chance for a caption is one in their number."
)

# ── the order of turns ───────────────────────────────────────────────────────────────────────────────────────────────

_ORDERS = {"per sample (the paper)": "sample", **{f"{g} per batch": g for g in (16, 8, 4, 2)}, "one per batch": "batch"}
_LEAK = tuple(
    Column(f"{view}, {what[:-1]} found", (f"leak/{view}/{what}",))
    for view, what in (("blank", "turns"), ("swapped", "turns"), ("blank", "dialogues"), ("sighted", "turns"))
)

ORDER = Study(
    name="order",
    question="How much does the order of compounded turns give away, and does an order shared by samples prevent it?",
    base=PLAIN,
    runs=(
        Run("isolated turns", steps(400)),
        *(
            Run(f"compounded, {name}", steps(400) | {"turns": {"mode": "compounded", "order": order}})
            for name, order in _ORDERS.items()
        ),
    ),
    columns=(*SCORES, *_LEAK),
    prepare=base.plain_scenes,
    probes=("leak",),
    compared=tuple((f"compounded, {name}", "compounded, per sample (the paper)") for name in [*_ORDERS][1:])
    + (("isolated turns", "compounded, per sample (the paper)"),),
    notes=(
        "400 steps of 32 images with seven turns from random weights.",
        "The probe takes 32 held-out samples with all their turns, in orders drawn as in training. Blank: all images "
        "are black. Swapped: each sample has another one's image, and the targets are those of its own questions. "
        "Both measure what is found without the image.",
        "Turn found: a turn's target scores above those of all other samples, as in the training loss. Knowing only "
        "the kind of a question finds 1 in 32 (3.1 %).",
        "Dialogue found: the sum of a dialogue's scores is highest with its own target dialogue. This sum depends on "
        "the order of kinds although no turn knows it, so isolated turns are found too; their training never uses it.",
        EVALUATED,
    ),
)

_ALL = (TURNS, COMPOUNDING, ORDER, base.NEGATIVES, SIGNALS, base.FINETUNE)
STUDIES = {study.name: study for study in _ALL}
FLOPS = "flops"  # it only counts, so it is not one of these


def find_study(name: str) -> Study:
    """The study of a name; a MucoError if there is none."""
    if name not in STUDIES:
        raise MucoError(f"unknown study {name!r}{did_you_mean(name, questions())}")
    return STUDIES[name]


def questions() -> dict[str, str]:
    """The question of each study by name."""
    return {name: study.question for name, study in STUDIES.items()} | {FLOPS: QUESTION}
