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


_NAMES: dict[tuple[Meta, bool], str] = {  # (meta, in_distribution) -> names, in the benchmark's order
    ("classification", True): "ImageNet-1K N24News HatefulMemes VOC2007 SUN397",
    ("classification", False): "Place365 ImageNet-A ImageNet-R ObjectNet Country211",
    ("vqa", True): "OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W",
    ("vqa", False): "ScienceQA VizWiz GQA TextVQA",
    ("retrieval", True): "VisDial CIRR VisualNews_t2i VisualNews_i2t MSCOCO_t2i MSCOCO_i2t NIGHTS WebQA",
    ("retrieval", False): "OVEN FashionIQ EDIS Wiki-SS-NQ",
    ("grounding", True): "MSCOCO",
    ("grounding", False): "RefCOCO RefCOCO-Matching Visual7W-Pointing",
}
_GROUPS: dict[str, Group] = {"classification": "cls", "vqa": "qa", "retrieval": "t2i", "grounding": "i2i"}
_GROUPS |= {"VisualNews_i2t": "i2t", "MSCOCO_i2t": "i2t"}  # those that differ from the rest of their meta
_GROUPS |= {"CIRR": "i2i", "NIGHTS": "i2i", "OVEN": "i2i", "FashionIQ": "i2i"}
_ENDS = {name: {"target_end": ""} for name in ("MSCOCO", "RefCOCO", "Visual7W-Pointing")}
_ENDS["VisDial"] = {"query_end": "\n\n"}

DATA_SETS = tuple(
    DataSet(name, meta, inside, _GROUPS.get(name, _GROUPS[meta]), **_ENDS.get(name, {}))
    for (meta, inside), names in _NAMES.items()
    for name in names.split()
)
NAMES = tuple(data_set.name for data_set in DATA_SETS)
