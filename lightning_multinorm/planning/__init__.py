"""Memory, communication and FLOPs of a training run, before it runs: arithmetic on shapes, nothing is allocated."""

from lightning_multinorm.planning.estimate import OptimizerPlan, Plan, plan
from lightning_multinorm.planning.settings import Layout, MicroBatch, Precision

__all__ = ["Layout", "MicroBatch", "OptimizerPlan", "Plan", "Precision", "plan"]
