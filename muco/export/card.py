"""The model card of an exported model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from muco.model import Model
from muco.template import EMB

if TYPE_CHECKING:
    from muco.training.recipe import Recipe


Format = Literal["sentence-transformers", "vllm"]

ADAPTER = "adapter"  # folder of adapters that are kept separate


def _write_card(
    folder: Path, source: str, format: Format, model: Model, recipe: Recipe | None, *, separate: bool
) -> None:
    dimensions = sorted(recipe.loss.dimensions) if recipe else []
    if format == "vllm" and dimensions:  # else vLLM refuses requests for shorter vectors
        file = folder / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        config |= {"is_matryoshka": True, "matryoshka_dimensions": dimensions}
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    library = "sentence-transformers" if format == "sentence-transformers" else "vllm"
    card = f"""---
library_name: {library}
pipeline_tag: feature-extraction
tags: ["muco"]
---

# A multimodal embedding model

Maps text, images, or both to one vector of {model.get_embedding_dimension()} numbers. Exported from {Path(source).name}
by MuCo; its vectors were compared with the model's own after the export.

"""
    card += _vllm_card(dimensions, separate) if format == "vllm" else _library_card(dimensions, separate)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _library_card(dimensions: list[int], separate: bool) -> str:
    load = f'model[0].model.load_adapter("this folder/{ADAPTER}")\n' if separate else ""
    short = f"\nVectors may be cut to {_listed(dimensions)} numbers: `truncate_dim`.\n" if dimensions else ""
    return f"""```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("this folder")
{load}model.encode(["a text", {{"text": "a question", "image": "photo.png"}}])
```
{short}"""


def _vllm_card(dimensions: list[int], separate: bool) -> str:
    lora = f" --enable-lora --lora-modules muco=./{ADAPTER}" if separate else ""
    name = "muco" if separate else "."
    if dimensions:
        short = f"`dimensions` may be {_listed(dimensions)}, for which the model was trained."
    else:
        short = "`dimensions` is refused: the model was not trained for shorter vectors."
    return f"""From within this folder:

```bash
vllm serve . --runner pooling --convert embed --chat-template ./chat_template.jinja{lora}
```

```bash
curl http://localhost:8000/v1/embeddings -H 'Content-Type: application/json' -d '{{"model": "{name}", "messages":
  [{{"role": "user", "content": [{{"type": "image_url", "image_url": {{"url": "data:image/png;base64,…"}}}},
  {{"type": "text", "text": "What is it?"}}]}}]}}'
```

Ask with `messages`, texts too: only they pass through the chat template, which ends at `{EMB}`, where the vector is
read
(last token, L2-normalised: `1_Pooling/config.json`). A plain `input` would be embedded without it, as something else.
{short} A text alone needs no placeholder image.
"""


def _listed(dimensions: list[int]) -> str:
    return ", ".join(map(str, dimensions))
