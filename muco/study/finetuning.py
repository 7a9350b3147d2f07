"""Studies of fine-tuning on single pairs: reconstruction, and what becomes of identical targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from muco.data.jsonl import write_jsonl
from muco.study.base import BASE, HELD_OUT, SCENES, rows_of, scenes_in_two_stages
from muco.study.design import Column, Run, Study

# ── reconstruction ───────────────────────────────────────────────────────────────────────────────────────────────────


def fine_tuning(mode: str, **loss: Any) -> dict[str, Any]:
    """A recipe for the pairs of :func:`muco.study.base.scenes_in_two_stages`."""
    return {
        "data": {"train": [{"path": "{data}/pairs.jsonl"}]},
        "turns": {"mode": mode},
        "loss": loss,
        "batch": {"size": 64},
        "trainer": {"max_steps": 300, "warmup_steps": 15, "learning_rate": 5e-4},
    }


MULTI_TURN = {"data": {"train": [{"path": "{data}/pretrain.jsonl"}]}}
JOINT = fine_tuning("reconstruction", joint=True)

FINETUNE = Study(
    name="finetune",
    question="Does reconstruction help fine-tuning on single pairs, and is the mask of the counterpart needed?",
    base=BASE,
    runs=(
        Run("untrained", MULTI_TURN | {"trainer": {"max_steps": 1, "learning_rate": 0.0}}, shown=False),
        Run("pre-trained", MULTI_TURN | {"trainer": {"max_steps": 400, "warmup_steps": 20}}),
        Run("plain pairs", fine_tuning("isolated"), start="pre-trained"),
        Run("reconstruction, joint", JOINT, start="pre-trained"),
        Run("reconstruction, separate", fine_tuning("reconstruction"), start="pre-trained"),
        Run(
            "joint without mask",
            fine_tuning("reconstruction", joint=True, mask_counterpart=False),
            start="pre-trained",
        ),
        Run("plain from scratch", fine_tuning("isolated"), start="untrained"),
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
        rows = rows_of(folder / f"{split}.jsonl")[first:]
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
