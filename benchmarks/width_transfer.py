"""Whether a learning rate found on a narrow LLaMA carries over to a wide one: SinkGD's, by three ways to scale it.

``python -m benchmarks.width_transfer [--widths 128 256 512] [--steps 300] [--only plain operator base_width]``

Small models of two layers on the quickstart's data, the same batches for all. Of every way and width the loss is found
at the rates around the best, on a grid of factors of two, until the best is no longer at an edge; runs that the results
already hold are not made again. Prints a table, and writes ``benchmarks/results/width_transfer.json`` after each run,
and a picture of losses against rates beside it.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.machine import describe
from lightning_multinorm import LlamaPretraining, SinkGD, TextDataModule
from lightning_multinorm.llama.loss import token_losses
from lightning_multinorm.schedules import WarmupCosine

RESULTS = Path(__file__).parent / "results" / "width_transfer.json"
BASE = 128
ROWS, LENGTH, VALIDATION = 8, 64, 32  # rows of a batch, tokens of a row, batches of validation
START = 0.01
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "base_width": {"base_width": BASE},
    "operator": {"base_width": BASE, "optimizer": {"rescale": "operator", "matrix_lr_scale": 2.0}},
}
"""operator: the spectral norm sets the size of the matrices' updates, and base_width that of the head's."""

Batch = dict[str, Tensor]


def batches(steps: int) -> tuple[list[Batch], list[Batch]]:
    """The batches of training and of validation; the same in every run."""
    data = TextDataModule(
        source="stdlib", tokenizer="bpe", vocab_size=4096, sequence_length=LENGTH, batch_size=ROWS,
        validation_fraction=0.02, validation_tokens=2 * VALIDATION * ROWS * LENGTH,
    )  # fmt: skip
    data.trainer = Trainer(max_steps=steps, logger=False, accelerator="cpu")  # its train_dataloader asks for the steps
    data.prepare_data()
    data.setup("fit")
    found = []
    for loader, count in ((data.train_dataloader(), steps), (data.val_dataloader(), VALIDATION)):
        iterator = iter(loader)
        found.append([next(iterator) for _ in range(count)])
    return found[0], found[1]


def train(width: int, option: str, lr: float, data: tuple[list[Batch], list[Batch]]) -> float:
    """The final validation loss in nats per token; infinite for a run that diverges."""
    torch.manual_seed(1)
    scheme = OPTIONS[option]
    shape = {
        "vocab_size": 4096, "hidden_size": width, "intermediate_size": width * 11 // 4, "num_hidden_layers": 2,
        "num_attention_heads": width // 32, "max_position_embeddings": LENGTH,
    }  # fmt: skip
    module = LlamaPretraining(
        size=None,
        config=shape,
        optimizer=lambda groups: SinkGD(groups, lr=lr, **scheme.get("optimizer", {})),
        scheduler=None,
        base_width=scheme.get("base_width"),
    )
    module.configure_model()
    optimizer: Any = module.configure_optimizers()
    schedule = WarmupCosine(optimizer, total_steps=len(data[0]))
    for batch in data[0]:
        loss = token_losses(module(batch["input_ids"], batch.get("position_ids")), batch["labels"]).mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if not math.isfinite(loss.item()):
            return math.inf
    with torch.no_grad():
        losses = [token_losses(module(b["input_ids"], b.get("position_ids")), b["labels"]).mean() for b in data[1]]
    return torch.stack(losses).mean().item()


class Sweep:
    """Runs of one number of steps, kept in a file."""

    def __init__(self, out: Path, steps: int) -> None:
        self.out, self.steps = out, steps
        kept = json.loads(out.read_text()) if out.exists() else {}
        self.runs: list[dict[str, Any]] = kept.get("runs", []) if kept.get("steps") == steps else []
        self.data: tuple[list[Batch], list[Batch]] | None = None

    def losses(self, width: int, option: str) -> dict[float, float]:
        """By rate."""
        own = [run for run in self.runs if (run["width"], run["option"]) == (width, option)]
        return {
            run["lr"]: math.inf if run["loss"] is None else run["loss"] for run in sorted(own, key=lambda r: r["lr"])
        }

    def best(self, width: int, option: str) -> float:
        """The rate of the lowest loss."""
        losses = self.losses(width, option)
        return min(losses, key=lambda lr: losses[lr])

    def around(self, width: int, option: str, lr: float) -> None:
        """Runs at a rate, at half and at twice it, and on until the best has both neighbours."""
        wanted = [lr, lr / 2, lr * 2]
        while wanted:
            for rate in wanted:
                self._run(width, option, rate)
            best, found = self.best(width, option), self.losses(width, option)
            wanted = [rate for rate in (best / 2, best * 2) if rate not in found]

    def _run(self, width: int, option: str, lr: float) -> None:
        if lr in self.losses(width, option):
            return
        twin = self.losses(width, "plain").get(lr) if option == "base_width" and width == BASE else None
        started = time.monotonic()
        if twin is None:
            self.data = self.data or batches(self.steps)
            twin = train(width, option, lr, self.data)
        seconds = round(time.monotonic() - started, 1)
        print(f"width {width}, {option}, lr {lr:g}: {twin:.4f} nats/token, {seconds} s", flush=True)
        loss = twin if math.isfinite(twin) else None
        self.runs.append({"width": width, "option": option, "lr": lr, "loss": loss, "seconds": seconds})
        self.write()

    def write(self) -> None:
        """Runs, and what comes of the rate that is best at the base width."""
        setting = {"base_width": BASE, "tokens_per_step": ROWS * LENGTH, "steps": self.steps, "options": OPTIONS}
        result = {"machine": describe(), **setting, "transfer": self.transfer(), "runs": self.runs}
        self.out.parent.mkdir(exist_ok=True)
        self.out.write_text(json.dumps(result, indent=1) + "\n")

    def transfer(self) -> list[dict[str, Any]]:
        """For every way and width: the best loss, and that at the rate which is best at the base width."""
        found = []
        for option in OPTIONS:
            if not self.losses(BASE, option):
                continue
            chosen = self.best(BASE, option)
            for width in sorted({run["width"] for run in self.runs if run["option"] == option}):
                losses, best = self.losses(width, option), self.best(width, option)
                carried = losses.get(chosen, math.inf)
                row = {"option": option, "width": width, "best_lr": best, "best_loss": losses[best]}
                if math.isfinite(carried):
                    row |= {"carried_lr": chosen, "carried_loss": carried, "excess": carried / losses[best] - 1}
                found.append(row)
        return found


def table(sweep: Sweep) -> Table:
    """Loss at the rate of the base width, beside each width's own best."""
    view = Table("scaling", "width", "lr", "loss at it", "best lr", "loss at that", "above")
    for row in sweep.transfer():
        carried = ["–"] * 3
        if "excess" in row:
            carried = [f"{row['carried_lr']:g}", f"{row['carried_loss']:.3f}", f"{row['excess']:.1%}"]
        best = f"{row['best_lr']:g}", f"{row['best_loss']:.3f}"
        view.add_row(row["option"], str(row["width"]), *carried[:2], *best, carried[2])
    return view


