"""Fields of MMEB-V2's rows, checked: errors name the row, the field and what was wanted."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muco.data.lines import image_of
from muco.errors import DataError


@dataclass(frozen=True)
class Fields:
    """One row; ``where`` names it in errors."""

    values: Mapping[str, Any]
    where: str

    def wrong(self, key: str, wanted: str) -> DataError:
        return DataError(f"{self.where}: {key!r} must be {wanted}, not {self.values.get(key)!r:.60}; repair the row")

    def text(self, key: str) -> str:
        """A string."""
        value = self.values.get(key)
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def name(self, key: str) -> str:
        """A string that tells candidates apart, or a whole number as one: not empty, without control characters."""
        value = self.values.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str) or not value or not value.isprintable():
            raise self.wrong(key, "a name: a string that is not empty, or a whole number")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of at least one string."""
        value = self.values.get(key)
        if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
            raise self.wrong(key, "a list of strings")
        return value

    def first(self, key: str) -> str:
        """A string, or the first one of a list."""
        return self.texts(key)[0] if isinstance(self.values.get(key), list) else self.text(key)

    def label(self, key: str) -> str:
        """The same, and not empty or with control characters."""
        if not (value := self.first(key)).strip() or not value.isprintable():
            raise self.wrong(key, "a label: a string that is not empty")
        return value

    def place(self, key: str, count: int) -> int:
        """A place in a list of ``count``, from 0: a whole number, or a string of its digits."""
        value = self.values.get(key)
        if isinstance(value, str) and value.isascii() and value.isdigit():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < count:
            raise self.wrong(key, f"a place from 0 to {count - 1}")
        return value

    def letter(self, key: str, count: int) -> int:
        """The place, from 0, that a letter of A, B … names."""
        value = self.text(key).strip()
        if len(value) != 1 or not 0 <= ord(value) - ord("A") < count:
            raise self.wrong(key, f"a letter from A to {chr(ord('A') + count - 1)}")
        return ord(value) - ord("A")

    def paths(self, key: str, inner: str) -> list[str]:
        """The strings ``inner`` of a list of objects."""
        value = self.values.get(key)
        if not isinstance(value, list) or not all(isinstance(r, dict) and isinstance(r.get(inner), str) for r in value):
            raise self.wrong(key, f"a list of objects with a string {inner!r}")
        return [record[inner] for record in value]

    def inside(self, folder: Path, *parts: str) -> Path:
        """The path of parts below a folder; a DataError if it leaves it."""
        return Path(str(image_of({"path": os.path.join(*parts)}, "path", folder, self.where)))


def stem(path: str) -> str:
    """The name of a file without folders and ending."""
    return os.path.splitext(path.replace("\\", "/").rpartition("/")[2])[0]
