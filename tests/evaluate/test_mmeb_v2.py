"""MMEB-V2: all 78 sets of the published layout, metrics that no trick passes, means, texts, and what is missing."""

from __future__ import annotations

import mmeb_v2_tree as made
import pytest

from muco.evaluate.mmeb_v2 import NAMES, evaluate_mmeb_v2


@pytest.fixture(scope="session")
def tree(tmp_path_factory) -> made.Tree:
    return made.write_tree(tmp_path_factory.mktemp("mmeb_v2"))


@pytest.fixture(scope="session")
def other(tmp_path_factory) -> made.Tree:
    return made.write_tree(tmp_path_factory.mktemp("mmeb_v2_qwen"), "qwen", images=False)


def test_an_oracle_is_perfect_in_all_78_sets_and_in_every_mean(tree, tmp_path):
    assert list(NAMES) == made.ALL and len(NAMES) == 78
    result = evaluate_mmeb_v2(made.Oracle(tree.rows), tree.root, tmp_path)
    wrong = {name: task["score"] for name, task in result["tasks"].items() if task["score"] != pytest.approx(1)}
    assert not wrong
    assert list(result["tasks"]) == made.ALL
    assert result["overall"] == pytest.approx(1) and len(result["groups"]) == 15
    assert all(score == pytest.approx(1) for score in result["groups"].values())
