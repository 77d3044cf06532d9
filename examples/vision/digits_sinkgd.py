"""The project in `digits.py` with SinkGD and the convergence of its norms: two lines, marked below.

python digits_sinkgd.py fit
"""

import torch
from digits import Digits, DigitsData
from lightning.pytorch.cli import LightningCLI

from lightning_multinorm import NormConvergence, SinkGD, parameter_groups


class SinkGDDigits(Digits):
    """`Digits`, trained by SinkGD."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Kernels of convolutions are normalised as matrices, packed q, k and v each for itself; the rest gets Adam."""
        return SinkGD(parameter_groups(self), lr=0.02)  # line one: instead of the configured optimizer


if __name__ == "__main__":
    watch = NormConvergence(every_n_steps=10)  # line two: a callback like any other
    LightningCLI(
        SinkGDDigits,
        DigitsData,
        trainer_defaults={"max_epochs": 10, "log_every_n_steps": 10, "callbacks": [watch]},
        seed_everything_default=0,
        auto_configure_optimizers=False,
    )
