"""The LightningModule that pretrains a LLaMA. Data and optimizers meet here, and in the command line."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_multinorm.data import TextDataModule
from lightning_multinorm.errors import UsageError
from lightning_multinorm.flops import training_flops
from lightning_multinorm.layouts import flat_slices
from lightning_multinorm.layouts.clipping import clip_
from lightning_multinorm.llama.loss import IGNORE, TokenLoss, token_losses
from lightning_multinorm.llama.model import Llama
from lightning_multinorm.llama.parallel import build_llama
from lightning_multinorm.llama.sizes import Size, config_fields, llama_config
from lightning_multinorm.optim import SinkGD, parameter_groups
from lightning_multinorm.optim.base import MultiNormOptimizer
from lightning_multinorm.optim.groups import Policy, Rule
from lightning_multinorm.optim.hyperparameters import hyperparameters, restore_hyperparameters
from lightning_multinorm.optim.rates import apply_lr_factors, transfer_rates
from lightning_multinorm.optim.release import release_gradients
from lightning_multinorm.schedules import WarmupCosine, WarmupSchedule
from lightning_multinorm.strategies import ShardedStrategy, check_release, is_flat

Batch = dict[str, Tensor]
_SHAPE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "tie_word_embeddings",
)


class LlamaPretraining(LightningModule):
    """Pretrains transformers' `LlamaForCausalLM` on packed rows of tokens.

    A batch is a dictionary with "input_ids" (B, T), "labels" (B, T), already shifted, -100 where nothing is to be
    predicted, and optionally "bytes" (B,), the UTF-8 length of the text that the labels stand for, and "position_ids"
    (B, T), which restart where attention is not to look further back.

    Logs ``train/loss`` in nats per token, and ``val/loss``, ``val/perplexity``, ``val/bits_per_byte`` (``test/...``
    likewise), exact over batches and ranks.

    Args:
        size: a size of the papers' benchmark: 60m, 130m, 350m, 1b or 7b. Null starts from the 60m's fields.
        config: fields of transformers' `LlamaConfig` that differ from the size's.
        optimizer: called with parameter groups; by class path in YAML.
        scheduler: called with the optimizer, stepped after every optimizer step; null for a constant rate. A
            `WarmupSchedule` without total_steps gets the trainer's.
        policy: which rule updates which kind of parameter: "paper" (default), "stateless" (no parameter keeps
            optimizer state) or a mapping of kinds to rules; see `parameter_groups`.
        rules: regular expressions on parameter names to rules ("multinorm", "adam", ...), before the policy; first
            match wins.
        lr_scales: kinds ("matrix", "embedding", "head", "norm", "bias") or regular expressions on parameter names to
            factors on the effective learning rate; first match wins. Works with any optimizer.
        base_width: the hidden_size that the learning rate was tuned at. The rate of matrices and of the output head
            is then scaled for this model's as `rates.transfer_rates` says, the rest kept: by base_width / hidden_size
            under SinkGD and AdamW, as ``lr_scales={"matrix": ..., "head": ...}`` would; under SinkGD with
            ``rescale="operator"`` that of the head alone. Null (default) scales nothing. Factors of ``lr_scales``
            are multiplied with it.
        activation_checkpointing: keep only the inputs of blocks for the backward pass, and compute the rest again:
            much less memory for a third more work. Default: False.
        gradient_release: update each parameter inside the backward pass and free its gradient at once; on one device or
            under fsdp2, without accumulation, clipping and float16. Default: False.
        loss_chunk: tokens whose logits exist at a time; output head and loss are computed in chunks of so many. Null
            for those of all tokens at once, which take as much memory as many layers do. Default: 512.
        compile: let `torch.compile` compile each block: faster steps after some minutes of compilation. Checkpoints
            stay as they are, with it or without. Default: False.

    Raises:
        UsageError: for an unknown size or field of the configuration, and a base_width or loss_chunk below 1.
    """

    def __init__(
        self,
        size: Size | None = "60m",
        config: dict[str, Any] | None = None,
        optimizer: OptimizerCallable = SinkGD,
        scheduler: LRSchedulerCallable | None = WarmupCosine,
        policy: Policy = "paper",
        rules: dict[str, Rule] | None = None,
        lr_scales: dict[str, float] | None = None,
        base_width: int | None = None,
        activation_checkpointing: bool = False,
        gradient_release: bool = False,
        loss_chunk: int | None = 512,
        compile: bool = False,
    ) -> None:
        super().__init__()
        if loss_chunk is not None and loss_chunk < 1:
            raise UsageError(f"model.loss_chunk={loss_chunk} must be at least 1, or null for all tokens at once")
        # No save_hyperparameters(): the command line would let a checkpoint's values beat those given to it.
        self.llama_config = llama_config(size, config)
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.policy = policy
        self.rules = rules
        self.lr_scales = lr_scales
        if base_width is not None and base_width < 1:
            raise UsageError(f"model.base_width={base_width} must be a width, or null")
        self.base_width = base_width
        self.activation_checkpointing = activation_checkpointing
        self.gradient_release = gradient_release
        self.loss_chunk = loss_chunk
        self.compile_blocks = compile  # a module's own ``compile`` is a method
        self.model: Llama | None = None
        self.val = TokenLoss()
        self.test = TokenLoss()
        self._parameter_count = 0
        self._configured: list[dict[str, Any]] = []

    def configure_model(self) -> None:
        """Build the model once, in the precision and spread over the devices as the trainer's strategy asks for."""
        if self.model is not None:
            return
        spread: dict[str, Any] = {}
        strategy = self._trainer.strategy if self._trainer is not None else None
        if isinstance(strategy, ShardedStrategy):
            spread = {
                "data_mesh": strategy.data_mesh,
                "tensor_mesh": strategy.tensor_mesh,
                "precision": strategy.mixed_precision,
                "reshard_after_forward": strategy.reshard_after_forward,
            }
        device = torch.get_default_device() if strategy is None else strategy.root_device
        self.model = build_llama(self.llama_config, device, compiled=self.compile_blocks, **spread)
        self._parameter_count = sum(
            parameter.numel() for parameter in self.model.parameters()
        )  # before FSDP1 cuts them
        if self.activation_checkpointing:
            self.model.activation_checkpointing_enable()

    def setup(self, stage: str) -> None:
        """Refuse text that does not fit the model.

        Raises:
            UsageError: for a tokenizer with more ids than the vocabulary, or rows longer than the positions.
        """
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, TextDataModule):
            return
        config = self.llama_config
        if data.text_vocab_size > config.vocab_size:
            raise UsageError(
                f"the tokenizer has {data.text_vocab_size} ids, the model only {config.vocab_size}: raise "
                f"--model.config.vocab_size to {data.text_vocab_size}, or take a smaller tokenizer"
            )
        if data.sequence_length > config.max_position_embeddings:
            raise UsageError(
                f"data.sequence_length={data.sequence_length} is longer than "
                f"model.config.max_position_embeddings={config.max_position_embeddings}; change one of them"
            )

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Logits (B, T, vocabulary) for tokens (B, T); positions that restart keep attention inside documents."""
        assert self.model is not None, "configure_model() has not run"
        return self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits

    def flops_per_token(self, length: int) -> int:
        """FLOPs of training on a token of sequences of so many, see `flops.training_flops`."""
        config = self.llama_config
        looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
        width = config.num_attention_heads * (config.head_dim or config.hidden_size // config.num_attention_heads)
        return sum(training_flops(self._parameter_count - looked_up, config.num_hidden_layers, width, length))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss per predicted token."""
        total, _ = self._losses(batch)
        loss = total / (batch["labels"] != IGNORE).sum()
        self.log("train/loss", loss.detach(), sync_dist=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the validation loss."""
        self._evaluate(self.val, batch)

    def on_validation_epoch_end(self) -> None:
        """Log the validation loss."""
        self._log_evaluation("val", self.val)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the test loss."""
        self._evaluate(self.test, batch)

    def on_test_epoch_end(self) -> None:
        """Log the test loss."""
        self._log_evaluation("test", self.test)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Per row: its "document" and the "nats", "tokens" and "bytes" of what it predicts, each (B,)."""
        _, losses = self._losses(batch)
        return {
            "document": batch["document"],
            "nats": losses.sum(-1, dtype=torch.float64),
            "tokens": (batch["labels"] != IGNORE).sum(-1),
            "bytes": batch["bytes"],
        }

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer on the policy's parameter groups, and its schedule, counted in steps."""
        trainer = self._trainer
        model: Any = self
        if trainer is not None and is_flat(trainer):  # only the outermost wrapper knows what its own slices are
            model = trainer.strategy.model
        with _usage():
            optimizer = self.optimizer(
                parameter_groups(model, policy=self.policy, overrides=self.rules, lr_scales=self.lr_scales)
            )
            apply_lr_factors(optimizer)
            if self.base_width is not None:
                transfer_rates(optimizer, self.llama_config.hidden_size / self.base_width)
        replicated = trainer is not None and isinstance(trainer.strategy, DDPStrategy)
        if replicated and isinstance(optimizer, MultiNormOptimizer):
            optimizer.replicas = torch.distributed.group.WORLD
        if self.gradient_release:
            release_gradients(check_release(self.trainer, optimizer))
        self._configured = hyperparameters(optimizer)
        if self.scheduler is None:
            return optimizer
        with _usage():
            scheduler = self.scheduler(optimizer)
        if isinstance(scheduler, WarmupSchedule) and scheduler.total_steps is None:
            steps = self.trainer.estimated_stepping_batches
            if steps == float("inf"):
                raise UsageError(
                    "the trainer runs without end, so the schedule has no length: set trainer.max_steps, or the "
                    "schedule's total_steps"
                )
            scheduler.total_steps = int(steps)
        if isinstance(scheduler, ReduceLROnPlateau):
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val/loss"}}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """By the norm of all gradients, however they are spread over devices; by value as Lightning does."""
        if gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            clip_(self.parameters(), gradient_clip_val, flat_slices(self.trainer.strategy.model or self))
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The step; then the gradients are freed, which Lightning would keep through the next forward pass."""
        super().optimizer_step(*args, **kwargs)
        self.zero_grad()

    def on_train_start(self) -> None:
        """After a checkpoint was loaded: the configured hyper-parameters hold, not the checkpoint's."""
        if self.trainer.ckpt_path is not None:
            schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
            restore_hyperparameters(self.trainer.optimizers[0], schedulers, self._configured)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the model's configuration beside its weights."""
        checkpoint["llama_config"] = self.llama_config.to_diff_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights of another shape in one sentence.

        Raises:
            UsageError: naming the fields in which checkpoint and configuration differ.
        """
        saved = checkpoint.get("llama_config", {})
        configured = {field: getattr(self.llama_config, field) for field in _SHAPE_FIELDS}
        differing = [
            f"{field}={saved[field]} in the checkpoint, {value} in the configuration"
            for field, value in configured.items()
            if saved.get(field, value) != value
        ]
        if differing:
            raise UsageError(f"the checkpoint holds another model: {'; '.join(differing)}. Give the --config it had")

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Load a trained model; its size and configuration, if not given, are the checkpoint's own.

        Args:
            checkpoint_path: a checkpoint file.
            *args: as in Lightning.
            **kwargs: as in Lightning, and arguments of the constructor.
        """
        if not kwargs.keys() & {"size", "config"}:
            saved = torch.load(checkpoint_path, map_location="cpu", mmap=True, weights_only=True)["llama_config"]
            kwargs |= {"size": None, "config": {k: v for k, v in saved.items() if k in config_fields()}}
        kwargs.setdefault("weights_only", True)  # a file may be a stranger's, and Lightning trusts it if it is remote
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def _losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Nats of all labels together, for the backward pass, and of every one (B, T)."""
        tokens, positions, labels = batch["input_ids"], batch.get("position_ids"), batch["labels"]
        if self.loss_chunk is None:
            losses = token_losses(self(tokens, positions), labels)
            return losses.sum(), losses
        assert self.model is not None, "configure_model() has not run"
        return self.model.chunked_loss(tokens, positions, labels, self.loss_chunk)

    def _evaluate(self, metric: TokenLoss, batch: Batch) -> None:
        metric.update(self._losses(batch)[1], batch["labels"], batch.get("bytes"))

    def _log_evaluation(self, stage: str, metric: TokenLoss) -> None:
        values = {f"{stage}/{name}": value.float() for name, value in metric.compute().items()}
        metric.reset()
        self.log_dict(values, sync_dist=True)


@contextmanager
def _usage() -> Iterator[None]:
    """A hyper-parameter out of range, or a rule that fits nothing, is the user's to mend."""
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from error
