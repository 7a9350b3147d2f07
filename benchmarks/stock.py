"""The plain way that users have today: single-turn pairs under the library's CachedMultipleNegativesRankingLoss.

The stock Transformer module of sentence-transformers cannot be built for Qwen2-VL without torchvision, so
:class:`StockEncoder` stands in for it and hands the same tensors to the same backbone: no positions (the model computes
them), no mask but the padding's, and what the library needs to cut a batch of flattened images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.input_module import InputModule
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from torch import Tensor, nn
from turns import Bench

from muco.batch import collate
from muco.dialogue import Dialogue, Sample, query_dialogue, target_dialogue
from muco.processor import Processor
from muco.training.prepared import Chosen

INPUTS = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids")


class StockEncoder(InputModule):
    """A backbone called as the stock Transformer module calls it."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.model = backbone

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        inputs = {key: features[key] for key in INPUTS if key in features}
        output = self.model(**inputs, use_cache=False, return_dict=True)
        return features | {"token_embeddings": output.last_hidden_state}

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("made for measurements, not for keeping")


class StockModel(SentenceTransformer):
    """Runs each forward pass under autocast and gives float32, which is what the trainer's accelerator makes of one."""

    autocast: Callable[[], AbstractContextManager[Any]]

    def forward(self, input: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        with self.autocast():
            features = super().forward(input, **kwargs)
        return features | {"sentence_embedding": features["sentence_embedding"].float()}


def stock_model(bench: Bench) -> StockModel:
    """The stock modules around the very backbone of ``bench``."""
    encoder = bench.model.encoder
    modules = [StockEncoder(encoder.model), Pooling(encoder.get_embedding_dimension(), "lasttoken"), Normalize()]
    model = StockModel(modules=modules, device=bench.settings.device).train()
    model.autocast = bench.autocast
    return model


def pairs_of(samples: Sequence[Sample], turns: int) -> tuple[list[Dialogue], list[Dialogue]]:
    """The first ``turns`` turns of each sample as single-turn (image and question, answer) pairs."""
    rng = np.random.default_rng(0)
    queries, targets = [], []
    for sample in samples:
        for turn in sample.turns[:turns]:
            chosen = Chosen.of(turn, rng)
            queries.append(query_dialogue(sample, [chosen.query], isolated=True))
            targets.append(target_dialogue(sample, [chosen.target], isolated=True))
    return queries, targets


def features_of(dialogues: Sequence[Dialogue], processor: Processor) -> dict[str, Tensor]:
    """Single-turn dialogues as the stock module's ``preprocess`` would give them."""
    batch = collate(dialogues, processor)
    features: dict[str, Tensor] = {key: batch[key] for key in INPUTS if key in batch}
    for name in processor.family.inputs if "images" in batch else ():
        features[name] = torch.cat([image[name] for image in batch["images"]])
    features["mm_token_type_ids"] = (batch["input_ids"] == processor.family.image_id).long()
    if "image_rows" in batch:
        features["num_images_per_sample"] = torch.bincount(batch["image_rows"], minlength=len(dialogues))
    return features


class StockStep:
    """The training step of the plain way: called, it leaves the gradients in the parameters.

    Args:
        turns: Of every sample of the bench; each becomes a pair.
        mini_batch: Pairs that pass through the model together.
        mini_tokens: Most tokens that do, without padding, instead of a number of pairs.
    """

    def __init__(self, bench: Bench, turns: int, mini_batch: int, mini_tokens: int | None = None) -> None:
        self.device = bench.settings.device
        if turns not in bench.pairs:
            sides = pairs_of(bench.samples["isolated"], turns)
            bench.pairs[turns] = [features_of(side, bench.processor) for side in sides]
        self.features = bench.pairs[turns]
        self.loss = CachedMultipleNegativesRankingLoss(
            stock_model(bench),
            scale=1 / bench.loss.temperature,
            mini_batch_size=mini_batch or 32,  # with a number of tokens, of the loss alone; the library's default
            mini_batch_num_tokens=mini_tokens,
        )

    def __call__(self) -> Tensor:
        # the trainer, too, moves the whole batch to the device first
        moved = [{key: value.to(self.device) for key, value in side.items()} for side in self.features]
        loss = self.loss(moved, torch.empty(0))
        loss.backward()
        return loss.detach()
