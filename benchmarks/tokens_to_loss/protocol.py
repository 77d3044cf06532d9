"""A protocol: what is trained, for how long, and how finely each optimizer is tuned; read from YAML and checked."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from lightning_multinorm.configurations import find_config
from lightning_multinorm.errors import UsageError

PROTOCOLS = Path(__file__).parents[1] / "protocols"
_LR = ("model.optimizer.init_args.lr",)


@dataclass(frozen=True)
class Optimizer:
    """A row of the comparison.

    Attributes:
        name: of the row.
        configs: overlays that lie over the protocol's configurations.
        lr: options that all get the learning rate. Default: ``model.optimizer.init_args.lr``.
        grid: learning rates to begin with, ascending.
        set: options of this row alone.
        budgets: whether it is trained for the protocol's shorter budgets, too. Default: False.
        needs: packages to import without which the row is left out. Default: none.
    """

    name: str
    grid: tuple[float, ...]
    configs: tuple[str, ...] = ()
    lr: tuple[str, ...] = _LR
    set: Mapping[str, Any] | None = None
    budgets: bool = False
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Protocol:
    """A study.

    Attributes:
        name: of the file, without its ending.
        configs: for ``--config`` of every run.
        steps: of the full budget, optimizer steps.
        optimizers: by name, the most wanted first.
        targets: names of optimizers whose final losses are to be reached.
        set: options of every run.
        seeds: the first one tunes, all are compared. Default: 1, 2, 3.
        budgets: fractions of the full budget, each trained with a schedule of its own. Default: none.
        grid_ratio: of neighbouring learning rates, in every grid. Default: 2.
        max_extensions: steps by which a grid whose best rate is at its edge may grow. Default: 3.
    """

    name: str
    configs: tuple[str, ...]
    steps: int
    optimizers: Mapping[str, Optimizer]
    targets: tuple[str, ...]
    set: Mapping[str, Any] | None = None
    seeds: tuple[int, ...] = (1, 2, 3)
    budgets: tuple[float, ...] = ()
    grid_ratio: float = 2.0
    max_extensions: int = 3

    def steps_of(self, fraction: float) -> int:
        """Optimizer steps of a fraction of the full budget."""
        return round(self.steps * fraction)

    def option(self, name: str, default: Any) -> Any:
        """A dotted option as all runs have it: set by the protocol, or else by the last configuration that does."""
        if name in (self.set or {}):
            return (self.set or {})[name]
        for config in reversed(self.configs):
            value = yaml.safe_load(Path(find_config(config)).read_text(encoding="utf-8"))
            for key in name.split("."):
                value = value.get(key) if isinstance(value, Mapping) else None
            if value is not None:
                return value
        return default

    @property
    def tokens_per_step(self) -> int:
        """Of one device."""
        rows = self.option("data.batch_size", 32) * self.option("trainer.accumulate_grad_batches", 1)
        return rows * self.option("data.sequence_length", 256)


def load(name: str) -> Protocol:
    """Read and check a protocol.

    Args:
        name: a path, or the bare name of one in ``benchmarks/protocols``.

    Raises:
        UsageError: naming the key, its value and the way out.
    """
    path = Path(name) if Path(name).is_file() else PROTOCOLS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in PROTOCOLS.glob("*.yaml")))
        raise UsageError(f"protocol {name}: no such file, and none of {known}; give a path or one of these names")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UsageError(f"protocol {path} is no YAML: {' '.join(str(error).split())}") from None
    values = _known(content, Protocol, f"{path}", leave_out="name")
    rows = values["optimizers"]
    _require(isinstance(rows, dict) and len(rows) > 0, "optimizers", rows, "a mapping of names to rows")
    values["optimizers"] = {str(row): _optimizer(str(row), content) for row, content in rows.items()}
    protocol = Protocol(path.stem, **_tuples(values, ("configs", "seeds", "budgets", "targets")))
    _check(protocol)
    return protocol


def _optimizer(name: str, content: Any) -> Optimizer:
    key = f"optimizers.{name}"
    values = _tuples(_known(content, Optimizer, key, leave_out="name"), ("configs", "lr", "grid", "needs"), f"{key}.")
    _require(all(map(_positive, values["grid"])) and values["grid"], f"{key}.grid", values["grid"], "numbers above 0")
    _require(_names(values.get("needs", ())), f"{key}.needs", values.get("needs"), "names of packages")
    _require(_names(values.get("lr", _LR)) and values.get("lr", _LR), f"{key}.lr", values.get("lr"), "dotted options")
    _require(isinstance(values.get("budgets", False), bool), f"{key}.budgets", values.get("budgets"), "true or false")
    _options(f"{key}.set", values.get("set"))
    return Optimizer(name, **values)


def _check(protocol: Protocol) -> None:
    """What the keys say together."""
    _require(_names(protocol.configs) and protocol.configs, "configs", protocol.configs, "names of configurations")
    _require(_whole(protocol.steps), "steps", protocol.steps, "a whole number above 0")
    _require(protocol.seeds and all(map(_whole, protocol.seeds)), "seeds", protocol.seeds, "whole numbers above 0")
    _require(_positive(protocol.grid_ratio) and protocol.grid_ratio > 1, "grid_ratio", protocol.grid_ratio, "above 1")
    _require(type(protocol.max_extensions) is int, "max_extensions", protocol.max_extensions, "a whole number")
    fractions = [fraction for fraction in protocol.budgets if _positive(fraction) and fraction < 1]
    _require(len(fractions) == len(protocol.budgets), "budgets", protocol.budgets, "fractions between 0 and 1")
    rows = ", ".join(protocol.optimizers)
    for target in protocol.targets:
        _require(target in protocol.optimizers, "targets", target, f"one of the optimizers ({rows})")
    _options("set", protocol.set)
    for optimizer in protocol.optimizers.values():
        _check_grid(optimizer, protocol.grid_ratio)
    for config in (*protocol.configs, *(name for row in protocol.optimizers.values() for name in row.configs)):
        find_config(config)
    _check_validations(protocol)


def _check_grid(optimizer: Optimizer, ratio: float) -> None:
    """All grids are equally fine: no optimizer is tuned more carefully than another."""
    for low, high in pairwise(optimizer.grid):
        if not math.isclose(high / low, ratio, rel_tol=0.01):
            raise UsageError(
                f"optimizers.{optimizer.name}.grid={list(optimizer.grid)}: {high:g} is {high / low:.3g} times {low:g}; "
                f"neighbours must differ by grid_ratio={ratio:g}, as in every grid, so that all are tuned alike"
            )


def _check_validations(protocol: Protocol) -> None:
    """A run is judged by a validation at its very end."""
    batches = protocol.option("trainer.val_check_interval", 1.0)
    _require(_whole(batches), "set.trainer.val_check_interval", batches, "a whole number of batches")
    every = batches / protocol.option("trainer.accumulate_grad_batches", 1)
    logged = protocol.option("trainer.log_every_n_steps", 50)
    if every % logged:  # tokens and seconds of a validation are those of the log
        raise UsageError(f"set.trainer.log_every_n_steps={logged} must divide the {every:g} steps between validations")
    for fraction in (*protocol.budgets, 1.0):
        if protocol.steps_of(fraction) % every:
            raise UsageError(
                f"the budget {fraction:g} is {protocol.steps_of(fraction)} steps, but validations are every {every:g}; "
                "choose steps, budgets and trainer.val_check_interval so that each budget ends with a validation"
            )


def _known(content: Any, kind: type, key: str, leave_out: str) -> dict[str, Any]:
    """A mapping with a class's fields for keys, and all that have no default."""
    _require(isinstance(content, dict), key, content, "a mapping")
    names = [field.name for field in fields(kind) if field.name != leave_out]
    for name in content:
        if name not in names:
            raise UsageError(f"{key}: the key {name} is not known; there are {', '.join(names)}")
    for field in fields(kind)[1:]:
        if field.name not in content and field.name not in kind.__dict__:  # the class holds the defaults
            raise UsageError(f"{key}: the key {field.name} is missing; give it")
    return dict(content)


def _tuples(values: dict[str, Any], names: Sequence[str], prefix: str = "") -> dict[str, Any]:
    for name in set(names) & set(values):
        _require(isinstance(values[name], list), f"{prefix}{name}", values[name], "a list, in brackets")
        values[name] = tuple(values[name])
    return values


def _options(key: str, values: Any) -> None:
    _require(values is None or isinstance(values, dict), key, values, "a mapping of dotted options to values")
    _require(_names(values or ()), key, values, "a mapping of dotted options to values")


def _names(values: Any) -> bool:
    return all(isinstance(value, str) for value in values)


def _whole(value: Any) -> bool:
    return type(value) is int and value > 0


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _require(holds: Any, key: str, value: Any, what: str) -> None:
    if not holds:
        raise UsageError(f"{key}={value!r} must be {what} (in YAML a number is 0.001 or 1.0e-3, not 1e-3)")
