from __future__ import annotations

import functools
import hashlib
import io
import json
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from muco.dialogue import Content, Sample, Turn
from muco.errors import DataError, ImageError, MucoError, OutputError
from muco.evaluate import cache as cache_module
from muco.evaluate.cache import Book, EmbeddingCache, embed
from muco.evaluate.compare import compare
from muco.evaluate.report import print_results
from muco.evaluate.retrieval import evaluate_retrieval

COLOURS = {"red": (220, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 220), "white": (255, 255, 255), "grey": (120,) * 3}
NAMES = list(COLOURS)


class Samples(list):
    """A list of samples as data; the fingerprint covers texts and image bytes, as the real sources' does."""

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(repr([[self.side(c) for c in contents(s)] for s in self]).encode()).hexdigest()

    @staticmethod
    def side(content: Content) -> tuple:
        return content.text, [i.read_bytes() if isinstance(i, Path) else i for i in content.images]


def contents(sample: Sample) -> list[Content]:
    return [Content(images=sample.images), *(c for turn in sample.turns for c in (*turn.query, *turn.target))]


def png(left: str, right: str, bottom: str) -> bytes:
    image = Image.new("RGB", (40, 40), COLOURS[left])
    image.paste(COLOURS[right], (20, 0, 40, 40))
    image.paste(COLOURS[bottom], (0, 20, 40, 40))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def scenes(n: int = 60) -> Samples:
    combinations = [(a, b, c) for a in NAMES for b in NAMES for c in NAMES]
    random.Random(0).shuffle(combinations)
    return Samples(
        Sample(
            image=png(a, b, c),
            turns=[
                Turn(["colour left", "unused"], [f"left {a}", "unused"], "local"),
                Turn("colour right", f"right {b}", "local"),
                Turn("colours above", f"above {a} {b}"),
                Turn("caption", f"left {a} right {b} bottom {c}", "retrieval"),
            ],
            id=str(i),
            where=f"scenes.jsonl:{i + 1}",
        )
        for i, (a, b, c) in enumerate(combinations[:n])
    )


class Words:
    """Reads colours from three places of an image, and any word from a text: a real, if simple, content encoder."""

    fingerprint = "words"
    places = {"left": (5, 5), "right": (35, 5), "bottom": (20, 35)}

    def __init__(self) -> None:
        self.calls = self.encoded = 0

    def encode(self, contents: list[Content], *, batch_size: int) -> np.ndarray:
        self.calls += 1
        self.encoded += len(contents)
        return np.stack([self.vector(content) for content in contents])

    def words(self, content: Content) -> list[str]:
        words = content.text.split()
        for image in content.images:
            pixels = (image if isinstance(image, Image.Image) else Image.open(self.file(image))).convert("RGB")
            for place, xy in self.places.items():
                near = min(NAMES, key=lambda name: np.abs(np.subtract(COLOURS[name], pixels.getpixel(xy))).sum())
                words += [place, near, f"{place} {near}"]
        return words

    @staticmethod
    def file(image: bytes | Path):
        return io.BytesIO(image) if isinstance(image, bytes) else image

    def vector(self, content: Content) -> np.ndarray:
        words = self.words(content)
        vector = sum(
            word_vector(word) for word in [*words, *(" ".join(p) for p in zip(words, words[1:], strict=False))]
        )
        return (vector / np.linalg.norm(vector)).astype(np.float32)


@functools.cache
def word_vector(word: str, dim: int = 64) -> np.ndarray:
    return np.random.default_rng(int(hashlib.sha256(word.encode()).hexdigest()[:8], 16)).normal(size=dim)


class Blurred(Words):
    """Sees one place alone."""

    fingerprint = "blurred"
    places = {"left": (5, 5)}


