"""LLaMA pretraining: sizes of the papers' benchmark, the LightningModule, its loss and metrics."""

from lightning_multinorm.llama.module import LlamaPretraining

__all__ = ["LlamaPretraining"]
