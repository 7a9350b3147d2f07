"""LLaVA conversations and VisDial dialogues: turns, images, random access into large JSON, and every error."""

from __future__ import annotations

import json
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from muco.data import json_places
from muco.data.conversations import LlavaData, VisDialData
from muco.dialogue import Sample
from muco.errors import DataError


def square(path: Path, level: int = 90) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (level, 20, 30)).save(path)
    return str(path)


def entry(*messages: str, image: Any = "a/7.jpg", id: Any = "7", **others: Any) -> dict:
    roles = ("human", "gpt") * len(messages)
    said = [{"from": role, "value": text} for role, text in zip(roles, messages, strict=False)]
    return {"id": id, "image": image, "conversations": said} | others


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def texts(sample: Sample) -> list[tuple[str, str]]:
    return [(turn.query[0].text, turn.target[0].text) for turn in sample.turns]


# ── LLaVA ────────────────────────────────────────────────────────────────────────────────────────────────────────────

ENTRIES = [
    entry("<image>\nWhat is it?", "A ring.", "Is it “gold”?", "No, silver."),
    entry("Who wrote it?", "A baker did.", image=None, id=12),
    entry("<image>", "Größe 😀", id="x"),
]


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_every_exchange_is_a_turn(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"talk.{kind}"
    lines = [json.dumps(e, ensure_ascii=False) for e in ENTRIES]
    path.write_text("\n\n".join(lines) if kind == "jsonl" else "[" + ",\n".join(lines) + "]", encoding="utf-8")
    data = LlavaData(path)
    assert len(data) == 3 and data[-1] == data[2]
    first, second, third = (data[i] for i in range(3))
    assert texts(first) == [("What is it?", "A ring."), ("Is it “gold”?", "No, silver.")]
    assert first.images == (str(tmp_path / "a/7.jpg"),) and first.id == "7"
    assert {turn.kind for turn in first.turns} == {"dialogue"}
    assert texts(second) == [("Who wrote it?", "A baker did.")] and second.images == () and second.id == "12"
    assert texts(third) == [("", "Größe 😀")], "the question is the image itself"
    assert [s.where for s in (first, third)] == [f"{path}:1", f"{path}:5"] if kind == "jsonl" else [
        f"{path} row 0", f"{path} row 2"]  # fmt: skip
    with pytest.raises(IndexError, match="row 3 of 3"):
        data[3]
    again = pickle.loads(pickle.dumps(data))
    assert [again[i] for i in range(3)] == [first, second, third]


@pytest.mark.parametrize(
    "text, with_image, without",
    [
        ("<image>\nWhat?", "What?", "\nWhat?"),
        ("What?\n<image>", "What?", "What?\n"),
        ("Look at <image> there", "Look at there", "Look at  there"),
        ("<image> <image>\nBoth?", "Both?", " \nBoth?"),
        ("an <images> tag", "an <images> tag", "an <images> tag"),
    ],
)
def test_placeholders_are_taken_out(tmp_path: Path, text: str, with_image: str, without: str) -> None:
    path = write(tmp_path / "talk.json", [entry(text, "yes"), entry(text, "yes", image="")])
    data = LlavaData(path)
    assert [data[i].turns[0].query[0].text for i in range(2)] == [with_image, without]


def test_answers_keep_what_looks_like_a_placeholder_and_images_may_be_several(tmp_path: Path) -> None:
    path = write(tmp_path / "talk.json", [entry("Tag?", "<image>", image=["a.png", "b.png"])])
    sample = LlavaData(path, images=tmp_path)[0]
    assert texts(sample) == [("Tag?", "<image>")]
    assert sample.images == (str(tmp_path / "a.png"), str(tmp_path / "b.png"))


@pytest.mark.parametrize(
    "bad, sentence",
    [
        ([], "the entry must be a JSON object, not a list"),
        ({"id": "1"}, "'conversations' must be a list of at least two messages, not None"),
        (
            {"id": "1", "conversation": []},
            "'conversations' must be a list of at least two messages, not None; the entry has id, conversation",
        ),
        (entry("a"), "the last message, 0, has no answer; every question needs one"),
        (entry("a", "b", "c"), "the last message, 2, has no answer; every question needs one"),
        (entry("a", "") | {"image": None}, "message 1: 'value' is empty; fix the entry"),
        (entry("<image>", "b", image=None), "message 0: 'value' is empty and the entry has no image"),
        (entry("a", "b", image="../x.png"), "'image' is '../x.png'; use the path of an image within"),
        (entry("a", "b", image="http://example.org/x.png"), "'image' is a URL (http://example.org/x.png)"),
        (entry("a", "b", image=3), "'image' must be a string or null, not 3"),
        (entry("a", "b", id=1.5), "'id' must be a string or null, not 1.5"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "message 0: 'from' is 'gpt', where 'human' must be"),
        ({"conversations": [{"from": "human", "value": "a"}] * 2}, "message 1: 'from' is 'human', where 'gpt' must be"),
        ({"conversations": [{"from": "system", "value": "a"}]}, "message 0: 'from' is 'system'; it must be 'human' or"),
        ({"conversations": ["a"]}, "message 0: the message must be a JSON object, not a string"),
        ({"conversations": [{"from": "human"}]}, "message 0: no 'value'; a message says something"),
        ({"conversations": [{"from": "human", "value": 1}]}, "message 0: 'value' must be a string or null, not 1"),
    ],
)
def test_a_bad_entry_is_named(tmp_path: Path, bad: Any, sentence: str) -> None:
    path = write(tmp_path / "talk.json", [entry("a", "b"), bad])
    data = LlavaData(path)
    assert data[0].turns
    with pytest.raises(DataError) as error:
        data[1]
    assert str(error.value).removeprefix(f"{path} row 1").lstrip(": ").startswith(sentence)
    assert str(error.value).startswith(f"{path} row 1")


@pytest.mark.parametrize(
    "content, sentence",
    [
        ("[1]".encode("utf-16"), "the file is UTF-16; save it as UTF-8"),
        (b"", "must hold a JSON array; name it .jsonl if it has one entry a line"),
        (b'{"a": 1}', "must hold a JSON array; name it .jsonl"),
        (b"[]", "the file holds no conversation"),
        (b"[{}", "not JSON, the end of the file at byte 3 where , or ] must be; download the file again"),
        (b"[{} {}]", "not JSON, '{' at byte 4 where , or ] must be"),
        (b"[{}, {]", "not JSON at byte 5 ("),
        (b"[{}] 5", "there is more after the JSON value, at byte 5; fix the file"),
        (b"[" * 9 + b"]", "not JSON"),
        (b"[" * 100_000, "not JSON at byte 1 (nested too deep)"),
    ],
)
def test_a_bad_file_is_refused_on_opening(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "talk.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        LlavaData(path)
    assert str(path) in str(error.value) and sentence in str(error.value)


def test_wrong_arguments_are_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown kind of conversations; pass a .json or .jsonl file"):
        LlavaData(write(tmp_path / "talk.txt", []))
    with pytest.raises(DataError, match="talk.json: cannot be read"):
        LlavaData(tmp_path / "talk.json")
    with pytest.raises(DataError, match="no such folder; it must hold the images of"):
        LlavaData(write(tmp_path / "talk.json", ENTRIES), images=tmp_path / "nowhere")
    (tmp_path / "talk.jsonl").write_text("\n")
    with pytest.raises(DataError, match="the file holds no conversation"):
        LlavaData(tmp_path / "talk.jsonl")
    (tmp_path / "talk.jsonl").write_text("{\n")
    with pytest.raises(DataError, match="talk.jsonl:1:1: malformed JSON"):
        LlavaData(tmp_path / "talk.jsonl")[0]
    (tmp_path / "talk.json").write_bytes(b'[{"id": "\xff"}]')
    with pytest.raises(DataError, match="talk.json row 0: not UTF-8 at byte 9"):
        LlavaData(tmp_path / "talk.json")[0]


def test_a_file_that_changes_while_it_is_open_is_refused(tmp_path: Path) -> None:
    data = LlavaData(write(tmp_path / "talk.json", ENTRIES))
    write(tmp_path / "talk.json", ENTRIES[:2])
    with pytest.raises(DataError, match="the file changed since it was opened; start again"):
        data[0]


def test_the_fingerprint_changes_with_texts_and_images(tmp_path: Path) -> None:
    square(tmp_path / "a/7.jpg")
    path = write(tmp_path / "talk.json", ENTRIES)
    first = LlavaData(path).fingerprint
    assert first == LlavaData(path).fingerprint and len(first) == 64
    square(tmp_path / "a/7.jpg", 200)
    assert first != (second := LlavaData(path).fingerprint)
    write(path, ENTRIES[:1])
    assert second != LlavaData(path).fingerprint


# ── large files ──────────────────────────────────────────────────────────────────────────────────────────────────────

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(JSON, max_size=6), st.integers(1, 9), st.none() | st.integers(0, 2), st.booleans(), st.booleans())
def test_elements_are_found_wherever_pieces_end(
    tmp_path: Path, values: list, piece: int, indent: int | None, ascii: bool, mark: bool
) -> None:
    path = tmp_path / "any.json"
    text = json.dumps(values, indent=indent, ensure_ascii=ascii)
    path.write_bytes((b"\xef\xbb\xbf" if mark else b"") + text.encode("utf-8", "surrogatepass"))
    with pytest.MonkeyPatch.context() as patch, path.open("rb") as file:
        patch.setattr(json_places, "PIECE", piece)
        places = json_places.Scanner(file, path).elements()
        assert [json_places.value_at(file, place, "here") for place in places] == values


def test_opening_takes_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "talk.json", [entry("q" * 400, "a" * 400) for _ in range(4000)])
    assert path.stat().st_size > 3_500_000
    monkeypatch.setattr(json_places, "PIECE", 1 << 16)
    tracemalloc.start()
    data = LlavaData(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(data) == 4000 and peak < 1_000_000, f"{peak:,} bytes"
    assert len(data[3999].turns[0].query[0].text) == 400


def test_an_entry_that_does_not_end_is_not_read_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "talk.json"
    path.write_text('["' + "a" * 300_000)
    monkeypatch.setattr(json_places, "PIECE", 1 << 10)
    monkeypatch.setattr(json_places, "LONGEST_VALUE", 1 << 12)
    read = []
    with path.open("rb") as file, pytest.raises(DataError, match=r"talk.json: not JSON at byte 1 \("):
        try:
            json_places.Scanner(file, path).elements()
        finally:
            read.append(file.tell())
    assert read[0] < 20_000


# ── VisDial ──────────────────────────────────────────────────────────────────────────────────────────────────────────

QUESTIONS = ["is it old", "who is it", "wo ist “es”"]
ANSWERS = ["yes", "a baker", "no", "dort"]


def visdial(*dialogs: Any, split: str = "val2018", **others: Any) -> dict:
    data = {"questions": QUESTIONS, "answers": ANSWERS, "dialogs": list(dialogs)}
    return {"version": "1.0", "split": split, "data": data | others}


def dialog(*rounds: tuple[int, int], image_id: Any = 7) -> dict:
    said = [{"question": q, "answer": a, "answer_options": [0, 1], "gt_index": 0} for q, a in rounds]
    return {"image_id": image_id, "caption": f"a thing, {image_id}", "dialog": said}


def test_every_round_is_a_turn(tmp_path: Path) -> None:
    square(tmp_path / "VisualDialog_val2018" / "VisualDialog_val2018_000000000007.jpg")
    square(tmp_path / "val2014" / "COCO_val2014_000000000012.jpg")
    path = write(tmp_path / "visdial.json", visdial(dialog((0, 0), (1, 1)), dialog((2, 3), image_id=12)))
    data = VisDialData(path)
    first, second = data[0], data[1]
    assert texts(first) == [("is it old", "yes"), ("who is it", "a baker")] and first.id == "7"
    assert first.images == (str(tmp_path / "VisualDialog_val2018" / "VisualDialog_val2018_000000000007.jpg"),)
    assert texts(second) == [("wo ist “es”", "dort")] and second.images[0].endswith("COCO_val2014_000000000012.jpg")
    assert second.where == f"{path} row 1" and {turn.kind for turn in second.turns} == {"dialogue"}
    again = pickle.loads(pickle.dumps(data))
    assert [again[0], again[1]] == [first, second] and again.fingerprint == data.fingerprint
    square(tmp_path / "val2014" / "COCO_val2014_000000000012.jpg", 200)
    assert VisDialData(path).fingerprint != data.fingerprint


def test_the_names_of_images_can_be_chosen_and_a_caption_can_be_a_turn(tmp_path: Path) -> None:
    path = write(tmp_path / "visdial.json", visdial(dialog((0, 0))))
    sample = VisDialData(path, images=tmp_path, pattern="{split}/{image_id}.png", caption="Describe the image.")[0]
    assert sample.images == (str(tmp_path / "val2018/7.png"),)
    assert texts(sample) == [("Describe the image.", "a thing, 7"), ("is it old", "yes")]
    assert sample.turns[0].kind == "caption"
    with pytest.raises(DataError, match=r"the pattern '{name}.png' cannot be used \(KeyError"):
        VisDialData(path, pattern="{name}.png")
    with pytest.raises(DataError, match="row 0: 'image' is '../7.png'; use the path of an image within"):
        VisDialData(path, pattern="../{image_id}.png")[0]
    with pytest.raises(
        DataError, match="row 0: no image of 7 in .*, looked for a7 and b7; pass the folder as 'images'"
    ):
        VisDialData(path, pattern=("a{image_id}", "b{image_id}"))[0]


@pytest.mark.parametrize(
    "bad, sentence",
    [
        (5, ": the dialogue must be a JSON object, not a number"),
        (dialog(), ": 'dialog' must be a list of at least one question, not []"),
        (dialog((0, 0), (3, 0)), " turn 2: 'question' is 3; it must be a number below 3, of data.questions"),
        (dialog((0, -1)), " turn 1: 'answer' is -1; it must be a number below 4, of data.answers"),
        (dialog((0, True)), " turn 1: 'answer' is True; it must be a number below 4"),
        ({"image_id": 7, "dialog": [{"question": 0}]}, " turn 1: no 'answer'; a turn needs a question and an answer"),
        ({"image_id": 7, "dialog": ["why"]}, " turn 1: the turn must be a JSON object, not a string"),
        (dialog((0, 0), image_id="7"), ": 'image_id' must be a number, not '7'"),
    ],
)
def test_a_bad_dialogue_is_named(tmp_path: Path, bad: Any, sentence: str) -> None:
    path = write(tmp_path / "visdial.json", visdial(dialog((0, 0)), bad))
    data = VisDialData(path, pattern="{image_id}.png")
    assert data[0].turns
    with pytest.raises(DataError) as error:
        data[1]
    assert str(error.value).startswith(f"{path} row 1{sentence}")


def test_empty_and_wrong_texts_are_named(tmp_path: Path) -> None:
    path = write(
        tmp_path / "visdial.json", visdial(dialog((0, 0), (1, 1)), questions=["is it old", " "], answers=[3, "a"])
    )
    with pytest.raises(DataError, match="row 0 turn 1: 'answer' must be a string or null, not 3"):
        VisDialData(path, pattern="{image_id}.png")[0]
    write(path, visdial(dialog((0, 0)), questions=[" "]))
    with pytest.raises(DataError, match="row 0 turn 1: 'question' is empty; fix the entry"):
        VisDialData(path, pattern="{image_id}.png")[0]


@pytest.mark.parametrize(
    "value, sentence",
    [
        ([], "the file must hold a JSON object, as those of VisDial 1.0 do"),
        ({}, "no list data.questions; it must be a file of VisDial 1.0, with data.questions, .* found none of them"),
        ({"data": [1]}, "no list data.questions"),
        ({"data": {"questions": [], "answers": 3}}, "no list data.answers; .* found questions"),
        (visdial(), "the file holds no dialogue"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, value: Any, sentence: str) -> None:
    with pytest.raises(DataError, match=f"visdial.json: {sentence}"):
        VisDialData(write(tmp_path / "visdial.json", value))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(piece=st.integers(1, 40), indent=st.none() | st.integers(0, 3), last=st.booleans())
def test_dialogues_are_found_wherever_pieces_end(tmp_path: Path, piece: int, indent: int | None, last: bool) -> None:
    value = visdial(*(dialog((i % 3, i % 4), image_id=i) for i in range(5)), empty=[], none={}, number=12)
    value = value | {"more": {}} if last else {"data": value["data"], "split": "val2018"}
    path = tmp_path / "visdial.json"
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_places, "PIECE", piece)
        data = VisDialData(path, pattern="{split}/{image_id}")
    assert [texts(data[int(i)]) for i in np.arange(5)] == [[(QUESTIONS[i % 3], ANSWERS[i % 4])] for i in range(5)]
    assert data[4].images == (str(tmp_path / "val2018/4"),)
