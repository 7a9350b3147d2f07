"""The cached step equals the plain one, in value and gradient, and runs frozen vision once."""

from __future__ import annotations

import logging

import pytest
import steps
import torch
from torch.utils.flop_counter import FlopCounterMode

from muco.batch import split
from muco.errors import TrainingError
from muco.loss import MultiTurnLoss
from muco.step import TrainingStep

BUDGETS = (1, 97, 200, 400, 10**6)  # one row at a time; that do not divide, that do; more than the batch


@pytest.fixture(scope="module")
def samples(scenes) -> steps.InMemory:
    return steps.ragged_samples(scenes)


@pytest.mark.parametrize("mode", ["isolated", "compounded"])
@pytest.mark.parametrize("trained", ["adapters", "language", "all"])
def test_every_budget_gives_the_plain_value_and_gradient(tiny_model, samples, mode, trained):
    model = steps.to_train(tiny_model, trained)
    batch = steps.share(model, samples, mode)
    expected = steps.plain(model, batch)
    assert any("visual" in name for name in expected[1]) == (trained == "all")
    counts = set()
    for budget in BUDGETS:
        steps.assert_same(steps.cached(model, [batch], budget), expected)
        counts.add(len(split(batch["query"], budget)))
    assert len(counts) > 3 and {1, len(samples)} <= counts


@pytest.mark.parametrize("trained", ["adapters", "all"])
def test_a_batch_within_the_budget_is_passed_once_in_several_chunks(tiny_model, samples, trained, monkeypatch):
    model = steps.to_train(tiny_model, trained)
    batch = steps.share(model, samples, "isolated")
    expected = steps.plain(model, batch)
    monkeypatch.setattr("muco.batch.PASS", 1)  # so that small dialogues are worth cutting
    assert len(split(batch["query"], 10**6)) > 2
    passes = []
    model.encoder.model.register_forward_pre_hook(lambda module, args: passes.append(torch.is_grad_enabled()))
    steps.assert_same(steps.cached(model, [batch], 10**6), expected)
    assert len(passes) > 4 and all(passes), "no pass is made twice"


def test_a_step_is_made_plainly_only_if_both_sides_fit_together(tiny_model, samples):
    model = steps.to_train(tiny_model, "adapters")
    batch = steps.share(model, samples, "isolated")
    sides = [sum(chunk["input_ids"].numel() for chunk, _ in split(batch[side], 10**6)) for side in ("query", "target")]
    with_graph: list[bool] = []
    model.encoder.model.register_forward_pre_hook(lambda module, args: with_graph.append(torch.is_grad_enabled()))
    for budget, plain in ((sum(sides), True), (sum(sides) - 1, False)):
        assert budget > max(sides), "either side alone would fit"
        with_graph.clear()
        steps.cached(model, [batch], budget)
        assert all(with_graph) == plain and len(with_graph) > 1
        assert plain or with_graph.count(False) == with_graph.count(True) - 1, "the largest chunk passes once"


