"""Pass one of making data: sources of pictures, one look at each, and the catalogue of those that are kept."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import random
import signal
import sqlite3
import struct
import sys
import tarfile
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from muco.base.fetch import FetchError, FetchLimits, without_query
from muco.errors import DataError, ImageError, MucoError, OutputError
from muco.synth import catalogue as catalogue_module
from muco.synth import pictures as pictures_module
from muco.synth.catalogue import Catalogue, Kept, fill, first_near
from muco.synth.pictures import (
    ASPECT,
    DUPLICATE,
    NEAR_DUPLICATE,
    NOT_FETCHED,
    TOO_SMALL,
    UNREACHABLE,
    UNREADABLE,
    Filter,
    Look,
    look,
    look_at_all,
    look_at_some,
    perceptual_hash,
)
from muco.synth.sources import Picture, Source, open_source

SMALL = Filter(min_side=40, max_aspect=2.0)


def examples(catalogue: Catalogue, reason: str, n: int) -> list[tuple[str, str]]:
    """Name and note of the first ``n`` pictures that were left out for a reason."""
    query = "SELECT name, note FROM pictures WHERE place IS NULL AND reason = ? ORDER BY number LIMIT ?"
    return catalogue._database.execute(query, (reason, n)).fetchall()


def photo(seed: int, width: int = 96, height: int = 72) -> Image.Image:
    """Noise smoothed at several scales: like photos, most of it is in the low frequencies."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for size in (3, 6, 12, 24):
        noise = Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))
        total += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC)) / size
    total -= total.min()
    return Image.fromarray((total * (255 / total.max())).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_urls(path: Path, urls: list[Any], **columns: list[Any]) -> Path:
    pq.write_table(pa.table({"url": urls, **columns}), path, row_group_size=2)
    return path


def bomb(side: int = 20_000) -> bytes:
    """A PNG of a few kilobytes that says it is side x side."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9999))) + chunk(b"IEND", b"")
    )


def rows_of(path: Path) -> list[tuple[Any, ...]]:
    database = sqlite3.connect(path)
    try:
        return database.execute("SELECT * FROM pictures ORDER BY number").fetchall()
    finally:
        database.close()


def stored(store: Path) -> list[str]:
    return sorted(str(file.relative_to(store)) for file in store.rglob("*") if file.is_file())


def filled(out: Path, source: Source, filter: Filter = SMALL, **options: Any) -> dict[str, int]:
    with Catalogue(out / "pictures.db", source.fingerprint, filter) as catalogue:
        fill(catalogue, source, filter, out / "images", **options)
        assert catalogue.complete
        return catalogue.counts()


# ── sources ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def check_source(source: Source, names: list[str], contents: list[bytes]) -> None:
    """Names, numbers and bytes, from every start, also in another process."""
    everything = list(source.pictures())
    assert [picture.name for picture in everything] == names
    assert [picture.number for picture in everything] == [*range(len(names))]
    for start in range(len(names) + 2):
        assert list(source.pictures(start)) == everything[start:]
    again = pickle.loads(pickle.dumps(source))
    assert again == source and list(again.pictures()) == everything
    assert [again.read(picture.ref) for picture in everything] == contents


def test_a_folder_gives_its_images_and_those_below(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = {"b.png": b"b", "a/2.JPG": b"a2", "a/1.webp": b"a1", "a.jpg": b"a", "phone.HEIC": b"", ".x.png": b""}
    source = open_source(write_folder(tmp_path, files))
    assert "files of other kinds are passed over: 1 .heic" in caplog.text
    check_source(source, ["a.jpg", "a/1.webp", "a/2.JPG", "b.png"], [b"a", b"a1", b"a2", b"b"])
    assert source.total == 4 and source.root == tmp_path


def test_names_that_are_no_utf8_do_not_stop_a_folder(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")).write_bytes(b"x")
    (tmp_path / "é.png").write_bytes(encoded(photo(0), "PNG"))
    source = open_source(tmp_path)
    assert filled(tmp_path / "out", source) == {"pictures": 2, "kept": 1, UNREADABLE: 1}


def test_urls_come_from_parquet_files_row_by_row(tmp_path: Path) -> None:
    urls = ["http://a/1.png?key=secret", None, "http://user:pass@b/2.png#x", " ", "x" * 999]
    write_urls(tmp_path / "2.parquet", ["http://c/3.png"])
    write_urls(tmp_path / "1.parquet", urls)
    source = open_source(tmp_path)
    pictures = list(source.pictures())
    assert [p.name for p in pictures] == [
        *("http://a/1.png", "1.parquet row 1", "http://b/2.png", "1.parquet row 3", "x" * 300, "http://c/3.png")
    ]
    assert [p.ref for p in pictures] == [urls[0], "", urls[2], "", urls[4], "http://c/3.png"]
    assert [p.number for p in pictures] == [*range(6)] and source.total == 6 and source.root is None
    for start in range(8):
        assert list(source.pictures(start)) == pictures[start:]
    assert pickle.loads(pickle.dumps(source)) == source
    with pytest.raises(FetchError, match="the row has no URL"):
        source.read("")


def test_columns_of_urls_and_names_may_be_named(tmp_path: Path) -> None:
    table = {"URL": pa.array(["http://a/1", "http://a/2"]).dictionary_encode(), "id": [7, None], "other": ["x", "y"]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    assert [p.name for p in open_source(tmp_path / "a.parquet").pictures()] == ["http://a/1", "http://a/2"]
    named = open_source(tmp_path / "a.parquet", name_column="id")
    assert [(p.name, p.ref) for p in named.pictures()] == [("7", "http://a/1"), ("http://a/2", "http://a/2")]
    other = open_source(tmp_path / "a.parquet", url_column="other")
    assert [p.ref for p in other.pictures()] == ["x", "y"]
    assert len({named.fingerprint, other.fingerprint, open_source(tmp_path / "a.parquet").fingerprint}) == 3
    with pytest.raises(DataError, match="a.parquet: no column 'urls'; is it 'URL'|a.parquet: no column 'urls'"):
        open_source(tmp_path / "a.parquet", url_column="urls")
    with pytest.raises(DataError, match="a.parquet: the column 'id' must hold URLs as strings, not int64"):
        open_source(tmp_path / "a.parquet", url_column="id")


def test_shards_give_their_images_only(tmp_path: Path) -> None:
    members = {"./1.jpg": b"one", "1.txt": b"caption", "1.json": b"{}", "x/2.PNG": b"two", "2.seg.png": b"mask"}
    write_tar(tmp_path / "b.tar", {"9.jpeg": b"nine", "9.cls": b"4"})
    shard = write_tar(tmp_path / "a.tar", members | {"../3.jpg": b"outside", "4.webp": b"four", "5.svg": b"<svg>"})
    with tarfile.open(shard, "a") as archive:
        link = tarfile.TarInfo("6.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    write_tar(tmp_path / "empty.tar", {"1.txt": b"no image"})
    source = open_source(tmp_path)
    names = ["a.tar/1.jpg", "a.tar/x/2.PNG", "a.tar/4.webp", "b.tar/9.jpeg"]
    check_source(source, names, [b"one", b"two", b"four", b"nine"])
    assert source.total is None and source.root is None
    assert [p.name for p in open_source(shard).pictures()] == names[:3]


def test_a_shard_that_changed_or_is_damaged_is_named(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", {"1.jpg": b"one", "2.jpg": b"two"})
    source = open_source(shard)
    ref = next(source.pictures()).ref
    write_tar(shard, {"1.jpg": b"one" * 9999})
    with pytest.raises(DataError, match=r"a.tar: the file changed since it was opened"):
        source.read(ref)
    content = bytearray(shard.read_bytes())
    content[150] ^= 0xFF  # the check sum of the first header
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"a.tar: not a whole plain tar archive"):
        next(open_source(shard).pictures())
    for end in (0, 100, 512, 700, 4096):
        shard.write_bytes(bytes(content[:end]))
        with pytest.raises(DataError, match=r"a.tar: not a whole plain tar archive \(no end\); download it again"):
            open_source(shard)
    empty = open_source(write_tar(tmp_path / "b.tar", {"1.jpg": b""}))
    with pytest.raises(ImageError, match="b.tar: the image at byte 512 is empty"):
        empty.read(next(empty.pictures()).ref)


def test_the_fingerprint_changes_with_names_sizes_and_times(tmp_path: Path) -> None:
    makers = {
        "folder": lambda path, content: write_folder(path, {"1.png": content.encode()}),
        "shards": lambda path, content: write_tar(path / "1.tar", {"1.png": content.encode()}).parent,
        "urls": lambda path, content: write_urls(path / "1.parquet", [content]).parent,
    }
    for name, make in makers.items():
        folder = tmp_path / name
        folder.mkdir()
        make(folder, "short")
        (file,) = folder.iterdir()
        os.utime(file, ns=(1, 1))
        first = open_source(folder).fingerprint
        assert first == open_source(folder).fingerprint and len(first) == 64
        os.utime(file, ns=(2, 2))
        assert open_source(folder).fingerprint != first
        make(folder, "longer" * 9999)
        os.utime(file, ns=(1, 1))
        assert open_source(folder).fingerprint != first
        make(folder, "short")
        os.utime(file, ns=(1, 1))
        file.rename(file.with_stem("2"))
        assert open_source(folder).fingerprint != first


@pytest.mark.parametrize("beside", ["00000.tar", "00000/1.jpg"])
def test_a_table_beside_what_it_describes_is_not_read(tmp_path: Path, beside: str) -> None:
    write_urls(tmp_path / "00000.parquet", ["http://a/1"])
    if beside.endswith(".tar"):
        write_tar(tmp_path / beside, {"1.jpg": b"one"})
    else:
        write_folder(tmp_path, {beside: b"one"})
    source = open_source(tmp_path)
    assert [source.read(picture.ref) for picture in source.pictures()] == [b"one"]


def test_what_is_no_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone: no such file or folder"):
        open_source(tmp_path / "gone")
    with pytest.raises(DataError, match=r"no pictures here; looked for images \(.*\.jpg.*\), .parquet files, .tar"):
        open_source(tmp_path)
    for name in ("a.jpg", "a.tar.gz", "a.csv"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(DataError, match=f"{name}: pass a folder of images, a .parquet file of URLs, or a plain"):
            open_source(tmp_path / name)
    with pytest.raises(DataError, match="no .parquet files here, so there is no column 'link'"):
        open_source(tmp_path, url_column="link")
    write_tar(tmp_path / "b.tar", {"1.jpg": b"one"})
    with pytest.raises(DataError, match="both images and .tar shards; name a folder or file that has one kind"):
        open_source(tmp_path)
    (tmp_path / "c.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"c.parquet: not a readable Parquet file"):
        open_source(tmp_path / "c.parquet")
    pq.write_table(pa.table({"link": ["x"]}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match="c.parquet: no column 'url' or 'URL'; it has link; name the one"):
        open_source(tmp_path / "c.parquet")
    pq.write_table(pa.table({"url": pa.array([], pa.string())}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match="c.parquet: no rows"):
        open_source(tmp_path / "c.parquet")


def test_text_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    bad = pa.array([b"http://a", b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"url": bad}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a.parquet: text that is not UTF-8 after row 0"):
        list(open_source(tmp_path / "a.parquet").pictures())


@pytest.mark.parametrize("url", ["http://u:p@h/x?key=1#y", "http://h/x", "", "no url", "http://h?x@y"])
def test_no_secret_is_left_of_a_url(url: str) -> None:
    assert without_query(url) == {"http://u:p@h/x?key=1#y": "http://h/x", "http://h?x@y": "http://h"}.get(url, url)


# ── one look ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def look_at(folder: Path, content: bytes, filter: Filter = SMALL, name: str = "1.png") -> Look:
    source = open_source(write_folder(folder, {name: content}))
    (picture,) = source.pictures()
    return look(source, picture, filter, None)


def test_a_look_measures_upright(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn
    data = encoded(photo(1), exif=turned)
    found = look_at(tmp_path, data)
    assert (found.width, found.height, found.reason, found.file) == (72, 96, "", "1.png")
    upright = look_at(tmp_path, encoded(photo(1).transpose(Image.Transpose.ROTATE_270)))
    assert (found.phash ^ upright.phash).bit_count() <= 4 and found.digest != upright.digest
    assert found.digest == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((40, 40), ""),
        ((39, 60), TOO_SMALL),
        ((80, 40), ""),
        ((81, 40), ASPECT),
        ((40, 81), ASPECT),
        ((200, 20), TOO_SMALL),
    ],
)
def test_sides_and_aspect_decide(tmp_path: Path, size: tuple[int, int], reason: str) -> None:
    found = look_at(tmp_path, encoded(photo(0, *size)))
    assert found.reason == reason and (found.width, found.height) == size
    assert (found.note, found.file, found.phash) == (f"{size[0]} x {size[1]}", "", 0) if reason else found.file


HOSTILE = {
    "bomb": bomb(),
    "cut": encoded(photo(2), "PNG")[:-200],
    "cut jpeg": encoded(photo(2))[:-200],
    "empty": b"",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "text": b"<html>not found</html>",
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n",
    "long": encoded(Image.new("1", (20_000, 50)), "PNG"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_unreadable_and_named(tmp_path: Path, kind: str) -> None:
    found = look_at(tmp_path, HOSTILE[kind])
    assert found.reason == UNREADABLE and found.note.startswith("1.png: ") and len(found.note) <= 300
    assert (found.width, found.height, found.phash, found.file) == (0, 0, 0, "")


def test_more_pixels_than_allowed_are_not_decoded(tmp_path: Path) -> None:
    found = look_at(tmp_path, encoded(photo(0)), replace(SMALL, max_pixels=96 * 72 - 1))
    assert found.reason == UNREADABLE and "96 x 72 is over the limit of 6,911 pixels" in found.note
    assert look_at(tmp_path, encoded(photo(0)), replace(SMALL, max_pixels=96 * 72)).reason == ""


def test_a_file_that_vanished_is_unreadable(tmp_path: Path) -> None:
    source = open_source(write_folder(tmp_path, {"a/1.png": b"x"}))
    (tmp_path / "a/1.png").unlink()
    found = look(source, Picture(0, "a/1.png", "a/1.png"), SMALL, None)
    assert found.reason == UNREADABLE and found.note == "a/1.png: no such image file"


def test_files_are_stored_whole_under_their_digest_and_real_kind(tmp_path: Path) -> None:
    kinds = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}
    members = {f"{n}.png": encoded(photo(n), kind) for n, kind in enumerate(kinds.values())}  # whatever the name says
    members |= {"small.jpg": encoded(photo(9, 30, 30)), "bad.jpg": b"x"}
    source, store = open_source(write_tar(tmp_path / "a.tar", members)), tmp_path / "store"
    looks = [look(source, picture, SMALL, store) for picture in source.pictures()]
    assert [found.file.rpartition(".")[2] for found in looks] == [*kinds, "", ""]
    for found, content in zip(looks[:3], members.values(), strict=False):
        assert found.file.startswith(f"{found.digest[:2]}/{found.digest}.")
        assert (store / found.file).read_bytes() == content
    assert stored(store) == sorted(found.file for found in looks[:3])
    with pytest.raises(ValueError, match="need a store"):
        look(source, next(source.pictures()), SMALL, None)


def test_frames_of_a_camera_are_a_jpeg(tmp_path: Path) -> None:
    data = encoded(photo(1), "MPO", save_all=True, append_images=[photo(2)])
    source = open_source(write_tar(tmp_path / "a.tar", {"1.jpg": data}))
    assert look(source, next(source.pictures()), SMALL, tmp_path / "store").file.endswith(".jpg")


def test_a_store_that_cannot_be_written_stops_the_run(tmp_path: Path) -> None:
    source = open_source(write_tar(tmp_path / "a.tar", {"1.png": encoded(photo(0), "PNG")}))
    (tmp_path / "store").write_text("a file")
    with pytest.raises(OutputError, match="store: a picture cannot be stored"):
        look(source, next(source.pictures()), SMALL, tmp_path / "store")
    with pytest.raises(MucoError, match="store: a picture cannot be stored"):
        list(look_at_all(source, SMALL, tmp_path / "store", workers=2))


def test_copies_of_a_photo_are_near_and_others_are_not() -> None:
    hashes = [perceptual_hash(photo(n, 200, 150)) for n in range(40)]
    for n, first in enumerate(hashes):
        image = photo(n, 200, 150)
        copies = [image.resize((120, 90)), image.resize((300, 225), Image.Resampling.BICUBIC)]
        copies += [Image.open(io.BytesIO(encoded(image, quality=40)))]
        copies += [Image.open(io.BytesIO(encoded(image.resize((160, 120)), "WEBP", quality=50)))]
        assert max((first ^ perceptual_hash(copy)).bit_count() for copy in copies) <= Filter().near
    apart = [(a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(apart) > Filter().near


def test_copies_of_a_scene_are_near(scenes: Path) -> None:
    file = next(file for file in sorted(scenes.rglob("*.png")))
    image = Image.open(file).convert("RGB").resize((224, 224))
    assert (perceptual_hash(image) ^ perceptual_hash(image.resize((600, 600)))).bit_count() <= Filter().near


@pytest.mark.parametrize(
    "values", [{"min_side": 0}, {"max_aspect": 0.5}, {"max_aspect": float("nan")}, {"max_pixels": 0}]
)
def test_a_filter_that_makes_no_sense_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(MucoError, match="must be at least 1"):
        Filter(**values)
    for near in (-2, 17):
        with pytest.raises(MucoError, match=rf"near must be -1 \(off\) or 0 to 16 bits, not {near}"):
            Filter(near=near)


# ── many looks ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_looks_come_in_order_from_any_start_with_any_number_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {f"{n:02}.jpg": encoded(photo(n)) if n % 5 else b"bad" for n in range(23)}
    source = open_source(write_folder(tmp_path, files))
    expected = [look(source, picture, SMALL, None) for picture in source.pictures()]
    assert {found.reason for found in expected} == {"", UNREADABLE} and max(e.phash for e in expected) >= 1 << 63
    for chunk, workers, start in ((256, 16, 0), (3, 1, 0), (1, 3, 7), (23, 2, 22), (5, 4, 23)):
        monkeypatch.setattr("muco.synth.pictures.CHUNK", chunk)
        assert list(look_at_all(source, SMALL, None, start=start, workers=workers)) == expected[start:]


def test_a_source_that_changes_meanwhile_stops_the_run(tmp_path: Path) -> None:
    source = open_source(write_tar(tmp_path / "a.tar", {"1.jpg": b"one"}))
    pictures = list(source.pictures())
    os.utime(tmp_path / "a.tar", ns=(1, 1))
    broken = replace(source, files=(tmp_path / "a.tar",), states=((0, 0),))
    with pytest.raises(DataError, match="a.tar: the file changed"):
        broken.read(pictures[0].ref)
    with pytest.raises(DataError, match="a.tar: the file changed"):
        list(look_at_all(source, SMALL, tmp_path / "store"))


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status, headers, body = self.server.pages.get(self.path.split("?")[0], (404, {}, b""))
        self.server.seen.append(self.path)
        if self.path == "/slow.jpg":
            self.server.release.wait(300)
        self.send_response(status)
        for key, value in ({"Content-Type": "image/jpeg", "Content-Length": str(len(body))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def site(pages: dict[str, tuple[int, dict[str, str], bytes]]) -> Iterator[tuple[str, ThreadingHTTPServer]]:
    """An address and its server, of which /slow.jpg waits until it is released."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.pages, server.seen, server.release = True, pages, [], threading.Event()
    server.handle_error = lambda *_: None  # a client that waits no longer hangs up
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}", server
    finally:
        server.release.set()
        server.shutdown()
        thread.join()
        server.server_close()


