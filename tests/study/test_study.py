"""Studies: intervals against the textbook, and whole small studies that are killed, resumed and grown."""

from __future__ import annotations

import json
import math
import re
import signal
import sys
import time
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import numpy as np
import processes
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import muco
from muco import MucoError, OutputError
from muco.base.files import write_json
from muco.base.svg import Mark, chart
from muco.cli import main
from muco.data import open_data
from muco.data.scenes import write_scenes
from muco.study.design import Column, Curve, Equal, Grid, Run, Sets, Study, filled, folder_of, recipe_of, steps_of
from muco.study.estimate import Estimate, half_width
from muco.study.one import of_curve, run_job, seconds_of
from muco.study.probes import dialogues_found, leak, turns_found
from muco.study.report import differences, plot, reached, table, table_as_json, write_report
from muco.study.run import TUNING_SEED, choose, forecast, run_study
from muco.study.studies import FLOPS, STUDIES, find_study, questions
from muco.study.true_sizes import ASSUMPTIONS, run_flops, tokens_per_turn
from muco.study.turns import questions_of_one_kind
from muco.training.recipe import TurnsRecipe, from_dict

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


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    """Scenes of which a run sees all in no time."""
    return write_scenes(tmp_path_factory.mktemp("few") / "scenes", train=8, dev=1, test=4)


@pytest.fixture
def forked(monkeypatch) -> None:
    """The runs of a study are processes of their own that need not import the libraries."""
    monkeypatch.setattr("muco.study.run.subprocess", processes)


def made_up_costs(study: Study) -> dict[str, dict[str, float]]:
    return {
        run.name: {"pairs": 7.0 + place, "flops": 2e9 + place, "seconds": 0.5 + place, "spread": 0.1, "scoring": 2.0}
        for place, run in enumerate(study.runs)
    }


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
        values = recipe_of(study, run, 3, 0.1, tmp_path, costs=made_up_costs(study))
        recipe = from_dict(values)
        assert recipe.seed == 3 and recipe.trainer["max_steps"] >= 1
        start = folder_of(tmp_path, run.start, 3) / "run" / "model" if run.start else tmp_path / "data" / "start"
        assert recipe.model.path == (str(start) if run.start or "model" in study.needs else None)
    assert find_study(name) is study


def test_what_cannot_be_studied_is_said(scenes, tmp_path):
    with pytest.raises(MucoError, match="unknown study 'fine'; did you mean 'finetune'"):
        find_study("fine")
    for bad in ({"seeds": 0}, {"jobs": 0}, {"first_seed": -1}):
        with pytest.raises(MucoError, match="--seeds is .* --first-seed .* --jobs"):
            run_study(two_runs(scenes), tmp_path / "out", **bad)
    with pytest.raises(MucoError, match="--scale is 0"):
        run_study(two_runs(scenes), tmp_path / "out", scale=0)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    with pytest.raises(OutputError, match="holds no study"):
        run_study(two_runs(scenes), tmp_path / "other")


