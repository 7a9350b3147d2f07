"""The report: one HTML file without scripts or other files, for phones too, light or dark."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from functools import cache
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image

from muco.base.html import count, data_uri, document, house_style, section, sign
from muco.base.machine import machine_in_words, versions_in_words
from muco.base.svg import loss_curve
from muco.evaluate.retrieval import CONTROLS

TASKS = {  # name -> title, explanation
    "answer": ("Image + question → answer", "mean over the kinds of question"),
    "answer_text_only": ("Question alone → answer", "control: what the question alone reveals"),
    "image_to_caption": ("Image → caption", "among all captions of the set"),
    "caption_to_image": ("Caption → image", "among all images of the set"),
    "within": ("Within one image", "among the answers about the same image: is the question read?"),
    "blind": ("Black image → caption", "control: above chance would be a leak"),
}
TILES = ("image_to_caption", "caption_to_image", "answer", "within")
METRICS = ("hit@1", "hit@5", "hit@10", "mrr")
STAGES = {
    "scenes": "draw the scenes",
    "before": "score the untrained model",
    "train": "train",
    "after": "score the trained model",
    "embed": "embed the held-out images",
    "search": "search",
    "page": "write the page",
}


def page(record: Mapping[str, Any], scenes: Path) -> str:
    """The report of a demo, from its ``demo.json`` with all stages done but the page, and the folder of the scenes."""
    results = {name: stage["result"] for name, stage in record["stages"].items() if "result" in stage}

    @cache
    def image(name: str, words: str) -> str:
        with Image.open(scenes / name) as picture:
            source = data_uri(picture, "PNG", optimize=True)
        return f'<img src="{source}" alt="{escape(words)}" title="{escape(words)}">'

    sections = [
        _tiles(results),
        _texts(results["search"], image),
        _answers(results["search"], image),
        _scores(results),
        _curve(results),
        _missed_images(results["search"]["missed_images"], image),
        _missed_answers(results["search"], image),
        _run(record, results),
    ]
    body = f"""<header>
<h1>One image, many turns: the MuCo demo</h1>
{_summary(record["stages"]["train"], results)}
</header>
<main>
{"".join(sections)}
</main>
"""
    return document("MuCo demo", body, house_style())


def _summary(stage: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    before, train, scenes = results["before"], results["train"], results["scenes"]
    pairs = train["steps"] * before["pairs_per_step"]
    interrupted = " after an interruption" if stage["interrupted"] else ""
    minutes, rest = divmod(round(stage["seconds"]), 60)
    duration = f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"""<p>A Qwen2-VL of <b>{before["parameters"] / 1e6:.1f} million parameters</b> with random weights was
trained in <b>{duration}</b>{interrupted}: {train["steps"]:,} steps, {pairs:,} pairs of query and
target, from {scenes["train"]:,} drawn scenes. Each scene has seven questions with answers, and all of them share one
pass over its image. The scores are of <b>{scenes["test"]:,} other scenes</b>, whose captions never occur in training.
All of it ran on {escape(machine_in_words(train["machine"]))}.</p>"""


def _tiles(results: Mapping[str, Any]) -> str:
    before, after = results["before"]["tasks"], results["after"]["tasks"]
    tiles = "".join(_tile(name, before, after) for name in TILES if name in after)
    lines = "".join(f"<li>{escape(line)}</li>" for line in results["after"]["warnings"])
    warnings = f'<ul class="warning">{lines}</ul>' if lines else ""
    return f'<div class="tiles">{tiles}</div>{warnings}'


def _tile(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    scores = _scores_of(after[name])
    hit, chance = _number(scores["hit@1"]), _number(scores["chance@1"])
    alone = ""
    if name == "answer" and "answer_text_only" in after:
        alone = f"<li>question alone {_number(after['answer_text_only']['mean']['hit@1'])}\u202f%</li>"
    return f"""<div class="card tile"><p class="what">{TASKS[name][0]}</p>
