"""Loss in chunks against the loss of all logits: values, gradients, laws; alone, in a module, and in a Trainer."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from parts import Recorder, loader, tiny_llama, trainer
from torch import Tensor
from torch.testing import assert_close

from lightning_multinorm.errors import UsageError
from lightning_multinorm.llama.chunked import chunked_loss
from lightning_multinorm.llama.loss import IGNORE, token_losses

TOKENS, WIDTH, WORDS = 12, 5, 9


def drawn(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (2, 6, 5), a weight (9, 5), and labels of which three are ignored."""
    labels = torch.randint(WORDS, (2, TOKENS // 2))
    labels[0, :2] = labels[1, 3] = IGNORE
    leaves = torch.randn(2, TOKENS // 2, WIDTH, dtype=dtype), torch.randn(WORDS, WIDTH, dtype=dtype)
    return *(leaf.requires_grad_() for leaf in leaves), labels  # type: ignore[return-value]


def reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum, losses and both gradients, in float64, by log Σ exp(z) − z_label."""
    H, W = (leaf.detach().double().requires_grad_() for leaf in (hidden, weight))
    logits = (H @ W.T).flatten(0, 1)
    known = labels.flatten() != IGNORE
    losses = torch.zeros(known.shape, dtype=torch.float64)
    losses[known] = torch.logsumexp(logits[known], -1) - logits[known, labels.flatten()[known]]
    losses.sum().backward()
    return losses.sum().detach(), losses.detach().view_as(labels), *gradients(H, W)  # type: ignore[return-value]


def gradients(*leaves: Tensor) -> list[Tensor]:
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("chunk", [1, 5, 6, 12, 100])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.03)]
)
def test_it_is_the_loss_of_all_logits(dtype: torch.dtype, tolerance: float, chunk: int) -> None:
    hidden, weight, labels = drawn(dtype)
    total, losses = chunked_loss(hidden, weight, labels, chunk)
    total.backward()
    assert losses.dtype == total.dtype == torch.promote_types(dtype, torch.float32)
    assert not losses.requires_grad and (losses[labels == IGNORE] == 0).all()
    assert [grad.dtype for grad in gradients(hidden, weight)] == [dtype, dtype]
    computed = [total, losses, *gradients(hidden, weight)]
    for value, expected in zip(computed, reference(hidden, weight, labels), strict=True):
        assert_close(value.double(), expected, rtol=tolerance, atol=tolerance)


def test_gradients_are_those_of_finite_differences() -> None:
    hidden, weight, labels = drawn()
    assert torch.autograd.gradcheck(lambda h, w: chunked_loss(h, w, labels, 5)[0] / 9, (hidden, weight))


@pytest.mark.parametrize("chunk", [5, 12])
def test_autocast_is_that_of_the_plain_loss(chunk: int) -> None:
    hidden, weight, labels = drawn(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        total, losses = chunked_loss(hidden, weight, labels, chunk)
        plain = token_losses(F.linear(hidden, weight), labels)
    assert_close(losses, plain.detach(), rtol=1e-5, atol=1e-5)
    total.backward()
    found = [grad.clone() for grad in gradients(hidden, weight)]
    hidden.grad = weight.grad = None
    plain.sum().backward()
    assert [grad.dtype for grad in found] == [torch.float32] * 2
    assert_close(found, gradients(hidden, weight), rtol=0.02, atol=0.02)


def test_a_permutation_of_tokens_permutes_losses_and_gradients() -> None:
    hidden, weight, labels = (leaf.detach() for leaf in drawn())
    hidden, labels, order = hidden.flatten(0, 1), labels.flatten(), torch.randperm(TOKENS)
    runs = []
    for rows, targets in ((hidden, labels), (hidden[order], labels[order])):
        leaves = rows.clone().requires_grad_(), weight.clone().requires_grad_()
        total, losses = chunked_loss(*leaves, targets, 5)
        total.backward()
        runs.append((total.detach(), losses, *gradients(*leaves)))
    (total, losses, of_hidden, of_weight), permuted = runs
    assert_close(permuted, (total, losses[order], of_hidden[order], of_weight))


def test_it_is_deterministic_and_scales_with_what_arrives() -> None:
    hidden, weight, labels = drawn(torch.float32)
    runs = []
    for factor in (1.0, 1.0, 0.25):
        hidden.grad = weight.grad = None
        (chunked_loss(hidden, weight, labels, 5)[0] * factor).backward()
        runs.append(gradients(hidden, weight))
    for once, again, quarter in zip(*runs, strict=True):
        assert torch.equal(once, again) and torch.equal(quarter, once / 4)


def test_only_ignored_labels_make_no_gradient() -> None:
    hidden, weight, labels = drawn()
    total, losses = chunked_loss(hidden, weight, torch.full_like(labels, IGNORE), 5)
    total.backward()
    assert total == 0 and not losses.any() and not any(grad.any() for grad in gradients(hidden, weight))


def test_a_hopeless_token_has_a_finite_loss() -> None:
    weight = torch.tensor([[1e3], [0.0]])
    _, losses = chunked_loss(torch.ones(1, 1), weight, torch.tensor([1]), 1)
    assert losses.item() == 1e3


def test_without_gradients_none_is_made() -> None:
    hidden, weight, labels = drawn()
    with torch.no_grad():
        total, _ = chunked_loss(hidden, weight, labels, 5)
    assert not total.requires_grad


@pytest.mark.parametrize("options", [{}, {"gradient_release": True}, {"activation_checkpointing": True}], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_training_is_that_with_all_logits(options: dict[str, bool], tied: bool, tmp_path: Path) -> None:
    runs = []
    for chunk in (None, 24):  # of 64 tokens
        module, recorder = tiny_llama(loss_chunk=chunk, **options), Recorder()
        module.llama_config.tie_word_embeddings = tied
        trainer(tmp_path, 3, logger=recorder).fit(module, loader(12), loader(10))
        values = recorder.values("train/loss") | recorder.values("val/loss")
        runs.append((values, dict(module.named_parameters())))
    (losses, weights), (chunked_losses, chunked_weights) = runs
    assert len(losses) == 3 and chunked_losses == pytest.approx(losses, rel=1e-5)
    assert_close(chunked_weights, weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [0, -5])
def test_a_chunk_without_tokens_is_refused(chunk: int) -> None:
    with pytest.raises(UsageError, match=f"loss_chunk={chunk} must be at least 1, or null"):
        tiny_llama(loss_chunk=chunk)
