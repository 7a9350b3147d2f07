"""Which part of a device's matrix peak the step reaches, with which attention, and where the rest of its time goes."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import product
from typing import Any

import torch
from cells import Cell, configure, device_name, failures, make_step, measure, mib, page, seconds, settings_of
from torch.profiler import ProfilerActivity, profile
from turns import Bench, heading, say, write

from muco.training.flops import step_flops

KINDS = {  # of kernels, by parts of their names; the first that fits
    "attention": ("flash", "fmha", "attention", "flex", "sdpa"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk", "addmm", "::mm", "::bmm", "conv"),
    "copies": ("memcpy", "memset", "copy", "cat"),
    "norms and softmax": ("norm", "softmax", "reduce"),
}


def matrix_peak(device: str, dtype: torch.dtype, size: int, rounds: int) -> float:
    """Operations per second of a product of two square matrices, the best of some rounds."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(rounds):
        _wait(device)
        start = time.perf_counter()
        for _ in range(10):
            left @ right
        _wait(device)
        best = min(best, (time.perf_counter() - start) / 10)
    return 2 * size**3 / best


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def cells_of(args: argparse.Namespace) -> list[Cell]:
    """Attention, checkpointing and cache in all combinations; compounded turns with the first attention."""
    passes = [max(args.rows), None]
    cells = [
        Cell(rows=rows, attention=attention, checkpointing=checkpointing)
        for attention, checkpointing, rows in product(args.attention, (False, True), passes)
    ]
    cells.append(Cell(mode="compounded", rows=passes[0], attention=args.attention[0]))
    return cells + ([Cell(rows=passes[0], attention=args.attention[0], compiled=True)] if args.compile else [])


def kernels(bench: Bench, step: Callable[[], Any]) -> dict[str, Any]:
    """Where the time of one step goes: the longest kernels (on the CPU: operators), and shares by kind."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * bench.cuda
    with profile(activities=activities):  # its first start takes long
        bench.synchronize()
    with profile(activities=activities, acc_events=True) as profiler:
        bench.synchronize()
        start = time.perf_counter()
        step()
        bench.update()
        bench.synchronize()
        wall = time.perf_counter() - start
    rows = []
    for event in profiler.key_averages():
        spent = event.self_device_time_total if bench.cuda else event.self_cpu_time_total
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if spent and on_device == bench.cuda and not event.is_user_annotation:  # a range over kernels listed as well
            rows.append({"name": event.key, "calls": event.count, "seconds": spent / 1e6})
    rows.sort(key=lambda row: -row["seconds"])
    busy = sum(row["seconds"] for row in rows)
    kinds = dict.fromkeys([*KINDS, "element by element and other"], 0.0)
    for row in rows:
        kinds[kind_of(row["name"])] += row["seconds"] / busy
    return {"wall": wall, "busy": busy, "kinds": kinds, "top": rows[:25]}


def kind_of(name: str) -> str:
    low = name.lower()
    fitting = (kind for kind, marks in KINDS.items() if any(mark in low for mark in marks))
    return next(fitting, "element by element and other")


def run(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Writes utilisation-DEVICE.json and .md."""
    settings = settings_of(args, images=args.images)
    bench = Bench(settings)
    size, dtype = 8192 if bench.cuda else 1024, getattr(torch, settings.dtype)
    peak = matrix_peak(settings.device, dtype, size, 5)
    configure(bench, Cell())
    with bench.autocast():
        useful = step_flops(bench.model, bench.on_device(bench.collate("isolated", args.turns))).total
    bench.update()
    cells = cells_of(args)
    # flex attention cannot be counted; what it computes is what sdpa computes, or less
    measured = measure(bench, cells, args.turns, settings.rounds, count=False)
    for cell in measured:
        if "failed" not in cell:
            cell["utilisation"] = useful / seconds(cell) / peak
    result = heading("steps.py", argv, settings.device) | {"settings": asdict(settings), "matrix_peak": peak}
    result |= {"useful_operations": useful, "cells": measured, "failed": failures(measured), "kernels": {}}
    name = f"utilisation-{device_name(settings)}"
    write(args.output, name, result, markdown(result, size, str(dtype)))
    known = [number for number, cell in enumerate(measured) if "failed" not in cell]
    for number in sorted({*known[:1], *sorted(known, key=lambda n: measured[n]["utilisation"])[-1:]}):
        configure(bench, cells[number])
        result["kernels"][cells[number].name] = kernels(bench, make_step(bench, cells[number], args.turns))
        say(f"profiled {cells[number].name}")
        write(args.output, name, result, markdown(result, size, str(dtype)))


def markdown(result: dict[str, Any], size: int, dtype: str) -> str:
    notes = [
        f"Matrix peak, measured in this run: {result['matrix_peak'] / 1e12:.3g} TFLOP/s ({size} × {size}, {dtype}). "
        f"A step's useful operations: {result['useful_operations'] / 1e12:.3g} TFLOP, that is one forward pass of "
        "either side and its backward pass, attention in full (`muco.training.flops`); second passes of the cache "
        "and of checkpointing are not useful. *Utilisation*: useful operations per second over the peak."
    ]
    measured = [cell for cell in result["cells"] if "failed" not in cell]
    rows = [
        (
            *(cell["name"], cell["chunks"], f"{seconds(cell):.3g}", f"**{cell['utilisation']:.1%}**"),
            mib(cell["memory"]["peak"]) if "memory" in cell else "–",
        )
        for cell in measured
    ]
    rows += [(name, f"not measured: {reason}", "", "", "") for name, reason in result["failed"].items()]
    text = page("Utilisation", result, notes, "step | passes | s / step | utilisation | peak MiB", rows)
    for name, found in result["kernels"].items():
        shares = ", ".join(f"{kind} {share:.0%}" for kind, share in found["kinds"].items())
        text += (
            f"\n## Where time goes: {name}\n\nUnder the profiler the step took {found['wall']:.3g} s, of which kernels "
            f"ran {found['busy'] / found['wall']:.0%}. Of their time: {shares}.\n\n"
            "| kernel | calls | ms | share |\n|---|---|---|---|\n"
        )
        for row in found["top"]:
            title = row["name"].replace("|", "/")[:100]
            text += (
                f"| `{title}` | {row['calls']} | {row['seconds'] * 1e3:.1f} | {row['seconds'] / found['busy']:.1%} |\n"
            )
    return text
