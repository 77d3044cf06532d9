"""Next-token loss against a float64 computation, and the metric against the same numbers in one piece."""

import math

import pytest
import torch

from lightning_multinorm.llama.loss import IGNORE, TokenLoss, token_losses


def reference(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """log Σ exp(z) − z_label in float64, position by position."""
    losses = torch.zeros(labels.shape, dtype=torch.float64)
    for index in torch.cartesian_prod(*map(torch.arange, labels.shape)).tolist():
        row, label = logits[tuple(index)].double(), int(labels[tuple(index)])
        if label != IGNORE:
            losses[tuple(index)] = torch.logsumexp(row, -1) - row[label]
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_are_the_cross_entropy_of_each_position(dtype: torch.dtype) -> None:
    logits = (torch.randn(3, 5, 11) * 4).to(dtype)
    labels = torch.randint(0, 11, (3, 5))
    labels[0, 2] = labels[2, 4] = IGNORE
    losses = token_losses(logits, labels)
    torch.testing.assert_close(losses.double(), reference(logits, labels), rtol=1e-6, atol=1e-6)
    assert losses[0, 2] == losses[2, 4] == 0


@pytest.mark.parametrize("gap", [20.0, 103.0, 1000.0])
def test_a_hopeless_token_has_a_finite_loss(gap: float) -> None:
    logits = torch.zeros(1, 1, 2, dtype=torch.float16)
    logits[0, 0, 0] = gap
    assert token_losses(logits, torch.tensor([[1]])).item() == pytest.approx(gap, rel=1e-3)


def test_metric_does_not_depend_on_how_rows_are_batched() -> None:
    losses, labels, sizes = torch.rand(12, 7), torch.randint(0, 9, (12, 7)), torch.randint(1, 30, (12,))
    labels[3:5, 2:] = IGNORE
    losses[labels == IGNORE] = 0
    values = []
    for rows in (12, 5, 1):
        metric = TokenLoss()
        for part in zip(losses.split(rows), labels.split(rows), sizes.split(rows), strict=True):
            metric.update(*part)
        values.append(metric.compute())
    count = (labels != IGNORE).sum()
    expected = losses.double().sum() / count
    for value in values:
        assert value["loss"] == pytest.approx(expected.item(), abs=1e-12)
        assert value["perplexity"] == pytest.approx(math.exp(expected), rel=1e-12)
        assert value["bits_per_byte"] == pytest.approx(losses.double().sum().item() / math.log(2) / int(sizes.sum()))


def test_metric_without_bytes_has_no_bits_per_byte() -> None:
    metric = TokenLoss()
    metric.update(torch.ones(1, 3), torch.ones(1, 3, dtype=torch.int64))
    assert metric.compute().keys() == {"loss", "perplexity"}


def test_sums_stay_in_double_in_a_bfloat16_module() -> None:
    module = torch.nn.Module()
    module.metric = TokenLoss()
    module.to(torch.bfloat16)
    module.metric.update(torch.full((1, 1), 1e-3), torch.zeros(1, 1, dtype=torch.int64))
    module.metric.update(torch.full((1, 1), 1e3), torch.zeros(1, 1, dtype=torch.int64))
    assert module.metric.compute()["loss"].item() == pytest.approx(500.0005, abs=1e-6)
