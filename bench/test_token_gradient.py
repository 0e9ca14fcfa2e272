"""Token-gradient metrics against the row norms alone."""

from __future__ import annotations

import torch

import normscope as ns
from bench.conftest import Compare, Report
from bench.memory import peak_extra_bytes


def test_grokking_vocabulary(compare: Compare) -> None:
    gradient = torch.randn(9973, 256, generator=torch.Generator().manual_seed(0))
    compare(
        lambda: ns.token_gradient(gradient, stride=99),
        lambda: torch.linalg.vector_norm(gradient, dim=1),
        what="token gradient, all seven metrics, 9973 x 256 float32",
        against="torch.linalg.vector_norm(g, dim=1)",
        target=1.5,
    )


def test_large_vocabulary(compare: Compare) -> None:
    gradient = torch.randn(128_256, 2048, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    compare(
        lambda: ns.token_gradient(gradient, stride=358),
        lambda: torch.linalg.vector_norm(gradient, dim=1),
        what="token gradient, all seven metrics, 128,256 x 2048 bfloat16 (525 MB)",
        against="torch.linalg.vector_norm(g, dim=1)",
        target=1.5,
        rounds=11,
    )


def test_large_vocabulary_memory(report: Report) -> None:
    gradient = torch.randn(128_256, 2048, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    bytes_a_token = peak_extra_bytes(lambda: ns.token_gradient(gradient, stride=358)) / len(gradient)
    report(
        what="the same, peak extra memory",
        figure="bytes a token",
        target=64,
        quartiles=(bytes_a_token, bytes_a_token, bytes_a_token),
    )
