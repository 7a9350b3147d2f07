"""Small trees of files as Debian's packages of pictures leave them, with what their readers must refuse."""

from __future__ import annotations

import importlib
import struct
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image, ImageDraw

FOLDER = Path(__file__).parents[2] / "examples/pictures"


def example(name: str) -> ModuleType:
    """A script of the folder as when it runs: its own folder comes first."""
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))


def svg(title: str = "", keywords: Sequence[str] = (), description: str = "", **more: str) -> str:
    """With metadata as Open Clip Art has them; ``more``: creator, licence (a URL), doctype."""
    creator = more.get("creator", "Ann Lee")
    licence = more.get("licence", "http://web.resource.org/cc/PublicDomain")
    listed = "".join(f"<rdf:li>{word}</rdf:li>" for word in keywords)
    return f"""<?xml version="1.0" encoding="UTF-8"?>{more.get("doctype", "")}
<svg xmlns="http://www.w3.org/2000/svg"><metadata>
 <rdf:RDF xmlns:cc="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/"
  xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><cc:Work rdf:about="">
  <dc:title>{title}</dc:title><dc:description>{description}</dc:description>
  <dc:subject><rdf:Bag><rdf:li/>{listed}</rdf:Bag></dc:subject>
  <dc:publisher><cc:Agent><dc:title>Open Clip Art Library</dc:title></cc:Agent></dc:publisher>
  <dc:creator><cc:Agent><dc:title>{creator}</dc:title></cc:Agent></dc:creator>
  <cc:license rdf:resource="{licence}"/></cc:Work></rdf:RDF></metadata></svg>"""


def blot(seed: int, size: tuple[int, int] = (60, 50)) -> Image.Image:
    """RGBA with coloured boxes on transparent ground; others for other seeds."""
    dice = np.random.default_rng(seed)
    picture = Image.new("RGBA", size)
    draw = ImageDraw.Draw(picture)
    for _ in range(6):
        x, y = (int(dice.integers(0, length - 20)) for length in size)
        draw.rectangle((x, y, x + 20, y + 15), fill=(*map(int, dice.integers(0, 200, 3)), 255))
    return picture


def noise(seed: int) -> Image.Image:
    """As a photograph: no two neighbours are equal."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 200, (40, 50, 3), dtype=np.uint8))


def png_header(width: int, height: int) -> bytes:
    """A PNG that says how large it is, and is cut off before its first pixel."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">II", zlib.crc32(header), 99) + b"IDAT"


class Clipart:
    """A tree as the packages openclipart-png and -svg leave it."""

    def __init__(self, root: Path) -> None:
        self.png, self.svg = (root / "usr/share/openclipart" / name for name in ("png", "svg"))
        self.made = 0

    def add(self, place: str, text: str, picture: Image.Image | bytes | None = None) -> None:
        self.made += 1
        for file in (self.png / f"{place}.png", self.svg / f"{place}.svg"):
            file.parent.mkdir(parents=True, exist_ok=True)
        (self.svg / f"{place}.svg").write_text(text, encoding="utf-8")
        if isinstance(picture, bytes):
            (self.png / f"{place}.png").write_bytes(picture)
        else:
            (picture or blot(self.made)).save(self.png / f"{place}.png")


def write_clipart(root: Path) -> None:
    """24 drawings: 11 titles that can be used, one of them twice, and each reason to leave one out."""
    tree = Clipart(root)
    tree.add("animals/mammals/big_cats/lion_ann_lee_01", svg("Lion", ["cat", "hash(0x8589f20)", "big_cat", "Ann Lee"]))
    tree.add("animals/birds/owl", svg("Owl", ["bird"], "An owl on a branch. More."), blot(50, (3000, 2000)))
    tree.add("animals/fish_01", svg("architetto -- pesce 01", ["fish"], creator="Architetto Bo"))
    tree.add("food/red_apple", svg("Red Apple", ["fruit"]))
    tree.add("food/green_apple_02", svg("Green Apple 2", ["fruit"], doctype="<!DOCTYPE svg PUBLIC 'a' 'b.dtd'>"))
    tree.add("food/pear_a", svg("Pear", ["fruit"]), blot(60))
    tree.add("food/quince_b", svg("Quince", ["fruit"]), blot(60))  # the very picture of the pear
    for number, name in enumerate(("no_entry", "round_about", "exit", "xq_03")):
        tree.add(f"signs/{name}", svg("SVG Road Signs", ["sign"]), blot(70 + number))
    tree.add("unsorted/rose", svg("Rose"))
    tree.add("food/again", svg("LION", ["a"]))
    tree.add("people/lee", svg("Ann Lee 01", ["a"]))  # left out from here on
    tree.add("people/missing", svg("", ["a"]))
    tree.add("people/owned", svg("Owned", licence="http://creativecommons.org/licenses/GPL/2.0/"))
    tree.add("people/entities", svg("&a;", doctype='<!DOCTYPE svg [<!ENTITY a SYSTEM "file:///etc/hostname">]>'))
    tree.add("people/broken_xml", "<svg><metadata>")
    tree.add("people/huge", svg("Huge"), png_header(20_000, 20_000))
    tree.add("people/cut", svg("Cut"), png_header(20, 20))
    tree.add("people/white", svg("White"), Image.new("RGBA", (20, 20), (255, 255, 255, 255)))
    tree.add("people/home", svg("Lemon SVG theme", ["icon"]))
    tree.add("shapes/stars/star_05", svg("Star"))
    tree.add("computer/icons/flat/go", svg("Go"))
    tree.add("special/patterns/dots", svg("Dots"))
    tree.add("buttons/b1", svg("Button"))
    (tree.svg / "food/alone.svg").write_text(svg("Alone"))
    blot(99).save(tree.png / "food/lonely.png")
    (tree.png / "food/link.png").symlink_to("pear_a.png")


def write_stamps(root: Path) -> None:
    """A tree as tuxpaint-stamps-default leaves it: five stamps to use, and each reason to leave one out."""
    folder = root / "usr/share/tuxpaint/stamps"

    def add(place: str, text: str | bytes | None, picture: Image.Image | bytes) -> None:
        file = folder / f"{place}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture) if isinstance(picture, bytes) else picture.save(file)
        if text is not None:
            file.with_suffix(".txt").write_bytes(text if isinstance(text, bytes) else text.encode())

    add("animals/birds/crow", "A crow.\nde.utf8=Eine Krähe.\nsr@latin.utf8=Vrana.\nbad line\nfr.utf8=\n", noise(1))
    add("animals/birds/owl", "An owl.\nde.utf8=Eine Eule.\n", noise(2))
    add("animals/birds/cartoon/duck", "A happy duck!\nde.utf8=Eine Ente!\n", noise(3))
    add("clothes/hat", "A hat.\n", noise(4))
    (folder / "clothes/hat.svg").write_text("<svg/>")
    add("vehicles/car", "A car.\n", blot(7))
    add("animals/birds/owl_other", "An Owl.\n", noise(5))  # left out from here on
    add("animals/birds/owl_mirror", None, noise(6))
    add("symbols/alphabets/a", "The letter A.\n", noise(7))
    add("people/ghost", "A ghost.\n", Image.new("RGBA", (9, 9)))
    add("people/none", "de.utf8=Ein Nichts.\n", noise(8))
    add("people/bytes", b"A caf\xe9.\n", noise(9))
    add("people/cut", "A cut.\n", png_header(9, 9))
    add("people/huge", "A giant.\n", png_header(9_000, 9_000))
    (folder / "people/drawn.svg").write_text("<svg/>")
