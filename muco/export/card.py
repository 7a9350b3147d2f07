"""The model card of an exported model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from muco.template import EMB
from muco.training.card import card_head, usage

Format = Literal["sentence-transformers", "vllm"]

ADAPTER = "adapter"  # folder of adapters that are kept separate


def export_card(format: Format, name: str, dimension: int, shorter: list[int], *, separate: bool) -> str:
    """The card of an export.

    Args:
        format: Also the hub's name of the library that loads it.
        name: Of the model that was exported.
        dimension: Of its vectors.
        shorter: The dimensions that its vectors may be cut to; empty if it was not trained for any.
        separate: Whether its adapters are in a folder of their own.
    """
    origin = f"exported from {name} by\nMuCo. Its vectors were compared with the model's own after the export."
    body = _vllm(shorter, separate) if format == "vllm" else _library(shorter, separate)
    return f"{card_head(format, dimension, origin)}\n{body}"


def write_matryoshka(folder: Path, shorter: list[int]) -> None:
    """Tells vLLM the dimensions that vectors may be cut to; else it refuses requests for them."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config |= {"is_matryoshka": True, "matryoshka_dimensions": shorter}
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _library(shorter: list[int], separate: bool) -> str:
    load = f'model[0].model.load_adapter("this folder/{ADAPTER}")\n' if separate else ""
    short = f"\nVectors may be cut to {_listed(shorter)} dimensions: `truncate_dim`.\n" if shorter else ""
    return usage(load) + short


def _vllm(shorter: list[int], separate: bool) -> str:
    lora = f" --enable-lora --lora-modules muco=./{ADAPTER}" if separate else ""
    name = "muco" if separate else "."
    if shorter:
        short = f"`dimensions` may be {_listed(shorter)}, for which the model was trained."
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

Send `messages`, for texts too: only they pass through the chat template, which ends at `{EMB}`, where the vector is
read (last token, L2-normalised: `1_Pooling/config.json`). A plain `input` would be embedded without it, as something
else. {short} A text alone needs no placeholder image.
"""


def _listed(dimensions: list[int]) -> str:
    return ", ".join(map(str, dimensions))
