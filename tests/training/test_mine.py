"""Mined hard negatives against a slow, obvious reference; on texts and images; the command line."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import processes
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import muco
from muco import Content, DataError, MucoError, OutputError, Sample, Turn
from muco.data import open_data
from muco.data.jsonl import sample_to_row, write_jsonl
from muco.training.mine import Mining, mine


class Rows(list):
    fingerprint = "rows"


class Letters:
    """An embedder of texts whose vectors follow from their bytes alone, as good as random."""

    fingerprint = "letters"

    def encode(self, contents, *, batch_size=1):
        rows = [np.random.default_rng(list(f"{c.text}".encode()) or [0]).normal(size=6) for c in contents]
        return np.array([row / np.linalg.norm(row) for row in rows], dtype=np.float32)


def by_hand(rows: list[Sample], model, mining: Mining) -> list[list[str]]:
    """Negatives of every turn by sorting all candidates."""
    pool = list(dict.fromkeys(turn.target[0].text for row in rows for turn in row.turns))

    def score(query, target):
        return float(np.dot(*model.encode([Content(query), Content(target)]).astype(np.float64)))

    found = []
    for row in rows:
        for turn in row.turns:
            query = turn.query[0].text
            own = {t.target[0].text for other in rows for t in other.turns if t.query[0].text == query}
            groups = [r.id for r in rows for t in r.turns if t.query[0].text == query]
            barred = {t.target[0].text.strip() for r in rows if r.id in groups for t in r.turns}
            least = min(score(query, target) for target in own)
            ranked = sorted((t for t in pool if t not in own), key=lambda t: -score(query, t))
            ranked = ranked[mining.skip : mining.depth]
            if mining.margin is not None:
                ranked = [t for t in ranked if score(query, t) + mining.margin <= least]
            if mining.relative_margin is not None:
                ranked = [t for t in ranked if score(query, t) <= least - mining.relative_margin * abs(least)]
            if mining.max_score is not None:
                ranked = [t for t in ranked if score(query, t) <= mining.max_score]
            if mining.min_score is not None:
                ranked = [t for t in ranked if score(query, t) >= mining.min_score]
            usable = [t for t in ranked if t.strip() not in barred]
            found.append(usable[: mining.negatives])
    return found


words = st.text("abcdef", min_size=1, max_size=3)


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("uvwxyz"),
            st.lists(st.tuples(words, words.map(lambda w: w.upper())), min_size=1, max_size=3),
        ),
        min_size=2,
        max_size=8,
    ),
    st.builds(
        Mining,
        negatives=st.integers(1, 3),
        skip=st.integers(0, 2),
        depth=st.integers(5, 20),
        margin=st.none() | st.sampled_from([0.01, 0.2]),
        relative_margin=st.none() | st.sampled_from([0.1]),
        max_score=st.none() | st.sampled_from([0.5]),
        min_score=st.none() | st.sampled_from([-0.5]),
    ),
)
def test_mined_negatives_are_those_found_by_sorting_everything(tmp_path_factory, samples, mining):
    rows = [Sample(turns=[Turn(q, t) for q, t in turns], id=key) for key, turns in samples]
    output = tmp_path_factory.mktemp("mine") / "mined.jsonl"
    counts = mine(Rows(rows), Letters(), output, mining)
    found = [[c.text for c in turn.negatives] for sample in open_data(output) for turn in sample.turns]
    assert found == by_hand(rows, Letters(), mining)
    assert counts["mined"] == sum(map(len, found)) and counts["turns"] == len(found)
    assert counts["turns_with_fewer"] == sum(len(n) < mining.negatives for n in found)


def test_a_random_draw_is_of_those_that_qualify_and_the_same_again(tmp_path):
    rows = Rows([Sample(turns=[Turn(f"q{i}", f"t{i}")], id=str(i)) for i in range(30)])
    drawn = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        mine(rows, Letters(), tmp_path / f"{name}.jsonl", Mining(3, skip=2, depth=12, sample="random", seed=seed))
        drawn.append([[c.text for c in s.turns[0].negatives] for s in open_data(tmp_path / f"{name}.jsonl")])
    mine(rows, Letters(), tmp_path / "all.jsonl", Mining(10, skip=2, depth=12))
    qualified = [{c.text for c in s.turns[0].negatives} for s in open_data(tmp_path / "all.jsonl")]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(len(some) == 3 and set(some) <= those for some, those in zip(drawn[0], qualified, strict=True))


def test_images_are_mined_given_negatives_stay_and_paraphrases_are_no_negatives(scenes, tiny_model, tmp_path):
    pairs = [open_data(scenes / "train_pairs.jsonl")[i] for i in range(12)]
    first = pairs[0].turns[0]
    given = Turn(first.query, [first.target[0], pairs[1].turns[0].target[0]], "k", negatives=["not this"])
    rows = Rows([pairs[0].with_turns([given]), *pairs[1:]])
    mine(rows, tiny_model, tmp_path / "mined.jsonl", Mining(2, depth=11), cache=tmp_path / "vectors")
    mined = open_data(tmp_path / "mined.jsonl")
    images = [content.images[0] for content in mined[0].turns[0].negatives[1:]]
    assert mined[0].turns[0].negatives[0].text == "not this" and len(images) == 2
    assert not {str(c.images[0]) for c in given.target} & {str(image) for image in images}
    vectors = tiny_model.encode([first.query[0], *(pair.turns[0].target[0] for pair in pairs[2:])])
    nearest = np.argsort(-(vectors[1:] @ vectors[0]))[:2]
    assert [str(i) for i in images] == [str(pairs[2 + int(n)].turns[0].target[0].images[0]) for n in nearest]
    made = json.loads((tmp_path / "mined.jsonl.json").read_text())
    assert made["model"] == tiny_model.fingerprint and made["mining"]["negatives"] == 2


def test_targets_of_a_copy_of_the_image_are_no_negatives(scenes, tiny_model, tmp_path):
    image, other = sorted((scenes / "images" / "train").glob("*.png"))[:2]
    copy = shutil.copy(image, tmp_path / "copy.png")
    seen = [
        (image, "one", "a"),
        (copy, "two", "b"),
        (other, "three", "a"),
    ]  # an id says nothing where there is an image
    rows = Rows([Sample(file, [Turn("what?", target)], id=id) for file, target, id in seen])
    mine(rows, tiny_model, tmp_path / "mined.jsonl", Mining(2, depth=4))
    mined = [{content.text for content in sample.turns[0].negatives} for sample in open_data(tmp_path / "mined.jsonl")]
    assert mined == [{"three"}, {"three"}, {"one", "two"}]


def test_what_cannot_be_mined_is_said(tmp_path, scenes):
    rows = Rows([Sample(turns=[Turn("a", "b")]), Sample(turns=[Turn("c", "d")])])
    (tmp_path / "there.jsonl").write_text("")
    with pytest.raises(OutputError, match="exists"):
        mine(rows, Letters(), tmp_path / "there.jsonl")
    with pytest.raises(MucoError, match="raise depth"):
        Mining(5, skip=10, depth=12)
    with pytest.raises(MucoError, match="'top' or 'random'"):
        Mining(sample="best")
    image = next((scenes / "images" / "train").glob("*.png")).read_bytes()
    with pytest.raises(DataError, match="names images by their files"):
        mine(Rows([Sample(image=image, turns=[Turn("a", "b")]), *rows]), Letters(), tmp_path / "bytes.jsonl")
    assert not (tmp_path / "bytes.jsonl").exists()


@pytest.mark.slow
def test_mined_data_trains_by_the_command_line(scenes, tiny_path, tmp_path):
    data = open_data(scenes / "train.jsonl")
    write_jsonl(tmp_path / "few.jsonl", (sample_to_row(data[i], tmp_path) for i in range(10)))
    command = [sys.executable, "-m", "muco", "data", "mine", str(tmp_path / "few.jsonl"), "-m", str(tiny_path)]
    done = processes.run(
        [*command, "-o", str(tmp_path / "mined.jsonl"), "--negatives", "2", "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["mined"] == 2 * 70
    again = processes.run([*command, "-o", str(tmp_path / "mined.jsonl")], capture_output=True, text=True)
    assert again.returncode == 1 and "exists" in again.stderr
    recipe = muco.training.recipe.from_dict(
        {
            "output": str(tmp_path / "run"),
            "model": {"path": str(tiny_path)},
            "data": {"train": [{"path": str(tmp_path / "mined.jsonl")}]},
            "batch": {"size": 4},
            "trainer": {"max_steps": 2, "report_to": []},
        }
    )
    assert (muco.train(recipe) / "modules.json").exists()
