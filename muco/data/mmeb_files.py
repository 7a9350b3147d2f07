"""The files of MMEB's training data: configurations, splits, and which file holds what."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from muco.errors import DataError, did_you_mean

Split = Literal["original", "diverse_instruction"]

SPLITS: tuple[Split, ...] = ("original", "diverse_instruction")
CONFIGS = tuple(
    "ImageNet_1K N24News HatefulMemes VOC2007 SUN397 OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W "
    "VisDial CIRR VisualNews_t2i VisualNews_i2t MSCOCO_t2i MSCOCO_i2t NIGHTS WebQA MSCOCO".split()
)
_CAPTIONED = "_generated_sentence.parquet"
_SPLIT_OF: tuple[tuple[str, Split], ...] = (  # pattern of a name and its split; the first that fits counts
    (f"*diverse_instruction*{_CAPTIONED}", "diverse_instruction"),
    (f"*{_CAPTIONED}", "original"),
    ("original-*.parquet", "original"),
    ("diverse_instruction-*.parquet", "diverse_instruction"),
    ("train-*.parquet", "original"),  # only where there is no original-*.parquet
)


def find_files(folder: Path, configs: Sequence[str] | None, split: Split) -> dict[str, list[Path]]:
    """Configuration -> its files of a split, in the order of ``configs``, or of the benchmark where that is None.

    Raises a DataError if a configuration is unknown, twice or without a file, or both kinds of files hold its pairs.
    """
    if isinstance(configs, str):
        raise DataError(f"configs must be a list of names, not the text {configs!r}")
    if configs is not None and (len(set(configs)) < len(configs) or not configs):
        raise DataError(f"configs must name at least one configuration, and each once; they are {list(configs)}")
    for config in configs or ():
        if config not in CONFIGS:
            raise DataError(f"{folder}: unknown configuration {config!r}{did_you_mean(config, CONFIGS)}")
    if configs is None:
        for inner in sorted(path for path in folder.iterdir() if path.is_dir() and path.name not in CONFIGS):
            if _files_of(inner, split):
                raise DataError(f"{inner}: unknown configuration {inner.name!r}{did_you_mean(inner.name, CONFIGS)}")
    found = {config: _files_of(folder / config, split) for config in configs or CONFIGS}
    for config, files in found.items():
        if not files and configs is not None:
            raise DataError(f"{folder / config}: no {split}-*.parquet and no *{_CAPTIONED}; download the files")
    found = {config: files for config, files in found.items() if files}
    if not found:
        what = f"<configuration>/{split}-*.parquet or <configuration>/*{_CAPTIONED}"
        raise DataError(f"{folder}: no {what}; configurations are {', '.join(CONFIGS)}")
    return found


def _files_of(folder: Path, split: Split) -> list[Path]:
    found: dict[str, list[Path]] = {pattern: [] for pattern, own in _SPLIT_OF if own == split}
    for file in sorted(folder.glob("*.parquet")):
        pattern = next((pattern for pattern, _ in _SPLIT_OF if fnmatchcase(file.name, pattern)), None)
        if pattern in found:
            found[pattern].append(file)
    captioned, *plain = found.values()
    named = next((files for files in plain if files), [])
    if named and captioned:
        what = f"both {named[0].name} and {captioned[0].name} hold its {split} pairs"
        raise DataError(f"{folder}: {what}; move one of them to another folder, or pass one file")
    return named or captioned


def config_of(file: Path) -> str:
    """The configuration of a single file: the name of its folder, or its own where that is not a configuration."""
    parent = file.absolute().parent.name
    return parent if parent in CONFIGS else file.stem
