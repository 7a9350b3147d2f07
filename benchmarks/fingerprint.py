"""How long it takes to tell a training set's state before the first step, against reading every image.

    PYTHONPATH=. python benchmarks/fingerprint.py --output benchmarks/results

Writes fingerprint.json and .md. The set is made here: a JSONL file, and as many tiny PNG files as it has rows. *Every
image* hashes them all in one thread, which is what a run did before its first step until version 2 of the rule.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from turns import heading, say, write

from muco.data import fingerprint
from muco.data.jsonl import JsonlData
from muco.images import image_digest

PNG = bytes.fromhex(  # 1 x 1 pixel; what follows the end of the image makes the files differ
    "89504e470d0a1a0a0000000d49484452000000010000000108020000009077"
    "53de0000000c4944415408d763f8ffff3f0005fe02fea735810000000049454e44ae426082"
)


def make(folder: Path, rows: int) -> Path:
    file = folder / "train.jsonl"
    with file.open("w", encoding="utf-8") as lines:
        for row in range(rows):
            image = folder / f"{row % 1000:03}" / f"{row}.png"
            image.parent.mkdir(exist_ok=True)
            image.write_bytes(PNG + b"%d" % row)
            turns = [{"query": f"question {turn} of {row}", "target": f"answer {turn} of {row}"} for turn in range(7)]
            lines.write(json.dumps({"image": f"{row % 1000:03}/{row}.png", "turns": turns}) + "\n")
    time.sleep(2.1)  # digests of files that were written just now are not remembered
    return file


def every_image(file: Path) -> int:
    data = JsonlData(file)
    return len({image_digest(image) for i in range(len(data)) for image in data[i].images})


def seconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(folder: Path, rows: int) -> dict[str, float]:
    file = make(folder, rows)
    say("files written")
    parts = {"the rule: first": seconds(lambda: JsonlData(file).fingerprint)}
    fingerprint.remember(folder / "digests.json")
    parts["the rule: resumed"] = seconds(lambda: JsonlData(file).fingerprint)
    parts["every image"] = seconds(lambda: every_image(file))
    parts["opening alone, in each of them"] = seconds(lambda: JsonlData(file))
    return parts


def table(result: dict[str, Any]) -> str:
    on = result["machine"]
    lines = [
        "# The state of a training set, before the first step",
        "",
        f"`{result['command']}`",
        "",
        f"{result['date']}; {on['cpu']}, {on['cores']} cores. {result['rows']:,} rows with a tiny PNG file each, in "
        f"the system's cache. The rule reads the file and the images of {fingerprint.LOOKED:,} rows of however many; "
        "real images are some thousand times larger, which only *every image* pays in full.",
        "",
        "| part | s |",
        "|---|---|",
        *(f"| {name} | {value:.2f} |" for name, value in result["parts"].items()),
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--rows", type=int, default=100_000)
    args = parser.parse_args(argv)
    result = heading("fingerprint.py", argv, "cpu") | {"rows": args.rows}
    with tempfile.TemporaryDirectory() as folder:
        result["parts"] = measure(Path(folder), args.rows)
    write(args.output, "fingerprint", result, table(result))


if __name__ == "__main__":
    main(sys.argv[1:])
