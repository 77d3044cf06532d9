"""What the optimizers refuse, early and by name."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from lightning_multinorm import SWAN, MultiNormGD, SinkGD
from lightning_multinorm.norms import RowNorm

Make = Callable[..., torch.optim.Optimizer]
_OPTIMIZERS: dict[str, Make] = {"SinkGD": SinkGD, "SWAN": SWAN, "MultiNormGD": partial(MultiNormGD, norms=[RowNorm()])}
every = pytest.mark.parametrize(("owner", "make"), _OPTIMIZERS.items(), ids=_OPTIMIZERS)


def _matrix(dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.zeros(3, 4, dtype=dtype), requires_grad=dtype.is_floating_point or dtype.is_complex)


@every
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -0.1),
        ("lr", float("nan")),
        ("matrix_lr_scale", -1.0),
        ("fallback_lr_scale", -1.0),
        ("weight_decay", -1e-9),
        ("eps", -1e-8),
        ("betas", (0.9, 1.0)),
        ("betas", (-0.1, 0.9)),
        ("betas", (0.9,)),
    ],
)
def test_bad_hyperparameters_are_refused_by_name(owner: str, make: Make, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{owner}: {name}="):
        make([("w.weight", _matrix())], **{name: value})


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (SinkGD, {"iterations": 0}, "SinkGD: iterations=0"),
        (MultiNormGD, {"norms": [RowNorm()], "iterations": 0}, "MultiNormGD: iterations=0"),
        (MultiNormGD, {"norms": []}, "MultiNormGD: norms is empty"),
        (SWAN, {"k": 0}, "SWAN: k=0"),
        (SWAN, {"beta": 0.0}, "SWAN: beta=0.0"),
        (SWAN, {"beta": 0.81}, "SWAN: beta=0.81"),
        (SWAN, {"whitening": "qr"}, "'qr'"),
        (SWAN, {"normalization": "columns"}, "SWAN: normalization='columns'"),
        (SWAN, {"normalization": "sinkhorn", "iterations": 0}, "SWAN: iterations=0"),
        (SWAN, {"normalization": "sinkhorn", "iterations": "auto"}, "SWAN: iterations='auto'"),
        (SWAN, {"normalization": "sinkhorn", "center": True}, "SWAN: center=True"),
        (SinkGD, {"rescale": "spectral"}, "SinkGD: rescale='spectral'"),
    ],
)
def test_bad_options_of_one_optimizer_are_refused_by_name(make: Make, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make([("w.weight", _matrix())], **options)


@every
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_complex_and_integer_parameters_are_refused_by_name(owner: str, make: Make, dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"{owner}: layer\.weight is {dtype}"):
        make([("layer.weight", _matrix(dtype))])


@every
@pytest.mark.parametrize("name", ["layer.weight", "embedding.weight"])
def test_sparse_gradients_are_refused_by_name(owner: str, make: Make, name: str) -> None:
    weight = _matrix()
    weight.grad = torch.eye(3, 4).to_sparse()
    with pytest.raises(RuntimeError, match=rf"{owner}: the gradient of {name} is sparse"):
        make([(name, weight)]).step()


@every
@pytest.mark.parametrize("keys", [{"rule": "muon"}, {"rule": "muon", "view": "matrix"}], ids=["alone", "with_view"])
def test_unknown_rules_are_refused(owner: str, make: Make, keys: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="'muon'"):
        make([{"params": [("w.weight", _matrix())], **keys}])


@every
@pytest.mark.parametrize(
    ("view", "shape"), [("matrix", (4,)), ("batch", (4,)), ("qkv", (4, 5)), ("matrix", (2, 4, 5)), ("diagonal", (4, 5))]
)
def test_views_that_do_not_fit_are_refused_at_construction(
    owner: str, make: Make, view: str, shape: tuple[int, ...]
) -> None:
    group = {"params": [("w", nn.Parameter(torch.zeros(shape)))], "rule": "multinorm", "view": view, "name": "w"}
    with pytest.raises(ValueError, match=f"'{view}'"):
        make([group])


@every
def test_a_vector_that_is_to_be_a_matrix_is_refused_by_name(owner: str, make: Make) -> None:
    with pytest.raises(ValueError, match=r"layer\.bias cannot be multi-normalised"):
        make([{"params": [("layer.bias", nn.Parameter(torch.zeros(4)))], "rule": "multinorm"}])


@every
def test_no_parameters_are_refused(owner: str, make: Make) -> None:
    with pytest.raises(ValueError, match="empty"):
        make([])
