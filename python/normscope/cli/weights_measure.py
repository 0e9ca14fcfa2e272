"""The weight metrics of a checkpoint, and the change between two, with a few tensors in memory at a time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from normscope import ops, tensors
from normscope.checkpoints import Checkpoint, CheckpointError
from normscope.errors import NormscopeError, UnsupportedTensorError
from normscope.metrics.values import Number, divide, vector
from normscope.metrics.weight_tracking import Column, Spectral, WeightTrackingOptions, exact_spectra, weight_tracking
from normscope.ops.contract import DTYPES
from normscope.reading import complete, naming
from normscope.stats import Stats, merge

#: Tensors are measured together up to this many bytes: spectra of small matrices are faster side by side.
_BATCH_BYTES = 24 << 20
#: Elements of a difference in memory at once, in float64.
_BLOCK = 1 << 20
#: Differences of larger numbers could leave float64's range; all is then scaled by the second.
_LARGE, _SCALE = 2.0**960, 2.0**-64

#: Of a layer; vectors have the first alone.
METRICS = ("weight_norm", "top_sv", "effective_rank")
#: Of a layer in a comparison.
CHANGES = (
    "relative_change",
    "cosine",
    *(f"{metric}_{part}" for metric in METRICS for part in ("before", "after", "change")),
)


class CompareError(NormscopeError, ValueError):
    """Two checkpoints are not of one model; the message names what differs."""


@dataclass(frozen=True)
class Layer:
    """One tensor of a checkpoint.

    Attributes:
        name: without wrappers' prefixes.
        shape: its sizes.
        dtype: as stored, such as ``"float32"``; in a comparison both, if they differ.
        values: metric -> value; a vector has no spectrum.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    values: Mapping[str, float]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def full_rank(self) -> int:
        """The smaller side of the matrix that its spectrum is of; 1 for a vector."""
        return min(self.shape[0], math.prod(self.shape[1:])) if len(self.shape) > 1 else 1


@dataclass(frozen=True)
class Measured:
    """What was found.

    Attributes:
        layers: in the checkpoint's order, unless sorted.
        metrics: what layers may have, whether or not one of these does.
        summary: over all layers that were measured.
        skipped: dtype -> how many tensors of it were not measured.
        tied: name -> the name under which the same tensor is measured.
    """

    layers: Sequence[Layer]
    metrics: Sequence[str]
    summary: Mapping[str, float]
    skipped: Mapping[str, int] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)


class _Chosen(NamedTuple):
    """The tensors to measure: clean name -> name in the checkpoint; and what is left out."""

    stored: dict[str, str]
    skipped: dict[str, int]
    tied: dict[str, str]


Advance = Callable[[float], object]


def measure(
    checkpoint: Checkpoint,
    options: WeightTrackingOptions,
    include: tuple[str, ...] | None = None,
    exclude: tuple[str, ...] | None = None,
    advance: Advance = lambda share: None,
) -> Measured:
    """As :func:`normscope.weight_tracking` on the loaded tensors, reading them a few at a time.

    Args:
        include, exclude: shell-style patterns of clean names.
        advance: called now and then with the share of the work that was done since.

    Raises:
        ValueError: a pattern matches nothing.
        CheckpointError: there is no floating-point tensor, or one cannot be read.
    """
    chosen = _choose(checkpoint, include, exclude)
    norms: dict[str, float] = {}
    spectra: dict[str, Spectral] = {}
    for names, share in _batches(checkpoint, chosen.stored):
        _measure_batch(_load(checkpoint, chosen.stored, names), options, norms, spectra)
        advance(share)
    layers = [
        _layer(checkpoint, name, stored, {"weight_norm": norms[name], **_as_floats(spectra.get(name, {}))})
        for name, stored in chosen.stored.items()
    ]
    return Measured(
        layers, _metrics_of(layers, METRICS), _summary(norms, spectra, options), chosen.skipped, chosen.tied
    )


