"""Sizes of adapters, a tiny model and vectors. No torch in this file."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

from muco.errors import MucoError

UNSTATED = 1 << 40  # tokenizers whose configuration has no length have an astronomical one


def context_of(config: Any, tokenizer: Any = None) -> int | None:
    """Most tokens that a model reads, as its configuration and its tokenizer state it; None if neither does."""
    stated = (
        getattr(config.get_text_config(), "max_position_embeddings", None),
        getattr(tokenizer, "model_max_length", None),
    )
    return min((tokens for tokens in stated if tokens and tokens < UNSTATED), default=None)


def checked_dimension(dimension: int | None, whole: int) -> int:
    """The dimension to truncate to, ``whole`` for None; a MucoError unless it is a whole number, 1 to ``whole``."""
    if dimension is None:
        return whole
    if isinstance(dimension, bool) or not isinstance(dimension, Integral) or not 0 < dimension <= whole:
        raise MucoError(f"vectors of {whole} dimensions cannot be shortened to {dimension}; pass 1 to {whole}")
    return dimension


@dataclass(frozen=True)
class Adapter:
    """Low-rank adapters on every linear layer of the language model."""

    kind: Literal["lora", "dora"] = "lora"  # DoRA: arXiv 2402.09353
    rank: int = 64
    alpha: int = 64  # the update is multiplied by alpha / rank
    dropout: float = 0.0  # on the adapter's input


@dataclass(frozen=True)
class TinyConfig:
    """Sizes of a Qwen2-VL small enough to train from scratch on a CPU: the language model, the vision tower, images."""

    width: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    feed_forward: int = 256
    vision_width: int = 128
    vision_depth: int = 2
    vision_heads: int = 4
    vision_mlp_ratio: int = 2
    patch: int = 14  # side of a patch in pixels; a visual token is 2 x 2 patches
    vocabulary: int = 1024  # tokens of the tokenizer, which is trained on the data's texts
    max_pixels: int = 84 * 84  # of an image, larger ones are shrunk; the smallest is one visual token
