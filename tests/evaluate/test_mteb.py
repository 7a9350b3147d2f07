"""A real task class of the mteb package, on scenes drawn here."""

from __future__ import annotations

import importlib
import logging
import sys

import numpy as np
import pytest

mteb = pytest.importorskip("mteb", reason="mteb is one of the dev packages")
from datasets import Dataset  # noqa: E402
from mteb._create_dataloaders import create_dataloader  # noqa: E402
from mteb.abstasks.retrieval import AbsTaskRetrieval  # noqa: E402
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402
from mteb.types import PromptType  # noqa: E402
from PIL import Image  # noqa: E402

from muco.data import open_data  # noqa: E402
from muco.dialogue import BLANK  # noqa: E402
from muco.errors import DataError, MucoError  # noqa: E402
from muco.evaluate.metrics import ndcg_at  # noqa: E402
from muco.evaluate.mteb import MtebEncoder, _contents, model_meta  # noqa: E402

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
    own = _contents({"text": ["a with data", "b"], "instruction": ["with data", ""]}, "Look.", "t")
    assert [c.text for c in own] == ["a with data", "Look. b"], "the data have an instruction"
    said = _contents({"text": ["user: a; bot: b"], "conversation": [[{"role": "user", "content": "a"}]]}, "", "t")
    assert said[0].text == "user: a; bot: b"
    assert _contents({"text": [""], "image": [None]}, "", "t") == [BLANK]


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({"text": ["a"], "audio": [object()]}, "t: the column 'audio' holds audio; the model reads text and images"),
        ({"video": [object()]}, "t: the column 'video' holds video"),
        ({"sentence1": ["a"]}, "t: no column 'text' or 'image' to encode, only 'sentence1'"),
        ({"text": [3]}, "t: the column 'text' holds a int, not a text"),
        ({"image": [[Image.new("RGB", (30, 30))]]}, "t: the column 'image' holds a list, not a Pillow image"),
    ],
)
def test_what_no_content_can_be_is_named(batch, said):
    with pytest.raises(DataError, match=said):
        _contents(batch, "", "t")


def encoded(encoder: MtebEncoder, batches: list, task: TaskMetadata, prompt_type: PromptType | None = None):
    where = {"hf_split": "test", "hf_subset": "default"}
    return encoder.encode(batches, task_metadata=task, prompt_type=prompt_type, batch_size=2, **where)


def test_vectors_have_the_order_of_the_rows_and_unit_length(tiny_model, caplog):
    deep = Image.fromarray(np.arange(900, dtype=np.uint16).reshape(30, 30) * 70)
    kinds = [Image.new("RGBA", (30, 40), (255, 0, 0, 90)), Image.new("L", (30, 30), 80), deep]
    kinds += [Image.new("RGB", (30, 60), "red").convert(mode) for mode in ("P", "CMYK", "1")]
    texts = ["a", "", "a longer text than the others", "", "e", "f"]
    batches = [{"text": texts[:4], "image": kinds[:4]}, {"text": texts[4:], "image": kinds[4:]}]
    batches.append({"text": ["", "last"], "image": [None, None]})
    with caplog.at_level(logging.WARNING, "muco"):
        found = encoded(MtebEncoder(tiny_model, dimension=24), batches, SceneCaptions.metadata)
    contents = [{"text": t, "image": image} for t, image in zip(texts, kinds, strict=True)]
    whole = tiny_model.encode([*contents, " ", "last"])
    one_by_one = [{name: [value] for name, value in row.items()} for row in contents]
    again = encoded(MtebEncoder(tiny_model, dimension=24), one_by_one, SceneCaptions.metadata)
    np.testing.assert_allclose(again, found[:6], atol=1e-5)
    expected = whole[:, :24] / np.linalg.norm(whole[:, :24], axis=1, keepdims=True)
    assert found.dtype == np.float32 and found.shape == (8, 24)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert (
        "SceneCaptions, test, default: 1 of 8 rows (input) have neither text nor image; each is read as a blank"
        in caplog.text
    )