class Oracle:
    """Knows the data: a query and its target are one axis, and so are a caption and its image."""

    fingerprint = "oracle"

    def __init__(self, data: Samples) -> None:
        self.book, self.axis = Book(), {}
        for sample in data:
            for turn in sample.turns:
                target = self.book.add(turn.target[0])
                axis = self.axis.setdefault(target, len(self.axis))
                self.axis[self.book.add(Content(turn.query[0].text, sample.images))] = axis
                if turn.kind == "retrieval":
                    self.axis[self.book.add(Content(images=sample.images))] = axis

    def encode(self, contents: list[Content], *, batch_size: int) -> np.ndarray:
        size = len(self.axis)
        rows = np.zeros((len(contents), size), np.float32)
        for row, content in zip(rows, contents, strict=True):
            key = self.book.add(content)
            row[self.axis[key] if key in self.axis else int(key, 16) % size] = 1
        return rows


class Constant:
    """A collapsed model: one point, give or take some noise."""

    fingerprint = "constant"

    def __init__(self, value: float = 0.5, noise: float = 0.0) -> None:
        self.value, self.noise = value, noise

    def encode(self, contents: list[Content], *, batch_size: int) -> np.ndarray:
        noise = np.random.default_rng(0).normal(size=(len(contents), 4)) * self.noise
        return (self.value + noise).astype(np.float32)


def flat(result: dict) -> dict[str, dict]:
    """Task or task/kind -> scores."""
    found = {}
    for name, scores in result["tasks"].items():
        found |= {f"{name}/{kind}": part for kind, part in scores.get("kinds", {}).items()} or {name: scores}
    return found


# ---------------------------------------------------------------- scores


def slow_hits(model: Words, rows: list[tuple[Content, Content, list[Content]]]) -> dict[str, float]:
    """hit@1 and MRR of (query, right, rivals), one at a time; ties (to 1e-6) are lost."""
    ranks, vectors = [], {}

    def vector(content: Content) -> np.ndarray:
        if id(content) not in vectors:
            vectors[id(content)] = model.vector(content)
        return vectors[id(content)]

    for query, right, rivals in rows:
        q = vector(query)
        own = q @ vector(right)
        ranks.append(1 + sum(q @ vector(rival) >= own - 1e-6 for rival in rivals))
    return {"hit@1": np.mean([r == 1 for r in ranks]), "mrr": np.mean([1 / r for r in ranks])}


def test_scores_equal_an_obvious_loop():
    data, model = scenes(), Words()
    result = evaluate_retrieval(model, data, candidates=1000)
    found = flat(result)
    asked = [(s, t, Content(t.query[0].text, s.images), t.target[0]) for s in data for t in s.turns]

    def others(targets: list[Content], right: Content) -> list[Content]:
        return [t for t in {t.text: t for t in targets}.values() if t.text != right.text]

    alone = {s.id: Content(images=s.images) for s in data}
    rows = defaultdict(list)
    for sample, turn, query, right in asked:
        same_kind = others([r for _, t, _, r in asked if t.kind == turn.kind], right)
        rows["within"].append((query, right, others([t.target[0] for t in sample.turns], right)))
        if turn.kind == "retrieval":
            rows["image_to_caption"].append((query, right, same_kind))
            black = Content(query.text, (Image.new("RGB", (40, 40)),))
            rows["blind"].append((black, right, same_kind))
            rows["caption_to_image"].append((right, alone[sample.id], [alone[s.id] for s in data if s is not sample]))
        else:
            kind = turn.kind or "(none)"
            rows[f"answer/{kind}"].append((query, right, same_kind))
            rows[f"answer_text_only/{kind}"].append((Content(query.text), right, same_kind))
    expected = {name: slow_hits(model, some) for name, some in rows.items()}
    assert set(found) == set(expected)
    for name, scores in found.items():
        assert {key: scores[key] for key in ("hit@1", "mrr")} == pytest.approx(expected[name]), name
        assert scores["queries"] == len(rows[name])
        assert scores["chance@1"] == pytest.approx(np.mean([1 / (1 + len(r)) for _, _, r in rows[name]]))
    assert 0.1 < found["image_to_caption"]["hit@1"] < 1  # neither blind nor perfect: the comparison means something
    kinds = result["tasks"]["answer"]["kinds"]
    assert result["tasks"]["answer"]["mean"]["mrr"] == pytest.approx(np.mean([k["mrr"] for k in kinds.values()]))


