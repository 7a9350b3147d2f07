"""The built-in data set: answers follow from pictures, held-out captions stay held out, writing is all or nothing."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from itertools import combinations, product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops

from muco.data import scenes
from muco.data.scenes import Scene, SceneObject, caption, describe, render, split_of, turns, write_scenes
from muco.errors import DataError, OutputError

KINDS = ["classification", "global", "global", "local", "local", "creative", "retrieval"]
any_scene = st.builds(describe, st.integers(0, 3), st.integers(0, 10**9), st.sampled_from((scenes.USUAL, (4, 5, 6))))


def queries(turn) -> list[str]:
    return [content.text for content in turn.query]


def target(turn) -> str:
    (content,) = turn.target
    return content.text


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def five_hundred() -> list[Scene]:
    return [describe(0, index) for index in range(500)]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes") / "set", train=120, test=30, dev=20, seed=5)


# Scenes --------------------------------------------------------------------------------------------------------------


def test_a_scene_depends_on_its_two_numbers_only():
    assert describe(3, 17) == describe(3, 17)
    assert len({describe(seed, index) for seed, index in product(range(10), range(10))}) == 100


@given(any_scene)
def test_nothing_in_a_scene_is_ambiguous(scene):
    n = len(scene.objects)
    assert n in scenes.NUMBERS
    for field in ("color", "shape", "cell"):
        assert len({getattr(thing, field) for thing in scene.objects}) == n
    assert [thing.cell for thing in scene.objects] == sorted(thing.cell for thing in scene.objects)
    assert [thing.size for thing in scene.objects].count(scene.main.size) == 1


def test_the_number_of_scenes_is_that_of_counting_them_one_by_one():
    shapes, colors, sizes = list(scenes.SHAPES), list(scenes.COLORS), list(scenes.SIZES)  # sizes ascend
    total = 0
    for n in (2, 3):
        cells = sum(1 for _ in combinations(range(9), n))
        named = [sum(len(set(chosen)) == n for chosen in product(words, repeat=n)) for words in (colors, shapes)]
        ranks = [sorted(chosen, reverse=True) for chosen in product(range(len(sizes)), repeat=n)]
        total += 5 * 6 * cells * named[0] * named[1] * sum(chosen[0] > chosen[1] for chosen in ranks)
    assert scenes.number_of_scenes() == total == 1_534_982_400
    assert f"{total:,}".replace(",", " ") in scenes.__doc__


def test_scenes_have_as_many_objects_as_asked_for(tmp_path):
    counts = Counter(len(describe(0, index, (4, 6, 6)).objects) for index in range(600))
    assert counts.keys() == {4, 6} and 340 < counts[6] < 460
    folder = write_scenes(tmp_path / "set", train=10, dev=0, test=5, objects=(5,), size=168)
    assert all(turn["target"].startswith("five ") for turn in (row["turns"][1] for row in rows(folder / "train.jsonl")))
    with Image.open(folder / "images/test/00000.png") as picture:
        assert picture.size == (168, 168)
    for wrong in ((), (1,), (2, 7)):
        with pytest.raises(DataError, match=r"objects is .*; pass numbers from 2 to 6"):
            write_scenes(tmp_path / "other", objects=wrong)


# Texts ---------------------------------------------------------------------------------------------------------------


def read_caption(text: str) -> tuple[list[dict], str, str]:
    """What a caption says, read by pattern: the slow and obvious way back."""
    things = re.findall(r"an? (\w+) (\w+) (\w+) at ((?:top|middle|bottom) (?:left|center|right)|center)", text.lower())
    texture, background = re.search(r", on a (\w+) (\w+) background\.$", text).groups()
    return [dict(zip(("size", "color", "shape", "place"), thing, strict=True)) for thing in things], texture, background


@given(any_scene)
def test_a_caption_tells_the_whole_scene(scene):
    things, texture, background = read_caption(caption(scene))
    objects = tuple(
        SceneObject(thing["color"], thing["shape"], thing["size"], scenes.CELLS.index(thing["place"]))
        for thing in things
    )
    assert Scene(objects, background, texture) == scene
    assert len(caption(scene).split()) <= (35 if len(things) <= 3 else 60)


@given(any_scene)
def test_every_answer_follows_from_the_caption_and_the_question(scene):
    things, texture, background = read_caption(caption(scene))
    largest = next(thing for size in ("large", "medium") for thing in things if thing["size"] == size)
    main, shapes, colors, here, there, story, full = turns(scene)

    assert target(main) == f"{largest['color']} {largest['shape']} on {texture} {background}"
    count, rest = re.fullmatch(r"(\w+) shapes on (.*)", target(shapes)).groups()
    ground, named = rest.split(": ")
    assert ["two", "three", "four", "five", "six"][len(things) - 2] == count
    assert ground == f"{texture} {background}"
    assert sorted(re.split(", | and ", named)) == sorted(thing["shape"] for thing in things)
    named, ground = target(colors).split(" on ")
    assert (sorted(re.split(", | and ", named)), ground) == (sorted(thing["color"] for thing in things), background)

    # The place or the color that a question names fits one object, and the answer is about it.
    for question in queries(here):
        (thing,) = [thing for thing in things if re.search(rf" at {thing['place']}[.?]$", question)]
        assert target(here) == f"{thing['size']} {thing['color']} {thing['shape']}"
    for question in queries(there):
        (other,) = [thing for thing in things if f"the {thing['color']} object" in question]
        assert target(there) == f"a {other['size']} {other['shape']} at {other['place']}"
    assert other != thing

    time, hero, place = re.fullmatch(r"At (\w+) a (\w+ \w+) walks (.*)\.", target(story)).groups()
    assert hero == f"{scenes.TEMPERS[largest['color']]} {scenes.HEROES[largest['shape']]}"
    assert (time, place) == (scenes.TIMES[background], scenes.PLACES[texture])
    assert target(full) == caption(scene)


@given(any_scene)
def test_kinds_order_and_lengths(scene):
    assert [turn.kind for turn in turns(scene)] == KINDS
    for turn in turns(scene):
        assert 2 <= len(turn.query) == len(set(turn.query)) <= 4
        assert turn.kind == "retrieval" or 3 <= len(target(turn).split()) <= 12
    assert len({target(turn) for turn in turns(scene)}) == 7


def test_many_answers_and_few_words(five_hundred):
    asked = [turns(scene) for scene in five_hundred]
    distinct = [len({target(turn) for turn in column}) for column in zip(*asked, strict=True)]
    assert min(distinct) >= 130
    assert distinct[-1] == 500
    texts = [text for sample in asked for turn in sample for text in (*queries(turn), target(turn))]
    assert len({word for text in texts for word in re.findall(r"\w+", text.lower())}) < 200


def test_a_question_does_not_give_its_answer_away(five_hundred):
    told = {*scenes.COLORS, *scenes.SHAPES, *scenes.SIZES, *scenes.CELLS, *scenes.BACKGROUNDS, *scenes.TEXTURES}
    answers = defaultdict(Counter)
    for scene in five_hundred:
        for position, turn in enumerate(turns(scene)):
            answers[position, queries(turn)[0]][target(turn)] += 1
            for question in queries(turn):
                words = set(re.findall(r"\w+", question))
                assert not words & set(re.findall(r"\w+", target(turn))) & told
    # Whoever knows the question only, and the most frequent answer to it, is nearly always wrong.
    assert sum(max(counter.values()) for counter in answers.values()) < 0.04 * 7 * len(five_hundred)


def test_questions_of_different_kinds_are_never_the_same(five_hundred):
    kinds = defaultdict(set)
    for scene in five_hundred:
        for position, turn in enumerate(turns(scene)):
            for question in queries(turn):
                kinds[question].add(position)
    assert all(len(positions) == 1 for positions in kinds.values())
    assert len(kinds) == 2 + 3 + 3 + 3 * 9 + 2 * 8 + 3 + 3


# Pictures ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)  # the first picture of a size draws its background
@given(any_scene, st.sampled_from((24, 56, 84, 100)))
def test_objects_stay_inside_their_cells(scene, size):
    picture, empty = render(scene, size), render(Scene((), scene.background, scene.texture), size)
    assert (picture.mode, picture.size) == ("RGB", (size, size))
    outside = ImageChops.difference(picture, empty)
    for thing in scene.objects:
        row, column = divmod(thing.cell, 3)
        left, top = column * size // 3, row * size // 3
        box = (left, top, left + size // 3, top + size // 3)
        assert outside.crop(box).getbbox() is not None
        outside.paste(0, box)
    assert outside.getbbox() is None


@pytest.mark.parametrize("texture", scenes.TEXTURES)
def test_a_picture_shows_color_and_size_of_its_objects(texture):
    for color, background, shape in product(scenes.COLORS, ("beige", "rose"), scenes.SHAPES):
        empty, widths = middle(Scene((), background, texture)), []
        for size in scenes.SIZES:
            picture = middle(Scene((SceneObject(color, shape, size, 4),), background, texture))
            changed = ImageChops.difference(picture, empty).convert("L").point(lambda level: 255 * (level > 0))
            left, _, right, _ = changed.getbbox()
            widths.append(right - left)
            inside = Counter(pixel for pixel, on in zip(pixels(picture), pixels(changed), strict=True) if on)
            assert inside.most_common(1)[0][0] == scenes.COLORS[color]
        assert all(wider >= 1.3 * width for width, wider in zip(widths, widths[1:], strict=False)), widths


def middle(scene: Scene) -> Image.Image:
    return render(scene).crop((28, 28, 56, 56))


def pixels(picture: Image.Image) -> list:
    data = picture.tobytes()
    return list(data) if picture.mode == "L" else list(zip(data[::3], data[1::3], data[2::3], strict=True))


def test_no_two_things_look_alike():
    def look(shape="star", size="small", texture="plain", background="mint", color="red"):
        return render(Scene((SceneObject(color, shape, size, 4),), background, texture)).tobytes()

    forms = {look(shape=shape, size=size) for shape in scenes.SHAPES for size in scenes.SIZES}
    grounds = {look(texture=name, background=ground) for name in scenes.TEXTURES for ground in scenes.BACKGROUNDS}
    assert (len(forms), len(grounds)) == (18, 30)

    def distance(one, other):
        return sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) ** 0.5

    colors = list(scenes.COLORS.values())
    assert min(distance(*pair) for pair in combinations(colors, 2)) > 80
    darker = [tuple(0.86 * level for level in ground) for ground in scenes.BACKGROUNDS.values()]
    grounds = [*scenes.BACKGROUNDS.values(), *darker]
    assert min(distance(*pair) for pair in product(colors, grounds)) > 100


# Files ---------------------------------------------------------------------------------------------------------------


def test_what_is_written(written):
    assert {path.name for path in written.iterdir()} == {
        "images", "train.jsonl", "train_pairs.jsonl", "dev.jsonl", "test.jsonl",
    }  # fmt: skip
    for split, wanted in {"train": 120, "dev": 20, "test": 30}.items():
        lines = rows(written / f"{split}.jsonl")
        assert len(lines) == wanted == len(list((written / "images" / split).iterdir()))
        for number, line in enumerate(lines):
            assert (line["image"], line["id"]) == (f"images/{split}/{number:05d}.png", f"{split}-{number:05d}")
            assert [turn["kind"] for turn in line["turns"]] == KINDS
            with Image.open(written / line["image"]) as image:
                image.load()
                assert (image.format, image.mode, image.size) == ("PNG", "RGB", (84, 84))


def test_pairs_are_the_captions_of_the_training_images(written):
    train, pairs = rows(written / "train.jsonl"), rows(written / "train_pairs.jsonl")
    assert len({pair["id"] for pair in pairs}) == len(pairs) == len(train)
    for row, pair in zip(train, pairs, strict=True):
        (turn,) = pair["turns"]
        assert turn == {
            "query": row["turns"][-1]["target"], "target": {"image": row["image"]}, "kind": "text-to-image",
        }  # fmt: skip


def test_a_written_picture_is_the_one_that_its_caption_tells(written):
    for row in rows(written / "test.jsonl"):
        things, texture, background = read_caption(row["turns"][-1]["target"])
        objects = [SceneObject(t["color"], t["shape"], t["size"], scenes.CELLS.index(t["place"])) for t in things]
        with Image.open(written / row["image"]) as image:
            assert image.tobytes() == render(Scene(tuple(objects), background, texture)).tobytes()


def test_held_out_captions_are_not_in_training_whatever_the_seed(written, tmp_path):
    other = write_scenes(tmp_path / "other", train=300, test=60, dev=60, seed=6, size=24)
    captions = {split: [] for split in scenes.SPLITS}
    for folder, split in product((written, other), scenes.SPLITS):
        here = [row["turns"][-1]["target"] for row in rows(folder / f"{split}.jsonl")]
        assert len(set(here)) == len(here)
        captions[split] += here
    for one, another in combinations(captions.values(), 2):
        assert not set(one) & set(another)


def test_splits_have_their_shares():
    shares = Counter(split_of(describe(9, index)) for index in range(4000))
    assert shares["train"] == pytest.approx(3600, abs=80)
    assert shares["dev"] == pytest.approx(200, abs=60)


def test_the_same_arguments_give_the_same_bytes(tmp_path):
    small = {"train": 12, "test": 3, "dev": 2, "size": 48}
    one, two = (hashes(write_scenes(tmp_path / name, **small, seed=1)) for name in "ab")
    assert one == two
    assert one.keys() == (other := hashes(write_scenes(tmp_path / "c", **small, seed=2))).keys()
    assert one != other


def test_the_first_scenes_do_not_depend_on_how_many_follow(tmp_path):
    few = hashes(write_scenes(tmp_path / "few", train=5, test=2, dev=2))
    many = hashes(write_scenes(tmp_path / "many", train=9, test=4, dev=2))
    assert all(many[name] == digest for name, digest in few.items() if name.startswith("images"))


def test_progress_counts_every_image(tmp_path):
    seen = []
    write_scenes(tmp_path / "set", train=4, test=2, dev=1, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 7) for done in range(1, 8)]


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path):
    used, file = tmp_path / "used", tmp_path / "file"
    used.mkdir()
    (used / "notes.txt").write_text("mine")
    file.write_text("mine")
    for path in (used, file):
        with pytest.raises(OutputError, match=re.escape(str(path))):
            write_scenes(path, train=2, test=1, dev=1)
    assert [path.name for path in used.iterdir()] == ["notes.txt"]
    assert {path.name for path in tmp_path.iterdir()} == {"used", "file"}


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "a" / "b"):
        assert write_scenes(path, train=2, test=1, dev=0) == path
        assert len(rows(path / "train.jsonl")) == 2
        assert rows(path / "dev.jsonl") == []


@pytest.mark.parametrize("wrong", [{"train": -1}, {"dev": -3}, {"seed": -1}, {"size": 10}])
def test_senseless_numbers_are_refused(tmp_path, wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(DataError, match=f"{name} is {value}"):
        write_scenes(tmp_path / "set", **wrong)
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_nothing(tmp_path):
    def interrupt(done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_scenes(tmp_path / "set", train=10, test=0, dev=0, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_no_half_written_set_and_the_next_run_succeeds(tmp_path):
    code = (
        "import os, signal, sys\n"
        "from muco.data.scenes import write_scenes\n"
        "die = lambda done, total: done == 5 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_scenes(sys.argv[1], train=10, test=0, dev=0, progress=die)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "set")], cwd=Path(__file__).parents[2])
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "set").exists()
    (left,) = tmp_path.iterdir()  # hidden, and named after the set
    assert left.name.startswith(".set-")
    assert len(rows(write_scenes(tmp_path / "set", train=10, test=0, dev=0) / "train.jsonl")) == 10
