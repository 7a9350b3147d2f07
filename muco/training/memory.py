"""How much of a device's memory a training step takes, estimated on the meta device.

Nothing is allocated: the model of the true size passes its shapes through its layers, and what autograd keeps of them
for the backward pass is added up. Left out: what driver and allocator take for themselves, often one to two GiB.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

KEEPING = "muco_keeping"  # the name of our attention in transformers' registry


@dataclass(frozen=True)
class Memory:
    """Bytes of one device at the peak of a step.

    Args:
        weights: Of the model; with bfloat16 autocast over float32 weights also the copies that autocast makes.
        gradients: Of what is trained.
        optimizer: AdamW's two moments.
        activations: What the largest pass keeps for its backward pass, and the buffers of the layer at work.
        features: Of frozen vision, for all images of a step.
        loss: Vectors of all turns of all devices with their gradients, and blocks of scores.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    features: int
    loss: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.features + self.loss


def saved_bytes(forward: Callable[[], Any], weights: nn.Module) -> int:
    """Bytes that autograd keeps of a forward pass, each storage once, the weights' own aside."""
    own = {parameter.untyped_storage()._cdata for parameter in weights.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # holding the storages keeps their addresses from being used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
        del result
    return sum(storage.nbytes() for storage in kept.values())


def activation_bytes(
    language: nn.Module, rows: int, length: int, *, tree: bool, checkpointing: bool, flex: bool = False
) -> int:
    """Bytes that one pass of a language model needs until its backward pass is done.

    Args:
        language: On the meta device, in the dtype in which it computes. It takes ``inputs_embeds``.
        tree: Whether the mask of isolated turns is given.
        checkpointing: Whether a layer keeps its input only and is computed again in backward.
        flex: Whether the mask is a rule and no matrix.
    """
    config = language.config
    embeds = torch.empty(1, length, config.hidden_size, device="meta", dtype=language.dtype, requires_grad=True)
    positions = torch.empty(3, 1, length, dtype=torch.long, device="meta")
    mask = torch.empty(1, 1, length, length, dtype=torch.bool, device="meta") if tree and not flex else None

    def forward() -> Tensor:
        return language(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state

    kept = rows * saved_bytes(forward, language)
    one_layer = kept // config.num_hidden_layers
    state = rows * length * config.hidden_size * embeds.element_size()
    if checkpointing:
        kept = config.num_hidden_layers * state + one_layer
    # the mask as a rule and as a bias; gradients of the widest buffers of a layer
    masks = rows * length**2 * (1 + embeds.element_size()) if mask is not None else 0
    widest = 3 * rows * length * config.intermediate_size * embeds.element_size()
    return kept + masks + widest


def computing(language: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a language model on the meta device that computes in ``dtype`` throughout, as under autocast."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(KEEPING, _attention)
    AttentionMaskInterface.register(KEEPING, sdpa_mask)
    copied = copy.deepcopy(language).to(dtype)
    copied.set_attn_implementation(KEEPING)
    return copied


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Keeps what fused kernels keep; what torch computes on the meta device would keep all attention weights."""
    if mask is not None:  # sdpa then repeats the keys and values that several heads share
        key, value = (t.repeat_interleave(module.num_key_value_groups, dim=1) for t in (key, value))
    return _Attention.apply(query, key, value).transpose(1, 2).contiguous(), None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        sums = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        raise AssertionError("only what is kept for backward is counted")
