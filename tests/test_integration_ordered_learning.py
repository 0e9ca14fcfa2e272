"""The hooks of OrderedLearning against the formulas in float64, in both modes, on a stand-in for the framework."""

from __future__ import annotations

import gc
import math
import re
import sys
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from normscope import ops
from normscope.errors import AmbiguousEmbeddingError, NoGradientError, NormscopeError
from normscope.integrations.ordered_learning import MissingFrameworkError, register

ROOT = Path(__file__).parent / "ordered_learning_framework"
HOOKS = ("norms", "weight_tracking", "token_gradient")


def forget_framework() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "framework"]:
        del sys.modules[name]


@pytest.fixture
def framework(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    forget_framework()
    monkeypatch.syspath_prepend(str(ROOT))
    import framework.hooks as hooks  # type: ignore[import-not-found]

    yield hooks
    forget_framework()


class Context:
    """As the framework's: a new one a firing."""

    def __init__(self, config: object = None) -> None:
        self.config = config


class Grokking(nn.Module):
    """An embedding, positions, a convolution, a norm and a decoder; one parameter has a bias's name and two axes."""

    def __init__(self, tokens: int = 23, width: int = 6, sparse: bool = False, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width, sparse=sparse)
        self.position = nn.Parameter(torch.randn(2, width))
        self.head_bias_table = nn.Parameter(torch.randn(3, width))
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv1d(width, 3, 2)
        self.decoder = nn.Linear(width, tokens)
        if tied:
            self.decoder.weight = self.embedding.weight

    def forward(self, pairs: Tensor) -> Tensor:
        hidden = self.norm(self.embedding(pairs) + self.position + self.head_bias_table.mean())
        squeezed = self.conv(hidden.transpose(1, 2)).mean()
        logits: Tensor = self.decoder(hidden.mean(dim=1)) * squeezed
        return logits


def trained(seed: int = 0, **options: Any) -> Grokking:
    torch.manual_seed(seed)
    model = Grokking(**options)
    model(torch.tensor([[1, 2], [2, 5], [4, 4], [1, 0]])).square().sum().backward()
    return model


def accumulated(model: nn.Module, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(p.shape, generator=generator) * torch.rand((), generator=generator)
        for name, p in model.named_parameters()
    }


def state(model: nn.Module | None = None, grads: Mapping[str, Tensor | None] | None = None) -> dict[str, Any]:
    return {"model_state": SimpleNamespace(model=model), "gradient_state": SimpleNamespace(accumulated_grads=grads)}


def compute(published: bool, model: nn.Module, grads: Any = None, config: object = None) -> dict[str, dict[str, float]]:
    ctx, given = Context(config), state(model, grads)
    return {kind.name: kind().compute(ctx, **given) for kind in register(published)}


# The formulas, in NumPy and float64


def wide(tensor: Tensor) -> Any:
    tensor = tensor.detach().double()
    return (tensor.to_dense() if tensor.is_sparse else tensor).numpy()


def expected_norms(grads: Mapping[str, Tensor], published: bool) -> dict[str, float]:
    kept = {name: wide(g) for name, g in grads.items() if not (published and "bias" in name)}
    flat = np.concatenate([g.ravel() for g in kept.values()])
    found = {
        "total_norm": np.sqrt((flat**2).sum()),
        "max_component": np.abs(flat).max(),
        "mean_component": np.abs(flat).mean(),
    }
    found |= {f"norm_{name}": np.sqrt((g**2).sum()) for name, g in kept.items()}
    return found if published else found | {"nonfinite": float((~np.isfinite(flat)).sum())}


def expected_weights(model: nn.Module, grads: Mapping[str, Tensor], published: bool) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        w = wide(parameter)
        if published and (w.ndim < 2 or "bias" in name):
            continue
        found[f"weight_norm/{name}"] = np.sqrt((w**2).sum())
        if w.ndim == 2 or (w.ndim > 2 and not published):
            s = np.linalg.svd(w.reshape(len(w), -1), compute_uv=False)
            p = s / s.sum()
            found[f"top_sv/{name}"] = s[0]
            entropy = -sum(x * math.log(x) for x in p if x > 0)
            found[f"effective_rank/{name}"] = s.sum() ** 2 / (s**2).sum() if published else math.exp(entropy)
        if name in grads:
            g = wide(grads[name])
            with np.errstate(invalid="ignore"):
                found[f"grad_weight_align/{name}"] = (g * w).sum() / np.sqrt((g**2).sum()) / np.sqrt((w**2).sum())

    def values(metric: str) -> list[float]:
        return [v for key, v in found.items() if key.startswith(metric + "/") and not math.isnan(v)]

    norms = values("weight_norm")
    found["total_weight_norm"] = math.sqrt(sum(n**2 for n in norms)) if published else sum(norms)
    for metric in ("weight_norm", "top_sv", "effective_rank", "grad_weight_align"):
        found[f"mean_{metric}"] = float(np.mean(values(metric))) if values(metric) else math.nan
    found["max_top_sv"] = max(values("top_sv"))
    return found


def expected_tokens(grad: Tensor, stride: int | None, published: bool) -> dict[str, float]:
    g = wide(grad)
    x = np.sqrt((g.reshape(len(g), -1) ** 2).sum(axis=1))
    v = len(x)
    share = x if published else x**2
    descending = np.cumsum(np.sort(share)[::-1]) / share.sum()
    counts = {f"tokens_for_{int(100 * f)}pct": float((descending < f - 1e-15).sum() + 1) for f in (0.5, 0.9)}
    limit = 0.1 * x.mean() if published else 0.01 * x.max()
    index = np.arange(1, v + 1)
    found = {
        "gradient_sparsity": (x < limit).mean(),
        "gradient_gini": ((2 * index - v - 1) * np.sort(x)).sum() / (v * x.sum()),
        **counts,
        "concentration_ratio": counts["tokens_for_50pct"] / v,
    }
    stride = stride or (math.isqrt(v) if published else None)
    if stride:
        means = np.array([x[k::stride].mean() for k in range(min(stride, v))])
        found["stride_group_variance"] = means.var()
        with np.errstate(divide="ignore"):
            found["stride_group_max_ratio"] = means.max() / (means.mean() if published else means.min())
    return found


def assert_same(actual: Mapping[str, float], expected: Mapping[str, float]) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert type(actual[key]) is float, key
        assert actual[key] == pytest.approx(value, rel=1e-9, abs=1e-12, nan_ok=True), key


def assert_all(
    found: Mapping[str, Mapping[str, float]],
    model: nn.Module,
    grads: Mapping[str, Tensor],
    stride: Any,
    published: bool,
) -> None:
    assert_same(found["norms"], expected_norms(grads, published))
    assert_same(found["weight_tracking"], expected_weights(model, grads, published))
    assert_same(found["token_gradient"], expected_tokens(grads["embedding.weight"], stride, published))


pytestmark = pytest.mark.usefixtures("framework")
both_modes = pytest.mark.parametrize("published", [False, True], ids=["defined", "published"])


# Values


@both_modes
@pytest.mark.parametrize(("tokens", "width", "stride"), [(7, 3, 2), (23, 6, None), (40, 70, 9), (100, 2, 150)])
def test_values_are_the_formulas(published: bool, tokens: int, width: int, stride: int | None) -> None:
    model = trained(tokens=tokens, width=width, seed=tokens)
    grads = accumulated(model)
    found = compute(published, model, grads, SimpleNamespace(stride=stride))
    assert_all(found, model, grads, stride, published)


@both_modes
def test_gradients_on_the_model_where_none_are_given(published: bool) -> None:
    model = trained()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_all(compute(published, model, None, {"stride": 4}), model, grads, 4, published)


@both_modes
@pytest.mark.parametrize("config", [None, {}, {"stride": None}, {"stride": 0}, SimpleNamespace(), {"p": 23}, 5])
def test_without_a_stride(published: bool, config: object) -> None:
    model = trained()
    found = compute(published, model, accumulated(model), config)["token_gradient"]
    assert ("stride_group_variance" in found) is published
    assert_same(found, expected_tokens(accumulated(model)["embedding.weight"], None, published))


@both_modes
def test_a_context_without_config_and_strides_that_are_none(published: bool) -> None:
    model, grads = trained(), accumulated(trained())
    _, _, kind = register(published)
    for ctx in (None, object(), SimpleNamespace(epoch=3)):
        assert_same(
            kind().compute(ctx, **state(model, grads)), expected_tokens(grads["embedding.weight"], None, published)
        )
    assert_same(
        kind(stride=5).compute(Context({"stride": 3}), **state(model, grads)),
        expected_tokens(grads["embedding.weight"], 5, published),
    )
    with pytest.raises(ValueError, match="stride must be a positive integer, got -2"):
        kind().compute(Context({"stride": -2}), **state(model, grads))


@both_modes
def test_sparse_gradients(published: bool) -> None:
    model = trained(sparse=True)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert grads["embedding.weight"].is_sparse
    assert_all(compute(published, model, grads, {"stride": 3}), model, grads, 3, published)


@both_modes
def test_zero_gradients_leave_nothing_to_divide(published: bool) -> None:
    model = trained()
    grads = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    found = compute(published, model, grads, {"stride": 4})
    assert found["norms"]["total_norm"] == found["norms"]["norm_embedding.weight"] == 0.0
    assert math.isnan(found["weight_tracking"]["grad_weight_align/embedding.weight"])
    assert math.isnan(found["weight_tracking"]["mean_grad_weight_align"])
    tokens = found["token_gradient"]
    assert tokens.pop("stride_group_variance") == 0.0
    assert all(math.isnan(value) for value in tokens.values())


@both_modes
def test_nan_shows_where_it_is(published: bool) -> None:
    model = trained()
    grads = accumulated(model)
    grads["embedding.weight"][3, 1] = math.nan
    found = compute(published, model, grads, {"stride": 4})
    assert_same(found["norms"], expected_norms(grads, published))
    assert math.isnan(found["norms"]["total_norm"])
    assert not math.isnan(found["norms"]["norm_decoder.weight"])
    assert found["norms"].get("nonfinite", 1.0) == 1.0
    assert all(math.isnan(value) for value in found["token_gradient"].values())
    assert math.isnan(found["weight_tracking"]["grad_weight_align/embedding.weight"])
    assert not math.isnan(found["weight_tracking"]["mean_grad_weight_align"])


def test_zero_and_non_finite_weights() -> None:
    model = trained()
    with torch.no_grad():
        model.decoder.weight.zero_()
        model.position[0, 0] = math.inf
    found = compute(True, model, accumulated(model))["weight_tracking"]
    assert math.isnan(found["effective_rank/decoder.weight"])
    assert found["top_sv/decoder.weight"] == 0.0
    assert math.isnan(found["top_sv/position"])
    assert found["max_top_sv"] == found["top_sv/embedding.weight"]


@both_modes
def test_half_precision_is_read_as_stored(published: bool) -> None:
    model = trained().to(torch.bfloat16)
    grads = {name: grad.bfloat16() for name, grad in accumulated(model).items()}
    assert_all(compute(published, model, grads, {"stride": 4}), model, grads, 4, published)


def test_tied_weights_count_once() -> None:
    model = trained(tied=True)
    grads = accumulated(model)
    twice = {**grads, "decoder.weight": grads["embedding.weight"].clone()}
    assert repr(compute(False, model, twice)) == repr(compute(False, model, grads))
    assert_all(compute(False, model, grads), model, grads, None, False)


def test_wrappers_show_in_the_published_names_only() -> None:
    wrapped = nn.ModuleDict({"module": trained()})
    grads = accumulated(wrapped)
    clean = {name.removeprefix("module."): grad for name, grad in grads.items()}
    assert compute(False, wrapped, grads)["norms"] == compute(False, trained(), clean)["norms"]
    assert repr(compute(False, wrapped, clean)) == repr(compute(False, trained(), clean))
    assert "norm_module.decoder.weight" in compute(True, wrapped, grads)["norms"]
    assert "grad_weight_align/module.decoder.weight" in compute(True, wrapped, grads)["weight_tracking"]


def test_a_parameter_without_a_gradient_is_absent() -> None:
    model = trained()
    model.position.grad = None
    found = compute(False, model)
    assert "norm_position" not in found["norms"]
    assert "grad_weight_align/position" not in found["weight_tracking"]
    assert "weight_norm/position" in found["weight_tracking"]


# Which embedding


def test_the_one_embedding_and_else_the_first_of_that_name() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"pos_embedding": nn.Embedding(4, 3), "embedding": nn.Embedding(9, 3)})
    grads = accumulated(model)
    for published in (False, True):  # several fit: as the framework has it, the first
        found = compute(published, model, grads)["token_gradient"]
        assert_same(found, expected_tokens(grads["pos_embedding.weight"], None, published))
    _, _, kind = register()
    found = kind(embedding="embedding").compute(Context(), **state(model, grads))
    assert_same(found, expected_tokens(grads["embedding.weight"], None, False))
    other = nn.ModuleDict({"wte": nn.Embedding(9, 3), "embedding_weight_norm": nn.Linear(3, 3)})
    found = compute(False, other, grads_other := accumulated(other))["token_gradient"]
    assert_same(found, expected_tokens(grads_other["wte.weight"], None, False))


