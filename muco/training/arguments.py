"""The training arguments of a recipe: its ``trainer`` group over our defaults, checked before any work."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformerTrainingArguments
from torch import nn
from transformers import Trainer, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from muco import distributed
from muco.errors import RecipeError
from muco.training.folder import CHECKPOINTS
from muco.training.mixture import Mixture
from muco.training.read import check_keys
from muco.training.recipe import Recipe

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


def training_arguments(
    recipe: Recipe, *, evaluates: bool, bf16: bool | None = None, use_cpu: bool | None = None
) -> OneDeviceArguments:
    """The recipe's ``trainer`` group over our defaults.

    Args:
        evaluates: Whether there is something to evaluate during training.
        bf16: From :func:`muco.training.build.uses_autocast`; None, before the model is known: as the recipe says.
        use_cpu: Take a CPU whatever there is; None takes it where there is nothing else.
    Raises:
        RecipeError: For unknown names, and for what transformers refuses.
    """
    _check_trainer(recipe.trainer)
    values = {**DEFAULTS, **recipe.trainer}
    if bf16 is not None:
        values["bf16"] = bf16
    if evaluates:
        values.setdefault("eval_strategy", "steps")
        values.setdefault("eval_steps", values["save_steps"])
    if use_cpu is not None:
        values["use_cpu"] = use_cpu
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


def steps_of(arguments: OneDeviceArguments, mixture: Mixture) -> int:
    """The steps of a whole run."""
    if arguments.max_steps > 0:
        return arguments.max_steps
    return max(1, int(arguments.num_train_epochs * mixture.steps_per_epoch))


def _check_trainer(values: Mapping[str, Any]) -> None:
    accepted = [field for field in dataclasses.fields(SentenceTransformerTrainingArguments) if field.init]
    check_keys(values, [field.name for field in accepted], "trainer")
    for field in accepted:
        value = values.get(field.name)
        if isinstance(field.default, bool) and value is not None and not isinstance(value, bool):
            raise RecipeError(f"trainer.{field.name} must be true or false, got {value!r}")


def _try_out(arguments: OneDeviceArguments) -> None:
    """Makes what the trainer will make of its arguments: the optimizer, its schedule and the loggers.

    Raises:
        TypeError, ValueError, ImportError, RuntimeError: By transformers, if one cannot be made.
    """
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
