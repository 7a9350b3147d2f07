"""Fine-tuning by reconstruction: what is hidden, the four losses against a loop, whole steps and runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import steps
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import normalize

import muco
from muco.data import open_data
from muco.dialogue import Content, Sample, Turn
from muco.info_nce import reconstruction_info_nce
from muco.loss import ReconstructionLoss
from muco.negatives import SampleIds, TurnIds
from muco.reconstruction import hide, reconstruction_dialogues
from muco.step import TrainingStep
from muco.template import MASK
from muco.training.prepared import Chosen, batch_of, prepare_pair
from muco.training.recipe import from_dict

PICTURE = Image.new("RGB", (56, 56), "red")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# ---------------------------------------------------------------- what is hidden


@given(st.lists(st.text("abc", min_size=1, max_size=3), max_size=12), st.integers(0, 2**32 - 1))
def test_what_is_left_stands_in_order_and_masks_are_merged(words, seed):
    hidden = hide(Content(" ".join(words)), rng(seed)).split()
    assert hidden and not any(a == b == MASK for a, b in zip(hidden, hidden[1:], strict=False))
    rest = iter(words)
    assert all(word in rest for word in hidden if word != MASK), "a subsequence"
    left = len([word for word in hidden if word != MASK])
    assert (MASK in hidden) == (left < len(words) or not words)


def test_half_of_the_time_everything_is_hidden_and_else_half_of_the_words():
    text = " ".join("word" for _ in range(20))
    hidden = [hide(Content(text), rng(seed)).split() for seed in range(2000)]
    assert 0.46 < np.mean([words == [MASK] for words in hidden]) < 0.54
    shown = [words.count("word") / 20 for words in hidden if words != [MASK]]
    assert 0.48 < np.mean(shown) < 0.52


def test_an_image_is_hidden_as_its_caption_or_as_one_mask():
    plain, captioned = Content("below", (PICTURE,)), Content("below", (PICTURE,), caption="two red dots")
    assert {hide(plain, rng(s)) for s in range(60)} == {MASK, f"{MASK} below"}
    said = {word for s in range(60) for word in hide(captioned, rng(s)).split()}
    assert said == {MASK, "a", "picture", "of", "two", "red", "dots", "below"}
    assert captioned == plain, "a caption is no part of what a content is"


def test_both_sides_are_dialogues_of_two_turns():
    sample = Sample(image=PICTURE, turns=[Turn({"text": "what?", "caption": "a red square"}, "a square")], where="a:1")
    query, target = reconstruction_dialogues(sample, sample.turns[0].query[0], sample.turns[0].target[0], rng(3))
    assert query.context == (PICTURE,) and target.context == ()
    assert [d.turns[0].text for d in (query, target)] == ["what?", "a square"]
    assert not query.isolated and query.reconstructs and query.where == "a:1"
    assert all(MASK in d.turns[1].text and not d.turns[1].images for d in (query, target))
    shown = {
        w for s in range(40) for w in reconstruction_dialogues(sample, *pair(sample), rng(s))[1].turns[1].text.split()
    }
    assert {"what?", "red", "square"} <= shown, "the query's text and the caption of its image"


def test_as_a_reply_lines_are_kept_and_words_are_parted_at_blanks_only():
    content = Content("Take this\nsquare", (PICTURE,), caption="two red dots")
    whole = "Image description: two red dots\nTake this\nsquare\n"
    hidden = [hide(content, rng(seed), as_reply=True) for seed in range(400)]
    assert 0.4 < np.mean([text == MASK for text in hidden]) < 0.6
    parts = whole.split(" ")
    assert parts[-2:] == ["dots\nTake", "this\nsquare\n"]
    for text in hidden:
        rest = iter(parts)
        assert all(word in rest for word in text.split(" ") if word != MASK) and f"{MASK} {MASK}" not in text
    assert max(hidden, key=len).endswith("square\n")
    shown = {hide(Content("below", (PICTURE,)), rng(seed), as_reply=True) for seed in range(60)}
    assert shown == {MASK, f"{MASK}\nbelow\n"}, "an image without a caption is a mask"


def test_with_requests_the_assistant_says_the_hidden_counterpart():
    sample = Sample(image=PICTURE, turns=[Turn({"text": "what?", "caption": "a red square"}, "a square")], where="a:1")
    query, target = reconstruction_dialogues(sample, *pair(sample), rng(3), ("Say it.", "Guess it."))
    plain = reconstruction_dialogues(sample, *pair(sample), rng(3))
    for dialogue, other in ((query, plain[0]), (target, plain[1])):
        assert [turn.text for turn in dialogue.turns] == [other.turns[0].text, "Guess it."]
        assert dialogue.exchange.request == "Say it." and MASK in dialogue.exchange.reply and not other.exchange
        assert dialogue.context == other.context and dialogue.reconstructs
    replies = {
        word
        for seed in range(40)
        for dialogue in reconstruction_dialogues(sample, *pair(sample), rng(seed), ("Say it.", "Guess it."))
        for word in dialogue.exchange.reply.split()
    }
    assert replies == {MASK, "a", "square", "Image", "description:", "red", "what?"}


def pair(sample: Sample) -> tuple[Content, Content]:
    return sample.turns[0].query[0], sample.turns[0].target[0]


@pytest.mark.parametrize("text", ["a <|mask|> here", "an <|emb|>", "<|image_pad|>"])
@pytest.mark.parametrize("side", ["query", "target"])
def test_special_tokens_of_the_data_are_refused_all_the_same(tiny_model, text, side):
    turn = Turn(**({"query": "q", "target": "t"} | {side: text}))
    sample = Sample(turns=[turn], where="rows.jsonl:7")
    with pytest.raises(muco.DataError, match=r"rows\.jsonl:7 turn [12]: the text contains the special token"):
        prepare_pair(sample, Chosen.of(turn, rng()), rng(1), "k", tiny_model.encoder.muco_processor)


# ---------------------------------------------------------------- the loss


def slow(sides, ids, targets, hard, owners, hard_ids, temperature, joint, masked) -> dict[str, torch.Tensor]:
    terms = {}
    for a in ("q", "q2"):
        for b in ("p", "p2"):
            losses = []
            for i, query in enumerate(sides[a]):
                own = query @ sides[b][i] / temperature
                scores = [own]
                for kind in ("p", "p2") if joint else (b,):
                    for j, other in enumerate(sides[kind]):
                        counterpart = i == j and kind != b and not masked
                        if counterpart or (ids[i] != ids[j] and targets[i] != targets[j]):
                            scores.append(query @ other / temperature)
                for vector, owner, identity in zip(hard, owners, hard_ids, strict=True):
                    if (owner == i or ids[owner] != ids[i]) and identity != targets[i]:
                        scores.append(query @ vector / temperature)
                losses.append(torch.logsumexp(torch.stack(scores), 0) - own)
            terms[a + b] = torch.stack(losses).mean()
    return terms


@pytest.mark.parametrize("block", [1, 30, 10**6])
@pytest.mark.parametrize(("joint", "masked"), [(False, True), (True, True), (True, False)])
def test_the_four_terms_equal_a_loop_in_value_and_gradient(monkeypatch, block, joint, masked):
    torch.manual_seed(0)
    monkeypatch.setattr("muco.info_nce.BLOCK", block)
    raw = {name: torch.randn(6, 8, requires_grad=True) for name in ("q", "q2", "p", "p2")}
    raw_hard = torch.randn(3, 8, requires_grad=True)
    ids, targets = torch.tensor([0, 1, 1, 2, 3, 4]), torch.tensor([7, 8, 9, 7, 5, 6])
    owners, hard_ids = torch.tensor([0, 4, 2]), torch.tensor([1, 8, 2])
    leaves = [*raw.values(), raw_hard]

    def both(function) -> list[torch.Tensor]:
        sides = {name: normalize(side, dim=1) for name, side in raw.items()}
        terms = function(sides, normalize(raw_hard, dim=1))
        assert list(terms) == ["qp", "qp2", "q2p", "q2p2"]
        values = torch.stack([*terms.values()])
        return [values.detach(), *torch.autograd.grad((values * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum(), leaves)]

    found = both(
        lambda sides, hard: reconstruction_info_nce(
            **sides,
            hard_negatives=hard,
            temperature=0.3,
            joint=joint,
            sample_ids=ids,
            target_ids=targets,
            hard_negative_pairs=owners,
            hard_negative_ids=hard_ids,
            mask_counterpart=masked,
        )  # fmt: skip
    )
    expected = both(lambda sides, hard: slow(sides, ids, targets, hard, owners, hard_ids, 0.3, joint, masked))
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5) and one.abs().max() > 0.01


def test_by_default_every_pair_is_a_sample_and_every_hard_negative_is_everyones():
    same = normalize(torch.ones(5, 4), dim=1)
    for joint, candidates in ((False, 5), (True, 9)):
        terms = reconstruction_info_nce(same, same, same, same, hard_negatives=same[:2], joint=joint)
        assert all(term.item() == pytest.approx(math.log(candidates + 2), abs=1e-4) for term in terms.values())


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"hard_negatives": torch.ones(1, 4), "target_ids": torch.arange(2)}, "hard_negative_ids"),
    ],
)
def test_wrong_arguments_are_named(changes, word):
    sides = dict.fromkeys(("q", "q2", "p", "p2"), torch.ones(2, 4))
    with pytest.raises(ValueError, match=word):
        reconstruction_info_nce(**(sides | changes))


# ---------------------------------------------------------------- steps and runs


def test_the_module_takes_pairs_apart():
    """Each side's vectors come in twos, hard negatives after them; a pair has one id."""
    torch.manual_seed(0)
    query, vectors = (normalize(torch.randn(count, 8), dim=1) for count in (6, 8))
    one = SampleIds(1, target_rows=[0], target_ids=[5], hard_turns=[0], hard_ids=[7], vectors=2)
    two = SampleIds(2, target_rows=[0], target_ids=[7], hard_turns=[0], hard_ids=[9], vectors=2)
    three = SampleIds(2, target_rows=[0], target_ids=[6], hard_turns=[], hard_ids=[], vectors=2)
    for joint in (False, True):
        loss = ReconstructionLoss(torch.nn.Identity(), temperature=0.3, joint=joint)
        terms = reconstruction_info_nce(
            query[[0, 2, 4]],
            query[[1, 3, 5]],
            vectors[[0, 2, 4]],
            vectors[[1, 3, 5]],
            hard_negatives=vectors[6:],
            temperature=0.3,
            joint=joint,
            sample_ids=torch.tensor([1, 2, 2]),
            target_ids=torch.tensor([5, 7, 6]),
            hard_negative_pairs=torch.tensor([0, 1]),
            hard_negative_ids=torch.tensor([7, 9]),
        )
        value = loss.of_vectors(query, vectors, TurnIds.of([one, two, three]))
        assert value.item() == pytest.approx(sum(terms.values()).item() / 4, rel=1e-6)


