"""A model as the ``mteb`` package wants it: ``mteb.evaluate(MtebEncoder(muco.load(path)), tasks)``.

``pip install mteb`` (or ``muco[mteb]``) brings the package. Its tasks hand over batches of columns; a row becomes
the content that :meth:`muco.model.Model.encode` takes::

    batch of columns ─text, image─▶ Content ─model─▶ vector ─first dimensions, normalised─▶ row of [n, d]
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from muco.dialogue import BLANK, Content
from muco.errors import DataError, MucoError
from muco.evaluate.cache import Book
from muco.sizes import checked_dimension

try:
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ModelMeta, ScoringFunction
except ImportError as error:
    raise MucoError(f"the mteb package is not installed ({error}); run: pip install mteb") from error

from mteb.abstasks.task_metadata import TaskMetadata
from mteb.types import PromptType
from torch.utils.data import DataLoader

from muco.model import Model, load

MODALITIES = ("text", "image")
INSTRUCTIONS = (
    "a task's prompt is put before its queries in retrieval, and before every input of other tasks; "
    "where a query's data have an instruction, that one alone"
)

log = logging.getLogger(__name__)


class MtebEncoder(AbsEncoder):
    """Encodes texts, images and both; other modalities are refused.

    Args:
        model: From :func:`muco.load`, or a path or hub id.
        name: Of the model in results, a path or hub id; ``model`` if that is one.
        device: See :func:`muco.load`.
        instructions: Put the prompt that a task states before its inputs, see ``INSTRUCTIONS``. A task that states none
            gets none: mteb's general ones ("Retrieve text based on user query.") speak of texts only.
        dimension: Cut vectors to their first dimensions and normalise them again. None: as the model has it.
        dimensions: Sizes that the model was trained for (Matryoshka), smaller ones than its vectors; only named in
            results.
    Raises:
        MucoError: If the model's vectors are shorter than ``dimension``.

    Attributes:
        mteb_model_meta: Its name and revision, and the settings of this encoder, are what mteb finds results by.
    """

    def __init__(
        self,
        model: Model | str | Path,
        name: str = "",
        *,
        device: str | None = None,
        instructions: bool = True,
        dimension: int | None = None,
        dimensions: Sequence[int] = (),
    ) -> None:
        if not isinstance(model, Model):
            name, model = name or str(model), load(model, device=device)
        dimension = model.truncate_dim if dimension is None else dimension
        checked_dimension(dimension, model.get_embedding_dimension())
        self.model, self.instructions, self.dimension = model, instructions, dimension
        self.mteb_model_meta = model_meta(model, name, instructions, dimension, dimensions)
        self._kept = _Kept()

    def encode(
        self,
        inputs: DataLoader[Any],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        batch_size: int = 32,
        **kwargs: Any,
    ) -> np.ndarray:
        """One vector per row of the batches, in their order.

        Args:
            batch_size: Contents per forward pass; the vectors do not depend on it.
        Returns:
            float32 [n, d], L2-normalised.
        Raises:
            DataError: If a batch has audio, video, neither text nor image, or a missing text, or the model refuses a
                content; the message names the task, and the row or the column.
        """
        task, side = task_metadata.name, prompt_type.value if prompt_type else "input"
        instruction = self._instruction(task_metadata, prompt_type)
        self._kept.start(task, several=len(task_metadata.hf_subsets) > 1)
        vectors: list[np.ndarray] = []
        row = blanks = 0
        for contents in _joined((_contents(batch, instruction, task) for batch in _batches(inputs, task)), batch_size):
            blanks += sum(content == BLANK for content in contents)
            places = [f"{task}, {hf_split}, {hf_subset}, {side} {row + number}" for number in range(len(contents))]
            vectors.append(self._vectors(contents, places, batch_size))
            row += len(contents)
        if blanks:
            said = "%s, %s, %s: %d of %d rows (%s) have neither text nor image; each is read as a blank"
            log.warning(said, task, hf_split, hf_subset, blanks, row, side)
        if not vectors:
            raise DataError(f"{task}, {hf_split}, {hf_subset}: has no {side} to encode")
        return np.concatenate(vectors)

    def _instruction(self, task: TaskMetadata, prompt_type: PromptType | None) -> str:
        if not self.instructions or prompt_type is PromptType.document:
            return ""
        prompt = task.prompt
        if isinstance(prompt, Mapping):
            return (prompt.get(PromptType.query.value) or "") if prompt_type else ""
        return prompt or ""

    def _vectors(self, contents: Sequence[Content], places: Sequence[str], batch_size: int) -> np.ndarray:
        """Vectors of contents, [n, d]; those of images that an earlier subset of the task had are kept."""
        book = Book()
        keys = [book.add(content, place) for content, place in zip(contents, places, strict=True)]
        new = [key for key in dict.fromkeys(keys) if key not in self._kept.vectors]
        found = dict(self._kept.vectors)
        if new:
            vectors, rows = book.vectors(_Cut(self.model, self.dimension), batch_size, new)
            found |= {key: vectors[row] for key, row in rows.items()}
            self._kept.add({key: found[key] for key in new if book.contents[key].images})
        return np.stack([found[key] for key in keys])


@dataclass(frozen=True)
class _Cut:
    """The model with shorter vectors."""

    model: Model
    dimension: int | None

    def encode(self, contents: list[Content], /, *, batch_size: int) -> np.ndarray:
        return self.model.encode(contents, batch_size=batch_size, truncate_dim=self.dimension, show_progress_bar=False)

    @property
    def fingerprint(self) -> str:
        return self.model.fingerprint


@dataclass
class _Kept:
    """Vectors of one task's images by content: every language of ViDoRe V2 and V3 has the same pages again."""

    vectors: dict[str, np.ndarray] = field(default_factory=dict)
    task: str = ""
    several: bool = False

    def start(self, task: str, *, several: bool) -> None:
        """Forgets another task's vectors; a task without several subsets has nothing to keep."""
        if task != self.task:
            self.vectors = {}
        self.task, self.several = task, several

    def add(self, vectors: Mapping[str, np.ndarray]) -> None:
        if self.several:
            self.vectors.update(vectors)


