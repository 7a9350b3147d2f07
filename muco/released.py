"""Embedding models that other trainers released: how a stock sentence-transformers folder writes its prompt.

Such a folder names its parts in ``modules.json``. A model of ours has the same file, and its own settings beside it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from transformers.utils.hub import cached_file

from muco.errors import CheckpointError

KEPT = ("Transformer", "Pooling", "Normalize")  # the parts by which MuCo's own models make vectors


@dataclass(frozen=True)
class ReleasedPrompt:
    """How a prompt is rendered whose last token's state is the vector."""

    system: str | None  # the system message; None: the chat template's own
    generation: bool  # whether the beginning of an answer follows


def released_prompt(path: str, *, local_files_only: bool) -> ReleasedPrompt | None:
    """The prompt of a stock embedding model; None if the folder holds a generative one.

    Raises:
        CheckpointError: If its vectors are not the last token's states.
    """

    def read(name: str) -> Any:
        options = {"local_files_only": local_files_only, "_raise_exceptions_for_missing_entries": False}
        file = cached_file(path, name, **options)
        return {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))

    modules = read("modules.json")
    if not modules:
        return None
    folders = {module["type"].rsplit(".", 1)[-1]: module["path"] for module in modules}
    if other := [name for name in folders if name not in KEPT]:
        raise CheckpointError(f"its vectors pass through {other[0]}, which MuCo does not have")
    place = PurePosixPath(folders.get("Pooling", "1_Pooling"))
    if place.is_absolute() or ".." in place.parts:
        raise CheckpointError(f"modules.json: {place} is not a folder of the model")
    pooling = read(f"{place}/config.json")
    if pooling.get("pooling_mode") != "lasttoken" and not pooling.get("pooling_mode_lasttoken"):
        raise CheckpointError("its vectors are not the states of the last token, as MuCo's are")
    library = read("config_sentence_transformers.json")
    system = (library.get("prompts") or {}).get(library.get("default_prompt_name"))
    rendering = (read("sentence_bert_config.json").get("processing_kwargs") or {}).get("chat_template") or {}
    return ReleasedPrompt(system, bool(rendering.get("add_generation_prompt")))
