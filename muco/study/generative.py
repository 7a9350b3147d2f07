"""Starts that can answer: image-text-to-text models trained on image + question -> answer by next-token prediction.

They have never seen ``<|emb|>``, as published models have not. transformers has the models, their processors and the
training loop; the prompt is the one that an embedding has, up to the token that is read.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    PrinterCallback,
    ProgressCallback,
    Qwen2VLForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from muco.backbone import connectors, start_reading
from muco.base.files import write_json
from muco.base.terminal import progress_bar
from muco.data.source import Data
from muco.dialogue import Content, Dialogue
from muco.images import open_image
from muco.processor import Processor, load_processor
from muco.sizes import TinyConfig
from muco.template import ImageSlot
from muco.tiny import tiny_qwen2_vl
from muco.vision import vision_modules

IGNORED = -100  # label of a token that is not to be predicted
RECORD = "generative.json"
Example = tuple[Any, str, str]  # image, question, answer


def write_tiny(folder: Path, texts: Sequence[str], config: TinyConfig, seed: int) -> None:
    """Writes a small Qwen2-VL of random weights with its language-model head, tied to the embeddings."""
    backbone, processor = tiny_qwen2_vl(texts, config, seed=seed)
    whole = Qwen2VLForConditionalGeneration(backbone.config)
    whole.model.load_state_dict(backbone.state_dict())
    whole.save_pretrained(folder)
    processor.save(folder)


class Questions(torch.utils.data.Dataset):
    """Every turn of a data set by itself, with the first wording of its question."""

    def __init__(self, data: Data) -> None:
        self.data = data
        self.places = [(row, turn) for row in range(len(data)) for turn in range(len(data[row].turns))]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Example:
        row, turn = self.places[index]
        sample = self.data[row]
        asked = sample.turns[turn]
        return open_image(sample.images[0]), asked.query[0].text, asked.target[0].text


class Collate:
    """Examples -> the tensors that the model takes; ``labels`` are the answers and the token that ends them."""

    def __init__(self, processor: Processor) -> None:
        self.processor, self.end = processor, processor.tokenizer.eos_token

    def prompt(self, question: str) -> str:
        """Everything before the answer, with the placeholder of one image."""
        template = self.processor.template
        laid = template.prompt(Dialogue((None,), (Content(question),), True))
        pieces = (*laid.trunk, *laid.branches[0])
        text = "".join(template.image_token if isinstance(piece, ImageSlot) else piece for piece in pieces)
        return text.removesuffix(template.read)

    def __call__(self, examples: Sequence[Example]) -> Mapping[str, Tensor]:
        prompts = [self.prompt(question) for _, question, _ in examples]
        answers = [f"{answer}{self.end}" for *_, answer in examples]
        batch = self.processor.stock(
            text=[prompt + answer for prompt, answer in zip(prompts, answers, strict=True)],
            images=[[image] for image, *_ in examples],
            padding=True,
            padding_side="right",
            return_tensors="pt",
            add_special_tokens=False,
        )
        lengths = [len(self.processor.text_ids(answer)) for answer in answers]
        ends = batch["attention_mask"].sum(dim=1).tolist()
        labels = torch.full_like(batch["input_ids"], IGNORED)
        for row, (end, length) in enumerate(zip(ends, lengths, strict=True)):
            labels[row, end - length : end] = batch["input_ids"][row, end - length : end]
        return {**batch, "labels": labels}


@torch.inference_mode()
def accuracy(model: torch.nn.Module, processor: Processor, data: Data, *, batch_size: int = 64) -> float:
    """The share of turns whose whole answer is what the model writes, choosing the likeliest token each time.

    If every token of the right answer is the likeliest after those before it, the model writes this answer.
    """
    questions, collate, right = Questions(data), Collate(processor), 0
    model.eval()
    for start in range(0, len(questions), batch_size):
        batch = {**collate([questions[index] for index in range(start, min(start + batch_size, len(questions)))])}
        labels = batch.pop("labels")[:, 1:]
        said = model(**batch).logits[:, :-1].argmax(dim=-1)
        right += int(((said == labels) | (labels == IGNORED)).all(dim=1).sum())
    return right / len(questions)


class _Trainer(Trainer):
    """The library's, under which frozen parts beside the language model keep their statistics."""

    def compute_loss(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        for module in vision_modules(model.model).values():
            if not any(parameter.requires_grad for parameter in module.parameters()):
                module.eval()
        return super().compute_loss(model, *args, **kwargs)


class _Progress(TrainerCallback):
    def __init__(self, progress: Callable[[int, int], None]) -> None:
        self.progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress(state.global_step, state.max_steps)


def learn_to_answer(
    start: Path,
    output: Path,
    train: Data,
    held_out: Data,
    *,
    steps: int,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    connector_only: bool = False,
    bf16: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Trains the model in ``start`` to answer, writes it to ``output`` and returns what :data:`RECORD` says of it.

    Returns:
        ``accuracy`` before and after on ``held_out`` (:func:`accuracy`, 0 to 1), ``loss`` of the last steps (nats per
        token), ``steps``, and the ``sha256`` of the weights.
    """
    model = AutoModelForImageTextToText.from_pretrained(start, dtype=torch.float32)
    processor, added = load_processor(str(start), model.config)
    if connector_only:
        model.requires_grad_(False)
        for part in connectors(model.model).values():
            part.requires_grad_(True)
    set_seed(seed)
    found = {"accuracy_before": accuracy(model, processor, held_out)}
    arguments = TrainingArguments(
        output_dir=str(output / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        adam_beta2=0.98,
        weight_decay=0.01,
        logging_steps=max(1, steps // 20),
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
        disable_tqdm=True,
    )
    trainer = _Trainer(model, arguments, data_collator=Collate(processor), train_dataset=Questions(train))
    for shown in (ProgressCallback, PrinterCallback):  # they print to stdout, which is for programs
        trainer.remove_callback(shown)
    with progress_bar("the start learns to answer") as progress:
        trainer.add_callback(_Progress(progress))
        trainer.train()
    found |= {"accuracy": accuracy(model, processor, held_out), "steps": steps}
    found["loss"] = next(entry["loss"] for entry in reversed(trainer.state.log_history) if "loss" in entry)
    if not added:  # else it begins so when the model is loaded for training
        start_reading(model.model, processor)
    shutil.copytree(start, output, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    model.save_pretrained(output)
    found["sha256"] = hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest()
    write_json(output / RECORD, found)
    return found
