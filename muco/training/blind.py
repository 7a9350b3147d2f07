"""The blind control: can a model's turns be matched with every pixel replaced by a constant?

Retrieval scores look at single turns. Whole dialogues leak in other ways, above all by the order of their questions,
which only the training loss shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from muco.data.source import Data, InMemory
from muco.info_nce import chance_level
from muco.loss import MultiTurnLoss
from muco.model import Model
from muco.training.batches import TrainingBatches
from muco.training.mixture import Mixture
from muco.training.recipe import Recipe, TurnsRecipe

SAMPLES, BATCHES = 32, 4  # of a batch, and batches
BELOW = 0.9  # of the chance level: what the wording of questions tells about answers stays above this on our data


def pictured(data: Data, limit: int) -> InMemory:
    """The first ``limit`` samples that have an image; the others need none to be answered."""
    rows = (data[index] for index in range(len(data)))
    return InMemory(islice((sample for sample in rows if sample.images), limit))


def whole_batches(
    model: Model, samples: InMemory, recipe: Recipe, turns: TurnsRecipe, *, blind: bool
) -> Iterator[dict[str, Any]]:
    """Training batches of ``SAMPLES`` samples, or of all if they are fewer; what is left over goes.

    Reconstruction counts as isolated turns: its hidden texts give the answers away, as they are meant to. There are no
    hard negatives, which chance does not count.
    """
    size = min(SAMPLES, len(samples))
    turns = replace(turns, negatives=0, mode="isolated" if turns.mode == "reconstruction" else turns.mode)
    mixture = Mixture([len(samples)], [1.0], size, recipe.seed)
    batches = TrainingBatches([samples], mixture, model.encoder.muco_processor, turns, seed=recipe.seed, blind=blind)
    return (batches[step] for step in range(len(samples) // size))


@torch.inference_mode()
def blind_loss(model: Model, data: Data, recipe: Recipe) -> dict[str, Any] | None:
    """The training loss on held-out samples without their pixels, query to target, with the recipe's turns.

    Returns:
        ``loss`` in nats; ``chance``: that of a model that knows only the kind of a question, ln(samples per batch), or
        less where answers are equal and so are not negatives; ``leaks``: whether the loss is clearly below; ``samples``
        per batch. None for fewer than two pictured samples.
    """
    samples = pictured(data, SAMPLES * BATCHES)
    size = min(SAMPLES, len(samples))
    if size < 2:
        return None
    loss = MultiTurnLoss(model, temperature=recipe.loss.temperature)
    model.eval()
    values, chances = [], []
    for batch in whole_batches(model, samples, recipe, recipe.turns, blind=True):
        ids = batch["ids"].to(model.device)
        values.append(loss([batch["query"], batch["target"]], ids).item())
        chances.append(min(math.log(size), chance_level(ids.sample_ids, ids.target_ids)))
    mean, chance = sum(values) / len(values), sum(chances) / len(chances)
    return {"loss": mean, "chance": chance, "leaks": not mean >= BELOW * chance, "samples": size}


def add_blind_loss(result: dict[str, Any], model: Model, data: Data, recipe: Recipe) -> None:
    """Adds ``blind_loss`` to the result of an evaluation, and a warning if the turns can be matched without pixels."""
    result["blind_loss"] = control = blind_loss(model, data, recipe)
    if control and control["leaks"]:
        result["warnings"].append(
            f"the turns are matched without any pixel: blind loss {control['loss']:.2f} nats, below the "
            f"{control['chance']:.2f} of chance; their order or the questions reveal the answers"
        )
