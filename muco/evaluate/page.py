"""The page of a benchmark: one HTML file that needs nothing else, with no script, beside JSON, CSV and Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from muco.base.files import write_json, write_text
from muco.base.html import count, data_uri, document, house_style, section, sign, text
from muco.errors import ImageError
from muco.evaluate import report
from muco.evaluate.benchmark import Failure, Shown, TaskResult
from muco.images import open_image

SIDE = 160  # px, of a thumbnail
THUMBNAILS = 12 * 2**20  # characters of all images of a page together
WARNINGS = 12  # shown at once; the rest opens
TEXT = 600  # characters shown of a query or candidate


def write_reports(output: Path, result: Mapping[str, Any], results: Sequence[TaskResult]) -> None:
    """Writes .json, .csv, .md and .html of a benchmark, with failures of ``results``; an OutputError if it cannot."""
    name = result["benchmark"]
    write_json(Path(output) / f"{name}.json", result)
    write_text(Path(output) / f"{name}.csv", report.as_csv(result))
    write_text(Path(output) / f"{name}.md", report.benchmark_markdown(result))
    write_text(Path(output) / f"{name}.html", page(result, results))


def page(result: Mapping[str, Any], results: Sequence[TaskResult], *, thumbnails: int = THUMBNAILS) -> str:
    """The HTML page as text; images beyond ``thumbnails`` characters in all are named instead, and the page says so."""
    sections = {
        "Groups": _groups(result),
        "Tasks": _tasks(result),
        "All metrics": _table(result),
        "Worst failures": _failures(results, Thumbnails(thumbnails)),
    }
    links = "".join(f'<a href="#{_anchor(title)}">{title}</a>' for title in sections)
    body = f"""<header>
{_head(result)}
<nav>{links}</nav>
</header>
<main>
{"".join(sections.values())}</main>
"""
    style = house_style() + Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return document(f"{report.title_of(result)}: {result['model']['path']}", body, style)


def _head(result: Mapping[str, Any]) -> str:
    lead = ""
    for name, score in report.means_of(result).items():
        if name.startswith("overall"):
            unknown = f'<b class="none">{report.INCOMPLETE}</b>'
            overall = unknown if score is None else f"<b>{report.percent(score)}<small>%</small></b>"
            lead += f'<p class="lead">{overall} <span>{text(name)}</span></p>\n'
    items = "".join(f"<dt>{name}</dt><dd>{text(value)}</dd>" for name, value in report.origin(result).items())
    return f"""<h1>{text(report.title_of(result))}: {text(result["model"]["path"])}</h1>
{lead}{_warnings(report.warnings_of(result))}
<dl class="card facts-list run-of">{items}</dl>"""


def _warnings(lines: Sequence[str]) -> str:
    if not lines:
        return ""
    items = [f"<li>{text(line)}</li>" for line in lines]
    shown = f"<ul>{''.join(items[:WARNINGS])}</ul>"
    if more := items[WARNINGS:]:
        shown += f"<details><summary>{len(more):,} more</summary><ul>{''.join(more)}</ul></details>"
    return f'<div class="alarm" role="alert"><h2>{count(len(lines), "warning")}</h2>{shown}</div>'


LEGEND = """<ul class="legend"><li><i class="ours"></i>this model, measured</li>
<li><i class="chance"></i>chance</li></ul>"""


def _groups(result: Mapping[str, Any]) -> str:
    cards = []
    for name, score in report.means_of(result).items():
        missing = '<p class="flag">not all of its tasks were scored</p>' if score is None else ""
        cards.append(f"<li class=card><h3>{text(name)}</h3>{_bar(score)}{missing}</li>")
    return _section("Groups", "Unweighted means over tasks, in per cent.", LEGEND + _list(cards))


def _tasks(result: Mapping[str, Any]) -> str:
    cards = [_task(name, task) for name, task in result["tasks"].items()]
    words = "The metric that counts, in per cent. Each task lists what its number rests on."
    return _section("Tasks", words, LEGEND + _list(cards))


def _task(name: str, task: Mapping[str, Any]) -> str:
    note = f"{task['metric']}, {task['queries']:,} queries, {report.candidates_text(task['candidates'])} candidates"
    if task["chance"] is not None:
        note += f", chance {report.percent(task['chance'])} %"
    if told := task["left_out"]:
        note += f", left out {told['queries']:,} queries and {told['candidates']:,} candidates"
    facts = f'<p class="note">{text(report.facts_text(task["facts"]))}</p>' if task["facts"] else ""
    flags = "".join(f'<p class="flag">{text(line)}</p>' for line in task["warnings"])
    bar = _bar(task["score"], task["chance"])
    return f'<li class=card><h3>{text(name)}</h3><p class="note">{text(note)}</p>{facts}{bar}{flags}</li>'


def _bar(score: float | None, chance: float | None = None) -> str:
    """A bar of the score, 0 to 1, with a mark at chance."""
    width = 100 * min(1.0, max(0.0, score or 0.0))
    mark = "" if chance is None else f'<b style="left:{100 * chance:.2f}%"></b>'
    return f"""<div class="bar" title="this model"><span class="who">this model</span>
