"""The model of a dry run, on the meta device, where tensors have shapes and no memory; and the memory a step takes.

One row of the true size passes through the language model, and what autograd saves for the backward pass is summed. The
vision tower must be frozen, so that it saves nothing: most towers cannot run without values. The driver and the
allocator take often one to two GiB more.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from muco.backbone import meta_backbone
from muco.data.source import Data
from muco.errors import CheckpointError
from muco.processor import Processor, load_processor
from muco.starter import located
from muco.template import SPECIAL_TOKENS
from muco.tiny import stand_in_processor
from muco.training.build import build_model, check_kept, model_config, prepare_for_training, texts_of
from muco.training.published import PUBLISHED
from muco.training.recipe import Recipe
from muco.vision import vision_parameters


def meta_model(recipe: Recipe, sources: Sequence[Data], notes: list[str]) -> tuple[nn.Module, Processor]:
    """The backbone with adapters and frozen parts, and a processor; the notes name each stand-in."""
    if recipe.model.tiny:
        model = build_model(recipe, sources)
        return model.encoder.model.to("meta"), model.encoder.muco_processor
    path = located(recipe.model.path)
    config = model_config(path)
    try:  # the paper's models without a download
        processor, _ = load_processor(path, config, local_files_only=path in PUBLISHED)
    except CheckpointError:
        if path not in PUBLISHED:
            raise
        stand_in = "sizes as published; texts are counted with a tokenizer made from them"
        notes.append(f"{path} is not in the local cache: {stand_in}")
        processor = stand_in_processor(texts_of(sources), config)
    wanted = config.dtype if recipe.model.dtype == "auto" else getattr(torch, recipe.model.dtype)
    model = meta_backbone(config, wanted or torch.float32)
    if recipe.model.min_pixels or recipe.model.max_pixels:
        processor.set_pixels(recipe.model.min_pixels, recipe.model.max_pixels)
    with torch.device("meta"):
        model = prepare_for_training(model, recipe.model, range(len(SPECIAL_TOKENS)))
    check_kept(recipe, model)
    return model, processor


def model_facts(model: nn.Module, recipe: Recipe) -> dict[str, Any]:
    """Numbers of parameters, by part, trained and frozen."""
    parts = dict.fromkeys(("vision", "language", "adapters", "token embeddings"), 0)
    beside = {id(parameter) for parameter in vision_parameters(model)}
    for name, parameter in model.named_parameters():
        parts["vision" if id(parameter) in beside else _part_of(name)] += parameter.numel()
    trained, whole = sum(p.numel() for p in model.parameters() if p.requires_grad), sum(parts.values())
    return {
        "path": recipe.model.path or "tiny, made from its config",
        "family": model.config.model_type,
        "parameters": whole,
        "trained": trained,
        "frozen": whole - trained,
        "parts": {name: count for name, count in parts.items() if count},
    }


def _part_of(name: str) -> str:
    """The part of the language model that a parameter belongs to."""
    if "lora_" in name:
        return "adapters"
    if "trainable_tokens" in name:
        return "token embeddings"
    return "language"


def activation_bytes(backbone: nn.Module, tokens: int, dtype: torch.dtype, *, masked: bool, checkpointing: bool) -> int:
    """Bytes that one row needs in the language model until its backward pass is done.

    Args:
        backbone: On the meta device.
        tokens: Of the row, visual ones included.
        dtype: In which it computes.
        masked: Whether the mask of isolated turns is passed as a matrix.
        checkpointing: Whether a layer keeps only its input and is computed again in backward.
    """
    language = copy.deepcopy(backbone.get_decoder()).to(dtype)
    config = language.config
    embeds = torch.empty(1, tokens, config.hidden_size, device="meta", dtype=dtype, requires_grad=True)
    # of four dimensions, so that every family takes it as it is and looks at no value
    mask = torch.empty(1, 1, tokens, tokens, dtype=torch.bool, device="meta")
    # A storage is one Python object as long as someone holds it; on the meta device it has no address.
    weights = [parameter.untyped_storage() for parameter in language.parameters()]
    own = {id(storage) for storage in weights}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in own:
            saved[id(storage)] = storage
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, _FusedAttention(None if masked else config.num_key_value_heads):
        language(inputs_embeds=embeds, attention_mask=mask, use_cache=False)
    sizes = [storage.nbytes() for storage in saved.values()]
    kept, layers = sum(sizes), config.num_hidden_layers
    if checkpointing:
        kept = layers * embeds.nbytes + kept // layers
    # the mask as a rule and as a bias; gradients of the widest buffers of a layer
    masks = tokens**2 * (1 + embeds.element_size()) if masked else 0
    return kept + masks + 3 * max(sizes)


def held_bytes(backbone: nn.Module, dtype: torch.dtype, *, shards: int) -> dict[str, int]:
    """Bytes of ``weights``, ``gradients`` and ``optimizer`` (AdamW's two moments) that a device holds.

    Args:
        backbone: On the meta device, as it is trained, with a frozen vision tower.
        dtype: In which it computes: autocast keeps copies of weights that are held in another precision.
        shards: Devices over which all but the vision tower is spread.
    """
    weights = sum(p.nbytes for p in backbone.parameters())
    trained = sum(p.nbytes for p in backbone.parameters() if p.requires_grad)
    vision = sum(parameter.nbytes for parameter in vision_parameters(backbone))
    language = backbone.get_decoder()
    if dtype != language.dtype:
        weights += sum(parameter.numel() for parameter in language.parameters()) * dtype.itemsize
    return {
        "weights": (weights - vision) // shards + vision,
        "gradients": trained // shards,
        "optimizer": 2 * trained // shards,
    }


class _FusedAttention(TorchFunctionMode):
    """Saves of attention what fused kernels save; on the meta device torch would save every score."""

    def __init__(self, kv_heads: int | None) -> None:
        super().__init__()
        self.kv_heads = kv_heads  # to save; None: all that are passed, which with a mask are repeated for all heads

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        query, key, value = args[:3]
        if self.kv_heads is not None:
            key, value = key[:, : self.kv_heads].clone(), value[:, : self.kv_heads].clone()
        return _Attention.apply(query, key, value)


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
