"""``muco index`` and ``muco search``: each imports what it needs inside itself."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, BadParameter, Context, Option

from muco.base.terminal import finish, print_json, print_pairs
from muco.cli.options import (
    BatchSize,
    ComputeIn,
    Dimension,
    IdColumn,
    ImageColumn,
    Json,
    Storage,
    TextColumn,
    examples,
)

Place = Annotated[str, Option("--index", "-i", metavar="DIR", help="Folder of the index, or URL (s3://bucket/index).")]
INDEX_EXAMPLES = examples(
    "muco index photos/ --model starter --index photos.index",
    "muco index rows.jsonl --index rows.index --delete-missing",
    "muco index --index photos.index --delete 2019/cat.jpg --delete 2019/dog.jpg",
)
SEARCH_EXAMPLES = examples(
    'muco search --index photos.index --text "a red bicycle in the snow"',
    'muco search -i photos.index --image cat.jpg -k 5 --where "year >= 2020" --json',
    "muco search -i photos.index --like 2019/cat.jpg --exact",
)


def index(
    context: Context,
    index: Place,
    input: Annotated[
        Path | None, Argument(metavar="INPUT", help="Folder of images, .jsonl or .parquet file, or a folder of these.")
    ] = None,
    model: Annotated[
        str | None,
        Option(
            "--model", "-m", help='Model folder, hub id, or "starter"; default: the index\'s. A new index needs one.'
        ),
    ] = None,
    storage: Annotated[Storage | None, Option(help="How a new index stores its vectors; default: float32.")] = None,
    dimension: Dimension = None,
    delete: Annotated[list[str], Option(metavar="ID", help="Delete this row; may be repeated.")] = [],  # noqa: B006
    delete_missing: Annotated[bool, Option("--delete-missing", help="Delete all rows that are not in INPUT.")] = False,
    batch_size: BatchSize = 32,
    precision: ComputeIn = None,
    text_column: TextColumn = "text",
    image_column: ImageColumn = "image",
    id_column: IdColumn = "id",
    workers: Annotated[int, Option(min=1, help="Processes that each hold the model; more than one run on Daft.")] = 1,
    ray: Annotated[str | None, Option(metavar="ADDRESS", help="Ray cluster of workers, as ray://host:10001.")] = None,
    errors: Annotated[Path | None, Option(help="JSONL file for unusable rows; default: errors.jsonl in DIR.")] = None,
    as_json: Json = False,
) -> None:
    """Create or update a search index.

    Encodes only what is new or changed. Inputs that cannot be read are listed and left out. Run the same command again
    to resume an interrupted run.
    """
    from muco.search.columns import checked_id
    from muco.search.index import Index
    from muco.search.update import build

    if input is None and (not delete or delete_missing):
        raise BadParameter("pass an INPUT, or rows to --delete", context)
    result: dict[str, Any] = {}
    if delete:
        opened = Index.open(index)
        delete = [*map(checked_id, delete)]
        known = opened.rows_where("id", delete, ["id"]).column("id").to_pylist()
        if unknown := [id for id in dict.fromkeys(delete) if id not in known]:
            print(f"{index}: no row has the id {', '.join(map(repr, unknown))}", file=sys.stderr)
        result = {"deleted": opened.delete(delete), "total": len(opened)}
    if input is not None:
        found = build(
            input,
            index,
            model,
            storage=storage,
            dimension=dimension,
            text_column=text_column,
            image_column=image_column,
            id_column=id_column,
            delete_missing=delete_missing,
            batch_size=batch_size,
            workers=workers,
            ray=ray,
            precision=precision,
            errors=errors,
        )
        result = found | {"deleted": found["deleted"] + result.get("deleted", 0)}
    finish(result, as_json, print_pairs)


def search(
    index: Place,
    text: Annotated[str | None, Option("--text", "-t", help="Text to search for.")] = None,
    image: Annotated[Path | None, Option(help="An image to search for; with --text, both form one query.")] = None,
    like: Annotated[str | None, Option(metavar="ID", help="Find rows like this one.")] = None,
    k: Annotated[int, Option("-k", min=1, help="Number of rows to find, at most 10,000.")] = 10,
    where: Annotated[str | None, Option(metavar="FILTER", help='Only rows that match, e.g. "year > 2020".')] = None,
    exact: Annotated[
        bool, Option("--exact/--approximate", help="Compare with every row; use no vector index.")
    ] = False,
    queries: Annotated[Path | None, Option(metavar="FILE", help="Many texts, one per line; needs --page.")] = None,
    page: Annotated[Path | None, Option(metavar="FILE", help="Write what is found as a page of pictures.")] = None,
    caption: Annotated[
        str | None, Option(metavar="COLUMN", help="The column that is written under the pictures of --page.")
    ] = None,
    model: Annotated[str | None, Option("--model", "-m", help="The index's model, if it has moved.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print one JSON line per row on stdout.")] = False,
) -> None:
    """Search an index.

    By text, image, both, or for rows like one of its own. Shows thumbnails if the terminal supports them.
    """
    from muco.search.index import Index

    if queries and not page:
        raise BadParameter("--queries writes a page: pass --page FILE.html too")
    if caption and not page:
        raise BadParameter("--caption is for a page: pass --page FILE.html too")
    if page and as_json:
        raise BadParameter("--page and --json exclude each other")
    if queries and (text or image or like):
        raise BadParameter("--queries takes the place of --text, --image and --like")
    asked: list[dict[str, Any]] = [{"text": text, "image": image, "like": like}]
    if queries:
        from muco.search.sheet import read_queries

        asked = [{"text": line} for line in read_queries(queries)]
    if image is not None:
        from muco.images import file_status

        file_status(image, str(image))  # before a model is loaded
    opened = Index.open(index, model)
    found = [opened.search(**one, k=k, where=where, exact=exact) for one in asked]
    if page:
        from muco.search.sheet import write_sheet

        words = (" ".join(str(part) for part in one.values() if part) for one in asked)
        write_sheet(page, dict(zip(words, found, strict=True)), caption=caption)
        print(page)
        return
    [hits] = found
    if as_json:
        from muco.search.columns import in_json

        for hit in hits:
            row = {"id": hit.id, "score": hit.score, "text": hit.text, "image": hit.image, "extra": in_json(hit.extra)}
            print_json(row)
        return
    from rich.console import Console

    from muco.search.terminal import protocol, show_hits

    show_hits(hits, Console(file=sys.stdout), protocol(os.environ, sys.stdout))