REQUESTS = ("Say it in words.", "Guess the rest of it.")


def batch_of_scenes(model, scenes: Path, requests: tuple[str, ...] = ()) -> dict:
    processor = model.encoder.muco_processor
    prepared = []
    for number, sample in enumerate(steps.ragged_samples(scenes)):
        first = sample.turns[0]
        chosen = Chosen(first.query[0], first.target[0], first.negatives)
        prepared.append(prepare_pair(sample, chosen, rng(number), sample.id or number, processor, requests=requests))
    return batch_of(prepared, processor, target_ids=True)


@pytest.mark.parametrize(("joint", "requests"), [(False, REQUESTS), (True, ())])
@pytest.mark.parametrize("trained", ["adapters", "all"])
def test_the_cached_step_is_the_plain_one(tiny_model, scenes, joint, requests, trained):
    model = steps.to_train(tiny_model, trained)
    batch = batch_of_scenes(model, scenes, requests)
    loss = ReconstructionLoss(model, temperature=0.1, joint=joint, dimensions=(16, 64))
    value = loss([dict(batch["query"]), dict(batch["target"])], batch["ids"])
    value.backward()
    expected = value.item(), steps.gradients(loss)
    for budget in (1, 200, None):
        model.zero_grad(set_to_none=True)
        report = TrainingStep(model, loss, token_budget=budget)([batch])
        steps.assert_same((report.loss.item(), steps.gradients(loss)), expected)


