"""From kinds to rules: policy, overrides, groups handed to an optimizer, and the routing as text."""

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from lightning_multinorm import SWAN, MultiNormGD, SinkGD, parameter_groups
from lightning_multinorm.norms import ColumnNorm, RowNorm, SpectralNorm
from lightning_multinorm.optim import routing_table
from lightning_multinorm.optim.rates import apply_lr_factors, transfer_rates

from .architectures import ARCHITECTURES, gpt2, llama
from .models import TEXT_MATRICES, TinyText


def _rules(groups: list[dict[str, Any]]) -> dict[str, str]:
    return {name: group["rule"] for group in groups for name, _ in group["params"]}


def _matrices(groups: list[dict[str, Any]]) -> set[str]:
    return {name for name, rule in _rules(groups).items() if rule == "multinorm"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_parameter_is_in_exactly_one_group_and_trains(name: str) -> None:
    model = ARCHITECTURES[name][0]()
    groups = parameter_groups(model)
    names = [name for group in groups for name, _ in group["params"]]
    assert sorted(names) == sorted(dict(model.named_parameters()))
    assert all(model.get_parameter(name) is parameter for group in groups for name, parameter in group["params"])
    assert len({group["name"] for group in groups}) == len(groups)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    SinkGD(groups).step()
    assert all((parameter != before[name]).any() for name, parameter in model.named_parameters())


def test_paper_policy_normalises_hidden_matrices_alone() -> None:
    assert _matrices(parameter_groups(TinyText())) == set(TEXT_MATRICES)


@pytest.mark.parametrize("kind", ["matrix", "embedding", "head"])
def test_policy_changes_the_rule_of_one_kind(kind: str) -> None:
    of_kind = {"matrix": set(TEXT_MATRICES), "embedding": {"embedding.weight"}, "head": {"lm_head.weight"}}[kind]
    groups = parameter_groups(TinyText(), policy={kind: "adam" if kind == "matrix" else "multinorm"})  # type: ignore[dict-item]
    assert _matrices(groups) == set(TEXT_MATRICES) ^ of_kind


@pytest.mark.parametrize(
    ("overrides", "changed"),
    [
        ({r"layers\.1": "adam"}, {"layers.1.weight"}),
        ({"lm_head.weight": "multinorm"}, {"lm_head.weight"}),
        ({r"layers\.2": "multinorm", "layers.*weight": "adam"}, {"layers.0.weight", "layers.1.weight"}),
        ({"layers.*weight": "adam", r"layers\.2": "multinorm"}, set(TEXT_MATRICES)),
    ],
)
def test_first_override_that_matches_wins(overrides: dict[str, Any], changed: set[str]) -> None:
    rules, plain = (_rules(parameter_groups(TinyText(), overrides=o)) for o in (overrides, None))
    assert {name for name in rules if rules[name] != plain[name]} == changed


def test_an_override_keeps_the_view() -> None:
    groups = parameter_groups(gpt2(), policy={"matrix": "adam"}, overrides={"c_attn.weight": "multinorm"})
    assert [group["view"] for group in groups if group["rule"] == "multinorm"] == ["transposed"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "papers"}, "policy='papers'"),
        ({"policy": {"matrices": "adam"}}, "'matrices'"),
        ({"policy": {"matrix": "muon"}}, "'muon'"),
        ({"overrides": {"lm_head": "muon"}}, r"overrides\['lm_head'\]='muon'"),
        ({"overrides": {"lmhead": "adam"}}, r"overrides\['lmhead'\] matches no parameter"),
        ({"overrides": {r"layers\.0\.bias": "multinorm"}}, r"layers\.0\.bias cannot be multi-normalised"),
        ({"policy": {"norm": "multinorm"}}, r"norm\.weight cannot be multi-normalised"),
    ],
)
def test_unknown_kinds_rules_and_patterns_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parameter_groups(TinyText(), **options)


