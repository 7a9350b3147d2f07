"""Checks before training, the same for a dry run; errors name the key and the numbers.

:class:`muco.training.recipe.Recipe` itself refuses a recipe that contradicts itself.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformerTrainingArguments
from torch import nn
from transformers import Trainer, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from muco import distributed
from muco.data.source import Data
from muco.errors import DataError, RecipeError
from muco.loss import MultiTurnLoss
from muco.negatives import Variety
from muco.reading import Reading
from muco.step import SIDES
from muco.training.build import model_config
from muco.training.folder import CHECKPOINTS
from muco.training.mixture import Mixture
from muco.training.read import check_keys
from muco.training.recipe import ModelRecipe, Recipe, TurnsRecipe

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
        if "trained" in (model.vision, model.connector):
            raise RecipeError(
                "batch.sharding: fsdp needs vision and connector frozen: processes without images would not join in"
            )
    if dimensions:
        width = model.tiny.width if model.tiny else model_config(str(model.path)).get_text_config().hidden_size
        if max(dimensions) > width:
            raise RecipeError(
                f"loss.dimensions: {max(dimensions)} is more than the {width} dimensions of the model's vectors"
            )


def check_turns(turns: TurnsRecipe, reading: Reading) -> None:
    """Refuses turns in one row that the model cannot keep apart."""
    reason, several = reading.why_not_isolated, turns.limit != 1
    if reading.looks_ahead and (several or turns.mode == "reconstruction"):
        key = "turns.mode: reconstruction" if turns.mode == "reconstruction" else "turns.limit"
        raise RecipeError(f"{key}: {reason}; train single turns with 'turns: {{mode: isolated, limit: 1}}'")
    if reason and several and turns.mode == "isolated":
        raise RecipeError(f"turns.mode: isolated: {reason}; set turns.mode: compounded")
    if reason and several and turns.of_targets == "isolated":
        raise RecipeError(f"turns.targets: isolated: {reason}; leave it out")


def over_budget(budget: int | None, batch: Mapping[str, Any]) -> tuple[str, bool] | None:
    """What of a batch is longer than the token budget, with numbers and sample, and whether nothing of its side fits.

    None if all fits. A longer dialogue passes alone, and needs more memory than the budget says.
    """
    if budget is None or not batch["places"]:
        return None
    lengths = {side: batch[side]["attention_mask"].sum(dim=1) for side in SIDES}
    side = max(SIDES, key=lambda side: int(lengths[side].max()))
    longest, row = int(lengths[side].max()), int(lengths[side].argmax())
    if longest > budget:
        place = f" of {batch['places'][row]}" if row < len(batch["places"]) else ""  # else a hard negative
        lower = "model.max_pixels or turns.limit" if "image_rows" in batch[side] else "turns.limit"
        said = (
            f"batch.token_budget: {budget} tokens are fewer than the {longest} of the {side} side{place}; raise it to "
            f"at least {longest}, or lower {lower}"
        )
        return said, int(lengths[side].min()) > budget
    return None


def check_negatives(loss: MultiTurnLoss, batch: Mapping[str, Any], sources: Sequence[Data]) -> None:
    """Refuses data of a single sample that gives none of its turns a negative; with more samples, a step warns."""
    reason = loss.why_no_negative([Variety.of(batch["ids"])])
    if reason and sum(map(len, sources)) == 1:
        raise DataError(NO_NEGATIVE.format(samples="its only sample", reason=reason))


DEFAULTS = {  # of the training arguments, where a recipe says nothing
    "learning_rate": 5e-5,
    "logging_steps": 10,
    "save_strategy": "steps",
    "save_steps": 500,
    "save_total_limit": 2,
    "report_to": ["tensorboard"],
    "dataloader_pin_memory": torch.cuda.is_available(),
}


class OneDeviceArguments(SentenceTransformerTrainingArguments):
    """The library's, with one device per process."""

    @property
    def n_gpu(self) -> int:
        """1, or 0 without a GPU: of more, DataParallel would cut our batches in half along the wrong dimension."""
        return min(1, super().n_gpu)

    def steps(self, mixture: Mixture) -> int:
        """The steps of a whole run."""
        return self.max_steps if self.max_steps > 0 else max(1, int(self.num_train_epochs * mixture.steps_per_epoch))


def training_arguments(recipe: Recipe, *, evaluates: bool, bf16: bool = False) -> OneDeviceArguments:
    """The recipe's ``trainer`` group over our defaults.

    Args:
        evaluates: Whether there is something to evaluate during training.
        bf16: From :func:`muco.training.precision.uses_autocast`, once the model is known.
    Raises:
        RecipeError: For unknown names, and for what transformers refuses.
    """
    accepted = [field for field in dataclasses.fields(SentenceTransformerTrainingArguments) if field.init]
    check_keys(recipe.trainer, [field.name for field in accepted], "trainer")
    for field in accepted:
        value = recipe.trainer.get(field.name)
        if isinstance(field.default, bool) and value is not None and not isinstance(value, bool):
            raise RecipeError(f"trainer.{field.name} must be true or false, got {value!r}")
    for name in ("save_strategy", "eval_strategy", "logging_strategy"):
        if recipe.trainer.get(name) == "epoch":
            other = name.replace("strategy", "steps")
            raise RecipeError(
                f"trainer.{name}: epoch is not supported; set trainer.{other}, below 1 a share of the run"
            )
    values = {**DEFAULTS, **recipe.trainer, "bf16": bf16}
    if evaluates:
        values.setdefault("eval_strategy", "steps")
        values.setdefault("eval_steps", values["save_steps"])
        # What cannot be evaluated stops a run before it has learnt anything, and the start's scores say what it gains.
        values.setdefault("eval_on_start", values["eval_strategy"] != "no")
    values.setdefault("use_cpu", distributed.on_cpu() or not torch.accelerator.is_available())
    try:
        arguments = OneDeviceArguments(
            output_dir=str(Path(recipe.output) / CHECKPOINTS),
            seed=recipe.seed,
            per_device_train_batch_size=-(-recipe.batch.size // distributed.world_size()),
            ignore_data_skip=True,  # our loader begins at the step that is asked for
            dataloader_drop_last=True,  # only to quiet a warning: our loader has whole steps
            **values,
        )
        _try_out(arguments)
    except (TypeError, ValueError, ImportError, RuntimeError) as error:
        raise RecipeError(f"trainer: {error}") from None
    if arguments.save_strategy == "best" and arguments.metric_for_best_model is None:
        raise RecipeError("trainer.save_strategy: best needs trainer.metric_for_best_model")
    if arguments.eval_strategy != "no" and not evaluates:
        raise RecipeError("trainer.eval_strategy: there is nothing to evaluate; set data.validation")
    return arguments


def _try_out(arguments: OneDeviceArguments) -> None:
    """Makes what the trainer will make of its arguments, for transformers' errors: optimizer, schedule and loggers."""
    with suppress(ValueError):  # of an optimizer that asks for the model, which is not there yet
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    get_scheduler(
        arguments.lr_scheduler_type,
        torch.optim.SGD([nn.Parameter(torch.zeros(()))]),
        num_warmup_steps=0,
        num_training_steps=1,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
    )
    for logger_of in get_reporting_integration_callbacks(arguments.report_to):
        logger_of()
