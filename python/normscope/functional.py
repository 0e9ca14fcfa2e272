"""The metrics once, for gradients at hand: ``ns.norms`` and ``ns.token_gradient``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

from torch import Tensor, nn

from normscope import ops, tensors
from normscope.errors import NoGradientError, UnsupportedTensorError
from normscope.metrics.norms import norms as norm_values
from normscope.metrics.token_gradient import TokenGradientOptions
from normscope.metrics.token_gradient import token_gradient as token_gradient_values

__all__ = ["naming", "norms", "token_gradient"]


@contextmanager
def naming(names: Sequence[str]) -> Iterator[None]:
    """Let an error about the i-th tensor say its name."""
    try:
        yield
    except UnsupportedTensorError as error:
        raise UnsupportedTensorError(error.index, error.reason, names[error.index]) from None


def norms(source: nn.Module | Mapping[str, Tensor | None]) -> dict[str, float]:
    """Norms of a model's gradients, exact as defined in float64.

    Args:
        source: a module (its parameters' ``.grad``), or a mapping name -> gradient. Gradients are float16, bfloat16,
            float32 or float64, of any shape and strides, or sparse COO. Parameters without a gradient are left out;
            tied ones count once.

    Returns:
        ``total_norm``, ``max_component``, ``mean_component``, ``nonfinite`` (the number of NaN or inf components) and
        ``norm_{name}`` for each parameter. NaN and inf in a gradient show in the norms that contain it.

    Raises:
        NoGradientError: there is no gradient at all.
        UnsupportedTensorError: a gradient has another dtype or layout; the message names it.

    Example:
        >>> import torch, normscope as ns
        >>> ns.norms({"a": torch.tensor([3.0]), "b": torch.tensor([0.0, 4.0])})["total_norm"]
        5.0
    """
    names, gradients = tensors.gradients(source)
    with naming(names):
        return norm_values(ops.fused_pass(gradients), names).to_dict()


def token_gradient(
    grad: Tensor | nn.Module,
    *,
    stride: int | None = None,
    sparsity: tuple[Literal["max", "mean"], float] = ("max", 0.01),
    energy_power: Literal[1, 2] = 2,
    ratio: Literal["max/min", "max/mean"] = "max/min",
    embedding: str | nn.Module | None = None,
) -> dict[str, float]:
    """How the gradient of an embedding is distributed over its tokens.

    Args:
        grad: the gradient of the embedding, ``[V, ...]``, dense or sparse COO; or a module, whose embedding's gradient
            is used.
        stride: tokens t with equal ``t % stride`` form a group; without it the two stride metrics are left out.
        sparsity, energy_power, ratio: published variants, see :class:`normscope.TokenGradientOptions`.
        embedding: which embedding of a module, see :func:`normscope.tensors.token_table`.

    Returns:
        ``gradient_sparsity``, ``gradient_gini`` (in [0, 1 - 1/V]), ``tokens_for_50pct``, ``tokens_for_90pct`` (in
        [1, V]), ``concentration_ratio`` and, with a stride, ``stride_group_variance`` and ``stride_group_max_ratio``;
        NaN where undefined (all-zero or non-finite gradient).

    Raises:
        ValueError: an option is out of range, or ``grad`` is a scalar.
        TypeError: ``grad`` is neither a tensor nor a module.
        AmbiguousEmbeddingError, NoGradientError: the module's token table is not clear, or has no gradient.
        UnsupportedTensorError: another dtype or layout.

    Example:
        >>> import torch, normscope as ns
        >>> ns.token_gradient(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))["gradient_gini"]
        0.5
    """
    options = TokenGradientOptions(stride, sparsity, energy_power, ratio)
    if isinstance(grad, nn.Module):
        name = tensors.token_table(grad, embedding)
        found = tensors.gradients(grad)
        if name not in found.names:
            raise NoGradientError(f"{name} has no gradient")
        grad = found.tensors[found.names.index(name)]
    if not isinstance(grad, Tensor):
        raise TypeError(f"expected a gradient tensor or a torch.nn.Module, got {type(grad).__name__}")
    if grad.dim() == 0:
        raise ValueError("the gradient of an embedding has one row a token; got a scalar")
    with naming(["grad"]):
        return token_gradient_values(ops.row_energies(grad), options).to_dict()
