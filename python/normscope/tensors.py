"""From a model or a mapping to the named tensors to read: clean names, each tensor once, which one holds tokens."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor, nn

from normscope.errors import AmbiguousEmbeddingError, NoGradientError

_INNER_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


class TensorList(NamedTuple):
    """Named tensors in the model's order, each once."""

    names: list[str]
    tensors: list[Tensor]


@lru_cache(maxsize=65536)
def clean_name(name: str) -> str:
    """A parameter's name without the prefixes that wrappers (DDP, FSDP, compile, checkpointing) put into it.

    Example:
        >>> clean_name("module._orig_mod.encoder._checkpoint_wrapped_module.weight")
        'encoder.weight'
    """
    name = _INNER_WRAPPERS.sub("", name)
    while name.startswith("module."):
        name = _INNER_WRAPPERS.sub("", name[len("module.") :])
    return name


def _named_once(pairs: Iterable[tuple[str, Tensor | None]]) -> TensorList:
    names: list[str] = []
    tensors: list[Tensor] = []
    taken: set[str] = set()
    seen: set[int] = set()
    for raw, tensor in pairs:
        if tensor is None or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        name = clean_name(raw)
        if name in taken:
            name = raw
        taken.add(name)
        names.append(name)
        tensors.append(tensor)
    return TensorList(names, tensors)


def parameters(model: nn.Module) -> TensorList:
    """Parameters of the model; tied ones once, under the first name ``named_parameters()`` gives."""
    return _named_once(model.named_parameters())


def gradients(source: nn.Module | Mapping[str, Tensor | None]) -> TensorList:
    """Gradients of a model's parameters, or those of a mapping name -> gradient.

    A parameter without a gradient is left out.

    Raises:
        NoGradientError: no parameter has a gradient.
        TypeError: ``source`` is neither a module nor a mapping.
    """
    if isinstance(source, nn.Module):
        found = _named_once((name, parameter.grad) for name, parameter in source.named_parameters())
    elif isinstance(source, Mapping):
        found = _named_once(source.items())
    else:
        raise TypeError(f"expected a torch.nn.Module or a mapping name -> gradient, got {type(source).__name__}")
    if not found.tensors:
        raise NoGradientError(
            "no parameter has a gradient: observe after backward() and before zero_grad(), "
            "or pass accumulate='epoch' to observe the mean of an epoch's gradients"
        )
    return found


def token_table(
    model: nn.Module, embedding: str | nn.Module | None = None, with_gradient: Collection[str] | None = None
) -> str:
    """Name of the parameter whose rows are tokens.

    Args:
        model: the model.
        with_gradient: names of the parameters that have a gradient; by default those whose ``.grad`` is set.
        embedding: the embedding module, or a name or shell-style pattern of the module or parameter. By default the
            one ``nn.Embedding`` (or ``nn.EmbeddingBag``) that has a gradient.

    Raises:
        AmbiguousEmbeddingError: none or several fit; the message lists the candidates.
    """
    found = parameters(model)
    names = {id(tensor): name for name, tensor in zip(*found, strict=True)}
    if with_gradient is None:
        with_gradient = {name for name, tensor in zip(*found, strict=True) if tensor.grad is not None}
    if isinstance(embedding, nn.Module):
        weight = getattr(embedding, "weight", None)
        if id(weight) not in names:
            raise AmbiguousEmbeddingError(f"the given {type(embedding).__name__} holds no weight of this model")
        return names[id(weight)]
    if embedding is None:
        embeddings = [module for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))]
        held = {names[id(module.weight)] for module in embeddings if id(module.weight) in names}
        candidates = [name for name in names.values() if name in held and name in with_gradient]
        problem = "no nn.Embedding of the model has a gradient" if not candidates else "several embeddings fit"
    else:
        candidates = [
            name
            for name in names.values()
            if fnmatchcase(name, embedding) or fnmatchcase(name.removesuffix(".weight"), embedding)
        ]
        problem = f"{'nothing matches' if not candidates else 'several parameters match'} embedding={embedding!r}"
    if len(candidates) != 1:
        listed = ", ".join(candidates or [name for name in names.values() if name.endswith("weight")]) or "none"
        raise AmbiguousEmbeddingError(f"{problem}; name one with embedding=..., candidates: {listed}")
    return candidates[0]
