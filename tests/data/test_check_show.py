"""The data report counts what a slow recount counts and lists every planted fault; the sheet is one safe file."""

from __future__ import annotations

import base64
import io
import json
import re
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from muco.data import check_report
from muco.data.check import NO_KIND, check
from muco.data.check_report import Repeats, Report, TextLengths, print_report
from muco.data.jsonl import write_jsonl
from muco.data.show import show
from muco.dialogue import Sample, Turn
from muco.errors import CheckpointError, DataError, OutputError


def picture(path, color=0, size=(30, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (color, 0, 0)).save(path)
    return path


def row(image=None, target="t", query="q", **turn):
    return ({"image": image} if image else {}) | {"turns": [{"query": query, "target": target, **turn}]}


@pytest.fixture
def faulty(tmp_path):
    """Six good rows and one of each fault."""
    for i in range(3):
        picture(tmp_path / f"{i}.png", i)
    (tmp_path / "cut.png").write_bytes(picture(tmp_path / "x.png").read_bytes()[:60])
    rows = [row(f"{i % 3}.png", "yes" if i < 4 else f"other {i}", kind="closed") for i in range(5)]
    rows.append(row(query="a", target={"image": "2.png"}))
    rows.append(row("gone.png"))
    rows.append(row("cut.png"))
    rows.append(row("0.png", target="say <|emb|>"))
    rows.append(row("0.png") | {"idd": "x"})
    write_jsonl(tmp_path / "train.jsonl", rows)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('\n{"turns": [}\n' + json.dumps(row("1.png")) + "\n")
    return tmp_path / "train.jsonl"


# ── check ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_check_goes_on_and_names_every_fault(faulty):
    report = check(faulty)
    assert not report.ok
    assert (report.rows, report.samples, report.turns, report.images) == (12, 10, 10, 5)
    assert report.bad_rows.listed == [
        f"{faulty}:10: unknown key 'idd' in a row; did you mean 'id'?",
        f"{faulty}:12:12: malformed JSON: Expecting value",
    ]
    assert report.missing_images.listed == [f"{faulty}:7: {faulty.parent / 'gone.png'}: no such image file"]
    [broken] = report.broken_images.listed
    assert broken.startswith(f"{faulty}:8: {faulty.parent / 'cut.png'}: the image is truncated or broken")
    [special] = report.special_tokens.listed
    assert special.startswith(f"{faulty}:9 turn 1: the text contains the special token '<|emb|>'")
    assert check(faulty.parent).as_dict() == report.as_dict()


def test_without_opening_images_missing_ones_are_still_found(faulty):
    report = check(faulty, images=False)
    assert (report.missing_images.total, report.broken_images.total, report.images) == (1, 0, 5)


def test_each_fault_alone_makes_the_report_not_ok(tmp_path):
    picture(tmp_path / "a.png")
    path = tmp_path / "a.jsonl"
    special = [row("a.png", target="<|im_end|>"), row("a.png", negatives=["<|mask|>"])]
    faults = [row("b.png"), row("a.png", kind=1), *special]
    for fault in [None, *faults]:
        write_jsonl(path, [row("a.png"), *([fault] if fault else [])])
        assert check(path).ok == (fault is None)
    (tmp_path / "a.png").write_bytes(b"no image")
    write_jsonl(path, [row("a.png")])
    assert not check(path).ok and check(path, images=False).ok


def test_every_image_is_opened_once_and_in_row_order(tmp_path, monkeypatch):
    paths = [picture(tmp_path / f"{i}.png", i) for i in range(40)]
    for path in paths[::3]:
        path.write_bytes(b"broken")
    write_jsonl(tmp_path / "a.jsonl", [row(f"{i % 40}.png") for i in range(400)])
    opened, real = [], Image.open
    monkeypatch.setattr(Image, "open", lambda *given, **options: opened.append(0) or real(*given, **options))
    report = check(tmp_path / "a.jsonl")
    assert len(opened) == report.images == 40
    assert [re.search(r"jsonl:(\d+)", m)[1] for m in report.broken_images.listed] == [str(i) for i in range(1, 41, 3)]


def test_copies_of_an_image_are_one_target(tmp_path):
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    rows = [{"turns": [{"query": "q", "target": {"image": name}}]} for name in ("a.png", "b.png")]
    write_jsonl(tmp_path / "a.jsonl", rows)
    repeats = check(tmp_path / "a.jsonl").kinds[NO_KIND]
    assert repeats.share == 1 and repeats.most_frequent == [(f"[image {tmp_path / 'a.png'}]", 2)]
    assert check(tmp_path / "a.jsonl", images=False).kinds[NO_KIND].share == 0, "nothing was read"


def test_lists_are_capped_and_totals_are_not(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [row(f"{i}.png") for i in range(75)])
    missing = check(tmp_path / "a.jsonl").missing_images
    assert (missing.total, len(missing.listed)) == (75, check_report.MAX_LISTED)


class Samples(list):
    """Data without files."""

    fingerprint = "0" * 64


kinds = st.sampled_from([None, "a", "b"])
words = st.sampled_from(["", "x", "x y", "x  y\nz"])
sample_lists = st.lists(
    st.builds(
        Sample, st.just(b"image"), st.lists(st.builds(Turn, words, words.filter(bool), kinds), min_size=1, max_size=4)
    ),
    max_size=8,
)


@given(sample_lists)
@settings(max_examples=50)
def test_counts_equal_a_slow_recount(samples):
    report = check(Samples(samples), images=False)
    turns = [(i, turn) for i, sample in enumerate(samples) for turn in sample.turns]
    assert (report.samples, report.turns) == (len(samples), len(turns))
    assert report.turns_per_sample == Counter(len(sample.turns) for sample in samples)
    assert report.ok == bool(samples)
    for kind, repeats in report.kinds.items():
        mine = [(i, turn.target[0].text) for i, turn in turns if (turn.kind or NO_KIND) == kind]
        elsewhere = [any(text == other and i != j for j, other in mine) for i, text in mine]
        assert repeats.turns == len(mine)
        assert repeats.distinct == len({text for _, text in mine})
        assert repeats.share == pytest.approx(np.mean(elsewhere))
        expected = Counter(text for (_, text), repeated in zip(mine, elsewhere, strict=True) if repeated)
        assert dict(repeats.most_frequent) == expected
    for side in ("query", "target"):
        lengths = [len(text.split()) for _, turn in turns if (text := getattr(turn, side)[0].text)]
        if not lengths:
            assert report.words[side] == TextLengths()
            continue
        median, p95 = (int(np.quantile(lengths, q, method="inverted_cdf")) for q in (0.5, 0.95))
        assert report.words[side] == TextLengths(
            len(lengths), pytest.approx(np.mean(lengths)), median, p95, max(lengths)
        )


def test_images_in_memory_are_checked_too():
    good, bad = io.BytesIO(), b"no image"
    Image.new("RGB", (30, 30)).save(good, "PNG")
    lazy = Image.open(io.BytesIO(good.getvalue()[:60]))
    turn = Turn("q", {"image": bad})
    report = check(Samples([Sample(good.getvalue(), [turn]), Sample(good.getvalue(), [turn]), Sample(lazy, [turn])]))
    assert (report.images, report.broken_images.total, report.missing_images.total) == (3, 2, 0)
    assert report.kinds[NO_KIND].share == 1


@pytest.fixture
def tokenizer_folder(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"[unk]": 0, "q": 1, "t": 2, "<image>": 3}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[unk]"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="[unk]", additional_special_tokens=["<image>"]
    ).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_lengths_in_tokens_and_the_tokenizers_own_special_tokens(tmp_path, tokenizer_folder):
    picture(tmp_path / "a.png")
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [row("a.png", query="q!q", target="t"), row("a.png", target="t <image>")])
    report = check(path, tokenizer=tokenizer_folder)
    assert report.tokens["query"] == TextLengths(texts=2, mean=2.0, median=1, p95=3, max=3)
    assert [message.split(": ")[0] for message in report.special_tokens.listed] == [f"{path}:2 turn 1"]
    assert check(path).special_tokens.total == 0 and check(path).tokens is None
    write_jsonl(path, [row("a.png", query="", target={"image": "a.png"})])  # neither side has a text
    assert check(path, tokenizer=tokenizer_folder).tokens["target"] == TextLengths()


