"""The scenes and the base recipe of all studies; the studies of fine-tuning and of identical targets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from muco.data.jsonl import write_jsonl
from muco.data.scenes import write_scenes
from muco.study.design import Column, Run, Study

SCENES, TEST = 20_000, 500  # training and held-out scenes at scale 1
HELD_OUT = ("global", "creative")  # kinds of turns that fine-tuning never sees
SEED = 1  # of the scenes; the demo's have seed 0
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
PLAIN = BASE | {"data": {"train": [{"path": "{train}"}]}}  # the whole training set, of the scenes or a user
COMPOUNDED = {"turns": {"mode": "compounded"}}
SCORES = tuple(Column(name.replace("_", " "), (name,)) for name in ("image_to_caption", "answer", "within"))


def steps(count: int, **trainer: Any) -> dict[str, Any]:
    """A recipe's number of steps, a twentieth of them with a rising learning rate."""
    return {"trainer": {"max_steps": count, "warmup_steps": count // 20, **trainer}}


def plain_scenes(folder: Path, scale: float, seed: int = SEED) -> None:
    """``train.jsonl`` and ``test.jsonl``; the test set does not grow beyond scale 1, so that its scores compare."""
    test = min(TEST, max(32, round(TEST * scale)))
    write_scenes(folder, train=max(64, round(SCENES * scale)), dev=0, test=test, seed=seed)


def scenes_in_two_stages(folder: Path, scale: float) -> None:
    """``pretrain.jsonl``: half of the scenes with all turns; ``pairs.jsonl``: the other half with one turn each."""
    plain_scenes(folder, scale)
    rows = rows_of(folder / "train.jsonl")
    half = len(rows) // 2
    write_jsonl(folder / "pretrain.jsonl", rows[:half])
    write_jsonl(folder / "pairs.jsonl", _single_pairs(rows[half:]))


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _single_pairs(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One turn per image, kinds in rotation but no held-out ones; the query has its image's caption."""
    for number, row in enumerate(rows):
        turns = [turn for turn in row["turns"] if turn["kind"] not in HELD_OUT]
        turn = turns[number % len(turns)]
        caption = next(turn["target"] for turn in row["turns"] if turn["kind"] == "retrieval")
        wordings = turn["query"] if isinstance(turn["query"], list) else [turn["query"]]
        query = [{"text": wording, "caption": caption} for wording in wordings]
        yield {"image": row["image"], "turns": [turn | {"query": query}], "id": row["id"]}


def fine_tuning(mode: str, **loss: Any) -> dict[str, Any]:
    """A recipe for the pairs of :func:`muco.study.base.scenes_in_two_stages`."""
    return {
        "data": {"train": [{"path": "{data}/pairs.jsonl"}]},
        "turns": {"mode": mode},
        "loss": loss,
        "batch": {"size": 64},
        **steps(300, learning_rate=5e-4),
    }


MULTI_TURN = {"data": {"train": [{"path": "{data}/pretrain.jsonl"}]}}
JOINT = fine_tuning("reconstruction", joint=True)
UNMASKED = fine_tuning("reconstruction", joint=True, mask_counterpart=False)

FINETUNE = Study(
    name="finetune",
    question="Does reconstruction help fine-tuning on single pairs, and is the mask of the counterpart needed?",
    base=BASE,
    runs=(
        Run("untrained", MULTI_TURN | {"trainer": {"max_steps": 1, "learning_rate": 0.0}}, shown=False),
        Run("pre-trained", MULTI_TURN | steps(400)),
        Run("plain pairs", fine_tuning("isolated"), start="pre-trained"),
        Run("reconstruction, joint", JOINT, start="pre-trained"),
        Run("reconstruction, separate", fine_tuning("reconstruction"), start="pre-trained"),
        Run("joint without mask", UNMASKED, start="pre-trained"),
        Run("plain from scratch", fine_tuning("isolated"), start="untrained"),
        Run("reconstruction from scratch", JOINT, start="untrained"),
    ),
    columns=(
        Column("tasks trained on", ("answer/classification", "answer/local", "image_to_caption")),
        Column("tasks held out", ("answer/global", "answer/creative")),
        SCORES[0],
        SCORES[2],
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
        "Pre-training: 400 steps of 32 images with their seven turns. Fine-tuning: 300 steps of 64 other images, with "
        f"one turn each, never {' or '.join(HELD_OUT)}. From scratch: fine-tuning only.",
        "Reconstruction replaces the image of a hidden counterpart by its caption, as in the paper. It costs more "
        "operations per step than plain pairs; see the column.",
    ),
)

VOCABULARIES = {"1440 answers": 9, "48 answers": 2, "8 answers": 1}  # words kept of an answer
TREATMENTS = {
    "masked": {},
    "left out": {"data": {"duplicates": "leave_out"}},
    "as negatives": {"loss": {"mask_identical_targets": False}},
}


def scenes_with_few_answers(folder: Path, scale: float) -> None:
    """The two stages' data, and ``pairs-N.jsonl`` and ``test-N.jsonl`` with classification answers of N words."""
    scenes_in_two_stages(folder, scale)
    half = max(64, round(SCENES * scale)) // 2
    for split, first, name in (("train", half, "pairs"), ("test", 0, "test")):
        rows = rows_of(folder / f"{split}.jsonl")[first:]
        for words in VOCABULARIES.values():
            write_jsonl(folder / f"{name}-{words}.jsonl", (classification(row, words) for row in rows))


def classification(row: dict[str, Any], words: int) -> dict[str, Any]:
    """The row with its question of classification alone, whose answer is cut to its first words."""
    turns = [turn for turn in row["turns"] if turn["kind"] == "classification"]
    return row | {"turns": [turn | {"target": " ".join(turn["target"].split()[:words])} for turn in turns]}


def _few_answers(words: int, treatment: dict[str, Any]) -> dict[str, Any]:
    source = {"train": [{"path": f"{{data}}/pairs-{words}.jsonl"}]}
    trainer = {"max_steps": 150, "warmup_steps": 8, "learning_rate": 5e-4}
    data, loss = source | treatment.get("data", {}), treatment.get("loss", {})
    return {"data": data, "loss": loss, "batch": {"size": 64}, "trainer": trainer}


NEGATIVES = Study(
    name="negatives",
    question="What is best for identical targets in a batch: mask them, leave them out, or use them as negatives?",
    base=BASE,
    runs=(
        Run("pre-trained", MULTI_TURN | steps(300), shown=False),
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
        "pre-training. Answers are cut to fewer words, so that more of them in a batch are equal.",
        "hit@1 is among all answers, at most 100: compare rows of one vocabulary only.",
    ),
)
