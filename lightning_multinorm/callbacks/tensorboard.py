"""What TensorBoard gets beyond single scalars: all of a step's at once, maps of the residuals, and a layout."""

import math
from collections.abc import Mapping

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor

from lightning_multinorm.callbacks.telemetry import Telemetry

TENSORBOARD_STEPS = 10
"""Between two records of all parameters: its writer sums up every byte in Python, 0.1 µs each, beside the training."""

_CELL = 16  # pixels
_SMALLEST, _LARGEST = -6.0, 0.0  # log10 of what is dark, and bright
# Dark blue over green to yellow, equally spaced and readable without colours (matplotlib's viridis at nine points).
_COLOURS = torch.tensor([
    [68, 1, 84], [71, 44, 122], [59, 81, 139], [44, 113, 142], [33, 144, 141],
    [39, 173, 129], [92, 200, 99], [170, 220, 50], [253, 231, 37],
]) / 255  # fmt: skip


class Scalars:
    """Logs all scalars of a step as one record: many times faster than ``logger.log_metrics``, one by one."""

    def __init__(self) -> None:
        self._record, self._tags = Summary(), list[str]()  # kept, since the tags are the same every time

    @rank_zero_only
    def log(self, logger: TensorBoardLogger, metrics: Mapping[str, float], step: int) -> None:
        """As ``logger.log_metrics``."""
        if self._tags != list(metrics):
            self._tags = list(metrics)
            self._record = Summary(value=[Summary.Value(tag=tag) for tag in metrics])
        for entry, value in zip(self._record.value, metrics.values(), strict=True):
            entry.simple_value = value
        logger.experiment.file_writer.add_summary(self._record, step)  # copies it


@rank_zero_only
def draw_maps(logger: TensorBoardLogger, telemetry: Telemetry, step: int) -> None:
    """Images of the residuals last read: a row for each layer from the top, a column for each kind or iteration."""
    for norm in telemetry.norms:
        for name, cells in (("kinds", telemetry.by_kind(norm)), ("iterations", telemetry.by_iteration(norm))):
            if cells:
                logger.experiment.add_image(f"norm_convergence_layers_by_{name}/{norm}", _image(cells), step)


@rank_zero_only
def lay_out(logger: TensorBoardLogger, telemetry: Telemetry) -> None:
    """The tab "Custom Scalars": residuals of all kinds in one chart, and of all layers, for each norm."""
    layout = {
        norm: {
            title: ["Multiline", [f"norm_convergence_{title.replace(' ', '_')}/.*/{norm}"]]
            for title in ("by kind", "by layer")
        }
        for norm in telemetry.norms
    }
    if layout:
        logger.experiment.add_custom_scalars(layout)


def _image(cells: Mapping[tuple[str, str], float]) -> Tensor:
    """(3, height, width) in [0, 1]; grey where there is no such parameter."""
    rows = sorted({row for row, _ in cells}, key=int)
    columns = list(dict.fromkeys(column for _, column in cells))
    if all(column.isdigit() for column in columns):
        columns.sort(key=int)
    image = torch.full((len(rows), len(columns), 3), 0.5)
    for (row, column), residual in cells.items():
        image[rows.index(row), columns.index(column)] = _colour(residual)
    return image.permute(2, 0, 1).repeat_interleave(_CELL, 1).repeat_interleave(_CELL, 2)


def _colour(residual: float) -> Tensor:
    exponent = math.log10(residual) if 0 < residual < math.inf else _SMALLEST if residual == 0 else _LARGEST
    place = (min(max(exponent, _SMALLEST), _LARGEST) - _SMALLEST) / (_LARGEST - _SMALLEST) * (len(_COLOURS) - 1)
    low = min(int(place), len(_COLOURS) - 2)
    return _COLOURS[low] + (place - low) * (_COLOURS[low + 1] - _COLOURS[low])
