"""A family's own processor of transformers without its video and audio halves, and what it makes of a picture.

Both halves need packages that images and text do not. Nothing here knows a family by name: what a model calls its
tensors, and how its processor writes an image, is read off the two.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, ProcessorMixin
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils.hub import cached_file
from transformers.video_utils import VideoMetadata

from muco.errors import CheckpointError

PROCESSOR_SETTINGS, VIDEO_SETTINGS = "processor_config.json", "video_preprocessor_config.json"
VIDEO_HALF = "video_processor"
VIDEO_INPUTS = {"pixel_values", "image_grid_thw"}  # of a family whose frames can be joined here
CHANNELS = 3
PLAIN = {"add_special_tokens": False}
PICTURES = ((84, 84), (57, 130))  # width and height of the pictures by which a processor shows what it does


class LeftOut:
    """Takes the place of a video or audio half; has its saved settings, else those of ``beside``, else None."""

    def __init__(self, settings: Mapping[str, Any] | None = None, beside: Any = None) -> None:
        self.settings, self.beside = dict(settings or {}), beside

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copying and pickling ask for these
            raise AttributeError(name)
        known = self.__dict__
        return known.get("settings", {}).get(name, getattr(known.get("beside"), name, None))


@dataclass(frozen=True)
class VideoForm:
    """How a processor writes a video whose frames it joins in time.

    Attributes:
        token: The token of which a video has one per visual token.
        joined_frames: Frames in one step of time.
        tokens_per_second: Positions in a second; None: one step of time is one position.
    """

    token: int
    joined_frames: int
    tokens_per_second: float | None = None

    def joined(self, frames: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The image processor's tensors of frames of one size as those of one video; the last frame may come again.

        An image is a frame of which all slots of a step of time are the same. A step takes its slot from each of its
        frames.
        """
        pixels, (_, height, width), slots = (
            frames["pixel_values"],
            frames["image_grid_thw"][0].tolist(),
            self.joined_frames,
        )
        slotted = pixels.view(-1, height * width, CHANNELS, slots, pixels.shape[1] // (CHANNELS * slots))
        slotted = torch.cat([slotted, slotted[-1:].expand(-len(slotted) % slots, *slotted.shape[1:])])
        steps = torch.stack([slotted[slot::slots, :, :, slot] for slot in range(slots)], dim=3)
        grid = torch.tensor([[len(steps), height, width]])
        return {"pixel_values": steps.reshape(-1, pixels.shape[1]), "image_grid_thw": grid}

    def text(self, processor: Any, grid: Tensor, seconds: Sequence[float]) -> str:
        """What the processor writes for a video of this grid, [1, 3], with frames at these seconds."""
        indices = [*seconds, *seconds[-1:] * (-len(seconds) % self.joined_frames)]
        told = VideoMetadata(total_num_frames=len(indices), fps=1.0, frames_indices=indices)
        return processor.replace_video_token({"video_grid_thw": grid, "video_metadata": [told]}, 0)

    def step(self, seconds: Sequence[float]) -> float:
        """Positions from one step of time to the next."""
        apart = seconds[1] - seconds[0] if len(seconds) > 1 else 1.0
        return 1.0 if self.tokens_per_second is None else self.tokens_per_second * self.joined_frames * apart


@dataclass(frozen=True)
class Family:
    """What a model takes of an image and of the tokens beside it.

    Attributes:
        image_id: The token of which an image has one per visual token.
        inputs: The processor's tensors that the model makes visual tokens of, each with the dimension on which images
            are joined; None if they cannot be.
        token_types: Per argument of the model that says what a token is, the value for an image's tokens; 0 for others.
        rotary: Whether positions are [3, rows, tokens] (time, height, width).
        grid: Whether an image is one token per cell of its grid and nothing else, so that its tokens can be counted.
        several: Whether an image's tokens are the same beside another image.
        lead, trail: Text that the processor writes before and after an image's first and last special token.
        appended: Number of tokens that it writes after a text by itself.
        glue: Text that it puts between an image and a word behind it.
        video: How it joins the frames of a video; None: frames are read as images, one after another.
    """

    image_id: int
    inputs: Mapping[str, int | None]
    token_types: Mapping[str, int] = field(default_factory=dict)
    rotary: bool = False
    grid: bool = False
    several: bool = True
    lead: str = ""
    trail: str = ""
    appended: int = 0
    glue: str = ""
    video: VideoForm | None = None

    @property
    def prefix(self) -> bool:
        """Whether text and images are one kind of token to a model that knows kinds: a prefix, which sees itself."""
        return bool(self.token_types) and not any(self.token_types.values())


def image_half(path: str, *, local_files_only: bool) -> Any:
    """The image processor of a model, computed by Pillow where the family has such a one."""
    return AutoImageProcessor.from_pretrained(path, backend="pil", local_files_only=local_files_only)


def family_processor(
    path: str, config: Any, image_processor: Any, tokenizer: Any, *, local_files_only: bool
) -> ProcessorMixin:
    """The processor of a saved or hub model, of its image processor and tokenizer.

    Raises:
        CheckpointError: If transformers has no processor for the model.
        ImportError: If it needs a package that is not installed.
    """
    settings, _ = ProcessorMixin.get_processor_dict(path, local_files_only=local_files_only)
    name = settings.get("processor_class") or PROCESSOR_MAPPING_NAMES.get(config.model_type)
    if name is None:
        raise CheckpointError(f"{path}: transformers has no processor for {config.model_type} models")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = settings.get("chat_template")
    file = cached_file(
        path, VIDEO_SETTINGS, local_files_only=local_files_only, _raise_exceptions_for_missing_entries=False
    )
    if file is not None and VIDEO_HALF not in settings:
        settings = settings | {VIDEO_HALF: json.loads(Path(file).read_text(encoding="utf-8"))}
    return assembled(_class_named(name), image_processor, tokenizer, settings)


def assembled(
    kind: type[ProcessorMixin], image_processor: Any, tokenizer: Any, settings: Mapping[str, Any] | None = None
) -> Any:
    """A processor of this class; ``settings`` are the arguments of it and its halves, as a model's folder has them."""
    own, stated = {"image_processor": image_processor, "tokenizer": tokenizer}, dict(settings or {})
    beside = {VIDEO_HALF: image_processor}
    parts = {name: own.get(name) or LeftOut(stated.get(name), beside.get(name)) for name in kind.get_attributes()}
    others = {name: value for name, value in stated.items() if name in _arguments(kind)}
    processor = kind.__new__(kind)
    processor.check_argument_for_proper_class = lambda name, part: None  # it would refuse what is left out
    processor.__init__(**parts, **others)
    del processor.check_argument_for_proper_class
    return processor


def save(processor: ProcessorMixin, folder: Path) -> None:
    """Writes everything but the tokenizer, so that stock libraries find all halves."""
    halves = {name: getattr(processor, name) for name in processor.get_attributes()}
    left_out = {name: half for name, half in halves.items() if isinstance(half, LeftOut)}
    if not left_out:
        processor.save_pretrained(folder)
        return
    processor.image_processor.save_pretrained(folder)
    settings = {name: half.settings for name, half in left_out.items() if half.settings and name != VIDEO_HALF}
    settings |= {name: getattr(processor, name) for name in _arguments(type(processor)) if hasattr(processor, name)}
    if settings:
        write_json(folder / PROCESSOR_SETTINGS, settings | {"processor_class": type(processor).__name__})
    if VIDEO_HALF in left_out:  # of the class of the model's family, with the settings of images if it has none
        own = plain(processor.image_processor.to_dict())
        own.pop("image_processor_type", None)
        write_json(folder / VIDEO_SETTINGS, left_out[VIDEO_HALF].settings or own)


def plain(value: Any) -> Any:
    """The value as JSON has it."""
    return json.loads(json.dumps(value, default=str, sort_keys=True))


def write_json(file: Path, value: Any) -> None:
    """Writes a JSON file as stock libraries do."""
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _arguments(kind: type[ProcessorMixin]) -> list[str]:
    """The names of a processor's own settings: neither its halves nor the chat template."""
    names = inspect.signature(kind.__init__).parameters
    return [name for name in names if name not in ("self", "kwargs", "chat_template", *kind.get_attributes())]


def _class_named(name: str) -> type[ProcessorMixin]:
    """The class; transformers itself offers a stand-in where the video half's packages are missing."""
    for model_type, names in PROCESSOR_MAPPING_NAMES.items():
        if name == names or (not isinstance(names, str) and name in names):
            folder = model_type_to_module_name(model_type)
            try:
                return getattr(importlib.import_module(f"transformers.models.{folder}.processing_{folder}"), name)
            except ModuleNotFoundError as error:
                if not str(error.name).startswith("transformers."):
                    raise
    raise CheckpointError(f"transformers has no processor named {name}")


def learnt_family(config: Any, processor: ProcessorMixin) -> Family:
    """Finds out by two small pictures what a processor writes for an image, and what the model takes of it.

    Raises:
        CheckpointError: If the model's image token is not the most frequent one of an image.
    """

    def text_ids(text: str) -> list[int]:
        return processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    takes = _parameters(MODEL_MAPPING[type(config)].get_image_features)
    takes |= _parameters(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)].get_image_features)
    types = {*_parameters(MODEL_MAPPING[type(config)].forward)} & {"token_type_ids", "mm_token_type_ids"}
    pictures = [small_picture(number) for number in range(len(PICTURES))]
    outputs = [expanded(processor, [picture]) for picture in pictures]
    ids, image_id = [output["input_ids"][0].tolist() for output in outputs], config.image_token_id
    if any(max({*own}, key=own.count, default=None) != image_id for own in ids):
        raise CheckpointError("the tokenizer is not this model's or lacks a file; look for tokenizer.json")
    beside = _beside(processor, pictures)
    before_text = processor(text=[processor.image_token + "x"], images=[pictures[:1]], return_tensors="pt", **PLAIN)
    row = before_text["input_ids"][0].tolist()
    apart = row[: len(ids[0])] == ids[0]  # else what a processor writes after a text would follow the word
    after = 0 if apart else _appended(ids[0], ids[1], beside)
    cores = [own[: len(own) - after] for own in ids]
    special = {number for number, token in processor.tokenizer.added_tokens_decoder.items() if token.special}
    lead, trail = _ends(cores[0], {*special, image_id}, processor.tokenizer)
    own = [core[len(text_ids(lead)) : len(core) - len(text_ids(trail))] for core in cores]
    alone = [*text_ids(lead), *own[0], *text_ids(trail + lead), *own[1], *text_ids(trail)]
    merge = getattr(processor.image_processor, "merge_size", 1)
    counts = [_counted(output, merge) for output in outputs]
    twice = expanded(processor, pictures[:1], texts=2)
    inputs = {name: _grown(outputs[0][name], twice[name]) for name in outputs[0] if name in takes}
    grid = all(count == len(own) == own.count(image_id) for count, own in zip(counts, ids, strict=True))
    return Family(
        image_id=image_id,
        inputs=inputs,
        token_types={name: outputs[0][name][0].tolist()[ids[0].index(image_id)] for name in types & {*outputs[0]}},
        rotary=hasattr(MODEL_MAPPING[type(config)], "get_rope_index"),
        grid=grid,
        several=beside == alone + ids[0][len(ids[0]) - after :],
        lead=lead,
        trail=trail,
        appended=after,
        glue=" " if apart and row[len(ids[0]) :] == text_ids(" x") != text_ids("x") else "",
        video=_video_form(config, processor, image_id) if grid and {*inputs} == VIDEO_INPUTS else None,
    )


