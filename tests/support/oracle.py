"""SPEC section 2 in float64 and plain Python: what every implementation is held against."""

import math
from dataclasses import dataclass

import torch


@dataclass
class Oracle:
    a: float
    b: float
    cos: float
    dot: float
    conflict: bool
    norm: float
    clip: float
    merged: torch.Tensor


def surgery_oracle(t, r, lam, config, max_grad_norm):
    """Coefficients and merged gradient of two fp64 vectors, each quantity from its own definition."""
    nt, nr = math.sqrt(float(t @ t)), math.sqrt(float(r @ r))
    dot = float(t @ r)
    cos = dot / nt / nr if nt > 0 and nr > 0 else 0.0
    conflict = config.use_grad_projection and nr > 0 and cos < config.conflict_threshold
    shift = -dot / nr / nr if conflict else 0.0
    projected = t + shift * r
    if config.projection_mode == "weighted":
        a, b, merged = 1.0, shift + lam, projected + lam * r
    elif config.projection_mode == "equal":
        a, b, merged = 0.5, 0.5 * (shift + 1.0), 0.5 * (projected + r)
    else:
        a, b, merged = 1.0, shift + min(lam, 1.0), projected + min(lam, 1.0) * r
    norm = float(merged.norm())
    clip = 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / (norm + 1e-6))
    return Oracle(a, b, cos, dot, conflict, norm, clip, merged)


def adamw_oracle(p, m, v, grad, step, group):
    """One AdamW step in fp64 on copies; returns (p, m, v)."""
    beta1, beta2 = group["betas"]
    g = -grad if group.get("maximize") else grad
    p = p.double() * (1 - group["lr"] * group["weight_decay"])
    m = beta1 * m.double() + (1 - beta1) * g
    v = beta2 * v.double() + (1 - beta2) * g * g
    denom = v.sqrt() / math.sqrt(1 - beta2**step) + group["eps"]
    return p - group["lr"] / (1 - beta1**step) * m / denom, m, v
