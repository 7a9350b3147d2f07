"""The page of a benchmark: one HTML file that needs nothing else, with no script, beside JSON, CSV and Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from itertools import zip_longest
from pathlib import Path
from typing import Any

from muco.base.files import write_json, write_text
from muco.base.tables import clean
from muco.evaluate.benchmark import Failure, Shown, TaskResult
from muco.evaluate.published import NOTICE, Published, published
from muco.evaluate.tables import (
    INCOMPLETE,
    as_csv,
    as_markdown,
    candidates_text,
    columns_of,
    facts_text,
    left_out_text,
    means_of,
    origin,
    percent,
    print_benchmark,
    title_of,
    warnings_of,
)
from muco.evaluate.thumbnails import Thumbnails

__all__ = ["page", "print_benchmark", "write_reports"]

THUMBNAILS = 12 * 2**20  # characters of all images of a page together
WARNINGS = 12  # shown at once; the rest opens
TEXT = 600  # characters shown of a query or candidate


def write_reports(output: Path, result: Mapping[str, Any], results: Sequence[TaskResult]) -> None:
    """Writes ``<benchmark>.json``, ``.csv``, ``.md`` and ``.html`` into the folder, each whole or not at all.

    Args:
        result: Of :func:`muco.evaluate.benchmark.benchmark_result`.
        results: The tasks it was made of, for their failures.
    Raises:
        OutputError: If a file cannot be written.
    """
    name = result["benchmark"]
    write_json(Path(output) / f"{name}.json", result)
    for suffix, text in ((".csv", as_csv(result)), (".md", as_markdown(result)), (".html", page(result, results))):
        write_text(Path(output) / f"{name}{suffix}", text)


def page(result: Mapping[str, Any], results: Sequence[TaskResult], *, thumbnails: int = THUMBNAILS) -> str:
    """The HTML page as text.

    Args:
        thumbnails: Characters that all images may take; what does not fit is named instead, and the page says so.
    """
    references = published(result["benchmark"])
    style = (files("muco.base") / "style.css", Path(__file__).with_name("page.css"))
    sections = {
        "Groups": _groups(result, references),
        "Tasks": _tasks(result, references),
        "All metrics": _table(result),
        **({"Published scores": _references(result, references)} if references else {}),
        "Worst failures": _failures(results, Thumbnails(thumbnails)),
    }
    links = "".join(f'<a href="#{_anchor(title)}">{title}</a>' for title in sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{_text(title_of(result))}: {_text(result["model"]["path"])}</title>
<style>
{"".join(file.read_text(encoding="utf-8") for file in style)}</style>
</head>
<body>
<header>
{_head(result)}
<nav>{links}</nav>
</header>
<main>
{"".join(sections.values())}</main>
</body>
</html>
"""


# ── head ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _head(result: Mapping[str, Any]) -> str:
    lead = "".join(
        f'<p class="lead">{_overall(score)} <span>{_text(name)}</span></p>\n'
        for name, score in means_of(result).items()
        if name.startswith("overall")
    )
    items = "".join(f"<dt>{name}</dt><dd>{_text(value)}</dd>" for name, value in origin(result).items())
    return f"""<h1>{_text(title_of(result))}: {_text(result["model"]["path"])}</h1>
{lead}{_warnings(warnings_of(result))}
<dl class="card facts-list run-of">{items}</dl>"""


def _overall(score: float | None) -> str:
    return f'<b class="none">{INCOMPLETE}</b>' if score is None else f"<b>{percent(score)}<small>%</small></b>"


def _warnings(lines: Sequence[str]) -> str:
    if not lines:
        return ""
    first, more = (_items(part) for part in (lines[:WARNINGS], lines[WARNINGS:]))
    if more:
        more = f"<details><summary>{len(lines) - WARNINGS:,} more</summary>{more}</details>"
    return f'<div class="alarm" role="alert"><h2>{_count(len(lines), "warning")}</h2>{first}{more}</div>'


