"""Fine-tuning on single pairs: each side, once embedded, has to reconstruct the other one. No torch in this file.

From a pair (q, p) two dialogues of two compounded turns are made::

    query side    turn 1: q ─▶ vector q      turn 2: "what belongs to it, parts hidden: p with masks" ─▶ vector q2
    target side   turn 1: p ─▶ vector p      turn 2: "… : q with masks" ─▶ vector p2

Half of the time all of the counterpart is hidden, else each word with probability 1/2; neighbouring masks are one. An
image of the counterpart is replaced by its caption, without a caption by a mask. Inference knows turn 1 only.

Source: arXiv 2602.06393, fine-tuning by reconstruction; the wording of the prompt is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from muco.dialogue import Content, Dialogue, ImageLike, Sample
from muco.template import MASK

if TYPE_CHECKING:
    import numpy as np

HIDDEN = 0.5  # probability that all of a counterpart is hidden, and, if not, that a word of it is
PROMPT = "Something belongs to this. Here it is with parts of it hidden; complete it in your mind:\n{hidden}"
PICTURE = "a picture of {caption}"


def reconstruction_dialogues(
    sample: Sample, query: Content, target: Content, rng: np.random.Generator
) -> tuple[Dialogue, Dialogue]:
    """The query and the target dialogue of a pair, of two turns each.

    Args:
        query: Of one turn; the sample's images belong to it.
        rng: Of what is hidden.
    """
    whole = Content(query.text, (*sample.images, *query.images), query.caption)
    return (
        _dialogue(sample.images, query, hide(target, rng), sample.place),
        _dialogue((), target, hide(whole, rng), sample.place),
    )


def _dialogue(context: tuple[ImageLike, ...], own: Content, hidden: str, where: str) -> Dialogue:
    turns = (own, Content(PROMPT.format(hidden=hidden)))
    return Dialogue(context, turns, isolated=False, reconstructs=True, where=where)


def hide(content: Content, rng: np.random.Generator) -> str:
    """A counterpart as text with parts of it hidden, :data:`muco.template.MASK` in their place."""
    words = _as_words(content)
    if rng.random() < HIDDEN:
        return MASK
    return " ".join(_merged([MASK if rng.random() < HIDDEN else word for word in words]))


def _as_words(content: Content) -> list[str]:
    words = content.text.split()
    if not content.images:
        return words
    picture = PICTURE.format(caption=content.caption).split() if content.caption else [MASK]
    return [*picture, *words]


def _merged(words: Sequence[str]) -> list[str]:
    """Neighbouring masks are one; nothing at all is one too."""
    kept = [word for place, word in enumerate(words) if word != MASK or place == 0 or words[place - 1] != MASK]
    return kept or [MASK]
