"""Settings of CRaFT: one frozen, validated dataclass."""

# No `from __future__ import annotations`: LeRobot's command line (draccus) reads the annotations at run time.
import math
from dataclasses import dataclass, fields

RETENTION_MODES = ("hidden", "token_ce")
RETENTION_LOSSES = ("nmse", "mse", "cosine", "l1")
EPSILON_SCHEDULES = ("linear", "cosine", "exponential")
PROJECTION_MODES = ("weighted", "equal", "task_priority")
TOKEN_LOSSES = ("kl", "ce")
TEACHERS = ("cache", "adapters_off")
LAMBDA_CONTROLLERS = ("ascent", "nupi")
EPSILON_MODES = ("schedule", "auto")
OFF_STEPS = ("skip", "reuse")
BF16_ROUNDINGS = ("nearest", "stochastic")
# A running average with a decay of 1 would never move, and ε as no fraction of the drift would never be met.
BELOW_ONE = 1.0 - 1e-6
SMALLEST_FRACTION = 1e-6


@dataclass(frozen=True)
class CraftConfig:
    """Settings of constrained retention fine-tuning.

    The problem is ``min L_task(θ) subject to L_ret(θ) ≤ ε(t)``. :class:`~craft_opt.CraftOptimizer` reads the
    surgery and dual fields only; the anchor fields are for the training loop around it.

    Attributes:
        enabled: Whether the training loop computes a retention loss at all.
        anchor_cache_dir: Folder of the anchor cache; empty means none.
        anchor_batch_size: Anchors per retention step, at least 1.
        retention_freq: K; retention runs at steps 0, K, 2K, ...
        retention_mode: ``hidden`` (features of the teacher) or ``token_ce`` (its tokens).
        retention_loss: Distance of features for ``hidden``: ``nmse``, ``mse``, ``cosine`` or ``l1``. ``nmse`` is the
            squared error over the variance of the teacher's features, dimensionless, so that ε means the same for
            every policy.
        initial_lambda: λ at t = 0, in [0, ``lambda_max``].
        lambda_lr: Step size of the dual ascent λ ← clip(λ + lambda_lr (L_ret − ε(t)), 0, lambda_max).
        lambda_max: Upper bound of λ, finite.
        epsilon_start: ε at t = 0, in units of the retention loss.
        epsilon_end: ε at t = ``epsilon_decay_steps`` and after.
        epsilon_decay_steps: Steps from start to end; 0 means all steps of the run.
        epsilon_schedule: ``linear``, ``cosine`` or ``exponential``.
        use_grad_projection: Whether a conflicting task gradient is projected.
        conflict_threshold: A cosine in [-1, 1]; the gradients conflict when their cosine is below it.
        projection_mode: How the gradients merge: ``weighted`` (g_t' + λ g_r), ``equal`` (½ (g_t' + g_r)) or
            ``task_priority`` (g_t' + min(λ, 1) g_r).
        anchor_cache_weights: Weights of the caches where ``anchor_cache_dir`` names several, as text with commas,
            such as ``2,1``; empty means equal weights. They are normalised to a sum of 1.
        replay_weight: For ``hidden``: weight of the cross-entropy of the anchors' action tokens in the retention
            gradient, beside that of the drift; at least 0. L_ret, which λ and ε look at, is the drift alone.
        teacher: Where the teacher's features come from under ``hidden``: ``cache`` (stored) or ``adapters_off``
            (computed at every retention step by the policy itself with its LoRA adapters switched off; the cache gives
            the samples alone).
        token_loss: Distance for ``token_ce``: ``kl`` (to the teacher's stored top-k distribution) or ``ce`` (CE of the
            stored tokens minus the teacher's own CE); both are 0 where nothing has drifted.
        off_steps: What happens between the steps that measure retention: ``skip`` (plain AdamW) or ``reuse`` (project
            against, and merge, the last retention gradient, which still lies in its buffer).
        reuse_decay: Factor in [0, 1] on the reused retention gradient for every step of its age.
        lambda_controller: ``ascent`` (the rule of ``lambda_lr`` above) or ``nupi`` (a PI controller, arXiv 2406.04558,
            with ``lambda_lr`` as the integral gain).
        nupi_kp: Proportional gain of ``nupi``, at least 0.
        nupi_nu: ν of ``nupi`` in [0, 1): decay of the running average of the violation under the proportional gain.
        retention_ema: Decay in [0, 1) of a running average of L_ret that λ is held against; 0 takes L_ret as it is.
        epsilon: ``schedule`` (``epsilon_start`` to ``epsilon_end``) or ``auto``: the training loop measures the drift
            of a short naive run and sets both ends to fractions of it.
        epsilon_auto_fraction: ε at the end of the schedule under ``auto``, as a fraction of that drift, in (0, 1];
            ε at the start is twice as much.
        epsilon_auto_steps: Length of the naive run in steps, at least 1.
        bf16_rounding: How an updated bf16 parameter is rounded from fp32: ``nearest`` or ``stochastic``, which moves
            it by less than half a unit in the last place with the right probability.
        rounding_seed: Seed of the stochastic rounding, in [0, 2^31).

    Raises:
        ValueError: A value is out of its range; the message has the field, the value and what is allowed.

    Example:
        >>> CraftConfig(conflict_threshold=0.0).conflict_threshold
        0.0
    """

    enabled: bool = True
    anchor_cache_dir: str = ""
    anchor_batch_size: int = 16
    retention_freq: int = 5
    retention_mode: str = "hidden"
    retention_loss: str = "nmse"
    initial_lambda: float = 1.0
    # In units of the teacher's feature variance a run at λ = 1 drifts by 0.02 to 0.03 and keeps its skills, one without
    # retention by 0.15 and loses them (docs/quickstart.md). The report's ε from 1.0 to 0.1 with lambda_lr 0.01 lies
    # above both: λ was 0 after 120 steps, and a skill was lost.
    lambda_lr: float = 0.1
    lambda_max: float = 10.0
    epsilon_start: float = 0.05
    epsilon_end: float = 0.02
    epsilon_decay_steps: int = 0
    epsilon_schedule: str = "linear"
    use_grad_projection: bool = True
    conflict_threshold: float = -0.1
    projection_mode: str = "weighted"
    anchor_cache_weights: str = ""
    replay_weight: float = 0.0
    teacher: str = "cache"
    token_loss: str = "kl"
    off_steps: str = "skip"
    reuse_decay: float = 1.0
    lambda_controller: str = "ascent"
    nupi_kp: float = 1.0
    nupi_nu: float = 0.0
    retention_ema: float = 0.0
    epsilon: str = "schedule"
    epsilon_auto_fraction: float = 0.2
    epsilon_auto_steps: int = 50
    bf16_rounding: str = "nearest"
    rounding_seed: int = 0

    def __post_init__(self) -> None:
        """Refuse every value that the method does not define."""
        for field in fields(self):
            check_type(field.name, getattr(self, field.name), type(field.default))
        check_choice("retention_mode", self.retention_mode, RETENTION_MODES)
        check_choice("retention_loss", self.retention_loss, RETENTION_LOSSES)
        check_choice("epsilon_schedule", self.epsilon_schedule, EPSILON_SCHEDULES)
        check_choice("projection_mode", self.projection_mode, PROJECTION_MODES)
        check_choice("teacher", self.teacher, TEACHERS)
        check_choice("token_loss", self.token_loss, TOKEN_LOSSES)
        check_choice("off_steps", self.off_steps, OFF_STEPS)
        check_choice("lambda_controller", self.lambda_controller, LAMBDA_CONTROLLERS)
        check_choice("epsilon", self.epsilon, EPSILON_MODES)
        check_choice("bf16_rounding", self.bf16_rounding, BF16_ROUNDINGS)
        check_range("anchor_batch_size", self.anchor_batch_size, 1)
        check_range("retention_freq", self.retention_freq, 1)
        check_range("epsilon_decay_steps", self.epsilon_decay_steps, 0)
        check_range("lambda_lr", self.lambda_lr, 0.0)
        check_range("lambda_max", self.lambda_max, 0.0)
        check_range("initial_lambda", self.initial_lambda, 0.0, self.lambda_max, high_name="lambda_max")
        check_range("epsilon_start", self.epsilon_start, 0.0)
        check_range("epsilon_end", self.epsilon_end, 0.0)
        check_range("conflict_threshold", self.conflict_threshold, -1.0, 1.0)
        check_range("reuse_decay", self.reuse_decay, 0.0, 1.0)
        check_range("replay_weight", self.replay_weight, 0.0)
        check_range("nupi_kp", self.nupi_kp, 0.0)
        check_range("nupi_nu", self.nupi_nu, 0.0, BELOW_ONE)
        check_range("retention_ema", self.retention_ema, 0.0, BELOW_ONE)
        check_range("epsilon_auto_fraction", self.epsilon_auto_fraction, SMALLEST_FRACTION, 1.0)
        check_range("epsilon_auto_steps", self.epsilon_auto_steps, 1)
        check_range("rounding_seed", self.rounding_seed, 0, 2**31 - 1)
        if self.teacher == "adapters_off" and self.retention_mode != "hidden":
            raise ValueError(
                f"teacher='adapters_off' gives features, and retention_mode is {self.retention_mode!r}; "
                f"use retention_mode='hidden' or teacher='cache'"
            )
        if self.replay_weight and self.retention_mode != "hidden":
            raise ValueError(
                f"replay_weight={self.replay_weight!r} adds to the features' gradient, and retention_mode is "
                f"{self.retention_mode!r}; use retention_mode='hidden' or replay_weight=0"
            )
        if self.epsilon_schedule == "exponential" and min(self.epsilon_start, self.epsilon_end) <= 0:
            raise ValueError(
                f"epsilon_schedule='exponential' needs epsilon_start and epsilon_end above 0, got "
                f"epsilon_start={self.epsilon_start!r} and epsilon_end={self.epsilon_end!r}; "
                f"use epsilon_schedule='linear' to reach 0"
            )


def check_type(name: str, value: object, expected: type) -> None:
    """Refuse a setting of another type: a bool is no number here, an int serves where a float is asked for."""
    allowed = (int, float) if expected is float else (expected,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and expected is not bool):
        raise ValueError(f"{name} must be of type {expected.__name__}, got {value!r} ({type(value).__name__})")


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse a setting that is none of those defined."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def check_range(name: str, value: float, low: float, high: float = math.inf, *, high_name: str | None = None) -> None:
    """Refuse a setting that is not finite, or not in [low, high] (``high_name``: what sets high)."""
    if not (math.isfinite(value) and low <= value <= high):
        if math.isinf(high):
            allowed = f"finite and at least {low:g}"
        else:
            allowed = f"in [{low:g}, {high_name + ' = ' if high_name else ''}{high:g}]"
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
