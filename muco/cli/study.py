"""``muco study``."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

from typer import Argument, BadParameter, Context, Option

from muco.base.terminal import finish, print_pairs
from muco.cli.options import Json
from muco.errors import MucoError


def study(
    context: Context,
    name: Annotated[str | None, Argument(metavar="[NAME]", help="The study; without a name, all are listed.")] = None,
    output: Annotated[
        Path | None, Option("--output", "-o", metavar="DIR", help="Folder for data, runs and the page.")
    ] = None,
    seeds: Annotated[int | None, Option(min=1, help="Seeds per run, 3 or 8 by the study; more can come later.")] = None,
    first_seed: Annotated[int, Option(min=0, help="First seed; use fresh ones for a second look.")] = 0,
    scale: Annotated[float, Option(help="Scale of data and steps: 0.1 takes a tenth of the time.")] = 1.0,
    jobs: Annotated[int, Option(min=1, help="Simultaneous runs, which share the cores.")] = 1,
    data: Annotated[str | None, Option(metavar="TRAIN", help="Training data instead of scenes; needs --test.")] = None,
    test: Annotated[str | None, Option(metavar="TEST", help="Held-out data that goes with --data.")] = None,
    dev: Annotated[
        str | None, Option(metavar="DEV", help="Data to choose settings on, for a study that chooses them.")
    ] = None,
    model: Annotated[
        str | None, Option(metavar="MODEL", help="The model that every run of such a study starts from.")
    ] = None,
    format: Annotated[str, Option(help="Format of --data, --test and --dev, as in recipes.")] = "jsonl",
    as_json: Json = False,
) -> None:
    """Repeat a claim of the paper at this machine's scale.

    Trains and scores every run of the study with several seeds and writes a table, a plot and a page. Run the same
    command again after an interruption, or with more seeds: it runs only what is missing. Without a name it lists the
    studies and their questions.
    """
    from muco.study.studies import FLOPS, find_study, questions

    if name is None:
        finish(questions(), as_json, print_pairs)
        return
    if output is None:
        raise BadParameter("pass a folder for data, runs and the page", param_hint="--output")
    if (data is None) != (test is None):
        raise BadParameter("--data and --test go together", param_hint="--data")
    if data is None and (dev, model) != (None, None):
        raise BadParameter("--dev and --model go with --data", param_hint="--dev" if dev else "--model")
    if name == FLOPS:
        if (seeds, data) != (None, None) or scale != 1 or first_seed > 0:
            raise MucoError("the study flops counts and trains nothing; leave out --seeds, --scale, --data and --test")
        from muco.study.true_sizes import print_flops, run_flops

        finish(run_flops(output, context.obj), as_json, print_flops)
        return

    from muco.study.design import Sets
    from muco.study.report import print_study, table_as_json, write_report
    from muco.study.run import run_study

    chosen = find_study(name)
    sets = Sets(data, test, format, dev, model) if data is not None and test is not None else None
    # Else it would end at once and leave the trainings that it has started.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    found = run_study(
        chosen, output, seeds=seeds or chosen.seeds, first_seed=first_seed, scale=scale, jobs=jobs, sets=sets
    )
    page = write_report(chosen, found, output, context.obj)
    if as_json:
        found = {"study": name, "page": str(page), "table": table_as_json(chosen, found)}
    finish(found, as_json, lambda value, console: print_study(chosen, value, console))
