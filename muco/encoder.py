"""Backbone and processor as a sentence-transformers model: hidden states, one vector per turn, encode, save, load.

A saved model is a stock SentenceTransformer folder (Transformer, last-token Pooling, Normalize) plus ``muco.json``.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from sentence_transformers.base.modules.input_module import InputModule
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from muco.backbone import CONNECTOR_NAMES, FLEX, VISION_NAMES, merge_adapters, reads_all_before
from muco.batch import PATCH_KEYS, DialogueBatch, collate
from muco.dialogue import Content, Dialogue, as_content, single_turn
from muco.errors import DataError, MucoError
from muco.processor import Processor, write_config

_FORWARD = {"method": "forward", "method_output_name": "last_hidden_state"}
STOCK_TRANSFORMER = {  # what the stock library may be given, and the output it hands to the pooling
    "transformer_task": "feature-extraction",
    "modality_config": {"text": _FORWARD, "image": _FORWARD, "message": {**_FORWARD, "format": "structured"}},
    "module_output_name": "token_embeddings",
}


class Encoder(InputModule):
    """Backbone and processor; its output is the hidden state after the final norm, [rows, tokens, dim]."""

    save_in_root = True

    def __init__(
        self, model: nn.Module, processor: Processor, *, padding_side: Literal["right", "left"] = "right"
    ) -> None:
        super().__init__()
        self.model = model
        self.muco_processor = processor
        self.padding_side = padding_side
        self._cut_to: int | None = None
        self.cut = 0  # texts that were cut and that nobody was told of

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def processor(self) -> ProcessorMixin | PreTrainedTokenizerBase:
        """The family's own processor, else the tokenizer, for the library; ``muco_processor`` prepares inputs."""
        return self.muco_processor.stock or self.muco_processor.tokenizer

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.muco_processor.tokenizer

    @property
    def modalities(self) -> list[Any]:
        return ["text", "image", ("image", "text")]

    @property
    def max_seq_length(self) -> int | None:
        """Most tokens of an input, its images and the prompt included. More are an error where this is the model's
        context, as it is unless it is set; once it is set, longer texts are cut at their end, with a warning.
        """
        return self._cut_to or self.muco_processor.max_tokens

    @max_seq_length.setter
    def max_seq_length(self, tokens: int | None) -> None:
        if tokens is not None:
            context = self.muco_processor.max_tokens or sys.maxsize
            prompt = collate([Dialogue((), (Content(""),))], self.muco_processor)["input_ids"].shape[1]
            if isinstance(tokens, bool) or not isinstance(tokens, Integral) or not prompt < tokens <= context:
                raise MucoError(
                    f"max_seq_length must be a number of tokens from {prompt + 1} (the prompt has {prompt}) to the "
                    f"model's context, {context:,}; not {tokens!r}"
                )
        self._cut_to = None if tokens is None else int(tokens)

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> DialogueBatch:
        """Single-turn prompts of text, images or both.

        Raises:
            DataError: If an input is empty, its text holds a special token, or it has more tokens than the model
                reads; the message names its place in the list.
        """
        if prompt:
            raise MucoError("this model takes no prompt; write the instruction into the text")
        dialogues = []
        for number, value in enumerate(inputs):
            place = f"input {number}"
            if isinstance(value, dict) and "where" in value:
                value, place = Content(value["text"], tuple(value["images"])), value["where"]
            dialogues.append(single_turn(value, place))
        batch = self.collate(dialogues)
        self.cut += len(batch.get("cut_turns", ()))
        return batch

    def collate(self, dialogues: Sequence[Dialogue]) -> DialogueBatch:
        side, truncate = self.padding_side, "END" if self._cut_to else "NONE"
        return collate(dialogues, self.muco_processor, padding_side=side, truncate=truncate, max_tokens=self._cut_to)

    @property
    def uses_flex_attention(self) -> bool:
        return self.model.config.get_text_config()._attn_implementation == FLEX

    @property
    def vision_is_frozen(self) -> bool:
        """True if vision tower and connector are frozen."""
        parts = {*VISION_NAMES, *CONNECTOR_NAMES}
        return not any(p.requires_grad and parts & set(name.split(".")) for name, p in self.model.named_parameters())

    def image_features(self, batch: DialogueBatch) -> list[tuple[Tensor, ...]]:
        """What the language model reads of each image: its visual tokens [tokens, dim], and further maps where a family
        has them (deepstack). As ``image_features`` of a batch they replace ``pixel_values``.
        """
        output = self.model.get_image_features(**_pixels(batch, self.muco_processor), return_dict=True)
        pooled = output.pooler_output  # a tensor, or some, of all images' tokens one after another
        pooled = pooled if isinstance(pooled, Tensor) else torch.cat([*pooled])
        maps = [m.flatten(0, -2) for m in (pooled, *(getattr(output, "deepstack_features", None) or ()))]
        patches = batch["image_patches"]
        lengths = (patches * len(maps[0]) // patches.sum()).tolist()
        return list(zip(*(tokens.split(lengths) for tokens in maps), strict=True))

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        tokens = features["input_ids"].shape[1]
        if "branch_ids" in features and not reads_all_before(self.model, tokens):
            raise MucoError(
                f"isolated turns, {tokens} tokens in a row: this model has layers that do not attend to all earlier "
                "tokens, and the mask of isolated turns would override them; train with turns.mode: compounded"
            )
        device = self.model.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        else:  # a frozen vision tower may have another
            dtype = next(self.model.get_input_embeddings().parameters()).dtype
        inputs = model_inputs(features, self.muco_processor, dtype, flex=self.uses_flex_attention)
        features["token_embeddings"] = self.model(**inputs).last_hidden_state
        return features

    def get_embedding_dimension(self) -> int:
        return self.model.config.get_text_config().hidden_size

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Writes plain weights (adapters folded in) as safetensors, and everything the stock library reads."""
        folder, model = Path(output_path), self.model
        if hasattr(model, "merge_and_unload"):
            model = merge_adapters(copy.deepcopy(model))
        model.save_pretrained(folder)
        self.muco_processor.save(folder)
        write_config(folder / "sentence_bert_config.json", STOCK_TRANSFORMER)


def tree_mask(batch: DialogueBatch) -> Tensor | None:
    """Who may attend to whom, bool [B, 1, L, L], or None where the usual causal mask says it all.

    No token attends to padding but each padding token to itself, so that no row of the softmax is empty.
    """
    if "branch_ids" not in batch:
        return None
    rows, tokens = (torch.arange(size, device=batch["branch_ids"].device) for size in batch["branch_ids"].shape)
    return _tree_rule(batch)(rows[:, None, None, None], None, tokens[:, None], tokens)


def _tree_rule(batch: DialogueBatch) -> Callable[..., Tensor]:
    """Of (row, head, query, key), index tensors that broadcast: whether the query may attend to the key."""
    branches, real = batch["branch_ids"], batch["attention_mask"].bool()

    def allowed(row: Tensor, head: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
        own_or_trunk = (branches[row, query] == branches[row, key]) | (branches[row, key] == 0)
        return ((query >= key) & own_or_trunk & real[row, key]) | (query == key)

    return allowed


def attention_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask [B, 1, L, L] as a bias of attention scores: 0 where it is True, else minus infinity.

    All layers share it; of a boolean mask torch would make and keep one per layer. Rows begin at multiples of 16
    elements, because kernels would otherwise copy the bias.
    """
    *outer, length = mask.shape
    bias = torch.zeros(*outer, -(-length // 16) * 16, dtype=dtype, device=mask.device)[..., :length]
    return bias.masked_fill_(~mask, float("-inf"))


def tree_block_mask(batch: DialogueBatch) -> BlockMask | None:
    """:func:`tree_mask` for FlexAttention, which skips blocks in which nothing is allowed; for all heads and layers."""
    if "branch_ids" not in batch:
        return None
    rows, length = batch["branch_ids"].shape
    return create_block_mask(_tree_rule(batch), rows, None, length, length, device=batch["branch_ids"].device)


def model_inputs(
    batch: DialogueBatch, processor: Processor, dtype: torch.dtype, *, flex: bool = False
) -> dict[str, Any]:
    """The arguments of the backbone's forward for a batch.

    Args:
        batch: A pass that continues another one also has its ``past_key_values``, and by ``attention_allowed``, bool
            [B, 1, L, kept + L], says which tokens read which (see :mod:`muco.turns`).
        dtype: In which attention is computed.
        flex: For a language model with FlexAttention.
    """
    mask: Any = batch.get("attention_allowed")
    if mask is None:
        mask = tree_block_mask(batch) if flex else tree_mask(batch)
    if isinstance(mask, Tensor):
        mask = attention_bias(mask, dtype)
    inputs: dict[str, Any] = {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"] if mask is None else mask,
        "position_ids": batch["position_ids"] if processor.rotary_3d else batch["position_ids"][0],
        "use_cache": "past_key_values" in batch,
        "past_key_values": batch.get("past_key_values"),
        "return_dict": True,
    }
    if "image_features" in batch:
        # in the form in which a backbone's own vision tower returns them
        pooled, *further = zip(*batch["image_features"], strict=True)
        seen = SimpleNamespace(pooler_output=pooled, deepstack_features=[torch.cat(level) for level in further])
        return inputs | {"mm_encoder_outputs": {"image": seen}}
    return inputs | _pixels(batch, processor)


def _pixels(batch: DialogueBatch, processor: Processor) -> dict[str, Tensor]:
    """The pixels of a batch, if any, as the family takes them."""
    inputs = {key: batch[key] for key in (*PATCH_KEYS, "image_grid_thw") if key in batch}
    if processor.rotary_3d:
        return inputs
    # other families take [rows, tiles, …] and flatten it; the order of the tiles is all that counts
    return {key: value[None] for key, value in inputs.items()}


def content_of(value: Any, where: str) -> Content:
    """What one vector is of; a list or tuple may hold images, but texts in it are not file names."""
    pair = isinstance(value, (list, tuple)) and any(isinstance(part, str) for part in value)
    try:
        if not pair:
            return as_content(value)
    except DataError as error:
        if isinstance(value, (bytes, Mapping, list, tuple)):
            raise DataError(f"{where}: {error}") from None
    raise DataError(
        f"{where} is of type {type(value).__name__}{', of texts' if pair else ''}; for each vector pass a text, an "
        "image (a path, bytes or a Pillow image), or a mapping with 'text' and 'image' or 'images'"
    )