def test_pictures_behind_urls(tmp_path: Path) -> None:
    good = encoded(photo(1))
    pages = {
        "/good.jpg": (200, {}, good),
        "/again.jpg": (200, {}, good),
        "/moved.jpg": (302, {"Location": "/good.jpg"}, b""),
        "/html.jpg": (200, {"Content-Type": "text/html"}, b"<html>"),
        "/liar.jpg": (200, {}, b"<html>"),
        "/slow.jpg": (200, {}, good),
        "/private.jpg": (302, {"Location": "http://127.0.0.2:80/x"}, b""),
        "/large.jpg": (200, {}, bytes(100_001)),
        "/small.jpg": (200, {}, encoded(photo(1, 30, 30))),
    }
    perceptual_hash(photo(0))  # loads what takes seconds to load
    with site(pages) as (address, _):
        names = [*pages, "/gone.jpg"]
        urls = [
            f"http://{address}{name}?key=secret" if name != "/slow.jpg" else f"http://{address}{name}" for name in names
        ]
        write_urls(tmp_path / "a.parquet", [*urls, "ftp://host/x", None, "http://169.254.169.254/x"])
        fetch = FetchLimits(max_bytes=100_000, seconds=4.0, allowed_addresses=(address,))
        source = open_source(tmp_path / "a.parquet", fetch=fetch)
        looks = list(look_at_all(source, SMALL, tmp_path / "store"))
    reasons = {found.name.removeprefix(f"http://{address}"): found.reason for found in looks}
    assert reasons == {
        "/good.jpg": "",
        "/again.jpg": "",
        "/moved.jpg": "",
        "/html.jpg": NOT_FETCHED,
        "/liar.jpg": UNREADABLE,
        "/slow.jpg": UNREACHABLE,
        "/private.jpg": NOT_FETCHED,
        "/large.jpg": NOT_FETCHED,
        "/small.jpg": TOO_SMALL,
        "/gone.jpg": NOT_FETCHED,
        "ftp://host/x": NOT_FETCHED,
        "a.parquet row 11": NOT_FETCHED,
        "http://169.254.169.254/x": NOT_FETCHED,
    }
    notes = {found.name.removeprefix(f"http://{address}"): found.note for found in looks}
    assert "answered 404" in notes["/gone.jpg"] and "took longer than 4 s" in notes["/slow.jpg"]
    assert "not on the public internet" in notes["/private.jpg"] and "100,000 bytes" in notes["/large.jpg"]
    assert not any("secret" in found.note + found.name for found in looks)
    assert stored(tmp_path / "store") == [looks[0].file], "once, although three threads stored it"


