"""What a step tells: scalars that stay on the device until somebody reads them."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from craft_opt.kernels.surgery_adamw import METRIC_NAMES


@dataclass(frozen=True)
class StepMetrics:
    """Metrics of one step; every field is a tensor of shape () on the device of the optimizer, fp64 unless said.

    Attributes:
        dot: <g_t, g_r> before projection; NaN on a step without retention.
        cos: Cosine of the two gradients before projection; NaN on a step without retention.
        conflict: bool, whether the task gradient was projected.
        grad_norm: Norm of the merged gradient before the clip.
        lam_before: λ that the merge used.
        lam_after: λ after the step.
        epsilon: ε(t) that λ was held against.
        retention_loss: L_ret that was captured for this step; NaN on a step without retention.
        skipped: bool, whether this step changed nothing because a gradient or the captured loss was not finite.
        skipped_steps: int64, skipped steps so far.
    """

    dot: Tensor
    cos: Tensor
    conflict: Tensor
    grad_norm: Tensor
    lam_before: Tensor
    lam_after: Tensor
    epsilon: Tensor
    retention_loss: Tensor
    skipped: Tensor
    skipped_steps: Tensor

    @classmethod
    def from_vector(cls, vector: Tensor) -> StepMetrics:
        """Take the metrics out of a copy of the kernel's vector (METRIC_NAMES), without waiting for the device."""
        named = dict(zip(METRIC_NAMES, vector.detach().clone().unbind(), strict=True))
        named["conflict"] = named["conflict"] > 0
        named["skipped"] = named["skipped"] > 0
        named["skipped_steps"] = named["skipped_total"].to(torch.int64)
        return cls(**{field.name: named[field.name] for field in fields(cls)})

    def as_floats(self) -> dict[str, float]:
        """Return all values as numbers, in one copy from the device (this waits for it)."""
        names = [field.name for field in fields(self)]
        values = torch.stack([getattr(self, name).double() for name in names]).tolist()
        return dict(zip(names, values, strict=True))
