"""What scores count in the loss. No torch in this file."""

from __future__ import annotations

from dataclasses import dataclass

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
