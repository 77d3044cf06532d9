"""Floating-point operations of training a transformer, and how many a second some devices can do."""

from typing import NamedTuple

import torch


class Peak(NamedTuple):
    """Dense FLOP/s of a device: of 16-bit matrix products added up in float32, and of float32 without TF32."""

    half: float
    single: float | None


PEAKS = {
    "A100": Peak(312e12, 19.5e12),
    "H100 PCIe": Peak(756.5e12, 51e12),
    "H100 NVL": Peak(835.5e12, 60e12),
    "H100": Peak(989.4e12, 67e12),  # SXM: "NVIDIA H100 80GB HBM3"
    "H200 NVL": Peak(835.5e12, 60e12),
    "H200": Peak(989.4e12, 67e12),
    "B200": Peak(2250e12, None),
    "L40S": Peak(362e12, 91.6e12),
    "L4": Peak(121e12, 30.3e12),
    "RTX 4090": Peak(165.2e12, 82.6e12),
    "RTX 3090": Peak(71e12, 35.6e12),
    "MI300X": Peak(1307.4e12, 163.4e12),
}
"""By what a device's name contains, longer ones first.

From the vendors' data sheets (NVIDIA: A100, H100, H200, L4, L40S, HGX B200; AMD: Instinct MI300X) and NVIDIA's Ada
(RTX 4090) and GA102 (RTX 3090) architecture papers. Most sheets print 16-bit figures for matrices of which half are
zeros (2:4 sparsity): an H200's 1979 TFLOP/s are 989.4 dense.
"""
_OTHERS = ("Laptop", "Max-Q", "MIG", " D", "Ti")  # of such names in the table, but slower or faster
_16_BITS = ("bf16", "16")


def peak_flops(device: str, precision: str) -> float | None:
    """Dense peak of a device in FLOP/s, or None where it is not known for certain.

    Args:
        device: its name, as `torch.cuda.get_device_name` tells it.
        precision: of Lightning's trainer.
    """
    if any(other in device for other in _OTHERS):
        return None
    words = f" {device} ".replace("-", " ")
    known = [name for name in PEAKS if f" {name} " in words]
    if not known:
        return None
    peak = PEAKS[max(known, key=len)]
    if precision.partition("-")[0] in _16_BITS:
        return peak.half
    exact = torch.get_float32_matmul_precision() == "highest"  # else TF32's rate, or one between the two
    return peak.single if precision == "32-true" and exact else None


def training_flops(multiplied: int, layers: int, width: int, length: int) -> tuple[int, int]:
    """FLOPs of training on one token by the convention of PaLM (arXiv:2204.02311, Appendix B).

    Args:
        multiplied: parameters without an embedding that is looked up alone.
        layers: of the transformer.
        width: of its attention, all heads together.
        length: of a sequence, in tokens.

    Returns:
        6 N for products with parameters, and 12 · layers · width · length for scores and sums of all pairs, as if none
        were masked.
    """
    return 6 * multiplied, 12 * layers * width * length
