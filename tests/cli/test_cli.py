"""The command line: help of every command, what it prints where, and its exit codes."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image

import muco
from muco.cli import main
from muco.cli.app import app

ROOT = Path(__file__).parents[2]


def walk(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from walk(inner, (*path, name))


COMMANDS = dict(walk(typer.main.get_command(app)))
LEAVES = {path: command for path, command in COMMANDS.items() if not hasattr(command, "commands")}


def parse(command: Any, arguments: list[str], parent: Any = None) -> None:
    """Parses a command line without running it; a mistake in it raises."""
    context = command.make_context(command.name, arguments, parent=parent)
    if hasattr(command, "commands"):
        _, inner, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        parse(inner, rest, context)


# ---------------------------------------------------------------- help


def test_the_commands_are_the_documented_ones():
    names = {" ".join(path) for path in LEAVES}
    assert names == {
        "train",
        "evaluate retrieval",
        "evaluate mmeb",
        "evaluate mbeir",
        "evaluate beir",
        "evaluate mteb",
        "evaluate compare",
        "embed",
        "export",
        "merge",
        "index",
        "search",
        "serve",
        "starter",
        "study",
        "synth",
        "data caption",
        "data check",
        "data convert coco",
        "data mine",
        "data leak",
        "data show",
        "data scenes",
        "data score",
        "data split",
        "demo",
        "doctor",
    }


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_names_every_command_and_option(path, flag, capsys):
    assert main([*path, flag]) == 0
    page, mistakes = capsys.readouterr()
    assert not mistakes
    command = COMMANDS[path]
    for name in getattr(command, "commands", {}):
        assert name in page
    for parameter in command.params:
        assert parameter.help, f"{' '.join(path)}: {parameter.name} has no help"
        assert all(option in page for option in parameter.opts if option.startswith("-"))


@pytest.mark.parametrize("path", [path for path in COMMANDS if path], ids=" ".join)
def test_the_first_sentence_of_help_fits_the_list_of_commands(path):
    shown = COMMANDS[path].get_short_help_str(limit=60)
    assert shown.endswith("."), "a sentence"
    assert not shown.endswith("..."), "cut off in the list of commands"


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_every_command_has_examples_that_parse(path):
    examples = [line.strip() for line in LEAVES[path].epilog.splitlines() if line.startswith("  ")]
    assert examples
    for line in examples:
        program, *arguments = shlex.split(line)
        assert program == "muco"
        assert arguments[: len(path)] == list(path)
        parse(COMMANDS[()], arguments)


def test_help_and_mistakes_do_not_import_torch():
    code = (
        "import sys; from muco.cli import main\n"
        "codes = [main(['--help']), main(['train', '--help']), main(['train']), main(['train', 'missing.yaml'])]\n"
        "print(codes, [n for n in ('torch', 'transformers', 'pyarrow', 'PIL') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[0, 0, 2, 1] []"


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"muco {muco.__version__}\n"


# ---------------------------------------------------------------- exit codes


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["bogus"], "No such command 'bogus'"),
        (["data", "chek", "x"], "Did you mean 'check'?"),
        (["train"], "Missing argument"),
        (["doctor", "--jsn"], "--json"),
        (["embed", "photos", "--model", "m", "--output", "o", "--batch-size", "0"], "--batch-size"),
        (["evaluate", "retrieval", "--data", "d", "--output", "o"], "--model"),
    ],
)
def test_a_usage_mistake_is_2(arguments, says, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out
    assert says in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "{}/missing.yaml"],
        ["evaluate", "retrieval", "--model", "m", "--data", "{}/missing.jsonl", "--output", "{}/scores"],
        ["embed", "{}/missing.jsonl", "--model", "m", "--output", "{}/vectors.parquet"],
        ["data", "check", "{}/missing.jsonl"],
        ["data", "show", "{}/missing.jsonl", "--output", "{}/sheet.html"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_a_missing_file_is_1_and_one_line_and_nothing_written(arguments, tmp_path, capsys):
    assert main([argument.format(tmp_path) for argument in arguments]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("muco: ")
    assert err.count("\n") == 1
    assert "missing" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["embed", "{}/rows.jsonl", "--model", "{}/no-model", "--output", "{}/vectors.parquet"],
        ["evaluate", "retrieval", "--model", "{}/no-model", "--data", "{}/rows.jsonl", "--output", "{}/scores"],
        ["data", "check", "{}/rows.jsonl", "--model", "{}/no-model"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_a_missing_model_is_1_and_one_line(arguments, tmp_path, capsys):
    row = {"text": "a"} if arguments[0] == "embed" else {"turns": [{"query": "a", "target": "b"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert main([argument.format(tmp_path) for argument in arguments]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("muco: ")
    assert err.count("\n") == 1
    assert "no-model" in err


class Failing(io.StringIO):
    """A standard output whose first write raises."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


