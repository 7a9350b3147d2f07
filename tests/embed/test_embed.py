"""muco embed: what is written equals a plain loop over the rows, whatever the input, batches, parts or kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import weakref
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import processes
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import muco.data.items
import muco.data.lines
import muco.embed.vectors
from muco.base.files import claimed
from muco.data.items import COLUMNS, open_items
from muco.dialogue import as_content
from muco.embed import embed
from muco.errors import DataError, OutputError
from muco.images import open_image


class Hashed:
    """A small real encoder: hashed words and a thumbnail. It counts what it encodes and can be slow or give out."""

    def __init__(self, *, fingerprint: str = "a" * 64, seconds: float = 0.0, batches: int | None = None) -> None:
        self.fingerprint, self.seconds, self.left = fingerprint, seconds, batches
        self.encoded = 0

    def get_embedding_dimension(self) -> int:
        return 24

    def opened(self, image) -> Image.Image:
        return open_image(image)

    def encode(
        self, inputs, batch_size: int = 32, show_progress_bar: bool = True, truncate_dim: int = 24
    ) -> np.ndarray:
        assert truncate_dim == self.get_embedding_dimension()
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise RuntimeError("the machine gave out")
        time.sleep(self.seconds)
        vectors = np.stack([self.vector(value) for value in inputs])
        self.encoded += len(inputs)
        return vectors

    def vector(self, value) -> np.ndarray:
        content = as_content(value)
        vector = np.ones(24, dtype=np.float32)
        if "<|emb|>" in content.text:
            raise DataError("input 0 turn 1: the text holds the special token <|emb|>")
        if content.text == "not finite":
            return vector * np.nan
        for word in content.text.split():
            vector[zlib.crc32(word.encode()) % 12] += 1
        for image in content.images:
            vector[12:] += np.asarray(open_image(image).resize((2, 2)), dtype=np.float32).reshape(-1)
        return vector / np.linalg.norm(vector)


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def png(seed: int) -> bytes:
    buffer = BytesIO()
    picture(seed).save(buffer, format="png")
    return buffer.getvalue()


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def texts(folder: Path, count: int) -> Path:
    return write_jsonl(folder / "items.jsonl", [{"id": f"r{i}", "text": f"row number {i}"} for i in range(count)])


def read(path: Path) -> tuple[list[dict], np.ndarray]:
    rows = pq.read_table(path).to_pylist()
    vectors = np.array([row.pop("embedding") for row in rows], dtype=np.float32)
    return rows, vectors


def errors(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def run(source: Path, output: Path, model: Hashed | None = None, **kwargs) -> dict:
    return embed(source, model or Hashed(), output, **{"progress": False, **kwargs})


# ── inputs ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_folder_is_read_recursively_in_the_order_of_relative_paths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["a.png", "a/1.png", "a/b/2.JPG", "a0.webp", "z.bmp", "a-.gif"]
    for i, name in enumerate(names):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(tmp_path / "in" / name)
    for left_out in (".hidden.png", "notes.txt", "a/x.HEIC", "y.heic", "y.avif", "no_suffix", ".cache/x.png"):
        (tmp_path / "in" / left_out).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / left_out).write_bytes(png(0))
    summary = run(tmp_path / "in", tmp_path / "out.parquet")
    rows, vectors = read(tmp_path / "out.parquet")
    assert [row["id"] for row in rows] == sorted(names)
    assert rows[0] == {"id": "a-.gif", "text": None, "image": "a-.gif"}
    np.testing.assert_array_equal(vectors, [Hashed().vector(tmp_path / "in" / name) for name in sorted(names)])
    assert (summary["rows"], summary["embedded"], summary["failed"], summary["errors"]) == (6, 6, 0, None)
    assert summary["passed_over"] == {".heic": 2, ".txt": 1, ".avif": 1, "other": 1}
    assert not capsys.readouterr().err  # asked to keep it empty
    run(tmp_path / "in", tmp_path / "out.parquet", progress=None)
    assert "in: files of other kinds are passed over: 2 .heic, 1 " in capsys.readouterr().err


def test_a_folder_is_read_by_all_names_of_the_formats(tmp_path: Path) -> None:
    kinds = {"mpo": "MPO", "pgm": "PPM", "JFIF": "JPEG", "apng": "PNG", "dib": "BMP", "Tif": "TIFF", "pnm": "PPM"}
    for i, (suffix, kind) in enumerate(kinds.items()):
        picture(i).convert("L" if suffix == "pgm" else "RGB").save(tmp_path / f"{i}.{suffix}", kind)
    (tmp_path / "broken.jpe").write_bytes(b"no image")
    summary = run(tmp_path, tmp_path / "out.parquet")
    assert (summary["embedded"], summary["failed"]) == (len(kinds), 1)
    assert "broken.jpe: not an image" in errors(tmp_path / "out.errors.jsonl")[0]["reason"]


def test_output_schema_and_what_its_metadata_name(tmp_path: Path) -> None:
    summary = run(texts(tmp_path, 3), tmp_path / "new" / "out.parquet")
    schema = pq.read_schema(tmp_path / "new" / "out.parquet")
    assert schema.field("embedding").type == pa.list_(pa.float32(), 24)
    assert [schema.field(name).type for name in ("id", "text", "image")] == [pa.string()] * 3
    assert schema.metadata[b"muco.model"] == b"a" * 64 and schema.metadata[b"muco.dimension"] == b"24"
    assert schema.metadata[b"muco.version"].decode() == muco.__version__
    assert schema.metadata[b"muco.input"].decode() == open_items(tmp_path / "items.jsonl", COLUMNS).fingerprint
    assert schema.metadata[b"muco.image_root"].decode() == str(tmp_path.resolve())
    assert summary["model"] == "a" * 64 and summary["output"] == str(tmp_path / "new" / "out.parquet")
    assert summary["rows_per_second"] == pytest.approx(3 / summary["seconds"], rel=0.5)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["out.parquet"]


def mixed_rows(folder: Path) -> tuple[list[dict], list]:
    """Rows of all shapes and what the model must be given for them."""
    folder.mkdir(exist_ok=True)
    (folder / "images").mkdir(exist_ok=True)
    picture(1).save(folder / "images" / "1.png")
    picture(2, (20, 300)).save(folder / "images" / "ü.jpg")
    rows = [
        {"id": "both", "text": "what is it?", "image": "images/1.png"},
        {"text": "only text", "unknown": [1, 2]},
        {"id": 7, "image": "images/ü.jpg", "text": None},
        {"id": "spaces", "text": " kept as it is ", "image": ""},
        {"image": "images/1.png", "text": "  "},
    ]
    one, two = folder / "images" / "1.png", folder / "images" / "ü.jpg"
    inputs = [{"text": "what is it?", "image": one}, "only text", two, " kept as it is ", one]
    return rows, inputs


MIXED_OUTPUT = [
    {"id": "both", "text": "what is it?", "image": "images/1.png"},
    {"id": "1", "text": "only text", "image": None},
    {"id": "7", "text": None, "image": "images/ü.jpg"},
    {"id": "spaces", "text": " kept as it is ", "image": None},
    {"id": "4", "text": None, "image": "images/1.png"},
]


def test_jsonl_of_text_images_and_both(tmp_path: Path) -> None:
    rows, inputs = mixed_rows(tmp_path)
    lines = ["\ufeff" + json.dumps(rows[0]), "", *rows[1:], "   "]
    run(write_jsonl(tmp_path / "items.jsonl", lines), tmp_path / "out.parquet", batch_size=2)
    found, vectors = read(tmp_path / "out.parquet")
    assert found == MIXED_OUTPUT
    np.testing.assert_array_equal(vectors, [Hashed().vector(value) for value in inputs])


@pytest.mark.parametrize("kind", ["paths", "dictionary", "structs"])
def test_parquet_gives_the_same_as_jsonl(tmp_path: Path, kind: str) -> None:
    rows, inputs = mixed_rows(tmp_path)
    images = pa.array([row.get("image") for row in rows])
    if kind == "dictionary":
        images = images.dictionary_encode()
    elif kind == "structs":  # the image column of Hugging Face data sets: some with bytes, some with a path only
        structs = [{"bytes": None, "path": row.get("image")} for row in rows]
        structs[0]["bytes"] = (tmp_path / "images" / "1.png").read_bytes()
        images = pa.array(structs)
    ids = [None if row.get("id") is None else str(row["id"]) for row in rows]
    table = pa.table({"other": range(5), "image": images, "id": ids, "text": [row.get("text") for row in rows]})
    pq.write_table(table, tmp_path / "items.parquet", row_group_size=2)
    run(tmp_path / "items.parquet", tmp_path / "out.parquet")
    found, vectors = read(tmp_path / "out.parquet")
    assert found == MIXED_OUTPUT
    np.testing.assert_array_equal(vectors, [Hashed().vector(value) for value in inputs])


def test_parquet_with_image_bytes_and_numbers_as_ids(tmp_path: Path) -> None:
    struct = [{"bytes": png(i), "path": None} for i in range(3)]
    pq.write_table(pa.table({"img": [png(i) for i in range(3)], "key": [5, 6, 7]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": struct, "id": [5, 6, 7]}), tmp_path / "b.parquet")
    run(tmp_path / "a.parquet", tmp_path / "oa.parquet", image_column="img", id_column="key")
    run(tmp_path / "b.parquet", tmp_path / "ob.parquet")
    rows, vectors = read(tmp_path / "oa.parquet")
    assert rows == [{"id": str(i), "text": None, "image": None} for i in (5, 6, 7)] == read(tmp_path / "ob.parquet")[0]
    np.testing.assert_array_equal(vectors, [Hashed().vector(picture(i)) for i in range(3)])
    np.testing.assert_array_equal(vectors, read(tmp_path / "ob.parquet")[1])


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_row_has_images_as_encode_takes_them(tmp_path: Path, kind: str) -> None:
    one, two = tmp_path / "1.png", tmp_path / "2.png"
    for path, seed in ((one, 1), (two, 2)):
        path.write_bytes(png(seed))
    given = [
        ({"text": "a ring", "images": ["1.png"]}, {"text": "a ring", "images": [one]}, "1.png"),
        ({"images": ["1.png", "2.png"]}, [one, two], '["1.png", "2.png"]'),
        ({"text": "both", "images": ["2.png", "1.png"]}, {"text": "both", "images": [two, one]}, '["2.png", "1.png"]'),
        ({"text": "none", "images": []}, "none", None),
    ]
    rows = [row for row, _, _ in given]
    if kind == "jsonl":
        given.append(({"text": "a ring", "image": ["1.png"], "images": None}, given[0][1], "1.png"))
        source = write_jsonl(tmp_path / "in.jsonl", [row for row, _, _ in given])
    else:
        pq.write_table(pa.Table.from_pylist(rows), source := tmp_path / "in.parquet")
    assert run(source, tmp_path / "out.parquet")["failed"] == 0
    found, vectors = read(tmp_path / "out.parquet")
    np.testing.assert_array_equal(vectors, [Hashed().vector(value) for _, value, _ in given])
    assert [row["image"] for row in found] == [path for _, _, path in given]
    assert not np.allclose(vectors[0], Hashed().vector("a ring"))


@pytest.mark.parametrize("name", ["image", "images", "photos"])
def test_parquet_holds_several_images_as_bytes_or_structs(tmp_path: Path, name: str) -> None:
    structs = [{"bytes": png(1), "path": "1.png"}, {"bytes": png(2), "path": None}]
    for values in ([png(1), png(2)], structs):
        pq.write_table(pa.table({name: [values, []], "text": ["a", "b"]}), tmp_path / "in.parquet")
        column = {"image_column": name} if name == "photos" else {}
        assert run(tmp_path / "in.parquet", tmp_path / "out.parquet", resume=False, **column)["failed"] == 0
        found, vectors = read(tmp_path / "out.parquet")
        np.testing.assert_array_equal(vectors[0], Hashed().vector({"text": "a", "images": [picture(1), picture(2)]}))
        assert found[0]["image"] == ('["1.png", null]' if values is structs else None)


def test_rotated_and_transparent_images_are_as_the_encoder_would_open_them(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    (tmp_path / "in").mkdir()
    picture(1).save(tmp_path / "in" / "turned.png", exif=exif)
    picture(2).convert("RGBA").rotate(30).save(tmp_path / "in" / "clear.png")
    picture(3, (9, 9)).save(tmp_path / "in" / "small.png")
    run(tmp_path / "in", tmp_path / "out.parquet")
    rows, vectors = read(tmp_path / "out.parquet")
    expected = [Hashed().vector(tmp_path / "in" / row["id"]) for row in rows]
    np.testing.assert_array_equal(vectors, expected)
    assert np.abs(expected[2] - Hashed().vector(picture(1))).max() > 1e-3  # the turn matters


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 9), part=st.integers(1, 15), bad=st.sets(st.integers(0, 12), max_size=6), held=st.booleans()
)
def test_batches_and_parts_change_nothing(tmp_path_factory, batch: int, part: int, bad: set[int], held: bool) -> None:
    folder = tmp_path_factory.mktemp("runs")
    lines = [{"id": f"r{i}", "text": "<|emb|>" if i in bad else f"row {i}"} for i in range(13)]
    for i in (2, 5, 8):
        picture(i).save(folder / f"{i}.png")
        lines[i]["image"] = f"{i}.png"
    source = write_jsonl(folder / "items.jsonl", lines)
    with pytest.MonkeyPatch.context() as patch:
        if held:  # no two images may wait at once
            patch.setattr(muco.embed.vectors, "DECODED_BYTES", 1)
        summary = run(source, folder / "out.parquet", batch_size=batch, shard_rows=part)
    good = [i for i in range(13) if i not in bad]
    rows, vectors = read(folder / "out.parquet")
    assert [row["id"] for row in rows] == [f"r{i}" for i in good]
    expected = [{"text": f"row {i}"} | ({"image": folder / f"{i}.png"} if i in (2, 5, 8) else {}) for i in good]
    np.testing.assert_array_equal(vectors, [Hashed().vector(value) for value in expected])
    assert summary["failed"] == len(bad)
    assert [e["row"] for e in errors(folder / "out.errors.jsonl")] == sorted(bad) if bad else not summary["errors"]


@pytest.fixture(scope="module")
def real_model():
    from muco.model import from_backbone
    from muco.tiny import tiny_qwen2_vl

    return from_backbone(*tiny_qwen2_vl(["what is it?", "only text", "kept as it is", "row number"]), device="cpu")


def test_the_real_model_and_its_saved_folder(tmp_path: Path, real_model) -> None:
    rows, inputs = mixed_rows(tmp_path)
    rows += [{"id": "token", "text": "a <|emb|> b"}, {"id": "gone", "image": "gone.png"}]
    source = write_jsonl(tmp_path / "items.jsonl", rows)
    expected = real_model.encode(inputs)
    for batch_size in (1, 2, 7):
        output = tmp_path / f"{batch_size}.parquet"
        summary = run(source, output, real_model, batch_size=batch_size, shard_rows=3)
        found, vectors = read(output)
        assert found == MIXED_OUTPUT and summary["model"] == real_model.fingerprint
        np.testing.assert_allclose(vectors, expected, atol=1e-5)
        token, gone = errors(tmp_path / f"{batch_size}.errors.jsonl")
        assert (token["id"], gone["id"]) == ("token", "gone")
        assert token["reason"].startswith("the text contains the special token")
    real_model.save(str(tmp_path / "model"))
    assert run(source, tmp_path / "1.parquet", str(tmp_path / "model"))["resumed"] == 7  # the same fingerprint
    run(source, tmp_path / "1.parquet", tmp_path / "model", resume=False)
    np.testing.assert_allclose(read(tmp_path / "1.parquet")[1], expected, atol=1e-5)


# ── bounded memory ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_large_row_group_is_read_in_pieces_and_finished_groups_not_at_all(tmp_path: Path) -> None:
    images, size = [os.urandom(50_000) for _ in range(400)], 400 * 50_000
    table = pa.table({"image": images, "id": [str(i) for i in range(400)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=300, write_batch_size=16)
    del table
    source = open_items(tmp_path / "a.parquet", COLUMNS)
    before, peak = pa.total_allocated_bytes(), 0
    for i, row in enumerate(source.rows(0)):
        assert (row.number, row.id, row.images) == (i, str(i), (images[i],))
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert i == 399 and 0 < peak < size / 3
    for start in (1, 299, 300, 301, 399):
        assert [row.number for row in source.rows(start)] == list(range(start, 400))
    assert list(source.rows(400)) == []


@pytest.mark.parametrize(("held", "ahead"), [(10**9, 2 * 8), (6 * 3 * 40 * 30, 6), (1, 4)])
def test_rows_are_opened_only_a_little_ahead_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: int, ahead: int
) -> None:
    class Watching(Hashed):
        waiting: list[int] = []

        def encode(self, inputs, **kwargs):
            self.waiting.append(numbers[-1] + 1 - self.encoded - len(inputs))
            return super().encode(inputs, **kwargs)

    numbers: list[int] = []
    make_row = muco.data.items.read_row
    monkeypatch.setattr(
        muco.data.items, "read_row", lambda record, *rest: numbers.append(record.number) or make_row(record, *rest)
    )
    monkeypatch.setattr(muco.embed.vectors, "DECODED_BYTES", held)
    (tmp_path / "in").mkdir()
    for i in range(80):
        picture(i).save(tmp_path / "in" / f"{i}.png")
    run(tmp_path / "in", tmp_path / "out.parquet", Watching(), batch_size=8)
    assert numbers == list(range(80)) and max(Watching.waiting) == ahead


def test_damage_in_a_finished_row_group_is_not_met_and_in_another_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"text": [os.urandom(50).hex() for _ in range(200)]}), path, row_group_size=100, use_dictionary=False
    )
    column = pq.read_metadata(path).row_group(0).column(0)
    with path.open("r+b") as file:
        file.seek(column.data_page_offset)
        file.write(b"\xff" * column.total_compressed_size)
    rows = open_items(path, COLUMNS).rows
    assert [row.number for row in rows(100)] == list(range(100, 200))
    with pytest.raises(DataError, match="a.parquet: broken after row 0"):
        list(rows(0))


@pytest.mark.parametrize(("held", "largest"), [(10**9, 4), (2 * 3 * 40 * 30, 3), (1, 1)])
def test_images_are_let_go_once_encoded_and_large_ones_make_small_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: int, largest: int
) -> None:
    class Watching(Hashed):
        images: list[weakref.ref] = []
        alive: list[int] = []

        def encode(self, inputs, **kwargs):
            self.images.extend(weakref.ref(value["image"]) for value in inputs)
            self.alive.append(sum(image() is not None for image in self.images))
            return super().encode(inputs, **kwargs)

    monkeypatch.setattr(muco.embed.vectors, "DECODED_BYTES", held)
    (tmp_path / "in").mkdir()
    for i in range(24):
        picture(i).save(tmp_path / "in" / f"{i}.png")
    run(tmp_path / "in", tmp_path / "out.parquet", Watching(), batch_size=4)
    assert len(Watching.images) == 24 and max(Watching.alive) <= largest + 2  # not 24
    assert len(Watching.alive) == 24 / largest


# ── interrupted runs ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder"])
@pytest.mark.parametrize("batches", [0, 1, 3, 4, 7])
def test_a_run_that_broke_goes_on_at_the_next_part(tmp_path: Path, kind: str, batches: int) -> None:
    source = texts(tmp_path, 22)
    if kind == "parquet":
        source = tmp_path / "items.parquet"
        pq.write_table(pa.table({"text": [f"row number {i}" for i in range(22)]}), source, row_group_size=5)
    if kind == "folder":
        source = tmp_path / "in"
        source.mkdir()
        for i in range(22):
            picture(i).save(source / f"{i}.png")
    with pytest.raises(RuntimeError, match="gave out"):
        run(source, tmp_path / "out.parquet", Hashed(batches=batches), batch_size=3, shard_rows=6)
    assert not (tmp_path / "out.parquet").exists()
    again = Hashed()
    done = batches // 2 * 6
    summary = run(source, tmp_path / "out.parquet", again, batch_size=5, shard_rows=4)  # other sizes are no obstacle
    assert (summary["resumed"], again.encoded, summary["rows"]) == (done, 22 - done, 22)
    run(source, tmp_path / "whole.parquet")
    assert pq.read_table(tmp_path / "out.parquet").equals(pq.read_table(tmp_path / "whole.parquet"))
    assert not (tmp_path / "out.parquet.parts").exists()


def test_a_killed_process_loses_at_most_one_part(tmp_path: Path) -> None:
    lines = [{"id": f"r{i}", "text": "<|emb|>" if i % 10 == 3 else f"row {i}"} for i in range(120)]
    source, output = write_jsonl(tmp_path / "items.jsonl", lines), tmp_path / "out.parquet"
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from test_embed import Hashed, embed; "
        "embed(sys.argv[2], Hashed(seconds=0.1), sys.argv[3], batch_size=4, shard_rows=8, progress=False)"
    )
    arguments = [sys.executable, "-c", code, str(Path(__file__).parent), str(source), str(output)]
    process = processes.Popen(arguments, cwd=Path(__file__).parents[2])
    parts, limit = output.with_name("out.parquet.parts"), time.monotonic() + 300
    while len(list(parts.glob("rows-*.parquet"))) < 3:
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not output.exists()
    finished = 8 * len(list(parts.glob("rows-*.parquet")))
    again = Hashed()
    summary = run(source, output, again, shard_rows=8)
    assert 24 <= summary["resumed"] == finished < 120
    assert again.encoded == sum("emb" not in line["text"] for line in lines[finished:])
    run(source, tmp_path / "whole.parquet")
    assert pq.read_table(output).equals(pq.read_table(tmp_path / "whole.parquet"))
    assert errors(tmp_path / "out.errors.jsonl") == errors(tmp_path / "whole.errors.jsonl")
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".jsonl"] * 3 + [".parquet"] * 2


def test_leftovers_of_a_kill_while_merging_or_clearing(tmp_path: Path) -> None:
    source, output = texts(tmp_path, 10), tmp_path / "out.parquet"
    parts = tmp_path / "out.parquet.parts"
    with pytest.raises(RuntimeError):
        run(source, output, Hashed(batches=2), batch_size=4, shard_rows=4)
    (parts / "merged.tmp").write_bytes(b"half")
    (parts / "part.tmp").write_bytes(b"half")
    run(source, output)
    assert not parts.exists()
    whole = pq.read_table(output)
    parts.mkdir()  # the manifest goes first: what is left without it does not count
    (parts / "rows-000000000004.parquet").write_bytes(b"whatever")
    idle = Hashed()
    assert run(source, output, idle)["embedded"] == 10 and idle.encoded == 0
    output.unlink()
    run(source, output)
    assert pq.read_table(output).equals(whole) and not parts.exists()


def test_a_finished_output_is_not_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = texts(tmp_path, 10), tmp_path / "out.parquet"
    first = run(source, output)
    inode, idle = output.stat().st_ino, Hashed()
    again = run(source, output, idle, progress=None, shard_rows=3)
    assert idle.encoded == 0 and output.stat().st_ino == inode
    assert again["rows"] == again["resumed"] == first["rows"] and again["rows_per_second"] == 0
    captured = capsys.readouterr()
    assert captured.out == "" and "complete" in captured.err and "--no-resume" in captured.err
    anew = Hashed()
    run(source, output, anew, resume=False)
    assert anew.encoded == 10 and output.stat().st_ino != inode


@pytest.mark.parametrize("stage", ["parts", "output"])
@pytest.mark.parametrize("change", ["model", "input", "columns"])
def test_another_run_at_the_output_is_refused_and_kept(tmp_path: Path, stage: str, change: str) -> None:
    source, output = texts(tmp_path, 10), tmp_path / "out.parquet"
    if stage == "parts":
        with pytest.raises(RuntimeError):
            run(source, output, Hashed(batches=2), batch_size=4, shard_rows=4)
    else:
        run(source, output)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.parquet") if p.is_file()}
    assert before
    model, kwargs = Hashed(), {}
    if change == "model":
        model = Hashed(fingerprint="b" * 64)
    elif change == "columns":
        kwargs = {"id_column": "key"}
    else:
        texts(tmp_path, 11)
    with pytest.raises(OutputError, match=f"differs in {change} .*--no-resume"):
        run(source, output, model, **kwargs)
    assert model.encoded == 0 and before == {p: p.read_bytes() for p in tmp_path.rglob("*.parquet") if p.is_file()}
    summary = run(source, output, model, resume=False, **kwargs)
    assert summary["resumed"] == 0 and summary["rows"] == model.encoded == (11 if change == "input" else 10)


def test_a_run_anew_replaces_the_old_output_at_its_end_even_when_interrupted(tmp_path: Path) -> None:
    source, output = texts(tmp_path, 10), tmp_path / "out.parquet"
    run(source, output)
    old = output.read_bytes()
    with pytest.raises(RuntimeError):
        run(source, output, Hashed(fingerprint="b" * 64, batches=2), resume=False, batch_size=4, shard_rows=4)
    assert output.read_bytes() == old
    summary = run(source, output, Hashed(fingerprint="b" * 64))
    assert summary["resumed"] == 8 and pq.read_schema(output).metadata[b"muco.model"] == b"b" * 64


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_a_changed_folder_or_parquet_file_is_noticed(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "in"
    if kind == "folder":
        source.mkdir()
        changed = source / "1.png"
        changed.write_bytes(png(1))
    else:
        source = changed = tmp_path / "in.parquet"
        pq.write_table(pa.table({"text": ["one"]}), source)
    before = open_items(source, COLUMNS).fingerprint
    assert open_items(source, COLUMNS).fingerprint == before
    os.utime(changed, ns=(1, 1))
    assert open_items(source, COLUMNS).fingerprint != before


def test_files_of_others_are_never_replaced(tmp_path: Path) -> None:
    source, output = texts(tmp_path, 3), tmp_path / "out.parquet"
    pq.write_table(pa.table({"mine": [1]}), output)
    with pytest.raises(OutputError, match="exists and is not of `muco embed`"):
        run(source, output)
    output.write_text("not Parquet")
    with pytest.raises(OutputError, match="exists and is not of `muco embed`"):
        run(source, output)
    output.unlink()
    (tmp_path / "out.parquet.parts").mkdir()
    (tmp_path / "out.parquet.parts" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds other files"):
        run(source, output)
    with pytest.raises(OutputError, match="holds other files"):
        run(source, output, resume=False)
    assert (tmp_path / "out.parquet.parts" / "mine.txt").read_text() == "mine"
    for name in ("out.txt", "items.jsonl", "."):
        with pytest.raises(OutputError, match="ends in .parquet"):
            run(source, tmp_path / name)
    (tmp_path / "a.errors.jsonl").write_bytes(source.read_bytes())
    with pytest.raises(OutputError, match="replace the input"):
        run(tmp_path / "a.errors.jsonl", tmp_path / "a.parquet")
    with pytest.raises(OutputError, match="cannot be written"):
        run(source, source / "out.parquet")


def test_a_second_run_into_the_same_file_is_refused(tmp_path: Path) -> None:
    source, output = texts(tmp_path, 3), tmp_path / "out.parquet"
    with claimed(output, beside=True), pytest.raises(OutputError, match=r"out\.parquet is in use by process \d+ on"):
        run(source, output)
    assert run(source, output)["rows"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["items.jsonl", "out.parquet"]


def test_a_full_disk_ends_a_run_in_a_sentence_and_the_run_resumes(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("this user may not mount")
    try:
        source = texts(tmp_path, 64)
        told = r"small/.*: cannot be written \(No space left on device\); make room, and run the same command again"
        with pytest.raises(OutputError, match=told):
            run(source, small / "out.parquet", shard_rows=2)
        subprocess.run(["mount", "-o", "remount,size=4m", small], check=True)
        summary = run(source, small / "out.parquet", shard_rows=2)
        assert summary["rows"] == 64 and 0 < summary["resumed"] < 64
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_missing_or_broken_part_is_noticed(tmp_path: Path) -> None:
    source, output = texts(tmp_path, 12), tmp_path / "out.parquet"
    with pytest.raises(RuntimeError):
        run(source, output, Hashed(batches=3), batch_size=2, shard_rows=2)
    parts = sorted((tmp_path / "out.parquet.parts").glob("rows-*"))
    content = parts[1].read_bytes()
    parts[1].write_bytes(content[:100])
    with pytest.raises(OutputError, match="from row 2 on is missing or broken"):
        run(source, output)
    parts[1].unlink()
    with pytest.raises(OutputError, match="from row 2 on is missing or broken"):
        run(source, output)


# ── bad rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_bad_rows_are_listed_and_the_others_embedded(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(png(1)[:200])
    (tmp_path / "good.png").write_bytes(png(2))
    bad = {
        1: ({"id": "gone", "image": "gone.png"}, "no such image file"),
        2: ({"id": "broken", "image": "broken.png", "text": "x"}, "truncated or broken"),
        3: ({"id": "empty"}, "nothing to embed"),
        4: ({"id": "token", "text": "a <|emb|> b"}, "special token"),
        6: ('{"text": ', "malformed JSON"),
        7: ("[1]", "not an object"),
        8: ({"text": 5}, "'text' must be a string, not a number"),
        9: ({"image": ["good.png", 5]}, "'image' must be a path or a list of paths"),
        10: ({"id": True, "text": "x"}, "'id' must be a string"),
        11: ({"text": "\ud800"}, "'text' holds half a character"),
        12: ({"id": "\ud800", "text": "x"}, "'id' holds half a character"),
        13: ({"image": "a\0b.png"}, "null byte"),
        14: ({"image": "x" * 5000 + ".png"}, "cannot be read"),
        15: ({"image": "."}, "not a file"),
        16: ({"image": "https://example.org/x.png"}, "URLs are not fetched"),
        17: ({"text": "not finite"}, "not finite"),
    }
    rows = [bad[i][0] if i in bad else {"id": f"good {i}", "text": "good", "image": "good.png"} for i in range(19)]
    model = Hashed()
    summary = run(write_jsonl(tmp_path / "items.jsonl", rows), tmp_path / "out.parquet", model, shard_rows=5)
    found, vectors = read(tmp_path / "out.parquet")
    assert [row["id"] for row in found] == ["good 0", "good 5", "good 18"]
    np.testing.assert_array_equal(vectors, [model.vector({"text": "good", "image": picture(2)})] * 3)
    assert (summary["rows"], summary["embedded"], summary["failed"]) == (19, 3, 16)
    assert summary["errors"] == str(tmp_path / "out.errors.jsonl")
    for error, (row, (line, reason)) in zip(errors(tmp_path / "out.errors.jsonl"), bad.items(), strict=True):
        assert error["row"] == row and error["where"] == f"items.jsonl:{row + 1}" and reason in error["reason"]
        assert "input 0" not in error["reason"]
        if isinstance(line, dict) and isinstance(line.get("id"), str) and line["id"].isascii():
            assert error["id"] == line["id"]


DEEP = "[" * 100_000 + "]" * 100_000
BAD_ROWS = [
    (b'{"text": "a", "x": ' + DEEP.encode() + b"}", "malformed JSON: nested too deep"),
    (b'{"text": "a", "x": ' + b"[" * 200 + b"]" * 200 + b"}", "malformed JSON: nested too deep"),
    (b'{"text": "a", "text": "b"}', "the key 'text' occurs twice in one object"),
    (b'{"text": "a", "x": {"y": 1, "y": 2}}', "the key 'y' occurs twice in one object"),
    (b'{"text": "a", "x": NaN}', "NaN is not JSON"),
    (b'{"text": "a", "x": [-Infinity]}', "-Infinity is not JSON"),
    (b'{"text": "a"} {"text": "b"}', "malformed JSON: Extra data"),
    (b'{"text": "caf\xe9"}', "not UTF-8 at byte 14 of the row"),
    ('{"text": "a"}'.encode("utf-16"), "not UTF-8 at byte 1 of the row"),
    (b'{"text": "a", "x": "\\ud800"}', "'x' holds half a character"),
    (b'{"text": "a", "x": [{"y": "\\udc80"}]}', "'x' holds half a character"),
    (b'{"text": "a", "\\ud800": 1}', "holds half a character"),
    (b'{"text": ["a"]}', "'text' must be a string, not a list"),
    (b'{"text": "a", "image": 7}', "'image' must be a path or a list of paths"),
    (b'{"text": "a", "image": {"url": "a.png"}}', "unknown key 'url' in 'image'"),
    (b'{"text": "a", "image": {"bytes": "a.png"}}', "'image' must be a path or a list of paths"),
    (b'{"text": "a", "images": {"path": 7}}', "'images' must be a path or a list of paths"),
    (b'{"text": "a", "images": [["good.png"]]}', "'images' must be a path or a list of paths"),
    (b'{"text": "a", "images": ["good.png", null]}', "'images' has an item that is null or blank"),
    (b'{"text": "a", "images": ["good.png", "gone.png"]}', "gone.png: no such image file"),
    (b'{"text": "a", "image": "good.png", "images": ["good.png"]}', "both 'image' and 'images' have images"),
]


def test_one_bad_line_stops_no_other_and_is_named(tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(png(1))
    lines = [
        b'\xef\xbb\xbf{"text": "first"}',
        *(line for line, _ in BAD_ROWS),
        b'{"text": "last", "images": "good.png"}',
    ]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    summary = run(tmp_path / "in.jsonl", tmp_path / "out.parquet", batch_size=4)
    assert (summary["embedded"], summary["failed"]) == (2, len(BAD_ROWS))
    assert [row["text"] for row in read(tmp_path / "out.parquet")[0]] == ["first", "last"]
    for number, (error, (_, reason)) in enumerate(zip(errors(tmp_path / "out.errors.jsonl"), BAD_ROWS, strict=True), 2):
        assert error["where"] == f"in.jsonl:{number}" and reason in error["reason"]
        assert "in.jsonl" not in error["reason"]  # it is said once


def test_a_line_without_end_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muco.data.lines, "LONGEST_LINE", 100)
    with pytest.raises(DataError, match=r"in.jsonl:2: the line is longer"):
        run(write_jsonl(tmp_path / "in.jsonl", [{"text": "a"}, {"text": "b" * 200}]), tmp_path / "out.parquet")


def test_the_images_of_a_row_have_a_limit_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muco.embed.vectors, "ROW_BYTES", 3 * 3 * 40 * 30)
    (tmp_path / "a.png").write_bytes(png(1))
    rows = [{"images": ["a.png"] * number} for number in (3, 4)]
    assert run(write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out.parquet")["failed"] == 1
    assert "use fewer or smaller ones" in errors(tmp_path / "out.errors.jsonl")[0]["reason"]


def test_a_cell_of_parquet_that_python_cannot_hold(tmp_path: Path) -> None:
    half = pa.py_buffer(b"fine\xed\xa0\x80last")
    text = pa.StringArray.from_buffers(3, pa.py_buffer(np.array([0, 4, 7, 11], dtype=np.int32)), half)
    pq.write_table(pa.table({"text": text}), tmp_path / "in.parquet")
    assert run(tmp_path / "in.parquet", tmp_path / "out.parquet")["failed"] == 1
    assert [row["text"] for row in read(tmp_path / "out.parquet")[0]] == ["fine", "last"]
    [error] = errors(tmp_path / "out.errors.jsonl")
    assert error["where"] == "in.parquet row 1" and error["reason"].startswith("'text' cannot be read ('utf-8'")


def test_lines_that_are_not_utf8_and_broken_bytes_in_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "caf\xe9"}\n{"text": "fine"}\n')
    assert run(tmp_path / "a.jsonl", tmp_path / "a.parquet")["failed"] == 1
    pq.write_table(pa.table({"image": [png(1), b"", b"no image", None]}), tmp_path / "b.parquet")
    assert run(tmp_path / "b.parquet", tmp_path / "ob.parquet")["failed"] == 3
    found = errors(tmp_path / "ob.errors.jsonl")
    assert [(e["row"], e["where"]) for e in found] == [(i, f"b.parquet row {i}") for i in (1, 2, 3)]


def test_file_names_that_are_not_unicode(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(png(1))
    try:
        Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/\xff.png")).write_bytes(png(2))
    except OSError:
        pytest.skip("this file system takes Unicode names only")
    assert run(tmp_path / "in", tmp_path / "out.parquet")["failed"] == 1
    assert errors(tmp_path / "out.errors.jsonl")[0]["row"] == 1


def test_a_row_beyond_the_models_context_fails_by_name(tmp_path: Path, real_model, monkeypatch) -> None:
    monkeypatch.setattr(real_model.encoder.muco_processor, "max_tokens", 50)
    rows = [{"id": f"row {number}", "text": "x y " * (200 if number == 2 else 2)} for number in range(4)]
    summary = run(write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "out.parquet", real_model)
    assert (summary["embedded"], summary["failed"]) == (3, 1)
    (failed,) = errors(tmp_path / "out.errors.jsonl")
    assert failed["id"] == "row 2" and failed["reason"].endswith(
        "but the model reads at most 50; shorten the text, or give fewer or smaller images"
    )


def test_one_bad_row_costs_its_own_batch_only_the_speed(tmp_path: Path) -> None:
    class Counting(Hashed):
        calls: list[int] = []

        def encode(self, inputs, **kwargs):
            self.calls.append(len(inputs))
            return super().encode(inputs, **kwargs)

    rows = [{"text": "<|emb|>" if i == 6 else f"row {i}"} for i in range(12)]
    run(write_jsonl(tmp_path / "items.jsonl", rows), tmp_path / "out.parquet", Counting(), batch_size=4)
    assert Counting.calls == [4, 4, 1, 1, 1, 1, 4]


def test_when_all_rows_fail_the_list_is_written_and_the_next_run_tries_again(tmp_path: Path) -> None:
    source, output = (
        write_jsonl(tmp_path / "items.jsonl", [{"image": f"{i}.png"} for i in range(5)]),
        tmp_path / "o.parquet",
    )
    with pytest.raises(DataError, match="none of the 5 rows .* no such image file"):
        run(source, output, shard_rows=2)
    assert len(errors(tmp_path / "o.errors.jsonl")) == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["items.jsonl", "o.errors.jsonl"]
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    assert run(source, output)["embedded"] == 5
    assert not (tmp_path / "o.errors.jsonl").exists()  # the list of the earlier run would be false now


def test_dialogues_are_refused_with_what_to_do(tmp_path: Path) -> None:
    rows = [{"image": "a.png", "turns": [{"query": "what?", "target": "a ring"}]}]
    with pytest.raises(DataError, match=r"items.jsonl:1: a dialogue .*muco evaluate"):
        run(write_jsonl(tmp_path / "items.jsonl", rows), tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


def test_inputs_that_cannot_be_read_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone" / "1.heic").write_bytes(b"x")
    (tmp_path / "blank.jsonl").write_text("\n \n")
    (tmp_path / "x.png").write_bytes(png(1))
    (tmp_path / "no.parquet").write_text("PAR1 not really")
    pq.write_table(pa.table({"caption": ["a"], "key": [1]}), tmp_path / "other.parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "none.parquet")
    for name, message in {
        "gone": "no such file or folder",
        "empty": "no images in this folder",
        "phone": "no images in this folder, .* found 1 .heic",
        "blank.jsonl": "no rows",
        "x.png": "pass a folder of images",
        "no.parquet": "not a readable Parquet file",
        "other.parquet": "no column for text, image or video; it has caption, key",
        "none.parquet": "no rows",
    }.items():
        with pytest.raises(DataError, match=message):
            run(tmp_path / name, tmp_path / "out.parquet")
    with pytest.raises(DataError, match="no column 'captoin'; it has caption, key"):
        run(tmp_path / "other.parquet", tmp_path / "out.parquet", text_column="captoin")
    with pytest.raises(ValueError, match="at least 1"):
        run(tmp_path / "x.png", tmp_path / "out.parquet", batch_size=0)
    assert not list(tmp_path.glob("out*"))
    assert run(tmp_path / "other.parquet", tmp_path / "out.parquet", text_column="caption")["embedded"] == 1


def test_links_to_folders_are_left_out_and_links_to_images_followed(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.png").write_bytes(png(1))
    (folder / "loop").symlink_to(folder)
    (folder / "b.png").symlink_to(folder / "a.png")
    (folder / "c.png").symlink_to(folder / "gone.png")
    assert run(folder, tmp_path / "out.parquet")["failed"] == 1
    assert [row["id"] for row in read(tmp_path / "out.parquet")[0]] == ["a.png", "b.png"]


def test_the_bar_is_on_stderr_and_counts_all_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(texts(tmp_path, 7), tmp_path / "out.parquet", progress=True, batch_size=2)
    captured = capsys.readouterr()
    assert captured.out == "" and "7/7" in captured.err
    run(texts(tmp_path, 7), tmp_path / "quiet.parquet", progress=None)
    assert capsys.readouterr() == ("", "")
