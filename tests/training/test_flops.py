from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from muco.dialogue import Sample, Turn
from muco.model import from_backbone
from muco.sizes import Adapter, TinyConfig
from muco.tiny import tiny_qwen2_vl
from muco.training.flops import Flops, count_flops, meta_step_flops, step_flops
from muco.training.prepared import Chosen, batch_of, prepare_turns
from muco.training.published import qwen2_vl_config

ROOT = Path(__file__).parents[2]
CONFIG = TinyConfig(width=32, layers=3, heads=4, kv_heads=2, feed_forward=48, vision_width=32, vision_depth=3)
IMAGES, VISUAL = 3, 9  # 84 x 84 px are 6 x 6 patches


@pytest.fixture(scope="module")
def model():
    backbone, processor = tiny_qwen2_vl(["one two three four five six"] * 4, CONFIG)
    backbone.visual.requires_grad_(False)
    return from_backbone(backbone, processor, device="cpu")


def make_batch(model, *, turns: int, isolated: bool = True, first: int = 1):
    """``first`` is the number of words in the first query and target; the others have two. All targets differ."""
    noise = np.random.default_rng(0).integers(0, 256, (84, 84, 3), dtype=np.uint8)
    texts = ["one " * (first if j == 0 else 2) for j in range(turns)]
    made = [Turn(text + "two", text + last) for text, last in zip(texts, ("six", "five", "four"), strict=False)]
    samples = [Sample(Image.fromarray(noise), made, id=str(i)) for i in range(IMAGES)]
    processor = model.encoder.muco_processor
    chosen = [[Chosen.of(turn, np.random.default_rng(0)) for turn in sample.turns] for sample in samples]
    pairs = enumerate(zip(samples, chosen, strict=True))
    prepared = [prepare_turns(sample, turns, key, processor, isolated=isolated) for key, (sample, turns) in pairs]
    return batch_of(prepared, processor, target_ids=False)


def linear_weights() -> int:
    kv_width = CONFIG.width // CONFIG.heads * CONFIG.kv_heads
    return 2 * CONFIG.width**2 + 2 * CONFIG.width * kv_width + 3 * CONFIG.width * CONFIG.feed_forward


def language_by_hand(batch) -> int:
    """Forward of the language model and the loss's scores."""
    flops = 0
    for side in ("query", "target"):
        rows, tokens = batch[side]["input_ids"].shape
        flops += rows * CONFIG.layers * (2 * tokens * linear_weights() + 4 * tokens * tokens * CONFIG.width)
    turns = len(batch["ids"])
    return flops + 2 * turns * turns * CONFIG.width


def vision_by_hand() -> tuple[int, int]:
    """Forward of the vision tower, and the part of it that is the embedding of the patches."""
    width, patches = CONFIG.vision_width, 4 * VISUAL
    embed = 2 * patches * (3 * 2 * CONFIG.patch**2) * width
    block = 2 * patches * (4 + 2 * CONFIG.vision_mlp_ratio) * width * width + 4 * patches * patches * width
    merger = 2 * VISUAL * (4 * width * 4 * width + 4 * width * CONFIG.width)
    return IMAGES * (embed + CONFIG.vision_depth * block + merger), IMAGES * embed


def test_linear_layers_are_2mnk_forward_and_twice_that_backward():
    first, second, rows = nn.Linear(5, 7), nn.Linear(7, 3), torch.randn(11, 5)
    flops = count_flops(lambda: second(first(rows)).sum())
    one, two = 2 * 11 * 5 * 7, 2 * 11 * 7 * 3
    assert flops == Flops(0, one + two, one + 2 * two)  # the input itself needs no gradient
    assert count_flops(lambda: second(first(rows)).sum(), backward=False) == Flops(0, one + two, 0)
    assert flops.total == 2 * one + 3 * two


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("masked", ["causal", "mask", "none"])
def test_attention_is_counted_in_full_whatever_mask_and_device(device, kv_heads, masked):
    query = torch.randn(2, 4, 12, 8, device=device, requires_grad=True)
    key, value = (torch.randn(2, kv_heads, 12, 8, device=device, requires_grad=True) for _ in range(2))
    mask = torch.ones(2, 1, 12, 12, dtype=torch.bool, device=device).tril() if masked == "mask" else None

    def attend():
        options = {"attn_mask": mask, "is_causal": masked == "causal", "enable_gqa": kv_heads != 4}
        return scaled_dot_product_attention(query, key, value, **options).sum()

    products = 4 * 2 * 4 * 12 * 12 * 8
    assert count_flops(attend) == Flops(0, products, 2 * products)
    with sdpa_kernel(SDPBackend.MATH):
        assert count_flops(attend) == Flops(0, products, 2 * products)


@pytest.mark.parametrize("isolated", [True, False])
@pytest.mark.parametrize("turns", [1, 3])
def test_a_step_equals_the_formula(model, turns, isolated):
    batch = make_batch(model, turns=turns, isolated=isolated)
    vision, language = vision_by_hand()[0], language_by_hand(batch)
    assert step_flops(model, batch) == Flops(vision, language, 2 * language)
    assert step_flops(model, batch, backward=False) == Flops(vision, language, 0)


