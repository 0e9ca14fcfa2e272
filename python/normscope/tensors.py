"""From a model or a mapping to the named tensors to read: clean names, each tensor once, which one holds tokens."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import NamedTuple, cast

from torch import Tensor, nn

from normscope.errors import AmbiguousEmbeddingError, NoGradientError

_INNER_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


class TensorList(NamedTuple):
    """Named tensors in the model's order, each once."""

    names: Sequence[str]
    tensors: list[Tensor]


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


@lru_cache(maxsize=64)
def _clean_names(raw: tuple[str, ...]) -> tuple[str, ...]:
    """The names without prefixes; those that would then be equal keep theirs."""
    clean = [clean_name(name) for name in raw]
    uses = Counter(clean)
    return tuple(short if uses[short] == 1 else name for name, short in zip(raw, clean, strict=True))


def _each_once(raw: Iterable[str], tensors: Iterable[Tensor | None]) -> TensorList:
    # All names are cleaned together: a parameter is called the same whether or not others have a gradient.
    names, held = _clean_names(tuple(raw)), list(tensors)
    first = dict(zip(map(id, reversed(held)), reversed(range(len(held))), strict=True))
    first.pop(id(None), None)
    if len(first) < len(held):
        positions = sorted(first.values())
        names, held = tuple(names[i] for i in positions), [held[i] for i in positions]
    return TensorList(names, cast(list[Tensor], held))


def parameters(model: nn.Module) -> TensorList:
    """Parameters of the model; tied ones once, under the first name ``named_parameters()`` gives."""
    named = list(model.named_parameters())
    return _each_once([name for name, _ in named], [parameter for _, parameter in named])


def gradients(source: nn.Module | Mapping[str, Tensor | None]) -> TensorList:
    """Gradients of a model's parameters, or those of a mapping name -> gradient.

    A parameter without a gradient is left out.

    Raises:
        NoGradientError: no parameter has a gradient.
        TypeError: ``source`` is neither a module nor a mapping.
    """
    if isinstance(source, nn.Module):
        named = list(source.named_parameters())
        found = _each_once([name for name, _ in named], [parameter.grad for _, parameter in named])
    elif isinstance(source, Mapping):
        found = _each_once(source.keys(), source.values())
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
