"""MuCo: multi-turn contrastive training of multimodal embedding models.

Names that need torch are loaded on first use, so that ``import muco`` costs milliseconds. README.md shows them at work.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from muco.base.machine import VERSION
from muco.dialogue import Content, Dialogue, Sample, Turn, Video
from muco.errors import (
    CheckpointError,
    DataError,
    ImageError,
    MucoError,
    OutputError,
    RecipeError,
    StorageError,
    TrainingError,
)

if TYPE_CHECKING:
    from muco.info_nce import multi_turn_info_nce, reconstruction_info_nce
    from muco.model import load
    from muco.training.recipe import Recipe
    from muco.training.trainer import train

__version__ = VERSION

_HOME = {
    "load": "muco.model",
    "multi_turn_info_nce": "muco.info_nce",
    "reconstruction_info_nce": "muco.info_nce",
    "Recipe": "muco.training.recipe",
    "train": "muco.training.trainer",
}

__all__ = [
    "CheckpointError",
    "Content",
    "DataError",
    "Dialogue",
    "ImageError",
    "MucoError",
    "OutputError",
    "StorageError",
    "Recipe",
    "RecipeError",
    "Sample",
    "TrainingError",
    "Turn",
    "Video",
    "load",
    "multi_turn_info_nce",
    "reconstruction_info_nce",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'muco' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
