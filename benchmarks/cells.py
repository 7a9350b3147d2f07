"""What is measured: one way of making a training step, its time, its operations and its memory."""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from stock import StockStep
from torch import Tensor
from turns import SIZES, Bench, Settings, in_own_processes, reset_device_memory, say

from muco.backbone import use_flex_attention
from muco.base.text import first_line
from muco.errors import TrainingError
from muco.step import TrainingStep
from muco.training.flops import count_flops

# kernels that a machine cannot run or a model does not take, memory that is short
ERRORS = (RuntimeError, TrainingError, ValueError)


@dataclass(frozen=True)
class Cell:
    """A way of making a step of ``Settings.images`` images with their turns.

    Args:
        library: The plain way users have today, see ``stock.py``; else ours.
        mode: Of our turns.
        rows: Query dialogues per chunk, which sets our token budget; None for the whole batch at once.
        mini_batch: Pairs that pass through the library's model together.
        mini_tokens: Most tokens that do, instead of a number of pairs.
        parts: The batch is so many times ``Settings.images`` images, and comes in so many parts.
        streamed: Each part is made when the step asks for it, as the loader does; else before.
        attention, checkpointing, compiled: Of the language model; attention as a recipe calls it.
    """

    library: bool = False
    mode: str = "isolated"
    rows: int | None = None
    mini_batch: int = 0
    mini_tokens: int | None = None
    parts: int = 1
    streamed: bool = False
    attention: str = "sdpa"
    checkpointing: bool = False
    compiled: bool = False

    @property
    def name(self) -> str:
        if self.library:
            return (
                f"library, {self.mini_tokens} tokens" if self.mini_tokens else f"library, mini-batch {self.mini_batch}"
            )
        passes = "whole batch" if self.rows is None else f"chunks of {self.rows}"
        marks = [self.attention] * (self.attention != "sdpa") + ["checkpointing"] * self.checkpointing
        return ", ".join([f"MuCo {self.mode}", passes, *marks, *["compiled"] * self.compiled])


class OurStep:
    """Our training step with its batch: called, it leaves the gradients in the parameters."""

    def __init__(self, bench: Bench, cell: Cell, turns: int) -> None:
        self.bench, self.cell, self.turns = bench, cell, turns
        first = bench.collate(cell.mode, turns)
        self.length = first["query"]["input_ids"].shape[1]
        self.ready = None if cell.streamed else [first, *self._parts(1)]
        budget = None if cell.rows is None else cell.rows * self.length
        self.step = TrainingStep(bench.model, bench.loss, token_budget=budget, autocast=bench.autocast)
        self.asked = self.step.token_budget

    def _parts(self, first: int = 0) -> Iterator[dict[str, Any]]:
        return (self.bench.collate(self.cell.mode, self.turns, part) for part in range(first, self.cell.parts))

    def __call__(self) -> Tensor:
        report = self.step(self._parts() if self.ready is None else self.ready)
        assert report is not None, "no turn in the batch"
        self.report = report
        if self.step.token_budget != self.asked:
            raise torch.OutOfMemoryError("the token budget was halved, so this is another measurement")
        return self.report.loss


def make_step(bench: Bench, cell: Cell, turns: int) -> OurStep | StockStep:
    if cell.library:
        return StockStep(bench, turns, cell.mini_batch, cell.mini_tokens)
    return OurStep(bench, cell, turns)


def configure(bench: Bench, cell: Cell) -> None:
    """Sets what a cell asks of the backbone, and takes back what the cell before had asked."""
    if cell.attention == "flex":
        use_flex_attention(bench.backbone)
    else:
        bench.backbone.set_attn_implementation({"text_config": cell.attention})
    if cell.checkpointing and not bench.checkpointing:
        bench.backbone.activation_checkpointing_enable({"use_reentrant": False})
    if bench.checkpointing and not cell.checkpointing:
        bench.backbone.activation_checkpointing_disable()
    bench.checkpointing = cell.checkpointing
    for layer in bench.backbone.language_model.layers:
        layer._compiled_call_impl = None
        if cell.compiled:
            layer.compile()


def timed(bench: Bench, step: Callable[[], Any]) -> float:
    """Seconds of a step with its AdamW update."""
    bench.synchronize()
    start = time.perf_counter()
    step()
    bench.update()
    bench.synchronize()
    return time.perf_counter() - start


def operations(bench: Bench, step: Callable[[], Any]) -> dict[str, int]:
    """Operations that a step makes, second passes included, and how many images it puts through the vision tower."""
    seen = []

    def forward() -> Tensor:
        step()
        return torch.zeros((), requires_grad=True)  # the step has made its own backward passes

    hook = bench.backbone.visual.register_forward_pre_hook(
        lambda tower, args, kwargs: seen.append(len(kwargs["grid_thw"])), with_kwargs=True
    )
    with hook:
        return {"operations": count_flops(forward).total, "images_seen": sum(seen)}


