"""Checks of a model's texts. Each returns the reason why a text cannot be used, under which it is counted, or None."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Set
from pathlib import PurePath

from muco.base.text import LONE_SURROGATE, SPECIAL_TOKEN
from muco.synth.answers import Answer
from muco.synth.prompts import Prompts

# The reasons, in the order in which they are looked for.
NOT_JSON, MISSING, EMPTY, CUT_OFF = "not JSON", "missing field", "empty", "cut off"
SPECIAL, REFUSAL, LANGUAGE, TOO_LONG, TOO_SHORT = "special token", "refusal", "language", "too long", "too short"
HALF = "half a character"
NAMES_SOURCE, GIVEN_AWAY, REPEATS = "names its source", "does not need the image", "repeats the question"
SAME_QUESTION, SAME_TARGET, NOT_WRONG = "same question twice", "same target twice", "wrong answer is right"

FOREIGN = 0.3  # share of letters of another script from which a text is in another language
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
    """Why an answer is not a caption."""
    if answer.finish == "length":
        return CUT_OFF
    if answer.finish in ("refusal", "content_filter"):
        return REFUSAL
    return text_problem(answer.text, prompts) or (
        TOO_SHORT if len(answer.text.split()) < SHORTEST_CAPTION and prompts.script == "LATIN" else None
    )


def text_problem(text: str, prompts: Prompts) -> str | None:
    """What is wrong with any text of a model, a question, an answer or a caption."""
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
    """What is wrong with a question; ``name`` is that of the image's file."""
    if problem := text_problem(question, prompts):
        return problem
    if len(question.split()) > prompts.words["question"]:
        return TOO_LONG
    return NAMES_SOURCE if names_source(question, name) else None


def answer_problem(question: str, answer: str, most_words: int, prompts: Prompts) -> str | None:
    """What is wrong with an answer to a question that is sound."""
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


def names_source(question: str, name: str) -> bool:
    """Whether a question speaks of a description or of the image's file, which nobody has who sees the image."""
    stem = PurePath(name).stem
    named = len(stem) > 3 and re.search(rf"(?<!\w){re.escape(stem)}(?!\w)", question, re.IGNORECASE) is not None
    # A file may be called "red ring.jpg"; one named by digits or with signs between the words is meant as a file.
    return _SOURCE.search(question) is not None or (named and re.search(r"[\d_]", stem) is not None)


def foreign(text: str, script: str) -> float:
    """Share of the letters that belong to another script."""
    letters = [char for char in text if char.isalpha()]
    own = sum(unicodedata.name(char, "").startswith(script) for char in letters)
    return 1 - own / len(letters) if letters else 0.0


def plain(text: str) -> str:
    """A text by which two are compared: words in lower case, without signs and articles."""
    words = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    return " ".join(word for word in words if word not in ("a", "an", "the")) or text.strip()


def content_words(text: str) -> Set[str]:
    return {word for word in plain(text).split() if word not in _FILLERS}
