"""Retention losses and pooling of hidden features: pure tensor functions.

Source: matching the hidden features of a frozen teacher is feature distillation (Romero et al., "FitNets",
arXiv 1412.6550); matching its outputs is distillation (Hinton et al., arXiv 1503.02531), used against forgetting in Li
and Hoiem, "Learning without Forgetting" (arXiv 1606.09282).
Deviations: ``nmse`` divides by the variance of the teacher's features over the whole cache, so that one ε means the
same drift for every policy and layer; the losses of tokens are 0 at the teacher, so that they measure drift.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from craft_opt.config import RETENTION_LOSSES

POOLINGS = ("mean_image_tokens", "mean_masked", "last_token", "cls_token", "action_tokens", "none")
# Probabilities near 1 round at 2^-24; a handful of them are summed.
TAIL_ROUNDING = 2.0**-21


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


def token_kl(
    logits: Float[Tensor, "batch tokens vocabulary"],
    top_ids: Int[Tensor, "batch tokens top"],
    top_logprobs: Float[Tensor, "batch tokens top"],
    mask: Bool[Tensor, "batch tokens"],
) -> Float[Tensor, ""]:
    """Return KL(teacher || student) over the teacher's top tokens and one bucket for all others, nats a token.

    ``Σ_c p_c log(p_c / q_c) − p_c + q_c`` over the k top tokens and the bucket; p the teacher's, q the student's. Both
    sum to 1, so the last two terms add nothing: they keep every summand at or above 0, and the gradient exactly 0 where
    p = q, although the teacher's mass outside its top tokens is known only as what the stored ones leave over (less
    than 2^-21 of it is rounding, and taken for none).

    Args:
        logits: Of the policy in training, any floating dtype; position i predicts what ``top_ids[:, i]`` are about.
        top_ids: The teacher's most probable tokens, none of them twice, 1 <= k <= vocabulary.
        top_logprobs: Their log-probabilities under the teacher, any floating dtype.
        mask: True where a position counts.

    Returns:
        The mean over the positions that count, fp32, shape (). 0 when none counts.

    Raises:
        ValueError: The shapes do not belong together.

    Source: Hinton et al. (arXiv 1503.02531), equation 1 at temperature 1, and Li and Hoiem (arXiv 1606.09282), equation
    2. Deviation: the tail of the vocabulary is one outcome. Merging outcomes never raises a KL, so this is a lower
    bound of the full one.

    Example:
        >>> probabilities = torch.tensor([[[0.5, 0.3, 0.2]]])
        >>> top = probabilities.log()[..., :1]
        >>> counts = torch.ones(1, 1, dtype=torch.bool)
        >>> abs(token_kl(probabilities.log(), torch.tensor([[[0]]]), top, counts).item()) < 1e-6
        True
    """
    _check_tokens(logits, mask)
    if top_ids.shape != top_logprobs.shape or top_ids.shape[:2] != mask.shape:
        raise ValueError(
            f"top_ids and top_logprobs must have shape ({mask.shape[0]}, {mask.shape[1]}, k), got "
            f"{tuple(top_ids.shape)} and {tuple(top_logprobs.shape)}"
        )
    # Only the positions that count are looked at: padding may hold inf, and the gradient of inf * 0 is NaN.
    scores, ids, log_p = logits[mask].float(), top_ids[mask], top_logprobs[mask].detach().float()
    p, log_q = log_p.exp(), scores.gather(-1, ids)
    if ids.shape[-1] < logits.shape[-1]:
        # Summed over the tail itself: 1 − Σ exp(log_q) has no correct digit where the top tokens hold nearly all. And
        # no log_softmax: of the vocabulary's size this copy alone is kept for the backward.
        tail_log_q = scores.scatter(-1, ids, -torch.inf).logsumexp(dim=-1, keepdim=True)
        tail_p = 1.0 - p.sum(dim=-1, keepdim=True)
        # What is left may be rounding alone, whose logarithm means nothing.
        tail_p = torch.where(tail_p > TAIL_ROUNDING, tail_p, 0.0)
        p, log_q = torch.cat([p, tail_p], dim=-1), torch.cat([log_q, tail_log_q], dim=-1)
        log_p = torch.cat([log_p, tail_p.log()], dim=-1)
    log_q = log_q - log_q.logsumexp(dim=-1, keepdim=True)
    surprise = torch.where(p > 0, p * (log_p - log_q), 0.0)
    per_position = (surprise - p + log_q.exp()).sum(dim=-1)
    return per_position.sum() / mask.sum().clamp(min=1)


def token_ce_above(
    logits: Float[Tensor, "batch tokens vocabulary"],
    tokens: Int[Tensor, "batch tokens"],
    mask: Bool[Tensor, "batch tokens"],
    teacher_ce: Float[Tensor, "batch"],
) -> Float[Tensor, ""]:
    """Return the student's cross-entropy of stored tokens minus the teacher's own, nats a token.

    ``mean_b (mean_i −log q(y_bi) − CE_b)``: 0 at the teacher. It falls below 0 where the student is surer of the tokens
    than the teacher was; in expectation over tokens drawn from the teacher it is KL(teacher || student).

    Args:
        logits: Of the policy in training, any floating dtype; position i predicts ``tokens[:, i]``.
        tokens: The stored tokens; anything where the mask is False.
        mask: True where a position counts.
        teacher_ce: The teacher's own mean cross-entropy of each sample's tokens.

    Returns:
        The mean over the samples that have a token that counts, fp32, shape (). 0 when there is none.

    Raises:
        ValueError: The shapes do not belong together.

    Source: Li and Hoiem (arXiv 1606.09282), equation 2 with recorded hard targets. Deviation: the teacher's own
    cross-entropy is taken off, a constant, so that the constraint bounds the drift and not the difficulty of the task.

    Example:
        >>> even = torch.zeros(1, 3, 4)
        >>> counts = torch.ones(1, 3, dtype=torch.bool)
        >>> round(token_ce_above(even, torch.zeros(1, 3, dtype=torch.long), counts, torch.zeros(1)).item(), 4)
        1.3863
    """
    _check_tokens(logits, mask)
    if tokens.shape != mask.shape or teacher_ce.shape != mask.shape[:1]:
        raise ValueError(
            f"tokens must have shape {tuple(mask.shape)} and teacher_ce ({mask.shape[0]},), got "
            f"{tuple(tokens.shape)} and {tuple(teacher_ce.shape)}"
        )
    losses = torch.zeros(mask.shape, dtype=torch.float32, device=logits.device)
    losses = losses.masked_scatter(
        mask, functional.cross_entropy(logits[mask].float(), tokens[mask].long(), reduction="none")
    )
    counts = mask.sum(dim=-1)
    above = losses.sum(dim=-1) / counts.clamp(min=1) - teacher_ce.detach().float()
    return _masked_mean(above, counts > 0)


def _check_tokens(logits: Tensor, mask: Tensor) -> None:
    if logits.shape[:-1] != mask.shape:
        raise ValueError(f"logits of shape {tuple(logits.shape)} and a mask of shape {tuple(mask.shape)} do not fit")


def _masked_mean(values: Float[Tensor, "*positions"], mask: Bool[Tensor, "*positions"] | None) -> Float[Tensor, ""]:
    if mask is None:
        return values.mean()
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def _positions(mask: Tensor | None, name: str, hidden: Tensor) -> Bool[Tensor, "batch positions"]:
    if mask is None or mask.shape != hidden.shape[:2]:
        found = "None" if mask is None else str(tuple(mask.shape))
        raise ValueError(f"{name} must have shape {tuple(hidden.shape[:2])}, got {found}")
    return mask
