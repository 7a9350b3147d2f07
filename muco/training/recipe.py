"""Recipes: frozen dataclasses read from strict YAML.

A recipe says everything a training run depends on. Unknown keys, wrong types and contradictions are errors before
anything is loaded; the resolved recipe is saved beside the weights.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from muco.base.text import read_text
from muco.dialogue import Positions
from muco.errors import RecipeError, did_you_mean
from muco.sizes import Adapter, TinyConfig


@dataclass(frozen=True)
class ModelRecipe:
    """What is trained. Exactly one of ``path`` and ``tiny`` is given.

    Args:
        path: Folder or hub id of an image-text-to-text model.
        tiny: A small model made from its config and trained from scratch.
        adapter: None trains all weights.
        vision: Whether the vision tower is trained.
        dtype: "auto" (as the checkpoint), "float32", "bfloat16" or "float16": how weights that are not trained are
            held. What is trained is held in float32, as is frozen float16 without an adapter; without one, a model of
            half precision then computes in bfloat16 by autocast, unless ``trainer.bf16`` says otherwise.
        save_dtype: Of the finished model's weights, into which adapters are folded in float32: "auto" (as ``dtype``),
            "float32", "bfloat16" or "float16".
        min_pixels, max_pixels: The pixel budget of an image; None keeps the model's own.
        attention: "sdpa" takes the mask of isolated turns as a matrix, [rows, 1, tokens, tokens]. "flex"
            (FlexAttention, CUDA only) takes it as a rule and skips what it hides.
        activation_checkpointing: Compute the activations of a layer again in backward instead of keeping them.
    """

    path: str | None = None
    tiny: TinyConfig | None = None
    adapter: Adapter | None = None
    vision: Literal["frozen", "trained"] = "frozen"
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
        weight: Its share of every batch, relative to the weights of the other sources; 1 where only others have one.
            None for all: the rows of all sources are shuffled together, and each is seen as often as any other.
        format: One of ``muco.data.FORMATS``: MuCo's own JSONL, or how others publish their data.
        options: Further arguments of the format, as its class in ``muco/data`` says: the folder of images, columns, …
    """

    path: str
    weight: float | None = None
    format: str = "jsonl"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataRecipe:
    """Where samples come from.

    Args:
        train: One source or more.
        epoch: How long an epoch is, which ``trainer.num_train_epochs`` counts. "every_row": until every row of every
            source has been seen. Without weights that is once; with weights, sources that have more weight than rows
            are seen more often meanwhile. "row_count": as many samples as the sources have rows together, so that with
            weights some rows are seen often and others not at all.
        validation: A set evaluated during training; None for none.
        broken_images: "error" stops at a row or an image that cannot be used, "skip" leaves its sample out, counts it
            and names it in ``<output>/skipped-<process>.jsonl``.
        max_broken: With "skip": the run stops when more than this share of its samples could not be used.
        duplicates: What becomes of a target, or of an image, that stands in a batch before. "mask": it is trained and
            is no negative of the other. "leave_out": it is not trained in this step; other turns of its sample are.
        one_source: Every batch comes from one source, so that its negatives are of one kind; weights are then shares of
            the batches. False: every batch mixes the sources. Batches are whole: without weights, an epoch takes from
            each source as many as its rows fill, and the last one is filled up with rows of the next epoch.
        blind: Replaces every pixel by a constant: the control that shows whether a run learns without looking.
    """

    train: tuple[SourceRecipe, ...] = ()
    epoch: Literal["every_row", "row_count"] = "every_row"
    validation: str | None = None
    broken_images: Literal["error", "skip"] = "error"
    max_broken: float = 0.01
    duplicates: Literal["mask", "leave_out"] = "mask"
    one_source: bool = False
    blind: bool = False

    @property
    def weights(self) -> tuple[float, ...] | None:
        """One per source; None where the recipe gives none."""
        if all(source.weight is None for source in self.train):
            return None
        return tuple(1.0 if source.weight is None else source.weight for source in self.train)


