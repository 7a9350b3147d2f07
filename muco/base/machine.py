"""This machine, and the versions of what runs on it."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VERSION = "0.1.0"
GIB = 1 << 30  # bytes
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT_BLOCK, KEPT = GIB, 2 * GIB - 1  # bytes; the second is the most that glibc takes


def usable_cores() -> int:
    """Cores that this process may use, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_host_memory() -> int:
    """The most memory that this process has held, in bytes."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def keep_freed_memory() -> bool:
    """Lets this process keep memory that it frees for the next use; whether it does.

    torch frees what a layer made, and the C library hands blocks of more than 32 MiB back to the system, which clears
    them again for the next layer: half of the time of encoding pictures (benchmarks/results/freed-memory.json). Blocks
    of more than 1 GiB are still handed back, and what is free beyond 2 GiB. Left alone where the environment sets the C
    library's memory (``MALLOC_…``, ``GLIBC_TUNABLES``), and where it is not glibc.
    """
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    import ctypes

    option = getattr(ctypes.CDLL(None), "mallopt", None)  # not in other C libraries; 1: done
    return option is not None and option(M_MMAP_THRESHOLD, KEPT_BLOCK) == 1 and option(M_TRIM_THRESHOLD, KEPT) == 1


def leave_out_of_collections() -> None:
    """Takes all objects of this process out of later garbage collections.

    With torch and transformers imported, a full collection takes a quarter of a second, in which a server answers
    nothing.
    """
    gc.collect()
    gc.freeze()


def machine() -> dict[str, Any]:
    """Processor, cores, threads of torch, device and system of this machine, as JSON; the processor may be unknown."""
    import platform

    import torch

    return {
        "processor": processor(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "system": platform.platform(),
    }


def processor() -> str | None:
    """The name of the processor, or None."""
    import platform

    if (cpuinfo := Path("/proc/cpuinfo")).is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or None


def machine_in_words(found: Mapping[str, Any]) -> str:
    """What a result was made on, from :func:`machine`: the device and the cores."""
    name = found["processor"] if found["device"] == "cpu" else found["device"]
    return f"{name or 'an unnamed processor'} ({found['cores']} core{'s' if found['cores'] > 1 else ''})"


def versions() -> dict[str, str | None]:
    """Versions of what computed a result, without importing it; None: not installed."""
    import platform

    names = ("muco", "torch", "transformers", "sentence-transformers", "peft", "numpy", "pillow")
    return {"python": platform.python_version()} | {name: installed(name) for name in names}


def versions_in_words(found: Mapping[str, str | None]) -> str:
    return ", ".join(f"{name} {number}" for name, number in found.items() if number)


def installed(package: str) -> str | None:
    """The installed version of a package, without importing it; None: not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None
