"""The observer that grokking runs add: the total weight norm and its share in each matrix."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from normscope.observer import Observer, Reads, View


class WeightNorm(Observer):
    """Norms of the weight matrices, biases excluded (Truong et al. 2026, arXiv 2606.13753).

    Keys: ``weight_norm/total``, the square root of the sum of the squared Frobenius norms of all parameters with two or
    more dimensions, and ``weight_norm/{layer}``, each one's Frobenius norm.
    """

    name = "weight_norm"
    reads = Reads(weights=True)

    def observe(self, view: View) -> Mapping[str, float | Tensor]:
        norms = {name: norm for name, norm in view.weight_norms.items() if view.parameters[name].ndim > 1}
        return {"total": torch.linalg.vector_norm(torch.stack(list(norms.values()))), **norms}
