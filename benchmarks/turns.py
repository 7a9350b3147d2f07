"""What do more turns per image cost? Training steps at k = 1, 2, 4, 7 turns with the number of images fixed.

    python benchmarks/turns.py --output DIR                  measure on the CPU -> turns-cpu.json, turns-cpu.md
    python benchmarks/turns.py --device cuda --output DIR    measure on a GPU   -> turns-cuda.json, turns-cuda.md

The model has random weights: only shapes matter here. benchmarks/README.md says what the numbers mean.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from muco.backbone import add_adapters
from muco.base.machine import peak_host_memory, processor, usable_cores
from muco.batch import to
from muco.dialogue import Sample, Turn
from muco.loss import MultiTurnLoss
from muco.model import from_backbone
from muco.processor import Processor
from muco.sizes import Adapter, TinyConfig
from muco.template import EMB
from muco.tiny import tiny_qwen2_vl
from muco.training.flops import Flops, step_flops
from muco.training.prepared import Chosen, batch_of, prepare_turns

TURNS = (1, 2, 4, 7)
MODES = ("isolated", "compounded")
IMAGE = (952, 644)  # a photograph of 3 : 2 with its short side at 640, as in M3T training: 34 x 23 = 782 visual tokens
PIXELS = IMAGE[0] * IMAGE[1]
SIZES = {  # in the order of TinyConfig: language model, vision tower, patch, vocabulary, pixels
    "quick": TinyConfig(64, 1, 4, 2, 256, 64, 1, 4, 2, 14, 2048, PIXELS),  # for tests
    # the vision tower does as large a part of the work as in Qwen2-VL-2B with LoRA, see benchmarks/README.md
    "small": TinyConfig(512, 2, 8, 2, 3072, 256, 4, 4, 4, 14, 2048, PIXELS),
    # Qwen2-VL-2B but for the vocabulary, which is a mere look-up where there is no head
    "2b": TinyConfig(1536, 28, 12, 2, 8960, 1280, 32, 16, 4, 14, 2048, PIXELS),
}
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprst" for vowel in "aeiou"]
WORDS = [first + second for first, second in zip(SYLLABLES, SYLLABLES[7:] + SYLLABLES[:7], strict=True)]


@dataclass(frozen=True)
class Settings:
    """Everything a measurement depends on."""

    model: TinyConfig
    image: tuple[int, int]
    images: int
    query_tokens: int
    target_tokens: int
    turns: tuple[int, ...]
    rounds: int
    device: str
    dtype: str
    lora: int  # rank; 0 trains the whole language model
    train_vision: bool
    threads: int
    weights: str = "float32"  # of what is not trained by an adapter


class Bench:
    """A model, its optimizer and the batches of both modes, ready to make training steps."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.cuda = settings, settings.device.startswith("cuda")
        if self.cuda:
            if torch.device(settings.device).index is not None:
                torch.cuda.set_device(settings.device)  # whose memory and time are asked for
            gc.collect()  # a bench of before, whose memory would count
            torch.cuda.empty_cache()
        torch.set_num_threads(settings.threads)
        with torch.device(settings.device):  # made where it is needed, which for large sizes is much faster
            backbone, self.processor = tiny_qwen2_vl(WORDS * 4, settings.model)
        for parameter in backbone.parameters():  # not the buffers: rotary frequencies stay float32, as when loaded
            parameter.data = parameter.data.to(getattr(torch, settings.weights))
        self.backbone, visual = backbone, backbone.visual
        if settings.lora:
            adapter = Adapter(rank=settings.lora, alpha=settings.lora)
            backbone = add_adapters(backbone, adapter, [self.processor.read_id])
        visual.requires_grad_(settings.train_vision)
        self.model = from_backbone(backbone, self.processor, device=settings.device).train()
        _ = self.model.encoder.form  # learnt before anything is counted
        self.checkpointing = False
        self.loss = MultiTurnLoss(self.model)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], fused=True)
        self.samples = {mode: make_samples(settings, self.processor, mode) for mode in MODES}
        self.pairs: dict[int, Any] = {}  # of the plain way, by number of turns: it makes them once

    def collate(self, mode: str, turns: int, part: int = 0) -> dict[str, Any]:
        """The training batch, on the CPU, of the first ``turns`` turns of every sample.

        Args:
            part: Parts differ in nothing but the identity of their samples.
        """
        rng = np.random.default_rng(0)
        samples = self.samples[mode]
        prepared = []
        for key, sample in enumerate(samples, start=part * len(samples)):
            chosen = [Chosen.of(turn, rng) for turn in sample.turns[:turns]]
            prepared.append(prepare_turns(sample, chosen, key, self.processor, isolated=mode == "isolated"))
        return batch_of(prepared, self.processor, target_ids=True)

    def on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        device = self.settings.device
        return {key: to(batch[key], device) for key in ("query", "target")} | {"ids": batch["ids"].to(device)}

    def autocast(self) -> AbstractContextManager[Any]:
        kind = "cuda" if self.cuda else "cpu"
        return torch.autocast(kind, dtype=torch.bfloat16, enabled=self.settings.dtype == "bfloat16")

    def count(self, batch: dict[str, Any]) -> Flops:
        """One whole step, counted; it is also the warm-up."""
        with self.autocast():
            flops = step_flops(self.model, batch)
        self.update()
        return flops

    def step(self, batch: dict[str, Any]) -> float:
        """Forward of both sides, loss, backward, AdamW; returns the seconds it took."""
        self.synchronize()
        start = time.perf_counter()
        with self.autocast():
            value = self.loss([dict(batch["query"]), dict(batch["target"])], batch["ids"])
        value.backward()
        self.update()
        self.synchronize()
        return time.perf_counter() - start

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def make_samples(settings: Settings, processor: Processor, mode: str) -> list[Sample]:
    """Images of noise with texts of random words, so long that every turn adds the asked number of tokens.

    A compounded dialogue spends some of them on opening a further turn, so its texts are that much shorter.
    """
    rng = np.random.default_rng(1)
    closing = len(processor.text_ids(processor.template.tail + EMB))
    opening = len(processor.text_ids(processor.template.next_turn)) if mode == "compounded" else 0

    def text(tokens: int, turn: int) -> str:
        return " ".join(rng.choice(WORDS, tokens - closing - (opening if turn else 0)))

    samples = []
    for number in range(settings.images):
        noise = rng.integers(0, 256, (settings.image[1], settings.image[0], 3), dtype=np.uint8)
        turns = [
            Turn(text(settings.query_tokens, j), text(settings.target_tokens, j)) for j in range(max(settings.turns))
        ]
        samples.append(Sample(Image.fromarray(noise), turns, id=str(number)))
    return samples


