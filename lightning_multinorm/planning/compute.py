"""FLOPs of a token, and how many tokens a second that makes on some GPUs."""

from dataclasses import dataclass

from lightning_multinorm import flops
from lightning_multinorm.planning.settings import Shape

PEAKS = {
    title: flops.PEAKS[name].half
    for title, name in (("A100", "A100"), ("H100 NVL", "H100 NVL"), ("H100 SXM, H200", "H200"))
}
"""FLOP/s in dense bfloat16 of those that a plan tells."""
UTILISATION = 0.4


@dataclass(frozen=True)
class Compute:
    """FLOPs of training on one token, forward and backward.

    Attributes:
        products: 6 N, with N the parameters without the embedding's, which are looked up, not multiplied.
        attention: 12 · layers · width · length, scores and sums of all pairs, as if none were masked.
    """

    products: int
    attention: int

    @property
    def per_token(self) -> int:
        """Both."""
        return self.products + self.attention

    def tokens_per_second(self, peak: float, devices: int) -> float:
        """At `UTILISATION` of the devices' peak."""
        return UTILISATION * peak * devices / self.per_token


def compute(parameters: int, shape: Shape, length: int) -> Compute:
    """FLOPs by the convention of PaLM (arXiv:2204.02311, Appendix B) for sequences of a length.

    Args:
        parameters: of the whole model.
        shape: of the model; an embedding that is the output head too is multiplied, and counts.
        length: of a sequence, in tokens.
    """
    multiplied = parameters - (0 if shape.tied else shape.vocabulary * shape.hidden)
    return Compute(*flops.training_flops(multiplied, shape.layers, shape.heads * shape.head_dim, length))
