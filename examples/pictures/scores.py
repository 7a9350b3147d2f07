"""What a model finds in a collection that it was not trained on: titles and pictures, each among all of the other kind.

    python examples/pictures/scores.py --model starter

Prints a table, and writes ``<output>/scores.json``: hit@1 and hit@10 with intervals of 95 %, chance, and what the model
finds without seeing the picture (blind).
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from collection import script
from rich.console import Console
from rich.table import Table

import muco
from muco.base.files import write_json
from muco.base.machine import machine, versions
from muco.data import open_data
from muco.evaluate.compare import interval
from muco.evaluate.metrics import chance_hit, ranks_in_pool
from muco.evaluate.retrieval import evaluate_retrieval
from muco.seen import SeenImages

PARTS = ("openclipart/test", "emoji/test", "tuxpaint/photographs", "tuxpaint/drawings")  # never trained on
AT = (1, 10)
DRAWS = 10_000  # of the bootstrap
MEMORY = 1 << 30  # bytes: several questions are asked about each picture


def scored(model: muco.Model, file: Path) -> dict[str, Any]:
    """The scores of a JSONL file beside the ``index.jsonl`` of its collection; shares from 0 to 1."""
    data = open_data(file)
    index = (json.loads(line) for line in (file.parent / "index.jsonl").read_text(encoding="utf-8").splitlines())
    family = {Path(row["image"]).name: row.get("family", row["id"]) for row in index}
    named = [sample for sample in data if sample.images and sample.turns[-1].kind == "retrieval"]
    families = [family[Path(sample.images[0]).name] for sample in named]
    pictures = model.encode([sample.images[0] for sample in named])
    texts = [sample.turns[-1].target[0].text for sample in named]
    titles, same, own = model.encode(texts), alike(texts), np.arange(len(named))
    tasks = evaluate_retrieval(model, data)["tasks"]
    answers = tasks.get("answer", {}).get("kinds", {})
    found = {
        "text -> image": with_intervals(titles, pictures, own, same, families),
        "image -> text": with_intervals(pictures, titles, own, same, families)
        | {f"blind@{k}": tasks["blind"][f"hit@{k}"] for k in AT},
    }
    asked = [sample.turns[0] for sample in data if not sample.images and sample.turns[0].target[0].images]
    if asked:
        row_of = {str(sample.images[0]): row for row, sample in enumerate(named)}
        rows = np.array([row_of[str(turn.target[0].images[0])] for turn in asked])
        words = [turn.query[0].text for turn in asked]
        same = [[rows[i] for i in equal] for equal in alike(words)]
        found["keywords -> image"] = with_intervals(model.encode(words), pictures, rows, same, families)
    return found | {
        "questions": {
            kind: {
                "hit@1": answers[kind]["hit@1"],
                "chance@1": answers[kind]["chance@1"],
                "most common answer": answers[kind]["most_common"],
                "candidates": answers[kind]["candidates_max"],
            }
            for kind in answers
            if kind != "retrieval"
        },
    }


def alike(texts: Sequence[str]) -> list[list[int]]:
    """For each text the places of all texts that are equal to it."""
    places: dict[str, list[int]] = defaultdict(list)
    for place, text in enumerate(texts):
        places[text].append(place)
    return [places[text] for text in texts]


def with_intervals(
    queries: np.ndarray, pool: np.ndarray, own: np.ndarray, right: Sequence[Sequence[int]], families: Sequence[str]
) -> dict[str, Any]:
    """hit@k of finding rows of a pool, float32 [n, d] both; ties are lost.

    Args:
        own: int [queries], the row that each asks for.
        right: For each query all rows that are right, as their title is the same; they are no rivals.
        families: Of each row. Whole families are drawn for an interval, as near copies are right or wrong together.
    """
    ranks = ranks_in_pool(queries, pool, own, right)
    _, number = np.unique([families[row] for row in own], return_inverse=True)
    sizes = np.bincount(number)
    drawn = np.random.default_rng(0).integers(len(sizes), size=(DRAWS, len(sizes)))
    found: dict[str, Any] = {"queries": len(queries), "candidates": len(pool)}
    for k in AT:
        hits = np.bincount(number, weights=ranks <= k)
        found[f"hit@{k}"] = float((ranks <= k).mean())
        found[f"interval@{k}"] = interval(hits[drawn].sum(axis=1) / sizes[drawn].sum(axis=1), 0.95)
        found[f"chance@{k}"] = chance_hit(k, len(pool))
    return found


def table(scores: Mapping[str, Any]) -> Table:
    shown = Table("not trained on", "", "pictures", *(f"{name}@{k}" for k in AT for name in ("hit", "chance", "blind")))
    for part, found in scores.items():
        for direction, own in found.items():
            if direction == "questions":
                continue
            cells = [cell for k in AT for cell in (with_interval(own, k), percent(own[f"chance@{k}"]), blind(own, k))]
            shown.add_row(part, direction, str(own["candidates"]), *cells)
    return shown


def with_interval(own: Mapping[str, Any], k: int) -> str:
    low, high = own[f"interval@{k}"]
    return f"{percent(own[f'hit@{k}'])} ({percent(low)} to {percent(high)})"


def blind(own: Mapping[str, Any], k: int) -> str:
    value = own.get(f"blind@{k}")
    return "" if value is None else percent(value)


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="starter", help="a model's folder or name (default: %(default)s)")
    parser.add_argument("--pictures", type=Path, default=Path("runs/pictures"), help="(default: %(default)s)")
    parser.add_argument("--parts", nargs="+", default=PARTS, help="COLLECTION/FILE (default: what none was trained on)")
    parser.add_argument("--output", type=Path, default=Path("runs/pictures"), help="(default: %(default)s)")
    args = parser.parse_args(argv)
    model = muco.load(args.model)
    model.encoder.seen_images = SeenImages(MEMORY)
    scores = {part: scored(model, args.pictures / f"{part}.jsonl") for part in args.parts}
    command = shlex.join(["python", "examples/pictures/scores.py", *argv])
    facts = {"command": command, "machine": machine(), "versions": versions(), "fingerprint": model.fingerprint}
    write_json(args.output / "scores.json", facts | {"scores": scores})
    Console().print(table(scores))


if __name__ == "__main__":
    script(main)
