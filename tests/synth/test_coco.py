"""COCO's form to turns: questions against a slow reference on pixels, words, what must not matter, bad files."""

from __future__ import annotations

import json
import logging
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import muco
from muco.cli import main
from muco.data import open_data
from muco.data.check import check
from muco.data.scenes import SIZES, caption, describe, render
from muco.errors import DataError
from muco.synth import coco, coco_rules, english
from muco.synth.coco import convert_coco
from muco.synth.coco_rules import Picture, Thing, turns_of
from muco.synth.english import a, countable, number, plural
from muco.training.recipe import from_dict

KINDS = {"dog": "animal", "cat": "animal", "cup": "kitchen", "skis": "sports", "person": "person", "fox": "animal"}
SIDE = 90  # px of the pictures below; a place has 30 x 30
LEAST = 0.02
LOCAL = {"count", "place", "beside", "where", "size"}  # what may be asked twice about an image


# ── the truth of questions ───────────────────────────────────────────────────────────────────────────────────────────


@st.composite
def boxes(draw) -> Thing:
    name = draw(st.sampled_from(["dog", "cat", "cup", "skis", "person"]))
    left, top = draw(st.integers(0, SIDE - 1)), draw(st.integers(0, SIDE - 1))
    width, height = draw(st.integers(1, SIDE - left)), draw(st.integers(1, SIDE - top))
    if draw(st.booleans()):  # half of them small, so that there is something to ask
        width, height = min(width, 24), min(height, 24)
    return Thing(name, left, top, left + width, top + height, draw(st.integers(0, 9)) == 0)


pictures = st.builds(
    lambda things, key: Picture(key, "x.png", SIDE, SIDE, things),
    st.lists(boxes(), min_size=1, max_size=6),
    st.integers(0, 999),
)


class Truth:
    """What is true of a picture, by counting its pixels."""

    def __init__(self, things: list[Thing]) -> None:
        self.things = things
        self.masks = []
        for thing in things:
            mask = np.zeros((SIDE, SIDE), dtype=bool)
            mask[int(thing.top) : int(thing.bottom), int(thing.left) : int(thing.right)] = True
            self.masks.append(mask)
        self.areas = [int(mask.sum()) for mask in self.masks]
        self.middles = [(thing.left + thing.right, thing.top + thing.bottom) for thing in things]  # twice

    def of(self, name: str) -> list[int]:
        return [i for i, thing in enumerate(self.things) if thing.name == name]

    def clear(self, i: int) -> bool:
        return self.areas[i] >= LEAST * SIDE * SIDE

    def exact(self, name: str) -> bool:
        return all(self.clear(i) and not self.things[i].crowd for i in self.of(name))

    def main(self) -> str | None:
        first, *rest = sorted(range(len(self.things)), key=lambda i: -self.areas[i])
        beaten = all(2 * self.areas[first] >= 3 * self.areas[i] for i in rest)
        return self.things[first].name if beaten and self.clear(first) and not self.things[first].crowd else None

    def seen(self) -> list[str]:
        totals = Counter()
        for i, thing in enumerate(self.things):
            if self.clear(i):
                totals[thing.name] += self.areas[i]
        return sorted(totals, key=lambda name: (-totals[name], name))

    def at(self, place: str) -> list[int]:
        """The boxes that have their middle in a place or a tenth of it."""
        row = 0 if "top" in place else 2 if "bottom" in place else 1
        column = 0 if "left" in place else 2 if "right" in place else 1
        found = []
        for i, mask in enumerate(self.masks):
            covered = mask[30 * row : 30 * row + 30, 30 * column : 30 * column + 30].sum()
            x, y = self.middles[i]
            within = 60 * column <= x <= 60 * column + 60 and 60 * row <= y <= 60 * row + 60
            if within or covered > 90:
                found.append(i)
        return found

    def is_at(self, i: int, place: str) -> bool:
        """Whether a box is where the words say: in that half and that third, or near the middle."""
        thing, (x, y) = self.things[i], self.middles[i]
        column = thing.right <= 45 and x <= 60 if "left" in place else thing.left >= 45 and x >= 120
        row = thing.bottom <= 45 and y <= 60 if "top" in place else thing.top >= 45 and y >= 120
        if "left" not in place and "right" not in place:
            column = 72 <= x <= 108
        if "top" not in place and "bottom" not in place:
            row = 72 <= y <= 108
        return column and row

    def beyond(self, side: str, anchor: int) -> list[int]:
        """The boxes with their middle on that side that share rows (columns) of pixels with the anchor."""
        axis, sign = {"to the left of": (0, -1), "to the right of": (0, 1), "above": (1, -1), "below": (1, 1)}[side]
        lines = [mask.any(1 - axis) for mask in self.masks]
        return [
            i
            for i, middle in enumerate(self.middles)
            if sign * middle[axis] > sign * self.middles[anchor][axis] and (lines[i] & lines[anchor]).any()
        ]

    def faces(self, i: int, side: str, anchor: int) -> bool:
        """No shared column (row) of pixels, and half of the smaller one's rows (columns) shared."""
        axis, other = (0, 1) if "of" in side else (1, 0)
        one, two = self.masks[i], self.masks[anchor]
        apart = not (one.any(axis) & two.any(axis)).any()
        shared = (one.any(other) & two.any(other)).sum()
        return apart and 2 * shared >= min(one.any(other).sum(), two.any(other).sum())


