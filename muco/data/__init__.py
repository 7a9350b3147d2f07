"""Data sources. All of them yield :class:`muco.dialogue.Sample`; ``open_data`` finds the right one for a path."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from muco.dialogue import Sample
from muco.errors import DataError

__all__ = ["Data", "open_data"]


class Data(Protocol):
    """What every source offers, and all that training and evaluation ask of one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all that matters: the rows and the contents of the image files."""
        ...


def open_data(path: str | Path) -> Data:
    """Opens a ``.jsonl`` file, or a folder that holds exactly one.

    Raises:
        DataError: If the path is missing, of another kind, or a folder with no or several ``.jsonl`` files.
    """
    path = Path(path)
    if path.is_dir():
        path = _only_jsonl(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if path.suffix != ".jsonl":
        raise DataError(f"{path}: unknown kind of data; give a .jsonl file or a folder that holds one")
    from muco.data.jsonl import JsonlData

    return JsonlData(path)


def _only_jsonl(folder: Path) -> Path:
    found = sorted(folder.glob("*.jsonl"))
    if len(found) == 1:
        return found[0]
    if not found:
        raise DataError(f"{folder}: the folder holds no .jsonl file")
    names = ", ".join(path.name for path in found[:5]) + (", …" if len(found) > 5 else "")
    raise DataError(f"{folder}: the folder holds {len(found)} .jsonl files ({names}); give one of them")
