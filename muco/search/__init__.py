"""A searchable index of images and texts on LanceDB: ``muco index`` fills it, ``muco search`` and the server read it.

::

    input ─rows.py─▶ rows with hashes ─update.py─▶ new ones ─encode.py─▶ vectors ─storage.py─▶ table.py
    text, image, row, vector ─index.py─▶ candidates of the table ─▶ scored again ─▶ hits
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from muco.search.index import Hit, Index
    from muco.search.update import build

__all__ = ["Hit", "Index", "build"]

_HOME = {"Hit": "muco.search.index", "Index": "muco.search.index", "build": "muco.search.update"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'muco.search' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