def is_true(truth: Truth, query: str, target: str) -> str:
    """Asserts that an answer is right, from the texts alone; the name of the rule."""
    names = {name: name for name in KINDS} | {plural(name): name for name in KINDS}
    answer = re.sub(r"^an? ", "", target)
    if query == coco_rules.MAIN[0]:
        assert answer == truth.main()
        return "main"
    if query == coco_rules.THINGS[0]:
        assert re.split(", | and ", target) == truth.seen()
        return "things"
    if query == coco_rules.KINDS[0]:
        kinds = re.split(", | and ", target.removeprefix("things of the kinds "))
        assert kinds == list(dict.fromkeys(KINDS[name] for name in truth.seen()))
        return "kinds"
    if found := re.fullmatch(r"How many (\w+) are there\?", query):
        name, (word, things) = names[found[1]], target.split()
        assert truth.exact(name) and things == found[1] and english.NUMBERS.index(word) == len(truth.of(name)) > 1
        return "count"
    if found := re.fullmatch(r"What is ((?:at|in) .+)\?", query):
        (i,) = truth.at(found[1])
        assert truth.things[i].name == answer and truth.is_at(i, found[1])
        assert truth.clear(i) and not truth.things[i].crowd
        return "place"
    if found := re.fullmatch(r"What is directly (.+) the (\w+)\?", query):
        (anchor,) = truth.of(found[2])
        (i,) = truth.beyond(found[1], anchor)
        assert truth.things[i].name == answer and truth.exact(found[2]) and truth.faces(i, found[1], anchor)
        assert truth.clear(i) and not truth.things[i].crowd
        return "beside"
    if found := re.fullmatch(r"Where (is|are) the (\w+)\?", query):
        (i,) = truth.of(found[2])
        assert truth.exact(found[2]) and truth.is_at(i, target) and (found[1] == "are") == (found[2] == "skis")
        return "where"
    found = re.fullmatch(r"What size (?:is|are) the (\w+)\?", query)
    assert found, query
    (i,) = truth.of(found[1])
    assert truth.exact(found[1])
    share = truth.areas[i] / SIDE**2
    assert share <= 0.05 if target.startswith("small") else share >= 0.25
    return "size"


def test_every_answer_is_true_and_only_of_its_own_question():
    asked = Counter()

    @settings(max_examples=600, derandomize=True)  # so that every rule is met in every run
    @given(pictures)
    def holds(picture):
        truth, turns = Truth(picture.things), turns_of(picture, KINDS, min_area=LEAST)
        *rest, last = turns or [None]
        assert last is None or last.kind == "retrieval"
        rules = [is_true(truth, turn.query[0].text, turn.target[0].text) for turn in rest]
        asked.update(rules)
        assert all(count <= (2 if rule in LOCAL else 1) for rule, count in Counter(rules).items())
        # what is always asked where it can be
        seen = truth.seen()
        assert ("main" in rules) == (truth.main() is not None)
        assert ("things" in rules) == (len(seen) > 1)
        assert ("kinds" in rules) == (len({KINDS[name] for name in seen}) > 1)
        assert (last is None) == (not seen)
        targets = [turn.target[0].text for turn in turns]
        assert len(set(targets)) == len(targets)
        answers = {re.sub(r"^an? ", "", target) for target in targets} & set(KINDS)
        for turn in turns:
            assert len(turn.query) >= 3
            for query in turn.query:
                words = set(re.findall(r"\w+", query.text))
                assert not words & {word for name in answers for word in (name, plural(name))}
                assert turn.target[0].text.lower() not in query.text.lower()
            for negative in turn.negatives:
                name, right = (re.sub(r"^an? ", "", c.text) for c in (negative, turn.target[0]))
                assert not truth.of(name) and KINDS[name] == KINDS[right] and turn.kind == "classification"

    holds()
    assert set(asked) == {"main", "things", "kinds", *LOCAL}, asked
    assert min(asked.values()) >= 10, asked


