"""Dialogues -> one batch of tensors that knows how to cut itself.

Letters: B rows (one per dialogue) · L tokens · T turns of all rows · I images · P patches (or tiles) of all images.

An isolated dialogue of several turns is a *tree* in one row: the trunk, then each turn's branch. A token attends to
the trunk and to its own branch only, and every branch's positions begin where the trunk's end (unless the dialogue says
otherwise), so that each turn's vector is the one of a single-turn pass::

    tokens      [ system · image | query 1 <|emb|> | query 2 <|emb|> | … ]
    branch_ids    0 … … … … … 0    1 … … … … … 1     2 … … … … … 2
    positions     0 … … … … p-1    p p+1 …           p p+1 …
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from muco.dialogue import Dialogue
from muco.errors import DataError
from muco.processor import EncodedImage, Processor, rotary_positions
from muco.template import ImageSlot, Pieces

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch.nn.attention.flex_attention import BlockMask


class DialogueBatch(TypedDict):
    """Tensors of several dialogues. Images stand in the order of their placeholders, row by row."""

    input_ids: Int[Tensor, "B L"]
    attention_mask: Int[Tensor, "B L"]
    position_ids: Int[Tensor, "A B L"]  # A = 3 axes (Qwen family) or 1
    branch_ids: NotRequired[Int[Tensor, "B L"]]  # 0 trunk, j the branch of turn j; absent if every row is linear
    turn_rows: Int[Tensor, " T"]  # which row a turn belongs to
    turn_columns: Int[Tensor, " T"]  # where its <|emb|> stands
    pixel_values: NotRequired[Float[Tensor, "P ..."]]
    pixel_attention_mask: NotRequired[Tensor]  # [P, height, width], families with padded tiles
    image_grid_thw: NotRequired[Int[Tensor, "I 3"]]
    image_rows: NotRequired[Int[Tensor, " I"]]  # which row an image belongs to
    image_patches: NotRequired[Int[Tensor, " I"]]  # how many of the P it owns
    image_features: NotRequired[list[tuple[Tensor, ...]]]  # I of them, in place of the patches: see Encoder.see
    cut_turns: NotRequired[Int[Tensor, " C"]]  # which turns had their text cut, where that is asked for


PATCH_KEYS = ("pixel_values", "pixel_attention_mask")
IMAGE_KEYS = ("image_grid_thw", "image_patches")


@dataclass
class Row:
    """One dialogue's tokens and images before padding."""

    ids: list[int] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)  # each [A, tokens]
    branches: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)  # columns of <|emb|>
    lengths: list[int] = field(default_factory=list)  # of what each turn reads, itself included
    images: list[EncodedImage] = field(default_factory=list)
    cut: tuple[int, ...] = ()  # numbers of the turns whose text was cut
    tree: bool = False  # whether it has branches that do not see one another

    def append(self, part: _Part, start: int, branch: int) -> int:
        """Adds a part whose positions begin at ``start``; returns the position that follows it."""
        positions = part.positions(start)
        self.ids += part.ids
        self.positions.append(positions)
        self.branches += [branch] * len(part.ids)
        return int(positions.max()) + 1 if part.ids else start


@dataclass
class _Part:
    ids: list[int]
    segments: list[int | EncodedImage]
    rotary_3d: bool

    def positions(self, start: int) -> np.ndarray:
        if self.rotary_3d:
            return rotary_positions(self.segments, start)
        return np.arange(start, start + len(self.ids))[None]


