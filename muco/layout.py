"""Dialogue -> one row of tokens, positions and images, before padding.

An isolated dialogue of several turns is a *tree* in one row: the trunk, then each turn's branch. A token attends to
the trunk and to its own branch only, and every branch's positions begin where the trunk's end (unless the dialogue says
otherwise), so that each turn's vector is the one of a single-turn pass::

    tokens      [ system · image | query 1 <|emb|> | query 2 <|emb|> | … ]
    branch_ids    0 … … … … … 0    1 … … … … … 1     2 … … … … … 2
    positions     0 … … … … p-1    p p+1 …           p p+1 …
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from muco.dialogue import Dialogue
from muco.errors import DataError
from muco.processor import EncodedImage, Grid, Processor
from muco.template import ImageSlot, Pieces

Truncate = Literal["NONE", "START", "END"]
CUTS = 8  # what is left of a text that is cut between two tokens may be read as other tokens than before


@dataclass
class TokenRow:
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
        self.ids += part.ids
        self.positions.append(part.positions + start)
        self.branches += [branch] * len(part.ids)
        return start + part.length


def prepare(
    dialogue: Dialogue, processor: Processor, *, truncate: Truncate = "NONE", max_tokens: int | None = None
) -> TokenRow:
    """Tokenises a dialogue and opens its images; arguments and errors are those of :func:`collate`."""
    limit = min((n for n in (max_tokens, processor.max_tokens) if n is not None), default=sys.maxsize)
    processor.guard.check(dialogue)
    dialogue = processor.as_read(dialogue)
    _check_images(dialogue, processor)
    images = [processor.encode_image(image, dialogue.where) for image in dialogue.images]
    row = whole = _laid_out(dialogue, images, processor)
    alone = dialogue.isolated or len(dialogue.turns) == 1
    for _ in range(CUTS if alone and truncate != "NONE" else 0):
        if max(row.lengths) <= limit:
            break
        turns = list(dialogue.turns)
        for number, length in enumerate(row.lengths):
            if length > limit:
                text = processor.shortened(turns[number].text, length - limit, truncate)
                turns[number] = replace(turns[number], text=text)
        dialogue = replace(dialogue, turns=tuple(turns))
        row = _laid_out(dialogue, images, processor)
    row.cut = tuple(turn for turn, length in enumerate(whole.lengths) if length > limit)
    for turn in row.cut:
        if row.lengths[turn] > limit:
            raise DataError(
                f"{dialogue.where or 'input'} turn {turn + 1}: {whole.lengths[turn]:,} tokens with its images and the "
                f"prompt, but the model reads at most {limit:,}; shorten the text, or give fewer or smaller images"
            )
    return row


def _check_images(dialogue: Dialogue, processor: Processor) -> None:
    if processor.several_images:
        return
    own = [len(turn.images) for turn in dialogue.turns]
    most = len(dialogue.context) + (max(own, default=0) if dialogue.isolated else sum(own))
    if most > 1:
        raise DataError(
            f"{dialogue.where or 'input'}: {most} images are read together, but this model's processor writes an image "
            "differently beside another one; use one image per input"
        )


def _laid_out(dialogue: Dialogue, images: list[EncodedImage], processor: Processor) -> TokenRow:
    prompt = processor.template.prompt(dialogue)
    row = TokenRow(images=images)
    row.tree = dialogue.isolated and len(dialogue.turns) > 1
    position = row.append(_part(prompt.trunk, images, processor), 0, 0)
    trunk = len(row.ids)
    begin = None  # of the positions of all turns after the first; None: where the turn before ended
    if dialogue.restarts and not prompt.isolated:  # after what isolated turns of this dialogue would share
        shared = processor.template.prompt(replace(dialogue, isolated=True)).trunk
        begin = _part(shared, images, processor).length
    elif dialogue.restarts:
        begin = position
    for number, branch in enumerate(prompt.branches, start=1):
        start = position if number == 1 or begin is None else begin
        before = trunk if prompt.isolated else len(row.ids)
        part = _part(branch, images, processor)
        position = row.append(part, start, number if prompt.isolated else 0)
        row.turns.append(len(row.ids) - 1)
        row.lengths.append(before + len(part.ids))
    return row


@dataclass(frozen=True)
class _Part:
    """The tokens of some pieces."""

    ids: list[int]
    positions: np.ndarray  # from 0 on, int64 [A, tokens]
    length: int  # the position that follows


def _part(pieces: Pieces, images: Sequence[EncodedImage], processor: Processor) -> _Part:
    ids: list[int] = []
    segments: list[int | Grid] = []
    for piece in pieces:
        image = images[piece.index] if isinstance(piece, ImageSlot) else None
        own = image.ids if image else processor.text_ids(piece)
        ids += own
        segments += image.segments if image else (len(own),)
    if not processor.family.rotary:
        return _Part(ids, np.arange(len(ids))[None], len(ids))
    return _Part(ids, rotary_positions(segments), sum(map(_length, segments)))


def _length(segment: int | Grid) -> int:
    """Positions from the beginning of a segment to what follows: the longer side of a picture, whatever its time."""
    return segment if isinstance(segment, int) else max(segment.height, segment.width)


def rotary_positions(segments: Sequence[int | Grid], start: int = 0) -> np.ndarray:
    """Multimodal rotary positions of a run of text lengths and visual tokens, beginning at ``start``.

    Text advances all three axes by one per token. Visual tokens are laid out by step of time, row and column.

    Returns:
        int64 [3, tokens] (time, height, width).
    Source: Qwen2-VL (arXiv 2409.12191), M-RoPE. Equal to the model's own ``get_rope_index`` (tests).
    """
    parts, position = [np.zeros((3, 0), dtype=np.int64)], start
    for segment in segments:
        if isinstance(segment, int):
            own = np.broadcast_to(np.arange(segment), (3, segment))
        else:
            own = np.indices((segment.time, segment.height, segment.width)).reshape(3, -1)
            own[0] = own[0] * segment.step + 1e-4  # rounded down, but not for the rounding of a product
        parts.append(own + position)
        position += _length(segment)
    return np.concatenate(parts, axis=1)
