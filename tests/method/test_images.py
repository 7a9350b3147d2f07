"""Images: every orientation and mode against a slow obvious reference, and every bad file by name."""

from __future__ import annotations

import copy
import io
import os
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from families import model
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from muco import images
from muco.data.images import SameImage
from muco.errors import DataError, ImageError
from muco.images import FORMATS, image_digest, open_image, resize_to_budget


def noise(width=40, height=30, channels=3, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values.squeeze())


def encoded(image, format="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def forged_png(width, height, data=b""):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


# ── what comes in ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_path_bytes_and_pillow_image_give_the_same_pixels(tmp_path):
    image = noise()
    path = tmp_path / "a.png"
    path.write_bytes(encoded(image))
    for given_image in (path, str(path), path.read_bytes(), image, Image.open(path)):
        assert np.array_equal(open_image(given_image), image)


def test_an_image_as_stored_is_neither_turned_nor_laid_onto_white():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(noise(), "PNG", exif=exif)
    assert open_image(turned).size == (30, 40)
    found = open_image(turned, as_stored=True)
    assert np.array_equal(found, noise()) and not found.info and not found.getexif()
    clear = Image.fromarray(np.dstack([np.asarray(noise()), np.zeros((30, 40), np.uint8)]))
    assert np.array_equal(open_image(encoded(clear), as_stored=True), noise())
    assert np.asarray(open_image(encoded(clear))).min() == 255


@pytest.mark.parametrize("format", FORMATS)
def test_every_accepted_format_is_read(format):
    image = open_image(encoded(noise(), format))
    assert (type(image), image.mode, image.size) == (Image.Image, "RGB", (40, 30))


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (30, 30), color) for color in ("red", "blue")]
    for format in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=10)
        assert open_image(data).getpixel((3, 3)) == pytest.approx((255, 0, 0), abs=3)


# ── large JPEGs ──────────────────────────────────────────────────────────────────────────────────────────────────────


