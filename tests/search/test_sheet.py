"""Pages of what queries find: every hit, in order, and nothing of a stranger's text as HTML."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import pytest
from PIL import Image

import muco
from muco.cli import main
from muco.search import Hit, Index
from muco.search.sheet import read_queries, search_folder, write_sheet


def jpeg(colour: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (20, 10), colour).save(stream, "JPEG")
    return stream.getvalue()


def captions(page: str) -> list[str]:
    return re.findall(r"<figcaption>(.*?)</figcaption>", page)


def test_pictures_and_texts_in_the_order_in_which_they_were_found(tmp_path):
    file = tmp_path / "found.html"
    red, blue = jpeg("red"), jpeg("blue")
    hits = [Hit("a", 0.9, thumbnail=red, extra={"title": "one"}), Hit("b", 0.8, text="a poem", extra={"title": None})]
    write_sheet(file, {"a cat": hits, "a dog": [Hit("c", 0.7, thumbnail=blue)]}, caption="title", title="Found")
    page = file.read_text(encoding="utf-8")
    assert captions(page) == ["one", "b", "c"]
    with pytest.raises(muco.MucoError, match=r"caption 'tittle': the index has no such column; did you mean 'title'\?"):
        write_sheet(file, {"a cat": hits}, caption="tittle")
    assert [base64.b64decode(data) for data in re.findall('src="data:image/jpeg;base64,([^"]+)"', page)] == [red, blue]
    assert re.findall("<h2>(.*?)</h2>", page) == ["a cat", "a dog"] and "a poem" in page and "<h1>Found</h1>" in page
    write_sheet(file, {"a cat": hits})
    assert captions(file.read_text(encoding="utf-8")) == ["a", "b"]


def test_a_strangers_text_is_no_html(tmp_path):
    file, bad = tmp_path / "found.html", '"><script>alert(1)</script>\ud800'
    hits = [Hit(bad, 1.0, text=bad), Hit(bad, 1.0, thumbnail=jpeg("red"), extra={"title": bad})]
    write_sheet(file, {bad: hits}, caption="title", title=bad)
    page = file.read_text(encoding="utf-8")
    assert "<script" not in page and page.count("&lt;script&gt;") >= 6


def test_queries_are_lines(tmp_path):
    file = tmp_path / "queries.txt"
    file.write_text("a cat\n\n  two words \r\n", encoding="utf-8")
    assert read_queries(file) == ["a cat", "two words"]
    for content, says in (
        (b" \n", "it has no queries; write one per line"),
        (b"a\n\xff\n", "not UTF-8 .*; save the file as UTF-8"),
    ):
        file.write_bytes(content)
        with pytest.raises(muco.DataError, match=rf"queries\.txt(:2)?: {says}"):
            read_queries(file)
    with pytest.raises(muco.DataError, match=r"none\.txt: cannot be read \(No such file"):
        read_queries(tmp_path / "none.txt")
    file.write_bytes("\ufeffa dog\na cat".encode())  # as programs of Windows write it
    assert read_queries(file) == ["a dog", "a cat"]


def test_any_value_of_any_column_can_be_the_caption(tmp_path):
    file, hit = tmp_path / "found.html", Hit("a", 0.9, text="words", extra={"n": 0, "sure": False})
    for column, said in (("n", "0"), ("sure", "False"), ("text", "words"), ("id", "a"), ("image", "a")):
        write_sheet(file, {"asked": [hit]}, caption=column)
        assert captions(file.read_text(encoding="utf-8")) == [said]


def test_another_folder_replaces_all_pictures(tmp_path: Path, tiny_path: Path) -> None:
    both = {"one": ["a", "b"], "two": ["c"]}
    for number, (folder, names) in enumerate(both.items()):
        (tmp_path / folder).mkdir()
        for name in names:
            Image.new("RGB", (40 + number, 40), (ord(name), 0, 0)).save(tmp_path / folder / f"{name}.png")
    for folder in ("one", "two", "one"):
        page = search_folder(tmp_path / folder, tmp_path / "demo", str(tiny_path))
        expected = {f"{name}.png" for name in both[folder]}
        assert set(captions(page.read_text(encoding="utf-8"))) == expected
        with pytest.raises(muco.DataError):  # which changes nothing
            search_folder(tmp_path / "none", tmp_path / "demo", str(tiny_path))
        assert {id for ids in Index.open(tmp_path / "demo/pictures.index").ids() for id in ids} == expected
    (tmp_path / "one" / "b.png").unlink()
    search_folder(tmp_path / "one", tmp_path / "demo", str(tiny_path))
    assert len(Index.open(tmp_path / "demo/pictures.index")) == 1


@pytest.mark.slow
def test_pages_of_the_commands(scenes: Path, tiny_path: Path, tmp_path: Path, capsys) -> None:
    images = scenes / "images/test"
    page = search_folder(images, tmp_path / "demo", str(tiny_path))
    assert page == tmp_path / "demo" / "pictures.html"
    assert f"muco serve --model {tiny_path} --index {tmp_path}/demo/pictures.index" in capsys.readouterr().err
    text = page.read_text(encoding="utf-8")
    assert text.count("<section") == 24 and len(captions(text)) == 240

    queries, index, sheet = tmp_path / "queries.txt", tmp_path / "demo" / "pictures.index", tmp_path / "sheet.html"
    queries.write_text("a red star\na blue ring\n")
    ask = ["search", "--index", str(index), "--exact", "-k", "3"]
    assert main([*ask, "--queries", str(queries), "--page", str(sheet)]) == 0
    assert capsys.readouterr().out == f"{sheet}\n"
    both = captions(sheet.read_text(encoding="utf-8"))
    assert main([*ask, "--text", "a red star", "--json"]) == 0
    assert both[:3] == re.findall(r'"id": "(.*?)"', capsys.readouterr().out) and len(both) == 6
    assert main([*ask, "--image", str(images / "00003.png"), "--page", str(sheet)]) == 0
    assert captions(sheet.read_text(encoding="utf-8"))[0] == "00003.png"
    for more, says in (
        (["--queries", str(queries)], "pass --page FILE.html too"),
        (["--text", "x", "--caption", "title"], "--caption is for a page"),
        (["--queries", str(queries), "--page", str(sheet), "--text", "x"], "takes the place of --text"),
        (["--text", "x", "--page", str(sheet), "--json"], "exclude each other"),
    ):
        capsys.readouterr()
        assert main([*ask, *more]) == 2
        assert says in " ".join(capsys.readouterr().err.split())
