"""What the optimizers of the MultiNorm family share: groups, closure, batching of equal shapes, Adam, observers.

Abstract; the final classes `SinkGD`, `SWAN` and `MultiNormGD` add how a batch of matrices is updated.
"""

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from lightning_multinorm.alternating import Trace
from lightning_multinorm.optim.fallback import adam_
from lightning_multinorm.optim.groups import Group, resolve
from lightning_multinorm.optim.views import as_matrices, check_view
from lightning_multinorm.sinkhorn.eager import block_size

Observer = Callable[[Tensor, Trace], None]
"""Called with a parameter and the trace of its update; the residuals (iterations, norms) stay on the device."""


class MultiNormOptimizer(Optimizer):
    """Base of the family: one optimizer that multi-normalises matrices, without state, and runs Adam on the rest.

    Group keys beside ``params``: "rule" ("multinorm" or "adam"), "view" (how a parameter lies as a matrix), "name",
    "lr", "lr_scale" and "weight_decay". The effective learning rate is ``lr · lr_scale``, so every scheduler of torch
    works unchanged.
    """

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        matrix_lr_scale: float,
        fallback_lr_scale: float,
    ) -> None:
        _check_hyperparameters(
            type(self).__name__,
            {**defaults, "matrix_lr_scale": matrix_lr_scale, "fallback_lr_scale": fallback_lr_scale},
        )
        self.observers: list[Observer] = []
        self._lr_scales = {"multinorm": matrix_lr_scale, "adam": fallback_lr_scale}
        self._nameless = False
        super().__init__(params, defaults)
        if self._nameless:
            warnings.warn(
                f"{type(self).__name__} got parameters without names, so it multi-normalises everything of two or more "
                "dimensions, embeddings and output head included. Give it model.named_parameters(), told apart by "
                "name, or parameter_groups(model), told apart by module.",
                stacklevel=3,  # where the subclass was called
            )

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, split by rule and view if it names no rule.

        Raises:
            TypeError: for a complex or an integer parameter.
            ValueError: for an unknown rule, or a parameter that the rule cannot update.
        """
        owner = type(self).__name__
        parts, nameless = resolve(param_group, owner)
        self._nameless = self._nameless or nameless
        for part in parts:
            part.setdefault("lr_scale", self._lr_scales[part["rule"]])
            for name in ("lr", "lr_scale", "weight_decay"):
                if not part.get(name, 0) >= 0:
                    raise ValueError(f"{owner}: {name}={part[name]} of group {part.get('name')} must not be negative")
            for entry in part["params"]:
                name, parameter = entry if isinstance(entry, tuple) else ("a parameter", entry)
                _check_parameter(owner, name, parameter)
                if part["rule"] == "multinorm":
                    check_view(parameter, part["view"])
            super().add_param_group(part)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step. The closure, if any, is run first, with gradients enabled; its loss is returned.

        Raises:
            RuntimeError: for a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            names = group.get("param_names", ["a parameter"] * len(group["params"]))
            parameters = []
            for name, parameter in zip(names, group["params"], strict=True):
                if parameter.grad is not None:
                    _check_gradient(type(self).__name__, name, parameter.grad)
                    parameters.append(parameter)
            lr = group["lr"] * group["lr_scale"]
            if group["rule"] == "adam":
                adam_(parameters, self.state, group, lr)
            else:
                self._multinorm_step(parameters, group, lr)
        return loss

    def _multinorm_step(self, parameters: Sequence[Tensor], group: Group, lr: float | Tensor) -> None:
        for batch in _equal_shapes(parameters):
            weights = [as_matrices(parameter, group["view"]) for parameter in batch]
            gradients = [as_matrices(p.grad, group["view"], like=p) for p in batch if p.grad is not None]
            trace = self._update_(weights, gradients, group, lr, observe=bool(self.observers))
            if trace is None:
                continue
            for parameter, residuals in zip(batch, trace.residuals, strict=True):
                if residuals.ndim > 2:  # several matrices in one parameter: their root mean square
                    residuals = residuals.flatten(0, -3).square().mean(0).sqrt()
                for observer in self.observers:
                    observer(parameter, Trace(trace.norms, residuals))

    @abstractmethod
    def _update_(
        self, weights: Sequence[Tensor], gradients: Sequence[Tensor], group: Group, lr: float | Tensor, observe: bool
    ) -> Trace | None:
        """Update matrices (..., m, n) of one shape, dtype and device in place.

        Returns:
            If ``observe``, a trace whose residuals are (len(weights), ..., iterations, norms).
        """

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_lr_scales": self._lr_scales}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.setdefault("observers", [])
        self.__dict__.setdefault("_nameless", False)
        super().__setstate__(state)


def apply_normalized_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    normalize: Callable[[Tensor], tuple[Tensor, Trace | None]],
    *,
    lr: float | Tensor,
    weight_decay: float,
) -> Trace | None:
    """``W <- (1 - lr · weight_decay) W - lr · normalize(G)`` for matrices of one shape, stacked up to a block.

    ``normalize`` maps (k, ..., m, n) to as much, in float32 or wider.
    """
    traces = []
    per_stack = max(1, block_size(gradients[0]) // max(1, gradients[0].numel()))
    for i in range(0, len(weights), per_stack):
        part = gradients[i : i + per_stack]
        G = torch.stack(list(part)) if len(part) > 1 else part[0].unsqueeze(0)
        X, trace = normalize(G.to(torch.promote_types(G.dtype, torch.float32)))
        for W, X_k in zip(weights[i : i + per_stack], X, strict=True):
            if W.dtype != X.dtype:  # round to the weight's precision once, at the end
                W.copy_(W.to(X.dtype) * (1 - lr * weight_decay) - X_k * lr)
                continue
            if weight_decay:
                W.mul_(1 - lr * weight_decay)
            if isinstance(lr, Tensor):
                W.sub_(X_k.mul_(lr))
            else:
                W.add_(X_k, alpha=-lr)
        traces.append(trace)
    kept = [trace for trace in traces if trace is not None]
    return Trace(kept[0].norms, torch.cat([trace.residuals for trace in kept])) if kept else None


def _equal_shapes(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    batches: dict[tuple[Any, ...], list[Tensor]] = {}
    for parameter in parameters:
        assert parameter.grad is not None
        key = (parameter.shape, parameter.dtype, parameter.grad.dtype, parameter.device)
        batches.setdefault(key, []).append(parameter)
    yield from batches.values()


def _check_hyperparameters(owner: str, values: dict[str, Any]) -> None:
    for name in ("lr", "matrix_lr_scale", "fallback_lr_scale", "weight_decay", "eps"):
        if not values[name] >= 0:
            raise ValueError(f"{owner}: {name}={values[name]} must not be negative")
    if len(values["betas"]) != 2 or not all(0 <= beta < 1 for beta in values["betas"]):
        raise ValueError(f"{owner}: betas={values['betas']} must be two numbers in [0, 1)")
    if "iterations" in values and values["iterations"] < 1:
        raise ValueError(f"{owner}: iterations={values['iterations']} must be at least 1")


def _check_parameter(owner: str, name: str, parameter: Tensor) -> None:
    if not parameter.is_floating_point():
        raise TypeError(
            f"{owner}: {name} is {parameter.dtype}; only real floating-point parameters are supported. "
            "View a complex one with torch.view_as_real, or give it to another optimizer"
        )
    if _is_sharded(parameter):
        raise NotImplementedError(
            f"{owner}: {name} is a DTensor, a shard of a matrix whose rows and columns lie on several ranks; sharded "
            "parameters are not supported yet: use DDP"
        )


def _is_sharded(parameter: Tensor) -> bool:
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    from torch.distributed.tensor import DTensor  # slow to import, and needed in distributed runs alone

    return isinstance(parameter, DTensor)


def _check_gradient(owner: str, name: str, gradient: Tensor) -> None:
    if gradient.layout is not torch.strided:
        raise RuntimeError(
            f"{owner}: the gradient of {name} is sparse; use sparse=False in its embedding, "
            "or give it to another optimizer"
        )