def test_no_tokenizer_is_the_users_error(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [row()])
    (tmp_path / "model").mkdir()
    with pytest.raises(CheckpointError, match="model: cannot load a tokenizer from it"):
        check(tmp_path / "a.jsonl", tokenizer=tmp_path / "model")


def test_the_report_is_json_and_a_table(faulty):
    report = check(faulty)
    plain = report.as_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["ok"] is False and plain["turns_per_sample"] == {"1": 10}
    assert plain["kinds"]["closed"] == {"turns": 5, "distinct": 2, "share": 0.8, "most_frequent": [["yes", 4]]}

    console = Console(file=io.StringIO(), width=100)
    print_report(report, console)
    printed = console.file.getvalue()
    for findings in report.problems.values():
        assert all(message in printed for message in findings.listed)
    assert "not ok" in printed and "yes (4)" in printed and "80%" in printed


@pytest.mark.parametrize("width", [30, 40, 60, 80, 200])
def test_the_report_cuts_no_name_and_no_number(width):
    names = ("classification", "of-twenty-chars-in-all")
    kinds = {name: Repeats(1_234_567, 7_055, 0.99, [("a ring", 1_200)]) for name in names}
    words = {side: TextLengths(8_234_567, 12.3, 11, 40, 12_345) for side in ("query", "target")}
    report = Report("a.jsonl", rows=2_400, samples=2_399, turns_per_sample={7: 2_399}, kinds=kinds, words=words)
    console = Console(file=io.StringIO(), width=width)
    print_report(report, console)
    printed = console.file.getvalue()
    heads = ("rows", "samples", "kind", "turns", "distinct", "repeated", "texts", "mean", "median", "95 %", "max")
    for word in [
        *heads,
        *names,
        "2,400",
        "2,399",
        "1,234,567",
        "7,055",
        "99%",
        "(1,200)",
        "8,234,567",
        "12.3",
        "12,345",
    ]:
        assert word in printed
    assert "…" not in printed