def model_meta(
    model: Model, name: str, instructions: bool, dimension: int | None, dimensions: Sequence[int] = ()
) -> ModelMeta:
    """What mteb keeps of a model, and finds its results by: name, revision and ``experiment_kwargs``.

    The revision is the model's fingerprint, which follows weights, tokenizer, prompt and pixel limits. What is not
    known is None, such as languages and the data it was trained on.

    Args:
        name: A hub id ("org/name") is taken as it is; a folder becomes "muco/" and its own name.
        instructions, dimension, dimensions: See :class:`MtebEncoder`.
    """
    whole = model.get_embedding_dimension()
    processor = model.encoder.muco_processor
    settings: dict[str, bool | int | str] = {"instructions": instructions}
    cut = dimension is not None and dimension != whole
    if cut:
        settings["embed_dim"] = dimension  # mteb's own name for it
    if processor.trained_pixels and processor.pixels and processor.pixels != processor.trained_pixels:
        settings["pixels"] = "{}-{}".format(*processor.pixels)
    weights = list(model.parameters())
    return ModelMeta(
        loader=None,
        name=_name(name),
        revision=model.fingerprint,
        release_date=None,
        languages=None,
        n_parameters=sum(p.numel() for p in weights),
        n_embedding_parameters=sum(p.numel() for p in model.encoder.model.get_input_embeddings().parameters()),
        memory_usage_mb=round(sum(p.numel() * p.element_size() for p in weights) / 2**20, 1),
        max_tokens=model.max_seq_length,
        embed_dim=dimension if cut else sorted({*dimensions, whole}) if dimensions else whole,
        license=None,
        open_weights=None,
        public_training_code=None,
        public_training_data=None,
        framework=["Sentence Transformers", "PyTorch"],
        similarity_fn_name=ScoringFunction.COSINE,
        use_instructions=instructions,
        training_datasets=None,
        modalities=list(MODALITIES),
        experiment_kwargs=settings,
    )


def _name(name: str) -> str:
    """ "org/name" of a hub id or a folder; the revision tells models of the same name apart."""
    if name.count("/") == 1 and all(name.split("/")) and not name.startswith(".") and not Path(name).exists():
        return name
    return f"muco/{Path(name).resolve().name if name else 'model'}"


def _batches(inputs: Iterable[Mapping[str, Any]], task: str) -> Iterator[Mapping[str, Any]]:
    """The batches of a loader; a cell that is missing, which mteb refuses without naming the task, is a DataError."""
    try:
        yield from inputs
    except ValueError as error:
        if "Found None in batch" not in str(error):
            raise
        column = str(error).split("'")[1]
        raise DataError(f"{task}: a row has nothing in the column {column!r}; repair the task's data") from error


def _joined(parts: Iterable[list[Content]], size: int) -> Iterator[list[Content]]:
    """Parts of at least this size, but for the last: some tasks hand over images one by one."""
    together: list[Content] = []
    for part in parts:
        together += part
        if len(together) >= size:
            yield together
            together = []
    if together:
        yield together


def _contents(batch: Mapping[str, Sequence[Any]], instruction: str, task: str) -> list[Content]:
    """One content per row. A conversation's turns are joined in "text" by mteb."""
    for name in ("audio", "video"):
        if any(value is not None for value in batch.get(name, ())):
            raise DataError(f"{task}: the column {name!r} holds {name}; the model reads text and images")
    if not any(name in batch for name in MODALITIES):
        raise DataError(f"{task}: no column 'text' or 'image' to encode, only {', '.join(map(repr, batch))}")
    length = len(next(batch[name] for name in MODALITIES if name in batch))
    columns = [batch.get(name, [None] * length) for name in ("text", "image", "instruction")]
    rows = zip(*columns, strict=True)
    return [_content(text, image, "" if own else instruction, task) for text, image, own in rows]


def _content(text: Any, image: Any, instruction: str, task: str) -> Content:
    for column, value, kind in (("text", text, str), ("image", image, Image)):
        if value is not None and not isinstance(value, kind):
            known = "a text" if kind is str else "a Pillow image"
            raise DataError(f"{task}: the column {column!r} holds a {type(value).__name__}, not {known}")
    said = " ".join(part for part in (instruction, text) if part)
    return Content(said, () if image is None else (image,)) if said or image is not None else BLANK
