"""Prepares a Hugging Face image-text-to-text model for MuCo: weights loaded strictly, the language-model head dropped,
two tokens added, the vision tower frozen or not, adapters (LoRA, DoRA) on the language model's linear layers.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForImageTextToText,
    PreTrainedModel,
)
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.masking_utils import flex_attention_mask
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from muco.base.text import first_line
from muco.dialogue import Video
from muco.errors import CheckpointError
from muco.layout import rotary_positions
from muco.processor import Processor, load_processor
from muco.sizes import Adapter
from muco.starter import located
from muco.stock import small_picture
from muco.template import EMB
from muco.vision import base_model, lay_out_convolutions, vision_modules, vision_parameters

log = logging.getLogger(__name__)
# Of the language model: "eager" would add the boolean mask of isolated turns, not apply it. Towers have what they can.
ATTENTION = {"text_config": "sdpa"}
FLEX = "muco_flex"  # the name under which FlexAttention is registered


def load_backbone(
    path: str | Path, *, dtype: str = "auto", local_files_only: bool = False
) -> tuple[nn.Module, Processor]:
    """Loads a model by path, by hub id or as "starter", and its processor; both know ``<|emb|>`` and ``<|mask|>`` then.

    The checkpoint is read through its image-text-to-text class, whose inner model is kept: reading it with
    ``AutoModel`` would leave the vision tower of some checkpoints randomly initialised.

    Args:
        dtype: "auto" (as saved), "float32", "bfloat16" or "float16".
        local_files_only: Never ask the hub.
    Returns:
        The model (without language-model head, in eval mode) and its processor.
    Raises:
        CheckpointError: If the path holds no model, the model does not take images, or weights are missing,
            unexpected or of another shape; the message names them.
    """
    source = located(path)
    if (Path(source) / "trainer_state.json").is_file():
        raise CheckpointError(f"{source} is a checkpoint of a run, not a model; make one by `muco export {source}`")
    if (Path(source) / "model" / "config.json").is_file() and not (Path(source) / "config.json").is_file():
        raise CheckpointError(f"{source} is the folder of a run; its model is {Path(source) / 'model'}")
    if (Path(source) / "adapter" / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{source}: MuCo does not add adapters from a folder; use `muco export --adapters merged`"
        )
    try:
        config = AutoConfig.from_pretrained(source, local_files_only=local_files_only)
        _check_config(source, config)
        with _without_load_report():
            wrapper, info = AutoModelForImageTextToText.from_pretrained(
                source,
                dtype=dtype,
                attn_implementation=ATTENTION,
                output_loading_info=True,
                local_files_only=local_files_only,
                use_safetensors=True,  # pickled weights can run code
                ignore_mismatched_sizes=True,  # they are reported by name below
            )
    except CheckpointError:
        raise
    except (ImportError, OSError, ValueError, SafetensorError) as error:
        why = first_line(error)
        if not isinstance(error, ImportError) and not Path(source).exists():
            local = str(source).startswith(("/", ".", "~"))
            why = "no such folder" if local else f"no such folder, and from the hub: {why}"
        raise CheckpointError(f"cannot load a model from {source!r}: {why}") from error
    _check_loaded(source, info)
    _check_attention(source, wrapper.model.get_decoder())
    processor, added = load_processor(source, config, local_files_only=local_files_only)
    model = wrapper.model
    tokens, rows = len(processor.tokenizer), model.get_input_embeddings().num_embeddings
    if added and tokens > rows:  # never shrinks: families pad their vocabulary, and new tokens often fit in there
        with torch.random.fork_rng(devices=[]):  # loading twice, or on two processes, gives the same new rows
            torch.manual_seed(0)
            model.resize_token_embeddings(tokens, mean_resizing=False)
    elif tokens > rows:
        raise CheckpointError(f"the tokenizer of {source!r} has {tokens} tokens and the model embeds only {rows}")
    if added:
        start_reading(model, processor)
    _check_positions(source, model, processor)
    lay_out_convolutions(model)
    return model.eval(), processor


def start_reading(model: nn.Module, processor: Processor) -> None:
    """``<|emb|>`` starts as the token that ends a text, whose state sums it up; a random one would have to learn to."""
    embeddings, end = model.get_input_embeddings().weight, processor.tokenizer.eos_token_id
    if end is not None:
        with torch.no_grad():
            embeddings[processor.tokenizer.convert_tokens_to_ids(EMB)] = embeddings[end]


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Keeps transformers from advising to train missing weights; here they are an error."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _check_config(source: str, config: Any) -> None:
    kind = config.model_type
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise CheckpointError(
            f"{source!r} is a {kind} model; MuCo needs one that reads images and text (image-text-to-text)"
        )


def _check_attention(source: str, decoder: nn.Module) -> None:
    """Refuses a language model that would add the mask of isolated turns, which is true and false, to its scores."""
    kind = decoder.config._attn_implementation
    if kind != ATTENTION["text_config"]:
        raise CheckpointError(f"{source!r}: its language model computes attention as {kind!r}; MuCo needs sdpa")


def _check_positions(source: str, model: nn.Module, processor: Processor) -> None:
    """Refuses a model whose multimodal rotary positions are not ours, by text around an image."""
    if not processor.family.rotary:
        return
    image = processor.encode_image(small_picture())
    text = [processor.read_id] * 3
    ids = torch.tensor([[*text, *image.ids, *text]])
    kinds = (ids == processor.family.image_id).long()
    grid = image.tensors.get("image_grid_thw")
    own, _ = model.get_rope_index(input_ids=ids, mm_token_type_ids=kinds, image_grid_thw=grid)
    expected = rotary_positions([len(text), *image.segments, len(text)])
    if grid is None or not np.array_equal(own[:, 0].numpy(), expected):
        kind = model.config.model_type
        raise CheckpointError(f"{source!r} is a {kind} model, whose multimodal rotary positions MuCo does not know")
    if processor.family.video and not _knows_videos(model, processor):
        processor.family = replace(processor.family, video=None)  # its frames are then read as images


def _knows_videos(model: nn.Module, processor: Processor) -> bool:
    """Whether positions around a video of two steps of time are the model's own."""
    form, text = processor.family.video, [processor.read_id] * 3
    video = processor.encode_image(Video((small_picture(),) * 2 * form.joined_frames, fps=1.0))
    ids = torch.tensor([[*text, *video.ids, *text]])
    kinds = torch.where(ids == processor.family.image_id, 2, 0)
    named = {"video_grid_thw": video.tensors["image_grid_thw"]}
    if form.tokens_per_second:
        named["second_per_grid_ts"] = torch.tensor([float(form.joined_frames)])
    try:
        own, _ = model.get_rope_index(input_ids=ids, mm_token_type_ids=kinds, **named)
    except (RuntimeError, StopIteration):  # it expects other steps of time than its processor writes
        return False
    return np.array_equal(own[:, 0].numpy(), rotary_positions([len(text), *video.segments, len(text)]))


