"""MMEB-V2: all 78 sets of the published layout, metrics that no trick passes, means, pools, and what is missing."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import mmeb_v2_tree as made
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from processes import finished, launch

from muco.data import mmeb_video
from muco.data.mmeb_v2_sets import BY_NAME, METAS
from muco.dialogue import Content
from muco.errors import DataError, MucoError
from muco.evaluate.mmeb_task import sample
from muco.evaluate.mmeb_v2 import NAMES, aggregates, evaluate_mmeb_v2

Json = dict[str, Any]


@pytest.fixture(scope="session")
def tree(tmp_path_factory) -> made.Tree:
    return made.write_tree(tmp_path_factory.mktemp("mmeb_v2"))


@pytest.fixture
def copied(tree, tmp_path) -> Path:
    """A copy of the tree's rows that a test may change; frames and pages are linked."""
    root = tmp_path / "data"
    for folder in ("video-tasks", "visdoc-tasks"):
        shutil.copytree(tree.root / folder, root / folder, copy_function=lambda old, new: Path(new).symlink_to(old))
    for file in [*root.rglob("*.parquet")]:
        old = file.resolve()
        file.unlink()
        shutil.copy(old, file)
    return root


def edit(root: Path, folder: str, change: Any) -> Path:
    """Lets ``change`` alter the list of rows of the one Parquet file in a folder."""
    (file,) = (root / folder).glob("*.parquet")
    rows = pq.read_table(file).to_pylist()
    rows = change(rows) or rows
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file


def task(model: Any, root: Path, output: Path, name: str, **how: Any) -> Json:
    return evaluate_mmeb_v2(model, root, output, tasks=[name], **how)["tasks"][name]


def outcomes(output: Path, name: str) -> list[Json]:
    lines = (output / "outcomes" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value, allow_nan=False))


# ---------------------------------------------------------------- the 78


def test_an_oracle_is_perfect_in_all_78_sets_and_in_every_mean(tree, tmp_path):
    assert list(NAMES) == made.ALL and len(NAMES) == 78
    assert {meta: len(names) for meta, names in METAS.items()} == {
        "classification": 10,
        "vqa": 10,
        "retrieval": 12,
        "grounding": 4,
        "V-CLS": 5,
        "V-QA": 5,
        "V-RET": 5,
        "V-MR": 3,
        "ViDoRe-V1": 10,
        "ViDoRe-V2": 4,
        "VisRAG": 6,
        "OOD": 4,
    }
    model = made.Oracle(tree.rows)
    result = evaluate_mmeb_v2(model, tree.root, tmp_path)
    assert list(result["tasks"]) == made.ALL
    assert not {name: t["score"] for name, t in result["tasks"].items() if t["score"] != pytest.approx(1)}
    assert result["overall"] == pytest.approx(1) and len(result["groups"]) == 15
    assert all(score == pytest.approx(1) for score in result["groups"].values())
    assert {t["metric"] for n, t in result["tasks"].items() if n in made.VISDOC} == {"ndcg@5"}
    assert {t["metric"] for n, t in result["tasks"].items() if n not in made.VISDOC} == {"hit@1"}
    local = {n for n in made.VIDEO if result["tasks"][n]["facts"]["pool"] == "local"}
    qa = {"MVBench", "Video-MME", "NExTQA", "EgoSchema", "ActivityNetQA"}
    assert local == {"SmthSmthV2", *qa, "QVHighlight", "Charades-STA", "MomentSeeker"}
    for name in (*made.VIDEO, *made.VISDOC):
        assert result["tasks"][name]["facts"]["prompts"] == "vlm2vec"
        assert result["tasks"][name]["queries"] == len(tree.rows[name])
        said = (
            f"{name}: the data has {len(tree.rows[name])} queries; the published data set has {BY_NAME[name].queries}"
        )
        assert said in result["warnings"]
    assert result["settings"]["frames"] == 8 and result["tasks"]["K700"]["facts"]["frames"] == 8
    page = (tmp_path / "mmeb_v2.html").read_text()
    assert "MMEB-V2" in page and "vlm2vec: instructions in front of the text; 8 frames a video" in page
    seen = model.seen
    again = evaluate_mmeb_v2(model, tree.root, tmp_path)
    assert model.seen == seen, "a second run finds everything done"
    assert plain(again["tasks"]) == plain(result["tasks"])


