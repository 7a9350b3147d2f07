"""Turns of an image by rule, from its boxes and captions.

A rule asks only if the boxes leave no doubt, so most images get some of the turns and few get all:

==============  ===================================================  ================================================
kind            asks                                                 if
==============  ===================================================  ================================================
classification  what the main thing is                               the largest box has ``CLEARLY`` times the next
global          which things, which kinds of things                  there are at least two
global          how many of a category                               all its boxes are single and of the least area
local           what is at a place                                   one box is there and no other reaches into it
local           what is left or right of, above or below a thing     no other box on that side is level with it
local           where a thing is, and how large                      it is the only one of its category
retrieval       a description                                        there are captions, else made from the boxes
==============  ===================================================  ================================================

Within an image, questions name a category or have it as an answer, never both, and no two turns have the same target.
Answers are true as far as the annotation is complete.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product

from muco.dialogue import Turn
from muco.synth.english import a, countable, is_plural, listed, number, plural

CLEARLY = 1.5  # times the area of the next box
SMALL, LARGE = 0.05, 0.25  # shares of the picture: at most, at least
REACHES = 0.1  # share of a place that another box may cover
MAX_LEVEL = 500  # boxes compared with each other; images with more get no neighbours
ROUNDS = 2  # times that a local or counting rule may ask
MAX_LISTED = 8  # things in one answer
KIND_ORDER = ("classification", "global", "local")

PLACES = (
    *("at the top left", "at the top", "at the top right"),
    *("at the left", "in the center", "at the right"),
    *("at the bottom left", "at the bottom", "at the bottom right"),
)
SIDES = ("to the left of", "to the right of", "above", "below")
MAIN = ["What is the main thing in the picture?", "Name the largest thing.", "Which thing takes up the most room?"]
THINGS = ["Which things can be seen clearly?", "List the things in the picture.", "What are the things shown here?"]
KINDS = ["Which kinds of things are there?", "What sorts of things does the picture show?", "Name the kinds of things."]
DESCRIBE = ["Describe the picture.", "Write a caption.", "What does the picture show?", "Sum up the picture."]
COUNT = ["How many {many} are there?", "What is the number of {many}?", "Count the {many}."]
WHERE = ["Where {be} the {name}?", "In which part of the picture {be} the {name}?", "Find the {name}."]
SIZE = [
    "What size {be} the {name}?",
    "How much of the picture {do} the {name} take up?",
    "What size {do} the {name} have in the picture?",
]


@dataclass(frozen=True, order=True, slots=True)
class Thing:
    """A box: the name of its category, its edges in px, and whether it is a crowd instead of one thing."""

    name: str
    left: float
    top: float
    right: float
    bottom: float
    crowd: bool = False

    @property
    def area(self) -> float:
        return (self.right - self.left) * (self.bottom - self.top)


@dataclass(slots=True)
class Picture:
    """An image with its annotations; the order of the lists does not matter."""

    id: int
    file: str
    width: float
    height: float
    things: list[Thing] = field(default_factory=list)
    captions: list[tuple[int, str]] = field(default_factory=list)  # (id, text)
    unsure: frozenset[str] = frozenset()  # categories that may lack boxes
    absent: frozenset[str] | None = None  # categories known to be absent; None: all without a box


def turns_of(picture: Picture, kinds: Mapping[str, str], *, min_area: float = 0.01, seed: int = 0) -> list[Turn]:
    """The turns of one image in the order classification, global, local, retrieval; possibly none.

    ``kinds``: the supercategory of every category by name; hard negatives are drawn from it.
    """
    return _Rules(picture, kinds, min_area, random.Random(f"{seed}:{picture.id}")).turns()


class _Rules:
    """The rules for one image, and which names are in answers or questions already."""

    def __init__(self, picture: Picture, kinds: Mapping[str, str], min_area: float, rng: random.Random) -> None:
        self.picture, self.kinds, self.rng = picture, kinds, rng
        least = min_area * picture.width * picture.height
        self.things = sorted(picture.things)
        self.boxes: dict[str, list[Thing]] = {}
        for thing in self.things:
            self.boxes.setdefault(thing.name, []).append(thing)
        self.clear = {thing for thing in self.things if thing.area >= least and not thing.crowd}
        # categories with one box per thing, all of them clear
        known = [(name, boxes) for name, boxes in self.boxes.items() if name not in picture.unsure]
        self.exact = [name for name, boxes in known if self.clear.issuperset(boxes)]
        self.single = {name: self.boxes[name][0] for name in self.exact if len(self.boxes[name]) == 1}
        areas: Counter[str] = Counter()
        for thing in self.things:
            if thing.area >= least:
                areas[thing.name] += thing.area
        self.seen = sorted(areas, key=lambda name: (-areas[name], name))
        self.answers: set[str] = set()
        self.asked: set[str] = set()
        self._done: set[tuple[str, str]] = set()  # (first wording, name)

    def turns(self) -> list[Turn]:
        asked = [self.main(), self.list_things(), self.list_kinds()]
        often = [self.place, self.where, self.size, self.count]
        self.rng.shuffle(often)  # each takes names from the others; the rarest rule comes before them
        for _ in range(ROUNDS):
            asked += [rule() for rule in (self.beside, *often)]
        made = sorted(filter(None, asked), key=lambda turn: KIND_ORDER.index(turn.kind))
        used: dict[str, Turn] = {}  # target -> the first turn that has it
        for turn in made:
            used.setdefault(_plain(turn.target[0].text), turn)
        describe = self.describe(set(used))
        return [*used.values(), *([describe] if describe else [])]

    def main(self) -> Turn | None:
        ranked = sorted(self.things, key=lambda thing: -thing.area)
        if not ranked or ranked[0] not in self.clear or any(ranked[0].area < CLEARLY * t.area for t in ranked[1:]):
            return None
        name = ranked[0].name
        self.answers.add(name)
        siblings = self._siblings(name)
        return Turn(MAIN, a(name), "classification", [a(self.rng.choice(siblings))] if siblings else [])

    def _siblings(self, name: str) -> list[str]:
        """Categories of the same kind that neither a box nor a caption of the image has."""
        kind, absent = self.kinds.get(name, ""), self.picture.absent
        if not kind and absent is None:
            return []
        said = " ".join(text for _, text in self.picture.captions).lower()
        others = [name for name in (self.kinds if absent is None else absent) if self.kinds.get(name, "") == kind]
        return sorted(n for n in others if n not in self.boxes and n not in said and plural(n) not in said)

    def list_things(self) -> Turn | None:
        return Turn(THINGS, listed(self.seen), "global") if 2 <= len(self.seen) <= MAX_LISTED else None

    def list_kinds(self) -> Turn | None:
        kinds = list(dict.fromkeys(self.kinds.get(name, "") for name in self.seen))
        if not 2 <= len(kinds) <= MAX_LISTED or "" in kinds:
            return None
        return Turn(KINDS, f"things of the kinds {listed(kinds)}", "global")

    def count(self) -> Turn | None:
        several = [name for name in self.exact if len(self.boxes[name]) > 1 and countable(name)]
        return self._ask_about({name: self._phrase(name) for name in several}, COUNT, "global")

    def place(self) -> Turn | None:
        alone = [(name, self._alone_at(place)) for place, name in enumerate(PLACES)]
        options = [(name, thing) for name, thing in alone if thing and self._free(thing.name)]
        if not options:
            return None
        place, thing = self.rng.choice(options)
        self.answers.add(thing.name)
        asks = [f"What is {place}?", f"What can be seen {place} of the picture?", f"Name the thing {place}."]
        return Turn(asks, a(thing.name), "local")

    def _alone_at(self, place: int) -> Thing | None:
        there = [thing for thing in self.clear if self._place(thing) == place]
        alone = len(there) == 1 and sum(self._reaches(thing, place) for thing in self.things) == 1
        return there[0] if alone else None

    def _place(self, thing: Thing) -> int | None:
        """The index of its place in PLACES; None if unclear."""
        column = _third(thing.left, thing.right, self.picture.width)
        row = _third(thing.top, thing.bottom, self.picture.height)
        return None if row is None or column is None else 3 * row + column

    def _reaches(self, thing: Thing, place: int) -> bool:
        """Whether the box has its middle in a place, or covers more than ``REACHES`` of it."""
        row, column = divmod(place, 3)
        width, height = self.picture.width / 3, self.picture.height / 3
        across = min(thing.right, (column + 1) * width) - max(thing.left, column * width)
        down = min(thing.bottom, (row + 1) * height) - max(thing.top, row * height)
        x, y = (thing.left + thing.right) / 2, (thing.top + thing.bottom) / 2
        middle = column * width <= x <= (column + 1) * width and row * height <= y <= (row + 1) * height
        return middle or (across > 0 and down > 0 and across * down > REACHES * width * height)

    def beside(self) -> Turn | None:
        if len(self.things) > MAX_LEVEL:
            return None
        anchors = [anchor for name, anchor in self.single.items() if name not in self.answers]
        sides = [(self._alone_beside(anchor, side), side, anchor) for anchor, side in product(anchors, SIDES)]
        options = [each for each in sides if each[0] is not None]
        if not options:
            return None
        thing, side, anchor = self.rng.choice(options)
        self.answers.add(thing.name)
        self.asked.add(anchor.name)
        spot = f"directly {side} the {anchor.name}"
        asks = [f"What is {spot}?", f"Name the thing {spot}.", f"What can be seen {spot}?"]
        return Turn(asks, a(thing.name), "local")

    def _alone_beside(self, anchor: Thing, side: str) -> Thing | None:
        """The one thing on that side of the anchor, if it can be asked for and its box faces the anchor's."""
        beyond = [thing for thing in self.things if _beyond(thing, anchor, side)]
        if len(beyond) != 1 or beyond[0] not in self.clear or beyond[0].name == anchor.name:
            return None
        return beyond[0] if self._free(beyond[0].name) and _faces(beyond[0], anchor, side) else None

    def where(self) -> Turn | None:
        places = [(name, self._place(thing)) for name, thing in self.single.items()]
        return self._ask_about({name: PLACES[place] for name, place in places if place is not None}, WHERE, "local")

    def size(self) -> Turn | None:
        whole = self.picture.width * self.picture.height
        shares = [(name, thing.area / whole) for name, thing in self.single.items()]
        sizes = {name: "small, a little part of it" for name, share in shares if share <= SMALL}
        sizes |= {name: "large, a big part of it" for name, share in shares if share >= LARGE}
        return self._ask_about({name: sizes[name] for name in self.single if name in sizes}, SIZE, "local")

    def describe(self, used: set[str]) -> Turn | None:
        texts = list(dict.fromkeys(text for _, text in sorted(self.picture.captions) if _plain(text) not in used))
        if not texts and self.seen:
            texts = [f"A picture of {listed([self._phrase(name) for name in self.seen[:MAX_LISTED]])}."]
        return Turn(DESCRIBE, texts, "retrieval") if texts else None

    def _phrase(self, name: str) -> str:
        if name in self.single:
            place = self._place(self.single[name])
            return a(name) if place is None else f"{a(name)} {PLACES[place]}"
        boxes = self.boxes[name]
        if name in self.exact and countable(name):
            return f"{number(len(boxes))} {plural(name)}"
        return a(name) if len(boxes) == 1 and not boxes[0].crowd else plural(name)

    def _free(self, name: str) -> bool:
        return name not in self.answers and name not in self.asked

    def _ask_about(self, told: Mapping[str, str], asks: list[str], kind: str) -> Turn | None:
        """Asks about one of the names that may be in a question, and was in none of these; ``told``: answer by name."""
        options = [name for name in told if name not in self.answers and (asks[0], name) not in self._done]
        if not options:
            return None
        name = self.rng.choice(options)
        self.asked.add(name)
        self._done.add((asks[0], name))
        be, do = ("are", "do") if is_plural(name) else ("is", "does")
        words = {"name": name, "many": plural(name), "be": be, "do": do}
        return Turn([ask.format(**words) for ask in asks], told[name], kind)


