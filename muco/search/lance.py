"""What LanceDB raises, as sentences. It tells apart by words only whether files, a filter or a call are at fault."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from muco.errors import MucoError, StorageError

FILES = ("LanceError(IO)", "LanceError(Arrow)", "Not found", "os error", "panicked", "Lance file")  # in errors of files
FILTER = "sql filter"  # in errors of a filter, whatever else they say


@contextmanager
def lance_calls(path: str | Path, where: str | None = None) -> Iterator[None]:
    """Put every call of LanceDB, and the reading of what it gives, into this block.

    Args:
        path: The index.
        where: The user's filter, if the call has one.
    Raises:
        StorageError: If files of the index are missing or were cut, or cannot be written.
        MucoError: If LanceDB refuses the filter.
    """
    import pyarrow as pa

    try:
        yield
    except MucoError:
        raise
    except (RuntimeError, ValueError, OSError, pa.ArrowException) as error:
        if (
            where
            and not isinstance(error, OSError)
            and (FILTER in str(error) or not any(w in str(error) for w in FILES))
        ):
            raise MucoError(f"the filter cannot be used: {_reason(error)}") from error
        raise StorageError(f"{path}: {_told(error)}") from error


def _told(error: Exception) -> str:
    """What is wrong with an index, and what to do."""
    if refused := re.search(r"([^:()]+) \(os error \d+\)", str(error)):
        return f"the index cannot be written ({refused[1].strip()}); make room or change that, and start again"
    if isinstance(error, OSError) and error.errno:
        return f"the index cannot be used ({os.strerror(error.errno)}); change that, or name another"
    return (
        f"the index cannot be read ({_reason(error)}); files of it are missing, damaged or cut: copy it again, or "
        "delete it and make it anew"
    )


def _reason(error: Exception) -> str:
    """The first sentence of LanceDB's error, without what it says about its own source."""
    text = " ".join(str(error).split()).removeprefix("Invalid input, ").removeprefix("lance error: ")
    return re.split(r", /(?:rustc|root)/", text, maxsplit=1)[0][:200]
