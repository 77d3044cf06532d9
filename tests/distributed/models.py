"""Checks on a real LLaMA: some steps on a spread model end where the same steps on one device do."""

import itertools
from collections.abc import Callable
from copy import deepcopy
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.distributed import _sync_ddp_if_available
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lightning_multinorm import SWAN, MultiNormGD, NonFiniteGradients, SinkGD, layouts, parameter_groups
from lightning_multinorm.layouts import clean, flat_slices
from lightning_multinorm.layouts.clipping import clip_
from lightning_multinorm.llama.loss import IGNORE, token_losses
from lightning_multinorm.llama.parallel import build_llama
from lightning_multinorm.norms import ColumnNorm, RowNorm
from lightning_multinorm.optim.release import release_gradients
from tests.distributed import folders

STEPS, VOCABULARY, LENGTH = 8, 51, 12
CONFIG = LlamaConfig(
    vocab_size=VOCABULARY, hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=LENGTH, use_cache=False,
)  # fmt: skip
MAKERS: dict[str, Callable[..., Any]] = {
    "sinkgd": SinkGD,
    "swan": partial(SWAN, k=6, beta=0.5),
    "multinormgd": partial(MultiNormGD, norms=[RowNorm(), ColumnNorm()]),
}


def batch(step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(VOCABULARY, (2, LENGTH), generator=generator)


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(input_ids=tokens, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def train(model: nn.Module, optimizer: Any, ranks: list[int]) -> list[float]:
    """Gradients are the mean over ``ranks``' batches, and those of other processes if the model says so."""
    losses = []
    for step in range(STEPS):
        total = 0.0
        for rank in ranks:
            value = loss(model, batch(step, rank)) / len(ranks)
            value.backward()
            total += value.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def whole(make: Callable[..., Any], ranks: int) -> tuple[dict[str, Tensor], list[float]]:
    torch.manual_seed(3)
    model = build_llama(CONFIG, torch.device("cpu"))
    optimizer = make(parameter_groups(model), lr=0.01)
    losses = train(model, optimizer, list(range(ranks)))
    return {name: p.detach() for name, p in model.named_parameters()}, losses


def check(spread: str, maker: str) -> None:
    make, world, rank = MAKERS[maker], dist.get_world_size(), dist.get_rank()
    torch.manual_seed(3)
    model, data_rank, replicas = SPREAD[spread]()
    optimizer = make(parameter_groups(model), lr=0.01)
    if spread == "ddp":
        optimizer.replicas = dist.group.WORLD
    losses = train(model, optimizer, [data_rank])
    count = world // replicas
    expected, expected_losses = whole(make, count)
    mean = torch.tensor(losses)
    dist.all_reduce(mean)
    assert_close((mean / world).tolist(), expected_losses, rtol=0, atol=1e-5)
    for name, parameter in gathered(model).items():
        assert_close(parameter, expected[name], rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert rank < world


def clipped(spread: str) -> None:
    """The norm of all gradients, and the gradients after clipping, are those of one device."""
    torch.manual_seed(3)
    model, rank, replicas = SPREAD[spread]()
    loss(model, batch(0, rank)).backward()
    torch.manual_seed(3)
    whole_model = build_llama(CONFIG, torch.device("cpu"))
    for other in range(dist.get_world_size() // replicas):
        (loss(whole_model, batch(0, other)) / (dist.get_world_size() // replicas)).backward()
    slices = flat_slices(model)
    norm = clip_(model.parameters(), 0.1, slices)
    expected = torch.nn.utils.clip_grad_norm_(whole_model.parameters(), 0.1)
    assert expected > 0.1
    assert_close(norm, expected, rtol=1e-5, atol=0)
    for parameter, other in zip(model.parameters(), whole_model.parameters(), strict=True):
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert_close(layouts.whole(gradient, slices.get(parameter)), other.grad, rtol=1e-4, atol=1e-6)


def chunked(spread: str) -> None:
    """Losses and gradients of the loss in chunks are those of one device with all logits."""
    torch.manual_seed(3)
    model, rank, replicas = SPREAD[spread]()
    torch.manual_seed(3)
    whole_model, ranks = build_llama(CONFIG, torch.device("cpu")), dist.get_world_size() // replicas
    for other in range(ranks):
        tokens, labels = batch(0, other), batch(1, other)
        labels[1, 3:5] = IGNORE
        expected = token_losses(whole_model(input_ids=tokens, use_cache=False).logits, labels)
        (expected.sum() / ranks).backward()
        if other == rank:
            total, losses = model.chunked_loss(tokens, None, labels, 5)
            assert_close((total, losses), (expected.sum(), expected), rtol=1e-5, atol=1e-5, check_stride=False)
            total.backward()
    for parameter, alone in zip(model.parameters(), whole_model.parameters(), strict=True):
        assert_close(layouts.whole(parameter.grad), alone.grad, rtol=1e-4, atol=1e-5)


def released(maker: str) -> None:
    """Updates inside backward under FSDP2 are those after it, bit for bit."""
    models = []
    for release in (False, True):
        torch.manual_seed(3)
        model, rank, _ = fsdp2()
        optimizer = MAKERS[maker](parameter_groups(model), lr=0.01)
        if release:
            release_gradients(optimizer)
        train(model, optimizer, [rank])
        models.append(gathered(model))
    for name, parameter in models[0].items():
        assert torch.equal(parameter, models[1][name]), name


def guarded(spread: str, maker: str) -> None:
    """A NaN that one rank's shard alone has: no rank takes the step, nor waits for another, and the next is taken."""
    model, rank, _ = SPREAD[spread]()
    optimizer = MAKERS[maker](parameter_groups(model), lr=0.01, weight_decay=0.1)
    if spread == "ddp":
        optimizer.replicas = dist.group.WORLD
    module = LightningModule()
    module.model = model
    guard, messages = NonFiniteGradients(), []
    module.log_dict = lambda values: messages.append(values)  # type: ignore[method-assign,assignment]
    strategy = SimpleNamespace(model=model, reduce=_sync_ddp_if_available)
    trainer: Any = SimpleNamespace(strategy=strategy, precision_plugin=None, global_step=0)
    guard.on_train_start(trainer, module)
    for step in range(3):
        before = {name: p.detach().clone() for name, p in gathered(model).items()}
        loss(model, batch(step, rank)).backward()
        if step == 1 and dist.get_rank() == 1:
            largest = max((p for p in model.parameters() if p.grad is not None), key=lambda p: layouts.local(p).numel())
            layouts.local(largest.grad).flatten()[-1:] = float("inf")  # type: ignore[arg-type]
        guard.on_before_optimizer_step(trainer, module, optimizer)
        state = deepcopy([optimizer.state[p] for p in model.parameters()])
        optimizer.step()
        if step == 1:
            assert_close([optimizer.state[p] for p in model.parameters()], state, rtol=0, atol=0)
        changed = [not torch.equal(p, before[name]) for name, p in gathered(model).items()]
        assert all(changed) if step != 1 else not any(changed)
        optimizer.zero_grad()
    assert guard.skipped == 1
    norms = torch.stack([values["train/gradient_norm"] for values in messages])
    assert norms.isfinite().tolist() == [True, False, True]
    others = [torch.empty_like(norms) for _ in range(dist.get_world_size())]
    dist.all_gather(others, norms)
    assert torch.equal(others[0], others[1])


def released_and_guarded(maker: str) -> None:
    """Under FSDP2: the parameter with a NaN on one rank is updated on none, and all others are."""
    model, rank, _ = fsdp2()
    optimizer = MAKERS[maker](parameter_groups(model), lr=0.01, weight_decay=0.1)
    poisoned = {"model.layers.1.mlp.up_proj.weight", "lm_head.weight"}
    for name, parameter in model.named_parameters():
        if name in poisoned and dist.get_rank() == 1:
            parameter.register_post_accumulate_grad_hook(
                lambda p: layouts.local(p.grad).view(-1)[:1].fill_(float("nan"))  # type: ignore[arg-type]
            )
    release_gradients(optimizer)
    before = {name: p.clone() for name, p in gathered(model).items()}
    loss(model, batch(0, rank)).backward()
    assert optimizer.released is not None
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)]: count for p, count in optimizer.released.left} == dict.fromkeys(poisoned, 1)
    assert {name for name, p in gathered(model).items() if torch.equal(p, before[name])} == poisoned
    assert all(not optimizer.state[p] for name, p in model.named_parameters() if name in poisoned)


def release_is_refused() -> None:
    """Under DDP and FSDP1, where ranks would part."""
    for spread in (ddp, fsdp1):
        model, _, _ = spread()
        optimizer = SinkGD(parameter_groups(model))
        try:
            release_gradients(optimizer)
        except ValueError as error:
            assert "fsdp2" in str(error)
        else:
            raise AssertionError(f"{spread.__name__} was taken")


def flat_slices_are_never_adams() -> None:
    """Names and 1-D shapes cannot tell FSDP1's slices of matrices from vectors."""
    model, _, _ = fsdp1()
    for parameters in (model.named_parameters(), model.parameters()):
        try:
            SinkGD(parameters)
        except ValueError as error:
            assert "fsdp2" in str(error)
            assert "parameter_groups" in str(error)
        else:
            raise AssertionError("slices were taken")


def gathered(model: nn.Module) -> dict[str, Tensor]:
    """Whole parameters by name."""
    slices = flat_slices(model)
    names = (clean(name).removeprefix("module.") for name, _ in model.named_parameters())
    return {name: layouts.whole(p, slices.get(p)) for name, p in zip(names, model.parameters(), strict=True)}


@cache
def mesh(*shape: int) -> Any:
    """Groups are slow to make, and the same for all checks."""
    names = ("outer", "inner")[-len(shape) :]
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def ddp() -> tuple[nn.Module, int, int]:
    return DistributedDataParallel(build_llama(CONFIG, torch.device("cpu"))), dist.get_rank(), 1


def fsdp2() -> tuple[nn.Module, int, int]:
    return build_llama(CONFIG, torch.device("cpu"), data_mesh=mesh(dist.get_world_size())), dist.get_rank(), 1


def hsdp() -> tuple[nn.Module, int, int]:
    return build_llama(CONFIG, torch.device("cpu"), data_mesh=mesh(2, 2)), dist.get_rank(), 1


def tensor_parallel() -> tuple[nn.Module, int, int]:
    size = dist.get_world_size()
    return build_llama(CONFIG, torch.device("cpu"), tensor_mesh=mesh(size)), 0, size


def fsdp2_over_tp() -> tuple[nn.Module, int, int]:
    grid = mesh(2, 2)
    model = build_llama(CONFIG, torch.device("cpu"), data_mesh=grid["outer"], tensor_mesh=grid["inner"])
    return model, grid["outer"].get_local_rank(), 2


def fsdp1() -> tuple[nn.Module, int, int]:
    wrapped = FullyShardedDataParallel(
        build_llama(CONFIG, torch.device("cpu")),
        auto_wrap_policy=ModuleWrapPolicy({LlamaDecoderLayer}),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )
    return wrapped, dist.get_rank(), 1


SPREAD: dict[str, Callable[[], tuple[nn.Module, int, int]]] = {
    "ddp": ddp,
    "fsdp2": fsdp2,
    "fsdp1": fsdp1,
    "tp": tensor_parallel,
    "hsdp": hsdp,
    "fsdp2-tp": fsdp2_over_tp,
}
_SIZES = {"ddp": (2,), "fsdp1": (2, 3), "tp": (2,), "hsdp": (4,), "fsdp2-tp": (4,)}

CHECKS: dict[str, Callable[[], None]] = {}
for _spread, _maker in itertools.product(SPREAD, MAKERS):
    CHECKS[f"{_spread}-{_maker}"] = partial(check, _spread, _maker)
    _sizes = _SIZES.get(_spread, (2, 3, 4))
    # What the number of ranks changes is how matrices are cut, which is checked on them alone.
    CHECKS[f"{_spread}-{_maker}"].sizes = [n for n in _sizes if n == _sizes[0] or _maker == "sinkgd"]  # type: ignore[attr-defined]
for _spread in SPREAD:
    CHECKS[f"clipped-{_spread}"] = partial(clipped, _spread)
    CHECKS[f"clipped-{_spread}"].sizes = _SIZES.get(_spread, (2,))[:1]  # type: ignore[attr-defined]
for _spread in ("fsdp2", "tp", "fsdp2-tp"):
    CHECKS[f"chunked-{_spread}"] = partial(chunked, _spread)
    CHECKS[f"chunked-{_spread}"].sizes = _SIZES.get(_spread, (2,))  # type: ignore[attr-defined]
for _maker in MAKERS:
    CHECKS[f"released-{_maker}"] = partial(released, _maker)
    CHECKS[f"released-{_maker}"].sizes = (2,)  # type: ignore[attr-defined]
    CHECKS[f"released-guarded-{_maker}"] = partial(released_and_guarded, _maker)
    CHECKS[f"released-guarded-{_maker}"].sizes = (2,)  # type: ignore[attr-defined]
for _spread, _maker in [*((spread, "sinkgd") for spread in SPREAD), ("ddp", "swan"), ("fsdp2", "multinormgd")]:
    CHECKS[f"guarded-{_spread}-{_maker}"] = partial(guarded, _spread, _maker)
    CHECKS[f"guarded-{_spread}-{_maker}"].sizes = _SIZES.get(_spread, (2,))[:1]  # type: ignore[attr-defined]
for _check in (release_is_refused, flat_slices_are_never_adams):
    CHECKS[_check.__name__] = _check
    _check.sizes = (2,)  # type: ignore[attr-defined]
CHECKS |= folders.CHECKS
