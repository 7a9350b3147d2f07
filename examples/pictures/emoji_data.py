"""The emoji of this machine: names from Unicode, keywords from CLDR, pictures from an installed colour font.

emoji-test.txt ─read_emoji─▶ Emoji ─annotated─▶ with keywords ─drawn─▶ with a glyph each ─▶ emoji.py
                CLDR's en.xml ─read_keywords─┘        font ─Pen─┘
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from packages import read_bytes, read_xml
from PIL import Image, ImageDraw, ImageFont, features

from muco.errors import DataError

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
NAMES = Path("/usr/share/unicode/emoji/emoji-test.txt")
CLDR = tuple(Path(f"/usr/share/unicode/cldr/common/{part}/en.xml") for part in ("annotations", "annotationsDerived"))
PACKAGES = {
    FONT: "fonts-noto-color-emoji",
    NAMES: "unicode-data",
    CLDR[0]: "unicode-cldr-core",
    CLDR[1]: "unicode-cldr-core",
}
MAX_FONT = 64 << 20  # bytes; it has 10 MB
FONT_SIZE = 109  # the only size of the font's bitmaps
CANVAS = 136  # pixels; the bitmaps have 136 x 128
SIDE = 84  # pixels of a written picture: 6 x 6 patches of 14, two by two merged into 9 visual tokens

SELECTOR, SKIN_TONES = 0xFE0F, range(0x1F3FB, 0x1F400)


@dataclass(frozen=True)
class Emoji:
    """One emoji. ``codes`` are its code points; ``keywords`` are CLDR's, the name itself left out."""

    codes: tuple[int, ...]
    name: str
    group: str
    subgroup: str
    keywords: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return "".join(map(chr, self.codes))

    @property
    def id(self) -> str:
        return "-".join(f"{code:x}" for code in self.codes)


# ---------------------------------------------------------------- names and keywords


def read_emoji(file: Path = NAMES) -> list[Emoji]:
    """The fully-qualified emoji without skin tones, in the order of the file, without keywords.

    Raises:
        DataError: If the file is missing or too large, or a line is not as UTS #51 has it; names file and line.
    """
    found, group, subgroup = [], "", ""
    for number, line in enumerate(read_bytes(file, PACKAGES[NAMES]).decode("utf-8", "replace").splitlines(), start=1):
        if line.startswith("# group:"):
            group = line.partition(":")[2].strip()
        elif line.startswith("# subgroup:"):
            subgroup = line.partition(":")[2].strip()
        elif line.strip() and not line.startswith("#"):
            match = re.fullmatch(r"([0-9A-F ]+?) *; ([a-z-]+) +# \S+ E\d+\.\d+ (.+)", line)
            codes = tuple(int(code, 16) for code in match[1].split()) if match else ()
            if not match or not group or not subgroup or max(codes) > 0x10FFFF:
                raise DataError(
                    f"{file}:{number}: not 'code points ; status # emoji name' under a group: {line[:60]!r}"
                )
            if match[2] == "fully-qualified" and not set(codes) & set(SKIN_TONES):
                found.append(Emoji(codes, match[3], group, subgroup))
    if not found:
        raise DataError(f"{file}: no fully-qualified emoji in it; install the Debian package {PACKAGES[NAMES]} again")
    return found


def read_keywords(files: Sequence[Path] = CLDR) -> dict[str, tuple[str, ...]]:
    """CLDR's English keywords: text without U+FE0F -> keywords, the short name among them left out.

    Raises:
        DataError: If a file is missing, too large, no XML or defines entities.
    """
    words: dict[str, list[str]] = {}
    names: dict[str, str] = {}
    for file in files:
        for item in read_xml(file, PACKAGES[CLDR[0]]).iter("annotation"):
            text, value = item.get("cp", ""), (item.text or "").strip()
            if item.get("type") == "tts":
                names[text] = value
            else:
                words[text] = [word.strip() for word in value.split("|") if word.strip()]
    return {text: tuple(w for w in own if w.lower() != names.get(text, "").lower()) for text, own in words.items()}


