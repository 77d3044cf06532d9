"""The contenders of `benchmarks.throughput`: each builds a model, trains it for some steps, and times them."""

import contextlib
import importlib.util
import io
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from lightning_multinorm import LlamaPretraining, SinkGD, parameter_groups
from lightning_multinorm.cli import MultiNormCLI, PlanningTrainer
from lightning_multinorm.configurations import resolve_configs
from lightning_multinorm.llama.loss import token_losses

WARM = 4
"""Steps before those that are timed: the first make states and, if asked to, compile."""


@dataclass(frozen=True)
class Setting:
    """What all contenders train, and how."""

    model: str
    steps: int
    precision: str
    compiled: bool
    length: int
    rows: int = 1

    def of(self, **changes: int) -> Self:
        """The same with other rows or steps."""
        return replace(self, **changes)

    @property
    def device(self) -> torch.device:
        """A GPU if there is one."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and products."""
        return torch.bfloat16 if self.precision == "bf16-true" else torch.float32

    @property
    def config(self) -> str:
        """The packaged configuration."""
        return "quickstart.yaml" if self.model == "nano" else f"llama{self.model}.yaml"

    def told(self) -> dict[str, Any]:
        """For a results file."""
        return {name: getattr(self, name) for name in ("model", "length", "steps", "precision", "compiled")}

    def module(self) -> LlamaPretraining:
        """Of the configuration, not yet built."""
        with tempfile.TemporaryDirectory() as folder:
            return command(self, folder, "sinkgd").model

    def flops_per_token(self) -> int:
        """Of training."""
        module = self.module()
        with torch.device("meta"):
            module.configure_model()
        return module.flops_per_token(self.length)

    def batch(self) -> dict[str, Tensor]:
        """Rows of random tokens, packed: every label counts."""
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(4096, (self.rows, self.length + 1), generator=generator)
        return {"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


class Clock(Callback):
    """When the step after `WARM` begins, and when the one after the last does."""

    def __init__(self, steps: int) -> None:
        self.steps, self.times = steps, list[float]()

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step in (WARM, WARM + self.steps):
            self.times.append(now())


class Idle(PlanningTrainer):
    """A trainer that is built as configured, and left to be called."""

    def fit(self, model: Any, datamodule: Any = None, ckpt_path: str | None = None) -> None:  # type: ignore[override]
        """Not yet."""


def now() -> float:
    """Seconds, when all that was asked for is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def command(setting: Setting, folder: str, optimizer: str) -> MultiNormCLI:
    """What ``fit`` builds."""
    options = {
        "run.root": folder,
        "run.report": "false",
        "trainer.accelerator": "auto",
        "trainer.devices": "1",
        "trainer.max_steps": str(WARM + setting.steps + 1),
        "trainer.accumulate_grad_batches": "1",
        "trainer.precision": setting.precision,
        "trainer.log_every_n_steps": "10",
        "trainer.limit_val_batches": "0",
        "norm_convergence.every_n_steps": "10",
        "model.compile": str(setting.compiled).lower(),
    }
    configs = [setting.config] + ([f"optimizer/{optimizer}.yaml"] if optimizer != "sinkgd" else [])
    args = ["fit", *(part for name in configs for part in ("--config", name))]
    args += [part for name, value in options.items() for part in (f"--{name}", value)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return MultiNormCLI(resolve_configs(args), trainer_class=Idle)


def trainer(setting: Setting, optimizer: str) -> float:
    """This project's."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    clock, batches = Clock(setting.steps), [setting.batch()] * (WARM + setting.steps + 1)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        cli = command(setting, folder, optimizer)
        cli.trainer.callbacks.append(clock)  # type: ignore[attr-defined]
        loader: DataLoader[Any] = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
        Trainer.fit(cli.trainer, cli.model, loader)
    begun, ended = clock.times
    return ended - begun


def loop(setting: Setting, model: nn.Module, losses: Callable[[Tensor, Tensor], Tensor], optimizer: Any) -> float:
    """The plain one."""
    batch = {name: tensor.to(setting.device) for name, tensor in setting.batch().items()}
    begun = 0.0
    for step in range(WARM + setting.steps):
        if step == WARM:
            begun = now()
        losses(batch["input_ids"], batch["labels"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return now() - begun


def plain(setting: Setting, optimizer: str) -> float:
    """transformers' model in a plain loop."""
    config = setting.module().llama_config
    with setting.device:
        model = LlamaForCausalLM(config).to(setting.dtype).train()
    if setting.compiled:
        for block in model.model.layers:
            block.compile()
    return loop(
        setting,
        model,
        lambda tokens, labels: token_losses(model(input_ids=tokens, use_cache=False).logits, labels).mean(),
        SinkGD(parameter_groups(model)) if optimizer == "sinkgd" else fused_adamw(model),
    )


def litgpt(setting: Setting) -> float:
    """litgpt's model and loss in a plain loop."""
    from litgpt.model import GPT, Config  # type: ignore[import-not-found]
    from litgpt.utils import chunked_cross_entropy  # type: ignore[import-not-found]

    llama = setting.module().llama_config
    config = Config(
        block_size=setting.length,
        vocab_size=llama.vocab_size,
        padded_vocab_size=llama.vocab_size,
        n_layer=llama.num_hidden_layers,
        n_head=llama.num_attention_heads,
        n_embd=llama.hidden_size,
        intermediate_size=llama.intermediate_size,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=1e-6,
        mlp_class_name="LLaMAMLP",
    )
    with setting.device:
        model = GPT(config).to(setting.dtype).train()
    if setting.compiled:
        for block in model.transformer.h:
            block.compile()
    return loop(setting, model, lambda tokens, labels: chunked_cross_entropy(model(tokens), labels), fused_adamw(model))


def fused_adamw(model: nn.Module) -> torch.optim.Optimizer:
    """torch's, in one kernel."""
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)


def litgpt_is_here() -> bool:
    """Whether it is installed."""
    return importlib.util.find_spec("litgpt") is not None


CONTENDERS: dict[str, Callable[[Setting], float]] = {
    "trainer sinkgd": partial(trainer, optimizer="sinkgd"),
    "trainer adamw": partial(trainer, optimizer="adamw"),
    "plain adamw": partial(plain, optimizer="adamw"),
    "plain sinkgd": partial(plain, optimizer="sinkgd"),
    "litgpt adamw": litgpt,
}
