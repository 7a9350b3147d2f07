"""How fast batches are made from image files, against the step that they feed."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import Cell, configure, device_name, page, settings_of, timed
from PIL import Image
from torch.utils.data import DataLoader
from turns import Bench, heading, say, write

from muco.dialogue import Sample
from muco.processor import Processor
from muco.step import TrainingStep
from muco.training.batches import PartSampler, StepLoader, TrainingBatches
from muco.training.mixture import Mixture
from muco.training.recipe import TurnsRecipe

FED = 2  # most workers beside a step: more are so far ahead that a short run never waits


class Photographs:
    """A training set of JPEG files."""

    fingerprint = "made for measuring"

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


def photographs(bench: Bench, folder: Path) -> Photographs:
    """The samples of ``bench`` with their images as files: soft noise, about as hard to decode as a photograph."""
    rng = np.random.default_rng(2)
    samples = []
    for number, sample in enumerate(bench.samples["isolated"]):
        width, height = bench.settings.image
        noise = rng.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
        file = folder / f"{number}.jpg"
        Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(file, quality=90)
        samples.append(Sample(file, sample.turns, id=sample.id))
    return Photographs(samples)


def step_loader(data: Photographs, processor: Processor, workers: int, steps: int) -> StepLoader:
    """As the trainer makes it; a step is the whole data set, in parts."""
    mixture = Mixture([len(data)], [1.0], len(data), seed=0)
    batches = TrainingBatches([data], mixture, processor, TurnsRecipe(mode="isolated"))
    sampler = PartSampler(steps, batches.parts, first=lambda: 0)
    loader = DataLoader(
        batches,
        batch_sampler=sampler,
        collate_fn=itemgetter(0),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
    return StepLoader(loader)


def ahead(workers: int) -> int:
    """Steps that workers make before the first is asked for: while these come, nothing is waited for."""
    return max(1, 2 * workers)


def loading_seconds(steps: StepLoader, first: int) -> list[float]:
    """Seconds of each step when nothing but loading happens, without the ``first`` ones.

    Workers finish at about the same time, so steps come in waves, and only sums over whole waves mean something.
    """
    times, start = [], time.perf_counter()
    for step in steps:
        for _ in step["parts"]:
            pass
        times.append(time.perf_counter() - start)
        start = time.perf_counter()
    return times[first:]


class Waiting:
    """Parts on their way to the step, and how long the step has waited for them."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, parts: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        source = iter(parts)
        while True:
            start = time.perf_counter()
            part = next(source, None)
            self.seconds += time.perf_counter() - start
            if part is None:
                return
            yield part


def fed_seconds(bench: Bench, step: TrainingStep, steps: StepLoader, first: int) -> list[tuple[float, float]]:
    """Seconds of each step fed by the loader, and seconds of these spent waiting, without the ``first`` ones."""
    times = []
    for batch in steps:
        waiting = Waiting()
        parts = waiting(batch["parts"])
        times.append((timed(bench, lambda parts=parts: step(parts)), waiting.seconds))
    return times[first:]


def run(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Writes loader-DEVICE.json and .md."""
    settings = settings_of(args, images=args.loader_images)
    bench = Bench(settings)
    result = heading("steps.py", argv, settings.device) | {"settings": asdict(settings), "cells": []}
    with tempfile.TemporaryDirectory() as folder:
        data = photographs(bench, Path(folder))
        result["file_bytes"] = statistics.mean(file.stat().st_size for file in Path(folder).iterdir())
        ready = [part for batch in step_loader(data, bench.processor, 0, 1) for part in batch["parts"]]
        length = ready[0]["query"]["input_ids"].shape[1]
        step = TrainingStep(bench.model, bench.loss, token_budget=args.rows[0] * length, autocast=bench.autocast)
        configure(bench, Cell())
        result["step"] = [timed(bench, lambda: step(ready)) for _ in range(settings.rounds + 1)][1:]
        for workers in args.workers:
            first, waves = ahead(workers), max(1, workers) * (4 if workers <= FED else 1) * settings.rounds
            loading = loading_seconds(step_loader(data, bench.processor, workers, first + waves), first)
            fed = None
            if workers <= FED:
                steps = step_loader(data, bench.processor, workers, first + max(1, workers) * settings.rounds)
                fed = fed_seconds(bench, step, steps, first)
            result["cells"].append({"workers": workers, "loading": loading, "fed": fed})
            say(f"loader with {workers} workers")
            result["budget"] = step.token_budget
            write(args.output, f"loader-{device_name(settings)}", result, markdown(result, args.rows[0]))


def markdown(result: dict[str, Any], chunk: int) -> str:
    images, alone = result["settings"]["images"], statistics.median(result["step"])
    notes = [
        f"Files: JPEG of {result['file_bytes'] / 1e3:.0f} kB on average, from the file cache. The step alone, its "
        f"batch ready in memory: {images / alone:.3g} samples / s, gradient cache, chunks of {chunk}. *Loader*: "
        "nothing else runs. *Fed*: the step takes its parts from the loader, on the same cores; *waiting* is the share "
        f"of its time in which it had none, not measured beyond {FED} workers. Left out: the steps that workers have "
        "made before the first is asked for."
    ]
    rows = []
    for cell in result["cells"]:
        loading = images * len(cell["loading"]) / sum(cell["loading"])
        fed = ("–", "–")
        if cell["fed"]:
            seconds, waited = (sum(values) for values in zip(*cell["fed"], strict=True))
            fed = f"{images * len(cell['fed']) / seconds:.3g}", f"{waited / seconds:.1%}"
        rows.append((cell["workers"], f"{loading:.3g}", f"**{loading * alone / images:.1f}**", *fed))
    header = "workers | loader samples / s | × the step alone | fed samples / s | waiting"
    return page("The loader against the step", result, notes, header, rows)
