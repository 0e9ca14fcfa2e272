"""The families of attention layouts: by which names the weights are known, and how they are stored."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypeAlias

from normscope.attention.layouts import Fused, Split, Stored

#: What is known of the norm in front of the attention: its parameter says; or the module's ``norm_first`` does;
#: or its absence means that it is folded into the weights already.
NormRule: TypeAlias = Literal["named", "norm_first", "folded_if_absent"]

_NUMBER = r"(?P<layer>[0-9]+)"
_PARTS = r"(?P<between>(?:(?![0-9]+\.)[^.]+\.)*)"


@dataclass(frozen=True)
class Family:
    """Names and storage of one way to write attention; :func:`register_family` explains the fields."""

    name: str
    patterns: Mapping[str, str]
    stored: Stored = "linear"
    fused: Fused = "concatenated"
    split: Split | None = None
    norm: str | None = None
    norm_offset: float = 0.0
    norm_rule: NormRule = "named"
    #: Model types of a configuration whose norm multiplies by 1 + weight.
    offset_types: frozenset[str] = field(default_factory=frozenset)
    #: Why there is no norm to fold where ``norm`` is absent.
    post_norm: str | None = None
    #: A name that only models with post-norm have.
    post_norm_mark: str | None = None
    #: Whether the numbers in the names count the layers from 0; else they only put them in order.
    counted: bool = True

    @cached_property
    def expressions(self) -> Mapping[str, re.Pattern[str]]:
        """Role -> expression with groups ``prefix``, ``layer`` and ``between`` where the pattern has them."""
        return {role: _expression(pattern) for role, pattern in self.patterns.items()}


def _expression(pattern: str) -> re.Pattern[str]:
    text = re.escape(pattern).replace(r"\{layer\}", _NUMBER).replace(r"\.\*\.", r"\." + _PARTS)
    return re.compile(rf"(?P<prefix>(?:.+\.)?){text}")


#: Name -> its variants, in the order in which they are tried.
_REGISTERED: dict[str, tuple[Family, ...]] = {}
_SHIPPED: set[str] = set()


def families() -> dict[str, tuple[Family, ...]]:
    """Every family known, by name; the variants of one are tried in order.

    Example:
        >>> list(families())[:3]
        ['gpt2', 'nanogpt', 'gpt-neox']
    """
    return dict(_REGISTERED)


def register_family(
    name: str,
    patterns: Mapping[str, str],
    *,
    stored: Stored = "linear",
    fused: Fused = "concatenated",
    norm: str | None = None,
    norm_offset: float = 0.0,
    split: Split | None = None,
) -> None:
    """Make the attention of another kind of model known. A name registered before is replaced.

    Args:
        name: of the family.
        patterns: role -> parameter name, with ``{layer}`` where the number of the layer stands; any prefix may precede
            it. Roles are ``query, key, value, output`` or, for one fused weight, ``qkv, output``.
        stored: ``"linear"`` for weights [out, in], as nn.Linear; ``"conv1d"`` for [in, out]; ``"per_head"`` for
            [heads, d_model, d_head] and an output [heads, d_head, d_model].
        fused: ``qkv`` holds query, key and value ``"concatenated"`` or, per head, ``"interleaved"``.
        norm: name of the scale of the norm in front of the attention (pre-norm models), for ``fold_norm=True``.
        norm_offset: the norm multiplies by ``norm_offset`` + weight.
        split: for any other storage: a function of role -> weight (any roles) and the number of heads that returns
            :class:`LayerHeads`; ``stored`` and ``fused`` are then unused.

    Raises:
        ValueError: a family of that name is shipped, or the patterns are not as described.

    Example:
        >>> import torch
        >>> from normscope.attention import find_attention, register_family
        >>> register_family(
        ...     "mine",
        ...     {"qkv": "stage.{layer}.mix.qkv.weight", "output": "stage.{layer}.mix.out.weight"},
        ...     norm="stage.{layer}.norm.weight",
        ... )
        >>> weights = {"net.stage.0.mix.qkv.weight": torch.ones(24, 8), "net.stage.0.mix.out.weight": torch.ones(8, 8)}
        >>> find_attention(weights, heads=2)
        Attention(family='mine', stack='net.stage.{layer}.mix', layers=1, heads=2, folded=False)
    """
    if name in _SHIPPED:
        raise ValueError(f"the family {name!r} is shipped; register yours under another name")
    roles = set(patterns)
    if split is None and roles not in ({"query", "key", "value", "output"}, {"qkv", "output"}):
        raise ValueError(f"patterns need the roles query, key, value, output or qkv, output; got {', '.join(patterns)}")
    if split is None and stored == "per_head" and "qkv" in roles:
        raise ValueError("stored='per_head' needs query, key and value apart")
    if stored not in ("linear", "conv1d", "per_head"):
        raise ValueError(f"stored must be 'linear', 'conv1d' or 'per_head', got {stored!r}")
    if fused not in ("concatenated", "interleaved"):
        raise ValueError(f"fused must be 'concatenated' or 'interleaved', got {fused!r}")
    every = [*patterns.values(), *([norm] if norm is not None else [])]
    if not patterns or any(pattern.count("{layer}") != 1 for pattern in every):
        raise ValueError(f"each pattern must hold {{layer}} once, got {', '.join(every) or 'none'}")
    _REGISTERED[name] = (Family(name, dict(patterns), stored, fused, split=split, norm=norm, norm_offset=norm_offset),)


def _ship(*variants: Family) -> None:
    _REGISTERED[variants[0].name] = variants
    _SHIPPED.add(variants[0].name)


def _separate(form: str, output: str) -> dict[str, str]:
    """Patterns of separate projections; ``form`` has a gap for the role."""
    return {role: form.format(role, layer="{layer}") for role in ("query", "key", "value")} | {"output": output}


_GPT2 = {"qkv": "h.{layer}.attn.c_attn.weight", "output": "h.{layer}.attn.c_proj.weight"}
_ship(Family("gpt2", _GPT2, "conv1d", norm="h.{layer}.ln_1.weight"))
# The same names, but nn.Linear: told apart by their shapes, [3 d, d] for [d, 3 d].
_ship(Family("nanogpt", _GPT2, "linear", norm="h.{layer}.ln_1.weight"))
_ship(
    Family(
        "gpt-neox",
        {
            "qkv": "layers.{layer}.attention.query_key_value.weight",
            "output": "layers.{layer}.attention.dense.weight",
        },
        fused="interleaved",
        norm="layers.{layer}.input_layernorm.weight",
    )
)
_ship(
    Family(
        "llama",
        {
            "query": "layers.{layer}.self_attn.q_proj.weight",
            "key": "layers.{layer}.self_attn.k_proj.weight",
            "value": "layers.{layer}.self_attn.v_proj.weight",
            "output": "layers.{layer}.self_attn.o_proj.weight",
        },
        norm="layers.{layer}.input_layernorm.weight",
        offset_types=frozenset({"gemma", "gemma2", "gemma3", "gemma3_text", "vaultgemma", "nemotron"}),
    )
)
_ship(
    Family(
        "bert",
        _separate("layer.{layer}.attention.self.{}.weight", "layer.{layer}.attention.output.dense.weight"),
        norm="layer.{layer}.attention.LayerNorm.weight",  # of the pre-norm ones with these names, such as ESM
        post_norm="their LayerNorm follows the attention (post-norm)",
    )
)
_ship(
    *(
        Family(
            "torch",
            {role: f"{place}{name}" for role, name in names.items()} | {"output": f"{place}out_proj.weight"},
            norm_rule="norm_first",
            counted=False,
        )
        for place in ("{layer}.*.", "")
        for names in (
            {"qkv": "in_proj_weight"},
            {"query": "q_proj_weight", "key": "k_proj_weight", "value": "v_proj_weight"},
        )
    )
)
_ship(
    *(
        Family(
            "transformer-lens",
            {
                "query": "blocks.{layer}.attn.W_Q",
                "key": f"blocks.{{layer}}.attn.{own}W_K",
                "value": f"blocks.{{layer}}.attn.{own}W_V",
                "output": "blocks.{layer}.attn.W_O",
            },
            "per_head",
            norm="blocks.{layer}.ln1.w",
            norm_rule="folded_if_absent",
            post_norm="a HookedEncoder's LayerNorm follows the attention (post-norm)",
            post_norm_mark="embed.ln.w",
        )
        for own in ("", "_")  # grouped-query heads are stored once each, with an underscore
    )
)
