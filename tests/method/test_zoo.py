"""The tiny checkpoints of more families are what their names say: plain transformers loads them whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import zoo
from families import checkpoint
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

MODEL_TYPES = {"gemma3_window": "gemma3", "idefics2_window": "idefics2", "paligemma_chat": "paligemma"}


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_a_checkpoint_is_whole(family):
    folder = checkpoint(family)
    assert AutoConfig.from_pretrained(folder).model_type == MODEL_TYPES.get(family, family)
    model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    floats = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    assert [name for name, value in floats.items() if ((value == 0) | (value == 1)).any()] == []
    assert len(AutoTokenizer.from_pretrained(folder)) == model.config.get_text_config().vocab_size
    assert sum(file.stat().st_size for file in folder.iterdir()) < 4e6
    assert has_pillow(folder) is not zoo.FAMILIES[family].torchvision


def has_pillow(folder: Path) -> bool:
    """The image processor has a version for Pillow."""
    try:
        return type(AutoImageProcessor.from_pretrained(folder, backend="pil")).__name__.endswith("Pil")
    except ImportError:  # it has one for torchvision alone, and that is not here
        return False
