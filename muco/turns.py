"""Many turns about one image at inference: what they share passes through the model once and keeps its keys and values.

::

    dialogues ─collate─▶ trees ─trunks──▶ [N, P] ─pass─▶ keys and values of every layer, kept
                           └───branches─▶ [R, L] ─pass, reading them─▶ one vector per turn

The branches of a tree are *packed*: some of them stand in one row, one after another, under a mask by which each reads
the trunk and itself. So what is kept is read once per pack, not once per turn, and no turn is multiplied with many
others in vain. How full a pack is (``PACK``) and how many pass together (a token budget) changes the cost, never a
vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from muco.backbone import reads_all_before
from muco.batch import DialogueBatch, chunks_of, images_of, split, tree_mask
from muco.dialogue import Content, Dialogue

if TYPE_CHECKING:
    from muco.model import Model

PACK = 256  # tokens of branches in one row: the best or near it at 4 to 64 turns, benchmarks/encode_turns.py


def sharing(model: Model, longest: int) -> Literal["cache", "tree", "none"]:
    """How isolated turns can share what they have in common, so that vectors are those of single turns.

    - "cache": what is shared passes once, its keys and values are kept. Every layer attends to all earlier tokens
      (Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Idefics3/SmolVLM), or to a window that holds the longest turn.
    - "tree": the same in one pass under a tree mask; the language model attends by FlexAttention, whose masks are not
      made for keys of a pass before.
    - "none": each turn passes alone; layers have a window that is too short for the mask, or a recurrent state, or
      attend to later tokens.

    Args:
        longest: Tokens of the longest single turn, its image included.
    """
    if not reads_all_before(model.encoder.model, longest):
        return "none"
    return "tree" if model.encoder.uses_flex_attention else "cache"


def embed_turns(model: Model, dialogues: Sequence[Dialogue], token_budget: int) -> list[Tensor]:
    """The vectors of every dialogue, float32 [turns, dim], L2-normalised, on the model's device.

    Args:
        model: In eval mode.
        dialogues: Isolated or not. They are collated together, so all their images are in memory at once.
        token_budget: Most tokens of a pass, padding and kept tokens included; one trunk, pack or row may exceed it.
    """
    batch = model.encoder.collate(dialogues)
    counts = [len(dialogue.turns) for dialogue in dialogues]
    way = "tree"
    if "branch_ids" in batch and all(dialogue.isolated for dialogue in dialogues):
        forest = _Forest(batch, dialogues)
        way = sharing(model, forest.longest) if forest.trunks else "none"
    if way != "none":
        model.encoder.cut += len(batch.get("cut_turns", ()))
    if way == "cache":
        vectors = _with_cache(model, forest, token_budget)
    elif way == "tree":
        vectors = _in_passes(model, batch, token_budget)
    else:
        contents = [Content(turn.text, d.context + turn.images) for d in dialogues for turn in d.turns]
        vectors = model.encode(contents, convert_to_tensor=True, truncate_dim=None, show_progress_bar=False)
    return list(vectors.split(counts))


def _in_passes(model: Model, batch: DialogueBatch, token_budget: int) -> Tensor:
    """Whole dialogues, each in one row."""
    chunks = split(batch, token_budget)
    vectors = torch.cat([model.embed(_on_device(model, chunk)) for chunk, _ in chunks])
    return vectors[torch.cat([turns for _, turns in chunks]).argsort()]


def _with_cache(model: Model, forest: _Forest, token_budget: int) -> Tensor:
    numbers, vectors = [], []
    for rows in chunks_of(torch.tensor([trunk.length for trunk in forest.trunks]), token_budget):
        trunks = _Trunks.of(model, forest.cut([forest.trunks[row] for row in rows.tolist()]))
        packs = [(place, pack) for place, row in enumerate(rows.tolist()) for pack in forest.packs(row)]
        kept = trunks.real.shape[1]
        for chosen in chunks_of(torch.tensor([kept + pack.length for _, pack in packs]), token_budget):
            places, spans = zip(*(packs[number] for number in chosen.tolist()), strict=True)
            branches = _on_device(model, forest.cut(spans))
            vectors.append(model.embed(branches | trunks.read_by(branches, torch.tensor(places))))
            numbers += [turn for span in spans for turn in span.turns]
    return torch.cat(vectors)[torch.tensor(numbers).argsort()]


@dataclass(frozen=True)
class _Span:
    """Columns ``start`` to ``stop`` of a row of a batch, and the numbers of the turns and images that stand there."""

    row: int
    start: int
    stop: int
    turns: tuple[int, ...] = ()
    images: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        return self.stop - self.start

    def with_next(self, other: _Span) -> _Span:
        return _Span(self.row, self.start, other.stop, self.turns + other.turns, self.images + other.images)


class _Forest:
    """A batch of trees, cut into trunks and branches.

    ``trunks`` has one span per row, or none at all if any tree has no trunk, so that nothing is shared.
    """

    def __init__(self, batch: DialogueBatch, dialogues: Sequence[Dialogue]) -> None:
        self.batch = batch
        self.trunks: list[_Span] = []
        self.branches: list[list[_Span]] = []
        turn = image = 0
        trunk = (batch["branch_ids"] == 0) & batch["attention_mask"].bool()
        for row, dialogue in enumerate(dialogues):
            start = int(batch["attention_mask"][row].argmax())
            stop = start + int(trunk[row].sum())
            context = len(dialogue.context)
            self.trunks.append(_Span(row, start, stop, (), tuple(range(image, image + context))))
            image += context
            branches = []
            for content in dialogue.turns:
                start, stop = stop, int(batch["turn_columns"][turn]) + 1
                own = len(content.images)
                branches.append(_Span(row, start, stop, (turn,), tuple(range(image, image + own))))
                turn, image = turn + 1, image + own
            self.branches.append(branches)
        self.longest = max(
            trunk.length + branch.length
            for trunk, branches in zip(self.trunks, self.branches, strict=True)
            for branch in branches
        )
        if not all(trunk.length for trunk in self.trunks):
            self.trunks = []

    def packs(self, row: int) -> list[_Span]:
        """The branches of a row, neighbours joined up to ``PACK`` tokens."""
        first, *others = self.branches[row]
        packs = [first]
        for branch in others:
            if packs[-1].length + branch.length > PACK:
                packs.append(branch)
            else:
                packs[-1] = packs[-1].with_next(branch)
        return packs

    def cut(self, spans: Sequence[_Span]) -> DialogueBatch:
        """A row per span, padded on the right; its turns and images come along in the order of the spans."""
        batch, length = self.batch, max(span.length for span in spans)

        def padded(table: Tensor) -> Tensor:
            parts = [table[..., span.row, span.start : span.stop] for span in spans]
            return torch.stack([pad(part, (0, length - part.shape[-1])) for part in parts], dim=-2)

        owners = [(row, span, turn) for row, span in enumerate(spans) for turn in span.turns]
        part: DialogueBatch = {
            "input_ids": padded(batch["input_ids"]),
            "attention_mask": padded(batch["attention_mask"]),
            "position_ids": padded(batch["position_ids"]),
            "branch_ids": padded(batch["branch_ids"]),
            "turn_rows": torch.tensor([row for row, _, _ in owners], dtype=torch.long),
            "turn_columns": torch.tensor(
                [int(batch["turn_columns"][turn]) - span.start for _, span, turn in owners], dtype=torch.long
            ),
        }
        images = [(row, image) for row, span in enumerate(spans) for image in span.images]
        if images:
            part |= images_of(batch, torch.tensor([image for _, image in images]))  # type: ignore[assignment]
            part["image_rows"] = torch.tensor([row for row, _ in images])
        return part


@dataclass(frozen=True)
class _Trunks:
    """What has passed.

    Args:
        cache: Keys and values of each layer, [N, heads, P, dim] both.
        real: Which of the P are no padding, bool [N, P].
    """

    cache: DynamicCache
    real: Tensor

    @classmethod
    def of(cls, model: Model, batch: DialogueBatch) -> _Trunks:
        cache = DynamicCache()
        linear = {key: value for key, value in batch.items() if key != "branch_ids"}
        moved = _on_device(model, linear)
        model.encoder(moved | {"past_key_values": cache})
        return cls(cache, moved["attention_mask"].bool())

    def read_by(self, branches: Mapping[str, Tensor], places: Tensor) -> dict[str, Any]:
        """What a pass of packs needs besides their tokens: the keys before them, and whom each token may read.

        Args:
            branches: R rows of L tokens.
            places: The trunk of each, int64 [R].
        """
        rows, length = branches["input_ids"].shape
        places = places.to(self.real.device)
        before = self.real[places][:, None, None].expand(rows, 1, length, -1)
        mask = torch.cat([before, tree_mask(branches)], dim=-1)  # type: ignore[arg-type]
        layers = [_KeptLayer(layer, places) for layer in self.cache.layers]
        return {"past_key_values": Cache(layers=layers), "attention_allowed": mask}


class _KeptLayer(DynamicLayer):
    """One layer's kept keys and values, of which each row reads its own; those of the rows are not added."""

    def __init__(self, layer: Any, places: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.places, self.is_initialized = layer.keys, layer.values, places, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self._after(self.keys, key_states), self._after(self.values, value_states)

    def _after(self, kept: Tensor, new: Tensor) -> Tensor:
        own = kept.expand(len(new), -1, -1, -1) if len(kept) == 1 else kept[self.places]
        return torch.cat([own, new], dim=-2)


def _on_device(model: Model, batch: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.to(model.device) for key, value in batch.items()}