def test_no_embedding() -> None:
    model = nn.ModuleDict({"wte": nn.Embedding(9, 3), "wpe": nn.Embedding(4, 3)})
    grads = accumulated(model)
    _, _, kind = register()
    with pytest.raises(AmbiguousEmbeddingError, match=r"wte\.weight, wpe\.weight"):
        kind().compute(Context(), **state(model, grads))
    with pytest.raises(NoGradientError, match=r"wte\.weight has no gradient"):
        kind(embedding="wte").compute(Context(), **state(model, {"wpe.weight": grads["wpe.weight"]}))
    _, _, published = register(published_code=True)
    assert published().compute(Context(), **state(model, grads)) == {}


@both_modes
def test_an_embedding_named_after_a_bias(published: bool) -> None:
    model = nn.ModuleDict({"embedding_bias": nn.Embedding(9, 3), "out": nn.Linear(3, 3)})
    grads = accumulated(model)
    found = compute(published, model, grads)["token_gradient"]
    assert_same(found, expected_tokens(grads["embedding_bias.weight"], None, published))


# What is not there


def test_no_gradient_at_all() -> None:
    model = Grokking()
    norms, weights, tokens = register()
    for kind in (norms, tokens):
        for given in (state(model), state(model, {}), {}, {"model_state": None, "gradient_state": None}):
            with pytest.raises(NoGradientError, match=f"hook '{kind.name}'.*before zero_grad"):
                kind().compute(Context(), **given)
    assert_same(weights().compute(Context(), **state(model)), expected_weights(model, {}, False))
    with pytest.raises(NormscopeError, match=r"no model_state\.model"):
        weights().compute(Context(), **state(None, accumulated(model)))
    published = register(published_code=True)
    for kind in published:
        assert kind().compute(Context()) == {}
    without = published[1]().compute(Context(), **state(model))
    assert "mean_grad_weight_align" not in without
    assert "mean_effective_rank" in without


