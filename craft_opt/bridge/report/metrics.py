"""Metrics of continual learning as the literature defines them, with intervals. Pure functions of NumPy arrays.

Notation: ``R[t, k]`` is the success of skill k after stage t, t = 0 … T−1; stage 0 is the pre-training, which gives the
starting policy. ``learned[k]`` is the stage in which skill k was learned. A skill is *old* where ``learned[k] = 0`` and
*new* otherwise. Every function of R takes leading axes (seeds, resamples) and gives its result for each of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Statistic = Callable[[Array], Array]

LEVEL = 0.95
Z = 1.959963984540054  # the normal distribution's 97.5 % point
RESAMPLES = 2000


def average_success(success: Array) -> Array:
    """Mean success over all skills after the last stage.

    ``ACC = 1/K Σ_k R[T−1, k]``

    Args:
        success: R, [..., stages, skills], in [0, 1].

    Source: Lopez-Paz and Ranzato, "Gradient episodic memory" (arXiv 1706.08840), section 2 (average accuracy).
    """
    return np.asarray(success[..., -1, :].mean(axis=-1))


def old_success(success: Array, learned: Sequence[int]) -> Array:
    """Mean success after the last stage over the skills of the starting policy."""
    return np.asarray(success[..., -1, _where(learned, lambda stage: stage == 0)].mean(axis=-1))


def new_success(success: Array, learned: Sequence[int]) -> Array:
    """Mean success after the last stage over the skills learned in the stages after the pre-training."""
    return np.asarray(success[..., -1, _where(learned, lambda stage: stage > 0)].mean(axis=-1))


def kept_of_before(success: Array, learned: Sequence[int]) -> Array:
    """Old success after the last stage over old success before the first, 1 where both are 0."""
    before = success[..., 0, _where(learned, lambda stage: stage == 0)].mean(axis=-1)
    after = old_success(success, learned)
    return np.where(before > 0, after / np.where(before > 0, before, 1.0), np.where(after > 0, np.inf, 1.0))


def forgetting(success: Array, learned: Sequence[int]) -> Array:
    """Mean over the skills learned before the last stage of the best success before it less that after it.

    ``f_k = max_{t < T−1} R[t, k] − R[T−1, k]``, mean over k with ``learned[k] < T−1``; negative where a skill gained.

    Args:
        success: R, [..., stages, skills].
        learned: Stage in which each skill was learned.

    Raises:
        ValueError: No skill was learned before the last stage.

    Source: Chaudhry et al., "Riemannian walk" (arXiv 1801.10112), section 3.1.
    """
    earlier = _learned_before_last(success, learned)
    best = success[..., :-1, :].max(axis=-2)[..., earlier]
    return np.asarray((best - success[..., -1, earlier]).mean(axis=-1))


def nbt(success: Array, learned: Sequence[int]) -> Array:
    """LIBERO's negative backward transfer: mean loss of success over all later stages; lower is better.

    ``NBT_k = 1/(T−1−s) Σ_{t=s+1}^{T−1} (R[s, k] − R[t, k])`` with ``s = learned[k]``; mean over the skills with a later
    stage. Convention: the skills of the last stage, for which the sum is empty, are left out of the mean; the skills of
    the pre-training are in it.

    Args:
        success: R, [..., stages, skills].
        learned: Stage in which each skill was learned.

    Raises:
        ValueError: No skill was learned before the last stage.

    Source: Liu et al., "LIBERO" (arXiv 2306.03310), section 4.
    """
    earlier = _learned_before_last(success, learned)
    terms = [success[..., learned[k], k] - success[..., learned[k] + 1 :, k].mean(axis=-1) for k in earlier]
    return np.asarray(np.stack(terms, axis=-1).mean(axis=-1))


def fwt(curves: Mapping[int, Sequence[float]]) -> float:
    """LIBERO's forward transfer: success while a skill is being learned, mean over its checkpoints and the skills.

    ``FWT_k = 1/|E| Σ_{e ∈ E} c_k(e)``, mean over k. LIBERO takes 11 checkpoints of 50 epochs, the first before
    training and the last after it; here a curve has as many as were measured, equally spaced, with the same two ends.
    Skills of the pre-training have no curve and do not count. Deviation: LIBERO keeps the best checkpoint of a task and
    counts its success for all later ones; here a policy is what it is at each of them, and at the end of the stage.

    Args:
        curves: Skill → its success at the checkpoints of its own stage, first to last.

    Raises:
        ValueError: There is no curve.

    Source: Liu et al., "LIBERO" (arXiv 2306.03310), section 4.
    """
    if not curves:
        raise ValueError("FWT needs the learning curve of at least one skill, and there is none")
    return float(np.mean([np.mean(curve) for curve in curves.values()]))


def auc(success: Array, learned: Sequence[int], curves: Mapping[int, Sequence[float]]) -> Array:
    """LIBERO's area under the success curve; higher is better.

    ``AUC_k = 1/(T−s) (FWT_k + Σ_{t=s+1}^{T−1} R[t, k])`` with ``s = learned[k]``, mean over all skills. Conventions:
    for a skill of the last stage the sum is empty and AUC_k = FWT_k; a skill of the pre-training has no learning curve,
    and ``R[0, k]``, the same for every method, stands for its FWT_k.

    Args:
        success: R, [..., stages, skills].
        learned: Stage in which each skill was learned.
        curves: Skill → its success at the checkpoints of its own stage; one for each skill learned after stage 0.

    Raises:
        ValueError: A skill lacks its curve.

    Source: Liu et al., "LIBERO" (arXiv 2306.03310), section 4.
    """
    if missing := [k for k, stage in enumerate(learned) if stage > 0 and k not in curves]:
        raise ValueError(f"AUC needs the learning curve of every skill learned after stage 0, missing: {missing}")
    stages = success.shape[-2]
    terms = []
    for k, stage in enumerate(learned):
        during = success[..., 0, k] if stage == 0 else np.full(success.shape[:-2], float(np.mean(curves[k])))
        terms.append((during + success[..., stage + 1 :, k].sum(axis=-1)) / (stages - stage))
    return np.asarray(np.stack(terms, axis=-1).mean(axis=-1))


def wilson(successes: int, rollouts: int, z: float = Z) -> tuple[float, float]:
    """Wilson's interval of a success rate, 95 % by default.

    Source: Wilson (1927), "Probable inference, the law of succession, and statistical inference".
    """
    rate, squared = successes / rollouts, z * z
    centre = (rate + squared / (2 * rollouts)) / (1 + squared / rollouts)
    half = z / (1 + squared / rollouts) * math.sqrt(rate * (1 - rate) / rollouts + squared / (4 * rollouts**2))
    # Rounding must not leave [0, 1] where all or none succeeded.
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Difference:
    """A difference of two methods with its interval.

    Attributes:
        value: The first less the second.
        low: Lower end of the interval.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    @property
    def is_tie(self) -> bool:
        """Whether the interval holds 0."""
        return self.low <= 0.0 <= self.high