@dataclass(frozen=True)
class TurnsRecipe:
    """How the turns of a sample share one pass.

    Args:
        mode: "isolated": a turn sees the image and itself. "compounded" (the paper): also the turns before it.
            "reconstruction" (the paper's fine-tuning): of every sample one turn is drawn, and either side of it has to
            reconstruct the other one.
        order: The order of a sample's turns, the same on both sides: "sample" draws one per sample (the paper),
            "batch" one per batch, a number g draws g per batch.
        limit: At most so many turns per sample and step, drawn anew each time; None for all.
        negatives: The most hard negatives per turn and step, drawn anew each time; None for all. The released
            code draws one.
        image_turn: The kind of turn whose target describes the whole image ("retrieval"). Its samples get one more
            turn, the image alone with that target, so that an image by itself is embedded too; None for none.
        positions: Where a turn's positions begin: "restart" after the image, "run_on" after the turn before. None:
            isolated turns restart, which makes them equal to single turns, and compounded ones run on (the paper).
            The other way round only shows what positions do beside what a turn sees.
        requests: With "reconstruction", two texts: what the user asks before, and after, the assistant says the hidden
            counterpart. This is the dialogue of the released code; give its two sentences to train its checkpoints
            further (docs/training.md says where they are). Empty: the hidden counterpart is in one turn of the user.
    """

    mode: Literal["isolated", "compounded", "reconstruction"] = "isolated"
    order: Literal["sample", "batch"] | int = "sample"
    limit: int | None = None
    negatives: int | None = None
    image_turn: str | None = None
    positions: Positions | None = None
    requests: tuple[str, ...] = ()


@dataclass(frozen=True)
class LossRecipe:
    """The arguments of :func:`muco.multi_turn_info_nce`, and Matryoshka training.

    Args:
        dimensions: The loss is the mean over vectors cut to their first so many numbers, each time normalised again, so
            that a part of a vector is a vector too (arXiv 2205.13147). Empty: the whole vector only.
        joint: With ``turns.mode: reconstruction``: whether its four terms share one set of candidates (the paper), or
            each has its own (the released code).
        mask_counterpart: False takes the counterpart of its own pair for a negative, where ``joint``; only to show what
            the mask is for.
        mask_same_image: False takes the targets of an image's other turns for negatives; only to show what the mask is
            for.
    """

    temperature: float = 0.02
    mask_identical_targets: bool = True
    symmetric: bool = False
    dimensions: tuple[int, ...] = ()
    joint: bool = False
    mask_counterpart: bool = True
    mask_same_image: bool = True


@dataclass(frozen=True)
class BatchRecipe:
    """How many samples a step takes, and how they pass through the devices at hand.

    Only ``size`` changes what is learnt; value and gradient do not depend on the others, nor on the number of devices.

    Args:
        size: Samples per step, over all devices together.
        token_budget: Most tokens that a device holds activations of, visual ones and padding included. What is more
            passes through in chunks (gradient cache). None: the whole batch at once.
        feature_memory: GiB of a device that may hold the features of a frozen vision tower between the two passes of
            the cache; what is above waits in host memory.
        sharding: "none": every device holds the whole model (data parallel). "fsdp": its weights, gradients and
            optimizer state are spread over the devices (FSDP2).
    """

    size: int = 32
    token_budget: int | None = None
    feature_memory: float = 8.0
    sharding: Literal["none", "fsdp"] = "none"


@dataclass(frozen=True)
class WarmUpRecipe:
    """A short language-model training of the text half before contrastive training; 0 steps for none."""

    steps: int = 0
    batch_size: int = 64
    learning_rate: float = 1e-3


