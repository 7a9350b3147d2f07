"""In which precision a model computes: as its weights are, as asked, or the quicker of two by measurement.

In bfloat16 torch's autocast computes the products of matrices. Weights, vectors and loss stay in float32, so a vector
differs by rounding alone; how much, :mod:`muco.export` measures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # a recipe is read without torch
    import torch

Precision = Literal["auto", "float32", "bfloat16"]
TIMED = 2  # passes of each that are timed, after one that is not
WORTH = 0.95  # bfloat16 is taken if it needs at most this share of the time: less may be noise


@dataclass(frozen=True)
class Choice:
    """A precision and why it was chosen.

    Attributes:
        bfloat16: Whether to compute in bfloat16.
        seconds: Of one pass, by precision.
    """

    bfloat16: bool
    seconds: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        name, other = ("bfloat16", "float32") if self.bfloat16 else ("float32", "bfloat16")
        return f"{name}, measured: {self.seconds[name]:.2g} s a pass; {other} takes {self.seconds[other]:.2g} s"


def autocast(bfloat16: bool | None, device: torch.device) -> AbstractContextManager[Any]:
    """The context of a pass in bfloat16, in the precision of the weights, or (None) in that of whoever calls."""
    if bfloat16 is None:
        return nullcontext()
    import torch

    return torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)


def quicker(work: Callable[[bool], object], device: torch.device) -> Choice:
    """Does the same ``work`` in bfloat16 (True) and in float32 (False), in turns; the fastest pass of each counts.

    float32 is taken unless bfloat16 is clearly quicker.
    """
    import torch

    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(1 + TIMED):
        for bfloat16, taken in seconds.items():
            begun = time.perf_counter()
            work(bfloat16)
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            taken.append(time.perf_counter() - begun)
    best = {name: min(seconds[value][1:]) for name, value in (("float32", False), ("bfloat16", True))}
    return Choice(best["bfloat16"] <= WORTH * best["float32"], best)
