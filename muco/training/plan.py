"""``muco train RECIPE --dry-run``: what a run would take, without a GPU, weights or a single step.

The recipe is resolved, some samples are read and tokenised, the model is built on the meta device, and from both follow
parameters, tokens, operations, memory and steps. What cannot be found here is put in place by something like it, and
``notes`` say so; what would stop the run is in ``problems``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from muco.backbone import VISION_NAMES, add_adapters, freeze_vision, hold_trained_in_float32, meta_backbone
from muco.batch import chunks_of
from muco.data import open_data
from muco.data.source import Data
from muco.dialogue import Sample, Turn
from muco.errors import CheckpointError, DataError, RecipeError
from muco.loss import MultiTurnLoss
from muco.negatives import Variety
from muco.processor import Processor, load_processor
from muco.template import SPECIAL_TOKENS
from muco.tiny import stand_in_processor
from muco.training.batches import TrainingBatches
from muco.training.build import (
    NO_NEGATIVE,
    PUBLISHED,
    build_model,
    check_budget,
    check_recipe,
    make_loss,
    model_config,
    texts_of,
    uses_autocast,
)
from muco.training.flops import IMAGE_MARKS, PROMPT_TOKENS, meta_step_flops
from muco.training.memory import Memory, activation_bytes, computing
from muco.training.mixture import Mixture
from muco.training.recipe import Recipe
from muco.training.trainer import steps_of, training_arguments

if TYPE_CHECKING:
    from rich.console import Console

LOOK = 64  # samples that are read, over all sources
GIB = 1 << 30
ASSUMED = Sample(
    Image.new("RGB", (952, 644)), [Turn("word " * 24, "word " * 14, kind="retrieval")] * 7, where="the assumed sample"
)


@dataclass(frozen=True)
class Lengths:
    """Tokens of the dialogues that were looked at; int64 arrays with one entry per sample, targets one per dialogue."""

    query: np.ndarray
    target: np.ndarray
    visual: np.ndarray
    turns: np.ndarray
    images: np.ndarray

    @property
    def sides(self) -> tuple[np.ndarray, np.ndarray]:
        return self.query, self.target


def plan(recipe: Recipe, *, devices: int = 1) -> dict[str, Any]:
    """What a run of a recipe would take.

    Args:
        devices: Processes with a device each.
    Returns:
        Plain values for JSON: ``recipe``, ``data``, ``model``, ``step``, ``memory`` (GiB of one device), ``run``,
        ``problems`` and ``notes``.
    Raises:
        RecipeError: If the recipe contradicts itself, or cannot run on so many devices.
        CheckpointError: If the model's configuration cannot be read.
    """
    check_recipe(recipe, devices)
    arguments = training_arguments(_for_this_machine(recipe), recipe.data.validation is not None)
    problems: list[str] = []
    notes: list[str] = []
    sources = _open(recipe, problems)
    known = [source for source in sources if source is not None]
    mixture = Mixture.of(recipe, [len(source) for source in known]) if len(known) == len(sources) else None
    broken = notes if recipe.data.broken_images == "skip" else problems  # rows that cannot be used
    looked = _Looked(_look(sources, recipe.seed, broken))
    if not looked:
        looked = _Looked([ASSUMED])
        notes.append("no sample could be read: 952 × 644 px and 7 turns of 24 and 14 words are assumed")
    readable = [looked] if problems or broken else [source for source in sources if source is not None]
    model, processor = _model(recipe, readable, notes)
    lengths, varieties = _lengths(recipe, looked, processor, problems, broken)
    if looked[0] is not ASSUMED:
        _look_for_negatives(make_loss(recipe, model), recipe, sources, varieties, problems=problems, notes=notes)
    step = _step(recipe, lengths, devices)
    result = {
        "recipe": _recipe_facts(recipe, devices),
        "data": _data_facts(recipe, sources, lengths),
        "model": _model_facts(model, recipe),
        "step": step,
        "memory": None,
        "run": _run_facts(recipe, arguments, mixture, notes, bf16=uses_autocast(recipe, model)),
        "problems": problems,
        "notes": notes,
    }
    if model.config.model_type != "qwen2_vl":
        notes.append(f"operations and memory are counted for Qwen2-VL only, not for {model.config.model_type}")
        return result
    step |= _operations(recipe, model.config, lengths, cached=step["cached"])
    memory = _memory(recipe, model, lengths, step, devices)
    result["memory"] = {key: round(value / GIB, 2) for key, value in (asdict(memory) | {"total": memory.total}).items()}
    notes.append("memory is estimated, for AdamW, without what the driver and the allocator take for themselves")
    return result


# ── data ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _open(recipe: Recipe, problems: list[str]) -> list[Data | None]:
    train = [(source.path, source.format, source.options) for source in recipe.data.train]
    validation = [(recipe.data.validation, "jsonl", {})] if recipe.data.validation else []
    sources: list[Data | None] = []
    for path, format, options in train + validation:
        try:
            sources.append(open_data(path, format, options))
        except DataError as error:
            problems.append(str(error))
            sources.append(None)
    return sources[: len(train)]


class _Looked(list[Sample]):
    """Samples that are looked at, as data."""

    fingerprint = ""


def _look(sources: Sequence[Data | None], seed: int, problems: list[str]) -> Iterator[Sample]:
    """Some samples of every source, spread over all of it; rows that cannot be read become problems."""
    known = [source for source in sources if source is not None]
    for number, source in enumerate(known):
        count = min(len(source), math.ceil(LOOK / len(known)))
        for index in sorted(np.random.default_rng([seed, number]).choice(len(source), count, replace=False).tolist()):
            try:
                yield source[index]
            except DataError as error:
                problems.append(str(error))


def _lengths(
    recipe: Recipe, looked: _Looked, processor: Processor, problems: list[str], broken: list[str]
) -> tuple[Lengths, list[Variety]]:
    batches = TrainingBatches([looked], Mixture([len(looked)], [1.0], 1, 0), processor, recipe.turns, seed=recipe.seed)
    found: dict[str, list[int]] = {"query": [], "target": [], "visual": [], "turns": [], "images": []}
    varieties = []
    for number in range(len(looked)):
        try:
            batch = batches[number]
            check_budget(recipe, batch)
        except DataError as error:
            broken.append(str(error))
            continue
        except RecipeError as error:
            if not any("batch.token_budget" in problem for problem in problems):
                problems.append(str(error))
        found["query"].append(int(batch["query"]["attention_mask"].sum()))
        found["target"] += batch["target"]["attention_mask"].sum(dim=1).tolist()
        found["visual"].append(int((batch["query"]["input_ids"] == processor.image_id).sum()))
        found["turns"].append(len(batch["query"]["turn_rows"]))
        found["images"].append(len(batch["query"].get("image_rows", ())))
        varieties.append(Variety.of(batch["ids"]))
    if not found["query"]:
        raise DataError(f"none of {len(looked)} samples can be used; the first: {broken[0]}")
    return Lengths(**{name: np.array(values) for name, values in found.items()}), varieties


def _look_for_negatives(
    loss: MultiTurnLoss,
    recipe: Recipe,
    sources: Sequence[Data | None],
    varieties: Sequence[Variety],
    *,
    problems: list[str],
    notes: list[str],
) -> None:
    """Says so where no turn that was looked at can have a negative: a problem if that is all there is, else a note."""
    if problems:
        return  # what was looked at is not the data, or not all of it
    reason = loss.why_no_negative(varieties)
    if reason:
        whole = sum(map(len, sources)) == len(varieties)
        samples = "the data" if whole else f"what was read of the data ({len(varieties)} samples)"
        (problems if whole else notes).append(NO_NEGATIVE.format(samples=samples, reason=reason))
    elif recipe.batch.size == 1 and all(loss.why_no_negative([own]) for own in varieties):
        notes.append("batch.size: 1 gives no turn a negative but for hard negatives, and none were found; raise it")


# ── model ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _model(recipe: Recipe, sources: list[Data], notes: list[str]) -> tuple[nn.Module, Processor]:
    """The backbone on the meta device with adapters and frozen parts, and a processor."""
    if recipe.model.tiny:
        model = build_model(recipe, sources)
        return model.encoder.model.to("meta"), model.encoder.muco_processor
    config, processor = _found(recipe, sources, notes)
    wanted = config.dtype if recipe.model.dtype == "auto" else getattr(torch, recipe.model.dtype)
    model = meta_backbone(config, wanted or torch.float32)
    if recipe.model.min_pixels or recipe.model.max_pixels:
        processor.set_pixels(recipe.model.min_pixels, recipe.model.max_pixels)
    if recipe.model.vision == "frozen":
        freeze_vision(model)
    if recipe.model.adapter is not None:
        with torch.device("meta"):
            model = add_adapters(model, recipe.model.adapter, list(range(len(SPECIAL_TOKENS))))
    hold_trained_in_float32(model)
    return model, processor


def _found(recipe: Recipe, sources: list[Data], notes: list[str]) -> tuple[Any, Processor]:
    """Configuration and processor; for the paper's models without any download."""
    path, config = str(recipe.model.path), model_config(recipe)
    if path not in PUBLISHED:
        return config, load_processor(path, config)[0]
    try:
        return config, load_processor(path, config, local_files_only=True)[0]
    except CheckpointError:
        notes.append(
            f"{path} is not in the local cache: sizes as published; texts are counted with a tokenizer made from them"
        )
        return config, stand_in_processor(texts_of(sources), config)


