"""``muco evaluate mteb``: real task classes of the package, some with the data of real tasks in folders; no network."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path

import numpy as np
import pytest

mteb = pytest.importorskip("mteb", reason="mteb is one of the dev packages")
import datasets  # noqa: E402
import mteb_tasks as made  # noqa: E402
import torch  # noqa: E402
from mteb.benchmarks.benchmark import Benchmark, MIEBBenchmark, VidoreBenchmark  # noqa: E402
from scipy.stats import spearmanr  # noqa: E402

import muco  # noqa: E402
from muco.cli import main  # noqa: E402
from muco.errors import DataError, MucoError  # noqa: E402
from muco.evaluate.metrics import ndcg_at  # noqa: E402
from muco.evaluate.mteb_run import evaluate_mteb, named_tasks  # noqa: E402
from muco.model import Model  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of the package and what it imports


@pytest.fixture
def benchmarks() -> None:
    """Makes mteb's benchmarks in a thread: their 2,000 tasks set seeds, and torch notes the stack, which is short."""
    thread = threading.Thread(target=mteb.get_benchmarks)
    thread.start()
    thread.join()


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """The number of contents of every call of the model."""
    calls: list[int] = []
    encode = Model.encode

    def counting(self, inputs, **how):
        calls.append(len(inputs) if isinstance(inputs, list) else 1)
        return encode(self, inputs, **how)

    monkeypatch.setattr(Model, "encode", counting)
    return calls


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A working directory in which folders take the place of data sets of the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return tmp_path


def files(output: Path, name: str) -> list[Path]:
    return sorted((output / "results").rglob(f"{name}.json"))


def one_by_one(model: Model, contents: list, dimension: int | None = None) -> np.ndarray:
    return np.stack([model.encode(content, truncate_dim=dimension) for content in contents])


def ndcg(model: Model, language: str, prompt: str = f"{made.PROMPT} ", dimension: int | None = None) -> float:
    """nDCG@5 of the pages, by the vectors of single calls and our own metric."""
    queries = one_by_one(model, [prompt + text for text in made.queries_of(language)], dimension)
    pages = one_by_one(model, [made.drawn(n) for n in range(6)], dimension)
    found = np.argsort(-(queries @ pages.T), axis=1).tolist()
    return float(np.mean([ndcg_at([f"d{n}" for n in row], made.grades_of(q), 5) for q, row in enumerate(found)]))


def test_scores_are_those_of_single_vectors_and_nothing_is_encoded_twice(tiny_model, tmp_path, encoded):
    tasks = [made.pages_task(), made.pairs_task()]
    found = evaluate_mteb(tiny_model, tasks, tmp_path, batch_size=4, command="muco evaluate mteb", model_path="m")
    pages, pairs = found["tasks"]["TestPages"], found["tasks"]["TestPairs"]
    assert sum(encoded) == 6 + 2 * 4 + 12, "the pages of the second language are those of the first"

    expected = {language: ndcg(tiny_model, language) for language in made.LANGUAGES}
    assert pages["parts"]["test"] == pytest.approx(expected, abs=1e-5)
    assert pages["score"] == pytest.approx(np.mean(list(expected.values())), abs=1e-5) and 0 < pages["score"] < 1
    rows = made.pairs()
    sides = [one_by_one(tiny_model, list(rows[name])) for name in ("sentence1", "sentence2")]
    likeness = (sides[0] * sides[1]).sum(1)
    assert pairs["score"] == pytest.approx(spearmanr(likeness, made.STS_SCORES)[0], abs=1e-5)
    assert found["overall"] == pytest.approx((pages["score"] + pairs["score"]) / 2)
    assert (pages["metric"], pairs["metric"]) == ("ndcg_at_5", "cosine_spearman")

    assert json.loads((tmp_path / "mteb.json").read_text()) == json.loads(json.dumps(found))
    assert found["model"]["fingerprint"] == tiny_model.fingerprint and found["command"] == "muco evaluate mteb"
    assert found["versions"]["mteb"] and pages["data"] == "1" and not pages["reused"]
    encoded.clear()
    again = evaluate_mteb(tiny_model, tasks, tmp_path, model_path="m")
    assert not encoded and all(task["reused"] for task in again["tasks"].values())
    assert again["overall"] == pytest.approx(found["overall"], abs=1e-6)
    french = made.pages_task().filter_languages(languages=None, hf_subsets=["french"])
    one = evaluate_mteb(tiny_model, [french], tmp_path, model_path="m")
    assert one["overall"] == pytest.approx(expected["french"], abs=1e-5) and not encoded


