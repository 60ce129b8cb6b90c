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

from weft_kernels import FLOAT8_MAX


@dataclass(frozen=True, slots=True)
class Source:
    """``target``, a view of a parameter, is ``region`` of the checkpoint tensor ``name``, whose shape is ``shape``.

    With a ``scale``, float32 [N], the target is of float8_e4m3fn and stands for ``target * scale[:, None]``.
    """

    name: str
    shape: tuple[int, ...]
    region: tuple[slice, ...]  # one for each of the first dimensions; the others are taken whole
    target: Tensor
    scale: Tensor | None = None

    def fill(self, values: Tensor) -> None:
        """Give the target these values, of its shape and any float type, which stay as they are. Values that are not
        finite stay so."""
        if self.scale is None:
            self.target.copy_(values)
            return
        wide = values.to(self.target.device, copy=True).float()
        self.scale.copy_(wide.abs().amax(1) / FLOAT8_MAX)
        self.target.copy_(wide.div_(self.scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]))

    def is_finite(self) -> bool:
        """Whether all values are; after ``fill``."""
        # The extremes carry any NaN or infinity: 9 ms for 134 MB on two cores, where isfinite takes 218.
        values = self.target if self.scale is None else self.scale
        return values.numel() == 0 or bool(torch.stack(torch.aminmax(values)).isfinite().all())


def parameter(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    """An uninitialized parameter of the current default type, unless given, and device; it never needs a gradient."""
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


class Layer(nn.Module, ABC):
    """A module whose parameters come from a checkpoint."""

    @abstractmethod
    def sources(self, path: str) -> Iterator[Source]:
        """Everything that fills this layer's parameters, the layer being at ``path`` of the model."""


def whole(path: str, layer: nn.Module) -> Iterator[Source]:
    """Sources of a layer that every rank holds whole, under the names of its parameters."""
    for name, target in layer.named_parameters(recurse=False):
        yield Source(f"{path}.{name}", tuple(target.shape), (), target)