def jpeg(width: int, height: int, format: str = "JPEG") -> bytes:
    """A smooth picture with coarse detail."""
    coarse = np.random.default_rng(0).integers(40, 216, (9, 12, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(stream, format, quality=92)
    return stream.getvalue()


@given(st.integers(1, 20_000), st.integers(1, 20_000), st.sampled_from(["llava", "qwen2_vl"]))
def test_what_is_left_of_a_jpeg_has_twice_the_detail_that_the_model_reads(width, height, family):
    processor = model(family).encoder.muco_processor
    factor = processor.reduction(width, height)
    assert factor in (1, 2, 4, 8)

    def enough(factor: int) -> bool:
        if processor.pixels:
            return width * height / factor**2 >= 4 * processor.pixels[1]
        return min(width, height) / factor >= 2 * processor._side

    assert factor == 1 or enough(factor)
    assert factor == 8 or not enough(2 * factor)


def test_only_models_that_read_all_images_alike_or_count_pixels_have_jpegs_reduced():
    reductions = {name: model(name).encoder.muco_processor.reduction(12_000, 9_000) for name in ("llava", "llava_next")}
    assert reductions["llava"] > 1 and reductions["llava_next"] == 1  # which cuts large images into tiles


def test_a_large_jpeg_is_decoded_smaller_and_gives_nearly_the_same_pixels(tmp_path):
    processor = model("llava").encoder.muco_processor
    side, data = processor._side, jpeg(1600, 1200)
    factor = processor.reduction(1600, 1200)
    assert factor > 1
    small, whole = processor.opened(data), open_image(data)
    assert small.size == (1600 // factor, 1200 // factor) and whole.size == (1600, 1200)
    resized = (np.asarray(one.resize((side, side), Image.Resampling.BICUBIC), dtype=float) for one in (small, whole))
    assert abs(next(resized) - next(resized)).max() <= 2
    (tmp_path / "a.jpg").write_bytes(data)
    assert processor.opened(tmp_path / "a.jpg") == small
    opened = Image.open(io.BytesIO(data))
    assert processor.opened(opened).size == opened.size == (1600, 1200)  # the caller's own is never changed
    assert processor.opened(jpeg(1600, 1200, "PNG")).size == (1600, 1200)
    as_stored = copy.copy(processor)
    as_stored.images_as_stored = True
    assert as_stored.opened(data).size == (1600, 1200)


def test_the_input_is_not_changed_and_the_result_carries_no_metadata():
    exif = Image.Exif()
    exif[0x0112] = 6
    original = Image.open(io.BytesIO(encoded(noise(), "JPEG", exif=exif.tobytes())))
    before = np.array(original)
    result = open_image(original)
    result.putpixel((0, 0), (1, 2, 3))
    assert np.array_equal(original, before) and original.getexif()[0x0112] == 6
    assert result.info == {} and not result.getexif()
    plain = noise()
    open_image(plain).putpixel((0, 0), (1, 2, 3))
    assert np.array_equal(plain, noise())


def upright(pixels, orientation):
    """The reference: what each EXIF orientation says about rows and columns."""
    return {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a),
    }[orientation](pixels)


@given(st.integers(28, 48), st.integers(28, 48), st.integers(1, 8), st.sampled_from(["PNG", "WEBP", "TIFF"]))
def test_exif_orientation_is_applied_once(width, height, orientation, format):
    image = noise(width, height)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    once = open_image(encoded(image, format, exif=exif, **options))
    assert np.array_equal(once, upright(np.array(image), orientation))
    assert np.array_equal(open_image(once), once)


@given(st.sampled_from(["RGBA", "LA", "PA", "P", "La", "RGBa"]), st.integers(0, 255), st.integers(0, 2**32 - 1))
def test_transparency_is_laid_onto_white(mode, alpha, seed):
    rgba = np.array(noise(30, 28, 4, seed))
    rgba[..., 3] = np.where(rgba[..., 3] < 128, alpha, 255)
    image = Image.fromarray(rgba)
    if mode in ("LA", "La"):
        image = image.convert("LA")
    image = image.quantize() if mode == "P" else image.convert(mode)
    # The reference takes what Pillow says each pixel is, and blends it by hand.
    seen = np.array((image.convert("LA") if mode == "La" else image).convert("RGBA")).astype(float)
    opacity = seen[..., 3:] / 255
    expected = seen[..., :3] * opacity + 255 * (1 - opacity)
    assert np.abs(np.array(open_image(image)) - expected).max() <= 1


@pytest.mark.parametrize(("mode", "color"), [("1", 0), ("L", 7), ("RGB", (1, 2, 3)), ("P", 5), ("I;16", 300)])
def test_the_transparent_colour_of_a_png_becomes_white(mode, color):
    image = Image.new(mode, (30, 30), color)
    if mode == "P":
        image.putpalette(list(range(30)))
    opened = open_image(encoded(image, transparency=color))
    assert opened.getcolors() == [(900, (255, 255, 255))]


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16", "I;16B"]
)
def test_every_other_mode_becomes_rgb(mode):
    image = open_image(Image.new(mode, (32, 28)))
    assert (image.mode, image.size) == ("RGB", (32, 28))


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV"])
def test_colour_spaces_keep_the_colour(mode):
    red = Image.new("RGB", (28, 28), (200, 40, 30)).convert(mode)
    assert open_image(red).getpixel((0, 0)) == pytest.approx((200, 40, 30), abs=4)


def test_sixteen_bits_are_scaled_not_clipped():
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.round(every / 257).astype(np.uint8)
    for image in (Image.fromarray(every), encoded(Image.fromarray(every)), Image.fromarray(every.astype(np.int32))):
        assert np.array_equal(np.array(open_image(image))[..., 1], expected)


def test_float_pixels_must_be_fractions():
    assert open_image(Image.new("F", (28, 28), 0.5)).getpixel((0, 0)) == (128, 128, 128)
    for value in (-0.1, 1.5, float("nan")):
        with pytest.raises(ImageError, match="float pixels outside 0 … 1"):
            open_image(Image.new("F", (28, 28), value))
    with pytest.raises(ImageError, match="mode I outside 0 … 65535"):
        open_image(Image.new("I", (28, 28), 70_000))


# ── size ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.integers(1, 60), st.integers(1, 60))
def test_a_small_side_makes_56_by_56(width, height):
    expected = (56, 56) if min(width, height) < 28 else (width, height)
    image = Image.new("RGB", (width, height), (10, 20, 30))
    assert open_image(image).size == expected
    assert open_image(image).getcolors() == [(expected[0] * expected[1], (10, 20, 30))]
    assert open_image(image, small_side=0).size == (width, height)


def test_very_long_images_are_refused():
    assert open_image(Image.new("RGB", (200, 1))).size == (56, 56)
    for size in ((201, 1), (1, 201), (28, 5601)):
        with pytest.raises(ImageError, match="longer than 200 : 1"):
            open_image(Image.new("RGB", size))
    with pytest.raises(ImageError, match="no pixels"):
        open_image(Image.new("RGB", (0, 5)))


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 40_000))
def test_resize_to_budget(width, height, budget):
    image = Image.new("RGB", (width, height), (9, 99, 199))
    small = resize_to_budget(image, budget)
    if width * height <= budget:
        assert small is image
        return
    assert 1 <= small.width * small.height <= budget
    assert small.getpixel((0, 0)) == (9, 99, 199)
    scale = (budget / (width * height)) ** 0.5
    if min(width, height) * scale >= 1:
        assert small.width == pytest.approx(width * scale, abs=1) and small.height == pytest.approx(
            height * scale, abs=1
        )


