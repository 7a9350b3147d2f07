"""What commands do on a Ray cluster is what they do alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from chat_server import ChatServer
from ray_cluster import on_ray

from muco.cli import main
from muco.search import Index


def table(folder: Path) -> tuple[list[dict], np.ndarray]:
    """Rows of an index by id, and their vectors."""
    index = Index.open(folder)
    rows = index.table.to_arrow().sort_by("id")
    vectors = index.storage.vectors(rows, index.dimension)
    return rows.drop_columns([*index.storage.columns]).to_pylist(), vectors


def lines(output: Path) -> list[str]:
    return sorted((output / "train.jsonl").read_text("utf-8").splitlines())


@pytest.mark.slow
def test_a_cluster_gives_what_one_process_gives(scenes, tiny_path, tmp_path):
    images = str(scenes / "images/test")

    def index(name: str) -> list[str]:
        return ["index", images, "--model", str(tiny_path), "--index", str(tmp_path / name), "--batch-size", "4"]

    def synth(server: ChatServer, name: str) -> list[str]:
        models = ["--captioner", server.url, "--captioner-model", "seer", "--writer", server.url]
        options = ["--writer-model", "scribe", "--min-side", "64", "--near", "-1", "--shard-size", "4"]
        return ["synth", images, *models, *options, "--output", str(tmp_path / name)]

    with ChatServer(scenes) as server:
        cluster = [*index("index_ray"), "--workers", "1", "--json"], [*synth(server, "ray"), "--workers", "2", "--json"]
        found, made = map(json.loads, on_ray(*cluster).splitlines())
        assert server.asked("caption") == 16, "no picture is asked about twice"
        assert main(index("index_alone")) == main(synth(server, "alone")) == 0
    assert (found["encoded"], found["failed"], made["rows"]) == (16, 0, 16)
    (rows, vectors), (expected_rows, expected) = (table(tmp_path / name) for name in ("index_ray", "index_alone"))
    assert rows == expected_rows
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
    assert lines(tmp_path / "ray") == lines(tmp_path / "alone")