def _video_form(config: Any, processor: Any, image_id: int) -> VideoForm | None:
    """How a processor joins frames, if it writes a video by a token of its own, once per cell of its grid."""
    joined = getattr(processor.image_processor, "temporal_patch_size", None) or 1
    token, merge = getattr(processor, "video_token_id", None), processor.image_processor.merge_size
    if joined < 2 or not isinstance(token, int):
        return None
    form = VideoForm(token, joined, getattr(config.vision_config, "tokens_per_second", None))
    try:
        text = form.text(processor, torch.tensor([[2, 2 * merge, merge]]), [0.0] * 2 * joined)
    except NotImplementedError:  # as transformers has it for families without videos
        return None
    ids = processor.tokenizer(text, **PLAIN)["input_ids"]
    return form if ids.count(token) == 4 and image_id not in ids else None


def _beside(processor: ProcessorMixin, pictures: list[Image.Image]) -> list[int] | None:
    """The tokens of two images in one text; None if the family takes one only."""
    try:
        return expanded(processor, pictures)["input_ids"][0].tolist()
    except ValueError:
        return None


def _appended(first: list[int], second: list[int], beside: list[int] | None) -> int:
    """The number of tokens that a processor writes after a text, not after each of its images."""
    return next((n for n in range(len(first)) if beside == first[: len(first) - n] + second), 0)


