"""Every exception a user of MuCo can cause; ``str(error)`` is a sentence that says what, where and what to do.

Three more are next to what raises them: FetchError (muco/base/fetch.py), EndpointError (muco/synth/limits.py) and
RequestError (muco/serve/schema.py). All are also :class:`ValueError`, so that callers who know nothing of MuCo can
catch them. The command line turns them into one line on stderr and exit code 1; anything else is a defect and keeps its
traceback.
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
