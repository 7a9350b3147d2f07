"""The data of a dry run: some samples are read and tokenised, and their sizes and negatives noted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from muco.data.source import Data, InMemory
from muco.dialogue import Sample, Turn, Video
from muco.errors import DataError, did_you_mean
from muco.evaluate.retrieval import Scoring, tasks_of
from muco.images import open_image
from muco.loss import MultiTurnLoss
from muco.negatives import Variety
from muco.processor import Processor
from muco.training.batches import TrainingBatches
from muco.training.checks import NO_NEGATIVE, over_budget
from muco.training.mixture import Mixture, data_of, validation_of
from muco.training.recipe import DataRecipe, Recipe

LOOK = 64  # samples that are read, over all sources
ASSUMED = Sample(
    Image.new("RGB", (952, 644)), [Turn("word " * 24, "word " * 14, kind="retrieval")] * 7, where="the assumed sample"
)


@dataclass(frozen=True)
class Measured:
    """The dialogues that were looked at; int64 arrays with one entry per sample."""

    query: np.ndarray  # tokens of the query dialogue
    target: np.ndarray  # tokens of each target dialogue; hard negatives have their own, so these may be more
    visual: np.ndarray  # visual tokens
    turns: np.ndarray
    images: np.ndarray  # of the query dialogue


def open_known(data: DataRecipe, problems: list[str], notes: list[str]) -> list[Data | None]:
    """The training sets, None for one that cannot be opened; this, and a bad validation set, become problems.

    Notes get what of the validation set is not scored.
    """
    sources: list[Data | None] = []
    for source in data.train:
        try:
            sources.append(data_of(source))
        except DataError as error:
            problems.append(str(error))
            sources.append(None)
    if (held_out := data.validation_source) is not None:
        try:
            scored, left = validation_of(held_out)
            notes += filter(None, [left])
            _check_validation(scored)
        except DataError as error:
            problems.append(str(error))
    return sources


def _check_validation(data: Data) -> None:
    """A DataError if an evaluation could not read a row or an image, or has nothing to evaluate."""
    book, _ = tasks_of(data, Scoring())
    seen = set[int]()  # the turns of a sample share its images, and the book keeps them alive
    for key, content in book.contents.items():
        for image in content.images:
            if not isinstance(image, Video) and id(image) not in seen:
                seen.add(id(image))
                open_image(image, where=book.places[key])


def look(sources: Sequence[Data | None], seed: int, problems: list[str]) -> Iterator[Sample]:
    """Some samples of every source, spread over all of it; rows that cannot be read become problems."""
    known = [source for source in sources if source is not None]
    for number, source in enumerate(known):
        count = min(len(source), math.ceil(LOOK / len(known)))
        for index in sorted(np.random.default_rng([seed, number]).choice(len(source), count, replace=False).tolist()):
            try:
                yield source[index]
            except DataError as error:
                problems.append(str(error))


def without_effect(recipe: Recipe, looked: Sequence[Sample]) -> list[str]:
    """Settings of the recipe that nothing answers to in the samples of its data that were read."""
    turns = [turn for sample in looked for turn in sample.turns]
    kind, kinds = recipe.turns.image_turn, {turn.kind for turn in turns if turn.kind}
    said, without = [], f"none of the {len(looked)} samples that were read has"
    if looked and kind and not any(turn.kind == kind for sample in looked if sample.images for turn in sample.turns):
        hint = did_you_mean(kind, kinds)
        said.append(f"turns.image_turn may change nothing: {without} an image and a turn of kind {kind!r}{hint}")
    if looked and recipe.loss.distillation is not None and not any(turn.scores for turn in turns):
        said.append(f"loss.distillation may change nothing: {without} 'scores'; see `muco data score`")
    return said


def measure(
    recipe: Recipe,
    looked: InMemory,
    processor: Processor,
    *,
    problems: list[str],
    broken: list[str],
    notes: list[str],
) -> tuple[Measured, list[Variety]]:
    """The sizes of the samples, and their variety for the loss; a DataError if no sample can be used.

    A token budget that all of them exceed is added to ``problems``, one that some do to ``notes``; samples that cannot
    be used to ``broken``.
    """
    batches = TrainingBatches([looked], Mixture([len(looked)], [1.0], 1, 0), processor, recipe.turns, seed=recipe.seed)
    found: dict[str, list[int]] = {"query": [], "target": [], "visual": [], "turns": [], "images": []}
    varieties, long = [], []
    for number in range(len(looked)):
        try:
            batch = batches[number]
        except DataError as error:
            broken.append(str(error))
            continue
        if (over := over_budget(recipe.batch.token_budget, batch)) is not None:
            long.append(over)
        found["query"].append(int(batch["query"]["attention_mask"].sum()))
        found["target"] += batch["target"]["attention_mask"].sum(dim=1).tolist()
        found["visual"].append(int(batch["query"]["image_tokens"].sum()) if "image_tokens" in batch["query"] else 0)
        found["turns"].append(len(batch["query"]["turn_rows"]))
        found["images"].append(len(batch["query"].get("image_rows", ())))
        varieties.append(Variety.of(batch["ids"]))
    if not found["query"]:
        raise DataError(f"none of {len(looked)} samples can be used; the first: {broken[0]}")
    if len(long) == len(varieties) and all(nothing_fits for _, nothing_fits in long):
        problems.append(long[0][0])
    elif long:
        notes.append(f"{len(long)} of {len(varieties)} samples pass alone, in more memory; the first: {long[0][0]}")
    return Measured(**{name: np.array(values) for name, values in found.items()}), varieties


def look_for_negatives(
    loss: MultiTurnLoss,
    batch_size: int,
    sources: Sequence[Data | None],
    varieties: Sequence[Variety],
    *,
    problems: list[str],
    notes: list[str],
) -> None:
    """Reports that no turn looked at can have a negative: a problem if this is all the data, else a note."""
    if problems:
        return  # what was looked at is not the data, or not all of it
    reason = loss.why_no_negative(varieties)
    if reason:
        whole = sum(map(len, sources)) == len(varieties)
        samples = "the data" if whole else f"what was read of the data ({len(varieties)} samples)"
        (problems if whole else notes).append(NO_NEGATIVE.format(samples=samples, reason=reason))
    elif batch_size == 1 and all(loss.why_no_negative([own]) for own in varieties):
        notes.append("batch.size: 1 gives no turn a negative but for hard negatives, and none were found; raise it")
