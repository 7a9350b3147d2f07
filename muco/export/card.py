"""What an exported or merged model says of itself: its card, where it comes from, and its shorter lengths."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

from transformers.utils.hub import cached_file

from muco.base.files import read_json, write_text
from muco.model import Model
from muco.starter import located, model_name
from muco.stock import write_json
from muco.training.checkpoint import run_of
from muco.training.folder import (
    CARD_FILE,
    CHECKPOINTS,
    MODEL,
    RECIPE_FILE,
    RUN_FILE,
    SHORTER,
    WEIGHTS_FILE,
    card_head,
    hub_id,
    usage,
)
from muco.training.recipe import dump_recipe

Format = Literal["sentence-transformers", "vllm"]
ADAPTER = "adapter"  # folder of adapters that are kept separate


def describe(
    folder: Path,
    source: str,
    format: Format,
    model: Model,
    dimensions: Collection[int],
    *,
    separate: bool,
) -> None:
    """Writes the card of an exported model, what it keeps of its source's run, and its shorter lengths."""
    run = write_origin(folder, source)
    write_dimensions(folder, dimensions)
    if format == "vllm":
        body = _usage_of_vllm(_listed(dimensions), model.encoder.muco_processor.template.read, separate)
    else:
        body = full_usage(dimensions, f'model[0].model.load_adapter("this folder/{ADAPTER}")\n' if separate else "")
    compared = "Its vectors were compared with the model's own after the export."
    origin = f"exported from {_named(source)} by\nMuCo. {compared}"
    head = card_head(format, model.get_embedding_dimension(), origin, hub_id(source) or run.get("base_model"))
    trained = f"\nHow it was trained is in `{RECIPE_FILE}` and `{RUN_FILE}`.\n" if run else ""
    write_text(folder / CARD_FILE, f"{head}\n{body}{trained}")


def write_origin(folder: Path, source: str) -> dict[str, Any]:
    """Writes the recipe and the facts of the run that made the source; returns the facts, {} if it has none of ours."""
    if (Path(source) / WEIGHTS_FILE).is_file():
        run, recipe = run_of(Path(source))
        write_text(folder / RECIPE_FILE, dump_recipe(recipe))
        write_json(folder / RUN_FILE, run)
        return run
    names = (RECIPE_FILE, RUN_FILE)
    found = [cached_file(located(source), name, _raise_exceptions_for_missing_entries=False) for name in names]
    run = {} if None in found else read_json(Path(found[1]))
    if "recipe" not in run:  # another program has files of these names too
        return {}
    for file, name in zip(found, names, strict=True):
        shutil.copyfile(file, folder / name)
    return run


def _named(source: str) -> str:
    """What a card calls the source: by its run, its folder, or its hub id."""
    folder = Path(os.path.abspath(source))
    if not folder.exists():
        return source
    if folder.parent.name == CHECKPOINTS:
        return f"{folder.name} of the run {folder.parent.parent.name}"
    if folder.name == MODEL and (folder.parent / RUN_FILE).is_file():
        return f"the run {folder.parent.name}"
    return model_name(source)


def write_dimensions(folder: Path, dimensions: Collection[int]) -> None:
    """Says in ``config.json`` for which shorter vectors a model was trained.

    vLLM reads it there, and refuses requests for other lengths; :func:`muco.training.recipe.trained_dimensions` too.
    """
    config = read_json(folder / "config.json")
    kept = {key: value for key, value in config.items() if key not in SHORTER}  # what it says may be of its own source
    said = dict(zip(SHORTER, (True, sorted(dimensions)), strict=True)) if dimensions else {}
    if kept | said != config:
        write_json(folder / "config.json", kept | said)


def full_usage(dimensions: Collection[int], after_loading: str = "") -> str:
    """As :func:`muco.training.folder.usage`, and to which lengths vectors may be cut."""
    cut = f"\nVectors may be cut to {_listed(dimensions)} dimensions: `truncate_dim`.\n" if dimensions else ""
    return usage(after_loading) + cut


def _listed(dimensions: Collection[int]) -> str:
    return ", ".join(map(str, sorted(dimensions)))


def _usage_of_vllm(shorter: str, read: str, separate: bool) -> str:
    lora = f" --enable-lora --lora-modules muco=./{ADAPTER}" if separate else ""
    name = "muco" if separate else "."
    if shorter:
        short = f"`dimensions` may be {shorter}, for which the model was trained."
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

Send `messages`, for texts too: only they pass through the chat template, which ends at `{read}`, where the vector is
read (last token, L2-normalised: `1_Pooling/config.json`). A plain `input` would be embedded without it, as something
else. {short} A text alone needs no placeholder image.
"""
