"""What a run leaves on disk, and how it is found again; :mod:`muco.training.folder` names the files."""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from muco import distributed
from muco.base.files import is_empty, read_json, write_json, write_text, writing
from muco.base.machine import versions
from muco.data.fingerprint import RULE, fingerprint_for
from muco.data.source import Data
from muco.errors import CheckpointError, OutputError, RecipeError
from muco.model import Model
from muco.training.folder import (
    CARD_FILE,
    CHECKPOINTS,
    MODEL,
    PRECISION_FILE,
    RECIPE_FILE,
    RUN_FILE,
    WEIGHTS_FILE,
    hub_id,
    model_card,
)
from muco.training.recipe import Recipe, SourceRecipe, dump_recipe, recorded, to_dict

MISSING = object()
OF_LOSS = "loss."  # before the names of the loss's own parameters
MAY_CHANGE = {  # what a run may resume with otherwise: nothing that a step learns depends on it
    "model": ("activation_checkpointing",),
    "data": ("broken_images", "max_broken", "validation"),
    "batch": ("token_budget", "feature_memory", "seen_memory"),
    # beginnings of names:
    "trainer": ("log_", "logging_", "save_", "eval_", "per_device_eval_", "metric_for_best_model", "greater_is_better")
    + ("dataloader_", "report_to", "run_name"),
}
BY_SCORES = ("reduce_lr_on_plateau", "greedy")  # schedules of a rate that follows the evaluation

log = logging.getLogger(__name__)


def run_facts(recipe: Recipe, sources: list[Data]) -> dict[str, Any]:
    """What makes a run the same run: its recipe without the folder, and its data. Also the versions it began with."""
    settings = {key: value for key, value in to_dict(recipe).items() if key != "output"}
    skip = recipe.data.broken_images == "skip"

    def facts_of(source: SourceRecipe, data: Data) -> dict[str, Any]:
        digest = fingerprint_for(data, skip_broken=skip)
        facts = {"path": source.path, "samples": len(data), "fingerprint": digest}
        # found missing when it was opened, and left out: rows without their image, candidates of no pool
        names = ("missing", "missing_positives", "missing_negatives")
        return facts | {name: getattr(data, name) for name in names if hasattr(data, name)}

    with ThreadPoolExecutor() as threads:
        data = [*threads.map(facts_of, recipe.data.train, sources)]
    facts = {"recipe": settings, "base_model": hub_id(recipe.model.path), "data": data, "fingerprint_rule": RULE}
    return facts | {"versions": versions()}


def claim_output(output: Path, facts: dict[str, Any], *, resume: bool) -> Path | None:
    """Makes the folder this run's own.

    Returns:
        The finished model's folder if this very run is already complete, else None.
    Raises:
        OutputError: If the folder holds another run, something else, or a run that must not be resumed.
    """
    file = output / RUN_FILE
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file; the output of a run is a folder")
    if not file.is_file():
        if output.is_dir() and not is_empty(output):
            raise OutputError(f"{output} is not empty and holds no run; choose another output folder")
        write_json(file, facts)
        return None
    known = read_json(file)
    if differing := _differing(known, facts):
        if (output / MODEL).exists() or _checkpoints(output):
            message = f"{output} holds another run ({differing} differs); choose another output folder or delete it"
            raise OutputError(message)
        write_json(file, facts)  # the other one stopped before it had anything to lose, perhaps by a recipe's mistake
        (output / PRECISION_FILE).unlink(missing_ok=True)
        return None
    if not resume:
        raise OutputError(f"{output} already holds this run; resume it, or choose another output folder")
    if (output / MODEL / RUN_FILE).is_file():
        return output / MODEL
    if known.get("fingerprint_rule") != RULE or not _read_alike(known, facts):
        log.warning(
            "%s was begun by another version of MuCo or with another data.broken_images, which tell data apart "
            "otherwise: that the training data has not changed since is taken from its paths and numbers of samples "
            "alone",
            output,
        )
    write_json(file, known | {name: facts[name] for name in ("recipe", "data", "fingerprint_rule")})
    return None


