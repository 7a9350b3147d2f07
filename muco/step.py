"""One training step of any size: embed in chunks, take the loss once, replay the chunks with gradient.

::

    parts ─see─▶ features of frozen vision, pixels dropped ─split by token budget─▶ chunks of dialogues
    first pass    chunk ─embed, no graph─▶ vectors                        random state of each chunk is noted
    loss          all vectors of all processes ─▶ scalar ─▶ d loss / d vectors
    second pass   chunk ─embed, the same randomness─▶ vectors · their gradients ─▶ d loss / d weights

Value and gradient are those of the plain step; one chunk's activations are in memory at a time (gradient cache: Gao et
al., arXiv 2101.06983). The largest chunk is the last of the first pass and the first of the second, so that its graph
is kept and it passes once. A step within the budget is made plainly, in one pass over its chunks. The library's cached
losses cut rectangles and run the vision tower in both passes; :func:`muco.batch.split` cuts trees of turns, flattened
images and kept features. The replay of randomness is the library's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from sentence_transformers.base.losses.gradcache import RandContext
from torch import Tensor

from muco import distributed
from muco.base.machine import GIB
from muco.batch import DialogueBatch, collate, images_of, join, rows_of, spans_of, split
from muco.dialogue import single_turn
from muco.errors import TrainingError
from muco.loss import MultiTurnLoss
from muco.model import Model
from muco.negatives import TurnIds, Variety

log = logging.getLogger(__name__)
SIDES = ("query", "target")
UNLIMITED = 1 << 40  # tokens: the budget where none is asked for


@dataclass(frozen=True)
class StepReport:
    """The result of a step on this process."""

    loss: Tensor  # in nats, the same on every process
    tokens: int  # of all dialogues, padding left out
    padding: float  # share of padding in what passed through the model
    chunks: int  # forward passes with gradient
    no_negative: str = ""  # why no turn of the step has a negative, over all processes; "" where one has


@dataclass(frozen=True)
class _Chunk:
    """Dialogues that pass through the model together."""

    side: str
    batch: DialogueBatch
    turns: Tensor  # which vectors of the side are theirs
    used: bool = True  # False for a pass made only because other processes wait for it

    @property
    def tokens(self) -> int:
        """Padding included."""
        return self.batch["input_ids"].numel()


@dataclass(frozen=True)
class _Batch:
    """A whole step's share of this process."""

    sides: dict[str, DialogueBatch]  # on the CPU; a dialogue per side also where the share has no turn
    ids: TurnIds  # on the device
    places: list[str]
    variety: Variety


