"""``muco data show``: a contact sheet of samples, one HTML file that needs nothing else and works on a phone."""

from __future__ import annotations

import colorsys
import random
from collections import Counter
from html import escape
from pathlib import Path

from muco.base.files import write_text
from muco.base.html import count, data_uri, document, made_by
from muco.data import open_data
from muco.data.source import Data
from muco.dialogue import Content, ImageLike, Sample, Turn
from muco.errors import DataError, ImageError, OutputError
from muco.images import cover, open_image, resize_to_budget

THUMB_PIXELS = 480 * 480
MAX_TURNS = 24  # shown per sample; a line says how many are left out
MAX_IMAGES = 8
GENERATOR = "muco data show"  # by it an older sheet is known and may be overwritten


def show(data_or_path: Data | str | Path, output_html: str | Path, *, limit: int = 48, seed: int = 0) -> Path:
    """Writes a contact sheet of ``limit`` samples drawn with ``seed`` (all of them if there are fewer).

    A row or an image that cannot be read becomes a card that says why. The file appears whole or not at all.

    Raises:
        DataError: If the data cannot be opened.
        OutputError: If ``output_html`` exists and is not an earlier contact sheet.
    """
    if limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")
    output = Path(output_html)
    if output.is_dir():
        raise OutputError(f"{output}: is a folder; pass the name of an HTML file")
    if output.exists():
        with output.open("rb") as file:
            if made_by(GENERATOR).encode() not in file.read(1024):
                what = "exists and is not a contact sheet of MuCo"
                raise OutputError(f"{output}: {what}; choose another name or remove it")
    data = open_data(data_or_path) if isinstance(data_or_path, (str, Path)) else data_or_path
    chosen = sorted(random.Random(seed).sample(range(len(data)), min(limit, len(data))))
    samples: list[Sample | DataError] = []
    for i in chosen:
        try:
            samples.append(data[i])
        except DataError as error:
            samples.append(error)
    name = Path(getattr(data, "path", type(data).__name__)).resolve().name
    write_text(output, _page(name, len(data), samples, seed))
    return output


def _page(name: str, total: int, samples: list[Sample | DataError], seed: int) -> str:
    kinds = Counter(turn.kind for sample in samples if isinstance(sample, Sample) for turn in sample.turns if turn.kind)
    colors = {}
    for i, kind in enumerate(sorted(kinds)):  # hues that lie far apart, dark enough for white text
        red, green, blue = colorsys.hls_to_rgb((0.58 + 0.382 * i) % 1, 0.36, 0.5)
        colors[kind] = f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"
    legend = "".join(
        f"<li style='--kind:{colors[kind]}'><span class=kind>{escape(kind)}</span> {number:,}</li>"
        for kind, number in kinds.most_common()
    )
    turns = sum(len(sample.turns) for sample in samples if isinstance(sample, Sample))
    drawn = f"all {total:,} samples" if len(samples) == total else f"{len(samples):,} of {total:,} samples, seed {seed}"
    cards = "\n".join(_card(item, colors) for item in samples)
    body = f"""<header>
<h1>{escape(name)}</h1>
<p>{drawn} · {turns:,} turns</p>
<ul class="legend">{legend}</ul>
</header>
<main>
{cards}
</main>
"""
    style = Path(__file__).with_name("show.css").read_text(encoding="utf-8")
    return document(f"{name}: samples", body, style, generator=GENERATOR)


def _card(sample: Sample | DataError, colors: dict[str, str]) -> str:
    if isinstance(sample, DataError):
        return f"<article><p class='error'>{escape(str(sample))}</p></article>"

    turns = "\n".join(_turn(turn, sample, colors) for turn in sample.turns[:MAX_TURNS])
    if (left := len(sample.turns) - MAX_TURNS) > 0:
        turns += f"<li class='more'>… and {left:,} more turns</li>"
    line = sample.where.rpartition(":")[2]
    place = f"line {line}" if line.isdigit() else Path(sample.where).name
    name = f"<b>{escape(sample.id)}</b>" if sample.id else ""
    pictures = f"<div class='pictures'>{_images(sample.images, sample.place)}</div>" if sample.images else ""
    return f"<article>{pictures}<p class='id'>{name}<span>{escape(place)}</span></p><ol>{turns}</ol></article>"


def _turn(turn: Turn, sample: Sample, colors: dict[str, str]) -> str:
    style = f" style='--kind:{colors[turn.kind]}'" if turn.kind else ""
    badge = f"<span class=kind>{escape(turn.kind)}</span>" if turn.kind else ""
    query = _wordings(turn.query, sample, empty="the image itself")
    target = _wordings(turn.target, sample)
    negatives = _folded(count(len(turn.negatives), "hard negative"), turn.negatives, sample) if turn.negatives else ""
    return f"<li{style}>{badge}<div class='query'>{query}</div><div class='target'>{target}</div>{negatives}</li>"


def _wordings(contents: tuple[Content, ...], sample: Sample, empty: str = "") -> str:
    """The first paraphrase, and the others folded away."""
    first = _content(contents[0], sample, empty)
    others = contents[1:]
    return first + (_folded(count(len(others), "more wording"), others, sample) if others else "")


def _folded(summary: str, contents: tuple[Content, ...], sample: Sample) -> str:
    items = "".join(f"<li>{_content(content, sample)}</li>" for content in contents)
    return f"<details><summary>{summary}</summary><ul>{items}</ul></details>"


def _content(content: Content, sample: Sample, empty: str = "") -> str:
    images = f"<div class='inline'>{_images(content.images, sample.place)}</div>" if content.images else ""
    text = f"<p>{escape(content.text)}</p>" if content.text else ""
    return images + text or f"<p class='empty'>{empty}</p>"


def _images(images: tuple[ImageLike, ...], where: str) -> str:
    left = len(images) - MAX_IMAGES
    more = f"<span class='more'>… and {left} more</span>" if left > 0 else ""
    return "".join(_thumb(image, where) for image in images[:MAX_IMAGES]) + more


def _thumb(image: ImageLike, where: str) -> str:
    try:
        picture = open_image(cover(image, where=where), small_side=0, where=where)
    except ImageError as error:
        return f"<p class='error'>{escape(str(error))}</p>"
    width, height = picture.size
    small = width * height <= 128 * 128
    if small:  # every pixel counts: lossless, and shown enlarged without blur
        source = data_uri(picture, "PNG", optimize=True)
    else:
        source = data_uri(resize_to_budget(picture, THUMB_PIXELS), "JPEG", quality=82)
    name = escape(Path(image).name if isinstance(image, (str, Path)) else "image", quote=True)
    attributes = f"alt='{name}' title='{name} · {width} × {height}' width='{width}' height='{height}'"
    return f"<img{' class=pixels' if small else ''} src='{source}' {attributes}>"
