"""A recipe becomes a model and a loss; and what is refused before training, with the key and the numbers.

A dry run and training ask the same: :func:`check_recipe` before any work, :func:`check_budget` of a first batch. What
contradicts itself already in a recipe is refused where it is made, see :class:`muco.training.recipe.Recipe`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from muco import distributed
from muco.backbone import (
    VISION_NAMES,
    add_adapters,
    freeze_vision,
    hold_trained_in_float32,
    load_backbone,
    use_flex_attention,
)
from muco.data.source import Data
from muco.errors import CheckpointError, DataError, RecipeError
from muco.loss import MultiTurnLoss, ReconstructionLoss
from muco.model import Model, from_backbone
from muco.negatives import Variety
from muco.step import SIDES
from muco.template import SPECIAL_TOKENS
from muco.tiny import tiny_qwen2_vl
from muco.training.flops import qwen2_vl_config
from muco.training.recipe import ModelRecipe, Recipe

NO_NEGATIVE = (
    "data.train: {samples} gives no turn a negative ({reason}), so the loss would be 0 and nothing learnt; add samples "
    "of other images with other targets, or hard negatives"
)
PUBLISHED = {f"Qwen/Qwen2-VL-{size}-Instruct": size for size in ("2B", "7B")}  # sizes that need no download


def check_machine(recipe: Recipe) -> None:
    """Refuses what this machine or its launcher cannot do; a RecipeError says what to do."""
    if recipe.model.attention == "flex" and not torch.cuda.is_available():
        raise RecipeError("model.attention: flex needs CUDA; use sdpa here")
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise RecipeError("accelerate's own FSDP is not supported; launch without it and set batch.sharding: fsdp")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        raise RecipeError("DeepSpeed is not supported; launch without it and set batch.sharding: fsdp")


def check_recipe(recipe: Recipe, processes: int) -> None:
    """Refuses what these processes cannot share, or the model cannot do.

    Raises:
        RecipeError: With the key and the numbers.
        CheckpointError: If the model's configuration is needed and cannot be read.
    """
    if recipe.batch.size < processes:
        raise RecipeError(f"batch.size: {recipe.batch.size} samples are fewer than the {processes} processes")
    if recipe.batch.sharding == "fsdp":
        if processes == 1:
            raise RecipeError("batch.sharding: fsdp needs several processes; start them with torchrun --nproc-per-node")
        if recipe.model.vision == "trained":
            raise RecipeError("batch.sharding: fsdp needs 'vision: frozen': processes without images would not join in")
    _check_dimensions(recipe)


def _check_dimensions(recipe: Recipe) -> None:
    if not recipe.loss.dimensions:
        return
    width = recipe.model.tiny.width if recipe.model.tiny else model_config(recipe).get_text_config().hidden_size
    for dimension in recipe.loss.dimensions:
        if dimension > width:
            raise RecipeError(f"loss.dimensions: {dimension} is more than the {width} numbers of the model's vectors")


def model_config(recipe: Recipe) -> Any:
    """The configuration of the model at ``model.path``; for the paper's models without any download.

    Raises:
        CheckpointError: If it cannot be read.
    """
    from transformers import AutoConfig

    path = str(recipe.model.path)
    known = PUBLISHED.get(path)
    try:
        return qwen2_vl_config(known) if known else AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        where = "" if Path(path).exists() else "no such folder, and from the hub: "
        raise CheckpointError(f"model.path: {path}: {where}{str(error).splitlines()[0]}") from error


def check_budget(recipe: Recipe, batch: Mapping[str, Any]) -> None:
    """Refuses a token budget that is less than a single dialogue of a batch needs.

    Args:
        batch: From :func:`muco.training.prepared.batch_of`.
    Raises:
        RecipeError: With the numbers and the sample.
    """
    budget = recipe.batch.token_budget
    if budget is None or not batch["places"]:
        return
    lengths = {side: batch[side]["attention_mask"].sum(dim=1) for side in SIDES}
    side = max(SIDES, key=lambda side: int(lengths[side].max()))
    longest, row = int(lengths[side].max()), int(lengths[side].argmax())
    if longest > budget:
        place = f" of {batch['places'][row]}" if row < len(batch["places"]) else ""  # else a hard negative
        lower = "model.max_pixels or turns.limit" if "image_rows" in batch[side] else "turns.limit"
        raise RecipeError(
            f"batch.token_budget: {budget} tokens are fewer than the {longest} of the {side} side{place}; raise it to "
            f"at least {longest}, or lower {lower}"
        )


def check_negatives(loss: MultiTurnLoss, batch: Mapping[str, Any], sources: Sequence[Data]) -> None:
    """Refuses data of a single sample that gives none of its turns a negative; where more can be drawn, a step tells.

    Args:
        batch: Of this sample, from :func:`muco.training.prepared.batch_of`.
    Raises:
        DataError: With the reason.
    """
    reason = loss.why_no_negative([Variety.of(batch["ids"])])
    if reason and sum(map(len, sources)) == 1:
        raise DataError(NO_NEGATIVE.format(samples="its only sample", reason=reason))


def build_model(recipe: Recipe, sources: list[Data]) -> Model:
    """The model of a recipe before training: weights, special tokens, pixel budget, adapters, frozen parts."""
    settings = recipe.model
    if settings.tiny:
        texts = texts_of(sources, skip_broken=recipe.data.broken_images == "skip")
        backbone, processor = tiny_qwen2_vl(texts, settings.tiny, seed=recipe.seed)
    else:
        backbone, processor = load_backbone(settings.path, dtype=settings.dtype)
    if settings.min_pixels or settings.max_pixels:
        processor.set_pixels(settings.min_pixels, settings.max_pixels)
    processor.trained_pixels = processor.pixels
    if settings.attention == "flex":
        use_flex_attention(backbone)
    if settings.activation_checkpointing:
        backbone.activation_checkpointing_enable({"use_reentrant": False})
    return from_backbone(_trainable(backbone, settings, processor), processor)


def _trainable(backbone: nn.Module, settings: ModelRecipe, processor: Any) -> nn.Module:
    if settings.vision == "frozen":
        freeze_vision(backbone)
    if settings.adapter is not None:
        tokens = [processor.tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS]
        backbone = add_adapters(backbone, settings.adapter, tokens)
    hold_trained_in_float32(backbone)
    return backbone


def saved_dtype(recipe: Recipe, backbone: nn.Module) -> torch.dtype:
    """The precision of the finished model; ``backbone.config`` remembers that in which it was loaded."""
    asked = recipe.model.save_dtype
    return (backbone.config.dtype or torch.float32) if asked == "auto" else getattr(torch, asked)


def uses_autocast(recipe: Recipe, backbone: nn.Module) -> bool:
    """Whether a step is computed in bfloat16 by autocast: where asked for, and where whole weights of half precision
    are trained, which are held in float32 for the optimizer only.

    Raises:
        RecipeError: If autocast is refused and trained weights are held in another precision than frozen ones.
    """
    asked = recipe.trainer.get("bf16")
    half = recipe.model.adapter is None and backbone.config.dtype in (torch.bfloat16, torch.float16)
    if asked is None:
        return half
    if not asked and half and len({parameter.dtype for parameter in backbone.parameters()}) > 1:
        raise RecipeError(
            "trainer.bf16: false: frozen weights are held in bfloat16 and trained ones in float32, which only autocast "
            "brings together; leave it out, or set model.dtype: float32"
        )
    return bool(asked)


def texts_of(sources: list[Data], limit: int = 5000, *, skip_broken: bool = False) -> Iterator[str]:
    """Texts of up to ``limit`` samples per source, for a tokenizer."""
    for source in sources:
        for index in range(min(limit, len(source))):
            try:
                turns = source[index].turns
            except DataError:
                if not skip_broken:
                    raise
                continue
            for turn in turns:
                yield from (content.text for content in (*turn.query, *turn.target) if content.text)


def make_loss(recipe: Recipe, model: Model) -> MultiTurnLoss:
    settings = recipe.loss
    shared = {"temperature": settings.temperature, "dimensions": settings.dimensions}
    if recipe.turns.mode == "reconstruction":
        own = {"joint": settings.joint, "mask_counterpart": settings.mask_counterpart}
        return ReconstructionLoss(model, **own, **shared)
    masks = {"mask_same_image": settings.mask_same_image}
    return MultiTurnLoss(model, symmetric=settings.symmetric, **masks, **shared)


def shard_model(model: Model) -> None:
    """Spreads a model over all processes, layer by layer; its frozen vision tower stays whole on each."""
    backbone = model.encoder.model
    towers = [module for name, module in backbone.named_modules() if name.split(".")[-1] in VISION_NAMES]
    lists = [m for name, m in backbone.named_modules() if name.endswith("layers") and isinstance(m, nn.ModuleList)]
    layers = [layer for found in lists for layer in found if not any(layer in [*t.modules()] for t in towers)]
    distributed.shard(backbone, layers, towers)