<span class="track"><i class="ours" style="width:{width:.2f}%"></i>{mark}</span>
<span class="value">{report.percent(score)}</span></div>"""


def _table(result: Mapping[str, Any]) -> str:
    tasks = result["tasks"]
    metrics = list(dict.fromkeys(metric for task in tasks.values() for metric in task["scores"]))
    heads = "".join(f"<th>{text(name)}</th>" for name in ("task", *metrics, *report.columns_of(result)[3:]))
    mixed = len({task["metric"] for task in tasks.values()}) > 1  # then each row says which of its numbers counts
    rows = ""
    for name, _, _, *rest in report.task_rows(result):  # without metric and score, which are among all scores
        counts = f"<small>counts: {text(tasks[name]['metric'])}</small>" if mixed else ""
        cells = [*(report.percent(tasks[name]["scores"].get(metric)) for metric in metrics), *rest]
        rows += f"<tr><th>{text(name)}{counts}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    body = f"""<div class="card scroll" tabindex="0" role="region" aria-label="all scores"><table class="all"><thead>
<tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"""
    return _section("All metrics", "Every metric of every task, in per cent.", body)


class Thumbnails:
    """Small JPEGs as data URIs until ``room`` characters are used up."""

    def __init__(self, room: int) -> None:
        self.room, self.full, self.left_out = room, False, 0
        self._made: dict[str, str | None] = {}  # path -> data URI; None if it cannot be shown

    def html(self, image: str) -> str:
        """The image, or its name where it cannot be read or does not fit any more."""
        name = text(Path(image).name)
        if not self.full and image not in self._made:
            try:
                picture = open_image(image, small_side=0)
                picture.thumbnail((SIDE, SIDE))
                self._made[image] = data_uri(picture, "JPEG", quality=72)
            except ImageError:
                self._made[image] = None
        if image in self._made and (uri := self._made[image]) is None:
            return f'<span class="gone">{name}: the image is missing or cannot be read</span>'
        if self.full or len(uri) > self.room:
            self.full, self.left_out = True, self.left_out + 1
            return f'<span class="gone">{name}: left out</span>'
        self.room -= len(uri)
        return f'<img src="{uri}" alt="{name}" title="{name}" loading="lazy">'


def _failures(results: Sequence[TaskResult], thumbnails: Thumbnails) -> str:
    # The worst of each task first, then the second of each …: so that no task goes without images for those before it.
    cards: dict[str, list[str]] = {result.name: [] for result in results}
    for rank in zip_longest(*(result.failures for result in results)):
        for result, failure in zip(results, rank, strict=True):
            if failure is not None:
                cards[result.name].append(_failure(failure, thumbnails))
    words = (
        "Queries whose best candidate is wrong, worst first: those where the wrong candidate beats the right one by "
        "the most."
    )
    if thumbnails.left_out:
        left = count(thumbnails.left_out, "image")
        words += f" Left out, so that the page stays small: {left}; their names are shown instead."
    tasks, first = "", next((name for name, own in cards.items() if own), None)
    for result in results:
        own, opened = cards[result.name], " open" if result.name == first else ""
        told = f"{report.percent(result.score)} % {text(result.metric)}, {count(len(own), 'failure')} shown"
        tasks += (
            f'<details class="card worst"{opened}><summary><b>{text(result.name)}</b><span>{told}</span></summary>'
            f"{''.join(own)}</details>"
        )
    return _section("Worst failures", words, tasks)


def _failure(failure: Failure, thumbnails: Thumbnails) -> str:
    # in the order of reading, which is the order in which images take their room
    query, right = _shown(failure.query, thumbnails), _shown(failure.right, thumbnails)
    found = "".join(
        f'<li><p class="score">{sign(candidate.id == failure.right.id)}{score:.3f}</p>'
        f"{_shown(candidate, thumbnails)}</li>"
        for candidate, score in failure.found
    )
    return f"""<article><p>the best wrong candidate leads by {failure.margin:.3f}</p>
<div><h4>Query</h4>{query}</div><div><h4 class="good">Right</h4>{right}</div>
<div><h4 class="bad">Found instead</h4><ol class="found">{found}</ol></div></article>"""


def _shown(shown: Shown, thumbnails: Thumbnails) -> str:
    images = "".join(map(thumbnails.html, shown.images))
    words = shown.text.strip()
    if len(words) > TEXT:
        words = f"{words[:TEXT]}… ({len(words):,} characters)"
    said = f'<p dir="auto">{text(words)}</p>' if words else ""
    return f'<div class="thing">{images}{said}<p class="name" dir="auto">{text(shown.id[:200])}</p></div>'


def _section(title: str, words: str, body: str) -> str:
    return section(title, words, body, anchor=_anchor(title))


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _list(cards: Sequence[str]) -> str:
    return f'<ul class="bars">{"".join(cards)}</ul>'
