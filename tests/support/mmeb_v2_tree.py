"""A small tree in the published layout of MMEB-V2: all 78 data sets, with invented sentences and coloured squares.

Texts, folders and names of files are written down here a second time, from the benchmark's description, and not taken
from ``muco``: a :class:`Row` says literally what must reach the model, in the prompts of VLM2Vec.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import mmeb_tree
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from muco.dialogue import Content, Video
from muco.evaluate.cache import Book

Convention = Literal["vlm2vec", "qwen"]  # whose folders

VIDEO = (
    "K700 SmthSmthV2 HMDB51 UCF101 Breakfast MVBench Video-MME NExTQA EgoSchema ActivityNetQA DiDeMo MSR-VTT MSVD "
    "VATEX YouCook2 QVHighlight Charades-STA MomentSeeker"
).split()
VISDOC = {  # name -> repository
    **{f"ViDoRe_{n}": f"{n}_test_subsampled_beir" for n in "arxivqa docvqa infovqa tabfquad".split()},
    **{f"ViDoRe_{n}": f"{n}_test_beir" for n in "tatdqa shiftproject".split()},
    **{
        f"ViDoRe_syntheticDocQA_{n}": f"syntheticDocQA_{n}_test_beir"
        for n in "artificial_intelligence energy government_reports healthcare_industry".split()
    },
    "ViDoRe_esg_reports_human_labeled_v2": "esg_reports_human_labeled_v2",
    **{f"ViDoRe_{n}_v2_multilingual": f"{n}_v2" for n in "biomedical_lectures economics_reports esg_reports".split()},
    **{f"VisRAG_{n}": f"VisRAG-Ret-Test-{n}" for n in "ArxivQA ChartQA MP-DocVQA SlideVQA InfoVQA PlotQA".split()},
    "ViDoSeek-page": "ViDoSeek-page-fixed",
    "ViDoSeek-doc": "ViDoSeek",
    "MMLongBench-page": "MMLongBench-page-fixed",
    "MMLongBench-doc": "MMLongBench-doc",
}
ALL = [*mmeb_tree.ALL, *VIDEO, *VISDOC]
GRADED = ("ViDoSeek-doc", "MMLongBench-doc", "ViDoRe_esg_reports_human_labeled_v2")
ROWS = 3

CLASSES = {
    "K700": "Recognize the category of the video content.",
    "SmthSmthV2": "What actions or object interactions are being performed by the person in the video?",
    "UCF101": "What activities or sports are being performed by the person in the video?",
    "HMDB51": "What actions or objects interactions are the person in the video doing?",
    "Breakfast": "Recognize the breakfast type that the person is cooking in the video.",
}
LABELS = {
    "K700": ["abseiling_k", "air_drumming_k", "archery_k"],
    "SmthSmthV2": ["Holding something", "Moving something up", "Turning something"],
    "HMDB51": ["brush_hair_h", "cartwheel_h", "catch_h"],
    "UCF101": ["ApplyLipstickU", "ArcheryU", "BilliardsU"],
    "Breakfast": ["pancake", "scrambledegg", "juice"],
}
ASK = (
    "Given a video and a question, select the most accurate answer from the provided candidates. Return only the exact "
    "text of your chosen answer. Question:"
)
FIND = {
    "MSR-VTT": "Find a video that contains the following visual content:",
    "MSVD": "Find the video snippet that corresponds to the given summary:",
    "DiDeMo": "Find a video that includes the following described scenes:",
    "VATEX": "Select a video that fits the description provided:",
    "YouCook2": "Find a video that demonstrates the following action while making a recipe:",
}
CLIP = "Find the clip that corresponds to the described scene in the given video:"
OF_VIDEO = "Understand the content of the provided video."
OF_CLIP = "Understand the content of the provided video clip."
OF_PAGE = "Understand the content of the provided document image."
PAGE = "Find a document image that matches the given query:"


@dataclass(frozen=True)
class Row:
    """A query and its right candidates with their grades."""

    query: Content
    right: tuple[tuple[Content, int], ...]


@dataclass
class Tree:
    """What is written, and what must be read."""

    root: Path
    convention: Convention = "vlm2vec"
    rows: dict[str, list[Row]] = field(default_factory=dict)

    def frames(self, folder: Path, first: int = 1, name: str = "frame_{:04}.jpg", count: int = 2) -> Path:
        for number in range(first, first + count):
            picture(folder / name.format(number), f"{folder} {number}")
        return folder

    def add(self, name: str, query: Content, *right: tuple[Content, int]) -> None:
        self.rows.setdefault(name, []).append(Row(query, right))

    def table(self, folder: str, split: str, made: list[dict[str, Any]]) -> None:
        """Rows as Parquet, or as JSON lines: the copies of one convention are the other form."""
        place = self.root / folder
        place.mkdir(parents=True, exist_ok=True)
        if self.convention == "vlm2vec":
            pq.write_table(pa.Table.from_pylist(made), place / f"{split}-00000-of-00001.parquet")
        else:
            lines = "".join(json.dumps(row) + "\n" for row in made)
            (place / f"{split}.jsonl").write_text(lines, encoding="utf-8")


def picture(path: Path, token: str) -> Path:
    """A square of the token's own colour, as the ending of the path says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = tuple(hashlib.sha256(token.encode()).digest()[:3])
    square = Image.new("RGB", (32, 32), colour)
    if path.suffix == ".png":
        square.save(path, compress_level=1)
    else:
        square.save(path, "JPEG", comment=token.encode())
    return path


