"""The texts of MMEB-V2's videos and pages, which its data does not hold: a *style*, read from a YAML file.

::

    name: mine
    instruction: user       # whose turn holds the instruction in the code that the style follows: user or system
    frames: 8               # of a video, at most
    clip_frames: 8          # of a candidate that is a clip of a longer video
    uncertain: [...]        # sentences for the reader of the result
    sets:
      V-QA: {query: "Answer:"}          # a data set, or a group of them: a meta task, video, visdoc
      NExTQA: {candidates: bare}        # what is said of the set itself goes before what is said of its groups

``vlm2vec`` and ``qwen`` come with the package. A content is its instruction, a blank, and its text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from muco.base.text import read_text
from muco.base.yaml_text import parse_yaml
from muco.data.mmeb_v2_sets import BY_NAME, METAS, Published
from muco.errors import DataError, did_you_mean

STYLES = ("vlm2vec", "qwen")
GROUPS = (*METAS, "video", "visdoc")
Listed = Literal["lettered", "bare"]
Turn = Literal["user", "system"]


@dataclass(frozen=True)
class Wording:
    """How the texts of one data set are put together.

    Args:
        query, target: Instructions of queries, and of candidates that are videos or pages; "" is none.
        query_image, query_video: Of queries that have an image or a video beside their text (MomentSeeker).
        candidates: "lettered": "(A) …", as in the text of the question; "bare": the answer alone.
        before_options: Between a question and its options in EgoSchema.
        guarded: Whether the official code keeps an option without ". " whole; see the docs.
    """

    query: str = ""
    target: str = ""
    query_image: str = ""
    query_video: str = ""
    candidates: Listed = "lettered"
    before_options: str = ""
    guarded: bool = False


@dataclass(frozen=True)
class Style:
    """A style; ``wordings`` by the name of the data set or group."""

    name: str
    frames: int
    clip_frames: int
    wordings: Mapping[str, Mapping[str, Any]]
    instruction: Turn = "user"
    uncertain: tuple[str, ...] = field(default=())

    def wording(self, data_set: Published) -> Wording:
        """What is said of a data set, or else of its meta task, or else of its modality."""
        said: dict[str, Any] = {}
        for key in (data_set.modality, data_set.meta, data_set.name):
            said |= self.wordings.get(key, {})
        return Wording(**said)

    @property
    def told(self) -> str:
        """What results say of the style."""
        moved = "instructions of its system turn are put in front of the text"
        place = moved if self.instruction == "system" else "instructions in front of the text"
        doubt = "".join(f"; uncertain: {line}" for line in self.uncertain)
        return f"{self.name}: {place}; {self.frames} frames a video, {self.clip_frames} a clip{doubt}"


def load_style(name: str) -> Style:
    """The style of the package with this name, or of a YAML file.

    Raises:
        DataError: If there is no such file, it is not YAML with these keys, or a value has the wrong type.
    """
    path = Path(__file__).parent / "mmeb_v2" / f"{name}.yaml" if name in STYLES else Path(name)
    if not path.is_file():
        raise DataError(f"{name}: no such prompts; pass {', '.join(STYLES)}, or a YAML file")
    given = parse_yaml(read_text(path), str(path), DataError)
    keys = ("name", "instruction", "frames", "clip_frames", "uncertain", "sets")
    _check_keys(given, keys, str(path))
    frames, clip_frames = (_checked(given.get(key), int, f"{path}: {key!r}") for key in ("frames", "clip_frames"))
    if min(frames, clip_frames) < 1:
        raise DataError(f"{path}: 'frames' and 'clip_frames' must be at least 1")
    turn = given.get("instruction", "user")
    if turn not in get_args(Turn):
        raise DataError(f"{path}: 'instruction' must be 'user' or 'system', not {turn!r:.60}")
    sets = given.get("sets")
    _check_keys(sets, (*GROUPS, *BY_NAME), f"{path}: sets")
    for key, said in sets.items():
        _check_wording(said, f"{path}: sets.{key}")
    doubted = f"{path}: 'uncertain'"
    doubts = [_checked(line, str, doubted) for line in _checked(given.get("uncertain", []), list, doubted)]
    name = _checked(given.get("name"), str, f"{path}: 'name'")
    return Style(name, frames, clip_frames, sets, turn, tuple(doubts))


def _check_wording(said: Any, where: str) -> None:
    kinds = {item.name: type(item.default) for item in dataclasses.fields(Wording)}
    _check_keys(said, tuple(kinds), where)
    for key, value in said.items():
        _checked(value, kinds[key], f"{where}.{key}")
    if said.get("candidates", "bare") not in get_args(Listed):
        raise DataError(f"{where}.candidates must be 'lettered' or 'bare', not {said['candidates']!r:.60}")


def _check_keys(given: Any, accepted: tuple[str, ...], where: str) -> None:
    if not isinstance(given, Mapping):
        raise DataError(f"{where}: must be a mapping with some of {', '.join(accepted)}")
    for key in given:
        if key not in accepted:
            raise DataError(f"{where}: unknown key {key!r}{did_you_mean(str(key), accepted)}")


def _checked(value: Any, kind: type, where: object) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise DataError(f"{where} must be {kind.__name__}, not {value!r:.60}")
    return value
