"""The 36 data sets of MMEB, and how the texts of each are put together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Meta = Literal["classification", "vqa", "retrieval", "grounding"]
Group = Literal["cls", "qa", "i2t", "t2i", "i2i"]  # how rows of the split layout are put together

METAS: tuple[Meta, ...] = ("classification", "vqa", "retrieval", "grounding")


@dataclass(frozen=True)
class DataSet:
    """One of the 36.

    Args:
        name: Of its folder.
        in_distribution: Whether the benchmark's training data has a part of it.
        query_end, target_end: What the texts of v1 end with, where they are more than a bare answer or caption.
    """

    name: str
    meta: Meta
    in_distribution: bool
    group: Group
    query_end: str = "\n"
    target_end: str = "\n"

    @property
    def finds_images(self) -> bool:
        return self.group in ("t2i", "i2i")


DATA_SETS = (
    DataSet("ImageNet-1K", "classification", True, "cls"),
    DataSet("N24News", "classification", True, "cls"),
    DataSet("HatefulMemes", "classification", True, "cls"),
    DataSet("VOC2007", "classification", True, "cls"),
    DataSet("SUN397", "classification", True, "cls"),
    DataSet("Place365", "classification", False, "cls"),
    DataSet("ImageNet-A", "classification", False, "cls"),
    DataSet("ImageNet-R", "classification", False, "cls"),
    DataSet("ObjectNet", "classification", False, "cls"),
    DataSet("Country211", "classification", False, "cls"),
    DataSet("OK-VQA", "vqa", True, "qa"),
    DataSet("A-OKVQA", "vqa", True, "qa"),
    DataSet("DocVQA", "vqa", True, "qa"),
    DataSet("InfographicsVQA", "vqa", True, "qa"),
    DataSet("ChartQA", "vqa", True, "qa"),
    DataSet("Visual7W", "vqa", True, "qa"),
    DataSet("ScienceQA", "vqa", False, "qa"),
    DataSet("VizWiz", "vqa", False, "qa"),
    DataSet("GQA", "vqa", False, "qa"),
    DataSet("TextVQA", "vqa", False, "qa"),
    DataSet("VisDial", "retrieval", True, "t2i", query_end="\n\n"),
    DataSet("CIRR", "retrieval", True, "i2i"),
    DataSet("VisualNews_t2i", "retrieval", True, "t2i"),
    DataSet("VisualNews_i2t", "retrieval", True, "i2t"),
    DataSet("MSCOCO_t2i", "retrieval", True, "t2i"),
    DataSet("MSCOCO_i2t", "retrieval", True, "i2t"),
    DataSet("NIGHTS", "retrieval", True, "i2i"),
    DataSet("WebQA", "retrieval", True, "t2i"),
    DataSet("OVEN", "retrieval", False, "i2i"),
    DataSet("FashionIQ", "retrieval", False, "i2i"),
    DataSet("EDIS", "retrieval", False, "t2i"),
    DataSet("Wiki-SS-NQ", "retrieval", False, "t2i"),
    DataSet("MSCOCO", "grounding", True, "i2i", target_end=""),
    DataSet("RefCOCO", "grounding", False, "i2i", target_end=""),
    DataSet("RefCOCO-Matching", "grounding", False, "i2i"),
    DataSet("Visual7W-Pointing", "grounding", False, "i2i", target_end=""),
)
NAMES = tuple(data_set.name for data_set in DATA_SETS)
