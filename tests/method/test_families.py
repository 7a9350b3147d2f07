"""Every proven family, as a tiny random model of its real architecture: a vector depends on its own turn only.

The references are slow and obvious: one unpadded prompt at a time through the stock forward, which makes its own
positions and masks.
"""

from __future__ import annotations

import importlib.util
import pickle
import sys
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, QWEN, alone, checkpoint, image, model, ragged, vectors

from muco.dialogue import Content, Dialogue, single_turn
from muco.errors import CheckpointError, DataError
from muco.template import EMB, MASK

TOLERANCE = 1e-5  # float32
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"

every_family = pytest.mark.parametrize("family", FAMILIES)
every_qwen = pytest.mark.parametrize("family", QWEN)


def close(got: np.ndarray, expected: np.ndarray) -> bool:
    return got.shape == expected.shape and float(np.abs(got - expected).max()) < TOLERANCE


def one_by_one(family: str, dialogues: list[Dialogue]) -> np.ndarray:
    return np.concatenate([vectors(model(family), [dialogue]) for dialogue in dialogues])


@every_family
def test_two_tokens_are_added_in_order(family):
    from transformers import AutoTokenizer

    before = len(AutoTokenizer.from_pretrained(checkpoint(family)))
    tokenizer = model(family).tokenizer
    assert tokenizer.convert_tokens_to_ids([EMB, MASK]) == [before, before + 1]
    assert len(tokenizer) == before + 2 == model(family).encoder.model.get_input_embeddings().num_embeddings
    assert tokenizer(EMB + MASK, add_special_tokens=False)["input_ids"] == [before, before + 1]


@every_family
def test_loaded_weights_are_those_of_the_checkpoint(family):
    from transformers import AutoModelForImageTextToText

    stock = AutoModelForImageTextToText.from_pretrained(checkpoint(family)).model.state_dict()
    loaded = model(family).encoder.model.state_dict()
    assert stock.keys() == loaded.keys()
    for name, weight in stock.items():
        assert torch.equal(loaded[name][: len(weight)], weight), name


@every_family
def test_encode_takes_text_images_and_both(family):
    picture, other = image(120, 70, 4), image(60, 90, 5)
    inputs = [
        "a ring",
        picture,
        {"text": "what is it?", "image": picture},
        {"images": [picture, other], "text": "both"},
    ]
    result = model(family).encode(inputs)
    assert result.dtype == np.float32 and result.shape == (4, model(family).get_embedding_dimension())
    assert np.allclose(np.linalg.norm(result, axis=1), 1, atol=1e-6)
    similar = result @ result.T - np.eye(4)
    assert similar.max() < 0.9999, "different inputs, different vectors"
    assert close(model(family).encode(inputs[::-1]), result[::-1])
    assert close(model(family).encode(inputs[2]), result[2])


@every_family
def test_an_image_is_the_same_as_path_bytes_and_pillow(family, tmp_path):
    picture = image(90, 61, 6)
    data = BytesIO()
    picture.save(data, "PNG")
    (tmp_path / "a.png").write_bytes(data.getvalue())
    result = model(family).encode([picture, data.getvalue(), tmp_path / "a.png", {"image": str(tmp_path / "a.png")}])
    assert np.abs(result - result[0]).max() < TOLERANCE


@every_family
def test_isolated_turns_are_single_turns(family):
    dialogues = ragged()
    together = vectors(model(family), dialogues)
    assert close(together, one_by_one(family, alone(dialogues)))
    contents = [Content(d.turns[0].text, d.images) for d in alone(dialogues)]
    assert close(together, model(family).encode(contents, batch_size=5))


@every_family
def test_compounded_turns_see_the_turns_before_and_isolated_ones_do_not(family):
    compounded, isolated = vectors(model(family), ragged(isolated=False)), vectors(model(family), ragged())
    difference = np.abs(compounded - isolated).max(axis=1)
    first = [j == 0 for dialogue in ragged() for j in range(len(dialogue.turns))]
    assert difference[first].max() < TOLERANCE
    assert difference[np.logical_not(first)].min() > 0.01


@every_family
def test_a_compounded_turn_does_not_see_the_turns_after_it(family):
    whole = vectors(model(family), ragged(isolated=False))
    prefixes = [Dialogue(d.context, d.turns[: j + 1], False) for d in ragged() for j in range(len(d.turns))]
    last = np.stack([vectors(model(family), [prefix])[-1] for prefix in prefixes])
    assert close(whole, last)


