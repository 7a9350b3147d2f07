"""The studies. Each is data: what its runs share, what differs, what is compared."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from muco.data.jsonl import write_jsonl
from muco.data.scenes import write_scenes
from muco.errors import MucoError
from muco.study.design import Column, Run, Study

SCENES = 20_000  # training scenes at scale 1
HELD_OUT = ("global", "creative")  # kinds of turns that fine-tuning never sees
SEED = 1  # of the scenes; the demo's and the log's have seed 0

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


def find_study(name: str) -> Study:
    if name not in STUDIES:
        raise MucoError(f"unknown study {name!r}; there are {', '.join(STUDIES)}")
    return STUDIES[name]


# ── fine-tuning on pairs ─────────────────────────────────────────────────────────────────────────────────────────────


def scenes_in_two_stages(folder: Path, scale: float) -> None:
    """``pretrain.jsonl``: one half of the scenes with all turns; ``pairs.jsonl``: the other half, one turn each."""
    write_scenes(folder, train=max(64, round(SCENES * scale)), dev=0, test=max(32, round(500 * scale)), seed=SEED)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    half = len(rows) // 2
    write_jsonl(folder / "pretrain.jsonl", rows[:half])
    write_jsonl(folder / "pairs.jsonl", _single_pairs(rows[half:]))


def _single_pairs(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One turn per image, the kinds by turns, never a held-out one; the query knows its image's caption."""
    for number, row in enumerate(rows):
        turns = [turn for turn in row["turns"] if turn["kind"] not in HELD_OUT]
        turn = turns[number % len(turns)]
        caption = next(turn["target"] for turn in row["turns"] if turn["kind"] == "retrieval")
        wordings = turn["query"] if isinstance(turn["query"], list) else [turn["query"]]
        query = [{"text": wording, "caption": caption} for wording in wordings]
        yield {"image": row["image"], "turns": [turn | {"query": query}], "id": row["id"]}


def _fine_tuning(mode: str, **loss: Any) -> dict[str, Any]:
    return {
        "data": {"train": [{"path": "{data}/pairs.jsonl"}]},
        "turns": {"mode": mode},
        "loss": loss,
        "batch": {"size": 64},
        "trainer": {"max_steps": 300, "warmup_steps": 15, "learning_rate": 5e-4},
    }


MULTI_TURN = {"data": {"train": [{"path": "{data}/pretrain.jsonl"}]}}
JOINT = _fine_tuning("reconstruction", joint=True)

FINETUNE = Study(
    name="finetune",
    question="Does reconstruction help fine-tuning on single pairs, and is the mask of the counterpart needed?",
    base=BASE,
    runs=(
        Run("untrained", MULTI_TURN | {"trainer": {"max_steps": 1, "learning_rate": 0.0}}, shown=False),
        Run("pre-trained", MULTI_TURN | {"trainer": {"max_steps": 400, "warmup_steps": 20}}),
        Run("plain pairs", _fine_tuning("isolated"), start="pre-trained"),
        Run("reconstruction, joint", JOINT, start="pre-trained"),
        Run("reconstruction, separate", _fine_tuning("reconstruction"), start="pre-trained"),
        Run(
            "joint without mask",
            _fine_tuning("reconstruction", joint=True, mask_counterpart=False),
            start="pre-trained",
        ),
        Run("plain from scratch", _fine_tuning("isolated"), start="untrained"),
        Run("reconstruction from scratch", JOINT, start="untrained"),
    ),
    columns=(
        Column("tasks trained on", ("answer/classification", "answer/local", "image_to_caption")),
        Column("tasks held out", ("answer/global", "answer/creative")),
        Column("image to caption", ("image_to_caption",)),
        Column("within", ("within",)),
    ),
    prepare=scenes_in_two_stages,
    compared=(
        ("reconstruction, joint", "plain pairs"),
        ("reconstruction, separate", "plain pairs"),
        ("reconstruction, joint", "joint without mask"),
        ("plain pairs", "plain from scratch"),
        ("reconstruction from scratch", "plain from scratch"),
    ),
    notes=(
        "Pre-training: 400 steps of 32 images with their seven turns. Fine-tuning: 300 steps of 64 pairs of other "
        f"images, one turn each, of kinds other than {' and '.join(HELD_OUT)}. From scratch: fine-tuning only.",
        "In reconstruction the image of a hidden counterpart is replaced by its caption, as in the paper.",
        "A run with reconstruction costs more operations per step than plain pairs; see the column.",
    ),
)

# ── identical targets ────────────────────────────────────────────────────────────────────────────────────────────────

VOCABULARIES = {"1440 answers": 9, "48 answers": 2, "8 answers": 1}  # words that are kept of an answer
TREATMENTS = {
    "masked": {},
    "left out": {"data": {"duplicates": "leave_out"}},
    "as negatives": {"loss": {"mask_identical_targets": False}},
}


def scenes_with_few_answers(folder: Path, scale: float) -> None:
    """The two stages' data, and of classification turns ``pairs-N.jsonl`` and ``test-N.jsonl`` by words kept."""
    scenes_in_two_stages(folder, scale)
    half = max(64, round(SCENES * scale)) // 2
    for split, first in (("train", half), ("test", 0)):
        lines = (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[first:]
        rows = [json.loads(line) for line in lines]
        for words in VOCABULARIES.values():
            name = f"{'pairs' if split == 'train' else 'test'}-{words}.jsonl"
            write_jsonl(folder / name, (_classification(row, words) for row in rows))


def _classification(row: dict[str, Any], words: int) -> dict[str, Any]:
    turns = [turn for turn in row["turns"] if turn["kind"] == "classification"]
    return row | {"turns": [turn | {"target": " ".join(turn["target"].split()[:words])} for turn in turns]}


def _few_answers(words: int, treatment: dict[str, Any]) -> dict[str, Any]:
    source = {"train": [{"path": f"{{data}}/pairs-{words}.jsonl"}]}
    trainer = {"max_steps": 150, "warmup_steps": 8, "learning_rate": 5e-4}
    return {
        "data": source | treatment.get("data", {}),
        "loss": treatment.get("loss", {}),
        "batch": {"size": 64},
        "trainer": trainer,
    }


NEGATIVES = Study(
    name="negatives",
    question="What becomes of identical targets in a batch: masked, left out, or taken for negatives?",
    base=BASE,
    runs=(
        Run("pre-trained", MULTI_TURN | {"trainer": {"max_steps": 300, "warmup_steps": 15}}, shown=False),
        *(
            Run(f"{name}, {how}", _few_answers(words, change), start="pre-trained", test=f"{{data}}/test-{words}.jsonl")
            for name, words in VOCABULARIES.items()
            for how, change in TREATMENTS.items()
        ),
    ),
    columns=(Column("answer", ("answer/classification",)), Column("final loss, nats", ("loss",), percent=False)),
    prepare=scenes_with_few_answers,
    compared=tuple(
        (f"{name}, masked", f"{name}, {how}") for name in VOCABULARIES for how in ("left out", "as negatives")
    ),
    notes=(
        "Fine-tuning on single classification pairs, 64 per step, 150 steps, after 300 steps of multi-turn "
        "pre-training; the answers are cut to fewer words, so that more of a batch are equal.",
        "hit@1 is among all answers that there are, at most 100: the rows of one vocabulary can be compared, those of "
        "different ones cannot.",
    ),
)

STUDIES = {study.name: study for study in (FINETUNE, NEGATIVES)}
