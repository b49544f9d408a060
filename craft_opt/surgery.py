"""Two-objective gradient surgery as coefficients: the readable statement of the method.

Every rule is a pair (a, b) computed from the Gram matrix of the two gradients and λ; the update direction is
``g = a g_t + b g_r``. Nothing here waits for a device: decisions are ``where``, not ``if``, because a Python branch on
a CUDA value would synchronise the host. The same lines serve Python floats, which is what a step on the CPU computes
with.

Sources: projection of a conflicting gradient, Yu et al., "Gradient Surgery for Multi-Task Learning" (PCGrad,
arXiv 2001.06782), Algorithm 1; projection of the task gradient alone against a memory gradient, Chaudhry et al.,
"Efficient Lifelong Learning with A-GEM" (arXiv 1812.00420), equation 11. Deviations: the conflict test compares the
*cosine* with a threshold (both papers: the sign of the dot product), and the retention gradient is merged in with a
weight afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from craft_opt.config import CraftConfig
from craft_opt.scalars import clamp, sqrt, where

Scalar = Float[Tensor, ""] | float
Flag = Bool[Tensor, ""] | bool
Gradient = Float[Tensor, "..."]

# torch.nn.utils.clip_grad_norm_ adds the same constant.
CLIP_EPS = 1e-6


class Gram(NamedTuple):
    """The 2x2 Gram matrix of task and retention gradient; each entry fp64 of shape (), or a Python float.

    Attributes:
        dot_tt: <g_t, g_t>.
        dot_tr: <g_t, g_r>.
        dot_rr: <g_r, g_r>.
    """

    dot_tt: Scalar
    dot_tr: Scalar
    dot_rr: Scalar


class Coefficients(NamedTuple):
    """What a surgery rule decides; every entry has shape (), or is a Python number where the Gram matrix is.

    Attributes:
        a: Weight of the task gradient, fp64.
        b: Weight of the retention gradient, fp64.
        cos: Cosine of the two gradients before projection, fp64; 0 where either is 0.
        conflict: Whether the task gradient was projected.
        grad_norm: ‖a g_t + b g_r‖ before the clip, fp64.
        clip: s in (0, 1]; AdamW sees s (a g_t + b g_r). fp64.
    """

    a: Scalar
    b: Scalar
    cos: Scalar
    conflict: Flag
    grad_norm: Scalar
    clip: Scalar


def compute_dot(grads_task: Sequence[Gradient], grads_ret: Sequence[Gradient]) -> Gram:
    """Return the Gram matrix of two gradients given tensor by tensor.

    ``tt = Σ<g_t,g_t>``, ``tr = Σ<g_t,g_r>``, ``rr = Σ<g_r,g_r>``. Products and sums are taken in fp64, in which the
    product of two fp32 numbers is exact and the square of the largest fp32 number does not overflow.

    Args:
        grads_task: Task gradients, any floating dtype and shape.
        grads_ret: Retention gradients, one for each of ``grads_task`` and of its shape.

    Returns:
        The Gram matrix in fp64, on the device of the first gradient.

    Raises:
        ValueError: The lists are empty, or lengths or shapes differ.

    Example:
        >>> g = compute_dot([torch.tensor([1.0, 2.0])], [torch.tensor([3.0, -1.0])])
        >>> g.dot_tt.item(), g.dot_tr.item(), g.dot_rr.item()
        (5.0, 1.0, 10.0)
    """
    _check_pairs(grads_task, grads_ret)
    totals = torch.zeros(3, dtype=torch.float64, device=grads_task[0].device)
    for task, ret in zip(grads_task, grads_ret, strict=True):
        t64, r64 = task.detach().reshape(-1).double(), ret.detach().reshape(-1).double()
        totals += torch.stack((t64 @ t64, t64 @ r64, r64 @ r64)).to(totals.device)
    return Gram(totals[0], totals[1], totals[2])


def coefficients(
    gram: Gram,
    lam: Scalar,
    config: CraftConfig,
    max_grad_norm: float | None = 1.0,
    ret_weight: Scalar = 1.0,
) -> Coefficients:
    """Return the coefficients of the update direction ``s (a g_t + b g_r)``.

    ``cos = tr / (sqrt(tt) sqrt(rr))``; with ``cos < conflict_threshold`` the task gradient is projected,
    ``g_t' = g_t − (tr/rr) g_r``. Then weighted: ``g_t' + λ w g_r``; equal: ``½ (g_t' + w g_r)``; task_priority:
    ``g_t' + min(λ, 1) w g_r``. ``‖g‖² = a² tt + 2ab tr + b² rr``, clamped at 0, and
    ``s = min(1, max_grad_norm / (‖g‖ + 1e-6))``.

    Args:
        gram: The Gram matrix, entries of shape (), or Python floats.
        lam: λ before the step, a number or a tensor of shape ().
        config: Gives ``use_grad_projection``, ``conflict_threshold`` and ``projection_mode``.
        max_grad_norm: Bound of the merged gradient's norm; None means no clip.
        ret_weight: w in [0, 1], below 1 for a retention gradient of an earlier step. The projection does not depend on
            the length of g_r, so w leaves it alone.

    Returns:
        The coefficients in fp64 on the device of ``gram``, or Python floats where ``gram`` holds those.

    Example:
        >>> gram = compute_dot([torch.tensor([1.0, 0.0])], [torch.tensor([-1.0, 1.0])])
        >>> c = coefficients(gram, 0.5, CraftConfig(), max_grad_norm=None)
        >>> c.conflict.item(), c.a.item(), c.b.item()
        (True, 1.0, 1.0)
    """
    tt, tr, rr = (_double(x) for x in gram)
    if isinstance(tt, Tensor):
        lam = torch.as_tensor(lam, dtype=torch.float64, device=tt.device)
    one, zero = _one_like(tt), _zero_like(tt)

    # sqrt(tt) * sqrt(rr), never sqrt(tt * rr): the product overflows or underflows long before its root does.
    norms = sqrt(clamp(tt, 0.0, math.inf)) * sqrt(clamp(rr, 0.0, math.inf))
    # Rounding may push parallel gradients past 1; a threshold of -1 must never fire.
    cos = clamp(where(norms > 0, tr / where(norms > 0, norms, one), zero), -1.0, 1.0)
    # A zero gradient has cosine 0 and is never a direction to project on, even with a positive threshold.
    conflict = (cos < config.conflict_threshold) & (rr > 0) if config.use_grad_projection else cos > 2.0
    shift = where(conflict, -tr / where(rr > 0, rr, one), zero)

    if config.projection_mode == "equal":
        a, b = 0.5 * one, 0.5 * (shift + ret_weight)
    elif config.projection_mode == "task_priority":
        a, b = one, shift + clamp(lam, -math.inf, 1.0) * ret_weight
    else:
        a, b = one, shift + lam * ret_weight

    norm = sqrt(clamp(a * a * tt + 2.0 * a * b * tr + b * b * rr, 0.0, math.inf))
    return Coefficients(a, b, cos, conflict, norm, clip_scale(norm, max_grad_norm))


def task_only_coefficients(dot_tt: Scalar, max_grad_norm: float | None = 1.0) -> Coefficients:
    """Return (a, b) = (1, 0): a step without a retention gradient is plain AdamW in every merge mode.

    Args:
        dot_tt: <g_t, g_t>, shape () or a Python float.
        max_grad_norm: Bound of the gradient's norm; None means no clip.
    """
    tt = _double(dot_tt)
    one, zero = _one_like(tt), _zero_like(tt)
    norm = sqrt(clamp(tt, 0.0, math.inf))
    return Coefficients(one, zero, zero, zero > 0, norm, clip_scale(norm, max_grad_norm))


def clip_scale(norm: Scalar, max_grad_norm: float | None) -> Scalar:
    """Return ``s = min(1, max_grad_norm / (‖g‖ + 1e-6))``, or 1 where there is no bound.

    The rule of ``torch.nn.utils.clip_grad_norm_``.
    """
    if max_grad_norm is None:
        return _one_like(norm)
    return clamp(max_grad_norm / (norm + CLIP_EPS), 0.0, 1.0)


def project_if_conflict(
    grads_task: Sequence[Gradient],
    grads_ret: Sequence[Gradient],
    conflict_threshold: float = -0.1,
) -> tuple[list[Gradient], Flag]:
    """Return the task gradient without its component along the retention gradient, if the two conflict.

    ``g_t' = g_t − (tr/rr) g_r`` where ``cos < conflict_threshold``, else ``g_t``.

    Args:
        grads_task: Task gradients, any floating dtype and shape.
        grads_ret: Retention gradients, one for each of ``grads_task``.
        conflict_threshold: A cosine in [-1, 1].

    Returns:
        The projected gradients as new tensors of the same dtypes, and whether they were projected, shape ().

    Raises:
        ValueError: The lists do not match.

    Example:
        >>> g, conflict = project_if_conflict([torch.tensor([1.0, 0.0])], [torch.tensor([-1.0, 1.0])])
        >>> g[0].tolist(), conflict.item()
        ([0.5, 0.5], True)
    """
    config = CraftConfig(projection_mode="weighted", conflict_threshold=conflict_threshold)
    rule = coefficients(compute_dot(grads_task, grads_ret), 0.0, config, max_grad_norm=None)
    return _combine(grads_task, grads_ret, rule.a, rule.b), rule.conflict


def merge_grads(
    grads_task: Sequence[Gradient],
    grads_ret: Sequence[Gradient],
    lam: Scalar,
    projection_mode: str = "weighted",
) -> list[Gradient]:
    """Return the merged gradient of a task gradient (projected or not) and a retention gradient.

    weighted ``g_t + λ g_r``; equal ``½ (g_t + g_r)``; task_priority ``g_t + min(λ, 1) g_r``.

    Args:
        grads_task: Task gradients, any floating dtype and shape.
        grads_ret: Retention gradients, one for each of ``grads_task``.
        lam: λ, a number or a tensor of shape ().
        projection_mode: ``weighted``, ``equal`` or ``task_priority``.

    Returns:
        New tensors of the dtypes of ``grads_task``.

    Raises:
        ValueError: The lists do not match, or the mode is unknown.

    Example:
        >>> merge_grads([torch.tensor([1.0])], [torch.tensor([2.0])], 3.0)[0].item()
        7.0
    """
    config = CraftConfig(use_grad_projection=False, projection_mode=projection_mode)
    rule = coefficients(compute_dot(grads_task, grads_ret), lam, config, max_grad_norm=None)
    return _combine(grads_task, grads_ret, rule.a, rule.b)


def _combine(grads_task: Sequence[Gradient], grads_ret: Sequence[Gradient], a: Scalar, b: Scalar) -> list[Gradient]:
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    return [
        (a.to(task.device) * task.double() + b.to(task.device) * ret.double()).to(task.dtype)
        for task, ret in zip(grads_task, grads_ret, strict=True)
    ]


def _double(x: Scalar) -> Scalar:
    return x.double() if isinstance(x, Tensor) else float(x)


def _one_like(x: Scalar) -> Scalar:
    return torch.ones_like(x, dtype=torch.float64) if isinstance(x, Tensor) else 1.0


def _zero_like(x: Scalar) -> Scalar:
    return torch.zeros_like(x, dtype=torch.float64) if isinstance(x, Tensor) else 0.0


def _check_pairs(grads_task: Sequence[Tensor], grads_ret: Sequence[Tensor]) -> None:
    if not grads_task or len(grads_task) != len(grads_ret):
        raise ValueError(
            f"need one retention gradient for each of at least one task gradient, got {len(grads_task)} task and "
            f"{len(grads_ret)} retention gradients; for a parameter that one loss did not reach pass zeros"
        )
    for i, (task, ret) in enumerate(zip(grads_task, grads_ret, strict=True)):
        if task.shape != ret.shape:
            raise ValueError(f"gradient {i} has shape {tuple(task.shape)} (task) and {tuple(ret.shape)} (retention)")
