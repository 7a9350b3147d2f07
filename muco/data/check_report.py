"""What ``muco data check`` found, as values and for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from muco.base.tables import print_readable

MAX_LISTED = 20  # messages kept per kind of problem; the total is always counted
FREQUENT = "most frequent among the repeated"


@dataclass
class Findings:
    """Problems of one sort: how many, and the messages of the first ``MAX_LISTED``."""

    total: int = 0
    listed: list[str] = field(default_factory=list)

    def add(self, message: str) -> None:
        self.total += 1
        if len(self.listed) < MAX_LISTED:
            self.listed.append(message)


@dataclass(frozen=True)
class TextLengths:
    """Exact statistics of text lengths; every wording counts once, an empty one not at all."""

    texts: int = 0
    mean: float = 0.0
    median: int = 0
    p95: int = 0
    max: int = 0


@dataclass(frozen=True)
class Repeats:
    """Identical targets of one kind.

    ``share`` is the share of turns whose target occurs in another sample too (each wording counts): such turns are
    wrong negatives of one another unless the loss masks them.
    """

    turns: int
    distinct: int
    share: float
    most_frequent: list[tuple[str, int]]


@dataclass
class Report:
    """All that :func:`check` found. ``ok`` is False if a row or an image cannot be used; repeats are not an error."""

    path: str
    rows: int = 0
    samples: int = 0  # rows that can be read
    turns: int = 0
    turns_per_sample: dict[int, int] = field(default_factory=dict)  # number of turns -> samples
    images: int = 0  # distinct files
    images_opened: bool = True
    bad_rows: Findings = field(default_factory=Findings)
    missing_images: Findings = field(default_factory=Findings)
    broken_images: Findings = field(default_factory=Findings)
    special_tokens: Findings = field(default_factory=Findings)  # rows whose text holds one
    words: dict[str, TextLengths] = field(default_factory=dict)  # "query", "target" -> lengths
    tokens: dict[str, TextLengths] | None = None  # the same in tokens, if a tokenizer was given
    kinds: dict[str, Repeats] = field(default_factory=dict)

    @property
    def problems(self) -> dict[str, Findings]:
        return {
            "bad rows": self.bad_rows,
            "missing images": self.missing_images,
            "broken images": self.broken_images,
            "special tokens in text": self.special_tokens,
        }

    @property
    def ok(self) -> bool:
        return self.samples > 0 and not any(findings.total for findings in self.problems.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with ``ok``; the keys of ``turns_per_sample`` become strings."""
        plain = asdict(self)
        plain["turns_per_sample"] = {str(turns): count for turns, count in self.turns_per_sample.items()}
        for repeats in plain["kinds"].values():
            repeats["most_frequent"] = [list(pair) for pair in repeats["most_frequent"]]
        return {"ok": self.ok} | plain


def print_report(report: Report, console: Console) -> None:
    """The report for people. Text of the data is never read as markup."""
    verdict = Text("ok", style="bold green") if report.ok else Text("not ok", style="bold red")
    console.print(Text.assemble((report.path, "bold"), "  ", verdict), soft_wrap=True)
    console.print(Padding(_counts(report), (1, 0)))
    kinds = _table("Targets by kind", ("kind", "turns", "distinct", "repeated", FREQUENT))
    for kind, repeats in report.kinds.items():
        short = [(text if len(text) <= 40 else text[:39] + "…", count) for text, count in repeats.most_frequent]
        frequent = ", ".join(f"{text} ({count:,})" for text, count in short)
        cells = (f"{repeats.turns:,}", f"{repeats.distinct:,}", f"{repeats.share:.0%}")
        kinds.add_row(Text(kind), *cells, Text(frequent or "–"))
    lengths = _table("Length of texts", ("", "texts", "mean", "median", "95 %", "max"))
    for unit, sides in (("words", report.words), ("tokens", report.tokens or {})):
        for side, length in sides.items():
            row = (f"{length.texts:,}", f"{length.mean:.1f}", str(length.median), str(length.p95), f"{length.max:,}")
            lengths.add_row(f"{side}, {unit}", *row)
    print_readable(kinds, console)
    console.print()
    print_readable(lengths, console)
    for name, findings in report.problems.items():
        if findings.total:
            console.print(Text(f"\n{name}: {findings.total:,}", style="bold red"))
            for message in findings.listed:
                console.print(Text(f"  {message}"), soft_wrap=True)  # unwrapped, so that file:line can be clicked
            if left := findings.total - len(findings.listed):
                console.print(Text(f"  … and {left:,} more"))


def _counts(report: Report) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    histogram = ", ".join(f"{turns} in {count:,}" for turns, count in report.turns_per_sample.items())
    table.add_row("rows", f"{report.rows:,}", "")
    table.add_row("samples", f"{report.samples:,}", "rows that can be read")
    table.add_row("turns", f"{report.turns:,}", f"turns per sample: {histogram}" if histogram else "")
    table.add_row("images", f"{report.images:,}", "each opened" if report.images_opened else "not opened")
    table.columns[1].justify = "right"
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number and name != FREQUENT else "left", overflow="fold")
    return table
