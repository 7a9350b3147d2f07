"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

USERS_INPUT, FAILED_CHECK = 1, 3  # exit codes

Model = Annotated[
    str, typer.Option("--model", "-m", help="Folder of a trained model, or its id on the Hugging Face hub.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON line on stdout.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Inputs per forward pass; does not change the result.")]
Dimension = Annotated[
    int | None,
    typer.Option(min=1, help="Cut vectors to their first N dimensions, for models trained with loss.dimensions."),
]
Precision = Literal["float32", "int8", "binary"]


def examples(*lines: str) -> str:
    return "\n".join(("\b", "Examples:", *(f"  {line}" for line in lines)))  # \b keeps the lines as they are
