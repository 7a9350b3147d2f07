"""From an installed emoji font to a trained model and a search by meaning, on emoji that training never saw.

    python examples/pictures/emoji_run.py --output runs/emoji

Needs the Debian packages fonts-noto-color-emoji, unicode-data and unicode-cldr-core; nothing is downloaded and no GPU
is needed. ``<output>/results.json`` holds all figures, ``<output>/search.png`` what some words find, ``<output>/index``
an index for ``muco search``. README.md says what came out.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from collection import script
from emoji import write_data
from emoji_data import CANVAS
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

import muco
from muco.base.files import write_json
from muco.base.machine import versions
from muco.data import open_data
from muco.demo.stages import machine
from muco.evaluate.compare import interval
from muco.evaluate.metrics import chance_hit
from muco.evaluate.retrieval import evaluate_retrieval
from muco.search import Index, build
from muco.training.recipe import Recipe, load_recipe

RECIPE = Path(__file__).with_name("emoji_recipe.yaml")
WORDS = "face hand woman animal plant food transport building clothing button".split()  # chosen before any was tried
FOUND = 10
DRAWS = 10_000  # of the bootstrap


def recipe(output: Path, data: Path, *, steps: int | None, seed: int, changes: Sequence[str] = ()) -> Recipe:
    """The recipe beside this file, with its paths in ``output`` and ``changes`` ("key=value") made."""
    found = load_recipe(RECIPE, changes)
    steps = steps or found.trainer["max_steps"]
    source = replace(found.data.train[0], path=str(data / "train.jsonl"))
    trainer = {**found.trainer, "max_steps": steps, "warmup_steps": steps // 20}
    data_recipe = replace(found.data, train=(source,))
    return replace(found, output=str(output / "run"), data=data_recipe, trainer=trainer, seed=seed)


# ---------------------------------------------------------------- scores


def short(tasks: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The scores of ``evaluate_retrieval`` that the table shows, shares 0 to 1; None where there is no such score."""
    rows = {
        "image -> name": (tasks["image_to_caption"], tasks["blind"]),
        "name -> image": (tasks["caption_to_image"], None),
        "keywords -> image": (tasks["text_to_image"], None),
    }
    for kind, scores in tasks["answer"]["kinds"].items():
        rows[f"question -> {kind}"] = (scores, tasks["answer_text_only"]["kinds"][kind])
    rows["right kind of answer (within)"] = (tasks["within"], None)
    names = ("queries", "hit@1", "hit@10", "chance@1", "chance@10", "most_common")
    return {
        label: {name: scores[name] for name in names}
        | {"candidates": scores["candidates_max"], "hit@1 without the image": unseen and unseen["hit@1"]}
        for label, (scores, unseen) in rows.items()
    }


def search_by_keywords(index: Index, rows: Sequence[Mapping[str, Any]], where: str | None) -> dict[str, Any]:
    """hit@1 and hit@10 of finding each emoji by its keywords, with 95 % intervals by resampling families.

    Args:
        rows: The emoji asked for, as in ``index.jsonl``.
        where: What is searched; None for all.
    """
    ranks = []
    for row in rows:
        hits = index.search(row["keywords"], k=FOUND, where=where, exact=True)
        ranks.append(next((i for i, hit in enumerate(hits, start=1) if hit.id == row["id"]), math.inf))
    candidates = len(index) if where is None else index.table.count_rows(where)
    scores: dict[str, Any] = {"queries": len(rows), "candidates": candidates}
    for k in (1, FOUND):
        hit = np.array(ranks) <= k
        scores[f"hit@{k}"] = float(hit.mean())
        scores[f"interval@{k}"] = bootstrap(hit, [row["family"] for row in rows])
        scores[f"chance@{k}"] = chance_hit(k, candidates)
    return scores


def bootstrap(hit: np.ndarray, family: Sequence[str]) -> tuple[float, float]:
    """95 % interval of the mean of bool [Q]; whole families are drawn, for near copies are right or wrong together."""
    _, number = np.unique(family, return_inverse=True)
    hits, sizes = np.bincount(number, weights=hit), np.bincount(number)
    drawn = np.random.default_rng(0).integers(len(sizes), size=(DRAWS, len(sizes)))
    return interval(hits[drawn].sum(axis=1) / sizes[drawn].sum(axis=1), 0.95)


