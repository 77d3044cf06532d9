"""Logs of runs that never were, written by the logger that writes real ones."""

import math
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.loggers import CSVLogger

KINDS = ("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", "self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj")
BATCH = 1000  # tokens in a step


def metrics(step: int, layers: int, final: float) -> dict[str, float]:
    """Of the norms and the updates, in one step."""
    found: dict[str, float] = {}
    for layer in range(layers):
        for index, kind in enumerate(KINDS):
            name = f"model.model.layers.{layer}.{kind}.weight"
            size = (1 + layer / layers) * (1 + index / 5) * (1 + 0.2 * math.sin(step + index)) / (1 + step / 40)
            for iteration in range(1, 6):
                found[f"norm_convergence/{name}/row/{iteration}"] = 0.5 * size * 8.0 ** -(iteration - 1)
                found[f"norm_convergence/{name}/column/{iteration}"] = 2e-8
            found[f"norm_convergence/{name}/row"] = found[f"norm_convergence/{name}/row/5"]
            found[f"norm_convergence/{name}/column"] = 2e-8
            found[f"gradient_norm/{name}"] = size
            found[f"update_to_weight/{name}"] = 1e-3 * size
            found[f"tail_index/{name}"] = 2 + size
            found[f"dead_rows/{name}"] = 0
            found[f"dead_columns/{name}"] = float(layer == 1 and step > 50)
            found[f"iterations/{name}"] = 5
    return found


def loss(step: int, final: float) -> float:
    """Falls towards its final value as one over the step."""
    return final + 300 / (step + 100)


def write(
    root: Path,
    name: str,
    *,
    steps: int = 200,
    first: int = 0,
    final: float = 3.0,
    rate: float = 100.0,
    layers: int = 3,
    watched: bool = True,
    config: dict[str, Any] | None = None,
    version: int = 0,
) -> Path:
    """A run of so many steps, validated four times and watched ten times.

    Args:
        root: of runs.
        name: of this one.
        steps: of the run.
        first: step, of a run that was resumed.
        final: what its loss falls to; its last one is 300 / (steps + 100) above.
        rate: tokens per second.
        layers: of the model.
        watched: by NormConvergence.
        config: kept in config.yaml; default: none.
        version: of the folder.

    Returns:
        Its folder.
    """
    logger = CSVLogger(root, name=name, version=f"version_{version}")
    every = max(1, (steps - first) // 40)
    for step in range(first, steps, every):
        tokens = (step + 1) * BATCH
        noise = 0.05 * math.sin(7 * step)
        train = {"train/loss": loss(step, final) + noise, "train/gradient_norm": 1 + noise, "lr-SinkGD/matrix": 0.02}
        spent = {"tokens": tokens, "seconds": tokens / rate, "throughput/tokens_per_second": rate, "epoch": 0}
        logger.log_metrics({**train, **spent, "memory/peak_mib": 900.0, "memory/optimizer_state_mib": 6.0}, step)
        if step == first:
            logger.log_metrics({"parameters": 1_850_000}, step)
        if watched and (step - first) // every % 4 == 0:
            logger.log_metrics(metrics(step, layers, final), step)
    for step in range(first + (steps - first) // 4 - 1, steps, (steps - first) // 4):
        value = loss(step, final)
        logger.log_metrics(
            {"val/loss": value, "val/perplexity": math.exp(value), "val/bits_per_byte": value / 2.4}, step
        )
    logger.save()
    folder = Path(logger.log_dir)
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder
