"""``import muco`` is cheap, its names are what they say."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import tomllib
from importlib import import_module, metadata
from pathlib import Path

import pytest

import muco

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "sentence_transformers", "datasets", "pyarrow", "numpy", "PIL", "yaml", "rich")


def python(code: str) -> str:
    """What a fresh interpreter prints when it runs ``code``."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_nothing_heavy():
    code = f"import sys, muco; print([name for name in {HEAVY} if name in sys.modules])"
    assert python(code) == "[]"


def test_samples_need_no_torch():
    code = f"import sys, muco; muco.Turn(query='a', target='b'); print([n for n in {HEAVY} if n in sys.modules])"
    assert python(code) == "[]"


@pytest.mark.parametrize("name", sorted(muco.__all__))
def test_a_public_name_is_the_object_of_its_home(name):
    value = getattr(muco, name)
    assert value is getattr(import_module(value.__module__), name)
    assert vars(muco)[name] is value, "the second access should cost nothing"
    assert inspect.getdoc(value)


def test_names_are_listed_and_unknown_ones_are_refused():
    assert set(muco.__all__) <= set(dir(muco))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = muco.trian


def test_train_calls_the_trainer(tmp_path):
    from muco.training.recipe import from_dict
    from muco.training.trainer import train

    model = {"tiny": {}, "vision": "trained"}
    missing = str(tmp_path / "missing.jsonl")
    recipe = from_dict({"output": str(tmp_path / "run"), "model": model, "data": {"train": [{"path": missing}]}})
    with pytest.raises(muco.MucoError, match=r"missing\.jsonl"):
        muco.train(recipe)
    assert inspect.signature(muco.train).parameters.keys() == inspect.signature(train).parameters.keys()


def test_version_and_type_marker():
    assert metadata.version("muco") == muco.__version__
    assert (Path(muco.__file__).parent / "py.typed").exists()


def test_every_dependency_is_pinned_to_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    wanted = [line for line in (*project["dependencies"], *extras) if not line.startswith("muco[")]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins), "exact versions, without a local part as in +cpu"
    pinned = {_plain(pin.partition("==")[0]) for pin in pins}
    assert len(pinned) == len(pins)
    assert {_plain(re.match(r"[\w.-]+", line)[0]) for line in wanted} <= pinned


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