def _grown(one: Any, two: Any) -> int | None:
    """The dimension of a tensor on which images are joined, if there is one."""
    grown = [dim for dim, sizes in enumerate(zip(one.shape, two.shape, strict=True)) if sizes[1] == 2 * sizes[0]]
    return grown[0] if len(grown) == 1 else None


def small_picture(number: int = 0) -> Image.Image:
    """A picture by which a processor or a model shows what it does."""
    return Image.new("RGB", PICTURES[number], (120, 130, 140))


def expanded(processor: ProcessorMixin, images: list[Image.Image], *, texts: int = 1) -> Mapping[str, Any]:
    """What a processor makes of images one after another in a text, as tensors of one row for each equal text."""
    text = processor.image_token * len(images)
    return processor(text=[text] * texts, images=[images] * texts, return_tensors="pt", **PLAIN)


def _counted(output: Mapping[str, Any], merge: int) -> int | None:
    """The visual tokens of an image by its grid, if it has one."""
    grid = output.get("image_grid_thw")
    return None if grid is None else int(grid[0].prod()) // merge**2


def _parameters(function: Any) -> set[str]:
    return {*inspect.signature(function).parameters}


def _ends(ids: list[int], special: set[int], tokenizer: Any) -> tuple[str, str]:
    """The text before the first and after the last special token."""
    places = [place for place, token in enumerate(ids) if token in special]
    lead, trail = ids[: places[0]], ids[places[-1] + 1 :]
    return tuple(tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in (lead, trail))
