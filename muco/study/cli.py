"""``muco study``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from muco.options import Json, finish


def study(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The study: finetune or negatives.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for data, runs and the page.")],
    seeds: Annotated[int, typer.Option(min=1, help="Seeds per run; more can be added later.")] = 3,
    scale: Annotated[float, typer.Option(help="Of data and steps: 0.1 to try it in a tenth of the time.")] = 1.0,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, which share the cores.")] = 1,
    as_json: Json = False,
) -> None:
    """Repeat a claim of the paper at this machine's scale.

    Trains and scores every run of the study with several seeds and writes a table, a plot and a page. Give the same
    command again after an interruption, or with more seeds: only what is missing is run.
    """
    from muco.study.report import print_study, table_as_json, write_report
    from muco.study.run import run_study
    from muco.study.studies import find_study

    chosen = find_study(name)
    found = run_study(chosen, output, seeds=seeds, scale=scale, jobs=jobs)
    page = write_report(chosen, found, output, context.obj)
    if as_json:
        found = {"study": name, "page": str(page), "table": table_as_json(chosen, found)}
    finish(found, as_json, lambda value, console: print_study(chosen, value, console))