def test_an_oracle_is_perfect_and_its_controls_are_not():
    data = scenes()
    result = evaluate_retrieval(Oracle(data), data, candidates=8)
    found = flat(result)
    for name in ("answer/local", "answer/(none)", "image_to_caption", "caption_to_image", "within"):
        assert found[name]["hit@1"] == found[name]["mrr"] == 1.0
    for name in ("answer_text_only/local", "answer_text_only/(none)", "blind"):
        assert found[name]["hit@1"] < 0.5
    assert result["warnings"] == [] and not result["collapsed"]
    assert found["answer/local"]["candidates_min"] == found["answer/local"]["candidates_max"] == 8
    assert found["answer/local"]["pool"] == 10 and found["image_to_caption"]["pool"] == 60
    assert found["within"]["chance@1"] == pytest.approx(1 / 4)
    assert found["within"]["hit@5"] is None  # of four candidates everyone hits five


def test_what_a_model_says_of_itself_is_among_the_warnings(tmp_path):
    data = scenes()
    oracle = Oracle(data)
    oracle.caveat = "it was not trained for vectors"
    assert evaluate_retrieval(oracle, data, output=tmp_path)["warnings"] == [oracle.caveat]
    assert json.loads((tmp_path / "retrieval.json").read_text())["warnings"] == [oracle.caveat]


@pytest.mark.parametrize(
    "model", [Constant(), Constant(noise=1e-5), Constant(float("nan"))], ids=["equal", "nearly equal", "nan"]
)
def test_a_collapsed_or_nan_model_scores_nothing_and_is_reported(model):
    result = evaluate_retrieval(model, scenes())
    assert result["collapsed"]
    for name, scores in flat(result).items():
        assert not any(scores[f"hit@{k}"] for k in (1, 5, 10)), name
    nan = np.isnan(model.value)
    assert result["non_finite"] == (result["encoded"] if nan else 0)
    said = "are not finite" if nan else "the model has collapsed"
    assert any(line.startswith("image_to_caption") and said in line for line in result["warnings"])
    json.dumps(result, allow_nan=False)


def test_a_model_that_ignores_images_is_reported():
    class Deaf(Words):
        def words(self, content: Content) -> list[str]:
            return ["picture"] if not content.text else content.text.split()

    result = evaluate_retrieval(Deaf(), scenes())
    assert result["collapsed"] and result["tasks"]["caption_to_image"]["hit@1"] == 0
    assert any("caption_to_image: all 60 pool vectors are the same" in line for line in result["warnings"])
    assert any("image_to_caption: hit@1" in line and "not above chance" in line for line in result["warnings"])


def test_a_question_that_tells_the_answer_is_reported_as_a_leak():
    told = [
        Sample(s.images, [Turn(f"caption {s.turns[3].target[0].text}", s.turns[3].target, "retrieval")])
        for s in scenes()
    ]
    result = evaluate_retrieval(Words(), Samples(told))
    assert result["tasks"]["blind"]["hit@1"] > 0.2 > 10 * result["tasks"]["blind"]["chance@1"]
    assert any(line.startswith("blind") and "gives the answer away" in line for line in result["warnings"])


# ---------------------------------------------------------------- what may not matter, and what is right


def test_the_order_of_samples_and_turns_moves_nothing():
    data = scenes()
    moved = Samples(s.with_turns(random.Random(i).sample(s.turns, 4)) for i, s in enumerate(data))
    random.Random(1).shuffle(moved)
    first, second = (evaluate_retrieval(Words(), d, candidates=5)["tasks"] for d in (data, moved))
    for name, scores in flat({"tasks": first}).items():
        again = flat({"tasks": second})[name]
        assert {k: v for k, v in scores.items() if k != "health"} == pytest.approx(
            {k: again[k] for k in scores if k != "health"}
        )


