"""A training run from a recipe to a saved model: ``muco.train(recipe)``.

sentence-transformers' trainer (:mod:`muco.training.loop`) has the optimizer, schedule and logs; MuCo has batches,
step (:mod:`muco.step`), loss (:mod:`muco.loss`) and checkpoints.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import set_seed

from muco import distributed
from muco.backbone import merge_adapters
from muco.data.fingerprint import recall, remember
from muco.data.source import Data
from muco.errors import RecipeError
from muco.model import Model
from muco.training import checkpoint
from muco.training.batches import TrainingBatches
from muco.training.build import build_model, make_loss, saved_dtype
from muco.training.callbacks import Record, RetrievalEvaluator, told_once
from muco.training.checks import (
    check_machine,
    check_negatives,
    check_recipe,
    check_turns,
    over_budget,
    training_arguments,
)
from muco.training.folder import DIGESTS_FILE
from muco.training.guide import VectorsById, guide_vectors
from muco.training.look import look, without_effect
from muco.training.loop import MuCoTrainer
from muco.training.mixture import Mixture, open_sources, validation_of
from muco.training.precision import uses_autocast
from muco.training.recipe import Recipe, from_dict, load_recipe, to_dict

log = logging.getLogger(__name__)


def train(recipe: Recipe | Mapping[str, Any] | str | Path, *, resume: bool = True) -> Path:
    """Trains a model and saves it.

    Args:
        recipe: A recipe, its keys and values as a mapping, or a YAML file.
        resume: Resume from the last checkpoint of the same recipe in ``recipe.output``. If false, a folder that holds a
            run is an error.
    Returns:
        The folder of the trained model, ``<output>/model``.
    Raises:
        RecipeError, DataError, CheckpointError: If the run cannot be set up.
        OutputError: If the output folder holds another run, another process trains into it, or it cannot be written.
    """
    if not isinstance(recipe, Recipe):
        recipe = from_dict(recipe) if isinstance(recipe, Mapping) else load_recipe(recipe)
    output, data, processes = Path(recipe.output), recipe.data, int(os.environ.get("WORLD_SIZE", "1"))
    check_machine(recipe.model)
    check_recipe(recipe, processes)
    held_out = data.validation_source
    evaluates = held_out is not None
    if processes == 1:  # several would join their group by it, and then wait for one another while data is read
        training_arguments(recipe, evaluates=evaluates)
    sources = open_sources(recipe)
    Mixture.of(recipe, [len(source) for source in sources])
    validation, notes = None, list[str]()
    if held_out is not None:
        validation, left = validation_of(held_out)
        notes += filter(None, [left])
    speaks = os.environ.get("RANK", "0") == "0"
    if speaks and (recipe.turns.image_turn or recipe.loss.distillation):
        notes += without_effect(recipe, [*look(sources, recipe.seed, [])])
    for said in notes if speaks else ():
        log.warning("%s", said)
    recall(output / DIGESTS_FILE)
    # by each process, before they are a group: in a group, the others would wait for this one
    facts = checkpoint.run_facts(recipe, sources)
    distributed.start()
    training_arguments(recipe, evaluates=evaluates)
    with distributed.claimed(output):
        scored = distributed.first_only(lambda: checkpoint.validation_of(output))
        finished = distributed.first_only(lambda: checkpoint.claim_output(output, facts, resume=resume))
        if finished:
            if distributed.rank() == 0:
                print(f"{finished} is trained already; pass another output folder to train anew", file=sys.stderr)
            return finished
        distributed.first_only(lambda: remember(output / DIGESTS_FILE))
        guide = guide_vectors(recipe, sources)
        set_seed(recipe.seed)
        model = build_model(recipe, sources)
        check_turns(recipe.turns, model.encoder.reading)
        last = distributed.first_only(lambda: checkpoint.last_complete(output, distributed.world_size()))
        distributed.make_equal(p for p in model.parameters() if p.requires_grad)
        trainer = make_trainer(recipe, model, sources, validation, guide)
        first = trainer.batches[0, 0]
        _check_budget(recipe.batch.token_budget, first)
        check_negatives(trainer.loss, first, sources)
        if last is not None and scored == to_dict(recipe)["data"]["validation"]:  # the start's scores are known
            trainer.args.eval_on_start = recipe.trainer.get("eval_on_start", False)
        set_seed(recipe.seed + distributed.rank())  # from here on each process draws its own dropout
        with told_once():
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        return _finish(recipe, trainer, sources, facts)


def _check_budget(budget: int | None, first: Mapping[str, Any]) -> None:
    """Refuses a token budget that everything in the first part exceeds; warns if only some of it does."""
    if (over := over_budget(budget, first)) is not None:
        said, nothing_fits = over
        if nothing_fits:
            raise RecipeError(said)
        log.warning("%s; it passes alone, in more memory", said)


def _finish(recipe: Recipe, trainer: MuCoTrainer, sources: list[Data], facts: dict[str, Any]) -> Path:
    """Saves the model with its adapters folded in; one process writes, and all return the folder."""
    model, weights, record = trainer.model, None, trainer.record.gather()
    if distributed.is_sharded(model):
        weights = checkpoint.trained_weights(model)
        model = build_model(recipe, sources, device="cpu") if distributed.rank() == 0 else model

    def save() -> Path:
        if weights is not None:
            checkpoint.assign_trained(model, weights)
        backbone = model.encoder.model
        model.encoder.model = merge_adapters(backbone, saved_dtype(recipe.model, backbone))
        return checkpoint.save_final(Path(recipe.output), model, recipe, facts | {"record": record}, trainer.state)

    return distributed.first_only(save)


def make_trainer(
    recipe: Recipe,
    model: Model,
    sources: Sequence[Data],
    validation: Data | None = None,
    guide: VectorsById | None = None,
) -> MuCoTrainer:
    """The trainer of a recipe, with its batches, loss and arguments."""
    data, mixture = recipe.data, Mixture.of(recipe, [len(source) for source in sources])
    batches = TrainingBatches(
        sources,
        mixture,
        model.encoder.muco_processor,
        recipe.turns,
        seed=recipe.seed,
        mask_identical_targets=recipe.loss.mask_identical_targets,
        skip_broken=data.broken_images == "skip",
        leave_out_duplicates=data.duplicates == "leave_out",
        blind=data.blind,
        guided=guide is not None,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
    loss = make_loss(recipe, model, guide).to(model.device)
    bf16 = uses_autocast(recipe, model, batches, loss)
    arguments = training_arguments(recipe, evaluates=validation is not None, bf16=bf16)
    arguments.max_steps = arguments.steps(mixture)
    asked = recipe.trainer.get("per_device_eval_batch_size")
    options = {} if asked is None else {"batch_size": asked}
    evaluator = None if validation is None else RetrievalEvaluator(validation, **options)
    record = Record(Path(recipe.output), data.max_broken)
    return MuCoTrainer(model, arguments, recipe.batch, batches, loss, record, evaluator)
