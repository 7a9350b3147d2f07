"""Daft, which spreads work over this machine or a Ray cluster."""

from __future__ import annotations

import os
from typing import Any

from muco.errors import MucoError


def daft_on(ray: str | None, extra: str) -> Any:
    """The module daft with its native runner, or that of a Ray cluster at this address; else a MucoError."""
    os.environ.setdefault("DAFT_PROGRESS_BAR", "0")  # there is one of ours
    try:
        import daft
    except ImportError as error:
        raise MucoError(f"this needs the package daft: pip install 'muco[{extra}]'") from error
    try:
        daft.set_runner_native() if ray is None else daft.set_runner_ray(ray)
    except ImportError as error:
        raise MucoError("a Ray cluster needs Ray: pip install 'daft[ray]'") from error
    except daft.exceptions.DaftCoreException as error:  # it can be set once in a process
        if daft.get_or_infer_runner_type() != ("native" if ray is None else "ray"):
            raise MucoError(f"Daft cannot be used here ({error}); start another process") from error
    return daft
