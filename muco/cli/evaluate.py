"""``muco evaluate …``: every command imports what it needs in its function."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, BadParameter, Context, Option, Typer

from muco.base.terminal import finish, progress_bar
from muco.cli import options
from muco.cli.evaluate_mteb import mteb
from muco.cli.options import BatchSize, Dimension, Format, Json, Model, OptionsOfFormat, Scored, examples

if TYPE_CHECKING:
    from muco.processor import Processor

app = Typer(no_args_is_help=True, help="Score a model on held-out data and benchmarks.")

WAIT = 86_400.0  # seconds for another evaluation into the same folder, whose vectors are then found there


@app.command(
    epilog=examples(
        "muco evaluate retrieval --model runs/demo/run/model --data test.jsonl --output runs/demo/test",
        "muco evaluate retrieval -m MODEL -d test.jsonl -o scores --dimension 256 --storage int8",
    ),
)
def retrieval(
    model: Model,
    data: Annotated[Path, Option("--data", "-d", help="A JSONL file, a folder with exactly one, or another format.")],
    output: Annotated[Path, Option("--output", "-o", help="Folder for the scores and the cached embeddings.")],
    format: Format = "jsonl",
    option: OptionsOfFormat = [],  # noqa: B006
    batch_size: BatchSize = 64,
    candidates: Annotated[int, Option(min=2, help="Length of the drawn lists of answers, right one included.")] = 100,
    limit: Annotated[int | None, Option(min=1, help="Use only the first N samples.")] = None,
    dimension: Dimension = None,
    storage: Annotated[Scored, Option(help="Score vectors as an index that stores them so would.")] = "float32",
    seed: Annotated[int, Option(help="Seed of the drawn lists.")] = 0,
    as_json: Json = False,
) -> None:
    """Score retrieval on held-out samples.

    Reports hit@k and MRR of image+question to answer (beside a text-only baseline), image to caption, caption to image,
    and "within": whether the model reads the question. For a model trained here also the training loss
    without pixels, which must not fall below chance. Embeddings are cached in the output folder by model and data;
    further dimensions and storages are scored without encoding again.
    """
    from muco.base.files import claimed
    from muco.data import open_data
    from muco.evaluate.report import print_results
    from muco.evaluate.retrieval import evaluate_retrieval, write_result
    from muco.model import load
    from muco.seen import IMAGE_MEMORY
    from muco.training.blind import add_blind_loss
    from muco.training.read import parse_options
    from muco.training.recipe import saved_recipe

    rows = open_data(data, format, parse_options(option))  # before the model: a mistyped path should not cost a minute
    encoder = load(model, image_memory=IMAGE_MEMORY)
    recipe = saved_recipe(model)
    _pixels(encoder.encoder.muco_processor, own=True)
    with claimed(output, wait=WAIT), progress_bar("embedding") as progress:
        result = evaluate_retrieval(
            encoder,
            rows,
            batch_size=batch_size,
            candidates=candidates,
            seed=seed,
            limit=limit,
            dimension=dimension,
            storage=storage,
            output=output,
            cache=output / "cache",
            progress=progress,
        )
        if recipe is not None:
            add_blind_loss(result, encoder, rows, recipe)
        write_result(output, result, dimension, storage)
    finish(result, as_json, print_results)


@app.command(
    epilog=examples(
        "muco evaluate mmeb --model MODEL --data MMEB_eval --output scores/mmeb",
        "muco evaluate mmeb -m MODEL -d MMEB_eval -o scores/some --task ImageNet-1K --task OK-VQA --queries 100",
        "muco evaluate mmeb -m MODEL -d MMEB-V2 -o scores/v2 --version 2 --only video,visdoc --prompts qwen",
    ),
)
def mmeb(
    context: Context,
    model: Model,
    data: Annotated[Path, Option("--data", "-d", help="A folder with one folder per data set; version 2: its root.")],
    output: options.Scores,
    version: options.MmebVersion = 1,
    only: options.Only = None,
    prompts: options.MmebPrompts = None,
    media: options.Media = [],  # noqa: B006
    images: Annotated[Path | None, Option(help="Image folder; default: the data's eval_images or image-tasks.")] = None,
    task: Annotated[list[str], Option(metavar="NAME", help="A data set; may be repeated. Default: all.")] = [],  # noqa: B006
    queries: options.Queries = None,
    seed: options.Seed = 0,
    batch_size: BatchSize = 64,
    own_pixels: options.OwnPixels = False,
    allow_missing: options.AllowMissing = False,
    skip_broken: options.SkipBroken = False,
    official: options.Official = False,
    as_json: Json = False,
) -> None:
    """Score MMEB: 36 data sets, or the 78 of version 2.

    hit@1, and nDCG@5 for the documents of version 2; ties count as misses. Reads the published layouts:
    TIGER-Lab/MMEB-eval, the one with separate instructions, and MMEB-V2. Writes JSON, CSV, Markdown and an HTML page;
    an interrupted run resumes. Also under torchrun.
    """
    from muco.data.mmeb_prompts import load_style
    from muco.data.mmeb_test import find_files
    from muco.evaluate.mmeb import evaluate_mmeb
    from muco.evaluate.mmeb_v2 import chosen_sets, evaluate_mmeb_v2, find_sets

    shared = {"data": data, "output": output, "images": images, "tasks": task or None, "queries": queries}
    shared |= {"seed": seed, "batch_size": batch_size, "allow_missing": allow_missing}
    shared |= {"skip_broken": skip_broken, "official": official}
    if version == 1:
        for name, value in (("--only", only), ("--prompts", prompts), ("--media", media)):
            if value:
                raise BadParameter(f"{name} belongs to version 2; add --version 2, or leave it out")
        find_files(data)  # before the model: a mistyped path should not cost a minute
        _run(evaluate_mmeb, context, model, as_json, own_pixels, **shared)
        return
    modalities = [name.strip() for name in only.split(",")] if only else None
    load_style(prompts or "vlm2vec")
    find_sets(data, chosen_sets(modalities, task or None))
    more = {"only": modalities, "prompts": prompts or "vlm2vec", "media": _folders(media)}
    _run(evaluate_mmeb_v2, context, model, as_json, own_pixels, **shared, **more)


def _folders(words: Sequence[str]) -> dict[str, Path]:
    """NAME=FOLDER words as a mapping."""
    for word in words:
        if not all(word.partition("=")):
            raise BadParameter(f"--media {word!r}: write it as NAME=FOLDER, as in MSVD=frames/msvd")
    return {name: Path(folder) for name, _, folder in (word.partition("=") for word in words)}


@app.command(
    epilog=examples(
        "muco evaluate mbeir --model MODEL --data M-BEIR --output scores/mbeir",
        "muco evaluate mbeir -m MODEL -d M-BEIR -o scores/local --pool local --prompts first",
    ),
)
def mbeir(
    context: Context,
    model: Model,
    data: Annotated[Path, Option("--data", "-d", help="The M-BEIR folder, as published.")],
    output: options.Scores,
    pool: Annotated[
        Literal["both", "local", "global"], Option(help="Rank among a task's own candidates, all of them, or both.")
    ] = "both",
    task: Annotated[
        list[str], Option(metavar="NAME", help="A task, e.g. 'MSCOCO t0'; may be repeated. Default: all 16.")
    ] = [],  # noqa: B006
    prompts: Annotated[
        Literal["random", "first"], Option(help="A query's instruction: its task's first, or one drawn by the seed.")
    ] = "random",
    queries: options.Queries = None,
    seed: options.Seed = 2023,
    batch_size: BatchSize = 64,
    own_pixels: options.OwnPixels = False,
    strict: Annotated[
        bool,
        Option(
            "--strict",
            help="A right candidate missing from the pool that should hold it is an error instead of a count.",
        ),
    ] = False,
    allow_missing: options.AllowMissing = False,
    skip_broken: options.SkipBroken = False,
    as_json: Json = False,
) -> None:
    """Score M-BEIR: 16 tasks, local and global pool.

    hit@k is what M-BEIR calls Recall@k; true recall@k is reported too. Pools are embedded once, in shards on disk, and
    searched exactly. Writes JSON, CSV, Markdown, an HTML page and TREC runs. Also under torchrun.
    """
    from muco.evaluate.mbeir import check_folder, evaluate_mbeir

    check_folder(data)  # before the model: a mistyped path should not cost a minute
    _run(
        evaluate_mbeir,
        context,
        model,
        as_json,
        own_pixels,
        data=data,
        output=output,
        pools=("local", "global") if pool == "both" else (pool,),
        tasks=task or None,
        prompts=prompts,
        seed=seed,
        queries=queries,
        batch_size=batch_size,
        strict=strict,
        allow_missing=allow_missing,
        skip_broken=skip_broken,
    )


@app.command(
    epilog=examples(
        "muco evaluate beir --model MODEL --data scifact --output scores/scifact",
        "muco evaluate beir -m MODEL -d pages/ -o scores/pages -k 5",
    ),
)
def beir(
    context: Context,
    model: Model,
    data: Annotated[
        Path, Option("--data", "-d", help="A folder with corpus.jsonl, queries.jsonl and qrels/, or a folder of these.")
    ],
    output: options.Scores,
    split: Annotated[str, Option(help="Judgements to use: qrels/SPLIT.tsv.")] = "test",
    k: Annotated[int, Option("-k", min=1, help="Depth of nDCG@k, recall@k and MRR@k.")] = 10,
    instruction: Annotated[str, Option(help="Text prepended to every query.")] = "",
    batch_size: BatchSize = 64,
    skip_broken: options.SkipBroken = False,
    as_json: Json = False,
) -> None:
    """Score any retrieval set in BEIR's format.

    Queries and corpus may have images (a path in "image"), judgements may be graded. The first score is nDCG@k.
    """
    from muco.evaluate.beir import evaluate_beir

    _run(
        evaluate_beir,
        context,
        model,
        as_json,
        own=True,
        data=data,
        output=output,
        split=split,
        k=k,
        instruction=instruction,
        batch_size=batch_size,
        skip_broken=skip_broken,
    )


app.command(
    epilog=examples(
        "muco evaluate mteb --model MODEL --benchmark 'ViDoRe(v2)' --output scores/vidore",
        "muco evaluate mteb -m MODEL --task VidoreDocVQARetrieval --task CIFAR10 -o scores/some --dimension 256",
    ),
)(mteb)


@app.command(epilog=examples("muco evaluate compare scores/old scores/new"))
def compare(
    a: Annotated[Path, Argument(metavar="A", help="Output folder of an evaluation.")],
    b: Annotated[Path, Argument(metavar="B", help="Another, of the same data.")],
    samples: Annotated[int, Option(min=100, help="Bootstrap samples.")] = 10_000,
    level: Annotated[float, Option(min=0.5, max=0.999, help="Level of the interval.")] = 0.95,
    seed: options.Seed = 0,
    as_json: Json = False,
) -> None:
    """Compare two results query by query.

    Prints the difference per data set with a paired bootstrap interval.
    """
    from muco.evaluate.compare import compare, print_comparison

    finish(compare(a, b, samples=samples, seed=seed, level=level), as_json, print_comparison)


def _run(evaluate: Callable[..., Any], context: Context, path: str, as_json: bool, own: bool, **settings: Any) -> None:
    """Runs a benchmark on the model at a path, with progress; one of several processes prints the result."""
    from muco import distributed
    from muco.evaluate.report import print_benchmark
    from muco.model import load
    from muco.seen import IMAGE_MEMORY

    distributed.start()
    model = load(path, image_memory=IMAGE_MEMORY)
    model.encoder.muco_processor.images_as_stored = settings.get("official", False)
    pixels = _pixels(model.encoder.muco_processor, own=own)
    with distributed.claimed(settings["output"]), progress_bar("embedding") as progress:
        shown = progress if distributed.rank() == 0 else None
        result = evaluate(model=model, model_path=path, command=context.obj, progress=shown, **pixels, **settings)
    if distributed.rank() == 0:
        finish(result, as_json, print_benchmark)


def _pixels(processor: Processor, *, own: bool) -> dict[str, str]:
    """Sets the limits of image size; returns them and those in training, and says on stderr if they differ."""
    from muco import distributed
    from muco.evaluate.benchmark import OWN_PIXELS, pixels_differ
    from muco.processor import EVALUATION_PIXELS

    own = own or processor.pixels is None
    if not own:
        processor.set_pixels(*EVALUATION_PIXELS)
    limits = (processor.pixels, processor.trained_pixels)
    used, trained = ("{} to {}".format(*pixels) if pixels else "" for pixels in limits)
    if own:
        used = OWN_PIXELS if used == trained or not trained else f"{OWN_PIXELS}, {used}"
    if distributed.rank() == 0:
        for line in pixels_differ(used, trained):
            print(f"muco evaluate: {line}", file=sys.stderr)
    return {"pixels": used, "trained_pixels": trained}
