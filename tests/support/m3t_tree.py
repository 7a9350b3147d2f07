"""A small M3T in its layout: one Parquet file, invented questions about coloured squares, and their pictures.

``expected`` says literally what must be read from a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from mmeb_tree import png

from muco.dialogue import Sample, Turn

Record = dict[str, Any]

KINDS = ["classification", "global", "global", "local", "local", "creative", "retrieval"]


def records(rows: int, *, turns: int = 7, paraphrases: int = 2) -> list[Record]:
    """The placeholder stands at the start, after a blank, within and at the end; every row has its own picture."""
    return [
        {
            "qry": [
                [_placed(f"Question {turn} about {row}, wording {n}?", turn) for n in range(paraphrases)]
                if paraphrases
                else _placed(f"Question {turn} about {row}?", turn)
                for turn in range(turns)
            ],
            "qry_image_path": f"{row % 3:04}/picture {row}.png",
            "qry_sentence": [f"what is in {row}"] * turns,
            "pos_text": [f"answer {turn} of {row}" for turn in range(turns)],
            "pos_sentence": [""] * turns,
            "pos_image_path": "",
            "neg_text": [""] * turns,
            "url": f"https://example.invalid/{row}.png",
        }
        for row in range(rows)
    ]


def _placed(text: str, turn: int) -> str:
    places = (f"<|image_1|>\n{text}", f"<|image_1|> {text}", text.replace(" about", " <|image_1|> about"), text)
    return places[turn % 4]


def expected(images: Path, file: Path, row: int, *, turns: int = 7, paraphrases: int = 2) -> Sample:
    """Sample of a row of ``records``."""
    read = [
        Turn(
            query=[f"Question {turn} about {row}, wording {n}?" for n in range(paraphrases)]
            or f"Question {turn} about {row}?",
            target=f"answer {turn} of {row}",
            kind=KINDS[turn] if turns == 7 else None,
        )
        for turn in range(turns)
    ]
    return Sample(image=str(images / f"{row % 3:04}/picture {row}.png"), turns=read, where=f"{file} row {row}")


def write_tree(
    folder: Path, made: Sequence[Record], *, missing: Sequence[int] = (), row_group: int | None = None
) -> Path:
    """``folder``/M3T_train/M3T.parquet and ``folder``/images with the pictures of the rows that are not missing."""
    (folder / "images").mkdir(parents=True)
    for row, record in enumerate(made):
        if row not in missing and record["qry_image_path"]:
            write_image(folder / "images" / record["qry_image_path"])
    return write_rows(folder / "M3T_train" / "M3T.parquet", made, row_group=row_group)


def write_rows(file: Path, made: Sequence[Record], *, row_group: int | None = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(made)), file, row_group_size=row_group)
    return file


def write_image(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(png(file.name))
