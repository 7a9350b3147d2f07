"""What the tests of a training step share: ragged samples, models to train, the plain step written down.

Run as a program it is one of several processes: ``python tests/support/steps.py FOLDER``, see test_distributed.py.
"""

from __future__ import annotations

import copy
import json
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from muco import distributed
from muco.backbone import add_adapters, freeze_vision, hold_trained_in_float32
from muco.data import open_data
from muco.data.source import InMemory
from muco.dialogue import Sample, Turn
from muco.loss import MultiTurnLoss, ReconstructionLoss
from muco.model import Model, from_backbone, load
from muco.sizes import Adapter
from muco.step import TrainingStep
from muco.template import SPECIAL_TOKENS
from muco.training.build import shard_model
from muco.training.prepared import Chosen, batch_of, prepare_pair, prepare_turns
from muco.weighting import Distillation, Weighting

MEMORY = 300  # tokens at once, where a process is short of it
SIGNALS = Weighting(false_negative_margin=0.01, hardness=2.0, hard_negative_hardness=1.0)
TEACHER = Distillation("symmetric_kl", weight=0.5, teacher_temperature=2.0)
LOSS = {
    "temperature": 0.1,
    "symmetric": True,
    "dimensions": (16, 64),
    "weighting": SIGNALS,
    "distillation": TEACHER,
    "learnt": 2,
}
# how the samples below are shared: alike, ragged (one process has one turn), texts without any image on one, all on one
SHARES = {
    "even": ([0, 2, 4], [1, 3, 5]),
    "ragged": ([0, 1, 2, 3, 4], [5]),
    "text": ([0, 2, 4, 5, 3], [1, 6]),
    "alone": ([0, 1, 2], []),
}
# share, mode, trained, budget, sharding
CASES = {
    "plain": ("even", "isolated", "adapters", None, "none"),
    "cached": ("even", "isolated", "adapters", 200, "none"),
    "compounded": ("even", "compounded", "adapters", 200, "none"),
    "ragged plain": ("ragged", "isolated", "adapters", None, "none"),
    "ragged cached": ("ragged", "isolated", "adapters", 97, "none"),
    "text only, vision trained": ("text", "isolated", "all", 97, "none"),
    "text only, plain": ("text", "compounded", "all", None, "none"),
    "reconstruction": ("ragged", "reconstruction", "adapters", 150, "none"),
    "alone, plain": ("alone", "isolated", "all", None, "none"),
    "alone, cached": ("alone", "reconstruction", "adapters", 97, "none"),
    "sharded": ("even", "isolated", "adapters", 200, "fsdp"),
    "sharded, alone": ("alone", "compounded", "adapters", 97, "fsdp"),
    "sharded, ragged": ("ragged", "isolated", "language", 97, "fsdp"),
    "sharded, text only": ("text", "compounded", "adapters", None, "fsdp"),
    "sharded, half": ("even", "isolated", "half", 200, "fsdp"),
    "short of memory": ("ragged", "isolated", "adapters", None, "none"),
    "recurrent": ("ragged", "isolated", "adapters", 97, "none"),
    "recurrent, sharded": ("even", "isolated", "adapters", 97, "fsdp"),
}


def ragged_samples(scenes: Path) -> InMemory:
    """Many turns and one; no, one and two images; an image as target; hard negatives; equal targets; one id twice."""
    images = sorted((scenes / "images" / "train").glob("*.png"))
    data = open_data(scenes / "train.jsonl")
    return InMemory(
        [
            data[0],
            Sample(turns=[Turn("what is red?", "a circle", None, ["a square", "a star"], [4, 1, 3])], id="twice"),
            Sample(
                image=[images[1], images[2]], turns=[Turn("both", "a circle"), Turn("", "two scenes, side by side")]
            ),
            Sample(turns=[Turn("a scene", {"image": images[4]}), Turn("a word", "a longer answer about that word")]),
            data[1].with_turns(data[1].turns[:3]),
            Sample(image=images[5], turns=[Turn("", "a square", negatives=[{"image": images[3]}])], id="twice"),
            Sample(turns=[Turn("what is blue?", "a circle"), Turn("what is green?", "nothing")]),
        ]
    )


def to_train(model: Model, trained: str, dropout: float = 0.0) -> Model:
    """A copy whose adapters, language model or whole self is trained; "half": the language model of a bfloat16 one."""
    processor, backbone = model.encoder.muco_processor, copy.deepcopy(model.encoder.model)
    backbone.requires_grad_(True)
    if trained == "half":
        backbone.bfloat16()
    if trained in ("adapters", "language", "half"):
        freeze_vision(backbone)
    if trained == "adapters":
        tokens = [processor.tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS]
        torch.manual_seed(0)
        backbone = add_adapters(backbone, Adapter(rank=4, alpha=4, dropout=dropout), tokens)
        for name, parameter in backbone.named_parameters():
            if "lora_B" in name:  # zero at the start, which would leave lora_A without gradient
                torch.nn.init.normal_(parameter, std=0.05)
    hold_trained_in_float32(backbone)
    return from_backbone(backbone, processor, device="cpu").train()