def measure(settings: Settings) -> list[dict[str, Any]]:
    """All cells (mode, number of turns): FLOPs once, then rounds through all cells in turn, so that drift cancels."""
    bench = Bench(settings)
    cells: list[dict[str, Any]] = [{"mode": mode, "turns": turns} for mode in MODES for turns in settings.turns]
    batches = [bench.on_device(bench.collate(**cell)) for cell in cells]
    check_tokens(settings, cells, batches)
    for cell, batch in zip(cells, batches, strict=True):
        flops = bench.count(batch)
        cell |= {"pairs": len(batch["ids"]), "flops": asdict(flops) | {"total": flops.total}}
        cell["tokens"] = {side: batch[side]["input_ids"].shape[1] for side in ("query", "target")}
        cell["tokens"]["visual"] = int(batch["query"]["image_tokens"][0])  # of them in a query row
        cell |= {"seconds": [], "collate_seconds": []}
    for number in range(settings.rounds):
        for cell, batch in zip(cells, batches, strict=True):
            start = time.perf_counter()
            bench.collate(cell["mode"], cell["turns"])
            cell["collate_seconds"].append(time.perf_counter() - start)
            resting = reset_device_memory(bench)
            cell["seconds"].append(bench.step(batch))
            if bench.cuda:
                cell["memory"] = {"resting": resting, "peak": torch.cuda.max_memory_allocated()}
        say(f"round {number + 1}/{settings.rounds}")
    if not bench.cuda:
        measure_process_memory(settings, cells)
    return cells