def test_resize_to_budget_refuses_no_budget():
    with pytest.raises(ValueError, match="at least 1"):
        resize_to_budget(Image.new("RGB", (4, 4)), 0)


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("side", [9_500, 14_000, 60_000])  # Pillow: a warning, an error, an error
def test_bombs_are_refused_by_the_header(tmp_path, side, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("the bomb was decoded"))
    path = tmp_path / "bomb.png"
    path.write_bytes(forged_png(side, side))
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(ImageError, match=r"data.jsonl:7: .*bomb.png: too many pixels"):
        open_image(path, where="data.jsonl:7")
    with pytest.raises(ImageError, match="too many pixels"):  # our limit cannot lift Pillow's
        open_image(path.read_bytes(), max_pixels=10**12)
    assert before == Image.MAX_IMAGE_PIXELS


def test_our_own_limit_holds_for_files_and_pillow_images():
    for image in (forged_png(40, 30, b"\0" * 121 * 30), noise()):
        assert open_image(image, max_pixels=1200).size == (40, 30)
        with pytest.raises(ImageError, match="40 x 30 is over the limit of 1,199 pixels"):
            open_image(image, max_pixels=1199)


def test_a_jpeg_of_very_many_scans_or_segments_is_refused_undecoded(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    data = encoded(noise(), "JPEG", progressive=True)
    start, end = data.rfind(b"\xff\xda"), data.rfind(b"\xff\xd9")
    scans = data[:end] + data[start:end] * 100 + data[end:]
    begun = data[:20]  # up to the end of the first segment
    bad = {
        "101 scans": scans,
        "101 segments of EXIF": begun + b"\xff\xe1\0\x09Exif\0\0a" * 101 + data[20:],
        "10,?001 segments": begun + b"\xff\xfe\0\x02" * 10_001 + data[20:],
        "1,048,577 bytes outside": begun + b"\xff" * (2**20 + 1) + data[20:],
        "2,000,000 bytes outside": begun + b"a" * 2_000_000,
        # what looks like a segment of 64 kB to a reader of markers, and not to the decoder
        "101 scans and 0": data[:end] + b"\xff\xf0\xff\xff" + data[start:end] * 100 + data[end:],
    }
    for says, file in bad.items():
        (tmp_path / "bad.jpg").write_bytes(file)
        for image in (file, tmp_path / "bad.jpg"):
            with pytest.raises(ImageError, match=rf"(bytes|bad\.jpg): a JPEG of too many parts \(.*{says}.*save it"):
                open_image(image)


def test_what_looks_like_scans_within_segments_or_behind_the_picture_does_not_count(tmp_path):
    data, look = encoded(noise(), "JPEG", progressive=True), b"\xff\xda" * 5000
    segment = b"\xff\xe1" + (len(look) + 2).to_bytes(2, "big") + look
    for file in (data[:20] + segment + data[20:], data + look, data[:20] + b"\xff" * 1000 + data[20:]):
        assert np.array_equal(open_image(file), open_image(data))
    several = encoded(noise(), "MPO", save_all=True, append_images=[noise(seed=n) for n in range(150)])
    assert Image.open(io.BytesIO(several)).n_frames == 151
    assert np.array_equal(open_image(several), open_image(encoded(noise(), "JPEG")))


def tiled_tiff(width, height, side=32):
    """A grey TIFF of side x side pixels, which are the corner of one tile."""
    data = zlib.compress(bytes(width * height))
    tags = {256: side, 257: side, 258: 8, 259: 8, 262: 1, 277: 1, 322: width, 323: height, 324: 0, 325: len(data)}
    tags[324] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


def test_a_tiff_of_large_tiles_is_refused_undecoded(monkeypatch):
    assert open_image(tiled_tiff(64, 48), max_pixels=64 * 48).size == (32, 32)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(ImageError, match="its tiles are 64 x 48, over the limit of 3,071 pixels"):
        open_image(tiled_tiff(64, 48), max_pixels=64 * 48 - 1)


def test_large_files_are_refused_unread(tmp_path):
    path = tmp_path / "big.png"
    with path.open("wb") as file:
        file.truncate(images.MAX_BYTES + 1)  # sparse: it takes no disk
    with pytest.raises(ImageError, match=r"big.png: 268,435,457 bytes; at most 268,435,456"):
        open_image(path)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("share", [0.4, 0.9])
def test_truncated_files_are_refused(tmp_path, format, share):
    data = encoded(noise(64, 64), format)
    path = tmp_path / "cut"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ImageError, match=r"cut: (the image is truncated or broken|not an image)"):
        open_image(path)
    with pytest.raises(ImageError, match="^row 3: image bytes: "):
        open_image(path.read_bytes(), where="row 3")
    if format == "JPEG":
        with pytest.raises(ImageError, match=r"^Pillow image: the image is truncated"):
            open_image(Image.open(io.BytesIO(path.read_bytes())))


