"""HTML pages that need nothing else: one file without script, whose images are within it."""

from __future__ import annotations

import base64
import io
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Literal

from muco.base.tables import clean

if TYPE_CHECKING:
    from PIL import Image


def document(title: str, body: str, style: str, *, generator: str = "") -> str:
    """A whole page.

    Args:
        title: Plain text.
        body: HTML of everything within ``<body>``, ending in a newline.
        style: CSS.
        generator: The command that makes the page, see :func:`made_by`.
    """
    mark = f"{made_by(generator)}\n" if generator else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
{mark}<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{text(title)}</title>
<style>
{style}</style>
</head>
<body>
{body}</body>
</html>
"""


def made_by(generator: str) -> str:
    """The line in the first 200 characters of a page by which the command that made it knows it again."""
    return f'<meta name="generator" content="{escape(generator)}">'


def house_style() -> str:
    """The CSS of ``style.css``, the look of the house, light or dark."""
    return (files("muco.base") / "style.css").read_text(encoding="utf-8")


def section(title: str, words: str, body: str, *, anchor: str = "") -> str:
    """A section with a heading and a paragraph of plain text above its HTML; a link may lead to its ``anchor``."""
    name = f' id="{anchor}"' if anchor else ""
    return f"<section{name}>\n<h2>{escape(title)}</h2>\n<p>{escape(words)}</p>\n{body}\n</section>\n"


def text(words: str) -> str:
    """Any text as HTML that shows it; half characters and control characters go."""
    return escape(clean(words))


def sign(right: bool) -> str:
    """A mark for right or wrong."""
    return '<b class="good" title="right">✓</b>' if right else '<b class="bad" title="wrong">✗</b>'


def count(number: int, thing: str) -> str:
    """ "1 image", "2,000 images"."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def data_uri(picture: Image.Image, form: Literal["PNG", "JPEG"], **options: Any) -> str:
    """An image within the page; ``options`` are passed to ``picture.save``, such as ``quality``."""
    stream = io.BytesIO()
    picture.save(stream, form, **options)
    return f"data:image/{form.lower()};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
