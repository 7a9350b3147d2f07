"""Shared by the tests of the server."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import processes
import pytest


@pytest.fixture(scope="module")
def forked() -> Iterator[None]:
    """The process of a model need not import the libraries, if its server is this process."""
    with pytest.MonkeyPatch.context() as patch:
        forks = SimpleNamespace(get_context=lambda _: processes.context)
        patch.setattr("muco.serve.process.multiprocessing", forks)
        yield
