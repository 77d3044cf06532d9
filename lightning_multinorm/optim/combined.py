"""Any optimizer on the hidden matrices beside any other on the rest, as one: baselines, each from its own library."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, final, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from lightning_multinorm.layouts import is_dtensor
from lightning_multinorm.optim.groups import Group, resolve
from lightning_multinorm.optim.plain_state import plain, restored

MakeOptimizer = Callable[[Iterable[Any]], Optimizer]
"""Called with parameter groups; a class with its other arguments bound."""


@final
class Combined(Optimizer):
    """One optimizer on the matrices of attention and MLP, another on everything else: Muon beside AdamW, for example.

    The two work side by side and unchanged. Their groups are this optimizer's ``param_groups``, the same dictionaries,
    so that each has a learning rate of its own and a scheduler drives both; their states are its ``state``. Objects
    that a library keeps there, such as GaLore's projectors, are saved by their attributes, so that checkpoints hold
    no code and are read with ``weights_only=True``.

    Weights are rounded as the two optimizers do it, bfloat16 ones usually to nearest. Matrices are handed over as they
    lie: a packed query, key and value is one matrix, and a convolution is refused where two dimensions are wanted.

    Args:
        params: ``parameter_groups(model)``, or ``model.named_parameters()`` (names tell matrices from the rest).
        matrices: makes the optimizer of the groups with the rule "multinorm".
        rest: makes the optimizer of the groups with the rule "adam".
        matrix_group: keys for the groups of matrices, where a library looks for them there: GaLore's rank, say.

    Attributes:
        experts: the optimizers, of the matrices first; only one where there is nothing for the other.

    Raises:
        ValueError: for parameters without names or rules, a rule that neither optimizer is for, matrices of which a
            rank holds a part that the optimizer would take for a whole, and whatever the two refuse.
    """

    experts: tuple[Optimizer, ...] = ()

    def __init__(
        self,
        params: ParamsT,
        matrices: MakeOptimizer,
        rest: MakeOptimizer,
        matrix_group: Mapping[str, Any] | None = None,
    ) -> None:
        groups = _routed(params)
        super().__init__([_parameter(entry) for group in groups for entry in group["params"]], {})
        experts: list[Optimizer] = []
        self._owners = [0] * len(groups)
        for make, rule, extra in ((matrices, "multinorm", matrix_group or {}), (rest, "adam", {})):
            own = [k for k, group in enumerate(groups) if group["rule"] == rule]
            if own:
                for k in own:
                    self._owners[k] = len(experts)
                experts.append(make([{**groups[k], **extra} for k in own]))
                if rule == "multinorm":
                    _check_whole(experts[-1])
        self.experts = tuple(experts)
        self._share()

    def add_param_group(self, param_group: Group) -> None:
        """Only when it is built.

        Raises:
            NotImplementedError: later.
        """
        if self.experts:
            raise NotImplementedError("Combined takes no further groups; give it all parameters when it is built")
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of each. The closure, if any, is run once before them, with gradients enabled."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for expert in self.experts:
            expert.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As any optimizer's, of tensors, numbers and text alone."""
        saved = super().state_dict()
        return {**saved, "state": {number: plain(entries) for number, entries in saved["state"].items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, each part as its optimizer loads it.

        Raises:
            ValueError: for the state of other groups or parameters, or of another library.
        """
        saved = state_dict["param_groups"]
        if [len(group["params"]) for group in saved] != [len(group["params"]) for group in self.param_groups]:
            raise ValueError("the checkpoint's optimizer has other parameter groups; resume with the policy it had")
        for k, expert in enumerate(self.experts):
            own = [group for group, owner in zip(saved, self._owners, strict=True) if owner == k]
            numbers = [number for group in own for number in group["params"]]
            parameters = [parameter for group in expert.param_groups for parameter in group["params"]]
            library = type(expert).__module__.partition(".")[0]
            state = {
                number: restored(state_dict["state"][number], library, parameter.device)
                for number, parameter in zip(numbers, parameters, strict=True)
                if number in state_dict["state"]
            }
            expert.load_state_dict({**state_dict, "state": state, "param_groups": own})
        self._share()

    def _share(self) -> None:
        """Take the groups and states of the experts for one's own; there is one dictionary of states for all."""
        groups = [iter(expert.param_groups) for expert in self.experts]
        self.param_groups = [next(groups[owner]) for owner in self._owners]
        found = {p: entries for expert in self.experts for p, entries in expert.state.items()}
        self.state.clear()
        self.state.update(found)
        for expert in self.experts:
            expert.state = self.state

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "experts": self.experts, "_owners": self._owners}


def _routed(params: ParamsT) -> list[Group]:
    entries: list[Any] = list(params)
    groups = entries if entries and isinstance(entries[0], dict) else [{"params": entries}]
    routed: list[Group] = []
    for group in groups:
        parts, nameless = resolve(group, "Combined")
        if nameless:
            raise ValueError(
                "Combined cannot tell matrices from embeddings without names; give it model.named_parameters(), or "
                "parameter_groups(model)"
            )
        routed += parts
    for group in routed:
        if group["rule"] not in ("multinorm", "adam"):
            raise ValueError(
                f"Combined has no rule={group['rule']!r}, which group {group.get('name')} asks for; use the policy "
                "'paper', or SinkGD, SWAN or MultiNormGD"
            )
        if "slices" in group:
            raise ValueError(
                "Combined cannot work under FSDP1, which cuts matrices into slices that its optimizers would take for "
                "vectors; use ddp or fsdp2"
            )
    return routed


def _parameter(entry: Any) -> Tensor:
    return entry[1] if isinstance(entry, tuple) else entry


def _check_whole(optimizer: Optimizer) -> None:
    """Only torch's own are known to work on shards of a matrix as on the whole."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if any(map(is_dtensor, parameters)) and not type(optimizer).__module__.startswith("torch.optim"):
        raise ValueError(
            f"{type(optimizer).__name__} of {type(optimizer).__module__.partition('.')[0]} is not known to work on "
            "sharded matrices; use ddp or a single device"
        )