def test_the_other_folders_and_json_lines_are_read_alike(tmp_path):
    other = made.write_tree(tmp_path / "data", "qwen", images=False)
    kinds = ["visdoc", "video"]
    result = evaluate_mmeb_v2(made.Oracle(other.rows), other.root, tmp_path / "out", only=kinds, official=True)
    assert list(result["tasks"]) == [*made.VIDEO, *made.VISDOC]
    graded = {name: t["score"] for name, t in result["tasks"].items() if t["score"] != pytest.approx(1)}
    assert set(graded) <= set(made.GRADED), "only grades may land elsewhere by the official rule"
    assert result["overall"] is None and result["groups"]["image"] is None
    assert result["groups"]["video"] == pytest.approx(1)
    assert "one of the orders that the official code may give" in result["settings"]["rules"]["official, visdoc"]


def test_a_collapsed_model_scores_nothing_anywhere(tree, tmp_path):
    result = evaluate_mmeb_v2(made.Collapsed(), tree.root, tmp_path)
    assert {t["score"] for t in result["tasks"].values()} == {0.0} and result["overall"] == 0.0
    assert set(result["groups"].values()) == {0.0}
    for name in NAMES:
        assert any(line.startswith(f"{name}: ") and "collapsed" in line for line in result["warnings"]), name


def test_means_are_plain_over_data_sets():
    published = {"image": 80.12, "video": 67.15, "visdoc": 82.36}
    scores = dict.fromkeys(NAMES[:36], published["image"])
    scores |= dict.fromkeys(NAMES[36:54], published["video"]) | dict.fromkeys(NAMES[54:], published["visdoc"])
    groups, overall = aggregates(scores)
    assert round(overall, 1) == 77.8 != round(sum(published.values()) / 3, 1)
    assert {name: groups[name] for name in published} == pytest.approx(published)
    del scores["MSVD"]
    groups, overall = aggregates(scores)
    assert overall is None and groups["video"] is None and groups["V-RET"] is None and groups["V-MR"] is not None


# ---------------------------------------------------------------- nDCG, ties and pools


def reference(vectors: dict[str, np.ndarray], query: np.ndarray, grades: dict[str, int], gain: Any) -> float:
    """nDCG@5 word for word: every order of all pages is tried for the best one."""
    order = sorted(
        vectors, key=lambda page: (-float(np.float32(vectors[page].astype(float) @ query.astype(float))), page)
    )

    def total(pages: Any) -> float:
        return sum(gain(grades.get(page, 0)) / math.log2(rank + 2) for rank, page in enumerate(pages[:5]))

    return total(order) / max(total(pages) for pages in itertools.permutations(vectors, 5))


@pytest.mark.parametrize("official", [False, True])
def test_ndcg_is_that_of_a_slow_reference(copied, tmp_path, official):
    name, base = "MMLongBench-doc", "visdoc-tasks/MMLongBench-doc"
    ids = [f"{name}-{number}" for number in range(7)]
    graded = {"q0": {ids[4]: 3, ids[1]: 1, ids[6]: 2}, "q1": {ids[2]: 1, ids[0]: 5}, "q2": {ids[3]: 2}}
    judged = [(query, page, grade) for query, own in graded.items() for page, grade in own.items()]
    columns = ("query-id", "corpus-id", "score")
    edit(copied, f"{base}/qrels", lambda _: [dict(zip(columns, row, strict=True)) for row in judged])
    if official:  # the grades of q0 in their order, given to pages 1, 4 and 6
        graded = {"q0": {ids[1]: 3, ids[4]: 1, ids[6]: 2}, "q1": {ids[0]: 1, ids[2]: 5}, "q2": {ids[3]: 2}}
    found = task(made.Own(), copied, tmp_path / "out", name, official=official)
    own = made.Own()
    pages = [Content(made.OF_PAGE, (copied / "visdoc-tasks" / name / f"{id}.png",)) for id in ids]
    vectors = dict(zip(ids, own.encode(pages, batch_size=1), strict=True))
    queries = own.encode([Content(f"{made.PAGE} what of {name} {i}") for i in range(3)], batch_size=1)
    for metric, gain in (("ndcg@5", lambda grade: grade), ("ndcg_exp@5", lambda grade: 2**grade - 1)):
        values = [reference(vectors, q, graded[f"q{i}"], gain) for i, q in enumerate(queries)]
        assert found["scores"][metric] == pytest.approx(np.mean(values))
    assert 0 < found["score"] < 1