def _model_facts(model: nn.Module, recipe: Recipe) -> dict[str, Any]:
    parts = dict.fromkeys(("vision", "language", "adapters", "token embeddings"), 0)
    trained = 0
    for name, parameter in model.named_parameters():
        parts[_part_of(name)] += parameter.numel()
        trained += parameter.numel() * parameter.requires_grad
    whole = sum(parts.values())
    return {
        "path": recipe.model.path or "tiny, made from its config",
        "family": model.config.model_type,
        "parameters": whole,
        "trained": trained,
        "frozen": whole - trained,
        "parts": {name: count for name, count in parts.items() if count},
    }


def _part_of(name: str) -> str:
    if "lora_" in name:
        return "adapters"
    if "trainable_tokens" in name:
        return "token embeddings"
    return "vision" if {*VISION_NAMES} & {*name.split(".")} else "language"


# ── a step ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _step(recipe: Recipe, lengths: Lengths, devices: int) -> dict[str, Any]:
    """Samples, turns, tokens and passes of one step, on average."""
    size, share = recipe.batch.size, math.ceil(recipe.batch.size / devices)
    rng = np.random.default_rng(0)
    per_sample = len(lengths.target) / len(lengths.query)  # hard negatives are dialogues of their own
    shares = (rng.choice(lengths.query, share), rng.choice(lengths.target, max(1, round(share * per_sample))))
    budget = recipe.batch.token_budget or 1 << 40
    cut = [[side[rows.numpy()] for rows in chunks_of(torch.from_numpy(side), budget)] for side in shares]
    passed = [sum(len(chunk) * int(chunk.max()) for chunk in chunks) for chunks in cut]
    return {
        "samples": size,
        "turns": round(size * float(lengths.turns.mean())),
        "tokens": round(size * float(lengths.query.mean() + per_sample * lengths.target.mean())),
        "image_tokens": round(size * float(lengths.visual.mean())),
        "samples_per_device": share,
        "passes_per_device": sum(map(len, cut)),
        "cached": sum(passed) > budget,
        "padding": round(1 - float(sum(side.sum() for side in shares)) / sum(passed), 4),
        "query_tokens": _range(lengths.query),
        "target_tokens": _range(lengths.target),
    }


