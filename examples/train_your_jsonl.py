"""Trains a model further on your own JSONL file and says how well it finds things in a tenth that was held out.
Without --model it is the starter, on a CPU. The same command again resumes where it stopped.

    python examples/train_your_jsonl.py data.jsonl --output runs/mine [--model Qwen/Qwen2-VL-2B-Instruct --rate 5e-5]
"""

import argparse
from pathlib import Path

import muco
from muco.data import open_data
from muco.data.check import check
from muco.data.split import split
from muco.evaluate.retrieval import evaluate_retrieval
from muco.training.recipe import from_dict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path, help="a JSONL file")
    parser.add_argument("--output", type=Path, required=True, help="folder for both parts, the run and the scores")
    parser.add_argument("--model", default="starter", help="folder or hub id to start from (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=3e-4, help="learning rate (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=500, help="of 32 samples each (default: %(default)s)")
    args = parser.parse_args()
    if problems := [line for found in check(args.data).problems.values() for line in found.listed]:
        raise muco.DataError(f"{problems[0]}; `muco data check {args.data}` lists all that is wrong")
    split(open_data(args.data), args.output)
    settings = {  # the keys of a YAML recipe
        "output": str(args.output / "run"),
        "model": {"path": args.model, "adapter": {"rank": 64}},
        "data": {"train": [{"path": f"{args.output}/train.jsonl"}]},
        "turns": {"image_turn": "retrieval"},  # one more turn: the image alone, with its caption
        "loss": {"temperature": 0.02, "symmetric": True},
        "trainer": {"max_steps": args.steps, "learning_rate": args.rate, "save_steps": 100},
    }
    model = muco.load(muco.train(from_dict(settings)))
    scores = evaluate_retrieval(model, open_data(args.output / "dev.jsonl"), output=args.output)
    for name, task in ((name, task.get("mean", task)) for name, task in scores["tasks"].items()):
        print(f"{name:18} hit@1 {task['hit@1']:6.1%}   chance {task['chance@1']:6.1%}   {task['queries']} queries")


if __name__ == "__main__":
    try:
        main()
    except (muco.MucoError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
