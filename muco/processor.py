"""Text and images -> token ids and pixel tensors, for one model. Works without torchvision.

The stock processor class of the Qwen family cannot be built without torchvision (its video half needs it), so the
image half and the tokenizer are put together here. Other families go through their own processor class.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from muco.data.images import open_image, resize_to_budget
from muco.dialogue import Dialogue, ImageLike
from muco.errors import CheckpointError, DataError
from muco.template import EMB, QWEN_MODEL_TYPES, QWEN_VL, SPECIAL_TOKENS, SpecialTokenGuard, Template, from_chat_template

if TYPE_CHECKING:
    from PIL.Image import Image

SETTINGS_FILE = "muco.json"
# The released checkpoints' pixel limits at evaluation (256 to 1280 visual tokens), spec of the paper's evaluation.
EVALUATION_PIXELS = (256 * 28 * 28, 1280 * 28 * 28)


@dataclass(frozen=True)
class EncodedImage:
    """One image as a model reads it.

    Args:
        ids: Its placeholder tokens.
        patches: Tensors whose first dimension is this image's patches or tiles, e.g. ``pixel_values``.
        grid: (time, height, width) in patches, for families with multimodal rotary positions.
        merge: Patches per visual token along one side.
    """

    ids: tuple[int, ...]
    patches: dict[str, Tensor]
    grid: tuple[int, int, int] | None = None
    merge: int = 1


class Processor:
    """Tokenizer, image processor and template of one model.

    Args:
        stock: For families other than Qwen, their own processor, which expands the image placeholder.
        max_pixels: For those families: larger images are shrunk to this many pixels before anything else.
    """

    def __init__(
        self, tokenizer: Any, image_processor: Any, template: Template, *, stock: Any = None, max_pixels: int | None = None
    ) -> None:
        self.tokenizer, self.image_processor, self.template, self.stock = tokenizer, image_processor, template, stock
        self.max_pixels = max_pixels
        self.emb_id = tokenizer.convert_tokens_to_ids(EMB)
        special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.guard = SpecialTokenGuard(special)
        self._text_ids = lru_cache(maxsize=65536)(self._tokenize)

    def __getstate__(self) -> dict[str, Any]:  # lru_cache does not pickle, and workers fill their own
        return {k: v for k, v in self.__dict__.items() if k != "_text_ids"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._text_ids = lru_cache(maxsize=65536)(self._tokenize)

    @property
    def rotary_3d(self) -> bool:
        """Whether positions are [3, rows, tokens] (time, height, width), as in the Qwen family."""
        return self.stock is None

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0

    def text_ids(self, text: str) -> tuple[int, ...]:
        return self._text_ids(text)

    def _tokenize(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def check(self, dialogue: Dialogue) -> None:
        """Raises DataError if a text holds a special token."""
        self.guard.check(dialogue)

    def encode_images(self, images: Sequence[ImageLike], where: str = "") -> list[EncodedImage]:
        """Opens and encodes images one by one, in order; raises ImageError naming the file and the row."""
        return [self.encode_image(open_image(image, where=where), where) for image in images]

    def encode_image(self, image: Image, where: str = "") -> EncodedImage:
        if self.stock is not None:
            return self._encode_with_stock(image)
        try:
            output = self.image_processor(images=[image], return_tensors="pt")
        except ValueError as error:  # e.g. an aspect ratio beyond 200
            raise DataError(f"{where or 'image'}: {error}") from error
        merge = self.image_processor.merge_size
        grid = tuple(output["image_grid_thw"][0].tolist())
        count = grid[0] * grid[1] * grid[2] // merge**2
        ids = (self.tokenizer.convert_tokens_to_ids(self.template.image_token),) * count
        return EncodedImage(ids, {"pixel_values": output["pixel_values"]}, grid, merge)

    def _encode_with_stock(self, image: Image) -> EncodedImage:
        if self.max_pixels is not None:
            image = resize_to_budget(image, self.max_pixels)
        output = self.stock(
            text=[self.template.image_token], images=[[image]], return_tensors="pt", add_special_tokens=False
        )
        patches = {k: v.flatten(0, 1) for k, v in output.items() if k in ("pixel_values", "pixel_attention_mask")}
        return EncodedImage(tuple(output["input_ids"][0].tolist()), patches)

    def set_pixels(self, min_pixels: int | None, max_pixels: int | None) -> None:
        """Sets the pixel budget; it is saved with the image processor, so stock libraries keep it."""
        if self.stock is not None:
            self.max_pixels = max_pixels
            return
        size = dict(self.image_processor.size)
        size["shortest_edge"] = min_pixels if min_pixels is not None else size["shortest_edge"]
        size["longest_edge"] = max_pixels if max_pixels is not None else size["longest_edge"]
        self.image_processor.size = size

    def settings(self) -> dict[str, Any]:
        """What the vectors depend on besides the weights: prompt and pixel budget."""
        return {
            "template": asdict(self.template),
            "max_pixels": self.max_pixels,
            "image_processor": _plain(self.image_processor.to_dict()),
        }

    def save(self, folder: Path) -> None:
        """Writes tokenizer, chat template, image processor and ``muco.json``, readable by stock libraries."""
        self.tokenizer.chat_template = self.template.jinja()
        if self.stock is not None:
            self.stock.chat_template = self.template.jinja()
            self.stock.save_pretrained(folder)
        else:
            self.image_processor.save_pretrained(folder)
            _write_video_half(folder, self.image_processor)
        self.tokenizer.save_pretrained(folder)
        settings = {"format": 1, "template": asdict(self.template), "max_pixels": self.max_pixels}
        (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str, sort_keys=True))


def _write_video_half(folder: Path, image_processor: Any) -> None:
    # Stock Qwen processors refuse to load without a video processor's settings; they are the image processor's.
    settings = _plain(image_processor.to_dict())
    settings.pop("image_processor_type", None)
    settings["video_processor_type"] = "Qwen2VLVideoProcessor"
    (folder / "video_preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def load_processor(path: str, model_type: str, *, local_files_only: bool = False) -> tuple[Processor, bool]:
    """The processor of a saved or hub model, with MuCo's tokens added where they are missing.

    Returns:
        The processor, and whether tokens were added (the embedding matrix must then grow).
    Raises:
        CheckpointError: If no prompt is known for the model's family or its processor cannot be built here.
    """
    from transformers import AddedToken, AutoImageProcessor, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=local_files_only)
    released = EMB in tokenizer.get_vocab()
    if not released:
        tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS], special_tokens=True)
    settings = _read_settings(path)
    template = Template(**settings["template"]) if settings else None

    if model_type in QWEN_MODEL_TYPES:
        image_processor = AutoImageProcessor.from_pretrained(path, backend="pil", local_files_only=local_files_only)
        if template is None:
            # A checkpoint with our tokens but without our settings is one of the paper's releases.
            template = _replace(QWEN_VL, newline_at_end=released)
        processor = Processor(tokenizer, image_processor, template)
        if released and not settings:
            processor.set_pixels(*EVALUATION_PIXELS)
        return processor, not released

    stock = _stock_processor(path, tokenizer, local_files_only)
    if template is None:
        special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        if not tokenizer.chat_template:
            tokenizer.chat_template = getattr(stock, "chat_template", None)
        template = from_chat_template(tokenizer, stock.image_token, special)
    max_pixels = settings["max_pixels"] if settings else None
    processor = Processor(tokenizer, stock.image_processor, template, stock=stock, max_pixels=max_pixels)
    return processor, not released


def _stock_processor(path: str, tokenizer: Any, local_files_only: bool) -> Any:
    from transformers import AutoProcessor

    try:
        stock = AutoProcessor.from_pretrained(path, backend="pil", local_files_only=local_files_only)
    except (ImportError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: its processor cannot be built here: {error}") from error
    if not hasattr(stock, "image_token") or not hasattr(stock, "image_processor"):
        raise CheckpointError(f"{path}: {type(stock).__name__} has no image token; MuCo needs an image-text-to-text model")
    stock.tokenizer = tokenizer
    return stock


def _read_settings(path: str) -> dict[str, Any] | None:
    from transformers.utils.hub import cached_file

    file = cached_file(path, SETTINGS_FILE, _raise_exceptions_for_missing_entries=False)
    if file is None:
        return None
    settings = json.loads(Path(file).read_text(encoding="utf-8"))
    known = {field.name for field in fields(Template)}
    if settings.get("format") != 1 or set(settings["template"]) != known:
        raise CheckpointError(f"{file}: written by another version of MuCo; this one reads format 1")
    return settings


def _replace(template: Template, **changes: Any) -> Template:
    return Template(**{**asdict(template), **changes})


def rotary_positions(segments: Sequence[int | EncodedImage], start: int = 0) -> np.ndarray:
    """Multimodal rotary positions of a run of text lengths and images, beginning at ``start``.

    Text advances all three axes by one per token. An image's tokens share the time position and are laid out by row
    and column; what follows begins after the larger of both.

    Returns:
        int64 [3, tokens] (time, height, width).
    Source: Qwen2-VL (arXiv 2409.12191), M-RoPE. Equal to the model's own ``get_rope_index`` (tests).
    """
    parts, position = [np.zeros((3, 0), dtype=np.int64)], start
    for segment in segments:
        if isinstance(segment, int):
            parts.append(np.broadcast_to(np.arange(position, position + segment), (3, segment)))
            position += segment
            continue
        time, height, width = segment.grid[0], segment.grid[1] // segment.merge, segment.grid[2] // segment.merge
        parts.append(np.indices((time, height, width)).reshape(3, -1) + position)
        position += max(height, width)
    return np.concatenate(parts, axis=1)
