"""The dual side of the method: the schedule of ε, the multiplier λ and their state on the device.

Source: the multiplier is the projected gradient ascent of Lagrangian duality (Arrow, Hurwicz and Uzawa 1958; for
constrained training of networks Gallego-Posada et al., "Cooper", arXiv 2504.01212). Deviation: ε moves with time, and λ
moves only on steps that measured the retention loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from craft_opt.config import CraftConfig

Scalar = Float[Tensor, ""]


def epsilon_schedule(t: Scalar | float, config: CraftConfig, decay_steps: int | None = None) -> Scalar:
    """Return the bound ε(t) of the retention loss.

    With ``u = t / T``: linear ``ε0 + u (ε1 − ε0)``; cosine ``ε1 + ½ (1 + cos πu)(ε0 − ε1)``; exponential
    ``ε0 (ε1/ε0)^u``; ε0 at t = 0 and ε1 from t = T on, both exactly.

    Args:
        t: Completed, non-skipped steps, at least 0; a number or a tensor of shape ().
        config: Gives ``epsilon_start``, ``epsilon_end``, ``epsilon_schedule`` and ``epsilon_decay_steps``.
        decay_steps: T in steps; None takes ``config.epsilon_decay_steps``. With T = 0 (all steps of a run whose length
            is not known) ε stays at ``epsilon_start``.

    Returns:
        ε(t) in units of the retention loss, fp64, shape (), on the device of ``t``.

    Raises:
        ValueError: ``t`` is a negative number.

    Example:
        >>> c = CraftConfig(epsilon_start=1.0, epsilon_end=0.5, epsilon_decay_steps=3)
        >>> [round(epsilon_schedule(t, c).item(), 3) for t in range(4)]
        [1.0, 0.833, 0.667, 0.5]
    """
    if not isinstance(t, Tensor) and t < 0:
        raise ValueError(f"t must be at least 0, got {t!r}")
    clock = torch.as_tensor(t, dtype=torch.float64)
    total = config.epsilon_decay_steps if decay_steps is None else decay_steps
    start, end = config.epsilon_start, config.epsilon_end
    if total <= 0:
        return torch.full_like(clock, start)
    u = clock / total
    if config.epsilon_schedule == "cosine":
        value = end + 0.5 * (1.0 + torch.cos(math.pi * u)) * (start - end)
    elif config.epsilon_schedule == "exponential":
        value = start * (end / start) ** u
    else:
        value = start + u * (end - start)
    # The ends are taken as they are: start + 1.0 * (end - start) need not equal end in floating point.
    value = torch.where(clock <= 0, start, value)
    return torch.where(clock >= total, end, value)


def update_lambda(
    lam: Scalar | float, retention_loss: Scalar | float, epsilon: Scalar | float, config: CraftConfig
) -> Scalar:
    """Return the multiplier after one step of projected dual ascent.

    ``λ ← clip(λ + lambda_lr (L_ret − ε), 0, lambda_max)``; a retention loss that is not finite leaves λ as it was.

    Args:
        lam: λ before, a number or a tensor of shape ().
        retention_loss: L_ret, a number or a tensor of shape ().
        epsilon: ε(t), a number or a tensor of shape ().
        config: Gives ``lambda_lr`` and ``lambda_max``.

    Returns:
        λ after, fp64, shape (), on the device of ``lam``.

    Example:
        >>> update_lambda(1.0, 1.5, 1.0, CraftConfig(lambda_lr=0.1)).item()
        1.05
    """
    before = torch.as_tensor(lam, dtype=torch.float64)
    violation = torch.as_tensor(retention_loss, dtype=torch.float64, device=before.device) - epsilon
    after = (before + config.lambda_lr * violation).clamp(0.0, config.lambda_max)
    # The violation, not the result: the clip would turn an infinite loss into lambda_max.
    # where, not if: on a CUDA device a Python branch would wait for the value.
    return torch.where(torch.isfinite(violation), after, before)


# Order of the entries in the device vector, shared with the kernel.
LAM, CLOCK, SKIPPED = 0, 1, 2


@dataclass(frozen=True)
class DualState:
    """λ, the clock of ε and the count of skipped steps, as one fp64 vector on a device.

    Attributes:
        vector: Shape (3,), fp64: λ, t (completed, non-skipped steps), skipped steps.
    """

    vector: Float[Tensor, "3"]

    @classmethod
    def create(cls, config: CraftConfig, device: torch.device | str) -> DualState:
        """Return the state before the first step."""
        return cls(torch.tensor([config.initial_lambda, 0.0, 0.0], dtype=torch.float64, device=device))

    def state_dict(self) -> dict[str, Tensor]:
        """Return ``lam`` (fp64), ``t`` and ``skipped`` (int64), each a copy of shape () on the CPU."""
        lam, clock, skipped = self.vector.detach().to("cpu", copy=True)
        return {"lam": lam.clone(), "t": clock.to(torch.int64), "skipped": skipped.to(torch.int64)}

    def load_state_dict(self, state: dict[str, Tensor], config: CraftConfig) -> None:
        """Take over a saved state.

        Raises:
            ValueError: An entry is missing, is no scalar, or lies outside what ``config`` allows.
        """
        values = []
        for name in ("lam", "t", "skipped"):
            if name not in state:
                raise ValueError(f"craft_dual has no entry {name!r} (found: {', '.join(sorted(state)) or 'nothing'})")
            value = torch.as_tensor(state[name])
            if value.numel() != 1:
                raise ValueError(f"craft_dual[{name!r}] must be a scalar, got shape {tuple(value.shape)}")
            values.append(float(value))
        lam, clock, skipped = values
        if not 0.0 <= lam <= config.lambda_max:
            raise ValueError(
                f"craft_dual['lam'] must be in [0, lambda_max = {config.lambda_max:g}], got {lam!r}; "
                f"raise lambda_max or start a fresh run"
            )
        if not (clock >= 0 and skipped >= 0 and clock.is_integer() and skipped.is_integer()):
            raise ValueError(f"craft_dual counts must be whole numbers >= 0, got t={clock!r}, skipped={skipped!r}")
        self.vector.copy_(torch.tensor(values, dtype=torch.float64))
