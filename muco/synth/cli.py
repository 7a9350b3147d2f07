"""The options of the commands that ask a model server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from muco.synth.limits import KEY_VARIABLE as KEY_VARIABLE

Concurrency = Annotated[int, typer.Option(min=1, help="Requests under way at once, for each model.")]
Rate = Annotated[
    float | None, typer.Option("--requests-per-minute", min=0.001, help="Pace of the requests, for each model.")
]
Timeout = Annotated[float, typer.Option(min=0.001, help="Seconds for one request.")]
Retries = Annotated[int, typer.Option(min=0, help="How often a request that failed is sent again.")]
MaxFailures = Annotated[int, typer.Option(min=1, help="Stop when so many answers in a row are of no use.")]
MaxRequests = Annotated[
    int | None, typer.Option(min=1, help="Stop after so many requests; the same command goes on from there.")
]
MaxTokens = Annotated[
    int | None, typer.Option(min=1, help="Stop after so many tokens, read and written; the same command goes on.")
]
MaxPixels = Annotated[int, typer.Option(min=784, help="Larger images are sent smaller.")]
KeyVariable = Annotated[
    str, typer.Option("--key-variable", metavar="NAME", help="Environment variable that holds the API key, if any.")
]
PromptsFile = Annotated[
    Path | None,
    typer.Option("--prompts", metavar="FILE.yaml", help="Wordings of your own; muco/synth/prompts.py has the keys."),
]
_SAMPLING = "Field of the requests, e.g. temperature=0.3; null leaves it out; may be repeated, value in YAML."
Sampling = Annotated[list[str], typer.Option("--sampling", metavar="KEY=VALUE", help=_SAMPLING)]


def sampling_of(words: list[str], **defaults: Any) -> dict[str, Any]:
    """The sampling that the options change the defaults to."""
    from muco.train.recipe import parse_options

    return defaults | parse_options(words)
