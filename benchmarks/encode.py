"""Encoding: in float32 and in bfloat16, images that come again, and large photographs from their files.

    python benchmarks/encode.py --parts precision seen photographs --output benchmarks/results

The ways take turns, round by round, so that other work on the machine meets all. Writes precision.json,
seen-images.json and photographs.json, and a page of each. The photographs take 5 GB on disk for a while.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from turns import heading, say, write

from muco.base.html import data_uri
from muco.base.machine import GIB, keep_freed_memory
from muco.data.items import Row
from muco.dialogue import Content, Dialogue
from muco.embed.vectors import encode_rows, open_row, opened_rows
from muco.embed.vectors import in_batches as batches
from muco.images import open_image
from muco.model import Model, compute_in, from_backbone, load
from muco.seen import SeenImages
from muco.serve.engine import Engine, Item
from muco.serve.images import ImageLimits
from muco.sizes import TinyConfig
from muco.template import ImageSlot
from muco.tiny import tiny_qwen2_vl

LARGE, COPIES = (4000, 3000), 20  # pixels of a photograph, and files with the same one
QUESTIONS = ("What is it?", "Which colour is it?", "Where is it?", "Is it a drawing?", "What is beside it?")
WORDS = ("a red bicycle in the snow", "fruit", "two dogs that run along a beach in the evening", "a map")


def pictures(count: int, side: int = 224) -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]


def rounds_of(
    ways: Mapping[str, Callable[[], np.ndarray]], rounds: int, *, warm: bool = True
) -> tuple[dict[str, list[float]], dict]:
    """Seconds of each way by round, after one round that does not count if ``warm``, and the vectors of each."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    vectors = {name: work() for name, work in ways.items()} if warm else {}
    for number in range(rounds):
        for name, work in ways.items():
            begun = time.perf_counter()
            vectors[name] = work()
            seconds[name].append(time.perf_counter() - begun)
        say(f"round {number + 1} of {rounds}")
    return seconds, vectors


def ratio(slow: list[float], quick: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(slow, quick, strict=True))


