"""Runs in an environment with torchvision (make_stock_environment.sh): encodes the inputs of a job with its models.

    .venv-stock/bin/python -I tests/support/stock_environment.py JOB.json

First it loads each folder with the sentence-transformers library alone ("stock"), where muco cannot be imported; then
with the muco of the job's ``root`` ("muco"). A job is ``{"root": folder, "output": folder, "models": {name: folder},
"inputs": {name: [{"text": str, "image": file or files}, …]}, "families": [name, …]}``, each input with one key or both,
in either order. Into ``output`` go ``MODE.npz`` (vectors by model), ``MODE.json`` (what ran), ``saved/NAME`` (the model
as the stock library saves it again), and ``families.json`` (the rows of the families, see family_checks.py).
"""

from __future__ import annotations

import json
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image


def fit_torchvision() -> torch.library.Library | None:
    """Makes torchvision importable beside a torch that its compiled half was not built for, such as a CPU one.

    Its Python half, which resizes images, asks only that two operators have schemas.

    Returns:
        What keeps the schemas alive.
    """
    compiled = next(Path(find_spec("torchvision").origin).parent.glob("_C*"))
    try:
        torch.ops.load_library(str(compiled))
        return None
    except OSError:
        schemas = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            schemas.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return schemas


def opened(value: dict[str, Any]) -> Any:
    """A text, an image, or a mapping of both in the job's order of keys."""
    parts = {key: part if key == "text" else _images(part) for key, part in value.items()}
    return parts if len(parts) == 2 else next(iter(parts.values()))


def _images(files: str | list[str]) -> Any:
    return [Image.open(file) for file in files] if isinstance(files, list) else Image.open(files)


def run_stock(job: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Vectors by model, with the image processor that the library chooses and, as NAME/pil, with Pillow's."""
    from sentence_transformers import SentenceTransformer
    from transformers import AutoImageProcessor

    vectors, facts = {}, {}
    for name, folder in job["models"].items():
        inputs = [opened(value) for value in job["inputs"][name]]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = SentenceTransformer(folder, device="cpu", local_files_only=True)
        vectors[name] = model.encode(inputs, batch_size=4)
        model.save(f"{job['output']}/saved/{name}", create_model_card=False)
        processor = model[0].processor
        facts[name] = {
            "warnings": [str(warning.message) for warning in caught],
            "model": type(model[0].model).__name__,
            "pooling": model[1].pooling_mode,
            "image_processor": _bases(processor.image_processor),
        }
        processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
        vectors[f"{name}/pil"] = model.encode(inputs, batch_size=4)
    return vectors, facts


def run_muco(job: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Vectors by model, as muco computes them where torchvision is installed."""
    sys.path.insert(0, job["root"])
    import muco

    vectors, facts = {}, {}
    for name, folder in job["models"].items():
        model = muco.load(folder, device="cpu", local_files_only=True)
        vectors[name] = model.encode([opened(value) for value in job["inputs"][name]], batch_size=4)
        facts[name] = {"image_processor": _bases(model.encoder.muco_processor.image_processor)}
    return vectors, facts


def run_checks(job: dict[str, Any]) -> dict[str, list[str]]:
    """The rows of the families that need torchvision, see family_checks.py."""
    sys.path.insert(0, f"{job['root']}/tests/support")
    import family_checks

    return {family: family_checks.row(family) for family in job["families"]}


def _bases(value: object) -> list[str]:
    return [base.__name__ for base in type(value).__mro__]


def main(file: str) -> None:
    schemas = fit_torchvision()
    import torchvision

    job = json.loads(Path(file).read_text(encoding="utf-8"))
    for mode, run in {"stock": run_stock, "muco": run_muco}.items():
        importable = find_spec("muco") is not None
        vectors, facts = run(job)
        ran = {
            "torchvision": torchvision.__version__,
            "compiled_half": schemas is None,
            "muco_importable": importable,
            "models": facts,
        }
        np.savez(Path(job["output"]) / f"{mode}.npz", **vectors)
        (Path(job["output"]) / f"{mode}.json").write_text(json.dumps(ran, indent=1), encoding="utf-8")
    (Path(job["output"]) / "families.json").write_text(json.dumps(run_checks(job)), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
