"""Retention losses of the baselines, in the form that CRaFT's step takes: each gives L_ret of the student.

What is common to replay, L2-SP and EWC is a loss added to the task's with a weight, which is ``merge: weighted`` of
:class:`~craft_opt.CraftOptimizer` with λ fixed and projection off; A-GEM is its projection with λ = 0. So all of them
run through the same optimizer, clip and AdamW as the method that they are compared with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from craft_opt.bridge.anchor_cache import AnchorBatch
from craft_opt.bridge.retention_term import CE_TOLERANCE, CacheRetention


def token_loss(policy: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The policy's own loss: cross-entropy of the batch's action tokens, nats a token, shape ()."""
    loss, _ = policy(batch)
    return loss


class ReplayRetention(CacheRetention):
    """The policy's own loss on stored samples: experience replay, or the reference gradient of A-GEM.

    ``L_ret = CE(stored observations → stored demonstrated action tokens)``; the cache's features are not used.

    Source: Chaudhry et al., "On tiny episodic memories" (arXiv 1902.10486), section 3.
    """

    tolerance = CE_TOLERANCE

    def _loss(self, policy: nn.Module, anchors: AnchorBatch) -> Tensor:
        return token_loss(policy, self._batch(policy, anchors))

    def _drift(self, policy: nn.Module, anchors: AnchorBatch) -> float:
        """Nothing is stored that the student could have drifted from."""
        return 0.0

    def sample(self, policy: nn.Module, index: int) -> dict[str, Any]:
        """One stored sample as a processed batch of one."""
        return self._batch(policy, self.cache.gather([index]))


class QuadraticPenalty:
    """``L_ret = Σ_i w_i (θ_i − θ⁰_i)²`` over the trained parameters; its gradient is ``2 w_i (θ_i − θ⁰_i)``.

    With w = 1 it is L2-SP; with w = F/2, F the diagonal of the Fisher information at θ⁰, it is EWC.

    Args:
        policy: The starting policy, whose trained parameters are θ⁰.
        weights: Name → w, of the parameter's shape; None is 1 everywhere.

    Sources: Li, Grandvalet and Davoine, "Explicit inductive bias for transfer learning" (arXiv 1802.01483), equation 2,
    with α/2 = λ and no new layers; Kirkpatrick et al., "Overcoming catastrophic forgetting" (arXiv 1612.00796),
    equation 3.
    """

    def __init__(self, policy: nn.Module, weights: Mapping[str, Tensor] | None = None) -> None:
        self._start = {name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad}
        self._weights = weights

    def loss(self, policy: nn.Module) -> Tensor:
        """L_ret, fp32 with a graph."""
        parts = []
        for name, p in policy.named_parameters():
            if name not in self._start:
                continue
            squared = (p - self._start[name]).float().square()
            parts.append((squared if self._weights is None else squared * self._weights[name]).sum())
        return torch.stack(parts).sum()


def diagonal_fisher(policy: nn.Module, samples: Iterable[dict[str, Any]]) -> dict[str, Tensor]:
    """Diagonal of the empirical Fisher information: the mean over samples of each parameter's squared gradient.

    ``F_i = 1/N Σ_n (∂ℓ_n/∂θ_i)²`` with ℓ_n the policy's own loss of sample n. Deviation: ℓ is the mean over the
    sample's action tokens rather than their sum, and the tokens are the demonstrated ones, not the policy's own.

    Args:
        policy: The policy at θ⁰; its ``.grad`` is left alone.
        samples: Processed batches of one sample each.

    Returns:
        Name → F of the parameter's shape, fp32, for every trained parameter.

    Raises:
        ValueError: There are no samples.

    Source: Kirkpatrick et al. (arXiv 1612.00796), section 2.1.
    """
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    fisher = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in trained.items()}
    count = 0
    for batch in samples:
        gradients = torch.autograd.grad(token_loss(policy, batch), list(trained.values()), allow_unused=True)
        for name, gradient in zip(trained, gradients, strict=True):
            if gradient is not None:
                fisher[name] += gradient.float().square()
        count += 1
    if not count:
        raise ValueError("the Fisher information needs at least one stored sample")
    return {name: total / count for name, total in fisher.items()}


def save_fisher(file: Path, fisher: Mapping[str, Tensor]) -> None:
    """Write it as safetensors."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in fisher.items()}, file)


def load_fisher(file: Path) -> dict[str, Tensor]:
    """Read it."""
    return load_file(file)


@torch.no_grad()
def interpolate(policy: nn.Module, start: Mapping[str, Tensor], alpha: float) -> None:
    """Move a policy to ``(1 − α) θ⁰ + α θ``, bit for bit θ⁰ at α = 0 and θ at α = 1.

    Args:
        policy: Its parameters are θ and are overwritten.
        start: Name → θ⁰, of every parameter.
        alpha: In [0, 1].

    Source: "Robust finetuning of vision-language-action robot policies via parameter merging" (RETAIN, arXiv
    2512.08333).
    """
    for name, p in policy.named_parameters():
        p.copy_(torch.lerp(start[name].to(p.device, p.dtype), p, alpha))