def test_a_network_that_is_gone_stops_the_run_and_is_not_held_against_pictures(tmp_path: Path) -> None:
    with site({"/good.jpg": (200, {}, encoded(photo(1)))}) as (address, _):
        good = f"http://{address}/good.jpg"
    write_urls(tmp_path / "a.parquet", [f"{good}?{n}" for n in range(3)])  # nobody listens there any more
    source = open_source(tmp_path / "a.parquet", fetch=FetchLimits(seconds=4.0, allowed_addresses=(address,)))
    with Catalogue(tmp_path / "pictures.db", source.fingerprint, SMALL) as catalogue:
        with pytest.raises(MucoError, match="none of 3 pictures in a row could be fetched.*resumes where it stopped"):
            fill(catalogue, source, SMALL, tmp_path / "store")
        assert catalogue.looked == 0


def test_pictures_before_a_network_is_gone_are_kept_and_the_rest_is_asked_for_again(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("muco.synth.catalogue.ADD", 4)
    monkeypatch.setattr("muco.synth.catalogue.GONE", 3)
    with site({}) as (dead, _):
        pass  # nobody listens there any more
    with site({"/good.jpg": (200, {}, encoded(photo(1)))}) as (address, _):
        urls = [f"http://{dead if kind == 'd' else address}/good.jpg?{n}" for n, kind in enumerate("gdgggddddg")]
        write_urls(tmp_path / "a.parquet", urls)
        fetch = FetchLimits(seconds=4.0, allowed_addresses=(address, dead))
        source = open_source(tmp_path / "a.parquet", fetch=fetch)
        with Catalogue(tmp_path / "pictures.db", source.fingerprint, SMALL) as catalogue:
            with pytest.raises(MucoError, match="none of 3 pictures in a row could be fetched"):
                fill(catalogue, source, SMALL, tmp_path / "store")
            assert catalogue.looked == 5, "one that is gone between others counts, three at the end do not"


def test_what_is_under_way_ends_when_nobody_wants_it(tmp_path: Path) -> None:
    source = open_source(write_folder(tmp_path, {f"{n}.jpg": encoded(photo(n)) for n in range(3)}))
    before, pictures = set(pictures_module._ended), list(source.pictures())
    looks = look_at_all(source, SMALL, None)
    next(looks)
    looks.close()
    (run,) = pictures_module._ended - before
    assert [r["failed"] for r in look_at_some(pictures, source, SMALL, None, 1, "other")] == [""] * 3
    assert [r["failed"] for r in look_at_some(pictures, source, SMALL, None, 1, run)] == ["broken off"] * 3


def test_the_same_picture_is_stored_by_many_threads_at_once(tmp_path: Path) -> None:
    data = encoded(photo(1), "PNG")
    source = open_source(write_tar(tmp_path / "a.tar", {f"{n}.png": data for n in range(12)}))
    for n in range(15):
        looks = look_at_some(list(source.pictures()), source, SMALL, tmp_path / f"{n}", 12, "run")
        assert {found["failed"] for found in looks} == {""} and stored(tmp_path / f"{n}") == [looks[0]["file"]]


# ── the catalogue ────────────────────────────────────────────────────────────────────────────────────────────────────


def made(number: int, phash: int, digest: int | None = None, reason: str = "") -> Look:
    digest_hex = f"{number if digest is None else digest:064x}"
    return Look(
        number, f"name {number}", "", digest_hex, phash, 600, 500, reason, "a note" * bool(reason), f"file {number}"
    )


def slowly(looks: list[Look], near: int) -> list[str]:
    """All pairs, one picture after the other."""
    kept: list[Look] = []
    reasons = []
    for found in looks:
        reason = found.reason
        if not reason and any(found.digest == other.digest for other in kept):
            reason = DUPLICATE
        elif not reason and any((found.phash ^ other.phash).bit_count() <= near for other in kept):
            reason = NEAR_DUPLICATE
        if not reason:
            kept.append(found)
        reasons.append(reason)
    return reasons


def reasons_of(path: Path) -> list[str]:
    return [row[7] for row in rows_of(path)]


@st.composite
def many_looks(draw: st.DrawFn) -> tuple[list[Look], int, list[int]]:
    near = draw(st.integers(-1, 16))
    centres = draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4))
    looks: list[Look] = []
    for number in range(draw(st.integers(1, 40))):
        if looks and draw(st.integers(0, 9)) == 0:  # a copy of a file
            other = draw(st.sampled_from(looks))
            looks.append(replace(other, number=number, name=f"name {number}"))
            continue
        phash = draw(st.sampled_from(centres))
        for bit in draw(st.lists(st.integers(0, 63), max_size=near + 3, unique=True)):
            phash ^= 1 << bit
        looks.append(made(number, phash, reason=draw(st.sampled_from(["", "", "", "", TOO_SMALL]))))
    return looks, near, draw(st.lists(st.integers(1, 12), min_size=1))