@settings(max_examples=100)
@given(pictures, st.randoms(use_true_random=False), st.sampled_from([2, 3.5]))
def test_order_and_resolution_do_not_matter(picture, rng, scale):
    things = [
        Thing(t.name, t.left * scale, t.top * scale, t.right * scale, t.bottom * scale, t.crowd) for t in picture.things
    ]
    rng.shuffle(things)
    larger = Picture(picture.id, "y.png", SIDE * scale, SIDE * scale, things)
    assert turns_of(larger, KINDS, min_area=LEAST) == turns_of(picture, KINDS, min_area=LEAST)


def test_the_seed_decides_what_is_asked():
    things = [Thing("dog", 0, 0, 45, 45), Thing("cat", 66, 0, 88, 22), Thing("cup", 2, 66, 22, 88)]
    things += [Thing("fox", 66, 66, 88, 88)]
    picture = Picture(1, "x.png", SIDE, SIDE, things)
    made = [turns_of(picture, KINDS, seed=seed) for seed in range(20)]
    assert made[0] == turns_of(picture, KINDS, seed=0) and any(turns != made[0] for turns in made)


def asked_of(*things: Thing, **more: Any) -> dict[str, Any]:
    """First wording of the query -> target, of a picture of 90 x 90."""
    turns = turns_of(Picture(1, "x.png", SIDE, SIDE, list(things), **more), KINDS)
    return {turn.query[0].text: [content.text for content in turn.target] for turn in turns}


def test_an_image_in_full():
    dog, cup = Thing("dog", 36, 20, 81, 80), Thing("cup", 2, 36, 18, 54)
    assert asked_of(dog, cup) in (
        {
            "What is the main thing in the picture?": ["a dog"],
            "Which things can be seen clearly?": ["dog and cup"],
            "Which kinds of things are there?": ["things of the kinds animal and kitchen"],
            "Describe the picture.": ["A picture of a dog and a cup at the left."],
        }
        | local
        for local in (
            {"What is at the left?": ["a cup"]},
            {"Where is the cup?": ["at the left"], "What size is the cup?": ["small, a little part of it"]},
        )
    )


@pytest.mark.parametrize(
    ("left", "right", "place"),
    [
        (0, 45, " at the left"),
        (0, 46, ""),  # into the right half
        (15, 45, " at the left"),
        (16, 45, ""),  # its middle is past the first third
        (26, 46, " in the center"),
        (25, 46, ""),
        (44, 64, " in the center"),
        (44, 65, ""),
        (45, 75, " at the right"),
        (45, 74, ""),
        (44, 90, ""),
    ],
)
def test_a_place_is_named_only_where_it_is_clear(left, right, place):
    for thing, words in ((Thing("cup", left, 36, right, 54), place), (Thing("cup", 36, left, 54, right), None)):
        down = place.replace("left", "top").replace("right", "bottom")
        assert asked_of(thing)["Describe the picture."] == [f"A picture of a cup{down if words is None else words}."]


def test_a_neighbour_is_asked_about_whatever_stands_elsewhere():
    cup, cat, fox = Thing("cup", 60, 60, 80, 80), Thing("cat", 10, 62, 30, 82), Thing("fox", 10, 5, 30, 25)

    def neighbours(*things: Thing) -> dict[str, str]:
        made = [turns_of(Picture(n, "x.png", SIDE, SIDE, list(things)), KINDS) for n in range(40)]
        found = {t.query[0].text: t.target[0].text for turns in made for t in turns}
        return {query: target for query, target in found.items() if "directly" in query}

    assert neighbours(cup, cat, fox) == {
        "What is directly to the left of the cup?": "a cat",
        "What is directly to the right of the cat?": "a cup",
        "What is directly above the cat?": "a fox",
        "What is directly below the fox?": "a cat",
    }
    between = neighbours(cup, cat, fox, Thing("dog", 35, 62, 55, 82))
    assert not between.keys() & {
        "What is directly to the left of the cup?",
        "What is directly to the right of the cat?",
    }


