"""Data sources. All of them yield :class:`muco.dialogue.Sample`; ``open_data`` finds the right one for a path."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

from muco.data.source import Data
from muco.errors import DataError, did_you_mean

__all__ = ["FORMATS", "Data", "open_data"]


FORMATS = {  # name in recipes and on the command line -> where its class is
    "jsonl": ("muco.data.jsonl", "JsonlData"),
    "m3t": ("muco.data.m3t", "M3TData"),
    "mmeb": ("muco.data.mmeb", "MMEBTrainData"),
    "mbeir": ("muco.data.mbeir", "MBEIRTrainData"),
    "pairs": ("muco.data.pairs", "PairsData"),
    "llava": ("muco.data.conversations", "LlavaData"),
    "visdial": ("muco.data.conversations", "VisDialData"),
    "webdataset": ("muco.data.shards", "ShardsData"),
}


def open_data(path: str | Path, format: str = "jsonl", options: Mapping[str, Any] | None = None) -> Data:
    """Opens a training or evaluation set.

    Args:
        path: For "jsonl" a ``.jsonl`` file, or a folder that holds exactly one; else what the format's class says.
        format: One of ``FORMATS``.
        options: Further arguments of the format's class, as its docstring says: the folder of images, columns, a split.
            ``captions`` goes with all formats: a file that ``muco data caption`` wrote.
    Raises:
        DataError: If the path is missing or of another kind, or the format or an option unknown.
    """
    if format not in FORMATS:
        raise DataError(f"{path}: unknown format {format!r}{did_you_mean(format, FORMATS)}")
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    module, name = FORMATS[format]
    kind = getattr(import_module(module), name)
    accepted = [*signature(kind).parameters][1:]  # the first is the path
    own = dict(options or {})
    captions = own.pop("captions", None)
    if unknown := [option for option in own if option not in accepted]:
        hint = did_you_mean(unknown[0], accepted)
        raise DataError(f"{path}: unknown option {unknown[0]!r} of the format {format!r}{hint}")
    if format == "jsonl":
        path = _jsonl_file(path)
    try:
        data = kind(path, **own)
    except TypeError as error:  # an option that is needed, or a list where a word belongs
        raise DataError(f"{path}: options of the format {format!r}: {error}") from error
    if not captions:
        return data
    from muco.data.captions import CaptionedData

    return CaptionedData(data, captions)


def _jsonl_file(path: Path) -> Path:
    if not path.is_dir():
        if path.suffix == ".jsonl":
            return path
        raise DataError(
            f"{path}: unknown kind of data; pass a .jsonl file or a folder that holds one, or name its format: "
            f"{', '.join(FORMATS)}"
        )
    found = sorted(path.glob("*.jsonl"))
    if len(found) == 1:
        return found[0]
    if not found:
        raise DataError(f"{path}: the folder holds no .jsonl file")
    names = ", ".join(file.name for file in found[:5]) + (", …" if len(found) > 5 else "")
    raise DataError(f"{path}: the folder holds {len(found)} .jsonl files ({names}); pass one of them")
