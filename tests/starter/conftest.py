"""Wheels of small halves, the starter joined from them, and a cache of one's own without a network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from starter_wheels import Wheels

from muco.starter.join import join


@pytest.fixture(scope="session")
def wheels(tmp_path_factory) -> Iterator[Wheels]:
    with Wheels(tmp_path_factory.mktemp("wheels")).published() as found:
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