<p class="value">{hit}<small>%</small></p>
<div class="meter" title="the mark is chance"><i style="width:{hit}%"></i><b style="left:{chance}%"></b></div>
<ul class="note"><li>found first among {_candidates(scores)}</li><li>chance {chance}\u202f%</li><li>untrained \
{_number(_scores_of(before[name])["hit@1"])}\u202f%</li>{alone}</ul></div>"""


def _texts(search: Mapping[str, Any], image: Any) -> str:
    return section(
        "Text → image",
        "Captions that no held-out image has, and the images nearest to each, with the cosine of the two vectors. The "
        "marks show which parts of the query each picture has. The model was trained on whole captions; it does not "
        "understand a shorter text, such as “a red star”.",
        "".join(_text(query, image) for query in search["texts"]),
    )


def _text(query: Mapping[str, Any], image: Any) -> str:
    items = ""
    for place, found in enumerate(query["found"], start=1):
        facts = "".join(f"<li{'' if has else ' class=no'}>{escape(fact)}</li>" for fact, has in found["facts"].items())
        items += (
            f"<li>{image(found['image'], found['caption'])}"
            f'<p class="score"><span class="place">{place}</span><span>{found["score"]:.3f}</span></p>'
            f'<ul class="facts">{facts}</ul></li>'
        )
    fits = "fits" if query["fitting"] == 1 else "fit"
    count = f"{query['fitting']} of the {query['of']} images {fits} entirely"
    return f"""<article class="card query"><h3>“{escape(query["query"])}”</h3><p class="count">{count}</p>
<ol>{items}</ol></article>"""


def _answers(search: Mapping[str, Any], image: Any) -> str:
    return section(
        "Image + question → answer",
        f"One question about each of the first held-out images, right or wrong. Every answer is ranked among all "
        f"{search['candidates']:,} answers to any question in the set, so this is harder than the table below.",
        f'<div class="cards">{"".join(_asked(item, image) for item in search["answers"])}</div>',
    )


def _asked(item: Mapping[str, Any], image: Any) -> str:
    rows = "".join(
        f"<li>{sign(found['text'] == item['right'])}<span>{escape(found['text'])}</span>"
        f"<span>{found['score']:.3f}</span></li>"
        for found in item["found"]
    )
    truth = ""
    if item["right"] not in (found["text"] for found in item["found"]):
        truth = f'<p class="truth">Right is “{escape(item["right"])}”, at place {item["rank"]:,}.</p>'
    return f"""<article class="card asked">{image(item["image"], "a drawn scene")}<div>
<h3>{escape(item["question"])}</h3><p class="kind">{escape(item["kind"])}</p><ol>{rows}</ol>{truth}</div></article>"""


def _curve(results: Mapping[str, Any]) -> str:
    train, chance = results["train"], results["before"]["chance_loss"]
    wide = loss_curve(train["loss"], train["steps"], chance)
    narrow = loss_curve(train["loss"], train["steps"], chance, width=330, height=260)
    return section(
        "Loss",
        f"The contrastive loss of the training batches. A model that cannot tell its candidates apart stays at "
        f"{chance:.2f} nats: each pair competes with about {math.expm1(chance):.0f} others.",
        f'<figure class="card chart"><div class="wide">{wide}</div><div class="narrow">{narrow}</div></figure>',
    )


def _scores(results: Mapping[str, Any]) -> str:
    before, after = results["before"]["tasks"], results["after"]["tasks"]
    rows = groups = columns = ""
    for name in (name for name in {**TASKS, **after} if name in after):
        title, note = TASKS.get(name, (name, ""))
        kind = "control" if name in CONTROLS else ""
        rows += _row(kind, title, note, _scores_of(before[name]), _scores_of(after[name]))
        if name == "answer":
            kinds = before[name]["kinds"]
            rows += "".join(_row("part", part, "", kinds[part], s) for part, s in after[name]["kinds"].items())
    for name in METRICS:
        title, width, chance = ("MRR", 2, "") if name == "mrr" else (name, 3, "<th>chance</th>")
        groups += f'<th class="group" colspan="{width}">{title}</th>'
        columns += f'<th class="group">before</th><th>after</th>{chance}'
    return section(
        "Scores on the held-out scenes",
        f"In per cent, before and after training. The right answer is ranked among drawn answers to such questions "
        f"({results['after']['candidates']} candidates where there are enough); a tie counts as lost.",
        f"""<div class="card scroll scores"><table>
<thead><tr><th></th><th class="pool"></th>{groups}</tr>
<tr><th>task</th><th class="pool">candidates</th>{columns}</tr></thead>
<tbody>{rows}</tbody></table></div>""",
    )


def _row(kind: str, title: str, note: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    cells = ""
    for name in METRICS:
        cells += f'<td class="first">{_number(before[name])}</td><td class="after">{_number(after[name])}</td>'
        if name != "mrr":
            share = after[name] and after[name.replace("hit", "chance")]
            cells += f'<td class="chance">{_number(share)}</td>'
    small = f"<small>{escape(note)}</small>" if note else ""
    return f'<tr class="{kind}"><th>{escape(title)}{small}</th><td class="pool">{_candidates(after)}</td>{cells}</tr>'


def _scores_of(task: Mapping[str, Any]) -> Mapping[str, Any]:
    return task.get("mean", task)


def _candidates(scores: Mapping[str, Any]) -> str:
    low, high = scores["candidates_min"], scores["candidates_max"]
    return f"{low}" if low == high else f"{low}–{high}"


def _missed_images(missed: Mapping[str, Any], image: Any) -> str:
    cards = "".join(
        f"""<figure class="card missed"><p>{_differing(item["caption"], item["found_caption"])}</p><div class="pair">
