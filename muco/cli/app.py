"""The command line. Every command imports what it needs in its function, so that help and usage errors come at once.

Results for other programs (``--json``, and those of train) are JSON lines on stdout; progress and logs go to stderr.
Exit codes: 0 done, 1 the user's input, 2 usage, 3 a failing check, 130 interrupted.
"""

from __future__ import annotations

import errno
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from typer import Argument, BadParameter, Exit, Option, Typer
from typer.main import get_command

from muco.base.machine import VERSION, keep_freed_memory
from muco.base.terminal import finish, print_json, print_pairs
from muco.base.text import LONE_SURROGATE, escape_what_streams_cannot_write, escaped
from muco.cli import options
from muco.cli.data import app as data_app
from muco.cli.evaluate import app as evaluate_app
from muco.cli.options import USERS_INPUT, BatchSize, Dimension, Json, Model, examples, finish_check
from muco.cli.search import INDEX_EXAMPLES, SEARCH_EXAMPLES, index, search
from muco.cli.serve import SERVE_EXAMPLES, serve
from muco.cli.starter import STARTER_EXAMPLES, starter
from muco.cli.study import study
from muco.cli.synth import SYNTH_EXAMPLES, synth
from muco.errors import MucoError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

app = Typer(
    name="muco",
    help="Train, evaluate and use multimodal embedding models by multi-turn contrast.",
    epilog=examples("muco demo", "muco train recipe.yaml --set loss.temperature=0.05", "muco COMMAND --help"),
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain pages: examples stay on one line and can be copied
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(evaluate_app, name="evaluate")
app.add_typer(data_app, name="data")
app.command(
    epilog=examples("muco study finetune --output runs/finetune", "muco study finetune -o quick --scale 0.02 --seeds 2")
)(study)
app.command(epilog=INDEX_EXAMPLES)(index)
app.command(epilog=SEARCH_EXAMPLES)(search)
app.command(epilog=SERVE_EXAMPLES)(serve)
app.command(epilog=STARTER_EXAMPLES)(starter)
app.command(epilog=SYNTH_EXAMPLES)(synth)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"muco {VERSION}")
        raise Exit