def _differing(known: dict[str, Any], facts: dict[str, Any]) -> str:
    settings = _comparable(known["recipe"])
    asked = _comparable(facts["recipe"])
    for group in {**asked, **settings}:
        value, other = asked.get(group), settings.get(group)
        if other != value and isinstance(value, dict) and isinstance(other, dict):
            return f"{group}.{next(k for k in {**value, **other} if value.get(k, MISSING) != other.get(k, MISSING))}"
        if other != value:
            return group
    told_by = "fingerprint" if known.get("fingerprint_rule") == RULE and _read_alike(known, facts) else "samples"
    before, now = ([source[told_by] for source in run["data"]] for run in (known, facts))
    return "" if before == now else "the training data"


def _read_alike(known: dict[str, Any], facts: dict[str, Any]) -> bool:
    """Whether both runs take the same rows for data, so that their fingerprints can be compared."""
    return len({run["recipe"]["data"].get("broken_images", "error") for run in (known, facts)}) == 1


def validation_of(output: Path) -> Any:
    """What the recipe of the run in a folder says of validation; None if there is no run."""
    file = output / RUN_FILE
    return read_json(file)["recipe"]["data"].get("validation") if file.is_file() else None


def _comparable(settings: dict[str, Any]) -> dict[str, Any]:
    """A recipe's settings but for MAY_CHANGE, with the defaults of keys that an older version did not know."""
    try:
        values = to_dict(recorded({"output": "", **settings}))
        del values["output"]
    except RecipeError:  # of another version
        values = copy.deepcopy(settings)
    data = values["data"]
    data["epoch"] = settings["data"].get("epoch", "row_count")  # which it was before it could be chosen
    if len(data["train"]) == 1:
        data["train"][0]["weight"] = None  # of a single source it says nothing
    if len(data["train"]) == 1 or values["trainer"].get("max_steps", -1) > 0:
        data["epoch"] = None  # nor does this
    return _without_what_may_change(values)


def _without_what_may_change(values: dict[str, Any]) -> dict[str, Any]:
    scored = values.get("trainer", {}).get("lr_scheduler_type") in BY_SCORES
    left = dict(values)
    for group, beginnings in MAY_CHANGE.items():
        if scored:
            beginnings = tuple(own for own in beginnings if own not in ("validation", "eval_"))
        left[group] = {key: value for key, value in values.get(group, {}).items() if not key.startswith(beginnings)}
    return left


def run_of(checkpoint: Path) -> tuple[dict[str, Any], Recipe]:
    """What the run of a checkpoint says of itself, and its recipe; a CheckpointError if the run is not there."""
    file = checkpoint.parent.parent / RUN_FILE
    if not file.is_file():
        raise CheckpointError(f"{checkpoint} is a checkpoint without its run; {file} is missing")
    run = read_json(file)
    return run, recorded(run["recipe"] | {"output": str(file.parent)})


def last_complete(output: Path, processes: int = 1) -> Path | None:
    """The newest complete checkpoint; removes others. An OutputError if another number of processes made it."""
    complete = []
    for folder in _checkpoints(output):
        if fault := _fault(folder):
            log.warning("%s is removed: it was not written to its end (%s)", folder, fault)
            shutil.rmtree(folder, ignore_errors=True)
        else:
            complete.append(folder)
    last = max(complete, key=lambda folder: int(folder.name.rsplit("-", 1)[1]), default=None)
    made_with = len([*last.glob("rng_state*.pth")]) if last else processes
    if made_with != processes:  # random states do not carry over
        raise OutputError(
            f"{last} was written by {made_with} processes; resume with the same number, not with {processes}"
        )
    return last


