"""This machine, and the versions of what runs on it."""

from __future__ import annotations

VERSION = "0.1.0"


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
