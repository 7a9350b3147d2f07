"""The study of operations: the cost of a step of the true Qwen2-VL-2B and 7B by turns per image, beside the paper's.

Nothing is trained and no weights are needed: :mod:`muco.training.flops` counts on the meta device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from muco.base.files import claimed, earlier_record, write_json, write_text
from muco.base.machine import VERSION, versions, versions_in_words
from muco.base.svg import Mark, chart
from muco.base.tables import markdown_table
from muco.base.terminal import progress_bar
from muco.sizes import Adapter

if TYPE_CHECKING:
    from rich.console import Console

QUESTION = "How many operations does a step of the true 2B and 7B model take, by turns per image, beside the paper's?"
IMAGES, VISUAL, QUERY, TARGET = 1024, 782, 30, 20  # images per step; tokens of an image, and of a turn on each side
TURNS = (1, 2, 4, 7)
MANY = "as many pairs"  # one turn of seven times the images
RUNS = {**{str(k): (IMAGES, k) for k in TURNS}, MANY: (7 * IMAGES, 1)}
PAPER = {"1": 17.5, "2": 17.6, "4": 17.7, "7": 18.0, MANY: 122.7}  # arXiv 2602.06393, Table 5, PFLOPs per step
SIZES = ("2B", "7B")
CLOSEST = "all weights, 1024 visual tokens, 5 + 5 tokens per turn"
ASSUMPTIONS: dict[str, dict[str, Any]] = {
    "forward only": {"backward": False},
    "LoRA r = 64": {"adapter": Adapter()},
    "all weights": {},
    "all weights, 1024 visual tokens": {"visual_tokens": 1024},
    CLOSEST: {"visual_tokens": 1024, "query_tokens": 5, "target_tokens": 5},
}


def run_flops(
    output: Path,
    command: str,
    *,
    sizes: Sequence[str] = SIZES,
    assumptions: Mapping[str, Mapping[str, Any]] = ASSUMPTIONS,
) -> dict[str, Any]:
    """Counts what ``study.json`` in the folder lacks, and writes it, ``plot.svg`` and ``README.md``.

    Returns ``asked``, ``versions``, and ``flops``: by size, assumption and run (``RUNS``) the operations of a step, as
    :class:`muco.training.flops.Flops` and in all (``total``). OutputError if the folder holds anything else.
    """
    from muco.training.flops import meta_step_flops
    from muco.training.published import qwen2_vl_config

    asked = {"study": "flops", "muco": VERSION}
    with claimed(output):
        file = output / "study.json"
        flops: dict[str, Any] = earlier_record(file, asked, "study").get("flops", {})
        todo = [(size, name) for size in sizes for name in assumptions if name not in flops.get(size, {})]
        found = {"asked": asked, "runs": [], "versions": versions(), "flops": flops}
        with progress_bar("flops") as progress:
            for done, (size, name) in enumerate(todo):
                progress(done, len(todo))
                config = qwen2_vl_config(size)  # type: ignore[arg-type]
                given = {"visual_tokens": VISUAL, "query_tokens": QUERY, "target_tokens": TARGET, **assumptions[name]}
                counts = flops.setdefault(size, {})[name] = {}
                for run, (images, turns) in RUNS.items():
                    count = meta_step_flops(config, images=images, turns=turns, **given)
                    counts[run] = asdict(count) | {"total": count.total}
                write_json(file, found)
        write_text(output / "plot.svg", _plot(flops))
        write_text(output / "README.md", _page(found, command))
        return found


def print_flops(found: Mapping[str, Any], console: Console) -> None:
    for size, counts in found["flops"].items():
        console.print("\n".join(_table(size, counts)), markup=False, highlight=False, soft_wrap=True)


def pflops(counts: Mapping[str, Mapping[str, int]]) -> dict[str, float]:
    """10¹⁵ operations by run."""
    return {run: flops["total"] / 1e15 for run, flops in counts.items()}


def tokens_per_turn(counts: Mapping[str, Mapping[str, int]], tokens: int, published: Mapping[str, float]) -> float:
    """How many text tokens a turn may have for six more turns to add as much as published, in PFLOPs at k = 1 and 7.

    ``tokens``: of a turn in ``counts``, both sides together; assumes a constant cost per token.
    """
    ours = pflops(counts)
    return tokens * (published["7"] - published["1"]) / (ours["7"] - ours["1"])


def _page(found: Mapping[str, Any], command: str) -> str:
    lines = [f"# {QUESTION}", "", f"Made by `{command}`. {versions_in_words(found['versions'])}.", ""]
    lines += [f"PFLOP (10¹⁵ operations) per training step of {IMAGES} images, except in the last column.", ""]
    for size, counts in found["flops"].items():
        lines += [f"## Qwen2-VL-{size}", "", *_table(size, counts), ""]
    lines += ["![Operations over turns](plot.svg)", "", "## Assumptions", "", *_ASSUMED, ""]
    if "2B" in found["flops"]:
        lines += ["## Why the paper's figures differ", "", *_explained(found["flops"]["2B"])]
    return "\n".join(lines) + "\n"


_ASSUMED = (
    f"- An image has {VISUAL} visual tokens (952 × 644 px, a photograph of 1000 × 667) unless the row says 1024. A "
    f"turn adds {QUERY} text tokens to the query side and {TARGET} to the target side, with its share of the prompt, "
    "unless the row says otherwise; the prompt itself has 14, and 3 more around an image.",
    "- The vision tower is frozen and runs forward once per image. The language model runs forward and backward on "
    "both sides. 'LoRA': only adapters of rank 64 get gradients; 'all weights': the model's own weights do.",
    "- Multiplications and additions of matrix products, convolutions, attention, and the scores of the loss among all "
    "pairs of the step are counted. Norms, activations, softmax, the optimizer, and a second forward pass of a "
    "gradient cache are not.",
    "- Isolated and compounded turns count the same: attention is counted as full products, whatever the mask.",
)


def _explained(counts: Mapping[str, Mapping[str, Mapping[str, int]]]) -> list[str]:
    lines = ["The lengths of the paper's images and texts, and what it counts, are unknown; this is inferred.", ""]
    all_weights, many = counts.get("all weights"), counts.get("all weights, 1024 visual tokens")
    if many:
        lines.append(
            f"- 1024 visual tokens per image and gradients of all weights give the paper's {PAPER['1']} at k = 1 "
            f"({pflops(many)['1']:.1f}), although LoRA needs no such gradients."
        )
    if all_weights:
        ours, fits = pflops(all_weights), tokens_per_turn(all_weights, QUERY + TARGET, PAPER)
        lines.append(
            f"- From k = 1 to 7 the paper adds {PAPER['7'] - PAPER['1']:.1f}; {QUERY} + {TARGET} tokens per turn add "
            f"{ours['7'] - ours['1']:.1f}. The paper's increment leaves about {fits:.0f} tokens per turn, both sides "
            "and their share of the prompt included: less than a short question and its answer, and one of the seven "
            "answers is a dense caption."
        )
    lines.append(
        f"- One turn of seven times the images takes {PAPER[MANY] / PAPER['1']:.2f} times as much in the paper and "
        "7.00 times as much here, except for the loss. So the paper's conclusion holds in every row: more turns are "
        "far cheaper than more images; by how much depends on the texts."
    )
    return lines


def _table(size: str, counts: Mapping[str, Any]) -> list[str]:
    rows = [_row(name, pflops(runs), 2) for name, runs in counts.items()]
    if size == "2B":  # the size of the paper's table
        rows.insert(0, _row("the paper, as published", PAPER, 1))
    return markdown_table(["", *(f"k = {k}" for k in TURNS), "7 : 1", f"k = 1 at {7 * IMAGES} images"], rows)


def _row(name: str, values: Mapping[str, float], digits: int) -> list[str]:
    by_turns = [f"{values[str(k)]:.{digits}f}" for k in TURNS]
    return [name, *by_turns, f"{values['7'] / values['1']:.3f}", f"{values[MANY]:.1f}"]


def _plot(flops: Mapping[str, Any]) -> str:
    size = next(iter(flops))
    lines = {"the paper": PAPER} if size == "2B" else {}
    lines |= {name: pflops(runs) for name, runs in flops[size].items()}
    return chart(
        QUESTION,
        {name: [Mark(k, values[str(k)]) for k in TURNS] for name, values in lines.items()},
        across="turns per image, k",
        upwards=f"PFLOP per step of {IMAGES} images, Qwen2-VL-{size}",
    )