def _range(values: np.ndarray) -> dict[str, Any]:
    return {"min": int(values.min()), "mean": round(float(values.mean()), 1), "max": int(values.max())}


def _operations(recipe: Recipe, config: Any, lengths: Lengths, *, cached: bool) -> dict[str, Any]:
    """Floating-point operations of a step over all devices: those of one pass each way, and those really made."""
    turns, visual = max(1, round(float(lengths.turns.mean()))), round(float(lengths.visual.mean()))
    marks = IMAGE_MARKS * bool(visual)
    adapter = recipe.model.adapter
    flops = meta_step_flops(
        config,
        images=recipe.batch.size,
        turns=turns,
        visual_tokens=visual,
        query_tokens=max(1, round((float(lengths.query.mean()) - visual - marks - PROMPT_TOKENS) / turns)),
        target_tokens=max(1, round((float(lengths.target.mean()) - PROMPT_TOKENS) / turns)),
        mode="isolated" if recipe.turns.mode == "isolated" else "compounded",
        vision_backward=recipe.model.vision == "trained",
        adapter=adapter and replace(adapter, kind="lora"),
    )
    again = cached + recipe.model.activation_checkpointing
    return {
        "pflop": round(flops.total / 1e15, 4),
        "pflop_made": round((flops.total + again * flops.language) / 1e15, 4),
    }


