"""Small trees in the two published layouts of MMEB, with invented sentences and coloured squares, and their encoders.

What a set is made of is written down here a second time, from the benchmark's description, and not taken from
``muco``: ``expected`` says literally what must reach the model.
"""

from __future__ import annotations

import hashlib
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from muco.dialogue import Content
from muco.evaluate.cache import Book

CLASSIFICATION = (
    "ImageNet-1K N24News HatefulMemes VOC2007 SUN397 Place365 ImageNet-A ImageNet-R ObjectNet Country211".split()
)
VQA = "OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W ScienceQA VizWiz GQA TextVQA".split()
RETRIEVAL = (
    "VisDial CIRR VisualNews_t2i VisualNews_i2t MSCOCO_t2i MSCOCO_i2t NIGHTS WebQA OVEN FashionIQ EDIS Wiki-SS-NQ"
).split()
GROUNDING = "MSCOCO RefCOCO RefCOCO-Matching Visual7W-Pointing".split()
ALL = [*CLASSIFICATION, *VQA, *RETRIEVAL, *GROUNDING]

TEXT_QUERIES = {"VisDial", "VisualNews_t2i", "MSCOCO_t2i", "Wiki-SS-NQ"}
TOKEN_WITHOUT_IMAGE = {"WebQA", "EDIS"}
BARE_IMAGE_QUERIES = {*CLASSIFICATION, "VisualNews_i2t", "MSCOCO_i2t", "NIGHTS"} - {"N24News"}
TEXT_TARGETS = {*CLASSIFICATION, *VQA, "VisualNews_i2t", "MSCOCO_i2t"}
CAPTIONED_TARGETS = {"WebQA", "OVEN", "EDIS", "RefCOCO-Matching"}
CROPS = {"MSCOCO", "RefCOCO", "Visual7W-Pointing"}  # their targets end without a newline
IMAGES = {"v1": "eval_images", "split": "image-tasks"}
TOKEN = "<|image_1|>"

Record = dict[str, Any]


@dataclass(frozen=True)
class Expected:
    query: Content
    candidates: tuple[Content, ...]


@dataclass(frozen=True)
class Piece:
    """One side of a row before any layout: an instruction, the text after it, and an image's path."""

    instruction: str = ""
    text: str = ""
    image: str = ""
    token: bool = False
    end: str = "\n"

    @property
    def body(self) -> str:
        return self.instruction + (f" {self.text}" if self.instruction and self.text else self.text)

    @property
    def v1(self) -> str:
        return (f"{TOKEN}\n" if self.token else "") + self.body + self.end

    @property
    def seen(self) -> str:
        """What the model gets besides the image: a query with a token and no image keeps its lone newline."""
        return ("\n" if self.token and not self.image else "") + self.body + self.end


def pieces(name: str, rows: int, candidates: int) -> list[tuple[Piece, list[Piece]]]:
    """Query and candidates of every row, the right one first."""
    pool = [_target(name, i) for i in range(2 if name == "HatefulMemes" else rows)]
    made = []
    for i in range(rows):
        size = len(pool) if name in CLASSIFICATION else min(candidates, len(pool))
        made.append((_query(name, i), [pool[(i + j) % len(pool)] for j in range(size)]))
    if name == "OK-VQA":
        made[0][1].append(Piece(end=""))  # a blank candidate
    if name == "RefCOCO-Matching":
        made[0][1].append(made[0][1][0])  # the ground truth again
    return made


def _query(name: str, i: int) -> Piece:
    image = f"{name}/asked {i}.png"  # with a space, as some have
    instruction = f"Tell what this {name} picture is about"
    if name in BARE_IMAGE_QUERIES:
        return Piece(instruction, "", image, True)
    text = f"number {i} of {name}" + " " * (i % 2)  # stray blanks at the end must not be lost
    if name == "VisDial":
        return Piece("Which picture do they speak of:", f"Q:is it {i}\nA:no\nQ:why\nA:{i}", end="\n\n")
    if name in TEXT_QUERIES:
        return Piece("Which picture shows this:", text)
    if name in TOKEN_WITHOUT_IMAGE:
        return Piece("Which page tells this:", text, token=True)
    return Piece(instruction + ", and:", text, image, True)


def _target(name: str, i: int) -> Piece:
    if name in TEXT_TARGETS:
        return Piece(text=["Yes", "No"][i] if name == "HatefulMemes" else f"answer {i}, {name}", end="")
    # In RefCOCO-Matching several candidates share an image.
    image = f"{name}/found {i // 3 if name == 'RefCOCO-Matching' else i}.png"
    if name in CAPTIONED_TARGETS:
        return Piece("This picture has a caption:", f'"words {i}"', image, True)
    return Piece("Take this picture", "", image, True, "" if name in CROPS else "\n")