def test_counts_are_asked_only_where_they_are_exact():
    cups = [Thing("cup", 30 * n, 0, 30 * n + 12, 12) for n in range(3)]
    count = "How many cups are there?"
    assert asked_of(*cups)[count] == ["three cups"]
    assert count not in asked_of(*cups, unsure=frozenset(["cup"]))
    assert count not in asked_of(*cups, Thing("cup", 50, 50, 80, 80, crowd=True))
    assert count not in asked_of(*cups, Thing("cup", 50, 50, 53, 53))  # too small to be seen
    skis = [Thing("skis", 30 * n, 0, 30 * n + 12, 12) for n in range(3)]
    assert not any(query.startswith("How many") for query in asked_of(*skis))  # a box is a pair, or one of it
    assert asked_of(
        *[Thing("cup", 15 * (n % 4), 20 * (n // 4), 15 * (n % 4) + 9, 20 * (n // 4) + 9) for n in range(12)]
    )[count] == ["12 cups"]


def test_captions_are_paraphrases_but_no_answer_of_another_turn():
    dog = Thing("dog", 30, 30, 60, 60)
    captions = [(9, "Dogs at play."), (2, "A dog."), (3, "The dog runs."), (4, "The dog runs.")]
    assert asked_of(dog, captions=captions)["Describe the picture."] == ["The dog runs.", "Dogs at play."]
    assert asked_of(dog, captions=[(1, "A dog.")])["Describe the picture."] == ["A picture of a dog in the center."]
    assert asked_of(captions=captions[:1])["Describe the picture."] == ["Dogs at play."]
    assert asked_of() == {}


def test_negatives_are_of_the_same_kind_and_not_on_the_image():
    def negatives(*things: Thing, **more: Any) -> set[str]:
        found = set()
        for seed in range(30):
            turns = turns_of(Picture(1, "x.png", SIDE, SIDE, list(things), **more), KINDS, seed=seed)
            found |= {content.text for content in turns[0].negatives}
        return found

    dog = Thing("dog", 0, 0, 60, 60)
    assert negatives(dog) == {"a cat", "a fox"}
    assert negatives(dog, Thing("cat", 88, 88, 89, 89)) == {"a fox"}  # too small to be asked about, but there
    assert negatives(dog, captions=[(1, "Two foxes and a dog")]) == {"a cat"}
    assert negatives(dog, absent=frozenset(["fox", "cup"])) == {"a fox"}  # the others have not been looked for
    assert negatives(Thing("cup", 0, 0, 60, 60)) == set()
    assert turns_of(Picture(1, "x.png", SIDE, SIDE, [dog]), {"dog": "", "cat": ""})[0].negatives == ()


# ── words ────────────────────────────────────────────────────────────────────────────────────────────────────────────

COCO_NAMES = """
person/people, bicycle/bicycles, car/cars, motorcycle/motorcycles, airplane/airplanes, bus/buses, train/trains,
truck/trucks, boat/boats, traffic light/traffic lights, fire hydrant/fire hydrants, stop sign/stop signs,
parking meter/parking meters, bench/benches, bird/birds, cat/cats, dog/dogs, horse/horses, sheep/sheep,
cow/cows, elephant/elephants, bear/bears, zebra/zebras, giraffe/giraffes, backpack/backpacks,
umbrella/umbrellas, handbag/handbags, tie/ties, suitcase/suitcases, frisbee/frisbees, skis/skis,
snowboard/snowboards, sports ball/sports balls, kite/kites, baseball bat/baseball bats, baseball glove/baseball
gloves, skateboard/skateboards, surfboard/surfboards, tennis racket/tennis rackets, bottle/bottles, wine
glass/wine glasses, cup/cups, fork/forks, knife/knives, spoon/spoons, bowl/bowls, banana/bananas, apple/apples,
sandwich/sandwiches, orange/oranges, broccoli/broccoli, carrot/carrots, hot dog/hot dogs, pizza/pizzas,
donut/donuts, cake/cakes, chair/chairs, couch/couches, potted plant/potted plants, bed/beds, dining table/dining
tables, toilet/toilets, tv/tvs, laptop/laptops, mouse/mice, remote/remotes, keyboard/keyboards, cell phone/cell
phones, microwave/microwaves, oven/ovens, toaster/toasters, sink/sinks, refrigerator/refrigerators, book/books,
clock/clocks, vase/vases, scissors/scissors, teddy bear/teddy bears, hair drier/hair driers,
toothbrush/toothbrushes
"""


def test_the_words_of_all_names_of_coco():
    names = dict(pair.split("/") for pair in " ".join(COCO_NAMES.split()).split(", "))
    assert len(names) == 80
    assert {name: plural(name) for name in names} == names
    uncounted = {"skis", "scissors", "broccoli"}
    assert {name for name in names if not countable(name)} == uncounted
    an = {"airplane", "elephant", "umbrella", "apple", "orange", "oven"}
    for name in names.keys() - uncounted:
        assert a(name) == f"{'an' if name in an else 'a'} {name}"
    assert all(a(name) == name for name in uncounted)


@pytest.mark.parametrize(
    ("name", "one", "many"),
    [
        ("snowman", "a snowman", "snowmen"),
        ("ottoman", "an ottoman", "ottomans"),
        ("baby", "a baby", "babies"),
        ("toy", "a toy", "toys"),
        ("box", "a box", "boxes"),
        ("bow (weapon)", "a bow (weapon)", "bows (weapon)"),
        ("loaf of bread", "a loaf of bread", "loaves of bread"),
        ("cabinet/shelf", "a cabinet/shelf", "cabinets/shelves"),
        ("hourglass", "an hourglass", "hourglasses"),
        ("unicycle", "a unicycle", "unicycles"),
        ("goldfish", "a goldfish", "goldfish"),
        ("street lights", "street lights", "street lights"),
        ("people", "people", "people"),
        ("iris", "an iris", "irises"),
    ],
)
def test_words_of_other_sets(name, one, many):
    assert (a(name), plural(name)) == (one, many)


def test_numbers_are_words_up_to_ten():
    assert [number(n) for n in (1, 2, 10, 11)] == ["one", "two", "ten", "11"]


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def instances() -> dict[str, Any]:
    return {
        "info": {"year": 2017},
        "images": [
            {"id": 7, "file_name": "a/7.png", "width": 90, "height": 90},
            {"id": 3, "file_name": "3.png", "width": 90, "height": 60},
        ],
        "categories": [
            {"id": 1, "name": "dog", "supercategory": "animal"},
            {"id": 5, "name": "Traffic_Light", "supercategory": "outdoor"},
            {"id": 6, "name": "mouse_(computer_equipment)"},
        ],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 1, "bbox": [36, 20, 45, 60], "iscrowd": 0, "segmentation": [[1]]},
            {"id": 2, "image_id": 7, "category_id": 5, "bbox": [-0.6, 36, 16, 18], "iscrowd": 0},
            {"id": 4, "image_id": 3, "category_id": 6, "bbox": [40, 30, 9, 30.9]},
            {"id": 5, "image_id": 3, "category_id": 1, "bbox": [40, 30, 9, 0]},
        ],
    }


def captions() -> dict[str, Any]:
    return {
        "annotations": [
            {"id": 12, "image_id": 3, "caption": "A mouse \n on a desk."},
            {"id": 11, "image_id": 3, "caption": "One mouse_pad."},
            {"id": 13, "image_id": 3, "caption": " \n"},
        ]
    }


def written(folder: Path, boxes: Any, texts: Any = None) -> tuple[Path, Path]:
    (folder / "images" / "a").mkdir(parents=True, exist_ok=True)
    for name in ("a/7.png", "3.png"):
        render(describe(0, len(name))).save(folder / "images" / name)
    for name, value in (("boxes.json", boxes), ("captions.json", texts or captions())):
        (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
    return folder / "boxes.json", folder / "captions.json"


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_file_is_converted(tmp_path):
    boxes, texts = written(tmp_path, instances())
    output = tmp_path / "out" / "coco.jsonl"
    counts = convert_coco(boxes, tmp_path / "images", output, captions=texts)
    first, second = rows(output)
    assert (first["id"], second["id"]) == ("3", "7") and Path(second["image"]) == tmp_path / "images" / "a" / "7.png"
    turns = {turn["kind"]: turn for turn in first["turns"]}
    assert turns["classification"]["target"] == "a mouse" and "negatives" not in turns["classification"]
    assert turns["retrieval"]["target"] == ["One mouse_pad.", "A mouse on a desk."]
    assert {turn["target"] for turn in second["turns"]} >= {"dog and traffic light", "a dog"}
    assert counts["samples"] == 2 and counts["turns"] == len(first["turns"]) + len(second["turns"])
    assert sum(counts[kind] for kind in ("classification", "global", "local", "retrieval")) == counts["turns"]
    left_out = {"too_few_turns": 0, "missing_images": 0, "empty_boxes": 1, "blank_captions": 1}
    assert counts.items() >= left_out.items()
    assert check(output).ok
    three, seven = coco.read_coco(boxes, tmp_path / "images").pictures  # boxes are cut at the edges
    assert three.things == [Thing("mouse", 40, 30, 49, 60)] and seven.things[1] == Thing(
        "traffic light", 0, 36, 15.4, 54
    )


def test_the_order_of_lists_does_not_matter_and_an_output_is_replaced_whole(tmp_path):
    boxes, texts = written(tmp_path, instances())
    output = tmp_path / "coco.jsonl"
    convert_coco(boxes, tmp_path / "images", output, captions=texts)
    before = output.read_bytes()
    for seed in range(5):
        given, said = instances(), captions()
        for entries in (*(given[key] for key in ("images", "categories", "annotations")), said["annotations"]):
            random.Random(seed).shuffle(entries)
        given = dict(reversed(given.items()))
        output.write_text("old")
        convert_coco(*written(tmp_path, given, said)[:1], tmp_path / "images", output, captions=texts)
        assert output.read_bytes() == before
    written(tmp_path, "{")
    with pytest.raises(DataError):
        convert_coco(boxes, tmp_path / "images", output)
    assert output.read_bytes() == before and not list(tmp_path.glob(".*"))


def test_names_with_notes_keep_them_only_where_they_are_needed(tmp_path):
    given = instances()
    given["categories"] += [
        {"id": 8, "name": "bow_(weapon)"},
        {"id": 9, "name": "bow_(ribbon)"},
        {"id": 2, "name": "dog"},
    ]
    found = coco.read_coco(written(tmp_path, given)[0], tmp_path / "images")
    assert found.kinds == {
        "dog": "animal",  # of two dogs the one with the lower id
        "traffic light": "outdoor",
        "mouse": "",
        "bow (weapon)": "",
        "bow (ribbon)": "",
    }


def test_files_of_lvis_are_read(tmp_path):
    given = instances()
    for image in given["images"]:
        image["coco_url"] = "http://images.org/a/7.png" if image["id"] == 7 else "http://images.org/images/3.png"
        del image["file_name"]
        image |= {"neg_category_ids": [5], "not_exhaustive_category_ids": [1, 6]}
    found = coco.read_coco(written(tmp_path, given)[0], tmp_path / "images")
    three, seven = found.pictures
    assert (three.file, seven.file) == tuple(str(tmp_path / "images" / name) for name in ("images/3.png", "a/7.png"))
    assert three.unsure == {"dog", "mouse"} and three.absent == {"traffic light"}


def test_what_is_left_out_is_counted_and_named(tmp_path, caplog):
    boxes, _ = written(tmp_path, instances())
    (tmp_path / "images" / "3.png").unlink()
    output = tmp_path / "coco.jsonl"
    with caplog.at_level(logging.WARNING):
        counts = convert_coco(boxes, tmp_path / "images", output)
    assert counts["missing_images"] == 1 and counts["samples"] == 1 and "3.png" in caplog.text
    written(tmp_path, change("images", 0, file_name=f"{'x' * 5000}.png"))  # longer than a name can be
    assert convert_coco(boxes, tmp_path / "images", output, min_turns=1)["missing_images"] == 1
    written(tmp_path, instances())
    convert_coco(boxes, tmp_path / "images", output)
    turns = {row["id"]: len(row["turns"]) for row in rows(output)} | {"3": 0}
    counts = convert_coco(boxes, tmp_path / "images", output, min_turns=turns["7"])
    assert counts["too_few_turns"] == 1 and [row["id"] for row in rows(output)] == ["7"]
    counts = convert_coco(boxes, tmp_path / "images", output, limit=1)
    assert counts["samples"] == 1 and [row["id"] for row in rows(output)] == ["3"]


def change(part: str, index: int, **values: Any) -> dict[str, Any]:
    given = instances()
    given[part][index] |= values
    given[part][index] = {key: value for key, value in given[part][index].items() if value is not ...}
    return given


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in instances().items() if name != key}


TWICE = {
    part: instances() | {part: [*instances()[part], instances()[part][0]]} for part in instances() if part != "info"
}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (without("categories"), r"boxes\.json: no list 'categories'"),
        (without("images"), r"boxes\.json: no list 'images'"),
        (without("annotations"), r"boxes\.json: no list 'annotations'"),
        (instances() | {"images": {}}, r"boxes\.json: 'images' must be one list"),
        ('{"images": [], "images": []}', r"boxes\.json: 'images' must be one list"),
        ([], r"boxes\.json: the file must hold one JSON object"),
        ("", r"boxes\.json: the file must hold one JSON object"),
        (json.dumps(instances())[:-9], r"boxes\.json: not JSON"),
        (json.dumps(instances()) + "{}", r"boxes\.json: there is more after the JSON value"),
        ('{"images": ' + "[" * 100_000, r"boxes\.json: not JSON at byte \d+ \(nested too deep"),
        (instances() | {"annotations": [[]]}, r"boxes\.json annotations\[0\]: the annotation must be a JSON object"),
        (TWICE["images"], r"boxes\.json image 7: the id 7 is there twice"),
        (TWICE["categories"], r"boxes\.json category 1: the id 1 is there twice"),
        (TWICE["annotations"], r"boxes\.json annotation 1: the id 1 is there twice"),
        (change("annotations", 0, id=...), r"boxes\.json annotations\[0\]: 'id' must be a whole number, not None"),
        (change("annotations", 0, image_id=8), r"annotation 1: 'image_id' is 8, which is not among the 2 images"),
        (change("annotations", 0, category_id=9), r"annotation 1: 'category_id' is 9, which is not among the 3 cat"),
        (change("annotations", 0, category_id=...), r"annotation 1: 'category_id' must be a whole number, not None"),
        (change("annotations", 0, bbox=...), r"annotation 1: 'bbox' must be \[x, y, width, height\], not None"),
        (change("annotations", 0, bbox=[1, 2, 3]), r"annotation 1: 'bbox' must be"),
        (change("annotations", 0, bbox=[1, 2, 3, "4"]), r"annotation 1: 'bbox' holds '4'"),
        (change("annotations", 0, bbox=[1, 2, 3, True]), r"annotation 1: 'bbox' holds True"),
        (change("annotations", 0, bbox=[float("nan"), 2, 3, 4]), r"annotation 1: 'bbox' holds nan"),
        (change("annotations", 0, bbox=[0, 0, float("inf"), 4]), r"annotation 1: 'bbox' holds inf"),
        (change("annotations", 0, bbox=[0, 0, 10**400, 4]), r"annotation 1: 'bbox' holds 1000"),
        (
            change("annotations", 0, bbox=[-1.1, 0, 9, 9]),
            r"annotation 1: 'bbox' is .* not within .* 90 x 90 px \(image 7",
        ),
        (change("annotations", 0, bbox=[0, 50, 9, 41.1]), r"annotation 1: 'bbox' is .* not within"),
        (change("annotations", 0, bbox=[5, 5, -2, 4]), r"annotation 1: 'bbox' is .* not within"),
        (change("annotations", 0, iscrowd="no"), r"annotation 1: 'iscrowd' is 'no'"),
        (change("images", 0, file_name="../7.png"), r"image 7: 'file_name' is '\.\./7\.png'"),
        (change("images", 0, file_name="a/../../7.png"), r"image 7: 'file_name'"),
        (change("images", 0, file_name="/etc/7.png"), r"image 7: 'file_name'"),
        (change("images", 0, file_name="a\0.png"), r"image 7: 'file_name'"),
        (change("images", 0, file_name="\ud800.png"), r"image 7: 'file_name' holds half a character"),
        (change("images", 0, file_name=7), r"image 7: 'file_name' must be a string"),
        (change("images", 0, file_name=...), r"image 7: no 'file_name'"),
        (change("images", 0, file_name=..., coco_url="http://a/../.."), r"image 7: 'file_name' is '\.\./\.\.'"),
        (change("images", 0, width=0), r"image 7: 'width' and 'height' are 0 and 90"),
        (change("images", 0, height=...), r"image 7: 'height' holds None"),
        (change("images", 0, neg_category_ids=[77]), r"image 7: 'neg_category_ids' must be a list of category ids"),
        (change("categories", 0, name=...), r"category 1: no 'name'"),
        (change("categories", 0, name=" _"), r"category 1: 'name' is blank"),
        (change("categories", 0, name="<|emb|>"), r"category 1: 'name' holds <\|emb\|>"),
        (change("categories", 0, supercategory=4), r"category 1: 'supercategory' must be a string"),
    ],
)
def test_a_bad_file_is_an_error_that_names_the_place(tmp_path, given, message):
    boxes, _ = written(tmp_path, given)
    with pytest.raises(DataError, match=message):
        convert_coco(boxes, tmp_path / "images", tmp_path / "coco.jsonl")
    assert not (tmp_path / "coco.jsonl").exists()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"id": 1, "image_id": 9, "caption": "x"}, r"captions\.json annotation 1: 'image_id' is 9"),
        ({"id": 1, "image_id": 3}, r"captions\.json annotation 1: no 'caption'"),
        ({"image_id": 3, "caption": 3}, r"captions\.json annotations\[0\]: 'caption' must be a string"),
        (
            {"id": 1, "image_id": 3, "caption": "a <|im_end|>"},
            r"captions\.json annotation 1: 'caption' holds <\|im_end",
        ),
    ],
)
def test_a_bad_caption_is_an_error_that_names_the_place(tmp_path, entry, message):
    boxes, texts = written(tmp_path, instances(), {"annotations": [entry]})
    with pytest.raises(DataError, match=message):
        convert_coco(boxes, tmp_path / "images", tmp_path / "coco.jsonl", captions=texts)


