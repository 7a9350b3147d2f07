"""Fine-tuning on single pairs: each side, once embedded, has to reconstruct the other one. No torch in this file.

From a pair (q, p) two dialogues of two compounded turns are made::

    query side    turn 1: q ─▶ vector q      turn 2: "what belongs to it, parts hidden: p with masks" ─▶ vector q2
    target side   turn 1: p ─▶ vector p      turn 2: "… : q with masks" ─▶ vector p2

Half of the time all of the counterpart is hidden, else each word with probability 1/2; neighbouring masks are one. An
image of the counterpart is replaced by its caption, without a caption by a mask. Inference knows turn 1 only.

The released code has three user turns instead. It asks the model to put its last answer into words, has the assistant
say the hidden counterpart, and asks for the reconstruction. With two ``requests`` the dialogues are these, token for
token, so that its checkpoints can be trained further. Its two sentences are not carried here.

Source: arXiv 2602.06393, fine-tuning by reconstruction; the wording of the prompt is ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from muco.dialogue import Content, Dialogue, Exchange, ImageLike, Sample
from muco.template import MASK

HIDDEN = 0.5  # probability that all of a counterpart is hidden, and, if not, that a word of it is
PROMPT = "Something belongs to this. Here it is with parts of it hidden; complete it in your mind:\n{hidden}"
PICTURE = "a picture of {caption}"
DESCRIPTION = "Image description: {caption}"  # the same in the assistant's reply


def reconstruction_dialogues(
    sample: Sample, query: Content, target: Content, rng: np.random.Generator, requests: Sequence[str] = ()
) -> tuple[Dialogue, Dialogue]:
    """The query and the target dialogue of a pair, of two turns each.

    Args:
        query: Of one turn; the sample's images belong to it.
        rng: Decides what is hidden.
        requests: The user's requests before and after the assistant says the hidden counterpart, as in the released
            code; empty: one turn of the user holds it, as in ``PROMPT``.
    """
    whole = Content(query.text, (*sample.images, *query.images), query.caption)

    def dialogue(context: tuple[ImageLike, ...], own: Content, counterpart: Content) -> Dialogue:
        hidden = hide(counterpart, rng, as_reply=bool(requests))
        turns = (own, Content(requests[1] if requests else PROMPT.format(hidden=hidden)))
        exchange = Exchange(requests[0], hidden) if requests else None
        return Dialogue(context, turns, False, sample.place, reconstructs=True, exchange=exchange)

    return dialogue(sample.images, query, target), dialogue((), target, whole)


def hide(content: Content, rng: np.random.Generator, *, as_reply: bool = False) -> str:
    """A counterpart as text, with :data:`muco.template.MASK` in place of hidden parts.

    ``as_reply`` splits words at blanks only and keeps lines, as in the released code.
    """
    form = DESCRIPTION if as_reply else PICTURE
    picture = form.format(caption=content.caption) if content.caption else MASK
    if as_reply:
        text = f"{picture}\n{content.text}" if content.images else content.text
        words = (text if text.endswith("\n") else text + "\n").split(" ")
    else:
        words = [*(picture.split() if content.images else ()), *content.text.split()]
    if rng.random() < HIDDEN:
        return MASK
    words = [MASK if rng.random() < HIDDEN else word for word in words]
    kept = [word for place, word in enumerate(words) if word != MASK or place == 0 or words[place - 1] != MASK]
    return " ".join(kept or [MASK])  # neighbouring masks are one; nothing at all is one too
