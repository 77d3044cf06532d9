"""Lightning callbacks: what a run shows and logs, the norms, what keeps it from going wrong, what resuming needs."""

from lightning_multinorm.callbacks.convergence import NormConvergence
from lightning_multinorm.callbacks.nonfinite import NonFiniteGradients
from lightning_multinorm.callbacks.perplexity import DocumentPerplexity
from lightning_multinorm.callbacks.progress import TrainingProgress
from lightning_multinorm.callbacks.random_state import RandomState
from lightning_multinorm.callbacks.spikes import LossSpikes
from lightning_multinorm.callbacks.summary import RunSummary
from lightning_multinorm.callbacks.termination import TerminationCheckpoint
from lightning_multinorm.callbacks.throughput import Throughput
from lightning_multinorm.callbacks.tokenizer import RunTokenizer

__all__ = [
    "DocumentPerplexity",
    "LossSpikes",
    "NonFiniteGradients",
    "NormConvergence",
    "RandomState",
    "RunSummary",
    "RunTokenizer",
    "TerminationCheckpoint",
    "Throughput",
    "TrainingProgress",
]
