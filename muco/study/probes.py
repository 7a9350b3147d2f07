"""What retrieval scores do not show: how far dialogues are matched without their images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from muco.data.source import Data, InMemory
from muco.model import Model
from muco.training.blind import BATCHES, SAMPLES, pictured, whole_batches
from muco.training.recipe import Recipe


def turns_found(
    query: np.ndarray, target: np.ndarray, sample_ids: np.ndarray, target_ids: np.ndarray | None = None
) -> float:
    """Share of turns whose target scores above the targets of all other samples, as in the loss; a tie is lost.

    From the kind of question alone, one turn in ``samples`` finds its target. Rows of ``query`` and ``target`` (float
    [turns, dim]) belong together; turns of the same sample, by ``sample_ids`` [turns], are not rivals, nor are those
    with equal ``target_ids`` [turns].
    """
    scores = query @ target.T
    rivals = sample_ids[:, None] != sample_ids[None, :]
    if target_ids is not None:
        rivals &= target_ids[:, None] != target_ids[None, :]
    best = np.where(rivals, scores, -np.inf).max(axis=1)
    return float(np.mean(np.diagonal(scores) > best))


def dialogues_found(query: np.ndarray, target: np.ndarray, sample_ids: np.ndarray) -> float:
    """Share of samples whose query dialogue scores highest with their own target dialogue; a tie is lost.

    The score of two dialogues is the sum over the turns that both have, the first with the first, and so on; so the
    order of questions counts even if no single turn knows it. The turns of a sample, by ``sample_ids`` [turns], are
    adjacent in ``query`` and ``target`` (float [turns, dim]).
    """
    _, first, owner = np.unique(sample_ids, return_index=True, return_inverse=True)
    place = np.arange(len(sample_ids)) - first[owner]
    shape = (len(first), place.max() + 1, query.shape[1])
    asked, answered = np.zeros(shape), np.zeros(shape)
    asked[owner, place], answered[owner, place] = query, target
    scores = np.einsum("akd,bkd->ab", asked, answered)
    own = np.diagonal(scores).copy()
    np.fill_diagonal(scores, -np.inf)
    return float(np.mean(own > scores.max(axis=1)))


def leak(model: Model, data: Data, recipe: Recipe) -> dict[str, float]:
    """How well query and target dialogues are matched with their own, black, and other samples' images.

    Takes all turns of a sample, in an order drawn as in the training of ``recipe``, among ``SAMPLES`` samples; mean
    over ``BATCHES`` batches.

    Returns:
        ``leak/{sighted,blank,swapped}/{turns,dialogues}``: shares by :func:`turns_found` and :func:`dialogues_found`.
        Swapped: the image of another sample with the own targets. Empty for fewer than two samples with an image.
    """
    rows = pictured(data, SAMPLES * BATCHES)
    if len(rows) < 2:
        return {}
    swapped = InMemory(row.with_images(other.images) for row, other in zip(rows, [*rows[1:], rows[0]], strict=True))
    scores: dict[str, float] = {}
    for view, own, blind in (("sighted", rows, False), ("blank", rows, True), ("swapped", swapped, False)):
        batches = _dialogues(model, own, recipe, blind=blind)
        scores[f"leak/{view}/turns"] = float(np.mean([turns_found(*batch) for batch in batches]))
        scores[f"leak/{view}/dialogues"] = float(np.mean([dialogues_found(*batch[:3]) for batch in batches]))
    return scores


@torch.inference_mode()
def _dialogues(model: Model, rows: InMemory, recipe: Recipe, *, blind: bool) -> list[tuple[np.ndarray, ...]]:
    """Query and target vectors, ids of samples and of targets, of batches of whole samples as in training."""
    turns = replace(recipe.turns, limit=None, image_turn=None)
    model.eval()
    made = []
    for batch in whole_batches(model, rows, recipe, turns, blind=blind):
        query, target = (model.embed(batch[side]).cpu().numpy() for side in ("query", "target"))
        ids = batch["ids"]
        made.append((query, target[ids.target_rows.numpy()], ids.sample_ids.numpy(), ids.target_ids.numpy()))
    return made


PROBES: dict[str, Callable[[Model, Data, Recipe], dict[str, float]]] = {"leak": leak}
