"""What retrieval scores do not show: matches of dialogues without their images, and the geometry of vectors.

The measures are functions of vectors; :func:`leak` and :func:`coherence` embed held-out samples and return the values
by name, for a study's columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from muco.data.source import Data, InMemory
from muco.dialogue import Content
from muco.model import Model
from muco.training.batches import TrainingBatches
from muco.training.blind import pictured
from muco.training.mixture import Mixture
from muco.training.recipe import Recipe

SAMPLES, BATCHES = 32, 4  # dialogues per search, and searches
DESCRIBED = 200  # samples for the coherence
CAPTION = "retrieval"  # the kind of turn whose target describes the image


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


def modality_gap(x: np.ndarray, y: np.ndarray) -> float:
    """Distance between the centroids of two sets of vectors, [n, dim] and [m, dim] (Liang et al. 2022)."""
    return float(np.linalg.norm(x.mean(axis=0) - y.mean(axis=0)))


def alignment(x: np.ndarray, y: np.ndarray) -> float:
    """Mean over pairs of ‖x_i − y_i‖²; smaller is better aligned. Both [n, dim] (Wang & Isola 2020, α = 2)."""
    return float(np.mean(np.sum((x - y) ** 2, axis=1)))


def uniformity(x: np.ndarray) -> float:
    """log of the mean over i < j of exp(−2 ‖x_i − x_j‖²), [n, dim] (Wang & Isola 2020, t = 2).

    Lower is more uniform: from 0 for equal vectors to a little above −4 on the unit sphere.
    """
    squares = np.sum(x**2, axis=1)
    distances = np.maximum(squares[:, None] + squares[None, :] - 2 * x @ x.T, 0)[np.triu_indices(len(x), 1)]
    return float(np.log(np.mean(np.exp(-2 * distances))))


def pair_cosine(x: np.ndarray, y: np.ndarray) -> float:
    """Mean over pairs of x_i · y_i, both [n, dim] of length 1."""
    return float(np.mean(np.sum(x * y, axis=1)))


def cross_cosine(x: np.ndarray, y: np.ndarray) -> float:
    """Mean of x_i · y_j over i ≠ j, both [n, dim] of length 1: :func:`pair_cosine` of random pairs."""
    count = len(x)
    return float((np.sum(x.sum(axis=0) * y.sum(axis=0)) - count * pair_cosine(x, y)) / (count * (count - 1)))


def agreement(vectors: np.ndarray, owners: np.ndarray) -> float:
    """Mean cosine of two vectors [n, dim], of length 1, of the same one of ``owners`` [n]; NaN if all have one."""
    means = []
    for owner in np.unique(owners):
        own = vectors[owners == owner]
        if len(own) > 1:
            means.append((np.sum(own.sum(axis=0) ** 2) - np.sum(own**2)) / (len(own) * (len(own) - 1)))
    return float(np.mean(means)) if means else float("nan")


def leak(model: Model, data: Data, recipe: Recipe) -> dict[str, float]:
    """How well query and target dialogues are matched with their own, black, and other samples' images.

    Takes all turns of a sample, in an order drawn as in the training of ``recipe``, among ``SAMPLES`` samples; mean
    over ``BATCHES`` draws.

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
    size = min(SAMPLES, len(rows))
    mode = "isolated" if recipe.turns.mode == "reconstruction" else recipe.turns.mode
    turns = replace(recipe.turns, mode=mode, limit=None, image_turn=None)
    mixture = Mixture([len(rows)], [1.0], size, recipe.seed)
    batches = TrainingBatches([rows], mixture, model.encoder.muco_processor, turns, seed=recipe.seed, blind=blind)
    model.eval()
    made = []
    for step in range(len(rows) // size):
        batch = batches[step]
        query, target = (model.embed(batch[side]).cpu().numpy() for side in ("query", "target"))
        ids = batch["ids"]
        made.append((query, target[ids.target_rows.numpy()], ids.sample_ids.numpy(), ids.target_ids.numpy()))
    return made


def coherence(model: Model, data: Data, recipe: Recipe) -> dict[str, float]:
    """The geometry of the vectors of images, their turns and their captions.

    Takes the first ``DESCRIBED`` samples with an image and a turn of kind "retrieval". An image is embedded with the
    question of that turn, as in training, or "alone"; every turn by itself.

    Returns:
        ``coherence/…``: ``gap`` and ``gap_alone`` (:func:`modality_gap` of images and captions), ``alignment`` of image
        and caption, ``uniformity_images`` and ``uniformity_captions``, ``caption`` and ``other_caption`` (mean cosine
        of an image with its own caption and with others) and ``turns`` (:func:`agreement` of an image's questions,
        absent if no sample has two). Empty for fewer than two such samples.
    """
    rows = [row for row in pictured(data, DESCRIBED) if any(turn.kind == CAPTION for turn in row.turns)]
    if len(rows) < 2:
        return {}
    described = [next(turn for turn in row.turns if turn.kind == CAPTION) for row in rows]
    captions = _encoded(model, [turn.target[0] for turn in described])
    alone = _encoded(model, [Content(images=row.images) for row in rows])
    asked = [(owner, turn) for owner, row in enumerate(rows) for turn in row.turns]
    contents = [(turn.query[0], rows[owner].images) for owner, turn in asked]
    questions = _encoded(model, [Content(query.text, (*images, *query.images)) for query, images in contents])
    images = questions[[place for place, (owner, turn) in enumerate(asked) if turn is described[owner]]]
    values = {
        "gap": modality_gap(images, captions),
        "gap_alone": modality_gap(alone, captions),
        "alignment": alignment(images, captions),
        "uniformity_images": uniformity(images),
        "uniformity_captions": uniformity(captions),
        "caption": pair_cosine(images, captions),
        "other_caption": cross_cosine(images, captions),
        "turns": agreement(questions, np.array([owner for owner, _ in asked])),
    }
    return {f"coherence/{name}": value for name, value in values.items() if value == value}


def _encoded(model: Model, contents: Sequence[Content]) -> np.ndarray:
    return np.asarray(model.encode(list(contents), batch_size=64, show_progress_bar=False), dtype=np.float64)


PROBES: dict[str, Callable[[Model, Data, Recipe], dict[str, float]]] = {"leak": leak, "coherence": coherence}