def draw(sweep: Sweep, folder: Path) -> None:
    """Loss against rate, one panel for each way, one line for each width; needs Matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "width_transfer"})
    from matplotlib import pyplot as plt

    options = [option for option in OPTIONS if any(run["option"] == option for run in sweep.runs)]
    figure, axes = plt.subplots(
        1, len(options), figsize=(3.4 * len(options), 3.2), sharex=True, sharey=True, squeeze=False
    )
    everywhere = sorted({run["width"] for run in sweep.runs})
    colours = {width: plt.get_cmap("viridis")(k / len(everywhere)) for k, width in enumerate(everywhere)}
    lines: dict[int, Any] = {}
    for panel, option in zip(axes[0], options, strict=True):
        widths = sorted({run["width"] for run in sweep.runs if run["option"] == option})
        for width in widths:
            points = [(lr, loss) for lr, loss in sweep.losses(width, option).items() if math.isfinite(loss)]
            (lines[width],) = panel.plot(*zip(*points, strict=True), "o-", color=colours[width], markersize=4)
        panel.axvline(sweep.best(widths[0], option), color="grey", linewidth=0.8, linestyle=":")
        panel.set(xscale="log", xlabel="learning rate", title=option)
        rates = sorted({run["lr"] for run in sweep.runs})
        panel.set_xticks(rates, [f"{lr:g}" for lr in rates], rotation=90)
        panel.minorticks_off()
        panel.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("validation loss (nats per token)")
    labels = [f"width {width}" for width in lines]
    axes[0][-1].legend([*lines.values()], labels, frameon=False, loc="upper right")
    figure.tight_layout()
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"{sweep.out.stem}.{suffix}", dpi=150)
    plt.close(figure)


def main() -> None:
    """Parse the command line, run what is missing, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--only", nargs="+", choices=OPTIONS, default=list(OPTIONS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    sweep = Sweep(options.out, options.steps)
    for width in sorted({BASE, *options.widths}):
        for option in options.only:
            sweep.around(width, option, START if width == BASE else sweep.best(BASE, option))
    sweep.write()
    Console().print(table(sweep))
    draw(sweep, options.out.parent)


if __name__ == "__main__":
    main()
