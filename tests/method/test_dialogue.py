"""Samples and dialogues: what is accepted, what is refused, and what the two sides are made of."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from muco import Content, DataError, Sample, Turn
from muco.dialogue import as_content, query_dialogue, single_turn, target_dialogue


def test_a_side_is_a_string_an_image_a_mapping_or_paraphrases():
    picture = Image.new("RGB", (30, 30))
    turn = Turn(
        query=["a", {"text": "b", "image": "x.png"}], target={"image": picture}, negatives=["c", {"image": Path("y")}]
    )
    assert turn.query == (Content("a"), Content("b", ("x.png",)))
    assert turn.target == (Content("", (picture,)),)
    assert turn.negatives == (Content("c"), Content("", (Path("y"),)))


def test_both_sides_keep_the_order_and_the_image_stands_once():
    sample = Sample(image=["a.png", "b.png"], turns=[Turn("q1", "p1"), Turn({"text": "q2", "image": "c.png"}, "p2")])
    query = query_dialogue(sample, [turn.query[0] for turn in sample.turns], isolated=False)
    target = target_dialogue(sample, [turn.target[0] for turn in sample.turns], isolated=False)
    assert query.images == ("a.png", "b.png", "c.png") and target.images == ()
    assert [t.text for t in query.turns] == ["q1", "q2"] and [t.text for t in target.turns] == ["p1", "p2"]


def test_an_empty_query_means_the_image_itself():
    assert Sample(image="a.png", turns=[Turn("", "p")]).turns[0].query == (Content(),)
    with pytest.raises(DataError, match="sample .* turn 1: 'query' is empty"):
        Sample(turns=[Turn("", "p")])


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: Turn("q", ""), "'target' is empty"),
        (lambda: Turn("q", "p", negatives=[""]), "'negatives' is empty"),
        (lambda: Turn("q", []), "'target' is an empty list"),
        (lambda: Turn("q", "p", negatives=["n"], scores=[10**400, 1]), "'scores' must be finite numbers"),
        (lambda: Turn({"txt": "q"}, "p"), "unknown key 'txt' in 'query'; did you mean 'text'?"),
        (lambda: Turn({"text": 3}, "p"), "string"),
        (lambda: Turn(3, "p"), "int"),
        (lambda: Sample(image="a.png", where="f.jsonl:3"), "f.jsonl:3"),
        (lambda: Sample(image="", turns=[Turn("q", "p")]), "empty string"),
        (lambda: single_turn("", "row 4"), "row 4"),
        (lambda: as_content({"image": 5}), "int"),
    ],
)
def test_bad_input_is_a_sentence(make, word):
    with pytest.raises(DataError, match=word):
        make()
