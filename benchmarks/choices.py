"""The defaults on evidence: trains variants of the demo's recipe on the built-in scenes, several seeds each.

    python benchmarks/choices.py --output benchmarks/results/choices --processes 5

Each run is scored on the 500 *dev* scenes; the test scenes of the demo are never looked at. A finished run is not done
again, so a killed benchmark goes on where it was. Writes a JSON file per run, and ``choices.json`` and ``choices.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

PAPER = {"loss.symmetric": False, "loss.temperature": 0.02, "turns.image_turn": None}
COMPOUNDED = {"turns.mode": "compounded"}
BLIND = {"data.blind": True, "turns.image_turn": None, "loss.symmetric": False}
VARIANTS: dict[str, dict] = {
    "demo": {},
    "temperature 0.02": {"loss.temperature": 0.02},
    "one direction": {"loss.symmetric": False},
    "no image turn (k = 7)": {"turns.image_turn": None},
    "text-image pairs for the image turn": {"turns.image_turn": None, "pairs": 0.5},
    "identical targets as negatives": {"loss.mask_identical_targets": False},
    "compounded, order per sample": COMPOUNDED,
    "compounded, order per batch": {**COMPOUNDED, "turns.order": "batch"},
    "compounded, 4 orders per batch": {**COMPOUNDED, "turns.order": 4},
    "paper: compounded, order per sample": {**PAPER, **COMPOUNDED},
    "paper but isolated": PAPER,
    "warmed up, isolated": {"warm_up.steps": 400},
    "warmed up, compounded, order per batch": {**COMPOUNDED, "turns.order": "batch", "warm_up.steps": 400},
    "blind, isolated": BLIND,
    "blind, compounded, order per sample": {**BLIND, **COMPOUNDED},
    "blind, compounded, order per batch": {**BLIND, **COMPOUNDED, "turns.order": "batch"},
    "blind, compounded, 4 orders per batch": {**BLIND, **COMPOUNDED, "turns.order": 4},
    "k = 1, equal steps": {"turns.image_turn": None, "turns.limit": 1},
    # on the demo's CPU a k = 7 step takes --step-ratio times as long, so k = 1 gets so many times the steps
    "k = 1, equal seconds": {"turns.image_turn": None, "turns.limit": 1, "scale_steps": True},
}
SINGLE_SEED = ("blind", "warmed up")
SCORES = ("answer", "answer_text_only", "image_to_caption", "caption_to_image", "within", "blind")


def run_one(name: str, seed: int, args: argparse.Namespace) -> dict:
    """Trains and scores one variant in this process."""
    import torch
    import yaml

    import muco
    from muco.data import open_data
    from muco.evaluate.retrieval import Scoring, score_tasks
    from muco.training.recipe import from_dict

    changes = dict(VARIANTS[name])
    pairs, scale = changes.pop("pairs", None), changes.pop("scale_steps", False)
    values = yaml.safe_load(Path("recipes/demo.yaml").read_text())
    values["trainer"]["learning_rate"] = float(values["trainer"]["learning_rate"])
    values["seed"], values["output"] = seed, str(Path(args.work) / f"{slug(name)}-{seed}")
    values["data"]["train"] = [{"path": f"{args.scenes}/train.jsonl"}]
    steps = round(args.steps * (args.step_ratio if scale else 1))
    values["trainer"] |= {"max_steps": steps, "warmup_steps": steps // 20, "save_strategy": "no", "report_to": []}
    values["trainer"]["dataloader_num_workers"] = args.workers
    if pairs:
        values["data"]["train"].append({"path": f"{args.scenes}/train_pairs.jsonl", "weight": pairs})
        values["batch"]["size"] = round(32 * (1 + pairs))
    for key, value in changes.items():
        group, _, field = key.partition(".")
        values.setdefault(group, {})[field] = value

    started = time.perf_counter()
    folder = muco.train(from_dict(values))
    seconds = time.perf_counter() - started
    losses = [loss for _, loss in json.loads((folder / "run.json").read_text())["loss"]]
    data = open_data(f"{args.scenes}/dev.jsonl")
    tasks = score_tasks(muco.load(folder), data, Scoring(batch_size=256))["tasks"]
    scores = {task: tasks[task].get("mean", tasks[task])["hit@1"] for task in SCORES if task in tasks}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    return {
        "variant": name,
        "seed": seed,
        "steps": steps,
        "seconds": round(seconds, 1),
        "final_loss": statistics.mean(losses[-5:]),
        "hit@1": scores,
        "device": device,
    }


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


def run_all(args: argparse.Namespace) -> None:
    """Runs what is missing in parallel processes, then writes the tables."""
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    todo = [
        (name, seed)
        for seed in range(args.seeds)
        for name in VARIANTS
        if (seed == 0 or not name.startswith(SINGLE_SEED)) and (not args.only or args.only in name)
    ]
    todo = [(n, s) for n, s in todo if not (output / f"{slug(n)}-{s}.json").exists()]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "false"}
    running: list[tuple[str, subprocess.Popen]] = []
    deadline = time.monotonic() + args.seconds
    while running or (todo and time.monotonic() < deadline):
        while todo and len(running) < args.processes and time.monotonic() < deadline:
            name, seed = todo.pop(0)
            command = [sys.executable, __file__, *sys.argv[1:], "--one", name, "--seed", str(seed)]
            running.append((f"{name} {seed}", subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)))
        for label, process in list(running):
            if process.poll() is not None:
                running.remove((label, process))
                print("done" if process.returncode == 0 else "FAILED", label, file=sys.stderr, flush=True)
        time.sleep(0.2)
    write_tables(output, args)


def write_tables(output: Path, args: argparse.Namespace) -> None:
    runs = [json.loads(f.read_text()) for f in sorted(output.glob("*-[0-9].json"))]
    command = "python benchmarks/choices.py " + " ".join(a for a in sys.argv[1:])
    (output / "choices.json").write_text(json.dumps({"command": command, "runs": runs}, indent=1) + "\n")
    lines = [
        f"Scenes, dev set (500), hit@1 in %, mean over seeds (lowest to highest). Command: `{command}`.",
        f"Device: {', '.join(sorted({run['device'] for run in runs}))}; {args.steps} steps of 32 images.",
        "",
        "| variant | seeds | steps | final loss | answer | image to caption | caption to image | within | blind |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in VARIANTS:
        own = [run for run in runs if run["variant"] == name]
        if not own:
            continue
        cells = [spread([100 * r["hit@1"][t] for r in own]) for t in SCORES if t != "answer_text_only"]
        loss = f"{statistics.mean(r['final_loss'] for r in own):.2f}"
        lines.append(" | ".join([f"| {name}", str(len(own)), str(own[0]["steps"]), loss, *cells]) + " |")
    (output / "choices.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def spread(values: list[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.1f}" + (f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True)
    parser.add_argument("--scenes", default="runs/choices/scenes", help="made if missing")
    parser.add_argument("--work", default="runs/choices/work", help="where models are trained")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--step-ratio", type=float, default=2.4, help="seconds of a k = 7 step over those of k = 1")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1, help="loader processes of each run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no run after so many")
    parser.add_argument("--only", help="variants whose name holds this")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        result = run_one(args.one, args.seed, args)
        (Path(args.output) / f"{slug(args.one)}-{args.seed}.json").write_text(json.dumps(result, indent=1) + "\n")
        return
    if not Path(args.scenes).exists():
        from muco.data.scenes import write_scenes

        write_scenes(Path(args.scenes))
    run_all(args)


if __name__ == "__main__":
    main()
