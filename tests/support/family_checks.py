"""What a family can do with MuCo, found out on a tiny model of its real architecture: a row of docs/backbones.md."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import steps
import torch
from families import alone, checkpoint, image, model, vectors
from transformers import AutoModelForImageTextToText, AutoTokenizer

import muco
from muco.chat_template import from_chat_template
from muco.dialogue import Content, Dialogue, Sample, Turn
from muco.errors import MucoError
from muco.export import export
from muco.model import Model
from muco.seen import SeenImages
from muco.stock import family_processor, image_half
from muco.template import EMB
from muco.turns import sharing

ROOT = Path(__file__).parents[2]
# model type and the row of the table; some are the same family with other settings
ROWS = {
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "qwen3_vl_moe": "Qwen3-VL-MoE",
    "qwen3_5": "Qwen3.5",
    "qwen3_5_moe": "Qwen3.5-MoE",
    "idefics2": "Idefics2",
    "idefics2_window": "Idefics2, Mistral with windows",
    "idefics3": "Idefics3",
    "smolvlm": "SmolVLM 2",
    "llava": "LLaVA",
    "llava_next": "LLaVA-NeXT",
    "llava_onevision": "LLaVA-OneVision",
    "granite4_vision": "Granite 4 Vision",
    "gemma3": "Gemma 3",
    "gemma4": "Gemma 4",
    "internvl": "InternVL",
    "glm4v": "GLM-4V",
    "aya_vision": "Aya Vision",
    "ovis2": "Ovis 2",
    "minicpmv4_6": "MiniCPM-V 4.6",
    "paligemma": "PaliGemma",
    "lfm2_vl": "LFM2-VL",
    "mistral3": "Mistral 3",
}
NEED_TORCHVISION = ("lfm2_vl", "mistral3")


def documented() -> dict[str, list[str]]:
    """The rows of the table in docs/backbones.md: the cells after the family, its model type and what it needs."""
    lines = (ROOT / "docs" / "backbones.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {own[0]: own[2:] for own in cells if own[0] in ROWS.values()}


EXACT, NEAR = 1e-6, 1e-5  # largest difference of a coordinate: of one input alone and in a batch; of a turn in a row
WIDE, TALL, SQUARE = image(150, 64, 1), image(57, 130, 2), image(84, 84, 3)


def row(family: str) -> list[str]:
    """The cells of the table after the family's name; an AssertionError where something is wrong."""
    try:
        found = model(family)
    except MucoError as error:
        return [str(error).replace(str(checkpoint(family)), family)]
    several = found.encoder.muco_processor.several_images
    check_inputs(found, several)
    check_own_prompt(family, found)
    reading = found.encoder.reading
    kinds = ", ".join(_kind(kind, found) for kind in dict.fromkeys(reading.layers))
    way = check_turns(found, several)
    check_training(found)
    return ["several" if several else "one", kinds, way, "yes", check_saving(found)]


def check_inputs(found: Model, several: bool) -> None:
    """Text, image and both have vectors of their own, alike alone, in any batch and with padding on either side."""
    inputs = [
        Content("a ring"),
        Content("", (SQUARE,)),
        Content("what is it?", (SQUARE,)),
        Content("in words", (WIDE,)),
    ]
    inputs += [Content("both of them", (TALL, SQUARE))] if several else []
    singles = np.concatenate([found.encode([one]) for one in inputs])
    assert np.isfinite(singles).all() and np.allclose(np.linalg.norm(singles, axis=1), 1, atol=1e-6)
    assert (singles @ singles.T - 2 * np.eye(len(inputs))).max() < 0.9999, "different inputs, different vectors"
    assert np.abs(found.encode(inputs) - singles).max() < EXACT
    assert np.abs(found.encode(inputs, batch_size=2) - singles).max() < EXACT
    found.encoder.seen_images = SeenImages(1 << 20)
    for _ in range(2):  # first seen, then remembered
        assert np.abs(found.encode(inputs) - singles).max() < EXACT
    found.encoder.seen_images = None
    found.encoder.padding_side = "left"
    try:
        assert np.abs(found.encode(inputs) - singles).max() < EXACT
    finally:
        found.encoder.padding_side = "right"
    if not several:
        for asked in (Content("both", (TALL, SQUARE)), Content("", (TALL, TALL))):
            try:
                found.encode([asked])
            except MucoError as error:
                assert "use one image per input" in str(error)
            else:
                raise AssertionError("two images are taken, but were to be refused")


def check_own_prompt(family: str, found: Model) -> None:
    """Vectors are those of plain transformers, with the family's own processor and chat template, up to <|emb|>."""
    folder = str(checkpoint(family))
    wrapper = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = family_processor(
        folder, wrapper.config, image_half(folder, local_files_only=True), tokenizer, local_files_only=True
    )
    if tokenizer.chat_template is None:
        return  # the processor writes its prompt by itself, and nothing can follow it
    tokenizer.add_tokens([EMB], special_tokens=True)
    own = found.encoder.muco_processor.template
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    if from_chat_template(tokenizer, processor.image_token, special).head != own.head:
        return  # the paper's prompt; what is saved is compared with plain transformers below
    if found.encoder.muco_processor.family.appended:
        return
    wrapper.resize_token_embeddings(found.encoder.model.get_input_embeddings().num_embeddings)
    wrapper.model.load_state_dict(found.encoder.model.state_dict())  # the rows of the new tokens
    for images, text in (((), "what is it?"), ((SQUARE,), "what is it?"), ((WIDE,), "a ring of silver")):
        parts = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
        chat = [{"role": "user", "content": parts}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) + EMB
        bos = tokenizer.bos_token
        adds = not (bos and prompt.startswith(bos))
        given = [list(images)] if images else None
        inputs = processor(text=[prompt], images=given, return_tensors="pt", add_special_tokens=adds)
        with torch.inference_mode():
            hidden = wrapper.eval().model(**inputs).last_hidden_state
        expected = torch.nn.functional.normalize(hidden[0, -1], dim=0).numpy()
        assert np.abs(found.encode([Content(text, images)])[0] - expected).max() < EXACT, text


