"""``muco synth``, and the options of all commands that ask a model server."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from muco.base.terminal import finish, print_pairs
from muco.cli.options import Json, examples
from muco.errors import MucoError
from muco.synth.chat import KEY_VARIABLE as KEY_VARIABLE

Concurrency = Annotated[int, typer.Option(min=1, help="Simultaneous requests per model.")]
Rate = Annotated[
    float | None, typer.Option("--requests-per-minute", min=0.001, help="Maximum requests per minute and model.")
]
Timeout = Annotated[float, typer.Option(min=0.001, help="Seconds for one request.")]
Retries = Annotated[int, typer.Option(min=0, help="Number of retries of a failed request.")]
MaxFailures = Annotated[int, typer.Option(min=1, help="Stop after this number of unusable answers in a row.")]
MaxRequests = Annotated[
    int | None, typer.Option(min=1, help="Stop after this number of requests; the same command resumes there.")
]
MaxTokens = Annotated[
    int | None,
    typer.Option(min=1, help="Stop after this number of tokens, read and written; the same command resumes."),
]
MaxPixels = Annotated[int, typer.Option(min=784, help="Larger images are sent smaller.")]
KeyVariable = Annotated[
    str, typer.Option("--key-variable", metavar="NAME", help="Environment variable that holds the API key, if any.")
]
PromptsFile = Annotated[
    Path | None,
    typer.Option("--prompts", metavar="FILE.yaml", help="Wordings of your own; muco/synth/prompts.py has the keys."),
]
Price = Annotated[str, typer.Option(metavar="READ:WRITTEN", help="Price of a million tokens, to estimate the cost.")]
_SAMPLING = "Field of the requests, e.g. temperature=0.3; null leaves it out; may be repeated, value in YAML."
Sampling = Annotated[list[str], typer.Option("--sampling", metavar="KEY=VALUE", help=_SAMPLING)]


def sampling_of(words: list[str], **defaults: Any) -> dict[str, Any]:
    """The sampling that the options change the defaults to."""
    from muco.training.read import parse_options

    return defaults | parse_options(words)


EXAMPLES = examples(
    "muco synth photos/ --captioner http://localhost:8000/v1 --captioner-model qwen2.5-vl --output data/photos",
    "muco synth urls.parquet --captioner http://a:8000/v1 --captioner-model see --writer http://b:8000/v1 "
    "--writer-model write --output data/web --concurrency 64",
    "muco synth shards/ --captioner http://a:8000/v1 --captioner-model see --output data/s --ray ray://head:10001 "
    "--workers 16",
)


def synth(
    images: Annotated[
        Path,
        typer.Argument(metavar="IMAGES", help="A folder of images, Parquet files with URLs, or webdataset shards."),
    ],
    captioner: Annotated[
        str, typer.Option("--captioner", metavar="URL", help="Base of an OpenAI-compatible API with a model that sees.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder of the data; runs resume.")],
    captioner_model: Annotated[
        str | None, typer.Option(help="The model's name on that server, if it has several.")
    ] = None,
    writer: Annotated[
        str | None,
        typer.Option(
            "--writer", metavar="URL", help="Base of an API with a model that writes; default: the captioner."
        ),
    ] = None,
    writer_model: Annotated[
        str | None, typer.Option(help="The writer's name on its server, if it has several.")
    ] = None,
    min_side: Annotated[int, typer.Option(min=1, help="Least pixels of an image's shorter side.")] = 512,
    max_aspect: Annotated[float, typer.Option(min=1, help="Greatest ratio of the longer to the shorter side.")] = 3.0,
    near: Annotated[
        int, typer.Option(min=-1, max=16, help="Bits of 64 by which near duplicates may differ; -1 keeps them.")
    ] = 4,
    min_turns: Annotated[int, typer.Option(min=1, max=7, help="Images with fewer good turns are left out.")] = 3,
    attempts: Annotated[int, typer.Option(min=1, help="Attempts to get a good caption, and good pairs.")] = 3,
    shard_size: Annotated[int, typer.Option(min=1, help="Images in a shard, which is written whole.")] = 1000,
    url_column: Annotated[
        str | None, typer.Option(help="Column of the URLs in Parquet files; default: url or URL.")
    ] = None,
    fetch_host: Annotated[
        list[str], typer.Option(metavar="HOST", help="Only fetch from this host, or *.domain; may be repeated.")
    ] = [],  # noqa: B006
    fetch_address: Annotated[
        list[str], typer.Option(metavar="ADDRESS:PORT", help="Fetch from this address although it is not public.")
    ] = [],  # noqa: B006
    prompts: PromptsFile = None,
    captioner_sampling: Annotated[list[str], typer.Option(metavar="KEY=VALUE", help=_SAMPLING)] = [],  # noqa: B006
    writer_sampling: Annotated[list[str], typer.Option(metavar="KEY=VALUE", help="The same for the writer.")] = [],  # noqa: B006
    concurrency: Concurrency = 16,
    requests_per_minute: Rate = None,
    timeout: Timeout = 120,
    retries: Retries = 6,
    max_failures: MaxFailures = 20,
    max_requests: MaxRequests = None,
    max_tokens: MaxTokens = None,
    max_pixels: MaxPixels = 1 << 20,
    key_variable: KeyVariable = KEY_VARIABLE,
    captioner_price: Price = "0:0",
    writer_price: Price = "0:0",
    threads: Annotated[int, typer.Option(min=1, help="Threads that open images, on each machine.")] = 16,
    workers: Annotated[int, typer.Option(min=1, help="Processes that ask the models; they share --concurrency.")] = 1,
    ray: Annotated[str | None, typer.Option(metavar="ADDRESS", help="Run on this Ray cluster.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the images, print the cost, and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Write training data about images with models.

    Asks models that you serve: one describes each image, another one writes seven questions with answers. Images that
    are too small, broken or duplicates are left out; what fails the checks is asked for again, then left out and
    counted. DIR/README.md reports the result; DIR/train.jsonl and DIR/M3T.parquet are the data. Run the same command
    again to resume after a kill.
    """
    from muco.base.fetch import FetchLimits
    from muco.synth.chat import Budget, Limits
    from muco.synth.pictures import Filter
    from muco.synth.pipeline import Job, Server
    from muco.synth.prompts import load_prompts
    from muco.synth.run import synth as run
    from muco.synth.sources import open_source
    from muco.synth.writing import Setting

    if (workers > 1 or ray) and (max_requests or max_tokens):
        raise MucoError("--max-requests and --max-tokens hold for one process; leave out --workers and --ray")
    limits = Limits(concurrency, requests_per_minute, timeout, retries, max_failures)
    fetch = FetchLimits(hosts=tuple(fetch_host) or None, allowed_addresses=tuple(fetch_address))

    def server(url: str, model: str | None, sampling: list[str], **defaults: Any) -> Server:
        return Server(url, model or "", sampling_of(sampling, **defaults), limits, key_variable)

    job = Job(
        source=open_source(images, url_column=url_column, fetch=fetch),
        output=output,
        captioner=server(captioner, captioner_model, captioner_sampling, temperature=0.2, max_tokens=512),
        writer=server(
            writer or captioner,
            writer_model or (None if writer else captioner_model),
            writer_sampling,
            temperature=0.7,
            max_tokens=1536,
        ),
        filter=Filter(min_side, max_aspect, near),
        setting=Setting(load_prompts(prompts), attempts, min_turns, max_pixels),
        shard=shard_size,
    )
    result = run(
        job,
        budget=Budget(max_requests, max_tokens),
        prices=(_price(captioner_price), _price(writer_price)),
        threads=threads,
        workers=workers,
        ray=ray,
        dry_run=dry_run,
        say=lambda sentence: print(f"muco synth: {sentence}", file=sys.stderr),
    )
    finish(result, as_json, lambda value, console: print_pairs(_readable(value), console))


