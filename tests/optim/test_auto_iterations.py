"""``iterations="auto"``: what is chosen is what the textbook's residuals ask for, and resumes with the checkpoint."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_multinorm import MultiNormGD, SinkGD, multi_normalize
from lightning_multinorm.norms import ColumnNorm, RowNorm
from lightning_multinorm.optim.auto_iterations import PERIOD
from lightning_multinorm.optim.release import release_gradients

_NORMS = [RowNorm(), ColumnNorm()]
_MAKERS = {"sinkgd": SinkGD, "multinormgd": lambda params, **how: MultiNormGD(params, _NORMS, **how)}
makers = pytest.mark.parametrize("make", _MAKERS.values(), ids=_MAKERS)


def _gradients() -> dict[str, Tensor]:
    """From one that is done after one iteration to one that never is; two of a shape."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    heavy = normal(40, 30) / normal(40, 30).abs().clamp(min=1e-3)
    return {
        "ones": torch.ones(40, 30),
        "normal": normal(40, 30),
        "scaled": normal(20, 50) * normal(20, 1).exp(),
        "heavy": heavy,
    }


def _needed(G: Tensor, tolerance: float, most: int) -> int:
    _, trace = multi_normalize(G.double(), _NORMS, most, return_trace=True)
    within = [k for k, residuals in enumerate(trace.residuals.tolist(), 1) if max(residuals) <= tolerance]
    return within[0] if within else most


def _step(parameters: dict[str, nn.Parameter], optimizer: Any) -> dict[str, int]:
    """Iterations that each parameter's observers were told of."""
    seen: dict[int, int] = {}
    optimizer.observers[:] = [lambda p, found: seen.__setitem__(id(p), len(found.residuals))]
    for name, G in _gradients().items():
        parameters[name].grad = G.clone()
    optimizer.step()
    return {name: seen[id(p)] for name, p in parameters.items()}


def _parameters() -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.zeros_like(G)) for name, G in _gradients().items()}


@makers
@pytest.mark.parametrize(("tolerance", "most"), [(0.01, 10), (1e-4, 6)])
def test_as_many_are_made_as_the_residuals_ask_for(make: Any, tolerance: float, most: int) -> None:
    parameters = _parameters()
    optimizer = make(parameters.items(), iterations="auto", tolerance=tolerance, max_iterations=most)
    wanted = {name: _needed(G, tolerance, most) for name, G in _gradients().items()}
    assert wanted["ones"] == 1 and wanted["heavy"] == min(8, most) and len(set(wanted.values())) >= 3
    assert _step(parameters, optimizer) == wanted  # the first step makes all, and chooses
    before = {name: p.detach().clone() for name, p in parameters.items()}
    assert _step(parameters, optimizer) == wanted
    for name, G in _gradients().items():
        X, _ = multi_normalize(G, _NORMS, wanted[name], return_trace=True)
        assert_close(parameters[name].detach(), before[name] - 0.001 * X, rtol=0, atol=1e-7)


def test_what_is_chosen_is_in_the_checkpoint_and_is_chosen_anew_on_time() -> None:
    parameters, twins = _parameters(), _parameters()
    optimizer, twin = (SinkGD(those.items(), iterations="auto") for those in (parameters, twins))
    chosen = _step(parameters, optimizer)
    twin.load_state_dict(optimizer.state_dict())
    for name, p in twins.items():
        p.data.copy_(parameters[name].data)
    assert _step(twins, twin) == chosen
    calls: list[bool] = []
    for step in range(2, PERIOD + 1):
        made = _step(twins, twin)
        calls.append(made == chosen)
        group = twin.param_groups[0]
        assert group["steps_to_measure"] == (-step - 1) % PERIOD
    assert all(calls)


def test_gradient_release_chooses_alike() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 30), nn.Tanh(), nn.Linear(30, 12))
    other = nn.Sequential(nn.Linear(12, 30), nn.Tanh(), nn.Linear(30, 12))
    other.load_state_dict(model.state_dict())
    optimizers = [SinkGD(net.named_parameters(), iterations="auto", tolerance=1e-3) for net in (model, other)]
    release_gradients(optimizers[1])
    for step in range(3):
        x = torch.randn(64, 12, generator=torch.Generator().manual_seed(step))
        for net, optimizer in zip((model, other), optimizers, strict=True):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    chosen = [[group.get("chosen_iterations") for group in o.param_groups] for o in optimizers]
    assert chosen[0] == chosen[1] and any(chosen[0])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@makers
@pytest.mark.parametrize(
    "wrong", [{"iterations": 0}, {"iterations": "many"}, {"tolerance": 0.0}, {"max_iterations": 0}], ids=str
)
def test_values_out_of_range_are_refused_by_name(make: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        make(_parameters().items(), **wrong)
