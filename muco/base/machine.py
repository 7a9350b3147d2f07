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

    names = ("muco", "torch", "transformers", "sentence-transformers", "peft", "numpy", "pillow")
    return {"python": platform.python_version()} | {name: installed(name) for name in names}


def installed(package: str) -> str | None:
    """The installed version of a package, without importing it; None: not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None
