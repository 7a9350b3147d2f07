"""Imports go one way and cost little, and the public names are what they say."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
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


# A folder of the package imports only from those before it; "" is the method, the files at the root.
ORDER = (
    ("base",),
    ("starter",),
    ("",),
    ("data",),
    ("evaluate",),
    ("training",),
    ("embed", "export", "synth", "study"),
    ("search", "demo"),
    ("serve",),
    ("cli",),
)
ABOVE_ALL = {"muco", "muco.__main__", "muco.errors"}  # the public names; the command; what every file may raise


def imports() -> dict[str, set[tuple[str, bool]]]:
    """For every module of the package, the modules of the package it imports, and whether only to check types."""
    found: dict[str, set[tuple[str, bool]]] = {}
    for file in sorted((ROOT / "muco").rglob("*.py")):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for_types = {
            id(node)
            for block in ast.walk(tree)
            if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
            for node in ast.walk(block)
        }
        found[module] = set()
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [name if _is_module(name) else node.module for name in inner]
            found[module] |= {(name, id(node) in for_types) for name in names if name.split(".")[0] == "muco"}
    return found


def _is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def _folder(module: str) -> str:
    first = module.split(".")[1]
    return first if (ROOT / "muco" / first).is_dir() else ""


def test_imports_go_one_way():
    floor = {folder: number for number, folders in enumerate(ORDER) for folder in folders}
    assert {path.parent.name for path in (ROOT / "muco").glob("*/__init__.py")} == set(floor) - {""}
    wrong = [
        f"{module} imports {other}"
        for module, others in imports().items()
        if module not in ABOVE_ALL
        for other, _ in others - {("muco.errors", False), ("muco.errors", True)}
        if other == "muco" or (_folder(module) != _folder(other) and floor[_folder(other)] >= floor[_folder(module)])
    ]
    assert wrong == []


def test_no_circle_of_imports_within_a_folder():
    graph = {module: {other for other, _ in others} for module, others in imports().items()}
    del graph["muco"]
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_the_files_at_the_root_are_the_method():
    files = {path.name for path in (ROOT / "muco").glob("*.py")}
    method = set(re.findall(r"`(\w+\.py)`", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert files - {"__init__.py", "__main__.py", "errors.py"} <= method, "the README's table names them all"


def test_only_the_command_line_knows_typer():
    using = {
        path.relative_to(ROOT).parts[1]
        for path in (ROOT / "muco").rglob("*.py")
        if re.search(r"^\s*(import|from) typer\b", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert using == {"cli"}


def test_data_is_read_without_torch():
    modules = sorted(f"muco.data.{path.stem}" for path in (ROOT / "muco" / "data").glob("*.py"))
    assert len(modules) > 20
    code = f"import sys, importlib; [importlib.import_module(m) for m in {modules}]; print('torch' in sys.modules)"
    assert python(code) == "False"


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