def test_that_a_model_was_not_trained_for_vectors_is_among_the_warnings(tiny_path, tmp_path):
    model = muco.load(tiny_path, device="cpu")
    model.encoder.muco_processor.trained_for_vectors = False  # as of a plain checkpoint
    found = evaluate_mteb(model, [made.pairs_task()], tmp_path)
    assert model.caveat and found["warnings"][0] == model.caveat


def test_a_result_belongs_to_weights_prompt_pixels_and_settings(tiny_model, tiny_path, tmp_path, encoded):
    def score(model: Model, **how: object) -> float:
        encoded.clear()
        result = evaluate_mteb(model, [made.pages_task(eval_langs=["eng-Latn"])], tmp_path, model_path="m", **how)
        assert encoded, "scored anew"
        return result["overall"]

    score(tiny_model)
    cut = score(tiny_model, dimension=16)
    bare = score(tiny_model, instructions=False)
    assert cut == pytest.approx(ndcg(tiny_model, "default", dimension=16), abs=1e-5)
    assert bare == pytest.approx(ndcg(tiny_model, "default", prompt=""), abs=1e-5)
    changed = muco.load(tiny_path, device="cpu")
    changed.encoder.muco_processor.set_pixels(784, 784 * 2)
    score(changed)
    changed.encoder.muco_processor.set_pixels(*changed.encoder.muco_processor.trained_pixels)
    with torch.no_grad():
        next(changed.parameters()).add_(0.01)
    score(changed)
    found = [path.parent.relative_to(tmp_path / "results").as_posix() for path in files(tmp_path, "TestPages")]
    assert (
        len(found) == 5
        and len({path.split("/")[1] for path in found}) == 3
        and len({p.split("/")[0] for p in found}) == 1
    )
    assert {path.split("/")[-1] for path in found} == {
        "instructions_True",
        "instructions_False",
        "embed_dim_16__instructions_True",
        "instructions_True__pixels_784-1568",
    }
    with pytest.raises(MucoError, match="64 dimensions cannot be shortened to 65"):
        score(tiny_model, dimension=65)


def test_results_of_other_data_or_another_main_version_are_not_used(tiny_model, tmp_path, encoded, caplog):
    def score(task) -> dict:
        encoded.clear()
        caplog.clear()
        with caplog.at_level(logging.WARNING, "muco"):
            return evaluate_mteb(tiny_model, [task], tmp_path)["tasks"]["TestPages"]

    score(made.pages_task("1", eval_langs={"english": ["eng-Latn"]}))
    assert not score(made.pages_task("1"))["reused"] and sum(encoded) == 4 + 6, "the other language is added"
    (path,) = files(tmp_path, "TestPages")
    assert score(made.pages_task("2"))["data"] == "2" and encoded
    assert str(path) in caplog.text and "is of data revision 1, now 2; the task is scored again" in caplog.text
    assert score(made.pages_task("2"))["reused"] and not encoded and not caplog.text

    plain = path.read_text()
    path.write_text(plain.replace('"mteb_version": "2.', '"mteb_version": "1.'))
    assert not score(made.pages_task("2"))["reused"] and encoded and "was scored by mteb 1." in caplog.text
    version = json.loads(plain)["mteb_version"]
    path.write_text(plain.replace(f'"mteb_version": "{version}"', '"mteb_version": "2.26.0"'))
    found = evaluate_mteb(tiny_model, [made.pages_task("2")], tmp_path)
    assert found["tasks"]["TestPages"]["reused"] and found["tasks"]["TestPages"]["mteb"] == ("2.26.0",)
    assert version == "2.26.0" or "another version of mteb" in found["warnings"][0]
    path.write_text(plain[:100])
    assert not score(made.pages_task("2"))["reused"] and "is damaged" in caplog.text


