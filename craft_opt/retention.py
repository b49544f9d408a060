"""Retention losses and pooling of hidden features: pure tensor functions.

Source: matching the hidden features of a frozen teacher is feature distillation (Romero et al., "FitNets",
arXiv 1412.6550); used against forgetting in Li and Hoiem, "Learning without Forgetting" (arXiv 1606.09282, on outputs).
Deviation: ``nmse`` divides by the variance of the teacher's features over the whole cache, so that one ε means the
same drift for every policy and layer.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from craft_opt.config import RETENTION_LOSSES

POOLINGS = ("mean_image_tokens", "mean_masked", "last_token", "cls_token", "action_tokens", "none")


def feature_loss(
    student: Float[Tensor, "*positions features"],
    teacher: Float[Tensor, "*positions features"],
    mask: Bool[Tensor, "*positions"] | None = None,
    kind: str = "nmse",
    teacher_var: Float[Tensor, ""] | float | None = None,
) -> Float[Tensor, ""]:
    """Return the distance of the student's features to the teacher's, a mean over the valid positions.

    nmse: ``mean((s − t)²) / var(t)``; mse: ``mean((s − t)²)``; l1: ``mean(|s − t|)``; cosine: ``mean(1 − cos(s, t))``.
    The mean runs over valid positions and features. All arithmetic is fp32.

    Args:
        student: Features of the policy in training, any floating dtype.
        teacher: Features of the frozen teacher, same shape.
        mask: True where a position counts; None counts all.
        kind: ``nmse``, ``mse``, ``cosine`` or ``l1``.
        teacher_var: For ``nmse``: variance of the teacher's features over the cache, averaged over features, above 0.

    Returns:
        The loss, fp32, shape (). Zero when no position is valid.

    Raises:
        ValueError: Unknown ``kind``, shapes differ, or ``nmse`` without a positive ``teacher_var``.

    Example:
        >>> feature_loss(torch.ones(2, 4), torch.zeros(2, 4), kind="nmse", teacher_var=2.0).item()
        0.5
    """
    if kind not in RETENTION_LOSSES:
        raise ValueError(f"retention_loss must be one of {', '.join(RETENTION_LOSSES)}, got {kind!r}")
    if student.shape != teacher.shape:
        raise ValueError(f"features differ in shape: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}")
    if mask is not None and mask.shape != student.shape[:-1]:
        raise ValueError(f"mask must have shape {tuple(student.shape[:-1])}, got {tuple(mask.shape)}")
    if kind == "nmse" and teacher_var is None:
        raise ValueError("retention_loss='nmse' needs teacher_var, the variance of the teacher's features")
    if isinstance(teacher_var, float | int) and not teacher_var > 0:
        raise ValueError(f"teacher_var must be above 0, got {teacher_var!r}; features that never vary anchor nothing")

    s, t = student.float(), teacher.detach().float()
    if mask is not None:
        # Zeroed before the arithmetic, not after: padding may hold inf, and the gradient of inf * 0 is NaN.
        kept = mask.unsqueeze(-1)
        s, t = torch.where(kept, s, 0.0), torch.where(kept, t, 0.0)
    if kind == "cosine":
        per_position = 1.0 - functional.cosine_similarity(s, t, dim=-1)
    elif kind == "l1":
        per_position = (s - t).abs().mean(dim=-1)
    else:
        per_position = (s - t).square().mean(dim=-1)
    loss = _masked_mean(per_position, mask)
    return loss / teacher_var if kind == "nmse" and teacher_var is not None else loss


def pool_features(
    hidden: Float[Tensor, "batch positions features"],
    pooling: str,
    valid_mask: Bool[Tensor, "batch positions"],
    image_mask: Bool[Tensor, "batch positions"] | None = None,
    action_mask: Bool[Tensor, "batch positions"] | None = None,
) -> tuple[Float[Tensor, "batch *kept features"], Bool[Tensor, "batch *kept"]]:
    """Reduce the hidden states of a sequence to the features that are anchored.

    Args:
        hidden: Hidden states of one layer, any floating dtype.
        pooling: ``mean_image_tokens``, ``mean_masked`` (mean of all valid positions), ``last_token`` (last valid
            position), ``cls_token`` (first position), ``action_tokens`` (every action position) or ``none`` (every
            position).
        valid_mask: True where a position is no padding.
        image_mask: True at image tokens; needed by ``mean_image_tokens``.
        action_mask: True at action tokens; needed by ``action_tokens``.

    Returns:
        For the pooled kinds features (batch, features) and a mask (batch,), True where a sample had a position to
        pool. For ``action_tokens`` and ``none`` the hidden states unchanged and the mask of positions that count.

    Raises:
        ValueError: Unknown pooling, or its mask is missing or of another shape.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
    valid = _positions(valid_mask, "valid_mask", hidden)
    if pooling == "none":
        return hidden, valid
    if pooling == "action_tokens":
        return hidden, valid & _positions(action_mask, "action_mask", hidden)
    if pooling == "cls_token":
        return hidden[:, 0], valid[:, 0]
    if pooling == "last_token":
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        last = torch.where(valid, positions, -1).amax(dim=1)
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        return hidden[rows, last.clamp(min=0)], last >= 0
    chosen = valid if pooling == "mean_masked" else valid & _positions(image_mask, "image_mask", hidden)
    count = chosen.sum(dim=1)
    # Zeroing before the sum, not multiplying: padding may hold inf or NaN, and NaN * 0 is NaN.
    kept = torch.where(chosen.unsqueeze(-1), hidden.float(), 0.0)
    return (kept.sum(dim=1) / count.clamp(min=1).unsqueeze(-1)).to(hidden.dtype), count > 0


def _masked_mean(values: Float[Tensor, "*positions"], mask: Bool[Tensor, "*positions"] | None) -> Float[Tensor, ""]:
    if mask is None:
        return values.mean()
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def _positions(mask: Tensor | None, name: str, hidden: Tensor) -> Bool[Tensor, "batch positions"]:
    if mask is None or mask.shape != hidden.shape[:2]:
        found = "None" if mask is None else str(tuple(mask.shape))
        raise ValueError(f"{name} must have shape {tuple(hidden.shape[:2])}, got {found}")
    return mask
