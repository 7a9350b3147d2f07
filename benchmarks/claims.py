"""A figure that the log cites: the loss that the order of turns alone leaves.

A model that knows only the kinds of a dialogue's turns so far cannot tell an image from those of the batch
whose turns came in the same order of kinds. Over the orders of M3T's seven turns its loss is the mean over turns j of
E[ln(1 + M)], where M, the number of other images with the same first j kinds, is binomial.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from turns import heading, write

KINDS = ("classification", "global", "global", "local", "local", "creative", "retrieval")  # of M3T and of the scenes


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


def table(result: dict[str, Any]) -> str:
    lines = ["# Figures that the log cites", "", f"`{result['command']}`", "", f"{result['date']}.", ""]
    lines += [
        "| images per step | knows the kind of the question only, nats | knows the order of kinds, nats |",
        "|---:|---:|---:|",
    ]
    lines += [f"| {row['images']} | {math.log(row['images']):.2f} | {row['floor']:.2f} |" for row in result["order"]]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args(argv)
    result = heading("claims.py", argv, "cpu") | {
        "order": [{"images": n, "floor": floor_of_order(n)} for n in (32, 1024)],
    }
    write(args.output, "claims", result, table(result))


if __name__ == "__main__":
    main(sys.argv[1:])