def shown(text: str, folder: Path, frames: int = 8) -> Content:
    return Content(text, (Video(folder, frames=frames),))


def write_tree(root: Path, convention: Convention = "vlm2vec", *, images: bool = True) -> Tree:
    """Writes all data sets with three queries each, and returns them."""
    tree = Tree(root, convention)
    if images:
        for name, expected in mmeb_tree.write_tree(root, "split", rows=ROWS, candidates=3).items():
            tree.rows[name] = [Row(row.query, ((row.candidates[0], 1),)) for row in expected]
    for name in CLASSES:
        _classes(tree, name)
    for write in (_mvbench, _video_mme, _nextqa, _egoschema, _activitynet, _moments):
        write(tree)
    for name in FIND:
        _retrieval(tree, name)
    for name in ("QVHighlight", "Charades-STA"):
        _clips(tree, name)
    for name, repository in VISDOC.items():
        _pages(tree, name, repository)
    return tree


def write_pages(root: Path, *names: str) -> Tree:
    """Some of the visual-document sets alone."""
    tree = Tree(root)
    for name in names:
        _pages(tree, name, VISDOC[name])
    return tree


def _classes(tree: Tree, name: str) -> None:
    folder = tree.root / "video-tasks" / "frames" / "video_cls" / ("SSv2" if name == "SmthSmthV2" else name)
    made = []
    for i, label in enumerate(LABELS[name]):
        row: dict[str, Any] = {"video_id": f"{name}_{i}", "pos_text": label}
        if name == "SmthSmthV2":
            row["neg_text"] = LABELS[name]
        made.append(row)
        tree.add(name, shown(CLASSES[name], tree.frames(folder / f"{name}_{i}")), (Content(label), 1))
    tree.table(f"video-tasks/{'Kinetics-700' if name == 'K700' else name}", "test", made)


def _qa(tree: Tree, name: str) -> Path:
    return tree.root / "video-tasks" / "frames" / "video_qa" / name


