"""What is refused before training, with the key and the numbers: at this machine, by so many processes, by the data.

A dry run and training ask the same: :func:`check_recipe` before any work, :func:`check_budget` of a first batch. What
contradicts itself already in a recipe is refused where it is made, see :class:`muco.train.recipe.Recipe`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from muco.data import Data
from muco.errors import CheckpointError, DataError, RecipeError
from muco.gradcache import SIDES
from muco.loss import MultiTurnLoss
from muco.negatives import Variety
from muco.train.flops import qwen2_vl_config
from muco.train.recipe import Recipe

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
        batch: From :func:`muco.train.batches.batch_of`.
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
        batch: Of this sample, from :func:`muco.train.batches.batch_of`.
    Raises:
        DataError: With the reason.
    """
    reason = loss.why_no_negative([Variety.of(batch["ids"])])
    if reason and sum(map(len, sources)) == 1:
        raise DataError(NO_NEGATIVE.format(samples="its only sample", reason=reason))
