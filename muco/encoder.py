"""Backbone and processor as a sentence-transformers model: hidden states, one vector per turn, encode, save, load.

A saved model is a stock SentenceTransformer folder (Transformer, last-token Pooling, Normalize) plus ``muco.json``.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import torch
from sentence_transformers.base.modules.input_module import InputModule
from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from muco.backbone import FLEX, merge_adapters
from muco.batch import DialogueBatch, collate, to
from muco.branches import ARGUMENT, Branches, let_states_branch
from muco.dialogue import Content, Dialogue, as_content, single_turn
from muco.errors import DataError, MucoError
from muco.masks import masks_of
from muco.precision import autocast
from muco.processor import Processor
from muco.reading import Reading, seen_reading, stated_reading
from muco.seen import ONE_AT_A_TIME, SeenImages
from muco.stock import small_picture, write_json
from muco.vision import Features, Form, features_of, see, vision_modules, vision_parameters

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
        self.reading = self._read()
        let_states_branch(model)
        self._cut_to: int | None = None
        self.cut = 0  # texts that were cut and that nobody was told of
        self.seen_images: SeenImages | None = None  # of images that come again, if any are kept
        self.bfloat16: bool | None = None  # whether passes compute in it by autocast; None: as whoever calls does

    def _read(self) -> Reading:
        if self.model.device.type == "meta":
            return stated_reading(self.model, prefix=self.muco_processor.family.prefix)
        family = self.muco_processor.family
        return seen_reading(self.model, family.image_id, family.token_types)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def processor(self) -> ProcessorMixin:
        """The family's own processor, for the library; ``muco_processor`` prepares inputs."""
        return self.muco_processor.stock

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
        """True if everything beside the language model is frozen."""
        return not any(parameter.requires_grad for parameter in vision_parameters(self.model))

    def train(self, mode: bool = True) -> Encoder:
        super().train(mode)
        for module in vision_modules(self.model).values():
            if not any(parameter.requires_grad for parameter in module.parameters()):
                module.eval()  # else the statistics of a frozen tower would follow the batches
        return self

    def image_features(self, batch: DialogueBatch) -> list[Features]:
        """What the language model reads of each image: its visual tokens [tokens, dim], and further maps where a family
        has them (deepstack). As ``image_features`` of a batch they replace ``images``.
        """
        tokens, joins = batch["image_tokens"].tolist(), self.muco_processor.family.inputs
        kept = self.seen_images and self.seen_images.features_of
        with autocast(self.bfloat16, self.device):
            return see(self.model, self.form, batch["images"], tokens, joins, self.device, kept)

    @cached_property
    def form(self) -> Form:
        """Of the output of ``get_image_features``; learnt from two copies of a small image when images first pass."""
        image, joins = self.muco_processor.encode_image(small_picture()), self.muco_processor.family.inputs
        with ONE_AT_A_TIME, torch.no_grad():
            return Form(features_of(self.model, to([image.tensors] * 2, self.device), joins), image.tokens)

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        if "branch_ids" in features and self.reading.why_not_isolated:
            raise MucoError(f"isolated turns: {self.reading.why_not_isolated}; {self._instead}")
        if self.reading.looks_ahead and len(features["turn_rows"]) > len(features["input_ids"]):
            raise MucoError(f"several turns in a row: {self.reading.why_not_isolated}; {self._instead}")
        with autocast(self.bfloat16, self.device):
            features["token_embeddings"] = self._hidden(features)
        return features

    def _hidden(self, features: dict[str, Any]) -> torch.Tensor:
        device = self.model.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        else:  # a frozen vision tower may have another
            dtype = next(self.model.get_input_embeddings().parameters()).dtype
        inputs = model_inputs(features, self.muco_processor, self.reading, dtype, flex=self.uses_flex_attention)
        if "image_tokens" in features:
            seen = features.get("image_features") or self.image_features(features)
            inputs["mm_encoder_outputs"] = {"image": self.form.together(seen)}
        return self.model(**inputs).last_hidden_state

    @property
    def _instead(self) -> str:
        return "train with turns.limit: 1" if self.reading.looks_ahead else "train with turns.mode: compounded"

    def get_embedding_dimension(self) -> int:
        return self.model.config.get_text_config().hidden_size

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Writes plain weights (adapters folded in) as safetensors, and everything the stock library reads."""
        folder, model = Path(output_path), self.model
        if hasattr(model, "merge_and_unload"):
            model = merge_adapters(copy.deepcopy(model))
        model.save_pretrained(folder)
        self.muco_processor.save(folder)
        write_json(folder / "sentence_bert_config.json", STOCK_TRANSFORMER)


def model_inputs(
    batch: DialogueBatch, processor: Processor, reading: Reading, dtype: torch.dtype, *, flex: bool = False
) -> dict[str, Any]:
    """The arguments of the backbone's forward for a batch, but those of its images.

    Args:
        batch: A pass that continues another one also has its ``past_key_values`` and ``kept_tokens``, and where layers
            keep states ``kept_states`` and ``kept_rows`` (see :mod:`muco.turns`).
        dtype: In which attention is computed.
        flex: For a language model with FlexAttention.
    """
    family, ids = processor.family, batch["input_ids"]
    masks, real = masks_of(batch, reading, family.image_id, dtype, flex=flex), batch["attention_mask"]
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": real,
        "position_ids": batch["position_ids"] if family.rotary else batch["position_ids"][0],
        "use_cache": "past_key_values" in batch,
        "past_key_values": batch.get("past_key_values"),
        "return_dict": True,
    }
    if masks is not None:
        by_kind = masks | dict.fromkeys(reading.recurrent, real)
        inputs["attention_mask"] = by_kind if len(by_kind) > 1 else next(iter(masks.values()))
    if reading.recurrent and ("branch_ids" in batch or "kept_states" in batch):
        branches = batch.get("branch_ids", torch.zeros_like(ids))
        kept = batch.get("kept_states"), batch.get("kept_rows")
        inputs[ARGUMENT] = Branches.of(branches, real.bool(), *kept)
    for name, value in family.token_types.items() if reading.blocks or reading.looks_ahead else ():
        inputs[name] = torch.where(ids == family.image_id, value, 0)
    return inputs


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