class TrainingStep:
    """Makes steps: called with the parts of a batch it leaves the gradients of the loss in the parameters.

    Args:
        model: On its device, in training mode.
        loss: Its :meth:`~muco.loss.MultiTurnLoss.of_vectors` is applied.
        token_budget: Most tokens whose activations are in memory at once, padding included; None: no limit. When memory
            runs out, it is halved for good and the step made again.
        feature_memory: GiB of the device that may hold features of frozen vision; the rest waits in host memory.
        autocast: Makes the context of one forward pass.
    """

    def __init__(
        self,
        model: Model,
        loss: MultiTurnLoss,
        *,
        token_budget: int | None = None,
        feature_memory: float = 8.0,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.model, self.loss, self.autocast = model, loss, autocast
        self.token_budget, self.feature_memory = token_budget or UNLIMITED, feature_memory
        self.keeps_features = model.encoder.vision_is_frozen
        self.sharded = distributed.is_sharded(model)

    def __call__(self, parts: Iterable[Mapping[str, Any]]) -> StepReport | None:
        """Makes one step.

        Args:
            parts: From :func:`muco.training.prepared.batch_of`, on the CPU; at least one, taken one at a time.
        Returns:
            None, and no gradients, if no process has a turn.
        Raises:
            TrainingError: If the loss is not finite, or one dialogue alone is more than memory holds.
        """
        self._forget()
        batch = self._receive(parts)
        varieties = distributed.gather_objects(batch.variety)
        if not any(variety.turns for variety in varieties):
            return None
        while True:
            self.token_budget = distributed.smallest(self.token_budget)
            chunks = [_Chunk(side, *cut) for side in SIDES for cut in split(batch.sides[side], self.token_budget)]
            # FSDP2 wants each forward pass followed by its backward pass
            plain = sum(chunk.tokens for chunk in chunks) <= self.token_budget and not self.sharded
            loss = self._plain(chunks, batch) if plain else self._cached(chunks, batch)
            if loss is not None:
                break
            # smaller than what was in memory at once: all chunks in a plain step, one in a cached one
            tokens = [chunk.tokens for chunk in chunks]
            smaller = plain or any(len(chunk.batch["input_ids"]) > 1 for chunk in chunks)
            # of the process with most: another may have had next to nothing, and all take the least budget of all
            held = distributed.largest(sum(tokens) if plain else max(tokens))
            self._shrink(held, possible=distributed.largest(int(smaller)) > 0)
        distributed.sum_gradients(self.model.parameters())
        tokens = sum(int(side["attention_mask"].sum()) for side in batch.sides.values())
        passed = sum(chunk.tokens for chunk in chunks)
        return StepReport(loss, tokens, 1 - tokens / passed, len(chunks), self.loss.why_no_negative(varieties))

    def _receive(self, parts: Iterable[Mapping[str, Any]]) -> _Batch:
        """Puts the parts together; as they come, images are replaced by their features where these cannot change."""
        sides: dict[str, list[DialogueBatch]] = {side: [] for side in SIDES}
        ids, places = [], []
        room = self.feature_memory * GIB
        for part in parts:
            for side in SIDES if part["places"] else ():
                batch, room = self._see(part[side], room)
                sides[side].append(batch)
            ids.append(part["ids"])
            places += part["places"]
        joined = TurnIds.join(ids)
        # a share without a turn makes passes as the others do
        idle = [] if places else [collate([single_turn("nothing")], self.model.encoder.muco_processor)]
        whole = {side: join(batches or idle) for side, batches in sides.items()}
        return _Batch(whole, joined.to(self.model.device), places, Variety.of(joined))

    def _see(self, batch: DialogueBatch, room: float) -> tuple[DialogueBatch, float]:
        """The batch with features for pixels if vision is frozen, and the bytes of the device left of ``room``."""
        if not self.keeps_features or "images" not in batch:
            return batch, room
        features: list[tuple[Tensor, ...]] = []
        tokens = batch["image_tokens"]
        while len(features) < len(tokens):
            first, memory = len(features), _OutOfMemory()
            fitting = max(1, int((tokens[first:].cumsum(0) <= self.token_budget).sum()))
            images = torch.arange(first, first + fitting)
            with memory, torch.no_grad(), self.autocast():
                seen = self.model.encoder.image_features(images_of(batch, images))
            if memory.happened:
                self._shrink(int(tokens[images].sum()), possible=len(images) > 1)
                continue
            room -= sum(tensor.nbytes for image in seen for tensor in image)
            features += seen if room >= 0 else [tuple(tensor.cpu() for tensor in image) for image in seen]
        light = {key: value for key, value in batch.items() if key != "images"}
        return light | {"image_features": features}, room  # type: ignore[return-value]

    def _plain(self, chunks: Sequence[_Chunk], batch: _Batch) -> Tensor | None:
        """Each chunk once, all with their graphs; None if memory ran out on any process."""
        memory = _OutOfMemory()
        with memory:
            vectors = [self._embed(chunk) for chunk in chunks]
        if self._failed(memory):
            return None
        loss = self._loss(_side("query", chunks, vectors), _side("target", chunks, vectors), batch)
        with memory:
            loss.backward()
        return None if self._failed(memory) else loss.detach()

    def _cached(self, chunks: Sequence[_Chunk], batch: _Batch) -> Tensor | None:
        """The same in chunks; None if memory ran out on any process."""
        memory = _OutOfMemory(caught=not self.sharded)  # else the other processes would wait for our part
        passed = [*sorted(chunks, key=lambda chunk: chunk.tokens), *self._idle(chunks)]
        kept = None if self.sharded else len(passed) - 1  # FSDP2 wants each backward pass right after its forward pass
        states, vectors = [], []
        with memory:
            for number, chunk in enumerate(passed):
                states.append(RandContext(next(self.model.parameters())))
                with torch.set_grad_enabled(number == kept):
                    vectors.append(self._embed(chunk))
        if self._failed(memory):
            return None
        leaves = {side: _side(side, passed, [v.detach() for v in vectors]).requires_grad_() for side in SIDES}
        loss = self._loss(leaves["query"], leaves["target"], batch)
        loss.backward()
        with memory:
            for number in reversed(range(len(passed))):
                chunk, replayed = passed[number], vectors.pop()
                if number != kept:
                    with states[number]:
                        replayed = self._embed(chunk)
                gradient = leaves[chunk.side].grad[chunk.turns.to(replayed.device)]
                (replayed * (gradient if chunk.used else torch.zeros_like(gradient))).sum().backward()
        return None if self._failed(memory) else loss.detach()

    def _idle(self, chunks: Sequence[_Chunk]) -> list[_Chunk]:
        """Passes whose result is not used, so that all processes that share one sharded model make equally many."""
        if not self.sharded:
            return []
        missing = distributed.largest(len(chunks)) - len(chunks)
        small, turns = rows_of(chunks[-1].batch, spans_of(chunks[-1].batch)[-1:])
        return [replace(chunks[-1], batch=small, turns=chunks[-1].turns[turns], used=False)] * missing

    def _embed(self, chunk: _Chunk) -> Tensor:
        with self.autocast():  # one per pass: autocast keeps cast weights, which without a graph are of no use with one
            return self.model.embed(chunk.batch)

    def _loss(self, query: Tensor, vectors: Tensor, batch: _Batch) -> Tensor:
        if not batch.places:  # the dialogue of a share without a turn
            query, vectors = query[:0], vectors[:0]
        loss = self.loss.of_vectors(query, vectors, batch.ids)
        if torch.isfinite(loss):
            return loss
        own: list[str] = []  # samples with a vector that is not finite
        if batch.places:
            parts = self.loss.parts(query, vectors, batch.ids)
            finite = torch.stack([torch.isfinite(part).all(dim=1) for part in parts]).all(dim=0)
            hard = torch.isfinite(vectors[batch.ids.hard_rows]).all(dim=1)
            finite[batch.ids.hard_turns[~hard]] = False
            owners = batch.sides["query"]["turn_rows"].view(len(batch.ids), -1)[:, 0]  # a reconstructed pair has two
            own = [batch.places[row] for row in owners[~finite.cpu()].unique().tolist()]
        places = [place for part in distributed.gather_objects(own) for place in part]
        shown = ", ".join(places[:5]) + (f" and {len(places) - 5} more" if len(places) > 5 else "")
        where = f"vectors are not finite for {shown}" if places else "all vectors are finite"
        raise TrainingError(f"the loss is {loss.item()}; {where}")

    def _failed(self, memory: _OutOfMemory) -> bool:
        """Whether memory ran out on any process; then the gradients found so far are dropped."""
        if not distributed.largest(int(memory.happened)):
            return False
        self.model.zero_grad(set_to_none=True)
        self._forget()
        return True

    def _forget(self) -> None:
        """Drops the gradients of the loss's own parameters, which are not among the model's."""
        for parameter in self.loss.parameters(recurse=False):
            parameter.grad = None

    def _shrink(self, tokens: int, *, possible: bool) -> None:
        before = min(self.token_budget, tokens)
        if not possible:
            raise TrainingError(
                f"out of memory with one dialogue of {before} tokens at a time; lower model.max_pixels or turns.limit, "
                "set model.activation_checkpointing, or spread the model with batch.sharding: fsdp"
            )
        self.token_budget = budget = max(1, before // 2)
        log.warning("out of memory with %d tokens at once; continuing with token_budget %d", before, budget)


class _OutOfMemory:
    """Suppresses the error of a device, or the host, that has no more memory, and remembers it."""

    def __init__(self, *, caught: bool = True) -> None:
        self.caught, self.happened = caught, False

    def __enter__(self) -> _OutOfMemory:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if not isinstance(error, Exception) or not _is_out_of_memory(error):
            return False
        if not self.caught:
            raise TrainingError(
                "out of memory; a sharded step cannot be made again, so lower batch.token_budget and start again"
            ) from error
        self.happened = True
        clear_device_cache(garbage_collection=True)
        return True


def _is_out_of_memory(error: Exception) -> bool:
    """As accelerate finds it, and as other libraries of the device say it."""
    said = str(error).lower()
    known = "out of memory" in said or "alloc_failed" in said
    return should_reduce_batch_size(error) or (isinstance(error, RuntimeError) and known)


def _side(side: str, chunks: Sequence[_Chunk], vectors: Sequence[Tensor]) -> Tensor:
    """The vectors of a side in the order of its turns."""
    own = [(c.turns, part) for c, part in zip(chunks, vectors, strict=True) if c.side == side and c.used]
    turns, parts = (torch.cat(tensors) for tensors in zip(*own, strict=True))
    return parts[turns.argsort().to(parts.device)]
