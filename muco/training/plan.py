"""``muco train RECIPE --dry-run``: what a run would take, without a GPU, weights or a single step.

Some samples are tokenised and the model is built on the meta device; from both follow parameters, tokens, operations,
memory and steps. ``notes`` name stand-ins for what is missing here, ``problems`` what would stop the run.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn

from muco.base.machine import GIB
from muco.batch import chunks_of
from muco.branches import state_bytes
from muco.data.source import InMemory
from muco.reading import stated_reading
from muco.step import UNLIMITED
from muco.training.build import make_loss
from muco.training.checks import OneDeviceArguments, check_recipe, check_turns, training_arguments
from muco.training.flops import IMAGE_MARKS, PROMPT_TOKENS, meta_step_flops
from muco.training.guide import check_guide
from muco.training.look import ASSUMED, Measured, look, look_for_negatives, measure, open_known, without_effect
from muco.training.meta_model import activation_bytes, held_bytes, meta_model, model_facts
from muco.training.mixture import Mixture
from muco.training.precision import stated_autocast
from muco.training.recipe import DataRecipe, Recipe


def plan(recipe: Recipe, *, devices: int = 1) -> dict[str, Any]:
    """What a run of a recipe would take.

    Args:
        devices: Processes with a device each.
    Returns:
        Plain values for JSON: ``recipe``, ``data``, ``model``, ``step``, ``memory`` (GiB of one device; None if the
        vision tower is trained), ``run``, ``problems`` and ``notes``.
    Raises:
        RecipeError: If the recipe contradicts itself, or cannot run on this number of devices.
        CheckpointError: If the configuration of the model, or of a guide, cannot be read.
    """
    check_recipe(recipe, devices)
    if recipe.loss.guide:
        check_guide(recipe.loss.guide.model)
    arguments = training_arguments(recipe, evaluates=recipe.data.validation is not None)
    problems: list[str] = []
    notes: list[str] = []
    sources = open_known(recipe.data, problems, notes)
    known = [source for source in sources if source is not None]
    mixture = Mixture.of(recipe, [len(source) for source in known]) if len(known) == len(sources) else None
    broken = notes if recipe.data.broken_images == "skip" else problems  # rows that cannot be used
    looked = InMemory(look(sources, recipe.seed, broken))
    if not looked:
        looked = InMemory([ASSUMED])
        notes.append("no sample could be read: 952 × 644 px and 7 turns of 24 and 14 words are assumed")
    model, processor = meta_model(recipe, [looked] if problems or broken else known, notes)
    check_turns(recipe.turns, stated_reading(model, prefix=processor.family.prefix))
    measured, varieties = measure(recipe, looked, processor, problems=problems, broken=broken, notes=notes)
    if looked[0] is not ASSUMED:
        notes += without_effect(recipe, looked)
        loss = make_loss(recipe, model)
        look_for_negatives(loss, recipe.batch.size, sources, varieties, problems=problems, notes=notes)
    stated = stated_autocast(recipe, model)
    precision = {
        True: "bfloat16 autocast",
        False: "as the weights",
        None: "bfloat16 if clearly quicker, measured at the start",
    }
    if stated is None:
        notes.append("memory is that of float32, of which bfloat16 may need less")
    step = _step(recipe, measured, devices)
    adapter = recipe.model.adapter
    lengths = [None if source is None else len(source) for source in sources]
    result = {
        "recipe": {
            "output": recipe.output,
            "devices": devices,
            "sharding": recipe.batch.sharding,
            "turns": recipe.turns.mode,
            "temperature": recipe.loss.temperature,
            "adapter": adapter and f"{adapter.kind}, rank {adapter.rank}, alpha {adapter.alpha}",
            "vision": recipe.model.vision,
            "connector": recipe.model.connector or recipe.model.vision,
            "token_budget": recipe.batch.token_budget,
        },
        "data": {
            "rows": dict(zip(_names(recipe.data), lengths, strict=True)),
            "looked_at": len(measured.query),
            "turns_per_sample": _range(measured.turns),
            "images_per_sample": _range(measured.images),
            "image_tokens_per_sample": _range(measured.visual),
        },
        "model": model_facts(model, recipe),
        "step": step,
        "memory": None,
        "run": _run_facts(recipe.data, arguments, mixture, notes, precision[stated]),
        "problems": problems,
        "notes": notes,
    }
    if model.config.model_type == "qwen2_vl":
        step |= _operations(recipe, model.config, measured, cached=step["cached"])
    else:
        notes.append(f"operations are counted for Qwen2-VL only, not for {model.config.model_type}")
    if "trained" not in (recipe.model.vision, recipe.model.connector):
        result["memory"] = _memory(recipe, model, measured, step, devices=devices, bf16=bool(stated))
        notes.append("memory is estimated, for AdamW, without what the driver and the allocator take for themselves")
    else:
        notes.append("memory is estimated only where vision tower and connector are frozen")
    return result


def _step(recipe: Recipe, measured: Measured, devices: int) -> dict[str, Any]:
    """Samples, turns, tokens and passes of one step, on average."""
    size, share = recipe.batch.size, math.ceil(recipe.batch.size / devices)
    rng = np.random.default_rng(0)
    per_sample = len(measured.target) / len(measured.query)  # hard negatives are dialogues of their own
    shares = (rng.choice(measured.query, share), rng.choice(measured.target, max(1, round(share * per_sample))))
    budget = recipe.batch.token_budget or UNLIMITED
    cut = [[side[rows.numpy()] for rows in chunks_of(torch.from_numpy(side), budget)] for side in shares]
    passed = [sum(len(chunk) * int(chunk.max()) for chunk in chunks) for chunks in cut]
    return {
        "samples": size,
        "turns": round(size * float(measured.turns.mean())),
        "tokens": round(size * float(measured.query.mean() + per_sample * measured.target.mean())),
        "image_tokens": round(size * float(measured.visual.mean())),
        "samples_per_device": share,
        "passes_per_device": sum(map(len, cut)),
        "cached": sum(passed) > budget,
        "padding": round(1 - float(sum(side.sum() for side in shares)) / sum(passed), 4),
        "query_tokens": _range(measured.query),
        "target_tokens": _range(measured.target),
    }


def _range(values: np.ndarray) -> dict[str, Any]:
    return {"min": int(values.min()), "mean": round(float(values.mean()), 1), "max": int(values.max())}


def _operations(recipe: Recipe, config: Any, measured: Measured, *, cached: bool) -> dict[str, Any]:
    """Floating-point operations of a step over all devices: those of one pass each way, and those really made."""
    turns, visual = max(1, round(float(measured.turns.mean()))), round(float(measured.visual.mean()))
    marks = IMAGE_MARKS * bool(visual)
    adapter = recipe.model.adapter
    flops = meta_step_flops(
        config,
        images=recipe.batch.size,
        turns=turns,
        visual_tokens=visual,
        query_tokens=max(1, round((float(measured.query.mean()) - visual - marks - PROMPT_TOKENS) / turns)),
        target_tokens=max(1, round((float(measured.target.mean()) - PROMPT_TOKENS) / turns)),
        vision_backward=recipe.model.vision == "trained",
        adapter=adapter and replace(adapter, kind="lora"),
    )
    again = cached + recipe.model.activation_checkpointing
    return {
        "pflop": round(flops.total / 1e15, 4),
        "pflop_made": round((flops.total + again * flops.language) / 1e15, 4),
    }


def _memory(
    recipe: Recipe, model: nn.Module, measured: Measured, step: dict[str, Any], *, devices: int, bf16: bool
) -> dict[str, float]:
    """GiB of one device: what it holds all the time, the largest pass, features of frozen vision, and the loss."""
    dtype = torch.bfloat16 if bf16 else model.get_decoder().dtype
    isolated = "isolated" in (recipe.turns.mode, recipe.turns.of_targets)
    masked = isolated and measured.turns.max() > 1 and recipe.model.attention != "flex"
    share, budget = step["samples_per_device"], recipe.batch.token_budget or UNLIMITED

    def activations(rows: int, tokens: int) -> int:
        checkpointing = recipe.model.activation_checkpointing
        return rows * activation_bytes(model, tokens, dtype, masked=bool(masked), checkpointing=checkpointing)

    sides = (measured.query, measured.target)
    if step["cached"]:
        largest = max(activations(max(1, min(share, budget // int(side.max()))), int(side.max())) for side in sides)
    else:  # both sides are held
        largest = sum(activations(share, round(float(side.mean()))) for side in sides)
    width, turns = model.get_decoder().config.hidden_size, step["turns"]
    features = round(share * float(measured.visual.mean())) * width * dtype.itemsize
    memory = held_bytes(model, dtype, shards=devices if recipe.batch.sharding == "fsdp" else 1) | {
        "activations": largest,
        "features": min(features, round(recipe.batch.feature_memory * GIB)),
        # vectors of all turns of all devices with their gradients, and blocks of scores
        "loss": 2 * 4 * turns * width * 4 + min(turns**2 * 4, 1 << 28) * 3,
    }
    if isolated and (sizes := state_bytes(model)):  # of recurrent layers, each turn has one
        rows = max(1.0, share / step["passes_per_device"]) if step["cached"] else share
        layers = max(sizes) if recipe.model.activation_checkpointing else sum(sizes)
        memory["states"] = round(rows * float(measured.turns.mean())) * layers
    memory["total"] = sum(memory.values())
    return {name: round(value / GIB, 2) for name, value in memory.items()}


def _names(data: DataRecipe) -> list[str]:
    """The path of each source, with its number where several have the same."""
    paths = [source.path for source in data.train]
    return [path if paths.count(path) == 1 else f"{path} ({n})" for n, path in enumerate(paths, start=1)]


def _run_facts(
    data: DataRecipe, arguments: OneDeviceArguments, mixture: Mixture | None, notes: list[str], precision: str
) -> dict[str, Any]:
    epoch, steps = None, arguments.max_steps if arguments.max_steps > 0 else None
    if mixture is not None:
        epoch, steps = mixture.steps_per_epoch, arguments.steps(mixture)
    if steps and arguments.get_warmup_steps(steps) >= steps:
        notes.append(f"trainer.warmup_steps: the run of {steps} steps ends before the learning rate is reached")
    checkpoints = None
    if steps and arguments.save_strategy == "steps":
        every = arguments.save_steps
        every = math.ceil(every * steps) if every < 1 else int(every)  # below 1 a share of the run
        checkpoints = math.ceil(steps / every)  # the last step is saved too
    return {
        "steps_per_epoch": epoch,
        "steps": steps,
        "rows_seen_per_epoch": _seen(data, mixture, epoch),
        "rows_seen_in_the_run": _seen(data, mixture, steps),
        "learning_rate": arguments.learning_rate,
        "schedule": str(arguments.lr_scheduler_type.value),
        "warmup_steps": arguments.warmup_steps,
        "precision": precision,
        "checkpoints": checkpoints,
    }


def _seen(data: DataRecipe, mixture: Mixture | None, steps: int | None) -> dict[str, float | None]:
    """How often each row of a source is seen in the first steps, on average."""
    if mixture is None or steps is None:
        return dict.fromkeys(_names(data))
    return {name: round(passes, 2) for name, passes in zip(_names(data), mixture.passes(steps), strict=True)}


def print_plan(result: dict[str, Any], console: Console) -> None:
    """The plan for people: a section per group, one fact per line, problems last."""
    for group in ("recipe", "data", "model", "step", "memory", "run"):
        title = "memory of one device, GiB" if group == "memory" else group
        facts = _flat(result[group] or {"": "not estimated, see the notes"})
        console.print(f"\n[bold]{title}[/bold]", highlight=False)
        width = max(len(name) for name, _ in facts)
        for name, value in facts:
            console.print(f"  {name:<{width}}  {value}", markup=False, highlight=False, soft_wrap=True)
    for title in ("notes", "problems"):
        for number, line in enumerate(result[title]):
            if number == 0:
                console.print(f"\n[bold]{title}[/bold]", highlight=False)
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
