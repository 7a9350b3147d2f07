"""A training run from a recipe to a saved model: ``muco.train(recipe)``.

The loop, optimizer, schedule and checkpoints are those of sentence-transformers' trainer; ours are the batches
(:mod:`muco.training.batches`), the loss (:mod:`muco.loss`) and what a checkpoint holds
(:mod:`muco.training.checkpoint`).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import resource
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, Trainer, get_scheduler, set_seed
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from muco import distributed
from muco.backbone import (
    merge_adapters,
)
from muco.base.files import writing
from muco.data import open_data
from muco.data.fingerprint import recall, remember
from muco.data.source import Data
from muco.errors import OutputError, RecipeError, TrainingError
from muco.loss import MultiTurnLoss
from muco.model import Model
from muco.step import GIB, TrainingStep
from muco.training import checkpoint
from muco.training.batches import PartSampler, StepLoader, TrainingBatches
from muco.training.build import (
    build_model,
    check_budget,
    check_machine,
    check_negatives,
    check_recipe,
    make_loss,
    saved_dtype,
    shard_model,
    uses_autocast,
)
from muco.training.callbacks import Record, ScreenProgress, TensorBoardLog, TokenBudget, told_once
from muco.training.mixture import Mixture, open_sources
from muco.training.recipe import BatchRecipe, Recipe, check_keys
from muco.training.warmup import warm_up

logger = logging.getLogger(__name__)

DEFAULTS = {  # of the training arguments, where a recipe says nothing
    "learning_rate": 5e-5,
    "logging_steps": 10,
    "save_strategy": "steps",
    "save_steps": 500,
    "save_total_limit": 2,
    "report_to": ["tensorboard"],
    "dataloader_pin_memory": torch.cuda.is_available(),
}


def train(recipe: Recipe, *, resume: bool = True) -> Path:
    """Trains a model and saves it.

    Args:
        recipe: From :func:`muco.training.recipe.load_recipe` or made in Python.
        resume: Go on from the last checkpoint of the same recipe in ``recipe.output``; otherwise a folder that holds
            a run is an error.
    Returns:
        The folder of the trained model, ``<output>/model``.
    Raises:
        RecipeError, DataError, CheckpointError: If the run cannot be set up.
        OutputError: If the output folder holds another run, another process trains into it, or it cannot be written.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    check_machine(recipe)
    check_recipe(recipe, processes)
    if processes == 1:  # several would join their group by it, and then wait for one another while data is read
        training_arguments(recipe, recipe.data.validation is not None)
    sources = open_sources(recipe)
    Mixture.of(recipe, [len(source) for source in sources])
    validation = open_data(recipe.data.validation) if recipe.data.validation else None
    recall(Path(recipe.output) / checkpoint.DIGESTS_FILE)
    facts = checkpoint.run_facts(recipe, sources)  # by each process: in a group, others would wait for this one
    distributed.start()
    training_arguments(recipe, validation is not None)
    with distributed.claimed(recipe.output):
        return _train(recipe, sources, validation, facts, resume)


def _train(recipe: Recipe, sources: list[Data], validation: Data | None, facts: dict[str, Any], resume: bool) -> Path:
    finished = distributed.first_only(lambda: _claim(recipe, facts, resume))
    if finished:
        return finished

    set_seed(recipe.seed)
    model = build_model(recipe, sources)
    last = distributed.first_only(lambda: checkpoint.last_complete(Path(recipe.output), distributed.world_size()))
    if last is None and recipe.warm_up.steps:
        skip = recipe.data.broken_images == "skip"
        warm_up(model.encoder, sources, recipe.warm_up, seed=recipe.seed, skip_broken=skip)
    distributed.make_equal(p for p in model.parameters() if p.requires_grad)
    trainer = make_trainer(recipe, model, sources, validation)
    first = trainer.batches[0, 0]
    check_budget(recipe, first)
    check_negatives(trainer.loss, first, sources)
    set_seed(recipe.seed + distributed.rank())  # from here on each process draws its own dropout
    with told_once():
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    return _finish(recipe, trainer, sources, facts)


def _claim(recipe: Recipe, facts: dict[str, Any], resume: bool) -> Path | None:
    output = Path(recipe.output)
    finished = checkpoint.claim_output(output, facts, resume=resume)
    if not finished:
        remember(output / checkpoint.DIGESTS_FILE)
    return finished


def _finish(recipe: Recipe, trainer: MuCoTrainer, sources: list[Data], facts: dict[str, Any]) -> Path:
    """Saves the model, adapters folded in; one process writes, and all know the folder."""
    model, weights, record = trainer.model, None, trainer.record.gather()
    if distributed.is_sharded(model):
        weights = checkpoint.trained_weights(model)
        model = build_model(recipe, sources) if distributed.rank() == 0 else model

    def save() -> Path:
        if weights is not None:
            checkpoint.assign_trained(model, weights)
        model.encoder.model = merge_adapters(model.encoder.model, saved_dtype(recipe, model.encoder.model))
        return checkpoint.save_final(Path(recipe.output), model, recipe, facts | {"record": record}, trainer.state)

    return distributed.first_only(save)


