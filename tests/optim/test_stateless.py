"""Rules without state: against a reference in float64, by law, and as the policy of a model."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_multinorm import SWAN, MultiNormGD, SinkGD, parameter_groups
from lightning_multinorm.layouts import Piece, ShardedMatrix
from lightning_multinorm.norms import RowNorm
from lightning_multinorm.optim import routing_table, stateless
from lightning_multinorm.optim.scalings import row_scaling
from lightning_multinorm.optim.stateless import LR_SCALES, MATRIX_RULES
from lightning_multinorm.sinkhorn import eager

from .models import Logits, TinyText, backward

matrix_rules = pytest.mark.parametrize("rule", MATRIX_RULES)
every = pytest.mark.parametrize("rule", [*MATRIX_RULES, "sign"])
small_blocks = pytest.mark.parametrize("block", [None, 40])


@pytest.fixture
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if getattr(request, "param", None):
        monkeypatch.setattr(eager, "_BLOCK_CPU", request.param)


def _step(rule: str, gradient: Tensor, weight: Tensor | None = None, **options: Any) -> Tensor:
    """What one step at rate 1 subtracts from a weight, by default zero."""
    parameter = nn.Parameter(torch.zeros_like(gradient) if weight is None else weight)
    parameter.grad = gradient
    group = {"params": [("w", parameter)], "rule": rule, "view": options.pop("view", "matrix"), "lr_scale": 1.0}
    optimizer = SinkGD([group], lr=1.0, **options)
    optimizer.step()
    assert not optimizer.state
    return -parameter.detach()


def _reference(rule: str, G: Tensor, W: Tensor | None = None) -> Tensor:
    """The definition, on a matrix without zeros; a weight without offsets by default."""
    X = G.double()
    if rule == "sign":
        return X.sign()
    norms = X.norm(dim=1, keepdim=True)
    if rule == "row_power":
        X = X / norms.pow(0.75)
    if rule == "balanced_column":
        if W is not None:
            X = X / (1 + _fitted(norms.log(), W.double() @ (G / norms).sum(0)).exp()).sqrt()
        norms = X.norm(dim=1, keepdim=True)
        X = X / (1 + (norms / (4 * norms.square().mean().sqrt())).square()).sqrt()
    if rule in ("column", "balanced_column"):
        return X / X.norm(dim=0) * len(X) ** 0.5
    return X / X.square().mean().sqrt()


def _fitted(y: Tensor, z: Tensor) -> Tensor:
    """What the line through y (m, 1) over z (m,) says, less its mean."""
    z = z - z.mean()
    line = torch.stack([z, torch.ones_like(z)], dim=1)
    return z.unsqueeze(1) * torch.linalg.lstsq(line, y, driver="gelsd").solution[0]


def _row_scaling(G: Tensor, W: Tensor) -> Tensor:
    m, n = G.shape
    whole = ShardedMatrix((m, n), (m, n), (Piece(W, G, 0, 0),), torch.arange(m), torch.arange(n), (), ())
    return row_scaling(whole, "balanced", G)


def _skewed(*shape: int) -> Tensor:
    """A gradient as embeddings have it: rows of very different size."""
    return torch.randn(shape) * torch.randn(shape[0], 1).mul(2).exp()


@every
@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (9, 9), (1, 7)])
@pytest.mark.parametrize("block", [None, 40], indirect=True)
@pytest.mark.usefixtures("block")
def test_equals_the_definition(rule: str, shape: tuple[int, int]) -> None:
    G = _skewed(*shape)
    assert_close(_step(rule, G).double(), _reference(rule, G), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (9, 9)])
@pytest.mark.parametrize("block", [None, 40], indirect=True)
@pytest.mark.usefixtures("block")
def test_balanced_rows_follow_the_offsets_in_the_weight(shape: tuple[int, int]) -> None:
    G, W = _skewed(*shape).double(), torch.randn(shape).double()
    update = W + _step("balanced_column", G, weight=W.clone())
    assert_close(update, _reference("balanced_column", G, W), rtol=1e-9, atol=1e-9)


def test_a_row_is_scaled_by_its_offset_whether_the_batch_has_its_token_or_not() -> None:
    """Pushes and pulls of a token must weigh alike, or the model expects it too often or too seldom."""
    hidden = torch.randn(16).double()
    frequency = torch.logspace(-4, -1, 64).double()
    W = frequency.log().unsqueeze(1) * hidden / hidden.square().sum()
    absent = frequency.unsqueeze(1) * hidden
    present = absent.clone()
    present[5] *= -10
    expected = (1 + frequency / frequency.log().mean().exp()).rsqrt()
    without, within = (_row_scaling(G, W) / _row_scaling(G, W)[30] for G in (absent, present))
    assert_close(without[:40], (expected / expected[30])[:40], rtol=0.05, atol=0)
    assert_close(within[5], without[5], rtol=0.05, atol=0)


def test_rows_without_gradient_have_no_say_in_what_is_expected_of_others() -> None:
    G, W = _skewed(20, 8).double(), torch.randn(20, 8).double() + 1
    G[[3, 7, 11]] = 0
    found = G.any(dim=1)
    r = _row_scaling(G, W)
    assert not r[~found].any()
    assert_close(r[found], _row_scaling(G[found], W[found]) * (20 / 17) ** 0.5, rtol=1e-9, atol=0)


@pytest.mark.parametrize("k", [-60, -1, 60])
def test_powers_of_two_in_the_weight_change_no_bit_of_the_scaling(k: int) -> None:
    G, W = _skewed(20, 8), torch.randn(20, 8)
    assert torch.equal(_row_scaling(G, W * 2.0**k), _row_scaling(G, W))


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e25])
def test_rows_and_weights_of_any_size_are_safe_together(size: float) -> None:
    G, W = torch.randn(7, 5), torch.randn(7, 5) * size
    G[0] *= 1e25
    G[1] *= 1e-25
    r = _row_scaling(G, W)
    assert r.isfinite().all()
    assert_close((r[:, None] * G).square().mean().sqrt().item(), 1.0, rtol=1e-4, atol=0)


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype(rule: str, dtype: torch.dtype) -> None:
    G = _skewed(20, 8).to(dtype)
    update = _step(rule, G, stochastic_rounding=False)
    precision = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert update.dtype == dtype
    assert_close(update.double(), _reference(rule, G), rtol=precision, atol=precision)


@every
@pytest.mark.parametrize("k", [-90, -37, -1, 5, 64, 90])
def test_powers_of_two_in_the_gradient_change_no_bit(rule: str, k: int) -> None:
    G = _skewed(20, 8)
    G[3] = 0
    assert torch.equal(_step(rule, G * 2.0**k), _step(rule, G))


@every
def test_permutations_commute(rule: str) -> None:
    G, rows, columns = _skewed(20, 8).double(), torch.randperm(20), torch.randperm(8)
    assert_close(_step(rule, G[rows][:, columns]), _step(rule, G)[rows][:, columns], rtol=1e-9, atol=1e-9)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_stay_and_are_no_nan(rule: str, dtype: torch.dtype) -> None:
    weight = torch.randn(6, 8, dtype=dtype)
    assert torch.equal(_step(rule, torch.zeros(6, 8, dtype=dtype), weight=weight.clone()), -weight)
    G = torch.randn(6, 8, dtype=dtype)
    G[3] = 0
    update = _step(rule, G)
    assert update.isfinite().all()
    assert (update[3] == 0).all()
    assert (update != 0).any(dim=1).sum() == 5


@every
def test_zero_columns_stay_and_are_no_nan(rule: str) -> None:
    G = _skewed(20, 8)
    G[:, 2] = 0
    update = _step(rule, G)
    assert update.isfinite().all()
    assert update[:, 2].abs().max() < 1e-6


@every
def test_rows_of_any_size_are_safe(rule: str) -> None:
    G = torch.randn(7, 5)
    G[0] *= 1e25
    G[1] *= 1e-25
    update = _step(rule, G)
    assert update.isfinite().all()
    assert_close(update.double(), _reference(rule, G.double()), rtol=2e-3, atol=1e-12)


@pytest.mark.parametrize("rule", ["column", "balanced_column"])
def test_columns_of_any_size_are_made_alike(rule: str) -> None:
    G = torch.randn(7, 5) * torch.tensor([1.0, 1e-25, 1e12, 1e3, 1e-12])
    assert_close(_step(rule, G).norm(dim=0), torch.full((5,), 7**0.5))


@matrix_rules
def test_directions_have_rms_one_and_rare_rows_move_less(rule: str) -> None:
    G = torch.randn(64, 16, dtype=torch.float64)
    G[10:] *= 1e-3
    update = _step(rule, G)
    assert_close(update.square().mean().sqrt().item(), 1.0, rtol=1e-4, atol=0)
    ratio = update[:10].norm(dim=1).mean() / update[10:].norm(dim=1).mean()
    kept = {"column": 1e3, "row_power": 1e3**0.25, "balanced_column": 845}
    assert kept[rule] / 1.4 < ratio < kept[rule] * 1.4


@every
def test_nan_reaches_the_weight(rule: str) -> None:
    G = torch.randn(6, 8)
    G[2, 4] = float("nan")
    assert _step(rule, G)[2, 4].isnan()


@every
@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (0, 4), (4, 0)])
def test_thin_and_empty_matrices(rule: str, shape: tuple[int, int]) -> None:
    assert_close(_step(rule, torch.ones(shape)), torch.ones(shape))


@every
def test_weight_decay_and_rate_as_everywhere(rule: str) -> None:
    G, W = _skewed(20, 8), torch.randn(20, 8)
    parameter = nn.Parameter(W.clone())
    parameter.grad = G.clone()
    SinkGD([{"params": [("w", parameter)], "rule": rule, "view": "matrix"}], lr=0.5, weight_decay=0.1).step()
    lr = 0.5 * LR_SCALES[rule]
    assert_close(parameter.detach(), (1 - lr * 0.1) * W - lr * _reference(rule, G, W).float(), rtol=1e-4, atol=1e-5)
    assert torch.equal(parameter.grad, G)


@every
def test_bfloat16_is_rounded_without_bias(rule: str) -> None:
    G = _skewed(64, 16)
    steps = 200
    parameter = nn.Parameter(torch.ones(64, 16, dtype=torch.bfloat16))
    optimizer = SinkGD([{"params": [("w", parameter)], "rule": rule, "view": "matrix", "lr_scale": 1.0}], lr=1e-4)
    for _ in range(steps):
        parameter.grad = G.bfloat16()
        optimizer.step()
    moved = (1 - parameter.detach().double()).flatten()
    expected = steps * 1e-4 * _reference(rule, G.bfloat16()).flatten()
    slope = (moved @ expected) / (expected @ expected)
    assert abs(slope - 1) < 0.1  # to nearest, nothing would move


@every
@pytest.mark.parametrize("view", ["batch", "transposed", "qkv", "convolution"])
def test_views(rule: str, view: str) -> None:
    G = torch.randn(6, 4, 5) if view in ("batch", "convolution") else torch.randn(6, 4)
    parts = {
        "batch": lambda f: torch.stack([f(g) for g in G]),
        "transposed": lambda f: f(G.mT.contiguous()).mT,
        "qkv": lambda f: torch.cat([f(g) for g in G.chunk(3)]),
        "convolution": lambda f: f(G.flatten(1)).view_as(G),
    }[view]
    assert_close(_step(rule, G, view=view), parts(lambda g: _step(rule, g)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)])
def test_sign_takes_any_shape(shape: tuple[int, ...]) -> None:
    G = torch.randn(shape)
    assert torch.equal(_step("sign", G), G.sign())


@matrix_rules
def test_extra_memory_is_a_block(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "_BLOCK_CPU", 2**10)
    parameter = nn.Parameter(torch.randn(4096, 16))
    parameter.grad = torch.randn(4096, 16)
    optimizer = SinkGD([{"params": [("w", parameter)], "rule": rule, "view": "matrix"}])
    with torch.profiler.profile(profile_memory=True) as profile:
        optimizer.step()
    largest = max(event.self_cpu_memory_usage for event in profile.key_averages(group_by_input_shape=True))
    allocated = max(e.self_cpu_memory_usage / max(1, e.count) for e in profile.key_averages())
    assert largest >= 0
    assert allocated <= parameter.numel() * 4 / 8


@pytest.mark.parametrize("optimizer", [SinkGD, SWAN, lambda groups: MultiNormGD(groups, norms=[RowNorm()])])
@pytest.mark.parametrize("model", [TinyText, Logits])
def test_policy_stateless_keeps_no_state_and_trains(optimizer: Any, model: Any) -> None:
    torch.manual_seed(0)
    model = model()
    groups = parameter_groups(model, policy="stateless")
    assert {group["rule"] for group in groups} == {"multinorm", "row_power", "balanced_column", "sign"}
    chosen = optimizer(groups)
    losses = []
    for _ in range(30):
        losses.append(backward(model, 0).item())
        chosen.step()
    assert losses[-1] < 0.7 * losses[0]
    assert not chosen.state
    assert chosen.state_dict()["state"] == {}


def test_runs_repeat_bit_by_bit_and_through_a_state_dict() -> None:
    def train(resumed: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = TinyText()
        optimizer = SinkGD(parameter_groups(model, policy="stateless"))
        for step in range(6):
            if resumed and step == 3:
                saved = optimizer.state_dict()
                optimizer = SinkGD(parameter_groups(model, policy="stateless"))
                optimizer.load_state_dict(saved)
            backward(model, step)
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    for one, other in zip(train(False), train(True), strict=True):
        assert torch.equal(one, other)


def test_scales_are_defaults_that_a_group_may_change() -> None:
    groups = parameter_groups(TinyText(), policy="stateless")
    next(group for group in groups if group["name"] == "head")["lr_scale"] = 0.5
    scales = {group["name"]: group["lr_scale"] for group in SinkGD(groups).param_groups}
    assert scales["head"] == 0.5
    assert scales["embedding"] == LR_SCALES["row_power"]
    assert scales["norm"] == scales["bias"] == LR_SCALES["sign"]
    assert scales["matrix"] == 0.05


def test_policy_can_change_one_kind_alone() -> None:
    groups = parameter_groups(TinyText(), policy={"head": "column"})
    assert {group["name"]: group["rule"] for group in groups} == {
        "embedding": "adam", "matrix": "multinorm", "bias": "adam", "norm": "adam", "head": "column",
    }  # fmt: skip


def test_routing_table_shows_the_rules() -> None:
    table = routing_table(parameter_groups(TinyText(), policy="stateless"))
    cells = {line.split()[0]: line.split()[1:] for line in table.splitlines()}
    assert cells["embedding.weight"] == ["13×12", "embedding", "row_power", "matrix"]
    assert cells["lm_head.weight"] == ["13×8", "head", "balanced_column", "matrix"]
    assert cells["norm.weight"] == ["8", "norm", "sign"]
    assert "adam:" not in cells


def test_a_vector_fits_no_rule_for_matrices() -> None:
    with pytest.raises(ValueError, match=r"norm\.weight cannot be updated by 'row_power'.*'sign'"):
        parameter_groups(TinyText(), overrides={r"norm\.weight": "row_power"})
    with pytest.raises(ValueError, match=r"shape \(3,\) is no 'matrix'"):
        SinkGD([{"params": [("w", nn.Parameter(torch.zeros(3)))], "rule": "column", "view": "matrix"}])


def test_every_rule_has_a_scale() -> None:
    assert set(stateless.LR_SCALES) == {*MATRIX_RULES, "sign"}