@dataclass(frozen=True)
class Recipe:
    """A whole training run.

    Args:
        output: The run's folder: checkpoints, logs and at last ``model/``.
        batch: Samples per step and how they pass through the devices.
        trainer: Passed through to sentence-transformers' training arguments, but for those in ``REFUSED``.
        seed: Of weights, order of samples, turns and paraphrases.
    """

    output: str
    model: ModelRecipe = field(default_factory=ModelRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    turns: TurnsRecipe = field(default_factory=TurnsRecipe)
    loss: LossRecipe = field(default_factory=LossRecipe)
    batch: BatchRecipe = field(default_factory=BatchRecipe)
    warm_up: WarmUpRecipe = field(default_factory=WarmUpRecipe)
    trainer: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_numbers()
        if (self.model.path is None) == (self.model.tiny is None):
            raise RecipeError(
                "model: give exactly one of 'path' (an existing model) and 'tiny' (one made from its config)"
            )
        if self.model.tiny and (self.model.adapter or self.model.vision == "frozen"):
            raise RecipeError("model: a tiny model starts from random weights; use 'vision: trained' and no adapter")
        if not self.data.train:
            raise RecipeError("data.train: give at least one source, e.g. train: [{path: data/train.jsonl}]")
        self._check_reconstruction()
        budget, limit = self.batch.token_budget, self.turns.limit
        if budget is not None and limit is not None and limit > budget:
            raise RecipeError(f"turns.limit: {limit} turns do not fit into batch.token_budget: {budget} tokens")
        for key in self.trainer:
            if key in REFUSED:
                raise RecipeError(f"trainer.{key} {REFUSED[key]}")

    def _check_numbers(self) -> None:
        for key, value in _leaves(dataclasses.asdict(self)):
            if isinstance(value, float) and not math.isfinite(value):
                raise RecipeError(f"{key} must be a finite number, got {value}")
            bound = BOUNDS.get(re.sub(r"\[\d+\]", "", key))
            if value is None and (not key.startswith("trainer.") or key in MAY_BE_NULL):
                continue
            if bound is None or (key == "turns.order" and isinstance(value, str)):
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not bound.holds(value):
                raise RecipeError(f"{key} must be {bound.words}, got {value!r}")
        least, most, tiny = self.model.min_pixels, self.model.max_pixels, self.model.tiny
        if least is not None and most is not None and least > most:
            raise RecipeError(f"model.min_pixels: {least} is more than model.max_pixels: {most}")
        for whole, part in (("width", "heads"), ("heads", "kv_heads"), ("vision_width", "vision_heads")):
            if tiny and getattr(tiny, whole) % getattr(tiny, part):
                raise RecipeError(f"model.tiny.{whole}: {getattr(tiny, whole)} is not a multiple of {part}")

    def _check_reconstruction(self) -> None:
        if self.turns.mode == "reconstruction":
            if self.turns.image_turn is not None:
                raise RecipeError("turns.image_turn: reconstruction trains single pairs; leave it out")
            if self.turns.positions is not None:
                raise RecipeError("turns.positions: reconstruction has its own; leave it out")
            if self.loss.symmetric:
                raise RecipeError("loss.symmetric: reconstruction has no symmetric form; leave it out")
            if not self.loss.mask_same_image:
                raise RecipeError(
                    "loss.mask_same_image: reconstruction has a mask of its own; see loss.mask_counterpart"
                )
            asked = [request for request in self.turns.requests if request.strip()]
            if self.turns.requests and (len(asked) != 2 or len(self.turns.requests) != 2):
                raise RecipeError(f"turns.requests must be two texts, got {list(self.turns.requests)}")
        elif self.turns.requests:
            raise RecipeError("turns.requests needs 'turns: {mode: reconstruction}'")
        elif self.loss.joint or not self.loss.mask_counterpart:
            raise RecipeError("loss.joint and loss.mask_counterpart need 'turns: {mode: reconstruction}'")
        if not self.loss.mask_counterpart and not self.loss.joint:
            raise RecipeError("loss.mask_counterpart: only the joint loss has a counterpart to mask; set loss.joint")


def _leaves(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Every plain value with its dotted key."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, _dotted(where, key))
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _leaves(item, f"{where}[{i}]")
    else:
        yield where, value


@dataclass(frozen=True)
class Bound:
    """What a number must be, as a test and in words."""

    holds: Callable[[float], bool]
    words: str


_POSITIVE = Bound(lambda value: value > 0, "positive")
_NOT_NEGATIVE = Bound(lambda value: value >= 0, "at least 0")
_BELOW_ONE = Bound(lambda value: 0 <= value < 1, "at least 0 and below 1")
_SHARE = Bound(lambda value: 0 <= value <= 1, "a share, 0 to 1")
_COUNT = Bound(lambda value: isinstance(value, int) and value > 0, "a positive whole number")
_COUNT_OR_ZERO = Bound(lambda value: isinstance(value, int) and value >= 0, "a whole number, at least 0")
_STEPS = Bound(
    lambda value: 0 < value < 1 or (value >= 1 and value == int(value)),
    "a positive number of steps, or a share of all steps below 1",
)
_MAX_STEPS = Bound(
    lambda value: isinstance(value, int) and (value > 0 or value == -1),
    "a positive whole number (leave it out to train for num_train_epochs)",
)
_SEED = Bound(lambda value: isinstance(value, int) and 0 <= value < 1 << 31, "a whole number, 0 to 2147483647")


def _of(group: str, keys: str, bound: Bound) -> dict[str, Bound]:
    return {f"{group}.{key}": bound for key in keys.split()}


BOUNDS = {  # key without the numbers of list items -> what its number must be; None is left to its type, or MAY_BE_NULL
    **_of("model", "min_pixels max_pixels", _COUNT),
    **_of("model.adapter", "rank alpha", _COUNT),
    **_of("model.adapter", "dropout", _BELOW_ONE),
    **_of("model.tiny", " ".join(size.name for size in dataclasses.fields(TinyConfig)), _COUNT),
    **_of("data", "max_broken", _SHARE),
    **_of("data", "train.weight", _POSITIVE),
    **_of("turns", "order limit", _COUNT),
    **_of("turns", "negatives", _COUNT_OR_ZERO),
    **_of("loss", "temperature dimensions", _POSITIVE),
    **_of("batch", "size token_budget", _COUNT),
    **_of("batch", "feature_memory", _NOT_NEGATIVE),
    **_of("warm_up", "steps", _COUNT_OR_ZERO),
    **_of("warm_up", "batch_size", _COUNT),
    **_of("warm_up", "learning_rate", _POSITIVE),
    **_of("trainer", "num_train_epochs adam_epsilon", _POSITIVE),
    **_of("trainer", "max_steps", _MAX_STEPS),
    **_of("trainer", "per_device_eval_batch_size dataloader_prefetch_factor", _COUNT),
    **_of("trainer", "dataloader_num_workers save_total_limit", _COUNT_OR_ZERO),
    **_of("trainer", "learning_rate weight_decay warmup_steps max_grad_norm eval_delay", _NOT_NEGATIVE),
    **_of("trainer", "adam_beta1 adam_beta2", _BELOW_ONE),
    **_of("trainer", "logging_steps save_steps eval_steps", _STEPS),
    "seed": _SEED,
}
MAY_BE_NULL = tuple(f"trainer.{key}" for key in ("eval_steps", "save_total_limit", "dataloader_prefetch_factor"))
_OURS = "is set by MuCo; use the recipe's own 'output' and 'seed'"
_BATCH = "splits the in-batch negatives; use batch.size, and batch.token_budget for what a device cannot hold at once"
_FSDP = "is not supported; use batch.sharding: fsdp"
REFUSED = {  # training arguments that a recipe may not set, and what to do instead
    **dict.fromkeys(("output_dir", "seed", "data_seed", "logging_dir", "resume_from_checkpoint"), _OURS),
    "overwrite_output_dir": _OURS,
    "per_device_train_batch_size": "is not used; batch.size counts the samples of a step over all devices",
    "auto_find_batch_size": "is not supported; batch.token_budget is halved when memory runs out",
    "gradient_accumulation_steps": _BATCH,
    "fsdp": _FSDP,
    "fsdp_config": _FSDP,
    "deepspeed": _FSDP,
    "parallelism_config": _FSDP,
    "gradient_checkpointing": "is not used; set model.activation_checkpointing",
    "activation_checkpointing": "is not used; set model.activation_checkpointing",
    "torch_compile": "is not supported: chunks change their shape at every step",
    "fp16": "is not supported: its loss scaling does not fit the gradient cache; use bf16",
    "ignore_data_skip": "is set by MuCo: batches are a function of the step",
    "dataloader_drop_last": "is set by MuCo: steps are whole",
    "label_smoothing_factor": "is not used: the loss is MuCo's own",
    "batch_sampler": "is not used; see data.duplicates",
    "multi_dataset_batch_sampler": "is not used; see data.one_source and the weights of data.train",
    "prompts": "is not used; write instructions into the queries",
    "neftune_noise_alpha": "is not supported",
    "use_liger_kernel": "is not supported",
    "load_best_model_at_end": "is not supported; checkpoints hold trained weights only",
    "push_to_hub": "is not supported; push the finished model",
}


class _StrictLoader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but ``2e-5`` is a number and a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise RecipeError(f"line {node.start_mark.line + 1}: the key {key!r} stands twice")
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


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
    values = _parse(read_text(file, RecipeError), str(file))
    if not isinstance(values, dict):
        raise RecipeError(f"{file}: a recipe is a mapping of keys, not {type(values).__name__}")
    for override in overrides:
        _override(values, override)
    try:
        return from_dict(values)
    except RecipeError as error:
        raise RecipeError(f"{file}: {error}") from None


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: not YAML: {' '.join(str(error).split())}") from None
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None


def _override(values: dict[str, Any], override: str, flag: str = "--set") -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        example = "loss.temperature=0.05" if flag == "--set" else "images=photos"
        raise RecipeError(f"{flag} {override!r}: write it as key=value, e.g. {flag} {example}")
    *parents, last = key.strip().split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise RecipeError(f"{flag} {override!r}: {parent!r} is no group of keys")
    values[last] = _parse(text, f"{flag} {override}")


def parse_options(words: Sequence[str]) -> dict[str, Any]:
    """ "key=value" strings as a mapping, the values in YAML; a RecipeError where one is none."""
    values: dict[str, Any] = {}
    for word in words:
        _override(values, word, flag="--option")
    return values


def from_dict(values: Mapping[str, Any]) -> Recipe:
    """Builds a recipe from plain values, checking every key and type."""
    return _build(Recipe, values, "")


def dump_recipe(recipe: Recipe) -> str:
    """The whole recipe, defaults included, as YAML that :func:`load_recipe` reads back."""
    return yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True)


def to_dict(recipe: Recipe) -> dict[str, Any]:
    return _plain(dataclasses.asdict(recipe))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def check_keys(given: Iterable[Any], accepted: Collection[str], where: str) -> None:
    """Refuses a key that is not accepted, with the nearest one that is."""
    for key in given:
        if key not in accepted:
            raise RecipeError(f"unknown key {_dotted(where, key)!r}{did_you_mean(key, accepted)}")


def _build(kind: type, values: Any, where: str) -> Any:
    if not isinstance(values, Mapping):
        raise RecipeError(f"{where or 'recipe'} must be a group of keys, got {values!r}")
    hints = typing.get_type_hints(kind)
    check_keys(values, hints, where)
    for item in dataclasses.fields(kind):
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and item.name not in values:
            raise RecipeError(f"{_dotted(where, item.name)!r} is missing")
    return kind(**{key: _convert(hints[key], value, _dotted(where, key)) for key, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _convert_union(arguments, value, where)
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            raise RecipeError(f"{where} must be one of {', '.join(map(repr, arguments))}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise RecipeError(f"{where} must be a list, got {value!r}")
        return tuple(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else _build(hint, value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    plain = dict if origin is not None else hint
    if not isinstance(value, plain) or (isinstance(value, bool) and hint is not bool):
        raise RecipeError(f"{where} must be {plain.__name__}, got {value!r}")
    return value


def _convert_union(arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    choices = [argument for argument in arguments if argument is not type(None)]
    problems = []
    for choice in choices:
        try:
            return _convert(choice, value, where)
        except RecipeError as error:
            problems.append(str(error))
    raise RecipeError(problems[0] if len(problems) == 1 else f"{problems[0]}; or: {problems[1]}")


def _dotted(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)
