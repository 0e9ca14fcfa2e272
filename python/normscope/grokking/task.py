"""The tasks: arithmetic modulo p, its split into training and test pairs, and the order of an epoch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from normscope.grokking.config import ConfigurationError, GrokConfig

MAX_TRAINING_PAIRS = 300_000
MAX_TEST_PAIRS = 20_000


def random_stream(seed: int, *names: object) -> torch.Generator:
    """A CPU generator of its own for each purpose, so that no draw shifts another one's.

    Example:
        >>> first, second = (torch.rand(3, generator=random_stream(0, name)) for name in ("split", "epoch"))
        >>> bool((first == second).any())
        False
    """
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


@dataclass(frozen=True)
class Examples:
    """What the model is given (int64, n x 2 tokens or n x bits) and the results ``targets`` (int64, n)."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return self.targets.numel()

    @property
    def pairs(self) -> Tensor:
        """The operands a and b of a task modulo p: ``inputs`` by another name."""
        return self.inputs


@dataclass(frozen=True)
class Split:
    """Disjoint training and test examples, each in the order in which it was drawn."""

    train: Examples
    test: Examples


class Task(Protocol):
    """What a run learns."""

    def split(self, train_fraction: float, seed: int) -> Split:
        """Training and test examples, a function of the seed alone."""

    def epoch_order(self, train: Examples, ordering: str, *, stride: int, seed: int, epoch: int) -> Tensor:
        """The order (int64, n) in which an epoch goes through the training examples."""


@dataclass(frozen=True)
class ModularAddition:
    """c = (a + b) mod p over all p^2 ordered pairs; the tokens are 0 .. p - 1.

    Example:
        >>> split = ModularAddition(59).split(train_fraction=0.4, seed=0)
        >>> len(split.train), len(split.test)
        (1392, 2089)
    """

    p: int

    def examples(self, indices: Tensor) -> Examples:
        """The examples with the given pair indices a * p + b (int64, n)."""
        first, second = indices // self.p, indices % self.p
        return Examples(torch.stack([first, second], dim=1), self.result(first, second))

    def result(self, first: Tensor, second: Tensor) -> Tensor:
        """What is to be learnt for operands a and b (int64, n)."""
        return (first + second) % self.p

    def split(self, train_fraction: float, seed: int) -> Split:
        """Draw min(300,000, floor(train_fraction * p^2)) training pairs without replacement.

        The test examples are all the pairs that remain, or 20,000 of them drawn in the same way if there are more.

        Raises:
            ConfigurationError: no pair is left on one side.
        """
        total = self.p**2
        training, test = split_sizes(total, train_fraction, "pairs")
        drawn = draw_distinct(total, training + test, random_stream(seed, "split"))
        return Split(self.examples(drawn[:training]), self.examples(drawn[training:]))

    def epoch_order(self, train: Examples, ordering: str, *, stride: int, seed: int, epoch: int) -> Tensor:
        """The order (int64, n) in which epoch 0, 1, ... goes through the training examples.

        ``"random"`` is a new permutation for every epoch, a function of (seed, epoch) alone. ``"stride"`` is the same
        for every epoch: sorted by (a mod stride, a), pairs with the same a as they were drawn, so that the operands a
        of neighbouring pairs are equal or lie ``stride`` apart.

        Example:
            >>> task = ModularAddition(4)
            >>> order = task.epoch_order(task.examples(torch.arange(16)), "stride", stride=2, seed=0, epoch=0)
            >>> (order // 4).tolist()
            [0, 0, 0, 0, 2, 2, 2, 2, 1, 1, 1, 1, 3, 3, 3, 3]
        """
        if ordering == "random":
            return torch.randperm(len(train), generator=random_stream(seed, "epoch", epoch))
        first = train.pairs[:, 0]
        return torch.argsort(first % stride * self.p + first, stable=True)


@dataclass(frozen=True)
class ModularSubtraction(ModularAddition):
    """c = (a - b) mod p; all else as for addition, the split of a seed included.

    Example:
        >>> ModularSubtraction(7).examples(torch.tensor([2 * 7 + 5])).targets
        tensor([4])
    """

    def result(self, first: Tensor, second: Tensor) -> Tensor:
        """(a - b) mod p."""
        return (first - second) % self.p


@dataclass(frozen=True)
class ModularMultiplication(ModularAddition):
    """c = a b mod p over all pairs, those with a zero included; all else as for addition.

    Example:
        >>> ModularMultiplication(7).examples(torch.tensor([2 * 7 + 5])).targets
        tensor([3])
    """

    def result(self, first: Tensor, second: Tensor) -> Tensor:
        """a b mod p."""
        return first * second % self.p


def build_task(config: GrokConfig) -> Task:
    """The task that ``config`` names."""
    if config.task == "parity":
        from normscope.grokking.parity import SparseParity

        return SparseParity(config.bits, config.relevant, config.examples)
    return _MODULAR[config.task](config.p)


_MODULAR = {
    "addition": ModularAddition,
    "subtraction": ModularSubtraction,
    "multiplication": ModularMultiplication,
}


def split_sizes(total: int, train_fraction: float, what: str) -> tuple[int, int]:
    """How many of ``total`` examples are trained on and tested on.

    Raises:
        ConfigurationError: no example is left on one side.
    """
    training = min(MAX_TRAINING_PAIRS, int(train_fraction * total))
    test = min(MAX_TEST_PAIRS, total - training)
    if not (training and test):
        side = "trained on" if test else "tested on"
        raise ConfigurationError(f"train fraction {train_fraction:g} leaves none of the {total} {what} to be {side}")
    return training, test


def draw_distinct(total: int, count: int, generator: torch.Generator) -> Tensor:
    """``count`` distinct integers of [0, total) in random order, without a list of all ``total`` where that is long."""
    if 2 * count >= total:
        return torch.randperm(total, generator=generator)[:count]
    drawn = torch.empty(0, dtype=torch.int64)
    while True:
        # Uniform draws with the repeats struck out are uniform draws without replacement.
        drawn = torch.cat([drawn, torch.randint(total, (count,), generator=generator)])
        values, position = torch.sort(drawn, stable=True)
        is_first = torch.ones(len(values), dtype=torch.bool)
        is_first[1:] = values[1:] != values[:-1]
        distinct = drawn[position[is_first].sort().values]
        if len(distinct) >= count:
            return distinct[:count]
