"""Peaks are dense ones of the device that is meant, or none; FLOPs of a model; what a run logs of both."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from parts import LENGTH, Recorder, loader, tiny_llama, trainer

from lightning_multinorm.callbacks import Throughput
from lightning_multinorm.callbacks.throughput import _full_rate
from lightning_multinorm.flops import peak_flops
from lightning_multinorm.planning.compute import compute
from lightning_multinorm.planning.settings import Shape

NAMES = {
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756.5e12,
    "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA B200": 2250e12,
    "AMD Instinct MI300X": 1307.4e12,
    "NVIDIA L40": None,
    "NVIDIA A10": None,
    "NVIDIA GeForce RTX 4090 Laptop GPU": None,
    "NVIDIA GeForce RTX 4090 D": None,
    "NVIDIA GeForce RTX 3090 Ti": None,
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
}


@pytest.mark.parametrize(("name", "peak"), NAMES.items())
def test_a_peak_is_the_devices_or_none(name: str, peak: float | None) -> None:
    assert peak_flops(name, "bf16-true") == peak_flops(name, "16-mixed") == peak


def test_tf32_has_no_peak_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_flops("NVIDIA H200", "32-true") == 67e12
    assert peak_flops("NVIDIA H200", "64-true") is None
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert peak_flops("NVIDIA H200", "32-true") is None


@pytest.mark.parametrize("tied", [False, True])
def test_flops_of_a_module_are_those_of_a_plan(tied: bool) -> None:
    module = tiny_llama()
    module.llama_config.tie_word_embeddings = tied
    module.configure_model()
    parameters = sum(parameter.numel() for parameter in module.parameters())
    planned = compute(parameters, Shape.of(module.llama_config), LENGTH)
    assert module.flops_per_token(LENGTH) == planned.per_token


def test_utilisation_is_logged_where_the_peak_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def logged() -> tuple[dict[int | None, float], dict[int | None, float]]:
        recorder = Recorder()
        trainer(tmp_path, 2, logger=recorder, callbacks=[Throughput()]).fit(tiny_llama(), loader())
        return recorder.values("throughput/tokens_per_second"), recorder.values("throughput/mfu")

    assert not logged()[1]
    monkeypatch.setattr("lightning_multinorm.callbacks.throughput._full_rate", lambda *_: 1e6)
    rates, shares = logged()
    assert shares == pytest.approx({step: rate / 1e6 for step, rate in rates.items()}, rel=1e-5)


def test_full_rate_is_of_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "NVIDIA H200")
    module = SimpleNamespace(device=torch.device("cuda"), flops_per_token=lambda length: 1000 * length)
    batch = {"input_ids": torch.zeros(4, LENGTH)}
    run = SimpleNamespace(world_size=8, precision="bf16-true")
    assert _full_rate(run, module, batch) == pytest.approx(8 * 989.4e12 / (1000 * LENGTH))  # type: ignore[arg-type]
    for other in ({"device": torch.device("cpu")}, {"flops_per_token": None}):
        unknown = SimpleNamespace(**{**vars(module), **other})
        assert _full_rate(run, unknown, batch) == 0  # type: ignore[arg-type]