@settings(max_examples=30)
@given(many_looks())
def test_decisions_are_those_of_the_slow_reference(tmp_path_factory: pytest.TempPathFactory, given_: tuple) -> None:
    looks, near, sizes = given_
    path = tmp_path_factory.mktemp("catalogue") / "pictures.db"
    start, turn = 0, 0
    while start < len(looks):
        with Catalogue(path, "source", Filter(near=near)) as catalogue:  # opened anew for each chunk
            assert catalogue.looked == start
            size = sizes[turn % len(sizes)]
            catalogue.add(looks[start : start + size])
            start, turn = min(start + size, len(looks)), turn + 1
    assert reasons_of(path) == slowly(looks, near)


@pytest.mark.parametrize("near", [0, 1, 4, 9, 16])
def test_first_near_is_exact_however_many_there_are(near: int) -> None:
    rng = np.random.default_rng(near)
    hashes = rng.integers(0, 2**64, 9000, dtype=np.uint64)
    asked = hashes[rng.integers(0, len(hashes), 400)]
    bits = rng.permuted(np.tile(np.arange(64, dtype=np.uint64), (400, 1)), axis=1)[:, : near + 1]
    flips = rng.integers(0, near + 2, 400)  # in some of them one bit too many
    for n in range(near + 1):
        asked ^= np.where(n < flips, np.uint64(1) << bits[:, n], np.uint64(0))
    hashes[8000:8100] = asked[:100]  # later ones, of which the earlier ones are to be found first
    distances = np.bitwise_count(asked[:, None] ^ hashes[None, :]) <= near
    expected = np.where(distances.any(axis=1), distances.argmax(axis=1), -1)
    assert (expected >= 0).sum() > 100 and (expected == -1).sum() > 10
    assert np.array_equal(first_near(asked, hashes, near), expected)
    assert np.array_equal(first_near(asked, hashes, -1), np.full(400, -1))
    assert np.array_equal(first_near(asked, hashes[:0], near), np.full(400, -1))


