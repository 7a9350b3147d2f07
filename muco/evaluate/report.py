"""Results as people and programs read them: tables for the terminal, CSV, Markdown, and warnings in sentences.

Scores are shares, 0 to 1, in the CSV file and per cent elsewhere.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from muco.base.machine import versions_in_words
from muco.base.tables import clean, markdown, markdown_table, print_report, table_of_numbers
from muco.evaluate.benchmark import above_guessing
from muco.evaluate.metrics import Health

COLUMNS = ("task", "metric", "score", "chance", "queries", "candidates")
CSV_COLUMNS = (
    *("kind", "name", "metric", "score", "queries", "candidates_min", "candidates_max", "chance", "scores", "facts"),
    *("left_out", "data", "warnings", "benchmark", "model", "model_fingerprint", "settings", "versions"),
    *("command", "date"),
)
INCOMPLETE = "not all tasks were scored"


def print_benchmark(result: Mapping[str, Any], console: Console) -> None:
    """Prints tasks, groups and overall of a :meth:`muco.evaluate.driver.Benchmark.result`, and every warning."""
    _print_scores(result, columns_of(result), task_rows(result), (), console)


def _print_scores(
    result: Mapping[str, Any],
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    notes: Sequence[str],
    console: Console,
) -> None:
    table = table_of_numbers(f"{title_of(result)}, %", columns)
    for cells in rows:
        table.add_row(*map(Text, cells))
    table.add_section()
    for name, score in group_rows(result):
        table.add_row(Text(name), "", Text(score), style="bold")
    origins = (f"{name} {value}" for name, value in origin(result).items())
    print_report(table, warnings_of(result), (*notes, *origins), console)


def benchmark_markdown(result: Mapping[str, Any]) -> str:
    """Tables of tasks and groups, warnings and origin as GitHub Markdown, ending in a newline."""
    lines = [f"# {markdown(title_of(result))}: {markdown(result['model']['path'])}", ""]
    lines += [f"- **Warning:** {markdown(line)}" for line in warnings_of(result)]
    lines += ["", *markdown_table(("group", "score"), group_rows(result))]
    lines += ["", *markdown_table(columns_of(result), task_rows(result)), "", "Scores and chance in per cent.", ""]
    for name, task in result["tasks"].items():
        if task["facts"]:
            lines.append(f"- {markdown(name)}: {markdown(facts_text(task['facts']))}")
    lines += ["", *(f"- {name}: {markdown(value)}" for name, value in origin(result).items())]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip("\n") + "\n"


def as_csv(result: Mapping[str, Any]) -> str:
    """One row per task, group and overall, each with all that tells where it comes from; an empty cell is unknown."""
    stream = io.StringIO()
    # all text is quoted: a bare carriage return would end the row for some readers
    writer = csv.DictWriter(stream, CSV_COLUMNS, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writeheader()
    model = result["model"]
    shared = {
        "benchmark": result["benchmark"],
        "model": model["path"],
        "model_fingerprint": model["fingerprint"],
        "settings": _json(result["settings"]),
        "versions": _json(result["versions"]),
        "command": result["command"],
        "date": result["date"],
    }
    for row in _csv_rows(result):
        writer.writerow({name: _cell(value) for name, value in (row | shared).items()})
    return stream.getvalue()


def _csv_rows(result: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for name, task in result["tasks"].items():
        low, high = task["candidates"]
        yield {
            "kind": "task",
            "name": name,
            **{key: task[key] for key in ("metric", "score", "queries", "chance", "data")},
            "candidates_min": low,
            "candidates_max": high,
            "scores": _json(task["scores"]),
            "facts": _json(task["facts"]),
            "left_out": _json(task["left_out"]),
            "warnings": " | ".join(task["warnings"]),
        }
    for name, score in groups_of(result).items():
        yield {"kind": "group", "name": name, "score": score, "warnings": "" if score is not None else INCOMPLETE}
    of_tasks = {f"{name}: {line}" for name, task in result["tasks"].items() for line in task["warnings"]}
    own = [line for line in warnings_of(result) if line not in of_tasks]
    yield {"kind": "overall", "name": "overall", "score": result["overall"], "warnings": " | ".join(own)}


def _cell(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula: text that begins like one gets an apostrophe in front."""
    if not isinstance(value, str):
        return value
    text = clean(value)
    return f"'{text}" if text[:1] in ("\t", "\r", "\n") or text.lstrip()[:1] in ("=", "+", "-", "@") else text


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def columns_of(result: Mapping[str, Any]) -> tuple[str, ...]:
    """``COLUMNS``, and one more if something was left out of a task."""
    return (*COLUMNS, "left out") if any(task["left_out"] for task in result["tasks"].values()) else COLUMNS


