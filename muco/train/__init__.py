"""Training: recipe, mixture, trainer, checkpoint. Also a function: ``muco.train(recipe)``.

Importing ``muco.train.recipe`` binds the package to the name ``muco.train``, whatever stood there before. So that
``muco.train`` is one object with one meaning in every order of imports, the package itself can be called.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from muco.train.recipe import Recipe


class _TrainPackage(ModuleType):
    def __call__(self, recipe: Recipe, *, resume: bool = True) -> Path:
        """Trains as the recipe says and returns the folder of the model; :func:`muco.train.trainer.train`."""
        from muco.train.trainer import train

        return train(recipe, resume=resume)


sys.modules[__name__].__class__ = _TrainPackage
