"""``muco index``, ``muco search`` and ``muco serve``: each imports what it needs inside itself."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from muco.base.terminal import finish, print_json, print_pairs
from muco.base.text import read_text
from muco.cli.options import BatchSize, Dimension, Json, Model, Precision, examples
from muco.errors import MucoError

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


TOKEN = "MUCO_SERVE_TOKEN"
ORIGIN = re.compile(r"https?://(\[[0-9a-f:]+\]|[a-z0-9._-]+)(:\d{1,5})?")
SERVE_EXAMPLES = examples(
    "muco serve --model runs/demo/run/model",
    "muco serve --model runs/demo/run/model --index photos.index --port 8080",
    "muco serve --model runs/demo/run/model --host 0.0.0.0 --token-file token.txt --name scenes",
)
Repeated = list[str]


def serve(
    model: Model,
    index: Annotated[
        str | None, typer.Option(metavar="DIR", help="An index of muco index: adds POST /search and the search page.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="The model's name for clients; default: the folder's name.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …; default: the best available.")] = None,
    instruction: Annotated[
        Repeated,
        typer.Option(
            metavar="INPUT_TYPE=TEXT", help="Text that an input_type prepends to every text; may be repeated."
        ),
    ] = [],  # noqa: B006
    token_file: Annotated[
        Path | None,
        typer.Option(help=f"File with the token that clients must send; else the environment variable {TOKEN}."),
    ] = None,
    allow_host: Annotated[
        Repeated,
        typer.Option(metavar="NAME", help="A host name clients may call, e.g. that of a proxy; may be repeated."),
    ] = [],  # noqa: B006
    allow_origin: Annotated[
        Repeated,
        typer.Option(
            metavar="ORIGIN",
            help="Allow requests from scripts on this site's pages, e.g. https://app.example.com; * for any site; "
            "may be repeated.",
        ),
    ] = [],  # noqa: B006
    allow_fetch: Annotated[bool, typer.Option(help="Fetch images from http(s) URLs of public hosts.")] = False,
    fetch_host: Annotated[
        Repeated,
        typer.Option(metavar="NAME", help="Fetch from this host only, or *.NAME for those under it; may be repeated."),
    ] = [],  # noqa: B006
    fetch_address: Annotated[
        Repeated,
        typer.Option(
            metavar="ADDRESS:PORT", help="Fetch from this address although it is not public; may be repeated."
        ),
    ] = [],  # noqa: B006
    max_items: Annotated[int, typer.Option(min=1, help="Maximum vectors per request.")] = 256,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens per item, including its images.")] = 8192,
    max_pixels: Annotated[int, typer.Option(min=1, help="Maximum pixels per image.")] = 16_000_000,
    max_body: Annotated[int, typer.Option(min=1, help="Maximum MiB per request body.")] = 64,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to answer a request.")] = 60,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens per forward pass.")] = 8192,
    batch_milliseconds: Annotated[float, typer.Option(min=0, help="How long an item waits for others.")] = 5,
    queue: Annotated[
        int, typer.Option(min=1, help="Items that may wait; large requests leave room for small ones, see the docs.")
    ] = 512,
) -> None:
    """Serve embeddings and search over HTTP.

    Accepts OpenAI's, vLLM's and Cohere's requests; with an index, has a search page at /; exports Prometheus metrics.
    Prints one JSON line with the address when it listens. SIGTERM finishes accepted requests. See docs/serving.md.
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise MucoError(f"muco serve needs the package {error.name}: pip install 'muco[serve]'") from error
    from muco.base.fetch import FetchLimits
    from muco.serve.batcher import BatchLimits
    from muco.serve.images import ImageLimits
    from muco.serve.run import run_server
    from muco.serve.schema import RequestLimits

    fetch = None
    if allow_fetch or fetch_host or fetch_address:
        fetch = FetchLimits(hosts=tuple(fetch_host) or None, allowed_addresses=tuple(fetch_address))
    image = ImageLimits(max_pixels=max_pixels, fetch=fetch)
    limits = RequestLimits(
        body_bytes=max_body * 2**20, seconds=timeout, items=max_items, tokens=max_tokens, image=image
    )
    if queue < max_items:
        raise MucoError(f"--queue {queue}: a request may have {max_items} items (--max-items), which must fit in it")
    token, instructions = _token(token_file), dict(map(_instruction, instruction))
    run_server(
        model,
        host=host,
        port=port,
        device=device,
        index=index,
        name=name or Path(model).name,
        limits=limits,
        batches=BatchLimits(batch_tokens, batch_milliseconds, queue),
        instructions=instructions,
        token=token,
        allowed_hosts=allow_host,
        origins=tuple(map(_origin, allow_origin)),
    )


def _token(file: Path | None) -> str | None:
    token = os.environ.get(TOKEN, "").strip() if file is None else read_text(file, MucoError).strip()
    if file is None and not token:
        return None
    if not token or not token.isprintable() or not token.isascii() or " " in token:
        raise MucoError(f"{file or TOKEN}: a token is one word of ASCII letters, digits and signs")
    return token


def _instruction(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise MucoError(f"--instruction {text!r}: write it as INPUT_TYPE=TEXT")
    return key, value


def _origin(text: str) -> str:
    """An origin as browsers write it, so that it can be compared as a text: without the scheme's own port."""
    origin = text.lower().removesuffix("/")
    origin = origin.removesuffix(":443" if origin.startswith("https:") else ":80")
    if text != "*" and not ORIGIN.fullmatch(origin):
        raise MucoError(
            f"--allow-origin {text!r}: write scheme, host and perhaps port, as https://app.example.com:8443"
        )
    return origin