def test_the_seed_changes_the_draw():
    answers = [evaluate_retrieval(Words(), scenes(), candidates=3, seed=seed)["tasks"]["answer"] for seed in (0, 0, 1)]
    assert answers[0] == answers[1] != answers[2]


def test_all_that_the_data_calls_right_is_no_rival():
    image = png("red", "green", "blue")
    data = Samples(
        [
            Sample(image, [Turn("caption", "left red", "retrieval"), Turn("q", "yes", "x")]),
            Sample(image, [Turn("caption", "right green", "retrieval"), Turn("q", "yes", "x")]),
            Sample(png("white", "grey", "grey"), [Turn("caption", "left white", "retrieval"), Turn("q", "no", "x")]),
        ]
    )
    result = evaluate_retrieval(Oracle(data), data)
    captions, images = result["tasks"]["image_to_caption"], result["tasks"]["caption_to_image"]
    assert (captions["queries"], captions["pool"], captions["candidates_max"], captions["candidates_min"]) == (
        3,
        3,
        3,
        2,
    )
    assert (images["pool"], images["candidates_max"]) == (2, 2)  # one image twice is one candidate
    answers = result["tasks"]["answer"]["kinds"]["x"]
    assert (answers["pool"], answers["queries"], answers["hit@1"]) == (2, 3, 1.0)
    assert answers["most_common"] == pytest.approx(2 / 3)


def test_targets_without_a_sample_image():
    images = [png(a, b, "grey") for a in NAMES for b in NAMES[:2]]
    rows = [Sample(turns=[Turn(f"{i}", {"image": image})]) for i, image in enumerate(images)]
    rows += [Sample(turns=[Turn("one", "eins"), Turn("two", "zwei")])]
    data = Samples(rows)
    result = evaluate_retrieval(Oracle(data), data)
    assert {name: s["pool"] for name, s in result["tasks"].items()} == {"text_to_image": 10, "text_to_text": 2}
    assert all(scores["hit@1"] == 1 for scores in result["tasks"].values())
    skipped = {"answer", "answer_text_only", "image_to_caption", "caption_to_image", "blind", "within"}
    assert set(result["skipped"]) == skipped


def test_a_kind_with_one_answer_or_without_text_is_skipped_with_a_reason():
    data = Samples(
        Sample(png(a, a, a), [Turn("q", "always", "same"), Turn("", a, "bare"), Turn("caption", a, "retrieval")])
        for a in NAMES
    )
    result = evaluate_retrieval(Words(), data)
    assert "two different targets" in result["skipped"]["answer/same"]
    assert result["skipped"]["answer_text_only/bare"] == "a question has no text"
    assert set(result["tasks"]["answer"]["kinds"]) == {"bare"}


# ---------------------------------------------------------------- input and output


def test_bad_input_is_named():
    with pytest.raises(MucoError, match="candidates is 1"):
        evaluate_retrieval(Words(), scenes(3), candidates=1)
    with pytest.raises(MucoError, match="limit is 0"):
        evaluate_retrieval(Words(), scenes(3), limit=0)
    with pytest.raises(DataError, match="nothing to evaluate in 0 samples"):
        evaluate_retrieval(Words(), Samples())
    missing = Sample(Path("/no/such.png"), [Turn("q", "a")], where="rows.jsonl:7")
    with pytest.raises(ImageError, match="rows.jsonl:7: /no/such.png: no such image file"):
        evaluate_retrieval(Words(), NoFingerprint([*scenes(3), missing]))


class NoFingerprint(Samples):
    fingerprint = "none"


def test_a_content_that_the_model_refuses_is_named_by_its_row():
    class Strict(Words):
        def vector(self, content: Content) -> np.ndarray:
            if "<|emb|>" in content.text:
                raise DataError("input 3: text holds the special token <|emb|>")
            return super().vector(content)

    data = scenes(9)
    data[5] = data[5].with_turns([Turn("q", "a <|emb|>", "x"), *data[5].turns[1:]])
    with pytest.raises(DataError, match=r"^scenes.jsonl:6: .*special token"):
        evaluate_retrieval(Strict(), data)


