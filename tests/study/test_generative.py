"""Starts that learn to answer: their prompts, labels and accuracy against the model's own generation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from muco.backbone import load_backbone
from muco.data import open_data
from muco.data.source import InMemory
from muco.dialogue import Content, Dialogue
from muco.layout import prepare
from muco.sizes import TinyConfig
from muco.study.generative import IGNORED, RECORD, Collate, Questions, accuracy, learn_to_answer, write_tiny
from muco.training.build import texts_of

SMALL = TinyConfig(width=64, feed_forward=128, vision_width=32, vision_depth=1, vocabulary=512)


@pytest.fixture(scope="module")
def untrained(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "untrained"
    write_tiny(folder, [*texts_of([open_data(scenes / "train.jsonl")])], SMALL, 0)
    return folder


def test_the_model_reads_what_an_embedding_reads_and_predicts_the_answer_and_its_end(scenes, untrained):
    _, processor = load_backbone(untrained)
    examples = Questions(InMemory([open_data(scenes / "test.jsonl")[0]]))
    assert len(examples) == 7
    batch = Collate(processor)([examples[turn] for turn in (0, 3, 6)])
    for row, turn in enumerate((0, 3, 6)):
        image, question, answer = examples[turn]
        wanted = batch["labels"][row] != IGNORED
        assert processor.tokenizer.decode(batch["input_ids"][row, wanted]) == f"{answer}<|im_end|>"
        assert torch.equal(batch["labels"][row, wanted], batch["input_ids"][row, wanted])
        embedded = prepare(Dialogue((image,), (Content(question),)), processor)
        before = batch["input_ids"][row, : int(wanted.nonzero()[0])].tolist()
        assert before == [*embedded.ids][:-1]  # all but <|emb|>


def test_accuracy_is_the_share_of_answers_that_the_model_writes_by_itself(scenes, untrained, tmp_path):
    few = InMemory([open_data(scenes / "train.jsonl")[index] for index in range(2)])
    found = learn_to_answer(untrained, tmp_path / "start", few, few, steps=60, batch_size=14, learning_rate=5e-3)
    assert found["accuracy_before"] == 0 and found["loss"] < 1.5
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "start")
    _, processor = load_backbone(tmp_path / "start")
    questions, collate, right = Questions(few), Collate(processor), 0
    for image, question, answer in (questions[index] for index in range(len(questions))):
        inputs = processor.stock(text=[collate.prompt(question)], images=[[image]], return_tensors="pt")
        said = model.generate(**inputs, max_new_tokens=60, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        right += processor.tokenizer.decode(said) == f"{answer}<|im_end|>"
    assert right > 0
    for batch_size in (64, 3):
        assert accuracy(model, processor, few, batch_size=batch_size) == found["accuracy"] == right / len(questions)


def test_a_start_is_the_same_each_time_and_its_connector_alone_can_be_trained(scenes, untrained, tmp_path):
    few = InMemory([open_data(scenes / "train.jsonl")[index] for index in range(4)])
    again = [learn_to_answer(untrained, tmp_path / name, few, few, steps=2, batch_size=4) for name in ("a", "b")]
    assert again[0] == again[1] and (tmp_path / "a" / RECORD).is_file()
    learn_to_answer(untrained, tmp_path / "c", few, few, steps=2, batch_size=4, connector_only=True)
    before, after = (load_file(folder / "model.safetensors") for folder in (untrained, tmp_path / "c"))
    changed = [name for name, weight in before.items() if not torch.equal(weight, after[name])]
    embeddings = [name for name in changed if "embed_tokens" in name]
    assert set(changed) - set(embeddings) and all("merger" in name for name in set(changed) - set(embeddings))
    _, processor = load_backbone(tmp_path / "c")
    emb, end = processor.read_id, processor.tokenizer.eos_token_id
    for name in embeddings:  # <|emb|> begins as the end of a text, as it does in a published model
        rows = (before[name] != after[name]).any(dim=1).nonzero().flatten().tolist()
        assert rows == [emb] and torch.equal(after[name][emb], before[name][end])
    assert embeddings