def task_rows(result: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Cells of ``columns_of`` for each task."""
    columns = columns_of(result)
    for name, task in result["tasks"].items():
        lost = f"{task['left_out']['queries']:,} q + {task['left_out']['candidates']:,} c" if task["left_out"] else "0"
        counts = (f"{task['queries']:,}", candidates_text(task["candidates"]), lost)
        cells = (name, task["metric"], percent(task["score"]), percent(task["chance"]), *counts)
        yield cells[: len(columns)]


def group_rows(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and cells of the groups, then of the overall score."""
    means = means_of(result)
    overall = [name for name in means if name == "overall"]
    for name in [*groups_of(result), *overall]:
        unknown = INCOMPLETE if name.startswith("overall") else "–"
        yield name, unknown if means[name] is None else percent(means[name])


def title_of(result: Mapping[str, Any]) -> str:
    """The benchmark as people write it."""
    return {"mmeb": "MMEB", "mmeb_v2": "MMEB-V2", "mbeir": "M-BEIR"}.get(result["benchmark"], result["benchmark"])


def groups_of(result: Mapping[str, Any]) -> dict[str, float | None]:
    """The groups but "overall", which has a place of its own."""
    return {name: score for name, score in result["groups"].items() if name != "overall"}


def means_of(result: Mapping[str, Any]) -> dict[str, float | None]:
    """The overall score first, unless the groups have one per pool, then the groups."""
    groups = groups_of(result)
    named = any(name.startswith("overall ") for name in groups)
    return ({} if named else {"overall": result["overall"]}) | groups


def warnings_of(result: Mapping[str, Any]) -> list[str]:
    """All warnings; what is missing comes first."""
    lines = []
    if result["missing"]:
        lines.append(f"no data was found for {', '.join(result['missing'])}")
    elif result["overall"] is None:
        lines.append(f"{INCOMPLETE}, so there is no overall score")
    return [*lines, *result["warnings"]]


def origin(result: Mapping[str, Any]) -> dict[str, str]:
    """Where the scores come from, by name."""
    return {
        "model": result["model"]["path"],
        "fingerprint": result["model"]["fingerprint"],
        "command": result["command"],
        "date": result["date"],
        "settings": facts_text(result["settings"]),
        "versions": versions_in_words(result["versions"]),
    }


def facts_text(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {v if isinstance(v, str) else _json(v)}" for name, v in facts.items())


def candidates_text(candidates: Sequence[int]) -> str:
    low, high = candidates
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def print_mteb(result: Mapping[str, Any], console: Console) -> None:
    """Prints tasks and means of an ``evaluate_mteb``, and every warning."""
    rows = [(name, task["metric"], percent(task["score"])) for name, task in result["tasks"].items()]
    reused = sum(task["reused"] for task in result["tasks"].values())
    found = f"{reused} of {len(result['tasks'])} tasks were found done"
    _print_scores(result, ("task", "metric", "score"), rows, [found], console)


RETRIEVAL_COLUMNS = ("task", "queries", "candidates", "hit@1", "hit@5", "hit@10", "MRR", "chance@1")


def print_results(result: Mapping[str, Any], console: Console) -> None:
    """Prints the scores of ``evaluate_retrieval`` in per cent, what was skipped, and every warning."""
    table = table_of_numbers("Retrieval, %", RETRIEVAL_COLUMNS)
    for cells, control in _retrieval_rows(result):
        table.add_row(*(Text(cell) for cell in cells), style="dim" if control else None)
    print_report(table, result["warnings"], _notes(result), console)


def _retrieval_rows(result: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], bool]]:
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
            f"training loss without pixels: {control['loss']:.2f} nats, chance {control['chance']:.2f}; "
            "below chance means that something leaks"
        )
    limit = "" if result["limit"] is None else f" (the first {result['limit']})"
    notes.append(f"{result['samples']} samples{limit}, {result['turns']} turns, {result['encoded']} contents encoded")
    notes.append(f"vectors of {result['dimension']} dimensions, scored as {result['storage']}")
    notes.append(f"model {result['model'][:12]}, data {result['data'][:12]}, seed {result['seed']}")
    return [*notes, f"{result['seconds']:.1f} s"]


def task_warnings(label: str, scores: Mapping[str, Any], *, control: str | None) -> list[str]:
    """Sentences about the scores of one task and kind that nobody should overlook.

    Args:
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