class Told(made.Own):
    """Vectors by the last folder or file of the first image, and text; the rest has vectors of its own."""

    def __init__(self, vectors: dict[str, list[float]]) -> None:
        self.vectors = {name: np.array(vector, np.float32) for name, vector in vectors.items()}

    def encode(self, contents: list[Content], *, batch_size: int) -> np.ndarray:
        return np.stack([self.vectors[c.images[0].source.name if c.images else c.text[-1]] for c in contents])


@pytest.mark.parametrize(
    ("rival", "hit"), [([0.8, 0.6], True), ([1.0, 0.0], False), ([1.0, 1e-7], False)], ids=["worse", "equal", "nearly"]
)
def test_ties_are_lost_in_pools_too(tree, tmp_path, rival, hit):
    vectors = {"MSVD.0": [1.0, 0.0], "MSVD.1": rival, "MSVD.2": [0.0, 1.0]}
    vectors |= {"0": [1.0, 0.0], "1": [0.6, 0.8], "2": [0.0, 1.0]}  # of the captions, by their last letter
    found = task(Told(vectors), tree.root, tmp_path, "MSVD")
    first, second, third = outcomes(tmp_path, "MSVD")
    assert first["rank"] == (1 if hit else 2) and first["value"] == float(hit) and third["rank"] == 1
    assert found["score"] == pytest.approx((first["value"] + second["value"] + third["value"]) / 3)
    assert any("the right one is behind" in line for line in found["warnings"]) == (not hit)


def test_equal_names_are_one_candidate_and_the_first_content_counts(copied, tmp_path):
    def double(rows: list[Json]) -> list[Json]:
        return [*rows, dict(rows[0], caption="somebody does it again")]

    edit(copied, "video-tasks/MSR-VTT/test_1k", double)
    found = task(made.Own(), copied, tmp_path / "out", "MSR-VTT")
    assert found["queries"] == 4 and found["candidates"] == (3, 3)


def test_any_right_candidate_counts(tree, tmp_path):
    class SecondOnly(made.Oracle):
        def __init__(self, rows: dict[str, list[made.Row]]) -> None:
            super().__init__({name: [made.Row(row.query, row.right[-1:]) for row in own] for name, own in rows.items()})

    rows = {name: tree.rows[name] for name in ("QVHighlight", "MomentSeeker", "Charades-STA")}
    assert max(len(row.right) for own in rows.values() for row in own) == 2
    result = evaluate_mmeb_v2(SecondOnly(rows), tree.root, tmp_path, tasks=[*rows])
    assert {t["score"] for t in result["tasks"].values()} == {1.0}
    assert result["tasks"]["QVHighlight"]["chance"] == pytest.approx((1 / 4 + 2 / 5 + 1 / 4) / 3)


def test_a_copy_of_a_right_clip_is_a_rival_by_the_official_rule_alone(tree, copied, tmp_path):
    folder = copied / "video-tasks/frames/video_mret/QVHighlight/QVHighlight 0"
    shutil.copytree(folder / "positive_0", folder / "copied")
    values = {}
    for official in (False, True):
        output = tmp_path / str(official)
        found = task(made.Oracle(tree.rows), copied, output, "QVHighlight", official=official)
        values[official] = [outcome["value"] for outcome in outcomes(output, "QVHighlight")]
        assert found["candidates"] == (4, 5) and found["facts"]["ties"] == int(official)
        assert found["facts"]["repeated_truth"] == int(not official)
    assert values == {False: [1.0, 1.0, 1.0], True: [0.0, 1.0, 1.0]}


def test_labels_come_from_a_file_or_from_the_rows_and_the_result_says_so(copied, tmp_path):
    found = task(made.Own(), copied, tmp_path / "rows", "UCF101")
    assert found["candidates"] == (3, 3) and found["facts"]["labels from"] == "the rows"
    assert any("3 labels were found in the rows, of 101; the score is not that of the benchmark" in line
               for line in found["warnings"])  # fmt: skip
    file = copied / "video-tasks" / "labels" / "UCF101.txt"
    file.parent.mkdir()
    file.write_text("\n".join([*made.LABELS["UCF101"], *(f"Label{n}" for n in range(98)), ""]))
    whole = task(made.Own(), copied, tmp_path / "file", "UCF101")
    assert whole["candidates"] == (101, 101) and whole["facts"]["labels from"] == str(file)
    assert not any("labels" in line for line in whole["warnings"])
    file.write_text("ApplyLipstickU\n")
    with pytest.raises(DataError, match=r"row 1: 'pos_text', 'ArcheryU', is not in .*UCF101\.txt; add it"):
        task(made.Own(), copied, tmp_path / "less", "UCF101")
    breakfast = task(made.Own(), copied, tmp_path / "own", "Breakfast")
    assert breakfast["candidates"] == (10, 10) and not any("labels" in line for line in breakfast["warnings"])


