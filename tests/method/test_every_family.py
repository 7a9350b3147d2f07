"""Every family that docs/backbones.md names does what its table says, no more and no less.

Those that need torchvision are checked in test_stock.py.
"""

from __future__ import annotations

import family_checks
import pytest
import zoo
from family_checks import NEED_TORCHVISION, ROOT, ROWS, documented

QUICK = ("gemma3", "llava", "qwen3_5")  # image blocks and windows; a tower beside its connector; recurrent layers
FAMILIES = [
    pytest.param(family, marks=() if family in QUICK else pytest.mark.slow)
    for family in ROWS
    if family not in NEED_TORCHVISION
]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_does_what_its_row_says(family):
    needs, *row = documented()[ROWS[family]]
    assert needs == ", ".join(zoo.FAMILIES[family].packages if family in zoo.FAMILIES else ())
    assert family_checks.row(family) == row


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3_window", "paligemma_chat"])
def test_other_settings_of_a_family_do_not_change_its_row(family):
    name = ROWS[family.rsplit("_", 1)[0]]
    assert [family.removesuffix("_chat"), *family_checks.row(family)][1:] == documented()[name][1:]


@pytest.mark.parametrize("family", NEED_TORCHVISION)
def test_without_torchvision_they_are_refused_in_a_sentence(family):
    (said,) = family_checks.row(family)
    assert said.startswith(f"{family}: its processor cannot be built here: ") and "orchvision" in said


def test_the_readme_names_every_family():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in ROWS.values() if name.split(",")[0] not in readme] == []