def test_frozen_parameters_are_skipped_but_still_told_apart() -> None:
    model = TinyText()
    for name in ("layers.0.weight", "embedding.weight"):
        model.get_parameter(name).requires_grad_(False)
    assert set(_rules(parameter_groups(model))) == set(dict(model.named_parameters())) - {
        "layers.0.weight",
        "embedding.weight",
    }


def test_tied_head_is_one_parameter_and_no_matrix() -> None:
    groups = parameter_groups(llama(tied=True))
    rules = _rules(groups)
    assert rules["model.embed_tokens.weight"] == "adam"
    assert "lm_head.weight" not in rules


@pytest.mark.parametrize("optimizer", [SinkGD, SWAN])
def test_bare_parameters_warn_once_and_are_told_apart_by_shape(optimizer: Any) -> None:
    model = TinyText()
    with pytest.warns(UserWarning, match="without names.*named_parameters") as caught:
        chosen = optimizer(model.parameters())
        chosen.add_param_group({"params": [nn.Parameter(torch.zeros(3, 3))]})
    assert [warning.filename for warning in caught] == [__file__]  # blames the caller's line
    matrices = {id(p) for group in chosen.param_groups if group["rule"] == "multinorm" for p in group["params"]}
    assert {id(p) for p in model.parameters() if p.ndim == 2} < matrices
    assert len(matrices) == 6


def test_named_parameters_and_ruled_groups_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SinkGD(TinyText().named_parameters())
        SinkGD(parameter_groups(TinyText()))
        SinkGD([{"params": [nn.Parameter(torch.zeros(3, 3))], "rule": "multinorm"}])


def test_groups_without_a_rule_are_split_and_keep_their_options() -> None:
    named = list(TinyText().named_parameters())
    optimizer = SinkGD([{"params": named[:3], "lr": 0.5}, {"params": named[3:], "weight_decay": 0.1, "lr_scale": 0.7}])
    for group in optimizer.param_groups:
        early = set(group["param_names"]) <= {name for name, _ in named[:3]}
        assert group["lr"] == (0.5 if early else 0.02)
        assert group["weight_decay"] == (0.0 if early else 0.1)
        scale = 0.05 if group["rule"] == "multinorm" else 1.0
        assert group["lr_scale"] == (scale if early else 0.7)
    rules = {name: group["rule"] for group in optimizer.param_groups for name in group["param_names"]}
    assert rules == _rules(parameter_groups(TinyText()))


def test_a_rule_without_a_view_is_kept() -> None:
    optimizer = SinkGD([{"params": [("lm_head.weight", nn.Parameter(torch.zeros(3, 4)))], "rule": "multinorm"}])
    assert optimizer.param_groups[0]["rule"] == "multinorm"
    assert optimizer.param_groups[0]["lr_scale"] == 0.05


def test_routing_table_has_a_line_for_every_parameter_and_totals() -> None:
    model = gpt2()
    groups = parameter_groups(model)
    expected = dict(model.named_parameters())
    matrices = sum(p.numel() for name, p in expected.items() if name.startswith("transformer.h") and p.ndim == 2)
    total = sum(p.numel() for p in expected.values())
    for source in (groups, SinkGD(groups).param_groups):
        lines = routing_table(source).splitlines()
        assert lines[0].split() == ["parameter", "shape", "group", "rule", "as"]
        cells = {line.split()[0]: line.split()[1:] for line in lines[1 : 1 + len(expected)]}
        assert cells.keys() == expected.keys()
        assert cells["transformer.h.0.attn.c_attn.weight"] == ["8×24", "matrix-transposed", "multinorm", "transposed"]
        assert cells["transformer.wte.weight"] == ["11×8", "embedding", "adam"]
        assert set(lines[-2:]) == {f"multinorm: {matrices:,} parameters", f"adam: {total - matrices:,} parameters"}


def test_routing_table_of_nameless_parameters() -> None:
    with pytest.warns(UserWarning, match="without names"):
        optimizer = SinkGD([nn.Parameter(torch.zeros(3, 4))])
    assert routing_table(optimizer.param_groups).splitlines()[1].split() == [
        "#0",
        "3×4",
        "matrix",
        "multinorm",
        "matrix",
    ]


