"""A small tree in the published layout of M-BEIR's training files, with invented sentences and coloured squares.

Every content has a token of its own: "c9x0x3" is candidate 3 of data set 9, task 0, and "q9x0x3" the query 3.
"""

from __future__ import annotations

from pathlib import Path

from mbeir_tree import NAMES, SETS, TASKS, candidate, did, query, write_instructions, write_lines

QUERIES, CANDIDATES = 3, 8
WITH_NEGATIVES = (2, 3, 4, 6, 8)  # data sets whose queries name hard negatives
ABSENT = "9:900000"  # a candidate that no pool holds


def write_train_tree(root: Path) -> Path:
    """Three queries and eight candidates for each of the 16 pairs of data set and task, in ten files of queries.

    Query i has candidate i as a positive, query 0 also 5 and 6, query 1 names its by an object. Hard negatives of
    ``WITH_NEGATIVES`` are candidates i + 1 of the same task, and of WebQA and InfoSeek also one of its other task, of
    another modality. Query 2 of OVEN and InfoSeek has as a positive, and by mistake as a negative, candidate 2 of the
    other data set. Query 2 of MSCOCO's task 0 has one positive more, which is in no pool.
    """
    union = []
    for data_set in range(len(SETS)):
        rows = []
        for task in sorted(task for of, task in TASKS if of == data_set):
            pool = [candidate(root, data_set, task, i) for i in range(CANDIDATES)]
            if SETS[data_set] != "mscoco":  # of which only pools of other splits are published
                write_lines(root / "cand_pool" / "local" / f"mbeir_{SETS[data_set]}_task{task}_cand_pool.jsonl", pool)
            union += pool
            rows += [train_query(root, data_set, task, i) for i in range(QUERIES)]
        write_lines(root / "query" / "train" / f"mbeir_{SETS[data_set]}_train.jsonl", rows)
    write_lines(root / "cand_pool" / "global" / "mbeir_union_train_cand_pool.jsonl", union)
    twice = [train_query(root, data_set, task, i) for data_set, task in TASKS for i in range(QUERIES) for _ in range(2)]
    write_lines(root / "query" / "union_train" / "mbeir_union_up_train.jsonl", twice)
    write_instructions(root / "instructions" / "query_instructions.tsv")
    return root


def train_query(root: Path, data_set: int, task: int, i: int) -> dict:
    row = query(root, data_set, task, i)
    if data_set in WITH_NEGATIVES:
        row["neg_cand_list"] = [did(data_set, task, i + 1)]
        others = [other for of, other in TASKS if of == data_set and other != task]
        row["neg_cand_list"] += [did(data_set, other, i) for other in others]
    if data_set in (5, 6) and i == 2:
        cross = did(11 - data_set, task, 2)
        row["pos_cand_list"] = [cross, *row["pos_cand_list"]]
        row["neg_cand_list"] = [*row["neg_cand_list"], cross]
    if (data_set, task, i) == (9, 0, 2):
        row["pos_cand_list"] = [ABSENT, *row["pos_cand_list"]]
    return row


def train_file(root: Path, name: str) -> Path:
    return root / "query" / "train" / f"mbeir_{SETS[NAMES.index(name)]}_train.jsonl"


def union_pool(root: Path) -> Path:
    return root / "cand_pool" / "global" / "mbeir_union_train_cand_pool.jsonl"