def test_settings_and_folders_of_no_use_are_errors(tmp_path, monkeypatch):
    boxes, _ = written(tmp_path, instances())
    images, output = tmp_path / "images", tmp_path / "coco.jsonl"
    for settings_, message in (
        ({"min_area": 1.5}, "min_area is 1.5"),
        ({"min_area": float("nan")}, "min_area is nan"),
        ({"min_turns": 0}, "min_turns is 0"),
        ({"limit": 0}, "limit is 0"),
        ({"min_turns": 50}, "no image has 50 turns"),
    ):
        with pytest.raises(DataError, match=message):
            convert_coco(boxes, images, output, **settings_)
    with pytest.raises(DataError, match="no such folder"):
        convert_coco(boxes, tmp_path / "nowhere", output)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"none of its 2 images is in .*empty \(the first is .*3\.png"):
        convert_coco(boxes, tmp_path / "empty", output)
    with pytest.raises(DataError, match="cannot be read"):
        convert_coco(tmp_path / "no.json", images, output)
    monkeypatch.setattr(coco, "MAX_BYTES", 10)
    with pytest.raises(DataError, match=r"boxes\.json: .* bytes; at most 10 are read"):
        convert_coco(boxes, images, output)
    assert not output.exists()


# ── the whole path ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """48 scenes as a set in COCO's form: every object is a box of its shape, with a drawn caption."""
    folder = tmp_path_factory.mktemp("coco")
    (folder / "images").mkdir()
    shapes = ["circle", "ring", "heart", "square", "triangle", "star"]
    kinds = ["round"] * 3 + ["pointed"] * 3
    given: dict[str, Any] = {"images": [], "annotations": []}
    given["categories"] = [
        {"id": n, "name": name, "supercategory": kind} for n, (name, kind) in enumerate(zip(shapes, kinds, strict=True))
    ]
    texts = []
    for number_ in range(48):
        scene = describe(5, number_)
        render(scene).save(folder / "images" / f"{number_:012d}.png")
        given["images"].append({"id": number_, "file_name": f"{number_:012d}.png", "width": 84, "height": 84})
        texts.append({"id": number_, "image_id": number_, "caption": caption(scene)})
        for thing in scene.objects:
            row, column = divmod(thing.cell, 3)
            side = 28 * SIZES[thing.size]
            box = [28 * column + 14 - side / 2, 28 * row + 14 - side / 2, side, side]
            entry = {"id": len(given["annotations"]), "image_id": number_, "category_id": shapes.index(thing.shape)}
            given["annotations"].append(entry | {"bbox": box, "area": side * side, "iscrowd": 0})
    (folder / "instances.json").write_text(json.dumps(given))
    (folder / "captions.json").write_text(json.dumps({"annotations": texts}))
    return folder


