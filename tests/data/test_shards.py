"""Webdataset shards: samples by shared names, random access, indexes that are kept, and hostile archives."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from muco.data import shards as shards_module
from muco.data.shards import ShardsData
from muco.dialogue import Content, Sample
from muco.errors import DataError
from muco.images import open_image

Members = list[tuple[str, bytes]]


def picture(level: int, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (level, 20, 30)).save(stream, kind)
    return stream.getvalue()


def write(path: Path, members: Members, format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def pair(number: int) -> Members:
    return [(f"{number:05}.png", picture(number)), (f"{number:05}.txt", f"square number {number}\n".encode())]


def everything(data: ShardsData) -> list[Sample]:
    return [data[i] for i in range(len(data))]


def caption(sample: Sample) -> str:
    return sample.turns[0].query[0].text


def test_samples_of_all_shards_in_the_order_of_their_names(tmp_path: Path) -> None:
    write(tmp_path / "b.tar", pair(3))
    write(tmp_path / "a.tar", pair(1) + pair(2))
    data = ShardsData(tmp_path)
    assert [caption(sample) for sample in everything(data)] == [f"square number {n}" for n in (1, 2, 3)]
    assert [caption(data[i]) for i in (2, -3, 1)] == [f"square number {n}" for n in (3, 1, 2)]
    sample = data[1]
    assert sample.where == f"{tmp_path / 'a.tar'} row 1 (00002)" and sample.id == "a.tar/00002"
    (turn,) = sample.turns
    assert turn.target == (Content(images=(picture(2),)),) and sample.images == () and turn.kind == "text-to-image"
    assert open_image(turn.target[0].images[0], small_side=0).getpixel((0, 0)) == (2, 20, 30)
    with pytest.raises(IndexError, match="row 3 of 3"):
        data[3]
    again = pickle.loads(pickle.dumps(data))
    assert everything(again) == everything(data) and again.fingerprint == data.fingerprint
    assert [caption(s) for s in everything(ShardsData([tmp_path / "b.tar", tmp_path / "a.tar"]))][
        0
    ] == "square number 3"


def test_the_other_direction_asks_with_the_image(tmp_path: Path) -> None:
    data = ShardsData(write(tmp_path / "a.tar", pair(1)), direction="image-to-text")
    (turn,) = data[0].turns
    assert data[0].images == (picture(1),) and turn.query == (Content(),) and turn.kind == "image-to-text"
    assert turn.target == (Content("square number 1"),)
    with pytest.raises(DataError, match="unknown direction 't2i'; pass 'text-to-image' or 'image-to-text'"):
        ShardsData(tmp_path, direction="t2i")  # type: ignore[arg-type]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_may_be_long_in_folders_and_apart(tmp_path: Path, format: int) -> None:
    deep = "/".join(["folder"] * 20)
    members = [("./x/1.jpg", picture(1, "JPEG")), (f"{deep}/1.WEBP", picture(2, "WEBP")), ("x/1.txt", b"one")]
    members += [(f"{deep}/1.txt", "größer".encode()), (f"{deep}/1.seg.png", b"mask"), (f"{deep}/1.cls", b"5")]
    data = ShardsData(write(tmp_path / "a.tar", members, format))
    assert [caption(sample) for sample in everything(data)] == ["one", "größer"] and not data.skipped
    assert [open_image(s.turns[0].target[0].images[0]).size for s in everything(data)] == [(56, 56)] * 2


def test_json_holds_a_caption_or_a_sample_of_our_own(tmp_path: Path) -> None:
    own = {
        "turns": [{"query": "", "target": "a ring"}, {"query": ["Old?", "Is it old?"], "target": "yes", "kind": "age"}]
    }
    values = [{"caption": "<|image_1|>\na mug", "url": "x"}, own, own | {"id": "mine"}]
    members = []
    for number, value in enumerate(values):
        members += [(f"{number}.png", picture(number)), (f"{number}.json", json.dumps(value).encode())]
    members += [("3.png", picture(3)), ("3.json", b'{"caption": "not this"}'), ("3.txt", b"but this")]
    data = ShardsData(write(tmp_path / "a.tar", members), direction="image-to-text")
    assert data[0].turns[0].target[0].text == "a mug" and data[3].turns[0].target[0].text == "but this"
    assert data[1].images == (picture(1),) and data[1].id == "a.tar/1" and data[2].id == "mine"
    assert [(t.query[0].text, t.target[0].text, t.kind) for t in data[1].turns] == [
        ("", "a ring", None),
        ("Old?", "yes", "age"),
    ]
    assert ShardsData(write(tmp_path / "b.tar", members[:2]), caption="url")[0].turns[0].query[0].text == "x"


@pytest.mark.parametrize("place", [{"video": "a"}, {"turns": [{"query": "q", "target": {"video": "a"}}]}])
def test_json_names_no_video_of_this_machine(tmp_path: Path, place: dict) -> None:
    value = {"turns": [{"query": "q", "target": "t"}]} | place
    members = [("0.png", picture(0)), ("0.json", json.dumps(value).encode())]
    with pytest.raises(DataError, match=r"'video' in the \.json; in a shard the image is a member"):
        ShardsData(write(tmp_path / "a.tar", members))[0]


# ── the index ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_shard_is_gone_through_once_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        write(tmp_path / f"{name}.tar", pair(ord(name)))
    gone_through: list[str] = []
    real: Callable = shards_module._go_through

    def stopping(file: io.BufferedReader, shard: Path) -> tuple:
        if shard.name == "c.tar" and len(gone_through) == 2:
            raise KeyboardInterrupt
        gone_through.append(shard.name)
        return real(file, shard)

    monkeypatch.setattr(shards_module, "_go_through", stopping)
    with pytest.raises(KeyboardInterrupt):
        ShardsData(tmp_path, cache=tmp_path / "cache")
    monkeypatch.setattr(
        shards_module, "_go_through", lambda file, shard: gone_through.append(shard.name) or real(file, shard)
    )
    first = everything(ShardsData(tmp_path, cache=tmp_path / "cache"))
    assert gone_through == ["a.tar", "b.tar", "c.tar"]
    assert everything(ShardsData(tmp_path, cache=tmp_path / "cache")) == first and len(gone_through) == 3
    assert sorted(p.suffix for p in (tmp_path / "cache").iterdir()) == [".npz"] * 3, "and nothing half-written"
    write(tmp_path / "b.tar", pair(1) + pair(2))
    assert len(ShardsData(tmp_path, cache=tmp_path / "cache")) == 4 and gone_through[3:] == ["b.tar"]


def test_shards_of_the_same_name_do_not_share_an_index(tmp_path: Path) -> None:
    for folder, numbers in (("x", (1, 2)), ("y", (3, 4))):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "a.tar", [member for n in numbers for member in pair(n)])
        os.utime(tmp_path / folder / "a.tar", ns=(1, 1))
    data = ShardsData([tmp_path / "x/a.tar", tmp_path / "y/a.tar"], cache=tmp_path / "cache")
    assert [sample.id for sample in everything(data)] == [f"a.tar/{n:05}" for n in (1, 2, 3, 4)]


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    shard = write(tmp_path / "a.tar", pair(1))
    ShardsData(shard)
    (kept,) = (tmp_path / ".muco-shards").iterdir()
    kept.write_bytes(kept.read_bytes()[:50])
    with pytest.raises(DataError, match=r"a.tar-.*npz: damaged \(.*remove it, it is made anew"):
        ShardsData(shard)
    np.savez(kept, places=np.zeros(1))
    with pytest.raises(DataError, match="damaged"):
        ShardsData(shard)


def test_an_index_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    shard = write(tmp_path / "a.tar", pair(1))
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match="cache: cannot write the cache .*; pass another folder as 'cache'"):
        ShardsData(shard, cache=tmp_path / "cache")


def test_a_shard_that_changes_while_it_is_open_is_refused(tmp_path: Path) -> None:
    data = ShardsData(write(tmp_path / "a.tar", pair(1)))
    write(tmp_path / "a.tar", pair(2) + pair(3) + pair(4) + pair(5) + pair(6) + pair(7))
    with pytest.raises(DataError, match="a.tar: the file changed since it was opened"):
        data[0]


def test_the_fingerprint_changes_with_shards_and_options(tmp_path: Path) -> None:
    shard = write(tmp_path / "a.tar", pair(1))
    first = ShardsData(shard).fingerprint
    assert first == ShardsData(shard).fingerprint and len(first) == 64
    assert first != ShardsData(shard, direction="image-to-text").fingerprint
    assert first != ShardsData(shard, caption="text").fingerprint
    os.utime(shard, ns=(1, 1))
    assert first != ShardsData(shard).fingerprint


# ── what is left out, and what is refused ────────────────────────────────────────────────────────────────────────────


def special(path: Path, name: str, type: bytes, target: str = "/etc/passwd") -> Path:
    with tarfile.open(path, "a") as archive:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = type, target
        archive.addfile(member)
    return path


@pytest.mark.parametrize("type", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_left_out(tmp_path: Path, type: bytes, caplog: pytest.LogCaptureFixture) -> None:
    shard = write(tmp_path / "a.tar", [*pair(1), ("2.txt", b"two")])
    special(shard, "2.png", type)
    with caplog.at_level(logging.WARNING):
        data = ShardsData(shard)
    assert [caption(sample) for sample in everything(data)] == ["square number 1"]
    assert data.skipped == {"links, devices and other special members": 1, "samples without an image": 1}
    assert "a.tar: left out links, devices and other special members: 1; samples without an image: 1" in caplog.text
    assert ShardsData(shard).skipped == data.skipped, "the index remembers"


@pytest.mark.parametrize("name", ["/etc/2.txt", "../2.txt", "a/../../2.txt", "a\\2.txt", "2\n.txt"])
def test_names_outside_of_the_archive_are_left_out(tmp_path: Path, name: str) -> None:
    data = ShardsData(write(tmp_path / "a.tar", [*pair(1), (name, b"two")]))
    assert len(data) == 1
    assert data.skipped == {"members with names outside of the archive or with control characters": 1}


def test_folders_and_other_members_are_no_matter(tmp_path: Path) -> None:
    shard = special(
        write(tmp_path / "a.tar", [*pair(1), ("readme", b"x"), ("big.npy", b"x" * 99)]), "d", tarfile.DIRTYPE
    )
    data = ShardsData(shard)
    assert len(data) == 1 and not data.skipped


def test_members_that_are_too_large_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "MAX_TEXT_BYTES", 99)
    monkeypatch.setattr(shards_module, "MAX_BYTES", 999)
    members = [*pair(1), ("2.png", picture(2)), ("2.txt", b"x" * 100), ("3.png", b"x" * 1000), ("3.txt", b"x" * 99)]
    data = ShardsData(write(tmp_path / "a.tar", members))
    assert len(data) == 1 and data.skipped["members that are too large"] == 2
    assert data.skipped["samples without an image"] == data.skipped["samples without a .txt or .json"] == 1


def test_samples_with_several_images_are_left_out(tmp_path: Path) -> None:
    data = ShardsData(write(tmp_path / "a.tar", [*pair(1), *pair(2), ("00002.jpg", picture(2, "JPEG"))]))
    assert len(data) == 1 and data.skipped == {"samples with several images": 1}


@pytest.mark.parametrize("end", [1, 100, 512, 600, 1023, 1024, 1500, 2600])
def test_a_truncated_archive_is_refused(tmp_path: Path, end: int) -> None:
    shard = write(tmp_path / "a.tar", pair(1) + pair(2))
    shard.write_bytes(shard.read_bytes()[:end])
    with pytest.raises(DataError, match=r"a.tar: not a whole plain tar archive \(.*; download it again"):
        ShardsData(shard)
    assert not (tmp_path / ".muco-shards").exists()


def test_a_damaged_header_is_not_the_end(tmp_path: Path) -> None:
    shard = write(tmp_path / "a.tar", pair(1) + pair(2))
    content = bytearray(shard.read_bytes())
    third = content.index(b"00002.png")
    content[third + 150] ^= 0xFF  # its check sum
    shard.write_bytes(content)
    with pytest.raises(DataError, match=rf"a.tar: not a whole plain tar archive \(no end at byte {third}\)"):
        ShardsData(shard)


def test_headers_that_claim_to_be_huge_are_not_read(tmp_path: Path) -> None:
    shard = write(tmp_path / "a.tar", [("x" * 200 + ".png", picture(1))], tarfile.GNU_FORMAT)
    content = bytearray(shard.read_bytes())
    member = tarfile.TarInfo("././@LongLink")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, 1 << 33
    content[:512] = member.tobuf(tarfile.GNU_FORMAT)
    shard.write_bytes(content)
    with pytest.raises(DataError, match="not a whole plain tar archive \\(a header of 8589934592 bytes\\)"):
        ShardsData(shard)


def test_sizes_below_zero_do_not_go_round_in_circles(tmp_path: Path) -> None:
    shard = write(tmp_path / "a.tar", pair(1))
    content = bytearray(shard.read_bytes())
    header = bytearray(content[:512])
    header[124:136] = (2**96 - 512).to_bytes(12, "big")  # -512, in the binary form of sizes
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    shard.write_bytes(header + content[512:])
    with pytest.raises(DataError, match=r"a.tar: not a whole plain tar archive \('00001.png' has a size below 0\)"):
        ShardsData(shard)


def test_endless_chains_of_headers_are_refused(tmp_path: Path) -> None:
    member = tarfile.TarInfo("pax")
    member.type = tarfile.XHDTYPE
    (tmp_path / "a.tar").write_bytes(member.tobuf(tarfile.USTAR_FORMAT) * 5000)
    with pytest.raises(DataError, match="a.tar: not a whole plain tar archive"):
        ShardsData(tmp_path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(DataError, match="a.tar: not a whole plain tar archive"):
        ShardsData(tmp_path)
    with tarfile.open(tmp_path / "a.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("1.txt"))
    with pytest.raises(DataError, match="a.tar: not a whole plain tar archive"):
        ShardsData(tmp_path)
    (tmp_path / "a.tar").rename(tmp_path / "a.tar.gz")
    with pytest.raises(DataError, match="a.tar.gz: a shard must be a plain .tar file; unpack a compressed one"):
        ShardsData(tmp_path / "a.tar.gz")
    with pytest.raises(DataError, match=f"{tmp_path}: no .tar file"):
        ShardsData(tmp_path)
    with pytest.raises(DataError, match="shards: no .tar file"):
        ShardsData([])
    with pytest.raises(DataError, match="gone.tar: cannot be read"):
        ShardsData(tmp_path / "gone.tar")
    shard = write(tmp_path / "a.tar", pair(1)[:1])
    with pytest.raises(
        DataError, match="no sample with an image and a .txt or .json in 1 shards .samples without a .txt"
    ):
        ShardsData(shard)
    with pytest.raises(DataError, match="a.tar: the member '00001.png' is there twice; keep one"):
        ShardsData(write(tmp_path / "a.tar", pair(1) + pair(1)))


@pytest.mark.parametrize(
    "kind, content, sentence",
    [
        ("txt", b" \n", "the caption is empty; fix the sample or leave it out"),
        ("txt", b"\xff", "the .txt is not UTF-8 (invalid start byte); fix the sample"),
        ("json", b"{", "malformed JSON"),
        ("json", b"[]", "the line must be a JSON object, not a list"),
        (
            "json",
            b'{"text": "a", "url": "b"}',
            "no 'caption' in the .json; found text, url; pass the key of the caption",
        ),
        ("json", b"{}", "no 'caption' in the .json; found nothing"),
        ("json", b'{"caption": 5}', "'caption' must be a string or null, not 5"),
        ("json", b'{"caption": null}', "the caption is empty"),
        ("json", b'{"turns": []}', "'turns' must be a list of at least one turn, not an empty list"),
        (
            "json",
            b'{"image": "/etc/passwd", "turns": [{"query": "a", "target": "b"}]}',
            "'image' in the .json; in a shard",
        ),
        ("json", b'{"turns": [{"query": "a", "target": {"images": ["../x"]}}]}', "'images' in the .json; in a shard"),
        (
            "json",
            b'{"turns": ' + b'{"a":' * 900 + b"[]" + b"}" * 901,
            "malformed JSON: nested too deep",
        ),
        ("json", b'{"turns": [{"query": "a", "target": "b", "negatives": [{"image": "x"}]}]}', "'image' in the .json;"),
    ],
)
def test_a_bad_text_is_named(tmp_path: Path, kind: str, content: bytes, sentence: str) -> None:
    shard = write(tmp_path / "a.tar", [*pair(1), ("2.png", picture(2)), (f"2.{kind}", content)])
    data = ShardsData(shard)
    assert caption(data[0]) == "square number 1"
    with pytest.raises(DataError) as error:
        data[1]
    assert str(error.value).startswith(f"{shard} row 1 (2): {sentence}")
