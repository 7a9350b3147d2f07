"""Options that several commands share, their examples and their exit codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Exit, Option

from muco.base.terminal import finish
from muco.precision import Precision

USERS_INPUT, FAILED_CHECK = 1, 3  # exit codes

Model = Annotated[str, Option("--model", "-m", help='Folder of a trained model, its hub id, or "starter".')]
Json = Annotated[bool, Option("--json", help="Print the result as one JSON line on stdout.")]
BatchSize = Annotated[int, Option(min=1, help="Inputs per forward pass; changes the result by rounding alone.")]
Dimension = Annotated[
    int | None, Option(min=1, help="Cut vectors to their first N dimensions, for models trained with loss.dimensions.")
]
Scored = Literal["float32", "int8", "binary"]  # how vectors are stored that are compared
Storage = Literal["float32", "float16", "binary"]  # how an index stores vectors
ComputeIn = Annotated[
    Precision | None,
    Option("--precision", help="Compute in it; auto: bfloat16 if clearly quicker here. Default: as the weights."),
]

# of the commands that read rows
TextColumn = Annotated[str, Option(help="Key or column that holds the text.")]
ImageColumn = Annotated[str, Option(help="Key or column that holds the image.")]
IdColumn = Annotated[str, Option(help="Key or column that holds the id.")]

# of the evaluations
Scores = Annotated[
    Path, Option("--output", "-o", help="Folder for scores, reports and cached embeddings; runs resume.")
]
Queries = Annotated[int | None, Option(min=1, help="Score N queries per data set, drawn by the seed; reported.")]
Seed = Annotated[int, Option(help="Seed of all random draws.")]
AllowMissing = Annotated[bool, Option("--allow-missing", help="Skip missing data sets; otherwise they are an error.")]
SkipBroken = Annotated[
    bool,
    Option("--skip-broken", help="Leave out and name what cannot be embedded (an error otherwise); such queries miss."),
]
MmebVersion = Annotated[
    int, Option(min=1, max=2, help="1: 36 data sets of images; 2: also 18 of videos and 24 of documents.")
]
Only = Annotated[str | None, Option(metavar="KINDS", help="Version 2: some of image,video,visdoc. Default: all.")]
MmebPrompts = Annotated[
    str | None, Option(metavar="STYLE", help="Version 2: vlm2vec (the default), qwen, or a YAML file of instructions.")
]
Media = Annotated[
    list[str], Option(metavar="NAME=FOLDER", help="Version 2: folder of a data set's frames or pages; repeatable.")
]
Official = Annotated[
    bool, Option("--official", help="Tell candidates apart and open images as the official code does; see the docs.")
]
OwnPixels = Annotated[bool, Option("--own-pixels", help="Keep the model's own image sizes, not the benchmark's.")]

# of the commands that read training data
Format = Annotated[str, Option(help="jsonl (MuCo's own), m3t, mmeb, mbeir, pairs, llava, visdial or webdataset.")]
OptionsOfFormat = Annotated[
    list[str], Option(metavar="KEY=VALUE", help="Option of the format in YAML, e.g. images=photos; may be repeated.")
]

# of the commands that ask a model server
Concurrency = Annotated[int, Option(min=1, help="Simultaneous requests per model.")]
Rate = Annotated[float | None, Option(min=0.001, help="Maximum requests per minute and model.")]
Timeout = Annotated[float, Option(min=0.001, help="Seconds for one request.")]
Retries = Annotated[int, Option(min=0, help="Number of retries of a failed request.")]
MaxFailures = Annotated[int, Option(min=1, help="Stop after this number of unusable answers in a row.")]
MaxRequests = Annotated[int | None, Option(min=1, help="Stop after N requests; the same command resumes there.")]
MaxTokens = Annotated[int | None, Option(min=1, help="Stop after N tokens read and written; the same command resumes.")]
MaxPixels = Annotated[int, Option(min=784, help="Larger images are sent smaller.")]
KeyVariable = Annotated[str, Option(metavar="NAME", help="Environment variable that holds the API key, if any.")]
PromptsFile = Annotated[Path | None, Option(metavar="FILE.yaml", help="Your wordings; keys: muco/synth/prompts.py.")]
Price = Annotated[str, Option(metavar="READ:WRITTEN", help="Price of a million tokens, to estimate the cost.")]
Sampling = Annotated[
    list[str],
    Option(metavar="KEY=VALUE", help="Field of requests in YAML, as temperature=0.3; null drops it; may be repeated."),
]

# of the commands that fetch images
FetchHost = Annotated[
    list[str], Option(metavar="HOST", help="Fetch from this host only, or *.HOST for those under it; may be repeated.")
]
FetchAddress = Annotated[
    list[str], Option(metavar="ADDRESS:PORT", help="Fetch from this address although not public; may be repeated.")
]


def examples(*lines: str) -> str:
    return "\n".join(("\b", "Examples:", *(f"  {line}" for line in lines)))  # \b keeps the lines as they are


def finish_check(result: Any, as_json: bool, show: Callable[..., None], ok: bool) -> None:
    """Prints a result; the command's exit code is 3 unless it is ``ok``."""
    finish(result, as_json, show)
    if not ok:
        raise Exit(FAILED_CHECK)