Truncate = Literal["NONE", "START", "END"]
CUTS = 8  # what is left of a text that is cut between two tokens may be read as other tokens than before


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
        padding_side: Changes where padding stands, never a vector.
        truncate: Which end of a text is cut where its turn has too many tokens. Only text is ever cut, and only of
            turns that see no other turn's text.
        max_tokens: Most tokens that a turn may read, its images and the prompt included; None, or more than the
            processor's: that of the processor.
    Raises:
        DataError: If a text holds a special token, or a turn has too many tokens; names the row.
        ImageError: If an image cannot be used; names the file.
    """
    rows = [prepare(dialogue, processor, truncate=truncate, max_tokens=max_tokens) for dialogue in dialogues]
    return stack(rows, processor, padding_side=padding_side)


def stack(rows: Sequence[Row], processor: Processor, *, padding_side: str = "right") -> DialogueBatch:
    """The batch of dialogues that are prepared one by one; at least one."""
    length = max(len(row.ids) for row in rows)
    starts = [length - len(row.ids) if padding_side == "left" else 0 for row in rows]

    def padded(values: Callable[[Row], Any], fill: int, *axes: int) -> Tensor:
        table = np.full((*axes, len(rows), length), fill, dtype=np.int64)
        for b, (row, start) in enumerate(zip(rows, starts, strict=True)):
            table[..., b, start : start + len(row.ids)] = values(row)
        return torch.from_numpy(table)

    batch: DialogueBatch = {
        "input_ids": padded(lambda row: row.ids, processor.pad_id),
        "attention_mask": padded(lambda row: 1, 0),
        "position_ids": padded(lambda row: np.concatenate(row.positions, axis=1), 0, 3 if processor.rotary_3d else 1),
        "turn_rows": torch.tensor([b for b, row in enumerate(rows) for _ in row.turns]),
        "turn_columns": torch.tensor([starts[b] + column for b, row in enumerate(rows) for column in row.turns]),
    }
    if any(row.tree for row in rows):
        batch["branch_ids"] = padded(lambda row: row.branches, 0)
    if any(row.cut for row in rows):
        first = np.cumsum([0, *(len(row.turns) for row in rows)]).tolist()
        batch["cut_turns"] = torch.tensor([first[b] + turn for b, row in enumerate(rows) for turn in row.cut])
    return batch | _image_tensors(rows)


def prepare(
    dialogue: Dialogue, processor: Processor, *, truncate: Truncate = "NONE", max_tokens: int | None = None
) -> Row:
    """Tokenises a dialogue and opens its images; arguments and errors are those of :func:`collate`."""
    limit = min((n for n in (max_tokens, processor.max_tokens) if n is not None), default=sys.maxsize)
    processor.check(dialogue)
    images = processor.encode_images(dialogue.images, dialogue.where)
    row = whole = _laid_out(dialogue, images, processor)
    alone = dialogue.isolated or len(dialogue.turns) == 1
    for _ in range(CUTS if alone and truncate != "NONE" else 0):
        if max(row.lengths) <= limit:
            break
        dialogue = _cut(dialogue, [length - limit for length in row.lengths], processor, truncate)
        row = _laid_out(dialogue, images, processor)
    row.cut = tuple(turn for turn, length in enumerate(whole.lengths) if length > limit)
    for turn in row.cut:
        if row.lengths[turn] > limit:
            raise DataError(
                f"{dialogue.where or 'input'} turn {turn + 1}: {whole.lengths[turn]:,} tokens with its images and the "
                f"prompt, but the model reads at most {limit:,}; shorten the text, or give fewer or smaller images"
            )
    return row


def _cut(dialogue: Dialogue, excess: Sequence[int], processor: Processor, end: Literal["START", "END"]) -> Dialogue:
    """The dialogue with ``excess`` tokens cut from each turn's text; turns of an excess below 1 stay as they are."""
    turns = zip(dialogue.turns, excess, strict=True)
    cut = [replace(turn, text=processor.shortened(turn.text, n, end)) if n > 0 else turn for turn, n in turns]
    return replace(dialogue, turns=tuple(cut))


def _laid_out(dialogue: Dialogue, images: list[EncodedImage], processor: Processor) -> Row:
    prompt = processor.template.prompt(dialogue)
    row = Row(images=images)
    row.tree = dialogue.isolated and len(dialogue.turns) > 1
    position = row.append(_part(prompt.trunk, row.images, processor), 0, 0)
    trunk = len(row.ids)
    begin = None  # of the positions of all turns after the first; None: where the turn before ended
    if dialogue.restarts:
        begin = position if prompt.isolated else _shared_end(dialogue, row.images, processor)
    for number, branch in enumerate(prompt.branches, start=1):
        start = position if number == 1 or begin is None else begin
        before = trunk if prompt.isolated else len(row.ids)
        part = _part(branch, row.images, processor)
        position = row.append(part, start, number)
        row.turns.append(len(row.ids) - 1)
        row.lengths.append(before + len(part.ids))
    if not prompt.isolated:
        row.branches = [0] * len(row.ids)
    return row


def _shared_end(dialogue: Dialogue, images: Sequence[EncodedImage], processor: Processor) -> int:
    """The position that follows what isolated turns of this dialogue share."""
    trunk = _part(processor.template.prompt(replace(dialogue, isolated=True)).trunk, images, processor)
    return int(trunk.positions(0).max()) + 1 if trunk.ids else 0


