"""Floating-point operations per training step of the true Qwen2-VL-2B and 7B, beside the paper's, at 1024 images.

    python benchmarks/true_sizes.py --output DIR      -> true-sizes.json, true-sizes.md; no weights, no GPU, two minutes

Counted on the meta device (:mod:`muco.train.flops`); benchmarks/README.md states the assumptions.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from muco.sizes import Adapter
from muco.train.flops import meta_step_flops, qwen2_vl_config

IMAGES = 1024
RUNS = {"1": (IMAGES, 1), "2": (IMAGES, 2), "4": (IMAGES, 4), "7": (IMAGES, 7), "as many pairs": (7 * IMAGES, 1)}
PAPER = {"1": 17.5, "2": 17.6, "4": 17.7, "7": 18.0, "as many pairs": 122.7}  # arXiv 2602.06393, PFLOPs per step
ASSUMPTIONS: dict[str, dict[str, Any]] = {
    "forward only": {"backward": False},
    "vision forward; language model forward and backward, LoRA r = 64": {"adapter": Adapter()},
    "vision forward; language model forward and backward, all weights": {},
    "the same with 1024 visual tokens": {"visual_tokens": 1024},
}


def count(sizes: Sequence[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Operations by size, assumption and run."""
    counts: dict[str, dict[str, dict[str, Any]]] = {}
    for size in sizes:
        config = qwen2_vl_config(size)
        for name, assumption in ASSUMPTIONS.items():
            flops = {
                run: meta_step_flops(config, images=images, turns=turns, **assumption)
                for run, (images, turns) in RUNS.items()
            }
            counts.setdefault(size, {})[name] = {run: asdict(f) | {"total": f.total} for run, f in flops.items()}
            print(f"{size}: {name}", file=sys.stderr, flush=True)
    return counts


def table(result: dict[str, Any]) -> str:
    lines = ["# Operations of a training step of the true Qwen2-VL", "", f"`{result['command']}`", ""]
    lines += [f"{result['date']}; torch {result['torch']}; PFLOPs per step; {IMAGES} images but for the last column."]
    for size, counts in result["flops"].items():
        lines += ["", f"## Qwen2-VL-{size}", ""]
        lines += [f"| | k = 1 | 2 | 4 | 7 | 7 : 1 | k = 1 at {7 * IMAGES} images |", "|---|---|---|---|---|---|---|"]
        if size == "2B":  # the size that the paper's table belongs to
            lines.append(_row("*the paper, as published*", PAPER, 1))
        for name, runs in counts.items():
            lines.append(_row(name, {run: flops["total"] / 1e15 for run, flops in runs.items()}, 2))
    return "\n".join(lines) + "\n"


def _row(name: str, pflops: dict[str, float], digits: int) -> str:
    values = [f"{pflops[run]:.{digits}f}" for run in ("1", "2", "4", "7")]
    return f"| {name} | {' | '.join(values)} | {pflops['7'] / pflops['1']:.3f} | {pflops['as many pairs']:.1f} |"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--sizes", nargs="+", choices=("2B", "7B"), default=("2B", "7B"))
    args = parser.parse_args(argv)
    result: dict[str, Any] = {
        "command": " ".join(["python benchmarks/true_sizes.py", *argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "flops": count(args.sizes),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "true-sizes.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (args.output / "true-sizes.md").write_text(table(result), encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main(sys.argv[1:])
