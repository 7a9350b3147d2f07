"""Images of a batch -> what the language model reads of each, in the form in which the family's own code hands it over.

Families return visual tokens in many shapes: of all images in one tensor or of each in its own, further maps for deeper
layers (deepstack), pairs of a layer and its map, settings beside them. :class:`Form` learns the shape from two copies
of one image, takes the output of several images apart and puts it together again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from muco.batch import to

Features = tuple[Tensor, ...]  # of one image: [tokens, dim] each, or what all images share
UNUSED = ("last_hidden_state", "hidden_states", "attentions")  # of the tower itself


class Form:
    """Where visual tokens are in the output of a family's ``get_image_features``.

    Args:
        output: For two copies of an image.
        tokens: Visual tokens of each copy.
    """

    def __init__(self, output: Mapping[str, Any], tokens: int) -> None:
        fields = {name: value for name, value in output.items() if name not in UNUSED}
        self.fields = {name: self._learnt(value, tokens) for name, value in fields.items()}

    def _learnt(self, value: Any, tokens: int) -> _Node:
        if isinstance(value, Tensor):
            return _Leaf(joined=_rows(value) == 2 * tokens)
        if not isinstance(value, (list, tuple)):
            return _Constant(value)
        rows = [_rows(own) if isinstance(own, Tensor) else 0 for own in value]
        if sum(rows) == 2 * tokens and max(rows) < 2 * tokens:
            return _Listed()
        return _Several(type(value), [self._learnt(own, tokens) for own in value])

    def apart(self, output: Mapping[str, Any], tokens: Sequence[int]) -> list[Features]:
        """The features of each image; ``tokens`` has the number of its visual tokens."""
        leaves = [leaf for name, node in self.fields.items() for leaf in node.apart(output[name], tokens)]
        return list(zip(*leaves, strict=True))

    def together(self, images: Sequence[Features]) -> SimpleNamespace:
        """The output of the family's own code for these images."""
        leaves = iter(zip(*images, strict=True))
        return SimpleNamespace(**{name: node.together(leaves) for name, node in self.fields.items()})


# Parts of an output. ``apart`` has an entry per leaf below, of a value per image; ``together`` takes them one by one.


class _Constant:
    def __init__(self, value: Any) -> None:
        self.value = value

    def apart(self, value: Any, tokens: Sequence[int]) -> list[Sequence[Any]]:
        return []

    def together(self, leaves: Any) -> Any:
        return self.value


class _Leaf:
    """A tensor of all images' tokens one after another, or (not ``joined``) one that does not depend on them."""

    def __init__(self, *, joined: bool) -> None:
        self.joined = joined

    def apart(self, value: Any, tokens: Sequence[int]) -> list[Sequence[Any]]:
        return [value.flatten(0, -2).split([*tokens])] if self.joined else [[value] * len(tokens)]

    def together(self, leaves: Any) -> Any:
        images = next(leaves)
        return torch.cat(images) if self.joined else images[0]


class _Listed:
    """A list of tensors, of each image's tokens or of each part of an image."""

    def apart(self, value: Any, tokens: Sequence[int]) -> list[Sequence[Any]]:
        return [torch.cat([own.flatten(0, -2) for own in value]).split([*tokens])]

    def together(self, leaves: Any) -> Any:
        return list(next(leaves))


class _Several:
    def __init__(self, kind: type, nodes: list[_Node]) -> None:
        self.kind, self.nodes = kind, nodes

    def apart(self, value: Any, tokens: Sequence[int]) -> list[Sequence[Any]]:
        return [leaf for node, own in zip(self.nodes, value, strict=True) for leaf in node.apart(own, tokens)]

    def together(self, leaves: Any) -> Any:
        return self.kind(node.together(leaves) for node in self.nodes)


_Node = _Constant | _Leaf | _Listed | _Several


def _rows(tensor: Tensor) -> int:
    return tensor.shape[:-1].numel()


def see(
    model: nn.Module,
    form: Form,
    images: Sequence[dict[str, Tensor]],
    tokens: Sequence[int],
    joins: Mapping[str, int | None],
    device: torch.device,
    kept: Callable[..., Any] | None = None,
) -> list[Features]:
    """What the language model reads of each image; those of one size pass through the vision tower together.

    Args:
        form: Of the family's output.
        images: The processor's tensors of each, on any device.
        tokens: Visual tokens of each.
        joins: See :class:`muco.stock.Family`.
        device: The model's.
        kept: Takes the place of :func:`features_of`, and the images' visual tokens and the device too.
    """
    groups: dict[Any, list[int]] = {}
    for number, image in enumerate(images):
        groups.setdefault(_size(image, joins, number), []).append(number)
    found: list[Features] = [()] * len(images)
    for numbers in groups.values():
        own, own_tokens = [images[number] for number in numbers], [tokens[number] for number in numbers]
        output = kept(model, own, joins, own_tokens, device) if kept else features_of(model, to(own, device), joins)
        parts = form.apart(output, own_tokens)
        for number, part in zip(numbers, parts, strict=True):
            found[number] = part
    return found


def _size(image: Mapping[str, Tensor], joins: Mapping[str, int | None], number: int) -> Any:
    """Equal for images that can be joined; ``number`` is the image's own."""
    if None in joins.values():
        return number
    return tuple((*t.shape[: joins[name]], *t.shape[joins[name] + 1 :]) for name, t in image.items())


def features_of(model: nn.Module, images: Sequence[dict[str, Tensor]], joins: Mapping[str, int | None]) -> Any:
    """The output of ``get_image_features`` for images that can be joined, or for one."""
    dtype = next(parameter.dtype for parameter in vision_parameters(model) if parameter.is_floating_point())
    joined = {name: torch.cat([image[name] for image in images], dim=joins[name] or 0) for name in images[0]}
    joined = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in joined.items()}
    return model.get_image_features(**joined, return_dict=True)


def lay_out_convolutions(model: nn.Module) -> None:
    """Lays the weights of a tower of convolutions out channels last, in which it computes faster; values stay.

    Only if windows overlap: those that cut an image into patches take little time, and some families view what they
    give as if it lay the other way.
    """
    for module in vision_modules(model).values():
        windows = (part for part in module.modules() if isinstance(part, nn.Conv2d))
        if any(side > step for part in windows for side, step in zip(part.kernel_size, part.stride, strict=True)):
            module.to(memory_format=torch.channels_last)


def base_model(model: nn.Module) -> nn.Module:
    """The model itself, without the wrapping of adapters."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def vision_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The parts of a model beside its language model, by name: vision tower and connector."""
    base = base_model(model)
    language = {*base.get_decoder().modules()}
    own = {name: child for name, child in base.named_children() if child not in language}
    return {name: child for name, child in own.items() if not language & {*child.modules()}}


def vision_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All parameters outside the language model."""
    base = base_model(model)
    language = {id(parameter) for parameter in base.get_decoder().parameters()}
    return [parameter for parameter in base.parameters() if id(parameter) not in language]