def _part(pieces: Pieces, images: Sequence[EncodedImage], processor: Processor) -> _Part:
    part = _Part([], [], processor.rotary_3d)
    for piece in pieces:
        image = images[piece.index] if isinstance(piece, ImageSlot) else None
        ids = image.ids if image else processor.text_ids(piece)
        part.ids += ids
        part.segments.append(image or len(ids))
    return part


def _image_tensors(rows: Sequence[Row]) -> dict[str, Tensor]:
    images = [(b, image) for b, row in enumerate(rows) for image in row.images]
    if not images:
        return {}
    tensors = {
        key: _stack_patches([image.patches[key] for _, image in images])
        for key in PATCH_KEYS
        if key in images[0][1].patches
    }
    tensors["image_rows"] = torch.tensor([b for b, _ in images])
    tensors["image_patches"] = torch.tensor([len(image.patches["pixel_values"]) for _, image in images])
    if images[0][1].grid is not None:
        tensors["image_grid_thw"] = torch.tensor([image.grid for _, image in images])
    return tensors


def _stack_patches(patches: Sequence[Tensor]) -> Tensor:
    """Joins along the first dimension; tiles of different heights and widths are padded with zeros."""
    shape = [max(sizes) for sizes in zip(*(patch.shape[1:] for patch in patches), strict=True)]
    grown = []
    for patch in patches:
        free = [extra for want, have in zip(shape, patch.shape[1:], strict=True) for extra in (want - have, 0)]
        grown.append(pad(patch, free[::-1]) if any(free) else patch)
    return torch.cat(grown)


def tree_mask(batch: DialogueBatch) -> Tensor | None:
    """Who may attend to whom, bool [B, 1, L, L], or None where the usual causal mask says it all.

    No token attends to padding but each padding token to itself, so that no row of the softmax is empty.
    """
    if "branch_ids" not in batch:
        return None
    branches, real = batch["branch_ids"], batch["attention_mask"].bool()
    length = branches.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=branches.device).tril()
    same = branches[:, :, None] == branches[:, None, :]
    trunk = (branches == 0)[:, None, :]
    allowed = causal & (same | trunk) & real[:, None, :]
    allowed = allowed | torch.eye(length, dtype=torch.bool, device=branches.device)
    return allowed[:, None]


def attention_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask [B, 1, L, L] as what is added to attention scores: 0 where it is True, else minus infinity.

    All layers share it; of a boolean mask torch makes such a bias anew in every layer and keeps it for backward. Its
    rows begin at multiples of 16 numbers, or kernels would copy it for that reason.
    """
    *outer, length = mask.shape
    bias = torch.zeros(*outer, -(-length // 16) * 16, dtype=dtype, device=mask.device)[..., :length]
    return bias.masked_fill_(~mask, float("-inf"))


def tree_block_mask(batch: DialogueBatch) -> BlockMask | None:
    """The rule of :func:`tree_mask` for FlexAttention, which leaves out blocks in which nothing is allowed.

    One mask serves all heads and layers.
    """
    if "branch_ids" not in batch:
        return None
    from torch.nn.attention.flex_attention import create_block_mask

    branches, real = batch["branch_ids"], batch["attention_mask"].bool()

    def allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own_or_trunk = (branches[row, query] == branches[row, key]) | (branches[row, key] == 0)
        return ((query >= key) & own_or_trunk & real[row, key]) | (query == key)

    rows, length = branches.shape
    return create_block_mask(allowed, rows, None, length, length, device=branches.device)


def split(batch: DialogueBatch, token_budget: int) -> list[tuple[DialogueBatch, Tensor]]:
    """Cuts a batch into chunks of whole rows of similar length, each of at most ``token_budget`` tokens with padding.

    A single row above the budget is a chunk of its own. Visual tokens count, since they are tokens of the row.

    Returns:
        Chunks, longest rows first so that what does not fit shows at once, each with the numbers of its turns in the
        batch, int64 [turns of the chunk]. Rows of equal length keep their order.
    """
    lengths = batch["attention_mask"].sum(dim=1)
    return [rows_of(batch, rows) for rows in chunks_of(lengths, token_budget)]


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


def rows_of(batch: DialogueBatch, rows: Tensor) -> tuple[DialogueBatch, Tensor]:
    """The dialogues ``rows`` (int64, in this order) with their turns and images, cut to their longest row.

    Returns:
        The part, and the numbers of its turns in the batch.
    """
    if torch.equal(rows, torch.arange(len(batch["input_ids"]))):
        return batch, torch.arange(len(batch["turn_rows"]))
    real = batch["attention_mask"][rows].bool().any(dim=0).nonzero().flatten()
    columns = slice(int(real[0]), int(real[-1]) + 1)
    turns, turn_rows = _owned(batch["turn_rows"], rows)
    part: DialogueBatch = {
        "input_ids": batch["input_ids"][rows, columns],
        "attention_mask": batch["attention_mask"][rows, columns],
        "position_ids": batch["position_ids"][:, rows, columns],
        "turn_rows": turn_rows,
        "turn_columns": batch["turn_columns"][turns] - columns.start,
    }
    if "branch_ids" in batch:
        part["branch_ids"] = batch["branch_ids"][rows, columns]
    if "image_rows" in batch:
        images, image_rows = _owned(batch["image_rows"], rows)
        part |= images_of(batch, images) if len(images) else {}
        part |= {"image_rows": image_rows} if len(images) else {}
    return part, turns


def images_of(batch: DialogueBatch, images: Tensor) -> dict[str, Any]:
    """What a batch knows of the images with these numbers (int64), in this order."""
    part: dict[str, Any] = {key: batch[key][images] for key in IMAGE_KEYS if key in batch}
    if "image_features" in batch:
        part["image_features"] = [batch["image_features"][i] for i in images.tolist()]
    ends = batch["image_patches"].cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    for key in PATCH_KEYS:
        if key in batch:
            part[key] = torch.cat([batch[key][starts[i] : ends[i]] for i in images.tolist()])
    return part


def _owned(owners: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of the things that ``rows`` own, in the order of ``rows``, and the place in ``rows`` of their owners."""
    place = torch.full((int(max(owners.max(), rows.max())) + 1,), -1)
    place[rows] = torch.arange(len(rows))
    places = place[owners]
    order = places.argsort(stable=True)
    own = order[places[order] >= 0]
    return own, places[own]


