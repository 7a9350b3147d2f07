"""``muco serve``: everything that can be wrong is reported before the first request."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from muco.base.text import read_text
from muco.cli.options import ComputeIn, FetchAddress, FetchHost, Model, examples
from muco.errors import MucoError

if TYPE_CHECKING:
    from muco.base.fetch import FetchLimits

TOKEN = "MUCO_SERVE_TOKEN"
PORT = re.compile(r":\d+$")
ORIGIN = re.compile(r"https?://(\[[0-9a-f:]+\]|[a-z0-9._-]+)(:\d{1,5})?")
SERVE_EXAMPLES = examples(
    "muco serve --model starter",
    "muco serve --model starter --index photos.index --port 8080",
    "muco serve --model starter --host 0.0.0.0 --token-file token.txt --name pictures",
)


def serve(
    model: Model,
    index: Annotated[str | None, Option(metavar="DIR", help="An index: adds POST /search and the search page.")] = None,
    host: Annotated[str, Option(help="Address to listen on; 0.0.0.0 for all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="Port to listen on; 0 for any free one.")] = 8000,
    name: Annotated[str | None, Option(help="The model's name for clients; default: the folder's name.")] = None,
    device: Annotated[str | None, Option(help="cpu, cuda, …; default: the best available.")] = None,
    precision: ComputeIn = None,
    instruction: Annotated[
        list[str], Option(metavar="INPUT_TYPE=TEXT", help="Text that an input_type prepends to texts; may be repeated.")
    ] = [],  # noqa: B006
    token_file: Annotated[Path | None, Option(help=f"File with the clients' token; default: variable {TOKEN}.")] = None,
    allow_host: Annotated[
        list[str], Option(metavar="NAME", help="A host name clients may call, e.g. that of a proxy; may be repeated.")
    ] = [],  # noqa: B006
    allow_origin: Annotated[
        list[str],
        Option(metavar="ORIGIN", help="Allow this site's scripts, as https://example.com; * for any; may be repeated."),
    ] = [],  # noqa: B006
    allow_fetch: Annotated[bool, Option(help="Fetch images from http(s) URLs of public hosts.")] = False,
    fetch_host: FetchHost = [],  # noqa: B006
    fetch_address: FetchAddress = [],  # noqa: B006
    max_items: Annotated[int, Option(min=1, help="Maximum vectors per request.")] = 256,
    max_tokens: Annotated[int, Option(min=1, help="Maximum tokens per item, including its images.")] = 8192,
    max_pixels: Annotated[int, Option(min=1, help="Maximum pixels per image.")] = 16_000_000,
    max_body: Annotated[int, Option(min=1, help="Maximum MiB per request body.")] = 64,
    timeout: Annotated[float, Option(min=0.1, help="Seconds to answer a request.")] = 60,
    batch_tokens: Annotated[int, Option(min=1, help="Maximum tokens per forward pass.")] = 8192,
    image_memory: Annotated[
        float, Option(min=0, help="GiB that keep what the model saw of images, for when they come again.")
    ] = 1.0,
    batch_milliseconds: Annotated[float, Option(min=0, help="How long an item waits for others.")] = 5,
    queue: Annotated[int, Option(min=1, help="Items that may wait; large requests leave room for small ones.")] = 512,
) -> None:
    """Serve embeddings and search over HTTP.

    Accepts OpenAI's, vLLM's and Cohere's requests; with an index, has a search page at /; exports Prometheus metrics.
    Prints one JSON line with the address when it listens. SIGTERM finishes accepted requests. See docs/serving.md.
    """
    _check_installed()
    from muco.serve.app import run_server
    from muco.serve.batcher import BatchLimits
    from muco.serve.images import ImageLimits
    from muco.serve.schema import RequestLimits
    from muco.starter import model_name

    image = ImageLimits(max_pixels=max_pixels, fetch=_fetch_limits(allow_fetch, fetch_host, fetch_address))
    limits = RequestLimits(max_body * 2**20, seconds=timeout, items=max_items, tokens=max_tokens, image=image)
    if queue < max_items:
        raise MucoError(f"--queue {queue}: a request may have {max_items} items (--max-items), which must fit in it")
    token, instructions = _token(token_file), dict(map(_instruction, instruction))
    run_server(
        model,
        host=host,
        port=port,
        device=device,
        precision=precision,
        image_memory=image_memory,
        index=index,
        name=name or model_name(model),
        limits=limits,
        batches=BatchLimits(batch_tokens, batch_milliseconds, queue),
        instructions=instructions,
        token=token,
        allowed_hosts=[*map(_host, allow_host)],
        origins=tuple(map(_origin, allow_origin)),
    )


def _check_installed() -> None:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise MucoError(f"muco serve needs the package {error.name}: pip install 'muco[serve]'") from error


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


def _fetch_limits(allow_fetch: bool, hosts: Sequence[str], addresses: Sequence[str]) -> FetchLimits | None:
    """What may be fetched; None: nothing. Addresses open themselves, and no public host."""
    from muco.base.fetch import FetchLimits

    if not (allow_fetch or hosts or addresses):
        return None
    limits = FetchLimits(hosts=tuple(hosts) or None, allowed_addresses=tuple(addresses))
    return limits if allow_fetch and not hosts else replace(limits, hosts=(*hosts, *limits.address_hosts))


def _host(text: str) -> str:
    """A host name as the server compares it: without port and brackets."""
    from muco.base.fetch import plain_host

    alone = text if text.count(":") > 1 and "[" not in text else PORT.sub("", text)
    name = plain_host(alone.removeprefix("[").removesuffix("]"))
    if name is None:
        raise MucoError(f"--allow-host {text!r}: write a name, as search.example.com")
    return name


def _origin(text: str) -> str:
    """An origin as browsers write it, so that it can be compared as a text: without the scheme's own port."""
    origin = text.lower().removesuffix("/")
    origin = origin.removesuffix(":443" if origin.startswith("https:") else ":80")
    if text != "*" and not ORIGIN.fullmatch(origin):
        raise MucoError(
            f"--allow-origin {text!r}: write scheme, host and perhaps port, as https://app.example.com:8443"
        )
    return origin
