"""Several models of one architecture made one, by their weights.

::

    sources ─load, fold adapters in─▶ models ─the same but for weights?─▶ tensor by tensor, in float64 ─▶ DIR

========================= ============================================================================================
mean                      the sum of w_k θ_k, with shares w_k that sum to 1
slerp                     of two models, along the arc between both, as each tensor, flattened, spans it
task-arithmetic           θ_0 + the sum of w_k (θ_k - θ_0): what each has learnt since the model that all began from
========================= ============================================================================================

Sources: model soups, arXiv 2203.05482; Shoemake, SIGGRAPH 1985; task arithmetic, arXiv 2212.04089.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from muco.backbone import merge_adapters
from muco.base.files import claimed, write_json, write_text, writing
from muco.errors import CheckpointError, MucoError, OutputError
from muco.export.card import full_usage, write_dimensions
from muco.export.export import load_source
from muco.model import Model
from muco.starter import model_name
from muco.training.folder import CARD_FILE, SHORTER, card_head

Method = Literal["mean", "slerp", "task-arithmetic"]
RECORD = "merge.json"
NARROW = 1e-3  # radians, under which an arc is taken for a line
# Of a configuration; says nothing of what kind a model is.
OWN = ("_name_or_path", "dtype", "transformers_version", "architectures", *SHORTER)


def merge(
    sources: Sequence[str],
    output: Path,
    *,
    weights: Sequence[float] | None = None,
    method: Method = "mean",
    base: str | None = None,
) -> dict[str, Any]:
    """Writes the model that is between others.

    Args:
        sources: As for :func:`muco.export.export`: folders, hub ids, or checkpoints of runs, whose adapters are folded
            in. All are in memory together.
        output: A folder that does not exist yet; it appears whole. Its vectors may be cut to the lengths that all
            sources were trained for.
        weights: One per source; by default all the same. With "mean" and "slerp" their shares of the sum count.
        method: See above.
        base: What all sources began from, for "task-arithmetic".
    Returns:
        ``output`` and the arguments, the weights as they were used; ``fingerprints`` of the sources and the base, and
        the ``fingerprint`` of the result.
    Raises:
        MucoError: If there are too few sources, or the weights or the base do not fit the method.
        CheckpointError: If a source cannot be loaded, or differs from the first in more than its weights: in its
            architecture, tokenizer, prompt or pixels.
        OutputError: If ``output`` exists, cannot be written, or another process writes it.
    """
    shares = _shares(sources, weights, method, base)
    with claimed(output, beside=True):
        if output.exists():
            raise OutputError(f"{output} already exists; choose another folder or delete it")
        names = [*sources, *([base] if base is not None else [])]
        loaded = [_folded(name) for name in names]
        models = [model for model, _ in loaded]
        shorter = frozenset.intersection(*(frozenset(lengths) for _, lengths in loaded[: len(sources)]))
        for name, other in zip(names[1:], models[1:], strict=True):
            if differing := _difference(models[0], other):
                raise CheckpointError(
                    f"{name} and {names[0]} differ in {differing}; only models of the same kind can be merged"
                )
        prints = [model.fingerprint for model in models]
        _combine(models, shares, method)
        facts = {"method": method, "sources": [*sources], "weights": shares, "base": base, "fingerprints": prints}
        _write(models[0], output, facts | {"fingerprint": models[0].fingerprint}, shorter)
    return {"output": str(output), **facts, "fingerprint": models[0].fingerprint}


def _shares(sources: Sequence[str], weights: Sequence[float] | None, method: str, base: str | None) -> list[float]:
    """The weights as they are used; a MucoError if something does not fit."""
    if method not in get_args(Method):
        raise MucoError(f"method must be one of {', '.join(get_args(Method))}, not {method!r}")
    arithmetic = method == "task-arithmetic"
    if len(sources) < (1 if arithmetic else 2) or (method == "slerp" and len(sources) != 2):
        raise MucoError(f"{method} takes {'two models' if method == 'slerp' else 'more models'}, got {len(sources)}")
    if arithmetic != (base is not None):
        raise MucoError("task-arithmetic needs the base that all models began from, and the other methods have none")
    found = [1.0] * len(sources) if weights is None else [float(weight) for weight in weights]
    if len(found) != len(sources) or not all(map(math.isfinite, found)):
        raise MucoError(f"weights must be a finite number for each of {len(sources)} models, got {found}")
    if arithmetic:
        return [weight / len(found) for weight in found] if weights is None else found
    if min(found) < 0 or not sum(found):
        raise MucoError(f"weights of {method} must be at least 0, and not all 0, got {found}")
    return [weight / sum(found) for weight in found]


def _folded(source: str) -> tuple[Model, tuple[int, ...]]:
    """A model without adapters, and the shorter lengths it was trained for."""
    model, shorter, dtype = load_source(source)
    model.encoder.model = merge_adapters(model.encoder.model, dtype)
    return model, shorter


def _difference(one: Model, other: Model) -> str:
    """What is not the same in both besides the values of weights; "" if all of it is."""
    if one.tokenizer.backend_tokenizer.to_str() != other.tokenizer.backend_tokenizer.to_str():
        return "their tokenizers"
    for whole, pair in (
        ("", [_settings(model) for model in (one, other)]),
        ("config.", [_plain(model) for model in (one, other)]),
    ):
        first, second = pair
        if differing := sorted(key for key in {*first, *second} if first.get(key) != second.get(key)):
            return f"their {whole}{differing[0]}"
    shapes = [{name: weight.shape for name, weight in model.state_dict().items()} for model in (one, other)]
    odd = sorted(name for name in {*shapes[0], *shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
    return f"the weight {odd[0]}" if odd else ""


def _settings(model: Model) -> dict[str, Any]:
    processor = model.encoder.muco_processor
    return processor.settings() | {"pixels in training": processor.trained_pixels}


def _plain(model: Model) -> dict[str, Any]:
    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without(item) for key, item in value.items() if key not in OWN}
        return value

    return without(model.encoder.model.config.to_dict())


@torch.no_grad()
def _combine(models: Sequence[Model], shares: Sequence[float], method: str) -> None:
    """Puts the result into the weights of the first model; tied weights stay tied."""
    states = [model.state_dict() for model in models]
    done = set[int]()
    for name, first in states[0].items():
        if not first.is_floating_point() or not first.numel() or first.data_ptr() in done:
            continue
        done.add(first.data_ptr())
        values = [state[name].double() for state in states]
        if method == "slerp":
            found = slerp(values[0], values[1], shares[1])
        elif method == "task-arithmetic":
            *values, start = values
            found = start + sum(share * (value - start) for share, value in zip(shares, values, strict=True))
        else:
            found = sum(share * value for share, value in zip(shares, values, strict=True))
        first.copy_(found)


def slerp(one: Tensor, other: Tensor, share: float) -> Tensor:
    """What lies between two tensors of one shape along the arc between them; ``share`` is 0 to 1, from one to other."""
    norms = one.norm() * other.norm()
    cosine = (one * other).sum() / norms if norms else one.new_tensor(1.0)
    arc = float(cosine.clamp(-1, 1).arccos())
    if arc < NARROW or math.pi - arc < NARROW:  # opposite ones have no single arc
        return (1 - share) * one + share * other
    return (math.sin((1 - share) * arc) * one + math.sin(share * arc) * other) / math.sin(arc)


def _write(model: Model, output: Path, facts: dict[str, Any], shorter: Collection[int]) -> None:
    part = output.with_name(f"{output.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    with writing(output):
        model.save(str(part), create_model_card=False)
        write_dimensions(part, shorter)
        write_json(part / RECORD, facts)
        pairs = zip(facts["sources"], facts["weights"], strict=True)
        named = ", ".join(f"{share:.3g} of {model_name(source)}" for source, share in pairs)
        origin = f"merged by MuCo\n({facts['method']}: {named})."
        text = f"{card_head('sentence-transformers', model.get_embedding_dimension(), origin)}\n{full_usage(shorter)}"
        write_text(part / CARD_FILE, text)
        os.replace(part, output)
