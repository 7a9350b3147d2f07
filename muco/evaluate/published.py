"""Scores that others have published, to be shown beside ours and never mixed with them.

All of them are data: per cent, as their authors round them. Names of tasks and groups are those that the evaluation
uses, so that a score finds its reference by name. Nobody measured them with this package: texts, image sizes, tie
handling and data copies may differ, which alone moves scores by a point or more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

NOTICE = "published by their authors, not measured here"

MMEB_GROUPS = (
    *("classification", "vqa", "retrieval", "grounding", "in-distribution", "out-of-distribution"),
    "overall",
)
MBEIR_GROUPS = (
    *("single to single global", "single to fused global", "fused to single global", "fused to fused global"),
    "overall global",
)

_MUCO = "MuCo paper, arXiv 2602.06393"
_TUNED = f"{_MUCO}, fine-tuned"
_RELEASED = "model card of the released checkpoint"
_TABLES = "published tables of MMEB scores"
_RERUN = "score files in the VLM2Vec repository, run with its second version"
_MBEIR = "published tables of M-BEIR scores"


@dataclass(frozen=True)
class Published:
    """What was published about one model.

    Args:
        scores: Task or group -> score in per cent.
        main: Whether it stands in the bars of a page; all of them stand in its table.
    """

    model: str
    source: str
    scores: Mapping[str, float] = field(repr=False)
    main: bool = False


def published(benchmark: str) -> tuple[Published, ...]:
    """The references of a benchmark ("mmeb", "mbeir"), best known overall score first; none for others."""
    name = "".join(c for c in benchmark.lower() if c.isalnum())
    return {"mmeb": MMEB, "mbeir": MBEIR}.get(name, ())


def _groups(names: tuple[str, ...], model: str, source: str, row: str, *, main: bool = False) -> Published:
    """A row of a table; "-" where nothing was published."""
    cells = row.split()
    scores = {name: float(cell) for name, cell in zip(names, cells, strict=True) if cell != "-"}
    return Published(model, source, scores, main)


def _with_tasks(names: tuple[str, ...], row: str, groups: Published) -> Published:
    cells = row.split()
    tasks = {name: float(cell) for name, cell in zip(names, cells, strict=True) if cell != "-"}
    return Published(groups.model, groups.source, tasks | dict(groups.scores), main=True)


def _ranked(rows: list[Published], overall: tuple[str, ...]) -> tuple[Published, ...]:
    return tuple(sorted(rows, key=lambda row: (-max(row.scores.get(name, 0.0) for name in overall), row.model)))


# ── MMEB V1: precision at 1 ──────────────────────────────────────────────────────────────────────────────────────────

_DATA_SETS = tuple(
    "ImageNet-1K N24News HatefulMemes VOC2007 SUN397 Place365 ImageNet-A ImageNet-R ObjectNet Country211 "
    "OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W ScienceQA VizWiz GQA TextVQA "
    "VisDial CIRR VisualNews_t2i VisualNews_i2t MSCOCO_t2i MSCOCO_i2t NIGHTS WebQA FashionIQ Wiki-SS-NQ OVEN EDIS "
    "MSCOCO RefCOCO RefCOCO-Matching Visual7W-Pointing".split()
)

_MMEB_TABLE = [
    # model, source, classification vqa retrieval grounding in-distribution out-of-distribution overall
    ("MuCo-2B, released", _RELEASED, "- - - - - - 70.1"),
    ("MuCo-7B, released", _RELEASED, "- - - - - - 74.2"),
    ("MuCo-2B, zero-shot", _MUCO, "53.6 59.9 55.2 74.6 - - 58.2"),
    ("MuCo-7B, zero-shot", _MUCO, "56.0 64.7 58.9 75.7 - - 61.6"),
    ("MuCo-2B, fine-tuned without pre-training", _MUCO, "62.4 64.5 70.2 85.1 72.9 62.2 68.4"),
    ("MuCo-7B, fine-tuned without pre-training", _MUCO, "68.6 70.7 72.0 89.7 76.7 67.6 72.6"),
    ("CLIP, zero-shot", _TABLES, "42.8 9.1 53.0 51.8 - - 37.8"),
    ("VLM2Vec Phi-3.5-V", _TABLES, "54.8 54.9 62.3 79.5 66.5 52.0 60.1"),
    ("VLM2Vec LLaVA-1.6", _TABLES, "61.2 49.9 67.4 86.1 67.5 57.1 62.9"),
    ("VLM2Vec Qwen2-VL-2B", _TABLES, "59.0 49.4 65.4 73.4 - - 59.3"),
    ("VLM2Vec Qwen2-VL-7B", _TABLES, "62.6 57.8 69.9 81.7 - - 65.8"),
    ("MMRet-7B", _TABLES, "56.0 57.4 69.9 83.6 68.0 59.1 64.1"),
    ("LLaVE-2B", _TABLES, "62.1 60.2 65.2 84.9 69.4 59.8 65.2"),
    ("LLaVE-7B", _TABLES, "65.7 65.4 70.9 91.9 75.0 64.4 70.3"),
    ("UniME-7B", _TABLES, "66.8 66.6 70.6 90.9 74.6 65.8 70.7"),
    ("mmE5-11B", _TABLES, "67.6 62.7 71.0 89.7 72.4 66.6 69.8"),
    ("B3-2B", _TABLES, "67.0 61.2 70.9 79.9 72.1 63.1 68.1"),
    ("B3-7B", _TABLES, "70.0 66.5 74.1 84.6 75.9 67.1 72.0"),
    ("MoCa-3B", _TABLES, "59.8 62.9 70.6 88.6 72.3 61.5 67.5"),
    ("MoCa-7B", _TABLES, "65.8 64.7 75.0 92.4 74.7 67.6 71.5"),
    ("QQMM-embed", _TABLES, "70.07 69.52 71.175 87.075 - - 72.175"),
    ("GME-2B", _TABLES, "54.5 29.8 66.8 55.6 - - 51.9"),
    ("GME-7B", _TABLES, "57.6 34.6 71.2 59.5 - - 55.9"),
    ("LamRA-Ret", _TABLES, "59.3 26.5 70.1 62.6 - - 54.1"),
    ("Qwen3-VL-Embedding-8B", _TABLES, "- - - - - - 80.1"),
]

_MMEB_TASKS = [
    # scores of the data sets in their order above: classification / vqa / retrieval / grounding
    (
        # the table of the paper breaks off after NIGHTS
        _groups(MMEB_GROUPS, "MuCo-7B", _TUNED, "68.3 71.9 73.7 90.9 77.3 69.1 73.6"),
        "82.9 82.0 73.4 86.5 80.7 46.0 61.8 91.9 49.9 28.3 72.7 60.4 95.4 78.0 68.2 64.1 57.3 55.0 81.4 86.4 "
        "85.3 54.1 82.9 85.6 79.3 77.2 66.6 - - - - - - - - -",
    ),
    (
        _groups(MMEB_GROUPS, "VLM2Vec-V1-2B", _RERUN, "58.6 49.2 65.0 73.0 64.8 53.4 59.7"),
        "77.5 73.8 57.9 74.3 73.7 35.0 50.6 84.7 36.9 21.7 48.2 39.7 82.7 47.3 42.2 50.9 30.5 38.8 48.1 63.2 "
        "75.1 46.8 73.4 73.8 73.1 68.3 65.8 85.8 13.8 54.6 68.4 81.4 65.7 80.8 76.6 69.1",
    ),
    (
        _groups(MMEB_GROUPS, "VLM2Vec-V1-7B", _RERUN, "62.8 56.5 69.4 81.9 71.3 57.9 65.4"),
        "80.2 79.5 70.3 80.6 77.3 37.2 57.6 74.2 40.5 30.2 56.8 47.5 88.8 59.0 56.6 52.7 38.2 39.6 54.4 71.6 "
        "81.6 51.4 80.3 81.2 77.5 73.6 67.5 88.3 16.8 62.1 66.6 85.9 75.4 87.1 84.4 80.7",
    ),
    (
        _groups(MMEB_GROUPS, "VLM2Vec-V2.0-2B", _RERUN, "62.9 56.4 69.6 77.1 68.8 60.0 64.9"),
        "80.8 73.0 55.8 84.9 70.9 36.1 47.6 89.3 65.1 25.8 51.7 44.0 90.1 59.1 48.1 52.8 38.1 43.3 65.4 71.6 "
        "82.7 57.3 74.7 78.3 75.9 71.1 68.4 90.6 19.6 67.6 64.8 84.2 66.2 87.0 86.3 69.0",
    ),
]

MMEB = _ranked(
    [
        _groups(MMEB_GROUPS, "MuCo-2B", _TUNED, "66.2 65.6 70.1 85.8 72.9 65.0 69.5", main=True),
        *(_groups(MMEB_GROUPS, *row) for row in _MMEB_TABLE),
        *(_with_tasks(_DATA_SETS, row, groups) for groups, row in _MMEB_TASKS),
    ],
    ("overall",),
)

# ── M-BEIR: hit at 5, at 10 for Fashion200K and FashionIQ; the pool is part of every name ────────────────────────────

_MBEIR_TASKS = tuple(
    f"{task} global"
    for task in (
        *("VisualNews t0", "MSCOCO t0", "Fashion200K t0", "WebQA t1", "EDIS t2", "WebQA t2", "VisualNews t3"),
        *("MSCOCO t3", "Fashion200K t3", "NIGHTS t4", "OVEN t6", "InfoSeek t6", "FashionIQ t7", "CIRR t7"),
        *("OVEN t8", "InfoSeek t8"),
    )
)

MBEIR = _ranked(
    [
        _groups(MBEIR_GROUPS, "MuCo-2B", _MUCO, "49.1 68.2 41.6 64.8 51.6", main=True),
        _groups(MBEIR_GROUPS, "MuCo-7B", _MUCO, "54.0 71.6 47.4 70.4 56.6", main=True),
        _groups(MBEIR_GROUPS, "LamRA-Ret-2B", _MBEIR, "47.6 66.2 41.0 61.0 50.0"),
        _groups(MBEIR_GROUPS, "MM-Embed", _MBEIR, "50.9 76.9 40.0 60.9 52.7"),
        _groups(MBEIR_GROUPS, "M3Task-UEM", _MBEIR, "54.0 74.9 41.9 55.7 53.9"),
        _groups(("overall global", "overall local"), "U-MARVEL", _MBEIR, "60.7 63.2"),
        _groups(("overall global", "overall local"), "LamRA, two-stage", _MBEIR, "61.4 63.7"),
        _with_tasks(
            _MBEIR_TASKS,
            "42.6 77.9 17.8 84.7 59.4 78.8 42.8 92.3 17.9 32.0 39.2 24.0 24.3 43.9 60.2 44.6",
            _groups(MBEIR_GROUPS, "UniIR CLIP_SF", _MBEIR, "51.0 69.1 32.9 52.4 48.9"),
        ),
        _with_tasks(
            _MBEIR_TASKS,
            "41.3 75.4 28.7 85.8 62.5 81.0 39.3 90.4 30.4 32.1 48.7 48.4 33.1 50.5 70.0 60.0",
            _groups(MBEIR_GROUPS, "LamRA-Ret-7B", _MBEIR, "52.9 71.8 45.2 65.0 54.9"),
        ),
    ],
    ("overall global", "overall local"),
)
