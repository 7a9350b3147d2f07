"""Retrieval scores during training, as an evaluator of the sentence-transformers trainer."""

from __future__ import annotations

from typing import Any

from sentence_transformers.base.evaluation import BaseEvaluator

from muco.data.source import Data
from muco.errors import MucoError, did_you_mean
from muco.evaluate.retrieval import Scoring, score_tasks
from muco.model import Model


class RetrievalEvaluator(BaseEvaluator):
    """Scores the model on a few samples; the trainer logs the scores as ``eval_image_to_caption_hit@1`` and so on.

    It uses no cache and no fingerprint, because the weights change between two calls. It draws nothing random and
    writes no file, so that training continues as if it had not been interrupted.

    Args:
        data: Samples that are not trained on.
        primary: The metric by which checkpoints are compared. None takes hit@1 of the first task of image_to_caption,
            answer, and any other that the data has.
        options: ``limit``, ``batch_size``, ``candidates`` and ``seed`` as for
            :func:`muco.evaluate.retrieval.score_tasks`.
    """

    def __init__(self, data: Data, *, primary: str | None = None, **options: Any) -> None:
        super().__init__()
        self.data = data
        self.options = {"limit": None, "batch_size": 64, "candidates": 100, "seed": 0} | options
        self.primary_metric = primary

    def __call__(
        self, model: Model, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        """hit@1 and MRR of every task (0 to 1), and ``collapsed`` (1 if the vectors are one point or not finite).

        Raises:
            MucoError: If the data does not have the primary metric.
        """
        result = score_tasks(model, self.data, Scoring(**self.options))
        metrics = {"collapsed": float(result["collapsed"])}
        for name, scores in result["tasks"].items():
            scores = scores.get("mean", scores)
            metrics |= {f"{name}_hit@1": scores["hit@1"], f"{name}_mrr": scores["mrr"]}
        if self.primary_metric is None:
            first = [name for name in ("image_to_caption", "answer", *result["tasks"]) if name in result["tasks"]]
            self.primary_metric = f"{first[0]}_hit@1"
        if self.primary_metric not in metrics:
            hint = did_you_mean(self.primary_metric, sorted(metrics))
            raise MucoError(f"{self.primary_metric!r} is not a metric of this data{hint}")
        self.store_metrics_in_model_card_data(model, metrics, epoch, steps)
        return metrics

    def get_config_dict(self) -> dict[str, Any]:
        return self.options
