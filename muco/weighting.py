"""What scores count in the loss. No torch in this file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LEAST_TEMPERATURE, MOST_TEMPERATURE = 0.005, 0.1  # of one that is learnt


@dataclass(frozen=True)
class Weighting:
    """What a negative counts by its score, a cosine; the weight itself has no gradient.

    Args:
        false_negative_margin: A negative whose score is above the positive's by more than this is left out: it is
            probably a right answer that nobody marked. None: none is.
        hardness: Multiplies the exponential of a negative of score s by exp(hardness * s), whatever the temperature, so
            that hard ones count more; of the targets of other turns. LLaVE (arXiv 2503.04812) trains with 9.
        hard_negative_hardness: The same of hard negatives. EmbeddingGemma (arXiv 2509.20354) trains with 5.
    """

    false_negative_margin: float | None = None
    hardness: float = 0.0
    hard_negative_hardness: float = 0.0


EQUAL = Weighting()


@dataclass(frozen=True)
class Guide:
    """A second model that tells false negatives (GISTEmbed, arXiv 2402.16829).

    Args:
        model: Any that ``muco.load`` takes, or a stock sentence-transformers model where all contents are texts. Its
            vectors of the training data are computed once, before training.
        margin: A negative is left out if the guide's cosine is above that of the turn's own target less this.
        relative: ``margin`` is a share of the magnitude of that cosine.
    """

    model: str
    margin: float = 0.0
    relative: bool = False


@dataclass(frozen=True)
class Distillation:
    """What a turn with a teacher's scores learns from them; see :func:`muco.teacher.divergence`.

    Args:
        kind: "kl": the teacher's distribution over the target and the hard negatives; "symmetric_kl": the mean of both
            directions (UniME-V2, arXiv 2510.13515); "margin_mse": the differences of scores (arXiv 2010.02666).
        weight: What this counts in the loss of such a turn, 0 to 1; the contrastive loss counts the rest.
        teacher_temperature: Divides the teacher's scores. 1 for logits; 0.02 for cosines.
        temperature: Divides the model's cosines; None: as in the contrastive loss. Not used by "margin_mse".
    """

    kind: Literal["kl", "symmetric_kl", "margin_mse"] = "kl"
    weight: float = 1.0
    teacher_temperature: float = 1.0
    temperature: float | None = None
