"""The names of the files that a run leaves on disk, and its model card, of which an export has parts too.

::

    <output>/
    ├── run.json             what the run is: its recipe, versions and data fingerprints
    ├── digests.json         digests of the data's files, so that a resumed run need not read them again
    ├── precision.json       with precision: auto, what was measured and chosen
    ├── skipped-0.jsonl      samples that could not be used, one file per process
    ├── checkpoints/         checkpoint-N: trained weights, optimizer, schedule, random states
    ├── logs/                TensorBoard
    ├── guide/               vectors of a guide, if there is one; may be deleted after training
    └── model/               the finished model; appears whole or not at all
        ├── recipe.yaml      the resolved recipe
        ├── run.json         as above, with steps, losses, scores on the way, and the model's fingerprint
        ├── README.md        the model card
        └── …                a stock SentenceTransformer folder, see muco.model
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from muco.base.machine import versions_in_words

RUN_FILE = "run.json"
RECIPE_FILE = "recipe.yaml"
CARD_FILE = "README.md"
DIGESTS_FILE = "digests.json"
PRECISION_FILE = "precision.json"
WEIGHTS_FILE = "trained.safetensors"  # of a checkpoint
CHECKPOINTS = "checkpoints"
LOGS = "logs"
GUIDE = "guide"
MODEL = "model"
SHORTER = ("is_matryoshka", "matryoshka_dimensions")  # keys of config.json, as vLLM names them


def hub_id(path: str | Path | None) -> str | None:
    """The path of a model if it is an id on the hub, NAMESPACE/NAME; None for a folder, and for a model made here."""
    known = path is not None and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(path)) and not Path(path).exists()
    return str(path) if known else None


def card_head(library: str, dimension: int, origin: str, base_model: str | None = None) -> str:
    """The front matter of a model card and its first paragraph.

    Args:
        library: The hub's name of the library that loads the model.
        dimension: Of the model's vectors.
        origin: The end of the first sentence: where the model comes from.
        base_model: The hub's id of the model that it was made from, see :func:`hub_id`.
    """
    header = {"library_name": library, "pipeline_tag": "feature-extraction", "tags": ["muco"]}
    header |= {"base_model": base_model} if base_model else {}
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in header.items())
    return f"""---
{front}
---

# A multimodal embedding model

Maps text, an image, or both to one vector of {dimension} dimensions; {origin}
"""


def usage(after_loading: str = "") -> str:
    """How to encode with the sentence-transformers library, with a line of Python to run once the model is loaded."""
    return f"""```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("this folder")
{after_loading}model.encode(["a text", {{"text": "a question", "image": "photo.png"}}])
```
"""


def model_card(run: dict[str, Any], dimension: int) -> str:
    """The card of a finished run, from its ``run.json`` and the dimension of the vectors; it claims no score."""
    recipe = run["recipe"]
    base = recipe["model"]["path"] or "a Qwen2-VL made from its config, trained from random weights"
    sources = "\n".join(f"| {d['path']} | {d['samples']} | `{d['fingerprint'][:16]}` |" for d in run["data"])
    last = "not logged"
    if run["loss"]:
        step, loss = run["loss"][-1]
        last = f"{loss:.4f} nats at step {step}"
    recorded = (
        f"Scores of `data.validation` on the way are in `{RUN_FILE}`." if run.get("scores") else "None is recorded."
    )
    return f"""{card_head("sentence-transformers", dimension, f"trained with MuCo from {base}.", run["base_model"])}
{usage()}
## Training

{run["steps"]} steps of multi-turn contrastive learning, turns {recipe["turns"]["mode"]}, temperature
{recipe["loss"]["temperature"]}. Last training loss: {last}. The whole recipe is in `{RECIPE_FILE}`; data fingerprints,
versions and the loss curve are in `{RUN_FILE}`.

| data | samples | fingerprint |
|---|---|---|
{sources}

Made with {versions_in_words(run["versions"])}.

## Evaluation

{recorded} Run `muco evaluate retrieval --model THIS_FOLDER --data DATA --output DIR`.
"""