def measure(
    bench: Bench, cells: Sequence[Cell], turns: int, rounds: int, *, count: bool = True
) -> list[dict[str, Any]]:
    """Rounds through all cells in turn, so that drift cancels; before them each cell once, uncounted.

    Args:
        count: Count the operations in the uncounted step; the library's cells make the same ones, which are counted
            once.
    Returns:
        Per cell its fields, ``seconds`` per round, what :func:`operations` counts, ``chunks`` of our ways and, on a
        GPU, ``memory`` in bytes. A cell that cannot be measured has ``failed``, the reason, in place of all that.
    """
    steps = [make_step(bench, cell, turns) for cell in cells]
    results = [asdict(cell) | {"name": cell.name, "seconds": []} for cell in cells]
    counted: dict[str, int] = {}
    for cell, step, result in zip(cells, steps, results, strict=True):
        known = counted if cell.library else {}
        result |= known | _warm_up(bench, cell, step, count and not known)
        if cell.library and count and "failed" not in result:
            counted = {key: result[key] for key in ("operations", "images_seen")}
        say(f"{cell.name}: {result.get('failed', 'ready')}")
    for number in range(rounds):
        for cell, step, result in zip(cells, steps, results, strict=True):
            if "failed" in result:
                continue
            try:
                configure(bench, cell)
                resting = reset_device_memory(bench)
                result["seconds"].append(timed(bench, step))
            except ERRORS as error:
                result["failed"] = _reason(bench, error)
                continue
            if bench.cuda:
                result["memory"] = {"resting": resting, "peak": torch.cuda.max_memory_allocated()}
        say(f"round {number + 1}/{rounds}")
    return results


def _warm_up(bench: Bench, cell: Cell, step: OurStep | StockStep, count: bool) -> dict[str, Any]:
    try:
        configure(bench, cell)
        known = operations(bench, step) if count else {"loss": float(step())}
        bench.update()
    except ERRORS as error:
        return {"failed": _reason(bench, error)}
    return known | ({} if cell.library else {"chunks": step.report.chunks, "padding": step.report.padding})


def _reason(bench: Bench, error: Exception) -> str:
    """Why a cell cannot be measured; what its step left goes."""
    bench.optimizer.zero_grad(set_to_none=True)
    return f"{type(error).__name__}: {first_line(error)}"


def measure_memory(settings: Settings, cells: Sequence[Cell], turns: int) -> Iterator[dict[str, int]]:
    """Bytes at rest and at the peak of one step of each cell: on a GPU what torch allocated, else resident memory."""
    if not settings.device.startswith("cuda"):
        yield from in_own_processes(_host_memory, [(settings, cell, turns) for cell in cells])
        return
    bench = Bench(settings)
    for cell in cells:
        step = make_step(bench, cell, turns)
        configure(bench, cell)
        timed(bench, step)  # makes the optimizer's state
        resting = reset_device_memory(bench)
        timed(bench, step)
        yield {"resting": resting, "peak": torch.cuda.max_memory_allocated()}


def _host_memory(settings: Settings, cell: Cell, turns: int) -> dict[str, int]:
    """Resident memory of this process before a step, with weights, optimizer state and batch in place, and its peak."""
    bench = Bench(settings)
    step = make_step(bench, cell, turns)
    configure(bench, cell)
    for parameter in bench.model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    bench.update()  # makes the optimizer's state
    resting = reset_peak()
    timed(bench, step)
    return {"resting": resting, "peak": peak_of_this_process()}


def reset_peak() -> int:
    """Bytes resident now, after giving back what is free; the peak counts from here on (Linux)."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_of_this_process() -> int:
    return _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def ratio(cell: dict[str, Any], other: dict[str, Any]) -> float:
    """How many times the seconds of ``other`` a cell takes: the median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(cell["seconds"], other["seconds"], strict=True))


def seconds(cell: dict[str, Any]) -> float:
    return statistics.median(cell["seconds"])


def mib(value: float) -> str:
    return f"{value / 2**20:.0f}"


def page(
    title: str,
    result: dict[str, Any],
    notes: Sequence[str],
    header: str,
    rows: Sequence[Sequence[Any]],
    *,
    trained: str | None = None,
) -> str:
    """A result as Markdown: title, command, machine, notes and one table; ``trained``: if not the settings say what."""
    on, made = result["machine"], result["settings"]
    model = made["model"]
    weights = f"LoRA r = {made['lora']}, weights in {made['weights']}" if made["lora"] else "all weights"
    trained = trained or f"{weights} of the language model"
    libraries = f"torch {on['torch']}, transformers {on['transformers']}"
    head = (
        f"{result['date']}; {on['cpu']}, {on['cores']} cores, {made['threads']} threads; {libraries}, "
        f"{made['dtype']}. Language model of width {model['width']} with {model['layers']} layers, vision tower of "
        f"width {model['vision_width']} with {model['vision_depth']} blocks, frozen; trained: {trained}. "
        f"{made['images']} images of {made['image'][0]} × {made['image'][1]} px with "
        f"{max(made['turns'])} turns each, which add {made['query_tokens']} + {made['target_tokens']} tokens; "
        f"{made['rounds']} rounds."
    )
    columns = header.split(" | ")
    lines = [f"# {title}: {on['device']}", "", f"`{result['command']}`", "", head, ""]
    lines += [line for note in notes for line in (note, "")]
    lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]) + "\n"


def failures(measured: Sequence[dict[str, Any]]) -> dict[str, str]:
    failed = {cell["name"]: cell["failed"] for cell in measured if "failed" in cell}
    for name, reason in failed.items():
        say(f"not measured: {name}: {reason}")
    return failed


def device_name(settings: Settings) -> str:
    return settings.device.split(":")[0]


def settings_of(
    args: argparse.Namespace, *, images: int, rounds: int | None = None, lora: int | None = None
) -> Settings:
    rank = args.lora if lora is None else lora
    return Settings(
        model=SIZES[args.size],
        image=tuple(args.image_size),
        images=images,
        query_tokens=30,
        target_tokens=20,
        turns=(args.turns,),
        rounds=rounds or args.rounds,
        device=args.device,
        dtype=args.dtype,
        lora=rank,
        train_vision=False,
        threads=args.threads,
        weights="bfloat16" if rank and args.dtype == "bfloat16" else "float32",
    )