def _check_loaded(source: str, info: Any) -> None:
    missing = sorted({*info["missing_keys"]} - {"lm_head.weight"})  # unused: an embedding is a hidden state
    unexpected = sorted(info["unexpected_keys"])
    mismatched = sorted(
        f"{key} {tuple(saved)} instead of {tuple(expected)}" for key, saved, expected in info["mismatched_keys"]
    )
    for what, keys in (("lacks", missing), ("has unexpected", unexpected), ("has wrongly shaped", mismatched)):
        if keys:
            shown = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            raise CheckpointError(f"the checkpoint {source!r} {what} weights: {shown}; the checkpoint is incomplete")


def meta_backbone(config: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of a configuration on the meta device, where tensors have shapes and no memory."""
    own = copy.deepcopy(config)  # it remembers the precision
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(own, dtype=dtype, attn_implementation=ATTENTION).model


def freeze_vision(model: nn.Module, *, vision: bool = True, connector: bool = True) -> None:
    """Freezes the vision tower, the connector, or both (all that is beside the language model).

    Raises:
        CheckpointError: If one of the two is to be trained alone, and the model has no part that can be told as its
            connector.
    """
    bridges = {id(p) for module in connectors(model).values() for p in module.parameters()}
    if vision != connector and not bridges:
        raise CheckpointError(f"{type(model).__name__} has no connector apart from its vision tower")
    for parameter in vision_parameters(model):
        if connector if id(parameter) in bridges else vision:
            parameter.requires_grad_(False)


def connectors(model: nn.Module) -> dict[str, nn.Module]:
    """The parts that turn what the vision tower sees into vectors as wide as the language model's, by name.

    They are beside the tower, or inside it, behind its layers.
    """
    width = base_model(model).get_decoder().config.hidden_size
    found: dict[str, nn.Module] = {}
    for name, module in vision_modules(model).items():
        if not isinstance(module, PreTrainedModel):
            found[name] = module
            continue
        children = list(module.named_children())
        lists = (number for number, (_, child) in enumerate(children) if isinstance(child, nn.ModuleList))
        layers = next(lists, len(children))
        for own, child in children[layers + 1 :]:
            if any(_width(part) == width for part in child.modules()):
                found[f"{name}.{own}"] = child
    return found


def _width(module: nn.Module) -> int | None:
    """The length of the vectors that a linear layer or a convolution makes."""
    return getattr(module, "out_features", None) or getattr(module, "out_channels", None)


def use_flex_attention(model: nn.Module) -> None:
    """Lets the language model attend by FlexAttention; the vision tower keeps its own attention.

    transformers offers it to some families only, but its function fits all that use its registry; hence a second name.
    """
    # Shapes, gradients and masks make more variants of the kernel than torch compiles as a rule; beyond that number it
    # would compute without a kernel.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    AttentionInterface.register(FLEX, flex_attention_forward)
    AttentionMaskInterface.register(FLEX, flex_attention_mask)
    model.set_attn_implementation({"text_config": FLEX})


def add_adapters(
    model: nn.Module, adapter: Adapter, token_ids: Sequence[int], beside: Sequence[nn.Parameter] = ()
) -> nn.Module:
    """Wraps a model with adapters; everything else is frozen but the embeddings of ``token_ids`` and ``beside``.

    Returns:
        The PEFT model, called like the model itself; ``merge_adapters`` undoes the wrapping.
    """
    from peft import LoraConfig, get_peft_model

    matrix = model.get_input_embeddings()
    embeddings = next(name for name, module in model.named_modules() if module is matrix)
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        use_dora=adapter.kind == "dora",
        target_modules=language_linears(model),
        trainable_token_indices={embeddings: list(token_ids)},
    )
    with warnings.catch_warnings():  # PEFT 0.21 asks transformers by a name that is on its way out
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        adapted = get_peft_model(model, config)
    for parameter in beside:
        parameter.requires_grad_(True)
    if unreached := _stacked(model):
        shown = ", ".join(unreached[:2]) + (" and more" if len(unreached) > 2 else "")
        log.warning("adapters do not reach the experts of this model, which are not linear layers: %s", shown)
    return adapted


def _stacked(model: nn.Module) -> list[str]:
    """Weights of the language model in which several matrices are stacked: the experts of a mixture."""
    own = model.get_decoder().named_modules()
    modules = [(name, module) for name, module in own if not isinstance(module, nn.modules.conv._ConvNd)]
    return [f"{name}.{key}" for name, m in modules for key, p in m.named_parameters(recurse=False) if p.ndim == 3]


def hold_trained_in_float32(model: nn.Module) -> None:
    """Casts trained weights to float32, in place; frozen ones keep their precision.

    In half precision an update smaller than the last bit of its weight is lost: every second one, at usual learning
    rates. Without adapters, frozen float16 is cast too: a CPU does not mix it with the bfloat16 of autocast.
    """
    whole = not hasattr(model, "peft_config")
    for parameter in model.parameters():
        if parameter.requires_grad or (whole and parameter.dtype == torch.float16):
            parameter.data = parameter.data.float()


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts all weights in place; not the buffers: rotary frequencies stay float32, as when loaded."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def merge_adapters(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """The plain model with adapters and trained token embeddings folded into its weights (in place).

    They are folded in float32 and rounded once, so that small changes are not lost. Afterwards all weights have this
    ``dtype``; each keeps its own if None.
    """
    if hasattr(model, "peft_config"):
        from peft.tuners.tuners_utils import BaseTunerLayer

        # one layer at a time, because a device may not hold the whole model in float32
        for layer in [module for module in model.modules() if isinstance(module, BaseTunerLayer)]:
            weight_dtype = layer.get_base_layer().weight.dtype
            layer.float().merge()
            layer.get_base_layer().to(dtype or weight_dtype)
        model = model.unload()
    if dtype is not None:
        cast_weights(model, dtype)
    return model


def language_linears(model: nn.Module) -> list[str]:
    """Names of the linear layers of the language model."""
    own = {*model.get_decoder().modules()}
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module in own]
