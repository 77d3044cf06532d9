"""Stateless matrix optimizers and the parameter groups they take; stands on torch alone."""

from lightning_multinorm.optim.groups import parameter_groups, routing_table
from lightning_multinorm.optim.multinormgd import MultiNormGD
from lightning_multinorm.optim.sinkgd import SinkGD
from lightning_multinorm.optim.swan import SWAN

__all__ = ["SWAN", "MultiNormGD", "SinkGD", "parameter_groups", "routing_table"]
