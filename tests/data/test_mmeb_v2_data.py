"""MMEB-V2's rows: the texts of both styles word for word, frames, names of pages, files and folders."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from muco.data.hub_rows import find_configs, find_split, read_rows
from muco.data.mmeb_fields import Fields
from muco.data.mmeb_prompts import load_style
from muco.data.mmeb_v2_sets import BY_NAME
from muco.data.mmeb_video_rows import READERS, Asked, Place, bare_option
from muco.data.mmeb_visdoc import misplaced, page_file
from muco.dialogue import Content, Video
from muco.errors import DataError
from muco.images import image_digest

FRAMES = Path("frames")
STYLES = ("vlm2vec", "qwen")
ASK = (
    "Given a video and a question, select the most accurate answer from the provided candidates. Return only the exact "
    "text of your chosen answer. Question"
)

SUMMARY = "Find the video snippet that corresponds to the given summary"
SCENES = "Find a video that includes the following described scenes"
SEGMENT = "Find the clip that corresponds to the given sentence and video segment"


def asked(name: str, row: dict[str, Any], style: str, config: str = "", **how: Any) -> Asked:
    told = load_style(style)
    place = Place(how.pop("frames", FRAMES), told, told.wording(BY_NAME[name]), config, **how)
    return READERS[name].read(Fields(row, "file row 0"), place)


def video(folder: str, style: str, root: Path = FRAMES) -> tuple[Video, ...]:
    return (Video(root / folder, frames={"vlm2vec": 8, "qwen": 64}[style]),)


def texts(candidates: Any) -> list[str]:
    return [content.text for _, content in candidates]


MVBENCH = {
    "question": "What is it?",
    "video": "a b.mp4",
    "candidates": ["red", "blue", "red and blue"],
    "answer": "blue",
}
NEXTQA = {"video": 4010069381, "question": "why did he", "answer": 3, **{f"a{n}": f"do {n}" for n in range(5)}}
VIDEO_MME = {
    "question": "Which one?",
    "videoID": "fFjv93ACGo8",
    "options": ["A. Apples.", "B. 1.5 m. or so. ", "C. Candles", "D. Berries"],
    "answer": "B",
}
EGOSCHEMA = {"video_idx": "x-1", "question": "Why?", "option": ["A. C cooks. ", "B. C sits.", "C. No"], "answer": "0"}
ACTIVITYNET = {"video_name": "1QIUV7WYKXg", "question": "is the athlete wearing trousers", "answer": "yes"}


@pytest.mark.parametrize("style", STYLES)
def test_texts_of_questions(style):
    ask = ASK + {"vlm2vec": ":", "qwen": "."}[style]
    found = asked("MVBench", MVBENCH, style, "action_count")
    text = f"{ask} What is it?\nOptions:\n(A) red\n(B) blue\n(C) red and blue"
    assert found.query == Content(text, video("action_count/a b.mp4", style))
    assert texts(found.right) == ["(B) blue"] and texts(found.wrong) == ["(A) red", "(C) red and blue"]

    found = asked("NExTQA", NEXTQA, style)
    text = f"{ask} why did he\nOptions:\n(A) do 0\n(B) do 1\n(C) do 2\n(D) do 3\n(E) do 4"
    assert found.query == Content(text, video("4010069381", style))
    assert texts(found.right) == {"vlm2vec": ["do 3"], "qwen": ["(D) do 3"]}[style]
    assert texts(found.wrong)[-1] == {"vlm2vec": "do 4", "qwen": "(E) do 4"}[style]

    found = asked("Video-MME", VIDEO_MME, style)
    text = f"{ask} Which one?\nA. Apples.\nB. 1.5 m. or so. \nC. Candles\nD. Berries"
    assert found.query == Content(text, video("fFjv93ACGo8", style))
    assert texts(found.right) == ["1.5 m. or so"] and texts(found.wrong) == ["Apples", "Candles", "Berries"]

    found = asked("EgoSchema", EGOSCHEMA, style)
    between = {"vlm2vec": "", "qwen": " "}[style]
    assert found.query == Content(f"{ask} Why?{between}A. C cooks.  B. C sits. C. No", video("x-1", style))
    assert texts(found.right) == ["C cooks"] and texts(found.wrong) == ["C sits", "No"]

    found = asked("ActivityNetQA", ACTIVITYNET, style)
    text = f"{ask} is the athlete wearing trousers? (A) yes; (B) no."
    assert found.query == Content(text, video("v_1QIUV7WYKXg", style))
    assert texts(found.right) == ["yes"] and texts(found.wrong) == ["no"]


@pytest.mark.parametrize("style", STYLES)
def test_texts_of_labels_and_captions(style):
    row = {"video_id": "7", "pos_text": "air_drumming"}
    found = asked("K700", row, style)
    assert found.query == Content("Recognize the category of the video content.", video("7", style))
    assert found.right == (("air_drumming", Content("air_drumming")),) and found.wrong == ()
    found = asked("SmthSmthV2", row | {"neg_text": ["b", "air_drumming", "c"]}, style)
    assert texts(found.right) == ["air_drumming"] and texts(found.wrong) == ["b", "c"]
    assert found.query.text.startswith("What actions or object interactions are being performed by the person")

    end, target = {"vlm2vec": (":", "Understand the content of the provided video."), "qwen": (".", "")}[style]
    shows, given = (
        "Find a video that contains the following visual content",
        "a video that fits the description provided",
    )
    recipe = "Find a video that demonstrates the following action while making a recipe"
    for name, row, folder, instruction in (
        ("MSR-VTT", {"video_id": "video7020", "caption": "a cat"}, "video7020", shows),
        ("MSVD", {"video_id": "x_1_2", "caption": ["a cat", "b"]}, "x_1_2", SUMMARY),
        ("DiDeMo", {"video": "d/9@N01_3.avi.mp4", "caption": "a cat"}, "9@N01_3.avi", SCENES),
        ("VATEX", {"videoID": "G_0", "enCap": ["a cat", "b"]}, "G_0", f"Select {given}"),
        ("YouCook2", {"id": "y_3", "sentence": "a cat"}, "y_3", recipe),
    ):
        found = asked(name, row, style)
        assert found.query == Content(f"{instruction}{end} a cat")
        assert found.right == ((folder, Content(target, video(folder, style))),)


def test_texts_of_pages():
    target = {"vlm2vec": "Understand the content of the provided document image.", "qwen": ""}
    for style, end in (("vlm2vec", ":"), ("qwen", ".")):
        wording = load_style(style).wording(BY_NAME["ViDoSeek-doc"])
        assert wording.query == f"Find a document image that matches the given query{end}"
        assert wording.target == target[style]


@pytest.mark.parametrize("style", STYLES)
def test_moments_are_asked_by_text_image_and_video(style):
    end = {"vlm2vec": ":", "qwen": "."}[style]
    target = {"vlm2vec": "Understand the content of the provided video clip.", "qwen": ""}[style]
    row = {
        "query": "he runs",
        "positive_frames": [{"output_path": "a/b/1.mp4"}, {"output_path": "a/b/2.mp4"}],
        "negative_frames": [{"output_path": "c 3.mp4"}],
    }
    for given, instruction, images in (
        ("", "Find the clip that corresponds to the given text", ()),
        (None, "Find the clip that corresponds to the given text", ()),
        ("a.jpg", "Select the video clip that aligns with the given text and image", (FRAMES / "query_a.jpg",)),
        ("a/q.mp4", SEGMENT, video("video_frames/a_q", style)),
    ):
        found = asked("MomentSeeker", row | {"input_frames": given}, style)
        assert found.query == Content(f"{instruction}{end} he runs", images)
        folders = [FRAMES / "video_frames" / name for name in ("a_b_1", "a_b_2", "c 3")]
        assert [content for _, content in found.right + found.wrong] == [
            Content(target, (Video(folder, frames=8),)) for folder in folders
        ]
        assert len(found.right) == 2
    assert asked("MomentSeeker", row, style).query.images == (), "the column may be missing"


def test_clips_are_folders_and_positive_ones_are_right(tmp_path):
    for name in ("query", "positive_1", "positive_0", "clip_3", "Positive"):
        (tmp_path / "v_1" / name).mkdir(parents=True)
    (tmp_path / "v_1" / "positive.txt").touch()
    row = {"query": "she sings", "video_path": "x/v_1.mp4"}
    found = asked("QVHighlight", row, "qwen", frames=tmp_path)
    assert found.query == Content(
        "Find the clip that corresponds to the described scene in the given video. she sings",
        video("v_1/query", "qwen", tmp_path),
    )
    assert [Path(name).name for name, _ in found.right] == ["positive_0", "positive_1"]
    assert [Path(name).name for name, _ in found.wrong] == ["Positive", "clip_3"]
    assert {content.images[0].frames for _, content in found.right + found.wrong} == {8}, "of a clip"
    with pytest.raises(DataError, match="file row 0: .*v_2: cannot be read"):
        asked("QVHighlight", row | {"video_path": "v_2.mp4"}, "qwen", frames=tmp_path)


def test_an_option_without_a_letter_is_whole_unless_officially():
    assert bare_option("C. a. b. ", cut=True) == bare_option("C. a. b. ", cut=False) == "a. b"
    assert bare_option("Ten apples", cut=False) == "Ten apples" and bare_option("Ten apples", cut=True) == "s"
    row = VIDEO_MME | {"options": ["Ten", "B. Nine", "C. Six", "D. One"]}
    for style, official, shown in (("vlm2vec", False, "Ten"), ("vlm2vec", True, "n"), ("qwen", True, "Ten")):
        assert texts(asked("Video-MME", row, style, official=official).wrong)[0] == shown


# ---------------------------------------------------------------- frames and pages


def frame(path: Path, colour: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (colour, 0, 0)).save(path, "PNG")
    return path


def test_frames_are_in_natural_order_and_other_files_are_ignored(tmp_path):
    names = ["2.jpg", "10.PNG", "1.jpeg", "33.JPG"]
    for place, name in enumerate(["1.jpeg", "2.jpg", "10.PNG", "33.JPG"]):
        frame(tmp_path / "a" / name, place * 20)
    for name in ("0.txt", "5.json", "notes"):
        (tmp_path / "a" / name).write_text("no frame")
    files = tuple(tmp_path / "a" / name for name in sorted(names, key=lambda name: int(name.split(".")[0])))
    assert image_digest(Video(tmp_path / "a", frames=8)) == image_digest(Video(files, frames=8))
    assert image_digest(Video(tmp_path / "a", frames=8)) == image_digest(Video(tmp_path / "a", frames=4)), "n < k: all"
    swapped = (files[1], files[0], *files[2:])
    assert image_digest(Video(swapped, frames=8)) != image_digest(Video(files, frames=8))


def test_frames_are_evenly_spaced(tmp_path):
    files = tuple(frame(tmp_path / f"{number}.png", number) for number in range(11))
    for wanted, places in ((1, [0]), (2, [0, 10]), (3, [0, 5, 10]), (4, [0, 3, 6, 10]), (8, [0, 1, 2, 4, 5, 7, 8, 10])):
        chosen = tuple(files[place] for place in places)
        assert image_digest(Video(tmp_path, frames=wanted)) == image_digest(Video(chosen, frames=wanted)), wanted


def test_names_of_pages():
    assert page_file(BY_NAME["ViDoRe_docvqa"], "12.a") == "12.a.png"
    name = BY_NAME["VisRAG_SlideVQA"]
    assert page_file(name, "a.png") == "a_32d3ca5e.png"
    long = "x" * 49 + " of the year.v2.jpeg"
    digits = hashlib.md5(long.encode()).hexdigest()[:8]
    assert page_file(name, long) == "x" * 49 + f" _{digits}.jpeg"


def test_the_official_grades_go_to_ids_in_their_order():
    assert misplaced({"c": 3, "a": 1, "b": 2}) == {"a": 3, "b": 1, "c": 2}
    assert misplaced({"c": 1, "a": 1}) == {"a": 1, "c": 1}


# ---------------------------------------------------------------- files


def test_files_of_a_split_are_found_in_every_form(tmp_path):
    def touch(*names: str) -> list[Path]:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        return [tmp_path / name for name in names]

    files = touch("a/test-00000-of-00002.parquet", "a/test-00001-of-00002.parquet")
    touch("a/train-00000-of-00001.parquet", "a/test_1k-0.parquet", "a/testing.parquet", "a/test.jsonl", "a/test.md")
    assert find_split([tmp_path / "none", tmp_path / "a"], "", "test") == files
    (file,) = touch("b/data/val.jsonl")
    assert find_split([tmp_path / "b"], "", "val") == [file]
    (file,) = touch("c/queries.parquet")
    assert find_split([tmp_path / "c"], "queries", "test") == [file]
    (file,) = touch("d/data/corpus/test.json")
    assert find_split([tmp_path / "d"], "corpus", "test") == [file]
    assert find_split([tmp_path / "d"], "qrels", "test") == []
    one, two = touch("e/first/train-0.parquet", "e/second.parquet")
    touch("e/readme.md", "e/third/test.parquet")
    assert find_configs([tmp_path / "e"], "train") == {"first": [one], "second": [two]}


def test_rows_of_json_files(tmp_path):
    file = tmp_path / "test.json"
    file.write_text(json.dumps([{"a": 1}, {"b": 2}]))
    rows = read_rows(file, ["a"])
    assert next(rows) == ({"a": 1}, f"{file} item 0")
    with pytest.raises(DataError, match=r"test\.json item 1: no 'a'; found b"):
        next(rows)
    file.write_text("{}")
    with pytest.raises(DataError, match=r"must be a list of objects"):
        next(read_rows(file, ["a"]))


# ---------------------------------------------------------------- prompts


def test_prompts_of_a_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("""
name: mine
frames: 16
clip_frames: 4
sets:
  video: {query: "Look:"}
  V-QA: {query: "Answer:"}
  NExTQA: {candidates: bare}
