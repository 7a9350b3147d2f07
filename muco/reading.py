"""How the layers of a language model read a row of tokens: what a mask of our own has to say, and to which layer.

What the configuration states is taken from there: windows, and layers that keep a state instead of keys. What only the
family's code knows is seen in one short row: which tokens each kind of layer lets an image's tokens read, and whether a
later token changes an earlier state.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from muco.vision import base_model

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Reading:
    """What each kind of layer reads.

    Attributes:
        layers: The kind of each layer.
        window: Of layers with a sliding window, the number of tokens that one reads, itself included.
        recurrent: Kinds of layers that keep a state instead of keys and values.
        unknown: Kinds of layers that read in another way than all that are known here.
        blocks: Kinds of layers in which the tokens of an image read each other in both directions.
        looks_ahead: Whether a later token changes the states of earlier ones.
        keeps: Whether each layer's keys, values or state can be kept from one pass to the next.
    """

    layers: tuple[str, ...]
    window: int | None = None
    recurrent: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    looks_ahead: bool = False
    keeps: bool = True

    @property
    def attending(self) -> list[str]:
        """The kinds of layers that need a mask."""
        return [kind for kind in dict.fromkeys(self.layers) if kind not in self.recurrent]

    @property
    def why_not_isolated(self) -> str:
        """Why several isolated turns cannot share a row; "" if they can."""
        if self.looks_ahead:
            return "in this model a later token changes the states of earlier ones, so that turns would see each other"
        if self.unknown:
            return f"this model has layers of a kind that MuCo cannot mask: {', '.join(self.unknown)}"
        return ""


def stated_reading(model: nn.Module, *, prefix: bool = False) -> Reading:
    """What the configuration says, and ``prefix`` (see :class:`muco.stock.Family`); nothing is computed."""
    config = model.config.get_text_config()
    kept = DynamicCache(config=config).layers
    named = {DynamicSlidingWindowLayer: SLIDING, LinearAttentionLayer: "linear_attention"}
    layers = tuple(getattr(config, "layer_types", None) or [named.get(type(layer), FULL) for layer in kept])
    by_kind: dict[str, Any] = {}
    for kind, layer in zip(layers, kept, strict=False):
        by_kind.setdefault(kind, layer)
    known = {kind: type(layer) for kind, layer in by_kind.items()}
    recurrent = tuple(kind for kind, cls in known.items() if cls is LinearAttentionLayer)
    attention = (DynamicLayer, DynamicSlidingWindowLayer)
    return Reading(
        layers=layers,
        window=getattr(by_kind.get(SLIDING), "sliding_window", None),
        recurrent=recurrent,
        unknown=tuple(kind for kind in known if kind not in (FULL, SLIDING, *recurrent)),
        looks_ahead=prefix or not getattr(config, "is_causal", True),
        keeps=all(type(layer) in (*attention, LinearAttentionLayer) for layer in kept),
    )


def seen_reading(model: nn.Module, image_id: int, token_types: dict[str, int]) -> Reading:
    """The same, with what the first layer of each kind shows in one short row of text and an image's tokens.

    Args:
        model: Not on the meta device; in eval mode.
        image_id, token_types: See :class:`muco.stock.Family`.
    """
    stated, base = stated_reading(model), base_model(model)
    first = {kind: stated.layers.index(kind) for kind in dict.fromkeys(stated.layers)}
    layers = decoder_layers(model)
    text = [token for token in range(8) if token != image_id][:4]
    row = torch.tensor([*text[:2], *[image_id] * 3, *text[2:], text[0]])  # the last one is padding
    ids = row.repeat(2, 1).to(base.device)
    real = torch.ones_like(ids)
    real[:, -1] = 0
    inputs = {"input_ids": ids, "attention_mask": real, "use_cache": False, "return_dict": True}
    inputs |= {name: torch.where(ids == image_id, value, 0) for name, value in token_types.items()}
    last_text = len(row) - 2
    with (
        torch.no_grad(),
        _evaluated(base),
        _watched(base, layers[: max(first.values()) + 1], last_text) as seen,
        suppress(_Enough),
    ):
        base(**inputs)
    blocks = tuple(
        kind
        for kind in stated.attending
        if isinstance(mask := seen.masks[first[kind]], Tensor) and mask.dim() == 4 and _allows(mask[0, 0, 2, 4])
    )
    early = seen.states[:, :2].float()
    ahead = bool((early[0] - early[1]).abs().max() > 1e-3 * early.abs().max())
    ahead = stated.looks_ahead or ahead
    return replace(stated, blocks=() if ahead else blocks, looks_ahead=ahead)


def _allows(entry: Tensor) -> bool:
    """Whether an entry of a mask, boolean or added to scores, lets a token be read."""
    return bool(entry) if entry.dtype == torch.bool else bool(entry > -1)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The layers of the language model."""
    decoder = base_model(model).get_decoder()
    count = decoder.config.num_hidden_layers
    return next(m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == count)


@contextmanager
def _evaluated(base: nn.Module) -> Iterator[None]:
    """Evaluation mode, without dropout; afterwards each module has the mode of before."""
    training = [module for module in base.modules() if module.training]
    base.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Enough(Exception):
    """Ends a pass: the rest of the layers is not needed."""


@dataclass
class _Seen:
    masks: list[Any]  # what each layer was given
    states: Tensor  # after the last of them


@contextmanager
def _watched(base: nn.Module, layers: Any, changed: int) -> Iterator[_Seen]:
    """Notes what layers are given, ends the pass after the last, and changes one token of the second row."""
    seen = _Seen([], torch.empty(0))

    def change(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if output.shape[:2] != (2, changed + 2):
            return output
        other = output.clone()
        other[1, changed] = -3 * other[1, changed] + 1
        return other

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.masks.append(kwargs.get("attention_mask", args[1] if len(args) > 1 else None))

    def end(module: nn.Module, args: Any, output: Any) -> None:
        seen.states = output if isinstance(output, Tensor) else output[0]
        raise _Enough

    hooks = [base.get_input_embeddings().register_forward_hook(change)]
    hooks += [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(end))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
