"""Text and images -> token ids and pixel tensors, for one model. Works without torchvision.

The stock processor of the Qwen family needs torchvision for videos, so its image half and tokenizer are put together
here. Other families use their own processor class.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from PIL.Image import Image
from torch import Tensor
from transformers import AddedToken, AutoImageProcessor, AutoProcessor, AutoTokenizer

from muco.dialogue import Content, Dialogue, ImageLike
from muco.errors import CheckpointError, DataError
from muco.images import open_image
from muco.sizes import context_of
from muco.template import (
    EMB,
    QWEN_MODEL_TYPES,
    QWEN_VL,
    SETTINGS_FILE,
    SPECIAL_TOKENS,
    SpecialTokenGuard,
    Template,
    from_chat_template,
    read_settings,
)

# The released checkpoints' pixel limits at evaluation (256 to 1280 visual tokens), spec of the paper's evaluation.
EVALUATION_PIXELS = (256 * 28 * 28, 1280 * 28 * 28)


@dataclass(frozen=True)
class EncodedImage:
    """One image as a model reads it."""

    ids: tuple[int, ...]  # its placeholder tokens
    patches: dict[str, Tensor]  # whose first dimension is this image's patches or tiles, e.g. "pixel_values"
    grid: tuple[int, int, int] | None = None  # (time, height, width) in patches, for multimodal rotary positions
    merge: int = 1  # patches per visual token along one side


class Processor:
    """Tokenizer, image processor and template of one model.

    Args:
        stock: For families other than Qwen, their own processor, which expands the image placeholder.
        max_tokens: The model's context: most tokens that a turn may read, itself included; None if nothing states it.

    Attributes:
        trained_pixels: Smallest and largest number of pixels in training; None if that is not known.
        images_as_stored: See :func:`muco.images.open_image`.
    """

    def __init__(
        self,
        tokenizer: Any,
        image_processor: Any,
        template: Template,
        *,
        stock: Any = None,
        max_tokens: int | None = None,
    ) -> None:
        self.tokenizer, self.image_processor, self.template, self.stock = tokenizer, image_processor, template, stock
        self.max_tokens = max_tokens
        self.trained_pixels: tuple[int, int] | None = None
        self.images_as_stored = False
        self.emb_id = tokenizer.convert_tokens_to_ids(EMB)
        self.guard = SpecialTokenGuard(special_tokens(tokenizer))
        self._text_ids = lru_cache(maxsize=65536)(self._tokenize)

    def __getstate__(self) -> dict[str, Any]:  # lru_cache does not pickle, and workers fill their own
        return {k: v for k, v in self.__dict__.items() if k != "_text_ids"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._text_ids = lru_cache(maxsize=65536)(self._tokenize)

    @property
    def image_id(self) -> int:
        """The id of the token of which an image has one per visual token."""
        return self.tokenizer.convert_tokens_to_ids(self.template.image_token)

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

    def shortened(self, text: str, tokens: int, end: Literal["START", "END"]) -> str:
        """The text without this many tokens at one end, cut between characters; whole if nothing would be left."""
        spans = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        if tokens >= len(spans):
            return text
        return (text[spans[tokens - 1][1] :] if end == "START" else text[: spans[-tokens][0]]) or text

    def encode_image(self, image: ImageLike, where: str = "") -> EncodedImage:
        """Opens and encodes an image; an ImageError names the file and the row."""
        image = open_image(image, as_stored=self.images_as_stored, where=where)
        if self.stock is not None:
            return self._encode_with_stock(image)
        try:
            output = self.image_processor(images=[image], return_tensors="pt")
        except ValueError as error:  # e.g. an aspect ratio beyond 200
            raise DataError(f"{where or 'image'}: {error}") from error
        merge = self.image_processor.merge_size
        grid = tuple(output["image_grid_thw"][0].tolist())
        count = grid[0] * grid[1] * grid[2] // merge**2
        return EncodedImage((self.image_id,) * count, {"pixel_values": output["pixel_values"]}, grid, merge)

    def _encode_with_stock(self, image: Image) -> EncodedImage:
        text = [self.template.image_token]
        output = self.stock(text=text, images=[[image]], return_tensors="pt", add_special_tokens=False)
        patches = {k: v.flatten(0, 1) for k, v in output.items() if k in ("pixel_values", "pixel_attention_mask")}
        return EncodedImage(tuple(output["input_ids"][0].tolist()), patches)

    @property
    def pixels(self) -> tuple[int, int] | None:
        """The smallest and largest number of pixels of an image; None for families without such limits."""
        if self.stock is not None:
            return None
        return self.image_processor.size["shortest_edge"], self.image_processor.size["longest_edge"]

    def set_pixels(self, min_pixels: int | None, max_pixels: int | None) -> None:
        """Sets the pixel budget, which is saved for stock libraries too; a CheckpointError if the family has none."""
        size = dict(self.image_processor.size)
        if self.stock is None:  # the Qwen family keeps pixel counts under the names of edges
            size["shortest_edge"] = min_pixels if min_pixels is not None else size["shortest_edge"]
            size["longest_edge"] = max_pixels if max_pixels is not None else size["longest_edge"]
        else:
            tile = dict(getattr(self.image_processor, "max_image_size", None) or {}).get("longest_edge")
            if min_pixels is not None or tile is None or "longest_edge" not in size:
                name, limits = type(self.image_processor).__name__, "min_pixels" + ("" if tile else " and max_pixels")
                raise CheckpointError(f"{name} has no such limit; leave {limits} out")
            if max_pixels is not None:  # every image is scaled to this edge and cut into square tiles
                size["longest_edge"] = max(tile, int(max_pixels**0.5) // tile * tile)
        self.image_processor.size = size

    def settings(self) -> dict[str, Any]:
        """What the vectors depend on besides the weights: prompt and pixel budget."""
        return {
            "template": asdict(self.template),
            "image_processor": _plain(self.image_processor.to_dict()),
            **({"images": "as stored"} if self.images_as_stored else {}),
        }

    def save(self, folder: Path) -> None:
        """Writes tokenizer, chat template, image processor and ``muco.json``, readable by stock libraries."""
        settings: dict[str, Any] = {"format": 1, "template": asdict(self.template)}
        if pixels := self.trained_pixels or self.pixels:
            settings["pixels"] = list(pixels)
        # The chat template takes the settings along where a stock library saves the model again without our file.
        note = json.dumps(settings).replace("#", "\\u0023")  # "#}" would end the comment
        self.tokenizer.chat_template = f"{{#- muco {note} -#}}{self.template.jinja()}"
        if self.stock is not None:
            self.stock.chat_template = self.tokenizer.chat_template
            self.stock.save_pretrained(folder)
        else:
            self.image_processor.save_pretrained(folder)
            # Stock Qwen processors have a video half: of the class of the model's family, with these settings.
            video = _plain(self.image_processor.to_dict())
            video.pop("image_processor_type", None)
            write_config(folder / "video_preprocessor_config.json", video)
        self.tokenizer.save_pretrained(folder)
        write_config(folder / SETTINGS_FILE, settings)


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str, sort_keys=True))


def write_config(file: Path, value: Any) -> None:
    """Writes a JSON file as stock libraries do."""
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def load_processor(path: str, config: Any, *, local_files_only: bool = False) -> tuple[Processor, bool]:
    """The processor of a saved or hub model, and whether MuCo's tokens were added (the embeddings must then grow).

    Raises:
        CheckpointError: If no prompt is known for the model's family, or its processor cannot be built here or does
            not belong to the model.
    """

    def read(auto_class: Any, **kwargs: Any) -> Any:
        try:
            return auto_class.from_pretrained(path, local_files_only=local_files_only, **kwargs)
        except (ImportError, OSError, ValueError) as error:
            raise CheckpointError(f"{path}: its processor cannot be built here: {first_line(error)}") from error

    tokenizer = read(AutoTokenizer)
    released = EMB in tokenizer.get_vocab()
    if not released:
        added = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
        tokenizer.add_tokens(added, special_tokens=True)
    settings = read_settings(path, local_files_only, tokenizer.chat_template)
    template = Template(**settings["template"]) if settings else None

    if config.model_type in QWEN_MODEL_TYPES:
        # A checkpoint with our tokens but without our settings is one of the paper's releases.
        template = template or replace(QWEN_VL, newline_at_end=released)
        processor = Processor(tokenizer, read(AutoImageProcessor, backend="pil"), template)
        if released and not settings:
            processor.set_pixels(*EVALUATION_PIXELS)
        if settings:  # an older model has no record, and keeps the limits that it was saved with
            processor.trained_pixels = tuple(settings.get("pixels") or processor.pixels)
    else:
        stock = read(AutoProcessor, backend="pil")
        if not hasattr(stock, "image_token") or not hasattr(stock, "image_processor"):
            name = type(stock).__name__
            raise CheckpointError(f"{path}: {name} has no image token; MuCo needs an image-text-to-text model")
        tokenizer.chat_template = tokenizer.chat_template or getattr(stock, "chat_template", None)
        stock.tokenizer = tokenizer
        template = template or from_chat_template(tokenizer, stock.image_token, special_tokens(tokenizer))
        processor = Processor(tokenizer, stock.image_processor, template, stock=stock)
    processor.max_tokens = context_of(config, tokenizer)
    _check_tokens(processor, config, path)
    return processor, not released


def special_tokens(tokenizer: Any) -> list[str]:
    return [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]


def _check_tokens(processor: Processor, config: Any, path: str) -> None:
    """Refuses a tokenizer of another model, an empty one (so some load when a file is missing), one we cannot cut."""
    template, image_ids = processor.template, processor.text_ids(processor.template.image_token)
    if image_ids != (getattr(config, "image_token_id", image_ids[:1]),) or not processor.text_ids("word"):
        raise CheckpointError(f"{path}: the tokenizer is not this model's or lacks a file; look for tokenizer.json")
    for text in ("word", " word", "\nword", "word\n"):
        prompt = template.prompt(Dialogue((), (Content(text),)))
        parts = ["".join(map(str, pieces)) for pieces in (prompt.trunk, *prompt.branches)]
        if sum((processor.text_ids(part) for part in parts), ()) != processor.text_ids("".join(parts)):
            raise CheckpointError(f"{path}: the tokenizer reads a prompt in parts differently than as a whole")


def first_line(error: Exception) -> str:
    """What went wrong, without the advice that libraries append to it."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
