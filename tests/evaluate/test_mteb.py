"""A real task class of the mteb package, on scenes drawn here."""

from __future__ import annotations

import numpy as np
import pytest

mteb = pytest.importorskip("mteb", reason="mteb is one of the dev packages")
from datasets import Dataset  # noqa: E402
from mteb.abstasks.retrieval import AbsTaskRetrieval  # noqa: E402
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402
from PIL import Image  # noqa: E402

from muco.data import open_data  # noqa: E402
from muco.errors import MucoError  # noqa: E402
from muco.evaluate.metrics import ndcg_at  # noqa: E402
from muco.evaluate.mteb import MtebEncoder, _contents  # noqa: E402

PROMPT = "Find the caption of the scene."


class SceneCaptions(AbsTaskRetrieval):
    """Image and question to caption; set ``scenes`` before it is run."""

    scenes = None
    metadata = TaskMetadata(
        name="SceneCaptions",
        type="Any2AnyRetrieval",
        description="Captions of drawn scenes.",
        reference=None,
        dataset={"path": "none", "revision": "none"},
        category="it2t",
        modalities=["image", "text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_10",
        date=("2026-01-01", "2026-01-01"),
        dialect=[],
        domains=[],
        task_subtypes=[],
        license="apache-2.0",
        annotations_creators="derived",
        sample_creation="created",
        bibtex_citation="",
        prompt={"query": PROMPT},
    )

    def load_data(self, num_proc: int | None = None, **kwargs) -> None:
        samples = [self.scenes[i] for i in range(len(self.scenes))]
        images = [Image.open(sample.images[0]).convert("RGB") for sample in samples]
        queries = {"id": [f"q{i}" for i in range(len(samples))], "image": images, "text": ["which?"] * len(samples)}
        corpus = {"id": [f"d{i}" for i in range(len(samples))], "text": [s.turns[-1].target[0].text for s in samples]}
        split = RetrievalSplitData(
            queries=Dataset.from_dict(queries),
            corpus=Dataset.from_dict(corpus),
            relevant_docs={f"q{i}": {f"d{i}": 1} for i in range(len(samples))},
            top_ranked=None,
        )
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


@pytest.mark.filterwarnings("ignore")  # of the package and what it imports
def test_a_real_task_gives_the_scores_of_our_own_vectors(tiny_model, scenes, tmp_path):
    SceneCaptions.scenes = data = open_data(scenes / "test.jsonl")
    result = mteb.evaluate(MtebEncoder(tiny_model), SceneCaptions(), cache=None, show_progress_bar=False)
    score = result.task_results[0].scores["test"][0]["ndcg_at_10"]

    samples = [data[i] for i in range(len(data))]
    queries = tiny_model.encode([{"image": s.images[0], "text": f"{PROMPT} which?"} for s in samples])
    captions = tiny_model.encode([s.turns[-1].target[0].text for s in samples])
    found = np.argsort(-(queries @ captions.T), axis=1)
    expected = np.mean([ndcg_at([f"d{c}" for c in row], {f"d{i}": 1}, 10) for i, row in enumerate(found.tolist())])
    assert score == pytest.approx(expected, abs=1e-4) and 0 < score < 1


def test_batches_become_contents():
    image = Image.new("RGB", (30, 30))
    both = _contents({"id": ["1", "2"], "text": ["a", "b"], "image": [image, None]}, "Look.", "t")
    assert [c.text for c in both] == ["Look. a", "Look. b"] and [len(c.images) for c in both] == [1, 0]
    assert _contents({"image": [image]}, "", "t")[0].text == ""
    with pytest.raises(MucoError, match="t: the column 'audio' holds audio; the model reads text and images"):
        _contents({"text": ["a"], "audio": [object()]}, "", "t")
