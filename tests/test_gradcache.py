"""The cached step equals the plain one, in value and gradient, and runs frozen vision once."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor

from muco.backbone import add_adapters
from muco.batch import split
from muco.data import open_data
from muco.dialogue import Sample, Turn
from muco.encoder import Model, from_backbone
from muco.errors import TrainingError
from muco.gradcache import UNLIMITED, TrainingStep
from muco.loss import MultiTurnLoss
from muco.sizes import Adapter
from muco.template import SPECIAL_TOKENS
from muco.train.mixture import Mixture, TrainingBatches
from muco.train.recipe import TurnsRecipe
from tests import families

# float32, of the largest gradient; the sums are taken in another order
TOLERANCE = 2e-6
BUDGETS = (1, 97, 200, 400, 10**6)  # one row at a time; that do not divide, that do; more than the batch


class Rows(list):
    fingerprint = "rows"


@pytest.fixture(scope="module")
def rows(scenes) -> Rows:
    """Ragged: many turns and one, no image, one and two images, an image as target, hard negatives, equal targets."""
    images = sorted((scenes / "images" / "train").glob("*.png"))
    first = open_data(scenes / "train.jsonl")
    return Rows(
        [
            first[0],
            Sample(turns=[Turn("what is red?", "a circle", negatives=["a square", {"image": images[3]}])]),
            Sample(
                image=[images[1], images[2]], turns=[Turn("both", "a circle"), Turn("", "two scenes, side by side")]
            ),
            Sample(turns=[Turn("a scene", {"image": images[4]}), Turn("a word", "a longer answer about that word")]),
            first[1].with_turns(first[1].turns[:3]),
            Sample(image=images[5], turns=[Turn("", "a square")]),
        ]
    )


def with_adapters(model: Model, dropout: float = 0.0, vision: str = "frozen") -> Model:
    processor = model.encoder.muco_processor
    tokens = [processor.tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS]
    torch.manual_seed(0)
    backbone = add_adapters(copy.deepcopy(model.encoder.model), Adapter(rank=4, alpha=4, dropout=dropout), tokens)
    for name, parameter in backbone.named_parameters():
        if "lora_B" in name:  # zero at the start, which would leave lora_A without gradient
            torch.nn.init.normal_(parameter, std=0.05)
    if vision == "trained":
        backbone.get_base_model().visual.requires_grad_(True)
    return from_backbone(backbone, processor, device="cpu")


def parts_of(model: Model, rows: Rows, mode: str, part: int | None = None) -> list[dict]:
    mixture = Mixture([len(rows)], [1.0], len(rows), 0)
    batches = TrainingBatches([rows], mixture, model.encoder.muco_processor, TurnsRecipe(mode=mode))
    if part is None:
        return [batches[0]]
    whole = [
        TrainingBatches([rows], mixture, model.encoder.muco_processor, TurnsRecipe(mode=mode), rank=r, world_size=3)
        for r in range(3)
    ]
    return [batches[0] for batches in whole]


def gradients(model: Model) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def make(
    model: Model, parts: list[dict], budget: int | None, **settings
) -> tuple[float, dict[str, Tensor], TrainingStep]:
    model.train().zero_grad(set_to_none=True)
    torch.manual_seed(7)
    loss = MultiTurnLoss(model, temperature=0.1, **settings)
    step = TrainingStep(model, loss, token_budget=budget)
    report = step(parts)
    return report.loss.item(), gradients(model), step


def reference(model: Model, parts: list[dict], **settings) -> tuple[float, dict[str, Tensor]]:
    """The plain step written down: embed both sides whole, the loss, backward."""
    model.train().zero_grad(set_to_none=True)
    torch.manual_seed(7)
    (part,) = parts
    loss = MultiTurnLoss(model, temperature=0.1, **settings)([dict(part["query"]), dict(part["target"])], part["ids"])
    loss.backward()
    return loss.item(), gradients(model)


def close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    assert one.keys() == other.keys() and one
    largest = max(float(g.abs().max()) for g in one.values())
    assert largest > 1e-4, "the gradient vanishes: nothing is compared"
    for name, gradient in one.items():
        assert torch.allclose(gradient, other[name], atol=tolerance * largest, rtol=1e-4), name


@pytest.mark.parametrize("mode", ["isolated", "compounded"])
@pytest.mark.parametrize("vision", ["frozen", "trained"])
def test_every_budget_gives_the_plain_value_and_gradient(tiny_model, rows, mode, vision):
    model = with_adapters(tiny_model, vision=vision)
    parts = parts_of(model, rows, mode)
    settings = {"symmetric": True, "dimensions": (16, 64)}
    value, plain = reference(model, parts, **settings)
    assert any("visual" in name for name in plain) == (vision == "trained")
    for budget in BUDGETS:
        cached, grads, step = make(model, parts, budget, **settings)
        assert cached == pytest.approx(value, rel=1e-6), budget
        close(plain, grads)
    print(value)
