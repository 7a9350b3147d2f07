"""The model card of a trained model."""

from __future__ import annotations

import json
from typing import Any

from muco.training.recipe import Recipe


def model_card(recipe: Recipe, done: dict[str, Any], dimension: int) -> str:
    """A model card that states what was run and claims no score."""
    base = recipe.model.path or "a Qwen2-VL made from its config, trained from random weights"
    sources = "\n".join(f"| {d['path']} | {d['samples']} | `{d['fingerprint'][:16]}` |" for d in done["data"])
    versions = ", ".join(f"{name} {number}" for name, number in done["versions"].items() if number)
    final = f"{done['loss'][-1][1]:.4f} nats at step {done['loss'][-1][0]}" if done["loss"] else "not logged"
    header = {"library_name": "sentence-transformers", "pipeline_tag": "feature-extraction", "tags": ["muco"]}
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in header.items())
    return f"""---
{front}
---

# A multimodal embedding model

Maps text, an image, or both to one vector of {dimension} numbers; made with MuCo from {base}.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("this folder")
model.encode(["a text", {{"text": "a question", "image": "photo.png"}}])
```

## Training

{done["steps"]} steps of multi-turn contrastive learning, turns {recipe.turns.mode}, temperature
{recipe.loss.temperature}. Last training loss: {final}. The whole recipe is in `recipe.yaml`; data fingerprints,
versions and the loss curve are in `run.json`.

| data | samples | fingerprint |
|---|---|---|
{sources}

Made with {versions}.

## Evaluation

None is recorded here. Run `muco evaluate retrieval --model THIS_FOLDER --data DATA --output DIR`.
"""
