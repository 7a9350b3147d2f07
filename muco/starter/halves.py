"""Reads the two halves of the starter: a language model from GGUF, and EfficientNet-Lite0 from a torch file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, EfficientNetConfig, EfficientNetModel

from muco.errors import CheckpointError

# EfficientNet-Lite0: B0 without squeeze-and-excitation, with relu6, and with images of 224 × 224 pixels.
SIDE, MEAN, DEVIATION = 224, 127.0, 128.0  # pixels; grey levels of 0 to 255 are (x - mean) / deviation
CELL = 32  # pixels of an image per visual token, in each direction
OPEN_GATE = 30.0  # sigmoid(30) is 1 in float32: squeeze-and-excitation that leaves everything as it is

# The names of the published weights -> those of transformers; the second list is within a block.
NAMES = {
    "_conv_stem.weight": "embeddings.convolution.weight",
    "_bn0.": "embeddings.batchnorm.",
    "_conv_head.weight": "encoder.top_conv.weight",
    "_bn1.": "encoder.top_bn.",
}
BLOCK_NAMES = {
    "_expand_conv.weight": "expansion.expand_conv.weight",
    "_bn0.": "expansion.expand_bn.",
    "_depthwise_conv.weight": "depthwise_conv.depthwise_conv.weight",
    "_bn1.": "depthwise_conv.depthwise_norm.",
    "_project_conv.weight": "projection.project_conv.weight",
    "_bn2.": "projection.project_bn.",
}
CLASSIFIER = "_fc."


def language_half(file: Path, layers: int | None = None) -> tuple[nn.Module, Any]:
    """A causal language model and its tokenizer from a GGUF file.

    Args:
        layers: Keep the first so many layers; None: all.
    Returns:
        The model in float32, which the quantised weights are expanded to, and the tokenizer.
    Raises:
        CheckpointError: If the package ``gguf`` is missing, or the model has fewer layers.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    except ImportError as error:
        raise CheckpointError("the language model is a GGUF file; install its reader: pip install gguf") from error
    del model.config.quantization_config  # the weights are plain now
    model.config._name_or_path = tokenizer.name_or_path = ""  # it would be a folder of this machine
    there = model.config.num_hidden_layers
    if layers is not None:
        if not 1 <= layers <= there:
            raise CheckpointError(f"layers: the language model has {there}, so 1 to {there} can be kept, not {layers}")
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
    return model, tokenizer


def vision_half(file: Path) -> tuple[EfficientNetModel, dict[str, Tensor]]:
    """The tower with its published weights, and the classifier on top of it: ``weight`` [1000, 1280], ``bias`` [1000].

    Raises:
        CheckpointError: If the weights are not those of EfficientNet-Lite0.
    """
    config = EfficientNetConfig(
        image_size=SIDE,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_dim=1280,
        hidden_size=1280,  # under this name FastVLM's connector asks for it
        hidden_act="relu6",
        drop_connect_rate=0.0,
    )
    tower = EfficientNetModel(config).eval()
    published = torch.load(file, map_location="cpu", weights_only=True)
    weights = {new: published[name] for name in published if (new := _renamed(name))}
    missing, unexpected = tower.load_state_dict(weights, strict=False)
    gates = {name for name in missing if ".squeeze_excite." in name}
    if unexpected or {*missing} - gates or not gates:
        raise CheckpointError(f"{file} does not hold the weights of EfficientNet-Lite0")
    with torch.no_grad():
        for name, weight in tower.named_parameters():
            if name in gates:
                weight.fill_(OPEN_GATE if name.endswith("expand.bias") else 0.0)
    return tower, {name: published[CLASSIFIER + name] for name in ("weight", "bias")}


def _renamed(name: str) -> str | None:
    """The name of a published weight in transformers; None for the classifier's."""
    block = re.match(r"_blocks\.(\d+)\.(.*)", name)
    for old, new in (BLOCK_NAMES if block else NAMES).items():
        own = block[2] if block else name
        if own.startswith(old):
            return (f"encoder.blocks.{block[1]}." if block else "") + new + own.removeprefix(old)
    return None if name.startswith(CLASSIFIER) else name  # one that is not known is unexpected
