"""The seven pairs of a picture: their keys, the reading of a model's answer, and the checks.

::

    caption ─▶ ask for all keys ─▶ read JSON ─▶ checks ─▶ good pairs
                     ▲                             │
                     └── the rest again, with reasons, up to n times ─▶ what is still bad is recorded with reasons
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from muco.base.text import LONE_SURROGATE, SPECIAL_TOKEN
from muco.synth.chat import Answer
from muco.synth.prompts import Prompts

# The reasons, in the order of the checks.
NOT_JSON, MISSING, EMPTY, CUT_OFF = "not JSON", "missing field", "empty", "cut off"
SPECIAL, REFUSAL, LANGUAGE, TOO_LONG, TOO_SHORT = "special token", "refusal", "language", "too long", "too short"
HALF = "half a character"
NAMES_SOURCE, GIVEN_AWAY, REPEATS = "names its source", "does not need the image", "repeats the question"
SAME_QUESTION, SAME_TARGET, NOT_WRONG = "same question twice", "same target twice", "wrong answer is right"

FOREIGN = 0.3  # share of letters of another script above which a text is in another language
SHORTEST_CAPTION = 3  # words

_SPECIAL = re.compile(
    SPECIAL_TOKEN.pattern
    + r"|</?(?:s|unk|pad|bos|eos|cls|sep|mask|image|img|video|think|start_of_turn|end_of_turn|image_soft_token)>"
    r"|\[/?(?:INST|SEP|CLS|MASK|PAD|UNK|IMG)\]",
    re.IGNORECASE,
)
_REFUSAL = re.compile(
    r"\A\W*(?:i['’]?m (?:sorry|afraid|unable|not able)|i am (?:sorry|afraid|unable|not able)|sorry\b|i apologi[sz]e"
    r"|i (?:can['’]?t|cannot|can not|won['’]?t|will not|must decline)|as an ai\b|as a (?:large )?language model)",
    re.IGNORECASE,
)
_NO_ANSWER = re.compile(
    r"\b(?:cannot|can['’]?t|can not|could not|impossible to) (?:be )?(?:determin|told\b|tell\b|known?\b|identif|answer)"
    r"|\bnot (?:mentioned|specified|stated|provided)\b|\A\W*(?:unknown|n/a|not visible)\W*\Z",
    re.IGNORECASE,
)
_SOURCE = re.compile(
    r"\b(?:descri(?:bed|ption)|captions?|passage|paragraph|text) (?:above|below|states?|mentions?|provided|given)\b"
    r"|\b(?:according to|based on|in|from|by) (?:the|this|that) (?:description|caption|passage|paragraph)\b"
    r"|\bthe (?:description|caption|passage)\b|\bbeing described\b|\bas described\b|\bfile ?names?\b"
    r"|\b[\w-]+\.(?:jpe?g|png|webp|gif|bmp|tiff?)\b",
    re.IGNORECASE,
)
_WORD = re.compile(r"\w+")
_FILLERS = frozenset(
    "a an the this that these those it its is are was were be do does did there here of in on at to for with by from "
    "and or as what which who whom whose where when why how many much kind type sort you can see shown picture image "
    "photo photograph yes no".split()
)


def caption_problem(answer: Answer, prompts: Prompts) -> str | None:
    """Why an answer is not a caption, or None."""
    if answer.finish in (ended := {"length": CUT_OFF, "refusal": REFUSAL, "content_filter": REFUSAL}):
        return ended[answer.finish]
    short = len(answer.text.split()) < SHORTEST_CAPTION and prompts.script == "LATIN"
    return text_problem(answer.text, prompts) or (TOO_SHORT if short else None)


def text_problem(text: str, prompts: Prompts) -> str | None:
    """The problem of a text that a model wrote: a question, an answer or a caption."""
    if not text.strip():
        return EMPTY
    if LONE_SURROGATE.search(text):
        return HALF
    if _SPECIAL.search(text):
        return SPECIAL
    if _REFUSAL.search(text):
        return REFUSAL
    return LANGUAGE if prompts.script and foreign(text, prompts.script) > FOREIGN else None


def question_problem(question: str, prompts: Prompts, name: str) -> str | None:
    """The problem of a question; ``name`` is that of the image's file."""
    if problem := text_problem(question, prompts):
        return problem
    if len(question.split()) > prompts.words["question"]:
        return TOO_LONG
    stem = PurePath(name).stem
    # "red ring.jpg" may be words of a question; a name with digits or "_" is that of a file
    named = len(stem) > 3 and re.search(r"[\d_]", stem)
    found = named and re.search(rf"(?<!\w){re.escape(stem)}(?!\w)", question, re.IGNORECASE)
    return NAMES_SOURCE if found or _SOURCE.search(question) else None


def answer_problem(question: str, answer: str, most_words: int, prompts: Prompts) -> str | None:
    """The problem of an answer to a good question."""
    if problem := text_problem(answer, prompts):
        return problem
    if _NO_ANSWER.search(answer):
        return REFUSAL
    if len(answer.split()) > most_words:
        return TOO_LONG
    if plain(question) in plain(answer):
        return REPEATS
    told = content_words(answer)
    return GIVEN_AWAY if told and told <= content_words(question) else None


def foreign(text: str, script: str) -> float:
    """Share of the letters that belong to another script."""
    letters = [char for char in text if char.isalpha()]
    own = sum(unicodedata.name(char, "").startswith(script) for char in letters)
    return 1 - own / len(letters) if letters else 0.0