def search_by_words(index: Index, rows: Sequence[Mapping[str, Any]], part: str, sheet: Path) -> list[dict[str, Any]]:
    """What single words find among the emoji of a part; draws it, emoji without the word framed in red.

    Returns:
        For each word the names found, the share of them that have the word (in name, keywords or subgroup), and the
        share of all that have it, which is what chance gives.
    """
    known = {row["id"]: row for row in rows}
    found = []
    picture = Image.new("RGB", (84 * (FOUND + 1), 84 * len(WORDS)), "white")
    draw = ImageDraw.Draw(picture)
    for line, word in enumerate(WORDS):
        hits = index.search(word, k=FOUND, where=f"part = '{part}'", exact=True)
        right = [has(known[hit.id], word) for hit in hits]
        draw.text((6, 84 * line + 36), word, fill="black")
        for column, (hit, good) in enumerate(zip(hits, right, strict=True), start=1):
            x, y = 84 * column, 84 * line
            draw.rectangle((x, y, x + 81, y + 81), fill="seagreen" if good else "red")
            with Image.open(known[hit.id]["file"]) as image:
                picture.paste(image.resize((76, 76)), (x + 3, y + 3))
        share = float(np.mean([has(row, word) for row in rows]))
        names = [known[hit.id]["name"] for hit in hits]
        found.append({"word": word, "precision": float(np.mean(right)), "chance": share, "found": names})
    picture.save(sheet)
    return found


def has(row: Mapping[str, Any], word: str) -> bool:
    text = f"{row['name']} {row['keywords']} {row['subgroup']}".lower()
    return word in text.replace(",", " ").replace("-", " ").split()


# ---------------------------------------------------------------- the whole


def table(results: Mapping[str, Any]) -> Table:
    columns = ("candidates", "hit@1", "hit@10", "chance@1", "chance@10", "hit@1 without the image", "most_common")
    title = f"{results['part']} emoji, none of them trained on; %"
    shown = Table("", *columns, title=title, title_justify="left")
    for label, scores in results["scores"].items():
        cells = (f"{100 * scores[name]:.1f}" if scores[name] is not None else "" for name in columns[1:])
        shown.add_row(label, str(scores["candidates"]), *cells)
    return shown


def lines(results: Mapping[str, Any]) -> list[str]:
    """The search in sentences."""
    found = []
    for name, scores in results["search"].items():
        parts = (
            f"hit@{k} {100 * scores[f'hit@{k}']:.1f} % "
            f"({' to '.join(f'{100 * end:.1f}' for end in scores[f'interval@{k}'])}), "
            f"chance {100 * scores[f'chance@{k}']:.2f} %"
            for k in (1, FOUND)
        )
        found.append(f"keywords -> image in {name} ({scores['candidates']}): {'; '.join(parts)}")
    found += [f"{word['word']}: {', '.join(word['found'])}" for word in results["words"]]
    return found


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/emoji"), help="a folder (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="training steps of 32 images (default: the recipe's)")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of training (default: %(default)s)")
    parser.add_argument("--views", type=int, default=1, help="pictures of a training emoji (default: %(default)s)")
    parser.add_argument(
        "--part", choices=("dev", "test"), default="test", help="what is scored; choose settings on dev"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe")
    parser.add_argument("--quick", action="store_true", help="2 steps on few emoji, to see that it runs")
    args = parser.parse_args(argv)
    for name in ("steps", "views"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(args, name)}")
    if args.quick:
        args.steps, args.views = 2, 2
    return args


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    data = args.output / f"data-{args.seed}-{args.views}{'-quick' * args.quick}"
    settings = recipe(args.output, data, steps=args.steps, seed=args.seed, changes=args.set)
    side = math.isqrt(settings.model.tiny.max_pixels) if settings.model.tiny else CANVAS
    counts = write_data(data, seed=args.seed, views=args.views, side=side, limit=200 if args.quick else None)

    known, start = args.output / "results.json", time.perf_counter()
    fresh = not Path(settings.output).exists()
    folder = muco.train(settings)  # a killed run goes on, a finished one is not done again
    seconds = round(time.perf_counter() - start, 1) if fresh else None
    if not fresh and known.is_file():
        seconds = json.loads(known.read_text(encoding="utf-8"))["train_seconds"]
    model = muco.load(folder)
    scored = evaluate_retrieval(model, open_data(data / f"{args.part}.jsonl"), output=args.output)

    build(data / "index.jsonl", args.output / "index", str(folder), progress=False)
    index = Index.open(args.output / "index", model)
    rows = [json.loads(line) for line in (data / "index.jsonl").read_text(encoding="utf-8").splitlines()]
    asked = [row | {"file": data / row["image"]} for row in rows if row["part"] == args.part]
    results = {
        "command": shlex.join(["python", "examples/pictures/emoji_run.py", *argv]),
        "machine": machine(),
        "versions": versions(),
        "part": args.part,
        "seed": args.seed,
        "steps": settings.trainer["max_steps"],
        "views": args.views,
        "data": counts,
        "train_seconds": seconds,
        "final_loss": json.loads((folder / "run.json").read_text(encoding="utf-8"))["loss"][-1][1],
        "scores": short(scored["tasks"]),
        "warnings": scored["warnings"],
        "search": {
            f"the {args.part} emoji": search_by_keywords(index, asked, f"part = '{args.part}'"),
            "all emoji": search_by_keywords(index, asked, None),
        },
        "words": search_by_words(index, asked, args.part, args.output / "search.png"),
    }
    write_json(args.output / "results.json", results)
    console = Console()
    console.print(table(results))
    for line in (*lines(results), *(f"Warning: {warning}" for warning in results["warnings"])):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    script(main)