# ---------------------------------------------------------------- samples, more processes


def test_samples_are_drawn_by_row_and_pools_stay_whole(tree, tmp_path):
    names = ["VATEX", "QVHighlight", "VisRAG_PlotQA"]
    result = evaluate_mmeb_v2(made.Oracle(tree.rows), tree.root, tmp_path, tasks=names, queries=2, seed=5)
    drawn = [str(row) for row in sample(3, 2, 5)]
    for name in names[:2]:
        assert [outcome["query"] for outcome in outcomes(tmp_path, name)] == drawn
    assert result["tasks"]["VATEX"]["candidates"] == (3, 3)
    assert {t["queries"] for t in result["tasks"].values()} == {2}
    assert "scored on samples of 2 queries (seed 5): 3;" in result["warnings"][0]


def test_two_processes_give_the_numbers_of_one(tree, tmp_path):
    names = ["MSVD", "QVHighlight", "ViDoSeek-doc"]
    one = evaluate_mmeb_v2(made.Own(), tree.root, tmp_path / "one", tasks=names)
    finished(launch(made.__file__, tree.root, tmp_path / "two"))
    two = json.loads((tmp_path / "two" / "mmeb_v2.json").read_text())
    assert two["tasks"] == plain(one["tasks"])


def test_only_the_first_rows_of_a_set_are_asked(tree, tmp_path, monkeypatch):
    monkeypatch.setitem(mmeb_video.FIRST, "SmthSmthV2", 2)
    assert task(made.Own(), tree.root, tmp_path, "SmthSmthV2")["queries"] == 2


# ---------------------------------------------------------------- what is missing or wrong