def made_in_this_process(study: Study, folder: Path, costs: dict, made: dict[str, tuple[Path, dict]]) -> dict:
    """All runs of a study with one seed, one step each of the smallest model; what a report reads.

    Of runs that differ in numbers only, such as how many turns or steps, or in the model that they start from, the
    first in any study is made, and the others take its result from ``made``.
    """
    tiny = "tiny" in study.base["model"]
    small = replace(study, base={**study.base, "model": {"tiny": SMALL, "vision": "trained"}}) if tiny else study
    kinds: dict[str, str] = {}  # name of a run -> what it is, numbers left out
    for run in study.runs:
        here = folder_of(folder, run.name, 0)
        values = recipe_of(small, run, 0, 1e-6, folder, costs=costs) | {"output": str(folder / "run")}
        values["trainer"] |= {"max_steps": 1, "warmup_steps": 0, "logging_steps": 1, "save_strategy": "no"}
        values["batch"] = {"size": 4}
        if run.start:
            values["model"]["path"] = str(folder / "start")
        elif tiny:
            values["model"]["tiny"] = values["model"]["tiny"] | SMALL
        job = {"recipe": values, "test": filled(run.test or study.test, folder), "probes": [*study.probes]}
        job |= {"curve": study.curve.score} if study.curve else {}
        kinds[run.name] = kind = re.sub(r"\d+", "#", json.dumps(job, sort_keys=True).replace(str(folder), ""))
        if kind not in made:
            values["output"] = str(here / "run")
            if run.start:
                values["model"]["path"] = str(made[kinds[run.start]][0] / "run" / "model")
            write_json(here / "job.json", job)
            made[kind] = here, run_job(here)
    runs = [{"name": run.name, "seed": 0, "result": made[kinds[run.name]][1]} for run in study.runs]
    found = {"asked": {"study": study.name, "scale": 1.0, "seeds": 1}, "runs": runs, "costs": costs}
    if study.grid:
        results = {(name, TUNING_SEED): runs[0]["result"] for name in study.tuning}
        found |= choose(study, results)
    return found


