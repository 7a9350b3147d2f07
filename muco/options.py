"""What the commands share: options, and how they answer. No torch in this file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from muco.base.json_text import json_text

if TYPE_CHECKING:
    from rich.console import Console

USERS_INPUT, FAILED_CHECK = 1, 3

Model = Annotated[
    str, typer.Option("--model", "-m", help="Folder of a trained model, or its id on the Hugging Face hub.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON line on stdout.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Inputs per forward pass; does not change the result.")]
Dimension = Annotated[
    int | None,
    typer.Option(min=1, help="Cut vectors to their first so many numbers, for models trained with loss.dimensions."),
]


def examples(*lines: str) -> str:
    return "\n".join(("\b", "Examples:", *(f"  {line}" for line in lines)))  # \b keeps the lines as they are


def finish(result: Any, as_json: bool, show: Callable[[Any, Console], None]) -> None:
    """Prints a result on stdout: one JSON line for programs, or a table for people."""
    if as_json:
        print_json(result)
        return
    from rich.console import Console

    show(result, Console(file=sys.stdout))


def print_json(result: Any) -> None:
    """One line of JSON on stdout."""
    print(json_text(result))


def print_pairs(result: Mapping[str, Any], console: Console) -> None:
    """One line per key."""
    width = max(map(len, result))
    for key, value in result.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{name}: {inner}" for name, inner in value.items()) or None
        console.print(f"{key:<{width}}  {value}", markup=False, highlight=False, soft_wrap=True)