def _readable(result: Mapping[str, Any]) -> dict[str, str]:
    """A run's result in lines for people."""

    def counts(values: Mapping[str, Any]) -> str:
        return ", ".join(f"{name} {count:,}" for name, count in values.items())

    looked = {"looked at": result["pictures"]["pictures"], **result["pictures"]}
    shown = {"pictures": counts({name: n for name, n in looked.items() if name != "pictures"})}
    shown |= {f"estimate, {role}": counts(result["estimate"][role]) for role in ("captioner", "writer")}
    if "rows" not in result:
        return shown
    down = {f"{line['what']}, {line['reason']}": line["count"] for line in result["rejected"]}
    shown |= {
        "shards": f"{result['finished']:,} of {result['shards']:,}",
        "rows": f"{result['rows']:,} with {result['pairs']:,} pairs: {counts(result['kinds'])}",
        "turned down": counts(down) or "nothing",
        "unanswered": f"{result['unanswered']:,} pictures; run the same command again" if result["unanswered"] else "",
        "stopped": result["stopped"] or "",
    }
    shown |= {f"used, {role}": counts(used) for role, used in result["usage"].items()}
    return {name: line for name, line in shown.items() if line} | {"output": result["output"]}


def _price(text: str) -> Any:
    from muco.synth.run import Price as Tokens

    try:
        read, written = (float(part) for part in text.split(":"))
    except ValueError as error:
        raise MucoError(f"price {text!r}: write it as READ:WRITTEN, of a million tokens each, e.g. 0.2:0.6") from error
    return Tokens(read, written)
