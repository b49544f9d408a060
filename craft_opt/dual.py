"""The dual side of the method: the schedule of ε, the multiplier λ and their state on the device.

Every formula takes Python numbers and tensors of shape () alike (``craft_opt.scalars``): numbers in, numbers out, and
no tensor is made; with a tensor among the arguments the result is a tensor and nothing waits for its value.

Sources: the multiplier is the projected gradient ascent of Lagrangian duality (Arrow, Hurwicz and Uzawa 1958; for
constrained training of networks Gallego-Posada et al., "Cooper", arXiv 2504.01212), or the PI controller nuPI (Sohrabi
et al., "On PI controllers for updating Lagrange multipliers in constrained optimization", arXiv 2406.04558,
algorithm 1). Deviations: ε moves with time, λ moves only on steps that measured the retention loss, and the loss may be
replaced by its running average.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from craft_opt.config import CraftConfig
from craft_opt.scalars import clamp, cos, isfinite, where

Scalar = Float[Tensor, ""]


def epsilon_schedule(t: Scalar | float, config: CraftConfig, decay_steps: int | None = None) -> Scalar | float:
    """Return the bound ε(t) of the retention loss.

    With ``u = t / T``: linear ``ε0 + u (ε1 − ε0)``; cosine ``ε1 + ½ (1 + cos πu)(ε0 − ε1)``; exponential
    ``ε0 (ε1/ε0)^u``; ε0 at t = 0 and ε1 from t = T on, both exactly.

    Args:
        t: Completed, non-skipped steps, at least 0; a number or a tensor of shape ().
        config: Gives ``epsilon_start``, ``epsilon_end``, ``epsilon_schedule`` and ``epsilon_decay_steps``.
        decay_steps: T in steps; None takes ``config.epsilon_decay_steps``. With T = 0 (all steps of a run whose length
            is not known) ε stays at ``epsilon_start``.

    Returns:
        ε(t) in units of the retention loss: a number, or for a tensor ``t`` fp64 of shape () on its device.

    Raises:
        ValueError: ``t`` is a negative number.

    Example:
        >>> c = CraftConfig(epsilon_start=1.0, epsilon_end=0.5, epsilon_decay_steps=3)
        >>> [round(epsilon_schedule(t, c), 3) for t in range(4)]
        [1.0, 0.833, 0.667, 0.5]
    """
    if not isinstance(t, Tensor) and t < 0:
        raise ValueError(f"t must be at least 0, got {t!r}")
    (clock,) = _alike(t)
    total = config.epsilon_decay_steps if decay_steps is None else decay_steps
    start, end = config.epsilon_start, config.epsilon_end
    if total <= 0:
        return torch.full_like(clock, start) if isinstance(clock, Tensor) else start
    # Held at 1, because a power beyond the end of the schedule may overflow.
    u = clamp(clock / total, 0.0, 1.0)
    if config.epsilon_schedule == "cosine":
        value = end + 0.5 * (1.0 + cos(math.pi * u)) * (start - end)
    elif config.epsilon_schedule == "exponential":
        value = start * (end / start) ** u
    else:
        value = start + u * (end - start)
    # The ends are taken as they are: start + 1.0 * (end - start) need not equal end in floating point.
    value = where(clock <= 0, start, value)
    return where(clock >= total, end, value)


class Multiplier(NamedTuple):
    """What the dual side carries from step to step; numbers, or tensors of shape (), fp64.

    Attributes:
        lam: λ, in [0, ``lambda_max``].
        ema: L̄, the running average of the retention loss; NaN before the first measurement.
        xi: ξ, nuPI's filtered violation; NaN before its first step.
    """

    lam: Scalar | float
    ema: Scalar | float = math.nan
    xi: Scalar | float = math.nan


def advance(
    state: Multiplier,
    retention_loss: Scalar | float,
    epsilon: Scalar | float,
    config: CraftConfig,
    moves: Scalar | bool = True,
) -> Multiplier:
    """Return the dual state after one step.

    ``L̄ ← L_ret`` at the first measurement, then ``L̄ ← β L̄ + (1 − β) L_ret`` with β = ``retention_ema``. With the
    violation ``e = L̄ − ε``, ``ascent``: ``λ ← clip(λ + κ_i e)``; ``nupi``: ``ξ' = ν ξ + (1 − ν) e`` and
    ``λ ← clip(λ + κ_i e + κ_p (ξ' − ξ))``; κ_i = ``lambda_lr``, κ_p = ``nupi_kp``, ν = ``nupi_nu``, clip to
    [0, ``lambda_max``]. nuPI's first step is plain ascent and leaves ξ = 0: algorithm 1 with ξ_0 = 0, which is cooper's
    default (``nuPIInitType.SGD``). Under ``ascent`` ξ stays as it was.

    Args:
        state: λ, L̄ and ξ before.
        retention_loss: L_ret of this step.
        epsilon: ε(t).
        config: Gives ``lambda_controller``, ``lambda_lr``, ``lambda_max``, ``nupi_kp``, ``nupi_nu``, ``retention_ema``.
        moves: Whether this step measured the loss and was not skipped; where it did not, and where L̄ − ε is not
            finite, the state stays as it was.

    Returns:
        λ, L̄ and ξ after.

    Source: arXiv 2406.04558, algorithm 1. Deviation: the violation may be that of a running average.

    Example:
        >>> c = CraftConfig(lambda_lr=0.5, lambda_controller="nupi", nupi_kp=1.0)
        >>> first = advance(Multiplier(1.0), 2.0, 1.0, c)
        >>> first, advance(first, 2.0, 1.0, c).lam
        (Multiplier(lam=1.5, ema=2.0, xi=0.0), 3.0)
    """
    *old, loss, bound = _alike(*state, retention_loss, epsilon)
    before = Multiplier(*old)
    # A number that differs from itself is NaN: nothing has been measured yet.
    ema = where(before.ema == before.ema, config.retention_ema * before.ema + (1.0 - config.retention_ema) * loss, loss)
    violation = ema - bound
    shift, xi = config.lambda_lr * violation, before.xi
    if config.lambda_controller == "nupi":
        filtered = config.nupi_nu * xi + (1.0 - config.nupi_nu) * violation
        started = xi == xi
        shift = shift + where(started, config.nupi_kp * (filtered - xi), 0.0)
        xi = where(started, filtered, 0.0)
    after = Multiplier(clamp(before.lam + shift, 0.0, config.lambda_max), ema, xi)
    # The violation, not the result: the clip would turn an infinite loss into lambda_max.
    moves = moves & isfinite(violation)
    return Multiplier(*(where(moves, *pair) for pair in zip(after, before, strict=True)))


def update_lambda(
    lam: Scalar | float, retention_loss: Scalar | float, epsilon: Scalar | float, config: CraftConfig
) -> Scalar | float:
    """Return the multiplier after one step of :func:`advance` from a fresh state: projected dual ascent.

    ``λ ← clip(λ + lambda_lr (L_ret − ε), 0, lambda_max)``; a retention loss that is not finite leaves λ as it was.

    Args:
        lam: λ before, a number or a tensor of shape ().
        retention_loss: L_ret, a number or a tensor of shape ().
        epsilon: ε(t), a number or a tensor of shape ().
        config: Gives ``lambda_lr`` and ``lambda_max``.

    Returns:
        λ after: a number, or fp64 of shape () where any of the three is a tensor.

    Example:
        >>> update_lambda(1.0, 1.5, 1.0, CraftConfig(lambda_lr=0.1))
        1.05
    """
    return advance(Multiplier(lam), retention_loss, epsilon, config).lam


def _alike(*values: Scalar | float) -> list[Scalar | float]:
    """All as numbers, or with a tensor among them all as fp64 tensors on the device of the first one."""
    device = next((x.device for x in values if isinstance(x, Tensor)), None)
    if device is None:
        return [float(x) for x in values]
    return [torch.as_tensor(x, dtype=torch.float64, device=device) for x in values]


# Order of the entries in the device vector, shared with the kernel.
LAM, CLOCK, SKIPPED, EMA, XI = range(5)


@dataclass(frozen=True)
class DualState:
    """λ, the clock of ε, the count of skipped steps and the controller's memory, as one fp64 vector on a device.

    Attributes:
        vector: Shape (5,), fp64: λ, t (completed, non-skipped steps), skipped steps, L̄ and ξ (see
            :class:`Multiplier`).
    """

    vector: Float[Tensor, "5"]

    @classmethod
    def create(cls, config: CraftConfig, device: torch.device | str) -> DualState:
        """Return the state before the first step."""
        first = [config.initial_lambda, 0.0, 0.0, math.nan, math.nan]
        return cls(torch.tensor(first, dtype=torch.float64, device=device))

    def state_dict(self) -> dict[str, Tensor]:
        """Return ``lam``, ``ema``, ``xi`` (fp64), ``t`` and ``skipped`` (int64), each a copy of shape () on the CPU."""
        lam, clock, skipped, ema, xi = self.vector.detach().to("cpu", copy=True)
        return {
            "lam": lam.clone(),
            "t": clock.to(torch.int64),
            "skipped": skipped.to(torch.int64),
            "ema": ema.clone(),
            "xi": xi.clone(),
        }

    def load_state_dict(self, state: dict[str, Tensor], config: CraftConfig) -> None:
        """Take over a saved state; one without ``ema`` and ``xi``, as older files are, has measured nothing yet.

        Raises:
            ValueError: An entry is missing, is no scalar, or lies outside what ``config`` allows.
        """
        values = []
        for name in ("lam", "t", "skipped", "ema", "xi"):
            if name not in state and name in ("ema", "xi"):
                values.append(math.nan)
                continue
            if name not in state:
                raise ValueError(f"craft_dual has no entry {name!r} (found: {', '.join(sorted(state)) or 'nothing'})")
            value = torch.as_tensor(state[name])
            if value.numel() != 1:
                raise ValueError(f"craft_dual[{name!r}] must be a scalar, got shape {tuple(value.shape)}")
            values.append(float(value))
        lam, clock, skipped, ema, xi = values
        if not 0.0 <= lam <= config.lambda_max:
            raise ValueError(
                f"craft_dual['lam'] must be in [0, lambda_max = {config.lambda_max:g}], got {lam!r}; "
                f"raise lambda_max or start a fresh run"
            )
        if not (clock >= 0 and skipped >= 0 and clock.is_integer() and skipped.is_integer()):
            raise ValueError(f"craft_dual counts must be whole numbers >= 0, got t={clock!r}, skipped={skipped!r}")
        if math.isinf(ema) or math.isinf(xi):
            raise ValueError(f"craft_dual['ema'] and ['xi'] must be finite or NaN, got ema={ema!r}, xi={xi!r}")
        self.vector.copy_(torch.tensor(values, dtype=torch.float64))