@app.callback()
def _root(
    version: Annotated[
        bool, Option("--version", is_eager=True, callback=_show_version, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(
    epilog=examples(
        "muco train recipe.yaml",
        "muco train recipe.yaml --set turns.mode=compounded --output runs/compounded",
        "muco train recipe.yaml --print",
        "muco train recipes/paper_pretrain_qwen2_vl_7b.yaml --dry-run --devices 8",
    )
)
def train(
    recipe: Annotated[Path, Argument(metavar="RECIPE.yaml", help="Model, data, turns, loss, batch and trainer.")],
    set_: Annotated[list[str], Option("--set", metavar="KEY=VALUE", help="Set a recipe value; may be repeated.")] = [],  # noqa: B006
    print_: Annotated[bool, Option("--print", help="Print the resolved recipe as YAML and stop.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Only report what a run takes and what would stop it.")] = False,
    devices: Annotated[int, Option(min=1, help="With --dry-run: processes, with a device each.")] = 1,
    as_json: Json = False,
    output: Annotated[Path | None, Option(help="Folder to write; overrides the recipe's output.")] = None,
    resume: Annotated[
        bool, Option(help="Resume from the last checkpoint in the output folder; otherwise an earlier run is an error.")
    ] = True,
) -> None:
    """Train a model from a recipe.

    Run the same command again to resume an interrupted run from its last checkpoint. Prints the model's folder. On
    several devices: torchrun --nproc-per-node 8 -m muco train RECIPE.yaml

    A dry run reads some samples and prints parameters, tokens, memory and steps, and for Qwen2-VL operations. It exits
    with 3 if something would stop the run.
    """
    from muco.training.recipe import dump_recipe, load_recipe

    overrides = [*set_, *([f"output={escaped(json.dumps(str(output), ensure_ascii=False))}"] if output else [])]
    resolved = load_recipe(recipe, overrides)
    if print_:
        print(dump_recipe(resolved), end="")
        return
    if dry_run:
        from muco.training.plan import plan, print_plan

        found = plan(resolved, devices=devices)
        return finish_check(found, as_json, print_plan, not found["problems"])
    from muco import distributed
    from muco.training.trainer import train

    folder = train(resolved, resume=resume)
    if distributed.rank() == 0:  # one of several processes prints
        print_json({"model": str(folder)})


@app.command(
    epilog=examples(
        "muco embed photos/ --model starter --output photos.parquet",
        "muco embed rows.jsonl --model runs/first/model --output rows.parquet --batch-size 64",
    )
)
def embed(
    input: Annotated[Path, Argument(metavar="INPUT", help="Folder of images, .jsonl or .parquet file.")],
    model: Model,
    output: Annotated[
        Path, Option("--output", "-o", metavar="FILE.parquet", help="File to write: id, embedding, text, image.")
    ],
    batch_size: BatchSize = 32,
    dimension: Dimension = None,
    precision: options.ComputeIn = None,
    text_column: options.TextColumn = "text",
    image_column: options.ImageColumn = "image",
    id_column: options.IdColumn = "id",
    resume: Annotated[bool, Option(help="Resume an interrupted run; otherwise start again.")] = True,
    as_json: Json = False,
) -> None:
    """Embed images or rows into a Parquet file.

    Inputs that cannot be read are listed and left out. Run the same command again to resume an interrupted run.
    """
    from muco.embed import embed

    summary = embed(
        input,
        model,
        output,
        batch_size=batch_size,
        dimension=dimension,
        precision=precision,
        resume=resume,
        text_column=text_column,
        image_column=image_column,
        id_column=id_column,
    )
    finish(summary, as_json, print_pairs)


@app.command(
    epilog=examples(
        "muco demo", "muco demo --output runs/quick --steps 100 --train 2000", "muco demo --pictures ~/Pictures"
    )
)
def demo(
    output: Annotated[
        Path | None, Option("--output", "-o", help="Folder for all that is made (runs/demo; of pictures runs/search).")
    ] = None,
    steps: Annotated[int | None, Option(min=1, help="Training steps; fewer are faster and worse.")] = None,
    train: Annotated[int | None, Option(min=1, help="Scenes to train on (20,000).")] = None,
    test: Annotated[int | None, Option(min=2, help="Held-out scenes to score and search (500).")] = None,
    seed: Annotated[int | None, Option(min=0, help="Of the scenes (0).")] = None,
    pictures: Annotated[
        Path | None, Option(metavar="FOLDER", help="Search these pictures with the starter; train nothing.")
    ] = None,
) -> None:
    """Train and search on this machine.

    Makes the built-in scenes, trains a small model, evaluates it before and after, embeds and searches the held-out
    images, and writes one self-contained report.html. Run the same command again to resume after an interruption.
    """
    asked = {"steps": steps, "train": train, "test": test, "seed": seed}
    given = {name: number for name, number in asked.items() if number is not None}
    if pictures:
        if given:
            raise BadParameter("--pictures trains nothing: leave out --steps, --train, --test and --seed")
        from muco.search.sheet import search_folder

        print(search_folder(pictures, output or Path("runs/search")))
        return
    from muco.demo import run_demo

    print(run_demo(output or Path("runs/demo"), **given))


@app.command(
    epilog=examples(
        "muco export runs/first/model --output exported",
        "muco export runs/first/model --format vllm --dtype bfloat16 --output served",
        "muco export runs/first/checkpoints/checkpoint-500 --adapters separate --output adapters",
    )
)
def export(
    model: Annotated[str, Argument(metavar="MODEL", help="A model's folder, a hub id, or a checkpoint of a run.")],
    output: Annotated[Path, Option("--output", "-o", metavar="DIR", help="Folder to create; it must not exist.")],
    format: Annotated[str, Option(help="sentence-transformers or vllm.")] = "sentence-transformers",
    adapters: Annotated[str, Option(help="merged into the weights, or separate (MODEL: a checkpoint).")] = "merged",
    dtype: Annotated[str | None, Option(help="float32, bfloat16 or float16; by default the model's own.")] = None,
    push: Annotated[str | None, Option(metavar="NAMESPACE/NAME", help="Push to this Hugging Face repository.")] = None,
    as_json: Json = False,
) -> None:
    """Write a model for other libraries, and check it.

    Plain transformers embeds texts and images from the new folder, which gets its name only if the vectors are the
    model's own. Exit code 3 if they are not.
    """
    from muco.export import export

    found = export(model, output, format=format, adapters=adapters, dtype=dtype, push=push)
    finish_check(found, as_json, print_pairs, found["ok"])


@app.command(
    epilog=examples(
        "muco merge runs/a/model runs/b/model --output merged",
        "muco merge runs/a/model runs/b/model --weights 0.7,0.3 --method slerp --output merged",
        "muco merge runs/a/model runs/b/model --method task-arithmetic --base start --output merged",
    )
)
def merge(
    models: Annotated[list[str], Argument(metavar="MODEL...", help="Folders, hub ids, or checkpoints of runs.")],
    output: Annotated[Path, Option("--output", "-o", metavar="DIR", help="Folder to create; it must not exist.")],
    weights: Annotated[str | None, Option(metavar="W,W…", help="One per model; by default all the same.")] = None,
    method: Annotated[str, Option(help="mean, slerp (of two models) or task-arithmetic.")] = "mean",
    base: Annotated[str | None, Option(metavar="MODEL", help="What all began from, for task-arithmetic.")] = None,
    as_json: Json = False,
) -> None:
    """Make one model of several, by their weights.

    All must be of the same kind: architecture, tokenizer, prompt and pixels. Adapters are folded in first.
    """
    from muco.export.merge import merge

    try:
        numbers = None if weights is None else [float(weight) for weight in weights.split(",")]
    except ValueError as error:
        raise BadParameter(f"--weights are numbers with commas between them, such as 0.7,0.3; not {weights}") from error
    found = merge(models, output, weights=numbers, method=method, base=base)
    finish(found, as_json, print_pairs)


@app.command(epilog=examples("muco doctor", "muco doctor --json"))
def doctor(as_json: Json = False) -> None:
    """Show versions, devices and what is missing.

    Exit code 3 if a requirement is not met.
    """
    from muco.cli.doctor import examine, print_report

    found = examine()
    finish_check(found, as_json, print_report, found["ok"])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line on ``argv`` (by default the process's arguments) and returns the exit code.

    An error that a user can cause becomes one line on stderr; any other is a defect and keeps its traceback.
    """
    escape_what_streams_cannot_write()
    keep_freed_memory()
    try:
        words = sys.argv[1:] if argv is None else argv
        get_command(app)(args=argv, prog_name="muco", obj=escaped(shlex.join(["muco", *words])))
    except SystemExit as stop:  # how Typer ends, also after usage errors (2) and Ctrl-C (130)
        return int(stop.code or 0)
    except (MucoError, OSError, UnicodeEncodeError) as error:
        sentence = _sentence(error)
        if not sentence:
            raise
        print(f"muco: {sentence}", file=sys.stderr)
        return USERS_INPUT
    return 0


def _sentence(error: MucoError | OSError | UnicodeEncodeError) -> str:
    """What to tell the user who caused an error; "" if it is a defect."""
    if isinstance(error, UnicodeEncodeError):  # of a library that takes no such name
        if not LONE_SURROGATE.search(error.object):
            return ""
        return f"{escaped(error.object):.200}: not UTF-8, or half a character; rename the file, or fix the text"
    if isinstance(error, OSError):
        if error.filename is None and error.errno not in DISK_FULL:
            return ""
        return ": ".join(str(part) for part in (error.filename, error.strerror) if part is not None)
    return " ".join(str(error).split())
