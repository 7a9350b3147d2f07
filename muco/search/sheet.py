"""A page of what queries find in an index: one HTML file without script, whose thumbnails are within it."""

from __future__ import annotations

import base64
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from muco.base.files import write_text, writing
from muco.base.html import document, house_style, text
from muco.base.text import read_text
from muco.errors import DataError, MucoError, did_you_mean
from muco.model import load
from muco.search.index import Hit, Index
from muco.search.update import build
from muco.starter import STARTER

STYLE = """\
.found { display: grid; grid-template-columns: repeat(auto-fill, minmax(88px, 1fr)); gap: 12px; margin-top: 12px }
.found img, .found p { aspect-ratio: 1; object-fit: contain; border: 1px solid var(--line); border-radius: 8px;
  background: #fff }
.found p { padding: 8px; overflow: hidden; color: #1b1c1f; font-size: .8rem; line-height: 1.35 }
.found figcaption { margin-top: 4px; overflow: hidden; color: var(--soft); font-size: .76rem; line-height: 1.3;
  text-overflow: ellipsis; white-space: nowrap }
section.asked-for { margin-top: 30px }
"""
# What photographs often show; for a first look at what a model finds in one's own.
EVERYDAY = (
    "a dog", "a cat", "a bird", "a flower", "a tree", "a mountain", "the sea", "snow", "a house", "a street", "a car",
    "a bicycle", "a train", "a boat", "an airplane", "food", "fruit", "a cup of coffee", "a book", "a computer",
    "a ball", "people", "a child", "the night",
)  # fmt: skip


def read_queries(file: Path) -> list[str]:
    """The lines of a text file that are not blank; a DataError if there is none, or the file is not text in UTF-8."""
    queries = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    if not queries:
        raise DataError(f"{file}: it has no queries; write one per line")
    return queries


def search_folder(folder: Path, output: Path, model: str = STARTER) -> Path:
    """Indexes the pictures of a folder and writes a page of what everyday words find.

    Args:
        output: For ``pictures.index`` and ``pictures.html``. The index holds the pictures of this folder and no others;
            a broken one keeps the row that its name has. The next call encodes only what has changed; for another
            folder, it replaces all.
        model: A model's folder or hub id.
    Returns:
        The page.
    Raises:
        MucoError: As :func:`muco.search.build` and :func:`write_sheet`.
    """
    place, page, loaded = output / "pictures.index", output / "pictures.html", load(model)
    Index.create(place, loaded, model_path=model)  # so that `muco serve` finds the model too
    found = build(folder, place, loaded)
    if found["total"] > found["rows"] - found["failed"]:  # of pictures that are gone, or of another folder before
        build(folder, place, loaded, delete_missing=True, progress=False)
    index = Index.open(place, loaded)
    write_sheet(page, {word: index.search(word) for word in EVERYDAY}, title=f"What everyday words find in {folder}")
    ask = shlex.join(["muco", "serve", "--model", model, "--index", str(place)])
    print(f"to ask for something else: {ask}", file=sys.stderr)
    return page


def write_sheet(
    file: Path, found: Mapping[str, Sequence[Hit]], *, caption: str | None = None, title: str = "What was found"
) -> None:
    """Writes a page with the rows that were found.

    Args:
        found: What was asked, in words, and the hits.
        caption: The column whose values stand under the pictures; None: the rows' ids.
    Raises:
        MucoError: If the index has no such column, or the page cannot be written.
    """
    shown = [hit for hits in found.values() for hit in hits]
    columns = dict.fromkeys(name for hit in shown for name in hit.columns)
    if caption and shown and caption not in columns:
        raise MucoError(f"caption {caption!r}: the index has no such column{did_you_mean(caption, columns)}")
    sections = []
    for asked, hits in found.items():
        figures = "\n".join(_figure(hit, caption) for hit in hits)
        sections.append(
            f'<section class="asked-for">\n<h2>{text(asked)}</h2>\n<div class="found">\n{figures}\n</div>\n</section>\n'
        )
    body = f"<header>\n<h1>{text(title)}</h1>\n</header>\n<main>\n{''.join(sections)}</main>\n"
    with writing(file):
        write_text(file, document(title, body, house_style() + STYLE, generator="muco search"))


def _figure(hit: Hit, caption: str | None) -> str:
    value = hit.columns.get(caption) if caption else None
    said = hit.id if value is None else str(value)
    words = f"{said} ({hit.score:.3f})"
    if hit.thumbnail:
        source = f"data:image/jpeg;base64,{base64.b64encode(hit.thumbnail).decode('ascii')}"
        shown = f'<img src="{source}" alt="{text(said)}" title="{text(words)}" loading="lazy">'
    else:
        shown = f'<p title="{text(words)}">{text(hit.text or hit.id)}</p>'
    return f"<figure>{shown}<figcaption>{text(said)}</figcaption></figure>"
