"""CRaFT: constrained retention fine-tuning. Gradient surgery inside AdamW."""

from craft_opt.config import CraftConfig
from craft_opt.optimizer import CraftOptimizer, StepMetrics

__all__ = ["CraftConfig", "CraftOptimizer", "StepMetrics"]
__version__ = "0.1.0"