@pytest.mark.parametrize("trained", ["adapters", "all"])
def test_a_batch_in_parts_is_the_batch(tiny_model, samples, trained):
    model = steps.to_train(tiny_model, trained)
    expected = steps.plain(model, steps.share(model, samples, "isolated"))
    places = [batch.place for batch in samples]
    for cuts in ((1, 4), (2, 3, 6)):
        parts = [samples[a:b] for a, b in zip((0, *cuts), (*cuts, len(samples)), strict=True)]
        assert sum(map(len, parts)) == len(places)
        for budget in (97, None):
            found = steps.cached(model, [steps.share(model, part, "isolated") for part in parts], budget)
            steps.assert_same(found, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_both_passes_draw_the_same_dropout(tiny_model, samples, checkpointing):
    """Chunks of one row: the masks of a row depend on the state of the generator alone, which we can set by hand."""
    model = steps.to_train(tiny_model, "adapters", dropout=0.3)
    if checkpointing:
        model.encoder.model.activation_checkpointing_enable({"use_reentrant": False})
    batch = steps.share(model, samples, "isolated")
    step = TrainingStep(model, MultiTurnLoss(model, **steps.LOSS), token_budget=1)
    torch.manual_seed(3)
    value = step([batch]).loss.item()
    found = value, steps.gradients(step.loss)

    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    cuts = [(side, *cut) for side in ("query", "target") for cut in split(batch[side], 1)]
    passed = [
        (side, turns, model.embed(chunk))
        for side, chunk, turns in sorted(cuts, key=lambda cut: cut[1]["input_ids"].numel())
    ]
    vectors = []
    for side in ("query", "target"):
        turns, parts = zip(*((turns, part) for own, turns, part in passed if own == side), strict=True)
        vectors.append(torch.cat(parts)[torch.cat(turns).argsort()])
    loss = MultiTurnLoss(model, **steps.LOSS)
    other = loss.of_vectors(*vectors, batch["ids"])
    other.backward()
    steps.assert_same(found, (other.item(), steps.gradients(loss)))
    other = steps.cached(model, [batch], 1, seed=4)[0]
    assert abs(other - value) > 1e-4, "dropout is off: nothing is compared"


def vision_flops(model, call) -> int:
    """Operations inside the vision tower, whether it is called by the model or by itself."""
    names = ("visual", type(model.encoder.model.visual).__name__)
    with FlopCounterMode(display=False, depth=None) as counter:
        call()
    counts = counter.get_flop_counts()
    return sum(sum(ops.values()) for name, ops in counts.items() if name.split(".")[-1] in names)


@pytest.mark.slow
def test_frozen_vision_runs_once_and_without_a_graph(tiny_model, samples):
    model = steps.to_train(tiny_model, "adapters")
    batch = steps.share(model, samples, "isolated")
    sides = [s for s in (batch["query"], batch["target"]) if "images" in s]

    def see() -> None:
        for side in sides:
            for features in model.encoder.image_features(side):
                assert not any(tensor.requires_grad for tensor in features)

    _ = model.encoder.form  # learnt before anything is counted
    once = vision_flops(model, see)
    assert once > 0
    for budget in (1, 10**6):
        assert vision_flops(model, lambda budget=budget: steps.cached(model, [batch], budget)) == once

    trained = steps.to_train(tiny_model, "all")
    forward = vision_flops(trained, lambda: steps.cached(trained, [batch], 97))
    assert forward > 2 * once  # both passes and backward


@pytest.mark.parametrize("room", [0.0, 1e-5, 8.0])
def test_features_may_wait_in_host_memory(tiny_model, samples, room):
    model = steps.to_train(tiny_model, "adapters")
    batch = steps.share(model, samples, "isolated")
    expected = steps.plain(model, batch)
    model.zero_grad(set_to_none=True)
    step = TrainingStep(model, MultiTurnLoss(model, **steps.LOSS), token_budget=97, feature_memory=room)
    steps.assert_same((step([batch]).loss.item(), steps.gradients(step.loss)), expected)


@pytest.mark.parametrize("budget", [None, 1000])
def test_out_of_memory_halves_the_budget_and_repeats_the_step(tiny_model, samples, budget, caplog):
    model = steps.to_train(tiny_model, "adapters")
    batch = steps.share(model, samples, "isolated")
    expected = steps.plain(model, batch)
    model.zero_grad(set_to_none=True)
    device = steps.Limited(model, 300)
    step = TrainingStep(model, MultiTurnLoss(model, **steps.LOSS), token_budget=budget)
    with caplog.at_level(logging.WARNING, "muco"):
        steps.assert_same((step([batch]).loss.item(), steps.gradients(step.loss)), expected)
    assert device.failed and step.token_budget <= 300
    assert f"continuing with token_budget {step.token_budget}" in caplog.text
    failures = len(device.failed)
    model.zero_grad(set_to_none=True)
    steps.assert_same((step([batch]).loss.item(), steps.gradients(step.loss)), expected)
    assert len(device.failed) == failures, "the smaller budget is kept"


def test_out_of_memory_in_the_second_pass_leaves_no_half_gradient(tiny_model, samples):
    model = steps.to_train(tiny_model, "adapters")
    batch = steps.share(model, samples, "isolated")
    expected = steps.plain(model, batch)
    model.zero_grad(set_to_none=True)
    failed = []

    def fail_once(module, args, kwargs) -> None:
        if torch.is_grad_enabled() and kwargs["input_ids"].shape[0] < 3 and not failed:  # not the first chunk
            failed.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    model.encoder.model.register_forward_pre_hook(fail_once, with_kwargs=True)
    step = TrainingStep(model, MultiTurnLoss(model, **steps.LOSS), token_budget=200)
    steps.assert_same((step([batch]).loss.item(), steps.gradients(step.loss)), expected)
    assert failed and step.token_budget < 200


@pytest.mark.slow
def test_one_dialogue_that_does_not_fit_ends_the_run(tiny_model, samples):
    model = steps.to_train(tiny_model, "adapters")
    batch = steps.share(model, samples, "isolated")
    steps.Limited(model, 30)
    step = TrainingStep(model, MultiTurnLoss(model, **steps.LOSS), token_budget=1000)
    with pytest.raises(TrainingError, match=r"out of memory with one dialogue of \d+ tokens.*max_pixels"):
        step([batch])


@pytest.mark.parametrize("budget", [None, 97])
@pytest.mark.parametrize(
    "turn", [steps.Turn("violet", "a circle"), steps.Turn("a shape", "a circle", negatives=["violet"])]
)
def test_a_loss_that_is_no_number_names_the_samples(tiny_model, samples, turn, budget):
    model = steps.to_train(tiny_model, "language")
    word = "violet"  # in one sample only: in its query, or in its hard negative
    poisoned = [samples[0], samples[2], samples[6].with_turns([*samples[6].turns[:1]])]
    poisoned[1] = steps.Sample(image=samples[2].images[0], turns=[turn], where="train.jsonl:2")
    tokenizer = model.encoder.tokenizer
    others = set(tokenizer(" ".join(t.target[0].text for s in samples for t in s.turns))["input_ids"])
    rare = [token for token in tokenizer(word)["input_ids"] if token not in others]
    embeddings = model.encoder.model.get_input_embeddings()
    with torch.no_grad():
        embeddings.weight[rare] = float("nan")
    batch = steps.share(model, poisoned, "isolated")
    step = TrainingStep(model, MultiTurnLoss(model, **steps.LOSS), token_budget=budget)
    with pytest.raises(TrainingError, match=r"the loss is nan; vectors are not finite for .*train\.jsonl:2"):
        step([batch])


def test_the_report_counts_tokens_and_padding(tiny_model, samples):
    model = steps.to_train(tiny_model, "adapters")
    batch = steps.share(model, samples, "isolated")
    tokens = sum(int(batch[side]["attention_mask"].sum()) for side in ("query", "target"))
    for budget in (1, 200, None):
        report = TrainingStep(model, MultiTurnLoss(model), token_budget=budget)([batch])
        cut = [chunk for side in ("query", "target") for chunk, _ in split(batch[side], budget or 10**6)]
        passed = sum(chunk["input_ids"].numel() for chunk in cut)
        assert report.tokens == tokens and report.chunks == len(cut)
        assert report.padding == pytest.approx(1 - tokens / passed)
    assert TrainingStep(model, MultiTurnLoss(model), token_budget=1)([batch]).padding == 0


def test_bfloat16_autocast_keeps_every_gradient(tiny_model, samples):
    """Weights that autocast has cast without a graph in the first pass must not serve the second one."""
    model = steps.to_train(tiny_model, "language")
    batch = steps.share(model, samples, "isolated")

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    found = {}
    for budget in (None, 97):
        model.zero_grad(set_to_none=True)
        step = TrainingStep(model, MultiTurnLoss(model, **steps.LOSS), token_budget=budget, autocast=autocast)
        found[budget] = step([batch]).loss.item(), steps.gradients(step.loss)
    (value, grads), (other, others) = found[None], found[97]
    assert other == pytest.approx(value, rel=0.02) and grads.keys() == others.keys()
    for name, gradient in grads.items():
        assert torch.nn.functional.cosine_similarity(gradient.flatten(), others[name].flatten(), dim=0) > 0.98, name


def test_a_step_without_a_turn_is_not_made(tiny_model):
    model = steps.to_train(tiny_model, "adapters")
    step = TrainingStep(model, MultiTurnLoss(model, **steps.LOSS))
    assert step([steps.share(model, [], "isolated")] * 2) is None
    assert not steps.gradients(step.loss)