class PairedBootstrap:
    """Resamples of seeds and rollouts, the same for every method, so that differences are paired.

    Each resample draws seeds with replacement and, within each seed and skill, rollouts with replacement: rollout i of
    a skill and seed places the objects alike for every method and stage, and is drawn for all of them together. Where
    one seed was run, the interval tells of the rollouts alone.

    Args:
        seeds: Number of seeds.
        skills: Number of skills.
        rollouts: Rollouts of each skill and seed.
        resamples: How many.
        seed: Of the resampling.

    Source: Efron and Tibshirani, "An introduction to the bootstrap" (1993), chapters 8 and 13 (percentile interval).
    """

    def __init__(self, seeds: int, skills: int, rollouts: int, resamples: int = RESAMPLES, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self._seeds = rng.integers(seeds, size=(resamples, seeds))
        even = np.full(rollouts, 1 / rollouts)
        # Counts of a multinomial are what drawing with replacement gives, and make a resampled mean a dot product.
        self._weights = rng.multinomial(rollouts, even, size=(resamples, seeds, skills)) / rollouts

    def resample(self, outcomes: NDArray[np.bool_]) -> Array:
        """R in every resample of the rollouts, before the seeds are drawn.

        Args:
            outcomes: [seeds, stages, skills, rollouts], True for a success.

        Returns:
            [resamples, seeds, stages, skills].
        """
        # Transposed for a batched matrix product, which is what makes this fast.
        drawn = outcomes.transpose(0, 2, 1, 3).astype(np.float64) @ self._weights[..., None]
        return np.ascontiguousarray(drawn[..., 0].swapaxes(-1, -2))

    def values(self, resampled: Array, statistic: Statistic) -> Array:
        """The statistic's mean over the drawn seeds in every resample, [resamples].

        Args:
            resampled: What :meth:`resample` gave.
            statistic: R [..., seeds, stages, skills] → [..., seeds].
        """
        return np.asarray(np.take_along_axis(statistic(resampled), self._seeds, axis=1).mean(axis=1))


def percentile_interval(drawn: Array) -> tuple[float, float]:
    """The 95 % percentile interval of resampled values."""
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _where(learned: Sequence[int], wanted: Callable[[int], bool]) -> list[int]:
    return [k for k, stage in enumerate(learned) if wanted(stage)]


def _learned_before_last(success: Array, learned: Sequence[int]) -> list[int]:
    found = _where(learned, lambda stage: stage < success.shape[-2] - 1)
    if not found:
        raise ValueError(
            f"no skill was learned before the last of {success.shape[-2]} stages, so none can be forgotten"
        )
    return found
