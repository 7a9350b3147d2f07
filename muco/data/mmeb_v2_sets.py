"""The 42 data sets that MMEB-V2 adds to the 36 of images: 18 of videos and 24 of pages, and where each lies.

Numbers of queries and candidates are those of the published sets; other numbers are a warning. Sources: the task files
of VLM2Vec and of Qwen3-VL-Embedding, and arXiv 2507.04590.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from muco.data import mmeb_sets

Modality = Literal["image", "video", "visdoc"]
Pool = Literal["local", "global"]

MODALITIES: tuple[Modality, ...] = ("image", "video", "visdoc")


@dataclass(frozen=True)
class Published:
    """One data set.

    Args:
        pool: "local": every row brings its candidates; "global": all candidates of the set are one pool.
        queries: How many were published.
        candidates: The smallest and the largest number that a query chooses from; None where that is not said.
        rows: Names of folders that may hold a copy of its rows, below ``video-tasks`` or ``visdoc-tasks``.
        media: Folders that may hold its frames or pages, below the data's root.
    """

    name: str
    modality: Modality
    meta: str
    pool: Pool
    queries: int
    candidates: tuple[int, int] | None
    rows: tuple[str, ...]
    config: str
    split: str
    media: tuple[str, ...]


def _video(
    meta: str,
    name: str,
    queries: int,
    candidates: tuple[int, int] | int | None,
    *media: str,
    pool: Pool = "local",
    also: str = "",
    config: str = "",
    split: str = "test",
) -> Published:
    rows = (also, name) if also else (name,)
    sizes = (candidates, candidates) if isinstance(candidates, int) else candidates
    folders = tuple(f"video-tasks/frames/{folder}" for folder in media)
    return Published(name, "video", meta, pool, queries, sizes, rows, config, split, folders)


def _retrieval(name: str, queries: int, **how: str) -> Published:
    folders = (f"video_ret/{name}", f"video_ret/data/ziyan/video_retrieval/{name}/frames")
    return _video("V-RET", name, queries, queries, *folders, pool="global", **how)


VIDEO = (
    _video("V-CLS", "K700", 1000, 700, "video_cls/K700", pool="global", also="Kinetics-700"),
    _video("V-CLS", "SmthSmthV2", 1000, 174, "video_cls/SSv2"),
    _video("V-CLS", "HMDB51", 1000, 51, "video_cls/HMDB51", pool="global"),
    _video("V-CLS", "UCF101", 1000, 101, "video_cls/UCF101", pool="global"),
    _video("V-CLS", "Breakfast", 433, 10, "video_cls/Breakfast", pool="global"),
    _video("V-QA", "MVBench", 4000, (3, 5), "video_qa/MVBench", split="train"),
    _video("V-QA", "Video-MME", 2700, 4, "video_qa/Video-MME"),
    _video("V-QA", "NExTQA", 8564, 5, "video_qa/NExTQA", config="MC"),
    _video("V-QA", "EgoSchema", 500, 5, "video_qa/EgoSchema", config="Subset"),
    _video("V-QA", "ActivityNetQA", 1000, 2, "video_qa/ActivityNetQA"),
    _retrieval("DiDeMo", 1004),
    _retrieval("MSR-VTT", 1000, config="test_1k"),
    _retrieval("MSVD", 670),
    _retrieval("VATEX", 4478),
    _retrieval("YouCook2", 3179, split="val"),
    _video("V-MR", "QVHighlight", 1083, None, "video_mret/QVHighlight"),
    _video("V-MR", "Charades-STA", 727, None, "video_mret/Charades_STA", "video_mret/Charades-STA"),
    _video("V-MR", "MomentSeeker", 1602, None, "video_mret/MomentSeeker"),
)


def _visdoc(meta: str, name: str, repository: str, queries: int, pages: int) -> Published:
    folders = dict.fromkeys((name, name.removeprefix("ViDoRe_"), repository))
    media = tuple(f"visdoc-tasks/{below}{folder}" for folder in folders for below in ("", "images/"))
    split = "train" if meta == "VisRAG" else "test"
    return Published(name, "visdoc", meta, "global", queries, (pages, pages), (repository,), "", split, media)


_VIDORE_V1 = {
    "arxivqa_test_subsampled": (500, 500),
    "docvqa_test_subsampled": (451, 500),
    "infovqa_test_subsampled": (494, 500),
    "tabfquad_test_subsampled": (280, 70),
    "tatdqa_test": (1646, 277),
    "shiftproject_test": (100, 1000),
    "syntheticDocQA_artificial_intelligence_test": (100, 968),
    "syntheticDocQA_energy_test": (100, 977),
    "syntheticDocQA_government_reports_test": (100, 972),
    "syntheticDocQA_healthcare_industry_test": (100, 965),
}
_VIDORE_V2 = {
    "esg_reports_human_labeled_v2": (52, 1538),
    "biomedical_lectures_v2_multilingual": (640, 1016),
    "economics_reports_v2_multilingual": (232, 452),
    "esg_reports_v2_multilingual": (228, 1538),
}
_VISRAG = {
    "ArxivQA": (816, 8066),
    "ChartQA": (63, 500),
    "MP-DocVQA": (591, 741),
    "SlideVQA": (556, 1284),
    "InfoVQA": (718, 459),
    "PlotQA": (863, 9593),
}
_OOD = {  # name -> repository, queries, pages
    "ViDoSeek-page": ("ViDoSeek-page-fixed", 1142, 5349),
    "ViDoSeek-doc": ("ViDoSeek", 1142, 5349),
    "MMLongBench-page": ("MMLongBench-page-fixed", 838, 6492),
    "MMLongBench-doc": ("MMLongBench-doc", 838, 6492),
}

VISDOC = (
    *(_visdoc("ViDoRe-V1", f"ViDoRe_{n.partition('_test')[0]}", f"{n}_beir", *size) for n, size in _VIDORE_V1.items()),
    *(
        _visdoc("ViDoRe-V2", f"ViDoRe_{n}", n.removesuffix("_multilingual"), *size)  # all languages in one set
        for n, size in _VIDORE_V2.items()
    ),
    *(_visdoc("VisRAG", f"VisRAG_{n}", f"VisRAG-Ret-Test-{n}", *size) for n, size in _VISRAG.items()),
    *(_visdoc("OOD", name, *of) for name, of in _OOD.items()),
)

BY_NAME = {data_set.name: data_set for data_set in (*VIDEO, *VISDOC)}
NAMES_OF: dict[Modality, tuple[str, ...]] = {
    "image": mmeb_sets.NAMES,
    "video": tuple(data_set.name for data_set in VIDEO),
    "visdoc": tuple(data_set.name for data_set in VISDOC),
}
NAMES = tuple(name for names in NAMES_OF.values() for name in names)
METAS: dict[str, tuple[str, ...]] = {
    **{meta: tuple(d.name for d in mmeb_sets.DATA_SETS if d.meta == meta) for meta in mmeb_sets.METAS},
    **{
        meta: tuple(name for name, data_set in BY_NAME.items() if data_set.meta == meta)
        for meta in dict.fromkeys(data_set.meta for data_set in BY_NAME.values())
    },
}
LABELS = {"K700": 700, "HMDB51": 51, "UCF101": 101, "Breakfast": 10}
BREAKFAST = "pancake cereal sandwich scrambledegg friedegg coffee milk tea juice salad".split()
