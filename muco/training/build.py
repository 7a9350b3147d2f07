"""A recipe becomes a model and a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from muco import distributed
from muco.backbone import (
    add_adapters,
    freeze_vision,
    hold_trained_in_float32,
    load_backbone,
    use_flex_attention,
)
from muco.base.machine import GIB
from muco.base.text import first_line
from muco.data.source import Data
from muco.errors import CheckpointError, DataError, RecipeError
from muco.loss import MultiTurnLoss, ReconstructionLoss
from muco.model import Model, from_backbone
from muco.reading import decoder_layers
from muco.seen import SeenImages, is_trained, tower_of
from muco.starter import located
from muco.template import SPECIAL_TOKENS
from muco.tiny import tiny_qwen2_vl
from muco.training.published import PUBLISHED
from muco.training.recipe import ModelRecipe, Recipe
from muco.vision import vision_parameters


def build_model(recipe: Recipe, sources: Sequence[Data], *, device: str | None = None) -> Model:
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
    token_ids = [processor.tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS]
    model = from_backbone(prepare_for_training(backbone, settings, token_ids), processor, device=device)
    check_kept(recipe, model.encoder.model)
    if recipe.batch.seen_memory:
        model.encoder.seen_images = SeenImages(round(recipe.batch.seen_memory * GIB))
    return model


def prepare_for_training(backbone: nn.Module, model: ModelRecipe, token_ids: Sequence[int]) -> nn.Module:
    """Freezes, adds adapters that train the embeddings of ``token_ids`` too, and holds in float32 what is trained."""
    connector = model.connector or model.vision
    freeze_vision(backbone, vision=model.vision == "frozen", connector=connector == "frozen")
    if model.adapter is not None:
        beside = [parameter for parameter in vision_parameters(backbone) if parameter.requires_grad]
        backbone = add_adapters(backbone, model.adapter, token_ids, beside)
    hold_trained_in_float32(backbone)
    return backbone


def check_kept(recipe: Recipe, backbone: nn.Module) -> None:
    """A RecipeError if outputs of the vision tower are to be kept, and a part of it is trained."""
    tower = tower_of(backbone)
    if recipe.batch.seen_memory and (tower is None or is_trained(tower)):
        raise RecipeError(
            "batch.seen_memory: the connector of this model is inside its vision tower, so that nothing can be kept "
            "while it is trained; leave one of the two out"
        )


def texts_of(sources: Sequence[Data], limit: int = 5000, *, skip_broken: bool = False) -> Iterator[str]:
    """Texts of up to ``limit`` samples per source, for a tokenizer."""
    for source in sources:
        for index in range(min(limit, len(source))):
            try:
                turns = source[index].turns
            except DataError:
                if not skip_broken:
                    raise
                turns = ()
            yield from (content.text for turn in turns for content in (*turn.query, *turn.target) if content.text)


def model_config(path: str) -> Any:
    """The configuration of a ``model.path``, of the paper's models without a download; else a CheckpointError."""
    known = PUBLISHED.get(path)
    try:
        return known() if known else AutoConfig.from_pretrained(located(path))
    except (OSError, ValueError) as error:
        where = "" if Path(path).exists() else "no such folder, and from the hub: "
        raise CheckpointError(f"model.path: {path}: {where}{first_line(error)}") from error


def make_loss(recipe: Recipe, model: Model, vectors_of: Callable[[Tensor], Tensor] | None = None) -> MultiTurnLoss:
    """The loss of a recipe; ``vectors_of`` gives a guide's vectors, without which there is no guide."""
    loss = recipe.loss
    shared = {"temperature": loss.temperature, "dimensions": loss.dimensions, "weighting": loss.weighting}
    shared["learnt"] = {None: 0, "one": 1, "per_source": len(recipe.data.train)}[loss.learn_temperature]
    shared |= {"guide": loss.guide, "vectors_of": vectors_of}
    if recipe.turns.mode == "reconstruction":
        return ReconstructionLoss(model, joint=loss.joint, mask_counterpart=loss.mask_counterpart, **shared)
    shared |= {"mask_same_image": loss.mask_same_image, "distillation": loss.distillation}
    return MultiTurnLoss(model, symmetric=loss.symmetric, **shared)


def saved_dtype(model: ModelRecipe, backbone: nn.Module) -> torch.dtype:
    """The precision of the finished model; ``backbone.config`` remembers that in which it was loaded."""
    if model.save_dtype == "auto":
        return backbone.config.dtype or torch.float32
    return getattr(torch, model.save_dtype)


def shard_model(model: Model) -> None:
    """Spreads a model over all processes, layer by layer; what is beside the language model stays whole on each."""
    backbone = model.encoder.model
    distributed.shard(backbone, decoder_layers(backbone), vision_parameters(backbone))
    with torch.no_grad():  # what a first pass in inference mode, that of `encode`, gathers could not be trained
        model.embed(model.preprocess(["nothing"]))
