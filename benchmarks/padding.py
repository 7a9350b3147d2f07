"""How much of what passes through the model is padding, on ragged dialogues: lengths only, no model.

The distribution stands for M3T: a photograph with its short side at 640 px and an aspect between 1 and 2, one to seven
turns, and captions as targets. Chunks are cut by :func:`muco.batch.chunks_of`, as training cuts them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from turns import heading, write

from muco.batch import chunks_of
from muco.training.flops import IMAGE_MARKS, PROMPT_TOKENS

SIDE = 28  # pixels of a visual token


@dataclass(frozen=True)
class Ragged:
    """The distribution. Ranges are uniform, both ends included.

    Args:
        short_side: Of every image, in pixels.
        aspect: Long over short side.
        query, target: Tokens of a text.
        marks: Tokens of the prompt that every turn adds on either side.
    """

    short_side: int = 640
    aspect: tuple[float, float] = (1.0, 2.0)
    turns: tuple[int, int] = (1, 7)
    query: tuple[int, int] = (8, 40)
    target: tuple[int, int] = (40, 150)
    marks: int = 6

    def lengths(self, samples: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Tokens of each sample's dialogues, int64 [samples] per side."""
        short = round(self.short_side / SIDE)
        long = np.round(self.short_side * rng.uniform(*self.aspect, samples) / SIDE).astype(int)
        turns = rng.integers(*self.turns, samples, endpoint=True)
        query, target = (
            np.array([(rng.integers(*texts, k, endpoint=True) + self.marks).sum() for k in turns])
            for texts in (self.query, self.target)
        )
        return {"query": PROMPT_TOKENS + IMAGE_MARKS + short * long + query, "target": PROMPT_TOKENS + target}


def passed(lengths: np.ndarray, budget: int) -> tuple[int, int]:
    """What goes through the model with padding, and in how many chunks."""
    chunks = chunks_of(torch.from_numpy(lengths), budget)
    return sum(len(rows) * int(lengths[rows.numpy()].max()) for rows in chunks), len(chunks)


def passed_in_order(lengths: np.ndarray, budget: int) -> int:
    """The same if rows were taken as they come, as many as fit."""
    total, first = 0, 0
    while first < len(lengths):
        tokens = np.maximum.accumulate(lengths[first:]) * np.arange(1, len(lengths) - first + 1)
        rows = max(1, int((tokens <= budget).sum()))
        total += int(tokens[rows - 1])
        first += rows
    return total


def cell(ragged: Ragged, samples: int, devices: int, budget: int, steps: int) -> dict[str, Any]:
    """Shares of padding over some steps, all devices together, as ``StepReport.padding`` has them per device."""
    rng = np.random.default_rng(0)
    shares, in_order, sides, chunks = [], [], {"query": [], "target": []}, []
    for _ in range(steps):
        own = ragged.lengths(samples, rng)
        parts = [(side, lengths[rank::devices]) for side, lengths in own.items() for rank in range(devices)]
        real = {side: int(lengths.sum()) for side, lengths in own.items()}
        cut = [(side, *passed(lengths, budget)) for side, lengths in parts]
        whole = {side: sum(tokens for name, tokens, _ in cut if name == side) for side in sides}
        shares.append(1 - sum(real.values()) / sum(whole.values()))
        in_order.append(1 - sum(real.values()) / sum(passed_in_order(lengths, budget) for _, lengths in parts))
        chunks.append(sum(count for *_, count in cut) / devices)
        for side in sides:
            sides[side].append(1 - real[side] / whole[side])
    return {
        "devices": devices,
        "budget": budget,
        "padding": float(np.mean(shares)),
        "worst": float(np.max(shares)),
        **{side: float(np.mean(values)) for side, values in sides.items()},
        "in_order": float(np.mean(in_order)),
        "chunks": float(np.mean(chunks)),
    }


def table(result: dict[str, Any]) -> str:
    ragged, cells = result["distribution"], result["cells"]
    low, high = ragged["aspect"]
    lines = [
        "# Padding on ragged dialogues",
        "",
        f"`{result['command']}`",
        "",
        f"{result['date']}; lengths only, so no machine matters. {result['samples']} samples per step over all "
        f"devices, {result['steps']} steps. An image has its short side at {ragged['short_side']} px and an aspect "
        f"of {low:g} to {high:g}: {result['visual'][0]} to {result['visual'][1]} visual tokens. "
        f"{ragged['turns'][0]} to {ragged['turns'][1]} turns of a query of {ragged['query'][0]} to "
        f"{ragged['query'][1]} and a caption of {ragged['target'][0]} to {ragged['target'][1]} tokens, all uniform; "
        f"the prompt adds {ragged['marks']} tokens "
        "per turn. Padding is its share in what passes through the model, both sides together.",
        "",
        "| devices | token budget | padding | worst step | query side | target side | rows as they come | chunks |",
        "|---" * 8 + "|",
    ]
    for row in cells:
        shares = [f"{row[key]:.1%}" for key in ("padding", "worst", "query", "target", "in_order")]
        lines.append(
            f"| {row['devices']} | {row['budget']} | **{shares[0]}** | {' | '.join(shares[1:])} | {row['chunks']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def run(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Writes padding.json and padding.md."""
    samples, steps = (64, 1) if args.quick else (1024, 5)
    ragged = Ragged()
    visual = [round(ragged.short_side / SIDE) * round(ragged.short_side * aspect / SIDE) for aspect in ragged.aspect]
    cells = [cell(ragged, samples, n, budget, steps) for n in (1, 8, 32) for budget in (8192, 16384, 32768)]
    result = heading("steps.py", argv, "cpu") | {"samples": samples, "steps": steps, "visual": visual}
    result |= {"distribution": asdict(ragged), "cells": cells}
    write(args.output, "padding", result, table(result))
