"""Files that appear whole, locks against two runs that write to one place, and errors of writing as sentences.

A lock belongs to its process: the kernel releases it when the process ends, however it ends. Readers take none.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import platform
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryFile
from threading import get_ident
from typing import Any

from safetensors import SafetensorError

from muco.base.json_text import finite
from muco.base.text import escaped
from muco.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
POLL = 0.05  # seconds between two looks at a lock
TELL_AFTER = 2.0  # seconds of waiting that nobody needs to be told about
TORCH_WRITER = ("inline_container", "PytorchStreamWriter", "Parent directory")  # by these torch's file errors are known
FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "disk is full")
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)

log = logging.getLogger(__name__)
_held: set[int] = set()  # open files of the locks of this process
_told: set[Path] = set()  # folders without locks, each told once


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """The path to write to; it becomes ``path``, on disk, at the end of the block, or vanishes if that failed."""
    make_folder(path.parent)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}-{get_ident()}.tmp")  # of this thread alone
    try:
        yield unfinished
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())  # the content must be on the disk before the name is
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Makes a folder, with those above it, unless it is there; NotADirectoryError where a file is in the way."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from error


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all, half characters as escapes; OutputError if it cannot be written."""
    write_bytes(path, escaped(text).encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all; OutputError if it cannot be written."""
    with writing(path), whole_file(path) as unfinished:
        unfinished.write_bytes(content)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file whole or not at all, NaN and infinity as null; OutputError if it cannot be written."""
    write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """What :func:`write_json` wrote; OutputError if the file cannot be read or was cut."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: cannot be read ({_said(error)}); restore it, or choose another folder") from error
    if not isinstance(value, dict):
        raise OutputError(f"{path}: does not hold a JSON object; restore it, or choose another folder")
    return value


@contextmanager
def writing(path: str | Path, remedy: str = "choose another output folder", *, again: bool = False) -> Iterator[None]:
    """Turns an error of the system or a library that cannot write into a sentence.

    Only writing belongs in the block: an error of reading would be reported as one of writing.

    Args:
        path: The file or folder that is written, named in the sentence.
        remedy: What to do; if the disk is full, after "make room, or".
        again: Say instead that the same command resumes what was begun.
    Raises:
        OutputError: In place of an OSError, and of the errors of torch, safetensors and SQLite about files.
    """
    try:
        yield
    except (OSError, SafetensorError, sqlite3.OperationalError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in TORCH_WRITER):
            raise
        raise _cannot_write(path, error, remedy, again) from error


def _cannot_write(path: str | Path, error: Exception, remedy: str, again: bool) -> OutputError:
    told = isinstance(error, SafetensorError | sqlite3.Error) or getattr(error, "errno", None)
    reason = _said(error) if told else _probed(Path(path)) or _said(error)
    full = any(word in reason for word in FULL)
    if again:
        remedy = f"{'make room' if full else 'change that'}, and run the same command again: it resumes"
    elif full:
        remedy = f"make room, or {remedy}"
    return OutputError(f"{path}: cannot be written ({reason}); {remedy}")


def _said(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)  # a library may have a longer text of its own, with our path in it
    return " ".join(str(error).split())


def _probed(path: Path) -> str | None:
    """Why nothing can be written near a path, for libraries that do not say why they failed."""
    try:
        with TemporaryFile(dir=path if path.is_dir() else path.parent) as file:
            file.write(os.urandom(1 << 16))
            os.fsync(file.fileno())
    except OSError as error:
        return _said(error)
    return None


@contextmanager
def claimed(path: str | Path, *, beside: bool = False, wait: float = 0.0) -> Iterator[None]:
    """:func:`locked` for the output of a command; an OutputError also if the lock cannot be made."""
    path = Path(path)
    if beside and not path.name:  # "." or "/"
        raise OutputError(f"{path} cannot be made anew; name a folder or file in it")
    if not beside and path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file, and a folder is needed; choose another output folder")
    with ExitStack() as held:
        with writing(path):
            held.enter_context(locked(path, beside=beside, wait=wait))
        yield


@contextmanager
def locked(path: Path, *, beside: bool = False, wait: float = 0.0) -> Iterator[None]:
    """Lets one process or thread at a time into the block; all of them, with a warning, if there are no locks here.

    Args:
        path: The folder that is written to; made if missing. Its lock is the file ``.lock`` in it.
        beside: Put the lock beside ``path`` (``.NAME.lock``): for a file, or a folder that appears whole.
        wait: Seconds to wait for the holder of the lock, with a warning; 0: refuse at once.
    Raises:
        OutputError: If another process or thread still holds the lock; says which, where and since when.
        OSError: If the lock cannot be made.
    """
    file = path.with_name(f".{path.name}{LOCK}") if beside else path / LOCK
    made = not file.parent.exists()
    opened = _wait(path, file, wait)
    _held.add(opened)
    try:
        yield
    finally:
        if opened in _held:  # else this is a child, see _leave_locks
            with suppress(OSError):  # its folder may be gone; a file that stays locks nothing
                file.unlink()  # while it is held: who has opened it already sees that it has no name
                if made:
                    file.parent.rmdir()  # unless something was put there
            _held.discard(opened)
            os.close(opened)


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but, perhaps, its lock."""
    return all(path.name == LOCK for path in folder.iterdir())


def earlier_record(file: Path, asked: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The record of an earlier call that asked for the same thing, or an empty dictionary; makes the folder.

    Args:
        file: JSON in the folder that a command writes, with the key "asked".
        asked: The settings that tell one call from another.
        kind: What the folder holds, such as "study".
    Raises:
        OutputError: If the folder, which is left untouched, holds the result of another call, or anything else.
    """
    folder, remedy = file.parent, "choose another output folder"
    if file.is_file() and isinstance((record := read_json(file)).get("asked"), Mapping):
        known = {key: record["asked"].get(key) for key in asked}
        differing = [
            f"another {key}" if isinstance(value, Mapping) else f"{key} {known[key]}, now {value}"
            for key, value in asked.items()
            if known[key] != value
        ]
        if differing:
            raise OutputError(f"{folder} holds another {kind} ({', '.join(differing)}); {remedy}")
        return record
    if folder.exists() and (not folder.is_dir() or not is_empty(folder)):
        raise OutputError(f"{folder} is not empty and holds no {kind}; {remedy}")
    folder.mkdir(parents=True, exist_ok=True)
    return {}


def _wait(path: Path, file: Path, seconds: float) -> int:
    """The open file of the lock, once it is ours."""
    begun, told = time.monotonic(), False
    while (opened := _take(file)) is None:
        waited = time.monotonic() - begun
        if waited >= seconds:
            raise OutputError(f"{path} is in use by {_holder(file)}; wait until it has ended, or choose another output")
        if waited >= TELL_AFTER and not told:
            told = True
            log.warning("%s is in use by %s; waiting until it is free", path, _holder(file))
        time.sleep(POLL)
    return opened


def _take(file: Path) -> int | None:
    """The open file of a lock, or None if it is someone else's."""
    while True:
        make_folder(file.parent)
        opened = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not take_lock(opened, file):
                os.close(opened)
                return None
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(opened), file.stat()):
                    me = f"process {os.getpid()} on {platform.node()} since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
                    with suppress(OSError):  # on a full disk a lock without a name is still a lock
                        os.ftruncate(opened, 0)
                        os.write(opened, me.encode())
                    return opened
        except BaseException:
            os.close(opened)
            raise
        os.close(opened)  # whoever held it has removed it since it was opened


def take_lock(opened: int, file: Path) -> bool:
    """Locks an open file; False if another process has it. True, with a warning, if the file system has no locks."""
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        if file.parent not in _told:
            _told.add(file.parent)
            log.warning("%s: no locks here (%s); make sure that nothing else writes there", file.parent, _said(error))
    return True


def _holder(file: Path) -> str:
    """Whoever holds a lock, in its own words; what is not plain text in them is left out."""
    try:
        told = file.read_bytes()[:200].decode("ascii", "ignore")
    except OSError:
        told = ""
    return "".join(filter(str.isprintable, told)) or "another process"


def _leave_locks() -> None:
    """In the child of a fork: a copy of an open file would hold the lock after its owner has ended."""
    for opened in _held:
        os.close(opened)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_locks)
