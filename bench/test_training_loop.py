"""What watching costs where it matters: in a training loop, beside PyTorch's own threads."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import normscope as ns
from bench.conftest import Report
from normscope.grokking import Transformer

P, STEPS, BATCH = 9973, 50, 256


class Loop:
    """Training of the p = 9973 transformer on random pairs, with a hook after each step and each epoch."""

    def __init__(self, observe_at: str | None) -> None:
        torch.manual_seed(0)
        self.model = Transformer(P)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=0.1)
        self.pairs = torch.randint(0, P, (STEPS, BATCH, 2), generator=torch.Generator().manual_seed(1))
        observers = [ns.Norms(), ns.TokenGradient(embedding=self.embedding)]
        self.monitor = ns.Monitor(
            self.model, observers, loop="step" if observe_at == "step" else "epoch", context={"stride": 99}
        )
        self.observe_at = observe_at
        self.observing = 0.0

    @property
    def embedding(self) -> nn.Module:
        return next(module for module in self.model.modules() if isinstance(module, nn.Embedding))

    def _observed(self, fire: Callable[[int], object], step: int) -> None:
        start = time.perf_counter()
        fire(step)
        self.observing += time.perf_counter() - start

    def epoch(self) -> float:
        start = time.perf_counter()
        for step, pairs in enumerate(self.pairs):
            self.optimizer.zero_grad()
            targets = pairs.sum(dim=1) % P
            nn.functional.cross_entropy(self.model(pairs), targets).backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            if self.observe_at == "step":
                self._observed(self.monitor.post_step, step)
        if self.observe_at == "epoch":
            self._observed(self.monitor.post_epoch, 0)
        return time.perf_counter() - start


def _overhead(watched: Loop, plain: Loop, rounds: int) -> tuple[tuple[float, float, float], float]:
    """Quartiles of watched / plain - 1 in percent, epoch by epoch in turn, and the share of time inside the monitor."""
    ratios, total = [], 0.0
    for turn in range(rounds):
        pair = (watched, plain) if turn % 2 else (plain, watched)
        times = {id(loop): loop.epoch() for loop in pair}
        ratios.append(100 * (times[id(watched)] / times[id(plain)] - 1))
        total += times[id(watched)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return (low, middle, high), 100 * watched.observing / total


def test_watched_every_epoch(report: Report) -> None:
    plain, watched = Loop(None), Loop("epoch")
    plain.epoch(), watched.epoch()
    watched.observing = 0.0
    quartiles, inside = _overhead(watched, plain, rounds=8)
    report(
        what=f"p = 9973 transformer, {STEPS} steps an epoch, norms and token_gradient every epoch, against unwatched; "
        f"inside the monitor {inside:.2f} %",
        figure="% more time",
        target=1.0,
        quartiles=quartiles,
    )


def test_watched_every_step(report: Report) -> None:
    plain, watched = Loop(None), Loop("step")
    plain.epoch(), watched.epoch()
    watched.observing = 0.0
    quartiles, inside = _overhead(watched, plain, rounds=8)
    report(
        what=f"the same, watched every step; inside the monitor {inside:.2f} %",
        figure="% more time",
        target=5.0,
        quartiles=quartiles,
    )
