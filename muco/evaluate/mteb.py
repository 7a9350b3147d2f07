"""A model as the ``mteb`` package wants it: ``mteb.evaluate(MtebEncoder(muco.load(path)), tasks)``.

``pip install mteb`` (or ``muco[mteb]``) brings the package. Its tasks hand over batches of columns; a row becomes
the content that :meth:`muco.model.Model.encode` takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from muco.dialogue import Content
from muco.errors import MucoError

try:
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ModelMeta, ScoringFunction
except ImportError as error:
    raise MucoError(f"the mteb package is not installed ({error}); run: pip install mteb") from error

from mteb.abstasks.task_metadata import TaskMetadata
from mteb.types import PromptType
from torch.utils.data import DataLoader

from muco.model import Model, load


class MtebEncoder(AbsEncoder):
    """Encodes texts, images and both; other modalities are refused.

    Args:
        model: From :func:`muco.load`, or a path or hub id.
        revision: Of the weights; only named in results.
        device: See :func:`muco.load`.
        instructions: Put a task's own instruction, where it has one, before the text of its queries.
    """

    def __init__(
        self, model: Model | str, revision: str | None = None, *, device: str | None = None, instructions: bool = True
    ) -> None:
        if isinstance(model, str):
            name, model = model, load(model, device=device)
        else:
            name = f"muco/{model.fingerprint[:12]}"
        self.model, self.instructions = model, instructions
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": name if "/" in name.strip("/") else f"muco/{name}",
                "revision": revision or model.fingerprint[:12],
                "embed_dim": model.get_embedding_dimension(),
                "n_parameters": sum(p.numel() for p in model.parameters()),
                "similarity_fn_name": ScoringFunction.COSINE,
                "use_instructions": instructions,
                "modalities": ["text", "image"],
                "framework": ["Sentence Transformers", "PyTorch"],
            }
        )

    def encode(
        self,
        inputs: DataLoader[Any],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        batch_size: int = 32,
        **kwargs: Any,
    ) -> np.ndarray:
        """One vector per row, float32 [n, d], L2-normalised; a MucoError for a modality the model does not know."""
        instruction = self._instruction(task_metadata, prompt_type)
        vectors = []
        for batch in inputs:
            contents = _contents(batch, instruction, task_metadata.name)
            vectors.append(self.model.encode(contents, batch_size=batch_size, show_progress_bar=False))
        return np.concatenate(vectors)

    def _instruction(self, task: TaskMetadata, prompt_type: PromptType | None) -> str:
        if not self.instructions or prompt_type is None or prompt_type.value != "query":
            return ""
        prompt = task.prompt
        return (prompt.get("query") or "") if isinstance(prompt, Mapping) else (prompt or "")


def _contents(batch: Mapping[str, Sequence[Any]], instruction: str, task: str) -> list[Content]:
    other = {"audio", "video"} & {name for name, values in batch.items() if any(v is not None for v in values)}
    if other:
        raise MucoError(f"{task}: the model reads text and images, not {sorted(other)[0]}")
    length = len(next(iter(batch.values())))
    texts, images = (batch.get(name) or [None] * length for name in ("text", "image"))
    return [
        Content(" ".join(part for part in (instruction, text) if part), () if image is None else (image,))
        for text, image in zip(texts, images, strict=True)
    ]
