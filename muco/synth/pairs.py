"""The seven pairs of a picture: what they are, how a model's answer is read, and which of them are good.

::

    caption ─▶ ask for all keys ─▶ read JSON ─▶ checks ─▶ good pairs
                     ▲                             │
                     └── the rest again, with reasons, up to n times ─▶ what is still bad is recorded with its reason
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from muco.synth import checks
from muco.synth.prompts import Prompts


@dataclass(frozen=True)
class Slot:
    """One of the seven pairs; the retrieval pair has no answer key, because its answer is the caption."""

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
    """A question and its answer; ``negative`` is a wrong one."""

    query: str
    answer: str
    negative: str = ""


@dataclass(frozen=True)
class Rejected:
    """What a model wrote that is not used, and why."""

    kind: str
    reason: str
    text: str

    def as_dict(self) -> dict[str, str]:
        return {"kind": self.kind, "reason": self.reason, "text": self.text}


@dataclass
class Pairs:
    """The pairs of one picture so far: good ones by slot, and what is wrong with the last try of every other slot.

    Args:
        caption: Of the picture; the answer of the retrieval pair.
        name: Of the picture's file.
    """

    caption: str
    name: str
    prompts: Prompts
    good: dict[Slot, Pair] = field(default_factory=dict)
    rejected: dict[Slot, Rejected] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)  # of everything rejected so far, also what came good later

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
        """Sorts what a model answered into good and rejected; whether any of it is good."""
        wanted, value = self.missing, read_object(text)
        before = len(self.good)
        for slot in wanted:
            pair, problem, shown = self._judged(slot, value, text)
            if problem is None:
                self.good[slot] = pair
                self.rejected.pop(slot, None)
            else:
                self.rejected[slot] = Rejected(slot.kind, problem, " ".join(shown.split())[:200])
                self.reasons.append(problem)
        self.good = {slot: self.good[slot] for slot in SLOTS if slot in self.good}
        return len(self.good) > before

    def _judged(self, slot: Slot, value: Mapping[str, Any] | None, text: str) -> tuple[Pair, str | None, str]:
        nothing = Pair("", "")
        if value is None:
            return nothing, checks.NOT_JSON, text
        given = [value.get(key) for key in slot.keys]
        if not all(isinstance(part, str) for part in given):
            return nothing, checks.MISSING, f"no text under {', '.join(slot.keys)}"
        parts = [part.strip() for part in given]
        pair = Pair(parts[0], self.caption if slot.name == "retrieval" else parts[1], *parts[2:])
        return pair, self._problem(slot, pair), " | ".join(parts)

    def _problem(self, slot: Slot, pair: Pair) -> str | None:
        if problem := checks.question_problem(pair.query, self.prompts, self.name):
            return problem
        others = [other for key, other in self.good.items() if key != slot]
        if any(checks.plain(other.query) == checks.plain(pair.query) for other in others):
            return checks.SAME_QUESTION
        if slot.name == "retrieval":
            return None
        most = self.prompts.words[slot.kind]
        if problem := checks.answer_problem(pair.query, pair.answer, most, self.prompts):
            return problem
        targets = {checks.plain(other.answer) for other in others} | {checks.plain(self.caption)}
        if checks.plain(pair.answer) in targets:
            return checks.SAME_TARGET
        if slot.name != "cls":
            return None
        if checks.plain(pair.negative) == checks.plain(pair.answer):
            return checks.NOT_WRONG
        return checks.text_problem(pair.negative, self.prompts)


def schema(keys: Sequence[str]) -> dict[str, Any]:
    """The JSON schema of an object with these keys, all of them strings."""
    properties = {key: {"type": "string"} for key in keys}
    return {"type": "object", "properties": properties, "required": list(keys), "additionalProperties": False}


ALL_KEYS = tuple(key for slot in SLOTS for key in slot.keys)


def read_object(text: str) -> dict[str, Any] | None:
    """The one JSON object of a text, also in a fence or with words around it; None if there is none."""
    for candidate in _candidates(text):
        try:
            value = json.loads(candidate)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            return value
    return None


def _candidates(text: str) -> Iterator[str]:
    yield text
    if fenced := re.search(r"```(?:json)?\s*\n(.*?)```", text, re.DOTALL):
        yield fenced[1]
    yield text[text.find("{") : text.rfind("}") + 1]
