"""Two results of one benchmark, query by query: is B better than A, or is it the choice of queries?

    differences per query ─bootstrap─▶ mean differences of resampled queries ─percentiles─▶ interval

Both models answered the same queries, so queries are drawn as pairs: what makes a query hard for both cancels out. The
interval speaks of other queries of the same kind; it says nothing of other seeds of training.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from muco.base.html import count
from muco.base.tables import print_report, table_of_numbers
from muco.errors import DataError, MucoError
from muco.evaluate.benchmark import FORMAT, data_set_of, file_name
from muco.evaluate.retrieval import RESULT

BLOCK = 1 << 21  # counts in memory at a time (16 MiB)
COLUMNS = ("task", "metric", "queries", "A", "B", "B - A", "interval", "won", "lost", "equal")


def compare(a: Path, b: Path, *, samples: int = 10_000, seed: int = 0, level: float = 0.95) -> dict[str, Any]:
    """Compares two output folders of a benchmark, task by task, over the queries that both have.

    Args:
        a, b: Output folders: with ``tasks/`` and ``outcomes/``, or with these in ``retrieval/``. Differences are B - A;
            a query is won where B is better.
        samples: Of the bootstrap, at least 100.
        level: Of the intervals, between 0 and 1.
    Returns:
        Plain values for JSON: "tasks" (name -> metric, queries, a, b, difference, interval, won, lost, equal,
        excludes_zero; all shares 0 to 1), "means" (the same over tasks, queries resampled within each: "overall", or
        "overall local" and "overall global" where tasks name their pool, since both pools have the same queries; a
        folder of BEIR's sets, as cqadupstack, counts as one task),
        "not_comparable" (name -> reason), "settings" (what differs: name -> [A's, B's]) and "warnings".
    Raises:
        DataError: If a folder holds no results, a file is damaged, or no task can be compared.
        MucoError: If ``samples`` or ``level`` is out of range.
    Memory: about 50 MiB, and the outcomes of one task.
    """
    if samples < 100:
        raise MucoError(f"samples must be at least 100, not {samples}")
    if not 0 < level < 1:
        raise MucoError(f"level must be between 0 and 1, not {level}; 0.95 is usual")
    if seed < 0:
        raise MucoError(f"seed must not be negative, not {seed}")
    ours, theirs = _tasks(Path(a)), _tasks(Path(b))
    tasks: dict[str, dict[str, Any]] = {}
    reasons: dict[str, str] = {}
    warnings: list[str] = []
    places: dict[str, tuple[str, str]] = {}  # task -> the mean that it belongs to, and the folder of sets, if any
    totals: dict[tuple[str, str], np.ndarray] = {}  # such a place -> sum of the means of its tasks
    for name in sorted(ours.keys() | theirs.keys()):
        reason = _reason(ours.get(name), theirs.get(name))
        if reason is None:
            first, second = _outcomes(ours[name]["file"]), _outcomes(theirs[name]["file"])
            common = sorted(first.keys() & second.keys())
            reason = None if common else "the two have no query in common"
        if reason is not None:
            reasons[name] = reason
            continue
        if left := len(first.keys() ^ second.keys()):
            warnings.append(f"{name}: {left:,} queries are in one of the two only and are not compared")
        warnings += _partial(name, ours[name]["left_out"], theirs[name]["left_out"])
        values = np.array([[first[query], second[query]] for query in common])  # float64 [Q, 2]
        # draws depend on the seed and the task only, not on which other tasks there are
        own = int.from_bytes(hashlib.sha256(name.encode("utf-8", "replace")).digest()[:8])
        means = bootstrap(values[:, 1] - values[:, 0], samples, np.random.default_rng([seed, own]))
        tasks[name] = {"metric": ours[name]["metric"]} | _summary(values, means, level)
        place = places[name] = (_mean_of(name), _folder_of(name, ours[name]["key"]))
        totals[place] = totals.get(place, 0.0) + means
    if not tasks:
        listed = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:5])
        raise DataError(f"{a} and {b} have no task that can be compared ({listed})")
    one, other = (side[min(tasks)]["key"] for side in (ours, theirs))  # of the first task
    differing = sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
    return {
        "format": FORMAT,
        "a": str(a),
        "b": str(b),
        "samples": samples,
        "seed": seed,
        "level": level,
        "tasks": tasks,
        "means": _means(tasks, places, totals, level),
        "not_comparable": reasons,
        "settings": {key: [one.get(key), other.get(key)] for key in differing},
        "warnings": warnings,
    }


def bootstrap(differences: np.ndarray, samples: int, generator: np.random.Generator) -> np.ndarray:
    """Mean differences of ``samples`` draws of the same number of queries, with replacement.

    Only how often each distinct difference is drawn matters, and those counts are multinomial: the same distribution
    as drawing queries one by one, for hits (-1, 0, 1) at a tiny part of the cost.

    Args:
        differences: float64 [Q], in the order of the queries' ids. Negated differences give exactly negated means.
    Returns:
        float64 [samples].
    """
    unequal = differences[differences != 0]
    if not len(unequal):
        return np.zeros(samples)
    # The first query that differs decides which side is drawn as positive, so that swapping A and B mirrors the draws.
    sign = math.copysign(1.0, unequal[0])
    values, counts = np.unique(sign * differences, return_counts=True)
    shares = counts / len(differences)
    result = np.empty(samples)
    step = max(1, BLOCK // len(values))
    for start in range(0, samples, step):
        drawn = generator.multinomial(len(differences), shares, size=min(step, samples - start))
        result[start : start + step] = drawn @ values / len(differences)
    return sign * result


def interval(means: np.ndarray, level: float) -> tuple[float, float]:
    """The percentile interval; that of negated means is exactly its mirror image."""
    tail = (1 - level) / 2
    return float(np.quantile(means, tail)) + 0.0, -float(np.quantile(-means, tail)) + 0.0  # + 0.0: no negative zero


def _summary(values: np.ndarray, means: np.ndarray, level: float) -> dict[str, Any]:
    n, difference = len(values), values[:, 1] - values[:, 0]
    return {
        "queries": n,
        "a": math.fsum(values[:, 0]) / n,
        "b": math.fsum(values[:, 1]) / n,
        "difference": math.fsum(difference) / n + 0.0,
        **_with_interval(means, level),
        "won": float((difference > 0).mean()),
        "lost": float((difference < 0).mean()),
        "equal": float((difference == 0).mean()),
    }


def _with_interval(means: np.ndarray, level: float) -> dict[str, Any]:
    low, high = interval(means, level)
    return {"interval": [low, high], "excludes_zero": low > 0 or high < 0}


def _mean_of(task: str) -> str:
    """The mean that a task belongs to."""
    pool = task.rpartition(" ")[2]
    return f"overall {pool}" if pool in ("local", "global") else "overall"


def _folder_of(task: str, key: Mapping[str, Any]) -> str:
    """The folder of sets that a task of BEIR's format is one of; "" if it is a data set itself."""
    return data_set_of(task) if key.get("benchmark") == "beir" and data_set_of(task) != task else ""


def _means(
    tasks: Mapping[str, Mapping[str, Any]],
    places: Mapping[str, tuple[str, str]],
    totals: Mapping[tuple[str, str], np.ndarray],
    level: float,
) -> dict[str, dict[str, Any]]:
    """The means by label; the tasks of a folder of sets have together the weight of one."""
    weights = {place: 1 / size if place[1] else 1.0 for place, size in Counter(places.values()).items()}
    found = {}
    for label in sorted({label for label, _ in places.values()}):
        own = {name: weights[place] for name, place in places.items() if place[0] == label}
        whole = math.fsum(own.values())
        drawn = sum(weights[place] * total for place, total in totals.items() if place[0] == label)
        plain = {
            key: math.fsum(weight * tasks[name][key] for name, weight in own.items()) / whole
            for key in ("a", "b", "difference")
        }
        found[label] = {"tasks": len(own), **plain, **_with_interval(np.asarray(drawn / whole), level)}
    return found


def _tasks(folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> metric, data, key and file of outcomes, for every task in a results folder."""
    if not (folder / "tasks").is_dir() and (folder / RESULT / "tasks").is_dir():
        folder = folder / RESULT
    files = sorted((folder / "tasks").glob("*.json")) if (folder / "tasks").is_dir() else []
    if not files:
        raise DataError(f"{folder}: holds no results (tasks/*.json); pass the output folder of a benchmark")
    found = {}
    for file in files:
        try:
            plain = json.loads(file.read_text(encoding="utf-8"))
            result = plain["result"]
            name, form, left_out = result["name"], plain["format"], result.get("left_out", {})
            task = {"metric": result["metric"], "data": result["data"], "key": plain["key"], "left_out": left_out}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file}: is not a result of a task ({error!r}); run the evaluation again") from error
        if form != FORMAT:
            raise DataError(f"{file}: has format {form}, not {FORMAT}; run the evaluation again")
        if name in found and file.stem != file_name(name):
            continue  # of an earlier version, which named files otherwise
        found[name] = task | {"file": folder / "outcomes" / f"{file.stem}.jsonl"}
    of_model: dict[str, list[str]] = {}
    for name, task in found.items():
        of_model.setdefault(str(task["key"].get("model")), []).append(name)
    if len(of_model) > 1:
        (one, its), (other, others), *_ = of_model.items()
        raise DataError(
            f"{folder}: holds results of two models, {one[:12]} ({', '.join(its[:3])}{', …' * (len(its) > 3)}) and "
            f"{other[:12]} ({', '.join(others[:3])}{', …' * (len(others) > 3)}); score all tasks with one of them"
        )
    return found


def _outcomes(file: Path) -> dict[str, float]:
    """Query -> value."""
    values: dict[str, float] = {}
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                query, value = row["query"], float(row["value"])
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{file}:{number}: is not an outcome ({error!r}); run the evaluation again") from error
            if not isinstance(query, str):
                raise DataError(f"{file}:{number}: the query is {query!r}, not a string; run the evaluation again")
            if not math.isfinite(value):
                raise DataError(f"{file}:{number}: the value is {value}, not a number; run the evaluation again")
            if query in values:
                raise DataError(f"{file}:{number}: the query {query!r} occurs twice; run the evaluation again")
            values[query] = value
    return values


def _reason(a: Mapping[str, Any] | None, b: Mapping[str, Any] | None) -> str | None:
    """Why a task cannot be compared; None if it can."""
    if a is None or b is None:
        return f"only {'B' if a is None else 'A'} has it"
    if a["metric"] != b["metric"]:
        return f"the metrics differ: {a['metric']} in A, {b['metric']} in B"
    if a["data"] != b["data"]:
        return f"the data differ: {a['data'][:12]} in A, {b['data'][:12]} in B"
    for side, task in (("A", a), ("B", b)):
        if not task["file"].is_file():
            return f"{side} has no outcomes per query ({task['file']})"
    return None


def _partial(name: str, a: Mapping[str, int], b: Mapping[str, int]) -> list[str]:
    """A warning where something was left out of one of the two, because that makes a task easier or harder."""
    if not a and not b:
        return []
    said = (
        f"{side} left out {of.get('queries', 0):,} queries and {of.get('candidates', 0):,} candidates"
        for side, of in (("A", a), ("B", b))
    )
    return [f"{name}: {', '.join(said)} that could not be embedded; the scores are of different tasks unless these are "
            "the same"]  # fmt: skip


def print_comparison(result: Mapping[str, Any], console: Console) -> None:
    """Prints the differences in points of a per cent; rows whose interval excludes 0 are bold."""
    table = table_of_numbers("B - A, %", COLUMNS)
    for number, (cells, sure) in enumerate(_rows(result)):
        if number == len(result["tasks"]):
            table.add_section()
        table.add_row(*map(Text, cells), style="bold" if sure else None)
    print_report(table, result["warnings"], _notes(result), console)


def _rows(result: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], bool]]:
    """Cells of ``COLUMNS`` for each task and mean, and whether the interval excludes 0."""
    for name, task in result["tasks"].items():
        shares = (f"{100 * task[key]:.1f}" for key in ("won", "lost", "equal"))
        yield (name, task["metric"], f"{task['queries']:,}", *_numbers(task), *shares), task["excludes_zero"]
    for label, mean in result["means"].items():
        yield (f"{label}, {count(mean['tasks'], 'task')}", "", "", *_numbers(mean), "", "", ""), mean["excludes_zero"]


def _numbers(scores: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = scores["interval"]
    difference = f"{100 * scores['difference']:+.2f}"
    return f"{100 * scores['a']:.1f}", f"{100 * scores['b']:.1f}", difference, f"{100 * low:+.2f} to {100 * high:+.2f}"


def _notes(result: Mapping[str, Any]) -> list[str]:
    count, level = len(result["tasks"]), result["level"]
    sure = sum(task["excludes_zero"] for task in result["tasks"].values())
    notes = [f"A is {result['a']}", f"B is {result['b']}"]
    notes += [f"not comparable: {name}: {reason}" for name, reason in result["not_comparable"].items()]
    notes += [f"differs: {key}: {one!r} in A, {other!r} in B" for key, (one, other) in result["settings"].items()]
    return [
        *notes,
        f"{sure} of {count} intervals exclude 0; of equal models about {count * (1 - level):.1g} would by chance",
        f"paired bootstrap over queries, {result['samples']:,} samples, {level:.0%} percentile intervals, "
        f"seed {result['seed']}",
    ]
