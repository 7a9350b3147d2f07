"""Recipes: everything that a training run depends on, as frozen dataclasses that are read from strict YAML."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from muco.base.text import read_text
from muco.base.yaml_text import parse_yaml
from muco.dialogue import Positions
from muco.errors import RecipeError
from muco.precision import Precision
from muco.sizes import Adapter, TinyConfig
from muco.starter import located
from muco.training.folder import RECIPE_FILE, SHORTER
from muco.training.read import REFUSED, WITHOUT_EFFECT, build, check_numbers, set_value
from muco.weighting import EQUAL, LEAST_TEMPERATURE, MOST_TEMPERATURE, Distillation, Guide, Weighting


@dataclass(frozen=True)
class ModelRecipe:
    """The model to train. Set exactly one of ``path`` and ``tiny``.

    Args:
        path: Folder or hub id of an image-text-to-text model.
        tiny: A small model made from its config and trained from scratch.
        adapter: None trains all weights.
        vision: Whether the vision tower is trained.
        connector: Whether that is trained which brings the tower's vectors to the language model; None: as ``vision``.
        dtype: "auto" (that of the checkpoint), "float32", "bfloat16" or "float16": the precision of frozen weights.
            Trained weights are float32, and so are frozen float16 weights without an adapter. Without an adapter, a
            model of half precision then computes in bfloat16 by autocast, unless ``precision`` says otherwise.
        save_dtype: Precision of the finished model's weights: "auto" (as ``dtype``), "float32", "bfloat16" or
            "float16". Adapters are folded in in float32.
        min_pixels, max_pixels: The pixel budget of an image; None keeps the model's own.
        attention: "sdpa" takes the mask of isolated turns as a matrix, [rows, 1, tokens, tokens]. "flex"
            (FlexAttention, CUDA only) takes it as a rule and skips what it hides.
        activation_checkpointing: Compute the activations of a layer again in backward instead of keeping them.
    """

    path: str | None = None
    tiny: TinyConfig | None = None
    adapter: Adapter | None = None
    vision: Literal["frozen", "trained"] = "frozen"
    connector: Literal["frozen", "trained"] | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    min_pixels: int | None = None
    max_pixels: int | None = None
    attention: Literal["sdpa", "flex"] = "sdpa"
    activation_checkpointing: bool = False


@dataclass(frozen=True)
class SourceRecipe:
    """A training set.

    Args:
        weight: Its share of every batch, relative to the other sources' weights; 1 if only others have one. If none
            has one, the rows of all sources are shuffled together, and each is seen as often as any other.
        format: One of ``muco.data.FORMATS``: MuCo's own JSONL, or a format in which others publish data.
        options: Further arguments of the format's class in ``muco/data``: the folder of images, columns, …
    """

    path: str
    weight: float | None = None
    format: str = "jsonl"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ValidationRecipe:
    """The set that is scored during training.

    Args:
        limit: Most samples that are read and scored, spread evenly over the set; null: all of it. It is scored before
            the first step and with every checkpoint, on one process while the others wait, so its size costs time.
        format, options: As those of a training set.
    """

    path: str
    limit: int | None = 500
    format: str = "jsonl"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataRecipe:
    """Where samples come from.

    Args:
        train: One source or more.
        epoch: The length of an epoch, which ``trainer.num_train_epochs`` counts. "every_row" ends when every row has
            been seen: once without weights; with weights, sources of more weight than rows are seen more often.
            "row_count" has as many samples as there are rows, so with weights some are seen often, others not at all.
        validation: A set to evaluate during training: a path of JSONL, or a :class:`ValidationRecipe`; None for none.
        broken_images: "error" stops at a row or an image that cannot be used. "skip" leaves its sample out, counts it
            and names it in ``<output>/skipped-<process>.jsonl``.
        max_broken: With "skip", stop when more than this share of the samples could not be used.
        duplicates: What to do with a target or an image that occurs in a batch again. "mask" trains it, and neither is
            a negative of the other. "leave_out" does not train it in this step; other turns of its sample are trained.
        one_source: Take every batch from one source, so that its negatives are of one kind; weights are then shares of
            the batches. False mixes the sources in every batch. Batches are whole: without weights, an epoch takes from
            each source the batches that its rows fill, the last one completed with rows of the next epoch.
        blind: Replace every pixel by a constant: a control that shows whether a run learns without looking.
    """

    train: tuple[SourceRecipe, ...] = ()
    epoch: Literal["every_row", "row_count"] = "every_row"
    validation: str | ValidationRecipe | None = None
    broken_images: Literal["error", "skip"] = "error"
    max_broken: float = 0.01
    duplicates: Literal["mask", "leave_out"] = "mask"
    one_source: bool = False
    blind: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "validation", self.validation_source)  # so that a record has the limit too

    @property
    def validation_source(self) -> ValidationRecipe | None:
        return ValidationRecipe(self.validation) if isinstance(self.validation, str) else self.validation

    @property
    def weights(self) -> tuple[float, ...] | None:
        """One per source; None if no source has one."""
        if all(source.weight is None for source in self.train):
            return None
        return tuple(1.0 if source.weight is None else source.weight for source in self.train)


@dataclass(frozen=True)
class TurnsRecipe:
    """How the turns of a sample share one pass.

    Args:
        mode: "isolated": a turn sees the image and itself. "compounded" (the paper): also the turns before it.
            "reconstruction" (the paper's fine-tuning): one turn is drawn of every sample, and each side of it has to
            reconstruct the other.
        targets: The mode of the target side, if it differs from ``mode``; null: the same. Not with "reconstruction".
        order: The order of a sample's turns, the same on both sides: "sample" draws one per sample (the paper),
            "batch" one per batch, a number g draws g per batch.
        limit: Most turns per sample and step, drawn anew each time; None for all.
        negatives: Most hard negatives per turn and step, drawn anew each time; None for all. The released code draws
            one.
        image_turn: The kind of turn whose target describes the whole image ("retrieval"). Its samples get one more
            turn, the image alone with that target, so that the model learns to embed an image alone; None for none.
        positions: Where a turn's positions begin: "restart" after the image, "run_on" after the turn before. None:
            isolated turns restart, which makes them equal to single turns, and compounded turns run on (the paper).
        requests: With "reconstruction", two texts: the user's requests before and after the assistant says the hidden
            counterpart, as in the released code. Pass its two sentences to train its checkpoints further
            (docs/training.md says where they are). Empty: the hidden counterpart is in one turn of the user.
    """

    mode: Literal["isolated", "compounded", "reconstruction"] = "isolated"
    targets: Literal["isolated", "compounded"] | None = None
    order: Literal["sample", "batch"] | int = "sample"
    limit: int | None = None
    negatives: int | None = None
    image_turn: str | None = None
    positions: Positions | None = None
    requests: tuple[str, ...] = ()

    @property
    def of_targets(self) -> str:
        """The mode of the target side."""
        return self.targets or self.mode


@dataclass(frozen=True)
class LossRecipe:
    """The arguments of :func:`muco.multi_turn_info_nce`, and Matryoshka training.

    Args:
        dimensions: The loss is the mean over vectors cut to their first N dimensions and normalised again, for each N
            here, so that shorter vectors work too (arXiv 2205.13147). Empty: the whole vector only.
        joint: With ``turns.mode: reconstruction``: whether its four terms share one set of candidates (the paper), or
            each has its own (the released code).
        mask_counterpart: False, with ``joint``, makes a pair's counterpart its negative, to show the mask's effect.
        mask_same_image: False makes the targets of an image's other turns negatives, to show the mask's effect.
        learn_temperature: Whether ``temperature`` is where a learnt one begins: one for all turns, or one per source in
            ``data.train``; for it to fit sources whose scores are spread differently. null: it is fixed.
        guide: A second model that tells false negatives: :class:`muco.weighting.Guide`.
        distillation: What turns with a teacher's ``scores`` learn from them: :class:`muco.weighting.Distillation`.
        weighting: What negatives count by their scores: :class:`muco.weighting.Weighting`.
    """

    temperature: float = 0.02
    mask_identical_targets: bool = True
    symmetric: bool = False
    dimensions: tuple[int, ...] = ()
    joint: bool = False
    mask_counterpart: bool = True
    mask_same_image: bool = True
    learn_temperature: Literal["one", "per_source"] | None = None
    weighting: Weighting = EQUAL
    guide: Guide | None = None
    distillation: Distillation | None = None


@dataclass(frozen=True)
class BatchRecipe:
    """How many samples a step takes, and how they pass through the available devices.

    Only ``size`` and ``group`` change the training: loss and gradient do not depend on the others, nor on the number of
    devices.

    Args:
        size: Samples per step, over all devices together.
        group: A step is made of groups of this many samples of one source each, so that many negatives are of the same
            kind, and not all; it divides ``size``. Weights are then shares of the groups. null: sources are mixed.
        token_budget: Most tokens whose activations a device holds, visual tokens and padding included. A larger batch
            passes through in chunks (gradient cache). None: the whole batch at once.
        feature_memory: GiB of a device that may hold the features of a frozen vision tower between the two passes of
            the cache; the rest waits in host memory.
        seen_memory: GiB of host memory, per process, that keep what a frozen vision tower made of an image for when the
            image comes again, in a later epoch. Equal up to rounding: an image then passes beside other images.
        sharding: "none": every device holds the whole model (data parallel). "fsdp": its weights, gradients and
            optimizer state are spread over the devices (FSDP2).
    """

    size: int = 32
    group: int | None = None
    token_budget: int | None = None
    feature_memory: float = 8.0
    seen_memory: float = 0.0
    sharding: Literal["none", "fsdp"] = "none"


@dataclass(frozen=True)
class Recipe:
    """A whole training run.

    Args:
        output: The run's folder: checkpoints, logs and, at the end, ``model/``.
        trainer: Training arguments of sentence-transformers, except those in :data:`muco.training.read.REFUSED`.
        seed: Seed of weights, order of samples, turns and paraphrases.
        precision: In which a step computes; trained weights, vectors and loss are float32. "bfloat16": by autocast.
            "auto": bfloat16 if it is clearly quicker, by some steps in each before the first; resuming keeps it.
            null: as the weights, see ``model.dtype``.
    """

    output: str
    model: ModelRecipe = field(default_factory=ModelRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    turns: TurnsRecipe = field(default_factory=TurnsRecipe)
    loss: LossRecipe = field(default_factory=LossRecipe)
    batch: BatchRecipe = field(default_factory=BatchRecipe)
    trainer: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    precision: Precision | None = None

    def __post_init__(self) -> None:
        check_numbers(dataclasses.asdict(self))
        least, most, tiny = self.model.min_pixels, self.model.max_pixels, self.model.tiny
        if least is not None and most is not None and least > most:
            raise RecipeError(f"model.min_pixels: {least} is more than model.max_pixels: {most}")
        for whole, part in (("width", "heads"), ("heads", "kv_heads"), ("vision_width", "vision_heads")):
            if tiny and getattr(tiny, whole) % getattr(tiny, part):
                raise RecipeError(f"model.tiny.{whole}: {getattr(tiny, whole)} is not a multiple of {part}")
        if (self.model.path is None) == (self.model.tiny is None):
            raise RecipeError("model: set exactly one of 'path' (an existing model) and 'tiny' (made from its config)")
        if tiny and (self.model.adapter or "frozen" in (self.model.vision, self.model.connector)):
            raise RecipeError("model: a tiny model starts from random weights; use 'vision: trained' and no adapter")
        if not self.data.train:
            raise RecipeError("data.train: name at least one source, e.g. train: [{path: data/train.jsonl}]")
        self._check_reconstruction()
        if self.batch.group is not None and (self.data.one_source or self.batch.size % self.batch.group):
            why = (
                "data.one_source makes a group of every batch" if self.data.one_source else "it must divide batch.size"
            )
            raise RecipeError(f"batch.group: {self.batch.group} samples: {why}")
        if self.batch.seen_memory and (self.model.vision == "trained" or self.batch.sharding == "fsdp"):
            raise RecipeError(
                "batch.seen_memory: what a tower saw is kept only with vision frozen and without sharding"
            )
        if self.loss.learn_temperature and not LEAST_TEMPERATURE <= self.loss.temperature <= MOST_TEMPERATURE:
            raise RecipeError(
                f"loss.temperature: one that is learnt is kept to {LEAST_TEMPERATURE:g} to {MOST_TEMPERATURE:g}, and "
                f"cannot begin at {self.loss.temperature:g}"
            )
        budget, limit = self.batch.token_budget, self.turns.limit
        if budget is not None and limit is not None and limit > budget:
            raise RecipeError(f"turns.limit: {limit} turns do not fit into batch.token_budget: {budget} tokens")
        if self.precision == "auto" and self.batch.sharding == "fsdp":
            raise RecipeError("precision: auto measures whole models; with batch.sharding: fsdp ask for bfloat16")
        for key in self.trainer:
            if key in REFUSED:
                raise RecipeError(f"trainer.{key} {REFUSED[key]}")

    def _check_reconstruction(self) -> None:
        if self.turns.mode == "reconstruction":
            if self.turns.image_turn is not None:
                raise RecipeError("turns.image_turn: reconstruction trains single pairs; leave it out")
            if self.turns.targets is not None:
                raise RecipeError("turns.targets: both sides of reconstruction are alike; leave it out")
            if self.turns.positions is not None:
                raise RecipeError("turns.positions: reconstruction has its own; leave it out")
            if self.loss.symmetric:
                raise RecipeError("loss.symmetric: reconstruction has no symmetric form; leave it out")
            if self.loss.distillation:
                raise RecipeError("loss.distillation: reconstruction does not take a teacher's scores; leave it out")
            if not self.loss.mask_same_image:
                raise RecipeError("loss.mask_same_image: reconstruction has its own mask; see loss.mask_counterpart")
            if self.turns.requests and [bool(text.strip()) for text in self.turns.requests] != [True, True]:
                raise RecipeError(f"turns.requests must be two texts, got {list(self.turns.requests)}")
        elif self.turns.requests:
            raise RecipeError("turns.requests needs 'turns: {mode: reconstruction}'")
        elif self.loss.joint or not self.loss.mask_counterpart:
            raise RecipeError("loss.joint and loss.mask_counterpart need 'turns: {mode: reconstruction}'")
        if not self.loss.mask_counterpart and not self.loss.joint:
            raise RecipeError("loss.mask_counterpart: only the joint loss has a counterpart to mask; set loss.joint")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe; paths in it are relative to the current folder.

    Args:
        overrides: "dotted.key=value" strings, the value in YAML.
    Raises:
        RecipeError: Naming the file, the key and the nearest accepted key.
    """
    file = Path(path)
    if not file.is_file():
        raise RecipeError(f"{file}: no such recipe file")
    values = parse_yaml(read_text(file, RecipeError), str(file), RecipeError)
    if not isinstance(values, dict):
        raise RecipeError(f"{file}: a recipe is a mapping of keys, not {type(values).__name__}")
    for word in overrides:
        set_value(values, word)
    try:
        return from_dict(values)
    except RecipeError as error:
        raise RecipeError(f"{file}: {error}") from None


def recorded(values: Mapping[str, Any]) -> Recipe:
    """The recipe of a run or a model that is there, perhaps of an older version.

    Older versions took keys without effect, and scored all of ``data.validation``.
    """
    trainer = {key: value for key, value in values.get("trainer", {}).items() if key not in WITHOUT_EFFECT}
    data = dict(values.get("data", {}))
    held_out = {"path": data["validation"]} if isinstance(data.get("validation"), str) else data.get("validation")
    if isinstance(held_out, Mapping) and "limit" not in held_out:
        data["validation"] = {key: value for key, value in held_out.items() if key != "weight"} | {"limit": None}
    return from_dict({**values, "data": data, "trainer": trainer})


def from_dict(values: Mapping[str, Any]) -> Recipe:
    """A recipe from plain values, with every key and type checked.

    Older versions wrote a group ``warm_up`` into every recipe; without steps it says nothing, and is passed over.
    """
    former = values.get("warm_up")
    if isinstance(former, Mapping):
        if former.get("steps"):
            raise RecipeError("warm_up is not supported any more: it left texts nearly equal; leave it out")
        values = {key: value for key, value in values.items() if key != "warm_up"}
    return build(Recipe, values)


def saved_recipe(model: str | Path) -> Recipe | None:
    """The recipe that a model was trained with; None if none is saved with it.

    Args:
        model: A folder, a hub id, or "starter".
    Raises:
        RecipeError: If it is of a version whose recipes have other keys.
    """
    file, values = _saved(model)
    try:
        return None if values is None else recorded(values)
    except RecipeError as error:
        raise RecipeError(f"{file}: {error}") from None


def trained_dimensions(model: str | Path) -> tuple[int, ...]:
    """The lengths of vectors that a model was trained for besides the whole one (Matryoshka), whatever its version.

    The recipe that is saved with it says them; without one, as in a merged model, its ``config.json`` does
    (:data:`muco.training.folder.SHORTER`). Raises a RecipeError if they are not a list of whole numbers, an OutputError
    if ``config.json`` cannot be read.
    """
    from transformers.utils.hub import cached_file

    from muco.base.files import read_json

    file, values = _saved(model)
    try:
        if values is not None:
            return tuple(int(number) for number in values["loss"]["dimensions"])
        file = cached_file(located(model), "config.json", _raise_exceptions_for_missing_entries=False)
        config = read_json(Path(file)) if file else {}
        return tuple(int(number) for number in config.get(SHORTER[1]) or ())
    except (KeyError, TypeError, ValueError) as error:
        raise RecipeError(f"{file}: the shorter lengths of its vectors cannot be read") from error


def _saved(model: str | Path) -> tuple[str, dict[str, Any] | None]:
    """The recipe's file and its values; None if there is none, or one that another program has written."""
    from transformers.utils.hub import cached_file  # imports much that recipes do not need

    file = cached_file(located(model), RECIPE_FILE, _raise_exceptions_for_missing_entries=False)
    if file is None:
        return "", None
    values = parse_yaml(read_text(Path(file), RecipeError), file, RecipeError)
    return file, values if isinstance(values, dict) and "loss" in values else None


def dump_recipe(recipe: Recipe) -> str:
    """The whole recipe, defaults included, as YAML that :func:`load_recipe` reads back."""
    return yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True)


def to_dict(recipe: Recipe) -> dict[str, Any]:
    return _plain(dataclasses.asdict(recipe))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
