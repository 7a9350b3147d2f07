"""A guide tells false negatives: by its vectors in the loss, and from a recipe to a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import BoW
from torch.nn.functional import normalize

import muco
from muco import CheckpointError, Content, DataError
from muco.data import open_data
from muco.data.jsonl import write_jsonl
from muco.errors import TrainingError
from muco.info_nce import GuideVectors, multi_turn_info_nce, reconstruction_info_nce
from muco.training.batches import with_image_turn
from muco.training.guide import VectorsById, guide_vectors
from muco.training.plan import plan
from muco.training.prepared import query_keys, target_id
from muco.training.recipe import from_dict, to_dict
from muco.training.trainer import make_trainer
from muco.weighting import Weighting

SMALL = {"width": 64, "feed_forward": 128, "vision_width": 32, "vision_depth": 1, "vocabulary": 512}


def batch(seed: int, turns: int = 6, hard: int = 3):
    generator = torch.Generator().manual_seed(seed)
    own, guide = (
        [normalize(torch.randn(n, 8, generator=generator), dim=1) for n in (turns, turns, hard)] for _ in range(2)
    )
    how = {
        "temperature": 0.1,
        "symmetric": True,
        "hard_negatives": own[2],
        "hard_negative_turns": torch.arange(hard) * 2 % turns,
    }
    return own, guide, torch.arange(turns) // 2, how


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(-0.5, 0.5))
def test_a_guide_that_is_the_model_is_the_filter_by_own_scores(seed, margin):
    own, _, sample_ids, how = batch(seed)
    guided = multi_turn_info_nce(*own[:2], sample_ids, **how, guide=GuideVectors(*own, margin=-margin))
    by_score = multi_turn_info_nce(*own[:2], sample_ids, **how, weighting=Weighting(false_negative_margin=margin))
    assert torch.equal(guided, by_score)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(0, 0.9), st.booleans())
def test_a_negative_that_the_guide_scores_above_the_pair_is_left_out(seed, margin, relative):
    own, guide, sample_ids, how = batch(seed)
    counts = []
    found = multi_turn_info_nce(
        *own[:2], sample_ids, **how, guide=GuideVectors(*guide, margin=margin, relative=relative), count=counts.append
    )
    losses, pairs, left_out = [], 0, 0
    ways = [(own[0], torch.cat(own[1:]), guide[0], torch.cat(guide[1:])), (own[1], own[0], guide[1], guide[0])]
    for anchors, candidates, known, others in ways:
        for i in range(len(anchors)):
            right = float(known[i] @ others[i])
            total = own_share = torch.exp(anchors[i] @ candidates[i] / 0.1)
            for j in range(len(candidates)):
                turn = j if j < 6 else int(how["hard_negative_turns"][j - 6])
                if sample_ids[turn] == sample_ids[i] and not (j >= 6 and turn == i):
                    continue
                pairs += 1
                if float(known[i] @ others[j]) > right - margin * (abs(right) if relative else 1):
                    left_out += 1
                else:
                    total = total + torch.exp(anchors[i] @ candidates[j] / 0.1)
            losses.append(-torch.log(own_share / total))
    assert found.item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-4)
    assert counts[0].tolist() == [pairs, left_out]


@pytest.mark.parametrize("joint", [False, True])
def test_a_guide_of_reconstruction_is_one_of_the_contents(joint):
    own, guide, _, _ = batch(0)
    sides = (own[0], own[0], own[1], own[1])
    known = GuideVectors(*guide)
    terms = reconstruction_info_nce(*sides, hard_negatives=own[2], temperature=0.1, joint=joint, guide=known)
    plain = reconstruction_info_nce(*sides, hard_negatives=own[2], temperature=0.1, joint=joint)
    nothing = reconstruction_info_nce(
        *sides, hard_negatives=own[2], temperature=0.1, joint=joint, guide=GuideVectors(*guide, margin=3.0)
    )
    assert all(terms[name] < plain[name] for name in plain) and all(term == 0 for term in nothing.values())


def test_vectors_are_found_by_their_ids_in_any_order():
    vectors = VectorsById([9, -3, 5], np.eye(3, dtype=np.float32))
    assert vectors(torch.tensor([5, 9, 5])).tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 1]]
    assert vectors(torch.empty(0, dtype=torch.long)).shape == (0, 3)
    for unknown in (4, 99):
        with pytest.raises(TrainingError, match="no vector of a content"):
            vectors(torch.tensor([unknown]))


def recipe_of(data: Path, output: Path, guide: dict, **changes) -> muco.Recipe:
    values = {
        "output": str(output),
        "model": {"tiny": SMALL, "vision": "trained"},
        "data": {"train": [{"path": str(data)}]},
        "turns": {"image_turn": "retrieval"},
        "loss": {"guide": guide},
        "batch": {"size": 8},
        "trainer": {"max_steps": 2, "logging_steps": 1, "save_steps": 2, "report_to": []},
    }
    return from_dict(values | changes)


def test_a_run_takes_every_vector_from_the_guide_once_and_logs_what_is_left_out(scenes, tiny_path, tmp_path):
    recipe = recipe_of(scenes / "train.jsonl", tmp_path / "run", {"model": str(tiny_path)})
    sources = [open_data(scenes / "train.jsonl")]
    muco.train(recipe)
    made = len([*(tmp_path / "run" / "guide").rglob("*.npy")])
    vectors, guide = guide_vectors(recipe, sources), muco.load(tiny_path, device="cpu")
    trainer = make_trainer(recipe, muco.load(tiny_path, device="cpu"), sources, guide=vectors)
    ids = trainer.batches[0]["ids"]
    assert vectors(ids.query_keys).shape == vectors(ids.target_keys).shape == (len(ids), guide.encode("a").shape[0])
    keys, contents = [], []
    for sample in (sources[0][number] for number in range(3)):
        for turn in with_image_turn(sample, "retrieval").turns:
            keys += [*query_keys(sample, turn.query[:1]), target_id(sample, turn.target[0])]
            contents += [Content(turn.query[0].text, sample.images), turn.target[0]]
    expected = torch.from_numpy(guide.encode(contents))
    assert torch.allclose(vectors(torch.tensor(keys)), expected, atol=1e-5)
    state = json.loads((tmp_path / "run/checkpoints/checkpoint-2/trainer_state.json").read_text())
    shares = [entry["false_negatives"] for entry in state["log_history"] if "loss" in entry]
    assert len(shares) == 2 and all(0 < share < 1 for share in shares)
    shards = sorted((tmp_path / "run" / "guide").rglob("*.npy"))
    assert len(shards) == made, "computed a second time"


@pytest.fixture(scope="module")
def text_guide(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("guide") / "bow"
    words = ["a", "red", "blue", "ring", "square"]
    SentenceTransformer(modules=[BoW(words)], device="cpu").save(str(folder))
    return folder


def test_a_stock_model_guides_texts_and_refuses_images(text_guide, scenes, tmp_path):
    rows = [{"turns": [{"query": f"a {color}", "target": f"{color} ring"}]} for color in ("red", "blue") * 4]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    recipe = recipe_of(tmp_path / "rows.jsonl", tmp_path / "run", {"model": str(text_guide)}, turns={})
    vectors = guide_vectors(recipe, [open_data(tmp_path / "rows.jsonl")])
    assert vectors._vectors.shape == (4, 5) and np.allclose(np.linalg.norm(vectors._vectors, axis=1), 1)
    pictures = recipe_of(scenes / "train.jsonl", tmp_path / "other", {"model": str(text_guide)})
    with pytest.raises(DataError, match=r"train\.jsonl:\d+: the guide .* reads texts, and this has an image"):
        guide_vectors(pictures, [open_data(scenes / "train.jsonl")])


def test_what_a_run_skips_does_not_stop_its_guide(scenes, tiny_path, tmp_path, caplog):
    rows = [json.loads(line) for line in (scenes / "train.jsonl").read_text().splitlines()[:20]]
    for row in rows:
        row["image"] = str(scenes / row["image"])
    rows[3]["image"], rows[4]["image"] = "gone.png", "cut.png"
    (tmp_path / "cut.png").write_bytes(Path(rows[5]["image"]).read_bytes()[:-200])
    write_jsonl(tmp_path / "rows.jsonl", rows)
    data = {"train": [{"path": str(tmp_path / "rows.jsonl")}], "broken_images": "skip", "max_broken": 0.5}
    recipe = recipe_of(tmp_path / "rows.jsonl", tmp_path / "run", {"model": str(tiny_path)})
    recipe = replace(recipe, data=from_dict(to_dict(recipe) | {"data": data}).data)
    muco.train(recipe)
    assert "the guide has no vector of" in caplog.text and "rows.jsonl:5: " in caplog.text
    with pytest.raises(DataError, match=r"rows\.jsonl:\d"):
        muco.train(replace(recipe, output=str(tmp_path / "strict"), data=replace(recipe.data, broken_images="error")))


def test_a_guide_that_is_not_there_is_an_error_before_any_work_and_in_the_dry_run(scenes, tmp_path):
    recipe = recipe_of(scenes / "train.jsonl", tmp_path / "run", {"model": str(tmp_path / "gone")})
    for action in (muco.train, plan):
        with pytest.raises(CheckpointError, match=r"loss\.guide\.model: .*gone"):
            action(recipe)