def test_routing_table_of_a_group_that_nobody_named() -> None:
    weight = nn.Parameter(torch.zeros(3, 4))
    optimizer = SinkGD([{"params": [("w", weight)], "rule": "multinorm", "view": "matrix"}])
    assert routing_table(optimizer.param_groups).splitlines()[1].split()[:2] == ["w", "3×4"]


def test_lr_scales_are_multiplied_into_each_rate_exactly() -> None:
    model = TinyText()
    scales = {r"layers\.1": 4.0, "matrix": 0.5, "head": 0.25, "norm": 0.0}
    optimizer = SinkGD(parameter_groups(model, lr_scales=scales), matrix_lr_scale=0.1, fallback_lr_scale=0.5)
    rates = {name: g["lr_scale"] for g in optimizer.param_groups for name in g["param_names"]}
    expected = dict.fromkeys(TEXT_MATRICES, 0.1 * 0.5)
    expected |= {"layers.1.weight": 0.1 * 4.0, "layers.1.bias": 0.5 * 4.0, "lm_head.weight": 0.5 * 0.25}
    assert {name: rates[name] for name in expected} == expected
    assert rates["norm.weight"] == 0 and rates["embedding.weight"] == 0.5 and rates["layers.0.bias"] == 0.5


def test_lr_scales_of_any_other_optimizer_are_in_its_rate_and_follow_its_scheduler() -> None:
    optimizer = torch.optim.AdamW(parameter_groups(TinyText(), lr_scales={"embedding": 0.25}), lr=0.5)
    apply_lr_factors(optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    optimizer.step()
    schedule.step()
    for group in optimizer.param_groups:
        assert group["lr"] == (0.0625 if "embedding.weight" in group["param_names"] else 0.25)
    apply_lr_factors(optimizer)  # once is enough
    assert {group["lr"] for group in optimizer.param_groups} == {0.0625, 0.25}


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ({"heads": 2.0}, r"lr_scales\['heads'\] matches no parameter"),
        ({"bias": 2.0, "lmhead": 1.0}, r"lr_scales\['lmhead'\]"),
        ({"(": 2.0}, r"lr_scales\['\('\] is no regular expression"),
        ({"head": -1.0}, r"lr_scales\['head'\]=-1.0"),
        ({"head": float("nan")}, r"lr_scales\['head'\]=nan"),
    ],
)
def test_lr_scales_that_match_nothing_are_refused(scales: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parameter_groups(TinyText(), lr_scales=scales)


@pytest.mark.parametrize(
    ("make", "matrices"),
    [
        (SinkGD, 1.0),
        (partial(SinkGD, rescale="operator"), 0.0),
        (SWAN, 0.5),
        (partial(MultiNormGD, norms=[RowNorm(), SpectralNorm()]), 0.5),
        (partial(MultiNormGD, norms=[RowNorm(), ColumnNorm()]), 1.0),
        (torch.optim.AdamW, 1.0),
    ],
)
def test_rates_of_a_wider_model(make: Any, matrices: float) -> None:
    one, two = make(parameter_groups(TinyText())), make(parameter_groups(TinyText()))
    transfer_rates(two, 4.0)
    for group, other in zip(one.param_groups, two.param_groups, strict=True):
        exponent = {"matrix": matrices, "head": 1.0}.get(group["name"], 0.0)
        assert other["lr"] * other.get("lr_scale", 1) == group["lr"] * group.get("lr_scale", 1) * 4.0**-exponent


def test_rates_of_a_wider_model_are_not_guessed() -> None:
    with pytest.raises(ValueError, match="base_width: how the rate of SGD depends on the width is not known"):
        transfer_rates(torch.optim.SGD(parameter_groups(TinyText()), lr=0.1), 2.0)
    with pytest.raises(ValueError, match="base_width: the groups do not name their kind"):
        transfer_rates(torch.optim.AdamW(TinyText().parameters()), 2.0)
