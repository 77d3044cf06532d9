"""Lightning callbacks: norms, throughput, progress, summary, perplexity of documents, what a resumed run needs."""

from lightning_multinorm.callbacks.convergence import NormConvergence
from lightning_multinorm.callbacks.perplexity import DocumentPerplexity
from lightning_multinorm.callbacks.progress import TrainingProgress
from lightning_multinorm.callbacks.random_state import RandomState
from lightning_multinorm.callbacks.summary import RunSummary
from lightning_multinorm.callbacks.termination import TerminationCheckpoint
from lightning_multinorm.callbacks.throughput import Throughput

__all__ = [
    "DocumentPerplexity",
    "NormConvergence",
    "RandomState",
    "RunSummary",
    "TerminationCheckpoint",
    "Throughput",
    "TrainingProgress",
]