def share(model: Model, samples: list[Sample], mode: str) -> dict:
    """The training batch of these samples, all turns as they stand."""
    processor = model.encoder.muco_processor
    prepared = []
    for sample in samples:
        key = sample.id or repr(sample.turns)
        turns = [Chosen(turn.query[0], turn.target[0], turn.negatives, turn.scores) for turn in sample.turns]
        source = len(sample.turns) % LOSS["learnt"]  # the same in every process, wherever its images lie
        if mode == "reconstruction":
            prepared.append(prepare_pair(sample, turns[0], _masks(sample), key, processor, source=source))
        else:
            isolated = mode == "isolated"
            prepared.append(prepare_turns(sample, turns, key, processor, isolated=isolated, source=source))
    return batch_of(prepared, processor, target_ids=True)


def _masks(sample: Sample) -> np.random.Generator:
    """What decides on the masks of a sample, whichever process has it."""
    turn = sample.turns[0]
    return np.random.default_rng(zlib.crc32(f"{turn.query[0].text} {turn.target[0].text}".encode()))


def loss_of(model: Model, mode: str) -> MultiTurnLoss:
    if mode == "reconstruction":
        return ReconstructionLoss(
            model, joint=True, **{k: v for k, v in LOSS.items() if k not in ("symmetric", "distillation")}
        )
    return MultiTurnLoss(model, **LOSS)


def gradients(loss: MultiTurnLoss) -> dict[str, Tensor]:
    """Of the model's weights and of the loss's own."""
    return {n: distributed.whole(p.grad).clone() for n, p in loss.named_parameters() if p.grad is not None}


def cached(
    model: Model, parts: list[dict], budget: int | None, seed: int = 7, mode: str = "isolated"
) -> tuple[float, dict[str, Tensor]]:
    """Value and gradient by the step that is tested."""
    return made(TrainingStep(model, loss_of(model, mode), token_budget=budget), parts, seed)


def made(step: TrainingStep, parts: list[dict], seed: int = 7) -> tuple[float, dict[str, Tensor]]:
    """Value and gradient of this step."""
    step.model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    report = step(parts)
    return report.loss.item(), gradients(step.loss)


class Limited:
    """Makes a backbone fail like a device without memory when more than ``tokens`` pass through at once."""

    def __init__(self, model: Model, tokens: int) -> None:
        self.tokens, self.failed = tokens, []
        model.encoder.model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: Any, args: Any, kwargs: Any) -> None:
        if kwargs["input_ids"].numel() > self.tokens:
            self.failed.append(kwargs["input_ids"].numel())
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def plain(model: Model, batch: dict, seed: int = 7, mode: str = "isolated") -> tuple[float, dict[str, Tensor]]:
    """The slow, obvious reference: both sides whole, with their pixels, the loss, backward."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    loss = loss_of(model, mode)
    value = loss([dict(batch["query"]), dict(batch["target"])], batch["ids"])
    value.backward()
    return value.item(), gradients(loss)


def assert_same(
    found: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]], tolerance: float = 2e-6
) -> None:
    """Value and gradient agree to float32: 1e-6 of the value, ``tolerance`` of the largest gradient of the model."""
    (value, grads), (other, others) = found, expected
    assert abs(value - other) < 1e-6 * abs(other)
    assert grads.keys() == others.keys() and grads
    largest = max(float(gradient.abs().max()) for gradient in others.values())
    assert largest > 1e-3, "the gradient vanishes: nothing is compared"
    for name, gradient in grads.items():
        assert torch.allclose(gradient, others[name], atol=tolerance * largest, rtol=1e-4), name


def process(folder: Path) -> None:
    """One of several processes: makes the step of every case with its own samples, writes what it found."""
    distributed.start()
    rank, models = distributed.rank(), {name: load(folder / name, device="cpu") for name in ("model", "recurrent")}
    samples = ragged_samples(folder / "scenes")
    values, budgets = {}, {}
    for name, (shares, mode, trained, budget, sharding) in CASES.items():
        copied = to_train(models["recurrent" if "recurrent" in name else "model"], trained)
        if sharding == "fsdp":
            shard_model(copied)
        batch = share(copied, [samples[i] for i in SHARES[shares][rank]], mode)
        step = TrainingStep(copied, loss_of(copied, mode), token_budget=budget)
        if "memory" in name:
            Limited(copied, MEMORY)
        values[name], grads = made(step, [batch])
        budgets[name] = step.token_budget
        save_file(grads, folder / f"{name}-{rank}.safetensors")
    (folder / f"values-{rank}.json").write_text(json.dumps(values))
    (folder / f"budgets-{rank}.json").write_text(json.dumps(budgets))
    del copied, batch, grads, step
    distributed.leave()
    (folder / f"threads-{rank}.json").write_text(json.dumps(_threads()))


def _threads() -> list[str]:
    """The names of this process's threads, those of libraries too; none where the system does not tell."""
    return sorted(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))


if __name__ == "__main__":
    process(Path(sys.argv[1]))
