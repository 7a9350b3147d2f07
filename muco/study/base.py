"""What the studies share: the scenes that they train on, and the recipe that they change."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from muco.data.jsonl import write_jsonl
from muco.data.scenes import write_scenes

SCENES, TEST = 20_000, 500  # training and held-out scenes at scale 1
HELD_OUT = ("global", "creative")  # kinds of turns that fine-tuning never sees
SEED = 1  # of the scenes; the demo's and the log's have seed 0
FRESH = 2  # of scenes that no choice was ever made on

BASE = {
    "model": {"tiny": {}, "vision": "trained"},
    "batch": {"size": 32},
    "trainer": {
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.01,
        "adam_beta2": 0.98,
        "dataloader_num_workers": 0,
        "save_steps": 100,
        "report_to": [],
    },
}
PLAIN = BASE | {"data": {"train": [{"path": "{train}"}]}}  # on the whole training set, the scenes' or a user's

SINGLE = {"turns": {"limit": 1}}
COMPOUNDED = {"turns": {"mode": "compounded"}}


def steps(count: int, **trainer: Any) -> dict[str, Any]:
    """A recipe's number of steps, a twentieth of them with a rising learning rate."""
    return {"trainer": {"max_steps": count, "warmup_steps": count // 20, **trainer}}


def plain_scenes(folder: Path, scale: float) -> None:
    """``train.jsonl`` and ``test.jsonl``; the test set does not grow beyond scale 1, so that its scores compare."""
    write_sets(folder, scale, SEED)


def fresh_scenes(folder: Path, scale: float) -> None:
    """The same, of scenes that no other study has."""
    write_sets(folder, scale, FRESH)


def write_sets(folder: Path, scale: float, seed: int, train: int = SCENES, **drawing: Any) -> None:
    """Both sets, ``train`` at scale 1; ``drawing`` is passed on to :func:`muco.data.scenes.write_scenes`."""
    test = min(TEST, max(32, round(TEST * scale)))
    write_scenes(folder, train=max(64, round(train * scale)), dev=0, test=test, seed=seed, **drawing)


def scenes_in_two_stages(folder: Path, scale: float) -> None:
    """``pretrain.jsonl``: one half of the scenes with all turns; ``pairs.jsonl``: the other half, one turn each."""
    plain_scenes(folder, scale)
    rows = rows_of(folder / "train.jsonl")
    half = len(rows) // 2
    write_jsonl(folder / "pretrain.jsonl", rows[:half])
    write_jsonl(folder / "pairs.jsonl", _single_pairs(rows[half:]))


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _single_pairs(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One turn per image, the kinds by turns, never a held-out one; the query knows its image's caption."""
    for number, row in enumerate(rows):
        turns = [turn for turn in row["turns"] if turn["kind"] not in HELD_OUT]
        turn = turns[number % len(turns)]
        caption = next(turn["target"] for turn in row["turns"] if turn["kind"] == "retrieval")
        wordings = turn["query"] if isinstance(turn["query"], list) else [turn["query"]]
        query = [{"text": wording, "caption": caption} for wording in wordings]
        yield {"image": row["image"], "turns": [turn | {"query": query}], "id": row["id"]}
