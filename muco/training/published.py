"""Sizes of published models, written down so that a dry run of our recipes needs no download.

What decides the number of parameters, tokens and operations is here, as the model cards and configurations on
huggingface.co/Qwen state it; the rest is transformers' default.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from transformers import Qwen2VLConfig, Qwen3_5Config, Qwen3VLConfig

_QWEN2_VISION = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14}
_QWEN2_NAMES = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")
_QWEN2_SIZES = {"2B": (1536, 12, 2, 8960, 151936), "7B": (3584, 28, 4, 18944, 152064)}
_QWEN3_VISION = {"depth": 24, "hidden_size": 1024, "num_heads": 16, "intermediate_size": 4096, "patch_size": 16}


def qwen2_vl_config(size: Literal["2B", "7B"]) -> Qwen2VLConfig:
    """Qwen2-VL-Instruct."""
    text = dict(zip(_QWEN2_NAMES, _QWEN2_SIZES[size], strict=True))
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    return Qwen2VLConfig(
        text_config={**text, "num_hidden_layers": 28, "rope_parameters": rope, "bos_token_id": None},
        vision_config={**_QWEN2_VISION, "spatial_merge_size": 2, "hidden_size": text["hidden_size"]},
    )


def qwen3_vl_2b_config() -> Qwen3VLConfig:
    """Qwen3-VL-2B, and Qwen3-VL-Embedding-2B, which was trained from it."""
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]}
    text = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16}
    return Qwen3VLConfig(
        text_config={**text, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "rope_parameters": rope},
        vision_config={**_QWEN3_VISION, "out_hidden_size": 2048, "deepstack_visual_indexes": [5, 11, 17]},
        tie_word_embeddings=True,
    )


def qwen3_5_2b_config() -> Qwen3_5Config:
    """Qwen3.5-2B: three recurrent layers, then one with attention, six times."""
    text = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24, "num_attention_heads": 8}
    states = {"linear_num_key_heads": 16, "linear_num_value_heads": 16}
    return Qwen3_5Config(
        text_config={**text, **states, "num_key_value_heads": 2, "head_dim": 256, "vocab_size": 248320},
        vision_config={**_QWEN3_VISION, "out_hidden_size": 2048},
        tie_word_embeddings=True,
    )


PUBLISHED: dict[str, Callable[[], Any]] = {
    **{f"Qwen/Qwen2-VL-{size}-Instruct": partial(qwen2_vl_config, size) for size in ("2B", "7B")},
    "Qwen/Qwen3-VL-Embedding-2B": qwen3_vl_2b_config,
    "Qwen/Qwen3.5-2B": qwen3_5_2b_config,
}
