"""A small Qwen2-VL of the real architecture with its tokenizer, for tests, the demo and dry runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor

from muco.processor import Processor
from muco.sizes import TinyConfig, context_of
from muco.stock import Family, assembled
from muco.template import QWEN_VL, SPECIAL_TOKENS


def tiny_qwen2_vl(
    texts: Iterable[str], config: TinyConfig | None = None, *, seed: int = 0
) -> tuple[nn.Module, Processor]:
    """A randomly initialised Qwen2-VL of the real architecture, with a tokenizer trained on ``texts``.

    The fixed strings of the prompt are single tokens, which shortens a tiny model's sequences by almost half; the
    prompt as a string is that of the full-size model.
    """
    config = config or TinyConfig()
    tokenizer = train_tokenizer(texts, config.vocabulary)
    size = {"shortest_edge": (2 * config.patch) ** 2, "longest_edge": config.max_pixels}
    image_processor = Qwen2VLImageProcessorPil(patch_size=config.patch, merge_size=2, size=size)
    ids = tokenizer.convert_tokens_to_ids
    head = config.width // config.heads
    time = head // 8
    model_config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": config.width,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.kv_heads,
            "intermediate_size": config.feed_forward,
            "max_position_embeddings": 32768,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                # halves of a head's pairs: time, height, width (in Qwen2-VL 16, 24, 24 of 64)
                "mrope_section": [head // 2 - 2 * (time + time // 2), time + time // 2, time + time // 2],
            },
            "bos_token_id": None,
            "eos_token_id": ids("<|im_end|>"),
            "pad_token_id": ids("<|endoftext|>"),
        },
        vision_config={
            "depth": config.vision_depth,
            "embed_dim": config.vision_width,
            "hidden_size": config.width,
            "num_heads": config.vision_heads,
            "mlp_ratio": config.vision_mlp_ratio,
            "patch_size": config.patch,
            "spatial_merge_size": 2,
        },
        image_token_id=ids(IMAGE),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2VLModel._from_config(model_config, attn_implementation="sdpa")
    return model.eval(), _processor(tokenizer, image_processor, model_config)


def stand_in_processor(texts: Iterable[str], config: Any, vocabulary: int = 32768) -> Processor:
    """Counts tokens about as the processor of Qwen's models does; its tokenizer is trained on ``texts``."""
    texts = [*texts, *[QWEN_VL.head, QWEN_VL.tail] * 1000]
    tokenizer = train_tokenizer(texts, vocabulary, added=(*QWEN_TOKENS, *QWEN_PADS, *SPECIAL_TOKENS))
    vision = config.vision_config
    images = Qwen2VLImageProcessorPil(patch_size=vision.patch_size, merge_size=vision.spatial_merge_size)
    return _processor(tokenizer, images, config, image_id=tokenizer.convert_tokens_to_ids(IMAGE))


def _processor(tokenizer: Any, image_processor: Any, config: Any, image_id: int | None = None) -> Processor:
    family = Family(
        image_id=config.image_token_id if image_id is None else image_id,
        inputs={"pixel_values": 0, "image_grid_thw": 0},
        rotary=True,
        grid=True,
    )
    stock = assembled(Qwen2VLProcessor, image_processor, tokenizer)
    return Processor(stock, QWEN_VL, family, max_tokens=context_of(config))


QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
IMAGE = "<|image_pad|>"
QWEN_PADS = ("<|vision_pad|>", IMAGE, "<|video_pad|>")


def train_tokenizer(
    texts: Iterable[str],
    vocabulary: int,
    *,
    added: Sequence[str] = (*QWEN_TOKENS, *QWEN_PADS, *SPECIAL_TOKENS, QWEN_VL.head, QWEN_VL.tail),
) -> Any:
    """A byte-level BPE tokenizer in Qwen's form (same pre-tokenisation) trained on ``texts``; ``added`` are special."""
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    pattern = words + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    # words begin a prompt without the space they have in running text, so both forms must be learnt
    forms = [form for text in texts for form in (text, f" {text}")]
    bpe.train_from_iterator([*forms, *["user\n", "\n"] * 1000], trainer)
    core = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=core["vocab"],
        merges=[tuple(merge) for merge in core["merges"]],
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.add_tokens([AddedToken(s, special=True, normalized=False) for s in added], special_tokens=True)
    return tokenizer
