"""Hidden states and turn positions -> one vector per turn."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor


def pool_turns(
    hidden: Float[Tensor, "rows tokens dim"],
    turn_rows: Int[Tensor, " turns"],
    turn_columns: Int[Tensor, " turns"],
) -> Float[Tensor, "turns dim"]:
    """The hidden state at each turn's ``<|emb|>``, in the order of the turns. Positions, not padding, decide."""
    return hidden[turn_rows, turn_columns]


class TurnPooling(Pooling):
    """The library's last-token pooling, extended to several turns per row.

    It saves itself as the library's own ``Pooling("lasttoken")``: at inference a prompt ends at ``<|emb|>``, so both
    read the same position.
    """

    def __init__(self, embedding_dimension: int) -> None:
        super().__init__(embedding_dimension, pooling_mode="lasttoken")

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        if "turn_rows" not in features:
            return super().forward(features, **kwargs)
        features["sentence_embedding"] = pool_turns(
            features["token_embeddings"], features["turn_rows"], features["turn_columns"]
        )
        return features
