"""A small MMEB-train in its layout, with invented sentences: every configuration, both splits, and captioned files.

What each configuration is made of is written down here from the description of the data, and not taken from ``muco``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from muco.dialogue import Content, Sample, Turn

Record = dict[str, Any]

CLASSIFICATION = "ImageNet_1K N24News HatefulMemes VOC2007 SUN397".split()
VQA = "OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W".split()
RETRIEVAL = "VisDial CIRR VisualNews_t2i VisualNews_i2t MSCOCO_t2i MSCOCO_i2t NIGHTS WebQA".split()
ALL = [*CLASSIFICATION, *VQA, *RETRIEVAL, "MSCOCO"]
SPLITS = ("original", "diverse_instruction")
TOKEN = "<|image_1|>"

NO_QUERY_IMAGE = {"VisDial", "VisualNews_t2i", "MSCOCO_t2i", "WebQA"}
NO_TOKEN = NO_QUERY_IMAGE - {"WebQA"}
IMAGE_TARGETS = {"VisDial", "CIRR", "VisualNews_t2i", "MSCOCO_t2i", "NIGHTS", "WebQA", "MSCOCO"}
TEXT_NEGATIVES = {"HatefulMemes", "N24News", *VQA}
NO_NEGATIVE_COLUMNS = {"NIGHTS", "SUN397"}  # in this tree; readers must not need them


@dataclass(frozen=True)
class Pair:
    record: Record
    query: str  # as it must be read
    target: str


def pairs(name: str, split: str = "original", rows: int = 3) -> list[Pair]:
    return [_pair(name, split, row) for row in range(rows)]


def _pair(name: str, split: str, row: int) -> Pair:
    said = f"Tell number {row} of {name}:" if split == "original" else f"Number {row} of {name}, in other words:"
    query = f"{said} so? " if name == "ChartQA" else f"{said} so?"  # stray blanks at the end must not be lost
    text, seen = f"{query}\n", f"{query}\n"
    if name not in NO_TOKEN:
        text = f"{TOKEN}\n{query}\n"
        if name in NO_QUERY_IMAGE:
            seen = f"\n{query}\n"
        elif split == "diverse_instruction":
            # inline, in front with a blank, or not at all
            text = (f"{said} {TOKEN} so?", f"{TOKEN} {said} so?", f"{said} so?")[row % 3]
            seen = f"{said} so?"
    target = f"answer {row} of {name}"
    record = {
        "qry": text,
        "qry_image_path": "" if name in NO_QUERY_IMAGE else f"images/{name}/Train/asked {row}.jpg",
        "pos_text": target,
        "pos_image_path": "",
    }
    if name in IMAGE_TARGETS:
        target = "Take this picture\n"
        record |= {"pos_text": f"{TOKEN}\n{target}", "pos_image_path": f"images/{name}/Train/found {row}.jpg"}
    if name not in NO_NEGATIVE_COLUMNS:
        record |= {
            "neg_text": f"wrong {row} of {name}" if name in TEXT_NEGATIVES else "",
            "neg_image_path": f"images/{name}/Train/wrong {row}.jpg" if name == "VisDial" else "",
        }
    return Pair(record, seen, target)


def expected(root: Path, file: Path, name: str, split: str = "original", rows: int = 3) -> list[Sample]:
    """The samples that must be read from a file whose paths of images count from ``root``."""
    samples = []
    for row, pair in enumerate(pairs(name, split, rows)):
        negatives = [Content(f"wrong {row} of {name}")] if name in TEXT_NEGATIVES else []
        if name == "VisDial":
            negatives = [Content(images=(str(root / f"images/{name}/Train/wrong {row}.jpg"),))]
        target = Content(pair.target, _image(root, pair.record["pos_image_path"]))
        turn = Turn(pair.query, target, kind=name, negatives=negatives)
        image = _image(root, pair.record["qry_image_path"])
        samples.append(Sample(image=image, turns=[turn], where=f"{file} row {row}"))
    return samples


def _image(root: Path, path: str) -> tuple[str, ...]:
    return (str(root / path),) if path else ()


def file_of(folder: Path, name: str, split: str = "original") -> Path:
    return folder / name / f"{split}-00000-of-00001.parquet"


def write_rows(file: Path, made: Sequence[Record]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(made)), file)
    return file


def write_tree(folder: Path, names: Sequence[str] = ALL, splits: Sequence[str] = SPLITS, rows: int = 3) -> Path:
    for name in names:
        for split in splits:
            write_rows(file_of(folder, name, split), [pair.record for pair in pairs(name, split, rows)])
    return folder


def captioned(name: str, row: int, **changes: Any) -> Record:
    """A row of a ``*_generated_sentence.parquet`` file, with three hard negatives."""
    return (
        pairs(name, rows=row + 1)[row].record
        | {
            "qry_sentence": f"what is asked about in {row}",
            "pos_sentence": f"what is found in {row}",
            "neg_text": [f"wrong {n}" for n in range(3)],
            "neg_image_path": ["", "", ""],
        }
        | changes
    )
