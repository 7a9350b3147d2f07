"""Hidden states and turn positions -> one vector per turn."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor
from torch.nn.functional import normalize


def pool_turns(
    hidden: Float[Tensor, "rows tokens dim"],
    turn_rows: Int[Tensor, " turns"],
    turn_columns: Int[Tensor, " turns"],
) -> Float[Tensor, "turns dim"]:
    """The hidden state at each turn's ``<|emb|>``, in the order of the turns. Positions, not padding, decide.

    Float32, whatever the model computes in: normalised in bfloat16, vectors would be of lengths 0.997 to 1.003.
    """
    return hidden[turn_rows, turn_columns].float()


def shortened(vectors: Float[Tensor, "rows dim"], dimension: int | None) -> Float[Tensor, "rows shorter"]:
    """The first ``dimension`` dimensions of every vector, L2-normalised in float32; unchanged vectors for None.

    Vectors of a model trained with ``loss.dimensions`` can be shortened without much loss (arXiv 2205.13147).

    Raises:
        ValueError: If the vectors have fewer dimensions.
    """
    if dimension is None or dimension == vectors.shape[1]:
        return vectors
    if not 0 < dimension < vectors.shape[1]:
        raise ValueError(f"vectors of {vectors.shape[1]} dimensions cannot be shortened to {dimension}")
    return normalize(vectors[:, :dimension].float(), dim=1)


class TurnPooling(Pooling):
    """The library's last-token pooling, extended to several turns per row; its vectors are float32.

    It saves itself as the library's own ``Pooling("lasttoken")``: at inference a prompt ends at ``<|emb|>``, so both
    read the same position.
    """

    def __init__(self, embedding_dimension: int) -> None:
        super().__init__(embedding_dimension, pooling_mode="lasttoken")

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        features["sentence_embedding"] = pool_turns(
            features["token_embeddings"], features["turn_rows"], features["turn_columns"]
        )
        return features
