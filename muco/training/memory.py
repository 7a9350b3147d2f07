"""How much of a device's memory a training step takes, estimated on the meta device for any family of models.

Nothing is allocated. One row of the true size passes its shapes through the language model, and what autograd saves of
it for the backward pass is added up. The vision tower must be frozen: it keeps nothing for a backward pass, and most
towers cannot run without values. Not counted is what the driver and the allocator take for themselves, often one to
two GiB.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from muco.training.meta_model import part_of


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


def saved_sizes(forward: Callable[[], Any], model: nn.Module) -> list[int]:
    """Bytes of each storage that autograd saves of a forward pass, each counted once, without the model's weights."""
    # A storage is one Python object as long as someone holds it; on the meta device it has no address.
    weights = [parameter.untyped_storage() for parameter in model.parameters()]
    own = {id(storage) for storage in weights}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in own:
            saved[id(storage)] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
        del result
    return [storage.nbytes() for storage in saved.values()]


def activation_bytes(language: nn.Module, tokens: int, *, masked: bool, checkpointing: bool) -> int:
    """Bytes that one row needs in a language model until its backward pass is done.

    Args:
        language: On the meta device, in the dtype in which it computes.
        masked: Whether the mask of isolated turns is passed as a matrix.
        checkpointing: Whether a layer keeps only its input and is computed again in backward.
    """
    config = language.config
    embeds = torch.empty(1, tokens, config.hidden_size, device="meta", dtype=language.dtype, requires_grad=True)
    # of four dimensions, so that every family takes it as it is and looks at no value
    mask = torch.empty(1, 1, tokens, tokens, dtype=torch.bool, device="meta")
    with _FusedAttention(None if masked else config.num_key_value_heads):
        sizes = saved_sizes(lambda: language(inputs_embeds=embeds, attention_mask=mask, use_cache=False), language)
    kept, layers = sum(sizes), config.num_hidden_layers
    if checkpointing:
        kept = layers * embeds.nbytes + kept // layers
    # the mask as a rule and as a bias; gradients of the widest buffers of a layer
    masks = tokens**2 * (1 + embeds.element_size()) if masked else 0
    return kept + masks + 3 * max(sizes)


def step_memory(
    model: nn.Module,
    computes_in: torch.dtype,
    *,
    shards: int,
    activations: int,
    visual_tokens: int,
    feature_bytes: int,
    turns: int,
) -> Memory:
    """The memory of a step of a model with a frozen vision tower.

    Args:
        model: The backbone on the meta device, as it is trained.
        computes_in: With autocast another precision than that of the weights.
        shards: Devices over which weights, gradients and optimizer state are spread; the vision tower is not.
        activations: Bytes, from :func:`activation_bytes`.
        visual_tokens: Of all samples that a device sees in a step.
        feature_bytes: The most that features of images may take on the device.
        turns: Of a step, over all devices.
    """
    weights = trained = vision = 0
    for name, parameter in model.named_parameters():
        weights += parameter.nbytes
        trained += parameter.nbytes if parameter.requires_grad else 0
        vision += parameter.nbytes if part_of(name) == "vision" else 0
    language = model.get_decoder()
    if computes_in != language.dtype:
        weights += sum(parameter.numel() for parameter in language.parameters()) * computes_in.itemsize
    width = language.config.hidden_size
    return Memory(
        weights=(weights - vision) // shards + vision,
        gradients=trained // shards,
        optimizer=2 * trained // shards,
        activations=activations,
        features=min(visual_tokens * width * computes_in.itemsize, feature_bytes),
        loss=2 * 4 * turns * width * 4 + min(turns**2 * 4, 1 << 28) * 3,
    )


def in_dtype(language: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a model on the meta device that computes in ``dtype`` throughout, as under autocast."""
    return copy.deepcopy(language).to(dtype)


class _FusedAttention(TorchFunctionMode):
    """Saves of attention what fused kernels save; on the meta device torch would save every score.

    Args:
        kv_heads: Heads of the keys and values that are saved; None saves those that are passed, which with a mask are
            repeated for all heads.
    """

    def __init__(self, kv_heads: int | None) -> None:
        super().__init__()
        self.kv_heads = kv_heads

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is scaled_dot_product_attention:
            query, *both = args[:3]
            if self.kv_heads is not None:
                both = [tensor[:, : self.kv_heads].clone() for tensor in both]
            return _Attention.apply(query, *both)
        return function(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        raise AssertionError("only what is saved for backward is counted")
