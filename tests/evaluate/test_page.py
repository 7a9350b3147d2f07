"""The reports say the same, no data becomes markup or a formula, and no score stands without its pool."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from muco.base.tables import markdown, print_whole, table_of_numbers
from muco.errors import OutputError
from muco.evaluate.benchmark import Failure, Shown, TaskResult
from muco.evaluate.driver import Benchmark
from muco.evaluate.page import SIDE, page, write_reports
from muco.evaluate.report import as_csv, benchmark_markdown, print_benchmark

NASTY = "<script>alert(1)</script>|*x*\n[bold]'\"&`"
MODEL = {"path": "models/<i>tiny</i>", "fingerprint": "f" * 64}
COMMAND = "muco evaluate mmeb --model <m>"


def picture(folder: Path, name: str, colour: str = "red") -> str:
    Image.new("RGB", (300, 200), colour).save(folder / name)
    return str(folder / name)


def task(name: str = "VOC2007", score: float = 0.5, **changes) -> TaskResult:
    plain = TaskResult(
        name=name,
        metric="hit@1",
        scores={"hit@1": score, "mrr": 0.625},
        queries=1000,
        candidates=(20, 20),
        chance=0.05,
        data="d" * 64,
        facts={"prompt": "first"},
    )
    return replace(plain, **changes)


def failure(query: Shown, margin: float = 0.25) -> Failure:
    right = Shown("r", "the right one")
    return Failure(margin, query, right, ((Shown("w", "a wrong one"), 0.75), (right, 0.5)))


def result_of(results, name="mmeb", overall: float | None = 0.5, model=MODEL, command=COMMAND, **told):
    scored = SimpleNamespace(fingerprint=model["fingerprint"])
    run = Benchmark(name, scored, Path("data"), Path("out"), 8, False, command=command, model_path=model["path"])
    groups = {"classification": 0.5, "vqa": None, "overall": overall}
    return run.result(results, settings={"seed": 7}, groups=groups, overall=overall, **told)


class Checked(HTMLParser):
    """Collects tags, attributes and text; every element that is opened is closed in order."""

    VOID = {"meta", "img", "br"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def assert_self_contained(checked: Checked) -> None:
    names = {tag for tag, _ in checked.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for _, attributes in checked.tags:
        assert not any(key.startswith("on") or key in ("srcset", "action") for key in attributes)
        assert attributes.get("href", "#").startswith("#")
        assert attributes.get("src", "data:").startswith("data:")


# ── tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_csv_has_a_row_per_task_group_and_overall_that_tells_where_it_comes_from():
    warned = task("OVEN local", candidates=(5, 90), chance=None, warnings=('a, "quoted"\nwarning', "another"))
    rows = rows_of(as_csv(result_of([task(), warned], warnings=["of all"])))
    assert [(r["kind"], r["name"], r["score"]) for r in rows] == [
        ("task", "VOC2007", "0.5"),
        ("task", "OVEN local", "0.5"),
        ("group", "classification", "0.5"),
        ("group", "vqa", ""),
        ("overall", "overall", "0.5"),
    ]
    assert (rows[1]["candidates_min"], rows[1]["candidates_max"], rows[1]["chance"]) == ("5", "90", "")
    assert rows[1]["warnings"] == 'a, "quoted"\nwarning | another'
    assert rows[4]["warnings"] == "of all", "those of tasks stand in their own rows"
    assert json.loads(rows[0]["scores"]) == {"hit@1": 0.5, "mrr": 0.625}
    for row in rows:
        assert (row["model"], row["model_fingerprint"]) == (MODEL["path"], MODEL["fingerprint"])
        assert json.loads(row["settings"]) == {"seed": 7} and row["command"].startswith("muco evaluate")
        assert "numpy" in json.loads(row["versions"]) and row["date"]


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", " =1", "\n@x"])
def test_no_cell_of_data_is_a_formula(name):
    rows = rows_of(as_csv(result_of([task(name, warnings=(name,))], command=name)))
    assert rows[0]["name"] == rows[0]["warnings"] == rows[0]["command"] == f"'{name}"


@given(st.text(max_size=20))
def test_any_text_survives_in_every_report(text):
    result = result_of([task(text, facts={"note": text}, warnings=(text,))])
    for row in rows_of(as_csv(result)):
        assert all(not value.lstrip()[:1] or value.lstrip()[0] not in "=+-@" for value in row.values())
    tables = [line for line in benchmark_markdown(result).split("\n") if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables} == {3, 7}
    assert_self_contained(Checked(page(result, [task(text, failures=(failure(Shown(text, text)),))])))


def test_markdown_shows_data_as_it_is():
    assert markdown("a|b_c _d_ <i>\n*x* \\") == r"a\|b_c \_d\_ \<i\> \*x\* \\"
    text = benchmark_markdown(result_of([task(warnings=("low",))], missing=["GQA"]))
    assert "| VOC2007 | hit@1 | 50.0 | 5.0 | 1,000 | 20 |" in text
    assert "| vqa | – |" in text and "| overall | 50.0 |" in text
    assert text.index("**Warning:** no data was found for GQA") < text.index("| task |")
    assert "**Warning:** VOC2007: low" in text and "- VOC2007: prompt: first" in text
    assert f"- fingerprint: {'f' * 64}" in text and "- settings: seed: 7" in text


def test_a_missing_overall_is_said_everywhere():
    result = result_of([task()], overall=None)
    stream = io.StringIO()
    print_benchmark(result, Console(file=stream, width=120))
    assert rows_of(as_csv(result))[-1]["score"] == ""
    for text in (as_csv(result), benchmark_markdown(result), page(result, []), stream.getvalue()):
        assert "not all tasks were scored" in text


@pytest.mark.parametrize("width", [20, 50, 80])
def test_a_narrow_terminal_cuts_no_word_and_no_number(width):
    rows = [("image to caption", "1,000", "-1.00 to +3.40"), ("VisualNews_t2i", "12", "0.0")]
    table, stream = table_of_numbers("Shares, %", ("task", "queries", "interval")), io.StringIO()
    for cells in rows:
        table.add_row(*cells)
    print_whole(table, Console(file=stream, width=width))
    lines = [re.split(r" {2,}", line.strip()) for line in stream.getvalue().splitlines()]
    assert {"…"}.isdisjoint(stream.getvalue()) and ["task", "queries", "interval"] in lines
    for name, *numbers in rows:
        first = next(i for i, cells in enumerate(lines) if cells[1:] == numbers)
        names = [lines[first][0]]
        for cells in lines[first + 1 :]:
            if len(cells) > 1 or not cells[0]:
                break
            names += cells
        assert " ".join(names) == name


def test_the_terminal_shows_names_and_warnings_as_text():
    result = result_of([task("[red]x[/red]", warnings=("[link=x]low",))], warnings=["all"])
    stream = io.StringIO()
    print_benchmark(result, Console(file=stream, width=140))
    text = stream.getvalue()
    assert re.search(r"\[red\]x\[/red\]\W+hit@1\W+50\.0\W+5\.0\W+1,000\W+20", text)
    assert "Warning: all" in text and "Warning: [red]x[/red]: [link=x]low" in text
    assert re.search(r"classification\W+50\.0", text) and re.search(r"vqa\W+–", text)


# ── the page ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_all_four_files_are_written_whole(tmp_path):
    results = [task()]
    result = result_of(results)
    write_reports(tmp_path / "out", result, results)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["mmeb.csv", "mmeb.html", "mmeb.json", "mmeb.md"]
    assert json.loads((tmp_path / "out" / "mmeb.json").read_text())["tasks"]["VOC2007"]["score"] == 0.5
    assert (tmp_path / "out" / "mmeb.html").read_text().endswith("</html>\n")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"mmeb.json: cannot be written .* choose another output folder"):
        write_reports(tmp_path / "file", result, results)


def test_the_page_is_one_safe_file_in_which_data_is_text(tmp_path):
    image = picture(tmp_path, "a <b>.png")
    bad = failure(Shown(NASTY, NASTY, (image, str(tmp_path / "<gone>.png"))))
    results = [task(NASTY, facts={NASTY: NASTY}, warnings=(NASTY,), failures=(bad,))]
    result = result_of(results, command=NASTY, model={"path": NASTY, "fingerprint": NASTY})
    checked = Checked(page(result, results))
    assert_self_contained(checked)
    [shown] = checked.all("img")
    assert shown["alt"] == "a <b>.png"
    with Image.open(io.BytesIO(base64.b64decode(shown["src"].partition(",")[2]))) as small:
        assert small.format == "JPEG" and max(small.size) == SIDE
    text = "".join(checked.text)
    assert NASTY in text and "<gone>.png: the image is missing or cannot be read" in text
    assert checked.all("details") == [{"class": "card worst", "open": None}]


def test_a_bar_is_as_long_as_its_score_with_a_mark_at_chance():
    text = page(result_of([task()]), [])
    card = re.search(r"<h3>VOC2007</h3>(.*?)</li>", text, re.DOTALL)[1]
    assert 'style="width:50.00%"' in card and 'style="left:5.00%"' in card and '<span class="value">50.0</span>' in card
    assert text.count('class="bar"') == 4, "two groups, the overall score and the task"


def test_links_lead_to_sections_and_tables_can_be_scrolled_by_keyboard():
    checked = Checked(page(result_of([task(), task("OVEN local", metric="mrr")]), []))
    ids = [section["id"] for section in checked.all("section")]
    assert [link["href"] for link in checked.all("a")] == [f"#{name}" for name in ids] and len(ids) == 4
    scrolled = [box for box in checked.all("div") if "scroll" in (box.get("class") or "")]
    assert len(scrolled) == 1 and all(box["tabindex"] == "0" and box["aria-label"] for box in scrolled)
    assert "counts: mrr" in "".join(checked.text) and "counts:" not in page(result_of([task()]), [])


def test_no_score_stands_without_its_pool():
    names = [f"OVEN t6 {pool}" for pool in ("local", "global")]
    result = result_of([task(name) for name in names], name="mbeir")
    result["groups"] = {"overall local": 0.5, "overall global": 0.25}
    text = page(result, [])
    cards = dict(re.findall(r"<h3>([^<]*)</h3>(.*?)</li>", text, re.DOTALL))
    assert list(cards) == ["overall local", "overall global", *names], "no third overall"
    leads = re.findall(r'class="lead"><b>(.*?)<small>%</small></b> <span>(.*?)</span>', text)
    assert leads == [("50.0", "overall local"), ("25.0", "overall global")], "no score without its pool"
    assert "| overall |" not in benchmark_markdown(result) and "| overall global | 25.0 |" in benchmark_markdown(result)


def test_warnings_stand_above_all_scores_and_at_their_task():
    text = page(result_of([task(warnings=("collapsed",))], missing=["GQA", "VizWiz"]), [])
    assert text.index('role="alert"') < text.index("<main>") < text.index('<p class="flag">collapsed</p>')
    assert "no data was found for GQA, VizWiz" in text and "VOC2007: collapsed" in text
    assert "alert" not in page(result_of([task()]), [])


def test_failures_show_query_right_and_found_with_scores_and_clip_long_text():
    long = "word " * 400
    bad = failure(Shown("q7", long), margin=0.125)
    text = page(result_of([task()]), [task(failures=(bad,))])
    assert "the best wrong candidate leads by 0.125" in text and "0.750" in text and "0.500" in text
    assert "the right one" in text and "a wrong one" in text and "q7" in text
    assert text.count("word ") < 130 and "… (1,999 characters)" in text
    assert text.index('title="wrong"') < text.index('title="right"'), "the wrong one was found first"


def test_thumbnails_are_bounded_fair_and_counted(tmp_path):
    colours = ["red", "green", "blue", "white", "black", "gray"]
    images = [picture(tmp_path, f"{colour}.png", colour) for colour in colours]
    one = task("one", failures=tuple(failure(Shown(f"a{i}", images=(images[i],))) for i in range(3)))
    two = task("two", failures=tuple(failure(Shown(f"b{i}", images=(images[3 + i],))) for i in range(3)))
    results = [one, two]
    result = result_of(results)
    whole = page(result, results)
    sizes = [len(uri) for uri in re.findall(r'src="([^"]*)"', whole)]
    assert len(sizes) == 6 and "Left out" not in whole
    room = sizes[0] + sizes[1] + sizes[3] + 1  # for red, green and white, in the order in which they take their room
    small = page(result, results, thumbnails=sum(sizes[:1] + sizes[3:4]) + 1)
    assert re.findall(r'alt="([^"]*)"', small) == ["red.png", "white.png"], "the worst of each task"
    assert "Left out, so that the page stays small: 4 images" in small and "green.png: left out" in small
    assert re.findall(r'alt="([^"]*)"', page(result, results, thumbnails=room)) == [
        *("red.png", "green.png", "white.png"),
    ]
    assert page(result, results) == whole, "the same page every time"


def test_the_page_opens_in_a_browser(tmp_path):
    browser = Path("/usr/bin/chromium")
    if not browser.exists() or not shutil.which(str(browser)):
        pytest.skip("there is no /usr/bin/chromium to open the page in")
    bad = failure(Shown("q", NASTY, (picture(tmp_path, "a.png"),)))
    results = [task(failures=(bad,), warnings=("low",))]
    write_reports(tmp_path, result_of(results), results)
    flags = "--headless --no-sandbox --disable-gpu --disable-background-networking --virtual-time-budget=2000".split()
    shot = tmp_path / "shot.png"
    where = [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=500,900", f"--screenshot={shot}"]
    address = (tmp_path / "mmeb.html").as_uri()
    subprocess.run([browser, *flags, *where, address], check=True, capture_output=True, timeout=300)
    with Image.open(shot) as image:
        assert len(image.convert("RGB").getcolors(1 << 20)) > 50, "the page is blank"
    dom = subprocess.run(
        [browser, *flags, where[0], "--dump-dom", address], check=True, capture_output=True, timeout=300
    )
    text = dom.stdout.decode()
    assert "Worst failures" in text and "alert(1)" in text and "<script" not in text
