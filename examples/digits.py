"""Real images at once: from scikit-learn's 1 797 handwritten digits to a trained model and a text search.

    python examples/digits.py --output runs/digits

Nothing is downloaded and no GPU is needed. The digits are written as PNG files and two JSONL files (training, held
out), a 1 M parameter Qwen2-VL is trained on them from random weights, once with and once without
``loss.mask_identical_targets``, and both models are scored on the held-out digits. ``<output>/digits.json`` holds all
figures, ``<output>/search-masked.png`` the images that ten words find. To train on your own images, replace
:func:`turns` and :func:`write_data`; examples/README.md says more.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import muco
from muco.base.files import write_json
from muco.base.machine import machine, versions
from muco.data import open_data
from muco.data.jsonl import write_jsonl
from muco.data.source import Data
from muco.evaluate.retrieval import evaluate_retrieval
from muco.training.recipe import from_dict

SIDE = 56  # pixels: 4 x 4 patches of 14, two by two merged into 4 visual tokens
WORDS = "zero one two three four five six seven eight nine".split()
HOLES = {0: 1, 6: 1, 8: 2, 9: 1}  # by the digit, not by the ink: as mostly written here, the 4 open, the 2 not looped
RUNS = {"masked": True, "unmasked": False}  # folder -> loss.mask_identical_targets
FOUND = 10  # images per word


# ---------------------------------------------------------------- data


def turns(digit: int) -> list[dict[str, Any]]:
    """What is asked about a digit; a list of texts holds paraphrases, of which training draws one each time."""
    word, parity = WORDS[digit], "odd" if digit % 2 else "even"
    holes = ("no hole", "one hole", "two holes")[HOLES.get(digit, 0)]
    before = WORDS[digit - 1] if digit > 0 else "nothing"
    after = WORDS[digit + 1] if digit < 9 else "nothing"
    captions = [f"a handwritten {word}, {parity}, with {holes}", f"a handwritten {word}", word]
    asked = [
        ("digit", ["Which digit is it?", "Read the digit."], str(digit)),
        ("word", ["Write the digit as a word.", "Which digit is it, in letters?"], word),
        ("parity", ["Is the digit odd or even?", "Odd or even?"], parity),
        ("size", ["Is the digit larger than five?", "More than five?"], "yes" if digit > 5 else "no"),
        ("holes", ["How many closed holes does it have?", "Count the holes."], holes),
        ("neighbours", ["Which digits come before and after it?", "Name its neighbours."], f"{before} and {after}"),
        ("retrieval", ["Describe the image.", "Give a caption."], captions),  # evaluation knows captions by this kind
    ]
    return [{"query": query, "target": target, "kind": kind} for kind, query, target in asked]


def write_data(folder: Path, *, train: int = 1437, test: int = 360, seed: int = 0) -> None:
    """Writes ``images/*.png``, ``train.jsonl`` and ``test.jsonl``; both parts have the same share of every digit."""
    digits = load_digits()  # images float [1797, 8, 8] of 0 to 16, target int [1797]
    (folder / "images").mkdir(parents=True, exist_ok=True)
    parts = train_test_split(
        range(len(digits.target)), train_size=train, test_size=test, stratify=digits.target, random_state=seed
    )
    for name, numbers in zip(("train", "test"), parts, strict=True):
        rows = []
        for number in sorted(numbers):
            image = f"images/{number:04d}.png"
            ink = Image.fromarray((digits.images[number] * 255 / 16).round().astype(np.uint8))
            ink.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / image)
            rows.append({"image": image, "turns": turns(int(digits.target[number])), "id": f"{number:04d}"})
        write_jsonl(folder / f"{name}.jsonl", rows)


# ---------------------------------------------------------------- training and scores


def recipe(data: Path, output: Path, *, mask: bool, steps: int, seed: int) -> muco.Recipe:
    """The same keys as in a YAML recipe for ``muco train``; muco/training/recipe.py documents them."""
    values = {
        "output": str(output),
        "model": {"tiny": {"max_pixels": SIDE * SIDE}, "vision": "trained"},
        "data": {"train": [{"path": str(data)}]},
        "turns": {"image_turn": "retrieval"},  # one more turn, the image alone with its caption: what search needs
        "loss": {"temperature": 0.05, "symmetric": True, "mask_identical_targets": mask},
        "batch": {"size": 32},  # images, with 8 turns each
        "trainer": {
            "max_steps": steps,
            "logging_first_step": True,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": steps // 20,
            "adam_beta2": 0.98,
            "weight_decay": 0.01,
            "save_steps": 100,
        },
        "seed": seed,
    }
    return from_dict(values)


def train_and_score(settings: muco.Recipe, held_out: Data, sheet: Path) -> dict[str, Any]:
    """Trains (a killed run goes on, a finished one is not done again), then evaluates and searches."""
    fresh, start = not Path(settings.output).exists(), time.perf_counter()
    folder = muco.train(settings)
    model = muco.load(folder)
    seconds = time.perf_counter() - start
    scores = evaluate_retrieval(model, held_out, output=Path(settings.output))
    return {
        "train_seconds": round(seconds, 1) if fresh else None,
        "final_loss": json.loads((folder / "run.json").read_text())["loss"][-1][1],
        "search_precision": search(model, held_out, sheet),
        "tasks": scores["tasks"],
        "warnings": scores["warnings"],
    }


def search(model: Any, held_out: Data, sheet: Path) -> float:
    """Finds images by the ten words; returns precision@10 and draws what was found, mistakes framed in red."""
    samples = [held_out[i] for i in range(len(held_out))]
    labels = np.array([int(sample.turns[0].target[0].text) for sample in samples])
    images = model.encode([sample.images[0] for sample in samples])
    found = np.argsort(-(model.encode(WORDS) @ images.T), axis=1, kind="stable")[:, :FOUND]  # [10, FOUND]
    right = labels[found] == np.arange(len(WORDS))[:, None]
    tile = SIDE + 8
    picture = Image.new("RGB", (tile * (1 + found.shape[1]), tile * len(WORDS)), "white")
    draw = ImageDraw.Draw(picture)
    for row, word in enumerate(WORDS):
        draw.text((8, row * tile + 24), word, fill="black")
        for column, i in enumerate(found[row]):
            x, y = (column + 1) * tile, row * tile
            draw.rectangle((x, y, x + tile - 2, y + tile - 2), fill="seagreen" if right[row, column] else "red")
            picture.paste(Image.open(samples[i].images[0]), (x + 3, y + 3))
    picture.save(sheet)
    return float(right.mean())


# ---------------------------------------------------------------- the whole


def table(results: dict[str, dict[str, Any]]) -> Table:
    """hit@1 of both models; the last column is what the first one answers without seeing the image."""
    tasks = results["masked"]["tasks"]
    unseen = {kind: part["hit@1"] for kind, part in tasks["answer_text_only"]["kinds"].items()}
    unseen["image to caption"] = tasks["blind"]["hit@1"]
    rows: dict[str, list[float]] = {}
    for result in results.values():
        tasks = result["tasks"]
        shares = {kind: part["hit@1"] for kind, part in tasks["answer"]["kinds"].items()}
        for name in ("image_to_caption", "caption_to_image", "within"):
            shares[name.replace("_", " ")] = tasks[name]["hit@1"]
        shares[f"text search, precision@{FOUND}"] = result["search_precision"]
        for name, share in shares.items():
            rows.setdefault(name, []).append(share)
    title = "loss.mask_identical_targets: masked = true, unmasked = false"
    shown = Table("held-out digits, hit@1 in %", *results, "without the image", title=title)
    for name, row in rows.items():
        cells = [f"{100 * share:.1f}" for share in (*row, *([unseen[name]] if name in unseen else []))]
        shown.add_row(name, *cells, style="bold" if name == "digit" else None)
    return shown


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/digits"), help="a folder (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=350, help="training steps of 32 images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of training (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="2 steps on few images, to see that it runs")
    args = parser.parse_args(argv)
    steps, size = (2, {"train": 120, "test": 40}) if args.quick else (args.steps, {})
    if steps < 1:
        parser.error(f"--steps must be at least 1, not {steps}")

    data = args.output / f"data-{args.seed}{'-quick' * args.quick}"  # a name of its own: another seed leaves it alone
    write_data(data, seed=args.seed, **size)
    held_out = open_data(data / "test.jsonl")
    results = {}
    for name, mask in RUNS.items():
        settings = recipe(data / "train.jsonl", args.output / name, mask=mask, steps=steps, seed=args.seed)
        results[name] = train_and_score(settings, held_out, args.output / f"search-{name}.png")
    command = shlex.join(["python", "examples/digits.py", *argv])
    facts = {"command": command, "machine": machine(), "versions": versions()}
    write_json(args.output / "digits.json", facts | {"steps": steps, "seed": args.seed, "results": results})
    Console().print(table(results))


if __name__ == "__main__":
    try:
        main()
    except (muco.MucoError, OSError) as error:
        sys.exit(f"error: {error}")
