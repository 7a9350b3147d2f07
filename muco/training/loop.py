"""sentence-transformers' trainer with our batches, steps and checkpoints."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import Dataset
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformerTrainer
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from muco import distributed
from muco.base.files import writing
from muco.base.machine import GIB, peak_host_memory
from muco.errors import OutputError, TrainingError
from muco.loss import MultiTurnLoss
from muco.model import Model
from muco.step import TrainingStep
from muco.training import checkpoint
from muco.training.batches import PartSampler, StepLoader, TrainingBatches
from muco.training.build import shard_model
from muco.training.callbacks import Record, ScreenProgress, TensorBoardLog, TokenBudget
from muco.training.checks import OneDeviceArguments
from muco.training.folder import LOGS, WEIGHTS_FILE
from muco.training.recipe import BatchRecipe

MANY_LEFT_OUT = 0.2  # of all negatives; a larger share can hardly be right answers
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # of a sharded optimizer

log = logging.getLogger(__name__)


def memory() -> dict[str, float]:
    """GiB that this process held, for the log.

    ``host_memory_gib``: the most that it held in host memory, and what the workers of its loader hold for themselves
    now. ``peak_memory_gib``: the most that torch held on its GPU; without a GPU the most in host memory, its own.
    """
    own = peak_host_memory()
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else own
    found = {"peak_memory_gib": device, "host_memory_gib": own + sum(map(_unshared, psutil.Process().children()))}
    return {name: round(number / GIB, 3) for name, number in found.items()}


def _unshared(process: psutil.Process) -> int:
    """Bytes that a process shares with no other; 0 if it has ended, or may not be looked at."""
    try:
        return process.memory_full_info().uss
    except psutil.Error:
        return 0


class MuCoTrainer(SentenceTransformerTrainer):
    """sentence-transformers' trainer with our batches and steps; the loop, optimizer, schedule and logs are its own."""

    is_fsdp_enabled: bool

    def __init__(
        self,
        model: Model,
        args: OneDeviceArguments,
        batch: BatchRecipe,
        batches: TrainingBatches,
        loss: MultiTurnLoss,
        record: Record,
        evaluator: Any = None,
    ) -> None:
        self.batch, self.batches, self.record = batch, batches, record
        self._output = Path(args.output_dir).parent
        # the library insists on a table; this one has a row per step, the loader below makes the batches
        table = Dataset.from_dict({"step": range(args.max_steps)})
        super().__init__(model=model, args=args, train_dataset=table, loss=loss, evaluator=evaluator)
        for shown in (ProgressCallback, PrinterCallback):  # they print to stdout, which is for programs
            self.remove_callback(shown)
        if self.pop_callback(TensorBoardCallback):
            self.add_callback(TensorBoardLog(self._output / LOGS))
        if distributed.rank() == 0:
            self.add_callback(ScreenProgress(record))
        self.budget = TokenBudget(batch.token_budget)
        self.add_callback(self.budget)
        self.add_callback(record)
        if batch.sharding == "fsdp":
            shard_model(model)
        # The trainer must not wrap the model in DistributedDataParallel, see muco.distributed. It has no setting for
        # this; with the next line it takes the model as it is, sharded or not.
        self.is_distributed_loading_by_transformers = True
        self.made, self.without_turn = 0, 0  # steps since the last log, and those that were left out
        self.padding = 0.0  # of the last step
        self.warned = False  # that a step had no negative
        self.told_of_left_out = False  # that none or many negatives are left out by their score

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        """Does nothing: the step itself sums the gradients."""

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Adds none: :mod:`muco.training.checkpoint` writes the card from what was run."""

    def get_train_dataloader(self) -> StepLoader:
        workers = self.args.dataloader_num_workers
        steps = PartSampler(self.args.max_steps, self.batches.parts, first=lambda: self.state.global_step)
        loader = DataLoader(
            self.batches,
            batch_sampler=steps,
            collate_fn=itemgetter(0),
            num_workers=workers,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
            persistent_workers=bool(workers),
            multiprocessing_context=self.args.dataloader_multiprocessing_context if workers else None,
            pin_memory=self.args.dataloader_pin_memory,
            generator=torch.Generator(),  # its own: a start of the loader must not move the model's randomness
        )
        return StepLoader(loader)

    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> tuple[Any, Any]:
        """As the library's, which takes in the loss's own parameters, but those in a group without weight decay."""
        kind, options = super().get_optimizer_cls_and_kwargs(args, model)
        own, groups = [*self.loss.parameters(recurse=False)], options.get("optimizer_dict")
        if own and groups:
            for group in groups:
                group["params"] = [one for one in group["params"] if all(one is not other for other in own)]
            groups.append({"params": own, "weight_decay": 0.0})
        return kind, options

    @cached_property
    def step(self) -> TrainingStep:
        return TrainingStep(
            self.model,
            self.loss,
            token_budget=self.budget.tokens,
            feature_memory=self.batch.feature_memory,
            autocast=self.accelerator.autocast,
        )

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        model.train()
        try:
            report = self.step(self._counted(inputs["parts"]))
        except TrainingError as error:
            raise TrainingError(f"step {self.state.global_step + 1}: {error}; {self._last_good()}") from error
        self.budget.tokens = self.step.token_budget
        if report is None:
            self._warn(f"step {self.state.global_step + 1}: none of its samples can be used; the step is left out")
            self.without_turn += 1
            return torch.tensor(0.0, device=self.args.device)  # see log
        if report.no_negative and not self.warned:
            self.warned = True
            self._warn(
                f"step {self.state.global_step + 1}: no turn has a negative ({report.no_negative}), so the loss is "
                "0 and nothing is learnt; a batch needs samples of different images with different targets, or hard "
                "negatives (later steps of this kind are not reported)"
            )
        self.made, self.padding = self.made + 1, report.padding
        return report.loss

    def _warn(self, sentence: str) -> None:
        if distributed.rank() == 0:
            log.warning(sentence)

    def _counted(self, parts: Iterable[Mapping[str, Any] | None]) -> Iterator[Mapping[str, Any]]:
        for part in parts:
            if part is not None:
                self.record.add(part)
                yield part

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        if not math.isfinite(float(norm)):
            raise TrainingError(f"step {self.state.global_step + 1}: the gradient is {norm}; {self._last_good()}")
        return norm

    def _last_good(self) -> str:
        last = checkpoint.last_complete(self._output, distributed.world_size())
        return f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the library's, whose own sharding is the only one it knows: of a sharded model every process must make
        every pass, so every process evaluates.
        """
        two_precisions = len({parameter.dtype for parameter in self.model.parameters()}) > 1
        own = self.is_fsdp_enabled
        self.is_fsdp_enabled = own or self.batch.sharding == "fsdp"
        try:
            with self.accelerator.autocast() if two_precisions else nullcontext():
                return super().evaluate(*args, **kwargs)
        finally:
            self.is_fsdp_enabled = own

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            made, steps = self.made, self.made + self.without_turn
            self.made = self.without_turn = 0
            if made:
                logs["loss"] *= steps / made  # the library's mean counts steps that were left out
                logs |= {"padding": round(self.padding, 4)} | memory() | self._left_out() | self._temperatures()
            else:  # no loss was found
                del logs["loss"]
        logs.pop("train_loss", None)  # wrong after steps that were left out, and in a resumed run
        super().log(logs, start_time)

    def _temperatures(self) -> dict[str, float]:
        """Those that are learnt, by the number of their source where there are several."""
        learnt = [] if self.loss.log_scales is None else self.loss.temperatures()
        names = ["temperature"] if len(learnt) == 1 else [f"temperature_{number}" for number in range(len(learnt))]
        return dict(zip(names, learnt, strict=True))

    def _left_out(self) -> dict[str, float]:
        """The share of negatives that were left out by their score since the last log, if any can be."""
        counted, self.loss.counted = self.loss.counted, None
        rules = {
            "loss.weighting.false_negative_margin": self.loss.weighting.false_negative_margin,
            "loss.guide": self.loss.guide,
        }
        used = [name for name, rule in rules.items() if rule is not None]
        if not used or counted is None:
            return {}
        pairs, left_out = counted.tolist()
        share = left_out / max(pairs, 1)
        if (share == 0 or share > MANY_LEFT_OUT) and not self.told_of_left_out:
            self.told_of_left_out = True
            self._warn(
                f"step {self.state.global_step}: {' and '.join(used)}: {share:.1%} of all negatives are left out, "
                f"which is {'many' if share else 'none'}; set another margin, or do without (later shares are in the "
                "log alone)"
            )
        return {"false_negatives": round(share, 6)}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            with writing(folder, again=True):
                super()._save_checkpoint(model, trial)
        except OutputError as error:
            raise OutputError(f"step {self.state.global_step}: {error}; {self._last_good()}") from error

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        weights = checkpoint.trained_weights(self.model, self.loss)  # on all processes: shards are put together
        broken = [name for name, values in weights.items() if not torch.isfinite(values).all()]
        if broken:
            raise TrainingError(f"step {self.state.global_step}: {broken[0]} is not finite; {self._last_good()}")
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_file(weights, str(folder / WEIGHTS_FILE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoint.load_trained(self.model, Path(resume_from_checkpoint), self.loss)
        state = json.loads((Path(resume_from_checkpoint) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        kept = state["stateful_callbacks"]
        self.budget.resume(kept[TokenBudget.__name__])
        self.record.resume(kept[Record.__name__]["attributes"])

    @property
    def _trained(self) -> nn.Module:
        """The module whose parameters the optimizer has."""
        return self.model if self.loss.log_scales is None else self.loss

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not distributed.is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = get_optimizer_state_dict(self._trained, self.optimizer.optimizer, options=WHOLE)  # on all processes
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, folder: str | None) -> None:
        if folder is None or not distributed.is_sharded(self.model):
            super()._load_optimizer_and_scheduler(folder)
            return
        state = torch.load(Path(folder) / OPTIMIZER_NAME, weights_only=True, map_location="cpu")
        set_optimizer_state_dict(self._trained, self.optimizer.optimizer, state, options=WHOLE)
        self.lr_scheduler.load_state_dict(torch.load(Path(folder) / SCHEDULER_NAME, weights_only=True))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.record.gather()
        distributed.wait_for_all()  # the trainer's state, written next, says that the checkpoint is complete
