"""``muco evaluate mteb``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Context, Option

from muco.base.terminal import finish, progress_bar
from muco.cli import options
from muco.cli.options import BatchSize, Dimension, Json, Model


def mteb(
    context: Context,
    model: Model,
    output: Annotated[Path, Option("--output", "-o", help="Folder for scores and mteb's own results; runs resume.")],
    benchmark: Annotated[
        str | None, Option("--benchmark", "-b", metavar="NAME", help="Of mteb, such as 'ViDoRe(v2)' or 'MIEB(eng)'.")
    ] = None,
    task: Annotated[
        list[str], Option(metavar="NAME", help="A task of mteb, in place of a benchmark; may be repeated.")
    ] = [],  # noqa: B006
    batch_size: BatchSize = 64,
    dimension: Dimension = None,
    instructions: Annotated[
        bool,
        Option("--instructions/--no-instructions", help="Put a task's own prompt before its queries; see the docs."),
    ] = True,
    allow_missing: options.AllowMissing = False,
    device: Annotated[str | None, Option(help='"cpu", "cuda", "cuda:1", …; default: the best one available.')] = None,
    as_json: Json = False,
) -> None:
    """Score ViDoRe, MIEB and other tasks of the mteb package.

    Data come from the hub, as mteb loads them, and images keep the model's own sizes. What is done for the same model,
    settings and data is not repeated. Writes mteb.json beside mteb's own files.
    """
    from muco.base.files import claimed
    from muco.evaluate.mteb_run import evaluate_mteb, named_tasks
    from muco.evaluate.report import print_mteb
    from muco.model import load
    from muco.seen import IMAGE_MEMORY
    from muco.training.recipe import trained_dimensions

    tasks = named_tasks(benchmark, task)  # before the model: a mistyped name should not cost a minute
    encoder = load(model, device=device, image_memory=IMAGE_MEMORY)
    with claimed(output), progress_bar("tasks") as progress:
        result = evaluate_mteb(
            encoder,
            tasks,
            output,
            batch_size=batch_size,
            instructions=instructions,
            dimension=dimension,
            dimensions=trained_dimensions(model),
            allow_missing=allow_missing,
            progress=progress,
            command=context.obj,
            model_path=model,
        )
    finish(result, as_json, print_mteb)