def compare(
    before: Checkpoint,
    after: Checkpoint,
    options: WeightTrackingOptions,
    include: tuple[str, ...] | None = None,
    exclude: tuple[str, ...] | None = None,
    advance: Advance = lambda share: None,
) -> Measured:
    """The change from one checkpoint of a model to another; arguments and errors as for :func:`measure`.

    A layer has ``relative_change``, |W2 - W1| / |W1| (Frobenius, differences taken in float64), ``cosine`` between the
    two, and each metric as ``*_before``, ``*_after`` and ``*_change``, their difference. The summary has the mean and
    the largest relative change, that of all weights as one vector, and the changes of the summaries of the two.

    Raises:
        CompareError: their names or shapes differ.
    """
    chosen, other = _choose(before, include, exclude), _choose(after, include, exclude)
    _check_same_model(before, chosen, after, other)
    norms: tuple[dict[str, float], dict[str, float]] = ({}, {})
    spectra: tuple[dict[str, Spectral], dict[str, Spectral]] = ({}, {})
    changes: dict[str, tuple[float, float, float]] = {}
    for names, share in _batches(before, chosen.stored):
        first, second = _load(before, chosen.stored, names), _load(after, other.stored, names)
        for side, loaded in enumerate((first, second)):
            _measure_batch(loaded, options, norms[side], spectra[side])
        changes |= {name: _change(first[name], second[name]) for name in names}
        del first, second  # before the next ones are read
        advance(share)
    layers = []
    for name, stored in chosen.stored.items():
        values = {"relative_change": changes[name][0], "cosine": changes[name][1]}
        sides = [{"weight_norm": norms[side][name], **_as_floats(spectra[side].get(name, {}))} for side in (0, 1)]
        values |= _differences(sides[0], sides[1], METRICS)
        layer = _layer(before, name, stored, values)
        dtype = _short(after.dtype(other.stored[name]))
        layers.append(layer if dtype == layer.dtype else Layer(name, layer.shape, f"{layer.dtype}, {dtype}", values))
    relative = [change[0] for change in changes.values() if not math.isnan(change[0])]
    moved, total = math.hypot(*(change[2] for change in changes.values())), math.hypot(*norms[0].values())
    summary: dict[str, float] = {
        "relative_change": float(divide(moved, total)),
        "mean_relative_change": sum(relative) / len(relative) if relative else math.nan,
        "max_relative_change": max(relative, default=math.nan),
    }
    first_summary, second_summary = (_summary(norms[side], spectra[side], options) for side in (0, 1))
    summary |= _differences(first_summary, second_summary, tuple(first_summary))
    return Measured(layers, _metrics_of(layers, CHANGES), summary, chosen.skipped, chosen.tied)


def _choose(checkpoint: Checkpoint, include: tuple[str, ...] | None, exclude: tuple[str, ...] | None) -> _Chosen:
    skipped: Counter[str] = Counter()
    stand_ins: dict[str, Tensor] = {}  # without memory, so that names are cleaned and ties resolved as for a model
    for name in checkpoint.names:
        dtype = checkpoint.dtype(name)
        if dtype not in DTYPES:
            skipped[_short(dtype)] += 1
        elif name in checkpoint.tied:
            stand_ins[name] = stand_ins[checkpoint.tied[name]]
        else:
            stand_ins[name] = torch.empty(checkpoint.shape(name), dtype=dtype, device="meta")
    if not stand_ins:
        raise CheckpointError(f"{checkpoint.path} holds no tensor of float16, bfloat16, float32 or float64")
    found, _ = tensors.weights_and_gradients(stand_ins)
    names = tuple(found.names)
    stored_under = {id(tensor): name for name, tensor in reversed(stand_ins.items())}
    stored = {name: stored_under[id(tensor)] for name, tensor in zip(*found, strict=True)}
    clean = {of: name for name, of in stored.items()}
    tied = {name: clean[first] for name, first in checkpoint.tied.items() if name in stand_ins}
    return _Chosen({name: stored[name] for name in tensors.select(names, include, exclude)}, dict(skipped), tied)


