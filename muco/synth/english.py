"""Names of things in English: articles, plurals, numbers in words and lists. Enough for names of categories."""

from __future__ import annotations

import re

NUMBERS = "no one two three four five six seven eight nine ten".split()
_IRREGULAR = dict(
    pair.split("/")
    for pair in (
        "person/people man/men woman/women child/children foot/feet tooth/teeth goose/geese ox/oxen mouse/mice "
        "knife/knives wife/wives life/lives leaf/leaves shelf/shelves bookshelf/bookshelves wolf/wolves calf/calves "
        "loaf/loaves half/halves scarf/scarves thief/thieves potato/potatoes tomato/tomatoes hero/heroes "
        "stomach/stomachs human/humans ottoman/ottomans talisman/talismans"
    ).split()
)
_SAME = ("sheep", "deer", "fish", "moose", "bison", "craft", "shrimp", "squid", "salmon", "series")  # also as an ending
_MASS = frozenset(
    "broccoli rice bread grass hair water sand snow meat beef pork cheese pasta corn toast sushi sugar salt milk "
    "wine beer coffee tea juice luggage furniture clothing jewelry asparagus lettuce garlic bacon popcorn".split()
)
_SINGULAR_S = re.compile(r"(ss|us|is|bus|gas|lens|canvas|atlas|christmas)$")
_SOUNDS_LIKE_YOU = re.compile(r"(uni[cfotv]|use|usb|usual|uten|urin|ukul|eu|ewe|one\b|once\b)")
_SILENT_H = re.compile(r"(hour|heir|honest|honou?r|mp3\b)")


def a(name: str) -> str:
    """A name with "a" or "an", unless it is plural ("skis") or a mass ("rice")."""
    if not countable(name):
        return name
    vowel = name[0] in "aeiou" and not _SOUNDS_LIKE_YOU.match(name)
    return f"an {name}" if vowel or _SILENT_H.match(name) else f"a {name}"


def plural(name: str) -> str:
    """The plural of a name in lower case; of several words the head changes."""
    for joint in (" (", " of ", "/"):
        head, found, rest = name.partition(joint)
        if found:
            return f"{plural(head)}{joint}{plural(rest) if joint == '/' else rest}"
    if not countable(name):
        return name
    word = name.rpartition(" ")[2]
    if word in _IRREGULAR:
        return name.removesuffix(word) + _IRREGULAR[word]
    if word.endswith(_SAME):
        return name
    if word.endswith("man"):
        return f"{name[:-3]}men"
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return f"{name}es"
    return f"{name[:-1]}ies" if re.search(r"[^aeiou]y$", word) else f"{name}s"


def is_plural(name: str) -> bool:
    """Whether a name is a plural already, as "scissors", "skis" and "people" are."""
    word = _last_word(name)
    ends = word.endswith("s") and not _SINGULAR_S.search(word) and not word.endswith(_SAME)
    return word == "skis" or ends or word in _IRREGULAR.values()


def countable(name: str) -> bool:
    return not is_plural(name) and _last_word(name) not in _MASS


def _last_word(name: str) -> str:
    """The word that changes: the last one of the head."""
    return (re.split(r" \(| of ", name)[0].split() or [name])[-1]


def number(count: int) -> str:
    """Up to ten in words, above in digits."""
    return NUMBERS[count] if count < len(NUMBERS) else str(count)


def listed(words: list[str]) -> str:
    """ "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