def test_gradients_without_a_model() -> None:
    grads = accumulated(Grokking())
    norms, _, tokens = register()
    assert_same(norms().compute(Context(), **state(None, grads)), expected_norms(grads, False))
    assert_same(
        tokens().compute(Context(), **state(None, grads)), expected_tokens(grads["embedding.weight"], None, False)
    )
    with pytest.raises(AmbiguousEmbeddingError, match="candidates: position"):
        tokens().compute(Context(), **state(None, {"position": grads["position"]}))


def test_a_gradient_of_another_shape_is_the_weights_hooks_error() -> None:
    model = trained()
    grads = accumulated(model) | {"position": torch.ones(3)}
    norms, weights, _ = (kind() for kind in register())
    for _ in range(2):
        ctx = Context()
        assert norms.compute(ctx, **state(model, grads))["norm_position"] == math.sqrt(3)
        with pytest.raises(ValueError, match=r"'position' differ in shape: \(3,\) and \(2, 6\)"):
            weights.compute(ctx, **state(model, grads))


# One pass


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of tensors of the fused passes that are made."""
    made: list[int] = []
    whole = ops.fused_pass

    def counted(gradients: Any, *rest: Any) -> Any:
        made.append(len(gradients))
        return whole(gradients, *rest)

    monkeypatch.setattr(ops, "fused_pass", counted)
    return made


@both_modes
@pytest.mark.parametrize("kind_of_context", [Context, lambda config: SimpleNamespace(config=config)])
def test_hooks_that_fire_together_read_once(
    published: bool, passes: list[int], framework: Any, kind_of_context: Any
) -> None:
    register(published)
    model = trained()
    manager = framework.HookManager(*HOOKS)
    count = []
    for epoch in range(3):
        grads = accumulated(model, seed=epoch)
        with torch.no_grad():
            model.decoder.weight.add_(0.1)
        passes.clear()
        ctx = kind_of_context({"stride": 4})
        found = manager.fire(framework.HookPoint.POST_EPOCH, ctx, **state(model, grads))
        count.append(len(passes))
        split = {hook: {k.split("/", 1)[1]: v for k, v in found.items() if k.startswith(hook)} for hook in HOOKS}
        assert_all(split, model, grads, 4, published)
    assert count[1:] == [1, 1]


def test_what_was_written_to_is_read_again() -> None:
    model, ctx = trained(), Context()
    grads = accumulated(model)
    norms, weights, tokens = (kind() for kind in register())

    def fire(ctx: Context) -> None:
        norms.compute(ctx, **state(model, grads))
        weights.compute(ctx, **state(model, grads))
        tokens.compute(ctx, **state(model, grads))

    fire(Context())
    norms.compute(ctx, **state(model, grads))
    grads["embedding.weight"][2] *= 5  # counted by PyTorch
    assert_same(tokens.compute(ctx, **state(model, grads)), expected_tokens(grads["embedding.weight"], None, False))
    fire(ctx)
    grads["embedding.weight"].data[2] *= 5  # not counted; every hook gets a read once
    assert_same(norms.compute(ctx, **state(model, grads)), expected_norms(grads, False))
    assert_same(tokens.compute(ctx, **state(model, grads)), expected_tokens(grads["embedding.weight"], None, False))
    fire(ctx)
    model.decoder.weight.data = model.decoder.weight.data * 2
    assert_same(weights.compute(ctx, **state(model, grads)), expected_weights(model, grads, False))
    other = accumulated(model, seed=5)
    assert_same(norms.compute(ctx, **state(model, other)), expected_norms(other, False))


def test_only_what_fires_is_read(framework: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    register()
    model = trained()
    beside: list[object] = []
    whole = ops.fused_pass

    def noting(gradients: Any, weights: Any, tables: Any) -> Any:
        beside.append(weights)
        return whole(gradients, weights, tables)

    monkeypatch.setattr(ops, "fused_pass", noting)
    manager = framework.HookManager("norms", "token_gradient")
    for _ in range(2):
        manager.fire(framework.HookPoint.POST_EPOCH, Context(), **state(model, accumulated(model)))
    assert beside
    assert beside == [None] * len(beside)


def test_nothing_is_kept_alive_or_changed() -> None:
    model = trained()
    grads = accumulated(model)
    gone = weakref.ref(grads["embedding.weight"])
    before = {name: (p.detach().clone(), p._version) for name, p in model.named_parameters()}
    random = torch.get_rng_state()
    hooks = [kind() for kind in register()]
    for hook in hooks:
        hook.compute(Context(), **state(model, grads))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter._version == before[name][1]
    assert torch.equal(random, torch.get_rng_state())
    del grads
    gc.collect()
    assert gone() is None


# The framework


@both_modes
def test_the_classes_are_hooks_of_the_framework(published: bool, framework: Any) -> None:
    from framework import capabilities as c

    classes = register(published)
    assert [kind.name for kind in classes] == list(HOOKS)
    assert isinstance(classes, tuple)
    for kind in classes:
        assert framework.HookRegistry.items[kind.name] is kind
        assert issubclass(kind, framework.TrainingHook)
        assert kind.hook_points == {framework.HookPoint.POST_EPOCH}
        assert kind.loop_points == {"epoch": {framework.HookPoint.POST_EPOCH}}
        assert kind.needs is c.HookNeeds.ACCUMULATED_GRADS
        assert kind.requires.gradient_availability is c.GradientAvailability.GLOBAL_GRADIENTS
        assert kind.description
    norms, weights, tokens = classes
    assert (norms.requires.paradigm, norms.requires.model_capabilities) == (None, None)
    assert weights.requires.model_capabilities is c.ModelCapability.PARAMETERS
    assert tokens.requires.model_capabilities is c.ModelCapability.EMBEDDINGS
    assert tokens.requires.paradigm is c.TrainingParadigm.BACKPROP
    assert framework.HookRegistry.items["phases"].__name__ == "OtherHook"


@both_modes
def test_every_metric_is_described(published: bool, framework: Any) -> None:
    model = trained()
    found = compute(published, model, accumulated(model), {"stride": 4})
    for kind in register(published):
        described = [info.name for info in kind().describe_metrics()]
        assert all(isinstance(info, framework.MetricInfo) and info.label for info in kind().describe_metrics())
        families = {"norm_{layer}" if key.startswith("norm_") else key for key in found[kind.name]}
        families = {f"{key.split('/')[0]}/{{layer}}" if "/" in key else key for key in families}
        assert set(described) == families
        assert len(described) == len(families)


def test_the_frameworks_own_hook_stays_until_register_and_the_last_wins(framework: Any) -> None:
    model = trained()
    grads = accumulated(model)

    def fired() -> dict[str, Any]:
        found = framework.HookManager("norms", "phases").fire(
            framework.HookPoint.POST_EPOCH, Context(), **state(model, grads)
        )
        assert found.pop("phases/phase") == 0
        return {key.removeprefix("norms/"): value for key, value in found.items()}

    assert fired() == {"total_norm": -1.0}
    for published in (True, False, True):
        register(published)
        assert_same(fired(), expected_norms(grads, published))


def test_another_point_fires_nothing(framework: Any) -> None:
    register()
    assert framework.HookManager(*HOOKS).fire(framework.HookPoint.POST_STEP, Context()) == {}


def test_options_come_through_the_hook_configuration(framework: Any) -> None:
    register()
    model = trained()
    manager = framework.HookManager("token_gradient", config={"token_gradient": {"stride": 5}})
    found = manager.fire(framework.HookPoint.POST_EPOCH, Context(), **state(model, accumulated(model)))
    assert "token_gradient/stride_group_variance" in found


def test_a_missing_framework_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    forget_framework()
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(ROOT)])
    with pytest.raises(MissingFrameworkError, match="OrderedLearning's top-level package 'framework'"):
        register()
    package = tmp_path / "framework"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MissingFrameworkError, match=r"no module framework\.hooks"):
        register()
    forget_framework()
    (package / "hooks.py").write_text("HookPoint = None\n")
    with pytest.raises(MissingFrameworkError, match="has no TrainingHook, HookRegistry, MetricInfo"):
        register()
    forget_framework()
    (package / "hooks.py").write_text("import a_package_that_is_not_there\n")
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there") as raised:
        register()
    assert not isinstance(raised.value, MissingFrameworkError)


# The page


def test_the_page_runs_and_names_what_there_is(framework: Any) -> None:
    page = (Path(__file__).parents[1] / "docs" / "integrations" / "ordered_learning.md").read_text()
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(block, names)
    found = names["token_gradient"]().compute(names["context"], **names["state"])
    assert found["stride_group_max_ratio"] >= 1
    keys = {
        key for row in re.findall(r"^\| (`.*?) \|", page, flags=re.MULTILINE) for key in re.findall(r"`(\w+)`", row)
    }
    described = {
        info.name.split("/")[0] for hook in HOOKS for info in framework.HookRegistry.items[hook]().describe_metrics()
    }
    assert keys - set(HOOKS) <= described