def test_the_catalogue_says_what_it_holds(tmp_path: Path) -> None:
    looks = [
        made(0, 0),
        made(1, 0b111, reason=TOO_SMALL),
        made(2, 0b1111),
        made(3, 2**64 - 1),
        replace(made(4, 0, digest=3), phash=2**64 - 1),
        replace(made(5, 0), digest="", reason=UNREADABLE, note="broken"),
        made(6, 0b11 << 62),
        made(7, 0b11111 << 50),
    ]
    with Catalogue(tmp_path / "out/pictures.db", "source", Filter()) as catalogue:
        assert catalogue.looked == catalogue.kept_count == 0 and not catalogue.complete
        assert catalogue.counts() == {"pictures": 0, "kept": 0} and catalogue.kept(0, 9) == []
        assert catalogue.add(looks[:3]) == ["file 2"]
        assert catalogue.add(looks[3:]) == ["file 6"]
        catalogue.finish()
        assert catalogue.complete and catalogue.looked == 8 and catalogue.kept_count == 3
    with Catalogue(tmp_path / "out/pictures.db", "source", Filter()) as catalogue:
        assert catalogue.complete and catalogue.looked == 8
        assert catalogue.counts() == {
            "pictures": 8,
            "kept": 3,
            DUPLICATE: 1,
            NEAR_DUPLICATE: 2,
            TOO_SMALL: 1,
            UNREADABLE: 1,
        }
        kept = [Kept(p, n, f"name {n}", f"file {n}", f"{n:064x}", 600, 500) for p, n in enumerate((0, 3, 7))]
        assert catalogue.kept(0, 9) == kept and catalogue.kept(1, 1) == kept[1:2] and catalogue.kept(3, 9) == []
        assert examples(catalogue, NEAR_DUPLICATE, 9) == [
            ("name 2", "nearly the same as name 0"),
            ("name 6", "nearly the same as name 0"),
        ]
        assert examples(catalogue, DUPLICATE, 9) == [("name 4", "same file as name 3")]
        assert examples(catalogue, UNREADABLE, 9) == [("name 5", "broken")] and examples(catalogue, TOO_SMALL, 0) == []


