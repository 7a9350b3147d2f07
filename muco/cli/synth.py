"""``muco synth``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from muco.base.terminal import finish, print_pairs
from muco.cli import options
from muco.cli.options import Json, examples
from muco.errors import MucoError
from muco.synth.chat import KEY_VARIABLE

SYNTH_EXAMPLES = examples(
    "muco synth photos/ --captioner http://localhost:8000/v1 --captioner-model qwen2.5-vl --output data/photos",
    "muco synth urls.parquet --captioner http://a:8000/v1 --captioner-model see --writer http://b:8000/v1 "
    "--writer-model write --output data/web --concurrency 64",
    "muco synth shards/ --captioner http://a:8000/v1 --captioner-model see --output data/s --ray ray://head:10001 "
    "--workers 16",
)


def synth(
    images: Annotated[
        Path, Argument(metavar="IMAGES", help="A folder of images, Parquet files with URLs, or webdataset shards.")
    ],
    captioner: Annotated[str, Option(metavar="URL", help="Base of an OpenAI-compatible API with a model that sees.")],
    output: Annotated[Path, Option("--output", "-o", metavar="DIR", help="Folder of the data; runs resume.")],
    captioner_model: Annotated[str | None, Option(help="The model's name on that server, if it has several.")] = None,
    writer: Annotated[
        str | None, Option(metavar="URL", help="Base of the API of a model that writes; default: the captioner.")
    ] = None,
    writer_model: Annotated[str | None, Option(help="The writer's name on its server, if it has several.")] = None,
    min_side: Annotated[int, Option(min=1, help="Least pixels of an image's shorter side.")] = 512,
    max_aspect: Annotated[float, Option(min=1, help="Greatest ratio of the longer to the shorter side.")] = 3.0,
    near: Annotated[int, Option(min=-1, max=16, help="Bits of 64 that near duplicates differ by; -1 keeps them.")] = 4,
    min_turns: Annotated[int, Option(min=1, max=7, help="Images with fewer good turns are left out.")] = 3,
    attempts: Annotated[int, Option(min=1, help="Attempts to get a good caption, and good pairs.")] = 3,
    shard_size: Annotated[int, Option(min=1, help="Images in a shard, which is written whole.")] = 1000,
    url_column: Annotated[str | None, Option(help="Column of the URLs in Parquet files; default: url or URL.")] = None,
    fetch_host: options.FetchHost = [],  # noqa: B006
    fetch_address: options.FetchAddress = [],  # noqa: B006
    prompts: options.PromptsFile = None,
    captioner_sampling: options.Sampling = [],  # noqa: B006
    writer_sampling: Annotated[list[str], Option(metavar="KEY=VALUE", help="The same for the writer.")] = [],  # noqa: B006
    concurrency: options.Concurrency = 16,
    requests_per_minute: options.Rate = None,
    timeout: options.Timeout = 120,
    retries: options.Retries = 6,
    max_failures: options.MaxFailures = 20,
    max_requests: options.MaxRequests = None,
    max_tokens: options.MaxTokens = None,
    max_pixels: options.MaxPixels = 1 << 20,
    key_variable: options.KeyVariable = KEY_VARIABLE,
    captioner_price: options.Price = "0:0",
    writer_price: options.Price = "0:0",
    threads: Annotated[int, Option(min=1, help="Threads that open images, on each machine.")] = 16,
    workers: Annotated[int, Option(min=1, help="Processes that ask the models; they share --concurrency.")] = 1,
    ray: Annotated[str | None, Option(metavar="ADDRESS", help="Run on this Ray cluster.")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Check the images, print the cost, and stop.")] = False,
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
    from muco.training.read import parse_options

    if (workers > 1 or ray) and (max_requests or max_tokens):
        raise MucoError("--max-requests and --max-tokens hold for one process; leave out --workers and --ray")
    limits = Limits(concurrency, requests_per_minute, timeout, retries, max_failures)
    fetch = FetchLimits(hosts=tuple(fetch_host) or None, allowed_addresses=tuple(fetch_address))

    def server(url: str, model: str | None, sampling: list[str], **defaults: Any) -> Server:
        return Server(url, model or "", defaults | parse_options(sampling), limits, key_variable)

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
