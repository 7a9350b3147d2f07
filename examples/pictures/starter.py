"""Trains the starter again from nothing, packs it, and measures it.

    python examples/pictures/starter.py

Needs the Debian packages of openclipart, emoji and tuxpaint (see README.md), or ``--root`` where they are unpacked. The
same command resumes after an interruption. In ``<output>``: ``base/``, ``run/``, ``scores.json``, and ``weights/``,
which takes the place of ``muco/starter/weights`` in MuCo.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import scores
from collection import script
from debian import root
from looks import add_looks
from pictures import collect

import muco
from muco.base.files import read_json, write_text
from muco.starter import packages
from muco.starter.join import join
from muco.starter.trained import pack
from muco.training.recipe import Recipe, load_recipe

RECIPE = Path(__file__).with_name("starter.yaml")
LAYERS = 8  # of the language model's 30
TRAINED_ON = ("openclipart", "emoji")  # public domain, and a font under the OFL; tuxpaint is GPL, and only measured
LOOKS = "train-looks.jsonl"
CARD = """\
---
library_name: sentence-transformers
pipeline_tag: feature-extraction
license: apache-2.0
tags: [muco]
---

# MuCo's starter: a small multimodal embedding model

Maps a text, a picture, or both to one vector of {dimension} dimensions. It is there so that a search by words over your
own pictures works a minute after the installation, on a processor. It knows far less than CLIP: it saw {pictures:,}
drawings and emoji, with their titles for captions. It knows everyday things by their English names. It does not know
names of people, places and brands, numbers, positions, or long sentences.

| part | package | SHA-256 of the wheel | licence |
|---|---|---|---|
{halves}

Joined by `muco starter --layers {layers}`, then trained: the connector, LoRA adapters of the language model and the two
tokens of MuCo. Only those and the last normalisation, which fits the cut language model, are in MuCo's package, in
float16; both halves are downloaded at first use.

Trained on pictures of Open Clip Art (public domain) and on the emoji of Noto Color Emoji (OFL), with titles, names and
keywords (Unicode, CLDR), and the names of what the tower takes them for, in {steps:,} steps of {batch} pictures, by
`{command}`; the recipe is in `recipe.yaml`, the losses are in `run.json`.

hit@10 in %, with intervals of 95 %, on pictures that are never trained on, among all of them:

| pictures | text -> image | image -> text | chance |
|---|---|---|---|
{scores}
"""


def recipe(base: Path, pictures: Path, output: Path, changes: Sequence[str]) -> Recipe:
    """The recipe beside this file with its paths put in and ``changes`` ("key=value") made."""
    found = load_recipe(RECIPE, changes)
    sources = tuple(
        replace(source, path=str(pictures / name / LOOKS))
        for source, name in zip(found.data.train, TRAINED_ON, strict=True)
    )
    return replace(
        found,
        output=str(output / "run"),
        model=replace(found.model, path=str(base)),
        data=replace(found.data, train=sources),
    )


def card(folder: Path, command: str, found: dict[str, Any]) -> str:
    run, config = read_json(folder / "run.json"), read_json(folder / "config.json")
    halves = [f"| {p.about} | {p.pinned} | `{p.sha256}` | {p.licence} |" for p in (packages.LANGUAGE, packages.VISION)]
    lines = []
    for part, own in found.items():
        ways = own["text -> image"], own["image -> text"]
        cells = (scores.with_interval(way, 10) for way in ways)
        lines.append(f"| {part}, {ways[0]['queries']} | {' | '.join(cells)} | {scores.percent(ways[0]['chance@10'])} |")
    return CARD.format(
        dimension=config["text_config"]["hidden_size"],
        pictures=sum(source["samples"] for source in run["data"]),
        halves="\n".join(halves),
        layers=config["text_config"]["num_hidden_layers"],
        steps=run["steps"],
        batch=run["recipe"]["batch"]["size"],
        command=command,
        scores="\n".join(lines),
    )


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/starter"), help="a folder (default: %(default)s)")
    parser.add_argument("--pictures", type=Path, default=Path("runs/pictures"), help="(default: %(default)s)")
    parser.add_argument("--root", type=Path, help="where the packages are unpacked; by default apt gets them")
    parser.add_argument("--from", dest="source", type=Path, help="a folder with the wheels; by default pip gets them")
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the language model (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe")
    args = parser.parse_args(argv)

    collect(args.pictures, args.root or root(args.pictures / "debian"))
    for name in TRAINED_ON:
        if not (args.pictures / name / LOOKS).is_file():  # it appears whole
            add_looks(args.pictures / name / "train.jsonl", args.pictures / name / LOOKS, args.source)
    base = join(args.output / "base", layers=args.layers, source=args.source)
    trained = muco.train(recipe(base, args.pictures, args.output, args.set))

    scores.main(["--model", str(trained), "--pictures", str(args.pictures), "--output", str(args.output)])
    found = read_json(args.output / "scores.json")["scores"]
    weights = args.output / "weights"
    shutil.rmtree(weights, ignore_errors=True)
    pack(trained, weights, source=args.source)
    write_text(weights / "README.md", card(trained, " ".join(["python examples/pictures/starter.py", *argv]), found))
    print(f"{weights} takes the place of muco/starter/weights", file=sys.stderr)


if __name__ == "__main__":
    script(main)
