"""The prompts of the models, with a version; a YAML file may change any of them.

::

    version: jewellery-2        # your own name, stored with the results
    language: German
    caption: |
      Describe the piece of jewellery …
    words: {classification: 4}
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from muco.base.text import read_text
from muco.base.yaml_text import parse_yaml
from muco.errors import DataError, did_you_mean

WORDS = {"question": 40, "classification": 8, "global": 40, "local": 20, "creative": 60}  # at most

PICTURE = """Say in one or two sentences of {language} what this picture shows: the main subject with its looks, what is
around it, and any text that can be read. Begin with the subject itself, not with words such as "this picture shows"."""

CAPTION = """Describe this picture in {language} for somebody who cannot see it. Begin with the main subject. Then go
through everything else that can be made out: things with their number, colour, material, size and place, people and
what they do, text that can be read, the surroundings, the light, and what kind of picture it is. Say only what is to be
seen; leave out guesses, praise and introductions. One paragraph of 60 to 150 words."""

PAIRS = """You write questions and answers from which a search engine for pictures learns. Below is what one picture
shows. Whoever is asked sees the picture and knows nothing of these words.

For every question:
- it is about the picture and can be answered by looking at it alone; it does not mention a description, a caption, a
  text about the picture or a file;
- it does not give its own answer away, and no two questions ask for the same;
- at most {question} words.
For every answer:
- it follows from the words below; it is short and plain, and does not repeat the question;
- no two answers are the same.
Everything is in {language}.

Answer with one JSON object and nothing else, with these keys, all of them strings:
{keys}

What the picture shows:
{caption}"""

AGAIN = """

Some were written before. Do not write these again, and write nothing that means the same:
{kept}
These could not be used; write better ones in their place:
{rejected}"""

KEYS = {
    "query_cls": "a question about what the main subject is",
    "answer_cls": "the name of it, at most {classification} words",
    "negative_answer_cls": "a name that fits the same question and is wrong for this picture, though near",
    "query_vqa_global1": "a question about the picture as a whole: how its parts belong together or differ",
    "answer_vqa_global1": "at most {global} words",
    "query_vqa_global2": "another question about the picture as a whole: its surroundings, its mood, what goes on",
    "answer_vqa_global2": "at most {global} words",
    "query_vqa_local1": "a question about one detail",
    "answer_vqa_local1": "at most {local} words",
    "query_vqa_local2": "a question about another detail, somewhere else",
    "answer_vqa_local2": "at most {local} words",
    "query_vqa_creative": "a question that takes imagination: a story, a before or after, a purpose",
    "answer_vqa_creative": "one sentence of at most {creative} words that fits what is seen",
    "query_retrieval": "a request to describe the whole picture in detail",
}


@dataclass(frozen=True)
class Prompts:
    """The wordings. ``{language}``, ``{caption}`` … are filled in; other braces stay as they are."""

    version: str = "muco-1"  # stored with the results; changed wordings need a version of their own
    language: str = "English"  # of the results
    script: str = "LATIN"  # of that language, by Unicode's names of letters (CYRILLIC, CJK …); "" checks nothing
    picture: str = PICTURE  # asks for the short captions of ``muco data caption``
    caption: str = CAPTION  # asks for the dense caption
    pairs: str = PAIRS  # asks for the pairs; needs {caption} and {keys}
    again: str = AGAIN  # appended to ask for pairs again; needs {rejected}
    keys: Mapping[str, str] = field(default_factory=lambda: dict(KEYS))  # the request for each key
    words: Mapping[str, int] = field(default_factory=lambda: dict(WORDS))  # longer questions and answers are rejected

    @property
    def name(self) -> str:
        """The version and the beginning of a digest of all wordings, to reveal silent changes."""
        told = json.dumps(vars(self), sort_keys=True, default=dict)
        return f"{self.version} ({hashlib.sha256(told.encode()).hexdigest()[:8]})"

    def filled(self, text: str, **values: Any) -> str:
        """The text with every known ``{name}`` replaced, once: braces within a caption stay."""
        known = {"language": self.language, **self.words, **values}
        return re.sub(r"\{(\w+)\}", lambda found: str(known.get(found[1], found[0])), text)


def load_prompts(path: Path | None) -> Prompts:
    """The default wordings, with the changes of a YAML file if any.

    Raises:
        DataError: If the file is not YAML with these keys, lacks a version, or a wording lacks a placeholder.
    """
    if path is None:
        return Prompts()
    given = parse_yaml(read_text(path), str(path), DataError)
    if not isinstance(given, dict) or not isinstance(given.get("version"), str):
        raise DataError(f"{path}: prompts are a mapping with a 'version' of your own, such as version: mine-1")
    _check(given, {*vars(Prompts())}, str(path))
    for name, defaults in (("keys", KEYS), ("words", WORDS)):
        part = given.get(name, {})
        if not isinstance(part, dict):
            raise DataError(f"{path}: {name!r} must be a mapping with some of {', '.join(defaults)}")
        _check(part, {*defaults}, f"{path}: {name}")
        given[name] = defaults | part
    prompts = replace(Prompts(), **given)
    for name, value in vars(prompts).items():
        if name not in ("keys", "words") and not isinstance(value, str):
            raise DataError(f"{path}: {name!r} must be a text")
    if wrong := [name for name, number in prompts.words.items() if not isinstance(number, int) or number < 1]:
        raise DataError(f"{path}: words: {wrong[0]!r} must be a whole number from 1 on")
    for name, needed in (("pairs", "{caption}"), ("pairs", "{keys}"), ("again", "{rejected}")):
        if needed not in getattr(prompts, name):
            raise DataError(f"{path}: {name!r} must hold {needed}, in whose place it is filled in")
    return prompts


def _check(given: Mapping[str, Any], accepted: set[str], where: str) -> None:
    for key in given:
        if key not in accepted:
            raise DataError(f"{where}: unknown key {key!r}{did_you_mean(key, sorted(accepted))}")
