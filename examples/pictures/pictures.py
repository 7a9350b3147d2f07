"""Searches 1,541 real pictures with the starter, by queries that were written down before any was tried.

    make pictures

Needs Debian or Ubuntu. Gets the three collections, indexes their pictures that the starter was never trained on, writes
``<output>/found.html`` (what the queries of queries.txt find among them), and serves the search page.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import emoji
import openclipart
import tuxpaint
from collection import script
from debian import root

from muco.data.jsonl import write_jsonl
from muco.search import Index, build
from muco.search.sheet import read_queries, write_sheet

QUERIES = Path(__file__).with_name("queries.txt")
COLLECTIONS = {
    "openclipart": "title",
    "emoji": "name",
    "tuxpaint": "sentence",
}  # name -> the column that names a picture


def collect(pictures: Path, root: Path) -> None:
    """Writes the three collections, those that are not there yet."""
    for name, collection in {"openclipart": openclipart, "emoji": emoji, "tuxpaint": tuxpaint}.items():
        if not (pictures / name / "summary.json").is_file():  # which is written last
            against = ["--against", str(pictures / "openclipart")] if name == "tuxpaint" else []
            collection.main(["--root", str(root), "--output", str(pictures / name), *against])


def rows(pictures: Path) -> Iterator[dict[str, Any]]:
    """One row for each picture of all collections that the starter was not trained on, for ``muco index``."""
    for name, column in COLLECTIONS.items():
        for line in (pictures / name / "index.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["part"] == "train":
                continue
            yield {
                "id": f"{name}/{row['id']}",
                "image": f"{name}/{row['image']}",
                "title": row[column],
                "collection": name,
                "part": row["part"],
                "creator": row.get("creator", ""),
            }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/pictures"), help="a folder (default: %(default)s)")
    parser.add_argument("--root", type=Path, help="where the packages are unpacked; by default apt gets them")
    parser.add_argument("--model", default="starter", help="a model's folder or name (default: %(default)s)")
    parser.add_argument("--queries", type=Path, default=QUERIES, help="one per line (default: %(default)s)")
    parser.add_argument("--no-serve", action="store_true", help="write the page and stop")
    args = parser.parse_args(argv)
    asked = read_queries(args.queries)

    collect(args.output, args.root or root(args.output / "debian"))
    write_jsonl(args.output / "held-out.jsonl", rows(args.output))
    place, page = args.output / "pictures.index", args.output / "found.html"
    build(args.output / "held-out.jsonl", place, args.model, delete_missing=True)
    title = "Pictures that the model never saw, found by words"
    index = Index.open(place)
    found = {query: index.search(query, exact=True) for query in asked}
    write_sheet(page, found, caption="title", title=title)
    print(page, flush=True)  # before this process becomes the server
    if not args.no_serve:
        command = ["muco", "serve", "--model", args.model, "--index", str(place)]
        os.execv(sys.executable, [sys.executable, "-m", *command])  # the page's address is its first line


if __name__ == "__main__":
    script(main)
