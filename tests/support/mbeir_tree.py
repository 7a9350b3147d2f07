"""A small tree in the published layout of M-BEIR: all 16 test tasks, with invented sentences and coloured squares.

Every content has a token of its own, in its text or in the name of its image: "c9x0x3" is candidate 3 of data set 9,
task 0, and "q9x0x3" the query 3. The models of the tests read nothing else.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from muco.dialogue import Content

SETS = ["visualnews", "fashion200k", "webqa", "edis", "nights", "oven", "infoseek", "fashioniq", "cirr", "mscoco"]
NAMES = ["VisualNews", "Fashion200K", "WebQA", "EDIS", "NIGHTS", "OVEN", "InfoSeek", "FashionIQ", "CIRR", "MSCOCO"]
TASKS = [(0, 0), (9, 0), (1, 0), (2, 1), (3, 2), (2, 2), (0, 3), (9, 3), (1, 3), (4, 4), (5, 6), (6, 6), (7, 7), (8, 7),
         (5, 8), (6, 8)]  # fmt: skip
SIDES = {
    0: ("text", "image"),
    1: ("text", "text"),
    2: ("text", "image,text"),
    3: ("image", "text"),
    4: ("image", "image"),
    6: ("image,text", "text"),
    7: ("image,text", "image"),
    8: ("image,text", "image,text"),
}
WAYS = ("Plainly", "kindly", "Slowly,", "briefly")  # the first words of the four prompts
QUERIES, CANDIDATES = 4, 14


def write_tree(root: Path) -> Path:
    """Four queries and 14 candidates for each task.

    Query i has candidate i as a positive; query 0 also 5 and 6; query 3 of OVEN and InfoSeek also candidate 3 of the
    other one. Query 1 names its positives by objects. Candidate 9 is judged 0 for query 2.
    """
    union = []
    for data_set, task in TASKS:
        stem = f"mbeir_{SETS[data_set]}_task{task}"
        pool = [candidate(root, data_set, task, i) for i in range(CANDIDATES)]
        union += pool
        infix = "_test" if data_set == 9 else ""
        write_lines(root / "cand_pool" / "local" / f"{stem}{infix}_cand_pool.jsonl", pool)
        if data_set == 9:
            other = dict(pool[0], did="9:999999")
            write_lines(root / "cand_pool" / "local" / f"{stem}_val_cand_pool.jsonl", [other])
        queries = [query(root, data_set, task, i) for i in range(QUERIES)]
        write_lines(root / "query" / "test" / f"{stem}_test.jsonl", queries)
        write_qrels(root / "qrels" / "test" / f"{stem}_test_qrels.txt", task, queries, {f"{data_set}:{task * 100 + 3}"})
    write_lines(root / "cand_pool" / "global" / "mbeir_union_test_cand_pool.jsonl", union)
    write_instructions(root / "instructions" / "query_instructions.tsv")
    return root


def candidate(root: Path, data_set: int, task: int, i: int) -> dict:
    modality = SIDES[task][1]
    token = f"c{data_set}x{task}x{i}"
    return {
        "did": did(data_set, task, i),
        "txt": f'the tale of {token} and its lamp"' if "text" in modality else None,
        "img_path": image(root, data_set, token) if "image" in modality else None,
        "modality": modality,
        "src_content": None,
    }


def did(data_set: int, task: int, i: int) -> str:
    return f"{data_set}:{task * 100 + i + 1}"


def query(root: Path, data_set: int, task: int, i: int) -> dict:
    modality = SIDES[task][0]
    token = f"q{data_set}x{task}x{i}"
    positives = [did(data_set, task, n) for n in ((0, 5, 6) if i == 0 else (i,))]
    if i == 3 and data_set in (5, 6):
        positives.append(did(11 - data_set, task, 3))
    return {
        "qid": f"{data_set}:{task * 100 + i + 1}",
        "query_txt": f"where does {token} shine" if "text" in modality else None,
        "query_img_path": image(root, data_set, token) if "image" in modality else None,
        "query_modality": modality,
        "query_src_content": None,
        "pos_cand_list": [{"did": p} for p in positives] if i == 1 else positives,
        "neg_cand_list": [],
        "task_id": task,
    }


def image(root: Path, data_set: int, token: str) -> str:
    """Writes a square of the token's own colour; InfoSeek's lie among OVEN's."""
    path = f"mbeir_images/{'oven' if data_set == 6 else SETS[data_set]}_images/{token}.png"
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    colour = tuple(int(n) for n in np.random.default_rng(list(token.encode())).integers(0, 256, 3))
    Image.new("RGB", (32, 32), colour).save(root / path)
    return path


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_qrels(path: Path, task: int, queries: list[dict], zero: set[str]) -> None:
    lines = []
    for row in queries:
        for item in row["pos_cand_list"]:
            lines.append(f"{row['qid']} 0 {item['did'] if isinstance(item, dict) else item} 1 {task}\n")
        if row["qid"] in zero:
            own, n = row["qid"].split(":")
            lines.append(f"{row['qid']} 0 {own}:{int(n) + 7} 0 {task}\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")


