"""Memory of a plan: the papers' figures, what autograd and torch's allocator count, and laws of the arithmetic."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.memory import compare
from lightning_multinorm import SinkGD
from lightning_multinorm.errors import UsageError
from lightning_multinorm.llama.loss import token_losses
from lightning_multinorm.llama.model import Llama
from lightning_multinorm.llama.sizes import llama_config
from lightning_multinorm.planning import Layout, MicroBatch, Precision
from lightning_multinorm.planning.activations import activations
from lightning_multinorm.planning.memory import PARTS
from lightning_multinorm.planning.settings import Shape

from .plans import planned

# Weights and states in GiB: arXiv:2502.07752, its Adam and its own optimizer without states on matrices. It prints
# 2.05 for the 350M's 2.056.
PAPERS = {"60m": (0.32, 0.23), "130m": (0.75, 0.43), "350m": (2.05, 0.93), "1b": (7.48, 2.98)}
SMALL = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 173, "num_hidden_layers": 2}
LAYOUTS = [
    Layout(),
    Layout("DDP", replicate=4, buckets=True),
    Layout("FSDP2", shard=4),
    Layout("HSDP", replicate=2, shard=4),
    Layout("TP", tensor=4),
    Layout("TP", shard=2, tensor=2),
]


@pytest.mark.parametrize("size", PAPERS)
def test_weights_and_states_are_the_papers(size: str) -> None:
    sinkgd, adamw = planned(size).optimizers
    for optimizer, expected in zip((adamw, sinkgd), PAPERS[size], strict=True):
        assert optimizer.weights_and_states / 2**30 == pytest.approx(expected, abs=0.0066)


def test_nothing_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan of the 7B makes no tensor of more than a step counter."""
    made: list[int] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.device.type != "meta":
                made.append(result.untyped_storage().nbytes())
            return result

    with Watch():
        planned("7b", SinkGD, torch.optim.AdamW, torch.optim.SGD)
    assert made and max(made) <= 4  # numbers of steps


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize(("kv_heads", "chunk"), [(4, None), (2, None), (2, 30), (2, 100)])
def test_activations_are_what_autograd_saves(precision: str, kv_heads: int, chunk: int | None) -> None:
    numbers, batch = Precision.named(precision), MicroBatch(3, 24, loss_chunk=chunk)
    config = llama_config(None, {**SMALL, "num_attention_heads": 4, "num_key_value_heads": kv_heads})
    model = Llama(config).to(numbers.weights)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage
        return tensor

    tokens = torch.randint(300, (batch.sequences, batch.length))
    autocast = torch.autocast("cpu", torch.bfloat16) if numbers.mixed else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        if chunk is None:
            losses = token_losses(model(input_ids=tokens, use_cache=False).logits, tokens.clone())
        else:
            losses, _ = model.chunked_loss(tokens, None, tokens.clone(), chunk)
    plan_of = activations(Shape.of(config), batch, numbers, Layout())
    assert losses.requires_grad
    labels, total_weight = tokens.nbytes, 4  # what the loss of all logits keeps of the number of its tokens
    expected = plan_of.layer * 2 + plan_of.ends + plan_of.logits_saved + (total_weight if chunk is None else -labels)
    assert sum(storage.nbytes() for storage in saved.values()) == expected


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize(
    "batch", [MicroBatch(2, 64), MicroBatch(1, 8, accumulate=2), MicroBatch(2, 64, 1, 32), MicroBatch(1, 16, 2, 1024)]
)
def test_peak_is_what_a_real_run_holds(batch: MicroBatch, precision: str) -> None:
    row = compare("tiny", "adamw" if precision == "32-true" else "sinkgd", batch, precision)
    assert abs(row["deviation"]) < 0.05, row


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.name}{layout.world}")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_totals_are_sums_of_their_parts(layout: Layout, precision: str) -> None:
    run = planned("60m", precision=precision, layout=layout)
    for optimizer in run.optimizers:
        for moment in optimizer.moments:
            assert moment.total == sum(getattr(moment, part) for part in PARTS)
        assert optimizer.peak.total == max(moment.total for moment in optimizer.moments)
        assert optimizer.weights_and_states == optimizer.peak.weights + optimizer.memory.states


def test_precisions() -> None:
    true16, true32, mixed = (planned(precision=name).optimizers[1] for name in ("bf16-true", "32-true", "bf16-mixed"))
    assert true32.weights_and_states == pytest.approx(2 * true16.weights_and_states, rel=1e-4)
    assert mixed.weights_and_states == true32.weights_and_states
    assert Precision.named("bf16").name == "bf16-mixed" and Precision.named(32).name == "32-true"


class Wanderer(torch.optim.SGD):
    """An optimizer that needs values."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Look at a value."""
        self.param_groups[0]["params"][0].sum().item()


class Keeper(torch.optim.SGD):
    """An optimizer that keeps a tensor in an object, as GaLore does."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Keep it."""
        for parameter in (p for group in self.param_groups for p in group["params"]):
            self.state[parameter]["kept"] = SimpleNamespace(rank=4, basis=[torch.empty_like(parameter)])


@pytest.mark.parametrize(
    ("make", "copies"),
    [
        (Keeper, 1),
        (torch.optim.SGD, 0),
        (partial(torch.optim.SGD, momentum=0.9), 1),
        (partial(torch.optim.AdamW, amsgrad=True), 3),
        (torch.optim.RMSprop, 1),
        (torch.optim.Adagrad, 1),
    ],
)
def test_states_of_any_optimizer_are_counted(make: Callable[..., Any], copies: int) -> None:
    run = planned("60m", partial(make, lr=0.1))
    assert run.optimizers[0].memory.states == pytest.approx(2 * run.parameters * copies, abs=1000)


def test_an_optimizer_that_needs_values_is_refused() -> None:
    with pytest.raises(UsageError, match="states of Wanderer cannot be counted: its step on parameters without memory"):
        planned("60m", partial(Wanderer, lr=0.1))