@pytest.mark.parametrize("requests", [(), REQUESTS])
def test_the_first_turn_is_the_vector_of_inference(tiny_model, scenes, requests):
    batch = batch_of_scenes(tiny_model, scenes, requests)
    samples = steps.ragged_samples(scenes)
    with torch.inference_mode():
        first = tiny_model.eval().embed(batch["query"])[0::2].numpy()
    alone = tiny_model.encode([{"text": s.turns[0].query[0].text, "images": list(s.images)} for s in samples])
    assert np.abs(first - alone).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("joint", [False, True])
def test_a_run_learns_pairs_and_resumes_exactly(scenes, tmp_path, joint):
    def recipe(name: str, **trainer):
        values = {
            "output": str(tmp_path / name),
            "model": {
                "tiny": {"width": 64, "feed_forward": 128, "vision_width": 32, "vision_depth": 1},
                "vision": "trained",
            },
            "data": {"train": [{"path": str(scenes / "train.jsonl")}]},
            "turns": {"mode": "reconstruction"},
            "loss": {"temperature": 0.1, "joint": joint},
            "batch": {"size": 8, "token_budget": 700},
            "trainer": {"max_steps": 12, "learning_rate": 1e-3, "logging_steps": 1, "report_to": [], **trainer},
        }
        return from_dict(values)

    losses = {}
    ways = {"one": {}} if joint else {"one": {}, "two": {"dataloader_num_workers": 2}}  # workers know no loss
    for name, trainer in ways.items():
        folder = muco.train(recipe(name, **trainer))
        losses[name] = [loss for _, loss in json.loads((folder / "run.json").read_text())["loss"]]
    assert all(found == losses["one"] for found in losses.values()), "workers change nothing"
    assert np.mean(losses["one"][-4:]) < losses["one"][0] - 0.03
    from muco.training.blind import blind_loss
    from muco.training.recipe import saved_recipe

    control = blind_loss(muco.load(folder, device="cpu"), open_data(scenes / "test.jsonl"), saved_recipe(folder))
    assert control is not None and not control["leaks"]


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"turns": {"mode": "reconstruction", "image_turn": "retrieval"}}, "turns.image_turn"),
        ({"turns": {"mode": "reconstruction", "positions": "restart"}}, "turns.positions"),
        ({"turns": {"mode": "reconstruction"}, "loss": {"symmetric": True}}, "loss.symmetric"),
        ({"turns": {"mode": "reconstruction"}, "loss": {"mask_same_image": False}}, "loss.mask_same_image"),
        ({"loss": {"joint": True}}, "loss.joint"),
        ({"turns": {"requests": ["a", "b"]}}, "turns.requests needs"),
        ({"turns": {"mode": "reconstruction", "requests": ["a"]}}, "turns.requests must be two texts"),
        ({"turns": {"mode": "reconstruction", "requests": ["a", " "]}}, "turns.requests must be two texts"),
        ({"turns": {"negatives": -1}}, "turns.negatives must be a whole number"),
        ({"turns": {"mode": "reconstruction"}, "loss": {"mask_counterpart": False}}, "set loss.joint"),
    ],
)
def test_contradictions_are_refused(values, word):
    with pytest.raises(muco.RecipeError, match=word):
        from_dict({"output": "x", "model": {"path": "m"}, "data": {"train": [{"path": "a.jsonl"}]}} | values)
