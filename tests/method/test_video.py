"""Videos: which frames are read, and that a model reads them as its family does."""

from __future__ import annotations

import re
import shutil
import sys
import wave
from pathlib import Path

import av
import numpy as np
import pytest
import steps
import torch
from families import image, model

from muco.data.images import SameImage, image_problem
from muco.data.jsonl import JsonlData, sample_from_row, sample_to_row, write_jsonl
from muco.dialogue import Content, Dialogue, Sample, Turn, Video, as_content
from muco.errors import DataError, ImageError
from muco.images import image_digest, opened_image
from muco.layout import prepare
from muco.video import frame_files, frames_of, spaced

NATIVE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")
FRAMES = tuple(image(60, 48, seed) for seed in range(5))


def joined_slowly(found, frames):
    """Patches as the families' video processors cut them, by loops: [steps * rows * columns, C * T * P * P]."""
    processor = found.encoder.muco_processor.image_processor
    size, merge, slots = processor.patch_size, processor.merge_size, processor.temporal_patch_size
    out = processor(images=[*frames], return_tensors="pt")
    rows, columns = out["image_grid_thw"][0, 1:].tolist()
    pictures = []
    for patches in out["pixel_values"].view(len(frames), rows * columns, 3, slots, size, size):
        pictures.append(patches[:, :, 0])  # every slot of an image is the same
    if len(pictures) % slots:
        pictures.append(pictures[-1])
    assert not (rows % merge or columns % merge)
    steps = [pictures[start : start + slots] for start in range(0, len(pictures), slots)]
    cut = [torch.stack([frame[patch] for frame in step], dim=1) for step in steps for patch in range(rows * columns)]
    return torch.stack([patch.reshape(-1) for patch in cut]), (len(steps), rows, columns)


@pytest.mark.parametrize("family", NATIVE)
@pytest.mark.parametrize("count", [1, 4, 5])
def test_a_video_is_read_as_the_family_reads_it(family, count):
    found, frames = model(family), FRAMES[:count]
    processor, backbone = found.encoder.muco_processor, found.encoder.model
    own = prepare(Dialogue((Video(frames, fps=4.0),), (Content("what moves?"),)), processor)
    pixels, grid = joined_slowly(found, frames)
    assert torch.equal(own.images[0].tensors["pixel_values"], pixels)
    assert own.images[0].tensors["image_grid_thw"].tolist() == [[*grid]]

    token, picture = processor.family.video.token, processor.family.image_id
    ids = torch.tensor([[token if one == picture else one for one in own.ids]])
    named = {"video_grid_thw": torch.tensor([grid]), "mm_token_type_ids": torch.where(ids == token, 2, 0)}
    if processor.family.video.tokens_per_second:
        named["second_per_grid_ts"] = torch.tensor([2 / 4.0 if count > 1 else 1 / 4.0])
    positions, _ = backbone.get_rope_index(input_ids=ids, **named)
    if count > 1 or "second_per_grid_ts" not in named:
        assert np.array_equal(np.concatenate(own.positions, axis=1), positions[:, 0].numpy())
    with torch.no_grad():
        stock = backbone(input_ids=ids, pixel_values_videos=pixels, position_ids=positions, **named).last_hidden_state
    expected = torch.nn.functional.normalize(stock[0, -1], dim=0).numpy()
    vector = found.encode({"text": "what moves?", "video": {"source": [*frames], "fps": 4.0}})
    assert np.abs(vector - expected).max() < 2e-6


@pytest.mark.parametrize("family", ["idefics3", "glm4v", "internvl"])
def test_elsewhere_frames_are_images(family):
    found = model(family)
    vector = found.encode({"text": "what moves?", "video": [*FRAMES[:3]]})
    assert np.array_equal(vector, found.encode({"text": "what moves?", "images": [*FRAMES[:3]]}))


def test_turns_about_a_video_are_those_of_single_passes():
    found, asked = model("qwen3_vl"), ["what moves?", "", "how many are there?"]
    video = Video(FRAMES, 4, 8.0)
    single = found.encode([{"text": text, "video": video} for text in asked])
    assert np.abs(found.encode_turns(video, asked) - single).max() < 2e-6


@pytest.mark.parametrize("mode", ["isolated", "compounded"])
def test_training_on_videos_is_the_same_in_parts(scenes, mode):
    turns = [Turn("what moves?", {"video": Video(FRAMES[:2])}), Turn("", "a ball rolls")]
    samples = [Sample(Video(FRAMES[:4]), turns), Sample(image(30, 40), turns[1:]), Sample(Video(FRAMES[1:], 2), turns)]
    built = steps.to_train(model("qwen2_vl"), "all")
    batch = steps.share(built, samples, mode)
    steps.assert_same(steps.cached(built, [batch], 150, mode=mode), steps.plain(built, batch, mode=mode))


# Frames


@pytest.mark.parametrize(
    ("count", "wanted", "places"),
    [(10, 4, [0, 3, 6, 9]), (64, 8, [0, 9, 18, 27, 36, 45, 54, 63]), (3, 8, [0, 1, 2]), (5, 1, [0]), (1, 3, [0])],
)
def test_frames_are_chosen_at_even_distances(count, wanted, places):
    assert spaced(count, wanted) == places