def test_data_is_no_markup(tmp_path):
    text = "[bold red]x[/] [/nothing]"
    write_jsonl(tmp_path / "a.jsonl", [row(target=text, kind=text), row(target=text, kind=text), row(**{text: 1})])
    console = Console(file=io.StringIO(), width=200)
    print_report(check(tmp_path / "a.jsonl"), console)
    assert console.file.getvalue().count(text) == 3


# ── show ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Page(HTMLParser):
    def __init__(self, path):
        super().__init__()
        self.tags, self.sources, self.words, self.open = Counter(), [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.sources += [value for key, value in attributes if key in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_sheet_is_one_file_without_outside_parts(faulty, tmp_path):
    page = Page(show(faulty, tmp_path / "new" / "sheet.html"))
    assert page.open == [] and page.tags["article"] == 12
    assert page.tags["script"] == page.tags["link"] == 0
    assert len(page.sources) == 8 and all(source.startswith("data:image/png;base64,") for source in page.sources)
    text = " ".join(page.words)
    assert "gone.png: no such image file" in text and "unknown key 'idd'" in text and "malformed JSON" in text
    assert "url(" not in text and "@import" not in text
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["sheet.html"]


@given(st.text(st.characters(codec="utf-8"), max_size=20))
@settings(max_examples=30)
def test_text_of_the_data_is_never_html(tmp_path_factory, text):
    text += "<script>alert('1')</script>\"&'"
    folder = tmp_path_factory.mktemp("set")
    picture(folder / "a.png")
    hostile = row("a.png", text, [text, text], kind=text, negatives=[text]) | {"id": text}
    write_jsonl(folder / "a.jsonl", [hostile, row("a.png", **{text: 1})])
    page = Page(show(folder, folder / "sheet.html"))
    assert page.tags["script"] == 0 and page.open == []
    assert "".join(page.words).count("<script>alert(") == 8  # legend, id, badge, two queries, target, negative, error


def test_a_card_says_where_its_sample_is(tmp_path):
    from muco.data.show import _card

    for where, said in (("/data/a.jsonl:7", "line 7"), ("/data/M3T.parquet row 5", "M3T.parquet row 5"), ("", "")):
        sample = Sample(turns=[Turn("q", "t")], where=where)
        assert f"<span>{said}</span>" in _card(sample, {})


def test_large_images_are_shrunk_and_small_ones_kept_exact(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (900, 1200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    Image.fromarray(noise[:8, :8]).save(tmp_path / "small.png")
    write_jsonl(tmp_path / "a.jsonl", [row("large.png"), row("small.png")])
    page = Page(show(tmp_path, tmp_path / "sheet.html"))
    thumbs = [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in page.sources]
    assert thumbs[0].width / thumbs[0].height == pytest.approx(4 / 3, abs=0.01)
    assert thumbs[0].width * thumbs[0].height <= 480 * 480
    assert np.array_equal(thumbs[1], noise[:8, :8])


def test_samples_are_drawn_by_seed(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [row(target=f"target {i}.") for i in range(50)])

    def shown(name, **options):
        page = show(tmp_path / "a.jsonl", tmp_path / name, **options).read_text()
        return re.findall(r"target (\d+)\.", page)

    assert shown("a.html", limit=10) == shown("b.html", limit=10)
    assert len(set(shown("a.html", limit=10))) == 10
    assert shown("a.html", limit=10) != shown("c.html", limit=10, seed=1)
    assert shown("a.html", limit=99) == [str(i) for i in range(50)]
    with pytest.raises(ValueError, match="limit must be at least 1"):
        shown("a.html", limit=0)


def test_only_an_earlier_sheet_is_overwritten(tmp_path):
    data, output = tmp_path / "a.jsonl", tmp_path / "sheet.html"
    write_jsonl(data, [row()])
    first = show(data, output).read_text()
    assert show(data, output).read_text() == first
    for other in (data, tmp_path):
        with pytest.raises(OutputError):
            show(data, other)
    assert len(check(data).kinds) == 1
    with pytest.raises(DataError, match="no such file"):
        show(tmp_path / "none.jsonl", tmp_path / "none.html")
    assert not (tmp_path / "none.html").exists()


def test_long_samples_are_cut_with_a_line_that_says_so(tmp_path):
    picture(tmp_path / "a.png")
    turn = {"query": "q", "target": "t"}
    write_jsonl(tmp_path / "a.jsonl", [{"images": ["a.png"] * 11, "turns": [turn] * 30}])
    page = Page(show(tmp_path, tmp_path / "sheet.html"))
    assert page.tags["img"] == 8
    assert "… and 6 more turns" in page.words and "… and 3 more" in page.words
