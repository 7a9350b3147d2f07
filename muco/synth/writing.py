"""From one picture to its turns: a dense caption by one model, pairs by another.

::

    picture ─▶ captioner, until a caption passes the checks ─▶ writer, for the pairs that are missing ─▶ Made
                    up to ``attempts`` times                          up to ``attempts`` times

Every answer, good or not, goes into the journal of its shard under (picture, what was asked, attempt). A resumed run
reads them and asks only for the missing ones, so it makes the same turns.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from muco.base.journal import Journal, read_lines
from muco.errors import DataError, ImageError
from muco.synth.catalogue import Kept
from muco.synth.chat import Answer, Passing, Unanswered, image_part, seed_of, user
from muco.synth.endpoint import Endpoint
from muco.synth.pairs import ALL_KEYS, SLOTS, Pair, Pairs, Rejected, caption_problem, schema
from muco.synth.prompts import Prompts

NO_CAPTION, NO_ANSWER, TOO_FEW = "no caption", "refused by the server", "too few turns"
PAIRS_SCHEMA = schema(ALL_KEYS)


@dataclass(frozen=True)
class Setting:
    """How the turns of a picture are made."""

    prompts: Prompts = Prompts()  # noqa: RUF009
    attempts: int = 3  # for a good caption, and for each good pair
    min_turns: int = 3  # pictures with fewer good turns are rejected
    max_pixels: int = 1 << 20  # larger pictures are sent smaller


@dataclass(frozen=True)
class Made:
    """The outcome for a picture."""

    picture: Kept
    caption: str = ""
    turns: tuple[tuple[str, Pair], ...] = ()  # (kind, pair) in the order of M3T
    rejected: tuple[Rejected, ...] = ()  # unused answers with reasons; of pairs only the last attempt
    reasons: Counter[str] = field(default_factory=Counter)  # of all rejected answers, even if a later one was good
    reason: str = ""  # why the whole picture is rejected
    later: bool = False  # a server did not answer for now: a later run asks again


class Answers:
    """The answers about the pictures of one shard, in memory and in a journal.

    Useless answers are written only after a useful one: if a useless server stops the run, the pictures do not pay.
    """

    def __init__(self, path: Path) -> None:
        self._known: dict[tuple[str, str, int], Answer] = {}
        for _, line in read_lines(path) if path.exists() else ():
            try:
                key = (line["picture"], line["asked"], line["attempt"])
                self._known[key] = Answer(line["text"], line["finish"])
            except (KeyError, TypeError) as error:
                raise DataError(f"{path}: a line is not an answer of a model ({error!r}); delete the file") from error
        self._journal = Journal(path)

    def find(self, key: tuple[str, str, int]) -> Answer | None:
        return self._known.get(key)

    def add(self, key: tuple[str, str, int], answer: Answer, *, useful: bool) -> None:
        picture, asked, attempt = key
        self._known[key] = answer
        line = {"picture": picture, "asked": asked, "attempt": attempt, "text": answer.text, "finish": answer.finish}
        (self._journal.succeed if useful else self._journal.hold)(line, by=asked)

    def settle(self) -> None:
        """Writes what waits."""
        self._journal.release()

    def close(self, *, delete: bool = False) -> None:
        """Closes the journal; what waits is not written."""
        self._journal.close()
        if delete:
            self._journal.path.unlink()


async def make_turns(
    picture: Kept, root: Path, captioner: Endpoint, writer: Endpoint, setting: Setting, answers: Answers
) -> Made:
    """The turns of a picture, whose file is relative to ``root``, or why there are none.

    Raises:
        BudgetSpent, EndpointError: See endpoint.py.
        DataError: If the picture can no longer be read.
    """
    talk = _Talk(picture, answers, setting)
    try:
        caption = await talk.caption(captioner, root / picture.file)
        return await talk.pairs(writer, caption) if caption else talk.made(NO_CAPTION)
    except Passing:
        return Made(picture, later=True)
    except Unanswered as error:
        talk.rejected.append(Rejected("picture", NO_ANSWER, str(error)))
        return talk.made(NO_ANSWER)


class _Talk:
    """The questions and answers about one picture."""

    def __init__(self, picture: Kept, answers: Answers, setting: Setting) -> None:
        self.picture, self.answers, self.setting = picture, answers, setting
        self.rejected: list[Rejected] = []
        self.reasons: Counter[str] = Counter()

    async def caption(self, endpoint: Endpoint, path: Path) -> str:
        prompts, part = self.setting.prompts, None
        for attempt in range(self.setting.attempts):
            key = (self.picture.digest, "caption", attempt)
            known = answer = self.answers.find(key)
            if answer is None:
                try:
                    part = part or await asyncio.to_thread(image_part, path, self.setting.max_pixels)
                except ImageError as error:
                    raise DataError(
                        f"{self.picture.name}: the picture was sound when it was looked at and cannot be read any more "
                        f"({error}); put it back, or begin again in another output folder"
                    ) from error
                message = user(part, prompts.filled(prompts.caption))
                answer = await endpoint.ask([message], seed=seed_of(*key))
            problem = caption_problem(answer, prompts)
            if known is None:
                self._weigh(endpoint, key, answer, problem)
            text = " ".join(answer.text.split())
            if problem is None:
                return text
            self.reasons[problem] += 1
            self.rejected = [Rejected("caption", problem, text[:200])]
        return ""

    async def pairs(self, endpoint: Endpoint, caption: str) -> Made:
        pairs = Pairs(caption, self.picture.name, self.setting.prompts)
        self.rejected = []
        for attempt in range(self.setting.attempts):
            if not pairs.missing:
                break
            key = (self.picture.digest, "pairs", attempt)
            known = answer = self.answers.find(key)
            if answer is None:
                text, wanted = pairs.request()
                answer = await endpoint.ask([user(text)], schema=wanted, seed=seed_of(*key))
            good = pairs.take(answer.text)
            if known is None:
                worst = next((rejected.reason for rejected in pairs.rejected.values()), "")
                self._weigh(endpoint, key, answer, None if good else worst)
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
