"""Rows of tokens -> one batch of tensors that can be cut, joined and moved.

Letters: B rows (one per dialogue) · L tokens · T turns of all rows · I images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NotRequired, TypedDict

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import pad

from muco.dialogue import Dialogue
from muco.layout import TokenRow, Truncate, prepare
from muco.processor import Processor


class DialogueBatch(TypedDict):
    """Tensors of several dialogues. Images are in the order of their placeholders, row by row."""

    input_ids: Int[Tensor, "B L"]
    attention_mask: Int[Tensor, "B L"]
    position_ids: Int[Tensor, "A B L"]  # A = 3 axes (multimodal rotary positions) or 1
    branch_ids: NotRequired[Int[Tensor, "B L"]]  # 0 trunk, j the branch of turn j; absent if every row is linear
    turn_rows: Int[Tensor, " T"]  # which row a turn belongs to
    turn_columns: Int[Tensor, " T"]  # where its <|emb|> is
    images: NotRequired[list[dict[str, Tensor]]]  # I of them, each what EncodedImage.tensors has
    image_rows: NotRequired[Int[Tensor, " I"]]  # which row an image belongs to
    image_tokens: NotRequired[Int[Tensor, " I"]]  # its number of visual tokens
    image_features: NotRequired[list[tuple[Tensor, ...]]]  # I of them, in place of images: Encoder.image_features
    cut_turns: NotRequired[Int[Tensor, " C"]]  # turns whose text was cut; only :func:`collate` knows them


Axis = Literal["row", "turn", "image"]
# What the entries of each value belong to. Those of rows are on the second-last dimension of a tensor and padded to L;
# those of all others on the first, or in a list.
OWNERS: dict[str, Axis] = {
    "input_ids": "row",
    "attention_mask": "row",
    "position_ids": "row",
    "branch_ids": "row",
    "turn_rows": "turn",
    "turn_columns": "turn",
    "images": "image",
    "image_rows": "image",
    "image_tokens": "image",
    "image_features": "image",
}


def collate(
    dialogues: Sequence[Dialogue],
    processor: Processor,
    *,
    padding_side: str = "right",
    truncate: Truncate = "NONE",
    max_tokens: int | None = None,
) -> DialogueBatch:
    """Tokenises, opens the images and pads.

    Args:
        dialogues: At least one; any number of turns and images each, mixed.
        padding_side: Changes where padding is, never a vector.
        truncate: Which end of a text is cut if its turn has too many tokens. Only text is cut, and only of turns that
            see no other turn's text.
        max_tokens: Most tokens that a turn may read, images and prompt included; None: the processor's limit.
    Raises:
        DataError: If a text holds a special token, or a turn has too many tokens; names the row.
        ImageError: If an image cannot be used; names the file.
    """
    rows = [prepare(dialogue, processor, truncate=truncate, max_tokens=max_tokens) for dialogue in dialogues]
    return stack(rows, processor, padding_side=padding_side)


def stack(rows: Sequence[TokenRow], processor: Processor, *, padding_side: str = "right") -> DialogueBatch:
    """The batch of dialogues that are prepared one by one; at least one."""
    length = max(len(row.ids) for row in rows)
    starts = [length - len(row.ids) if padding_side == "left" else 0 for row in rows]

    def padded(values: Callable[[TokenRow], Any], fill: int, *axes: int) -> Tensor:
        table = np.full((*axes, len(rows), length), fill, dtype=np.int64)
        for b, (row, start) in enumerate(zip(rows, starts, strict=True)):
            table[..., b, start : start + len(row.ids)] = values(row)
        return torch.from_numpy(table)

    batch: DialogueBatch = {
        "input_ids": padded(lambda row: row.ids, processor.pad_id),
        "attention_mask": padded(lambda row: 1, 0),
        "position_ids": padded(
            lambda row: np.concatenate(row.positions, axis=1), 0, 3 if processor.family.rotary else 1
        ),
        "turn_rows": torch.tensor([b for b, row in enumerate(rows) for _ in row.turns]),
        "turn_columns": torch.tensor([starts[b] + column for b, row in enumerate(rows) for column in row.turns]),
    }
    if any(row.tree for row in rows):
        batch["branch_ids"] = padded(lambda row: row.branches, 0)
    if any(row.cut for row in rows):
        first = np.cumsum([0, *(len(row.turns) for row in rows)]).tolist()
        batch["cut_turns"] = torch.tensor([first[b] + turn for b, row in enumerate(rows) for turn in row.cut])
    return batch | _images_of_rows(rows)


def _images_of_rows(rows: Sequence[TokenRow]) -> dict[str, Any]:
    images = [(b, image) for b, row in enumerate(rows) for image in row.images]
    if not images:
        return {}
    return {
        "images": _in_one_storage([image.tensors for _, image in images]),
        "image_rows": torch.tensor([b for b, _ in images]),
        "image_tokens": torch.tensor([image.tokens for _, image in images]),
    }


def _in_one_storage(images: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The same tensors as parts of one per name: a process hands tensors over by a file for each storage."""
    own: list[dict[str, Tensor]] = [{} for _ in images]
    for name in images[0]:
        tensors = [image[name] for image in images]
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        for image, tensor, part in zip(own, tensors, flat.split([t.numel() for t in tensors]), strict=True):
            image[name] = part.view(tensor.shape)
    return own


