"""``muco doctor``: the facts about this machine and this installation with which a bug report should start.

MuCo's requirements are read from its installed metadata, so that there is no second list of them here.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from muco.base.machine import GIB, VERSION, installed

# Packages that MuCo runs without, and what each of them adds.
OPTIONAL = {
    "torchvision": "lets the stock sentence-transformers library load a checkpoint without muco",
    "lancedb": "muco index, muco search",
    "fastapi": "muco serve",
    "openai": "muco synth, muco data caption, muco data score",
    "daft": "muco synth; muco index in several processes",
    "ray": "the same on many machines",
    "mteb": "muco evaluate mteb; the test suite",
    "pytest": "the test suite",
    "hypothesis": "the test suite",
    "jaxtyping": "checks of tensor shapes in the test suite",
    "beartype": "checks of tensor shapes in the test suite",
    "ruff": "make check",
}


def examine() -> dict[str, Any]:
    """Versions, devices and memory of this machine, as plain JSON types.

    Returns:
        ``ok`` (every required package is there in an accepted version, and torch can be imported), ``muco``,
        ``python``, ``platform``, ``cpu_count``, ``memory_gib`` (None where the system does not tell),
        ``disk_free_gib`` (of the working directory), ``torch`` (threads, devices, or the error of its import),
        ``required`` and ``optional`` (one mapping per package).
    """
    # MuCo itself, then what it requires; the first is not met where muco is imported without being installed
    lines = metadata.requires("muco") or [] if installed("muco") else []
    required = []
    for requirement in map(Requirement, (f"muco=={VERSION}", *lines)):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            version, needs = installed(requirement.name), requirement.specifier
            ok = version is not None and needs.contains(version, prereleases=True)
            required.append({"name": requirement.name, "needs": str(needs), "installed": version, "ok": ok})
    torch = _torch()
    return {
        "ok": all(package["ok"] for package in required) and "error" not in torch,
        "muco": VERSION,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "disk_free_gib": round(shutil.disk_usage(".").free / GIB, 1),
        "torch": torch,
        "required": required,
        "optional": [{"name": name, "installed": installed(name), "gives": gives} for name, gives in OPTIONAL.items()],
    }


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB, 1)
    except (AttributeError, ValueError, OSError):  # not on Windows, and not every system knows these names
        return None


def _torch() -> dict[str, Any]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of it is missing
        return {"error": f"torch cannot be imported: {error}"}
    devices = [{"name": "cpu", "bf16": None, "memory_gib": _memory_gib()}]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = round(properties.total_memory / GIB, 1)
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        devices.append({"name": f"cuda:{index} {properties.name}", "bf16": bf16, "memory_gib": memory})
    if torch.backends.mps.is_available():
        devices.append({"name": "mps", "bf16": None, "memory_gib": None})
    return {"version": torch.__version__, "threads": torch.get_num_threads(), "devices": devices}


def print_report(found: Mapping[str, Any], console: Console) -> None:
    """Prints what :func:`examine` found as tables for people."""
    torch = found["torch"]
    names = ("python", "platform", "cpu_count", "memory_gib", "disk_free_gib")
    facts = [(name, _word(found[name], "unknown")) for name in names]
    facts += [(f"torch {name}", _word(torch[name])) for name in ("threads", "error") if name in torch]
    for device in torch.get("devices", []):
        bf16 = {True: "bfloat16", False: "no bfloat16", None: ""}[device["bf16"]]
        memory = f"{device['memory_gib']} GiB" if device["memory_gib"] else ""
        facts.append(("device", "  ".join(filter(None, (device["name"], memory, bf16)))))
    _print_table(console, "This machine", ("", ""), facts)
    required = [
        (package["name"], _word(package["installed"]), package["needs"], "" if package["ok"] else "[red]not met[/red]")
        for package in found["required"]
    ]
    _print_table(console, "\nRequired", ("package", "installed", "needs", ""), required)
    optional = [(package["name"], _word(package["installed"]), package["gives"]) for package in found["optional"]]
    _print_table(console, "\nOptional", ("package", "installed", "what it adds"), optional)
    missing = "[red]Not all requirements are met.[/red] In the folder of MuCo: pip install -c constraints.txt -e ."
    console.print("\nAll requirements are met." if found["ok"] else f"\n{missing}")


def _print_table(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(*columns, title=title, title_justify="left", show_header=any(columns), box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _word(value: object, absent: str = "missing") -> str:
    return absent if value is None else escape(str(value))