def dialogues(several: bool, *, isolated: bool = True) -> list[Dialogue]:
    """Turns of several lengths about an image, images in turns, and text alone."""
    asked = [Content(text) for text in ("", "What type of jewelry is this?", " led by a space", "3")]
    beside = [Content("A ring"), Content("the largest shape", (SQUARE,)), Content("", (WIDE,))]
    found = [Dialogue((WIDE,), tuple(asked), isolated), Dialogue((), tuple(beside), isolated)]
    found += [Dialogue((SQUARE,), (Content("one turn only"),), isolated)]
    if several:
        found.append(Dialogue((TALL, SQUARE), (Content("how many?"), Content("which?", (TALL,))), isolated))
    return found


def check_turns(found: Model, several: bool) -> str:
    """Isolated turns are single turns, in training's rows and in encode_turns; how the latter shares the image."""
    asked = dialogues(several)
    singles = np.concatenate([vectors(found, [one]) for one in alone(asked)])
    if found.encoder.reading.why_not_isolated:
        try:
            vectors(found, asked)
        except MucoError as error:
            assert "a later token changes" in str(error)
        else:
            raise AssertionError("several turns are taken, but were to be refused")
        got = found.encode_turns(WIDE, [turn.text for turn in asked[0].turns])
        assert np.abs(got - singles[: len(got)]).max() < NEAR
        return "single turns only"
    assert np.abs(vectors(found, asked) - singles).max() < NEAR
    start = 0
    for dialogue in asked:
        queries = [
            {"text": turn.text, "images": [*turn.images]} if turn.images else turn.text for turn in dialogue.turns
        ]
        got = found.encode_turns([*dialogue.context] or None, queries)
        assert np.abs(got - singles[start : start + len(got)]).max() < NEAR
        start += len(got)
    compounded = vectors(found, dialogues(True, isolated=False)[:1])
    assert np.abs(compounded - singles[: len(compounded)])[1:].max(axis=1).min() > 1e-3, "compounded turns see others"
    return {"cache": "exact, kept", "tree": "exact, in one pass"}[sharing(found.encoder)]


def check_training(found: Model) -> None:
    """A step of adapters, isolated, and one of all weights, compounded: the gradient cache changes nothing."""
    single = bool(found.encoder.reading.why_not_isolated)
    tolerance = 1e-5 if found.encoder.reading.recurrent else 2e-6  # a state sums up what it has read
    samples = [
        Sample(
            image=WIDE, turns=[Turn("what is it?", "a ring"), Turn("", "a wide silver ring"), Turn("how many?", "3")]
        ),
        Sample(image=SQUARE, turns=[Turn("what is that?", "a square of four colours"), Turn("which?", "the last one")]),
        Sample(turns=[Turn("a scene", {"image": TALL}), Turn("a word", "a longer answer about it")]),
    ]
    if single:
        samples = [sample.with_turns(sample.turns[:1]) for sample in samples]
    for trained, mode in (("adapters", "isolated"), ("all", "compounded")):
        copied = steps.to_train(found, trained)
        _without_dropout(copied)
        batch = steps.share(copied, samples, mode)
        chunked, plain = steps.cached(copied, [batch], 60, mode=mode), steps.plain(copied, batch, mode=mode)
        steps.assert_same(chunked, plain, tolerance)


def _without_dropout(found: Model) -> None:
    """Every pass draws its own, so that passes over chunks are not comparable with one over all."""
    for module in found.modules():
        rates = ("p",) if isinstance(module, torch.nn.Dropout) else [name for name in vars(module) if "dropout" in name]
        for name in rates:
            if isinstance(getattr(module, name), float):
                setattr(module, name, 0.0)


def check_saving(found: Model) -> str:
    """Saved and loaded, the model is the same; says whether plain transformers gets the same vectors from an export."""
    folder = Path(tempfile.mkdtemp(prefix="muco-saved-"))
    try:
        found.save(str(folder / "model"))
        again = muco.load(folder / "model", device="cpu", local_files_only=True)
        inputs = [Content("a ring"), Content("what is it?", (SQUARE,))]
        assert np.array_equal(again.encode(inputs), found.encode(inputs))
        assert again.fingerprint == found.fingerprint
        try:
            assert export(folder / "model", folder / "export")["ok"]
        except MucoError as error:
            assert "the family's own processor does not take" in str(error), error
            return "no: its processor takes no text without an image"
        return "yes"
    finally:
        shutil.rmtree(folder)


def _kind(kind: str, found: Model) -> str:
    reading = found.encoder.reading
    name = kind.removesuffix("_attention")
    notes = (["window"] if kind == "sliding_attention" else []) + (["image blocks"] if kind in reading.blocks else [])
    name = "recurrent" if kind in reading.recurrent else "full, both ways" if reading.looks_ahead else name
    return f"{name} with {' and '.join(notes)}" if notes else name
