"""Two figures that the log cites: the loss that the order of turns alone leaves, and what a warm-up does to texts.

The order: a model that knows only the kinds of a dialogue's turns so far cannot tell an image from those of the batch
whose turns came in the same order of kinds. Over the orders of M3T's seven turns its loss is the mean over turns j of
E[ln(1 + M)], where M, the number of other images with the same first j kinds, is binomial.

The warm-up: the mean cosine of different captions before and after steps of next-token prediction on the texts.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from turns import heading, write

from muco.data import open_data
from muco.study.base import plain_scenes
from muco.training.build import build_model, warm_up
from muco.training.recipe import WarmUpRecipe, from_dict

KINDS = ("classification", "global", "global", "local", "local", "creative", "retrieval")  # of M3T and of the scenes
CAPTIONS = 200


def floor_of_order(images: int, kinds: Sequence[str] = KINDS) -> float:
    """The loss in nats of a model that knows the order of kinds and nothing else, at ``images`` per step."""
    orders = Counter(permutations(kinds))
    total, losses = sum(orders.values()), []
    for turns in range(1, len(kinds) + 1):
        seen = Counter[tuple[str, ...]]()
        for order, count in orders.items():
            seen[order[:turns]] += count
        losses.append(sum(n / total * _expected_log(images - 1, n / total) for n in seen.values()))
    return sum(losses) / len(losses)


def _expected_log(others: int, share: float) -> float:
    """E[ln(1 + M)] of M binomial with ``others`` draws."""
    successes = np.arange(others + 1)
    log_choose = np.array(
        [math.lgamma(others + 1) - math.lgamma(m + 1) - math.lgamma(others - m + 1) for m in successes]
    )
    weights = np.exp(log_choose + successes * math.log(share) + (others - successes) * math.log1p(-share))
    return float(weights @ np.log1p(successes))


def cosines_by_warm_up(steps: int, seeds: int) -> list[dict[str, float]]:
    """Mean cosine of different captions of the built-in scenes before and after a warm-up, a row per seed."""
    with tempfile.TemporaryDirectory() as folder:
        plain_scenes(Path(folder), 0.1)
        train = Path(folder) / "train.jsonl"
        source, rows = open_data(train), []
        captions = [
            turn.target[0].text for i in range(CAPTIONS) for turn in source[i].turns if turn.kind == "retrieval"
        ]
        recipe = from_dict(
            {
                "output": folder,
                "model": {"tiny": {}, "vision": "trained"},
                "data": {"train": [{"path": str(train)}]},
            }
        )
        for seed in range(seeds):
            model = build_model(replace(recipe, seed=seed), [source])
            before = _mean_cosine(model.encode(captions))
            warm_up(model.encoder, [source], WarmUpRecipe(steps=steps), seed=seed)
            rows.append({"seed": seed, "before": before, "after": _mean_cosine(model.encode(captions))})
        return rows


def _mean_cosine(vectors: np.ndarray) -> float:
    count = len(vectors)
    return float(((vectors @ vectors.T).sum() - count) / (count * (count - 1)))


def table(result: dict[str, Any]) -> str:
    lines = ["# Figures that the log cites", "", f"`{result['command']}`", "", f"{result['date']}.", ""]
    lines += [
        "| images per step | knows the kind of the question only, nats | knows the order of kinds, nats |",
        "|---:|---:|---:|",
    ]
    lines += [f"| {row['images']} | {math.log(row['images']):.2f} | {row['floor']:.2f} |" for row in result["order"]]
    lines += ["", f"Mean cosine of {CAPTIONS} captions, {result['warm_up_steps']} steps of warm-up:", ""]
    lines += ["| seed | before | after |", "|---:|---:|---:|"]
    lines += [f"| {row['seed']} | {row['before']:.3f} | {row['after']:.3f} |" for row in result["warm_up"]]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--steps", type=int, default=60, help="of warm-up")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args(argv)
    result = heading("claims.py", argv, "cpu") | {
        "order": [{"images": n, "floor": floor_of_order(n)} for n in (32, 1024)],
        "warm_up_steps": args.steps,
        "warm_up": cosines_by_warm_up(args.steps, args.seeds),
    }
    write(args.output, "claims", result, table(result))


if __name__ == "__main__":
    main(sys.argv[1:])
