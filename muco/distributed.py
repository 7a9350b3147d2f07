"""Several devices, one process each: the only file that imports torch.distributed. With one process nothing happens.

Every process embeds its own samples. The vectors of all turns are gathered, and each process takes the loss over all of
them, in which only its own vectors carry a gradient. So the gradient of a parameter is the *sum* over processes. They
may make different numbers of passes, with different numbers of turns, with and without images.

Gradients are summed once, after the last backward pass of the step. DistributedDataParallel would need exactly one
backward pass per step with the same parameters everywhere, which the gradient cache and processes without images
cannot offer.
"""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from muco.base import files
from muco.errors import MucoError

Result = TypeVar("Result")
BUCKET = 1 << 26  # elements that are reduced in one message
PATIENCE = timedelta(hours=6)  # with which processes wait for one that saves, or encodes; one that ends ends them all
_meshes: list[DeviceMesh] = []  # all that were made here


def start() -> None:
    """Joins the group of ``torchrun`` or ``accelerate launch``, if any; a MucoError if this process cannot."""
    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    if wanted > 1:
        from accelerate import PartialState

        if "MASTER_ADDR" not in os.environ:
            raise MucoError(
                f"WORLD_SIZE is {wanted}, but MASTER_ADDR is not set; start with torchrun or accelerate launch"
            )
        PartialState(cpu=on_cpu(), timeout=PATIENCE)  # chooses NCCL or gloo and this process's device
        if dist.get_backend() == "gloo":
            atexit.register(leave)
    if world_size() != wanted:
        raise MucoError(f"WORLD_SIZE is {wanted}, but this process is one of {world_size()}; start it in a new process")


def leave() -> None:
    """Ends the process group; called at exit, because a gloo thread that outlives the interpreter may abort it.

    NCCL needs no such end. Its own would wait for the other processes, also where this one has failed and they wait
    for it, so that their launcher would never learn of it.
    """
    if not _together():
        return
    gc.collect()  # sharded modules, which hold the group, are cycles
    for mesh in _meshes:  # torch's caches keep a mesh for ever, and that its group
        vars(mesh).get("_pg_registry", {}).clear()
    dist.destroy_process_group()


def on_cpu() -> bool:
    """Whether several processes share the CPU: none of them has a GPU."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available()


def world_size() -> int:
    return dist.get_world_size() if _together() else 1


def rank() -> int:
    return dist.get_rank() if _together() else 0


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


def gather(rows: Tensor) -> Tensor:
    """The rows of all processes, any number each, in their order: [sum of rows, ...]; own rows keep their gradient."""
    if world_size() == 1:
        return rows
    counts = [int(count) for count in _all_gather(torch.tensor([len(rows)], device=rows.device))]
    padded = rows.detach().new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    parts = [part[:count] for part, count in zip(_all_gather(padded), counts, strict=True)]
    parts[rank()] = rows
    return torch.cat(parts)


def _all_gather(tensor: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return parts


def gather_objects(value: Any) -> list[Any]:
    """One plain value per process, in their order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def largest(value: int) -> int:
    """The largest of the processes' values."""
    if world_size() == 1:
        return value
    number = torch.tensor(value, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


def smallest(value: int) -> int:
    return -largest(-value)


def first_only(action: Callable[[], Result]) -> Result:
    """Lets the first process act and hands its result, or the error it raised, to all."""
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = action()
        except Exception as error:  # it is raised below, on every process
            outcome[1] = error
    if world_size() > 1:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


@contextmanager
def claimed(path: str | Path) -> Iterator[None]:
    """:func:`muco.base.files.claimed` by the first process for all; each learns it if the folder is in use."""
    with ExitStack() as held:
        first_only(lambda: held.enter_context(files.claimed(path)))
        yield


def wait_for_all() -> None:
    if world_size() > 1:
        dist.barrier()


def make_equal(parameters: Iterable[nn.Parameter]) -> None:
    """Gives every process the first one's values."""
    if world_size() > 1:
        for parameter in parameters:
            dist.broadcast(parameter.data, src=0)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sums the gradients of all processes in place, a missing one as zero; not of sharded parameters: FSDP2 has."""
    if world_size() == 1:
        return
    own = [p for p in parameters if p.requires_grad and not isinstance(p, DTensor)]
    for bucket in _buckets(own):
        flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in bucket])
        dist.all_reduce(flat)
        for parameter, grad in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = grad.view_as(parameter)


def _buckets(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Runs of parameters of one dtype; no bucket has more than ``BUCKET`` elements unless it is a single parameter."""
    buckets: list[list[nn.Parameter]] = []
    room = 0
    for parameter in parameters:
        if parameter.numel() > room or parameter.dtype != buckets[-1][0].dtype:
            buckets.append([])
            room = BUCKET
        buckets[-1].append(parameter)
        room -= parameter.numel()
    return buckets


def shard(model: nn.Module, layers: Iterable[nn.Module], replicated: Iterable[nn.Parameter] = ()) -> None:
    """Spreads weights, gradients and optimizer state over all processes (FSDP2), in place.

    Args:
        layers: Modules that are gathered one at a time; what is outside of them is gathered for the whole pass.
        replicated: Weights that every process keeps whole.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    mesh = init_device_mesh(device.type, (world_size(),))
    _meshes.append(mesh)
    ignored = {*replicated}
    for module in (*layers, model):
        # the outermost too: left whole after an evaluation, its weights would not be those that the optimizer knows
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=ignored)
        module.set_gradient_divide_factor(1.0)  # the loss is already the mean over all turns, so gradients are summed
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other reduction


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from all shards; every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def assign(parameter: nn.Parameter, values: Tensor) -> None:
    """Sets a parameter, sharded or not, to whole values that every process has."""
    values = values.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        values = distribute_tensor(values, parameter.device_mesh, parameter.placements)
    parameter.copy_(values)
