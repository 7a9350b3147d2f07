"""Listens, loads the model and serves until it is told to stop."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from muco.base.terminal import print_json
from muco.errors import MucoError
from muco.training.folder import RECIPE_FILE

if TYPE_CHECKING:
    from muco.serve.app import Served
    from muco.serve.images import ImageLimits
    from muco.serve.process import ModelProcess


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

    file = cached_file(path, RECIPE_FILE, _raise_exceptions_for_missing_entries=False)
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