def _items(lines: Sequence[str]) -> str:
    items = "".join(f"<li>{_text(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


# ── bars ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _groups(result: Mapping[str, Any], references: Sequence[Published]) -> str:
    scores = means_of(result)
    missing = '<p class="flag">not all of its tasks were scored</p>'
    cards = "".join(
        f"<li class=card><h3>{_text(name)}</h3>{_bars(name, score, None, references)}{missing * (score is None)}</li>"
        for name, score in scores.items()
    )
    return _section("Groups", "Unweighted means over tasks, in per cent.", _legend(references) + _list(cards))


def _tasks(result: Mapping[str, Any], references: Sequence[Published]) -> str:
    cards = "".join(_task(name, task, references) for name, task in result["tasks"].items())
    text = "The metric that counts, in per cent. Each task lists what its number rests on."
    return _section("Tasks", text, _legend(references) + _list(cards))


def _task(name: str, task: Mapping[str, Any], references: Sequence[Published]) -> str:
    note = f"{task['metric']}, {task['queries']:,} queries, {candidates_text(task['candidates'])} candidates"
    if task["chance"] is not None:
        note += f", chance {percent(task['chance'])} %"
    if told := task["left_out"]:
        note += f", left out {told['queries']:,} queries and {told['candidates']:,} candidates"
    facts = f'<p class="note">{_text(facts_text(task["facts"]))}</p>' if task["facts"] else ""
    flags = "".join(f'<p class="flag">{_text(line)}</p>' for line in task["warnings"])
    bars = _bars(name, task["score"], task["chance"], references)
    return f'<li class=card><h3>{_text(name)}</h3><p class="note">{_text(note)}</p>{facts}{bars}{flags}</li>'


def _bars(name: str, score: float | None, chance: float | None, references: Sequence[Published]) -> str:
    bars = _bar("this model", "ours", None if score is None else 100 * score, chance)
    for reference in references:
        if reference.main and name in reference.scores:
            bars += _bar(reference.model, "theirs", reference.scores[name])
    return bars


def _bar(who: str, kind: str, value: float | None, chance: float | None = None) -> str:
    """One bar; ``value`` in per cent."""
    width = min(100.0, max(0.0, value or 0.0))
    mark = "" if chance is None else f'<b style="left:{100 * chance:.2f}%"></b>'
    own = " own" if kind == "ours" else ""
    title = f"{who}: {NOTICE}" if kind == "theirs" else who
    return f"""<div class="bar{own}" title="{_text(title)}"><span class="who">{_text(who)}</span>
<span class="track"><i class="{kind}" style="width:{width:.2f}%"></i>{mark}</span>
<span class="value">{"–" if value is None else f"{value:.1f}"}</span></div>"""


def _legend(references: Sequence[Published]) -> str:
    theirs = f'<li><i class="theirs"></i>{NOTICE}</li>' if any(r.main for r in references) else ""
    return f"""<ul class="legend"><li><i class="ours"></i>this model, measured</li>{theirs}
<li><i class="chance"></i>chance</li></ul>"""


# ── tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _table(result: Mapping[str, Any]) -> str:
    tasks = result["tasks"]
    metrics = list(dict.fromkeys(metric for task in tasks.values() for metric in task["scores"]))
    columns = columns_of(result)
    last = columns[columns.index("chance") :]
    heads = "".join(f"<th>{_text(name)}</th>" for name in ("task", *metrics, *last))
    mixed = len({task["metric"] for task in tasks.values()}) > 1  # then each row says which of its numbers counts
    rows = "".join(
        f"<tr><th>{_text(name)}"
        + _small("counts: " + task["metric"]) * mixed
        + "</th>"
        + "".join(f"<td>{percent(task['scores'].get(metric))}</td>" for metric in metrics)
        + f"<td>{percent(task['chance'])}</td><td>{task['queries']:,}</td>"
        f"<td>{candidates_text(task['candidates'])}</td>"
        + f"<td>{left_out_text(task['left_out'])}</td>" * ("left out" in last)
        + "</tr>"
        for name, task in tasks.items()
    )
    body = _scrolled("all scores", f'<table class="all"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>')
    return _section("All metrics", "Every metric of every task, in per cent.", body)


def _references(result: Mapping[str, Any], references: Sequence[Published]) -> str:
    scores = means_of(result)
    names = [name for name in scores if any(name in reference.scores for reference in references)]
    own = "".join(f"<td>{percent(scores[name])}</td>" for name in names)
    rows = f'<tr class="own"><th>this model<small>measured</small></th>{own}</tr>'
    for reference in references:
        values = [reference.scores.get(name) for name in names]
        if any(value is not None for value in values):
            cells = "".join(f"<td>{'–' if value is None else f'{value:.1f}'}</td>" for value in values)
            rows += f"<tr><th>{_text(reference.model)}{_small(reference.source)}</th>{cells}</tr>"
    heads = "".join(f"<th>{_text(name)}</th>" for name in ("model", *names))
    text = (
        f"All scores but those of the first row were {NOTICE}. They compare only with scores on the same pool and all "
        "queries; texts, image sizes and the handling of ties may differ."
    )
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
    return _section("Published scores", text, _scrolled("published scores", table))


def _scrolled(label: str, table: str) -> str:
    return f'<div class="card scroll" tabindex="0" role="region" aria-label="{label}">{table}</div>'


# ── failures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _failures(results: Sequence[TaskResult], thumbnails: Thumbnails) -> str:
    # The worst of each task first, then the second of each …: so that no task goes without images for those before it.
    cards: dict[str, list[str]] = {result.name: [] for result in results}
    for rank in zip_longest(*(result.failures for result in results)):
        for result, failure in zip(results, rank, strict=True):
            if failure is not None:
                cards[result.name].append(_failure(failure, thumbnails))
    text = (
        "Queries whose best candidate is wrong, worst first: those where the wrong candidate beats the right one by "
        "the most."
    )
    if thumbnails.left_out:
        text += f" Left out, so that the page stays small: {_count(thumbnails.left_out, 'image')}; the names stand in."
    opened = next((name for name, items in cards.items() if items), None)
    tasks = "".join(
        f'<details class="card worst"{" open" * (result.name == opened)}><summary><b>{_text(result.name)}</b>'
        f"<span>{percent(result.score)} % {_text(result.metric)}, "
        f"{_count(len(cards[result.name]), 'failure')} shown</span></summary>{''.join(cards[result.name])}</details>"
        for result in results
    )
    return _section("Worst failures", text, tasks)


def _failure(failure: Failure, thumbnails: Thumbnails) -> str:
    # in the order of reading, which is the order in which images take their room
    query, right = _shown(failure.query, thumbnails), _shown(failure.right, thumbnails)
    found = "".join(
        f'<li><p class="score">{_sign(candidate.id == failure.right.id)}{score:.3f}</p>'
        f"{_shown(candidate, thumbnails)}</li>"
        for candidate, score in failure.found
    )
    return f"""<article><p>the best wrong candidate leads by {failure.margin:.3f}</p>
<div><h4>Query</h4>{query}</div><div><h4 class="good">Right</h4>{right}</div>
<div><h4 class="bad">Found instead</h4><ol class="found">{found}</ol></div></article>"""


def _shown(shown: Shown, thumbnails: Thumbnails) -> str:
    images = "".join(map(thumbnails.html, shown.images))
    text = shown.text.strip()
    if len(text) > TEXT:
        text = f"{text[:TEXT]}… ({len(text):,} characters)"
    words = f'<p dir="auto">{_text(text)}</p>' if text else ""
    return f'<div class="thing">{images}{words}<p class="name" dir="auto">{_text(shown.id[:200])}</p></div>'


def _sign(right: bool) -> str:
    return '<b class="good" title="right">✓</b>' if right else '<b class="bad" title="wrong">✗</b>'


# ── small things ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _section(title: str, text: str, body: str) -> str:
    return f'<section id="{_anchor(title)}">\n<h2>{escape(title)}</h2>\n<p>{escape(text)}</p>\n{body}\n</section>\n'


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _small(text: str) -> str:
    return f"<small>{_text(text)}</small>"


def _list(cards: str) -> str:
    return f'<ul class="bars">{cards}</ul>'


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'s' * (number != 1)}"


def _text(text: str) -> str:
    return escape(clean(text))
