"""The mean of the gradients of an epoch's optimizer steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normscope import tensors
from normscope.tensors import TensorList


class GradientMean:
    """Sums each parameter's gradient over optimizer steps, in float64.

    A parameter's mean runs over the steps at which it had a gradient. Sparse gradients are kept sparse.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._sums: dict[str, Tensor] = {}
        self._steps: dict[str, int] = {}

    @torch.no_grad()
    def add(self) -> None:
        """Add the gradients that are on the model now; a step without any adds nothing."""
        for name, parameter in zip(*tensors.parameters(self._model), strict=True):
            gradient = parameter.grad
            if gradient is None:
                continue
            if name not in self._sums:
                self._sums[name] = gradient.to(torch.float64, copy=True)
                self._steps[name] = 1
                continue
            if gradient.layout is torch.sparse_coo:
                self._sums[name] = (self._sums[name] + gradient.to(torch.float64)).coalesce()
            else:
                self._sums[name].add_(gradient)
            self._steps[name] += 1

    @torch.no_grad()
    def means(self) -> TensorList:
        """The means so far, in the model's order."""
        order = [name for name in tensors.parameters(self._model).names if name in self._sums]
        return TensorList(order, [self._sums[name] / self._steps[name] for name in order])

    def reset(self) -> None:
        """Start again from nothing."""
        self._sums, self._steps = {}, {}
