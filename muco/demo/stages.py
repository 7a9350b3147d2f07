"""The seven stages of the demo. Each resumes by itself, so a killed demo is simply run again.

::

    <output>/
    ├── demo.json             the arguments; each stage's result and seconds
    ├── scenes/               1  the data
    │                         2  scores of the untrained model (in demo.json)
    ├── run/                  3  training; the model is in run/model
    │                         4  scores of the trained model (in demo.json)
    ├── test-images.parquet   5  vectors of the held-out images
    │                         6  searches and mistakes (in demo.json)
    ├── report.html           7  the page
    └── cache/                vectors of the held-out set, for 2, 4 and 6
"""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from muco.base.files import claimed, earlier_record, read_json, write_json, write_text
from muco.base.machine import VERSION, machine, versions
from muco.base.terminal import progress_bar
from muco.data import open_data
from muco.data.scenes import write_scenes
from muco.data.source import Data
from muco.demo.page import STAGES, page
from muco.demo.search import search
from muco.embed import embed
from muco.errors import RecipeError
from muco.evaluate.report import print_results
from muco.evaluate.retrieval import evaluate_retrieval
from muco.info_nce import chance_level
from muco.model import Model, load
from muco.training.batches import TrainingBatches
from muco.training.build import build_model
from muco.training.folder import MODEL, RUN_FILE
from muco.training.mixture import Mixture, open_sources
from muco.training.recipe import Recipe, load_recipe, to_dict
from muco.training.trainer import train

RECIPE = Path(__file__).with_name("recipe.yaml")
RECIPE_ROOT = Path("runs/demo")  # the folder that the recipe's paths are in; any other output takes its place


def run_demo(
    output: str | Path, *, steps: int | None = None, train: int = 20_000, test: int = 500, seed: int = 0
) -> Path:
    """Makes data, trains, evaluates before and after, embeds, searches and writes one page.

    Run it again with the same arguments to resume: finished scenes, models and vectors are kept. Progress goes to
    stderr, the table of scores to stdout, all results to ``<output>/demo.json``.

    Args:
        output: A new or empty folder, or one of an earlier call with the same arguments.
        steps: Training steps; None for the recipe's.
        train, test: Numbers of scenes; the test scenes are held out from training and from every choice.
    Returns:
        ``<output>/report.html``.
    Raises:
        OutputError: If the folder holds another demo, or anything else.
    """
    output = Path(output)
    recipe = demo_recipe(output, steps)
    # without the recipe's paths, which follow from the output folder
    settings = {key: value for key, value in to_dict(recipe).items() if key not in ("output", "data")}
    asked = {"muco": VERSION, "train": train, "test": test, "seed": seed, "recipe": settings}
    with claimed(output):
        stages = Stages(output / "demo.json", asked)
        scenes, cache = output / "scenes", output / "cache"
        stages.run("scenes", partial(make_scenes, scenes, train=train, test=test, seed=seed), makes=scenes)
        held_out = open_data(scenes / "test.jsonl")
        stages.run("before", partial(score_untrained, recipe, held_out, cache))

        # the command that does the same again, without options that have their default
        options = {"steps": steps, "train": train, "test": test, "seed": seed}
        changed = [(name, value) for name, value in options.items() if value != run_demo.__kwdefaults__[name]]
        words = [word for name, value in changed for word in (f"--{name}", str(value))]
        command = shlex.join(["muco", "demo", "--output", str(output), *words])
        folder = Path(recipe.output) / MODEL
        stages.run("train", partial(train_model, recipe, command), makes=folder)
        model = load(folder)
        resume = stages.result("after").get("model", model.fingerprint) == model.fingerprint  # in an earlier call
        after = stages.run("after", partial(score, model, held_out, cache))

        vectors, report = output / "test-images.parquet", output / "report.html"
        stages.run("embed", partial(embed, scenes / "images" / "test", model, vectors, batch_size=64, resume=resume))
        stages.run("search", partial(search, model, held_out, vectors, cache))

        def write_page() -> str:
            write_text(report, page(stages.record, scenes))
            return report.name

        stages.run("page", write_page)
        print_results(after, Console(file=sys.stdout))
        return report


