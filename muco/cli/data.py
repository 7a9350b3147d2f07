"""``muco data …``: each command imports what it needs inside itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option, Typer

from muco.base.terminal import finish, print_pairs, progress_bar
from muco.cli import options
from muco.cli.options import BatchSize, Format, Json, Model, OptionsOfFormat, examples, finish_check
from muco.synth.chat import KEY_VARIABLE

if TYPE_CHECKING:
    from muco.data.source import Data

app = Typer(no_args_is_help=True, help="Check, show and make data.")
convert = Typer(no_args_is_help=True, help="Make data from annotated data sets.")
app.add_typer(convert, name="convert")

DataPath = Annotated[Path, Argument(metavar="PATH", help="A JSONL file, a folder with exactly one, or another format.")]


def _open(path: Path, format: str, options: Sequence[str]) -> Data:
    from muco.data import open_data
    from muco.training.read import parse_options

    return open_data(path, format, parse_options(options))


@app.command(
    epilog=examples(
        "muco data check data/train.jsonl", "muco data check data/train.jsonl --model runs/demo/run/model --json"
    ),
)
def check(
    path: DataPath,
    format: Format = "jsonl",
    option: OptionsOfFormat = [],  # noqa: B006
    model: Annotated[str | None, Option("--model", "-m", help="Count tokens with this model's tokenizer.")] = None,
    images: Annotated[bool, Option(help="Open every image; otherwise only missing files are found.")] = True,
    as_json: Json = False,
) -> None:
    """Report errors in data.

    Reads all rows and images, counts them, and names what is wrong by file, line and turn. Exit code 3 if anything is.
    """
    from muco.data.check import check
    from muco.data.check_report import print_report

    report = check(_open(path, format, option), images=images, tokenizer=model)
    finish_check(report.as_dict() if as_json else report, as_json, print_report, report.ok)


@app.command(
    epilog=examples(
        "muco data split data.jsonl --output data",
        "muco data split pairs.csv --format pairs --held-out 0.02 --output data",
    ),
)
def split(
    path: DataPath,
    output: Annotated[Path, Option("--output", "-o", metavar="DIR", help="Folder for train.jsonl and dev.jsonl.")],
    format: Format = "jsonl",
    option: OptionsOfFormat = [],  # noqa: B006
    held_out: Annotated[float, Option(metavar="SHARE", help="Share that goes into dev.jsonl.")] = 0.1,
    as_json: Json = False,
) -> None:
    """Hold out a part of a data set.

    No image of a query or a target is on both sides; hard negatives do not count. Takes any format whose images are
    files, and writes MuCo's own JSONL.
    """
    from muco.data.split import split
    from muco.errors import OutputError

    for file in (output / "train.jsonl", output / "dev.jsonl"):
        if file.exists():
            raise OutputError(f"{file} exists; choose another folder or delete it")
    finish(split(_open(path, format, option), output, held_out), as_json, print_pairs)


@app.command(epilog=examples("muco data show data/train.jsonl --output sheet.html --limit 50"))
def show(
    path: DataPath,
    output: Annotated[Path, Option("--output", "-o", metavar="FILE.html", help="The self-contained page to write.")],
    format: Format = "jsonl",
    option: OptionsOfFormat = [],  # noqa: B006
    limit: Annotated[int, Option(min=1, help="Samples to show.")] = 100,
) -> None:
    """Write an HTML contact sheet of samples."""
    from muco.data.show import show

    show(_open(path, format, option), output, limit=limit)
    print(output)


@app.command(
    epilog=examples(
        "muco data leak data/test.jsonl --train data/train.jsonl --output overlap",
        "muco data leak test.jsonl photos/ --train train.jsonl --train more/ --json",
        "muco data leak data/test.jsonl --train data/MMEB-train --format mmeb --option split=diverse_instruction",
    ),
)
def leak(
    evaluation: Annotated[list[Path], Argument(metavar="EVALUATION...", help="JSONL files or folders of images.")],
    train: Annotated[
        list[Path], Option("--train", "-t", help="Training data: the same, or all in another format; may be repeated.")
    ],
    format: Format = "jsonl",
    option: OptionsOfFormat = [],  # noqa: B006
    output: Annotated[Path | None, Option("--output", "-o", help="Folder for the report and the pairs found.")] = None,
    as_json: Json = False,
) -> None:
    """Find training data in evaluation data.

    Compares images by their bytes and pixels, and texts by their words; resized or compressed copies are not found.
    The format and its options are those of the training data. Exit code 3 if anything overlaps.
    """
    from muco.data.leak import find_overlap, print_overlap

    plain = format == "jsonl" and not option  # only then may it be a folder of images
    training = train if plain else [_open(path, format, option) for path in train]
    found = find_overlap(training, evaluation, output=output)
    finish_check(found, as_json, print_overlap, not found["affected"]["either"])


@app.command(
    epilog=examples(
        "muco data caption pairs.jsonl --endpoint http://localhost:8000/v1 --model qwen --output captions.jsonl",
        "muco data caption MMEB --format mmeb --endpoint http://localhost:8000/v1 --model qwen -o captions.jsonl",
    ),
)
def caption(
    path: DataPath,
    endpoint: Annotated[str, Option("--endpoint", metavar="URL", help="Base of an OpenAI-compatible API.")],
    model: Annotated[str, Option("--model", "-m", help="Name of a model there that sees images.")],
    output: Annotated[Path, Option("--output", "-o", metavar="FILE.jsonl", help="Captions; existing ones are kept.")],
    format: Format = "jsonl",
    option: OptionsOfFormat = [],  # noqa: B006
    prompts: options.PromptsFile = None,
    sampling: options.Sampling = [],  # noqa: B006
    concurrency: options.Concurrency = 16,
    requests_per_minute: options.Rate = None,
    timeout: options.Timeout = 120,
    retries: options.Retries = 6,
    max_failures: options.MaxFailures = 20,
    max_requests: options.MaxRequests = None,
    max_tokens: options.MaxTokens = None,
    max_pixels: options.MaxPixels = 1 << 20,
    key_variable: options.KeyVariable = KEY_VARIABLE,
    as_json: Json = False,
) -> None:
    """Caption the images of a data set with a model.

    Training by reconstruction reads the file: --option captions=FILE, or captions: FILE in a source's options. Each
    image is sent once; run the same command again to resume an interrupted run.
    """
    import asyncio

    from muco.synth.caption import caption
    from muco.synth.chat import Budget, Limits
    from muco.synth.endpoint import Endpoint
    from muco.synth.prompts import load_prompts
    from muco.training.read import parse_options

    wordings = load_prompts(prompts)

    async def run() -> dict[str, Any]:
        async with Endpoint(
            endpoint,
            model,
            sampling={"temperature": 0.2, "max_tokens": 256} | parse_options(sampling),
            limits=Limits(concurrency, requests_per_minute, timeout, retries, max_failures),
            budget=Budget(max_requests, max_tokens),
            key_variable=key_variable,
        ) as opened:
            with progress_bar("captions") as progress:
                return await caption(data, opened, output, prompts=wordings, max_pixels=max_pixels, progress=progress)

    data = _open(path, format, option)
    finish(asyncio.run(run()), as_json, print_pairs)


@app.command(
    epilog=examples(
        "muco data score mined.jsonl --endpoint http://localhost:8000/v1 --model reranker --output scored.jsonl",
        "muco data score mined.jsonl --by chat --endpoint http://localhost:8000/v1 --model qwen -o scored.jsonl",
    ),
)
def score(
    path: DataPath,
    endpoint: Annotated[str, Option("--endpoint", metavar="URL", help="Base of the server's API.")],
    model: Annotated[str, Option("--model", "-m", help="Name of a model there: a reranker, or one that chats.")],
    output: Annotated[Path, Option("--output", "-o", metavar="FILE.jsonl", help="The data with scores.")],
    by: Annotated[str, Option(help="rerank, or chat: the probability of yes against no.")] = "rerank",
    question: Annotated[str | None, Option(metavar="TEXT", help="Asked about query and candidate by chat.")] = None,
    format: Format = "jsonl",
    option: OptionsOfFormat = [],  # noqa: B006
    sampling: options.Sampling = [],  # noqa: B006
    concurrency: options.Concurrency = 16,
    requests_per_minute: options.Rate = None,
    timeout: options.Timeout = 120,
    retries: options.Retries = 6,
    max_failures: options.MaxFailures = 20,
    max_requests: options.MaxRequests = None,
    max_tokens: options.MaxTokens = None,
    max_pixels: options.MaxPixels = 1 << 20,
    key_variable: options.KeyVariable = KEY_VARIABLE,
    as_json: Json = False,
) -> None:
    """Score targets and hard negatives with a teacher.

    Training with loss.distillation learns from the scores. Run the same command again to resume an interrupted run.
    """
    import asyncio

    from muco.synth.chat import Budget, Limits
    from muco.synth.endpoint import Endpoint
    from muco.synth.score import QUESTION, SAMPLING, score
    from muco.training.read import parse_options

    async def run() -> dict[str, Any]:
        async with Endpoint(
            endpoint,
            model,
            sampling=(SAMPLING if by == "chat" else {}) | parse_options(sampling),
            limits=Limits(concurrency, requests_per_minute, timeout, retries, max_failures),
            budget=Budget(max_requests, max_tokens),
            key_variable=key_variable,
        ) as opened:
            with progress_bar("scores") as progress:
                asked = {"by": by, "question": question or QUESTION, "max_pixels": max_pixels}
                return await score(data, opened, output, progress=progress, **asked)

    data = _open(path, format, option)
    finish(asyncio.run(run()), as_json, print_pairs)


@app.command(
    epilog=examples(
        "muco data mine train.jsonl --model runs/demo/run/model --output mined.jsonl",
        "muco data mine train.jsonl -m MODEL -o mined.jsonl --negatives 5 --skip 10 --depth 200 --relative-margin 0.05",
    ),
)
def mine(
    path: DataPath,
    model: Model,
    output: Annotated[Path, Option("--output", "-o", metavar="FILE.jsonl", help="The data with negatives.")],
    format: Format = "jsonl",
    option: OptionsOfFormat = [],  # noqa: B006
    negatives: Annotated[int, Option(min=1, help="Negatives per turn, if enough candidates qualify.")] = 3,
    skip: Annotated[int, Option(min=0, help="Skip the first N ranks, which may contain right answers.")] = 0,
    depth: Annotated[int, Option(min=1, help="Ranks to look at; later ones are left out.")] = 100,
    margin: Annotated[float | None, Option(help="Cosine by which the right target must be ahead.")] = None,
    relative_margin: Annotated[float | None, Option(help="The same as a share of its cosine, e.g. 0.05.")] = None,
    max_score: Annotated[float | None, Option(help="Highest cosine of a negative.")] = None,
    min_score: Annotated[float | None, Option(help="Lowest cosine of a negative.")] = None,
    sample: Annotated[str, Option(help="top: the hardest that qualify; random: drawn among them.")] = "top",
    seed: options.Seed = 0,
    batch_size: BatchSize = 64,
    cache: Annotated[Path | None, Option(metavar="DIR", help="Keep vectors here so that a run can resume.")] = None,
    as_json: Json = False,
) -> None:
    """Find hard negatives with a model.

    Writes the data as JSONL. Every turn gets targets of other images, texts or images, that the model takes for right
    or nearly so. FILE.jsonl.json records how they were found.
    """
    from muco.model import load
    from muco.training.mine import Mining, mine

    mining = Mining(negatives, skip, depth, margin, relative_margin, max_score, min_score, sample, seed)
    data = _open(path, format, option)
    with progress_bar("mining") as progress:
        counts = mine(data, load(model), output, mining, batch_size=batch_size, cache=cache, progress=progress)
    finish(counts, as_json, print_pairs)


@app.command(
    epilog=examples(
        "muco data scenes data/scenes",
        "muco data scenes small --train 500 --dev 100 --test 100",
        "muco data scenes rich --size 168 --objects 4 --objects 5 --objects 6",
    ),
)
def scenes(
    folder: Annotated[Path, Argument(metavar="DIR", help="Folder to write the images and JSONL files to.")],
    train: Annotated[int, Option(min=1, help="Training scenes.")] = 20_000,
    dev: Annotated[int, Option(min=1, help="Held-out scenes for choosing settings.")] = 500,
    test: Annotated[int, Option(min=1, help="Held-out scenes for the final scores.")] = 500,
    seed: Annotated[int, Option(help="The same seed and options draw the same data.")] = 0,
    size: Annotated[int, Option(metavar="PX", help="Width and height of the images.")] = 84,
    objects: Annotated[
        list[int] | None, Option(metavar="N", help="Objects, 2 to 6; repeated: one is drawn. Default: 2, 3, 3.")
    ] = None,
) -> None:
    """Draw the built-in data set.

    Scenes are images of coloured shapes on patterned grounds, each with seven turns; see train.jsonl for the format.
    """
    from muco.data.scenes import USUAL, write_scenes

    print(write_scenes(folder, train=train, dev=dev, test=test, seed=seed, size=size, objects=objects or USUAL))


@convert.command(
    epilog=examples(
        "muco data convert coco instances.json --captions captions.json --images train2017 --output coco.jsonl",
        "muco data convert coco lvis_v1_val.json --images coco --output lvis.jsonl --min-turns 4 --json",
    ),
)
def coco(
    annotations: Annotated[Path, Argument(metavar="ANNOTATIONS.json", help="Boxes in COCO's format.")],
    images: Annotated[Path, Option(metavar="DIR", help="Folder of the image files.")],
    output: Annotated[Path, Option("--output", "-o", metavar="FILE.jsonl", help="The data; replaced if it exists.")],
    captions: Annotated[Path | None, Option(metavar="CAPTIONS.json", help="Image captions in COCO's format.")] = None,
    min_area: Annotated[float, Option(min=0, max=1, help="Smallest box to ask about, as a share of its image.")] = 0.01,
    min_turns: Annotated[int, Option(min=1, help="Leave out images with fewer turns.")] = 2,
    seed: Annotated[int, Option(help="Seed for choosing among possible questions.")] = 0,
    limit: Annotated[int | None, Option(min=1, help="Samples to write, by the order of image ids.")] = None,
    as_json: Json = False,
) -> None:
    """Turn boxes and captions into questions and answers.

    Makes questions by rule if the boxes leave no doubt: the main thing, which and how many things, what is where,
    and a description. Also reads LVIS, and other sets in COCO's format.
    """
    from muco.synth.coco import convert_coco

    with progress_bar("images") as progress:
        counts = convert_coco(
            annotations,
            images,
            output,
            captions=captions,
            min_area=min_area,
            min_turns=min_turns,
            seed=seed,
            limit=limit,
            progress=progress,
        )
    finish(counts, as_json, print_pairs)
