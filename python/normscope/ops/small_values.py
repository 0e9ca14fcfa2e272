"""Singular values too small to be read off a Gram matrix, from the matrix itself, without a float64 copy of it.

An eigenvalue of the Gram matrix G of A is off by about u s_1^2 (u is float64's rounding, s_1 the largest singular
value), a singular value s therefore by u s_1^2 / (2 s). Where that is too much, A is multiplied by the eigenvectors V
of the small eigenvalues: the singular values of A V are those of A that are missing, its largest is small, and so its
own Gram matrix holds them to a few more digits. What is missing then is found in the same way. What V holds of the
other right singular vectors, about u s_1^2 / s_j^2 of the j-th, adds u s_1^2 / s_j to A V, no more than the error of
s_j that was accepted.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDING = torch.finfo(torch.float64).eps / 2

#: Half of what is promised: the error of a singular value over the largest, and that of the entropy of the spectrum.
_VALUE_BOUND, _ENTROPY_BOUND = 5e-11, 5e-9
_FLOOR = 4 * _ROUNDING  # of the largest: what float64 arithmetic on A leaves of a zero
_ROW_BLOCK = 1 << 20  # float64 elements of A at once


def accurate_values(values: Tensor, largest: Tensor | None = None) -> int:
    """How many leading singular values of a spectrum read off a Gram matrix are within the bounds.

    Args:
        values: float64 ``[n]``, descending, square roots of the eigenvalues.
        largest: the largest singular value of the whole matrix, where these are only its small ones.
    """
    count = len(values)
    if count == 0 or values[0] == 0.0:
        return count
    top = values[0] if largest is None else largest
    if values[-1] >= 3e-3 * top:
        return count
    # Small eigenvalues were seen off by at most sqrt(n) u / 8 beside the largest, n from 16 to 768.
    off = (count**0.5 * _ROUNDING / 2) * values[0] * (values[0] / values)
    share = values / (values.sum() + (0.0 if largest is None else largest))
    entropy_off = (off / values * share * (1.0 - share.log())).nan_to_num(torch.inf).cumsum(0)
    fine = (off <= _VALUE_BOUND * top) & (entropy_off <= _ENTROPY_BOUND)
    return int(fine.to(torch.int64).cumprod(0).sum())


def with_small_values(matrix: Tensor, gram: Tensor, values: Tensor, accurate: int) -> Tensor:
    """The spectrum with its small values found from the matrix.

    Args:
        matrix: ``[rows, columns]``.
        gram: float64 ``[n, n]``, that of the smaller side.
        values: float64 ``[n]``, descending, square roots of its eigenvalues.
        accurate: how many of them are kept.

    Returns:
        float64 ``[n]``, descending.
    """
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    largest, found = values[0], [values[:accurate]]
    basis = torch.linalg.eigh(gram).eigenvectors[:, : len(values) - accurate]
    while True:
        eigenvalues, rotation = torch.linalg.eigh(_gram_of_product(tall, basis))
        rest = eigenvalues.clamp(min=0.0).sqrt().flip(0)
        negligible = bool(rest[0] <= _FLOOR * largest)
        kept = len(rest) if negligible else max(accurate_values(rest, largest), 1)
        found.append(rest[:kept])
        if kept == len(rest):
            return torch.cat(found).sort(descending=True).values
        basis = basis @ rotation[:, : len(rest) - kept]


def _gram_of_product(tall: Tensor, basis: Tensor) -> Tensor:
    """(A V)^T (A V), A being ``tall``, a block of rows at a time."""
    gram = basis.new_zeros(basis.shape[1], basis.shape[1])
    for rows in torch.split(tall, max(_ROW_BLOCK // max(tall.shape[1], 1), 1)):
        product = rows.to(torch.float64) @ basis
        gram.addmm_(product.T, product)
    return gram