def records(name: str, layout: str = "v1", rows: int = 6, candidates: int = 5) -> list[Record]:
    """The rows of a data set as one of the layouts has them."""
    made = []
    for query, found in pieces(name, rows, candidates):
        record: Record = {"qry_img_path": query.image, "tgt_img_path": [piece.image for piece in found]}
        if layout == "v1":
            record |= {"qry_text": query.v1, "tgt_text": [piece.v1 for piece in found]}
        else:
            last = "\n" if name == "CIRR" else ""  # where the split left a newline must not matter
            inst = {"qry_inst": _instruction(query), "tgt_inst": _instruction(found[0]) + last}
            record |= inst | {"qry_text": query.text, "tgt_text": [piece.text for piece in found]}
        made.append(record)
    return made


def _instruction(piece: Piece) -> str:
    return (f"{TOKEN}\n" if piece.token else "") + piece.instruction


def expected(folder: Path, name: str, layout: str = "v1", rows: int = 6, candidates: int = 5) -> list[Expected]:
    """The contents that a reader must find in the tree below ``folder``."""

    def content(piece: Piece) -> Content:
        if piece.image:
            return Content(piece.seen, (folder / IMAGES[layout] / piece.image,))
        return Content(piece.seen or " ")

    return [Expected(content(query), tuple(map(content, found))) for query, found in pieces(name, rows, candidates)]


def write_set(folder: Path, name: str, made: Sequence[Record], layout: str = "v1", files: int = 1) -> None:
    """Writes rows, in some files, and every image they name that is not there yet."""
    for path in {path for record in made for path in (record["qry_img_path"], *record["tgt_img_path"]) if path}:
        file = folder / IMAGES[layout] / path
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png(path))
    (folder / IMAGES[layout]).mkdir(parents=True, exist_ok=True)
    write_rows(folder, name, made, files)


def write_rows(folder: Path, name: str, made: Sequence[Record], files: int = 1) -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    step = -(-len(made) // files)
    for n in range(files):
        file = folder / name / f"test-{n:05}-of-{files:05}.parquet"
        pq.write_table(pa.Table.from_pylist(list(made[n * step : (n + 1) * step])), file)


def png(path: str) -> bytes:
    """A square whose colours are those of its path."""
    digest = hashlib.sha256(path.encode()).digest()
    image = Image.new("RGB", (32, 32), tuple(digest[:3]))
    image.paste(tuple(digest[3:6]), (0, 0, 16, 32))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_tree(
    folder: Path, layout: str = "v1", names: Sequence[str] = ALL, rows: int = 6, candidates: int = 5
) -> dict[str, list[Expected]]:
    """Writes data sets and their images; the split layout in two files each. Returns what must be read."""
    for name in names:
        made = records(name, layout, rows, candidates)
        write_set(folder, name, made, layout, files=1 if layout == "v1" else 2)
    return {name: expected(folder, name, layout, rows, candidates) for name in names}


class Oracle:
    """Gives a query the vector of its ground truth, and everything else one of its own."""

    fingerprint = "oracle"

    def __init__(self, expected: dict[str, list[Expected]], *, fails_after: int | None = None) -> None:
        self.book, self.right, self.fails_after = Book(), {}, fails_after
        self.calls, self.seen = 0, []
        for question in (question for questions in expected.values() for question in questions):
            self.right[self.book.add(question.query)] = self.book.add(question.candidates[0])

    def encode(self, contents: list[Content], *, batch_size: int) -> np.ndarray:
        if self.calls == self.fails_after:
            raise RuntimeError("the power is gone")
        self.calls += 1
        keys = [Book().add(content) for content in contents]
        self.seen += keys
        return np.stack([unit(self.right.get(key, key)) for key in keys])


class Own:
    """Gives every content a vector of its own, made of its text and the bytes of its image: it knows nothing."""

    fingerprint = "own"

    def encode(self, contents: list[Content], *, batch_size: int) -> np.ndarray:
        return np.stack([unit(Book().add(content)) for content in contents])


def unit(key: str) -> np.ndarray:
    vector = np.random.default_rng(int(key[:16], 16)).normal(size=24)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def write_texts(folder: Path, rows: list[tuple[str, list[str]]], name: str = "VisualNews_i2t") -> Path:
    """A v1 data set of texts alone: (query, candidates)."""
    made = [
        {"qry_text": q, "qry_img_path": "", "tgt_text": found, "tgt_img_path": [""] * len(found)} for q, found in rows
    ]
    write_set(folder, name, made)
    return folder


if __name__ == "__main__":  # one of several processes: python tests/support/mmeb_tree.py DATA OUTPUT
    from torch.distributed import destroy_process_group

    from muco import distributed
    from muco.evaluate.mmeb import evaluate_mmeb

    distributed.start()
    evaluate_mmeb(Own(), Path(sys.argv[1]), Path(sys.argv[2]), allow_missing=True)
    distributed.wait_for_all()
    destroy_process_group()  # gloo's threads must not outlive the interpreter: one exit in ten would abort