def test_missing_sets_are_named_with_what_was_looked_for(tree, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(tree.root / "video-tasks" / "MSVD", root / "video-tasks" / "MSVD")
    (root / "video-tasks/frames/video_ret").mkdir(parents=True)
    (root / "video-tasks/frames/video_ret/MSVD").symlink_to(tree.root / "video-tasks/frames/video_ret/MSVD")
    model = made.Oracle(tree.rows)
    with pytest.raises(DataError) as caught:
        evaluate_mmeb_v2(model, root, tmp_path / "out")
    said = str(caught.value)
    assert said.startswith("77 of 78 data sets of MMEB-V2 are missing; get them, or score the others alone")
    for place in (
        "CIRR/test-*.parquet",
        "video-tasks/NExTQA/MC/test*.parquet",
        "video-tasks/data/YouCook2/val*.parquet",
        "video-tasks/Kinetics-700/test*.parquet",
        "visdoc-tasks/ViDoSeek-page-fixed/corpus/test*.parquet",
        "visdoc-tasks/VisRAG-Ret-Test-PlotQA/qrels/train*.parquet",
    ):
        assert str(root / place) in said, place
    assert model.seen == 0 and not (tmp_path / "out").exists()
    result = evaluate_mmeb_v2(model, root, tmp_path / "out", allow_missing=True)
    assert list(result["tasks"]) == ["MSVD"] and len(result["missing"]) == 77 and result["overall"] is None
    with pytest.raises(DataError, match=r"1 of 1 data sets of MMEB-V2 are missing; get them, or name another folder"):
        evaluate_mmeb_v2(model, root, tmp_path / "out", tasks=["VATEX"], allow_missing=True)
    with pytest.raises(DataError, match="nowhere: no such folder"):
        evaluate_mmeb_v2(model, tmp_path / "nowhere", tmp_path / "out")


def test_frames_and_pages_are_found_where_one_says(copied, tmp_path):
    folders = {"MSVD": "video-tasks/frames/video_ret/MSVD", "ViDoSeek-doc": "visdoc-tasks/ViDoSeek-doc"}
    media = {name: (copied / folder).rename(copied / f"moved {name}") for name, folder in folders.items()}
    for name, folder in folders.items():
        kind = "frames" if name == "MSVD" else "pages"
        with pytest.raises(DataError, match=rf"{name}: no folder of its {kind}; looked for .*--media NAME=FOLDER") as e:
            task(made.Own(), copied, tmp_path / "out", name)
        assert str(copied / folder) in str(e.value) and ("ziyan" in str(e.value) or "images/" in str(e.value))
        assert task(made.Own(), copied, tmp_path / "out", name, media=media)["queries"] == 3
    with pytest.raises(DataError, match=r"called 'MSVDs'; did you mean 'MSVD'\?"):
        task(made.Own(), copied, tmp_path / "out", "MSVD", media={"MSVDs": copied})


def test_what_cannot_be_read_stops_or_is_left_out(copied, tmp_path):
    frames, pages = copied / "video-tasks" / "frames", copied / "visdoc-tasks"
    shutil.rmtree(frames / "video_mret/QVHighlight/QVHighlight 1")
    shutil.rmtree(frames / "video_qa/NExTQA/401")
    shutil.rmtree(frames / "video_ret/MSVD/MSVD.2")
    (pages / "ViDoSeek-doc" / "ViDoSeek-doc-0.png").unlink()  # the first one, and right
    names = ["NExTQA", "MSVD", "QVHighlight", "ViDoSeek-doc"]
    for name in names:
        with pytest.raises(DataError, match=r"row \d.*--skip-broken"):
            task(made.Own(), copied, tmp_path / "no", name)
    result = evaluate_mmeb_v2(made.Own(), copied, tmp_path / "out", tasks=names, skip_broken=True)
    assert {name: t["left_out"]["missed"] for name, t in result["tasks"].items()} == dict.fromkeys(names, 1)
    assert {t["queries"] for t in result["tasks"].values()} == {3}


@pytest.mark.parametrize(
    ("folder", "change", "said"),
    [
        ("video-tasks/NExTQA/MC", {"answer": 5}, "'answer' must be a place from 0 to 4, not 5"),
        ("video-tasks/Video-MME", {"answer": "E"}, "'answer' must be a letter from A to D, not 'E'"),
        ("video-tasks/MVBench/moving_count", {"answer": "x"}, "'answer' must be one of 'candidates'"),
        ("video-tasks/ActivityNetQA", {"answer": "maybe"}, "'answer' must be 'yes' or 'no'"),
        ("video-tasks/SmthSmthV2", {"neg_text": ["x"]}, "'neg_text' must be the whole list of candidates"),
        ("video-tasks/MSVD", {"video_id": "../x"}, "use the path of an image within"),
        ("video-tasks/MSVD", {"caption": [""][:0]}, "'caption' must be a list of strings"),
        ("video-tasks/MomentSeeker", {"negative_frames": []}, "'negative_frames' must be a list of at least one clip"),
        ("visdoc-tasks/ViDoSeek/queries", {"query-id": "q9"}, "no page has a score above 0 for the query 'q9'"),
        ("visdoc-tasks/ViDoSeek/queries", {"query-id": "q0"}, "the query 'q0' is also at"),
        ("visdoc-tasks/ViDoSeek/corpus", {"corpus-id": "ViDoSeek-doc-0"}, "is also that of"),
        ("visdoc-tasks/ViDoSeek/qrels", {"score": 0.5}, "'score' must be a whole number, not 0.5"),
    ],
)  # fmt: skip
def test_errors_name_file_row_and_field(copied, tmp_path, folder, change, said):
    name = "ViDoSeek-doc" if "ViDoSeek" in folder else folder.split("/")[1]

    def alter(rows: list[Json]) -> list[Json]:
        return [rows[0], rows[1] | change, *rows[2:]]

    file = edit(copied, folder, alter)
    with pytest.raises(DataError) as caught:
        task(made.Own(), copied, tmp_path / "out", name)
    assert said in str(caught.value) and f"{file} row 1: " in str(caught.value)


def test_wrong_arguments_are_named(tree, tmp_path):
    def run(**options: Any) -> Json:
        return evaluate_mmeb_v2(made.Own(), tree.root, tmp_path, **options)

    with pytest.raises(DataError, match=r"MMEB-V2 has no modality 'videos'; did you mean 'video'\?"):
        run(only=["videos"])
    with pytest.raises(DataError, match=r"MMEB-V2 \(video\) has no task 'CIRR'"):
        run(only=["video"], tasks=["CIRR"])
    with pytest.raises(MucoError, match="queries is 0"):
        run(queries=0)
    with pytest.raises(DataError, match=r"mine\.yaml: no such prompts; pass vlm2vec, qwen, or a YAML file"):
        run(prompts="mine.yaml")