def test_interruption_is_130(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Failing(KeyboardInterrupt()))
    assert main(["--version"]) == 130


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (muco.DataError("rows.jsonl:3: turn 2\nhas no target"), "muco: rows.jsonl:3: turn 2 has no target\n"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), "muco: a/b: Permission denied\n"),
        (OSError(errno.ENOSPC, "No space left on device"), "muco: No space left on device\n"),
    ],
    ids=["muco", "permission", "disk full"],
)
def test_what_a_user_can_cause_is_1_and_one_line(error, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Failing(error))
    assert main(["--version"]) == 1
    assert capsys.readouterr().err == says


@pytest.mark.parametrize("error", [ValueError("ours"), KeyError("ours"), OSError("ours"), AssertionError("ours")])
def test_a_defect_keeps_its_traceback(error, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Failing(error))
    with pytest.raises(type(error), match="ours"):
        main(["--version"])


# ---------------------------------------------------------------- commands

RECIPE = """
output: runs/first
model: {tiny: {}, vision: trained}
data: {train: [{path: data/train.jsonl}]}
trainer: {learning_rate: 2e-5}
"""


def test_train_prints_the_resolved_recipe_and_stops(tmp_path, capsys):
    from muco.training.recipe import load_recipe

    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    folder = "runs/ä: b #1 😀"
    assert main(["train", str(path), "--set", "loss.temperature=5e-2", "--output", folder, "--print"]) == 0
    page = capsys.readouterr().out
    path.write_text(page)
    recipe = load_recipe(path)
    assert recipe.output == folder
    assert recipe.loss.temperature == 0.05
    assert recipe.trainer["learning_rate"] == 2e-5
    assert main(["train", str(path), "--print"]) == 0
    assert capsys.readouterr().out == page


