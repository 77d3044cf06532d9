"""The command line: fit, validate, test and predict a LLaMA on text, plan it and prepare its data; configured in YAML.

Commands that need neither a trainer nor a model have options of their own instead: generate, export and report.

``python -m lightning_multinorm fit --config llama60m.yaml --config optimizer/adamw.yaml --trainer.max_steps 100``
"""

import errno
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_multinorm.arguments import OneLineParser
from lightning_multinorm.callbacks import (
    DocumentPerplexity,
    LossSpikes,
    NonFiniteGradients,
    NormConvergence,
    RandomState,
    RunSummary,
    RunTokenizer,
    TerminationCheckpoint,
    Throughput,
    TrainingProgress,
)
from lightning_multinorm.checkpoints.io import CheckpointFiles
from lightning_multinorm.configurations import resolve_configs
from lightning_multinorm.data import TextDataModule
from lightning_multinorm.data.prepared.command import Preparer
from lightning_multinorm.errors import UsageError
from lightning_multinorm.inference import export, generation
from lightning_multinorm.llama import LlamaPretraining
from lightning_multinorm.planning.command import Planner
from lightning_multinorm.report.command import report
from lightning_multinorm.resuming import last_checkpoint
from lightning_multinorm.strategies import end_communication

COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "generate": generation.main,
    "export": export.main,
    "report": report,
}
"""Commands with options of their own, given the arguments after their name; the first docstring line is their help."""


class PlanningTrainer(Trainer):
    """Lightning's Trainer, of which ``plan`` and ``prepare`` are two more subcommands."""

    plan = Planner.plan
    prepare = Preparer.prepare


