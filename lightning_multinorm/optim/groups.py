"""From a model, or from parameter names, to parameter groups: which rule updates which parameter.

A group is a plain dictionary, as `torch.optim` takes it, with the keys ``name``, ``rule``, ``view`` and ``params``
(named); ``lr``, ``lr_scale`` and ``weight_decay`` may be added to it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from torch import Tensor, nn

from lightning_multinorm.layouts import FlatSlice, clean, flat_slices
from lightning_multinorm.optim.routing import Kind, Route, route_by_name, route_by_shape, route_model
from lightning_multinorm.optim.stateless import MATRIX_RULES
from lightning_multinorm.views import check_view

Rule = Literal["multinorm", "adam", "row_power", "column", "balanced_column", "sign"]
"""multinorm: the optimizer's own. adam: the only one with state. The others, without state: see `stateless`."""
Policy = Literal["paper", "stateless"] | Mapping[Kind, Rule]
Group = dict[str, Any]

PAPER: Mapping[Kind, Rule] = {
    "matrix": "multinorm",
    "embedding": "adam",
    "head": "adam",
    "norm": "adam",
    "bias": "adam",
}
"""The papers' policy: multi-normalise the matrices of attention and MLP, Adam for everything else."""

STATELESS: Mapping[Kind, Rule] = {
    "matrix": "multinorm",
    "embedding": "row_power",
    "head": "balanced_column",
    "norm": "sign",
    "bias": "sign",
}
"""No parameter keeps optimizer state. The rules and their learning rates are those that did best in
``benchmarks/results/stateless_policy.json``."""

_POLICIES = {"paper": PAPER, "stateless": STATELESS}
_MATRIX_RULES = ("multinorm", *MATRIX_RULES)


def parameter_groups(
    model: nn.Module,
    *,
    policy: Policy = "paper",
    overrides: Mapping[str, Rule] | None = None,
    lr_scales: Mapping[str, float] | None = None,
    split_qkv: bool = True,
) -> list[Group]:
    """Group the trainable parameters of a model by what they are, for `SinkGD` and its family, or any optimizer.

    Args:
        model: any module; parameters are told apart by the modules that own them, see `routing.route_model`.
        policy: the rule of each kind of parameter: "paper" (default: matrices "multinorm", all else "adam"),
            "stateless" (no parameter keeps optimizer state) or a mapping that changes the rule of some kinds of the
            papers' policy, such as ``{"embedding": "row_power"}``.
        overrides: regular expressions, searched for in the parameters' names, to rules; the first that matches wins
            over the policy.
        lr_scales: kinds ("matrix", "embedding", "head", "norm", "bias") or regular expressions, searched for in the
            parameters' names, to factors on the effective learning rate; the first that matches wins, and what none
            matches keeps its rate. Groups get them as "lr_factor", which `SinkGD` and its family honour; give any
            other optimizer to `rates.apply_lr_factors`.
        split_qkv: normalise the packed q, k and v of `torch.nn.MultiheadAttention` each for itself (default), as the
            paper does with LLaMA's separate ones, instead of as one matrix.

    Returns:
        Groups ``{"name", "rule", "view", "params": [(name, parameter), ...]}``, in the order of the model. Of a model
        that FSDP1 has wrapped (give the wrapper), also "slices", which say what of each parameter this rank holds.

    Raises:
        ValueError: for an unknown kind or rule, an override or lr_scale that matches nothing, a negative lr_scale, or a
            vector that is to be normalised as a matrix.
    """
    rules = _rules(policy)
    overrides, lr_scales = overrides or {}, lr_scales or {}
    slices = flat_slices(model)
    named = {clean(name): parameter for name, parameter in model.named_parameters()}
    _check_overrides(overrides, list(named))
    routes = route_model(model, split_qkv=split_qkv, shapes={p: place.shape for p, place in slices.items()})
    _check_lr_scales(lr_scales, {name: route.kind for name, route in routes.items()})
    groups: dict[str, Group] = {}
    for name, parameter in named.items():
        if not parameter.requires_grad:
            continue
        route = routes[name]
        rule = next((rule for pattern, rule in overrides.items() if re.search(pattern, name)), rules[route.kind])
        factor = next((x for pattern, x in lr_scales.items() if _selects(pattern, name, route.kind)), 1.0)
        group = _add(groups, name, parameter, route, rule, rules[route.kind], slices.get(parameter), factor)
        if parameter in slices:
            group.setdefault("slices", {})[parameter] = slices[parameter]
    return list(groups.values())


