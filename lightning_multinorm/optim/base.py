"""What the optimizers of the MultiNorm family share: groups, closure, dispatch of parameters by rule and by layout.

Abstract; the final classes `SinkGD`, `SWAN` and `MultiNormGD` add how matrices are updated.
"""

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from lightning_multinorm.batch import Batch
from lightning_multinorm.layouts import FlatSlice, is_dtensor, local, locate
from lightning_multinorm.optim import auto_iterations, stateless
from lightning_multinorm.optim.checks import check_gradient, check_hyperparameters, check_parameter
from lightning_multinorm.optim.fallback import adam_
from lightning_multinorm.optim.groups import Group, resolve
from lightning_multinorm.optim.observation import (
    Measured,
    Observation,
    Observer,
    observe_sharded,
    observe_whole,
    sharded_weight_squares,
)
from lightning_multinorm.rounding import lowbias32
from lightning_multinorm.scaling import working_dtype
from lightning_multinorm.sinkhorn.sharded import Job
from lightning_multinorm.views import as_matrices, check_view, matrix_count

if TYPE_CHECKING:
    from lightning_multinorm.optim.release import Released


class MultiNormOptimizer(Optimizer):
    """Base of the family: one optimizer that multi-normalises matrices, without state, and runs Adam on the rest.

    Group keys beside ``params``: "rule" ("multinorm", "adam" or a rule of `stateless`), "view" (how a parameter lies
    as a matrix), "name", "lr", "lr_scale", "weight_decay" and "stochastic_rounding". The effective learning rate is
    ``lr · lr_scale``, so every scheduler of torch works unchanged. A "lr_factor" is multiplied into the lr_scale.

    Parameters may be whole (on one device, or on every rank of DDP), DTensors on any mesh (FSDP2, HSDP, tensor
    parallelism), or FSDP1's slices; with sharded ones ``step`` is a collective call.

    Attributes:
        observers: called with every multi-normalised parameter and what was observed of its update (`Observation`);
            none, nothing is measured.
        replicas: ranks with the same whole parameters and gradients, as DDP's. If set, costly updates of whole
            matrices are divided among them; SinkGD's are not worth it.
        released: what `release.release_gradients` has seen in this step; None without it.
    """

    released: "Released | None" = None
    _scheme: ClassVar[tuple[str, ...]] = ()
    """Hyper-parameters that matrices updated together must share."""
    _divisible: ClassVar[bool] = False
    """Whether computing an update costs more than sending it."""

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        matrix_lr_scale: float,
        fallback_lr_scale: float,
    ) -> None:
        check_hyperparameters(
            type(self).__name__,
            {**defaults, "matrix_lr_scale": matrix_lr_scale, "fallback_lr_scale": fallback_lr_scale},
        )
        self.observers: list[Observer] = []
        self.replicas: dist.ProcessGroup | None = None
        self._slices: dict[Tensor, FlatSlice] = {}
        self._numbers: dict[Tensor, int] = {}
        self._places: dict[Tensor, tuple[int, int]] = {}
        self._lr_scales = {"multinorm": matrix_lr_scale, "adam": fallback_lr_scale, **stateless.LR_SCALES}
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
        slices = param_group.pop("slices", {})
        parts, nameless = resolve(param_group, owner)
        self._nameless = self._nameless or nameless
        self._slices.update(slices)
        for part in parts:
            part["lr_scale"] = part.get("lr_scale", self._lr_scales[part["rule"]]) * part.pop("lr_factor", 1.0)
            for name in ("lr", "lr_scale", "weight_decay"):
                if not part.get(name, 0) >= 0:
                    raise ValueError(f"{owner}: {name}={part[name]} of group {part.get('name')} must not be negative")
            for entry in part["params"]:
                name, parameter = entry if isinstance(entry, tuple) else ("a parameter", entry)
                check_parameter(owner, name, parameter, located=parameter in slices)
                if part["rule"] == "multinorm" or part["rule"] in stateless.MATRIX_RULES:
                    check_view(slices[parameter].shape if parameter in slices else parameter.shape, part["view"])
            super().add_param_group(part)
        self._numbers, self._places = {}, {}

    @property
    def width_exponent(self) -> float:
        """By what power of the width the best rate of multi-normalised matrices falls: see `rates`."""
        return 1.0

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
        self._complete_slices()
        self._update([(group, self._with_gradient(group)) for group in self.param_groups])
        for group in self.param_groups:
            auto_iterations.end_step(group)
            if "rounding_steps" in group:
                group["rounding_steps"] += 1
        return loss

    @torch.no_grad()
    def step_parameter(self, parameter: Tensor) -> None:
        """The step of one parameter alone, inside backward: see `release.release_gradients`."""
        group = self.param_groups[self._place(parameter)[0]]
        assert parameter.grad is not None
        check_gradient(type(self).__name__, "a parameter", parameter.grad)
        self._update([(group, [parameter])])

    def _complete_slices(self) -> None:
        """FSDP1 leaves empty slices without a gradient, but their ranks take part in the sums.

        Not so in a step that has no gradients at all, which other ranks take none in either.
        """
        held = [parameter for parameter in self._slices if parameter.numel() and parameter.requires_grad]
        if held and all(parameter.grad is None for parameter in held):
            return
        for parameter in self._slices:
            if parameter.grad is None and parameter.numel() == 0:
                parameter.grad = torch.zeros_like(parameter)

    def _with_gradient(self, group: Group) -> list[Tensor]:
        names = group.get("param_names", ["a parameter"] * len(group["params"]))
        found = []
        for name, parameter in zip(names, group["params"], strict=True):
            if parameter.grad is not None:
                check_gradient(type(self).__name__, name, parameter.grad)
                found.append(parameter)
        return found

    def _update(self, work: Sequence[tuple[Group, list[Tensor]]]) -> None:
        sharded: list[tuple[Tensor, Group]] = []
        for group, parameters in work:
            if group["rule"] == "adam":
                adam_(parameters, self.state, group, group["lr"] * group["lr_scale"], self._seeds(group, parameters))
                continue
            if group["rule"] in stateless.LR_SCALES:
                seeds = self._seeds(group, parameters)
                stateless.update_(parameters, group, group["lr"] * group["lr_scale"], seeds, self._slices)
                continue
            whole: list[Tensor] = []
            for p in parameters:
                if is_dtensor(p) or (self._slices and p in self._slices):
                    sharded.append((p, group))
                else:
                    whole.append(p)
            self._step_whole(whole, group)
        if sharded:
            self._step_sharded(sharded)

    def _step_whole(self, parameters: Sequence[Tensor], group: Group) -> None:
        alike = list(self._alike(parameters, group))
        if self.replicas is not None and self._divisible:
            for part in alike:
                self._divide(part, group)
            return
        updates = self._update_([self._batch(part, group) for part in alike], group)
        if updates:
            observations = observe_whole(updates, group["lr"] * group["lr_scale"])
            self._tell([(p, group) for part in alike for p in part], observations)

    def _alike(self, parameters: Iterable[Tensor], group: Group) -> Iterator[list[Tensor]]:
        """Parameters that are updated together."""
        batches: dict[tuple[Any, ...], list[Tensor]] = {}
        for p in parameters:
            assert p.grad is not None
            batches.setdefault((p.shape, p.dtype, p.grad.dtype, p.device, self._iterations(p, group)), []).append(p)
        yield from batches.values()

    def _batch(self, alike: Sequence[Tensor], group: Group) -> Batch:
        """What the update of these parameters works on; to be observed if anyone asks."""
        weights = [as_matrices(parameter, group["view"]) for parameter in alike]
        gradients = [as_matrices(p.grad, group["view"], like=p) for p in alike if p.grad is not None]
        lr, decay, seed = group["lr"] * group["lr_scale"], group["weight_decay"], self._seeds(group, alike[:1])[0]
        return Batch(weights, gradients, lr, decay, self._iterations(alike[0], group), seed, self._observes(group))

    def _divide(self, alike: Sequence[Tensor], group: Group) -> None:
        """Each replica updates every so many-th parameter, and sends it to the others."""
        rank, world = dist.get_rank(self.replicas), dist.get_world_size(self.replicas)
        own: dict[int, Observation] = {}
        for k in range(rank, len(alike), world):
            for measured in self._update_([self._batch([alike[k]], group)], group):
                (seen,) = observe_whole([measured], group["lr"] * group["lr_scale"])
                own[k] = seen._replace(residuals=seen.residuals.cpu(), statistics=seen.statistics.cpu())
        sent = [
            dist.broadcast(p.data, group=self.replicas, group_src=k % world, async_op=True) for k, p in enumerate(alike)
        ]
        for work in sent:
            work.wait()
        if self._observes(group):
            gathered: list[Any] = [None] * world
            dist.all_gather_object(gathered, own, group=self.replicas)
            found = {k: seen for part in gathered for k, seen in part.items()}
            placed = [Observation(found[k][0], *(x.to(p.device) for x in found[k][1:])) for k, p in enumerate(alike)]
            self._tell([(p, group) for p in alike], placed)

    def _step_sharded(self, parameters: Sequence[tuple[Tensor, Group]]) -> None:
        buckets: dict[tuple[Any, ...], list[tuple[Tensor, Group]]] = {}
        for p, group in parameters:
            scheme = *(group[name] for name in self._scheme), self._iterations(p, group)
            buckets.setdefault((p.device, working_dtype(p), scheme), []).append((p, group))
        for bucket in buckets.values():
            jobs: list[Job] = []
            for k, (p, group) in enumerate(bucket):
                assert p.grad is not None
                lr, decay, (seed,) = group["lr"] * group["lr_scale"], group["weight_decay"], self._seeds(group, [p])
                for i, matrix in enumerate(locate(p, p.grad, group["view"], self._slices.get(p))):
                    jobs.append(Job(matrix, k, lr, decay, None if seed is None else seed + i))
            p, group = bucket[0]
            observe = any(self._observes(group) for _, group in bucket)
            squares = sharded_weight_squares(jobs, local(p)) if observe else None
            measured = self._update_sharded_(jobs, group, self._iterations(p, group), local(p), observe=observe)
            if measured is not None and squares is not None:
                self._tell(bucket, observe_sharded(measured, jobs, squares))

    def _iterations(self, parameter: Tensor, group: Group) -> int:
        if group.get("iterations") != "auto":
            return auto_iterations.iterations_of(group, 0)
        return auto_iterations.iterations_of(group, self._place(parameter)[1])

    def _observes(self, group: Group) -> bool:
        return bool(self.observers) or auto_iterations.is_measuring(group)

    def _tell(self, updated: Sequence[tuple[Tensor, Group]], observations: Sequence[Observation]) -> None:
        """Choose iterations where that is due, then tell the observers; of those chosen, if more were made."""
        if not observations:
            return
        if any(auto_iterations.is_measuring(group) for _, group in updated):
            worst = torch.stack([seen.residuals.amax(-1) for seen in observations]).tolist()
            observations = [
                seen._replace(residuals=seen.residuals[: auto_iterations.choose(group, self._place(p)[1], found)])
                if auto_iterations.is_measuring(group)
                else seen
                for (p, group), seen, found in zip(updated, observations, worst, strict=True)
            ]
        for (p, _), seen in zip(updated, observations, strict=True):
            for observer in self.observers:
                observer(p, seen)

    def _place(self, parameter: Tensor) -> tuple[int, int]:
        """The number of a parameter's group, and its own in there."""
        if not self._places:
            self._number()
        return self._places[parameter]

    def _seeds(self, group: Group, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """What each bfloat16 parameter is rounded by in this step, from the group's count of steps.

        The count is a tensor on the parameters' device, so that a captured CUDA graph goes on counting. Of parameters
        that are updated together the seeds count up, so that one alone is rounded like one among others.
        """
        if not group["stochastic_rounding"]:
            return [None] * len(parameters)
        if not self._numbers:
            self._number()
        seeds: list[Tensor | None] = []
        for p in parameters:
            if p.dtype is not torch.bfloat16:
                seeds.append(None)
                continue
            steps = group.setdefault("rounding_steps", torch.zeros((), dtype=torch.int64, device=p.device))
            if steps.device != p.device:
                group["rounding_steps"] = steps = steps.to(p.device)
            seeds.append(lowbias32(steps) + self._numbers[p])
        return seeds

    def _number(self) -> None:
        """Number the matrices of all parameters, those of a group that are updated together in one run."""
        count = 0
        for index, group in enumerate(self.param_groups):
            self._places |= {p: (index, k) for k, p in enumerate(group["params"])}
            alike: dict[tuple[Any, ...], list[Tensor]] = {}
            for p in group["params"]:
                alike.setdefault((p.shape, p.dtype, p.device), []).append(p)
            for p in (p for batch in alike.values() for p in batch):
                self._numbers[p] = count
                shape = self._slices[p].shape if p in self._slices else p.shape
                count += matrix_count(shape, group["view"]) if group["rule"] not in ("adam", "sign") else 1

    @abstractmethod
    def _update_(self, batches: Sequence[Batch], group: Group) -> list[Measured]:
        """Update whole matrices in place, with the hyper-parameters of a group.

        Returns:
            What was measured of each batch, in order, if they ask for it; else nothing.
        """

    @abstractmethod
    def _update_sharded_(
        self, jobs: Sequence[Job], group: Group, iterations: int, like: Tensor, *, observe: bool
    ) -> Measured | None:
        """Update sharded matrices of any shapes, on one device, in place; on all ranks alike.

        Args:
            jobs: the matrices, each with its learning rate, weight decay and seed.
            group: for the hyper-parameters in ``_scheme``.
            iterations: L, for those that have one.
            like: a parameter's shard, for device and dtype where this rank's shards are all empty.
            observe: whether to measure.

        Returns:
            What was measured, if ``observe``.
        """

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_lr_scales": self._lr_scales}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.setdefault("observers", [])
        self.__dict__.setdefault("replicas", None)
        self.__dict__.setdefault("_slices", {})
        self._numbers, self._places = {}, {}
        self.__dict__.setdefault("_nameless", False)
        super().__setstate__(state)
        for group in self.param_groups:  # of a checkpoint that is older than an option
            for name in self._scheme:
                group.setdefault(name, self.defaults.get(name))