@every_family
@pytest.mark.parametrize("isolated", [True, False])
def test_a_row_alone_is_the_row_in_a_batch(family, isolated):
    dialogues = ragged(isolated=isolated)
    mixed = [*dialogues, *ragged(isolated=not isolated)]
    turns = sum(len(dialogue.turns) for dialogue in dialogues)
    assert close(vectors(model(family), mixed)[:turns], one_by_one(family, dialogues))


@every_family
@pytest.mark.parametrize("isolated", [True, False])
def test_padding_side_does_not_matter(family, isolated):
    right = vectors(model(family), ragged(isolated=isolated))
    assert close(on_the_left(family, ragged(isolated=isolated)), right)


def on_the_left(family: str, dialogues: list[Dialogue]) -> np.ndarray:
    encoder = model(family).encoder
    encoder.padding_side = "left"
    try:
        batch = encoder.collate(dialogues)
        assert (batch["attention_mask"][:, -1] == 1).all() and (batch["attention_mask"][:, 0] == 0).any()
        return vectors(model(family), dialogues)
    finally:
        encoder.padding_side = "right"


@every_family
def test_batch_size_does_not_matter(family):
    inputs = [Content(d.turns[0].text, d.images) for d in alone(ragged())]
    whole = model(family).encode(inputs, batch_size=len(inputs))
    for batch_size in (1, 4):
        assert close(model(family).encode(inputs, batch_size=batch_size), whole)


@every_family
def test_encode_turns_is_encode(family):
    pictures, questions = [image(80, 80, 7), image(100, 57, 8)], ["", "What is it?", " a space", "3"]
    single = model(family).encode([{"images": pictures, "text": question} for question in questions])
    isolated = model(family).encode_turns(pictures, questions)
    assert close(isolated, single)
    compounded = model(family).encode_turns(pictures, questions, mode="compounded")
    assert close(compounded, vectors(model(family), [as_dialogue(pictures, questions, False)]))
    assert np.abs(compounded - isolated)[1:].max(axis=1).min() > 0.01
    assert close(model(family).encode_turns(None, questions[1:]), model(family).encode(questions[1:]))


def as_dialogue(images: list[Any], texts: list[str], isolated: bool) -> Dialogue:
    return Dialogue(tuple(images), tuple(Content(text) for text in texts), isolated)


@every_family
def test_encode_turns_refuses_nothing_to_embed(family):
    for images, queries in ((None, []), (image(60, 60), []), (None, ["a", ""])):
        with pytest.raises(DataError, match="encode_turns: pass at least one query"):
            model(family).encode_turns(images, queries)
    with pytest.raises(ValueError, match="mode must be 'isolated' or 'compounded', got 'joined'"):
        model(family).encode_turns(None, ["a"], mode="joined")


@every_family
def test_the_image_is_paid_once(family):
    encoder, picture = model(family).encoder, image(112, 84)
    single = encoder.collate([as_dialogue([picture], ["a"], True)])
    several = encoder.collate([as_dialogue([picture], ["a"] * 5, True)])
    assert several["image_tokens"].tolist() == single["image_tokens"].tolist() != []
    token = encoder.muco_processor.family.image_id
    assert (several["input_ids"] == token).sum() == several["image_tokens"].sum()


@every_family
def test_special_tokens_in_data_are_refused_by_row_turn_and_token(family):
    encoder, template = model(family).encoder, model(family).encoder.muco_processor.template
    end = "<end_of_utterance>" if family == "idefics3" else "<|im_end|>"
    for token in (EMB, MASK, template.image_token, end, "<|im_start|>"):
        with pytest.raises(DataError, match="input 3 turn 1") as error:
            model(family).encode(["a", "much longer than the others", "bb", f"x {token} y", "c"], batch_size=2)
        assert repr(token) in str(error.value)
        with pytest.raises(DataError, match="turn 2"):
            model(family).encode_turns(image(60, 60), ["fine", token])
        dialogues = [
            Dialogue((), (Content("fine"),)),
            Dialogue((), (Content("fine"), Content(f"x{token}")), where="b:7"),
        ]
        with pytest.raises(DataError, match="b:7 turn 2") as error:
            encoder.collate(dialogues)
        assert repr(token) in str(error.value)
    model(family).encode([token[:-1] + " " for token in (EMB, MASK, template.image_token, end)])


@every_family
def test_a_bad_input_is_named_by_its_place_in_the_list(family):
    for bad, reason in ((b"no image", "image bytes"), ("", "nothing to embed"), ({"picture": 1}, "'picture'")):
        value = {"image": bad} if isinstance(bad, bytes) else bad
        with pytest.raises(DataError, match=f"input 4: .*{reason}"):
            model(family).encode(["a", "bb", "ccc", "dddd", value, "eeeee"], batch_size=2)