def test_only_the_next_looks_can_be_added(tmp_path: Path) -> None:
    with Catalogue(tmp_path / "pictures.db", "source", Filter()) as catalogue:
        catalogue.add([made(0, 0)])
        for numbers in ([0], [2], [1, 1], [2, 1]):
            with pytest.raises(ValueError, match="from 1 on"):
                catalogue.add([made(n, 0) for n in numbers])
        catalogue.add([])
        assert catalogue.looked == 1


def test_a_failed_transaction_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue_module, "BLOCK", 2)
    with Catalogue(tmp_path / "pictures.db", "source", Filter(near=0)) as catalogue:
        catalogue.add([made(0, 1)])
        bad = [*(made(n, n + 1) for n in range(1, 5)), replace(made(5, 99), name=None)]  # type: ignore[arg-type]
        with pytest.raises(OutputError, match=r"pictures.db: cannot be written \(NOT NULL"):
            catalogue.add(bad)
        assert catalogue.counts() == {"pictures": 1, "kept": 1} and catalogue.looked == 1
        catalogue.add([made(1, 3), made(2, 1)])
        assert catalogue.counts() == {"pictures": 3, "kept": 2, NEAR_DUPLICATE: 1}


def test_another_source_or_filter_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pictures.db"
    with Catalogue(path, "source", Filter()):
        pass
    with pytest.raises(OutputError, match="pictures.db: made from other pictures, or their files have changed; name"):
        Catalogue(path, "another", Filter())
    for filter in (Filter(min_side=1), Filter(max_aspect=2), Filter(near=3), Filter(max_pixels=99)):
        with pytest.raises(OutputError, match="pictures.db: made from another filter"):
            Catalogue(path, "source", filter)
    with Catalogue(path, "source", Filter()):
        pass


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "pictures.db"
    code = f"from muco.synth.catalogue import Catalogue, Filter; Catalogue({str(path)!r}, 'source', Filter())"
    with Catalogue(path, "source", Filter()) as catalogue:
        with pytest.raises(OutputError, match="another process is writing to it"):
            Catalogue(path, "source", Filter())
        other = processes.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "pictures.db: another process is writing to it; wait for it" in other.stderr
        catalogue.add([made(0, 0)])
    assert processes.run([sys.executable, "-c", code]).returncode == 0


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pictures.db").write_bytes(b"something else" * 99)
    with pytest.raises(OutputError, match=r"pictures.db: cannot be used \(file is not a database\)"):
        Catalogue(tmp_path / "pictures.db", "source", Filter())
    database = sqlite3.connect(tmp_path / "other.db")
    database.execute("CREATE TABLE x (y)")
    database.commit()
    database.close()
    with pytest.raises(OutputError, match=r"other.db: cannot be used \(no such table: about\)"):
        Catalogue(tmp_path / "other.db", "source", Filter())
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="cannot be used"):
        Catalogue(tmp_path / "file/pictures.db", "source", Filter())