def test_limit_takes_the_first_samples():
    limited, whole = (evaluate_retrieval(Words(), d, limit=n) for d, n in ((scenes(), 20), (scenes(20), None)))
    assert limited["tasks"] == whole["tasks"]
    assert (limited["samples"], limited["limit"], whole["limit"]) == (20, 20, None)


def test_the_result_is_written_whole(tmp_path):
    done = []
    result = evaluate_retrieval(Words(), scenes(9), output=tmp_path / "new", progress=lambda *at: done.append(at))
    assert json.loads((tmp_path / "new" / "retrieval.json").read_text(encoding="utf-8")) == result
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["retrieval", "retrieval.json"]
    assert done == [(result["encoded"], result["encoded"])]
    assert (result["model"], result["data"]) == ("words", scenes(9).fingerprint)
    assert result["versions"]["torch"] and result["versions"]["python"] and "muco" in result["versions"]
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="choose another output folder"):
        evaluate_retrieval(Words(), scenes(9), output=tmp_path / "file")
    with pytest.raises(OutputError, match="choose another cache folder"):
        evaluate_retrieval(Words(), scenes(9), cache=tmp_path / "file")


def test_two_models_are_compared_query_by_query(tmp_path):
    data = scenes()
    made = {"a": Blurred(), "b": Words()}
    results = [evaluate_retrieval(model, data, output=tmp_path / name) for name, model in made.items()]
    found = compare(tmp_path / "a", tmp_path / "b")
    assert not found["not_comparable"] and found["settings"] == {"model": ["blurred", "words"]}
    for name, task in found["tasks"].items():
        group, _, kind = name.partition("/")
        scores = [result["tasks"][group] for result in results]
        scores = [own["kinds"][kind] if kind else own for own in scores]
        assert [task["a"], task["b"]] == pytest.approx([own["hit@1"] for own in scores])
        assert task["queries"] == scores[0]["queries"]
    tasks = {name.partition("/")[0] for name in found["tasks"]}
    assert {"answer", "image_to_caption", "caption_to_image", "within"} <= tasks, "controls tell nothing of models"
    assert not tasks & {"blind", "answer_text_only"} and found["means"]["overall"]["difference"] > 0
    evaluate_retrieval(Words(), data, output=tmp_path / "b", seed=1)
    with pytest.raises(DataError, match="the data differ"):
        compare(tmp_path / "a", tmp_path / "b")
    evaluate_retrieval(Words(), data, output=tmp_path / "b", dimension=16, storage="int8")
    evaluate_retrieval(Blurred(), data, output=tmp_path / "a", dimension=16, storage="int8")
    short = compare(*(tmp_path / name / "retrieval-16-int8" for name in ("a", "b")))
    assert short["tasks"].keys() == found["tasks"].keys()


def test_each_distinct_content_is_encoded_once():
    data, model = scenes(), Words()
    evaluate_retrieval(model, Samples([*data, *data]))
    images_and_questions, answers = 60 * (1 + 4), len({t.target[0].text for s in data for t in s.turns})
    unseen, blind = 3, 1
    assert model.encoded == images_and_questions + answers + unseen + blind


def test_reports_hold_every_task(capsys):
    data = scenes(12)
    more = (Turn("q", "x", "a|[bold]b"), Turn("r", "y", "a|[bold]b"), Turn("s", "z", "lonely"))
    data[0] = data[0].with_turns([*data[0].turns, *more])
    result = evaluate_retrieval(Constant(), data, limit=10)
    out = io.StringIO()
    print_results(result, Console(file=out, width=120))
    text = out.getvalue()
    told = ["image_to_caption", "within", "blind", "(mean of kinds)", "(none)", "collapsed", "first 10"]
    for name in [*told, "skipped answer/lonely", "a|[bold]b"]:
        assert name in text