@every_family
def test_no_input_gives_no_vector(family):
    assert model(family).encode([]).shape == (0, model(family).get_embedding_dimension())


@every_family
def test_a_processor_survives_pickling(family):
    processor = model(family).encoder.muco_processor
    copied, picture = pickle.loads(pickle.dumps(processor)), image(70, 90)
    assert copied.text_ids("a ring") == processor.text_ids("a ring")
    assert copied.encode_image(picture).ids == processor.encode_image(picture).ids


@every_family
def test_the_pixel_budget_is_a_number_of_tokens(family):
    processor, picture = pickle.loads(pickle.dumps(model(family).encoder.muco_processor)), image(112, 80)

    def tokens(max_pixels: int) -> int:
        processor.set_pixels(None, max_pixels)
        return len(processor.encode_image(picture).ids)

    small, middle, large = tokens(56 * 56 - 1), tokens(84 * 84), tokens(112 * 112)
    assert 0 < small < middle < large


def test_a_budget_the_family_does_not_know_is_refused():
    processor = pickle.loads(pickle.dumps(model("idefics3").encoder.muco_processor))
    with pytest.raises(
        CheckpointError, match=r"^min_pixels: .*Idefics3ImageProcessorPil\) has no such limit; leave it out"
    ):
        processor.set_pixels(28 * 28, None)


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="transformers imports it where it can")
@every_family
def test_torchvision_is_not_needed(family):
    model(family).encode([image(60, 60)])
    assert "torchvision" not in sys.modules


# Positions and vectors against the stock model's own logic


@every_qwen
@pytest.mark.parametrize("side", ["right", "left"])
def test_positions_are_the_models_own(family, side):
    encoder = model(family).encoder
    single = [single_turn(Content(d.turns[0].text, d.images)) for d in alone(ragged())]
    encoder.padding_side = side
    try:
        batch = encoder.collate([*single, *ragged(isolated=False)])
    finally:
        encoder.padding_side = "right"
    expected, _ = encoder.model.get_rope_index(
        batch["input_ids"],
        mm_token_type_ids=(batch["input_ids"] == encoder.model.config.image_token_id).int(),
        image_grid_thw=torch.cat([image["image_grid_thw"] for image in batch["images"]]),
        attention_mask=batch["attention_mask"],
    )
    real = batch["attention_mask"].bool()
    assert torch.equal(batch["position_ids"][:, real], expected[:, real])
    assert len({tuple(image["image_grid_thw"][0].tolist()) for image in batch["images"]}) > 2, "several grids"


def qwen_reference(family: str, dialogue: Dialogue) -> np.ndarray:
    """The prompt as a string, tokenised at once; positions by the model itself."""
    processor, backbone = model(family).encoder.muco_processor, model(family).encoder.model
    inputs: dict[str, torch.Tensor] = {}
    content = ""
    if dialogue.images:
        inputs |= dict(processor.image_processor(images=list(dialogue.images), return_tensors="pt"))
        for grid in inputs["image_grid_thw"]:
            content += "<|vision_start|>" + "<|image_pad|>" * (int(grid.prod()) // 4) + "<|vision_end|>\n"
    content += dialogue.turns[0].text
    prompt = f"{SYSTEM}{content}<|im_end|>\n<|im_start|>assistant\n<|emb|>"
    inputs["input_ids"] = processor.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    if dialogue.images:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == backbone.config.image_token_id).int()
    return last_state(backbone, inputs)


def idefics3_reference(family: str, dialogue: Dialogue) -> np.ndarray:
    """The stock processor and its own chat template, which knows nothing of MuCo but the token at the end."""
    from transformers import AutoProcessor

    stock = AutoProcessor.from_pretrained(checkpoint(family), backend="pil")
    stock.tokenizer.add_tokens([EMB], special_tokens=True)
    text = dialogue.turns[0].text
    content = [{"type": "image"}] * len(dialogue.images) + [{"type": "text", "text": text}]
    prompt = stock.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True) + EMB
    images = [list(dialogue.images)] if dialogue.images else None
    inputs = stock(text=[prompt], images=images, return_tensors="pt", add_special_tokens=False)
    return last_state(model(family).encoder.model, inputs)


def last_state(backbone: torch.nn.Module, inputs: Any) -> np.ndarray:
    with torch.inference_mode():
        hidden = backbone(**inputs).last_hidden_state
    return torch.nn.functional.normalize(hidden[0, -1], dim=0).numpy()


@every_family
def test_vectors_are_those_of_the_stock_forward(family):
    reference = idefics3_reference if family == "idefics3" else qwen_reference
    expected = np.stack([reference(family, dialogue) for dialogue in alone(ragged())])
    assert close(vectors(model(family), ragged()), expected)