# ── all of it ────────────────────────────────────────────────────────────────────────────────────────────────────────


def mixed_files(count: int = 60) -> dict[str, bytes]:
    """Photos, copies of files, smaller and recompressed ones, small ones and broken ones."""
    rng = random.Random(0)
    files: dict[str, bytes] = {}
    for n in range(count):
        image = photo(rng.randrange(count // 3))
        content = {
            0: encoded(image),
            1: encoded(image.resize((80, 60)), quality=60),
            2: encoded(image, "PNG"),
            3: encoded(photo(n, 30, 30)),
            4: b"broken",
        }[rng.choices(range(5), (4, 2, 2, 1, 1))[0]]
        files[f"{n:03}.jpg"] = content
    return files


def test_a_folder_is_filled_and_its_own_files_stay(tmp_path: Path) -> None:
    files = mixed_files()
    source = open_source(write_folder(tmp_path / "in", files))
    seen = []
    with Catalogue(tmp_path / "out/pictures.db", source.fingerprint, SMALL) as catalogue:
        # even where the store is the user's own folder
        fill(catalogue, source, SMALL, tmp_path / "in", progress=lambda done, total: seen.append((done, total)))
        counts = catalogue.counts()
    assert set(counts) == {"pictures", "kept", DUPLICATE, NEAR_DUPLICATE, TOO_SMALL, UNREADABLE}
    assert counts["pictures"] == 60 == sum(counts.values()) - 60 and seen[-1] == (60, 60)
    assert len(stored(tmp_path / "in")) == 60
    looks = list(look_at_all(source, SMALL, None))
    assert reasons_of(tmp_path / "out/pictures.db") == slowly(looks, SMALL.near)
    assert filled(tmp_path / "out", source) == counts, "nothing to do"


@pytest.mark.slow
def test_chunks_and_threads_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(write_tar(tmp_path / "a.tar", mixed_files()))
    results = []
    for n, (workers, chunk, add, block) in enumerate(((16, 256, 256, 256), (1, 1, 7, 2), (3, 10, 64, 64))):
        monkeypatch.setattr("muco.synth.pictures.CHUNK", chunk)
        monkeypatch.setattr("muco.synth.catalogue.ADD", add)
        monkeypatch.setattr(catalogue_module, "BLOCK", block)
        filled(tmp_path / str(n), source, workers=workers)
        with Catalogue(tmp_path / str(n) / "pictures.db", source.fingerprint, SMALL) as catalogue:
            kept = catalogue.kept(0, 99)
        assert stored(tmp_path / str(n) / "images") == sorted(k.file for k in kept), "those that are kept, no others"
        results.append(rows_of(tmp_path / str(n) / "pictures.db"))
    assert results[0] == results[1] == results[2] and len(results[0]) == 60


def test_what_was_found_before_an_error_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muco.synth.pictures.CHUNK", 4)
    monkeypatch.setattr("muco.synth.catalogue.ADD", 4)
    files, store = mixed_files(), tmp_path / "images"
    write_tar(tmp_path / "a.tar", files)
    content = bytearray(write_tar(tmp_path / "b.tar", files).read_bytes())
    content[150] ^= 0xFF
    (tmp_path / "b.tar").write_bytes(content)
    source = open_source(tmp_path)
    with Catalogue(tmp_path / "pictures.db", source.fingerprint, SMALL) as catalogue:
        with pytest.raises(DataError, match="b.tar: not a whole plain tar archive"):
            fill(catalogue, source, SMALL, store)
        assert 40 < catalogue.looked < 60 and not catalogue.complete
        kept = catalogue.kept(0, 99)
    under_way = {hashlib.sha256(content).hexdigest() for content in [*files.values()][catalogue.looked :]}
    rows = rows_of(tmp_path / "pictures.db")
    unused = {row[2] for row in rows if row[7] == NEAR_DUPLICATE and row[3].hex() not in under_way}
    assert unused and not unused & {*stored(store)} and {k.file for k in kept} <= {*stored(store)}


def test_what_a_killed_run_has_stored_is_removed(tmp_path: Path) -> None:
    source = open_source(write_tar(tmp_path / "a.tar", mixed_files(9)))
    images = tmp_path / "out/images/ab"
    images.mkdir(parents=True)
    left = [f"{'ab' * 32}.jpg", f".{'ab' * 32}.17", f"..{'ab' * 32}.17.4711.tmp"]
    for name in (*left, "mine.txt"):
        (images / name).write_bytes(b"x")
    filled(tmp_path / "out", source)
    assert not any((images / name).exists() for name in left) and (images / "mine.txt").exists()


RUN = """
import sys
from pathlib import Path
from muco.synth import catalogue, pictures
from muco.synth.sources import open_source
catalogue.ADD, pictures.CHUNK = 5, 4
source, out, filter = open_source(sys.argv[1]), Path(sys.argv[2]), pictures.Filter(min_side=40, max_aspect=2.0)
with catalogue.Catalogue(out / "pictures.db", source.fingerprint, filter) as opened:
    print("ready", flush=True)
    report = lambda done, _: (print(done, flush=True), sys.stdin.readline())
    catalogue.fill(opened, source, filter, out / "images", workers=2, progress=report)
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    source = open_source(write_tar(tmp_path / "a.tar", mixed_files()))
    filled(tmp_path / "whole", source)
    rng, line = random.Random(1), [sys.executable, "-c", RUN, str(tmp_path / "a.tar"), str(tmp_path / "killed")]
    killed = []
    for _ in range(3):
        process = processes.Popen(line, stdin=processes.PIPE, stdout=processes.PIPE)
        reported = [process.stdout.readline()]
        assert reported == ["ready\n"]
        # It waits at each report, so that it is still at work when it is killed, however slow this process is.
        for _ in range(rng.randrange(1, 3)):
            reported.append(process.stdout.readline())
            os.write(process.stdin, b"\n")
        time.sleep(rng.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        killed.append(process.wait() == -signal.SIGKILL)
        process.stdout.close()
        with Catalogue(tmp_path / "killed/pictures.db", source.fingerprint, SMALL) as catalogue:
            assert int(reported[-1]) <= catalogue.looked, "what was reported is there"
    assert all(killed) and catalogue.looked < 60, "they were killed in the middle"
    assert processes.run(line, stdout=processes.PIPE).returncode == 0
    assert rows_of(tmp_path / "killed/pictures.db") == rows_of(tmp_path / "whole/pictures.db")
    assert stored(tmp_path / "killed/images") == stored(tmp_path / "whole/images")
