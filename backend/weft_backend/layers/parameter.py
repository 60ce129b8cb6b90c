"""Parameters and where they come from: a ``Source`` ties a part of a parameter to a region of a checkpoint tensor.

Checkpoint names follow from the modules' paths. A layer of one tensor has that tensor's path; a linear layer, which may
fuse several tensors, names them beside its own place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Source:
    """``target``, a view of a parameter, is ``region`` of the checkpoint tensor ``name``, whose shape is ``shape``."""

    name: str
    shape: tuple[int, ...]
    region: tuple[slice, ...]  # one for each of the first dimensions; the others are taken whole
    target: Tensor


def parameter(*shape: int) -> nn.Parameter:
    """An uninitialized parameter of the current default type and device; it never needs a gradient."""
    return nn.Parameter(torch.empty(shape), requires_grad=False)


class Layer(nn.Module, ABC):
    """A module whose parameters come from a checkpoint."""

    @abstractmethod
    def sources(self, path: str) -> Iterator[Source]:
        """Everything that fills this layer's parameters, the layer being at ``path`` of the model."""


def whole(path: str, layer: nn.Module) -> Iterator[Source]:
    """Sources of a layer that every rank holds whole, under the names of its parameters."""
    for name, target in layer.named_parameters(recurse=False):
        yield Source(f"{path}.{name}", tuple(target.shape), (), target)