def write_instructions(path: Path) -> None:
    rows = [
        "\t".join(["query_modality", "cand_modality", "dataset_name", "dataset_id", *(f"prompt_{n}" for n in "1234")])
    ]
    for data_set, task in TASKS:
        asks = [f"{way} look for what belongs to {NAMES[data_set]} {task}" for way in WAYS]
        rows.append("\t".join([*SIDES[task], NAMES[data_set], str(data_set), *asks]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def edit(path: Path, line: int, change: Callable[[dict], dict | str]) -> str:
    """Replaces a line (from 1) of a JSONL file; returns "file:line"."""
    lines = path.read_text(encoding="utf-8").splitlines()
    changed = change(json.loads(lines[line - 1]))
    lines[line - 1] = changed if isinstance(changed, str) else json.dumps(changed)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"{path}:{line}"


def token_of(content: Content) -> str:
    found = {
        match
        for part in (content.text, *(Path(path).stem for path in content.images))
        for match in re.findall(r"[cq]\d+x\d+x\d+", part)
    }
    assert len(found) == 1, f"{found} in {content}"
    return found.pop()


class Oracle:
    """Knows the tree: a candidate is an axis of its own, a query the sum of its positives."""

    fingerprint = "oracle"

    def __init__(self) -> None:
        self.axis = {f"c{s}x{t}x{i}": n * CANDIDATES + i for n, (s, t) in enumerate(TASKS) for i in range(CANDIDATES)}
        self.seen: list[Content] = []

    def encode(self, contents: list[Content], *, batch_size: int) -> np.ndarray:
        self.seen += contents
        return np.stack([self.vector(token_of(content)) for content in contents])

    def vector(self, token: str) -> np.ndarray:
        row = np.zeros(len(self.axis), np.float32)
        row[[self.axis[right] for right in self.right(token)]] = 1
        return row / np.linalg.norm(row)

    def right(self, token: str) -> list[str]:
        if token[0] == "c":
            return [token]
        data_set, task, i = map(int, token[1:].split("x"))
        right = [f"c{data_set}x{task}x{n}" for n in ((0, 5, 6) if i == 0 else (i,))]
        return [*right, f"c{11 - data_set}x{task}x3"] if i == 3 and data_set in (5, 6) else right


def evaluate_here(root: Path, output: Path) -> None:
    """One of several processes: evaluates two tasks and tells in ``output`` what it found and encoded."""
    from muco import distributed
    from muco.evaluate.mbeir import evaluate_mbeir

    distributed.start()
    model = Oracle()
    result = evaluate_mbeir(model, root, output, tasks=["OVEN t6", "CIRR t7"])
    told = {"tasks": result["tasks"], "seen": [token_of(content) for content in model.seen]}
    (output / f"process-{distributed.rank()}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    evaluate_here(Path(sys.argv[1]), Path(sys.argv[2]))
