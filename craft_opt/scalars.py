"""The few scalar operations of the method, for Python numbers and for tensors alike.

One statement of a formula serves the device (tensors of shape (), nothing is read by the host) and the CPU, where a
Python float costs a tenth of a tensor operation.
"""

from __future__ import annotations

import math
from typing import TypeVar, overload

import torch
from torch import Tensor

Number = TypeVar("Number", float, Tensor)


def where(condition: bool | Tensor, yes: float | Tensor, no: float | Tensor) -> float | Tensor:
    """``yes`` where the condition holds, else ``no``; on a tensor no branch waits for its value."""
    if isinstance(condition, Tensor):
        return torch.where(condition, yes, no)
    return yes if condition else no


@overload
def sqrt(x: float) -> float: ...
@overload
def sqrt(x: Tensor) -> Tensor: ...
def sqrt(x: float | Tensor) -> float | Tensor:
    """Square root; NaN for negative numbers and NaN."""
    if isinstance(x, Tensor):
        return torch.sqrt(x)
    return math.sqrt(x) if x >= 0 else math.nan


@overload
def clamp(x: float, low: float, high: float) -> float: ...
@overload
def clamp(x: Tensor, low: float, high: float) -> Tensor: ...
def clamp(x: float | Tensor, low: float, high: float) -> float | Tensor:
    """``x`` held in [low, high]; NaN stays NaN."""
    if isinstance(x, Tensor):
        return x.clamp(low, high)
    return x if math.isnan(x) else min(max(x, low), high)


@overload
def cos(x: float) -> float: ...
@overload
def cos(x: Tensor) -> Tensor: ...
def cos(x: float | Tensor) -> float | Tensor:
    """Cosine of radians."""
    return torch.cos(x) if isinstance(x, Tensor) else math.cos(x)


def isfinite(x: float | Tensor) -> bool | Tensor:
    """Whether ``x`` is neither infinite nor NaN."""
    return torch.isfinite(x) if isinstance(x, Tensor) else math.isfinite(x)