def _mvbench(tree: Tree) -> None:
    for config in ("action_count", "episodic_reasoning", "moving_count"):
        made = []
        for i in range(2):
            options = [f"{config} a{i}", f"{config} b{i}", f"{config} c{i}"]
            name = "{:05}.jpg" if config == "episodic_reasoning" else "{:04}.jpeg"
            folder = tree.frames(_qa(tree, "MVBench") / config / f"clip {i}.mp4", i, name)
            made.append(
                {"question": f"Why {i}?", "video": f"clip {i}.mp4", "candidates": options, "answer": options[i]}
            )
            listed = "".join(f"\n({letter}) {option}" for letter, option in zip("ABCD", options, strict=False))
            tree.add(
                "MVBench", shown(f"{ASK} Why {i}?\nOptions:{listed}", folder), (Content(f"({'AB'[i]}) {options[i]}"), 1)
            )
        tree.table(f"video-tasks/MVBench/{config}", "train", made)


def _video_mme(tree: Tree) -> None:
    made = []
    for i in range(ROWS):
        options = [
            f"{letter}. It is {word} {i}." for letter, word in zip("ABCD", "red blue green pink".split(), strict=True)
        ]
        folder = tree.frames(_qa(tree, "Video-MME") / f"v{i}", 0, "{:04}.jpeg")
        given = {"question_id": f"00{i}", "domain": "Art", "sub_category": "Film"}
        made.append(
            {"question": f"Which {i}?", "videoID": f"v{i}", "options": options, "answer": "ABCD"[i + 1], **given}
        )
        text = "\n".join([f"{ASK} Which {i}?", *options])
        tree.add("Video-MME", shown(text, folder), (Content(f"It is {['blue', 'green', 'pink'][i]} {i}"), 1))
    tree.table("video-tasks/Video-MME", "test", made)


def _nextqa(tree: Tree) -> None:
    made = []
    for i in range(ROWS):
        answers = [f"they {word} {i}" for word in "run sit fly eat sing".split()]
        folder = tree.frames(_qa(tree, "NExTQA") / f"{400 + i}", 0, "{:04}.jpeg")
        row = {"video": 400 + i, "question": f"what then {i}", "answer": i + 2, "qid": i, "type": "CW"}
        made.append(row | {f"a{n}": answer for n, answer in enumerate(answers)})
        listed = "".join(f"\n({letter}) {answer}" for letter, answer in zip("ABCDE", answers, strict=True))
        tree.add("NExTQA", shown(f"{ASK} what then {i}\nOptions:{listed}", folder), (Content(answers[i + 2]), 1))
    tree.table("video-tasks/NExTQA/MC", "test", made)


def _egoschema(tree: Tree) -> None:
    made = []
    for i in range(ROWS):
        options = [f"{letter}. C is {word} {i}" for letter, word in zip("ABCDE", "at on in by up".split(), strict=True)]
        folder = tree.frames(_qa(tree, "EgoSchema") / f"ego-{i}", 0, "{:04}.jpeg")
        row = {"video_idx": f"ego-{i}", "question": f"Where is C {i}?", "option": options, "answer": str(i)}
        made.append(row | {"question_idx": str(i)})
        text = f"{ASK} Where is C {i}?" + " ".join(options)
        tree.add("EgoSchema", shown(text, folder), (Content(f"C is {['at', 'on', 'in'][i]} {i}"), 1))
    tree.table("video-tasks/EgoSchema/Subset", "test", made)


def _activitynet(tree: Tree) -> None:
    made = []
    for i in range(ROWS):
        folder = tree.frames(_qa(tree, "ActivityNetQA") / f"v_act{i}", 0, "{:04}.jpeg")
        answer = ["yes", "no"][i % 2]
        made.append({"video_name": f"act{i}", "question": f"is it day {i}", "answer": answer, "question_id": f"q{i}"})
        tree.add("ActivityNetQA", shown(f"{ASK} is it day {i}? (A) yes; (B) no.", folder), (Content(answer), 1))
    tree.table("video-tasks/ActivityNetQA", "test", made)


