"""Shared fixtures: one small set of scenes and one untrained tiny model per session; no network."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

# the shapes and dtypes in the signatures of the method are checked in tests, and only there
install_import_hook(["muco.info_nce", "muco.loss", "muco.negatives", "muco.pooling"], "beartype.beartype")
# a busy machine is no wrong result; and a change fails by what it does, not by what is drawn in its run
settings.register_profile("muco", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None)
settings.load_profile("muco")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tensors are small: a second thread would wait more than work
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_collection_finish() -> None:
    """The libraries are loaded now; the trainer collects garbage often, and need not look at all of them each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 64 training, 16 dev and 16 test scenes."""
    from muco.data.scenes import write_scenes

    return write_scenes(tmp_path_factory.mktemp("data") / "scenes", train=64, dev=16, test=16)


@pytest.fixture(scope="session")
def tiny_model(scenes: Path):
    """An untrained tiny Qwen2-VL; tests must not change its weights."""
    from muco.data import open_data
    from muco.model import from_backbone
    from muco.sizes import TinyConfig
    from muco.tiny import tiny_qwen2_vl
    from muco.training.build import texts_of

    sizes = TinyConfig(width=64, feed_forward=128, vision_width=32, vision_depth=1, vocabulary=512)
    return from_backbone(*tiny_qwen2_vl(texts_of([open_data(scenes / "train.jsonl")]), sizes), device="cpu")


@pytest.fixture(scope="session")
def tiny_path(tiny_model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny model, as it is saved; tests must not change it."""
    path = tmp_path_factory.mktemp("model") / "little"
    tiny_model.save(str(path))
    return path
