"""Running servers for tests: in this process, or as the command line starts them."""

from __future__ import annotations

import base64
import io
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn
from PIL import Image
from processes import PIPE, SOON, Popen

from muco.cli.serve import TOKEN
from muco.serve.app import Served, _bound, build_app


@contextmanager
def serving(served: Served) -> Iterator[httpx.Client]:
    """A client of a server in a thread."""
    config = uvicorn.Config(build_app(served), log_level="critical", lifespan="on", server_header=False)
    server = uvicorn.Server(config)
    with _bound("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        until(lambda: server.started or not thread.is_alive())
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=SOON) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join()


# begins a script whose model processes are forked, as those of conftest.py in serve are
FORKED = """
import multiprocessing, sys
from types import SimpleNamespace
from muco.cli import main
from muco.serve import process
forks = multiprocessing.get_context("forkserver")
process.multiprocessing = SimpleNamespace(get_context=lambda _: forks)
"""


@dataclass
class Running:
    address: str
    process: Popen
    facts: dict[str, Any]


@contextmanager
def command(model: Path, *options: str, token: str | None = None, forked: bool = False) -> Iterator[Running]:
    """``muco serve`` as a process, with a ``forked`` model or a started one; SIGTERM stops it if it still runs."""
    environment = {k: v for k, v in os.environ.items() if k != TOKEN} | {"OMP_NUM_THREADS": "1"}
    environment |= {TOKEN: token} if token else {}
    muco = ["-c", f"{FORKED}sys.exit(main())"] if forked else ["-m", "muco"]
    line = [sys.executable, *muco, "serve", "--model", str(model), "--port", "0", *options]
    process = Popen(line, stdout=PIPE, stderr=PIPE, env=environment)
    try:
        facts = process.stdout.readline()
        assert facts, process.stderr.read()
        facts = json.loads(facts)
        yield Running(facts["address"], process, facts)
    finally:
        process.terminate()
        process.communicate(timeout=SOON)


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


def picture(colour: Any = "red", size: tuple[int, int] = (64, 48), format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, format)
    return file.getvalue()


def data_uri(image: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def vectors_of(answer: httpx.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    data = answer.json()["data"]
    assert [one["index"] for one in data] == [*range(len(data))]
    return np.array([one["embedding"] for one in data], dtype=np.float32)
