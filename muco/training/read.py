"""Strict reading: ``key=value`` words with values in YAML, frozen dataclasses from plain values, and bounds.

Unknown keys, wrong types and missing values are a :class:`~muco.errors.RecipeError` that names the dotted key.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from muco.base.yaml_text import parse_yaml
from muco.errors import RecipeError, did_you_mean
from muco.sizes import TinyConfig


def set_value(values: dict[str, Any], word: str, flag: str = "--set") -> None:
    """Sets one value in nested dicts; ``word`` is "dotted.key=value", the value in YAML."""
    key, equals, text = word.partition("=")
    if not equals or not key:
        example = "loss.temperature=0.05" if flag == "--set" else "images=photos"
        raise RecipeError(f"{flag} {word!r}: write it as key=value, e.g. {flag} {example}")
    *parents, last = key.strip().split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise RecipeError(f"{flag} {word!r}: {parent!r} is not a group of keys")
    values[last] = parse_yaml(text, f"{flag} {word}", RecipeError)


def parse_options(words: Sequence[str]) -> dict[str, Any]:
    """The options of a data format as a mapping, from "key=value" words with the values in YAML."""
    values: dict[str, Any] = {}
    for word in words:
        set_value(values, word, flag="--option")
    return values


def check_keys(given: Iterable[Any], accepted: Collection[str], where: str) -> None:
    """Refuses a key that is not accepted, and names the nearest one that is."""
    for key in given:
        if key not in accepted:
            raise RecipeError(f"unknown key {_dotted(where, key)!r}{did_you_mean(key, accepted)}")


def build(kind: type, values: Any, where: str = "") -> Any:
    """A dataclass from plain values; ``where`` is the dotted key of the group, "" for the whole recipe."""
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
        return value if isinstance(value, hint) else build(hint, value, where)
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


def _bound(keys: str, test: Callable[[Any], bool], words: str) -> dict[str, tuple[Callable[[Any], bool], str]]:
    return dict.fromkeys(keys.split(), (test, words))


_TINY = " ".join(f"model.tiny.{size.name}" for size in dataclasses.fields(TinyConfig))
_COUNTS = f"""model.min_pixels model.max_pixels model.adapter.rank model.adapter.alpha {_TINY} turns.order turns.limit
    data.validation.limit batch.size batch.group batch.token_budget trainer.per_device_eval_batch_size
    trainer.dataloader_prefetch_factor"""
_COUNTS_OR_ZERO = "turns.negatives trainer.dataloader_num_workers trainer.save_total_limit"
_POSITIVE = """data.train.weight loss.temperature loss.distillation.temperature
    loss.distillation.teacher_temperature loss.dimensions trainer.num_train_epochs
    trainer.adam_epsilon"""
_NOT_NEGATIVE = """batch.feature_memory batch.seen_memory trainer.learning_rate trainer.weight_decay
    trainer.warmup_steps trainer.max_grad_norm trainer.eval_delay loss.weighting.false_negative_margin
    loss.weighting.hardness loss.weighting.hard_negative_hardness loss.guide.margin"""
_BELOW_ONE = "model.adapter.dropout trainer.adam_beta1 trainer.adam_beta2"
_STEPS = "a positive number of steps, or a share of all steps below 1"
_MAX_STEPS = "a positive whole number (leave it out to train for num_train_epochs)"
BOUNDS = {  # key without the numbers of list items -> what its number must be; None is left to its type, or MAY_BE_NULL
    **_bound(_COUNTS, lambda value: isinstance(value, int) and value > 0, "a positive whole number"),
    **_bound(_COUNTS_OR_ZERO, lambda value: isinstance(value, int) and value >= 0, "a whole number, at least 0"),
    **_bound(_POSITIVE, lambda value: value > 0, "positive"),
    **_bound(_NOT_NEGATIVE, lambda value: value >= 0, "at least 0"),
    **_bound(_BELOW_ONE, lambda value: 0 <= value < 1, "at least 0 and below 1"),
    **_bound("data.max_broken loss.distillation.weight", lambda value: 0 <= value <= 1, "a share, 0 to 1"),
    **_bound(
        "trainer.logging_steps trainer.save_steps trainer.eval_steps",
        lambda value: 0 < value < 1 or (value >= 1 and value == int(value)),
        _STEPS,
    ),
    **_bound("trainer.max_steps", lambda value: isinstance(value, int) and (value > 0 or value == -1), _MAX_STEPS),
    **_bound("seed", lambda value: isinstance(value, int) and 0 <= value < 1 << 31, "a whole number, 0 to 2147483647"),
}
MAY_BE_NULL = tuple(f"trainer.{key}" for key in ("eval_steps", "save_total_limit", "dataloader_prefetch_factor"))
_OURS = "is set by MuCo; use the recipe's own 'output' and 'seed'"
_BATCH = "splits the in-batch negatives; use batch.size, and batch.token_budget for what a device cannot hold at once"
_FSDP = "is not supported; use batch.sharding: fsdp"
# which an older version took; recipes of its runs and models have them
WITHOUT_EFFECT = """save_only_model torch_empty_cache_steps gradient_checkpointing_kwargs
    activation_checkpointing_kwargs dataloader_persistent_workers restore_callback_states_from_checkpoint
    dataloader_in_order train_sampling_strategy length_column_name remove_unused_columns label_names
    average_tokens_across_devices include_num_input_tokens_seen ddp_find_unused_parameters ddp_bucket_cap_mb
    ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout local_rank bf16_full_eval fp16_full_eval
    liger_kernel_config use_cache router_mapping prediction_loss_only eval_do_concat_batches
    eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics do_train do_eval
    do_predict skip_memory_metrics enable_jit_checkpoint hub_token hub_private_repo hub_model_id hub_strategy
    hub_always_push hub_revision torch_compile_backend torch_compile_mode accelerator_config""".split()
REFUSED = {  # training arguments that a recipe may not set, and what to do instead
    **dict.fromkeys(WITHOUT_EFFECT, "has no effect here; leave it out"),
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
    **dict.fromkeys(
        ("torch_compile", "torch_compile_backend", "torch_compile_mode"),
        "is not supported: chunks change their shape at every step",
    ),
    "accelerator_config": "is set by MuCo: a step is whole, whatever the number of devices",
    **dict.fromkeys(("ddp_backend", "ddp_timeout"), "is set by MuCo: NCCL on GPUs, else gloo"),
    "bf16": "is set by MuCo; use the recipe's own 'precision': bfloat16, float32 or auto",
    "fp16": "is not supported: its loss scaling does not fit the gradient cache; set 'precision: bfloat16'",
    "ignore_data_skip": "is set by MuCo: batches are a function of the step",
    "dataloader_drop_last": "is set by MuCo: steps are whole",
    "label_smoothing_factor": "is not used: the loss is MuCo's own",
    "batch_sampler": "is not used; see data.duplicates",
    "multi_dataset_batch_sampler": "is not used; see batch.group, data.one_source and the weights of data.train",
    "prompts": "is not used; write instructions into the queries",
    "neftune_noise_alpha": "is not supported",
    "use_liger_kernel": "is not supported",
    "load_best_model_at_end": "is not supported; checkpoints hold trained weights only",
    "push_to_hub": "is not supported; push the finished model",
    "save_only_model": "is not supported: a run could not resume from such checkpoints",
    "gradient_checkpointing_kwargs": "is not used; set model.activation_checkpointing",
    "activation_checkpointing_kwargs": "is not used; set model.activation_checkpointing",
    "restore_callback_states_from_checkpoint": "is not supported; a run resumes by itself",
    "dataloader_persistent_workers": "is not used: workers live as long as the run",
}


def check_numbers(values: Mapping[str, Any]) -> None:
    """Refuses a number out of its bounds by a RecipeError with the dotted key; ``values`` are nested mappings."""
    for key, value in _leaves(values):
        if isinstance(value, float) and not math.isfinite(value):
            raise RecipeError(f"{key} must be a finite number, got {value}")
        bound = BOUNDS.get(re.sub(r"\[\d+\]", "", key))
        if bound is None or (key == "turns.order" and isinstance(value, str)):
            continue
        if value is None and (not key.startswith("trainer.") or key in MAY_BE_NULL):
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not bound[0](value):
            raise RecipeError(f"{key} must be {bound[1]}, got {value!r}")


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
