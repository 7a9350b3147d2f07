"""The benchmarks run, and the plain way they compare with is the library's own."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import processes
import pytest
import torch

from muco.info_nce import multi_turn_info_nce

ROOT = Path(__file__).parents[1]


KEEPER = """#!/usr/bin/env bash
printf '%s\\n' "$(printf '%s\\t' "$@")" >> "$KEPT"
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Every part of steps.py, as a toy, by the commands of the whole GPU run, and padding."""
    folder, keeper = tmp_path_factory.mktemp("results"), tmp_path_factory.mktemp("keeper") / "python"
    keeper.write_text(KEEPER)
    keeper.chmod(0o755)
    kept = keeper.with_name("commands")
    environment = os.environ | {"PYTHON": str(keeper), "KEPT": str(kept), "DEVICE": "cpu"}
    environment |= {"EXTRA": "--quick --threads 1"}
    subprocess.run(["bash", "benchmarks/gpu.sh", folder], cwd=ROOT, env=environment, check=True, capture_output=True)
    commands = [line.strip("\t").split("\t") for line in kept.read_text().splitlines()]
    commands.append(["benchmarks/steps.py", "--parts", "padding", "--output", str(folder), "--quick"])  # on no device
    for command in commands:
        processes.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
    return {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")} | {"folder": folder}


@pytest.mark.slow
def test_every_part_writes_its_result(results):
    parts = {"baseline-cpu", "cache-cpu", "memory-cpu", "loader-cpu", "padding", "utilisation-cpu"}
    assert {file.stem for file in results["folder"].glob("*.md")} == parts == {*results} - {"folder"}
    for part in parts:
        assert results[part]["command"].startswith("python benchmarks/steps.py") and results[part]["machine"]["torch"]
        assert not results[part].get("failed")
        assert (results["folder"] / f"{part}.md").read_text().count("\n| ") > 2


@pytest.mark.slow
def test_what_the_parts_measure(results):
    baseline = {(row["turns"], row["name"]): row for row in results["baseline-cpu"]["summary"]}
    for turns in (1, 7):
        fastest = baseline[turns, baseline[turns, "library, mini-batch 2"]["fastest"]]
        assert fastest["speed"] == fastest["peak_ratio"] == fastest["step_ratio"] == 1
    by_tokens, ours = baseline[7, "library, 100 tokens"], baseline[7, "MuCo isolated, chunks of 1"]
    library = baseline[7, "library, mini-batch 2"]
    assert by_tokens["images_seen"] == library["images_seen"]
    assert library["images_seen"] == 2 * 7 * ours["images_seen"] == 2 * 7 * 2  # two passes over seven pairs each
    assert ours["operations"] < library["operations"] and ours["peak"] > ours["resting"] > 0
    plain, cached = results["cache-cpu"]["cells"][:2]
    assert plain["ratio"] == 1 and cached["chunks"] > plain["chunks"] == 2
    assert plain["images_seen"] == cached["images_seen"] == 2 and plain["operations"] < cached["operations"]
    memory = results["memory-cpu"]["cells"]
    assert [cell["parts"] for cell in memory] == [1, 2, 4, 8] and memory[0]["ratio_aside"] == 1
    assert memory[3]["features"] == 8 * memory[0]["features"] == 8 * 2 * 9 * 64 * 4  # images, visual tokens, width
    assert [cell["workers"] for cell in results["loader-cpu"]["cells"]] == [0, 1]
    assert all(0 < row["padding"] <= row["worst"] < 0.5 for row in results["padding"]["cells"])
    profiled = next(iter(results["utilisation-cpu"]["kernels"].values()))
    assert profiled["top"][0]["seconds"] > 0 and sum(profiled["kinds"].values()) == pytest.approx(1)


def script(name: str):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return import_module(name)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def make_bench(**changes):
    turns = script("turns")
    settings = turns.settings_of(turns.parse(["--quick", "--output", "unused"]))
    return turns.Bench(replace(settings, images=3, turns=(7,), threads=torch.get_num_threads(), **changes))


@pytest.fixture(scope="module", params=[0, 4], ids=["all weights", "lora"])
def bench(request):
    return make_bench(lora=request.param)


@pytest.mark.parametrize("mini_batch", [1, 2, 8])
def test_the_plain_way_equals_ours_at_one_turn(bench, mini_batch):
    """Same vectors, same loss, same gradient, through the library's own cutting of the batch."""
    batch = bench.on_device(bench.collate("isolated", 1))
    query, target = (bench.model.embed(batch[side]) for side in ("query", "target"))
    step = script("stock").StockStep(bench, 1, mini_batch)
    for side, ours in zip(step.features, (query, target), strict=True):
        torch.testing.assert_close(step.loss.model(dict(side))["sentence_embedding"], ours, atol=1e-6, rtol=0)
    bench.optimizer.zero_grad()
    value = multi_turn_info_nce(query, target, torch.arange(3), temperature=bench.loss.temperature)
    value.backward()
    expected = {name: p.grad for name, p in bench.model.named_parameters() if p.grad is not None}
    bench.optimizer.zero_grad()
    torch.testing.assert_close(step(), value.detach(), atol=1e-5, rtol=0)
    found = {name: p.grad for name, p in bench.model.named_parameters() if p.grad is not None}
    bench.optimizer.zero_grad()
    assert found.keys() == expected.keys() and any(grad.abs().max() > 1e-4 for grad in expected.values())
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, atol=1e-4 * float(grad.abs().max()), rtol=1e-3)


