"""What a reader of retrieval scores gets: warnings in sentences, and a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from muco.base.tables import print_report, table_of_numbers
from muco.evaluate.benchmark import above_guessing
from muco.evaluate.metrics import Health

COLUMNS = ("task", "queries", "candidates", "hit@1", "hit@5", "hit@10", "MRR", "chance@1")


def print_results(result: Mapping[str, Any], console: Console) -> None:
    """Prints the scores of ``evaluate_retrieval`` in per cent, what was skipped, and every warning."""
    table = table_of_numbers("Retrieval, %", COLUMNS)
    for cells, control in _rows(result):
        table.add_row(*(Text(cell) for cell in cells), style="dim" if control else None)
    print_report(table, result["warnings"], _notes(result), console)


def _rows(result: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], bool]]:
    """Cells of each row, and whether it is a control or a part of a mean."""
    for name, scores in result["tasks"].items():
        if "kinds" not in scores:
            yield _cells(name, scores), name == "blind"
            continue
        yield _cells(f"{name} (mean of kinds)", scores["mean"]), False
        for kind, part in scores["kinds"].items():
            yield _cells(f"  {kind}", part), True


def _cells(label: str, scores: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = scores["candidates_min"], scores["candidates_max"]
    values = [scores[name] for name in ("hit@1", "hit@5", "hit@10", "mrr", "chance@1")]
    shares = ("–" if value is None else f"{100 * value:.1f}" for value in values)
    return (label, str(scores["queries"]), str(low) if low == high else f"{low}–{high}", *shares)


def _notes(result: Mapping[str, Any]) -> list[str]:
    notes = [f"skipped {name}: {reason}" for name, reason in result["skipped"].items()]
    if control := result.get("blind_loss"):
        notes.append(
            f"blind control: loss {control['loss']:.2f} nats on the dialogues of training without pixels, "
            f"chance {control['chance']:.2f}"
        )
    limit = "" if result["limit"] is None else f" (the first {result['limit']})"
    notes.append(f"{result['samples']} samples{limit}, {result['turns']} turns, {result['encoded']} contents encoded")
    notes.append(f"vectors of {result['dimension']} dimensions, scored in {result['precision']}")
    notes.append(f"model {result['model'][:12]}, data {result['data'][:12]}, seed {result['seed']}")
    return [*notes, f"{result['seconds']:.1f} s"]


def task_warnings(label: str, scores: Mapping[str, Any], *, control: str | None) -> list[str]:
    """Sentences about one task's scores that nobody should overlook.

    Args:
        label: Name of the task and kind.
        scores: Of ``evaluate_retrieval``, for one task and kind.
        control: The task's name if it is one without the image ("answer_text_only", "blind"): there equal queries and
            low scores are as they should be, and high ones of "blind" are not.
    """
    lines = []
    for side, health in scores["health"].items():
        fault = Health(**health).fault(side)
        if fault and (health["non_finite"] or side == "pool" or not control):
            lines.append(f"{label}: {fault}")
    hit, chance = scores["hit@1"], scores["chance@1"]
    if control == "blind":
        if hit > above_guessing(max(chance, scores["most_common"]), scores["queries"]):
            lines.append(f"{label}: {hit:.1%} without any pixel is above chance; something gives the answer away")
    elif not control and hit <= above_guessing(chance, scores["queries"]):
        lines.append(f"{label}: hit@1 of {hit:.1%} is not above chance ({chance:.1%})")
    return lines
