"""The studies by name. Each is data: the base recipe, the differences of its runs, the comparisons."""

from __future__ import annotations

from typing import Any

from muco.errors import MucoError, did_you_mean
from muco.study import base
from muco.study.base import COMPOUNDED, PLAIN, SCORES, SINGLE, steps
from muco.study.design import Column, Equal, Run, Study
from muco.study.signals import SIGNALS
from muco.study.true_sizes import QUESTION

EVALUATED = (
    "Every model is scored with one question at a time, whatever its training; hit@1. At scale 1 or more there are 500 "
    "held-out scenes; chance for a caption is one in their number."
)

# ── turns per image (the paper, Table 5) ─────────────────────────────────────────────────────────────────────────────


def _turns(k: int, images: int = 32) -> dict[str, Any]:
    return steps(250) | {"turns": {"limit": k}, "batch": {"size": images}}


TURNS = Study(
    name="turns",
    question="What do more turns per image gain at equal images, equal seconds, equal pairs, and against more images?",
    base=PLAIN,
    runs=(
        Run("k = 7", _turns(7)),
        Run("k = 7, compounded (the paper)", _turns(7) | {"turns": {"limit": 7, "mode": "compounded"}}),
        *(Run(f"k = {k}, equal images", _turns(k)) for k in (4, 2, 1)),
        *(Run(f"k = {k}, equal seconds", _turns(k), equal=Equal("k = 7", "seconds")) for k in (4, 2, 1)),
        *(Run(f"k = {k}, equal pairs", _turns(k), equal=Equal("k = 7", "pairs")) for k in (4, 2, 1)),
        *(Run(f"k = 1, {k} × the images", _turns(1, 32 * k)) for k in (4, 7)),
    ),
    columns=SCORES,
    prepare=base.plain_scenes,
    compared=(
        *(("k = 7", f"k = {k}, equal {what}") for what in ("images", "seconds", "pairs") for k in (4, 2, 1)),
        ("k = 7", "k = 1, 7 × the images"),
        ("k = 7", "k = 7, compounded (the paper)"),
    ),
    notes=(
        "250 steps of 32 images from random weights; with k < 7 every step draws k turns per image. Turns are isolated "
        "except in the row with the paper's compounded ones.",
        "Equal seconds and equal pairs: more steps. k × the images: the same steps with more images in each.",
        EVALUATED,
    ),
)

# ── what a turn sees (the paper, Table 6) ────────────────────────────────────────────────────────────────────────────

_STARTS = {"from scratch": None, "pre-trained start": "single turns"}
_MODES = {"isolated": {}, "compounded": COMPOUNDED}
_POSITIONS = {
    "isolated, positions run on": {"turns": {"positions": "run_on"}},
    "compounded, positions restart": {"turns": {"mode": "compounded", "positions": "restart"}},
}
_TUNED, _TUNING = ", fine-tuned", steps(150, learning_rate=5e-4) | SINGLE | {"batch": {"size": 64}}

