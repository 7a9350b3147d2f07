"""The studies by name. Each is data: what its runs share, what differs, what is compared."""

from __future__ import annotations

from muco.errors import MucoError, did_you_mean
from muco.study.design import Study
from muco.study.finetuning import FINETUNE, NEGATIVES
from muco.study.image_share import IMAGE_SHARE
from muco.study.pretraining import BEAT, COHERENCE, COMPOUNDING, MASKS, ORDER, TURNS
from muco.study.true_sizes import QUESTION

_ALL = (TURNS, MASKS, COMPOUNDING, IMAGE_SHARE, ORDER, NEGATIVES, FINETUNE, COHERENCE, BEAT)
STUDIES = {study.name: study for study in _ALL}
FLOPS = "flops"  # counts and trains nothing, so it is none of the above


def find_study(name: str) -> Study:
    """The study of a name; a MucoError with all names if there is none."""
    if name not in STUDIES:
        raise MucoError(f"unknown study {name!r}{did_you_mean(name, questions())}")
    return STUDIES[name]


def questions() -> dict[str, str]:
    """What each study asks, by name."""
    return {name: study.question for name, study in STUDIES.items()} | {FLOPS: QUESTION}