def make_trainer(recipe: Recipe, model: Model, sources: list[Data], validation: Data | None = None) -> MuCoTrainer:
    """The trainer of a recipe; its batches, loss and arguments."""
    bf16 = uses_autocast(recipe, model.encoder.model)
    arguments = training_arguments(recipe, validation is not None, bf16=bf16)
    mixture = Mixture.of(recipe, [len(source) for source in sources])
    arguments.max_steps = steps_of(arguments, mixture)
    batches = TrainingBatches(
        sources,
        mixture,
        model.encoder.muco_processor,
        recipe.turns,
        seed=recipe.seed,
        mask_identical_targets=recipe.loss.mask_identical_targets,
        skip_broken=recipe.data.broken_images == "skip",
        leave_out_duplicates=recipe.data.duplicates == "leave_out",
        blind=recipe.data.blind,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
    loss = make_loss(recipe, model)
    evaluator = None
    if validation is not None:
        from muco.training.evaluator import RetrievalEvaluator

        evaluator = RetrievalEvaluator(validation)
    record = Record(Path(recipe.output), recipe.data.max_broken)
    return MuCoTrainer(model, arguments, recipe.batch, batches, loss, record, evaluator)


def steps_of(arguments: SentenceTransformerTrainingArguments, mixture: Mixture) -> int:
    """The steps of a whole run."""
    if arguments.max_steps > 0:
        return arguments.max_steps
    return max(1, int(arguments.num_train_epochs * mixture.steps_per_epoch))


def training_arguments(
    recipe: Recipe, evaluates: bool, *, bf16: bool | None = None
) -> SentenceTransformerTrainingArguments:
    """The recipe's ``trainer`` group over our defaults.

    Args:
        evaluates: Whether there is something to evaluate during training.
        bf16: From :func:`uses_autocast`; None before the model is known: as the recipe says.
    Raises:
        RecipeError: For unknown names, and what transformers refuses.
    """
    values = {**DEFAULTS, **recipe.trainer, **({} if bf16 is None else {"bf16": bf16})}
    if evaluates:
        values.setdefault("eval_strategy", "steps")
        values.setdefault("eval_steps", values["save_steps"])
    accepted = dataclasses.fields(SentenceTransformerTrainingArguments)
    check_keys(recipe.trainer, [item.name for item in accepted if item.init], "trainer")
    for item in accepted:
        given = values.get(item.name)
        if isinstance(item.default, bool) and given is not None and not isinstance(given, bool):
            raise RecipeError(f"trainer.{item.name} must be true or false, got {given!r}")
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(Path(recipe.output) / "logs")
    try:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=str(Path(recipe.output) / "checkpoints"),
            seed=recipe.seed,
            per_device_train_batch_size=-(-recipe.batch.size // distributed.world_size()),
            use_cpu=values.pop("use_cpu", distributed.on_cpu() or not torch.accelerator.is_available()),
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
    if arguments.n_gpu > 1:  # else DataParallel would cut our batches in half along the wrong dimension
        arguments._n_gpu = 1
    return arguments


def _try_out(arguments: SentenceTransformerTrainingArguments) -> None:
    """Makes what the trainer will make of its arguments: the optimizer, its schedule and the loggers.

    Raises:
        TypeError, ValueError, ImportError, RuntimeError: If it cannot be made, by transformers.
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


class MuCoTrainer(SentenceTransformerTrainer):
    """sentence-transformers' trainer with our batches and steps; the loop, optimizer, schedule and logs are its own."""

    def __init__(
        self,
        model: Model,
        args: SentenceTransformerTrainingArguments,
        batch: BatchRecipe,
        batches: TrainingBatches,
        loss: MultiTurnLoss,
        record: Record,
        evaluator: Any = None,
    ) -> None:
        from datasets import Dataset

        self.batch, self.batches, self.record = batch, batches, record
        # the library insists on a table; ours has a row per step, and the batches are made in the loader below
        table = Dataset.from_dict({"step": range(args.max_steps)})
        super().__init__(model=model, args=args, train_dataset=table, loss=loss, evaluator=evaluator)
        for shown in (ProgressCallback, PrinterCallback):  # they print to stdout, which is for programs
            self.remove_callback(shown)
        if self.pop_callback(TensorBoardCallback):
            self.add_callback(TensorBoardLog())
        if distributed.rank() == 0:
            self.add_callback(ScreenProgress(self))
        self.budget = TokenBudget(batch.token_budget)
        self.add_callback(self.budget)
        self.add_callback(record)
        if batch.sharding == "fsdp":
            shard_model(model)
        # The trainer must not wrap the model in DistributedDataParallel, see muco.distributed. By this it takes the
        # model as it is, sharded or not.
        self.is_distributed_loading_by_transformers = True
        self.made, self.padding = 0, 0.0  # steps since the last log, and the padding of the last one
        self.warned = False  # that a step had no negative

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        """Nothing: gradients are summed by the step itself."""

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """None: the card is written by :mod:`muco.training.checkpoint` from what was run."""

    def get_train_dataloader(self) -> StepLoader:
        workers = self.args.dataloader_num_workers
        steps = PartSampler(self.args.max_steps, self.batches.parts, first=lambda: self.state.global_step)
        loader = DataLoader(
            self.batches,
            batch_sampler=steps,
            collate_fn=_only,
            num_workers=workers,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
            persistent_workers=bool(workers),
            pin_memory=self.args.dataloader_pin_memory,
            generator=torch.Generator(),  # its own: a start of the loader must not move the model's randomness
        )
        return StepLoader(loader)

    @cached_property
    def step(self) -> TrainingStep:
        return TrainingStep(
            self.model,
            self.loss,
            token_budget=self.budget.tokens,
            feature_memory=self.batch.feature_memory,
            autocast=self.accelerator.autocast,
        )

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        model.train()
        try:
            report = self.step(self._counted(inputs["parts"]))
        except TrainingError as error:
            raise TrainingError(f"step {self.state.global_step + 1}: {error}; {self._last_good()}") from error
        self.budget.tokens = self.step.token_budget
        if report is None:
            self._warn(f"step {self.state.global_step + 1}: none of its samples can be used; the step is left out")
            return torch.tensor(math.nan, device=self.args.device)  # the log leaves it out
        if report.no_negative and not self.warned:
            self.warned = True
            self._warn(
                f"step {self.state.global_step + 1}: no turn has a negative ({report.no_negative}), so the loss is "
                "0 and nothing is learnt; a batch needs samples of different images with different targets, or hard "
                "negatives (later steps of this kind are not reported)"
            )
        self.made, self.padding = self.made + 1, report.padding
        return report.loss

    def _warn(self, sentence: str) -> None:
        if distributed.rank() == 0:
            logger.warning(sentence)

    def _counted(self, parts: Iterable[dict[str, Any] | None]) -> Iterator[dict[str, Any]]:
        for part in parts:
            if part is not None:
                self.record.add(part)
                yield part

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        if not math.isfinite(float(norm)):
            raise TrainingError(f"step {self.state.global_step + 1}: the gradient is {norm}; {self._last_good()}")
        return norm

    def _last_good(self) -> str:
        last = checkpoint.last_complete(Path(self.args.output_dir).parent, distributed.world_size())
        return f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        two_precisions = len({parameter.dtype for parameter in self.model.parameters()}) > 1
        with self.accelerator.autocast() if two_precisions else nullcontext():
            return super().evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and not self.made:  # all steps since the last time were left out: no loss was found
            del logs["loss"]
        elif "loss" in logs:
            logs |= {"padding": round(self.padding, 4), "peak_memory_gib": round(peak_memory() / GIB, 3)}
            self.made = 0
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            with writing(folder, again=True):
                super()._save_checkpoint(model, trial)
        except OutputError as error:
            raise OutputError(f"step {self.state.global_step}: {error}; {self._last_good()}") from error

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        weights = checkpoint.trained_weights(self.model)  # on all processes: shards are put together
        broken = [name for name, values in weights.items() if not torch.isfinite(values).all()]
        if broken:
            raise TrainingError(f"step {self.state.global_step}: {broken[0]} is not finite; {self._last_good()}")
        if self.args.should_save:
            checkpoint.save_trained(weights, Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoint.load_trained(self.model, Path(resume_from_checkpoint))
        state = json.loads((Path(resume_from_checkpoint) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        kept = state["stateful_callbacks"]
        self.budget.tokens = kept[TokenBudget.__name__]["args"]["tokens"]
        self.record.go_on(kept[Record.__name__]["attributes"])

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not distributed.is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = get_optimizer_state_dict(self.model, self.optimizer.optimizer, options=WHOLE)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, folder: str | None) -> None:
        if folder is None or not distributed.is_sharded(self.model):
            super()._load_optimizer_and_scheduler(folder)
            return
        state = torch.load(Path(folder) / OPTIMIZER_NAME, weights_only=True, map_location="cpu")
        set_optimizer_state_dict(self.model, self.optimizer.optimizer, state, options=WHOLE)
        self.lr_scheduler.load_state_dict(torch.load(Path(folder) / SCHEDULER_NAME, weights_only=True))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.record.gather()
        distributed.wait_for_all()  # the trainer's state, written next, says that the checkpoint is complete


WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def peak_memory() -> int:
    """Bytes: the most that torch held on this process's GPU, or that this process held in host memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _only(items: list[Any]) -> Any:
    return items[0]
