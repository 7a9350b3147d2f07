"""A model made ready for others: a folder for the sentence-transformers library, or one for vLLM.

::

    source ─load, cast─▶ model ─write─▶ DIR.part ─plain transformers─▶ vectors ─equal to the model's?─▶ DIR ─▶ hub

A folder gets its name only if it reproduces the model's vectors (:mod:`muco.export.parity`).
"""

from __future__ import annotations

import copy
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from muco.backbone import cast_weights, merge_adapters
from muco.base.files import claimed, writing
from muco.base.text import first_line
from muco.errors import CheckpointError, MucoError, OutputError
from muco.export.card import ADAPTER, Format, describe
from muco.export.parity import TOLERANCES, compare, examples, stock_vectors
from muco.model import Model, compute_in, from_backbone, load
from muco.training.build import build_model, saved_dtype
from muco.training.checkpoint import load_trained, run_of
from muco.training.folder import WEIGHTS_FILE
from muco.training.mixture import open_sources
from muco.training.recipe import trained_dimensions
from muco.vision import vision_parameters

INNER, WHOLE = "base_model.model.", "base_model.model.model."  # PEFT's names: of the inner model, within the whole one


def export(
    source: str,
    output: Path,
    *,
    format: Format = "sentence-transformers",
    adapters: Literal["merged", "separate"] = "merged",
    dtype: str | None = None,
    push: str | None = None,
) -> dict[str, Any]:
    """Writes a model for others and checks that its vectors are the same there.

    Args:
        source: A trained model or a hub id; or a checkpoint of a run (``RUN/checkpoints/checkpoint-N``), which still
            has its adapters.
        output: A folder that does not exist yet. It appears when the check has passed; otherwise what was written
            stays beside it as ``NAME.part``.
        format: "sentence-transformers" for the stock library, "vllm" for vLLM's server.
        adapters: "merged" into the weights, or "separate" in the folder ``adapter``, in PEFT's form.
        dtype: "float32", "bfloat16" or "float16"; as the source is if None, for a checkpoint as its run saves
            (``model.save_dtype``). Adapters are folded in float32, then all is rounded once; separate ones are float32.
        push: A repository on the Hugging Face hub, NAMESPACE/NAME, made private if it is new. ``recipe.yaml`` and
            ``run.json`` of the source, which name paths of this machine, go there too.
    Returns:
        ``ok`` and what was measured; ``output`` or, where the check failed, ``part``; ``url`` if pushed.
    Raises:
        OutputError: If ``output`` exists, cannot be written, or another process writes it.
        CheckpointError: If the source cannot be loaded, or has no adapters to keep separate.
        MucoError: If there is no token to push with, or the hub refuses.
    """
    choices = {"format": get_args(Format), "adapters": ("merged", "separate"), "dtype": (*TOLERANCES, None)}
    for (name, accepted), value in zip(choices.items(), (format, adapters, dtype), strict=True):
        if value not in accepted:
            raise MucoError(f"{name} must be one of {', '.join(filter(None, accepted))}, not {value!r}")
    with claimed(output, beside=True):
        if output.exists():
            raise OutputError(f"{output} already exists; choose another folder or delete it")
        if push is not None:
            _check_push(push)
        separate = adapters == "separate"
        model, shorter, own_dtype = load_source(source)
        if separate:
            _check_separable(source, model, format)
        before = _vectors(model)
        changed = _cast(model, getattr(torch, dtype) if dtype else own_dtype, separate=separate)
        expected = _vectors(model) if changed else before
        part = output.with_name(f"{output.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        with writing(part):
            part.mkdir(parents=True)
            _write(model, part, format, separate=separate)
            describe(part, source, format, model, shorter, separate=separate)
        adapter = part / ADAPTER if separate else None
        shown = examples(several_images=model.encoder.muco_processor.several_images)
        found = stock_vectors(part, shown, generation=format == "vllm", adapter=adapter)
        parity = compare(expected, found, str(model.encoder.model.dtype).removeprefix("torch."))
        result = {"format": format, "adapters": adapters, "ok": parity.ok, **asdict(parity)}
        if changed:
            result["cosine_to_source"] = compare(before, expected, parity.dtype).cosine
        if parity.dtype == "float32":  # what whoever computes in bfloat16 gets from the same folder
            compute_in(model, "bfloat16")
            result["cosine_in_bfloat16"] = compare(expected, _vectors(model), parity.dtype).cosine
        if not parity.ok:
            return result | {"part": str(part)}
        os.replace(part, output)
        result["output"] = str(output)
        if push:
            result["url"] = _push(output, push)
        return result


def load_source(source: str) -> tuple[Model, tuple[int, ...], torch.dtype]:
    """The model, a checkpoint's with its adapters; the shorter lengths it was trained for; how it is saved."""
    folder = Path(source)
    if (folder / WEIGHTS_FILE).is_file():
        return _load_checkpoint(folder)
    model = load(source, device="cpu")
    return model, trained_dimensions(source), model.encoder.model.dtype


def _load_checkpoint(folder: Path) -> tuple[Model, tuple[int, ...], torch.dtype]:
    _, recipe = run_of(folder)
    sources = open_sources(recipe) if recipe.model.tiny else []  # a tiny model's tokenizer is made from its data
    model = build_model(recipe, sources)
    load_trained(model, folder)
    dtype = saved_dtype(recipe.model, model.encoder.model)
    if recipe.model.adapter is None:  # trained weights are held in float32, and frozen ones as they were
        cast_weights(model.encoder.model, dtype)
    return model.to("cpu").eval(), recipe.loss.dimensions, dtype


def _check_separable(source: str, model: Model, format: Format) -> None:
    config = getattr(model.encoder.model, "peft_config", None)
    if config is None:
        raise CheckpointError(
            f"{source} has no adapters of its own (a finished model has them folded in); name a checkpoint of its run, "
            "RUN/checkpoints/checkpoint-N, or use --adapters merged"
        )
    if format == "vllm" and config["default"].use_dora:
        raise MucoError("vLLM takes LoRA but not DoRA; export with --adapters merged")


def _cast(model: Model, dtype: torch.dtype, *, separate: bool) -> bool:
    """Folds the adapters in, unless separate, and casts all other weights; returns whether any of these changed."""
    backbone = model.encoder.model
    adapted = hasattr(backbone, "peft_config")
    beside = {id(parameter) for parameter in vision_parameters(backbone)}
    adapters = {id(p) for p in backbone.parameters() if adapted and p.requires_grad} - beside
    weights = [parameter for parameter in backbone.parameters() if id(parameter) not in adapters]
    if all(weight.dtype == dtype for weight in weights):
        return False
    if not separate:
        model.encoder.model = merge_adapters(backbone, dtype)
        return True
    for weight in weights:
        weight.data = weight.data.to(dtype)
    return True


def _vectors(model: Model) -> dict[str, Any]:
    inputs = examples(several_images=model.encoder.muco_processor.several_images)
    whole = model.encoder.get_embedding_dimension()
    return dict(zip(inputs, model.encode([*inputs.values()], truncate_dim=whole), strict=True))


def _write(model: Model, folder: Path, format: Format, *, separate: bool) -> None:
    adapted = model.encoder.model
    backbone = merge_adapters(copy.deepcopy(adapted))
    if separate:  # the trained embeddings of tokens go into the plain model, as few readers of adapters know of them
        embeddings = backbone.get_input_embeddings().weight.data
        backbone = copy.deepcopy(adapted).unload()
        backbone.get_input_embeddings().weight.data = embeddings.clone()
    from_backbone(backbone, model.encoder.muco_processor, device="cpu").save(str(folder), create_model_card=False)
    if format == "vllm":
        _write_whole(folder)
    if separate:
        _write_adapters(adapted, folder / ADAPTER, whole=format == "vllm")


def _write_whole(folder: Path) -> None:
    """Saves the weights again under the names of the ``…ForConditionalGeneration`` class, which vLLM's loaders read."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    # an embedding model has no language-model head; the class wants one and takes the input embeddings for it
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = True
    whole = AutoModelForImageTextToText.from_pretrained(folder, config=config, dtype="auto", local_files_only=True)
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    whole.save_pretrained(folder)


def _write_adapters(adapted: Any, folder: Path, *, whole: bool) -> None:
    from peft import get_peft_model_state_dict

    weights = {name: weight for name, weight in get_peft_model_state_dict(adapted).items() if "lora_" in name}
    if whole:
        weights = {name.replace(INNER, WHOLE, 1): weight for name, weight in weights.items()}
    config = copy.deepcopy(adapted.peft_config["default"])
    config.trainable_token_indices, config.inference_mode, config.base_model_name_or_path = None, True, ".."
    folder.mkdir()
    config.save_pretrained(str(folder))
    save_file({k: w.detach().contiguous() for k, w in weights.items()}, folder / "adapter_model.safetensors")


def _check_push(repository: str) -> None:
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise MucoError(f"--push {repository!r} is not a valid repository name: {first_line(error)}") from error
    if repository.count("/") != 1:
        raise MucoError(f"--push {repository!r}: write it as NAMESPACE/NAME")
    if huggingface_hub.get_token() is None:
        raise MucoError("--push needs a token of the Hugging Face hub: set HF_TOKEN or run 'hf auth login'")


def _push(folder: Path, repository: str) -> str:
    hub = huggingface_hub.HfApi()
    try:
        hub.create_repo(repository, private=True, exist_ok=True)
        return str(hub.upload_folder(repo_id=repository, folder_path=folder).commit_url)
    except (HfHubHTTPError, OSError) as error:
        raise MucoError(f"{folder} is written, but the hub did not take it: {first_line(error)}") from error
