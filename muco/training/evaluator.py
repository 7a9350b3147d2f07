"""Retrieval scores during training, as an evaluator of the sentence-transformers trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sentence_transformers.base.evaluation import BaseEvaluator

from muco.errors import MucoError
from muco.evaluate.retrieval import Scoring, score_tasks

if TYPE_CHECKING:
    from muco.data.source import Data
    from muco.model import Model


class RetrievalEvaluator(BaseEvaluator):
    """Scores the model on a few samples; the trainer logs the numbers as ``eval_image_to_caption_hit@1`` and so on.

    No cache and no fingerprint are taken: the weights change between two calls. Nothing random is drawn and no file
    is written, so that training goes on as if it had not been interrupted.

    Args:
        data: Samples that are not trained on.
        limit: Only the first so many; None: all of them.
        candidates: See ``evaluate_retrieval``.
        primary: The metric by which checkpoints are compared; without it the first of image_to_caption, answer, or
            any other task that the data gives.
    """

    def __init__(
        self,
        data: Data,
        *,
        limit: int | None = None,
        batch_size: int = 64,
        candidates: int = 100,
        seed: int = 0,
        primary: str | None = None,
    ) -> None:
        super().__init__()
        self.data = data
        self.options: dict[str, Any] = {
            "limit": limit,
            "batch_size": batch_size,
            "candidates": candidates,
            "seed": seed,
        }
        self.primary_metric = primary

    def __call__(
        self, model: Model, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        """hit@1 and MRR of every task (0 to 1), and ``collapsed`` (1 if the vectors are one point or not finite).

        Raises:
            MucoError: If the data does not give the primary metric.
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
            known = ", ".join(sorted(metrics))
            raise MucoError(f"{self.primary_metric!r} is no metric of this data; there are {known}")
        self.store_metrics_in_model_card_data(model, metrics, epoch, steps)
        return metrics

    def get_config_dict(self) -> dict[str, Any]:
        return self.options