def test_the_command_makes_data_that_checks_clean(tree, capsys):
    output = tree / "coco.jsonl"
    command = ["data", "convert", "coco", str(tree / "instances.json"), "--captions", str(tree / "captions.json")]
    command += ["--images", str(tree / "images"), "--output", str(output)]
    assert main([*command, "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert counts["samples"] == 48 and counts["retrieval"] == 48 and counts["local"] > 48
    assert main(["data", "check", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["turns"] == counts["turns"]
    assert rows(output)[0]["image"] == "images/000000000000.png"  # relative: the folder can be moved
    # what is asked about places is what the scenes were drawn from
    places = 0
    for number_, row in enumerate(rows(output)):
        cells = {thing.place: thing.shape for thing in describe(5, number_).objects}
        for turn in row["turns"]:
            if found := re.fullmatch(r"What is (?:at the|in the) (.+)\?", turn["query"][0]):
                place = {"top": "top center", "bottom": "bottom center", "left": "middle left"}.get(found[1], found[1])
                places += 1
                assert turn["target"] == f"a {cells['middle right' if place == 'right' else place]}"
    assert places > 10
    assert main(command) == 0 and "48" in capsys.readouterr().out
    assert main([*command[:3], str(tree / "captions.json"), *command[6:]]) == 1
    assert "no list 'categories'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_trains_on_it(tree, tmp_path):
    output = tree / "train.jsonl"
    convert_coco(tree / "instances.json", tree / "images", output, captions=tree / "captions.json")
    recipe = from_dict(
        {
            "output": str(tmp_path / "run"),
            "model": {
                "tiny": {"width": 64, "feed_forward": 128, "vision_width": 32, "vision_depth": 1, "vocabulary": 512},
                "vision": "trained",
            },
            "data": {"train": [{"path": str(output)}]},
            "turns": {"image_turn": "retrieval"},
            "batch": {"size": 8},
            "trainer": {"max_steps": 2, "learning_rate": 1e-3, "logging_steps": 1, "warmup_steps": 1},
        }
    )
    facts = json.loads((muco.train(recipe) / "run.json").read_text())
    assert facts["steps"] == 2 and all(np.isfinite(loss) and loss > 0 for _, loss in facts["loss"])
    assert facts["data"][0]["fingerprint"] == open_data(output).fingerprint