def _retrieval(tree: Tree, name: str) -> None:
    folder = tree.root / "video-tasks" / "frames" / "video_ret"
    folder = folder / name if tree.convention == "vlm2vec" else folder / f"data/ziyan/video_retrieval/{name}/frames"
    made = []
    for i in range(ROWS):
        caption, id = f"somebody does {name} {i}", f"{name}.{i}"
        many = [caption, "another caption"]
        made.append({
            "MSR-VTT": {"video_id": id, "video": f"{id}.mp4", "caption": caption},
            "MSVD": {"video_id": id, "video": f"{id}.avi", "caption": many},
            "DiDeMo": {"video": f"videos/{id}.mp4", "caption": caption},
            "VATEX": {"videoID": id, "enCap": many},
            "YouCook2": {"id": id, "video_path": f"x/{id}.mp4", "sentence": caption},
        }[name])  # fmt: skip
        video = tree.frames(folder / id)
        tree.add(name, Content(f"{FIND[name]} {caption}"), (shown(OF_VIDEO, video), 1))
    config = "/test_1k" if name == "MSR-VTT" else ""
    tree.table(f"video-tasks/{name}{config}", "val" if name == "YouCook2" else "test", made)


def _clips(tree: Tree, name: str) -> None:
    own = name if name == "QVHighlight" or tree.convention == "qwen" else "Charades_STA"
    made = []
    for i in range(ROWS):
        folder = tree.root / "video-tasks" / "frames" / "video_mret" / own / f"{name} {i}"
        for clip in ("negative_2", "clip_10", "negative_1"):
            tree.frames(folder / clip)
        (folder / "notes.txt").write_text("no clip")
        right = [tree.frames(folder / f"positive_{n}") for n in range(1 + i % 2)]
        made.append({"query": f"he sings {name} {i}", "video_path": f"a/b/{name} {i}.mp4"})
        query = shown(f"{CLIP} he sings {name} {i}", tree.frames(folder / "query", count=3))
        tree.add(name, query, *((shown(OF_VIDEO, clip), 1) for clip in right))
    tree.table(f"video-tasks/{name}", "test", made)


def _moments(tree: Tree) -> None:
    root = tree.root / "video-tasks" / "frames" / "video_mret" / "MomentSeeker"
    made = []
    for i, (given, told) in enumerate(
        [
            (None, "Find the clip that corresponds to the given text:"),
            ("shots/a b.jpg", "Select the video clip that aligns with the given text and image:"),
            ("films/ask.mp4", "Find the clip that corresponds to the given sentence and video segment:"),
        ]
    ):

        def clip(name: str, i: int = i) -> dict[str, str]:
            tree.frames(root / "video_frames" / f"films_{i}_{name}")
            return {"output_path": f"films/{i}/{name}.mp4", "start": "0"}

        right, wrong = [clip(f"yes{n}") for n in range(1 + i % 2)], [clip(f"no{n}") for n in range(3)]
        row = {"query": f"they meet {i}", "input_frames": given}
        made.append(row | {"positive_frames": right, "negative_frames": wrong})
        query = Content(f"{told} they meet {i}")
        if given and given.endswith(".jpg"):
            query = Content(query.text, (picture(root / "query_shots/a b.jpg", "asked"),))
        elif given:
            query = shown(query.text, tree.frames(root / "video_frames" / "films_ask"))
        found = (root / "video_frames" / f"films_{i}_yes{n}" for n in range(len(right)))
        tree.add("MomentSeeker", query, *((shown(OF_CLIP, folder), 1) for folder in found))
    tree.table("video-tasks/MomentSeeker", "test", made)


def page_id(name: str, number: int) -> str | int:
    if name.startswith("VisRAG"):
        return f"{name} page {'of a long report ' * (number % 3 + 1)}{number}.jpg"
    return number if "_v2" in name else f"{name}-{number}"


def page_name(name: str, id: str | int) -> str:
    if not name.startswith("VisRAG"):
        return f"{id}.png"
    return f"{str(id).removesuffix('.jpg')[:50]}_{hashlib.md5(str(id).encode()).hexdigest()[:8]}.jpg"