def _memory(recipe: Recipe, model: nn.Module, lengths: Lengths, step: dict[str, Any], devices: int) -> Memory:
    sharded = devices if recipe.batch.sharding == "fsdp" else 1
    held = {True: 0, False: 0}  # bytes of what is trained, and of the rest
    for parameter in model.parameters():
        held[parameter.requires_grad] += parameter.numel() * parameter.element_size()
    towers = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if _part_of(n) == "vision")
    language = model.get_submodule(_name_of_language(model))
    weights_dtype = next(language.parameters()).dtype
    half = torch.bfloat16 if uses_autocast(recipe, model) else weights_dtype
    copies = sum(p.numel() for p in language.parameters()) * half.itemsize if half != weights_dtype else 0
    width, turns = model.config.get_text_config().hidden_size, step["turns"]
    features = round(step["samples_per_device"] * float(lengths.visual.mean())) * width * half.itemsize
    return Memory(
        weights=(sum(held.values()) - towers + copies) // sharded + towers,
        gradients=held[True] // sharded,
        optimizer=2 * held[True] // sharded,
        activations=_activations(recipe, computing(language, half), lengths, step),
        features=min(features, round(recipe.batch.feature_memory * GIB)) if recipe.model.vision == "frozen" else 0,
        loss=2 * 4 * turns * width * 4 + min(turns**2 * 4, 1 << 28) * 3,
    )