def test_the_plain_way_has_the_pairs_of_all_turns(bench):
    """Isolated turns in one pass and the library's single-turn pairs are the same vectors, in the same order."""
    batch = bench.on_device(bench.collate("isolated", 7))
    step = script("stock").StockStep(bench, 7, 4)
    for side, name in zip(step.features, ("query", "target"), strict=True):
        pairs = step.loss.model(dict(side))["sentence_embedding"]
        assert len(pairs) == 21
        torch.testing.assert_close(pairs, bench.model.embed(batch[name]), atol=1e-5, rtol=0)


def test_both_ways_train_adapters_on_bfloat16_weights_under_autocast():
    """The precision of the GPU run: frozen weights in bfloat16, adapters and vectors in float32."""
    cells = script("cells")
    bench = make_bench(lora=4, weights="bfloat16", dtype="bfloat16")
    losses = []
    for cell in (cells.Cell(rows=1), cells.Cell(rows=1, checkpointing=True), cells.Cell(library=True, mini_batch=2)):
        cells.configure(bench, cell)
        losses.append(float(cells.make_step(bench, cell, 1)()))
        trained = [p for p in bench.model.parameters() if p.requires_grad]
        assert all(p.grad is not None for p in trained) and any(p.grad.any() for p in trained)
        assert {p.dtype for p in trained if p.ndim == 2 and min(p.shape) == 4} == {torch.float32}
        bench.optimizer.zero_grad()
    assert {p.dtype for p in bench.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert losses[1] == pytest.approx(losses[0], abs=1e-3) and losses[2] == pytest.approx(losses[0], abs=0.5)


def test_a_cell_attends_as_it_says_and_only_its_language_model():
    cells = script("cells")
    bench = make_bench(lora=4)
    tower = bench.backbone.config.vision_config._attn_implementation
    for attention in ("flex", "sdpa"):
        cells.configure(bench, cells.Cell(attention=attention))
        assert bench.model.encoder.uses_flex_attention == (attention == "flex")
        assert bench.backbone.config.vision_config._attn_implementation == tower


def test_a_cell_that_fails_leaves_the_others(monkeypatch):
    """One that fails before the rounds, and one within them."""
    cells = script("cells")
    bench, never, later, whole = make_bench(), cells.Cell(attention="none such"), cells.Cell(rows=1), cells.Cell()

    class OutOfMemory(cells.OurStep):
        calls = 0

        def __call__(self):
            self.calls += 1
            if self.cell is later and self.calls == 3:  # the first is not counted
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().__call__()

    monkeypatch.setattr(cells, "make_step", OutOfMemory)
    found = {cell["name"]: cell for cell in cells.measure(bench, [never, later, whole], 1, 2, count=False)}
    assert len(found[whole.name]["seconds"]) == 2 and "failed" not in found[whole.name]
    assert "none such" in found[never.name]["failed"] and "out of memory" in found[later.name]["failed"]
    assert all(parameter.grad is None for parameter in bench.model.parameters())


def test_a_part_that_fails_leaves_the_others(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    spec = spec_from_file_location("steps_of_benchmarks", ROOT / "benchmarks" / "steps.py")
    steps, done = module_from_spec(spec), []
    spec.loader.exec_module(steps)
    steps.PARTS |= {"cache": lambda args, argv: 1 / 0, "memory": lambda args, argv: done.append("memory")}
    with pytest.raises(SystemExit, match="failed: cache"):
        steps.main(["--parts", "cache", "memory", "--quick", "--output", "unused"])
    assert done == ["memory"] and "ZeroDivisionError" in capsys.readouterr().err


def test_a_cell_that_cannot_be_measured_says_why():
    """A halved token budget would be another measurement, so it does not pass for the one that was asked for."""
    cells = script("cells")
    bench = make_bench()
    step = cells.make_step(bench, cells.Cell(rows=1), 7)
    step.step.token_budget -= 1  # as if memory had run out
    with pytest.raises(torch.OutOfMemoryError, match="another measurement"):
        step()


def test_the_floor_of_order_is_what_a_simulation_gives(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    claims = import_module("claims")
    kinds, images, rng = ("a", "b", "b"), 5, np.random.default_rng(0)
    losses = []
    for _ in range(4000):
        orders = ["".join(rng.permutation(kinds)) for _ in range(images)]
        losses += [
            math.log(sum(order[:turns] == own[:turns] for order in orders))
            for own in orders
            for turns in range(1, len(kinds) + 1)
        ]
    assert claims.floor_of_order(images, kinds) == pytest.approx(np.mean(losses), abs=0.01)
