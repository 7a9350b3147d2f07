"""The model in a process of its own: answering requests and computing vectors do not share an interpreter's lock.

::

    this process    HTTP, images, tokens ─prepared items─▶ pipe ─▶ Engine.run    the other one
                                         ◀────vectors──── pipe ◀─

The other process ends with this one, however this one ends; and if it ends by itself, ``gone`` is called.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

import numpy as np
import torch

from muco.base.machine import keep_freed_memory, leave_out_of_collections
from muco.errors import MucoError
from muco.precision import Precision
from muco.serve.engine import Embedded, Engine, Facts, Preparation, Prepared
from muco.serve.images import ImageLimits

JOIN = 30  # seconds that the process gets to end by itself
SMALL = 1 << 20  # bytes of arrays that go through the pipe itself


class ModelProcess(Preparation):
    """What :class:`Engine` is, with the model elsewhere; MucoError if it cannot be loaded.

    Args:
        path, device, precision, image_memory: As for :func:`muco.load`.
        fingerprint: Whether to compute the model's, which reads all weights.
        gone: Called once, from a thread, if the process ends although it was not asked to.
    """

    def __init__(
        self,
        path: str,
        device: str | None,
        images: ImageLimits,
        max_tokens: int,
        *,
        precision: Precision | None = None,
        image_memory: float = 0.0,
        fingerprint: bool = False,
        gone: Callable[[int | None], None] = lambda code: None,
    ) -> None:
        context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
        self._pipe, theirs = context.Pipe()
        asked = (theirs, path, device, precision, image_memory, fingerprint)
        self._process = context.Process(target=_main, args=asked, daemon=True)
        self._closing, self._one_at_a_time = False, threading.Lock()
        self._ended: Any = self._process  # what to join: two threads must not wait for a process at once
        self._process.start()
        theirs.close()
        super().__init__(self._received(), images, max_tokens)
        self._ended = threading.Thread(target=self._watch, args=(gone,), name="muco-watch", daemon=True)
        self._ended.start()

    def run(self, prepared: Sequence[Prepared]) -> list[Embedded]:
        """See :meth:`Engine.run`; raises what that raised, or a RuntimeError if the process is not there any more."""
        with self._one_at_a_time:
            try:
                send(self._pipe, [replace(one, batch=_as_numpy(one.batch)) for one in prepared])
            except OSError as error:
                raise RuntimeError("the model's process has ended") from error
            return self._received()

    def close(self) -> None:
        """Ends the process; what it computes is finished first."""
        with self._one_at_a_time:
            self._closing = True
            self._pipe.close()
        self._ended.join(JOIN)
        if self._ended.is_alive():
            self._process.kill()
            self._ended.join()

    def _received(self) -> Any:
        try:
            ok, value = receive(self._pipe)
        except (EOFError, OSError) as error:
            self._ended.join(JOIN)
            raise RuntimeError(f"the model's process has ended (exit code {self._process.exitcode})") from error
        if not ok:
            raise value
        return value

    def _watch(self, gone: Callable[[int | None], None]) -> None:
        self._process.join()
        if not self._closing:
            gone(self._process.exitcode)


def _main(
    pipe: Connection,
    path: str,
    device: str | None,
    precision: Precision | None,
    image_memory: float,
    fingerprint: bool,
) -> None:
    """The other process."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach the whole group; the pipe says when to end
        signal.signal(number, signal.SIG_IGN)
    keep_freed_memory()
    try:
        from muco.model import load

        model = load(path, device=device, precision=precision, image_memory=image_memory)
        engine = Engine(model, ImageLimits(), max_tokens=sys.maxsize)
        send(pipe, (True, Facts.of(model, model.fingerprint if fingerprint else "")))
    except Exception as error:
        send(pipe, (False, _raised(error)))
        return
    leave_out_of_collections()
    while True:
        try:
            prepared = receive(pipe)
        except EOFError:
            return
        try:
            send(pipe, (True, engine.run([replace(one, batch=_as_tensors(one.batch)) for one in prepared])))
        except Exception as error:
            send(pipe, (False, _raised(error)))


def _raised(error: Exception) -> Exception:
    """What is raised in the first process: a user's error as it is; a defect leaves its traceback here."""
    if isinstance(error, MucoError):
        return error.with_traceback(None)
    traceback.print_exception(error)
    return RuntimeError(f"the model's process failed: {type(error).__name__}: {error}")


# ── the pipe ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def send(pipe: Connection, value: Any) -> None:
    """Sends anything that pickles; arrays that are large together go as memory, of which only the handle is sent.

    That memory belongs to no file system, so that a small /dev/shm, as in containers, does not matter.
    """
    arrays: list[pickle.PickleBuffer] = []
    head = pickle.dumps(value, protocol=5, buffer_callback=arrays.append)
    parts = [array.raw() for array in arrays]
    size = sum(part.nbytes for part in parts)
    if size < SMALL or not hasattr(os, "memfd_create"):
        pipe.send_bytes(pickle.dumps((0, [bytearray(part) for part in parts], head), protocol=5))
        return
    memory = os.memfd_create("muco")
    try:
        os.ftruncate(memory, size)
        with mmap.mmap(memory, size) as room:
            for part in parts:
                room.write(part)
        pipe.send_bytes(pickle.dumps((size, [part.nbytes for part in parts], head)))
        send_handle(pipe, memory, None)
    finally:
        os.close(memory)


def receive(pipe: Connection) -> Any:
    """What :func:`send` sent; EOFError if the other side is gone."""
    size, parts, head = pickle.loads(pipe.recv_bytes())
    if not size:
        return pickle.loads(head, buffers=parts)
    memory = recv_handle(pipe)
    try:
        room = memoryview(mmap.mmap(memory, size))  # lives as long as the arrays in it
    finally:
        os.close(memory)
    ends = [*accumulate(parts)]  # here the lengths of the arrays
    return pickle.loads(head, buffers=[room[end - length : end] for end, length in zip(ends, parts, strict=True)])


# Torch would send every tensor through shared memory of its own, which costs more than a small one takes.
def _as_numpy(value: Any) -> Any:
    return _changed(value, lambda leaf: leaf.numpy() if isinstance(leaf, torch.Tensor) else leaf)


def _as_tensors(value: Any) -> Any:
    return _changed(value, lambda leaf: torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf)


def _changed(value: Any, change: Callable[[Any], Any]) -> Any:
    """The value with every leaf of its dicts and lists changed."""
    if isinstance(value, dict):
        return {key: _changed(item, change) for key, item in value.items()}
    return [_changed(item, change) for item in value] if isinstance(value, list) else change(value)
