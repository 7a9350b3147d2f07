"""Samples, turns and the two dialogues made of them. No torch in this file.

A *sample* is an image (or several, or none) with k *turns*; a turn is a (query, target) pair. Training reads a sample
as two *dialogues* with the same turn order::

    Sample(image, turns=[(q1, p1), …, (qk, pk)])
        query dialogue    context = the image(s), turns = q1 … qk
        target dialogue   context = nothing,      turns = p1 … pk

Source: arXiv 2602.06393, section 3 (multi-turn pre-training); docs/paper.md lists the equations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union

from muco.base.json_text import type_of
from muco.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from PIL.Image import Image

Positions = Literal["restart", "run_on"]
CONTENT_KEYS = ("text", "image", "images", "video", "caption")
VIDEO_KEYS = ("source", "frames", "fps")
FRAMES = 8  # of a video, where nothing else is said


@dataclass(frozen=True)
class Video:
    """A video as frames at even distances: one input, wherever an image may be.

    Args:
        source: A file, a folder of frames, or the frames in order.
        frames: How many are read, or all if there are fewer; see :func:`muco.video.frames_of`.
        fps: Frames per second of the source; None: as a file says, 2 for frames that are images.
    Raises:
        DataError: If there is no frame, or a number is not positive.
    """

    source: Path | tuple[ImageLike, ...]
    frames: int = FRAMES
    fps: float | None = None

    def __post_init__(self) -> None:
        vars(self)["source"] = Path(self.source) if isinstance(self.source, str) else self.source
        if not isinstance(self.source, (Path, tuple)) or not self.source:
            raise DataError("a video must be the path of a file or folder, or a list of at least one frame")
        if isinstance(self.frames, bool) or not isinstance(self.frames, int) or self.frames < 1:
            raise DataError(f"'frames' must be a whole number, at least 1, not {self.frames!r}")
        if self.fps is not None and not (type(self.fps) in (int, float) and 0 < self.fps < math.inf):
            raise DataError(f"'fps' must be a positive number of frames per second, not {self.fps!r}")

    def __str__(self) -> str:
        return str(self.source) if isinstance(self.source, Path) else f"a video of {len(self.source)} frames"


# a path, the bytes of an image file, an opened Pillow image, or a video
ImageLike = Union[str, Path, bytes, "Image", Video]


@dataclass(frozen=True)
class Content:
    """What one side of a turn says: text, images, or both. Images come before the text in the prompt.

    Empty content is allowed only where an image of the sample gives it meaning (the query "the image itself").

    Args:
        caption: Describes the images (for a query, the sample's too). It is never embedded as part of the content;
            fine-tuning by reconstruction hides it in their place.
    """

    text: str = ""
    images: tuple[ImageLike, ...] = ()
    caption: str = field(default="", compare=False)

    @property
    def empty(self) -> bool:
        return not self.text and not self.images


BLANK = Content(" ")  # what a content becomes of which nothing is left, for models embed no empty content
ContentLike = Union[Content, str, Path, bytes, "Image", Mapping[str, Any]]  # what :func:`as_content` reads


def as_content(value: object, name: str = "content") -> Content:
    """Reads a string, an image, a mapping with ``text``, ``image``, ``images`` or ``video``, or a Content.

    Args:
        name: What errors call the value.
    Raises:
        DataError: If the value is none of these, or a mapping has other keys.
    """
    if isinstance(value, Content):
        return value
    if isinstance(value, str):
        return Content(text=value)
    if isinstance(value, Mapping):
        for key in value:
            if key not in CONTENT_KEYS:
                raise DataError(f"unknown key {key!r} in {name}{did_you_mean(key, CONTENT_KEYS)}")
        text, caption = value.get("text"), value.get("caption")
        for key, said in (("text", text), ("caption", caption)):
            if not isinstance(said, str | None):
                raise DataError(f"{key!r} must be a string, not {type_of(said)}")
        images = as_images(value.get("image")) + as_images(value.get("images")) + as_video(value.get("video"))
        return Content(text or "", images, caption or "")
    return Content(images=as_images(value))


def as_images(value: object) -> tuple[ImageLike, ...]:
    """Reads nothing, one image (path, bytes or Pillow) or a sequence of them; bad types are a DataError."""
    if value is None:
        return ()
    # Pillow's by name, so that reading text-only data needs no Pillow
    pillow = any(c.__module__ == "PIL.Image" and c.__name__ == "Image" for c in type(value).__mro__)
    if pillow or isinstance(value, (str, Path, bytes, Video)):
        if isinstance(value, (str, bytes)) and not value:
            raise DataError("an image is an empty string; leave the key out if there is no image")
        return (value,)
    if isinstance(value, Sequence):
        return tuple(image for item in value for image in as_images(item))
    raise DataError(f"an image must be a path, bytes or a Pillow image, not {type(value).__name__}")


def as_video(value: object) -> tuple[Video, ...]:
    """Reads nothing, the path of a file or folder, a list of frames, or a mapping with ``source``, ``frames`` and
    ``fps``; bad types are a DataError.
    """
    if value is None or isinstance(value, Video):
        return () if value is None else (value,)
    if isinstance(value, Mapping):
        for key in value:
            if key not in VIDEO_KEYS:
                raise DataError(f"unknown key {key!r} in 'video'{did_you_mean(key, VIDEO_KEYS)}")
        how = {key: value[key] for key in VIDEO_KEYS[1:] if value.get(key) is not None}
        return tuple(replace(video, **how) for video in as_video(value.get("source") or ()))
    if isinstance(value, (list, tuple)):
        value = as_images(value)
        if any(isinstance(frame, Video) for frame in value):
            raise DataError("'video' holds a video; pass its frames, or one video")
    elif not isinstance(value, (str, Path)) or not str(value):
        raise DataError(f"'video' must be the path of a file or folder, or a list of frames, not {type_of(value)}")
    return (Video(value),)


def _paraphrases(value: object, name: str) -> tuple[Content, ...]:
    if isinstance(value, (list, tuple)) and not value:
        raise DataError(f"{name!r} is an empty list; pass at least one wording")
    return tuple(as_content(item, repr(name)) for item in (value if isinstance(value, (list, tuple)) else (value,)))


@dataclass(frozen=True, init=False)
class Turn:
    """One (query, target) pair.

    Args:
        query: A string, an image, a mapping with ``text`` and/or ``image``, or a list of paraphrases of which one is
            drawn whenever the sample is used. An empty string means the sample's image itself.
        target: The same, never empty.
        kind: A free label ("classification", "retrieval" …) by which evaluation groups its scores.
        negatives: Hard negatives, each like ``target``.
        scores: What a teacher gives the target and then each negative: numbers of any scale, the higher the better.
    Attributes:
        query, target: The paraphrases.
    Raises:
        DataError: If a side has the wrong type, the target or a negative is empty, or there is not a finite score for
            each of both.
    """

    query: tuple[Content, ...]
    target: tuple[Content, ...]
    kind: str | None
    negatives: tuple[Content, ...]
    scores: tuple[float, ...]

    def __init__(
        self,
        query: ContentLike | Sequence[ContentLike],
        target: ContentLike | Sequence[ContentLike],
        kind: str | None = None,
        negatives: Iterable[ContentLike] = (),
        scores: Iterable[float] = (),
    ) -> None:
        # frozen, so the fields are set past __setattr__, once
        vars(self).update(query=_paraphrases(query, "query"), target=_paraphrases(target, "target"), kind=kind)
        vars(self).update(negatives=tuple(as_content(item, "'negatives'") for item in negatives))
        try:
            vars(self).update(scores=tuple(map(float, scores)))
        except OverflowError as error:  # a whole number of hundreds of digits
            raise DataError("'scores' must be finite numbers, and one is too large") from error
        if self.scores and (len(self.scores) != 1 + len(self.negatives) or not self.negatives):
            raise DataError(
                f"'scores' are one for the target and one for each negative, {1 + len(self.negatives)} of them; got "
                f"{len(self.scores)}{'' if self.negatives else ', and there are no negatives to compare with'}"
            )
        if not all(map(math.isfinite, self.scores)):
            raise DataError(f"'scores' must be finite numbers, got {[*self.scores]}")
        for name in ("target", "negatives"):
            if any(content.empty for content in getattr(self, name)):
                raise DataError(f"{name!r} is empty; pass text, an image or both")


@dataclass(frozen=True, init=False)
class Sample:
    """An image, several or none, and the turns about it.

    Args:
        image: A path, the bytes of a file, a Pillow image, or a sequence of these.
        id: Samples without an image, of one source, with the same id are about the same thing: their targets are not
            negatives of one another.
        where: "file:line", for error messages only.
    Raises:
        DataError: If there is no turn, or a query is empty although the sample has no image.
    """

    images: tuple[ImageLike, ...]
    turns: tuple[Turn, ...]
    id: str | None
    where: str = field(compare=False)

    def __init__(
        self,
        image: ImageLike | Sequence[ImageLike] | None = None,
        turns: Iterable[Turn] = (),
        id: str | None = None,
        where: str = "",
    ) -> None:
        vars(self).update(images=as_images(image), turns=tuple(turns), id=id, where=where)
        if not self.turns:
            raise DataError(f"{self.place}: a sample without turns; pass at least one (query, target) pair")
        for number, turn in enumerate(() if self.images else self.turns, start=1):
            if any(content.empty for content in turn.query):
                what = "an empty query means the sample's image, and there is none"
                raise DataError(f"{self.place} turn {number}: 'query' is empty; pass text, an image or both ({what})")

    @property
    def place(self) -> str:
        return self.where or f"sample {self.id or '(no id)'}"

    def with_turns(self, turns: Iterable[Turn]) -> Sample:
        return Sample(self.images, turns, self.id, self.where)

    def with_images(self, images: Sequence[ImageLike]) -> Sample:
        return Sample(images, self.turns, self.id, self.where)


@dataclass(frozen=True)
class Exchange:
    """What is said before the last turn of a dialogue, word for word; no embedding is read after it."""

    request: str  # of the user
    reply: str  # of the assistant


@dataclass(frozen=True)
class Dialogue:
    """One side of a sample, ready for a template.

    Args:
        context: Images that all turns share; they come once, at the front of the first turn.
        turns: The user's messages in order; each yields one embedding.
        isolated: If true, a turn sees the context and itself only; otherwise also every turn before it.
        reconstructs: Whether turns after the first, or the exchange, hold the mask token, which data may not hold.
        exchange: Said before the last turn, whose text is then taken word for word; for turns that are not isolated.
        positions: Where a turn's positions begin: "restart" after what isolated turns share, "run_on" after the turn
            before. None: "restart" if isolated, so that turns equal single turns, else "run_on".
        where: Names the row in error messages.
    """

    context: tuple[ImageLike, ...]
    turns: tuple[Content, ...]
    isolated: bool = True
    where: str = field(default="", compare=False)
    reconstructs: bool = False
    positions: Positions | None = None
    exchange: Exchange | None = None

    @property
    def restarts(self) -> bool:
        """Whether every turn's positions begin at the same place."""
        return self.isolated if self.positions is None else self.positions == "restart"

    @property
    def images(self) -> tuple[ImageLike, ...]:
        """All images in the order of their placeholders in the prompt."""
        return self.context + tuple(image for turn in self.turns for image in turn.images)


def query_dialogue(
    sample: Sample, contents: Sequence[Content], *, isolated: bool, positions: Positions | None = None
) -> Dialogue:
    """The dialogue that asks: the sample's images once, then the chosen queries in order."""
    return Dialogue(sample.images, tuple(contents), isolated, sample.place, positions=positions)


def target_dialogue(
    sample: Sample, contents: Sequence[Content], *, isolated: bool, positions: Positions | None = None
) -> Dialogue:
    """The dialogue that answers: the chosen targets in the order of the queries, without the sample's images."""
    return Dialogue((), tuple(contents), isolated, sample.place, positions=positions)


def single_turn(value: ContentLike, where: str = "") -> Dialogue:
    """The dialogue of one input at inference: text, an image, or both; a DataError if there is neither."""
    content = as_content(value)
    if content.empty:
        raise DataError(f"{where or 'input'}: nothing to embed; pass text, an image or both")
    return Dialogue(content.images, (Content(text=content.text),), True, where)
