"""Every exception a user of MuCo can cause; ``str(error)`` is a sentence that says what, where and what to do.

::

    MucoError                 base: str(error) is a sentence that says what, where and what to do
    ├── DataError             a file, row, turn or image of the data is not as it must be
    │   └── ImageError        an image is missing, broken, too large or not an image
    ├── RecipeError           a recipe has an unknown key, a wrong type or a contradiction
    ├── CheckpointError       a model folder is incomplete or belongs to something else
    ├── OutputError           an output cannot be written, is in use, or already holds other work
    ├── StorageError          an index is damaged, or its files cannot be read or written (muco/search/lance.py)
    ├── FetchError            a download was refused or failed (muco/base/fetch.py)
    ├── EndpointError         a model server is missing or of no use (muco/synth/chat.py)
    ├── RequestError          a request to the server is not as it must be (muco/serve/schema.py)
    └── TrainingError         training cannot continue: the loss is not finite, or memory ran out

All of them are also :class:`ValueError`, so that callers who know nothing of MuCo can catch them. The command line
turns them into one line on stderr and exit code 1; anything else is a defect and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MucoError(ValueError):
    """Base of all errors that a user can cause and fix."""


class DataError(MucoError):
    """Data is not as it must be; the message names file, row and turn where they are known."""


class ImageError(DataError):
    """An image is missing, truncated, too large or not an image; the message names the file."""


class RecipeError(MucoError):
    """A recipe cannot be used; the message names the key and the nearest accepted one."""


class CheckpointError(MucoError):
    """A checkpoint lacks weights, has unexpected ones, or was made with other code or data."""


class OutputError(MucoError):
    """An output cannot be written, is in use by another process, or would replace what is already there."""


class StorageError(MucoError):
    """The files of an index are missing, damaged or cut, or cannot be written; the message names the index."""


class TrainingError(MucoError):
    """Training cannot continue; the message names the step, and what to change."""


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """The end of a sentence that refuses a word: "; did you mean 'x'?", or "; accepted are a, b, c" if none is near."""
    accepted = list(known)
    near = difflib.get_close_matches(str(word), accepted, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; accepted are {', '.join(accepted) or 'none'}"
