"""The hidden matrices of a model size, with random weights and gradients that every contender shares."""

from collections import Counter

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_multinorm.llama.sizes import SIZES

MODELS = ("60m", "130m", "350m", "1b")
DTYPES = ("float32", "bfloat16")
_TINY = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2}
_RMS_WEIGHT, _RMS_GRADIENT = 0.02, 1e-4


def shapes(model: str) -> list[tuple[int, int]]:
    """(m, n) of q, k, v, o, gate, up and down of every layer; "tiny" is for trying the benchmark itself."""
    fields = {str(size): fields for size, fields in SIZES.items()}.get(model, _TINY)
    d, width = fields["hidden_size"], fields["intermediate_size"]
    return [*[(d, d)] * 4, (width, d), (width, d), (d, width)] * fields["num_hidden_layers"]


class Matrices:
    """Weights, whose ``grad`` is set; the same numbers for one seed, whatever the dtype and device.

    Rows and columns of a gradient differ log-normally in size, as real ones do: no normalisation is over at once.
    """

    def __init__(self, model: str, dtype: torch.dtype, device: str, seed: int = 0) -> None:
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        self.weights: list[Parameter] = []
        for k, shape in enumerate(shapes(model)):
            weight = torch.randn(shape, generator=generator) * _RMS_WEIGHT
            parameter = Parameter(weight.to(device=device, dtype=dtype))
            parameter.grad = self._gradient(k, shape).to(device=device, dtype=dtype)
            self.weights.append(parameter)

    @property
    def gradients(self) -> list[Tensor]:
        """One for each weight."""
        return [weight.grad for weight in self.weights if weight.grad is not None]

    @property
    def count(self) -> int:
        """Number of parameters."""
        return sum(weight.numel() for weight in self.weights)

    @property
    def bytes(self) -> int:
        """Of the weights alone; the gradients take as much again."""
        return sum(weight.nbytes for weight in self.weights)

    @property
    def shapes(self) -> dict[str, int]:
        """How many matrices there are of each shape."""
        return dict(Counter(f"{weight.shape[0]}x{weight.shape[1]}" for weight in self.weights))

    def versions(self) -> list[int]:
        """Changes when somebody writes to a gradient."""
        return [gradient._version for gradient in self.gradients]

    def restore_gradients(self) -> None:
        """Write the gradients anew, after a contender that changed them."""
        with torch.no_grad():
            for k, gradient in enumerate(self.gradients):
                gradient.copy_(self._gradient(k, tuple(gradient.shape)))

    def _gradient(self, index: int, shape: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed((self.seed + 1) * 1_000_003 + index)
        rows = torch.randn(shape[0], 1, generator=generator).exp()
        columns = torch.randn(1, shape[1], generator=generator).exp()
        gradient = torch.randn(shape, generator=generator).mul_(rows).mul_(columns)
        return gradient.mul_(_RMS_GRADIENT / gradient.square().mean().sqrt())