def test_a_trained_vision_tower_costs_its_backward(model):
    batch = make_batch(model, turns=2)
    vision, embed = vision_by_hand()
    model.encoder.model.visual.requires_grad_(True)
    try:
        flops = step_flops(model, batch)
    finally:
        model.encoder.model.visual.requires_grad_(False)
    assert flops.backward == 2 * language_by_hand(batch) + 2 * vision - embed  # pixels need no gradient


@pytest.mark.parametrize("mode", ["isolated", "compounded"])
@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("vision_backward", [False, True])
def test_the_meta_count_is_that_of_a_real_step(model, mode, turns, vision_backward):
    for first in range(30, 60):  # until both sides are the true prompt's 17 and 14 tokens and whole tokens per turn
        batch = make_batch(model, turns=turns, isolated=mode == "isolated", first=first)
        query = batch["query"]["input_ids"].shape[1] - 17 - VISUAL
        target = batch["target"]["input_ids"].shape[1] - 14
        if query % turns == target % turns == 0:
            break
    else:
        pytest.fail("no such texts")
    model.encoder.model.visual.requires_grad_(vision_backward)
    try:
        real = step_flops(model, batch)
    finally:
        model.encoder.model.visual.requires_grad_(False)
    counted = meta_step_flops(
        model.encoder.model.config,
        images=IMAGES,
        turns=turns,
        visual_tokens=VISUAL,
        query_tokens=query // turns,
        target_tokens=target // turns,
        vision_backward=vision_backward,
    )
    assert counted == real


def test_a_model_of_one_layer_is_counted():
    configs = (tiny_qwen2_vl(["a b"], replace(CONFIG, layers=layers))[0].config for layers in (1, 2, 3))
    one, two, three = (meta_step_flops(config, images=1, turns=1).language for config in configs)
    assert three - two == two - one > 0


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_save_the_gradients_of_the_weights(model):
    config = model.encoder.model.config
    full = meta_step_flops(config, images=2, turns=3, visual_tokens=VISUAL)
    lora = meta_step_flops(config, images=2, turns=3, visual_tokens=VISUAL, adapter=Adapter(rank=1, alpha=1))
    tokens = (17 + VISUAL + 3 * 30) + (14 + 3 * 20)
    linear = 2 * CONFIG.layers * 2 * tokens * linear_weights()
    assert lora.vision == full.vision
    assert lora.language > full.language
    assert lora.backward == full.backward - linear + 2 * (lora.language - full.language)
    with pytest.raises(ValueError, match="LoRA"):
        meta_step_flops(config, images=2, turns=3, adapter=Adapter("dora"))


def test_bad_arguments_are_refused(model):
    config = model.encoder.model.config
    with pytest.raises(ValueError, match="positive"):
        meta_step_flops(config, images=0, turns=1)


@pytest.mark.slow
def test_the_true_2b_has_its_published_size_and_a_known_cost():
    from transformers import Qwen2VLModel

    config = qwen2_vl_config("2B")
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Qwen2VLModel(config).parameters())
    assert parameters == 2_208_985_600  # as in the published checkpoint, whose head is tied
    forward = meta_step_flops(config, images=1, turns=1, backward=False)
    # by hand: 3128 patches through 32 blocks of 12 x 1280^2 weights, and 863 tokens through 28 layers
    patches, tokens = 3128, (14 + 3 + 782 + 30, 14 + 20)
    vision = 32 * (24 * patches * 1280**2 + 4 * patches**2 * 1280)
    weights = 2 * 1536**2 + 2 * 1536 * 256 + 3 * 1536 * 8960
    language = sum(28 * (2 * n * weights + 4 * n * n * 1536) for n in tokens)
    assert forward.vision == pytest.approx(vision, rel=0.02)  # and the patches' embedding and the merger
    assert forward.language == language + 2 * 1536  # and the loss's one score


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path):
    options = f"--quick --turns 3 --rounds 1 --threads 1 --output {tmp_path}".split()
    command = [sys.executable, "benchmarks/turns.py", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    result = json.loads((tmp_path / "turns-cpu.json").read_text())
    cells = {(row["mode"], row["turns"]): row for row in result["summary"]}
    assert set(cells) == {(mode, k) for mode in ("isolated", "compounded") for k in (1, 3)}
    for (_, turns), row in cells.items():
        assert row["pairs"] == 2 * turns
        assert row["tokens"]["query"] == cells["isolated", 1]["tokens"]["query"] + 30 * (turns - 1)
        assert row["tflops"] > 0 and row["seconds"] > 0 and row["step_mib"] > 0
    for mode in ("isolated", "compounded"):
        assert 3 > cells[mode, 3]["flops_ratio"] > cells[mode, 1]["flops_ratio"] == 1
    assert "| compounded | 3 |" in (tmp_path / "turns-cpu.md").read_text()