def _activations(recipe: Recipe, language: nn.Module, lengths: Lengths, step: dict[str, Any]) -> int:
    """Of the largest pass; a step without cache holds those of both sides."""
    tree = recipe.turns.mode == "isolated" and lengths.turns.max() > 1
    settings = {
        "tree": bool(tree),
        "checkpointing": recipe.model.activation_checkpointing,
        "flex": recipe.model.attention == "flex",
    }
    share, budget = step["samples_per_device"], recipe.batch.token_budget or 1 << 40
    longest = [int(lengths.query.max()), int(lengths.target.max())]
    if not step["cached"]:
        return sum(activation_bytes(language, share, round(float(side.mean())), **settings) for side in lengths.sides)
    return max(activation_bytes(language, max(1, min(share, budget // n)), n, **settings) for n in longest)


def _name_of_language(model: nn.Module) -> str:
    return next(name for name, _ in model.named_modules() if name.split(".")[-1] == "language_model")


# ── the run ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _recipe_facts(recipe: Recipe, devices: int) -> dict[str, Any]:
    adapter = recipe.model.adapter
    return {
        "output": recipe.output,
        "devices": devices,
        "sharding": recipe.batch.sharding,
        "turns": recipe.turns.mode,
        "temperature": recipe.loss.temperature,
        "adapter": adapter and f"{adapter.kind}, rank {adapter.rank}, alpha {adapter.alpha}",
        "vision": recipe.model.vision,
        "token_budget": recipe.batch.token_budget,
    }


def _data_facts(recipe: Recipe, sources: Sequence[Data | None], lengths: Lengths) -> dict[str, Any]:
    rows = {name: len(d) if d is not None else None for name, d in zip(_names(recipe), sources, strict=True)}
    return {
        "rows": rows,
        "looked_at": len(lengths.query),
        "turns_per_sample": _range(lengths.turns),
        "images_per_sample": _range(lengths.images),
        "image_tokens_per_sample": _range(lengths.visual),
    }


def _names(recipe: Recipe) -> list[str]:
    """The path of each source, with its number where several have the same."""
    paths = [source.path for source in recipe.data.train]
    return [path if paths.count(path) == 1 else f"{path} ({n})" for n, path in enumerate(paths, start=1)]


def _for_this_machine(recipe: Recipe) -> Recipe:
    """A recipe whose arguments can be made here: without a GPU they would refuse bf16."""
    cpu = {} if torch.cuda.is_available() else {"use_cpu": True}
    return replace(recipe, trainer={**recipe.trainer, **cpu})


def _run_facts(
    recipe: Recipe, arguments: Any, mixture: Mixture | None, notes: list[str], *, bf16: bool
) -> dict[str, Any]:
    epoch = mixture.steps_per_epoch if mixture else None
    steps = steps_of(arguments, mixture) if mixture else arguments.max_steps if arguments.max_steps > 0 else None
    if steps and arguments.get_warmup_steps(steps) >= steps:
        notes.append(f"trainer.warmup_steps: the run of {steps} steps ends before the learning rate is reached")
    return {
        "steps_per_epoch": epoch,
        "steps": steps,
        "rows_seen_per_epoch": _seen(recipe, mixture, epoch),
        "rows_seen_in_the_run": _seen(recipe, mixture, steps),
        "learning_rate": arguments.learning_rate,
        "schedule": str(arguments.lr_scheduler_type.value),
        "warmup_steps": arguments.warmup_steps,
        "precision": "bfloat16 autocast" if bf16 else "as the weights",
        "checkpoints": steps and _checkpoints(arguments, steps),
    }


def _checkpoints(arguments: Any, steps: int) -> int | None:
    if arguments.save_strategy != "steps":
        return None
    every = arguments.save_steps
    return steps // (math.ceil(every * steps) if every < 1 else int(every))  # below 1 it is a share of the run


def _seen(recipe: Recipe, mixture: Mixture | None, steps: int | None) -> dict[str, float | None]:
    """How often each row of a source is seen in the first steps, on average."""
    if mixture is None or steps is None:
        return dict.fromkeys(_names(recipe))
    return {name: round(passes, 2) for name, passes in zip(_names(recipe), mixture.passes(steps), strict=True)}


def print_plan(result: dict[str, Any], console: Console) -> None:
    """The plan for people: a section per group, one fact per line, problems last."""
    for group in ("recipe", "data", "model", "step", "memory", "run"):
        title = "memory of one device, GiB" if group == "memory" else group
        facts = _flat(result[group] or {"": "not estimated"})
        console.print(f"\n[bold]{title}[/bold]", highlight=False)
        width = max(len(name) for name, _ in facts)
        for name, value in facts:
            console.print(f"  {name:<{width}}  {value}", markup=False, highlight=False, soft_wrap=True)
    for title, lines in (("notes", result["notes"]), ("problems", result["problems"])):
        if lines:
            console.print(f"\n[bold]{title}[/bold]", highlight=False)
        for line in lines:
            console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)


def _flat(facts: dict[str, Any]) -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    for name, value in facts.items():
        if isinstance(value, dict) and set(value) == {"min", "mean", "max"}:
            value = f"{value['min']} to {value['max']}, mean {value['mean']}"
        if isinstance(value, dict):
            lines += [(f"{name.replace('_', ' ')}: {key}", _shown(item)) for key, item in value.items()]
        else:
            lines.append((name.replace("_", " "), _shown(value)))
    return lines


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
