"""What a drawing of the Open Clip Art Library is called: its SVG's metadata, cleaned of authors, numbers and slips.

Titles were written by hundreds of people. Many are names of files ("magnolia-white"), of whole collections ("Map
Symbols", for 21 drawings), or of the author.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import Element

from packages import read_xml

PACKAGE = "openclipart-svg"
DC, RDF = "{http://purl.org/dc/elements/1.1/}", "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
WORK = "{http://web.resource.org/cc/}Work"
PUBLIC_DOMAIN = ("http://web.resource.org/cc/PublicDomain", "http://creativecommons.org/licenses/publicdomain/")

SHARED = 4  # drawings of one title, from which on it may be that of a whole collection
MOST_KEYWORDS = 12
NOISE = frozenset("clipart clip art svg aiga hash unsorted untitled image picture img openclipart none bw".split())
SHORT = frozenset("no up in on of to at go by di da al la il un pc tv cd dvd tft lcd".split())  # in names of files
NO_KEYWORD = re.compile(r"0x[0-9a-f]{5}|@|https?:|architetto")
NO_DESCRIPTION = re.compile(  # about the file or its author, not about what is drawn
    r"https?:|www\.|@|domain|licen[cs]e|copyright|clip ?art|released|convert|inkscape|\bsvg\b|vector|\bI\b|\bmy\b",
    re.IGNORECASE,
)
VARIANTS = frozenset(  # words in which near copies differ
    "red orange yellow green blue purple violet brown black white grey gray pink cyan magenta gold silver "
    "light dark bright large medium small big little tiny mini simple plain alternate mirrored rotated "
    "outline outlined left right up down top bottom front back side rear open closed full empty half "
    "colour color coloured colored one two three four five six seven eight nine ten first second third "
    "v r version the a an and of with without".split()
)


@dataclass(frozen=True)
class Metadata:
    """What an SVG says of itself, as written; texts that are not there are empty."""

    title: str
    keywords: tuple[str, ...]
    description: str
    creator: str
    free: bool  # whether it says that it is in the public domain


def read_metadata(file: Path) -> Metadata:
    """The RDF metadata of an SVG.

    Raises:
        DataError: If the file is missing, too large, no XML, or has entities.
    """
    work = read_xml(file, PACKAGE).find(f".//{WORK}")
    if work is None:
        return Metadata("", (), "", "", False)
    licences = [value for node in work if node.tag.endswith("}license") for value in node.attrib.values()]
    return Metadata(
        title=text(work.find(f"{DC}title")),
        keywords=tuple(filter(None, map(text, work.iterfind(f"{DC}subject//{RDF}li")))),
        description=text(work.find(f"{DC}description")),
        creator=" ".join(map(text, work.iterfind(f"{DC}creator//{DC}title"))).strip(),
        free=any(licence in PUBLIC_DOMAIN for licence in licences),
    )


def text(node: Element | None) -> str:
    return " ".join((node.text or "").split()) if node is not None else ""


# ---------------------------------------------------------------- titles


def words(name: str) -> list[str]:
    """The words of a title that may be the name of a file: "AfricanDrum1_bw" -> African, Drum, 1, bw."""
    name = re.sub(r"&#?\w+;|\.(svg|png)$|\bb and w\b", " ", name, flags=re.IGNORECASE)
    if " " not in name:
        name = name.replace("-", " ")
    name = re.sub(r"(?<=[a-zà-ÿ])(?=[A-Z0-9])|(?<=[0-9])(?=[A-Za-z]{2})", " ", name)
    return re.findall(r"[^\W_]+(?:['’.-][^\W_]+)*", name)


def clean_title(name: str, creator: str) -> str:
    """A title as words: "architetto -- bicchiere 01" -> "bicchiere"; "" if only its author or numbers are left."""
    name = re.sub(r"^clip ?art by .*? - ", "", name, flags=re.IGNORECASE)
    by = {word.lower() for word in words(creator) if len(word) > 1}
    found = [word for word in words(name) if word.lower() not in NOISE]
    if found and re.fullmatch(r"by|0\d", found[0]):  # "by nicu baloon", "01 nomoon"
        found = found[1:]
    found = without_author(found, by)
    while found and re.fullmatch(r"[\d.]+|[a-z]|\d+[a-z]", found[-1]):
        found.pop()
    title = " ".join(found)
    return title if re.search(r"[^\W\d_]{2}", title) else ""


def without_author(found: list[str], by: Collection[str]) -> list[str]:
    """The words without the author's at both ends; names of files often end in a name cut short ("frances_01")."""

    def his(word: str) -> bool:
        word = word.lower()
        return word in by or (len(word) > 3 and any(name.startswith(word) for name in by))

    while found and his(found[0]):
        found = found[1:]
    while found and (his(found[-1]) or found[-1].isdigit()):
        found = found[:-1]
    return found


def is_named_by(title: str, stem: str) -> bool:
    """Whether the name of a file comes from the title."""
    wanted, given = (re.sub(r"[\W\d_]", "", name.lower()) for name in (title, stem))
    return given.startswith(wanted[:8])


def title_of(meta: Metadata, stem: str, uses: int) -> str:
    """What the drawing is called: its title or, where that is a whole collection's, the name of its file.

    Args:
        stem: The name of its file, without ".png".
        uses: Drawings that have this title.
    Returns:
        "" if there is none: no title, no letters, only the author, or a file named by parts of words ("sm_016").
    """
    title = clean_title(meta.title, meta.creator)
    if uses < SHARED or (title and is_named_by(title, stem)):
        return title
    name = clean_title(stem, meta.creator)
    return name if all(is_word(word.lower()) for word in name.split()) else ""


def is_word(word: str) -> bool:
    return word in SHORT or word.isdigit() or bool(re.search(r"\w{3}", word) and re.search(r"[aeiouy]", word))


def base_title(title: str) -> str:
    """The title without what near copies differ in: number, colour, size, side. The title itself if nothing is left."""
    found = [word for word in words(title.lower()) if word not in VARIANTS and not re.search(r"\d", word)]
    return " ".join(found) or title.lower()


# ---------------------------------------------------------------- keywords and description


def clean_keywords(meta: Metadata, title: str) -> list[str]:
    """Keywords in lower case without the title, the author and slips, at most MOST_KEYWORDS."""
    lower = (" ".join(re.split(r"[\s_]+", word)).strip().lower() for word in meta.keywords)
    by = meta.creator.lower()
    found = [word for word in dict.fromkeys(lower) if is_keyword(word) and word != title.lower() and word not in by]
    return found[:MOST_KEYWORDS]


def is_keyword(word: str) -> bool:
    """Whether it has letters and is neither a slip of a program nor words run together ("cayennepepperspicyhot")."""
    letters = re.search(r"[^\W\d]{2}", word) and not NO_KEYWORD.search(word)
    return bool(letters) and word not in NOISE and max(map(len, word.split())) < 18


def clean_description(meta: Metadata, title: str) -> str:
    """The first sentence of the description; "" if it is short, long, the title again, or not about what is drawn."""
    sentence = re.split(r"(?<=[a-z)][.!?])\s", meta.description)[0]
    again = re.sub(r"\W", "", sentence.lower()) == re.sub(r"\W", "", title.lower())
    fits = 3 <= len(sentence.split()) <= 30 and not NO_DESCRIPTION.search(sentence)
    return sentence if fits and not again else ""
