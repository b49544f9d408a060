"""CraftOptimizer: AdamW with two gradients. This room is the only importer of the kernels."""

from craft_opt.optimizer._metrics import StepMetrics
from craft_opt.optimizer._optimizer import CraftOptimizer

__all__ = ["CraftOptimizer", "StepMetrics"]
