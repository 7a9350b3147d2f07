"""Tables: on the terminal, and as Markdown."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


WRAPPED = 16  # columns of the terminal that text of several words gets at least


def print_readable(table: Table, console: Console) -> None:
    """Prints a table; where the console is too narrow for its words and numbers, each row as lines of "name: value".

    Neither cuts a word or a number. Only text of several words is wrapped, at ``WRAPPED`` columns or more.
    """
    from rich.cells import cell_len
    from rich.text import Text

    widest = []
    for column in table.columns:
        cells = [str(cell) for cell in (column.header, *column.cells)]
        widest.append(max(map(cell_len, cells)))
        word = max((cell_len(word) for cell in cells for word in cell.split()), default=0)
        column.min_width = max(word, min(widest[-1], WRAPPED))
    least = console.measure(table, options=console.options.update_width(sys.maxsize)).minimum
    if least <= console.width:
        spare = console.width - least
        for width, column in sorted(zip(widest, table.columns, strict=True), key=itemgetter(0)):  # short ones whole
            column.width = min(width, column.min_width + spare)
            spare -= column.width - column.min_width
        console.print(table)
        return
    if table.title:
        console.print(table.title, style="bold", soft_wrap=True)
    for number, cells in enumerate(zip(*(column.cells for column in table.columns), strict=True)):
        if number:
            console.print()
        for column, cell in zip(table.columns, map(str, cells), strict=True):
            if cell:
                console.print(Text(f"{column.header}: {cell}" if column.header else cell), soft_wrap=True)


def table_of_numbers(title: str, columns: Sequence[str]) -> Table:
    """An empty table for the terminal: the first column, of names, to the left, the others to the right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    # no frame, which would leave too little of 80 columns to the names
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column(columns[0], overflow="fold")
    for column in columns[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def print_whole(table: Table, console: Console) -> None:
    """Prints a table and cuts no word and no number: where the terminal is too narrow, lines run on."""
    from rich.cells import cell_len

    for column in table.columns[1:]:
        column.min_width = max(cell_len(str(cell)) for cell in (column.header, *column.cells))
    least = console.measure(table, options=console.options.update_width(sys.maxsize)).minimum
    if least > console.width:
        table.width = least
    console.print(table, crop=False)


def print_report(table: Table, warnings: Iterable[str], notes: Iterable[str], console: Console) -> None:
    """Prints a table with :func:`print_whole`, then warnings, then notes, which are shown as plain text."""
    from rich.text import Text

    print_whole(table, console)
    for line in warnings:
        console.print(Text(f"Warning: {line}", style="bold red"))
    console.print(Text("\n".join(notes), style="dim"))


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right; cells are escaped."""
    lines = ["| " + " | ".join(map(markdown, cells)) + " |" for cells in (columns, *rows)]
    return [lines[0], "|---|" + "---:|" * (len(columns) - 1), *lines[1:]]


def markdown(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    line = re.sub(r"([\\`*\[\]<>|~#&!$])", r"\\\1", " ".join(clean(text).split()))
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", line)  # inside a word it marks nothing


def clean(text: str) -> str:
    """Text that can be written as UTF-8: half characters become "?", control characters other than blanks go."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return "".join(c for c in text if c >= " " or c in "\t\r\n")