<div>{image(item["found"], item["found_caption"])}<p class="tag"><b class="bad">✗</b> found first</p></div>
<div>{image(item["right"], item["caption"])}<p class="tag"><b class="good">✓</b> right, place {item["rank"]}</p></div>
</div></figure>"""
        for item in missed["shown"]
    )
    text = (
        f"Of {missed['of']:,} captions, {missed['count']:,} find another image than their own first. "
        "These are the first of them in the order of the set. Marked is where the caption of the found image differs."
    )
    return section("Mistakes: caption → image", text, f'<div class="cards">{cards}</div>')


def _differing(caption: str, other: str) -> str:
    """The caption, with those words marked that the other one lacks in this order."""
    plain = [[word.strip(".,").lower() for word in text.split()] for text in (caption, other)]
    blocks = difflib.SequenceMatcher(None, *plain, autojunk=False).get_matching_blocks()
    same = {i for block in blocks for i in range(block.a, block.a + block.size)}
    parts = []
    for alike, run in groupby(enumerate(caption.split()), key=lambda word: word[0] in same):
        text = escape(" ".join(word for _, word in run))
        parts.append(text if alike else f"<mark>{text}</mark>")
    return " ".join(parts)


def _missed_answers(search: Mapping[str, Any], image: Any) -> str:
    wrong = search["asked"] - search["right"]
    text = (
        f"Among all {search['candidates']:,} answers, {wrong:,} of {search['asked']:,} questions get a wrong one first "
        f"({_number(wrong / search['asked'])} %). The first such mistake at each of a scene's questions:"
    )
    cards = "".join(_asked(item, image) for item in search["missed_answers"])
    return section("Mistakes: image + question → answer", text, f'<div class="cards">{cards}</div>')


def _run(record: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    train, after, machine = results["train"], results["after"], results["train"]["machine"]
    settings = record["asked"]["recipe"]
    loss = settings["loss"]
    facts = {
        "command": f"<code>{escape(train['command'])}</code>",
        "machine": escape(f"{machine_in_words(machine)}, {count(machine['threads'], 'thread')}, {machine['system']}"),
        "versions": escape(versions_in_words(train["versions"])),
        "model": f"{results['before']['parameters']:,} parameters, vectors of {after['dimension']} dimensions, "
        f"fingerprint <code>{escape(after['model'][:16])}</code>",
        "training": f"{train['steps']:,} steps of {settings['batch']['size']} images, "
        f"{results['before']['pairs_per_step']} pairs each; turns {escape(settings['turns']['mode'])}, "
        f"temperature {loss['temperature']:g}{', both directions' if loss['symmetric'] else ''}",
        "data": f"{results['scenes']['train']:,} scenes for training, {results['scenes']['test']:,} for these scores, "
        f"seed {record['asked']['seed']}, fingerprint <code>{escape(after['data'][:16])}</code>",
        "finished": escape(train["finished"]),
    }
    items = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts.items())
    return section(
        "What was run",
        "All figures of this page are in demo.json beside it, the loss curve and the whole recipe in run/model.",
        f'<div class="run"><div class="card scroll">{_seconds(record["stages"])}</div>'
        f'<dl class="card facts-list">{items}</dl></div>',
    )


def _seconds(stages: Mapping[str, Any]) -> str:
    rows, total = "", 0.0
    untimed = "<small>after an interruption; the time before it is not counted</small>"
    for title, stage in ((title, stages[name]) for name, title in STAGES.items() if "seconds" in stages[name]):
        rows += f"<tr><th>{title}{untimed if stage['interrupted'] else ''}</th><td>{stage['seconds']:.1f}</td></tr>"
        total += stage["seconds"]
    return f"""<table><thead><tr><th>stage</th><th>seconds</th></tr></thead><tbody>{rows}</tbody>
<tfoot><tr><th>together</th><td>{total:.1f}</td></tr></tfoot></table>"""


def _number(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"
