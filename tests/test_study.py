"""Studies: intervals against the textbook, and whole small studies that are killed, resumed and grown."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

import muco
from muco import MucoError, OutputError
from muco.study.design import Column, Run, Study, folder_of, recipe_of
from muco.study.report import Estimate, differences, plot, table, table_as_json, write_report
from muco.study.run import run_study
from muco.study.studies import STUDIES, find_study
from muco.train.recipe import from_dict

SMALL = {"width": 32, "feed_forward": 64, "vision_width": 32, "vision_depth": 1, "vocabulary": 300}


def two_runs(scenes: Path) -> Study:
    """One training and one that goes on from it."""
    return Study(
        name="two",
        question="Is <this> escaped?",
        base={
            "model": {"tiny": SMALL, "vision": "trained"},
            "data": {"train": [{"path": "{data}/train.jsonl"}]},
            "batch": {"size": 4},
            "trainer": {"max_steps": 2, "logging_steps": 1, "report_to": []},
        },
        runs=(Run("first", shown=False), Run("goes on", start="first")),
        columns=(Column("answer", ("answer",)), Column("loss", ("loss",), percent=False)),
        prepare=lambda folder, scale: folder.symlink_to(scenes),
        compared=(("goes on", "first"),),
    )


def known(values: dict[str, list[float]]) -> dict:
    """What a study found, as far as the report reads it."""
    runs = [
        {"name": name, "seed": seed, "result": result(value)}
        for name, row in values.items()
        for seed, value in enumerate(row)
    ]
    return {"asked": {"study": "two", "scale": 1.0, "seeds": len(next(iter(values.values())))}, "runs": runs}


def result(value: float) -> dict:
    scores = {"answer": value, "loss": None}
    return {"scores": scores, "flops": 2e12, "seconds": None, "versions": {"torch": "2"}, "steps": 2}


def test_estimates_are_means_with_students_intervals():
    # t(0.975, 2 degrees of freedom) = 4.302653
    estimate = Estimate((1.0, 2.0, 6.0))
    assert estimate.mean == 3.0
    assert estimate.half_width == pytest.approx(4.302653 * math.sqrt(7 / 3), rel=1e-6)
    assert math.isnan(Estimate((1.0,)).half_width) and str(Estimate((1.0,))) == "1.0"


def test_differences_are_paired_by_seed(scenes, tmp_path):
    study, found = two_runs(scenes), known({"first": [0.1, 0.5, 0.9], "goes on": [0.2, 0.6, 1.0]})
    (row,) = differences(study, found)
    assert row["columns"]["answer"].mean == pytest.approx(10) and row["columns"]["answer"].half_width < 1e-9
    (shown,) = table(study, found)  # "first" is not shown
    assert shown["name"] == "goes on" and shown["tflops"] == 2.0 and math.isnan(shown["columns"]["loss"].mean)
    (plain,) = json.loads(json.dumps(table_as_json(study, found), allow_nan=False))
    assert plain["columns"]["answer"]["values"] == pytest.approx([20, 60, 100]) and plain["seconds"] is None
    page = write_report(study, found, tmp_path, "muco study two").read_text()
    assert "60.0 ± 99.4" in page and "goes on − first | 10.0 ± 0.0" in page and "`muco study two`; 3 seeds" in page
    drawn = ET.fromstring(plot(study, found))  # noqa: S314 - our own
    assert "Is <this> escaped?" in [element.text for element in drawn.iter()]


@pytest.mark.parametrize("name", STUDIES)
def test_every_run_of_every_study_has_a_recipe_and_scores_that_exist(name, tmp_path):
    study = find_study(name)
    for run in study.runs:
        values = recipe_of(study, run, 3, 0.1, tmp_path)
        recipe = from_dict(values)
        assert recipe.seed == 3 and recipe.trainer["max_steps"] >= 1
        start = folder_of(tmp_path, run.start, 3) / "run" / "model" if run.start else None
        assert recipe.model.path == (str(start) if start else None)
    assert find_study(name) is study


def test_what_cannot_be_studied_is_said(scenes, tmp_path):
    with pytest.raises(MucoError, match="unknown study 'fine'; there are finetune"):
        find_study("fine")
    with pytest.raises(MucoError, match="--scale is 0"):
        run_study(two_runs(scenes), tmp_path / "out", scale=0)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    with pytest.raises(OutputError, match="holds no study"):
        run_study(two_runs(scenes), tmp_path / "other")


@pytest.mark.slow
def test_a_study_goes_on_with_what_is_missing_and_grows_by_seeds(scenes, tmp_path):
    study, output = two_runs(scenes), tmp_path / "out"
    found = run_study(study, output, seeds=1)
    first = [entry["result"] for entry in found["runs"]]
    assert [entry["name"] for entry in found["runs"]] == ["first", "goes on"]
    assert all(r["flops"] > 1e6 and r["steps"] == 2 and 0 <= r["scores"]["answer"] <= 1 for r in first)
    model = muco.load(folder_of(output, "goes on", 0) / "run" / "model")
    assert model.get_embedding_dimension() == 32
    written = folder_of(output, "first", 0) / "result.json"
    before = written.stat().st_mtime_ns
    (folder_of(output, "goes on", 0) / "result.json").unlink()  # as if killed before it was scored
    again = run_study(study, output, seeds=1)
    assert [entry["result"]["scores"] for entry in again["runs"]] == [r["scores"] for r in first]
    assert written.stat().st_mtime_ns == before
    with pytest.raises(OutputError, match=r"holds another study \(scale 1.0, now 0.5\)"):
        run_study(study, output, seeds=1, scale=0.5)
    written.write_text(json.dumps(json.loads(written.read_text()) | {"job": {}}))
    with pytest.raises(OutputError, match="first-seed0 is a run of another recipe"):
        run_study(study, output, seeds=1)


@pytest.mark.slow
def test_a_run_that_fails_stops_the_study_with_its_last_words(scenes, tmp_path):
    study = two_runs(scenes)
    broken = Run("broken", {"trainer": {"optim": "no such optimizer"}})
    study = Study(**{**study.__dict__, "runs": (broken,), "compared": ()})
    with pytest.raises(MucoError, match=r"(?s)broken-seed0 failed \(exit code 1\).*no such optimizer"):
        run_study(study, tmp_path / "out", seeds=1)


@pytest.mark.slow
def test_the_command_can_be_interrupted(tmp_path):
    command = [sys.executable, "-m", "muco", "study", "finetune", "--output", str(tmp_path / "out"), "--scale", "0.01"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ})
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("out/runs/*/job.json")):
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    out, _ = running.communicate(timeout=60)
    assert running.returncode == 130 and not out
    assert json.loads((tmp_path / "out" / "study.json").read_text())["asked"]["study"] == "finetune"
