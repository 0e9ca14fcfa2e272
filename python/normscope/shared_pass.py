"""One read of the gradients and weights for all observers that fire together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager

from torch import Tensor

from normscope.errors import NormscopeError, ObserverError
from normscope.metrics.values import Number, Values, joined, larger, vector
from normscope.observer import GradientSource, GradientView, Observer, View
from normscope.pending import Parts
from normscope.reading import WeightView, complete, named_pass, weights_beside
from normscope.record import LifecyclePoint
from normscope.tensors import TensorList


@contextmanager
def naming_errors(kind: str, name: str, point: LifecyclePoint, step: int) -> Iterator[None]:
    """Let an error raised inside say which observer or intervention it comes from, and when.

    normscope's own errors already say what to do and pass through with the name put in front.
    """
    try:
        yield
    except NormscopeError as error:
        error.args = (f"{kind} {name!r} at {point.value} {step}: {error}",)
        raise
    except Exception as error:
        raise ObserverError(f"{kind} {name!r} failed at {point.value} {step}: {error!r}") from error


def read_shared(
    observers: Sequence[Observer],
    views: Sequence[View],
    parameters: TensorList,
    gradients_of: Callable[[GradientSource], TensorList],
    parts: Parts,
) -> None:
    """Give each observer's view what the observer reads.

    Gradients of one source are read once for all observers of that source, with the weights beside them where one of
    those observers reads weights too, or where any does and they have not been read. Per-parameter counts of non-finite
    components go to ``parts``.
    """
    wanted = _wanted_weights(observers, views)
    by_name = dict(zip(*parameters, strict=True)) if wanted else {}
    weights: list[WeightView] = []
    for source in ("current", "epoch_mean"):
        readers = [pair for pair in zip(observers, views, strict=True) if pair[0].reads.gradients == source]
        if not readers:
            continue
        first, first_view = readers[0]
        with naming_errors("observer", first.name, first_view.point, first_view.step):
            gradients = gradients_of(source)
        tables = _tables(readers, gradients)
        beside: list[Tensor | None] | None = None
        if wanted and (not weights or any(observer.reads.weights for observer, _ in readers)):
            beside = [by_name[name] if name in wanted else None for name in gradients.names]
        stats = named_pass(gradients, beside, tables)
        if beside is not None:
            weights.append(weights_beside(gradients.names, stats))
        nonfinite = Values(gradients.names, vector(stats.column("nonfinite")[:-1]))
        parts.nonfinite = nonfinite if parts.nonfinite is None else _most(parts.nonfinite, nonfinite, parameters.names)
        for _, view in readers:
            view.gradients = GradientView(gradients.names, stats)
    if any(observer.reads.weights for observer in observers):
        read = complete(weights, [name for name in parameters.names if name in wanted], by_name)
        for observer, view in zip(observers, views, strict=True):
            if observer.reads.weights:
                view.weights = read


def _wanted_weights(observers: Sequence[Observer], views: Sequence[View]) -> Set[str]:
    wanted: set[str] = set()
    for observer, view in zip(observers, views, strict=True):
        if observer.reads.weights:
            with naming_errors("observer", observer.name, view.point, view.step):
                wanted.update(observer.weights(view))
    return wanted


def _tables(readers: Sequence[tuple[Observer, View]], gradients: TensorList) -> list[int]:
    tables: set[int] = set()
    for observer, view in readers:
        view.gradient_names = gradients.names
        with naming_errors("observer", observer.name, view.point, view.step):
            tables.update(gradients.names.index(n) for n in observer.tables(view) if n in gradients.names)
    return sorted(tables)


def _most(first: Values, second: Values, order: Sequence[str]) -> Values:
    """The larger of two counts of each parameter, in the model's order."""
    counts: dict[str, Number] = dict(zip(first.keys, first.values, strict=True))
    for name, count in zip(second.keys, second.values, strict=True):
        counts[name] = larger(counts[name], count) if name in counts else count
    names = [name for name in order if name in counts]
    return Values(names, joined([counts[name] for name in names]))
