"""This machine, and the versions of what runs on it."""

from __future__ import annotations

import os

VERSION = "0.1.0"
GIB = 1 << 30  # bytes


def usable_cores() -> int:
    """Cores that this process may use, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str | None]:
    """Versions of what computed a result, without importing it; None: not installed."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("muco", "torch", "transformers", "sentence-transformers", "peft", "numpy", "pillow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
