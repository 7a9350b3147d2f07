"""Isolated turns through layers that keep a state instead of keys: gated delta-net, short convolution, and the like.

A mask cannot tell such a layer which tokens to read, as it reads them one after another. So each runs the trunks of all
rows once, then all branches as rows of a batch, each from the state that its trunk left, and puts the results where the
tokens were::

    row         [ trunk | branch 1 | branch 2 ]
    first run   [ trunk ]                       ─▶ state
    second run  [ branch 1 ], [ branch 2 ]      both from that state

The trunk is padded on the left, because padding on the right would change the state. States keep their graph.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from muco.reading import decoder_layers, stated_reading
from muco.vision import base_model

ARGUMENT = "turn_branches"  # by which a layer is passed its Branches; an argument, so that recomputation has it too
CACHE_ARGUMENTS = ("cache_params", "past_key_values")  # how families call the state's container


@dataclass(frozen=True)
class Branches:
    """Where trunks and branches are in rows of tokens, as columns; -1 is padding.

    Attributes:
        trunks: int64 [B, P], padded on the left.
        branches: int64 [R, L], padded on the right.
        rows: The row of each branch, int64 [R].
        kept: Per layer the state after each of N trunks, if it is kept from pass to pass; the first pass fills it.
        places: In a pass that reads kept states, which of the N each row continues, int64 [B]; then no row has a trunk.
    """

    trunks: Tensor
    branches: Tensor
    rows: Tensor
    kept: dict[int, State] | None = None
    places: Tensor | None = None

    @classmethod
    def of(
        cls, branch_ids: Tensor, real: Tensor, kept: dict[int, State] | None = None, places: Tensor | None = None
    ) -> Branches:
        """Of ``branch_ids`` (0 trunk) and ``real`` (not padding), both [B, L]."""
        width = branch_ids.shape[1]
        columns = torch.arange(width, device=branch_ids.device)
        trunk = (branch_ids == 0) & real
        trunks = torch.where(trunk, columns, -1).sort(dim=1).values[:, width - int(trunk.sum(1).max()) :]
        counts = torch.where(real, branch_ids, 0).amax(1)
        rows = torch.arange(len(branch_ids), device=columns.device).repeat_interleave(counts)
        numbers = torch.arange(len(rows), device=columns.device) - (counts.cumsum(0) - counts)[rows] + 1
        own = (branch_ids[rows] == numbers[:, None]) & real[rows]
        longest = int(own.sum(1).max()) if len(rows) else 0
        branches = torch.where(own, columns, width).sort(dim=1).values[:, :longest]
        return cls(trunks, branches.masked_fill(branches == width, -1), rows, kept, places)


@dataclass
class State:
    """Takes the place of a layer's part of a cache: keeps what a trunk leaves, or hands it to the branches.

    It has the methods that recurrent layers call. Nothing is written in place, so gradients pass.
    """

    convolution: dict[int, Tensor] = field(default_factory=dict)
    recurrent: dict[int, Tensor] = field(default_factory=dict)
    continued: bool = False

    def at(self, rows: Tensor) -> State:
        """The state for rows that continue these trunks."""
        own = ({number: tensor[rows] for number, tensor in kept.items()} for kept in (self.convolution, self.recurrent))
        return State(*own, continued=True)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.convolution.get(state_idx) if self.continued else None

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.recurrent.get(state_idx) if self.continued else None

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.continued

    def is_recording_past(self, layer_idx: int) -> bool:
        return True  # else a kernel for single tokens would write the state in place

    def update_conv_state(
        self, new: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> Tensor:
        if self.continued:
            return torch.cat([self.convolution[state_idx], new], dim=-1)
        size = conv_kernel_size or new.shape[-1]
        self.convolution[state_idx] = pad(new, (max(0, size - new.shape[-1]), 0))[..., -size:]
        return new

    def update_recurrent_state(self, new: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        if not self.continued:
            self.recurrent[state_idx] = new
        return new


def let_states_branch(model: nn.Module) -> None:
    """Lets the recurrent layers of a model take :class:`Branches`; without them they compute what they did before."""
    for module, argument in recurrent_modules(model):
        module.forward = MethodType(_branching(type(module).forward, argument), module)


def recurrent_modules(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The part of each recurrent layer that keeps a state, and the name by which it is passed the state's container."""
    reading = stated_reading(model)
    for kind, layer in zip(reading.layers, decoder_layers(model), strict=True):
        for module in layer.children() if kind in reading.recurrent else ():
            taken = inspect.signature(type(module).forward).parameters
            yield from ((module, name) for name in CACHE_ARGUMENTS if name in taken)


def state_bytes(model: nn.Module) -> list[int]:
    """Bytes of one turn's state in each recurrent layer; the model may be on the meta device."""
    width, sizes = base_model(model).get_decoder().config.hidden_size, []
    for module, argument in recurrent_modules(model):
        weight, left = next(module.parameters()), State()
        states = torch.zeros(1, 2, width, dtype=weight.dtype, device=weight.device)
        type(module).forward(module, states, **{argument: left}, attention_mask=None)
        sizes.append(sum(tensor.nbytes for tensor in (*left.convolution.values(), *left.recurrent.values())))
    return sizes


def _branching(plain: Callable[..., Tensor], cache: str) -> Callable[..., Tensor]:
    """The forward function of a recurrent layer, by which turns branch."""

    def forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layout: Branches | None = kwargs.pop(ARGUMENT, None)
        if layout is None:
            return plain(self, hidden_states, *args, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in (cache, "attention_mask")}
        output = torch.zeros_like(hidden_states)
        rows = torch.arange(len(hidden_states), device=hidden_states.device)
        if layout.places is not None:
            state = layout.kept[self.layer_idx].at(layout.places[layout.rows])
        elif layout.trunks.shape[1]:
            left = State()
            own = _taken(hidden_states, layout.trunks, rows)
            own = plain(self, own, **{cache: left}, attention_mask=(layout.trunks >= 0).long(), **kwargs)
            output = _put(output, own, layout.trunks, rows)
            if layout.kept is not None:
                layout.kept[self.layer_idx] = left
            state = left.at(layout.rows)
        else:
            state = State()
        if len(layout.rows):
            own = _taken(hidden_states, layout.branches, layout.rows)
            own = plain(self, own, **{cache: state}, attention_mask=None, **kwargs)
            output = _put(output, own, layout.branches, layout.rows)
        return output

    return forward


def _taken(states: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    return states[rows[:, None], columns.clamp(min=0)] * (columns >= 0)[..., None]


def _put(output: Tensor, part: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    row, column = (columns >= 0).nonzero(as_tuple=True)
    return output.index_put((rows[row], columns[row, column]), part[row, column].to(output.dtype))
