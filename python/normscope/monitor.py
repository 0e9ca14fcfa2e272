"""The monitor: at each lifecycle point, interventions, one shared pass, observers, then the record to the sinks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from normscope import tensors
from normscope.accumulate import GradientMean
from normscope.errors import NoGradientError, SinkError
from normscope.observer import GradientSource, Intervention, LoopKind, Observer, View
from normscope.observers import SHIPPED
from normscope.pending import Parts, make_record
from normscope.record import LifecyclePoint, Record
from normscope.shared_pass import naming_errors, read_shared
from normscope.tensors import TensorList
from normscope.unchanged import difference, state_of


@runtime_checkable
class Sink(Protocol):
    """Where records go."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


AnySink = Sink | Callable[[Record], object]


class Monitor:
    """Watches a model at the lifecycle points of its training loop and never changes it.

    Args:
        model: the model.
        observers: what to compute; all that fire at a point share one pass over the gradients.
        sinks: where records go: objects with ``write(record)`` and ``close()``, or plain functions of a record.
        context: what observers may read of the run, such as ``{"stride": 99}``.
        loop: ``"epoch"`` for a loop over epochs, ``"step"`` for one that only counts optimizer steps; decides at which
            points the observers fire.
        interventions: things that do change the model; at a point they act before the observers look.
        optimizer: see :meth:`attach`.

    Raises:
        TypeError: an observer or intervention is something else, such as the class instead of an instance.
        ValueError: an observer does not fit the loop, or two have one name.

    Example:
        >>> import torch, normscope as ns
        >>> model = torch.nn.Linear(2, 1)
        >>> monitor = ns.Monitor(model, observers=[ns.Norms()])
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> monitor.post_epoch(0)["norms/norm_bias"]
        1.0
    """

    def __init__(
        self,
        model: nn.Module,
        observers: Sequence[Observer] = (),
        sinks: Sequence[AnySink] = (),
        *,
        context: Mapping[str, object] | None = None,
        loop: LoopKind = "epoch",
        interventions: Sequence[Intervention] = (),
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        if loop not in ("epoch", "step"):
            raise ValueError(f"loop must be 'epoch' or 'step', got {loop!r}")
        for kind, parts in ((Observer, observers), (Intervention, interventions)):
            strangers = [part for part in parts if not isinstance(part, kind)]
            if strangers:
                raise TypeError(f"{strangers[0]!r} is not an instance of normscope.{kind.__name__}")
        watching: tuple[Observer | Intervention, ...] = (*observers, *interventions)
        names = [part.name for part in watching]
        for part in watching:
            if names.count(part.name) > 1:
                raise ValueError(f"two observers or interventions are called {part.name!r}; give one another name")
            if loop not in part.points:
                raise ValueError(f"{part.name!r} does not fit loop={loop!r}, only {', '.join(map(repr, part.points))}")
        self.model = model
        self.observers = tuple(observers)
        self.interventions = tuple(interventions)
        self.sinks = tuple(sinks)
        self.context: Mapping[str, object] = MappingProxyType(dict(context or {}))
        self.loop: LoopKind = loop
        if loop == "step" and any(observer.reads.gradients == "epoch_mean" for observer in observers):
            raise ValueError("accumulate='epoch' needs loop='epoch': a loop without epochs has no mean over one")
        wants_mean = any(observer.reads.gradients == "epoch_mean" for observer in observers)
        self._mean = GradientMean(model) if wants_mean else None
        self._optimizers: list[torch.optim.Optimizer] = []
        self._hooks: list[Any] = []
        self._steps = 0
        if optimizer is not None:
            self.attach(optimizer)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Follow the optimizer's steps through its step hooks.

        PRE_STEP and POST_STEP then fire at every step by themselves, counted from 0, and ``accumulate="epoch"`` has
        gradients to average. With several optimizers the points fire at the steps of the first, and each adds the
        gradients of all parameters but those of the others.
        """
        first = not self._hooks
        self._optimizers.append(optimizer)

        def add_gradients() -> None:
            if self._mean is not None:
                others = [_parameter_ids(other) for other in self._optimizers if other is not optimizer]
                self._mean.add(leave_out=set().union(*others) - _parameter_ids(optimizer) if others else ())

        def before(_: object, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            if not _has_closure(args, kwargs):
                add_gradients()
            if first:
                self.pre_step(self._steps)

        def after(_: object, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            if _has_closure(args, kwargs):
                add_gradients()
            if first:
                self._steps += 1
                self.post_step(self._steps - 1)

        self._hooks += [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]

    def pre_epoch(self, epoch: int, values: Mapping[str, float | Tensor] | None = None) -> Record | None:
        """Fire what is due at the start of an epoch; see :meth:`fire`."""
        return self.fire(LifecyclePoint.PRE_EPOCH, epoch, values)

    def post_epoch(self, epoch: int, values: Mapping[str, float | Tensor] | None = None) -> Record | None:
        """Fire what is due at the end of an epoch, while the last gradients are on the model; see :meth:`fire`."""
        return self.fire(LifecyclePoint.POST_EPOCH, epoch, values)

    def pre_step(self, step: int, values: Mapping[str, float | Tensor] | None = None) -> Record | None:
        """Fire what is due between backward and the optimizer's step; see :meth:`fire`."""
        return self.fire(LifecyclePoint.PRE_STEP, step, values)

    def post_step(self, step: int, values: Mapping[str, float | Tensor] | None = None) -> Record | None:
        """Fire what is due after the optimizer's step, before its gradients are cleared; see :meth:`fire`."""
        return self.fire(LifecyclePoint.POST_STEP, step, values)

    def snapshot(self, step: int, values: Mapping[str, float | Tensor] | None = None) -> Record | None:
        """Fire what is due at a moment of the caller's choice; see :meth:`fire`."""
        return self.fire(LifecyclePoint.SNAPSHOT, step, values)

    def fire(
        self, point: LifecyclePoint, step: int, values: Mapping[str, float | Tensor] | None = None
    ) -> Record | None:
        """Fire the interventions and observers due at ``point`` of ``step`` and write one record.

        Args:
            point: the lifecycle point.
            step: the epoch at the epoch points, otherwise the optimizer step.
            values: further values for the record, under these keys.

        Returns:
            The record, or None where nothing was due and no values were given.

        Raises:
            NoGradientError: an observer reads gradients and the model has none.
            ObserverError: an observer or intervention failed, or an observer changed the model; it is named.
            SinkError: a sink failed; it is named, and the others have the record.
        """
        point = LifecyclePoint(point)
        interventions = [i for i in self.interventions if point in i.points[self.loop] and i.due(step)]
        observers = [o for o in self.observers if point in o.points[self.loop] and o.due(step)]
        try:
            if not interventions and not observers and values is None:
                return None
            parts = Parts()
            with torch.no_grad():
                self._intervene(interventions, point, step, parts)
                self._observe(observers, point, step, parts)
            parts.add("", values or {})
            record = make_record(step, point, parts)
            self._write(record)
            return record
        finally:
            if self._mean is not None and point is LifecyclePoint.POST_EPOCH:
                self._mean.reset()  # an epoch's mean never reaches into the next, observed or not

    def _view(self, point: LifecyclePoint, step: int, parameters: TensorList) -> View:
        held = cast(dict[str, nn.Parameter], dict(zip(*parameters, strict=True)))
        return View(step, point, self.context, self.model, held)

    def _intervene(self, interventions: Sequence[Intervention], point: LifecyclePoint, step: int, parts: Parts) -> None:
        if not interventions:
            return
        view = self._view(point, step, tensors.parameters(self.model))
        for intervention in interventions:
            with naming_errors("intervention", intervention.name, point, step):
                parts.add(f"{intervention.name}/", intervention.apply(view) or {})

    def _observe(self, observers: Sequence[Observer], point: LifecyclePoint, step: int, parts: Parts) -> None:
        if not observers:
            return
        parameters = tensors.parameters(self.model)
        views = [self._view(point, step, parameters) for _ in observers]
        read_shared(observers, views, parameters, self._gradients, parts)
        for observer, view in zip(observers, views, strict=True):
            trusted = type(observer) in SHIPPED
            before = None if trusted else state_of(self.model, parameters)
            with naming_errors("observer", observer.name, point, step):
                parts.add(f"{observer.name}/", observer.observe(view))
                changed = before and difference(before, state_of(self.model, parameters))
                if changed:
                    raise RuntimeError(f"it changed the {changed}; what changes a model is an Intervention")

    def _gradients(self, source: GradientSource) -> TensorList:
        if source == "current":
            return tensors.gradients(self.model)
        assert self._mean is not None
        if not self._hooks:
            raise NoGradientError("accumulate='epoch' needs the optimizer: Monitor(..., optimizer=optimizer)")
        means = self._mean.means()
        if not means.tensors:
            raise NoGradientError("no gradient since the last epoch: the attached optimizer has made no step with one")
        return means

    def _write(self, record: Record) -> None:
        self._each_sink("write", lambda sink: _write_to(sink, record), f" at {record.point.value} {record.step}")

    def close(self) -> None:
        """Detach from the optimizer and close every sink.

        Raises:
            SinkError: a sink failed to close; it is named, and the others are closed.
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._optimizers = [], []
        self._each_sink("close", lambda sink: getattr(sink, "close", lambda: None)(), "")

    def _each_sink(self, verb: str, act: Callable[[AnySink], object], when: str) -> None:
        """Let every sink act, then raise the first failure: one sink's trouble costs the others nothing."""
        failures: list[tuple[AnySink, Exception]] = []
        for sink in self.sinks:
            try:
                act(sink)
            except Exception as error:  # noqa: PERF203
                failures.append((sink, error))
        if failures:
            sink, failure = failures[0]
            raise SinkError(f"sink {_sink_name(sink)} failed to {verb}{when}: {failure}") from failure

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _parameter_ids(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _has_closure(args: tuple[object, ...], kwargs: dict[str, object]) -> bool:
    """Whether the step computes its gradients itself, so that they are on the model only after it."""
    return any(callable(argument) for argument in (*args[1:], *kwargs.values()))


def _write_to(sink: AnySink, record: Record) -> None:
    if isinstance(sink, Sink):
        sink.write(record)
    else:
        sink(record)


def _sink_name(sink: AnySink) -> str:
    return getattr(sink, "__qualname__", None) or repr(sink)