def check_tokens(settings: Settings, cells: list[dict[str, Any]], batches: list[dict[str, Any]]) -> None:
    """Every turn after the first must add exactly the asked number of tokens, in both modes and without padding."""
    for side, tokens in (("query", settings.query_tokens), ("target", settings.target_tokens)):
        first = batches[0][side]["input_ids"].shape[1]
        for cell, batch in zip(cells, batches, strict=True):
            expected = first + (cell["turns"] - 1) * tokens
            if batch[side]["input_ids"].shape[1] != expected or not batch[side]["attention_mask"].all():
                raise RuntimeError(
                    f"{cell}: {side} rows have {batch[side]['input_ids'].shape[1]} tokens, not {expected}"
                )


def reset_device_memory(bench: Bench) -> int:
    if not bench.cuda:
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def measure_process_memory(settings: Settings, cells: list[dict[str, Any]]) -> None:
    """Peak memory of the CPU: a process's peak never falls, so every cell has a process of its own."""
    calls = [(settings, cell["mode"], cell["turns"]) for cell in cells]
    for cell, memory in zip(cells, in_own_processes(process_memory, calls), strict=True):
        cell["memory"] = memory
        say(f"memory {cell['mode']} k = {cell['turns']}")


def in_own_processes(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
    """The results of ``function`` for each tuple of arguments, one call after another, each in a process of its own."""
    # not "fork": OpenMP's threads do not survive it; a started Python would inherit this process's peak
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["muco.encoder", "muco.training.flops", "muco.training.batches"]
    )  # saves their import
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        for arguments in calls:
            yield pool.submit(function, *arguments).result()


def process_memory(settings: Settings, mode: str, turns: int) -> dict[str, int]:
    """Bytes of this process before a step, with weights, optimizer state and batch in place, and at its peak."""
    bench = Bench(settings)
    batch = bench.collate(mode, turns)
    for parameter in bench.model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    bench.update()  # makes the optimizer's state
    resting = peak_host_memory()
    bench.step(batch)
    return {"resting": resting, "peak": peak_host_memory()}


