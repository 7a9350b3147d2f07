"""Reads the two halves of the starter: a language model from GGUF, and EfficientNet-Lite0 from a torch file."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
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
CLASSIFIER = {"_fc.weight": (1000, 1280), "_fc.bias": (1000,)}  # not part of the tower


def language_half(file: Path, layers: int | None = None) -> tuple[nn.Module, Any]:
    """A causal language model and its tokenizer from a GGUF file.

    Args:
        layers: Number of layers to keep, from the first on; None: all.
    Returns:
        The model in float32, which the quantised weights are expanded to, and the tokenizer.
    Raises:
        CheckpointError: If the model has fewer layers.
    """
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
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
    published = _published(file)
    weights = {_renamed(name): weight for name, weight in published.items()}
    gates = {name for name in tower.state_dict() if ".squeeze_excite." in name}
    wanted = {name: tuple(weight.shape) for name, weight in tower.state_dict().items() if name not in gates}
    if {name: tuple(weight.shape) for name, weight in weights.items()} != wanted | CLASSIFIER:
        raise CheckpointError(f"{file} does not hold the weights of EfficientNet-Lite0")
    tower.load_state_dict(weights, strict=False)  # without the gates, and with the classifier, which it has not
    with torch.no_grad():
        for name, weight in tower.named_parameters():
            if name in gates:
                weight.fill_(OPEN_GATE if name.endswith("expand.bias") else 0.0)
    return tower, {name.removeprefix("_fc."): published[name] for name in CLASSIFIER}


def class_names(file: Path) -> list[str]:
    """The names of the classifier's classes, from a JSON list; a CheckpointError if the file holds something else."""
    classes = CLASSIFIER["_fc.bias"][0]
    try:
        names = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # also where the file is not UTF-8
        raise CheckpointError(f"{file} is not a JSON list of {classes} names") from error
    if not isinstance(names, list) or len(names) != classes or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{file} is not a JSON list of {classes} names")
    return names


def _published(file: Path) -> Mapping[str, Tensor]:
    """The tensors of a torch file by their names; code that it may hold is not run."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{file} does not hold weights and nothing else, or is cut") from error
    kinds = {(type(name), type(value)) for name, value in found.items()} if isinstance(found, Mapping) else set()
    if kinds != {(str, Tensor)}:
        raise CheckpointError(f"{file} does not hold tensors by their names")
    return found


def _renamed(name: str) -> str:
    """The name of a published weight in transformers; the same if there is none."""
    block = re.match(r"_blocks\.(\d+)\.(.*)", name)
    for old, new in (BLOCK_NAMES if block else NAMES).items():
        own = block[2] if block else name
        if own.startswith(old):
            return (f"encoder.blocks.{block[1]}." if block else "") + new + own.removeprefix(old)
    return name
