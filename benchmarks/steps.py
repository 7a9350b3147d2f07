"""Our training step against the plain way, against itself without cache, its memory, its loader and its padding.

    python benchmarks/steps.py --output DIR                    every part, on the CPU
    python benchmarks/steps.py --parts baseline --output DIR   one part
    python benchmarks/steps.py --device cuda --output DIR      on a GPU, at the shapes of Qwen2-VL-2B

Parts: baseline, cache, memory, loader, padding, utilisation. Each writes NAME-DEVICE.json and NAME-DEVICE.md (padding
needs no device). The model has random weights: only shapes matter here. benchmarks/README.md says what is measured.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import loader
import padding
import torch
import utilisation
from cells import Cell, device_name, failures, measure, measure_memory, mib, page, ratio, seconds, settings_of
from turns import IMAGE, MODES, SIZES, Bench, Settings, heading, say, write


def baseline(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Our step against single-turn pairs under the library's cached loss: speed and peak memory."""
    settings = settings_of(args, images=args.images)
    ours = [Cell(mode=mode, rows=rows) for mode in MODES for rows in (*args.rows, None)]
    cells = [
        *ours,
        *(Cell(library=True, mini_batch=size) for size in args.mini_batches),
        *(Cell(library=True, mini_tokens=tokens) for tokens in args.mini_tokens),
    ]
    result = heading("steps.py", argv, settings.device) | {"settings": asdict(settings)}
    result |= {"summary": [], "cells": [], "failed": []}
    for turns in dict.fromkeys((args.turns, 1)):
        # of one turn, both modes are the same computation, and a chunk of one image is its pair
        own = [cell for cell in cells if cell.library or turns > 1 or cell.mode == MODES[0]]
        measured = measure(Bench(settings), own, turns, settings.rounds)
        if settings.device == "cpu":
            for cell, memory in zip(measured, measure_memory(settings, own, turns), strict=True):
                cell["memory"] = memory
                say(f"memory of {cell['name']}, k = {turns}")
        result["cells"] += [cell | {"turns": turns} for cell in measured]
        result["failed"] += failures(measured)
        found = compare([cell for cell in measured if "failed" not in cell], settings.images * turns)
        result["summary"] += [row | {"turns": turns} for row in found]
        write(args.output, f"baseline-{device_name(settings)}", result, baseline_page(result, settings))


def baseline_page(result: dict[str, Any], settings: Settings) -> str:
    notes = [
        f"{settings.images} images per step with k pairs each. *Library*: the pairs as single-turn pairs (image and "
        "question, answer) under CachedMultipleNegativesRankingLoss of sentence-transformers, on the same backbone "
        "with the same weights and temperature, by pairs (mini_batch_size) or by tokens (mini_batch_num_tokens). × is "
        "the ratio to the library's fastest setting at the same k. Peak and resting memory: "
        + ("resident memory of a process of its own." if settings.device == "cpu" else "what torch allocated.")
    ]
    rows = [
        (
            *(row["turns"], row["name"], f"{row['seconds']:.3g}", f"{row['pairs_per_second']:.3g}"),
            *(f"**{row['speed']:.2f}**", f"{row['operations'] / 1e12:.3g}", row["images_seen"], mib(row["peak"])),
            *(f"**{row['peak_ratio']:.2f}**", mib(row["peak"] - row["resting"]), f"{row['step_ratio']:.2f}"),
        )
        for row in result["summary"]
    ]
    header = "k | way | s / step | pairs / s | × | TFLOP | images seen | peak MiB | × | peak over resting MiB | ×"
    return page("MuCo against the plain way", result, notes, header, rows)


def compare(measured: Sequence[dict[str, Any]], pairs: int) -> list[dict[str, Any]]:
    """Speed and memory of every way, as ratios to the library's fastest."""
    fastest = min((cell for cell in measured if cell["library"]), key=seconds, default=None)
    if fastest is None:  # nothing to compare with: the cells are in the JSON file
        return []
    base = fastest["memory"]
    return [
        {
            "name": cell["name"],
            "seconds": seconds(cell),
            "pairs_per_second": pairs / seconds(cell),
            "speed": 1 / ratio(cell, fastest),
            "operations": cell["operations"],
            "images_seen": cell["images_seen"],
            **cell["memory"],
            "peak_ratio": cell["memory"]["peak"] / base["peak"],
            "step_ratio": (cell["memory"]["peak"] - cell["memory"]["resting"]) / (base["peak"] - base["resting"]),
            "fastest": fastest["name"],
        }
        for cell in measured
    ]