def _pages(tree: Tree, name: str, repository: str) -> None:
    own = name.removeprefix("ViDoRe_") if "_v2" in name else name
    folder = tree.root / "visdoc-tasks" / ("images" if tree.convention == "qwen" else "") / own
    pages = [page_id(name, number) for number in range(7)]
    contents = [Content(OF_PAGE, (picture(folder / page_name(name, id), f"{name} {id}"),)) for id in pages]
    grades = {0: {0: 1}, 1: {2: 1, 1: 1}, 2: {5: 2, 3: 1} if name in GRADED else {5: 1, 3: 1}}
    queries = [
        {"query-id": i if isinstance(pages[0], int) else f"q{i}", "query": f"what of {name} {i}", "language": "english"}
        for i in range(ROWS)
    ]
    qrels = [
        {"query-id": queries[i]["query-id"], "corpus-id": pages[page], "score": grade}
        for i, own in grades.items()
        for page, grade in own.items()
    ]
    nothing, lower = dict(qrels[0], score=0), dict(qrels[-1], score=0)
    qrels += [dict(nothing, **{"corpus-id": pages[6]}), lower, qrels[0]]
    split = "train" if name.startswith("VisRAG") else "test"
    base = f"visdoc-tasks/{repository if tree.convention == 'vlm2vec' else f'data/{repository}'}"
    tree.table(f"{base}/queries", split, queries)
    tree.table(f"{base}/corpus", split, [{"corpus-id": id, "image": None} for id in pages])
    tree.table(f"{base}/qrels", split, qrels)
    for i, own in grades.items():
        tree.add(name, Content(f"{PAGE} what of {name} {i}"), *((contents[page], grade) for page, grade in own.items()))


class Oracle:
    """Gives a query the sum of its right candidates by their grades, and everything else a vector of its own."""

    fingerprint = "oracle"

    def __init__(self, rows: dict[str, list[Row]]) -> None:
        self.book, self.right, self.seen = Book(), dict[str, dict[str, int]](), 0
        for row in (row for own in rows.values() for row in own):
            grades = {self.book.add(content): grade for content, grade in row.right}
            self.right.setdefault(self.book.add(row.query), {}).update(grades)

    def encode(self, contents: list[Content], *, batch_size: int) -> np.ndarray:
        self.seen += len(contents)
        return np.stack([self.vector(self.book.add(content)) for content in contents])

    def vector(self, key: str) -> np.ndarray:
        if key not in self.right:
            return own_vector(key)
        vector = np.sum([grade * own_vector(right) for right, grade in self.right[key].items()], axis=0)
        return vector / np.linalg.norm(vector)


class Collapsed:
    """One point for everything."""

    fingerprint = "collapsed"

    def encode(self, contents: list[Content], *, batch_size: int) -> np.ndarray:
        return np.full((len(contents), 8), 8**-0.5, np.float32)


class Own:
    """Gives every content a vector of its own: it knows nothing."""

    fingerprint = "own"

    def encode(self, contents: list[Content], *, batch_size: int) -> np.ndarray:
        return np.stack([own_vector(Book().add(content)) for content in contents])


@functools.cache
def own_vector(key: str) -> np.ndarray:
    vector = np.random.default_rng(int(re.sub("[^0-9a-f]", "", key)[:16], 16)).normal(size=96)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


if __name__ == "__main__":  # one of several processes: python tests/support/mmeb_v2_tree.py DATA OUTPUT
    from torch.distributed import destroy_process_group

    from muco import distributed
    from muco.evaluate.mmeb_v2 import evaluate_mmeb_v2

    distributed.start()
    evaluate_mmeb_v2(Own(), Path(sys.argv[1]), Path(sys.argv[2]), tasks=["MSVD", "QVHighlight", "ViDoSeek-doc"])
    distributed.wait_for_all()
    destroy_process_group()