def _checkpoints(output: Path) -> list[Path]:
    """Those of the run; a copy that somebody made under another name is none of its business."""
    found = (output / CHECKPOINTS).glob("checkpoint-*")
    return [folder for folder in found if folder.name.removeprefix("checkpoint-").isdecimal()]


def _fault(folder: Path) -> str:
    """Which file of a checkpoint is missing or cut; "" if none is. Reads what each file says of its own length."""
    try:
        # the trainer writes its state last
        file = folder / TRAINER_STATE_NAME
        json.loads(file.read_text(encoding="utf-8"))
        file = folder / WEIGHTS_FILE
        with safe_open(file, framework="pt"):
            pass
        random = [*folder.glob("rng_state*.pth")] or [folder / "rng_state.pth"]
        for file in (folder / OPTIMIZER_NAME, folder / SCHEDULER_NAME, *random):
            with zipfile.ZipFile(file):
                pass
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
        return f"{file.name}: {error}"
    return ""


def trained_weights(model: nn.Module, loss: nn.Module | None = None) -> dict[str, Tensor]:
    """The weights that training changes, whole and on the CPU; with adapters these are few. Call on all processes.

    Those of the loss itself are among them, as ``loss.NAME``.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad} | _own(loss)
    return {name: distributed.whole(p.detach()).cpu().contiguous() for name, p in trained.items()}


def load_trained(model: nn.Module, folder: Path, loss: nn.Module | None = None) -> None:
    """Reads the weights of a checkpoint; a CheckpointError if they are not exactly those that this model trains.

    Without ``loss`` its weights are left out, as only training needs them.
    """
    try:
        weights = load_file(str(folder / WEIGHTS_FILE))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / WEIGHTS_FILE} is missing or truncated ({error}); use another one") from error
    if loss is None:
        weights = {name: weight for name, weight in weights.items() if not name.startswith(OF_LOSS)}
    own = _own(loss)
    trained = {name for name, p in model.named_parameters() if p.requires_grad} | own.keys()
    if set(weights) != trained:
        odd = sorted(set(weights) ^ trained)
        raise CheckpointError(f"{folder / WEIGHTS_FILE} does not fit the recipe's model, e.g. {odd[0]}")
    assign_trained(model, weights)
    for name, parameter in own.items():
        distributed.assign(parameter, weights[name])


def _own(loss: nn.Module | None) -> dict[str, nn.Parameter]:
    """The loss's parameters, without its model's."""
    return {} if loss is None else {OF_LOSS + name: p for name, p in loss.named_parameters(recurse=False)}


def _scores(entry: dict[str, Any]) -> dict[str, float]:
    """hit@1 on the validation set by task, and hit@10 as ``task@10``, of a line of the log that has them."""
    names = {"_hit@1": "", "_hit@10": "@10"}
    parts = [(*name.removeprefix("eval_").rpartition("_hit@"), value) for name, value in entry.items()]
    return {f"{task}{names[metric + k]}": value for task, metric, k, value in parts if metric + k in names}


def assign_trained(model: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if name in weights:
            distributed.assign(parameter, weights[name])


def save_final(output: Path, model: Model, recipe: Recipe, facts: dict[str, Any], state: Any) -> Path:
    """Saves the finished model with its recipe, facts and card; the folder appears when all of it is there."""
    final, part = output / MODEL, output / f"{MODEL}.part"
    run = {
        **facts,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "steps": state.global_step,
        "loss": [[entry["step"], entry["loss"]] for entry in state.log_history if "loss" in entry],
        "scores": [[entry["step"], scores] for entry in state.log_history if (scores := _scores(entry))],
        "model_fingerprint": model.fingerprint,
    }
    with writing(final, again=True):
        shutil.rmtree(part, ignore_errors=True)
        model.save(str(part), create_model_card=False)
        write_text(part / RECIPE_FILE, dump_recipe(recipe))
        write_json(part / RUN_FILE, run)
        write_text(part / CARD_FILE, model_card(run, model.get_embedding_dimension()))
        os.replace(part, final)
    return final
