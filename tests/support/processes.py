"""Processes for tests: forked from one that has imported the libraries, or started as a user starts them.

``Popen`` and ``run`` take the commands of the functions in ``subprocess`` that have the same names. The process that
they start is a process of its own, which can be killed and has its own streams, directory and environment, but it is
forked from a server that imported the libraries once. That saves ten seconds of processor time each.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT, CompletedProcess
from typing import IO, Any

SOON = 300  # seconds in which anything that is going to happen has happened, on a loaded machine too
ACCELERATE = "accelerate.commands.launch --multi_gpu --num_processes=2 --num_machines=1 --mixed_precision=no"
# what starts threads when it is imported, such as lancedb, is not among them; the last is found from the repository
LOADED = ("muco.cli.app", "muco.training.trainer", "openai", "fastapi", "uvicorn", "tests.support.loaded")

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload([*LOADED])


class Popen:
    """A forked process with the methods of ``subprocess.Popen``; the streams are text."""

    def __init__(
        self,
        command: Sequence[Any],
        *,
        stdin: Any = None,
        stdout: Any = None,
        stderr: Any = None,
        cwd: Path | str | None = None,
        env: dict[str, str] | None = None,
        text: bool = True,
    ) -> None:
        self.args = [str(word) for word in command]
        assert self.args[0] == sys.executable and text and stdin in (None, DEVNULL, PIPE), "nothing else is known here"
        self.stdout, out = _stream(stdout)
        self.stderr, error = (None, out) if stderr == STDOUT else _stream(stderr)
        into, self.stdin = os.pipe() if stdin == PIPE else (None, None)  # open as long as this process is
        into = Connection(into, writable=False) if into else None
        place = str(cwd or os.getcwd()), dict(os.environ if env is None else env)
        self.process = context.Process(target=_become, args=(self.args[1:], *place, into, out, error))
        self.process.start()
        self.pid = self.process.pid
        for end in {into, out, error} - {None}:
            end.close()

    def __del__(self) -> None:
        if self.stdin:
            os.close(self.stdin)

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str | None, str | None]:
        with ThreadPoolExecutor(2) as readers:
            found = [readers.submit(_rest, stream) for stream in (self.stdout, self.stderr)]
            try:
                self.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
            return found[0].result(), found[1].result()

    def __enter__(self) -> Popen:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self.stdout, self.stderr):
            if stream:
                stream.close()
        self.wait()


def run(
    command: Sequence[Any],
    *,
    capture_output: bool = False,
    check: bool = False,
    timeout: float = SOON,
    stdout: Any = None,
    stderr: Any = None,
    **options: Any,
) -> CompletedProcess[str]:
    """Forks a process, waits for its end and returns its streams, as ``subprocess.run``."""
    stdout, stderr = (PIPE, PIPE) if capture_output else (stdout, stderr)
    process = Popen(command, stdout=stdout, stderr=stderr, **options)
    out, error = process.communicate(timeout)
    done = CompletedProcess(process.args, process.returncode, out, error)
    assert not check or done.returncode == 0, error
    return done


def _rest(stream: IO[str] | None) -> str | None:
    if stream is None or stream.closed:
        return None
    with stream:
        return stream.read()


def _stream(wanted: Any) -> tuple[IO[str] | None, Connection | None]:
    """The end that this process reads and the one that the other writes."""
    if wanted is None:
        return None, None
    if wanted == PIPE:
        ours, theirs = os.pipe()
        return os.fdopen(ours, encoding="utf-8", errors="surrogateescape"), Connection(theirs, readable=False)
    file = os.open(os.devnull, os.O_WRONLY) if wanted == DEVNULL else os.dup(getattr(wanted, "fileno", int)())
    return None, Connection(file, readable=False)


def _become(
    arguments: list[str],
    folder: str,
    environment: dict[str, str],
    into: Connection | None,
    out: Connection | None,
    error: Connection | None,
) -> None:
    """What the forked process does: the work of ``python ARGUMENTS``."""
    for stream, number in ((into, 0), (out, 1), (error, 2)):
        if stream is not None:
            os.dup2(stream.fileno(), number)
    for stream in {into, out, error} - {None}:
        stream.close()
    if into is not None:  # else it is empty
        sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method(None, force=True)  # that of a new process
    forkserver._forkserver.ensure_running = lambda: None  # what it forks comes from the same server, which is loaded
    first, *rest = arguments
    try:
        if first == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif first == "-c":
            sys.argv = ["-c", *rest[1:]]
            exec(compile(rest[0], "<string>", "exec"), vars(sys.modules["__main__"]))  # noqa: S102
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(first).parent))
            runpy.run_path(first, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a child of multiprocessing leaves them out


def launch(*arguments: Any, accelerate: bool = False) -> list[Popen]:
    """Two processes on this machine that form one group; with ``accelerate`` it is its launcher that is returned."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if accelerate:
        command = [sys.executable, "-m", *ACCELERATE.split(), *arguments]
        return [Popen(command, env=environment, stdout=PIPE, stderr=PIPE)]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2))
    command = [sys.executable, *arguments]
    return [Popen(command, env=environment | group | rank, stdout=PIPE, stderr=PIPE) for rank in ranks]


def finished(processes: list[Popen]) -> str:
    """What processes that work together print; all of them end well, and where one does not the others are killed."""

    def end(process: Popen) -> tuple[str, str]:
        out, error = process.communicate(timeout=SOON)
        if process.returncode:
            for other in processes:
                other.kill()
        return out, error

    with ThreadPoolExecutor(len(processes)) as threads:
        said = list(threads.map(end, processes))
    assert all(process.returncode == 0 for process in processes), "\n".join(error for _, error in said)
    return "".join(out for out, _ in said)
