"""What is refused before training, with the key and the numbers; a dry run and training ask the same.

:func:`check_recipe` is asked before any work, :func:`check_budget` of a first batch. A recipe that contradicts itself
is refused where it is made, see :class:`muco.training.recipe.Recipe`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from muco.data.source import Data
from muco.errors import DataError, RecipeError
from muco.loss import MultiTurnLoss
from muco.negatives import Variety
from muco.step import SIDES
from muco.training.build import model_config
from muco.training.recipe import ModelRecipe, Recipe

NO_NEGATIVE = (
    "data.train: {samples} gives no turn a negative ({reason}), so the loss would be 0 and nothing learnt; add samples "
    "of other images with other targets, or hard negatives"
)


def check_machine(model: ModelRecipe) -> None:
    """Refuses what this machine or its launcher cannot do."""
    if model.attention == "flex" and not torch.cuda.is_available():
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
    batch, model, dimensions = recipe.batch, recipe.model, recipe.loss.dimensions
    if batch.size < processes:
        raise RecipeError(f"batch.size: {batch.size} samples are fewer than the {processes} processes")
    if batch.sharding == "fsdp":
        if processes == 1:
            raise RecipeError("batch.sharding: fsdp needs several processes; start them with torchrun --nproc-per-node")
        if model.vision == "trained":
            raise RecipeError("batch.sharding: fsdp needs 'vision: frozen': processes without images would not join in")
    if dimensions:
        width = model.tiny.width if model.tiny else model_config(str(model.path)).get_text_config().hidden_size
        if max(dimensions) > width:
            raise RecipeError(
                f"loss.dimensions: {max(dimensions)} is more than the {width} dimensions of the model's vectors"
            )


def check_budget(budget: int | None, batch: Mapping[str, Any]) -> None:
    """Refuses a token budget that is smaller than a single dialogue of a batch.

    Args:
        budget: ``batch.token_budget`` of the recipe; None for none.
        batch: From :func:`muco.training.prepared.batch_of`.
    Raises:
        RecipeError: With the numbers and the sample.
    """
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
    """Refuses data of a single sample that gives none of its turns a negative; with more samples, a step warns.

    Args:
        batch: Of this sample, from :func:`muco.training.prepared.batch_of`.
    Raises:
        DataError: With the reason.
    """
    reason = loss.why_no_negative([Variety.of(batch["ids"])])
    if reason and sum(map(len, sources)) == 1:
        raise DataError(NO_NEGATIVE.format(samples="its only sample", reason=reason))
