"""What a row of each video set of MMEB-V2 asks: columns, frames, texts, and which candidates are right.

Texts are put together as the evaluation code of VLM2Vec and of Qwen3-VL-Embedding does; where the two differ, a
:class:`~muco.data.mmeb_prompts.Style` says which.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from muco.data.mmeb_fields import Fields, stem
from muco.data.mmeb_prompts import Style, Wording
from muco.dialogue import Content, Video
from muco.errors import DataError, ImageError

QUERY = "query"  # folder of a query's own frames, beside those of its clips
POSITIVE = "positive"  # what the folder of a right clip begins with


class Named(NamedTuple):
    """A candidate; candidates of one name are the same."""

    name: str
    content: Content


@dataclass(frozen=True)
class Asked:
    """A row: its query, what is right, and, where rows bring their own lists, what is wrong."""

    query: Content
    right: tuple[Named, ...]
    wrong: tuple[Named, ...] = ()


@dataclass(frozen=True)
class Place:
    """Where the rows of a file belong: the set's folder of frames, its texts, and the file's configuration."""

    frames: Path
    style: Style
    wording: Wording
    config: str = ""
    official: bool = field(default=False, kw_only=True)

    def query(self, text: str, folder: Path, instruction: str | None = None) -> Content:
        """A video with the instruction and a text."""
        told = self.wording.query if instruction is None else instruction
        return Content(joined(told, text), (Video(folder, self.style.frames),))

    def target(self, folder: Path, frames: int) -> Content:
        return Content(self.wording.target, (Video(folder, frames),))


def joined(*parts: str) -> str:
    """The parts that are not empty, with single blanks between them."""
    return " ".join(part for part in parts if part)


def _labelled(row: Fields, place: Place) -> Asked:
    label = row.label("pos_text")
    folder = row.inside(place.frames, row.name("video_id"))
    return Asked(place.query("", folder), (Named(label, Content(label)),))


def _labelled_among(row: Fields, place: Place) -> Asked:
    asked = _labelled(row, place)
    (label, _), listed = asked.right[0], row.texts("neg_text")
    if label not in listed:
        raise row.wrong("neg_text", f"the whole list of candidates, with 'pos_text', {label!r:.60}, among them")
    return Asked(asked.query, asked.right, tuple(Named(text, Content(text)) for text in listed if text != label))


def _question(query: Content, answers: Sequence[str], right: int) -> Asked:
    named = [Named(text, Content(text)) for text in answers]
    return Asked(query, (named[right],), (*named[:right], *named[right + 1 :]))


def lettered(options: Sequence[str]) -> list[str]:
    """ "(A) first", "(B) second" …"""
    return [f"({chr(ord('A') + place)}) {option}" for place, option in enumerate(options)]


def _with_options(question: str, options: Sequence[str]) -> str:
    return "\n".join([question, "Options:", *lettered(options)])


def _answers(place: Place, options: Sequence[str]) -> Sequence[str]:
    return lettered(options) if place.wording.candidates == "lettered" else options


def bare_option(option: str, *, cut: bool) -> str:
    """The answer of "B. the answer.": what follows the first ". ", without dots and blanks around it.

    Args:
        cut: Of an option without ". " keep the last character alone, as the code of VLM2Vec does by mistake.
    """
    at = option.find(". ")
    return (option[at:] if at >= 0 or cut else option).strip(". ")


def _bare_answers(row: Fields, key: str, place: Place) -> list[str]:
    cut = place.official and not place.wording.guarded
    answers = [bare_option(option, cut=cut) for option in row.texts(key)]
    if not all(answers):
        raise row.wrong(key, "options with a text")
    return answers


def _mvbench(row: Fields, place: Place) -> Asked:
    options, answer = row.texts("candidates"), row.text("answer")
    if answer not in options:
        raise row.wrong("answer", "one of 'candidates'")
    folder = row.inside(place.frames, place.config, row.name("video"))
    query = place.query(_with_options(row.text("question"), options), folder)
    return _question(query, _answers(place, options), options.index(answer))


def _nextqa(row: Fields, place: Place) -> Asked:
    options = [row.text(f"a{number}") for number in range(5)]
    query = place.query(_with_options(row.text("question"), options), row.inside(place.frames, row.name("video")))
    return _question(query, _answers(place, options), row.place("answer", len(options)))


def _video_mme(row: Fields, place: Place) -> Asked:
    options, folder = row.texts("options"), row.inside(place.frames, row.name("videoID"))
    query = place.query("\n".join([row.text("question"), *options]), folder)
    return _question(query, _bare_answers(row, "options", place), row.letter("answer", len(options)))


def _egoschema(row: Fields, place: Place) -> Asked:
    options, folder = row.texts("option"), row.inside(place.frames, row.name("video_idx"))
    text = row.text("question") + place.wording.before_options + " ".join(options)
    return _question(place.query(text, folder), _bare_answers(row, "option", place), row.place("answer", len(options)))


def _activitynet(row: Fields, place: Place) -> Asked:
    answers = ("yes", "no")
    if (answer := row.text("answer")) not in answers:
        raise row.wrong("answer", "'yes' or 'no'")
    query = place.query(
        row.text("question") + "? (A) yes; (B) no.", row.inside(place.frames, f"v_{row.name('video_name')}")
    )
    return _question(query, answers, answers.index(answer))


def _found_by(video: str, caption: str, name: Callable[[str], str] = str) -> Callable[[Fields, Place], Asked]:
    """A caption that finds the video named in a column."""

    def read(row: Fields, place: Place) -> Asked:
        id = name(row.name(video))
        content = place.target(row.inside(place.frames, id), place.style.frames)
        return Asked(Content(joined(place.wording.query, row.first(caption))), (Named(id, content),))

    return read


def _clip(place: Place, folder: Path) -> Named:
    name = folder.relative_to(place.frames).as_posix()
    return Named(name, place.target(folder, place.style.clip_frames))


def _described_clip(row: Fields, place: Place) -> Asked:
    folder = row.inside(place.frames, stem(row.name("video_path")))
    query = place.query(row.first("query"), folder / QUERY)
    try:
        names = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name != QUERY)
    except OSError as error:
        raise ImageError(f"{row.where}: {folder}: cannot be read ({error.strerror or error})") from error
    clips = {True: list[Named](), False: list[Named]()}
    for name in names:
        clips[name.startswith(POSITIVE)].append(_clip(place, folder / name))
    if not clips[True] or not clips[False]:
        raise DataError(f"{row.where}: {folder} needs one folder '{POSITIVE}…' and one of another name, beside 'query'")
    return Asked(query, tuple(clips[True]), tuple(clips[False]))


def moment_folder(path: str) -> str:
    """The folder of a clip of MomentSeeker: its path without ".mp4", "_" in place of "/"."""
    return path.removesuffix(".mp4").replace("/", "_")


def _moment(row: Fields, place: Place) -> Asked:
    def clip(path: str) -> Path:
        return row.inside(place.frames, "video_frames", moment_folder(path))

    given, text = row.values.get("input_frames") or "", row.text("query")
    if not isinstance(given, str):
        raise row.wrong("input_frames", "a path or empty")
    if given.lower().endswith(".mp4"):
        query = place.query(text, clip(given), place.wording.query_video)
    elif given.lower().endswith(".jpg"):
        query = Content(joined(place.wording.query_image, text), (row.inside(place.frames, f"query_{given}"),))
    else:
        query = Content(joined(place.wording.query, text))
    right, wrong = (
        tuple(_clip(place, clip(path)) for path in row.paths(key, "output_path"))
        for key in ("positive_frames", "negative_frames")
    )
    if not right or not wrong:
        raise row.wrong("negative_frames" if right else "positive_frames", "a list of at least one clip")
    return Asked(query, right, wrong)


class Reader(NamedTuple):
    """The columns of a set, those that may be missing, and what makes a row of them."""

    columns: str
    read: Callable[[Fields, Place], Asked]
    optional: str = ""


_LABELLED = Reader("video_id pos_text", _labelled)
READERS = {
    **dict.fromkeys(("K700", "HMDB51", "UCF101", "Breakfast"), _LABELLED),
    "SmthSmthV2": Reader("video_id pos_text neg_text", _labelled_among),
    "MVBench": Reader("question video candidates answer", _mvbench),
    "Video-MME": Reader("question videoID options answer", _video_mme),
    "NExTQA": Reader("video question a0 a1 a2 a3 a4 answer", _nextqa),
    "EgoSchema": Reader("video_idx question option answer", _egoschema),
    "ActivityNetQA": Reader("video_name question answer", _activitynet),
    "DiDeMo": Reader("video caption", _found_by("video", "caption", stem)),
    "MSR-VTT": Reader("video_id caption", _found_by("video_id", "caption")),
    "MSVD": Reader("video_id caption", _found_by("video_id", "caption")),
    "VATEX": Reader("videoID enCap", _found_by("videoID", "enCap")),
    "YouCook2": Reader("id sentence", _found_by("id", "sentence")),
    "QVHighlight": Reader("query video_path", _described_clip),
    "Charades-STA": Reader("query video_path", _described_clip),
    "MomentSeeker": Reader("query positive_frames negative_frames", _moment, "input_frames"),
}
