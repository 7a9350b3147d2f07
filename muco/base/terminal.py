"""Tables on the terminal."""

from __future__ import annotations

import sys
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