def demo_recipe(output: Path, steps: int | None = None) -> Recipe:
    """The packaged recipe with its paths in ``output``; other ``steps`` keep the share of warm-up steps."""
    recipe = load_recipe(RECIPE)

    def moved(path: str) -> str:
        return str(output / Path(path).relative_to(RECIPE_ROOT))

    sources = tuple(replace(source, path=moved(source.path)) for source in recipe.data.train)
    recipe = replace(recipe, output=moved(recipe.output), data=replace(recipe.data, train=sources))
    if steps is None:
        return recipe
    if steps < 1:
        raise RecipeError(f"steps is {steps}; pass at least 1")
    warmup = recipe.trainer["warmup_steps"] * steps // recipe.trainer["max_steps"]
    return replace(recipe, trainer={**recipe.trainer, "max_steps": steps, "warmup_steps": warmup})


class Stages:
    """Runs the stages and writes ``demo.json``: ``asked``, and of each stage begun, seconds and result.

    Raises an OutputError if the folder holds a demo with other values in ``asked``, or anything else.
    """

    def __init__(self, file: Path, asked: Mapping[str, Any]) -> None:
        self.file, self.console = file, Console(stderr=True)
        self.record = earlier_record(file, asked, "demo") or {"asked": dict(asked), "stages": {}}
        write_json(file, self.record)

    def result(self, name: str) -> dict[str, Any]:
        """The result of an earlier call, or an empty dictionary."""
        return self.record["stages"].get(name, {}).get("result", {})

    def run(self, name: str, work: Callable[[], Any], makes: Path | None = None) -> Any:
        """The result of ``work()``; if what it ``makes`` exists, the seconds of the earlier call are kept."""
        known = self.record["stages"].get(name, {})
        done = makes is not None and makes.exists() and "seconds" in known
        title = f"[{list(STAGES).index(name) + 1}/{len(STAGES)}] {STAGES[name]}"
        self._say(title)
        # Work before a kill was not timed, which the page says.
        begun = datetime.now(UTC).isoformat(timespec="seconds")
        stage = known if done else {"begun": begun, "interrupted": "begun" in known and "seconds" not in known}
        self._write(name, stage)
        start = time.perf_counter()
        result = work()
        seconds = round(time.perf_counter() - start, 3)
        self._write(name, {"seconds": seconds, **stage, "result": result})
        self._say(f"{title}: {seconds:.1f} s")
        return result

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _write(self, name: str, stage: dict[str, Any]) -> None:
        self.record["stages"][name] = stage
        write_json(self.file, self.record)


def make_scenes(folder: Path, *, train: int, test: int, seed: int) -> dict[str, int]:
    """Draws the data, unless the folder exists: it appears whole."""
    for left in folder.parent.glob(f".{folder.name}-*"):  # by a killed run
        shutil.rmtree(left)
    if not folder.exists():
        with progress_bar("scenes") as progress:
            write_scenes(folder, train=train, dev=test, test=test, seed=seed, progress=progress)
    return {"train": train, "dev": test, "test": test}


def score_untrained(recipe: Recipe, data: Data, cache: Path) -> dict[str, Any]:
    """The scores of the model that training starts from, its size, pairs per step and the loss at chance."""
    sources = open_sources(recipe)
    model = build_model(recipe, sources)
    mixture = Mixture.of(recipe, [len(source) for source in sources])
    batches = TrainingBatches(sources, mixture, model.encoder.muco_processor, recipe.turns, seed=recipe.seed)
    ids = batches[0]["ids"]
    return score(model, data, cache) | {
        "parameters": sum(p.numel() for p in model.parameters()),
        "pairs_per_step": len(ids),
        "chance_loss": chance_level(ids.sample_ids, ids.target_ids),
    }


def score(model: Model, data: Data, cache: Path) -> dict[str, Any]:
    with progress_bar("scoring") as progress:
        return evaluate_retrieval(model, data, cache=cache, progress=progress)


def train_model(recipe: Recipe, command: str) -> dict[str, Any]:
    """Trains or resumes; returns the loss curve, the command, the machine and the versions of libraries."""
    run = read_json(train(recipe) / RUN_FILE)
    facts = {key: run[key] for key in ("steps", "loss", "finished")}
    return facts | {"command": command, "machine": machine(), "versions": versions()}