def resolve(group: Group, owner: str) -> tuple[list[Group], bool]:
    """Split what a user handed to an optimizer into groups of one rule and one view each.

    Args:
        group: with "params" (parameters, or (name, parameter) pairs) and any of the keys of a group. A group with a
            "rule" keeps it; one without is routed by names, or else by shapes alone.
        owner: name of the optimizer, for messages.

    Returns:
        The groups, and whether matrices had to be told apart by shape alone.
    """
    params = group["params"]
    entries = [params] if isinstance(params, Tensor) else list(params)
    if group.get("rule", "adam") not in get_args(Rule):
        raise ValueError(f"{owner}: rule={group['rule']!r} is unknown; use one of {', '.join(get_args(Rule))}")
    if {"rule", "view"} <= group.keys():
        return [{**group, "params": entries}], False
    shared = {key: value for key, value in group.items() if key != "params"}
    parts: dict[str, Group] = {}
    for entry in entries:
        name, parameter = entry if isinstance(entry, tuple) else (None, entry)
        route = route_by_shape(parameter) if name is None else route_by_name(name, parameter)
        rule = group.get("rule", PAPER[route.kind])
        _add(parts, name, parameter, route, rule, rule)
    nameless = "rule" not in group and any(not isinstance(entry, tuple) for entry in entries)
    unlabelled = [{**part, **shared} for part in parts.values()] or [{**shared, "params": [], "rule": "adam"}]
    return unlabelled, nameless


def routing_table(groups: Iterable[Group]) -> str:
    """The routing as text: one line per parameter with its shape, group, rule and view, and the totals."""
    rows = [("parameter", "shape", "group", "rule", "as")]
    totals: dict[str, int] = {}
    for group in groups:
        for name, parameter in _named(group):
            shape = "×".join(map(str, parameter.shape))
            view = group["view"] if group["rule"] in _MATRIX_RULES else ""
            rows.append((name, shape, group.get("name", ""), group["rule"], view))
            totals[group["rule"]] = totals.get(group["rule"], 0) + parameter.numel()
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines + [f"{rule}: {count:,} parameters" for rule, count in totals.items()])


def _named(group: Group) -> Sequence[tuple[str, Tensor]]:
    params = list(group["params"])
    if params and isinstance(params[0], tuple):
        return params
    return list(zip(group.get("param_names", [f"#{i}" for i in range(len(params))]), params, strict=True))


def _add(
    groups: dict[str, Group],
    name: str | None,
    parameter: Tensor,
    route: Route,
    rule: Rule,
    default: Rule,
    place: FlatSlice | None = None,
    lr_factor: float = 1.0,
) -> Group:
    view = route.view if rule in _MATRIX_RULES else "matrix"
    label = route.kind if view == "matrix" else f"{route.kind}-{view}"
    if rule != default:
        label += f"-{rule}"
    if lr_factor != 1:
        label += f"-lr×{lr_factor:.12g}"
    if rule in _MATRIX_RULES:
        try:
            check_view(parameter.shape if place is None else place.shape, route.view)
        except ValueError as error:
            verb = "multi-normalised" if rule == "multinorm" else f"updated by {rule!r}"
            raise ValueError(
                f"{name or 'a parameter'} cannot be {verb}: {error}; give it 'adam', or 'sign', which needs no state"
            ) from None
    group = groups.setdefault(label, {"name": label, "rule": rule, "view": view, "params": []})
    if lr_factor != 1:
        group["lr_factor"] = lr_factor
    group["params"].append(parameter if name is None else (name, parameter))
    return group


def _rules(policy: Policy) -> dict[Kind, Rule]:
    if isinstance(policy, str):
        if policy not in _POLICIES:
            raise ValueError(
                f"policy={policy!r} is unknown; use {', '.join(map(repr, _POLICIES))} or a mapping of kinds to rules"
            )
        return dict(_POLICIES[policy])
    for kind, rule in policy.items():
        if kind not in get_args(Kind) or rule not in get_args(Rule):
            raise ValueError(
                f"policy has {kind!r}: {rule!r}; kinds are {', '.join(get_args(Kind))}, "
                f"rules are {', '.join(get_args(Rule))}"
            )
    return {**PAPER, **policy}


def _check_overrides(overrides: Mapping[str, Rule], names: list[str]) -> None:
    for pattern, rule in overrides.items():
        if rule not in get_args(Rule):
            raise ValueError(f"overrides[{pattern!r}]={rule!r} is no rule; use one of {', '.join(get_args(Rule))}")
        _check_pattern("overrides", pattern)
        if not any(re.search(pattern, name) for name in names):
            raise ValueError(f"overrides[{pattern!r}] matches no parameter; names are such as {names[:3]}")


def _check_lr_scales(lr_scales: Mapping[str, float], kinds: Mapping[str, Kind]) -> None:
    for pattern, factor in lr_scales.items():
        if not 0 <= factor < float("inf"):
            raise ValueError(f"lr_scales[{pattern!r}]={factor} must be a number from 0 up")
        _check_pattern("lr_scales", pattern)
        if not any(_selects(pattern, name, kind) for name, kind in kinds.items()):
            found = ", ".join(sorted(set(kinds.values())))
            found = ", ".join(sorted(set(kinds.values())))
            raise ValueError(
                f"lr_scales[{pattern!r}] matches no parameter; the model has the kinds {found}, and names such as "
                f"{list(kinds)[:3]}"
            )


def _selects(pattern: str, name: str, kind: Kind) -> bool:
    """The name of a kind means that kind, anything else is searched for in names."""
    return pattern == kind if pattern in get_args(Kind) else re.search(pattern, name) is not None


def _check_pattern(owner: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{owner}[{pattern!r}] is no regular expression: {error}") from None
