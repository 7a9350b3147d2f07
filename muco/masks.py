"""Which token of a row attends to which: the tree of isolated turns, within the rules of each kind of layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.functional import pad

from muco.batch import DialogueBatch
from muco.reading import SLIDING, Reading

Rule = Callable[
    [Tensor, Tensor | None, Tensor, Tensor], Tensor
]  # of row, head, query, key: index tensors that broadcast


def tree_mask(batch: DialogueBatch) -> Tensor | None:
    """Who may attend to whom, bool [B, 1, L, L], or None where the usual causal mask says it all.

    No token attends to padding but each padding token to itself, so that no row of the softmax is empty.
    """
    if "branch_ids" not in batch:
        return None
    return _dense(_tree_rule(batch), batch)


def masks_of(
    batch: DialogueBatch, reading: Reading, image_id: int, dtype: torch.dtype, *, flex: bool = False
) -> dict[str, Any] | None:
    """The mask of each kind of attention layer, as the layers take it; None where the model makes its own.

    A tensor is a bias of scores [B, 1, L, kept + L]. Kinds that read alike share one.

    Args:
        batch: A pass that continues kept keys says by ``kept_tokens``, bool [B, kept], which of them its rows read.
        dtype: In which attention is computed.
        flex: For a language model with FlexAttention.
    """
    if "branch_ids" not in batch:
        return None
    tree = _tree_rule(batch)
    blocks = _image_blocks(batch, image_id) if reading.blocks else None
    before = batch.get("kept_tokens")
    made: dict[Any, Any] = {}
    masks = {}
    for kind in reading.attending:
        window = reading.window if kind == SLIDING else None
        key = (window, kind in reading.blocks)
        if key not in made:
            image = blocks if kind in reading.blocks else None
            made[key] = _made(batch, tree, before, window, image, dtype, flex=flex)
        masks[kind] = made[key]
    return masks


def _made(
    batch: DialogueBatch,
    tree: Rule,
    before: Tensor | None,
    window: int | None,
    blocks: Tensor | None,
    dtype: torch.dtype,
    *,
    flex: bool,
) -> Tensor | BlockMask:
    rule = tree if blocks is None else _or_one_image(tree, blocks)
    depth = None
    if window is not None:
        depth = _dense(tree, batch)[:, 0].sum(-1) - 1  # of what a token reads in its own turn, it is the last
        rule = _near(rule, depth, window)
    if flex:
        rows, length = batch["branch_ids"].shape
        return create_block_mask(rule, rows, None, length, length, device=batch["branch_ids"].device)
    mask = _dense(rule, batch)
    if before is not None:
        kept = before[:, None, None].expand(-1, 1, mask.shape[2], -1)
        if depth is not None:
            count = before.sum(1)[:, None, None]
            distance = depth[:, :, None] + count - (before.cumsum(1) - 1)[:, None]
            kept = kept & (distance < window)[:, None]
        mask = torch.cat([kept, mask], dim=-1)
    return attention_bias(mask, dtype)


def _dense(rule: Rule, batch: DialogueBatch) -> Tensor:
    rows, tokens = (torch.arange(size, device=batch["branch_ids"].device) for size in batch["branch_ids"].shape)
    return rule(rows[:, None, None, None], None, tokens[:, None], tokens)


def _tree_rule(batch: Mapping[str, Any]) -> Rule:
    branches, real = batch["branch_ids"], batch["attention_mask"].bool()

    def allowed(row: Tensor, head: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
        own_or_trunk = (branches[row, query] == branches[row, key]) | (branches[row, key] == 0)
        return ((query >= key) & own_or_trunk & real[row, key]) | (query == key)

    return allowed


def _or_one_image(rule: Rule, blocks: Tensor) -> Rule:
    """The rule, and the tokens of an image read each other; ``blocks`` [B, L] numbers images, 0 for other tokens."""

    def allowed(row: Tensor, head: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
        return rule(row, head, query, key) | ((blocks[row, query] == blocks[row, key]) & (blocks[row, key] > 0))

    return allowed


def _near(rule: Rule, depth: Tensor, window: int) -> Rule:
    """The rule within a window, counted in what a turn reads by itself: ``depth`` [B, L]."""

    def allowed(row: Tensor, head: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
        return rule(row, head, query, key) & (depth[row, query] - depth[row, key] < window)

    return allowed


def _image_blocks(batch: DialogueBatch, image_id: int) -> Tensor:
    """Numbers from 1 of the runs of image tokens in each row, 0 for other tokens, int64 [B, L]."""
    image, branch = batch["input_ids"] == image_id, batch["branch_ids"]
    same = pad(image, (1, 0))[:, :-1] & (branch == pad(branch, (1, 0))[:, :-1])
    return torch.where(image, (image & ~same).long().cumsum(1), 0)


def attention_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask [B, 1, L, L] as a bias of attention scores: 0 where it is True, else minus infinity.

    All layers share it; of a boolean mask torch would make and keep one per layer. Rows begin at multiples of 16
    elements, because kernels would otherwise copy the bias.
    """
    *outer, length = mask.shape
    bias = torch.zeros(*outer, -(-length // 16) * 16, dtype=dtype, device=mask.device)[..., :length]
    return bias.masked_fill_(~mask, float("-inf"))