def test_train_names_the_nearest_key(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    assert main(["train", str(path), "--set", "loss.temprature=1"]) == 1
    err = capsys.readouterr().err
    assert "temprature" in err
    assert "'temperature'" in err


def test_doctor_as_json_and_as_tables(capsys):
    assert main(["doctor", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    found = json.loads(out)
    assert found["ok"] is True
    assert found["muco"] == muco.__version__
    assert {package["name"].lower() for package in found["required"]} >= {"torch", "transformers", "pillow"}
    assert found["torch"]["devices"][0]["name"] == "cpu"

    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert all(package["name"] in out for package in found["required"] + found["optional"])


def test_scenes_are_made_checked_and_shown(tmp_path, capsys):
    folder = tmp_path / "scenes"
    assert main(["data", "scenes", str(folder), "--train", "4", "--dev", "2", "--test", "3"]) == 0
    assert capsys.readouterr().out.strip() == str(folder)
    test = folder / "test.jsonl"

    assert main(["data", "check", str(test)]) == 0
    assert capsys.readouterr().out.strip()
    assert main(["data", "check", str(test), "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    json.loads(out)

    page = tmp_path / "sheet.html"
    assert main(["data", "show", str(test), "--output", str(page), "--limit", "2"]) == 0
    assert capsys.readouterr().out.strip() == str(page)
    assert page.stat().st_size > 0


def test_data_that_is_not_right_is_3(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"turns": [{"query": "a", "target": "b"}]}\n{"turns": [}\n')
    assert main(["data", "check", str(path)]) == 3
    assert "rows.jsonl:2" in capsys.readouterr().out
    assert main(["data", "check", str(path), "--json"]) == 3
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "rows.jsonl:2" in out


TINY_RECIPE = """
output: {folder}/run
model:
  tiny: {{width: 32, layers: 1, heads: 2, kv_heads: 1, feed_forward: 32, vision_width: 32, vision_depth: 1}}
  vision: trained
data: {{train: [{{path: {folder}/scenes/train.jsonl}}]}}
batch: {{size: 4}}
trainer: {{max_steps: 2}}
"""


def test_a_model_is_trained_evaluated_and_used(tmp_path, capfd):
    import pyarrow.parquet as pq

    folder, recipe = tmp_path / "scenes", tmp_path / "recipe.yaml"
    assert main(["data", "scenes", str(folder), "--train", "12", "--dev", "2", "--test", "6"]) == 0
    recipe.write_text(TINY_RECIPE.format(folder=tmp_path))
    capfd.readouterr()

    assert main(["train", str(recipe)]) == 0
    (line,) = capfd.readouterr().out.splitlines()  # progress and the trainer's logs are on stderr
    model = json.loads(line)["model"]
    assert Path(model) == tmp_path / "run/model"

    output = tmp_path / "scores"
    wanted = ["evaluate", "retrieval", "--model", model, "--data", str(folder / "test.jsonl"), "--output", str(output)]
    assert main([*wanted, "--json"]) == 0
    (line,) = capfd.readouterr().out.splitlines()
    tasks = json.loads(line)["tasks"]
    assert "within" in tasks
    assert json.loads((output / "retrieval.json").read_text())["tasks"] == tasks
    assert main(wanted) == 0
    assert "within" in capfd.readouterr().out
    assert main([*wanted, "--dimension", "8", "--storage", "binary", "--json"]) == 0
    short = json.loads(capfd.readouterr().out)
    assert (short["dimension"], short["storage"]) == (8, "binary")
    assert main([*wanted, "--dimension", "1000"]) == 1
    assert "cannot be shortened to 1000" in capfd.readouterr().err

    vectors = tmp_path / "vectors.parquet"
    assert main(["embed", str(folder / "images"), "--model", model, "--output", str(vectors), "--json"]) == 0
    (line,) = capfd.readouterr().out.splitlines()
    assert json.loads(line)["embedded"] == pq.read_table(vectors).num_rows == 20
    short = [str(folder / "images"), "--model", model, "--output", str(tmp_path / "short.parquet"), "--dimension", "8"]
    assert main(["embed", *short]) == 0
    capfd.readouterr()
    wholes, parts = (
        np.array(pq.read_table(file)["embedding"].to_pylist()) for file in (vectors, tmp_path / "short.parquet")
    )
    assert parts.shape == (20, 8) and np.allclose(np.linalg.norm(parts, axis=1), 1, atol=1e-6)
    assert np.allclose(parts, wholes[:, :8] / np.linalg.norm(wholes[:, :8], axis=1, keepdims=True), atol=1e-6)
    assert main(["data", "check", str(folder / "test.jsonl"), "--model", model]) == 0


# ---------------------------------------------------------------- documents


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_the_commands_in_the_readme_parse():
    lines = [line for block in blocks("README.md", "bash") for line in block.splitlines() if line.startswith("muco ")]
    assert len(lines) > 5
    for line in lines:
        parse(COMMANDS[()], shlex.split(line, comments=True)[1:])


def test_the_recipe_in_the_readme_loads(tmp_path):
    from muco.training.recipe import load_recipe

    (page,) = blocks("README.md", "yaml")
    path = tmp_path / "recipe.yaml"
    path.write_text(page)
    assert load_recipe(path).trainer["learning_rate"] == 5e-5


def test_the_loop_in_the_docs_runs(tmp_path, tiny_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, colour in (("ring", "red"), ("mug", "blue")):
        Image.new("RGB", (60, 60), colour).save(f"{name}.jpg")
    (code,) = (block for block in blocks("docs/training.md", "python") if "optimizer" in block)
    found: dict = {}
    exec(code.replace('"starter"', repr(str(tiny_path))), found)
    assert found["loss"].item() > 0 and found["query"].grad_fn is not None


def test_the_rows_in_the_readme_are_samples(tmp_path):
    from muco.data import open_data

    (page,) = blocks("README.md", "json")
    path = tmp_path / "rows.jsonl"
    path.write_text(page)
    rows = open_data(path)
    first, captioned, second = (rows[number] for number in range(3))
    assert captioned.turns[0].query[0].empty and captioned.turns[0].negatives[0].text == "a blue mug"
    assert first.images == (tmp_path / "images/0001.jpg",)
    assert [turn.kind for turn in first.turns] == ["classification", "retrieval"]
    assert len(first.turns[1].query) == 2
    assert second.turns[0].target[0].images == (tmp_path / "images/7.png",)
    assert second.turns[0].negatives[0].text == "a blue mug"


def test_what_the_index_of_the_paper_names_exists():
    from importlib import import_module

    lines = (ROOT / "docs/paper.md").read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if "planned" not in line)
    names = set(re.findall(r"`(muco(?:\.\w+)+)", text))
    files = set(re.findall(r"`((?:tests|benchmarks|recipes|docs)/[\w./-]+)`", text))
    assert len(names) > 8
    assert len(files) > 2
    for name in names:
        value: Any = muco
        for part in name.split(".")[1:]:
            value = getattr(value, part, None) or import_module(f"{value.__name__}.{part}")
    assert [name for name in files if not (ROOT / name).exists()] == []


# ---------------------------------------------------------------- text that is not UTF-8, and streams that are not

ACCENTED = "output: runs/é\nmodel: {tiny: {}, vision: trained}\ndata: {train: [{path: rows.jsonl}]}\n"


def piped(monkeypatch: pytest.MonkeyPatch, encoding: str, *arguments: str) -> tuple[int, str]:
    """Exit code and stdout of a command whose stdout has an encoding."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    code = main(list(arguments))
    stream.flush()
    return code, stream.buffer.getvalue().decode(encoding)


@pytest.mark.parametrize(
    ("encoding", "said"),
    [
        ("latin-1", r"r\.yaml:1: not UTF-8 \(byte 0xe9\); save the file as UTF-8"),
        ("utf-16", r"r\.yaml: the file is UTF-16; save it as UTF-8"),
        ("utf-8-sig", ""),
    ],
)
def test_a_recipe_in_another_encoding_is_a_sentence(tmp_path, capfd, encoding, said):
    (tmp_path / "r.yaml").write_bytes(ACCENTED.encode(encoding))
    assert main(["train", str(tmp_path / "r.yaml"), "--print"]) == (1 if said else 0)
    out, err = capfd.readouterr()
    assert re.search(said, err) if said else "runs/é" in out


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-16", "utf-8"])
def test_stdout_of_any_encoding_gets_an_escape_and_json_stays_json(tmp_path, monkeypatch, encoding):
    from muco.base.terminal import finish, print_pairs

    told = {"text": "é 😀 漢", "name": os.fsdecode(b"caf\xe9")}

    @app.command("say")
    def say(as_json: bool = False) -> None:
        finish(told, as_json, print_pairs)

    monkeypatch.setattr(app, "registered_commands", app.registered_commands[:])
    try:
        code, out = piped(monkeypatch, encoding, "say", "--as-json")
        assert code == 0 and json.loads(out) == told
        code, out = piped(monkeypatch, encoding, "say")
        assert code == 0 and "caf\\udce9" in out and ("漢" in out) == encoding.startswith("utf")
    finally:
        app.registered_commands[:] = [c for c in app.registered_commands if c.name != "say"]


@pytest.fixture
def odd(tmp_path) -> Path:
    """A folder whose name is not UTF-8."""
    folder = Path(os.fsdecode(os.fsencode(str(tmp_path)) + b"/caf\xe9"))
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes no such name")
    return folder


def test_names_that_are_not_utf8_are_taken_or_named(odd, tmp_path, capfd):
    row = json.dumps({"turns": [{"query": "a", "target": "one two three four five six seven eight"}]}) + "\n"
    (odd / "rows.jsonl").write_text(row * 2)
    data = str(odd / "rows.jsonl")
    assert main(["data", "check", data, "--json"]) == 0
    assert main(["data", "show", data, "--output", str(odd / "sheet.html")]) == 0
    assert main(["data", "leak", data, "--train", data, "--output", str(odd / "leak")]) == 3
    assert json.loads((odd / "leak" / "overlap.jsonl").read_text().splitlines()[0])
    (odd / "r.yaml").write_text(ACCENTED)
    capfd.readouterr()
    assert main(["train", str(odd / "r.yaml"), "--print", "--output", str(odd)]) == 0
    assert "caf\\uDCE9" in capfd.readouterr().out


def test_a_name_that_a_library_does_not_take_is_a_sentence(odd, tiny_path, tmp_path, capfd):
    (tmp_path / "rows.jsonl").write_text('{"text": "a red mug"}\n')
    given = ["embed", str(tmp_path / "rows.jsonl"), "--model", str(tiny_path), "--output"]
    assert main([*given, str(odd / "v.parquet")]) == 1
    assert re.search(r"^muco: .*caf\\udce9/v\.parquet.*: not UTF-8", capfd.readouterr().err, re.MULTILINE)


def test_half_a_character_in_a_further_column_stops_no_run(tiny_path, tmp_path, capfd):
    rows = [{"id": "a", "text": "a red mug"}, {"id": "b", "text": "a blue mug", "note": "\ud800"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [str(tmp_path / "rows.jsonl"), "--model", str(tiny_path), "--json"]
    for command in (["embed", *given, "--output", str(tmp_path / "v.parquet")],
                    ["index", *given, "--index", str(tmp_path / "index")]):  # fmt: skip
        assert main(command) == 0
        found = json.loads(capfd.readouterr().out)
        assert found["rows"] == 2 and found["failed"] < 2