@pytest.fixture(scope="module")
def made() -> dict[str, tuple[Path, dict]]:
    """By what a run is: its folder and its result."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_every_run_of_every_study_trains_is_scored_and_reported(name, few, made, tmp_path):
    study = find_study(name)
    if study.needs_scenes or study.needs:
        study.prepare(tmp_path / "data", 0.0001)
        for test in (tmp_path / "data").glob("*test*.jsonl"):
            test.write_text("".join(test.read_text().splitlines(keepends=True)[:4]))
    else:
        (tmp_path / "data").symlink_to(few)
    found = made_in_this_process(study, tmp_path, made_up_costs(study), made)
    for entry in found["runs"]:
        known = entry["result"]["scores"]
        own = [score for column in study.columns for score in column.scores if "one kind" not in entry["name"]]
        missing = [score for score in own if known.get(score) is None]
        assert not missing, (entry["name"], missing)
    page = write_report(study, found, tmp_path, f"muco study {name}").read_text()
    assert all(f"| {run.name} |" in page for run in study.runs if run.shown) and "nan" not in page.lower()
    assert all(line in page for line in (*study.registered, *study.notes))
    drawn = ET.parse(tmp_path / "plot.svg")  # noqa: S314 - our own
    said = [element.text for element in drawn.iter("{http://www.w3.org/2000/svg}title")]  # one at every mark
    shown = [column for run in study.runs if run.shown for column in study.columns]
    assert 1 + len(shown) - 4 <= len(said) <= 1 + len(shown)  # questions of one kind have no captions, nor others
    assert (tmp_path / "curves.svg").exists() == ("](curves.svg)" in page) == (study.curve is not None)


# ── equal compute ────────────────────────────────────────────────────────────────────────────────────────────────────

COSTS = {
    "seven": {"pairs": 224.0, "flops": 9e9, "seconds": 0.3, "spread": 0.1},
    "one": {"pairs": 32.0, "flops": 6e9, "seconds": 0.125, "spread": 0.1},
    "later": {"pairs": 32.0, "flops": 6e9, "seconds": 0.1, "spread": 0.1},
}


def equal_runs(scenes: Path, by: str, to: str = "seven") -> Study:
    seven = {"trainer": {"max_steps": 2, "warmup_steps": 0, "logging_steps": 1, "report_to": []}}
    runs = (
        Run("seven", seven),
        Run("one", {"turns": {"limit": 1}}, equal=Equal("seven", by)),
        Run("later", {"model": {"vision": "frozen"}, "turns": {"limit": 1}}, start="one", equal=Equal(to, by)),
    )
    return replace(two_runs(scenes), runs=runs, compared=(), columns=two_runs(scenes).columns[:1])


@pytest.mark.parametrize("scale", [1.0, 0.3, 2.0])
@pytest.mark.parametrize("by", ["pairs", "flops", "seconds"])
def test_runs_of_equal_cost_have_steps_in_inverse_proportion(by, scale, scenes, tmp_path):
    study = replace(equal_runs(scenes, by), base={"trainer": {}, "model": {}})
    study = replace(study, runs=(Run("seven", {"trainer": {"max_steps": 300, "warmup_steps": 15}}), *study.runs[1:]))
    for run in study.runs:
        steps, warm = steps_of(study, run, scale, COSTS)
        spent, budget = steps * COSTS[run.name][by], round(300 * scale) * COSTS["seven"][by]
        assert abs(spent - budget) <= COSTS[run.name][by] / 2 + 1e-9  # as near as whole steps come
        assert warm / steps == pytest.approx(0.05, abs=0.01)
        trainer = recipe_of(study, run, 0, scale, tmp_path, costs=COSTS)["trainer"]
        assert (trainer["max_steps"], trainer["warmup_steps"]) == (steps, warm)
    # what equals a run that equals another costs what both cost
    chained = replace(study, runs=(*study.runs[:2], replace(study.runs[2], equal=Equal("one", by))))
    one, later = (steps_of(chained, run, scale, COSTS)[0] for run in chained.runs[1:])
    assert abs(later * COSTS["later"][by] - one * COSTS["one"][by]) <= COSTS["later"][by] / 2 + 1e-9


def test_what_equals_another_run_makes_at_least_one_step(scenes):
    study = equal_runs(scenes, "seconds")
    assert steps_of(study, study.runs[1], 1e-6, COSTS) == (2, 0)  # of one step of 0.3 s, 2.4 of 0.125 s
    dear = {**COSTS, "one": {**COSTS["one"], "seconds": 100.0}}
    assert steps_of(study, study.runs[1], 1.0, dear) == (1, 0)


@pytest.mark.slow
def test_costs_are_taken_once_and_runs_follow_them(few, tmp_path, forked, monkeypatch):
    monkeypatch.setattr("muco.study.run.ROUNDS", 2)
    monkeypatch.setattr("muco.study.run.TIMED", 2)
    study, output = equal_runs(few, "seconds"), tmp_path / "out"
    found = run_study(study, output, seeds=1, first_seed=5, jobs=2)
    costs = json.loads((output / "calibration.json").read_text())
    assert found["costs"] == costs and [*costs] == ["seven", "one", "later"]
    assert costs["seven"]["pairs"] == 7 * costs["one"]["pairs"] == 28  # four images of seven turns
    assert costs["seven"]["flops"] > 1.5 * costs["one"]["flops"]
    assert costs["one"]["flops"] > costs["later"]["flops"]  # no backward through a frozen tower, before it is trained
    assert all(0.001 < cost["seconds"] < 10 and cost["spread"] >= 0 for cost in costs.values())
    results = {entry["name"]: entry["result"] for entry in found["runs"]}
    for run in study.runs:
        assert results[run.name]["steps"] == steps_of(study, run, 1.0, costs)[0]
        assert results[run.name]["job"]["recipe"]["seed"] == 5
    page = write_report(study, found, output, "muco study two").read_text()
    assert "1 seed, from 5 on" in page and "| seven | 28 |" in page
    before = (output / "calibration.json").stat().st_mtime_ns, (output / "study.json").read_text()
    assert (
        run_study(study, output, seeds=1, first_seed=5, jobs=2) == found
    )  # the same costs, although a clock would differ
    assert before == ((output / "calibration.json").stat().st_mtime_ns, (output / "study.json").read_text())


def test_the_quickest_try_of_each_step_counts():
    cost = seconds_of([[0.1, 0.4, 0.3], [0.2, 0.2, 0.3], [0.3, 0.3, 0.6]])
    assert cost["seconds"] == pytest.approx((0.1 + 0.2 + 0.3) / 3)
    assert cost["spread"] == pytest.approx(1.2 / 0.7 - 1)  # the sums of the third and the second round


# ── settings, curves, and what is said of them ───────────────────────────────────────────────────────────────────────


def tuned(scenes: Path) -> Study:
    """Two runs that each take the better of two rates, and a start that is not trained."""
    rates = {f"{rate:g}": {"trainer": {"learning_rate": rate}} for rate in (1e-3, 1e-2)}
    still = {"trainer": {"max_steps": 1, "learning_rate": 0.0}}
    runs = (Run("the start", still, fixed=True), Run("a"), Run("b", {"turns": {"limit": 1}}, equal=Equal("a", "pairs")))
    return replace(
        two_runs(scenes),
        runs=runs,
        compared=(("a", "b"),),
        registered=("b wins",),
        margin=5.0,
        grid=Grid(rates, seeds=2, dev="{data}/dev.jsonl"),
        curve=Curve("answer", points=2, reach=1.0),
        spread=4.0,
    )


@pytest.mark.slow
def test_every_run_takes_its_own_best_setting_by_the_dev_set_alone(scenes, tmp_path, forked, capsys):
    study, output = tuned(scenes), tmp_path / "out"
    found = run_study(study, output, seeds=2, jobs=2)
    assert [(entry["name"], entry["seed"]) for entry in found["runs"]] == [
        *(("the start", 0), ("a", 0), ("b", 0), ("a", 1), ("b", 1))
    ]
    for name in ("a", "b"):
        means = {}
        for rate in ("0.001", "0.01"):
            jobs = [json.loads(path.read_text()) for path in output.glob(f"runs/{name}-{rate}-seed*/result.json")]
            assert sorted(job["job"]["recipe"]["seed"] for job in jobs) == [TUNING_SEED, TUNING_SEED + 1]
            assert {job["job"]["test"] for job in jobs} == {str(output / "data" / "dev.jsonl")}
            assert {job["job"]["recipe"]["data"]["validation"]["path"] for job in jobs} == {
                str(output / "data" / "dev.jsonl")
            }
            means[rate] = np.mean([job["scores"]["answer"] for job in jobs])
            assert sorted(found["tuning"][name][rate]) == sorted(job["scores"]["answer"] for job in jobs)
        best = max(means, key=means.get)
        assert found["chosen"][name] == best
        for entry in (entry for entry in found["runs"] if entry["name"] == name):
            recipe = entry["result"]["job"]["recipe"]
            assert recipe["trainer"]["learning_rate"] == float(best) and recipe["seed"] in (0, 1)
            assert entry["result"]["job"]["test"] == str(output / "data" / "test.jsonl")
            steps = [step for step, _ in entry["result"]["curve"]]
            assert steps == ([1, 2] if name == "a" else [7, 14])  # seven times as many for as many pairs
            assert entry["result"]["curve"][-1][1] == entry["result"]["scores"]["answer"]
    page = write_report(study, found, output, "muco study two").read_text()
    said = capsys.readouterr().err
    assert re.search(r"two: 13 trainings, about \d:\d\d:\d\d here; differences in 'answer' .* ± 35\.9 points", said)
    for word in ("Bonferroni", "± 5 points", "Chosen for each run", "Seconds to 1 % of 'answer'", "](curves.svg)"):
        assert word in page
    assert "nan" not in page
    assert run_study(study, output, seeds=2, jobs=2) == found


def test_eleven_lines_of_a_chart_look_different():
    drawn = chart("which?", {f"run {n}": [Mark(0, n, 1, (n,)), Mark(1, n)] for n in range(11)}, across="s", upwards="%")
    named = re.findall(r'<(circle|rect) fill="(#\w+)"[^>]*/><text[^>]*>run (\d+)<', drawn)
    assert [int(number) for _, _, number in named] == [*range(11)]
    assert len({(shape, ink) for shape, ink, _ in named}) == 11
    assert len({*re.findall(r'<polyline fill="none" (.*?) opacity', drawn)}) == 11


def test_what_an_interval_shows_depends_on_the_margin_and_on_how_many_hold_together(scenes):
    clear, near, wide = (Estimate(values) for values in ((10.0, 11.0, 12.0), (-0.1, 0.0, 0.1), (-30.0, 5.0, 40.0)))
    assert (clear.verdict(5), near.verdict(5), wide.verdict(5)) == ("more", "equal within the margin", "not shown")
    assert near.verdict() == "not shown" and Estimate((1.0,)).verdict(5) == "not shown"
    assert Estimate((-1.2, -1.1, -1.0)).verdict(5) == "less, within the margin"
    assert half_width(1.0, 3) == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    study = replace(tuned(scenes), compared=(("a", "b"),) * 5)
    assert study.level == pytest.approx(0.99) and replace(study, registered=()).level == 0.95
    found = known({"the start": [0.1] * 3, "a": [0.5, 0.6, 0.8], "b": [0.4, 0.4, 0.4]})
    together, alone = (differences(one, found)[0]["columns"] for one in (study, replace(study, registered=())))
    # t(0.995, 2 degrees of freedom) = 9.924843
    assert together["answer"].half_width / alone["answer"].half_width == pytest.approx(9.924843 / 4.302653, rel=1e-5)
    assert forecast(study, 1, 4, 60.0) == "two: 4 trainings, about 0:01:00 here"
    assert forecast(replace(study, compared=()), 8, 4, 60.0) == "two: 4 trainings, about 0:01:00 here"


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0, 100))
def test_what_is_read_off_a_curve_is_what_its_points_say(scores, reach):
    curve = [(10 * place, score) for place, score in enumerate(scores, start=1)]
    values = of_curve(curve)
    assert min(scores) - 1e-9 <= values["plateau"] <= max(scores) + 1e-9
    flat = of_curve([(step, 0.5) for step, _ in curve])
    assert flat == pytest.approx({"quarter": 0.5, "plateau": 0.5, "rise": 0.0})
    points = [(float(step), 100 * score) for step, score in curve]
    found = reached(points, reach)
    if max(score for _, score in points) < reach:
        assert math.isnan(found)
    else:
        first = next(place for place, (_, score) in enumerate(points) if score >= reach)
        assert points[max(0, first - 1)][0] <= found <= points[first][0]


def test_a_curve_that_rises_straight_is_read_where_it_is():
    assert of_curve([(10, 0.1), (20, 0.2), (40, 0.4)]) == pytest.approx({"quarter": 0.1, "plateau": 0.35, "rise": 0.1})
    assert reached([(10.0, 0.0), (20.0, 50.0), (30.0, 40.0)], 25.0) == 15.0
    assert reached([(10.0, 30.0)], 25.0) == 10.0 and math.isnan(reached([(10.0, 30.0)], 31.0))


def test_questions_of_one_kind_ask_for_every_object_and_one_empty_cell(tmp_path):
    write_scenes(tmp_path / "six", train=5, dev=0, test=0, seed=3, objects=(6,))
    for number, line in enumerate((tmp_path / "six" / "train.jsonl").read_text().splitlines()):
        row = json.loads(line)
        made = questions_of_one_kind(row, number)["turns"]
        answers = {turn["query"][0]: turn["target"] for turn in made}
        caption = row["turns"][-1]["target"].lower()
        assert len(answers) == 7 and {turn["kind"] for turn in made} == {"local"}
        for question, answer in answers.items():
            place = re.fullmatch(r"What is at (.+)\?", question)[1]
            there = re.search(rf"(\w+ \w+ \w+) at {place}(?=,| and )", caption)
            assert (
                answer
                == f"{there[1] if there else 'nothing'} on {caption.split(', on a ')[1].removesuffix(' background.')}"
            )
            assert place not in answer
        assert sum(answer.startswith("nothing on") for answer in answers.values()) == 1


# ── data of a user ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_data_of_a_user_take_the_place_of_the_scenes(scenes, tmp_path):
    sets = Sets("mine/train", "mine/test", "llava")
    values = filled({"train": [{"path": "{train}", "weight": 2.0}, {"path": "{data}/x.jsonl"}]}, tmp_path, sets)
    assert values["train"][0] == {"path": "mine/train", "weight": 2.0, "format": "llava"}
    assert values["train"][1] == {"path": str(tmp_path / "data" / "x.jsonl")}
    assert filled("{test}", tmp_path, sets) == "mine/test"
    assert filled("{test}", tmp_path) == str(tmp_path / "data" / "test.jsonl")
    assert [name for name, study in STUDIES.items() if study.needs_scenes] == [
        "compounding",
        "negatives",
        "signals",
        "finetune",
    ]
    assert {name: study.needs for name, study in STUDIES.items() if study.needs} == dict.fromkeys(
        ("turns", "compounding"), ("dev", "model")
    )
    assert filled(["{dev}", "{base}"], tmp_path, replace(sets, dev="d", model="m")) == ["d", "m"]


def test_data_that_cannot_be_studied_are_refused_before_anything_is_written(scenes, tmp_path):
    train, test = str(scenes / "train.jsonl"), str(scenes / "test.jsonl")
    with pytest.raises(MucoError, match="the study finetune is made of the scenes' structure; leave out --data"):
        run_study(find_study("finetune"), tmp_path / "out", sets=Sets(train, test))
    with pytest.raises(MucoError, match=r"missing\.jsonl: no such file"):
        run_study(find_study("order"), tmp_path / "out", sets=Sets(train, str(tmp_path / "missing.jsonl")))
    with pytest.raises(MucoError, match="unknown format 'jsnl'"):
        run_study(find_study("order"), tmp_path / "out", sets=Sets(train, test, "jsnl"))
    with pytest.raises(MucoError, match="the study turns needs --dev and --model beside --data and --test"):
        run_study(find_study("turns"), tmp_path / "out", sets=Sets(train, test))
    for more, said in (({"dev": test, "model": "starter"}, "--dev and --model"), ({"model": "starter"}, "--model")):
        with pytest.raises(MucoError, match=f"the study order makes no use of {said}; run it without"):
            run_study(find_study("order"), tmp_path / "out", sets=Sets(train, test, **more))
    whole = Sets(train, test, "llava", test, "starter")
    with pytest.raises(MucoError, match="the study turns scores while it trains, which takes JSONL"):
        run_study(find_study("turns"), tmp_path / "out", sets=whole)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_study_of_other_data_needs_no_scenes_and_no_captions(few, tmp_path, forked):
    def no_captions(name: str) -> str:
        rows = [json.loads(line) for line in (few / f"{name}.jsonl").read_text().splitlines()]
        rows = [
            row | {"image": str(few / row["image"]), "turns": [t for t in row["turns"] if t["kind"] != "retrieval"]}
            for row in rows
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / f"{name}.jsonl")

    base = {**two_runs(few).base, "data": {"train": [{"path": "{train}"}]}}
    columns = (
        Column("answer", ("answer",)),
        Column("caption", ("image_to_caption",)),
        Column("leak", ("leak/blank/turns",)),
    )
    study = replace(two_runs(few), base=base, runs=(Run("only"),), compared=(), columns=columns, probes=("leak",))
    sets = Sets(no_captions("train"), no_captions("test"))
    found = run_study(study, tmp_path / "out", seeds=1, jobs=2, sets=sets)
    assert not (tmp_path / "out" / "data").exists()
    page = write_report(study, found, tmp_path / "out", "muco study two").read_text()
    assert re.search(r"\| only \| \d+\.\d \| – \| \d+\.\d \| 2 \|", page) and f"of `{sets.train}`" in page
    with pytest.raises(OutputError, match="holds another study"):
        run_study(study, tmp_path / "out", seeds=1)


# ── probes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@st.composite
def dialogues(draw):
    """Query and target vectors of length 1, whose they are, and which targets are equal."""
    counts = draw(st.lists(st.integers(1, 4), min_size=2, max_size=6))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    ids = np.repeat(rng.permutation(100)[: len(counts)], counts)
    query, target = (
        vectors / np.linalg.norm(vectors, axis=1)[:, None] for vectors in rng.normal(size=(2, len(ids), 5))
    )
    return query, target, ids, rng.integers(0, 4, len(ids))


@settings(max_examples=40)
@given(dialogues(), st.booleans())
def test_turns_and_dialogues_found_equal_the_slow_way(batch, with_ids):
    query, target, ids, equal = batch
    hits = 0
    for i in range(len(ids)):
        rivals = [j for j in range(len(ids)) if ids[j] != ids[i] and not (with_ids and equal[i] == equal[j])]
        hits += all(query[i] @ target[i] > query[i] @ target[j] for j in rivals)
    assert turns_found(query, target, ids, equal if with_ids else None) == pytest.approx(hits / len(ids))
    samples, hits = list(dict.fromkeys(ids)), 0
    for a in samples:
        sums = {}
        for b in samples:
            pairs = zip(query[ids == a], target[ids == b], strict=False)  # the turns that both have
            sums[b] = sum(float(q @ t) for q, t in pairs)
        hits += all(sums[a] > value for b, value in sums.items() if b != a)
    assert dialogues_found(query, target, ids) == pytest.approx(hits / len(samples))


def test_an_order_of_kinds_is_seen_by_the_sum_of_a_dialogue_and_by_no_single_turn():
    kinds, ids = np.eye(7), np.repeat(np.arange(8), 7)
    orders = np.concatenate([np.roll(np.arange(7), shift) for shift in range(7)] + [np.arange(7)[::-1]])
    knows_the_kind = kinds[orders]
    assert dialogues_found(knows_the_kind, knows_the_kind, ids) == 1
    assert turns_found(knows_the_kind, knows_the_kind, ids) == 0  # eight equal targets: a tie is lost
    shared = kinds[np.tile(np.arange(7), 8)]
    assert dialogues_found(shared, shared, ids) == 0
    # vectors that know the whole order, as a compounded turn may, are found turn by turn
    leaking = np.eye(56)
    assert turns_found(leaking, leaking, ids) == dialogues_found(leaking, leaking, ids) == 1


@pytest.mark.parametrize("mode", ["isolated", "compounded"])
def test_the_leak_probe_looks_at_no_image_where_it_says_so(mode, scenes, tiny_model):
    rows = [open_data(scenes / "test.jsonl")[index] for index in range(12)]
    recipe = from_dict({"output": "x", "model": {"tiny": {}, "vision": "trained"}, "data": {"train": [{"path": "x"}]}})
    recipe = replace(recipe, turns=TurnsRecipe(mode=mode, limit=1))  # all turns are taken, whatever the training did
    views = leak(tiny_model, rows, recipe)
    assert [*views] == [
        f"leak/{view}/{what}" for view in ("sighted", "blank", "swapped") for what in ("turns", "dialogues")
    ]
    assert all(0 <= value <= 1 for value in views.values())
    other_images = [row.with_images(other.images) for row, other in zip(rows, [*rows[1:], rows[0]], strict=True)]
    others = leak(tiny_model, other_images, recipe)
    for what in ("turns", "dialogues"):
        assert others[f"leak/blank/{what}"] == views[f"leak/blank/{what}"]
        assert others[f"leak/sighted/{what}"] == views[f"leak/swapped/{what}"]
    assert leak(tiny_model, rows[:1], recipe) == {}
    assert leak(tiny_model, [row.with_images(()) for row in rows], recipe) == {}


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_bare_command_lists_the_studies(capsys):
    assert main(["study"]) == 0
    listed = capsys.readouterr().out
    assert all(f"{name} " in listed and question in listed for name, question in questions().items())
    assert main(["study", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == questions() and FLOPS in questions()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["turns"], 2, "--output"),
        (["turns", "-o", "{out}", "--data", "train.jsonl"], 2, "--data and --test go together"),
        (["turns", "-o", "{out}", "--dev", "dev.jsonl"], 2, "--dev and --model go with --data"),
        (["nothing", "-o", "{out}"], 1, "unknown study 'nothing'"),
        (["flops", "-o", "{out}", "--scale", "0.5"], 1, "counts and trains nothing"),
        (["flops", "-o", "{out}", "--seeds", "3"], 1, "counts and trains nothing"),
    ],
)
def test_mistakes_on_the_command_line(arguments, code, says, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["study", *(word.replace("{out}", str(out)) for word in arguments)]) == code
    page, mistake = capsys.readouterr()
    assert says in mistake and not page and not out.exists()


# ── operations of the true sizes ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_the_study_of_operations_keeps_what_it_counted(tmp_path):
    some = {"forward only": ASSUMPTIONS["forward only"]}
    found = run_flops(tmp_path / "out", "muco study flops", sizes=("2B",), assumptions=some)
    counts = found["flops"]["2B"]["forward only"]
    assert counts["7"]["total"] > counts["4"]["total"] > counts["1"]["total"] == 1024 * (counts["1"]["total"] // 1024)
    assert 8.1e15 < counts["1"]["total"] < 8.3e15  # as benchmarks/results/true-sizes.md
    written = (tmp_path / "out" / "study.json").read_text()
    edited = json.loads(written)
    edited["flops"]["2B"]["forward only"]["1"]["total"] = 5 * 10**15
    (tmp_path / "out" / "study.json").write_text(json.dumps(edited))
    again = run_flops(tmp_path / "out", "muco study flops", sizes=("2B",), assumptions=some)
    assert again["flops"]["2B"]["forward only"]["1"]["total"] == 5 * 10**15  # read, not counted again
    page = (tmp_path / "out" / "README.md").read_text()
    assert "| the paper, as published | 17.5 |" in page and "| forward only | 5.00 |" in page
    assert "the paper" in (tmp_path / "out" / "plot.svg").read_text()


def test_how_many_tokens_the_published_increment_has_room_for():
    counts = {run: {"total": total} for run, total in (("1", 10 * 10**15), ("7", 13 * 10**15))}
    # 50 tokens per turn add 3.0, so 0.5 has room for a sixth of them
    assert tokens_per_turn(counts, 50, {"1": 17.5, "7": 18.0}) == pytest.approx(50 / 6)


# ── whole studies ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_a_study_goes_on_with_what_is_missing_and_grows_by_seeds(few, tmp_path, forked):
    study, output = two_runs(few), tmp_path / "out"
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
def test_a_run_that_fails_stops_the_study_with_its_last_words(few, tmp_path, forked):
    study = two_runs(few)
    study = replace(study, runs=(Run("broken"),), compared=(), probes=("no such probe",))
    with pytest.raises(MucoError, match=r"(?s)broken-seed0 failed \(exit code 1\).*no such probe"):
        run_study(study, tmp_path / "out", seeds=1)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_the_command_can_be_interrupted_and_leaves_no_training_behind(number, code, tmp_path):
    command = [sys.executable, "-m", "muco", "study", "finetune", "--output", str(tmp_path / "out"), "--scale", "0.01"]
    running = processes.Popen(command, stdout=processes.PIPE, stderr=processes.PIPE)
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("out/**/job.json")):  # the first training measures how long a step takes
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.1)
    running.send_signal(number)
    out, _ = running.communicate(timeout=300)
    assert running.returncode == code and not out
    while [one for one in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(one.info["cmdline"] or [])]:
        assert time.monotonic() < deadline, "a training outlives the command"
        time.sleep(0.1)
    assert json.loads((tmp_path / "out" / "study.json").read_text())["asked"]["study"] == "finetune"
