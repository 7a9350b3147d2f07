"""Many turns about one image at inference: what they share passes through the model once and keeps its keys and values.

::

    dialogues ─collate─▶ trees ─trunks──▶ [N, P] ─pass─▶ keys and values of every layer, kept
                           └───branches─▶ [R, L] ─pass, reading them─▶ one vector per turn

The branches of a tree are *packed*: several share a row, under a mask by which each reads the trunk and itself, so the
kept trunk is read once per pack, not once per turn. ``PACK`` and the token budget change the cost, never a vector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from muco.batch import DialogueBatch, Span, chunks_of, cut, spans_of, split, to
from muco.branches import State
from muco.dialogue import Dialogue
from muco.encoder import Encoder

PACK = 256  # tokens of branches in one row: the best or near it at 4 to 64 turns, benchmarks/encode_turns.py

Embed = Callable[[DialogueBatch], Tensor]  # one vector per turn of a batch: Model.embed


def sharing(encoder: Encoder) -> Literal["cache", "tree", "none"]:
    """How isolated turns can share what they have in common, so that vectors are those of single turns.

    - "cache": what is shared passes once; its keys and values, or the states of recurrent layers, are kept.
    - "tree": the same in one pass under a tree mask. The language model attends by FlexAttention, whose masks are not
      made for keys of a pass before, or has layers that read the keys of others.
    - "none": each turn passes alone; a later token changes earlier states, or a kind of layer is not known.
    """
    if encoder.reading.why_not_isolated:
        return "none"
    return "tree" if encoder.uses_flex_attention or not encoder.reading.keeps else "cache"


def embed_turns(
    encoder: Encoder, embed: Embed, dialogues: Sequence[Dialogue], token_budget: int
) -> list[Tensor] | None:
    """The vectors of every dialogue, float32 [turns, dim], L2-normalised, on the model's device.

    Args:
        encoder: In eval mode.
        embed: The encoder and what follows it.
        dialogues: Isolated or not. They are collated together, so all their images are in memory at once.
        token_budget: Most tokens of a pass, padding and kept tokens included; one trunk, pack or row may exceed it.
    Returns:
        None if the turns cannot share anything: each has to pass alone.
    """
    dialogues = [encoder.muco_processor.as_read(dialogue) for dialogue in dialogues]
    batch = encoder.collate(dialogues)
    way, trees = "tree", []
    if "branch_ids" in batch and all(dialogue.isolated for dialogue in dialogues):
        trees = [_Tree.of(batch, row, dialogue) for row, dialogue in zip(spans_of(batch), dialogues, strict=True)]
        shared = all(tree.trunk.length for tree in trees)
        way = sharing(encoder) if shared else "none"
    if way == "none":
        return None
    encoder.cut += len(batch.get("cut_turns", ()))
    if way == "cache":
        vectors = _with_cache(encoder, embed, batch, trees, token_budget)
    else:
        chunks = split(batch, token_budget)
        vectors = torch.cat([embed(chunk) for chunk, _ in chunks])
        vectors = vectors[torch.cat([turns for _, turns in chunks]).argsort()]
    return list(vectors.split([len(dialogue.turns) for dialogue in dialogues]))


def _with_cache(
    encoder: Encoder, embed: Embed, batch: DialogueBatch, trees: Sequence[_Tree], token_budget: int
) -> Tensor:
    turns: list[int] = []
    vectors = []
    for rows in chunks_of(torch.tensor([tree.trunk.length for tree in trees]), token_budget):
        together = [trees[row] for row in rows.tolist()]
        trunks, cache = to(cut(batch, [tree.trunk for tree in together]), encoder.device), DynamicCache()
        trunks.pop("branch_ids")
        states: dict[int, State] = {}
        encoder(trunks | {"past_key_values": cache, "kept_states": states})
        real = trunks["attention_mask"].bool()
        packs = [tree.packs() for tree in together]
        spans = [span for own in packs for span in own]
        places = torch.arange(len(packs)).repeat_interleave(torch.tensor([len(own) for own in packs]))  # their trunks
        for numbers in chunks_of(torch.tensor([real.shape[1] + span.length for span in spans]), token_budget):
            chosen = [spans[number] for number in numbers.tolist()]
            branches = to(cut(batch, chosen), encoder.device)
            vectors.append(embed(branches | _kept(cache, states, real, places[numbers].to(real.device))))
            turns += [turn for span in chosen for turn in span.turns]
    return torch.cat(vectors)[torch.tensor(turns).argsort()]


@dataclass(frozen=True)
class _Tree:
    """A row of a batch, cut into its trunk and the branches of its turns; the trunk may be empty."""

    trunk: Span
    branches: tuple[Span, ...]

    @classmethod
    def of(cls, batch: DialogueBatch, row: Span, dialogue: Dialogue) -> _Tree:
        real = batch["attention_mask"][row.row].bool()
        start = int(real.int().argmax())
        stop = start + int((real & (batch["branch_ids"][row.row] == 0)).sum())
        ends = (batch["turn_columns"][list(row.turns)] + 1).tolist()
        images = [*accumulate([len(dialogue.context), *(len(turn.images) for turn in dialogue.turns)])]
        trunk = Span(row.row, start, stop, (), row.images[: images[0]])
        branches = []
        for number, turn in enumerate(row.turns):
            own = row.images[images[number] : images[number + 1]]
            branches.append(Span(row.row, [stop, *ends][number], ends[number], (turn,), own))
        return cls(trunk, tuple(branches))

    def packs(self) -> list[Span]:
        """The branches, neighbours joined up to ``PACK`` tokens."""
        packs: list[Span] = []
        for branch in self.branches:
            if packs and packs[-1].length + branch.length <= PACK:
                last = packs.pop()
                turns, images = last.turns + branch.turns, last.images + branch.images
                branch = replace(last, stop=branch.stop, turns=turns, images=images)
            packs.append(branch)
        return packs


def _kept(cache: DynamicCache, states: Mapping[int, State], real: Tensor, places: Tensor) -> dict[str, Any]:
    """What a pass of packs needs besides their tokens: what was kept of the trunks, and which each row continues.

    Args:
        cache: Keys and values of each layer for N trunks, [N, heads, P, dim] both.
        states: Of recurrent layers, by number.
        real: Which of the P are not padding, bool [N, P].
        places: The trunk of each row, int64 [R].
    """
    layers = [_KeptLayer(layer, places) for layer in cache.layers]
    kept = {"past_key_values": Cache(layers=layers), "kept_tokens": real[places]}
    return kept | {"kept_states": states, "kept_rows": places}


class _KeptLayer(DynamicLayer):
    """One layer's kept keys and values, of which each row reads its own; those of the rows are not added."""

    def __init__(self, layer: Any, places: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.places = layer.keys, layer.values, places
        self.is_initialized = layer.keys is not None  # else a recurrent layer, whose state is kept elsewhere

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self._after(self.keys, key_states), self._after(self.values, value_states)

    def _after(self, kept: Tensor, new: Tensor) -> Tensor:
        own = kept.expand(len(new), -1, -1, -1) if len(kept) == 1 else kept[self.places]
        return torch.cat([own, new], dim=-2)
