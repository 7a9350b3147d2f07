"""Files appear whole, locks keep two writers apart, and what cannot be written is said in a sentence."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from muco.base.files import (
    claimed,
    earlier_record,
    is_empty,
    locked,
    read_json,
    take_lock,
    whole_file,
    write_json,
    writing,
)
from muco.errors import MucoError, OutputError

HOLD = """
import sys, time
from pathlib import Path
from muco.base.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "full"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("this user may not mount")
    yield folder
    subprocess.run(["umount", folder], check=True)


def holder(folder: Path) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


# ── locks ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_second_is_refused_and_told_who_holds_the_lock(tmp_path: Path) -> None:
    with holder(tmp_path / "o") as process:
        said = rf"o is in use by process {process.pid} on \S+ since 2.* UTC; wait"
        with pytest.raises(OutputError, match=said), locked(tmp_path / "o"):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        with locked(tmp_path / "o"):  # the kernel has released it
            assert is_empty(tmp_path / "o") and [*(tmp_path / "o").iterdir()]
    assert not [*(tmp_path / "o").iterdir()]


def test_waiting_ends_with_the_holder_and_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with holder(tmp_path) as process:
        threading.Timer(2.5, process.kill).start()
        with caplog.at_level(logging.WARNING), locked(tmp_path, wait=60):
            assert process.wait(300) == -signal.SIGKILL
    [told] = [record.message for record in caplog.records]
    assert f"in use by process {process.pid}" in told and "waiting" in told


def test_a_limit_of_waiting(tmp_path: Path) -> None:
    refused = pytest.raises(OutputError, match=f"in use by process {os.getpid()}")
    with locked(tmp_path), refused, locked(tmp_path, wait=0.2):
        pass


def test_many_threads_are_in_the_block_one_at_a_time(tmp_path: Path) -> None:
    inside, most, entered = 0, 0, 0

    def work() -> None:
        nonlocal inside, most, entered
        for _ in range(5):
            with locked(tmp_path, wait=60):
                inside += 1
                most, entered = max(most, inside), entered + 1
                time.sleep(0.001)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, entered) == (1, 30)


def test_a_child_holds_no_lock_of_its_parent(tmp_path: Path) -> None:
    """Else the workers of a killed run would keep its folder locked."""
    with locked(tmp_path):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
    try:
        with locked(tmp_path):
            assert child.is_alive()
    finally:
        child.kill()
        child.join()


def test_where_there_are_no_locks_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    with caplog.at_level(logging.WARNING), locked(tmp_path):
        pass
    assert "no locks here (Operation not supported)" in caplog.text
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(PermissionError(errno.EPERM, "not you")))
    with (tmp_path / "a").open("wb") as file, pytest.raises(PermissionError):
        take_lock(file.fileno(), tmp_path / "a")


def test_a_lock_beside_a_file(tmp_path: Path) -> None:
    with claimed(tmp_path / "a.jsonl", beside=True):
        assert [path.name for path in tmp_path.iterdir()] == [".a.jsonl.lock"]
        with pytest.raises(OutputError, match=r"a\.jsonl is in use"), claimed(tmp_path / "a.jsonl", beside=True):
            pass
        with claimed(tmp_path / "b.jsonl", beside=True):
            pass


@pytest.mark.parametrize("path", [".", "/"])
def test_what_has_no_name_cannot_appear_whole(path: str) -> None:
    with pytest.raises(OutputError, match="cannot be made anew"), claimed(path, beside=True):
        pass


@pytest.mark.parametrize("record", [{}, {"asked": 3}])
def test_a_record_of_another_program_is_left_alone(tmp_path: Path, record: dict) -> None:
    write_json(tmp_path / "study.json", record)
    with pytest.raises(OutputError, match="is not empty and holds no study"):
        earlier_record(tmp_path / "study.json", {"seed": 1}, "study")


def test_an_output_that_cannot_be_claimed(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, said in ((tmp_path / "file", "is a file, and a folder"), (tmp_path / "file" / "o", "Not a directory")):
        with pytest.raises(OutputError, match=said), claimed(path):
            pass


def test_what_is_written_into_a_lock_is_shown_as_plain_text(tmp_path: Path) -> None:
    with locked(tmp_path):
        (tmp_path / ".lock").write_bytes(b"\x1b[31mred\n\xff")
        with pytest.raises(OutputError) as caught, locked(tmp_path):
            pass
    assert "in use by [31mred; wait" in str(caught.value)


# ── whole files ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_file_appears_whole_or_stays_as_it_was(tmp_path: Path) -> None:
    write_json(tmp_path / "new" / "a.json", {"a": "ü"})
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "new" / "a.json") as unfinished:
        unfinished.write_text("half")
        raise ZeroDivisionError
    assert read_json(tmp_path / "new" / "a.json") == {"a": "ü"}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]


def test_what_json_has_no_number_for_is_null(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"loss": [[1, float("nan")], (2, float("-inf"))], "score": 0.5})
    assert read_json(tmp_path / "a.json") == {"loss": [[1, None], [2, None]], "score": 0.5}


def test_threads_write_the_same_file_at_once(tmp_path: Path) -> None:
    values = [{"n": n, "filling": "x" * 10_000} for n in range(8)]
    threads = [threading.Thread(target=write_json, args=(tmp_path / "a.json", value)) for value in values]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read_json(tmp_path / "a.json") in values
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_cut_json_file_is_said(tmp_path: Path) -> None:
    for content in ('{"a": ', "", "[1]", '"\xff"'):
        (tmp_path / "run.json").write_text(content, encoding="latin-1")
        with pytest.raises(OutputError, match="run.json: "):
            read_json(tmp_path / "run.json")
    with pytest.raises(OutputError, match=r"none\.json: cannot be read \(No such file"):
        read_json(tmp_path / "none.json")


# ── errors ───────────────────────────────────────────────────────────────────────────────────────────────────────────

BIG = torch.zeros(1 << 20)
WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: path.write_text("x" * (4 << 20)),
    "torch": lambda path: torch.save({"a": BIG}, path),
    "safetensors": lambda path: save_file({"a": BIG}, path),
    "numpy": lambda path: np.save(path, BIG.numpy()),
    "json": lambda path: write_json(path, {"a": "x" * (4 << 20)}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_said_whoever_writes(name: str, full: Path) -> None:
    said = r"full.*: cannot be written \(.*No space left on device.*; make room, or"
    with pytest.raises(OutputError, match=said), writing(full / "x"):
        WRITERS[name](full / "x.npy")
    (full / "x.npy").unlink(missing_ok=True)
    assert not [*full.iterdir()]


def test_a_missing_folder_is_said_whoever_writes(tmp_path: Path) -> None:
    for write in WRITERS.values():
        if write is WRITERS["json"]:  # makes the folder itself
            (tmp_path / "gone").touch()
        said = "cannot be written .*(No such file or directory|Not a directory).*; choose another"
        with pytest.raises(OutputError, match=said), writing(tmp_path / "gone" / "x"):
            write(tmp_path / "gone" / "x")


def test_other_errors_pass(tmp_path: Path) -> None:
    for error in (RuntimeError("shapes differ"), MucoError("said already"), ValueError("a defect")):
        with pytest.raises(type(error), match=str(error)) as caught, writing(tmp_path):
            raise error
        assert caught.value is error


def test_a_lock_on_a_full_disk(full: Path) -> None:
    with pytest.raises(OSError), (full / "filling").open("wb") as file:
        while True:
            file.write(bytes(4096))
    with locked(full), pytest.raises(OutputError, match="in use by"), locked(full):
        pass