def annotated(emoji: Iterable[Emoji], keywords: Mapping[str, Sequence[str]]) -> list[Emoji]:
    """The emoji with their keywords; one that is newer than the annotations, or has only its name there, has none."""
    return [replace(one, keywords=tuple(keywords.get(one.text.replace(chr(SELECTOR), ""), ()))) for one in emoji]


# ---------------------------------------------------------------- pictures


class Pen:
    """Draws emoji with a font of colour bitmaps.

    Args:
        raqm: Whether sequences can be joined to one glyph; None asks Pillow. Without it single code points are drawn.
    Raises:
        DataError: If the font is missing or has no bitmaps of that size.
    """

    def __init__(self, file: Path = FONT, *, raqm: bool | None = None) -> None:
        read_bytes(file, PACKAGES[FONT], MAX_FONT)
        self.joins = features.check("raqm") if raqm is None else raqm
        engine = ImageFont.Layout.RAQM if self.joins else ImageFont.Layout.BASIC
        try:
            self.font = ImageFont.truetype(str(file), FONT_SIZE, layout_engine=engine)
        except OSError as error:
            raise DataError(f"{file}: no font with bitmaps of {FONT_SIZE} pixels ({error})") from error

    def draw(self, one: Emoji) -> Image.Image | None:
        """RGBA [136, 136]; None if the font has no glyph for it, or not a single one."""
        text = one.text if self.joins else one.text.replace(chr(SELECTOR), "")
        if (not self.joins and len(text) > 1) or self.font.getlength(text) > CANVAS:
            return None  # the glyphs of a sequence that was not joined stand side by side
        picture = Image.new("RGBA", (CANVAS, CANVAS))
        ImageDraw.Draw(picture).text((0, 4), text, font=self.font, embedded_color=True)
        return picture if picture.getbbox() else None


def on_paper(glyph: Image.Image, side: int = SIDE, dice: random.Random | None = None) -> Image.Image:
    """The glyph on white, RGB [side, side]; with dice turned, shrunk and moved a little, on a pale ground."""
    if dice is None:
        paper, place = Image.new("RGB", glyph.size, "white"), (0, 0)
    else:
        paper = Image.new("RGB", glyph.size, tuple(dice.randint(215, 255) for _ in "RGB"))
        size = round(CANVAS * dice.uniform(0.7, 1.0))
        glyph = glyph.rotate(dice.uniform(-20, 20), Image.Resampling.BICUBIC).resize(
            (size, size), Image.Resampling.LANCZOS
        )
        place = tuple(dice.randint(0, CANVAS - size) for _ in "xy")
    paper.paste(glyph, place, glyph)
    return paper.resize((side, side), Image.Resampling.LANCZOS)


def drawn(emoji: Sequence[Emoji], pen: Pen) -> tuple[dict[Emoji, Image.Image], Counter[str]]:
    """The glyph of each emoji that has keywords and a glyph of its own; how many were left out, and why.

    Of emoji with the same picture (the flags of some islands are those of their states) the shortest name stays.
    """
    glyphs: dict[Emoji, Image.Image] = {}
    left_out: Counter[str] = Counter()
    first: dict[bytes, Emoji] = {}
    for one in emoji:
        if not one.keywords:
            left_out["no keywords besides the name"] += 1
            continue
        glyph = pen.draw(one)
        if glyph is None:
            left_out["no single glyph"] += 1
            continue
        other = first.setdefault(on_paper(glyph).tobytes(), one)
        if other is not one:
            left_out["same picture as another"] += 1
            if len(other.name) <= len(one.name):
                continue
            del glyphs[other]
            first[on_paper(glyph).tobytes()] = one
        glyphs[one] = glyph
    return glyphs, left_out
