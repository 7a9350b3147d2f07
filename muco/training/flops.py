"""Floating-point operations of a training step: counted on a real batch, or on the meta device for the true sizes.

torch's FlopCounterMode counts multiplications and additions of matrix products (2 m n k for [m, n] x [n, k]),
convolutions and attention; not norms, activations, softmax or the optimizer. Attention counts as two full products,
whatever its mask hides. Backward is twice forward where inputs and weights need a gradient, once where the weights are
frozen. Kernels that recompute scores in backward count as if they kept them. So one number holds on every device.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2VLConfig

from muco.backbone import add_adapters, meta_backbone
from muco.info_nce import multi_turn_info_nce
from muco.loss import MultiTurnLoss, ReconstructionLoss
from muco.model import Model
from muco.sizes import Adapter
from muco.vision import vision_modules


@dataclass(frozen=True)
class Flops:
    """Operations of one step: forward through the vision tower, the rest of forward, and backward through both."""

    vision: int
    language: int
    backward: int

    @property
    def total(self) -> int:
        return self.vision + self.language + self.backward

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.vision + other.vision, self.language + other.language, self.backward + other.backward)

    def __mul__(self, times: int) -> Flops:
        return Flops(self.vision * times, self.language * times, self.backward * times)


def _attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    # shapes [rows, heads, tokens, dim]: scores are [queries, keys] per head, then their product with the values
    rows, heads, queries, dim = query
    return 2 * rows * heads * queries * key[2] * (dim + value[3])


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * _attention(query, key, value)


# torch has no formula for the CPU kernel and counts its attention as nothing; for the CUDA kernels it adds the
# recomputation of the scores in backward, which the meta device (plain products) does not.
_ATTENTION = {
    getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}{suffix}"): formula
    for kernel in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
    for suffix, formula in (("", _attention), ("_backward", _attention_backward))
}


def count_flops(
    forward: Callable[[], Tensor], vision: Collection[str] = ("visual",), *, backward: bool = True
) -> Flops:
    """Calls ``forward``, differentiates the scalar it returns if asked, and counts both.

    What happens inside the modules that are named so is ``vision``.
    """
    with torch.set_grad_enabled(backward), _counter() as ahead:
        value = forward()
    with _counter() as back:
        if backward:
            value.backward()
    seeing = 0
    for name, counts in ahead.get_flop_counts().items():
        *above, own = name.split(".")
        if own in vision and not {*vision} & {*above}:
            seeing += sum(counts.values())
    return Flops(seeing, ahead.get_total_flops() - seeing, back.get_total_flops())


def _counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, depth=None, custom_mapping=_ATTENTION)


def step_flops(model: Model, batch: Mapping[str, Any], *, backward: bool = True, temperature: float = 0.02) -> Flops:
    """Counts one training step: query forward, target forward, loss and, if asked, backward.

    Args:
        model: The step is really made and leaves its gradients in the parameters.
        batch: From :func:`muco.training.prepared.batch_of`, on the model's device.
    """
    pairs = len(batch["query"]["turn_rows"]) > len(batch["ids"])  # two vectors each: reconstruction
    loss = (ReconstructionLoss if pairs else MultiTurnLoss)(model, temperature=temperature)
    _ = model.encoder.form  # learnt before anything is counted
    sides, vision = [dict(batch["query"]), dict(batch["target"])], [*vision_modules(model.encoder.model)]
    return count_flops(lambda: loss(sides, batch["ids"]), vision, backward=backward)


# Tokens of QWEN_VL's prompt under the true tokenizer, outside the turns: the system text and the user's role, and for
# an image <|vision_start|>, <|vision_end|> and a newline.
PROMPT_TOKENS = 14
IMAGE_MARKS = 3


def meta_step_flops(
    config: Qwen2VLConfig,
    *,
    images: int,
    turns: int,
    visual_tokens: int = 782,
    query_tokens: int = 30,
    target_tokens: int = 20,
    backward: bool = True,
    vision_backward: bool = False,
    adapter: Adapter | None = None,
) -> Flops:
    """Counts a training step of a Qwen2-VL of any size without its weights, on the meta device; turns of either mode.

    One image's two dialogues are counted with one layer and with two, for every further layer costs the same, and
    multiplied by ``images``; the loss is counted for all of them at once.

    Args:
        visual_tokens: Per image, of ``spatial_merge_size`` squared patches each; 0 for samples without an image.
        query_tokens, target_tokens: What one more turn adds to either sequence, its share of the prompt included.
        backward: False counts the forward passes alone.
        vision_backward: Whether the vision tower is trained.
        adapter: Low-rank adapters on a frozen language model; None trains all of its weights. DoRA's weight norms,
            which do not grow with the batch, would be multiplied by ``images``, so only "lora" is accepted.
    Raises:
        ValueError: If a number is not positive or the adapter not LoRA.
    """
    if min(images, turns, query_tokens, target_tokens) < 1 or visual_tokens < 0:
        raise ValueError("images, turns and tokens must be positive")
    if adapter is not None and adapter.kind != "lora":
        raise ValueError("only LoRA adapters can be counted for one image and multiplied")

    def one_image(vision_depth: int, layers: int) -> Flops:
        model = _MetaModel(_cut(config, vision_depth, layers), adapter, vision_backward)
        sides = ((visual_tokens, query_tokens), (0, target_tokens))

        def forward() -> Tensor:
            hidden = [model(visual, turns * tokens) for visual, tokens in sides]
            return sum(states[0, -turns:].sum() for states in hidden)

        return count_flops(forward, backward=backward)

    def loss() -> Tensor:
        shape = (images * turns, config.text_config.hidden_size)
        query, target = (torch.empty(shape, device="meta", requires_grad=True) for _ in range(2))
        return multi_turn_info_nce(query, target, torch.empty(shape[0], dtype=torch.long, device="meta"))

    blocks, layers = config.vision_config.depth - 1, config.text_config.num_hidden_layers - 1  # besides the first
    one = one_image(1, 1) * (1 - blocks - layers) + one_image(2, 1) * blocks + one_image(1, 2) * layers
    return one * images + count_flops(loss, backward=backward)


def _cut(config: Qwen2VLConfig, vision_depth: int, layers: int) -> Qwen2VLConfig:
    """The same model with fewer layers."""
    cut = copy.deepcopy(config)
    cut.vision_config.depth, cut.text_config.num_hidden_layers = vision_depth, layers
    cut.text_config.layer_types = (cut.text_config.layer_types * layers)[:layers]  # the config may have fewer layers
    return cut


class _MetaModel(nn.Module):
    """The two halves of a Qwen2-VL, joined without looking at values, of which meta tensors have none."""

    def __init__(self, config: Qwen2VLConfig, adapter: Adapter | None, vision_backward: bool) -> None:
        super().__init__()
        model = meta_backbone(config)
        self.visual, self.language = model.visual, model.language_model
        if adapter is not None:
            with torch.device("meta"):
                add_adapters(model, adapter, [0, 1])
        self.visual.requires_grad_(vision_backward)

    def forward(self, visual_tokens: int, turn_tokens: int) -> Tensor:
        text = PROMPT_TOKENS + turn_tokens + (IMAGE_MARKS if visual_tokens else 0)
        embeds = [self.language.embed_tokens(torch.empty(text, dtype=torch.long, device="meta"))]
        if visual_tokens:
            embeds.append(self._see(visual_tokens))
        sequence = torch.cat(embeds)[None]  # [1, L, D], in any order: every token costs the same
        ids = torch.empty(sequence.shape[:2], dtype=torch.long, device="meta")
        positions = ids.expand(3, -1, -1)
        output = self.language(inputs_embeds=sequence, position_ids=positions, use_cache=False)
        return output.last_hidden_state

    def _see(self, visual_tokens: int) -> Tensor:
        config = self.visual.config
        patches = visual_tokens * config.spatial_merge_size**2
        pixels = config.in_channels * config.temporal_patch_size * config.patch_size**2
        # positions and lengths are given, because the tower would read them off the grid's values
        return self.visual(
            torch.empty(patches, pixels, device="meta"),
            grid_thw=None,
            position_ids=torch.empty(patches, 2, dtype=torch.long, device="meta"),
            cu_seqlens=torch.tensor([0, patches]),
        ).pooler_output