""")
    style = load_style(str(file))
    assert (style.name, style.frames, style.clip_frames, style.instruction) == ("mine", 16, 4, "user")
    assert style.wording(BY_NAME["K700"]).query == "Look:" and style.wording(BY_NAME["MVBench"]).query == "Answer:"
    next_qa = style.wording(BY_NAME["NExTQA"])
    assert (next_qa.query, next_qa.candidates) == ("Answer:", "bare")
    assert "mine: instructions in front of the text; 16 frames a video, 4 a clip" in style.told


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1]", "must be a mapping with some of name"),
        ("{a: [", "not YAML"),
        ("name: a\nname: b", "line 1: the key 'name' is there twice"),
        ("name: x\nframs: 8", "unknown key 'frams'; did you mean 'frames'"),
        ("name: x\nframes: '8'\nclip_frames: 8\nsets: {}", "'frames' must be int, not '8'"),
        ("name: x\nframes: 0\nclip_frames: 8\nsets: {}", "must be at least 1"),
        ("name: x\nframes: 8\nclip_frames: 8\nsets: {K7000: {}}", "unknown key 'K7000'; did you mean 'K700'"),
        ("name: x\nframes: 8\nclip_frames: 8\nsets: {K700: {query: 1}}", "sets.K700.query must be str, not 1"),
        ("name: x\nframes: 8\nclip_frames: 8\nsets: {K700: {candidates: x}}", "must be 'lettered' or 'bare'"),
        ("name: x\nframes: 8\nclip_frames: 8\nsets: {}\ninstruction: x", "'instruction' must be 'user' or 'system'"),
        ("frames: 8\nclip_frames: 8\nsets: {}", "'name' must be str, not None"),
    ],
)
def test_wrong_prompts_are_named(tmp_path, text, said):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(DataError) as caught:
        load_style(str(file))
    assert said in str(caught.value) and str(file) in str(caught.value)