@given(data=st.data(), format=st.sampled_from(FORMATS))
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # damaged EXIF and the like: only remarks
def test_damaged_files_raise_nothing_but_image_errors(data, format):
    damaged = bytearray(encoded(noise(32, 32), format))
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert open_image(bytes(damaged)).mode == "RGB"
    except ImageError as error:
        assert "image bytes" in str(error)


@given(st.binary(max_size=200))
def test_other_bytes_are_no_image(data):
    with pytest.raises(ImageError, match="^image bytes: |^image bytes: the image is empty"):
        open_image(data)


def test_other_formats_are_refused(tmp_path):
    for format in ("ICO", "TGA", "PCX", "EPS"):
        with pytest.raises(ImageError, match="must be a sound PNG, JPEG"):
            open_image(encoded(noise(), format))
    path = tmp_path / "drawing.svg"
    path.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    with pytest.raises(ImageError, match=r"drawing.svg: not an image"):
        open_image(path)


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(ImageError, match=r"none.png: no such image file"):
        open_image(tmp_path / "none.png")
    with pytest.raises(ImageError, match="not a file"):
        open_image(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError, match="pipe: not a file"):
        open_image(tmp_path / "pipe")
    for path in ("nul\0.png", "half\ud800.png"):
        with pytest.raises(ImageError, match="cannot be read"):
            open_image(path)
    (tmp_path / "empty.png").touch()
    with pytest.raises(ImageError, match="empty.png: the image is empty"):
        open_image(tmp_path / "empty.png")


