"""Text and images -> token ids and pixel tensors, for one model. Works without torchvision where the family does."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from torch import Tensor
from transformers import AddedToken, AutoTokenizer

from muco.base.text import first_line
from muco.chat_template import from_chat_template, from_processor
from muco.dialogue import Content, Dialogue, ImageLike, Video
from muco.errors import CheckpointError, DataError
from muco.images import opened_image, pictures
from muco.released import ReleasedPrompt, released_prompt
from muco.sizes import context_of
from muco.stock import CHANNELS, Family, expanded, family_processor, image_half, learnt_family, plain, save, write_json
from muco.template import (
    EMB,
    QWEN_VL,
    SETTINGS_FILE,
    SPECIAL_TOKENS,
    SpecialTokenGuard,
    Template,
    read_settings,
)
from muco.video import frames_of

SHORT_TEXT = 128  # characters: parts of prompts and labels, which come often; long texts would fill the memory
CACHED_TEXTS = 1 << 16
DETAIL = 2  # times the width and height that a model reads, which are kept of a large JPEG
PROBES = ((84, 84), (640, 480), (700, 1400))  # sizes of images by which a processor shows whether it reads all alike
VIDEO_PIXELS = 7_864_320  # of all frames of a video together, as in Qwen's own evaluation of MMEB-V2
# The released checkpoints' pixel limits at evaluation (256 to 1280 visual tokens), spec of the paper's evaluation.
EVALUATION_PIXELS = (256 * 28 * 28, 1280 * 28 * 28)


@dataclass(frozen=True)
class Grid:
    """Visual tokens in steps of time, rows and columns, for multimodal rotary positions."""

    time: int
    height: int
    width: int
    step: float = 1.0  # positions from one step of time to the next


@dataclass(frozen=True)
class EncodedImage:
    """One image or video as a model reads it."""

    ids: tuple[int, ...]  # its placeholder tokens, and those that a family writes beside them
    tokens: int  # how many of them are visual tokens
    tensors: dict[str, Tensor]  # what the model makes visual tokens of: Family.inputs
    segments: tuple[int | Grid, ...] = ()  # of ids in order: lengths of text, and grids; () where positions are plain


class Processor:
    """Tokenizer, image processor and template of one model.

    Args:
        stock: The family's own processor, which expands the image placeholder.
        max_tokens: The model's context: most tokens that a turn may read, itself included; None if nothing states it.

    Attributes:
        trained_pixels: Smallest and largest number of pixels in training; None if that is not known.
        trained_for_vectors: Whether the checkpoint says so, by a prompt of its own for vectors, or by our tokens.
        images_as_stored: See :func:`muco.images.open_image`.
    """

    def __init__(self, stock: Any, template: Template, family: Family, *, max_tokens: int | None = None) -> None:
        self.stock, self.template, self.family, self.max_tokens = stock, template, family, max_tokens
        self.trained_pixels: tuple[int, int] | None = None
        self.trained_for_vectors = True
        self.images_as_stored = False
        self.read_id = self._tokenize(template.read)[-1]
        self.guard = SpecialTokenGuard(special_tokens(self.tokenizer))
        self._short_text_ids = lru_cache(maxsize=CACHED_TEXTS)(self._tokenize)

    def __getstate__(self) -> dict[str, Any]:  # lru_cache does not pickle, and workers fill their own
        return {k: v for k, v in self.__dict__.items() if k != "_short_text_ids"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._short_text_ids = lru_cache(maxsize=CACHED_TEXTS)(self._tokenize)

    @property
    def tokenizer(self) -> Any:
        return self.stock.tokenizer

    @property
    def image_processor(self) -> Any:
        return self.stock.image_processor

    @property
    def several_images(self) -> bool:
        """Whether an input may have more than one image."""
        return self.family.several and not self.template.one_image

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0

    def text_ids(self, text: str) -> tuple[int, ...]:
        return self._short_text_ids(text) if len(text) <= SHORT_TEXT else self._tokenize(text)

    def _tokenize(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def shortened(self, text: str, tokens: int, end: Literal["START", "END"]) -> str:
        """The text without this many tokens at one end, cut between characters; whole if nothing would be left."""
        spans = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        if tokens >= len(spans):
            return text
        return (text[spans[tokens - 1][1] :] if end == "START" else text[: spans[-tokens][0]]) or text

    def opened(self, image: ImageLike, where: str = "", **limits: int) -> Any:
        """An image or a video as :func:`muco.images.opened_image` opens it for this model; ``limits`` are its."""
        reduction = None if self.images_as_stored else self.reduction
        return opened_image(image, as_stored=self.images_as_stored, reduction=reduction, where=where, **limits)

    def reduction(self, width: int, height: int) -> int:
        """By what a JPEG of this size may be divided in decoding: 1, 2, 4 or 8.

        What is left has at least ``DETAIL`` times the width and height that the model reads, so that resizing it gives
        nearly the pixels that resizing all of it gives.
        """
        if pixels := self.pixels:
            most = math.sqrt(width * height / pixels[1])
        else:
            most = min(width, height) / self._side if self._side else 0.0
        return next((factor for factor in (8, 4, 2) if factor * DETAIL <= most), 1)

    @cached_property
    def _side(self) -> int | None:
        """The side of a square with the pixels that the model reads of any image; None if not of all as many."""
        try:
            found = [self.image_processor(images=[Image.new("RGB", size)], return_tensors="pt") for size in PROBES]
        except ValueError:
            return None
        shapes = {tuple(output[name].shape for name in self.family.inputs) for output in found}
        if len(shapes) > 1:
            return None
        return math.ceil(math.sqrt(max(math.prod(shape) for shape in shapes.pop()) / CHANNELS))

    def encode_image(self, image: ImageLike, where: str = "") -> EncodedImage:
        """Opens and encodes an image, or a video where ``family.video`` says how; an ImageError names file and row."""
        if isinstance(image, Video):
            return self._encode_video(image, where)
        image = self.opened(image, where)
        try:
            if not self.family.grid:
                return self._encode_with_text(expanded(self.stock, [image]))
            output = self.image_processor(images=[image], return_tensors="pt")
        except ValueError as error:  # e.g. an aspect ratio beyond 200
            raise DataError(f"{where or 'image'}: {error}") from error
        grid = self._grid(output["image_grid_thw"][0].tolist())
        count = grid.time * grid.height * grid.width
        return EncodedImage((self.family.image_id,) * count, count, self._tensors(output), (grid,))

    def _grid(self, patches: Sequence[int], step: float = 1.0) -> Grid:
        time, height, width = patches
        merge = self.image_processor.merge_size
        return Grid(time, height // merge, width // merge, step)

    def as_read(self, dialogue: Dialogue) -> Dialogue:
        """The dialogue with the frames of its videos in their place, where the model reads frames as images."""
        if self.family.video or not any(isinstance(image, Video) for image in dialogue.images):
            return dialogue

        def spread(images: Sequence[ImageLike]) -> tuple[ImageLike, ...]:
            return tuple(frame for image in images for frame in pictures(image, where=dialogue.where))

        turns = tuple(replace(turn, images=spread(turn.images)) for turn in dialogue.turns)
        return replace(dialogue, context=spread(dialogue.context), turns=turns)

    def _encode_video(self, video: Video, where: str) -> EncodedImage:
        """Frames of one size, joined in time as the family's video processor joins them."""
        family = self.family.video
        if family is None:
            raise DataError(f"{where or video}: this model reads a video as images; see Processor.as_read")
        opened = self.opened(video, where)
        frames, seconds = [*opened.source], frames_of(opened).seconds
        size = dict(self.image_processor.size)
        size["longest_edge"] = max(size["shortest_edge"], min(size["longest_edge"], VIDEO_PIXELS // len(frames)))
        try:
            output = self.image_processor(images=frames, size=size, return_tensors="pt")
        except ValueError as error:
            raise DataError(f"{where or video}: {error}") from error
        tensors = family.joined(self._tensors(output))
        text = family.text(self.stock, tensors["image_grid_thw"], seconds)
        ids = tuple(self.family.image_id if one == family.token else one for one in self._tokenize(text))
        grid = self._grid(tensors["image_grid_thw"][0].tolist(), family.step(seconds))
        return EncodedImage(ids, ids.count(self.family.image_id), tensors, self._segments(ids, grid))

    def _segments(self, ids: Sequence[int], grid: Grid) -> tuple[int | Grid, ...]:
        """Runs of text, and of visual tokens: all of them, or those of one step of time."""
        runs = [(visual, len([*own])) for visual, own in groupby(ids, key=self.family.image_id.__eq__)]
        steps = sum(visual for visual, _ in runs)
        one = grid if steps == 1 else replace(grid, time=1)
        return tuple(one if visual else length for visual, length in runs)

    def _encode_with_text(self, output: Any) -> EncodedImage:
        ids = output["input_ids"][0].tolist()
        lead, trail = (len(self.text_ids(text)) for text in (self.family.lead, self.family.trail))
        own = tuple(ids[lead : len(ids) - trail - self.family.appended])
        return EncodedImage(own, own.count(self.family.image_id), self._tensors(output))

    def _tensors(self, output: Any) -> dict[str, Tensor]:
        return {name: output[name] for name in self.family.inputs}

    @property
    def _counts_pixels(self) -> bool:
        """Whether the image processor has limits of pixels, which it keeps under the names of edges."""
        size = getattr(self.image_processor, "size", None) or {}
        return hasattr(self.image_processor, "merge_size") and "shortest_edge" in size and "longest_edge" in size

    @property
    def pixels(self) -> tuple[int, int] | None:
        """The smallest and largest number of pixels of an image; None for families without such limits."""
        if not self._counts_pixels:
            return None
        return self.image_processor.size["shortest_edge"], self.image_processor.size["longest_edge"]

    def set_pixels(self, min_pixels: int | None, max_pixels: int | None) -> None:
        """Sets the pixel budget, which is saved for stock libraries too; a CheckpointError if the family has none."""
        size = dict(self.image_processor.size)
        if self._counts_pixels:
            size["shortest_edge"] = min_pixels if min_pixels is not None else size["shortest_edge"]
            size["longest_edge"] = max_pixels if max_pixels is not None else size["longest_edge"]
        else:
            tile = dict(getattr(self.image_processor, "max_image_size", None) or {}).get("longest_edge")
            if min_pixels is not None or tile is None or "longest_edge" not in size:
                name, limits = type(self.image_processor).__name__, "min_pixels" + ("" if tile else " and max_pixels")
                raise CheckpointError(f"{limits}: the model's image processor ({name}) has no such limit; leave it out")
            if max_pixels is not None:  # every image is scaled to this edge and cut into square tiles
                size["longest_edge"] = max(tile, int(max_pixels**0.5) // tile * tile)
        self.image_processor.size = size

    def settings(self) -> dict[str, Any]:
        """What the vectors depend on besides the weights: prompt and pixel budget."""
        return {
            "template": self.template.stated(),
            "image_processor": plain(self.image_processor.to_dict()),
            **({"images": "as stored"} if self.images_as_stored else {}),
        }

    def save(self, folder: Path) -> None:
        """Writes tokenizer, chat template, image processor and ``muco.json``, readable by stock libraries."""
        settings: dict[str, Any] = {"format": 1, "template": self.template.stated()}
        if pixels := self.trained_pixels or self.pixels:
            settings["pixels"] = list(pixels)
        # The chat template takes the settings along where a stock library saves the model again without our file.
        note = json.dumps(settings).replace("#", "\\u0023")  # "#}" would end the comment
        self.tokenizer.chat_template = f"{{#- muco {note} -#}}{self.template.jinja()}"
        self.stock.chat_template = self.tokenizer.chat_template
        save(self.stock, folder)
        self.tokenizer.save_pretrained(folder)
        write_json(folder / SETTINGS_FILE, settings)


def load_processor(path: str, config: Any, *, local_files_only: bool = False) -> tuple[Processor, bool]:
    """The processor of a saved or hub model, and whether MuCo's tokens were added (the embeddings must then grow).

    Raises:
        CheckpointError: If no prompt is known for the model's family, or its processor cannot be built here or does
            not belong to the model.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=local_files_only)
        images = image_half(path, local_files_only=local_files_only)
        stock = family_processor(path, config, images, tokenizer, local_files_only=local_files_only)
    except (ImportError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: its processor cannot be built here: {first_line(error)}") from error
    released = EMB in tokenizer.get_vocab()
    if not released:
        added = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
        tokenizer.add_tokens(added, special_tokens=True)
    settings = read_settings(path, local_files_only, tokenizer.chat_template)
    try:
        family = learnt_family(config, stock)
        prompt = None if settings or released else released_prompt(path, local_files_only=local_files_only)
        template = Template(**settings["template"]) if settings else _derived_template(stock, family, prompt, released)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    template = replace(template, image_lead=family.lead, image_trail=family.trail, image_glue=family.glue)
    processor = Processor(stock, template, family, max_tokens=context_of(config, tokenizer))
    processor.trained_for_vectors = bool(settings or released or prompt)
    if released and not settings:
        processor.set_pixels(*EVALUATION_PIXELS)
    if settings and processor.pixels:  # an older model has no record, and keeps the limits that it was saved with
        processor.trained_pixels = tuple(settings.get("pixels") or processor.pixels)
    _check_tokens(processor, path)
    return processor, not released


def _derived_template(stock: Any, family: Family, prompt: ReleasedPrompt | None, released: bool) -> Template:
    """The paper's prompt where a tokenizer has its special tokens, else that of the model's own chat template.

    An embedding model keeps its own ``prompt``. ``released``: one of the paper's, which has our tokens.
    """
    tokenizer, special = stock.tokenizer, special_tokens(stock.tokenizer)
    if prompt is None and all(token in special for token in QWEN_VL.special_tokens()):
        return replace(QWEN_VL, newline_at_end=released)
    if tokenizer.chat_template is None and family.appended:
        return from_processor(stock)
    return from_chat_template(tokenizer, stock.image_token, special, prompt)


def special_tokens(tokenizer: Any) -> list[str]:
    return [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]


def _check_tokens(processor: Processor, path: str) -> None:
    """Refuses an empty tokenizer (so some load when a file is missing), and one whose prompt we cannot cut."""
    template = processor.template
    if len(processor.text_ids(template.image_token)) != 1 or not processor.text_ids("word"):
        raise CheckpointError(f"{path}: the tokenizer is not this model's or lacks a file; look for tokenizer.json")
    for text in ("word", " word", "\nword", "word\n"):
        prompt = template.prompt(Dialogue((), (Content(text),)))
        parts = ["".join(map(str, pieces)) for pieces in (prompt.trunk, *prompt.branches)]
        if sum((processor.text_ids(part) for part in parts), ()) != processor.text_ids("".join(parts)):
            raise CheckpointError(f"{path}: the tokenizer reads a prompt in parts differently than as a whole")