COMPOUNDING = Study(
    name="compounding",
    question="Should a turn see the turns before it (compounded) or only the image and itself (isolated)?",
    base=PLAIN,
    runs=(
        Run("single turns", steps(800) | SINGLE),
        *(
            Run(f"{mode}, {name}", steps(400, learning_rate=1e-3 if start is None else 5e-4) | turns, start=start)
            for name, start in _STARTS.items()
            for mode, turns in _MODES.items()
        ),
        *(Run(f"{mode}, from scratch", steps(400) | turns) for mode, turns in _POSITIONS.items()),
        *(Run(f"{mode}, {name}{_TUNED}", _TUNING, start=f"{mode}, {name}") for name in _STARTS for mode in _MODES),
    ),
    columns=SCORES,
    prepare=base.plain_scenes,
    compared=(
        *((f"compounded, {name}{tuned}", f"isolated, {name}{tuned}") for name in _STARTS for tuned in ("", _TUNED)),
        *((f"{mode}, from scratch", f"{mode.split(',')[0]}, from scratch") for mode in _POSITIONS),
    ),
    notes=(
        "400 steps of 32 images with seven turns, in an order drawn per sample (the paper's). The pre-trained start is "
        "800 steps of one turn per image, which favours neither side. Fine-tuned: 150 more steps of 64 single turns.",
        "Positions of isolated turns restart after the image, those of compounded turns run on. Rows with the reverse "
        "separate the effect of positions from that of the turns seen.",
        EVALUATED,
    ),
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

# ── masks (the paper, Table 7) ───────────────────────────────────────────────────────────────────────────────────────

_LOSSES = {"masked": {}, "not masked": {"loss": {"mask_same_image": False}}}
_SHORT = {"trainer": {"max_steps": 150, "warmup_steps": 8, "learning_rate": 5e-4}}

MASKS = Study(
    name="masks",
    question="Are the masks needed: of an image's other targets in pre-training, of the counterpart in fine-tuning?",
    base=PLAIN,
    runs=(
        *(
            Run(f"{mode}, {name}", steps(350) | turns | base.MULTI_TURN | loss)
            for mode, turns in _MODES.items()
            for name, loss in _LOSSES.items()
        ),
        Run("fine-tuned, masked", base.JOINT | _SHORT, start="isolated, masked"),
        Run("fine-tuned, not masked", base.UNMASKED | _SHORT, start="isolated, masked"),
    ),
    columns=SCORES,
    prepare=base.scenes_in_two_stages,
    compared=tuple((f"{name}, masked", f"{name}, not masked") for name in (*_MODES, "fine-tuned")),
    notes=(
        "350 steps of 32 images with seven turns from random weights. Not masked: the targets of an image's other "
        "turns are negatives too, unless identical.",
        "Fine-tuned: 150 steps of 64 single pairs with reconstruction, joint. Not masked: the counterpart of a pair is "
        "a negative. See also the study finetune.",
        "'Within', the right one among the image's own seven targets, shows the effect of this mask.",
        EVALUATED,
    ),
)

# ── coherence ────────────────────────────────────────────────────────────────────────────────────────────────────────


_AS_SEVEN = Equal("isolated, k = 7", "seconds")
_SHAPE = {
    "modality gap": "gap",
    "alignment, lower is closer": "alignment",
    "uniformity of images": "uniformity_images",
    "uniformity of captions": "uniformity_captions",
    "cosine, own caption": "caption",
    "cosine, another's caption": "other_caption",
    "cosine, turns of an image": "turns",
}

COHERENCE = Study(
    name="coherence",
    question="Does training on several turns make vectors more coherent across image and text?",
    base=PLAIN,
    runs=(
        Run("isolated, k = 7", steps(450)),
        Run("single turns", SINGLE, equal=_AS_SEVEN),
        Run("compounded, k = 7 (the paper)", COMPOUNDED, equal=_AS_SEVEN),
        Run("compounded, one order per batch", {"turns": {"mode": "compounded", "order": "batch"}}, equal=_AS_SEVEN),
    ),
    columns=(
        SCORES[0],
        *(Column(title, (f"coherence/{name}",), percent=False, digits=3) for title, name in _SHAPE.items()),
    ),
    prepare=base.plain_scenes,
    probes=("coherence",),
    compared=(
        ("isolated, k = 7", "single turns"),
        ("compounded, k = 7 (the paper)", "single turns"),
        ("compounded, k = 7 (the paper)", "isolated, k = 7"),
    ),
    notes=(
        "450 steps of 32 images from random weights with seven isolated turns; the others at equal seconds.",
        "Measured on 200 held-out scenes, each image with the question for its caption. Modality gap: distance of the "
        "centroids of images and captions. Alignment: mean squared distance of an image and its caption. Uniformity: "
        "log of the mean of exp(−2 d²) over pairs; lower is more spread out (Wang & Isola 2020).",
        "Equal vectors have no gap and agree perfectly, so closeness alone says little: read alignment with "
        "uniformity, the own caption with another's, and the cosine of turns with hit@1.",
        "Differences of columns other than hit@1 are in their own units.",
    ),
)

# ── a better recipe ──────────────────────────────────────────────────────────────────────────────────────────────────

PAPER = {"turns": {"mode": "compounded", "order": "sample"}, "loss": {"temperature": 0.02, "symmetric": False}}
BOTH = {"loss": {"symmetric": True}}
IMAGE_TURN = {"turns": {"image_turn": "retrieval"}}
_AS_LONG = Equal("the paper's", "seconds")
_CANDIDATE = "isolated, both directions, image turn"

BEAT = Study(
    name="beat",
    question="Is there a better recipe than the paper's at equal seconds of training?",
    base=PLAIN,
    runs=(
        Run("single turns, short", steps(600) | SINGLE, shown=False),
        Run("the paper's", steps(500) | PAPER),
        Run("isolated", {}, equal=_AS_LONG),
        Run("isolated, both directions", BOTH, equal=_AS_LONG),
        Run(_CANDIDATE, BOTH | IMAGE_TURN, equal=_AS_LONG),
        Run("single turns", SINGLE, equal=_AS_LONG),
        Run("the paper's, pre-trained start", steps(500, learning_rate=5e-4) | PAPER, start="single turns, short"),
        Run(
            f"{_CANDIDATE}, pre-trained start",
            BOTH | IMAGE_TURN | {"trainer": {"learning_rate": 5e-4}},
            start="single turns, short",
            equal=Equal("the paper's, pre-trained start", "seconds"),
        ),
    ),
    columns=(SCORES[0], Column("caption to image", ("caption_to_image",)), *SCORES[1:]),
    prepare=base.fresh_scenes,
    compared=(
        *((name, "the paper's") for name in ("isolated", "isolated, both directions", _CANDIDATE, "single turns")),
        (f"{_CANDIDATE}, pre-trained start", "the paper's, pre-trained start"),
    ),
    seeds=5,
    registered=(
        "The measure is image to caption, hit@1 among held-out scenes, at equal seconds of training.",
        f"The candidate is '{_CANDIDATE}'; the rows before it show which of its parts matters. It is better if the "
        "95 % interval of its difference from the paper's recipe, paired by seed, lies above 0, from random weights "
        "and from the pre-trained start.",
        "At least five seeds of no earlier run (--first-seed), on scenes that no choice was made on.",
    ),
    notes=(
        "The paper's recipe: seven compounded turns in an order drawn per sample, temperature 0.02, query to target "
        "only, no image turn, but with 32 images per step instead of 1024 in one epoch. All runs share model, images "
        "per step, learning rates and data. These and the parts of the candidate were chosen in dev runs of isolated "
        "turns. 500 steps of the paper's recipe set the seconds.",
        "The pre-trained start is 600 steps of one turn per image; its time is not counted.",
        EVALUATED,
    ),
)

_ALL = (TURNS, MASKS, COMPOUNDING, base.IMAGE_SHARE, ORDER, base.NEGATIVES, SIGNALS, base.FINETUNE, COHERENCE, BEAT)
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