def test_a_folder_is_read_in_natural_order(tmp_path):
    for name in ("frame_10.jpg", "frame_2.JPG", "frame_1.png", "notes.txt", ".hidden.jpg.tmp"):
        image(30, 30).save(tmp_path / name, "PNG") if "frame" in name else (tmp_path / name).write_text("")
    (tmp_path / "sub.png").mkdir()
    names = [path.name for path in frame_files(tmp_path)]
    assert names == ["frame_1.png", "frame_2.JPG", "frame_10.jpg"]
    assert [Path(frame).name for frame in frames_of(Video(tmp_path, 2)).images] == ["frame_1.png", "frame_10.jpg"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match="row 1: .*empty: no frames in this folder; looked for .jpg"):
        frames_of(Video(tmp_path / "empty"), where="row 1")


def written(path: Path, shades: range, rate: int = 10) -> Path:
    """A video of grey frames."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for shade in shades:
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), shade, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_a_file_is_read_at_even_places(tmp_path):
    path = written(tmp_path / "clip.mp4", range(0, 222, 6))
    found = frames_of(Video(path, 5))
    shades = [np.asarray(frame).mean() for frame in found.images]
    assert np.abs(np.array(shades) - [0, 54, 108, 162, 216]).max() < 4  # the file is compressed
    assert found.seconds == (0.0, 0.9, 1.8, 2.7, 3.6)
    assert frames_of(Video(path, 5, fps=1.0)).seconds == (0.0, 9.0, 18.0, 27.0, 36.0)
    assert len(frames_of(Video(path, 1000)).images) == 37
    assert Video(str(path)) == Video(path)
    for family in ("qwen3_vl", "qwen2_5_vl"):  # the first writes seconds, the second counts positions by them
        alone, opened = (
            model(family).encode({"video": video}) for video in (Video(path, 5), opened_image(Video(path, 5)))
        )
        assert np.array_equal(alone, opened)


def test_what_is_not_a_video_is_refused_in_words(tmp_path, monkeypatch):
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "empty.mp4").touch()
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(8000))
    for name, said in (
        ("none.mp4", "no such video file or folder"),
        ("text.mp4", "not a video that can be read"),
        ("empty.mp4", "not a video that can be read"),
        ("sound.wav", "no pictures"),
    ):
        with pytest.raises(ImageError, match=f"row 3: .*{name}: .*{said}"):
            frames_of(Video(tmp_path / name), where="row 3")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImageError, match=r"text.mp4: a video file needs the package av: pip install 'muco\[video\]'"):
        frames_of(Video(tmp_path / "text.mp4"))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([], "at least one frame"),
        (3, "'video' must be the path of a file or folder, or a list of frames, not a number"),
        ({"source": "clip", "frame": 3}, "unknown key 'frame' in 'video'; did you mean 'frames'"),
        ({"frames": 3}, "at least one frame"),
        ({"source": "clip", "frames": 0}, "'frames' must be a whole number, at least 1, not 0"),
        ({"source": "clip", "fps": float("nan")}, "'fps' must be a positive number of frames per second"),
        ([Video(FRAMES)], "holds a video"),
    ],
)
def test_bad_videos_are_refused(value, said):
    with pytest.raises(DataError, match=said):
        as_content({"video": value})


def test_frames_of_other_sizes_are_refused():
    said = "a video of 2 frames: its frames differ in size .40 x 40 and 60 x 48.; make them alike"
    with pytest.raises(ImageError, match=f"input 0: {said}"):
        model("qwen2_vl").encode({"video": [FRAMES[0], image(40, 40)]})
    assert re.search(f"x:1: {said}", image_problem(Video((FRAMES[0], image(40, 40))), "x:1", opened=True)[1])


def test_a_video_is_known_again(tmp_path):
    path, copy = written(tmp_path / "clip.mp4", range(0, 60, 6)), tmp_path / "copy.mp4"
    shutil.copy(path, copy)
    for number, frame in enumerate(FRAMES):
        frame.save(tmp_path / f"{number}.png")
    files = tuple(tmp_path / f"{number}.png" for number in range(5))
    videos = [Video(path), Video(path, 4), Video(path, fps=3.0), Video(FRAMES), Video(FRAMES[::-1]), Video(FRAMES, 3)]
    assert len({image_digest(video) for video in videos} | {image_digest(path)}) == 7
    assert image_digest(Video(path)) == image_digest(Video(copy))
    assert image_digest(Video(files, 3)) == image_digest(Video((files[0], files[2], files[4])))
    assert image_digest(Video((files[0],))) != image_digest(files[0])
    assert len({SameImage(Video(files)), SameImage(Video(files, 5)), SameImage(Video(files, 3))}) == 2


def test_rows_hold_videos(tmp_path):
    turns = [{"query": "what?", "target": {"video": "b"}}]
    rows = [
        {"video": "clips/1.mp4", "turns": turns},
        {"video": {"source": ["1.png", "2.png"], "frames": 3, "fps": 4}, "turns": turns},
        {"image": "a.png", "video": {"source": "clips/2", "frames": 16}, "turns": turns},
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    data = JsonlData(tmp_path / "rows.jsonl")
    assert [sample_to_row(sample, tmp_path) for sample in data] == rows
    assert data[1].images == (Video((tmp_path / "1.png", tmp_path / "2.png"), 3, 4),)
    with pytest.raises(DataError, match="x:1: 'video' is a URL"):
        sample_from_row({"video": "https://a/b.mp4", "turns": turns}, tmp_path, "x:1")
