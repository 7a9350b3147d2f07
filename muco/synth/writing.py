"""From one picture to its turns: a dense caption by one model, pairs by another, each answer kept when it is there.

::

    picture ─▶ captioner, until a caption passes the checks ─▶ writer, for the pairs that are missing ─▶ Made
                    up to ``attempts`` times                          up to ``attempts`` times

Every answer, good or not, goes into the journal of its shard under (picture, what was asked, attempt). A resumed
run reads the same answers again and asks only for the missing ones, so it makes the same turns.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from muco.base.journal import Journal, read_lines
from muco.errors import DataError, ImageError
from muco.synth.answers import Answer, Unanswered, seed_of
from muco.synth.checks import caption_problem
from muco.synth.messages import Message, image_part, user
from muco.synth.pairs import ALL_KEYS, SLOTS, Pair, Pairs, Rejected, schema
from muco.synth.prompts import Prompts

if TYPE_CHECKING:
    from muco.synth.catalogue import Kept
    from muco.synth.endpoint import Endpoint

NO_CAPTION, NO_ANSWER, TOO_FEW = "no caption", "refused by the server", "too few turns"
PAIRS_SCHEMA = schema(ALL_KEYS)

Ask = Callable[[int], tuple[Sequence[Message], Mapping[str, Any] | None]]


@dataclass(frozen=True)
class Setting:
    """What decides the turns of a picture.

    Args:
        attempts: So many times a caption, and each pair, is asked for.
        min_turns: A picture with fewer good turns is rejected.
        max_pixels: Larger pictures are sent smaller.
    """

    prompts: Prompts = Prompts()  # noqa: RUF009
    attempts: int = 3
    min_turns: int = 3
    max_pixels: int = 1 << 20


@dataclass(frozen=True)
class Made:
    """What became of a picture.

    Args:
        turns: (kind, pair) in the order of M3T.
        rejected: What is not used, with reasons; of pairs the last try only.
        reasons: How many answers were turned down for which reason, those that came good later included.
        reason: Why the picture as a whole is rejected; "" if it is not.
        later: A server did not answer for now: nothing is known yet, and a later run has to ask again.
    """

    picture: Kept
    caption: str = ""
    turns: tuple[tuple[str, Pair], ...] = ()
    rejected: tuple[Rejected, ...] = ()
    reasons: Counter[str] = field(default_factory=Counter)
    reason: str = ""
    later: bool = False


class Answers:
    """The answers about the pictures of one shard, in memory and in a journal.

    Useless answers wait in memory until a useful one comes: if the run stops because a server says nothing useful, they
    are not held against the pictures.
    """

    def __init__(self, path: Path) -> None:
        self._known = _read(path) if path.exists() else {}
        self._journal = Journal(path)
        self._held: dict[str, list[dict[str, Any]]] = {}  # by what was asked: each model by itself

    def find(self, key: tuple[str, str, int]) -> Answer | None:
        return self._known.get(key)

    def add(self, key: tuple[str, str, int], answer: Answer, *, useful: bool) -> None:
        picture, asked, attempt = key
        self._known[key] = answer
        line = {"picture": picture, "asked": asked, "attempt": attempt, "text": answer.text, "finish": answer.finish}
        self._held.setdefault(asked, []).append(line)
        if useful:
            self._write(asked)

    def settle(self) -> None:
        """Writes down all that waits."""
        for asked in [*self._held]:
            self._write(asked)

    def _write(self, asked: str) -> None:
        for line in self._held.pop(asked, []):
            self._journal.add(line)

    def close(self) -> None:
        """Ends without what waits."""
        self._journal.close()

    def delete(self) -> None:
        self.close()
        self._journal.path.unlink()


def _read(path: Path) -> dict[tuple[str, str, int], Answer]:
    known = {}
    for _, line in read_lines(path):
        try:
            key = (line["picture"], line["asked"], line["attempt"])
            known[key] = Answer(line["text"], line["finish"])
        except (KeyError, TypeError) as error:
            raise DataError(f"{path}: a line is not an answer of a model ({error!r}); delete the file") from error
    return known


async def make_turns(
    picture: Kept, root: Path, captioner: Endpoint, writer: Endpoint, setting: Setting, answers: Answers
) -> Made:
    """The turns of a picture, or why there are none.

    Args:
        root: The folder that ``picture.file`` is relative to.
        answers: Of the shard that the picture belongs to.
    Raises:
        BudgetSpent: If there is no budget left.
        EndpointError: If a server sends nothing useful.
        DataError: If the picture, sound when it was looked at, cannot be read any more.
    """
    talk = _Talk(picture, answers, setting)
    try:
        caption = await talk.caption(captioner, root / picture.file)
        if not caption:
            return talk.made(NO_CAPTION)
        return await talk.pairs(writer, caption)
    except Unanswered as error:
        if error.passing:
            return Made(picture, later=True)
        talk.rejected.append(Rejected("picture", NO_ANSWER, str(error)))
        return talk.made(NO_ANSWER)


class _Talk:
    """What is said about one picture."""

    def __init__(self, picture: Kept, answers: Answers, setting: Setting) -> None:
        self.picture, self.answers, self.setting = picture, answers, setting
        self.rejected: list[Rejected] = []
        self.reasons: Counter[str] = Counter()

    async def caption(self, endpoint: Endpoint, path: Path) -> str:
        prompts, part = self.setting.prompts, None
        for attempt in range(self.setting.attempts):
            key = (self.picture.digest, "caption", attempt)
            answer = self.answers.find(key)
            fresh = answer is None
            if answer is None:
                part = part or await _image_part(path, self.setting.max_pixels, self.picture.name)
                message = user(part, prompts.filled(prompts.caption))
                answer = await endpoint.ask([message], seed=seed_of(*key))
            problem = caption_problem(answer, prompts)
            if fresh:
                self._weigh(endpoint, key, answer, problem)
            if problem is None:
                return " ".join(answer.text.split())
            self.reasons[problem] += 1
            self.rejected = [Rejected("caption", problem, " ".join(answer.text.split())[:200])]
        return ""

    async def pairs(self, endpoint: Endpoint, caption: str) -> Made:
        self.rejected = []
        pairs = Pairs(caption, self.picture.name, self.setting.prompts)
        for attempt in range(self.setting.attempts):
            if not pairs.missing:
                break
            key = (self.picture.digest, "pairs", attempt)
            answer = self.answers.find(key)
            fresh = answer is None
            if answer is None:
                text, wanted = pairs.request()
                answer = await endpoint.ask([user(text)], schema=wanted, seed=seed_of(*key))
            good = pairs.take(answer.text)
            if fresh:
                worst = next(iter(pairs.rejected.values()), None)
                self._weigh(endpoint, key, answer, None if good else worst.reason if worst else "")
        self.rejected = [pairs.rejected[slot] for slot in SLOTS if slot in pairs.rejected]
        self.reasons.update(pairs.reasons)
        turns = tuple((slot.kind, pair) for slot, pair in pairs.good.items())
        return self.made("" if len(turns) >= self.setting.min_turns else TOO_FEW, caption, turns)

    def _weigh(self, endpoint: Endpoint, key: tuple[str, str, int], answer: Answer, problem: str | None) -> None:
        self.answers.add(key, answer, useful=problem is None)
        if problem is None:
            endpoint.useful()
        else:
            endpoint.useless(f"{problem}: {answer.text}")

    def made(self, reason: str, caption: str = "", turns: tuple[tuple[str, Pair], ...] = ()) -> Made:
        kept = () if reason else turns
        return Made(self.picture, caption, kept, tuple(self.rejected), self.reasons, reason)


async def _image_part(path: Path, max_pixels: int, name: str) -> Message:
    try:
        return await asyncio.to_thread(image_part, path, max_pixels)
    except ImageError as error:
        raise DataError(
            f"{name}: the picture was sound when it was looked at and cannot be read any more ({error}); put it back, "
            "or begin again in another output folder"
        ) from error
