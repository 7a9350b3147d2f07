"""Hits on a terminal: a table, and thumbnails where the terminal says that it shows pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from muco.base.tables import clean, print_readable
from muco.images import open_image

if TYPE_CHECKING:
    from muco.search.index import Hit

KITTY_CHUNK = 4096  # characters per escape sequence, as its protocol wants
ROWS = 6  # of text that a picture takes


def protocol(environment: Mapping[str, str], stream: TextIO) -> str | None:
    """ "kitty" or "iterm2", if the stream is such a terminal itself and not seen through tmux or screen."""
    if not stream.isatty() or "TMUX" in environment or environment.get("TERM", "").startswith(("screen", "tmux")):
        return None
    program = environment.get("TERM_PROGRAM", "")
    if "KITTY_WINDOW_ID" in environment or environment.get("TERM") in ("xterm-kitty", "xterm-ghostty"):
        return "kitty"
    if program in ("iTerm.app", "WezTerm") or environment.get("LC_TERMINAL") == "iTerm2":
        return "iterm2"
    return None


def picture(jpeg: bytes, protocol: str) -> str:
    """The escape sequences that draw a JPEG, ROWS lines high."""
    if protocol == "iterm2":
        data = base64.b64encode(jpeg).decode()
        return f"\x1b]1337;File=inline=1;size={len(jpeg)};height={ROWS};preserveAspectRatio=1:{data}\a"
    stream = io.BytesIO()
    open_image(jpeg, small_side=0).save(stream, "PNG")  # the one format of files that kitty reads
    data, parts = base64.b64encode(stream.getvalue()).decode(), []
    for start in range(0, len(data), KITTY_CHUNK):
        head, more = "" if start else f"a=T,f=100,r={ROWS},", int(start + KITTY_CHUNK < len(data))
        parts.append(f"\x1b_G{head}m={more};{data[start : start + KITTY_CHUNK]}\x1b\\")
    return "".join(parts)


def show_hits(hits: Sequence[Hit], console: Console, pictures: str | None = None) -> None:
    """A table of hits, or lines where it has no room; with ``pictures``, a protocol, each hit's thumbnail below it."""
    names = {name: None for hit in hits for name, value in hit.extra.items() if value is not None}
    shown = [name for name in ("text", "image") if any(getattr(hit, name) not in (None, hit.id) for hit in hits)]
    table = Table("", "score", "id", *shown)
    for name in names:
        table.add_column(Text(_line(name)))
    for rank, hit in enumerate(hits, 1):
        values = [hit.id, *(getattr(hit, name) for name in shown), *(hit.extra.get(name) for name in names)]
        cells = [Text("" if value is None else _line(str(value))) for value in values]
        table.add_row(str(rank), f"{hit.score:.4f}", *cells)
    print_readable(table, console)
    for rank, hit in enumerate(hits, 1):
        if pictures and hit.thumbnail:
            console.file.write(f"{rank}\n{picture(hit.thumbnail, pictures)}\n")


def _line(text: str) -> str:
    """One line without control characters, because the text of a stranger must not control the terminal."""
    return "".join(c for c in " ".join(clean(text).split()) if c.isprintable())