def _third(low: float, high: float, size: float) -> int | None:
    """0, 1 or 2 for what is clearly at the start, in the middle or at the end of a side, else None."""
    middle = low + high  # twice
    if 2 * high <= size and 3 * middle <= 2 * size:
        return 0
    if 2 * low >= size and 3 * middle >= 4 * size:
        return 2
    return 1 if 4 * size <= 5 * middle <= 6 * size else None


def _spans(thing: Thing, side: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """The span of a box in the direction of a side, and the one across it."""
    across, down = (thing.left, thing.right), (thing.top, thing.bottom)
    return (down, across) if side in ("above", "below") else (across, down)


def _shared(one: tuple[float, float], other: tuple[float, float]) -> float:
    """The length that two spans share; negative: the distance between them."""
    return min(one[1], other[1]) - max(one[0], other[0])


def _beyond(thing: Thing, anchor: Thing, side: str) -> bool:
    """Whether a box has its middle on that side of the anchor's, and is level with a part of the anchor."""
    (along, level), (anchor_along, anchor_level) = _spans(thing, side), _spans(anchor, side)
    before, after = (along, anchor_along) if side in ("above", "to the left of") else (anchor_along, along)
    return sum(before) < sum(after) and _shared(level, anchor_level) > 0


def _faces(thing: Thing, anchor: Thing, side: str) -> bool:
    """Whether a box is wholly on that side of the anchor, and at least half of the smaller one is level with it."""
    (along, level), (anchor_along, anchor_level) = _spans(thing, side), _spans(anchor, side)
    smaller = min(level[1] - level[0], anchor_level[1] - anchor_level[0])
    return _shared(along, anchor_along) <= 0 and 2 * _shared(level, anchor_level) >= smaller


def _plain(text: str) -> str:
    return text.casefold().strip(" .")
