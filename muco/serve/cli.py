"""``muco serve``: everything that can be wrong is said before the first request. No torch at import."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from muco.base.text import read_text
from muco.errors import MucoError
from muco.options import Model, examples, print_json

if TYPE_CHECKING:
    from muco.serve.app import Served
    from muco.serve.images import ImageLimits
    from muco.serve.process import ModelProcess

TOKEN = "MUCO_SERVE_TOKEN"
ORIGIN = re.compile(r"https?://(\[[0-9a-f:]+\]|[a-z0-9._-]+)(:\d{1,5})?")
EXAMPLES = examples(
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
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 for any that is free.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="The model's name for clients; the folder's name if left out.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …; the best there is if left out.")] = None,
    instruction: Annotated[
        Repeated,
        typer.Option(metavar="INPUT_TYPE=TEXT", help="What an input_type puts before every text; may be repeated."),
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
            help="Let scripts of this site's pages ask in a browser, e.g. https://app.example.com; * for any site; "
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
    max_items: Annotated[int, typer.Option(min=1, help="Vectors of one request.")] = 256,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one item, its images included.")] = 8192,
    max_pixels: Annotated[int, typer.Option(min=1, help="Pixels of one image.")] = 16_000_000,
    max_body: Annotated[int, typer.Option(min=1, help="MiB of one request's body.")] = 64,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds in which a request is answered.")] = 60,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens that pass through the model at once.")] = 8192,
    batch_milliseconds: Annotated[float, typer.Option(min=0, help="How long an item waits for others.")] = 5,
    queue: Annotated[
        int, typer.Option(min=1, help="Items that may wait; large requests leave room for small ones, see the docs.")
    ] = 512,
) -> None:
    """Serve embeddings and search over HTTP.

    OpenAI's, vLLM's and Cohere's requests, a search page at / where there is an index, metrics for Prometheus. Prints
    one JSON line with the address when it listens. SIGTERM finishes what was accepted. See docs/serving.md.
    """
    _check_installed()
    from muco.fetch import FetchLimits
    from muco.serve.app import Served
    from muco.serve.batcher import BatchLimits
    from muco.serve.guard import LOCAL_HOSTS
    from muco.serve.images import ImageLimits
    from muco.serve.schema import Limits

    fetch = None
    if allow_fetch or fetch_host or fetch_address:
        fetch = FetchLimits(hosts=tuple(fetch_host) or None, allowed_addresses=tuple(fetch_address))
    image = ImageLimits(max_pixels=max_pixels, fetch=fetch)
    limits = Limits(body_bytes=max_body * 2**20, seconds=timeout, items=max_items, tokens=max_tokens, image=image)
    if queue < max_items:
        raise MucoError(f"--queue {queue}: a request may have {max_items} items (--max-items), which must fit in it")
    token, instructions = _token(token_file), dict(map(_instruction, instruction))
    origins = tuple(map(_origin, allow_origin))
    with _bound(host, port) as listener:
        local = host in LOCAL_HOSTS
        gone = _Gone()
        engine, opened = _load(model, device, index, image, max_tokens, gone)
        served = Served(
            engine=engine,
            name=name or Path(model).name,
            limits=limits,
            batches=BatchLimits(batch_tokens, batch_milliseconds, queue),
            dimensions=_trained_dimensions(model),
            index=opened,
            instructions=instructions,
            token=token,
            hosts=frozenset((*LOCAL_HOSTS, *(n.lower() for n in allow_host))) if local or allow_host else None,
            origins=origins,
        )
        with closing(engine):
            _run(served, listener, lambda: _announce(served, listener, local))
        if gone.code is not None:
            raise MucoError(f"the model's process ended (exit code {gone.code}); what it last said is above")


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


def _origin(text: str) -> str:
    """An origin as browsers write it, so that it can be compared as a text: without the scheme's own port."""
    origin = text.lower().removesuffix("/")
    origin = origin.removesuffix(":443" if origin.startswith("https:") else ":80")
    if text != "*" and not ORIGIN.fullmatch(origin):
        raise MucoError(f"--allow-origin {text!r}: give scheme, host and perhaps port, as https://app.example.com:8443")
    return origin


