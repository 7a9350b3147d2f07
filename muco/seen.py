"""What a vision tower made of images, kept for when the same images come again.

A training passes over its images many times, an evaluation and a server meet many of them again. The tower's output for
an image is kept by the image's digest, within a bound of memory, and the least recently used goes first. What is behind
the tower, such as a connector that is trained, is computed each time.

A tower is what a family has beside its language model, as a model of its own. Its outputs are kept if two images
together give what each gives alone, which is tried once, and as long as its weights cannot change.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from muco.batch import to
from muco.vision import features_of, vision_modules

Images = Sequence[dict[str, Tensor]]
IMAGE_MEMORY = 1.0  # GiB, where a command keeps them
ONE_AT_A_TIME = threading.RLock()  # a tower that answers for one thread's images must not be asked by another
CLOSE = 0.02  # of the largest value: how far apart an image's outputs alone and beside another may be, in any precision


class SeenImages:
    """Outputs of one tower by image. Threads may share it, and the model; they take turns.

    Args:
        memory: Bytes of host memory they may take.
    """

    def __init__(self, memory: int) -> None:
        self.memory, self.used = memory, 0
        self._kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._separable: bool | None = None  # None: not tried yet

    def features_of(
        self,
        model: nn.Module,
        images: Images,
        joins: Mapping[str, int | None],
        tokens: Sequence[int],
        device: torch.device,
    ) -> Any:
        """As :func:`muco.vision.features_of`, of images on any device; ``tokens`` are the visual tokens of each."""
        with ONE_AT_A_TIME:
            tower = _fixed_tower(model)
            if tower is not None and self._separable is None:
                self._separable = _is_separable(model, tower, to(images[0], device), joins)
            if tower is None or not self._separable:
                return features_of(model, to(images, device), joins)
            state = _state(tower)
            keys = [(state, _digest(image)) for image in images]  # before the move: they are on the host as a rule
            return self._kept_or_made(model, tower, keys, to(images, device), joins, tokens)

    def _kept_or_made(
        self,
        model: nn.Module,
        tower: nn.Module,
        keys: Sequence[Hashable],
        images: Images,
        joins: Mapping[str, int | None],
        tokens: Sequence[int],
    ) -> Any:
        image_of = dict(zip(keys, zip(images, tokens, strict=True), strict=True))
        found = {key: self._take(key) for key in image_of}
        new = [key for key, output in found.items() if output is None]
        shares = [_share(*image_of[key], joins) for key in new]
        # A share of the tower's rows is an image's only if it gets and gives in the same proportion as the others.
        even = all(one * other[1] == two * other[0] for (one, two), other in zip(shares, shares[1:], strict=False))
        for together in [new] if even and new else [[key] for key in new]:
            with _recorded(tower) as outputs:
                features_of(model, [image_of[key][0] for key in together], joins)
            for key, output in zip(together, _apart(outputs[0], [image_of[key][1] for key in together]), strict=True):
                found[key] = output
                self._keep(key, output)
        device = next(tower.parameters()).device
        with _answered(tower, _together([found[key] for key in keys], device)):
            return features_of(model, images, joins)

    def _take(self, key: Hashable) -> Any:
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key][0]

    def _keep(self, key: Hashable, output: Any) -> None:
        own = _map(output, lambda tensor: tensor.to("cpu", copy=True))
        size = sum(tensor.nbytes for tensor in _tensors(own))
        if size > self.memory:
            return
        self._kept[key], self.used = (own, size), self.used + size
        while self.used > self.memory:
            _, (_, freed) = self._kept.popitem(last=False)
            self.used -= freed


def tower_of(model: nn.Module) -> nn.Module | None:
    """The vision tower; None if a family has several."""
    towers = [module for module in vision_modules(model).values() if isinstance(module, PreTrainedModel)]
    return towers[0] if len(towers) == 1 else None


def is_trained(tower: nn.Module) -> bool:
    """Whether any of its weights is, as is those of a connector inside it."""
    return any(parameter.requires_grad for parameter in tower.parameters())


def _fixed_tower(model: nn.Module) -> nn.Module | None:
    """The vision tower, if its weights cannot change while its outputs are used, and nothing in it is random."""
    tower = tower_of(model)
    if tower is None or tower.training or (torch.is_grad_enabled() and is_trained(tower)):
        return None
    return tower


def _state(tower: nn.Module) -> Hashable:
    """Differs if the weights have been changed since, or are read in another precision."""
    device = next(tower.parameters()).device.type
    cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return cast, *((id(parameter), parameter._version, parameter.dtype) for parameter in tower.parameters())


def _digest(image: Mapping[str, Tensor]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in image.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def _is_separable(
    model: nn.Module, tower: nn.Module, image: dict[str, Tensor], joins: Mapping[str, int | None]
) -> bool:
    """Whether the tower runs once, and gives for an image beside another what it gives for the image alone."""
    other = {name: tensor.flip(-1) if tensor.is_floating_point() else tensor for name, tensor in image.items()}
    found, passes = [], ([image], [other], [image, other])
    for images in passes[: 1 if None in joins.values() else 3]:  # some families never join images
        with torch.no_grad(), _recorded(tower) as outputs:
            features_of(model, images, joins)
        if len(outputs) != 1:
            return False
        found.append(outputs[0])
    try:
        beside = _apart(found.pop(), [1, 1] if len(found) > 1 else [1])
    except ValueError:
        return False
    return all(
        one.shape == two.shape and (one - two).abs().max() <= CLOSE * two.abs().max()
        for together, alone in zip(beside, found or beside, strict=True)
        for one, two in zip(_tensors(together), _tensors(alone), strict=True)
    )


def _share(image: Mapping[str, Tensor], tokens: int, joins: Mapping[str, int | None]) -> tuple[int, int]:
    """How many rows of pixels the tower gets of an image, and how many visual tokens come of it."""
    rows = next(tensor.shape[joins[name] or 0] for name, tensor in image.items() if tensor.is_floating_point())
    return rows, tokens


# ---------------------------------------------------------------- outputs: tensors in tuples, lists and mappings


def _map(value: Any, change: Any) -> Any:
    """The same output with each tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return type(value)(**{name: _map(own, change) for name, own in value.items()})
    if isinstance(value, (tuple, list)):
        parts = [_map(own, change) for own in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _map(value, lambda tensor: found.append(tensor) or tensor)
    return found


def _apart(value: Any, rows: Sequence[int]) -> list[Any]:
    """The output of each image: of every tensor a share in proportion to ``rows``; a ValueError if there is none."""

    def shares(tensor: Tensor) -> Sequence[Tensor]:
        ends = [len(tensor) * own for own in rows] if tensor.ndim else [1]
        if any(end % sum(rows) for end in ends) or not tensor.ndim:
            raise ValueError("no shares")
        return tensor.split([end // sum(rows) for end in ends])

    columns = [shares(tensor) for tensor in _tensors(value)]
    outputs = []
    for number in range(len(rows)):
        own = iter(column[number] for column in columns)
        outputs.append(_map(value, lambda _, own=own: next(own)))
    return outputs


def _together(outputs: Sequence[Any], device: torch.device) -> Any:
    """The output of all images, on the device."""
    columns = iter(zip(*map(_tensors, outputs), strict=True))
    return _map(outputs[0], lambda _: torch.cat([tensor.to(device) for tensor in next(columns)]))


@contextmanager
def _recorded(tower: nn.Module) -> Iterator[list[Any]]:
    """Collects what the tower gives, before the family's code puts more into the same output."""
    outputs: list[Any] = []
    hook = tower.register_forward_hook(lambda module, inputs, output: outputs.append(_map(output, Tensor.detach)))
    try:
        yield outputs
    finally:
        hook.remove()


@contextmanager
def _answered(tower: nn.Module, output: Any) -> Iterator[None]:
    """Lets the tower give this output without running."""
    own = tower.__dict__.get("forward")  # where a library has put its own over the class's
    tower.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del tower.forward
        if own is not None:
            tower.forward = own
