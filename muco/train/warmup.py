"""An optional start for models made from their config: the text half learns the data's language first."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from muco.data import Data
from muco.dialogue import Dialogue
from muco.encoder import Encoder, model_inputs
from muco.train.recipe import WarmUpRecipe


def warm_up(encoder: Encoder, sources: Sequence[Data], settings: WarmUpRecipe, *, seed: int) -> float:
    """Next-token prediction on the queries and targets of random samples, with tied embeddings as the head.

    Returns:
        The mean loss of the last tenth of the steps, in nats per token.
    """
    rng = np.random.default_rng([seed, 5])
    trained = [p for p in encoder.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    losses: list[float] = []
    encoder.train()
    for step in range(settings.steps):
        loss = language_loss(encoder, _texts(sources, rng, settings.batch_size))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == settings.steps:
            print(f"warm-up {step + 1}/{settings.steps}  loss {losses[-1]:.3f}", file=sys.stderr)
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


def _texts(sources: Sequence[Data], rng: np.random.Generator, count: int) -> list[Dialogue]:
    dialogues = []
    while len(dialogues) < count:
        source = sources[rng.integers(len(sources))]
        sample = source[int(rng.integers(len(source)))]
        for turn in sample.turns:
            contents = [
                c for c in (turn.query[rng.integers(len(turn.query))], turn.target[0]) if c.text and not c.images
            ]
            dialogues += [Dialogue((), (content,), True, sample.place) for content in contents]
    return dialogues[:count]


def language_loss(encoder: Encoder, dialogues: Sequence[Dialogue]) -> torch.Tensor:
    """Mean next-token cross-entropy of text prompts, padding left out."""
    batch = encoder.collate(dialogues)
    batch = {key: value.to(next(encoder.parameters()).device) for key, value in batch.items()}
    hidden = encoder.model(**model_inputs(batch, encoder.muco_processor, encoder.model.dtype)).last_hidden_state
    logits = hidden[:, :-1] @ encoder.model.get_input_embeddings().weight.T
    labels = batch["input_ids"][:, 1:].masked_fill(batch["attention_mask"][:, 1:] == 0, -100)
    return cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