def _below_one_another(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Joins tensors along a dimension; the others are padded with zeros at their end to the largest."""
    dim %= tensors[0].ndim
    largest = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
    grown = []
    for tensor in tensors:
        free = [largest[d] - tensor.shape[d] if d != dim else 0 for d in range(tensor.ndim)]
        grown.append(pad(tensor, [end for extra in reversed(free) for end in (0, extra)]) if any(free) else tensor)
    return torch.cat(grown, dim=dim)


def split(batch: DialogueBatch, token_budget: int) -> list[tuple[DialogueBatch, Tensor]]:
    """Cuts a batch into chunks of whole rows of similar length, each of at most ``token_budget`` tokens, padding and
    visual tokens included. A single row above the budget is a chunk of its own.

    Returns:
        Chunks, longest rows first so that running out of memory shows at once, each with the numbers of its turns in
        the batch, int64 [turns of the chunk]. Rows of equal length keep their order.
    """
    chunks = chunks_of(batch["attention_mask"].sum(dim=1), token_budget)
    if len(chunks) == 1:
        return [(batch, torch.arange(len(batch["turn_rows"])))]
    spans = spans_of(batch)
    return [rows_of(batch, [spans[row] for row in rows.tolist()]) for rows in chunks]


PASS = 512  # tokens: what a pass of its own may cost before padding is the cheaper choice


def chunks_of(lengths: Tensor, token_budget: int) -> list[Tensor]:
    """Which rows of these lengths (int64 [B]) pass together: :func:`split` before anything is cut.

    Of all cuts of the sorted rows the one with the fewest tokens, padding included, when a chunk costs ``PASS`` more.
    """
    if token_budget < 1:
        raise ValueError(f"token_budget must be positive, got {token_budget}")
    order = lengths.argsort(descending=True, stable=True)
    longest = lengths[order].numpy()
    best, cuts = np.zeros(len(longest) + 1), np.zeros(len(longest) + 1, dtype=np.int64)
    for end in range(1, len(longest) + 1):  # best[end]: the cheapest way for the first rows up to end
        tokens = np.arange(end, 0, -1) * longest[:end]  # of a chunk that begins at each row before
        fits = (tokens <= token_budget) | (np.arange(end) == end - 1)
        costs = np.where(fits, best[:end] + tokens + PASS, np.inf)
        cuts[end] = costs.argmin()
        best[end] = costs[cuts[end]]
    chunks, end = [], len(longest)
    while end:
        chunks.append(order[cuts[end] : end])
        end = int(cuts[end])
    if len(chunks) == 1:
        return [torch.arange(len(lengths))]  # nothing is cut, so the rows stay in their order
    return chunks[::-1]


@dataclass(frozen=True)
class Span:
    """Columns ``start`` to ``stop`` of a row of a batch, and the numbers of the turns and images there."""

    row: int
    start: int
    stop: int
    turns: tuple[int, ...] = ()
    images: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        return self.stop - self.start


def spans_of(batch: DialogueBatch) -> list[Span]:
    """Every row, whole."""
    rows, width = batch["input_ids"].shape
    turns, images = ([[] for _ in range(rows)] for _ in range(2))
    for number, row in enumerate(batch["turn_rows"].tolist()):
        turns[row].append(number)
    for number, row in enumerate(batch["image_rows"].tolist() if "image_rows" in batch else ()):
        images[row].append(number)
    return [Span(row, 0, width, tuple(turns[row]), tuple(images[row])) for row in range(rows)]


def rows_of(batch: DialogueBatch, spans: Sequence[Span]) -> tuple[DialogueBatch, Tensor]:
    """Whole rows, some of :func:`spans_of`, cut to the longest; and the numbers of their turns, int64 [turns]."""
    real = batch["attention_mask"][[span.row for span in spans]].any(dim=0).nonzero().flatten()
    start, stop = int(real[0]), int(real[-1]) + 1
    part = cut(batch, [replace(span, start=start, stop=stop) for span in spans])
    return part, torch.tensor([turn for span in spans for turn in span.turns])


def cut(batch: DialogueBatch, spans: Sequence[Span]) -> DialogueBatch:
    """A row per span, padded on the right; its turns and images come along in the order of the spans."""
    rows = torch.tensor([span.row for span in spans])
    start, stop = torch.tensor([span.start for span in spans]), torch.tensor([span.stop for span in spans])
    columns = start[:, None] + torch.arange(int((stop - start).max()))
    inside = columns < stop[:, None]
    columns = columns.clamp(max=batch["input_ids"].shape[1] - 1)
    turns = torch.tensor([turn for span in spans for turn in span.turns], dtype=torch.long)
    images = torch.tensor([image for span in spans for image in span.images], dtype=torch.long)

    part = _select(batch, "turn", turns) | (images_of(batch, images) if len(images) else {})
    for key, axis in OWNERS.items():
        if axis == "row" and key in batch:
            part[key] = batch[key][..., rows[:, None], columns] * inside
    places = torch.arange(len(spans))
    part["turn_rows"] = places.repeat_interleave(torch.tensor([len(span.turns) for span in spans]))
    part["turn_columns"] = part["turn_columns"] - start[part["turn_rows"]]
    if len(images):
        part["image_rows"] = places.repeat_interleave(torch.tensor([len(span.images) for span in spans]))
    return part


def images_of(batch: DialogueBatch, images: Tensor) -> dict[str, Any]:
    """What a batch knows about the images with these numbers (int64), in this order."""
    return _select(batch, "image", images)


def _select(batch: DialogueBatch, owner: Axis, numbers: Tensor) -> dict[str, Any]:
    """The entries with these numbers of all tensors of an axis other than rows."""
    part: dict[str, Any] = {}
    for key, axis in OWNERS.items():
        if axis == owner and key in batch:
            values = batch[key]
            part[key] = [values[n] for n in numbers.tolist()] if isinstance(values, list) else values[numbers]
    return part


def join(batches: Sequence[DialogueBatch]) -> DialogueBatch:
    """Puts batches below one another, padded on the right to the longest; turns and images keep their order."""
    if len(batches) == 1:
        return batches[0]
    moved, first = [], 0
    for batch in batches:
        moved.append({**batch, **{key: batch[key] + first for key in ("turn_rows", "image_rows") if key in batch}})
        first += len(batch["input_ids"])
    joined: dict[str, Any] = {}
    for key, axis in OWNERS.items():
        if not any(key in batch for batch in moved):
            continue
        if axis == "row":  # padded with 0: the attention mask hides it, and an embedding matrix has a row 0
            tables = [batch.get(key, torch.zeros_like(batch["input_ids"])) for batch in moved]
            joined[key] = _below_one_another(tables, dim=-2)
        elif key in ("images", "image_features"):
            joined[key] = [image for batch in moved for image in batch.get(key, ())]
        else:
            joined[key] = _below_one_another([batch[key] for batch in moved if key in batch])
    return joined


def to(value: Any, device: torch.device | str) -> Any:
    """A batch, or part of one, on a device; whatever is not a tensor, or made of tensors, stays as it is."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, (list, tuple)):
        return type(value)(to(item, device) for item in value)
    if isinstance(value, dict):
        return {key: to(item, device) for key, item in value.items()}
    return value