@pytest.mark.parametrize("storage", ["float32", "int8", "binary"])
def test_shorter_vectors_and_codes_are_scored_from_the_cache(tmp_path, storage):
    model, data, cache = Words(), scenes(20), tmp_path / "cache"
    whole = evaluate_retrieval(model, data, cache=cache, output=tmp_path)
    encoded = model.encoded
    short = evaluate_retrieval(model, data, cache=cache, output=tmp_path, dimension=16, storage=storage)
    assert model.encoded == encoded, "whole vectors are in the cache"
    assert (short["dimension"], short["storage"]) == (16, storage) and whole["dimension"] == 64
    name = "retrieval-16.json" if storage == "float32" else f"retrieval-16-{storage}.json"
    assert json.loads((tmp_path / name).read_text()) == short

    class Short(Words):
        def encode(self, contents: list[Content], *, batch_size: int) -> np.ndarray:
            part = super().encode(contents, batch_size=batch_size)[:, :16]
            return part / np.linalg.norm(part, axis=1, keepdims=True)

    assert short["tasks"] == evaluate_retrieval(Short(), data, storage=storage)["tasks"]
    hits = [result["tasks"]["image_to_caption"]["mrr"] for result in (short, whole)]
    assert 0.1 < hits[0] < hits[1]
    out = io.StringIO()
    print_results(short, Console(file=out, width=120))
    assert f"vectors of 16 dimensions, scored as {storage}" in out.getvalue()


@pytest.mark.parametrize("storage", ["float32", "int8", "binary"])
def test_a_collapsed_model_scores_nothing_in_any_storage(storage):
    result = evaluate_retrieval(Constant(), scenes(12), storage=storage)
    assert result["collapsed"] and result["tasks"]["image_to_caption"]["hit@1"] == 0


def test_a_dimension_that_the_vectors_lack_is_refused():
    with pytest.raises(MucoError, match="vectors of 64 dimensions cannot be shortened to 65"):
        evaluate_retrieval(Words(), scenes(4), dimension=65)


# ---------------------------------------------------------------- cache


def on_disk(folder: Path, n: int = 12) -> Samples:
    rows = Samples()
    for i, sample in enumerate(scenes(n)):
        path = folder / f"{i}.png"
        path.write_bytes(sample.images[0])
        rows.append(sample.with_images(path))
    return rows


def test_the_cache_is_used_for_the_same_model_and_data_only(tmp_path):
    data = on_disk(tmp_path)

    def run(model: Words) -> tuple[int, dict]:
        result = evaluate_retrieval(model, data, cache=tmp_path / "cache")
        return model.encoded, result

    encoded, first = run(Words())
    assert encoded == first["encoded"] > 0
    again, second = run(Words())
    assert again == 0 and second["tasks"] == first["tasks"]

    other = Words()
    other.fingerprint = "other words"
    assert run(other)[0] == encoded

    short = Words()
    short.truncate_dim = 16  # as of a model that is loaded so: its vectors are others
    encoded_short, of_short = run(short)
    assert encoded_short == encoded and of_short["model"] == f"{first['model']}-16"

    (tmp_path / "3.png").write_bytes(png("grey", "grey", "white"))
    changed, third = run(Words())
    assert changed == third["encoded"]
    assert third["tasks"] == evaluate_retrieval(Words(), data)["tasks"] != first["tasks"]


def test_an_image_that_changes_under_an_old_fingerprint_is_encoded_again(tmp_path):
    data = NoFingerprint(on_disk(tmp_path))
    evaluate_retrieval(Words(), data, cache=tmp_path / "cache")
    (tmp_path / "3.png").write_bytes(png("grey", "grey", "white"))
    model = Words()
    result = evaluate_retrieval(model, data, cache=tmp_path / "cache")
    assert model.encoded == 5  # the image and its four questions
    assert result["tasks"] == evaluate_retrieval(Words(), data)["tasks"]


