"""Many questions about one image: `encode_turns` against a call of `encode` for each of them.

    PYTHONPATH=. python benchmarks/encode_turns.py --output benchmarks/results                 # encode-turns-cpu
    PYTHONPATH=. python benchmarks/encode_turns.py --device cuda --output benchmarks/results   # encode-turns-cuda

The model has random weights: only shapes matter here. benchmarks/README.md says what is measured.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from turns import IMAGE, SIZES, Bench, Settings, heading, say, write

from muco.training.flops import meta_step_flops
from muco.training.published import qwen2_vl_config

QUESTIONS = (1, 4, 16, 64)
TOKENS = 30  # of a question, its share of the prompt included
VISUAL = 782  # tokens of the image at the true sizes


def measure(bench: Bench, k: int, rounds: int) -> dict[str, Any]:
    """Medians over rounds, each of which goes through all ways once.

    The ideal is one call with the image and k - 1 texts of the same length without it, passed together.
    """
    sample = bench.samples["isolated"][0]
    image, queries = sample.images, [turn.query[0].text for turn in sample.turns[:k]]
    asked = [{"text": query, "images": list(image)} for query in queries]

    def ideal() -> None:
        bench.model.encode(asked[0])
        if k > 1:
            bench.model.encode(queries[1:], batch_size=k)

    ways: dict[str, Callable[[], Any]] = {
        "shared": lambda: bench.model.encode_turns(list(image), queries),
        "separate": lambda: [bench.model.encode(one) for one in asked],
        "ideal": ideal,
    }
    ideal()  # as the others are by what follows
    difference = float(np.abs(ways["shared"]() - np.stack(ways["separate"]())).max())
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            seconds[name].append(timed(bench, way))

    def ratio(name: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[name], seconds[other], strict=True))

    return {
        "questions": k,
        "difference": difference,
        **{f"{name}_seconds": statistics.median(values) for name, values in seconds.items()},
        "speedup": ratio("separate", "shared"),
        "over_ideal": ratio("shared", "ideal"),
        "seconds": seconds,
    }


def timed(bench: Bench, way: Callable[[], Any]) -> float:
    bench.synchronize()
    start = time.perf_counter()
    way()
    bench.synchronize()
    return time.perf_counter() - start


def true_flops(size: Literal["2B", "7B"], k: int) -> dict[str, float]:
    """TFLOPs at the true size, counted on the meta device; shared: all turns in one tree, attention counted in full."""

    def forward(turns: int) -> float:
        """Both sides of a training step without its target side: that is a pass without image, which is taken off."""
        counted = {"images": 1, "backward": False, "query_tokens": TOKENS, "target_tokens": TOKENS}
        both = meta_step_flops(qwen2_vl_config(size), turns=turns, visual_tokens=VISUAL, **counted)
        texts = meta_step_flops(qwen2_vl_config(size), turns=turns, visual_tokens=0, **counted)
        return (both.total - texts.total / 2) / 1e12

    return {"shared": forward(k), "separate": k * forward(1)}


def table(result: dict[str, Any]) -> str:
    settings, machine = result["settings"], result["machine"]
    lines = [
        f"# Many questions, one image: {machine['device']}",
        "",
        f"`{result['command']}`",
        "",
        f"{result['date']}; {machine['cpu']}, {machine['cores']} cores, {settings['threads']} threads; torch "
        f"{machine['torch']}, {settings['weights']}; image {settings['image'][0]} × {settings['image'][1]} px, "
        f"{TOKENS} tokens per question; medians of {settings['rounds']} rounds, image processing included. *Ideal*: "
        "one call with the image and k − 1 texts without it.",
        "",
        "| k | encode_turns s | k calls s | faster | over ideal | largest difference | TFLOP at 2B | k calls | fewer |",
        "|---|" + "---:|" * 8,
    ]
    for row in result["rows"]:
        flops = row["flops_2b"]
        lines.append(
            f"| {row['questions']} | {row['shared_seconds']:.3f} | {row['separate_seconds']:.3f} | "
            f"**{row['speedup']:.1f} ×** | {row['over_ideal']:.2f} × | {row['difference']:.1e} | "
            f"{flops['shared']:.2f} | {flops['separate']:.2f} | {flops['separate'] / flops['shared']:.1f} × |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--size", choices=tuple(SIZES), help="default: small on cpu, 2b on cuda")
    parser.add_argument("--questions", type=int, nargs="+", default=QUESTIONS)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    cuda = args.device.startswith("cuda")
    size = args.size or ("2b" if cuda else "small")
    settings = Settings(
        model=SIZES[size],
        image=(84, 84) if size == "quick" else IMAGE,
        images=1,
        query_tokens=TOKENS,
        target_tokens=TOKENS,
        turns=tuple(sorted({1, *args.questions})),
        rounds=args.rounds,
        device=args.device,
        dtype="float32",
        lora=0,
        train_vision=False,
        threads=torch.get_num_threads(),
        weights="bfloat16" if cuda else "float32",
    )
    bench = Bench(settings)
    bench.model.eval()
    rows = []
    for k in args.questions:
        rows.append(measure(bench, k, args.rounds) | {"flops_2b": true_flops("2B", k)})
        say(f"k = {k}: {rows[-1]['speedup']:.1f} x, {rows[-1]['over_ideal']:.2f} x the ideal")
    result = heading("encode_turns.py", argv, args.device) | {"settings": asdict(settings), "rows": rows}
    write(args.output, f"encode-turns-{args.device.split(':')[0]}", result, table(result))


if __name__ == "__main__":
    main(sys.argv[1:])