def test_a_task_made_of_others_is_scored_by_their_files(tiny_model, tmp_path, encoded):
    parts = [made.pairs_task("TestPairsA"), made.pairs_task("TestPairsB")]
    one = evaluate_mteb(tiny_model, [parts[0]], tmp_path)["overall"]
    encoded.clear()
    both = made.joined_task("TestBoth", parts)
    found = evaluate_mteb(tiny_model, [both], tmp_path)
    assert found["overall"] == pytest.approx(one, abs=1e-6) and sum(encoded) == 12 and files(tmp_path, "TestBoth")
    assert evaluate_mteb(tiny_model, [both], tmp_path)["tasks"]["TestBoth"]["reused"]

    alike = {"eval_langs": {"english": ["eng-Latn"], "french": ["eng-Latn"]}}  # as en-ar and en-de of VisualSTS17
    whole = evaluate_mteb(tiny_model, [made.pages_task(**alike)], tmp_path)["tasks"]["TestPages"]["parts"]["test"]
    french = made.pages_task(**alike).filter_languages(languages=None, hf_subsets=["french"])
    found = evaluate_mteb(tiny_model, [made.joined_task("TestFrench", [french])], tmp_path)
    assert found["overall"] == pytest.approx(whole["french"], abs=1e-5) != pytest.approx(whole["english"], abs=1e-5)