def cache(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """The cached step against the plain one, with frozen vision: what the second pass costs."""
    chunks = [n for n in (2, 4, 8) if n <= args.cache_images]
    cells = [Cell(), *(Cell(rows=args.cache_images // n) for n in chunks)]
    measured: list[dict[str, Any]] = []
    for rank in (args.lora or 16, 0):
        settings = settings_of(args, images=args.cache_images, lora=rank)
        own = measure(Bench(settings), cells, args.turns, settings.rounds)
        trained = f"LoRA r = {rank}" if rank else "all weights"
        for cell in own:
            compared = "failed" not in cell and "failed" not in own[0]
            cell |= {"trained": trained} | ({"ratio": ratio(cell, own[0])} if compared else {})
        measured += own
        result = heading("steps.py", argv, settings.device) | {"settings": asdict(settings)}
        result |= {"cells": measured, "failed": failures(measured)}
        write(args.output, f"cache-{device_name(settings)}", result, cache_page(result))


def cache_page(result: dict[str, Any]) -> str:
    rows = [
        (
            *(cell["trained"], cell["name"], cell["chunks"], f"{seconds(cell):.3g}", f"**{cell['ratio']:.2f}**"),
            *(f"{cell['operations'] / 1e12:.3g}", cell["images_seen"]),
        )
        for cell in result["cells"]
        if "ratio" in cell
    ]
    notes = [
        "× is the ratio to the whole batch at once. Passes are forward passes with gradient, both sides together; "
        "images seen is how often the vision tower was given one."
    ]
    header = "trained | step | passes | s / step | × | TFLOP | images seen"
    return page("The cached step against the plain one", result, notes, header, rows, trained="see the table")


def memory(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Peak memory as the batch grows and the token budget does not."""
    settings = settings_of(args, images=args.memory_images, rounds=1)
    cells = [Cell(rows=max(1, args.memory_images // 2), parts=factor, streamed=True) for factor in (1, 2, 4, 8)]
    measured: list[dict[str, Any]] = []
    result = heading("steps.py", argv, settings.device) | {"settings": asdict(settings), "cells": measured}
    for cell, used in zip(cells, measure_memory(settings, cells, args.turns), strict=True):
        found = asdict(cell) | {"name": cell.name, "memory": used} | kept_bytes(settings, cell, args.turns)
        measured.append(found)
        found["ratio"] = used["peak"] / measured[0]["memory"]["peak"]
        found["ratio_aside"] = without_kept(found) / without_kept(measured[0])
        say(f"memory at {cell.parts} x")
        write(args.output, f"memory-{device_name(settings)}", result, memory_page(result, settings))


def memory_page(result: dict[str, Any], settings: Settings) -> str:
    notes = [
        "The batch is given in parts of the images above, each made when the step asks for it, so that pixels of one "
        "part are in memory at a time. Kept for the whole batch, computed: features of frozen vision (images × visual "
        "tokens × width), vectors with their gradients and what the loss saves of them (turns × width), and token "
        "tables. The last column is the ratio of peaks with these aside."
    ]
    rows = [
        (
            *(f"{cell['parts']} ×", cell["parts"] * settings.images, mib(cell["memory"]["resting"])),
            *(mib(cell["memory"]["peak"]), f"{cell['ratio']:.3f}"),
            *(f"{cell[key] / 2**20:.1f}" for key in ("features", "vectors", "tables")),
            f"**{cell['ratio_aside']:.3f}**",
        )
        for cell in result["cells"]
    ]
    header = "batch | images | resting MiB | peak MiB | × | features MiB | vectors MiB | tables MiB | × aside"
    return page("Memory as the batch grows", result, notes, header, rows)


def kept_bytes(settings: Settings, cell: Cell, turns: int) -> dict[str, int]:
    """What a cached step must keep of a whole batch, in bytes."""
    images, width = cell.parts * settings.images, settings.model.width
    visual = (settings.image[0] // 28) * (settings.image[1] // 28)
    number = 2 if settings.dtype == "bfloat16" else 4
    lengths = visual + turns * settings.query_tokens, turns * settings.target_tokens
    return {
        "features": images * visual * width * number,
        # per side: the vectors of the first pass, put together, their gradient, and normalised rows within the loss
        "vectors": 2 * images * turns * width * 4 * 4,
        # ids, mask, branches and three axes of positions, int64, which stay on the host
        "tables": images * sum(lengths) * 6 * 8 if settings.device == "cpu" else 0,
    }


def without_kept(cell: dict[str, Any]) -> int:
    return cell["memory"]["peak"] - sum(cell[key] for key in ("features", "vectors", "tables"))


PARTS = {
    "baseline": baseline,
    "cache": cache,
    "memory": memory,
    "loader": loader.run,
    "padding": padding.run,
    "utilisation": utilisation.run,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "quick": {
        "size": "quick",
        "images": 2,
        "cache_images": 2,
        "memory_images": 2,
        "loader_images": 4,
        "rows": (1,),
        "mini_batches": (2,),
        "mini_tokens": (100,),
        "rounds": 1,
        "lora": 0,
        "dtype": "float32",
        "workers": (0, 1),
        "image_size": (84, 84),
    },
    "cpu": {
        "size": "small",
        "images": 2,
        "cache_images": 8,
        "memory_images": 4,
        "loader_images": 8,
        "rows": (1,),
        "mini_batches": (1, 7),
        "mini_tokens": (900, 3600),
        "rounds": 3,
        "lora": 0,
        "dtype": "float32",
        "workers": (0, 1, 2),
        "image_size": IMAGE,
    },
    "cuda": {
        "size": "2b",
        "images": 16,
        "cache_images": 8,
        "memory_images": 8,
        "loader_images": 16,
        "rows": (4, 8),
        "mini_batches": (16,),
        "mini_tokens": (16384,),
        "rounds": 3,
        "lora": 64,
        "dtype": "bfloat16",
        "workers": (0, 2, 8),
        "image_size": IMAGE,
    },
}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=tuple(PARTS), metavar="PART")
    parser.add_argument("--quick", action="store_true", help="a toy, to see that everything runs")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="bfloat16 is autocast; default on cuda")
    parser.add_argument("--size", choices=tuple(SIZES), help="default: small on cpu, 2b on cuda")
    parser.add_argument("--image-size", type=int, nargs=2, metavar=("WIDTH", "HEIGHT"), help="in pixels")
    parser.add_argument("--turns", type=int, default=7, help="per image (7)")
    parser.add_argument("--images", type=int, help="per step of baseline and utilisation; default 2 on cpu, 16 on cuda")
    parser.add_argument("--cache-images", type=int, help="per step of cache; default 8")
    parser.add_argument(
        "--memory-images", type=int, help="of the smallest batch of memory; default 4 on cpu, 8 on cuda"
    )
    parser.add_argument("--loader-images", type=int, help="per step of loader; default 8 on cpu, 16 on cuda")
    parser.add_argument("--rows", type=int, nargs="+", help="images per chunk of ours; default 1 on cpu, 4 8 on cuda")
    parser.add_argument("--mini-batches", type=int, nargs="+", help="of the library; default 1 7 on cpu, 16 on cuda")
    parser.add_argument(
        "--mini-tokens", type=int, nargs="+", help="of the library; default 900 3600 on cpu, 16384 on cuda"
    )
    parser.add_argument("--workers", type=int, nargs="+", help="of the loader; default 0 1 2 on cpu, 0 2 8 on cuda")
    parser.add_argument("--rounds", type=int, help="default 3")
    parser.add_argument("--lora", type=int, help="rank of the adapters, 0 for none; default 64 on cuda, else 0")
    parser.add_argument("--attention", nargs="+", choices=("sdpa", "flex"), help="of utilisation; default both on cuda")
    parser.add_argument("--compile", action="store_true", help="utilisation also with torch.compile, layer by layer")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    cuda = args.device.startswith("cuda")
    args.attention = args.attention or (["sdpa", "flex"] if cuda else ["sdpa"])
    for key, value in DEFAULTS["quick" if args.quick else "cuda" if cuda else "cpu"].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    return args


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    failed = []
    for part in args.parts:
        try:
            PARTS[part](args, argv)
        except Exception:  # whatever it is, the other parts are still of use
            traceback.print_exc()
            failed.append(part)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main(sys.argv[1:])