@pytest.mark.parametrize(
    "url", ["http://a/b.png", "HTTPS://a/b.png", "data:image/png;base64,AA", "file:///b", "s3://b/c"]
)
def test_urls_are_not_fetched(url):
    with pytest.raises(ImageError, match="URLs are not fetched; download"):
        open_image(url)


def test_a_long_data_url_is_not_repeated_in_the_error():
    with pytest.raises(ImageError) as caught:
        open_image("data:" + "A" * 100_000)
    assert len(str(caught.value)) < 200


def test_other_types_are_refused():
    for value in (5, None, ["a.png"], np.zeros((30, 30, 3))):
        with pytest.raises(ImageError, match="must be a path, bytes or a Pillow image"):
            open_image(value)
    assert issubclass(ImageError, DataError)


def test_threads_share_nothing():
    good, bomb = encoded(noise()), forged_png(9_500, 9_500)
    failures = []

    def work():
        for _ in range(40):
            try:
                assert open_image(good).size == (40, 30)
                with pytest.raises(ImageError):
                    open_image(bomb)
            except BaseException as error:  # a thread's exception would be lost
                failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# ── digest ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_digest_of_a_file_is_that_of_its_bytes(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(noise()))
    assert image_digest(path) == image_digest(str(path)) == image_digest(path.read_bytes())
    assert image_digest(path) != image_digest(encoded(noise(seed=1)))
    with pytest.raises(ImageError, match="no such image file"):
        image_digest(tmp_path / "b.png")


def test_digest_of_a_pillow_image_is_that_of_what_is_seen():
    image = noise(40, 30)
    assert image_digest(image) == image_digest(image.copy())
    assert image_digest(image) != image_digest(image.transpose(Image.Transpose.TRANSPOSE))
    assert image_digest(Image.new("RGB", (40, 30))) != image_digest(Image.new("RGB", (30, 40)))
    changed = image.copy()
    changed.putpixel((3, 4), (0, 0, 0))
    assert image_digest(image) != image_digest(changed)
    # equal indices, other palettes
    one, two = Image.new("P", (30, 30)), Image.new("P", (30, 30))
    one.putpalette([0, 0, 0])
    two.putpalette([9, 9, 9])
    assert image_digest(one) != image_digest(two)
    assert image_digest(ImageOps.exif_transpose(image)) == image_digest(image)


def test_the_same_image_is_known_again_and_read_only_where_it_must_be(tmp_path, monkeypatch):
    a = encoded(noise())
    for name, data in (("a.png", a), ("b.png", a), ("d.png", a + b"x")):
        (tmp_path / name).write_bytes(data)
    read, real = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path.name) or real(path))
    one, copy, longer = (SameImage(tmp_path / name) for name in ("a.png", "b.png", "d.png"))
    assert len({one, longer}) == 2 and not read
    assert len({one, copy, SameImage(a), SameImage(str(tmp_path / "a.png"))}) == 1 and {*read} == {"a.png", "b.png"}
    assert SameImage(noise()) == SameImage(noise()) != one
    with pytest.raises(ImageError, match=r"row 3: .*none\.png: no such image file"):
        SameImage(tmp_path / "none.png", where="row 3")


def test_a_digest_is_remembered_until_the_file_changes(tmp_path, monkeypatch):
    path, read, real = tmp_path / "a.png", [], Path.read_bytes
    path.write_bytes(b"one")
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(1) or real(path))
    assert image_digest(path) == image_digest(path) and len(read) == 2, "written just now"
    os.utime(path, ns=(10**18, 10**18))
    first = image_digest(path)
    assert image_digest(path) == image_digest(str(path)) == first and len(read) == 3
    path.write_bytes(b"two")
    assert image_digest(path) == image_digest(b"two") != first
