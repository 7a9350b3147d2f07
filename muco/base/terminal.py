"""What the commands print: progress on stderr, results on stdout."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from muco.base.json_text import json_text
from muco.base.text import writes_utf8

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, drawn only where that is a terminal; yields the function that moves it (done, total)."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def rows_bar(console: Console, *, shown: bool) -> Progress:
    """A bar with the number of rows done and the time left; draws nothing unless ``shown``."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(elapsed_when_finished=True))
    return Progress("{task.description}", *columns, console=console, disable=not shown)


def finish(result: Any, as_json: bool, show: Callable[[Any, Console], None]) -> None:
    """Prints a result on stdout: one JSON line for programs, or a table for people."""
    if as_json:
        print_json(result)
        return
    from rich.console import Console

    show(result, Console(file=sys.stdout))


def print_json(result: Any) -> None:
    """One line of JSON on stdout, in ASCII where stdout does not take every character."""
    print(json_text(result, ascii_only=not writes_utf8(sys.stdout)), flush=True)


def print_pairs(result: Mapping[str, Any], console: Console) -> None:
    """One line per key that has a value."""
    said = {key: value for key, value in result.items() if value is not None and value != {}}
    width = max(map(len, said), default=0)
    for key, value in said.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{name}: {inner}" for name, inner in value.items())
        console.print(f"{key:<{width}}  {value}", markup=False, highlight=False, soft_wrap=True)
