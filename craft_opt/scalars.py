"""The few scalar operations of the method, for Python numbers and for tensors alike.

One statement of a formula serves the device (tensors of shape (), nothing is read by the host) and the CPU, where a
Python float costs a tenth of a tensor operation.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# Any, not a type variable: a formula mixes numbers and tensors, and what comes out follows from what goes in.


def where(condition: Any, yes: Any, no: Any) -> Any:
    """``yes`` where the condition holds, else ``no``; on a tensor no branch waits for its value."""
    if isinstance(condition, Tensor):
        return torch.where(condition, yes, no)
    return yes if condition else no


def sqrt(x: Any) -> Any:
    """Square root; NaN for negative numbers and NaN."""
    if isinstance(x, Tensor):
        return torch.sqrt(x)
    return math.sqrt(x) if x >= 0 else math.nan


def clamp(x: Any, low: float, high: float) -> Any:
    """``x`` held in [low, high]; NaN stays NaN."""
    if isinstance(x, Tensor):
        return x.clamp(low, high)
    return x if math.isnan(x) else min(max(x, low), high)


def cos(x: Any) -> Any:
    """Cosine of radians."""
    return torch.cos(x) if isinstance(x, Tensor) else math.cos(x)


def isfinite(x: Any) -> Any:
    """Whether ``x`` is neither infinite nor NaN."""
    return torch.isfinite(x) if isinstance(x, Tensor) else math.isfinite(x)
