"""Plan against measurement: the most that real training steps hold at a time, next to what ``plan`` says of them.

``python -m benchmarks.memory [--model tiny 60m] [--precision 32-true bf16-true bf16-mixed] [--batch 4x256]``

A run is `LlamaPretraining` under Lightning's own Trainer on the CPU, three optimizer steps on random tokens, observed
from before the model is built to the end; measured are the bytes of all tensors, as torch's allocator counts them.
Prints a table, and writes what it measured, and the machine, into ``benchmarks/results/memory_MODEL.json``.
"""

import argparse
import gc
import json
import logging
import warnings
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from benchmarks.machine import describe
from benchmarks.optimizer_step.memory import peak_allocated
from lightning_multinorm import SWAN, LlamaPretraining, SinkGD, parameter_groups
from lightning_multinorm.planning import MicroBatch, Plan, Precision, plan

RESULTS = Path(__file__).parent / "results"
OPTIMIZERS = {
    "sinkgd": SinkGD,
    "adamw": partial(torch.optim.AdamW, fused=True),
    "swan": SWAN,
    "stateless-released": SinkGD,  # policy stateless, gradients released inside the backward pass
}
TINY = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
STEPS = 3


def module(model: str, optimizer: str, loss_chunk: int | None) -> LlamaPretraining:
    """One of the papers' sizes, or a small model."""
    options: dict[str, Any] = {"size": None, "config": TINY} if model == "tiny" else {"size": model}
    options["loss_chunk"] = loss_chunk
    if optimizer == "stateless-released":
        options |= {"policy": "stateless", "gradient_release": True}
    return LlamaPretraining(optimizer=OPTIMIZERS[optimizer], scheduler=None, **options)  # type: ignore[arg-type]


def measure(model: str, optimizer: str, batch: MicroBatch, precision: str) -> int:
    """Most bytes that tensors took at a time in a run from its beginning to its end."""
    torch.manual_seed(0)
    lightning_module = module(model, optimizer, batch.loss_chunk)
    tokens = torch.randint(lightning_module.llama_config.vocab_size, (batch.sequences, batch.length))
    batches = [{"input_ids": tokens, "labels": tokens.roll(-1, dims=1)}] * (STEPS * batch.accumulate)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        max_steps=STEPS,
        accumulate_grad_batches=batch.accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader: DataLoader[Any] = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    gc.collect()  # tensors of the run before, if freed in this one, would count as negative
    peak = peak_allocated(lambda: trainer.fit(lightning_module, loader))
    return peak + 2 * tokens.nbytes  # were there before


def planned(model: str, optimizer: str, batch: MicroBatch, precision: str) -> Plan:
    """The plan of the same run."""
    lightning_module = module(model, optimizer, batch.loss_chunk)
    with torch.device("meta"):
        lightning_module.configure_model()
    groups = parameter_groups(lightning_module, policy=lightning_module.policy)
    config = lightning_module.llama_config
    numbers = Precision.named(precision)
    make, released = [OPTIMIZERS[optimizer]], lightning_module.gradient_release
    return plan(lightning_module, config, groups, make, batch, numbers, device="cpu", released=released)


def compare(model: str, optimizer: str, batch: MicroBatch, precision: str) -> dict[str, Any]:
    """A row of the table."""
    run = planned(model, optimizer, batch, precision)
    [of_optimizer] = run.optimizers
    peak, measured = of_optimizer.peak, measure(model, optimizer, batch, precision)
    largest = run.shape.vocabulary * run.shape.hidden * run.precision.weights.itemsize
    over = {
        "largest_gradient_bytes": largest,
        "measured_over_weights_and_activations": measured - peak.weights - peak.activations - peak.logits,
    }
    return {
        "model": model,
        "optimizer": optimizer,
        "precision": precision,
        **asdict(batch),
        "planned_bytes": peak.total,
        "measured_bytes": measured,
        "deviation": round(peak.total / measured - 1, 4),
        "moment": peak.name,
        **over,
        "parts": {name: size for name, size in asdict(peak).items() if name != "name" and size},
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """Planned next to measured."""
    columns = ("optimizer", "precision", "micro-batch", "peak in the", "loss in", "plan", "measured", "off by")
    view = Table(*columns, title=f"{rows[0]['model']}, MiB", box=SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        batch = f"{row['sequences']}×{row['length']}" + (f"×{row['accumulate']}" if row["accumulate"] > 1 else "")
        sizes = (f"{row[key] / 2**20:.1f}" for key in ("planned_bytes", "measured_bytes"))
        view.add_row(
            row["optimizer"],
            row["precision"],
            batch,
            row["moment"].rpartition(": ")[2],
            str(row["loss_chunk"] or "one"),
            *sizes,
            f"{row['deviation']:+.1%}",
        )
    return view


def main() -> None:
    """Parse the command line, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["tiny", "60m"], help="tiny, or a size of the papers")
    parser.add_argument("--precision", nargs="+", default=["32-true", "bf16-true", "bf16-mixed"])
    parser.add_argument("--optimizer", nargs="+", choices=OPTIMIZERS, default=["sinkgd", "adamw", "stateless-released"])
    parser.add_argument(
        "--batch",
        nargs="+",
        default=["4x256", "4x256x2", "1x16x2", "1x16"],
        help="sequences x tokens [x micro-batches of a step]; large ones peak at the loss, small ones elsewhere",
    )
    parser.add_argument("--loss_chunk", nargs="+", type=int, default=[512], help="tokens; 0 for all at once")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for model in options.model:
        rows = []
        for batch, chunk in product(options.batch, options.loss_chunk):
            for precision in options.precision:
                for optimizer in options.optimizer:
                    sizes = dict(zip(("sequences", "length", "accumulate"), map(int, batch.split("x")), strict=False))
                    size = MicroBatch(**sizes, loss_chunk=chunk or None)
                    if size.accumulate == 1 or optimizer != "stateless-released":
                        rows.append(compare(model, optimizer, size, precision))
        Console().print(table(rows))
        options.out.mkdir(parents=True, exist_ok=True)
        result = {"machine": describe(), "steps": STEPS, "runs": rows}
        (options.out / f"memory_{model}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
