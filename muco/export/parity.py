"""Checks that plain transformers reproduces a model's vectors from an exported folder.

The folder is read by plain transformers: its chat template makes the prompt, its image processor the pixels, its own
code the positions and masks, and the hidden state of the last token is the vector. No missing or unexpected weight is
forgiven.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize
from transformers import AutoModel, AutoModelForImageTextToText, AutoTokenizer

from muco.errors import CheckpointError
from muco.stock import family_processor, image_half
from muco.template import EMB, read_settings

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


def examples(*, several_images: bool) -> dict[str, dict[str, Any]]:
    """Texts of several lengths, images of several forms, both together, and two images for a model that takes them."""
    wide, tall, square = _image(150, 84, 1), _image(70, 130, 2), _image(112, 112, 3)
    two = {"two images + text": {"images": [tall, square], "text": TEXTS["two lines"]}}
    return {
        **{f"text, {name}": {"text": text} for name, text in TEXTS.items()},
        "image, wide": {"image": wide},
        "image, tall": {"image": tall},
        "image + text": {"image": square, "text": "What is it?"},
        "image + long text": {"image": wide, "text": TEXTS["a long text"]},
        **(two if several_images else {}),
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
def stock_vectors(
    folder: Path, examples: Mapping[str, dict[str, Any]], *, generation: bool, adapter: Path | None = None
) -> dict[str, np.ndarray]:
    """The vectors of ``examples`` by plain transformers, float32 [dim], L2-normalised.

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
    processor = _own_processor(folder, model.config)
    read = read_settings(str(folder), True, processor.chat_template)["template"].get("read", EMB)
    last = processor.tokenizer(read, add_special_tokens=False)["input_ids"][-1]
    vectors = {}
    for name, example in examples.items():
        images = example.get("images") or ([example["image"]] if "image" in example else [])
        parts = [{"type": "image", "image": image} for image in images]
        parts.append({"type": "text", "text": example.get("text", "")})
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        try:
            inputs = processor.apply_chat_template([{"role": "user", "content": parts}], **options)
        except ValueError as error:
            raise CheckpointError(f"{folder}: the family's own processor does not take {name!r}: {error}") from error
        if inputs["input_ids"][0, -1] != last:
            raise CheckpointError(f"{folder}: its chat template does not end at {read!r}")
        inputs = {key: v.to(model.dtype) if v.is_floating_point() else v for key, v in inputs.items()}
        output = model.eval()(**inputs, output_hidden_states=True, use_cache=False)
        hidden = output.hidden_states[-1] if generation else output.last_hidden_state
        vectors[name] = normalize(hidden[0, -1].float(), dim=0).numpy()
    return vectors


def _own_processor(folder: Path, config: Any) -> Any:
    """The family's processor with the folder's settings, tokenizer and chat template, without its video half."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    images = image_half(str(folder), local_files_only=True)
    processor = family_processor(str(folder), config, images, tokenizer, local_files_only=True)
    processor.chat_template = tokenizer.chat_template
    return processor
