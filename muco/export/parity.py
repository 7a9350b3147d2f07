"""Checks that plain transformers reproduces a model's vectors from an exported folder.

The folder is read by plain transformers: its chat template makes the prompt, its image processor the pixels, its own
code the positions and masks, and the hidden state of the last token is the vector. No missing or unexpected weight is
forgiven.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from muco.errors import CheckpointError
from muco.template import EMB, QWEN_MODEL_TYPES

# smallest cosine and largest difference of a coordinate of unit vectors that count as the same. Both sides compute in
# this precision, so what differs is the order of sums; adapters that are folded in are also rounded.
TOLERANCES = {"float32": (0.999999, 1e-4), "bfloat16": (0.999, 3e-2), "float16": (0.9999, 1e-2)}
TEXTS = {
    "one word": "ring",
    "a sentence": "A ring with a square-cut stone and four prongs.",
    "two lines": " led by a space,\n\nin two lines\n",
    "a long text": " ".join(f"Item {number}: a narrow silver band, size {number + 40}." for number in range(20)),
}


@dataclass(frozen=True)
class Parity:
    """How far an export is from its model."""

    dtype: str
    examples: int
    cosine: float  # the smallest of all examples
    difference: float  # the largest absolute difference of a coordinate
    worst: str  # the example with the smallest cosine

    @property
    def ok(self) -> bool:
        cosine, difference = TOLERANCES[self.dtype]
        return self.cosine >= cosine and self.difference <= difference  # False for NaN


def examples() -> dict[str, dict[str, Any]]:
    """Texts of several lengths, images of several forms, both together, and two images."""
    wide, tall, square = _image(150, 84, 1), _image(70, 130, 2), _image(112, 112, 3)
    return {
        **{f"text, {name}": {"text": text} for name, text in TEXTS.items()},
        "image, wide": {"image": wide},
        "image, tall": {"image": tall},
        "image + text": {"image": square, "text": "What is it?"},
        "image + long text": {"image": wide, "text": TEXTS["a long text"]},
        "two images + text": {"images": [tall, square], "text": TEXTS["two lines"]},
    }


def _image(width: int, height: int, seed: int) -> Image.Image:
    cells = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((width, height), Image.Resampling.NEAREST)


def compare(expected: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray], dtype: str) -> Parity:
    """Measures two sets of vectors with the same names, of length 1 but for the rounding of their precision."""
    cosines = {}
    for name, vector in expected.items():
        one, other = vector.astype(np.float64), found[name].astype(np.float64)
        cosines[name] = float(one @ other / np.sqrt((one @ one) * (other @ other)))
    worst = min(cosines, key=lambda name: cosines[name] if np.isfinite(cosines[name]) else -np.inf)
    difference = max(float(np.abs(vector - found[name]).max()) for name, vector in expected.items())
    return Parity(dtype, len(cosines), cosines[worst], difference, worst)


@torch.inference_mode()
def stock_vectors(folder: Path, *, generation: bool, adapter: Path | None = None) -> dict[str, np.ndarray]:
    """The vectors of :func:`examples` by plain transformers, float32 [dim], L2-normalised.

    Args:
        generation: Read the folder by its ``…ForConditionalGeneration`` class, else by the inner model's, as the stock
            sentence-transformers library does.
        adapter: A PEFT folder to put on top.
    Raises:
        CheckpointError: If weights are missing or unexpected, a prompt does not end at ``<|emb|>``, or the folder's
            pooling is not that of the last token.
    """
    kind = AutoModelForImageTextToText if generation else AutoModel
    model, info = kind.from_pretrained(
        folder, dtype="auto", output_loading_info=True, local_files_only=True, use_safetensors=True
    )
    odd = sorted([*info["missing_keys"], *info["unexpected_keys"], *(key for key, *_ in info["mismatched_keys"])])
    if odd:
        raise CheckpointError(f"{folder}: {kind.__name__} finds missing or unexpected weights, e.g. {odd[0]}")
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text(encoding="utf-8"))
    if pooling["pooling_mode"] != "lasttoken" or not pooling["pooling_mode_lasttoken"]:
        raise CheckpointError(f"{folder}: its pooling is not that of the last token")
    if adapter is not None:
        model.load_adapter(str(adapter))
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    inputs_of = _reader(folder, model.config, tokenizer)
    vectors = {}
    for name, example in examples().items():
        images = example.get("images") or ([example["image"]] if "image" in example else [])
        parts = [*[{"type": "image"}] * len(images), {"type": "text", "text": example.get("text", "")}]
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
        inputs = inputs_of(prompt, images)
        if inputs["input_ids"][0, -1] != tokenizer.convert_tokens_to_ids(EMB):
            raise CheckpointError(f"{folder}: its chat template does not end at {EMB}: {prompt[-60:]!r}")
        inputs = {key: v.to(model.dtype) if v.is_floating_point() else v for key, v in inputs.items()}
        output = model.eval()(**inputs, output_hidden_states=True, use_cache=False)
        hidden = output.hidden_states[-1] if generation else output.last_hidden_state
        vectors[name] = normalize(hidden[0, -1].float(), dim=0).numpy()
    return vectors


def _reader(folder: Path, config: Any, tokenizer: Any) -> Callable[[str, list[Image.Image]], dict[str, Any]]:
    """Makes the tensors of one prompt and its images, by the folder's own processor."""
    if config.model_type not in QWEN_MODEL_TYPES:
        processor = AutoProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
        return lambda prompt, images: dict(
            processor(text=[prompt], images=[images] if images else None, return_tensors="pt", add_special_tokens=False)
        )
    # the Qwen family's processor class cannot be built without torchvision, so its one step is made here
    image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
    pad = tokenizer.convert_ids_to_tokens(config.image_token_id)

    def read(prompt: str, images: list[Image.Image]) -> dict[str, Any]:
        tensors = dict(image_processor(images=images, return_tensors="pt")) if images else {}
        for grid in tensors.get("image_grid_thw", ()):
            count = int(grid.prod()) // image_processor.merge_size**2
            prompt = prompt.replace(pad, "\0" * count, 1)
        prompt = prompt.replace("\0", pad)
        tensors["input_ids"] = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
        if images:
            tensors["mm_token_type_ids"] = (tensors["input_ids"] == config.image_token_id).int()
        return tensors

    return read