class MultiNormCLI(LightningCLI):
    """LightningCLI with this project's callbacks always there and configurable, and one folder for each run."""

    def __init__(self, args: Sequence[str] | None = None, trainer_class: type[Trainer] = PlanningTrainer) -> None:
        super().__init__(
            LlamaPretraining,
            TextDataModule,
            trainer_class=trainer_class,
            parser_class=OneLineParser,
            seed_everything_default=0,
            args=None if args is None else list(args),
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # LlamaPretraining keeps its configuration in the checkpoint itself
            parser_kwargs={"epilog": _commands_help()},
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, and ``plan`` and ``prepare``, with the arguments that are not options."""
        own = {"model", "datamodule"}
        return {**LightningCLI.subcommands(), "plan": own, "prepare": own}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """What draws no random number says nothing of a seed; the checkpoint "last" gets its path."""
        super().parse_arguments(parser, args)
        config = self.config[self.config.subcommand]
        if config.get("ckpt_path") == "last":
            path = last_checkpoint(config, self.config.subcommand)
            config.ckpt_path = None if path is None else str(path)
            if args is None:  # the processes that Lightning starts for other devices take the same
                sys.argv += ["--ckpt_path", config.ckpt_path or "null"]
        if self.config.subcommand in ("plan", "prepare"):
            config.seed_everything = False

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would read the whole checkpoint, unchecked, for hyper-parameters it does not hold."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Sections ``run``, ``checkpoint``, and one for each callback that is always there."""
        parser.add_argument("--run.root", type=str, default="runs", help="Folder that all runs lie in.")
        parser.add_argument("--run.name", type=str, default="llama", help="Folder of this run's versions, in run.root.")
        parser.add_argument(
            "--run.background_checkpoints", type=bool, default=False, help="Write checkpoints beside the training."
        )
        parser.add_argument("--run.report", type=bool, default=True, help="Write report.html when the run has ended.")
        parser.add_lightning_class_args(TerminationCheckpoint, "checkpoint")
        parser.set_defaults(
            {"checkpoint.monitor": "val/loss", "checkpoint.filename": "best-{step}", "checkpoint.save_last": True}
        )
        parser.add_lightning_class_args(NonFiniteGradients, "nonfinite")  # before those that read gradients
        parser.add_lightning_class_args(LossSpikes, "spikes")
        parser.add_lightning_class_args(NormConvergence, "norm_convergence")
        parser.add_lightning_class_args(Throughput, "throughput")
        parser.add_lightning_class_args(TrainingProgress, "progress")
        parser.add_lightning_class_args(DocumentPerplexity, "perplexity")

    def instantiate_classes(self) -> None:
        """Trainer, model and data; a value that one of them refuses is an error of usage."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise UsageError(str(error)) from error

    def before_instantiate_classes(self) -> None:
        """Only a training run has a folder to keep its configuration in."""
        if self.subcommand != "fit":
            self.save_config_callback = None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer, with loggers in the run's folder unless the configuration names its own."""
        if self.subcommand == "plan":  # no trainer: it would look for the devices
            return cast(Trainer, Planner(self.config.plan.trainer))
        if self.subcommand == "prepare":
            return cast(Trainer, Preparer())
        config = self.config_init[self.subcommand]
        _check_devices(config.trainer)
        logger = config.trainer.logger
        if logger in (None, True):
            logger = _loggers(config.run.root, config.run.name) if self.subcommand == "fit" else False
        own = [RandomState(), RunTokenizer(), RunSummary(config.run.report)]
        callbacks = [*(config.trainer.callbacks or []), *own]
        if logger:
            callbacks.append(LearningRateMonitor("step"))
        batches, interval = config.trainer.max_steps * config.trainer.accumulate_grad_batches, _interval(config.trainer)
        if 0 < batches < interval:
            rank_zero_info(f"The run is shorter than val_check_interval={interval}; it is validated once, at its end.")
            kwargs["val_check_interval"] = batches
        if config.trainer.enable_progress_bar is False:
            config.progress.disable()  # Lightning would refuse the combination
        plugins = config.trainer.plugins or []
        kwargs["plugins"] = [
            CheckpointFiles(config.run.background_checkpoints),
            *(plugins if isinstance(plugins, list) else [plugins]),
        ]
        return super().instantiate_trainer(logger=logger, callbacks=callbacks, enable_progress_bar=True, **kwargs)


def _commands_help() -> str:
    """The end of the page of help: the commands of which Lightning's parser knows nothing."""
    lines = [f"{name}: {str(command.__doc__).splitlines()[0]}" for name, command in COMMANDS.items()]
    return f"Commands with options of their own, told by --help after their name: {' '.join(lines)}"


def _check_devices(trainer: Namespace) -> None:
    """What Lightning would refuse without a word of what to do.

    Raises:
        UsageError: for an unknown strategy, a GPU that is not there, or fewer devices than processes of torchrun.
    """
    strategies = ["auto", *StrategyRegistry.available_strategies()]
    if isinstance(trainer.strategy, str) and trainer.strategy not in strategies:
        close = get_close_matches(trainer.strategy, strategies, n=1)
        hint = f"did you mean {close[0]}?" if close else "use auto, ddp, fsdp2, hsdp, tp or fsdp"
        raise UsageError(f"trainer.strategy={trainer.strategy} is not known; {hint}")
    if trainer.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UsageError(
            f"trainer.accelerator={trainer.accelerator}, but torch finds no GPU; set it to auto or cpu, or install a "
            "torch that fits the driver (nvidia-smi)"
        )
    started = int(os.environ["LOCAL_WORLD_SIZE"]) if dist.is_torchelastic_launched() else 0
    if (devices := _devices(trainer)) < started:
        raise UsageError(
            f"trainer.devices={trainer.devices} is {devices} on this machine, but torchrun has started {started} "
            f"processes; give --trainer.devices {started}, or torchrun --nproc-per-node {devices}"
        )


def _devices(trainer: Namespace) -> int:
    """How many devices the processes of this machine are to use."""
    asked = trainer.devices
    if isinstance(asked, str) and asked.lstrip("-").isdigit():
        asked = int(asked)
    if asked in ("auto", -1):
        on_gpu = trainer.accelerator != "cpu" and torch.cuda.is_available()
        return torch.cuda.device_count() if on_gpu else 1
    return asked if isinstance(asked, int) else len(asked if isinstance(asked, list) else asked.split(","))


def _interval(trainer: Namespace) -> int:
    """Batches between validations, 0 where it is a fraction or a time."""
    return trainer.val_check_interval if type(trainer.val_check_interval) is int else 0


def _loggers(root: str, name: str) -> list[Logger]:
    """TensorBoard and CSV, in a new folder ``root/name/version_N``."""
    folder = Path(root, name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UsageError(
            f"the run's folder {folder} cannot be written: {error.strerror}; name another --run.root"
        ) from None
    tensorboard = TensorBoardLogger(root, name=name)
    return [tensorboard, CSVLogger(root, name=name, version=Path(tensorboard.log_dir).name)]


def _quieten() -> None:
    """Keep to oneself what Lightning would say in every run and no user of this command line can act on."""
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
    # The folder holds the TensorBoard file and the configuration; it is new, and nothing in it is deleted.
    warnings.filterwarnings("ignore", "Experiment logs directory .* exists and is not empty")
    # ``last.ckpt`` is written anew each time, as it is meant to be.
    warnings.filterwarnings("ignore", "Detected an existing checkpoint in .*last", UserWarning)
    # A run that goes on does so in a version of its own, and looks for its best checkpoint anew.
    warnings.filterwarnings("ignore", "The dirpath has changed from", UserWarning)
    advertisement = "\N{ELECTRIC LIGHT BULB} Tip: For seamless cloud"
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(lambda record: not record.getMessage().startswith(advertisement))


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; an error of usage ends in one line and exit status 2.

    Args:
        args: arguments; default: those of the process.
    """
    _quieten()
    given = sys.argv[1:] if args is None else list(args)
    try:
        if given and given[0] in COMMANDS:
            return COMMANDS[given[0]](given[1:])
        if args is None:
            sys.argv[1:] = resolve_configs(given)  # where Lightning and the processes that it starts look
        MultiNormCLI(None if args is None else resolve_configs(given))
        if args is None:
            end_communication()
    except (UsageError, MisconfigurationException) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