def _check_same_model(before: Checkpoint, first: _Chosen, after: Checkpoint, second: _Chosen) -> None:
    problems = [
        f"only {here.path} has {_some(missing)}"
        for here, mine, others in ((before, first.stored, second.stored), (after, second.stored, first.stored))
        if (missing := [name for name in mine if name not in others])
    ]
    reshaped = [
        f"{name} {before.shape(stored)} and {after.shape(second.stored[name])}"
        for name, stored in first.stored.items()
        if name in second.stored and before.shape(stored) != after.shape(second.stored[name])
    ]
    if reshaped:
        problems.append(f"shapes differ: {_some(reshaped)}")
    if problems:
        raise CompareError(f"these are not two checkpoints of one model: {'; '.join(problems)}")


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def _batches(checkpoint: Checkpoint, stored: Mapping[str, str]) -> Iterator[tuple[list[str], float]]:
    """Names of tensors to read together, and their share of the work: multiplications of a Gram matrix, and reading."""
    costs = {}
    for name, under in stored.items():
        shape = checkpoint.shape(under)
        smaller = min(shape[0], math.prod(shape[1:])) if len(shape) > 1 else 0
        costs[name] = float(math.prod(shape) * (smaller + 20) + 10_000)
    total = sum(costs.values())
    batch: list[str] = []
    batch_bytes, work, done = 0, 0.0, 0.0
    for name, under in stored.items():
        size = math.prod(checkpoint.shape(under)) * checkpoint.dtype(under).itemsize
        if batch and batch_bytes + size > _BATCH_BYTES:
            yield batch, work / total
            done += work
            batch, batch_bytes, work = [], 0, 0.0
        batch.append(name)
        batch_bytes += size
        work += costs[name]
    if batch:
        yield batch, (total - done) / total


def _load(checkpoint: Checkpoint, stored: Mapping[str, str], names: Sequence[str]) -> dict[str, Tensor]:
    loaded = {name: checkpoint.load(stored[name]) for name in names}
    for index, (name, tensor) in enumerate(loaded.items()):
        if tensor.layout is not torch.strided:
            raise UnsupportedTensorError(index, f"layout {tensor.layout}; a checkpoint's tensors must be dense", name)
    return loaded


def _measure_batch(
    loaded: Mapping[str, Tensor],
    options: WeightTrackingOptions,
    norms: dict[str, float],
    spectra: dict[str, Spectral],
) -> None:
    """Add the norms of these tensors, and the spectra of the matrices among them."""
    names = tuple(loaded)
    norms.update(zip(names, vector(complete([], names, loaded).norms), strict=True))
    matrices = [name for name in names if loaded[name].dim() >= 2]
    with naming(matrices):
        spectra.update(zip(matrices, exact_spectra([loaded[name] for name in matrices], options), strict=True))


def _summary(
    norms: Mapping[str, float], spectra: Mapping[str, Spectral], options: WeightTrackingOptions
) -> dict[str, float]:
    """The values that :func:`normscope.weight_tracking` gives beside those of the layers."""
    found = weight_tracking(
        Column(tuple(norms), list(norms.values())),
        Column((), []),
        spectra,
        options,
        asked=("top_sv", "effective_rank"),
    ).to_dict()
    return {key: value for key, value in found.items() if "/" not in key and key != "mean_grad_weight_align"}


def _change(before: Tensor, after: Tensor) -> tuple[float, float, float]:
    """|after - before| / |before|, the cosine between them, and |after - before|."""
    first, second = before.reshape(-1), after.reshape(-1)
    beside = ops.fused_pass([second, first], [first, None])
    scale = _SCALE if float(beside.column("max_abs")[:2].max()) > _LARGE else 1.0
    parts = []
    for start in range(0, max(first.numel(), 1), _BLOCK):
        old, new = (side[start : start + _BLOCK].to(torch.float64) * scale for side in (first, second))
        parts.append(ops.fused_pass([new - old], [old]).sums[0])
    sums = torch.stack(parts)
    merged = Stats(torch.cat([sums, merge(sums)[None]]), in_range=False)
    moved, norm = (float(merged.roots(column)[-1]) for column in ("sum_squares", "weight_squares"))
    return float(divide(moved, norm)), float(beside.cosines()[0]), moved / scale


def _differences(before: Mapping[str, float], after: Mapping[str, float], metrics: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for metric in metrics:
        if metric in before and metric in after:
            found[f"{metric}_before"], found[f"{metric}_after"] = before[metric], after[metric]
            found[f"{metric}_change"] = after[metric] - before[metric]
    return found


def _layer(checkpoint: Checkpoint, name: str, stored: str, values: Mapping[str, float]) -> Layer:
    return Layer(name, checkpoint.shape(stored), _short(checkpoint.dtype(stored)), values)


def _metrics_of(layers: Sequence[Layer], always: Sequence[str]) -> list[str]:
    return list(dict.fromkeys([*always, *(metric for layer in layers for metric in layer.values)]))


def _as_floats(found: Mapping[str, Number]) -> dict[str, float]:
    return {metric: float(value) for metric, value in found.items()}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