@pytest.mark.slow
def test_vidore_2_from_the_command_line(benchmarks, hub, tiny_path, tiny_model, capfd):
    for task in mteb.get_benchmark("ViDoRe(v2)").tasks:
        languages = task.hf_subsets if len(task.hf_subsets) > 1 else ["english"]
        made.write_vidore2(hub / task.metadata.dataset["path"], languages)
    wanted = ["evaluate", "mteb", "-m", str(tiny_path), "-b", "ViDoRe(v2)", "-o", "out", "--device", "cpu"]
    assert main([*wanted, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    prompt = "Find a screenshot that relevant to the user's question. "
    expected = {one: ndcg(tiny_model, one, prompt) for one in ("french", "spanish", "english", "german")}
    esg = found["tasks"]["Vidore2ESGReportsRetrieval"]
    assert esg["parts"]["test"] == pytest.approx(expected, abs=1e-5)
    assert found["tasks"]["Vidore2ESGReportsHLRetrieval"]["score"] == pytest.approx(expected["english"], abs=1e-5)
    scores = [task["score"] for task in found["tasks"].values()]
    assert len(scores) == 4 and found["overall"] == found["groups"]["Mean(Task)"] == pytest.approx(np.mean(scores))
    assert found["command"].startswith("muco evaluate mteb") and found["model"]["name"] == f"muco/{tiny_path.name}"
    assert all("is read in place of the hub" in line for line in found["warnings"])
    assert main(wanted) == 0
    said = capfd.readouterr().out
    assert (
        "ViDoRe(v2), %" in said and "4 of 4 tasks were found done" in said and f"{100 * found['overall']:.1f}" in said
    )


def test_means_are_those_of_the_benchmark(hub, tiny_model):
    vidore, sts = mteb.get_task("Vidore2ESGReportsHLRetrieval"), mteb.get_task("STS12VisualSTS")
    others = [mteb.get_task("STS13VisualSTS")]
    made.write_vidore2(hub / vidore.metadata.dataset["path"], ["english"])
    for task in (sts, *others):
        made.write_hub_folder(hub / task.metadata.dataset["path"], {"default": made.pairs()})
    found = evaluate_mteb(tiny_model, MIEBBenchmark("MIEB(tiny)", [vidore, sts, *others]), hub / "out")
    pages, likeness = (found["tasks"][task.metadata.name]["score"] for task in (vidore, sts))
    assert found["benchmark"] == "MIEB(tiny)"
    assert found["overall"] == found["groups"]["Mean(TaskType)"] == pytest.approx((pages + likeness) / 2)
    assert found["groups"]["VisualSTS(eng)"] == pytest.approx(likeness)

    english = {"hf_subsets": ["english"]}
    public, private = (
        mteb.get_task("Vidore3HrRetrieval", **english),
        mteb.get_task("Vidore3NuclearRetrieval", **english),
    )
    made.write_vidore3(hub / public.metadata.dataset["path"], "english")
    found = evaluate_mteb(tiny_model, VidoreBenchmark("ViDoRe(tiny)", [public, private]), hub / "out")
    assert found["missing"] == ["Vidore3NuclearRetrieval"] and found["overall"] is None
    assert found["groups"] == {"Mean(Public)": found["tasks"]["Vidore3HrRetrieval"]["score"], "Mean(Private)": None}
    assert any(line.startswith("Vidore3NuclearRetrieval: skipped, its data (private)") for line in found["warnings"])
    assert found["tasks"]["Vidore3HrRetrieval"]["metric"] == "ndcg_at_10"


def test_what_cannot_be_scored_is_named(hub, tiny_model):
    with pytest.raises(MucoError, match="no task 'VidoreDocVQARetrival'; did you mean 'VidoreDocVQARetrieval'"):
        named_tasks(None, ["VidoreDocVQARetrival"])
    for both in ((None, []), ("ViDoRe(v2)", ["CIFAR10"])):
        with pytest.raises(MucoError, match="name one benchmark of mteb, or one or more of its tasks, and not both"):
            named_tasks(*both)
    (task,) = named_tasks(None, ["VidoreShiftProjectRetrieval", "VidoreShiftProjectRetrieval"])
    with pytest.raises(DataError, match="VidoreShiftProjectRetrieval: its data cannot be loaded from 'mteb/shiftproj"):
        evaluate_mteb(tiny_model, [task], hub / "out")
    found = evaluate_mteb(tiny_model, [task], hub / "out", allow_missing=True)
    assert found["missing"] == ["VidoreShiftProjectRetrieval"] and found["overall"] is None and not found["tasks"]
    heard = made.pages_task(modalities=["text", "audio"], category="t2a")
    with pytest.raises(DataError, match="TestPages: needs audio; the model reads text and images"):
        evaluate_mteb(tiny_model, [heard], hub / "out")
    lacking = made.pages_task(category="t2it", eval_langs=["eng-Latn"])
    with pytest.raises(
        DataError, match="TestPages, test, default: the column 'text' of the corpus is missing; there are id, image"
    ):
        evaluate_mteb(tiny_model, [lacking], hub / "out")
    lacking.load_data()
    split = lacking.dataset["default"]["test"]
    split["corpus"] = split["corpus"].add_column("text", ["a", None, "c", "d", "e", "f"])
    with pytest.raises(DataError, match="row 1 of the corpus has nothing in its column 'text'; repair"):
        evaluate_mteb(tiny_model, [lacking], hub / "out")
    with pytest.raises(MucoError, match="mine: mteb.get_task does not know its task 'TestPages'"):
        evaluate_mteb(tiny_model, Benchmark("mine", [made.pages_task()]), hub / "out")
    with pytest.raises(MucoError, match="name at least one task"):
        evaluate_mteb(tiny_model, [], hub / "out")
