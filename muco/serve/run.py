"""Listens, loads the model and serves until it is told to stop."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from muco.base.terminal import print_json
from muco.errors import MucoError
from muco.search.lance import is_local
from muco.training.folder import RECIPE_FILE

if TYPE_CHECKING:
    from muco.search import Index
    from muco.serve.batcher import BatchLimits
    from muco.serve.process import ModelProcess
    from muco.serve.schema import RequestLimits
    from muco.serve.service import Served


def run_server(
    path: str,
    *,
    host: str,
    port: int,
    device: str | None,
    index: str | None,
    name: str,
    limits: RequestLimits,
    batches: BatchLimits,
    instructions: Mapping[str, str],
    token: str | None,
    allowed_hosts: Sequence[str],
    origins: tuple[str, ...],
) -> None:
    """Serves a model until the process is told to stop.

    Args:
        path, device: As for :func:`muco.load`.
        index: Folder or URL of an index to search in; None: there is no search.
        allowed_hosts: Names that clients may call the server by, besides those of this machine. Without any, a server
            that other machines reach takes every name.
        name, limits, batches, instructions, token, origins: See :class:`muco.serve.service.Served`.
    Raises:
        MucoError: If the address cannot be had, the model or the index cannot be used, or the model's process ends.
    """
    from muco.serve.guard import LOCAL_HOSTS
    from muco.serve.service import Served

    local, gone = host in LOCAL_HOSTS, _Gone()
    hosts = frozenset((*LOCAL_HOSTS, *map(str.lower, allowed_hosts))) if local or allowed_hosts else None
    with _bound(host, port) as listener:
        engine, opened = _load(path, device, index, limits, gone)
        served = Served(
            engine=engine,
            name=name,
            limits=limits,
            batches=batches,
            dimensions=_trained_dimensions(path),
            index=opened,
            instructions=instructions,
            token=token,
            hosts=hosts,
            origins=origins,
        )
        with closing(engine):
            _run(served, listener, lambda: _announce(served, listener, local))
    if gone.code is not None:
        raise MucoError(f"the model's process ended (exit code {gone.code}); its last messages are above")


def _bound(host: str, port: int) -> socket.socket:
    """A socket at the address. It does not listen yet, so nobody connects before there is a model."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)  # without the protocol asyncio leaves Nagle's delay on: 40 ms
    except OSError as error:
        raise MucoError(f"--host {host}: {error.strerror}; name an address of this machine") from error
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
    path: str, device: str | None, index: str | None, limits: RequestLimits, gone: _Gone
) -> tuple[ModelProcess, Index | None]:
    from muco.serve.process import ModelProcess

    if index is not None and is_local(index) and not Path(index).is_dir():
        raise MucoError(f"{index}: no such index; make one with muco index")
    searched = index is not None
    engine = ModelProcess(path, device, limits.image, limits.tokens, fingerprint=searched, gone=gone)
    if index is None:
        return engine, None
    from muco.search import Index

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
        f"{address}  model {served.name}, vectors of {engine.dimension} dimensions, on {engine.facts.device}",
        f"one request: {limits.items} items, {limits.images} images, {limits.body_bytes >> 20} MiB, "
        f"{limits.seconds:g} s; one item: {limits.tokens:,} tokens; one image: {limits.image.max_pixels:,} pixels",
        f"one pass: {batches.tokens:,} tokens, {batches.milliseconds:g} ms; queue: {batches.queue}",
        "search page at /" if served.index is not None else "no index, so no search",
    ]
    if not local and served.token is None:
        lines.append("anyone who can reach this address may use it: no token is set")
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

    for name, text in served.instructions.items():  # better refused here than for every client that asks for it
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
    # uvicorn ends after SIGTERM by raising it again, but a stop that was asked for and went well is not a failure.
    signal.signal(signal.SIGTERM, lambda *_: None)
    Server(config).run(sockets=[listener])
