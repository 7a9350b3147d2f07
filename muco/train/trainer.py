"""A training run from a recipe to a saved model: ``muco.train(recipe)``.

The loop, optimizer, schedule and checkpoints are those of sentence-transformers' trainer; ours are the batches
(:mod:`muco.train.mixture`), the loss (:mod:`muco.loss`) and what a checkpoint holds (:mod:`muco.train.checkpoint`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, set_seed

from muco.backbone import add_adapters, freeze_vision, load_backbone, merge_adapters, tiny_qwen2_vl
from muco.data import open_data
from muco.encoder import Model, from_backbone
from muco.errors import RecipeError
from muco.loss import MultiTurnLoss
from muco.template import SPECIAL_TOKENS
from muco.train import checkpoint
from muco.train.mixture import Data, Mixture, StepSampler, TrainingBatches
from muco.train.progress import ScreenProgress
from muco.train.recipe import ModelRecipe, Recipe
from muco.train.warmup import warm_up

DEFAULTS = {  # of the training arguments, where a recipe says nothing
    "per_device_train_batch_size": 32,
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
        recipe: From :func:`muco.train.recipe.load_recipe` or made in Python.
        resume: Go on from the last checkpoint of the same recipe in ``recipe.output``; otherwise a folder that holds
            a run is an error.
    Returns:
        The folder of the trained model, ``<output>/model``.
    Raises:
        RecipeError, DataError, CheckpointError: If the run cannot be set up.
        OutputError: If the output folder holds another run.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError("training on several processes is not supported yet; start one process on one device")
    output = Path(recipe.output)
    sources = [open_data(source.path) for source in recipe.data.train]
    validation = open_data(recipe.data.validation) if recipe.data.validation else None
    facts = checkpoint.run_facts(recipe, sources)
    finished = checkpoint.claim_output(output, facts, resume=resume)
    if finished:
        return finished

    set_seed(recipe.seed)
    model = build_model(recipe, sources)
    trainer = make_trainer(recipe, model, sources, validation)
    last = checkpoint.last_complete(output)
    if last is None and recipe.warm_up.steps:
        warm_up(model.encoder, sources, recipe.warm_up, seed=recipe.seed)
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    model.encoder.model = merge_adapters(model.encoder.model)
    return checkpoint.save_final(output, model, recipe, facts, trainer.state)


def build_model(recipe: Recipe, sources: list[Data]) -> Model:
    """The model of a recipe before training: weights, special tokens, pixel budget, adapters, frozen parts."""
    settings = recipe.model
    if settings.tiny:
        backbone, processor = tiny_qwen2_vl(texts_of(sources), settings.tiny, seed=recipe.seed)
    else:
        backbone, processor = load_backbone(settings.path, dtype=settings.dtype)
    if settings.min_pixels or settings.max_pixels:
        processor.set_pixels(settings.min_pixels, settings.max_pixels)
    return from_backbone(_trainable(backbone, settings, processor), processor)


def _trainable(backbone: nn.Module, settings: ModelRecipe, processor: Any) -> nn.Module:
    if settings.vision == "frozen":
        freeze_vision(backbone)
    if settings.adapter is None:
        return backbone
    tokens = [processor.tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS]
    return add_adapters(backbone, settings.adapter, tokens)


def texts_of(sources: list[Data], limit: int = 5000):
    """Texts of up to ``limit`` samples per source, for a tokenizer."""
    for source in sources:
        for index in range(min(limit, len(source))):
            for turn in source[index].turns:
                yield from (content.text for content in (*turn.query, *turn.target) if content.text)


def make_trainer(recipe: Recipe, model: Model, sources: list[Data], validation: Data | None = None) -> MuCoTrainer:
    """The trainer of a recipe; its batches, loss and arguments."""
    arguments = training_arguments(recipe, validation is not None)
    size = arguments.per_device_train_batch_size
    mixture = Mixture([len(s) for s in sources], [s.weight for s in recipe.data.train], size, recipe.seed)
    steps = arguments.max_steps
    if steps <= 0:
        steps = arguments.max_steps = int(arguments.num_train_epochs * mixture.steps_per_epoch)
    batches = TrainingBatches(
        sources,
        mixture,
        model.encoder.muco_processor,
        recipe.turns,
        seed=recipe.seed,
        mask_identical_targets=recipe.loss.mask_identical_targets,
        skip_broken_images=recipe.data.broken_images == "skip",
        blind=recipe.data.blind,
    )
    loss = MultiTurnLoss(model, temperature=recipe.loss.temperature, symmetric=recipe.loss.symmetric)
    evaluator = None
    if validation is not None:
        from muco.evaluate.evaluator import RetrievalEvaluator

        evaluator = RetrievalEvaluator(validation)
    return MuCoTrainer(model, arguments, batches, StepSampler(steps), loss, evaluator)


def training_arguments(recipe: Recipe, evaluates: bool) -> SentenceTransformerTrainingArguments:
    """The recipe's ``trainer`` group over our defaults; unknown names are a RecipeError."""
    values = {**DEFAULTS, **recipe.trainer}
    if evaluates:
        values.setdefault("eval_strategy", "steps")
        values.setdefault("eval_steps", values["save_steps"])
    if values.get("gradient_accumulation_steps", 1) != 1:
        raise RecipeError("trainer.gradient_accumulation_steps splits the in-batch negatives; it must stay 1")
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(Path(recipe.output) / "logs")
    try:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=str(Path(recipe.output) / "checkpoints"), seed=recipe.seed, **values
        )
    except (TypeError, ValueError) as error:
        raise RecipeError(f"trainer: {error}") from None
    if arguments.n_gpu > 1:  # else DataParallel would cut our batches in half along the wrong dimension
        arguments._n_gpu = 1
    return arguments


class MuCoTrainer(SentenceTransformerTrainer):
    """sentence-transformers' trainer on batches of dialogues."""

    def __init__(
        self,
        model: Model,
        args: SentenceTransformerTrainingArguments,
        batches: TrainingBatches,
        steps: StepSampler,
        loss: MultiTurnLoss,
        evaluator: Any = None,
    ) -> None:
        from datasets import Dataset

        self.batches, self.steps, self.skipped_images = batches, steps, 0
        # the library insists on a table; ours has a row per step, and the batches are made in the loader below
        table = Dataset.from_dict({"step": range(len(steps))})
        super().__init__(model=model, args=args, train_dataset=table, loss=loss, evaluator=evaluator)
        for shown in (ProgressCallback, PrinterCallback):  # they print to stdout, which is for programs
            self.remove_callback(shown)
        self.add_callback(ScreenProgress(self))

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """None: the card is written by :mod:`muco.train.checkpoint` from what was run."""

    def get_train_dataloader(self) -> DataLoader:
        workers = self.args.dataloader_num_workers
        loader = DataLoader(
            self.batches,
            batch_sampler=self.steps,
            collate_fn=_only,
            num_workers=workers,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
            persistent_workers=bool(workers),
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def collect_features(self, inputs: dict[str, Any]) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        self.skipped_images += int(inputs.get("skipped", 0))
        return [dict(inputs["query"]), dict(inputs["target"])], inputs["ids"]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        checkpoint.save_trained(self.model, Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoint.load_trained(self.model, Path(resume_from_checkpoint))


def _only(items: list[Any]) -> Any:
    return items[0]
