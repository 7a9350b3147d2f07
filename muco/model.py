"""The embedding model: load, encode, encode turns, save."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize
from torch import Tensor, nn

from muco.backbone import load_backbone
from muco.base.files import writing
from muco.base.machine import GIB
from muco.batch import DialogueBatch, to
from muco.dialogue import Content, Dialogue, ImageLike, as_images
from muco.encoder import Encoder, content_of
from muco.errors import DataError, MucoError
from muco.pooling import TurnPooling, shortened
from muco.precision import Choice, Precision, quicker
from muco.processor import Processor
from muco.seen import SeenImages
from muco.sizes import checked_dimension
from muco.stock import small_picture, write_json
from muco.template import EMB
from muco.turns import embed_turns

TOKEN_BUDGET = 16384  # of a pass of turns
TRIAL_SIZE, TRIAL_TEXT = (448, 448), "a photograph of a red bicycle in the snow"  # of passes that choose a precision

STOCK_MODULES = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}  # name -> folder

log = logging.getLogger(__name__)


class Model(SentenceTransformer):
    """A universal multimodal embedding model; made by :func:`load` or :func:`from_backbone`."""

    @property
    def encoder(self) -> Encoder:
        return self[0]

    def embed(self, batch: DialogueBatch) -> Tensor:
        """One vector per turn of a batch, with its graph: float32 [turns, dim], L2-normalised, on this device."""
        features = to(batch, self.device)
        for module in self:
            features = module(features)
        return features["sentence_embedding"]

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> DialogueBatch:
        return self.encoder.preprocess(inputs, prompt=prompt, **kwargs) if len(inputs) else {}

    def opened(self, image: ImageLike) -> Any:
        """An image or a video as this model needs it: upright and RGB; of large JPEGs no more is decoded than that.

        For whoever opens images in threads while the model encodes. Raises an ImageError if it cannot be used.
        """
        return self.encoder.muco_processor.opened(image)

    def is_singular_input(self, inputs: Any) -> bool:
        return isinstance(inputs, (str, bytes, Mapping, Content)) or not isinstance(inputs, Iterable)

    def encode(self, inputs: Any, **kwargs: Any) -> Any:
        """Embeds strings, images (path, bytes, Pillow), videos, and mappings of several of these, mixed in one call.

        A plain string is text; an image file is a :class:`pathlib.Path` or ``{"image": "file.png"}``; a video is a
        :class:`muco.dialogue.Video` or ``{"video": …}``, a file, a folder of frames or a list of them. More tokens than
        the model's context are an error; set ``model.max_seq_length`` to cut long texts.

        Args:
            inputs: One input, or several: a list, a column of a table, a generator, …
            kwargs: Those of ``SentenceTransformer.encode``: ``batch_size``, ``show_progress_bar``; ``truncate_dim`` for
                shorter vectors (Matryoshka; None: the model's own), ``precision`` for quantised ones, …
        Returns:
            float32 [n, dim] in the order of the inputs, L2-normalised, shortened ones too ([dim] for one input).
        Raises:
            DataError: If an input is none of these, is empty, is too long, or its text holds a special token.
            ImageError: If an image cannot be used.
            MucoError: If the model's vectors are shorter than ``truncate_dim``.
        """
        if self.is_singular_input(inputs):
            return self.encode([inputs], **kwargs)[0]
        asked = self.truncate_dim if kwargs.get("truncate_dim") is None else kwargs["truncate_dim"]
        whole = self.encoder.get_embedding_dimension()
        kwargs["truncate_dim"] = dimension = checked_dimension(asked, whole)
        if dimension < whole:
            kwargs["normalize_embeddings"] = True  # the library leaves what it has cut shorter than 1
        # The library sorts inputs by length, which it knows for mappings of strings and Pillow images. Its order is not
        # the caller's, so each input takes along the number by which an error names it.
        values = []
        if len(getattr(inputs, "shape", (0,))) != 1 or isinstance(inputs, (set, frozenset)):
            raise DataError(
                f"encode takes one input or a list of them, not a {type(inputs).__name__}; pass one column of a table, "
                "pixels as a Pillow image, and inputs in an order"
            )
        for number, value in enumerate(inputs):
            content = content_of(value, f"input {number}")
            values.append({"text": content.text, "images": [*content.images], "where": f"input {number}"})
        if not values and kwargs.get("convert_to_numpy", True) and not kwargs.get("convert_to_tensor"):
            return np.zeros((0, dimension), dtype=np.float32)
        with self._telling_cuts():
            return super().encode(values, **kwargs)

    @contextmanager
    def _telling_cuts(self) -> Iterator[None]:
        """Warns of the texts that were cut within, if any."""
        before = self.encoder.cut
        yield
        cut, self.encoder.cut = self.encoder.cut - before, before
        if cut:
            warnings.warn(
                f"{cut} {'text was' if cut == 1 else 'texts were'} cut at the end, to max_seq_length = "
                f"{self.max_seq_length} tokens with images and prompt",
                stacklevel=4,
            )

    def encode_turns(
        self, image: Any, queries: Sequence[Any], *, mode: Literal["isolated", "compounded"] = "isolated"
    ) -> Float[np.ndarray, "k dim"]:
        """Embeds many queries about one image, which is encoded once.

        Args:
            image: An image, several, or None.
            queries: Texts; an empty one is the image itself.
            mode: "isolated": each vector is the one of a call with this query alone. "compounded": a query also sees
                the queries before it, as in the paper's training.
        Returns:
            float32 [k, dim], L2-normalised.
        Raises:
            DataError: If there is no query, or an empty one and no image.
        """
        return self._encode_turns([image], [queries], ["encode_turns"], mode, 1, TOKEN_BUDGET)[0]

    def encode_turns_batch(
        self,
        images: Sequence[Any],
        queries: Sequence[Sequence[Any]],
        *,
        mode: Literal["isolated", "compounded"] = "isolated",
        batch_size: int = 8,
        token_budget: int = TOKEN_BUDGET,
    ) -> list[Float[np.ndarray, "k dim"]]:
        """:meth:`encode_turns` for many images, each with its own queries.

        In isolated mode the system text and the images pass once and keep their keys and values, which the queries
        read in passes of their own; how a family shares them is decided by :func:`muco.turns.sharing`.

        Args:
            batch_size: Dialogues whose images are in memory at once; changes the result by rounding alone.
            token_budget: Most tokens that pass through the model at once, which bounds memory; changes the result by
                rounding alone. What one image needs by itself may exceed it.
        Raises:
            DataError: Also if ``images`` and ``queries`` differ in length; names the dialogue by its place, from 0.
        """
        if len(images) != len(queries):
            raise DataError(f"encode_turns_batch: {len(images)} images but {len(queries)} lists of queries")
        places = [f"encode_turns_batch: dialogue {number}" for number in range(len(images))]
        return self._encode_turns(images, queries, places, mode, batch_size, token_budget)

    @torch.inference_mode()
    def _encode_turns(
        self, images: Sequence[Any], queries: Sequence[Any], places: Sequence[str], mode: str, size: int, budget: int
    ) -> list[np.ndarray]:
        if mode not in ("isolated", "compounded"):
            raise MucoError(f"mode must be 'isolated' or 'compounded', got {mode!r}")
        dimension = checked_dimension(self.truncate_dim, self.encoder.get_embedding_dimension())
        asked = zip(images, queries, places, strict=True)
        dialogues = [_dialogue_of_turns(image, some, mode == "isolated", place) for image, some, place in asked]
        self.eval()
        vectors: list[Tensor] = []
        with self._telling_cuts():
            for start in range(0, len(dialogues), size):
                some = dialogues[start : start + size]
                made = embed_turns(self.encoder, self.embed, some, budget)
                vectors += self._embed_each(some) if made is None else made
        return [shortened(some, dimension).cpu().numpy() for some in vectors]

    def _embed_each(self, dialogues: Sequence[Dialogue]) -> list[Tensor]:
        contents = [Content(turn.text, d.context + turn.images) for d in dialogues for turn in d.turns]
        whole = self.encoder.get_embedding_dimension()
        alone = self.encode(contents, convert_to_tensor=True, truncate_dim=whole, show_progress_bar=False)
        return list(alone.split([len(dialogue.turns) for dialogue in dialogues]))

    @property
    def precision(self) -> Precision | None:
        """In which passes compute; None: in that of the weights."""
        return {True: "bfloat16", False: "float32", None: None}[self.encoder.bfloat16]

    @property
    def caveat(self) -> str:
        """What whoever takes the vectors for an embedding must know of the model as it was loaded; "" if nothing."""
        if self.encoder.muco_processor.trained_for_vectors:
            return ""
        return (
            f"the model was not trained for vectors: they are read at a new token, {EMB}, in MuCo's prompt, and it has "
            "learnt neither; train it first, or take an embedding model"
        )

    @property
    def fingerprint(self) -> str:
        """sha256 of weights, prompt, pixel budget and cut texts: whatever changes a whole vector by more than rounding
        changes it. A machine, the precision to compute in and ``truncate_dim`` are not in it.
        """
        settings = self.encoder.muco_processor.settings()
        if self.max_seq_length != self.encoder.muco_processor.max_tokens:
            settings["max_seq_length"] = self.max_seq_length
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        digest.update(self.tokenizer.backend_tokenizer.to_str().encode())
        add_weights(digest, self)
        return digest.hexdigest()

    def save(self, path: str, *args: Any, **kwargs: Any) -> None:
        """Saves a stock SentenceTransformer folder, see :mod:`muco.encoder`."""
        with writing(path):
            super().save(path, *args, **kwargs)
            _write_stock_modules(Path(path), self.encoder.get_embedding_dimension())


def add_weights(digest: Any, module: nn.Module) -> None:
    """Takes all weights of a module into a digest of hashlib, with their names, types and shapes."""
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _write_stock_modules(folder: Path, dimension: int) -> None:
    """Names the modules as every version of the stock library does, and vLLM, which knows the oldest names only."""
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (name, path) in enumerate(STOCK_MODULES.items())
    ]
    others = ("cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens")
    pooling = {
        "word_embedding_dimension": dimension,
        **{f"pooling_mode_{mode}": False for mode in others},
        "pooling_mode_lasttoken": True,
        "pooling_mode": "lasttoken",  # the new style
        "include_prompt": True,  # last: vLLM takes the first true value for the mode
    }
    write_json(folder / "modules.json", modules)
    write_json(folder / STOCK_MODULES["Pooling"] / "config.json", pooling)
    shutil.rmtree(folder / f"1_{TurnPooling.__name__}")  # written by the library under our class's name


def _dialogue_of_turns(image: Any, queries: Any, isolated: bool, place: str) -> Dialogue:
    if isinstance(queries, (str, bytes, Mapping)) or not isinstance(queries, Iterable):
        raise DataError(f"{place}: queries must be a list, not one {type(queries).__name__}")
    try:
        images = as_images(image)
    except DataError as error:
        raise DataError(f"{place}: {error}") from error
    contents = tuple(content_of(query, place) for query in queries)
    if not contents or (not images and any(content.empty for content in contents)):
        raise DataError(f"{place}: pass at least one query, and an image where a query is empty")
    return Dialogue(images, contents, isolated, place)


def from_backbone(model: nn.Module, processor: Processor, *, device: str | None = None) -> Model:
    """An embedding model of a prepared backbone (see :mod:`muco.backbone`)."""
    encoder = Encoder(model, processor)
    return Model(modules=[encoder, TurnPooling(encoder.get_embedding_dimension()), Normalize()], device=device)


def load(
    path: str | Path,
    *,
    device: str | None = None,
    truncate_dim: int | None = None,
    precision: Precision | None = None,
    image_memory: float = 0.0,
    **kwargs: Any,
) -> Model:
    """Loads a trained model, a released checkpoint of the paper, or a plain image-text-to-text model.

    A line in the log says if the model was not trained for vectors (:attr:`Model.caveat`).

    Args:
        path: A folder, a hub id, or "starter": a small model that comes with MuCo and is made at first use.
        device: "cpu", "cuda", …; the best one available if None.
        truncate_dim: Truncate vectors to the first N dimensions and normalise them again; for models trained with
            ``loss.dimensions``. None: whole vectors.
        precision: "float32" or "bfloat16" to compute in; "auto": bfloat16 if it is clearly quicker here, by three small
            passes in each, which a line on stderr tells. None: that of the weights. Weights in float32 stay so, and
            those in half precision do but for "float32".
        image_memory: GiB of host memory that keep what the vision tower made of an image for when it comes again, in
            any call. Vectors are equal up to rounding: an image then passes beside other images.
        kwargs: Those of :func:`muco.backbone.load_backbone`.
    Raises:
        CheckpointError: If weights are missing, or the folder does not hold such a model.
        MucoError: If the model's vectors are shorter than ``truncate_dim``, or it cannot compute in the precision.
    """
    if precision == "float32":
        kwargs.setdefault("dtype", "float32")
    model = from_backbone(*load_backbone(path, **kwargs), device=device)
    checked_dimension(truncate_dim, model.get_embedding_dimension())
    model.truncate_dim = truncate_dim
    if model.caveat:
        log.warning("%s: %s", path, model.caveat)
    if precision is not None:
        compute_in(model, precision)
    if image_memory:
        model.encoder.seen_images = SeenImages(round(image_memory * GIB))
    return model


def loaded(model: Model | str | Path, *, precision: Precision | None = None) -> Model:
    """A model, or the one at a path; a MucoError if a precision is asked of one that is loaded already."""
    if isinstance(model, (str, Path)):
        return load(model, precision=precision)
    if precision is not None:
        raise MucoError(f"the model is loaded already; pass precision={precision!r} to muco.load")
    return model


def compute_in(model: Model, precision: Precision) -> Choice | None:
    """Lets a model in float32 compute in a precision; "auto" tries both and returns what it measured, logged too."""
    encoder, held = model.encoder, str(model.encoder.model.dtype).removeprefix("torch.")
    if precision not in get_args(Precision):
        raise MucoError(f"precision must be one of {', '.join(get_args(Precision))}, not {precision!r}")
    if held != "float32":  # it computes in what its weights are held in
        if precision not in ("auto", held):
            raise MucoError(
                f"the weights are held in {held}; to compute in {precision}, load them with dtype='float32'"
            )
        return None
    if precision != "auto":
        encoder.bfloat16 = precision == "bfloat16"
        return None
    image = small_picture().resize(TRIAL_SIZE)
    batch = model.preprocess([{"image": image}, TRIAL_TEXT] * 2)

    @torch.inference_mode()
    def one_pass(bfloat16: bool) -> None:
        encoder.bfloat16 = bfloat16
        model.embed({**batch})

    choice = quicker(one_pass, encoder.device)
    encoder.bfloat16 = choice.bfloat16
    log.warning("computes in %s", choice)
    return choice