def _bound(host: str, port: int) -> socket.socket:
    """A socket at the address. It does not listen yet, so nobody connects before there is a model."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)  # without the protocol asyncio leaves Nagle's delay on: 40 ms
    except OSError as error:
        raise MucoError(f"--host {host}: {error.strerror}; give an address of this machine") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise MucoError(f"cannot listen at {host} port {port}: {error.strerror}; choose another --port") from error
    return listener


class _Gone:
    """Ends the server when the model's process does."""

    code: int | None = None

    def __call__(self, code: int | None) -> None:
        self.code = code
        os.kill(os.getpid(), signal.SIGTERM)


def _load(
    path: str, device: str | None, index: str | None, image: ImageLimits, max_tokens: int, gone: _Gone
) -> tuple[ModelProcess, Any]:
    from muco.serve.process import ModelProcess

    if index is None:
        return ModelProcess(path, device, image, max_tokens, gone=gone), None
    from muco.search import Index

    if "://" not in index and not Path(index).is_dir():
        raise MucoError(f"{index}: no such index; make one with muco index")
    engine = ModelProcess(path, device, image, max_tokens, fingerprint=True, gone=gone)
    opened = Index.open(index)
    opened.check(engine.facts.fingerprint, path)
    return engine, opened


def _trained_dimensions(path: str) -> tuple[int, ...]:
    """The lengths that a model was trained for (Matryoshka), from the recipe that is saved beside its weights."""
    import yaml
    from transformers.utils.hub import cached_file

    file = cached_file(path, "recipe.yaml", _raise_exceptions_for_missing_entries=False)
    if file is None:
        return ()
    try:
        return tuple(int(number) for number in yaml.safe_load(Path(file).read_text("utf-8"))["loss"]["dimensions"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise MucoError(f"{file}: its loss.dimensions cannot be read") from error


def _announce(served: Served, listener: socket.socket, local: bool) -> None:
    host, port = listener.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    limits, batches, engine = served.limits, served.batches, served.engine
    lines = [
        f"{address}  model {served.name}, vectors of {engine.dimension} numbers, on {engine.facts.device}",
        f"one request: {limits.items} items, {limits.images} images, {limits.body_bytes >> 20} MiB, "
        f"{limits.seconds:g} s; one item: {limits.tokens:,} tokens; one image: {limits.image.max_pixels:,} pixels",
        f"one pass: {batches.tokens:,} tokens, {batches.milliseconds:g} ms; queue: {batches.queue}",
        "search page at /" if served.index is not None else "no index, so no search",
    ]
    if not local and served.token is None:
        lines.append("anyone who reaches this address may use it: there is no token")
    print("\n".join(f"muco serve: {line}" for line in lines), file=sys.stderr)
    print_json({"address": address, "model": served.name, "dimension": engine.dimension})


def _run(served: Served, listener: socket.socket, announce: Callable[[], None]) -> None:
    import uvicorn

    from muco.serve.app import build_app
    from muco.serve.engine import Item

    class Server(uvicorn.Server):
        async def startup(self, sockets: Sequence[socket.socket] | None = None) -> None:
            await super().startup(list(sockets or ()))
            announce()

    for name, text in served.instructions.items():  # better said here than to every client that asks for it
        served.engine.prepare(Item((text or "ready?",), where=f"--instruction {name}"))
    served.engine.run([served.engine.prepare(Item(("ready?",)))])  # whatever a first pass sets up is set up now
    config = uvicorn.Config(
        build_app(served),
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_keep_alive=30,
    )
    # uvicorn ends after SIGTERM by raising it again; a stop that was asked for and went well is no failure.
    signal.signal(signal.SIGTERM, lambda *_: None)
    Server(config).run(sockets=[listener])
