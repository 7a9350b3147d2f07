"""An optional start for models made from their config: the text half learns the data's language first."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from muco.batch import to
from muco.data.source import Data
from muco.dialogue import Dialogue, Sample
from muco.encoder import Encoder, model_inputs
from muco.errors import DataError
from muco.layout import prepare
from muco.training.mixture import Purpose, generator
from muco.training.recipe import WarmUpRecipe

BARREN = 10_000  # samples without a text after which none is expected


def warm_up(
    encoder: Encoder, sources: Sequence[Data], settings: WarmUpRecipe, *, seed: int, skip_broken: bool = False
) -> float:
    """Next-token prediction on the queries and targets of random samples, with tied embeddings as the head.

    Args:
        skip_broken: Draw another sample for one that cannot be used.
    Returns:
        The mean loss of the last tenth of the steps, in nats per token.
    """
    rng = generator(seed, Purpose.WARM_UP)
    trained = [p for p in encoder.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    losses: list[float] = []
    encoder.train()
    for step in range(settings.steps):
        loss = language_loss(encoder, _texts(encoder, sources, rng, settings.batch_size, skip_broken=skip_broken))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == settings.steps:
            print(f"warm-up {step + 1}/{settings.steps}  loss {losses[-1]:.3f}", file=sys.stderr)
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


def _texts(
    encoder: Encoder, sources: Sequence[Data], rng: np.random.Generator, count: int, *, skip_broken: bool
) -> list[Dialogue]:
    dialogues: list[Dialogue] = []
    barren, error = 0, None  # draws since the last one with a text
    while len(dialogues) < count:
        source = sources[rng.integers(len(sources))]
        index = int(rng.integers(len(source)))
        own: list[Dialogue] = []
        try:
            own = _texts_of(source[index], rng)
            for dialogue in own if skip_broken else ():  # else the batch finds it
                prepare(dialogue, encoder.muco_processor)
        except DataError as found:
            if not skip_broken:
                raise
            own, error = [], found
        dialogues += own
        barren = 0 if own else barren + 1
        if barren == BARREN:
            reason = f"the last one: {error}" if error else "leave warm_up out"
            raise DataError(f"warm_up: {BARREN} samples in a row have no usable text; {reason}") from error
    return dialogues[:count]


def _texts_of(sample: Sample, rng: np.random.Generator) -> list[Dialogue]:
    contents = [c for turn in sample.turns for c in (turn.query[rng.integers(len(turn.query))], turn.target[0])]
    return [Dialogue((), (content,), True, sample.place) for content in contents if content.text and not content.images]


def language_loss(encoder: Encoder, dialogues: Sequence[Dialogue]) -> torch.Tensor:
    """Mean next-token cross-entropy of text prompts, padding left out."""
    batch = to(encoder.collate(dialogues), encoder.device)
    hidden = encoder.model(**model_inputs(batch, encoder.muco_processor, encoder.model.dtype)).last_hidden_state
    logits = hidden[:, :-1] @ encoder.model.get_input_embeddings().weight.T
    labels = batch["input_ids"][:, 1:].masked_fill(batch["attention_mask"][:, 1:] == 0, -100)
    return cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