def plain(text: str) -> str:
    """A text for comparisons: words in lower case, without punctuation and articles."""
    words = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    return " ".join(word for word in words if word not in ("a", "an", "the")) or text.strip()


def content_words(text: str) -> Set[str]:
    return {word for word in plain(text).split() if word not in _FILLERS}


@dataclass(frozen=True)
class Slot:
    """One of the seven pairs; the answer of the retrieval pair is the caption."""

    name: str
    kind: str

    @property
    def keys(self) -> tuple[str, ...]:
        query, answer = f"query_{self.name}", f"answer_{self.name}"
        return {"cls": (query, answer, f"negative_{answer}"), "retrieval": (query,)}.get(self.name, (query, answer))


SLOTS = (  # in the order in which they are stored
    Slot("cls", "classification"),
    Slot("vqa_global1", "global"),
    Slot("vqa_global2", "global"),
    Slot("vqa_local1", "local"),
    Slot("vqa_local2", "local"),
    Slot("vqa_creative", "creative"),
    Slot("retrieval", "retrieval"),
)


@dataclass(frozen=True)
class Pair:
    """A question, its answer and a wrong answer."""

    query: str
    answer: str
    negative: str = ""


@dataclass(frozen=True)
class Rejected:
    """An unused answer of a model, with the reason."""

    kind: str
    reason: str
    text: str


@dataclass
class Pairs:
    """The pairs of one picture so far: good ones, and the last rejected one of every other slot."""

    caption: str  # the answer of the retrieval pair
    name: str  # of the picture's file
    prompts: Prompts
    good: dict[Slot, Pair] = field(default_factory=dict)
    rejected: dict[Slot, Rejected] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)  # of everything rejected so far

    @property
    def missing(self) -> list[Slot]:
        return [slot for slot in SLOTS if slot not in self.good]

    def request(self) -> tuple[str, dict[str, Any]]:
        """The text that asks for what is missing, and the JSON schema of its answer."""
        keys = [key for slot in self.missing for key in slot.keys]
        told = "\n".join(f"{key}: {self.prompts.filled(self.prompts.keys[key])}" for key in keys)
        text = self.prompts.filled(self.prompts.pairs, keys=told, caption=self.caption)
        if self.rejected:
            kept = "\n".join(f"- {pair.query} {pair.answer}" for slot, pair in self.good.items() if slot in SLOTS[:-1])
            bad = "\n".join(f"- {r.kind}, {r.reason}: {r.text}" for r in self.rejected.values())
            text += self.prompts.filled(self.prompts.again, kept=kept or "- none", rejected=bad)
        return text, schema(keys)

    def take(self, text: str) -> bool:
        """Sorts the pairs of a model's answer into good and rejected; whether any is good."""
        value, before = read_object(text), len(self.good)
        for slot in self.missing:
            problem, shown = self._judged(slot, value, text)
            if problem is None:
                self.rejected.pop(slot, None)
            else:
                self.rejected[slot] = Rejected(slot.kind, problem, " ".join(shown.split())[:200])
                self.reasons.append(problem)
        self.good = {slot: self.good[slot] for slot in SLOTS if slot in self.good}
        return len(self.good) > before

    def _judged(self, slot: Slot, value: Mapping[str, Any] | None, text: str) -> tuple[str | None, str]:
        """Keeps a good pair; the problem of any other, and the text to show."""
        if value is None:
            return NOT_JSON, text
        given = [value.get(key) for key in slot.keys]
        if not all(isinstance(part, str) for part in given):
            return MISSING, f"no text under {', '.join(slot.keys)}"
        parts = [part.strip() for part in given]
        pair = Pair(parts[0], self.caption if slot.name == "retrieval" else parts[1], *parts[2:])
        problem = self._problem(slot, pair)
        if problem is None:
            self.good[slot] = pair
        return problem, " | ".join(parts)

    def _problem(self, slot: Slot, pair: Pair) -> str | None:
        if problem := question_problem(pair.query, self.prompts, self.name):
            return problem
        others = self.good.values()
        if any(plain(other.query) == plain(pair.query) for other in others):
            return SAME_QUESTION
        if slot.name == "retrieval":
            return None
        if problem := answer_problem(pair.query, pair.answer, self.prompts.words[slot.kind], self.prompts):
            return problem
        if plain(pair.answer) in {plain(self.caption), *(plain(other.answer) for other in others)}:
            return SAME_TARGET
        if slot.name != "cls":
            return None
        if plain(pair.negative) == plain(pair.answer):
            return NOT_WRONG
        return text_problem(pair.negative, self.prompts)


def schema(keys: Sequence[str]) -> dict[str, Any]:
    """The JSON schema of an object with these keys, all of them strings."""
    properties = {key: {"type": "string"} for key in keys}
    return {"type": "object", "properties": properties, "required": list(keys), "additionalProperties": False}


ALL_KEYS = tuple(key for slot in SLOTS for key in slot.keys)


def read_object(text: str) -> dict[str, Any] | None:
    """The JSON object of a text, even in a fence or among other words; None if there is none."""
    fenced = re.findall(r"```(?:json)?\s*\n(.*?)```", text, re.DOTALL)
    for candidate in (text, *fenced[:1], text[text.find("{") : text.rfind("}") + 1]):
        try:
            value = json.loads(candidate)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            return value
    return None