def test_a_killed_run_goes_on_at_the_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "SHARD", 10)

    class Killed(Words):
        def encode(self, contents: list[Content], *, batch_size: int) -> np.ndarray:
            if self.calls == 3:
                raise KeyboardInterrupt
            return super().encode(contents, batch_size=batch_size)

    data = scenes(12)
    with pytest.raises(KeyboardInterrupt):
        evaluate_retrieval(Killed(), data, cache=tmp_path)
    model = Words()
    result = evaluate_retrieval(model, data, cache=tmp_path)
    assert model.encoded == result["encoded"] - 30
    assert result["tasks"] == evaluate_retrieval(Words(), data)["tasks"]


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:-9] + b"x" + b[-8:]])
def test_a_damaged_shard_is_computed_again_with_a_message(tmp_path, monkeypatch, caplog, damage):
    monkeypatch.setattr(cache_module, "SHARD", 10)
    data = scenes(12)
    first = evaluate_retrieval(Words(), data, cache=tmp_path)
    shard = sorted(tmp_path.glob("*/*.npy"))[1]
    shard.write_bytes(damage(shard.read_bytes()))
    model = Words()
    second = evaluate_retrieval(model, data, cache=tmp_path)
    assert model.calls == 1 and 0 < model.encoded <= 10
    assert second["tasks"] == first["tasks"]
    assert f"{shard}: the cached vectors are damaged" in caplog.text
    caplog.clear()
    evaluate_retrieval(Words(), data, cache=tmp_path)
    assert caplog.text == ""


def test_the_cache_gives_back_the_bits_in_the_order_asked(tmp_path):
    rng = np.random.default_rng(0)
    keys = [hashlib.sha256(bytes([i])).hexdigest() for i in range(30)]
    vectors = dict(zip(keys, rng.normal(size=(30, 5)).astype(np.float32), strict=True))
    vectors[keys[4]][2] = np.nan
    store = EmbeddingCache(tmp_path, model="m", data="d")
    asked = []

    def encode(some):
        asked.extend(some)
        return np.stack([vectors[key] for key in some])

    embed(keys[::3], encode, cache=store)
    found = embed(keys[::-1], encode, cache=EmbeddingCache(tmp_path, model="m", data="d"))
    assert found.tobytes() == np.stack([vectors[key] for key in keys[::-1]]).tobytes()
    assert sorted(asked) == sorted(keys)
    for other in ({"model": "x", "data": "d"}, {"model": "m", "data": "x"}):
        assert EmbeddingCache(tmp_path, **other).load() == {}


def test_keys_follow_text_and_image_bytes(tmp_path):
    book = Book()
    data, path = png("red", "blue", "grey"), tmp_path / "a.png"
    path.write_bytes(data)
    assert book.add(Content("q", (path,))) == book.add(Content("q", (data,))) == book.add(Content("q", (str(path),)))
    grey = Image.new("L", (30, 40), 9)
    keys = [
        Content("q"),
        Content("", (path,)),
        Content("q", (path, path)),
        Content("q", (grey,)),
        Content("q", (data,)),
    ]
    keys += [Content("q", (grey.rotate(90, expand=True),)), Content("Q")]
    assert len({book.add(content) for content in keys}) == len(keys)


# ---------------------------------------------------------------- during training


def test_the_trainer_logs_the_evaluator(tmp_path):
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from torch import nn

    from muco.training.callbacks import RetrievalEvaluator

    class Trained(SentenceTransformer):
        def encode(self, inputs, **kwargs):
            return Words().encode(inputs, **kwargs)

    data = scenes(30)
    model = Trained(modules=[nn.Linear(2, 2)], device="cpu")
    evaluator = RetrievalEvaluator(data, limit=20)
    arguments = SentenceTransformerTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, evaluator=evaluator, loss=MultipleNegativesRankingLoss(model)
    )
    logged = trainer.evaluate()
    expected = evaluate_retrieval(Words(), data, limit=20)["tasks"]
    assert evaluator.primary_metric == "image_to_caption_hit@1"
    for name in ("image_to_caption", "caption_to_image", "within", "blind"):
        assert [logged.get(f"eval_{name}_hit@{k}") for k in (1, 10)] == [expected[name][f"hit@{k}"] for k in (1, 10)]
    assert logged["eval_answer_mrr"] == expected["answer"]["mean"]["mrr"]
    assert logged["eval_collapsed"] == 0.0
