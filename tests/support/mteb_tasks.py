"""Tasks for tests of mteb: small ones of its own classes, and the data of real ones in folders as the hub has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from mteb.abstasks.abstask import AbsTask
from mteb.abstasks.aggregate_task_metadata import AggregateTaskMetadata
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.sts import AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata
from PIL import Image

PROMPT = "Find the page."
LANGUAGES = {"english": ["eng-Latn"], "french": ["fra-Latn"]}


def drawn(number: int) -> Image.Image:
    """An image of its own for each number."""
    image = Image.new("RGB", (56, 56), (37 * number % 256, 91 * number % 256, 200))
    image.paste((255, 255 - 23 * number % 256, 0), (0, 0, 6 + 5 * number % 50, 20))
    return image


def made(name: str, type: str, category: str, modalities: Sequence[str], score: str, **more: Any) -> TaskMetadata:
    plain: dict[str, Any] = {
        "name": name,
        "type": type,
        "category": category,
        "modalities": list(modalities),
        "main_score": score,
        "description": "Made for a test.",
        "reference": None,
        "dataset": {"path": "none", "revision": "1"},
        "eval_splits": ["test"],
        "eval_langs": ["eng-Latn"],
        "date": ("2026-01-01", "2026-01-01"),
        "domains": [],
        "dialect": [],
        "task_subtypes": [],
        "license": "apache-2.0",
        "annotations_creators": "derived",
        "sample_creation": "created",
        "bibtex_citation": "",
    }
    return TaskMetadata(**(plain | more))


def pages_task(revision: str = "1", **more: Any) -> AbsTaskRetrieval:
    """Text to page as ViDoRe V2 has it: two languages, the same six pages in each, grades 1 and 2."""

    class Pages(AbsTaskRetrieval):
        metadata = pages_metadata(revision, more)

        def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
            self.dataset = {language: {"test": split_of(language)} for language in self.hf_subsets}
            self.data_loaded = True

    return Pages()


def pages_metadata(revision: str, more: Mapping[str, Any]) -> TaskMetadata:
    plain = {"dataset": {"path": "none", "revision": revision}, "eval_langs": LANGUAGES, "prompt": {"query": PROMPT}}
    kind = {"type": "DocumentUnderstanding", "category": "t2i", "modalities": ["text", "image"], "score": "ndcg_at_5"}
    return made("TestPages", **(kind | plain | more))


def queries_of(language: str) -> list[str]:
    return [f"the {language} page of {word}" for word in ("red", "green circle", "blue square", "nothing")]


def grades_of(query: int) -> dict[str, int]:
    return {f"d{query}": 2, f"d{(query + 3) % 6}": 1}


def split_of(language: str) -> RetrievalSplitData:
    texts = queries_of(language)
    pages = {"id": [f"d{n}" for n in range(6)], "image": [drawn(n) for n in range(6)]}
    return RetrievalSplitData(
        queries=Dataset.from_dict({"id": [f"q{n}" for n in range(len(texts))], "text": texts}),
        corpus=Dataset.from_dict(pages, features=Features({"id": Value("string"), "image": ImageFeature()})),
        relevant_docs={f"q{n}": grades_of(n) for n in range(len(texts))},
        top_ranked=None,
    )


STS_SCORES = [0.0, 1.5, 5.0, 3.0, 2.0, 4.5]


def pairs_task(name: str = "TestPairs") -> AbsTaskSTS:
    """Pairs of images with a degree of likeness, as MIEB's VisualSTS."""

    class Pairs(AbsTaskSTS):
        metadata = made(name, "VisualSTS(eng)", "i2i", ["image"], "cosine_spearman")

        def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
            self.dataset = {"test": pairs()}
            self.data_loaded = True

    return Pairs()


def joined_task(name: str, parts: list[AbsTask]) -> AbsTaskAggregate:
    """A task whose score is the mean of others', as MIEB's VisualSTS17Eng."""

    class Joined(AbsTaskAggregate):
        metadata = AggregateTaskMetadata(
            name=name,
            description="Made for a test.",
            tasks=parts,
            main_score=parts[0].metadata.main_score,
            type=parts[0].metadata.type,
            eval_splits=["test"],
            category=parts[0].metadata.category,
            license="apache-2.0",
            modalities=parts[0].metadata.modalities,
            annotations_creators="derived",
            dialect=[],
            sample_creation="created",
        )

    return Joined()


def pairs() -> Dataset:
    count = len(STS_SCORES)
    first, second = [drawn(n) for n in range(count)], [drawn(2 * n + 7) for n in range(count)]
    features = Features({"sentence1": ImageFeature(), "sentence2": ImageFeature(), "score": Value("float64")})
    return Dataset.from_dict({"sentence1": first, "sentence2": second, "score": STS_SCORES}, features=features)


def write_hub_folder(path: Path, configurations: Mapping[str, Dataset]) -> None:
    """A data set as a folder in the hub's form, one parquet file for each configuration, all of split "test"."""
    path.mkdir(parents=True)
    lines = ["---", "configs:"]
    for name, rows in configurations.items():
        rows.to_parquet(path / f"{name}.parquet")
        lines += [f"- config_name: {name}", "  data_files:", "  - split: test", f"    path: {name}.parquet"]
    (path / "README.md").write_text("\n".join([*lines, "---", ""]))


def write_vidore2(path: Path, languages: Sequence[str]) -> None:
    """Data as ViDoRe V2 has them on the hub: all languages in one table of queries."""
    texts = [(text, language) for language in languages for text in queries_of(language)]
    numbers = range(len(texts))
    judged = [(n, int(page[1:]), grade) for n in numbers for page, grade in grades_of(n % 4).items()]
    pages = {"corpus-id": list(range(6)), "image": [drawn(n) for n in range(6)]}
    queries = {"query-id": list(numbers), "query": [t for t, _ in texts], "language": [one for _, one in texts]}
    qrels = dict(zip(("query-id", "corpus-id", "score"), map(list, zip(*judged, strict=True)), strict=True))
    features = Features({"corpus-id": Value("int64"), "image": ImageFeature()})
    corpus = Dataset.from_dict(pages, features=features)
    sets = {"corpus": corpus, "queries": Dataset.from_dict(queries), "qrels": Dataset.from_dict(qrels)}
    write_hub_folder(path, sets)


def write_vidore3(path: Path, language: str) -> None:
    """Data of one language as ViDoRe V3 has them on the hub, in mteb's own form."""
    split = split_of(language)
    judged = [(query, page, grade) for query, own in split["relevant_docs"].items() for page, grade in own.items()]
    qrels = dict(zip(("query-id", "corpus-id", "score"), map(list, zip(*judged, strict=True)), strict=True))
    parts = {"corpus": split["corpus"], "queries": split["queries"], "qrels": Dataset.from_dict(qrels)}
    write_hub_folder(path, {f"{language}-{name}": rows for name, rows in parts.items()})
