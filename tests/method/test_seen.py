"""What a tower made of an image is kept: the same vectors, no second pass, within a bound, never of other weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import steps
import torch
from families import image, model

import muco
from muco.backbone import freeze_vision
from muco.dialogue import Content, Sample, Turn
from muco.model import Model
from muco.seen import SeenImages, _fixed_tower

# a tensor per image; patches in one row; padding that is taken out; parts of an image of which some tokens are dropped
FAMILIES = ("llava", "qwen2_vl", "gemma4", "llava_next")
ONE, WIDE, TALL, LIKE_ONE = image(84, 84, 1), image(150, 64, 2), image(57, 130, 3), image(84, 84, 4)


@pytest.fixture(params=FAMILIES)
def found(request) -> Iterator[Model]:
    loaded = model(request.param)
    _ = loaded.encoder.form  # learnt before anything is counted
    yield loaded
    loaded.encoder.seen_images = None


@pytest.fixture
def runs(found, monkeypatch) -> list[int]:
    """Grows whenever the tower really runs."""
    counted: list[int] = []
    with torch.no_grad():
        parts = _fixed_tower(found.encoder.model).modules()
    part = next(part for part in parts if isinstance(part, (torch.nn.LayerNorm, torch.nn.Linear)))
    own = part.forward
    monkeypatch.setattr(part, "forward", lambda *args, **kwargs: counted.append(1) or own(*args, **kwargs))
    return counted


def pictured(*pictures) -> list[Content]:
    return [Content("", (picture,)) for picture in pictures]


def test_an_image_is_seen_once(found, runs):
    expected = found.encode(pictured(ONE, WIDE, TALL, LIKE_ONE, ONE))
    found.encoder.seen_images = SeenImages(1 << 24)
    found.encode(pictured(ONE, WIDE, TALL))  # also tries whether outputs can be kept
    runs.clear()
    assert np.abs(found.encode(pictured(ONE, TALL)) - expected[[0, 2]]).max() < 1e-6 and not runs
    both = found.encode(pictured(ONE, WIDE, TALL, LIKE_ONE, ONE))  # one of them is new
    assert np.abs(both - expected).max() < 1e-6 and runs
    runs.clear()
    assert np.abs(found.encode(pictured(LIKE_ONE, LIKE_ONE)) - expected[[3, 3]]).max() < 1e-6 and not runs


def test_the_bound_of_memory_is_kept_and_the_latest_stay(found, runs):
    seen = found.encoder.seen_images = SeenImages(1 << 24)
    for picture in (ONE, WIDE, TALL):
        found.encode(pictured(picture))
    sizes = [size for _, size in seen._kept.values()]
    assert seen.used == sum(sizes)
    seen = found.encoder.seen_images = SeenImages(sizes[0] + sizes[2])
    for picture in (ONE, WIDE, ONE, TALL):  # the last one takes the place of the one used longest ago
        found.encode(pictured(picture))
    assert seen.used <= seen.memory
    runs.clear()
    found.encode(pictured(ONE, TALL))
    assert not runs
    found.encoder.seen_images = SeenImages(10)
    found.encode(pictured(ONE))
    assert found.encoder.seen_images.used == 0


def test_other_weights_or_another_precision_see_anew(found, runs):
    found.encoder.seen_images = SeenImages(1 << 24)
    before = found.encode(pictured(ONE))
    with torch.no_grad():
        weight = next(p for p in _fixed_tower(found.encoder.model).parameters() if p.ndim > 1)
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.mul_(1.5)
        changed = found.encode(pictured(ONE))
        found.encoder.seen_images = None
        assert np.abs(changed - before).max() > 1e-4 and np.array_equal(changed, found.encode(pictured(ONE)))
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    found.encoder.seen_images = SeenImages(1 << 24)
    found.encode(pictured(ONE))
    runs.clear()
    with torch.autocast("cpu", torch.bfloat16):
        found.encode(pictured(ONE))
    assert runs


def test_training_of_a_connector_is_the_same(runs, found):
    trained = steps.to_train(found, "all")
    freeze_vision(trained.encoder.model, vision=True, connector=False)
    trained.train()
    pairs = [Turn("which one?", "a ring"), Turn("what else?", "a cup")]
    batch = steps.share(
        trained, [Sample(image=one, turns=pairs[: 1 + n % 2]) for n, one in enumerate((ONE, WIDE, TALL))], "isolated"
    )
    expected = steps.plain(trained, batch)
    trained.encoder.seen_images = SeenImages(1 << 24)
    for budget in (None, 60, None):
        steps.assert_same(steps.cached(trained, [batch], budget), expected)
    inside = (
        found.encoder.model.config.model_type == "qwen2_vl"
    )  # its connector is part of the tower, which is seen anew
    assert bool(trained.encoder.seen_images.used) != inside


def test_what_is_trained_is_not_kept(found):
    trained = steps.to_train(found, "all")
    trained.encoder.seen_images = SeenImages(1 << 24)
    batch = steps.share(trained, [Sample(image=one, turns=[Turn("", "a ring")]) for one in (ONE, WIDE)], "isolated")
    steps.cached(trained, [batch], None)
    assert trained.encoder.seen_images.used == 0


def test_threads_that_share_a_model_and_what_it_saw_get_their_own_vectors(found):
    pictures = [image(84, 84, seed) for seed in range(12)]
    expected = found.encode(pictured(*pictures))
    one = SeenImages(1 << 24)
    found.encoder.seen_images = one
    found.encode(pictured(ONE))
    one.memory = 4 * one.used  # so that most are seen anew

    def asked(thread: int) -> float:
        errors = [found.encode(pictured(pictures[n])) - expected[n] for n in range(thread, 12, 2) for _ in range(3)]
        return float(np.abs(errors).max())

    with ThreadPoolExecutor(2) as threads:
        assert max(threads.map(asked, range(2))) < 1e-6


@pytest.mark.parametrize("seen", [None, SeenImages(1 << 24)])
def test_pixels_come_to_the_models_device_wherever_they_are(seen):
    """The library moves a batch to the device, but not the tensors in its lists. Here "meta" is the GPU."""
    own = model("llava")
    batch = own.preprocess([{"image": ONE}, {"image": LIKE_ONE}])
    elsewhere = copy.deepcopy(own.encoder)
    elsewhere.form = own.encoder.form
    elsewhere.model.to("meta")
    elsewhere.seen_images = seen
    assert all(tensor.device.type == "cpu" for image in batch["images"] for tensor in image.values())
    if seen is not None:
        seen._separable = False  # that cannot be tried without values
    features = elsewhere.image_features(batch)
    assert len(features) == 2 and all(tensor.device.type == "meta" for image in features for tensor in image)


def test_images_are_moved_on_the_way_to_what_is_kept(monkeypatch):
    """All that reaches the tower has passed ``to``, when it is tried and when it is used."""
    moved: set[int] = set()

    def watched(value, device):
        assert str(device) == "cpu"
        for own in value if isinstance(value, list) else [value]:
            moved.update(map(id, own.values()))
        return value

    monkeypatch.setattr("muco.seen.to", watched)
    own = model("qwen2_vl")
    batch = own.preprocess([{"image": ONE}, {"image": LIKE_ONE}])
    monkeypatch.setattr(own.encoder, "seen_images", SeenImages(1 << 24))
    own.encoder.image_features(batch)
    assert {id(tensor) for own in batch["images"] for tensor in own.values()} <= moved


def test_a_loaded_model_keeps_images_from_call_to_call(tiny_path):
    loaded = muco.load(tiny_path, device="cpu", image_memory=0.01)
    plain = muco.load(tiny_path, device="cpu")
    tower = _runs_of(loaded)
    texts = ["What is it?", "Which colour?"]
    first = loaded.encode_turns(ONE, texts)
    passed = len(tower)
    assert passed and np.abs(first - plain.encode_turns(ONE, texts)).max() < 1e-6
    again = loaded.encode_turns(ONE, ["Where?"])
    assert len(tower) == passed and np.abs(again - plain.encode_turns(ONE, ["Where?"])).max() < 1e-6
    assert np.abs(loaded.encode(pictured(ONE)) - plain.encode(pictured(ONE))).max() < 1e-6 and len(tower) == passed


def _runs_of(model: Model) -> list[int]:
    """Grows whenever the vision tower really runs."""
    runs: list[int] = []
    _ = model.encoder.form  # learnt before anything is counted
    with torch.no_grad():
        parts = _fixed_tower(model.encoder.model).modules()
    part = next(part for part in parts if isinstance(part, torch.nn.LayerNorm))
    part.register_forward_pre_hook(lambda *_: runs.append(1))
    return runs
