"""The model card of a trained model, and the parts that it shares with the card of an export."""

from __future__ import annotations

import json
from typing import Any

from muco.training.folder import RECIPE_FILE, RUN_FILE


def card_head(library: str, dimension: int, origin: str) -> str:
    """The front matter of a model card and its first paragraph.

    Args:
        library: The hub's name of the library that loads the model.
        dimension: Of the model's vectors.
        origin: The end of the first sentence: where the model comes from.
    """
    header = {"library_name": library, "pipeline_tag": "feature-extraction", "tags": ["muco"]}
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
    """The card of a finished run: it says what was run and claims no score.

    Args:
        run: What ``run.json`` of the model's folder holds.
        dimension: Of the model's vectors.
    """
    recipe = run["recipe"]
    base = recipe["model"]["path"] or "a Qwen2-VL made from its config, trained from random weights"
    sources = "\n".join(f"| {d['path']} | {d['samples']} | `{d['fingerprint'][:16]}` |" for d in run["data"])
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items() if number)
    last = "not logged"
    if run["loss"]:
        step, loss = run["loss"][-1]
        last = f"{loss:.4f} nats at step {step}"
    return f"""{card_head("sentence-transformers", dimension, f"trained with MuCo from {base}.")}
{usage()}
## Training

{run["steps"]} steps of multi-turn contrastive learning, turns {recipe["turns"]["mode"]}, temperature
{recipe["loss"]["temperature"]}. Last training loss: {last}. The whole recipe is in `{RECIPE_FILE}`; data fingerprints,
versions and the loss curve are in `{RUN_FILE}`.

| data | samples | fingerprint |
|---|---|---|
{sources}

Made with {versions}.

## Evaluation

None is recorded here. Run `muco evaluate retrieval --model THIS_FOLDER --data DATA --output DIR`.
"""