def precision(model: Model, args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Pictures and texts in both precisions, and what ``auto`` takes."""
    inputs = {"pictures": pictures(args.pictures), "texts": [*WORDS] * (args.pictures // 4)}
    found: dict[str, Any] = {}
    for name, values in inputs.items():

        def encode(asked: Any, values: Any = values) -> np.ndarray:
            compute_in(model, asked)
            return model.encode(values, batch_size=32, show_progress_bar=False)

        ways = {asked: lambda asked=asked, encode=encode: encode(asked) for asked in ("float32", "bfloat16")}
        seconds, vectors = rounds_of(ways, args.rounds)
        cosine = float((vectors["float32"] * vectors["bfloat16"]).sum(axis=1).min())
        found[name] = {"seconds": seconds, "ratio": ratio(seconds["float32"], seconds["bfloat16"]), "cosine": cosine}
    chosen = compute_in(model, "auto")
    model.encoder.bfloat16 = None
    found["auto"] = str(chosen)
    rows = ["| | ms in float32 | ms in bfloat16 | × | smallest cosine |", "|---|---:|---:|---:|---:|"]
    for name, values in inputs.items():
        own = found[name]
        ms = (f"{1e3 * statistics.median(taken) / len(values):.1f}" for taken in own["seconds"].values())
        rows.append(f"| {name} | {' | '.join(ms)} | **{own['ratio']:.2f}** | {own['cosine']:.5f} |")
    return found, [*rows, "", f"`precision: auto` takes {found['auto']}."]


def dominated() -> Model:
    """A Qwen2-VL of random weights whose image dominates: a tower of 12 layers, a language model of 4 narrow ones."""
    tower = {"vision_width": 384, "vision_depth": 12, "vision_heads": 6, "vision_mlp_ratio": 4}
    sizes = TinyConfig(width=256, layers=4, heads=4, kv_heads=2, feed_forward=1024, max_pixels=448 * 448, **tower)
    return from_backbone(*tiny_qwen2_vl([*WORDS, *QUESTIONS], sizes), device="cpu")


def seen(model: Model, args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Questions about pictures, of which four in five were asked about before, by encode, encode_turns and server."""
    found, rows = {}, ["| | ms an input | ms, images kept | × | largest difference |", "|---|---:|---:|---:|---:|"]
    models = {args.model: (model, 224), "a tower that dominates": (dominated(), 448)}
    for title, (one, side) in models.items():
        own = asked_again(one, pictures(args.pictures // len(QUESTIONS), side), args.rounds)
        found[title] = own
        for name, values in own.items():
            ms = (f"{1e3 * statistics.median(taken) / args.pictures:.1f}" for taken in values["seconds"].values())
            difference = f"{values['difference']:.1e}"
            rows.append(f"| {title}, {name} | {' | '.join(ms)} | **{values['ratio']:.2f}** | {difference} |")
    said = (
        "*A tower that dominates*: a Qwen2-VL of random weights with a tower of 12 layers of width 384, which sees "
        "1,024 patches of an image of 448 x 448 pixels, and a language model of 4 layers of width 256."
    )
    return {"inputs": args.pictures, "models": found}, [*rows, "", said]


def asked_again(model: Model, shown: Sequence[Image.Image], rounds: int) -> dict[str, Any]:
    """Seconds of each way with and without kept images, their ratio, and the largest difference of a number."""
    asked = [(picture, question) for picture in shown for question in QUESTIONS]
    asked = [asked[place] for place in np.random.default_rng(1).permutation(len(asked))]
    engine = Engine(model, ImageLimits(), max_tokens=sys.maxsize)
    items = [Item((question,), (data_uri(picture, "PNG"),)) for picture, question in asked]

    def by_encode() -> np.ndarray:
        values = [{"image": picture, "text": question} for picture, question in asked]
        return model.encode(values, batch_size=16, show_progress_bar=False)

    def by_turns() -> np.ndarray:
        return np.concatenate([model.encode_turns(picture, [question]) for picture, question in asked])

    def by_engine() -> np.ndarray:
        passes = [items[start : start + 16] for start in range(0, len(items), 16)]
        return np.concatenate([one.vectors for some in passes for one in engine.run([*map(engine.prepare, some)])])

    def memory(work: Callable[[], np.ndarray], gib: float) -> np.ndarray:
        model.encoder.seen_images = SeenImages(round(gib * GIB)) if gib else None  # each round begins with none kept
        return work()

    found: dict[str, Any] = {}
    for name, work in {"encode": by_encode, "encode_turns": by_turns, "server": by_engine}.items():
        ways = {"without": lambda work=work: memory(work, 0), "kept": lambda work=work: memory(work, 1)}
        seconds, vectors = rounds_of(ways, rounds)
        difference = float(np.abs(vectors["kept"] - vectors["without"]).max())
        found[name] = {"seconds": seconds, "ratio": ratio(*seconds.values()), "difference": difference}
    model.encoder.seen_images = None
    return found


def photographs(model: Model, args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """JPEG files of 4000 x 3000 pixels: plain transformers one by one, batches, and batches with threads that open."""
    with tempfile.TemporaryDirectory() as folder:
        files = written_photographs(Path(folder), args.photographs)
        ways = {
            "plain transformers, one by one": lambda: plain(model, files),
            "batches of 16, opened whole": lambda: in_batches(model, files, 0, open_image),
            "batches of 16, opened as needed": lambda: in_batches(model, files, 0, model.opened),
            **{
                f"the same, {threads} thread{'s' if threads > 1 else ''} beside the model": (
                    lambda threads=threads: in_batches(model, files, threads, model.opened)
                )
                for threads in (1, 2, 4)
            },
            **{
                f"the same, {threads} threads, precision: auto": (
                    lambda threads=threads: by_measure(model, partial(in_batches, model, files, threads))
                )
                for threads in (2, 4)
            },
        }
        seconds, vectors = rounds_of(ways, 1, warm=False)
    first = next(iter(ways))
    found, rows = {}, ["| | ms a photograph | × | smallest cosine |", "|---|---:|---:|---:|"]
    for name, (taken,) in seconds.items():
        cosine = float((vectors[name] * vectors[first]).sum(axis=1).min())
        found[name] = {"seconds": taken, "ratio": seconds[first][0] / taken, "cosine": cosine}
        each = 1e3 * taken / len(files)
        rows.append(f"| {name} | {each:.1f} | **{found[name]['ratio']:.2f}** | {cosine:.4f} |")
    return {"photographs": len(files), "rounds": 1, "ways": found}, [*rows, "", f"{len(files):,} files."]


def written_photographs(folder: Path, count: int) -> list[Path]:
    """That many JPEG files, of which every 20th is another picture."""
    random, files = np.random.default_rng(0), []
    for number in range(-(-count // COPIES)):
        coarse = Image.fromarray(random.integers(30, 226, (24, 32, 3), dtype=np.uint8))
        whole = np.asarray(coarse.resize(LARGE, Image.Resampling.BICUBIC), dtype=np.int16)
        grain = random.integers(-6, 7, (LARGE[1], LARGE[0], 1), dtype=np.int16)
        first = folder / f"{number:04d}-00.jpg"
        Image.fromarray((whole + grain).clip(0, 255).astype(np.uint8)).save(first, quality=88)
        files.append(first)
        for copy in range(1, COPIES):
            files.append(folder / f"{number:04d}-{copy:02d}.jpg")
            files[-1].hardlink_to(first)
    return files[:count]


@torch.inference_mode()
def plain(model: Model, files: Sequence[Path]) -> np.ndarray:
    """What a user writes with transformers alone: processor and model, one file at a time."""
    processor = model.encoder.muco_processor
    backbone = deepcopy(model.encoder.model).to(memory_format=torch.contiguous_format)  # as transformers loads it
    prompt = processor.template.prompt(Dialogue((None,), (Content(""),)))
    pieces = (*prompt.trunk, *prompt.branches[0])
    text = "".join(processor.template.image_token if isinstance(piece, ImageSlot) else piece for piece in pieces)
    vectors = []
    for file in files:
        with Image.open(file) as opened:
            inputs = processor.stock(text=[text], images=[[opened.convert("RGB")]], return_tensors="pt")
        state = backbone(**inputs).last_hidden_state[0, -1].float()
        vectors.append(torch.nn.functional.normalize(state, dim=0).numpy())
    return np.stack(vectors)


def in_batches(model: Model, files: Sequence[Path], threads: int, opened: Callable[[Any], Any]) -> np.ndarray:
    """As ``muco embed`` does; ``threads`` threads open images beside the model."""
    rows = (Row(number, "", "", "", (file,)) for number, file in enumerate(files))
    ready = opened_rows(rows, 32, opened, threads=threads) if threads else (open_row(row, opened) for row in rows)
    encode = partial(model.encode, show_progress_bar=False)
    return np.stack([row.vector for batch in batches(ready, 16) for row in encode_rows(encode, batch)])


def by_measure(model: Model, encode: Callable[[Callable[[Any], Any]], np.ndarray]) -> np.ndarray:
    """In the precision that ``auto`` takes, the measuring included."""
    compute_in(model, "auto")
    vectors = encode(model.opened)
    model.encoder.bfloat16 = None
    return vectors


PARTS = {
    "precision": ("precision", "Precision of encoding", precision),
    "seen": ("seen-images", "Images that come again", seen),
    "photographs": ("photographs", "Photographs of 12 MP from their files", photographs),
}


def main() -> None:
    argv = sys.argv[1:]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="starter", help="a model's folder or name (default: %(default)s)")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    parser.add_argument("--pictures", type=int, default=120, help="or questions about them (default: %(default)s)")
    parser.add_argument("--photographs", type=int, default=2000, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    args = parser.parse_args(argv)
    keep_freed_memory()
    model = load(args.model, device="cpu")
    for part in args.parts:
        name, title, work = PARTS[part]
        found, rows = work(model, args)
        result = heading("encode.py", argv, "cpu") | {"model": args.model} | found
        on = result["machine"]
        rounds = found.get("rounds", args.rounds)
        how = f"medians of {rounds} rounds that take turns" if rounds > 1 else "one round"
        head = f"{result['date']}; {on['cpu']}, {on['cores']} cores; {how}. {work.__doc__}"
        write(
            args.output, name, result, "\n".join([f"# {title}", "", f"`{result['command']}`", "", head, "", *rows, ""])
        )


if __name__ == "__main__":
    main()
