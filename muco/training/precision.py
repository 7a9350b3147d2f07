"""Whether a run computes in bfloat16: as its recipe says, or as some steps in each precision tell."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import torch
from torch import nn

from muco import distributed
from muco.base.files import read_json, write_json
from muco.errors import RecipeError
from muco.loss import MultiTurnLoss
from muco.model import Model
from muco.precision import autocast, quicker
from muco.step import TrainingStep
from muco.training.batches import TrainingBatches
from muco.training.folder import PRECISION_FILE
from muco.training.recipe import Recipe

log = logging.getLogger(__name__)


def stated_autocast(recipe: Recipe, backbone: nn.Module) -> bool | None:
    """Whether a step computes in bfloat16 by autocast, as the recipe says; None: that is to be measured.

    Without a precision: if all weights of a half-precision model are trained, which are held in float32 for the
    optimizer only.

    Raises:
        RecipeError: If float32 is asked for and frozen weights are held in another precision.
    """
    if recipe.precision == "bfloat16":
        return True
    in_half = {parameter.dtype for parameter in backbone.parameters()} - {torch.float32}
    if recipe.precision == "float32" and in_half:
        raise RecipeError(
            f"precision: float32: frozen weights are held in {str(in_half.pop()).removeprefix('torch.')}; leave it "
            "out, or set model.dtype: float32"
        )
    if recipe.precision == "auto" and not in_half:
        return None
    loaded_in_half = backbone.config.dtype in (torch.bfloat16, torch.float16)
    return recipe.precision != "float32" and loaded_in_half and recipe.model.adapter is None


def uses_autocast(recipe: Recipe, model: Model, batches: TrainingBatches, loss: MultiTurnLoss) -> bool:
    """Whether the steps of a run compute in bfloat16; what is measured is kept in the run's folder for when it resumes.

    Every process takes part. Weights, statistics and random states are afterwards as they were.
    """
    stated = stated_autocast(recipe, model.encoder.model)
    if stated is not None:
        return stated
    file = Path(recipe.output) / PRECISION_FILE
    known = distributed.first_only(lambda: read_json(file) if file.is_file() else None)
    if known is None:
        known = _measured(recipe, model, batches, loss)
        distributed.first_only(lambda: write_json(file, known))
    return known["precision"] == "bfloat16"


def _measured(recipe: Recipe, model: Model, batches: TrainingBatches, loss: MultiTurnLoss) -> dict[str, object]:
    """Makes the first step some times in each precision, without a step of the optimizer."""
    encoder, device = model.encoder, model.device
    parts = [part for number in range(batches.parts) if (part := batches[0, number]) is not None]
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    kept, encoder.seen_images = encoder.seen_images, None

    def step(bfloat16: bool) -> None:
        made = TrainingStep(
            model,
            loss,
            token_budget=recipe.batch.token_budget,
            feature_memory=recipe.batch.feature_memory,
            autocast=partial(autocast, bfloat16, device),
        )
        made(iter(parts))
        for parameter in (*model.parameters(), *loss.parameters(recurse=False)):
            parameter.grad = None

    model.train()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        choice = quicker(step, device)
    for name, buffer in model.named_buffers():
        buffer.copy_(statistics[name])
    encoder.seen_images, loss.counted = kept, None
    choice = distributed.first_only(lambda: choice)  # the first process decides for all
    if distributed.rank() == 0:
        log.warning("computes in %s", choice)
    return {"precision": "bfloat16" if choice.bfloat16 else "float32", "seconds_of_a_step": dict(choice.seconds)}
