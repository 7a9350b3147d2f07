"""The model of a dry run: on the meta device, where tensors have shapes and no memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from muco.backbone import VISION_NAMES, meta_backbone
from muco.data.source import Data
from muco.errors import CheckpointError
from muco.processor import Processor, load_processor
from muco.template import SPECIAL_TOKENS
from muco.tiny import stand_in_processor
from muco.training.build import PUBLISHED, build_model, model_config, prepare_for_training, texts_of
from muco.training.recipe import Recipe


def meta_model(recipe: Recipe, sources: Sequence[Data], notes: list[str]) -> tuple[nn.Module, Processor]:
    """The backbone with adapters and frozen parts, and a processor; what stands in for another goes to the notes."""
    if recipe.model.tiny:
        model = build_model(recipe, sources)
        return model.encoder.model.to("meta"), model.encoder.muco_processor
    config, processor = _found(str(recipe.model.path), sources, notes)
    wanted = config.dtype if recipe.model.dtype == "auto" else getattr(torch, recipe.model.dtype)
    model = meta_backbone(config, wanted or torch.float32)
    if recipe.model.min_pixels or recipe.model.max_pixels:
        processor.set_pixels(recipe.model.min_pixels, recipe.model.max_pixels)
    with torch.device("meta"):
        return prepare_for_training(model, recipe.model, range(len(SPECIAL_TOKENS))), processor


def _found(path: str, sources: Sequence[Data], notes: list[str]) -> tuple[Any, Processor]:
    """Configuration and processor; for the paper's models without a download."""
    config = model_config(path)
    if path not in PUBLISHED:
        return config, load_processor(path, config)[0]
    try:
        return config, load_processor(path, config, local_files_only=True)[0]
    except CheckpointError:
        notes.append(
            f"{path} is not in the local cache: sizes as published; texts are counted with a tokenizer made from them"
        )
        return config, stand_in_processor(texts_of(sources), config)


def model_facts(model: nn.Module, recipe: Recipe) -> dict[str, Any]:
    """Numbers of parameters, by part, trained and frozen."""
    parts = dict.fromkeys(("vision", "language", "adapters", "token embeddings"), 0)
    trained = 0
    for name, parameter in model.named_parameters():
        parts[part_of(name)] += parameter.numel()
        trained += parameter.numel() if parameter.requires_grad else 0
    whole = sum(parts.values())
    return {
        "path": recipe.model.path or "tiny, made from its config",
        "family": model.config.model_type,
        "parameters": whole,
        "trained": trained,
        "frozen": whole - trained,
        "parts": {name: count for name, count in parts.items() if count},
    }


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to."""
    if "lora_" in name:
        return "adapters"
    if "trainable_tokens" in name:
        return "token embeddings"
    return "vision" if {*VISION_NAMES} & {*name.split(".")} else "language"