def summary(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians, and ratios to k = 1 of the same mode; ratios of times are medians over rounds, each within its round."""
    rows = []
    for cell in cells:
        one = next(c for c in cells if c["mode"] == cell["mode"] and c["turns"] == 1)
        slower = statistics.median(a / b for a, b in zip(cell["seconds"], one["seconds"], strict=True))
        memory, memory_one = (c["memory"]["peak"] - c["memory"]["resting"] for c in (cell, one))
        seconds = statistics.median(cell["seconds"])
        rows.append(
            {key: cell[key] for key in ("mode", "turns", "pairs", "tokens")}
            | {"tflops": cell["flops"]["total"] / 1e12, "flops_ratio": cell["flops"]["total"] / one["flops"]["total"]}
            | {"vision_share": cell["flops"]["vision"] / cell["flops"]["total"]}
            | {"seconds": seconds, "seconds_ratio": slower}
            | {"pairs_per_second": cell["pairs"] / seconds, "pairs_ratio": cell["pairs"] / one["pairs"] / slower}
            | {"peak_mib": cell["memory"]["peak"] / 2**20, "step_mib": memory / 2**20}
            | {"step_memory_ratio": memory / memory_one if memory_one else None}
            | {"collate_seconds": statistics.median(cell["collate_seconds"])}
        )
    return rows


def table(result: dict[str, Any]) -> str:
    settings, machine = result["settings"], result["machine"]
    columns = ("mode", "k", "pairs", "tokens q / t", "TFLOP", "×", "s / step", "×", "pairs / s", "×")
    columns += ("peak MiB", "step MiB", "×", "collate s")
    lines = [f"# Turns per image, images fixed: {machine['device']}", "", f"`{result['command']}`", ""]
    lines += [
        f"{result['date']}; {machine['cpu']}, {machine['cores']} cores, {settings['threads']} threads; torch "
        f"{machine['torch']}, {settings['dtype']}; {settings['images']} images of {settings['image'][0]} × "
        f"{settings['image'][1]} px, {result['summary'][0]['tokens']['visual']} visual tokens each; a turn adds "
        f"{settings['query_tokens']} + {settings['target_tokens']} tokens; vision tower "
        f"{'trained' if settings['train_vision'] else 'frozen'}, {result['summary'][0]['vision_share']:.0%} of the "
        f"operations at k = 1; {'LoRA r = ' + str(settings['lora']) if settings['lora'] else 'all weights'} of the "
        f"language model trained; {settings['rounds']} rounds. "
        "× is the ratio to k = 1.",
        "",
        "| " + " | ".join(columns) + " |",
        "|---" * len(columns) + "|",
    ]
    for row in result["summary"]:
        ratio = row["step_memory_ratio"]
        cells = (
            *(row["mode"], row["turns"], row["pairs"], f"{row['tokens']['query']} / {row['tokens']['target']}"),
            *(
                f"{row['tflops']:.3g}",
                f"{row['flops_ratio']:.3f}",
                f"{row['seconds']:.3g}",
                f"{row['seconds_ratio']:.3f}",
            ),
            *(f"{row['pairs_per_second']:.3g}", f"**{row['pairs_ratio']:.2f}**", f"{row['peak_mib']:.0f}"),
            *(f"{row['step_mib']:.0f}", "–" if ratio is None else f"{ratio:.2f}", f"{row['collate_seconds']:.3f}"),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def machine(device: str) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "CPU",
        "cpu": processor(),
        "cores": usable_cores(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "system": f"{platform.system()} {platform.machine()}",
    }


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="a toy, to see that everything runs")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="bfloat16 is autocast; default on cuda")
    parser.add_argument("--size", choices=tuple(SIZES), help="default: small on cpu, 2b on cuda")
    for item in fields(TinyConfig):
        parser.add_argument(f"--{item.name.replace('_', '-')}", type=int, help="overrides the size's")
    parser.add_argument("--images", type=int, help="per step; default 2 on cpu, 8 on cuda")
    parser.add_argument("--image-size", type=int, nargs=2, metavar=("WIDTH", "HEIGHT"), help="in pixels")
    parser.add_argument("--query-tokens", type=int, default=30, help="a turn adds to the query side (30)")
    parser.add_argument("--target-tokens", type=int, default=20, help="a turn adds to the target side (20)")
    parser.add_argument("--turns", type=int, nargs="+", default=TURNS, help="1 (always) and what to compare with it")
    parser.add_argument("--rounds", type=int, help="default 5 on cpu, 10 on cuda")
    parser.add_argument("--lora", type=int, help="rank of the adapters, 0 for none; default 64 with size 2b, else 0")
    parser.add_argument("--train-vision", action="store_true", help="the paper freezes it")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args(argv)


def settings_of(args: argparse.Namespace) -> Settings:
    cuda = args.device.startswith("cuda")
    size = args.size or ("quick" if args.quick else "2b" if cuda else "small")
    overrides = {f.name: getattr(args, f.name) for f in fields(TinyConfig) if getattr(args, f.name) is not None}
    return Settings(
        model=replace(SIZES[size], **overrides),
        image=tuple(args.image_size or ((84, 84) if args.quick else IMAGE)),
        images=args.images or (8 if cuda and not args.quick else 2),
        query_tokens=args.query_tokens,
        target_tokens=args.target_tokens,
        turns=tuple(sorted({1, *args.turns})),
        rounds=args.rounds or (2 if args.quick else 10 if cuda else 5),
        device=args.device,
        dtype=args.dtype or ("bfloat16" if cuda else "float32"),
        lora=args.lora if args.lora is not None else 64 if size == "2b" else 0,
        train_vision=args.train_vision,
        threads=args.threads,
    )


def heading(script: str, argv: Sequence[str], device: str) -> dict[str, Any]:
    """What every result begins with: how, when and where it was made; folders elsewhere by their names alone."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in argv]
    return {
        "command": shlex.join(["python", f"benchmarks/{script}", *words]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(device),
    }


def write(folder: Path, name: str, result: dict[str, Any], markdown: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(markdown, encoding="utf-8")
    print(markdown)


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    settings = settings_of(args)
    result = heading("turns.py", argv, settings.device) | {"settings": asdict(settings)}
    cells = measure(settings)
    result |= {"summary": summary(cells), "cells": cells}
    write(args.output, f"turns-{settings.device.split(':')[0]}", result, table(result))


if __name__ == "__main__":
    main(sys.argv[1:])
