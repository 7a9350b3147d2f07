"""``muco index`` and ``muco search``: each imports what it needs inside itself."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from muco.base.terminal import finish, print_json, print_pairs
from muco.cli.options import BatchSize, Dimension, Json, Precision, examples

Place = Annotated[
    str, typer.Option("--index", "-i", metavar="DIR", help="Folder of the index, or a URL such as s3://bucket/index.")
]


INDEX_EXAMPLES = examples(
    "muco index photos/ --model runs/demo/run/model --index photos.index",
    "muco index rows.jsonl --index rows.index --delete-missing",
    "muco index --index photos.index --delete 2019/cat.jpg --delete 2019/dog.jpg",
)
SEARCH_EXAMPLES = examples(
    'muco search --index photos.index --text "a red bicycle in the snow"',
    'muco search -i photos.index --image cat.jpg -k 5 --where "year >= 2020" --json',
    "muco search -i photos.index --like 2019/cat.jpg --exact",
)


def index(
    context: typer.Context,
    index: Place,
    input: Annotated[
        Path | None, typer.Argument(metavar="INPUT", help="A folder of images, a .jsonl or a .parquet file.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Model folder or hub id; required for a new index, by default the index's own."
        ),
    ] = None,
    storage: Annotated[
        Precision | None, typer.Option(help="How a new index stores its vectors; float32 by default.")
    ] = None,
    dimension: Dimension = None,
    delete: Annotated[list[str], typer.Option("--delete", metavar="ID", help="Delete this row; may be repeated.")] = [],  # noqa: B006
    delete_missing: Annotated[
        bool, typer.Option("--delete-missing", help="Delete all rows that are not in INPUT.")
    ] = False,
    batch_size: BatchSize = 32,
    text_column: Annotated[str, typer.Option(help="Key or column that holds the text.")] = "text",
    image_column: Annotated[str, typer.Option(help="Key or column that holds the image.")] = "image",
    id_column: Annotated[str, typer.Option(help="Key or column that holds the id.")] = "id",
    workers: Annotated[
        int, typer.Option(min=1, help="Processes that each hold the model; more than one run on Daft.")
    ] = 1,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Run the workers on this Ray cluster (ray://host:10001).")
    ] = None,
    errors: Annotated[
        Path | None, typer.Option(help="JSONL file for the rows that cannot be used; default errors.jsonl in DIR.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Create or update a search index.

    Encodes only what is new or changed. Inputs that cannot be read are listed and left out. Run the same command again
    to resume an interrupted run.
    """
    from muco.search.index import Index
    from muco.search.update import build

    if input is None and (not delete or delete_missing):
        raise typer.BadParameter("pass an INPUT, or rows to --delete", context)
    result: dict[str, Any] = {}
    if delete:
        opened = Index.open(index)
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
            errors=errors,
        )
        result = found | {"deleted": found["deleted"] + result.get("deleted", 0)}
    finish(result, as_json, print_pairs)


def search(
    index: Place,
    text: Annotated[str | None, typer.Option("--text", "-t", help="Text to search for.")] = None,
    image: Annotated[
        Path | None, typer.Option(help="An image to search for; with --text, both form one query.")
    ] = None,
    like: Annotated[str | None, typer.Option(metavar="ID", help="Find rows like this one.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Number of rows to find.")] = 10,
    where: Annotated[
        str | None, typer.Option(metavar="FILTER", help='Only rows that match, e.g. "year > 2020".')
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact/--approximate", help="Compare with every row instead of using the vector index.")
    ] = False,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="New place of the index's model, if it has moved.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line per row on stdout.")] = False,
) -> None:
    """Search an index.

    By text, image, both, or for rows like one of its own. Shows thumbnails if the terminal supports them.
    """
    from muco.search.index import Index

    hits = Index.open(index, model).search(text, image=image, like=like, k=k, where=where, exact=exact)
    if as_json:
        from muco.search.columns import in_json

        for hit in hits:
            row = {"id": hit.id, "score": hit.score, "text": hit.text, "image": hit.image, "extra": in_json(hit.extra)}
            print_json(row)
        return
    from rich.console import Console

    from muco.search.terminal import protocol, show_hits

    show_hits(hits, Console(file=sys.stdout), protocol(os.environ, sys.stdout))