def test_a_row_that_the_model_refuses_and_a_missing_cell_are_named(tiny_model):
    with pytest.raises(DataError, match="SceneCaptions, test, default, document 3: .*special token"):
        bad = [{"text": ["a", "b"]}, {"text": ["c", "d <|im_start|>"]}]
        encoded(MtebEncoder(tiny_model), bad, SceneCaptions.metadata, PromptType.document)
    rows = Dataset.from_dict({"id": ["1", "2"], "text": ["a", None]})
    loader = create_dataloader(rows, task_metadata=SceneCaptions.metadata, batch_size=2)
    with pytest.raises(DataError, match="SceneCaptions: a row has nothing in the column 'text'"):
        encoded(MtebEncoder(tiny_model), loader, SceneCaptions.metadata)
    with pytest.raises(DataError, match="SceneCaptions, test, default: has no query to encode"):
        encoded(MtebEncoder(tiny_model), [], SceneCaptions.metadata, PromptType.query)


@pytest.mark.parametrize(
    ("prompt", "side", "before"),
    [
        ({"query": "Q."}, PromptType.query, "Q. "),
        ({"query": "Q."}, PromptType.document, ""),
        ({"query": "Q.", "document": "D."}, PromptType.document, ""),
        ({"query": "Q."}, None, ""),
        ("All.", PromptType.query, "All. "),
        ("All.", PromptType.document, ""),
        ("All.", None, "All. "),
        (None, PromptType.query, ""),
    ],
)
def test_a_prompt_goes_before_queries_or_before_the_inputs_of_other_tasks(tiny_model, prompt, side, before):
    task = SceneCaptions.metadata.model_copy(update={"prompt": prompt})
    with_it, without = (MtebEncoder(tiny_model, instructions=asked) for asked in (True, False))
    expected = tiny_model.encode([f"{before}word", "word"])
    np.testing.assert_allclose(encoded(with_it, [{"text": ["word"]}], task, side)[0], expected[0], atol=1e-5)
    np.testing.assert_allclose(encoded(without, [{"text": ["word"]}], task, side)[0], expected[1], atol=1e-5)


def test_without_the_package_an_error_says_how_to_install_it(monkeypatch):
    for module in ("mteb", "mteb.models.abs_encoder"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "muco.evaluate.mteb")
    with pytest.raises(MucoError, match="the mteb package is not installed .*; run: pip install mteb"):
        importlib.import_module("muco.evaluate.mteb")


def test_what_mteb_keeps_of_a_model(tiny_model, tiny_path):
    meta = MtebEncoder(tiny_path, device="cpu", dimensions=(16, 32)).mteb_model_meta
    assert (meta.name, meta.revision) == ("muco/little", tiny_model.fingerprint)
    assert (meta.embed_dim, meta.modalities, meta.similarity_fn_name.value) == (
        [16, 32, 64],
        ["text", "image"],
        "cosine",
    )
    assert meta.n_parameters == sum(p.numel() for p in tiny_model.parameters()) > meta.n_embedding_parameters > 0
    assert meta.max_tokens == tiny_model.max_seq_length and meta.languages is None and meta.training_datasets is None
    assert meta.experiment_kwargs == {"instructions": True} and meta.use_instructions
    names = {"org/name": "org/name", "starter": "muco/starter", "": "muco/model", "./a/b": "muco/b", "/x/y/": "muco/y"}
    for given, expected in names.items():
        assert model_meta(tiny_model, given, True, None).name == expected
    cut = model_meta(tiny_model, "org/name", False, 16)
    assert cut.embed_dim == 16 and cut.experiment_kwargs == {"instructions": False, "embed_dim": 16}
    assert model_meta(tiny_model, "org/name", True, 64).experiment_kwargs == {"instructions": True}, "not shortened"
