"""Lightning callbacks: convergence of the norms, throughput, progress, the closing summary, perplexity of documents."""

from lightning_multinorm.callbacks.convergence import NormConvergence
from lightning_multinorm.callbacks.perplexity import DocumentPerplexity
from lightning_multinorm.callbacks.progress import TrainingProgress
from lightning_multinorm.callbacks.summary import RunSummary
from lightning_multinorm.callbacks.throughput import Throughput

__all__ = ["DocumentPerplexity", "NormConvergence", "RunSummary", "Throughput", "TrainingProgress"]