def join(batches: Sequence[DialogueBatch]) -> DialogueBatch:
    """Puts batches below one another, padded on the right to the longest; turns and images keep their order."""
    if len(batches) == 1:
        return batches[0]
    length = max(batch["input_ids"].shape[1] for batch in batches)
    starts = np.cumsum([0, *(len(batch["input_ids"]) for batch in batches)]).tolist()

    def padded(key: str) -> Tensor:
        # 0 as padding: the attention mask hides it, and an embedding matrix has a row 0
        tables = [b[key] if key in b else torch.zeros_like(b["input_ids"]) for b in batches]
        return torch.cat([pad(t, (0, length - t.shape[-1])) for t in tables], dim=-2)

    joined: DialogueBatch = {
        **{key: padded(key) for key in ("input_ids", "attention_mask", "position_ids")},
        "turn_rows": torch.cat([b["turn_rows"] + start for b, start in zip(batches, starts, strict=False)]),
        "turn_columns": torch.cat([b["turn_columns"] for b in batches]),
    }
    if any("branch_ids" in b for b in batches):
        joined["branch_ids"] = padded("branch_ids")
    seen = [(b, start) for b, start in zip(batches, starts, strict=False) if "image_rows" in b]
    if not seen:
        return joined
    joined["image_rows"] = torch.cat([b["image_rows"] + start for b, start in seen])
    for key in ("image_patches", "image_grid_thw"):
        if key in seen[0][0]:
            joined[key] = torch.cat([b[key] for b, _ in seen])
    for key in PATCH_KEYS:
        if key in seen[0][0]:
            joined[key] = _stack_patches([b[key] for b, _ in seen])
    if "image_features" in seen[0][0]:
        joined["image_features"] = [features for b, _ in seen for features in b["image_features"]]
    return joined


def join_ids(parts: Sequence[Mapping[str, Tensor]], vectors: Sequence[int]) -> dict[str, Tensor]:
    """The ``ids`` of several training batches put below one another; ``vectors`` counts the target side of each."""
    joined: dict[str, list[Tensor]] = {key: [] for key in parts[0]}
    turns = first = 0
    for ids, count in zip(parts, vectors, strict=True):
        offsets = {"target_rows": first, "hard_negative_rows": first, "hard_negative_turns": turns}
        for key, values in ids.items():
            joined[key].append(values + offsets.get(key, 0))
        turns, first = turns + len(ids["sample_ids"]), first + count
    return {key: torch.cat(values) for key, values in joined.items()}
