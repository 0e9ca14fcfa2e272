"""From stored attention weights to one layout: query, key, value and output per head, without biases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, TypeAlias

from torch import Tensor

from normscope.errors import NormscopeError

#: How a weight is stored: ``linear`` as nn.Linear does, [out, in]; ``conv1d`` as GPT-2 does, [in, out]; ``per_head``
#: with the heads first, query, key and value [heads, d_model, d_head] and output [heads, d_head, d_model].
Stored: TypeAlias = Literal["linear", "conv1d", "per_head"]
#: How query, key and value share one weight: one after the other, or by turns, [heads, 3, d_head].
Fused: TypeAlias = Literal["concatenated", "interleaved"]


class LayoutError(NormscopeError, ValueError):
    """Attention weights were not found or do not fit together; the message says what was looked for."""


class LayerHeads(NamedTuple):
    """Attention weights of one layer, by head: the scores of head h are x W_Q W_K^T x^T, what it writes is A x W_V W_O.

    The rows of ``key`` and ``value`` are their inputs: d_model, or ``kdim`` and ``vdim`` of a
    ``torch.nn.MultiheadAttention`` that has them.

    Attributes:
        query: W_Q, float ``[heads, d_model, d_head]``.
        key: W_K, ``[kv_heads, d_model, d_head]``; head h reads with key h // (heads // kv_heads).
        value: W_V, ``[kv_heads, d_model, d_value]``; likewise.
        output: W_O, ``[heads, d_value, d_model]``.

    Example:
        >>> import torch
        >>> from normscope.attention import find_attention
        >>> layer = find_attention(torch.nn.MultiheadAttention(8, num_heads=2)).layer(0)
        >>> [tuple(weight.shape) for weight in layer]
        [(2, 8, 4), (2, 8, 4), (2, 8, 4), (2, 4, 8)]
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor


#: Role -> weight as stored, and the number of heads, to the weights by head.
Split: TypeAlias = Callable[[Mapping[str, Tensor], int], LayerHeads]


def _parts(whole: int, parts: int, what: str) -> int:
    """``whole / parts``, which must be a whole number."""
    if parts < 1 or whole < 1 or whole % parts:
        raise LayoutError(f"{what} is {whole}, which is no multiple of {parts}")
    return whole // parts


def _matrix(weights: Mapping[str, Tensor], role: str, stored: Stored) -> Tensor:
    """One weight as nn.Linear stores it."""
    weight = weights[role]
    if weight.dim() != 2:
        raise LayoutError(f"the {role} weight has shape {tuple(weight.shape)}, not two dimensions")
    return weight.mT if stored == "conv1d" else weight


def _heads_of(weight: Tensor, heads: int) -> Tensor:
    """[heads * width, d_model] -> [heads, d_model, width]."""
    return weight.reshape(heads, weight.shape[0] // heads, weight.shape[1]).mT


def _separate(query: Tensor, key: Tensor, value: Tensor, output: Tensor, heads: int) -> LayerHeads:
    d_value = _parts(output.shape[1], heads, "the input of the output projection")
    kv_heads = _parts(value.shape[0], d_value, "the output of the value projection")
    d_head = _parts(query.shape[0], heads, "the output of the query projection")
    _parts(heads, kv_heads, "the number of heads")
    if key.shape[0] != kv_heads * d_head:  # as where a gate is stored with the queries
        raise LayoutError(
            f"the key projection has {key.shape[0]} outputs; {heads} heads of width {d_head} "
            f"and {kv_heads} key/value heads need {kv_heads * d_head}"
        )
    return LayerHeads(
        _heads_of(query, heads),
        _heads_of(key, kv_heads),
        _heads_of(value, kv_heads),
        output.reshape(output.shape[0], heads, d_value).permute(1, 2, 0),
    )


def _fused(qkv: Tensor, output: Tensor, heads: int, fused: Fused) -> LayerHeads:
    width = output.shape[1]
    if fused == "interleaved":
        d_head = _parts(width, heads, "the input of the output projection")
        if qkv.shape[0] != 3 * width:
            raise LayoutError(f"the fused weight has {qkv.shape[0]} outputs; query, key and value need {3 * width}")
        by_head = qkv.reshape(heads, 3, d_head, qkv.shape[1])
        query, key, value = (part.flatten(0, 1) for part in by_head.unbind(1))
    else:
        shared = _parts(qkv.shape[0] - width, 2, "the width that key and value share")
        query, key, value = qkv[:width], qkv[width : width + shared], qkv[width + shared :]
    return _separate(query, key, value, output, heads)


def split(weights: Mapping[str, Tensor], heads: int, stored: Stored, fused: Fused) -> LayerHeads:
    """Weights by head; views where strides allow.

    Args:
        weights: role -> weight, with roles ``query, key, value, output`` or ``qkv, output``.
        heads: number of (query) heads.
        stored: how each is stored.
        fused: how ``qkv`` is divided.

    Raises:
        LayoutError: the shapes do not fit each other or ``heads``.
    """
    if stored == "per_head":
        return LayerHeads(weights["query"], weights["key"], weights["value"], weights["output"])
    output = _matrix(weights, "output", stored)
    if "qkv" in weights:
        return _fused(_matrix(weights, "qkv", stored), output, heads, fused)
    query, key, value = (_matrix(weights, role, stored) for role in ("query", "key", "value"))
    return _separate(query, key, value, output, heads)


def checked(layer: LayerHeads, heads: int) -> LayerHeads:
    """The same weights, if they have the shapes that :class:`LayerHeads` promises.

    Raises:
        LayoutError: they have not.
    """
    shapes = {role: tuple(weight.shape) for role, weight in layer._asdict().items()}
    if any(len(shape) != 3 or 0 in shape for shape in shapes.values()):
        problem = "each must have three extents and be no empty tensor"
    else:
        (queries, d_model, d_head), (keys, _, key_width) = shapes["query"], shapes["key"]
        (values, _, value_width), (outputs, d_value, written) = shapes["value"], shapes["output"]
        if (queries, outputs) != (heads, heads):
            problem = f"there should be {heads} heads"
        elif keys != values or heads % keys:
            problem = "key and value need the same number of heads, a divisor of the number of heads"
        elif (key_width, value_width) != (d_head, d_value):
            problem = "the widths of query and key, and of value and output, differ"
        elif written != d_model:
            problem = "query reads another width than output writes"
        else:
            return layer
    listed = ", ".join(f"{role} {list(shape)}" for role, shape in shapes.items())
    raise LayoutError(f"weights by head have shapes {listed}: {problem}")
