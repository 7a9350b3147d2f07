"""Scores two models on your data with the controls, and says whether B is better than A or it may be chance.
A model is what muco.load takes, or, after `stock:`, any SentenceTransformer of texts and images.

    python examples/evaluate_hub_model.py test.jsonl stock:sentence-transformers/clip-ViT-B-32 starter
"""

import sys

import numpy as np
from rich.console import Console
from sentence_transformers import SentenceTransformer

import muco
from muco.data import Data, open_data
from muco.evaluate import compare, metrics, report, retrieval
from muco.images import open_image


class Stock(SentenceTransformer):  # an image with a text becomes the sum of both vectors
    fingerprint = "stock"  # no cache is used that would need more

    def encode(self, contents: list[muco.Content], *, batch_size: int) -> np.ndarray:
        if any(len(content.images) > 1 for content in contents):
            raise muco.DataError("the library takes one image per input; leave out what has more")
        vectors = np.zeros((len(contents), self.get_embedding_dimension()), dtype=np.float32)
        for first in range(0, len(contents), batch_size):  # few images are open at a time
            some = [*enumerate(contents)][first : first + batch_size]
            texts = {row: {"text": content.text} for row, content in some if content.text}
            seen = {row: {"image": open_image(content.images[0])} for row, content in some if content.images}
            for part in filter(None, (texts, seen)):  # the library takes inputs of one sort at a time
                vectors[[*part]] += super().encode([*part.values()], batch_size=batch_size, normalize_embeddings=True)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def caption_hits(model: Stock, data: Data) -> np.ndarray:
    """float [n]: 1 where an image finds its caption before all others; the mean is hit@1 of image_to_caption."""
    turns = [(s.images, turn) for s in data if s.images for turn in s.turns if turn.kind == "retrieval"]
    if not turns:
        raise muco.DataError("models are compared by captions, and no turn about an image is of the kind 'retrieval'")
    queries = model.encode([muco.Content(turn.query[0].text, shown) for shown, turn in turns], batch_size=64)
    captions = [turn.target[0] for _, turn in turns]
    scores, names = queries @ model.encode(captions, batch_size=64).T, [*map(repr, captions)]
    return 1.0 * (metrics.ranks(scores, np.arange(len(turns)), names) == 1)  # equal ones: no rivals


def main() -> None:
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    data, hits = open_data(sys.argv[1]), []
    for name in sys.argv[2:]:
        model = Stock(name.removeprefix("stock:")) if name.startswith("stock:") else muco.load(name)
        report.print_results(retrieval.evaluate_retrieval(model, data), Console())
        hits.append(caption_hits(model, data))
    low, high = compare.interval(compare.bootstrap(hits[1] - hits[0], 10_000, np.random.default_rng(0)), 0.95)
    print(f"image to caption, B - A: {hits[1].mean() - hits[0].mean():+.3f}, 95 % interval {low:+.3f} to {high:+.3f}")
    print("The difference may be chance." if low <= 0 <= high else f"{'B' if low > 0 else 'A'} is better.")


if __name__ == "__main__":
    try:
        main()
    except (muco.MucoError, OSError) as error:
        sys.exit(f"error: {error}")
