"""The backends of the step: the Triton kernel, the CPU kernel, and flat torch operations as the portable form.

None of them waits for a CUDA device.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from craft_opt.config import CraftConfig
from craft_opt.dual import Multiplier, advance, epsilon_schedule
from craft_opt.kernels import rounding
from craft_opt.kernels import surgery_adamw as kernel
from craft_opt.optimizer._layout import DeviceLayout, Slot
from craft_opt.scalars import isfinite, where
from craft_opt.surgery import Gram, coefficients, task_only_coefficients

# Elements of a partial dot product, widened to fp64 at a time: 2 MB.
REDUCE_CHUNK = 1 << 18
# Elements that are widened to fp32 at a time for half-precision parameters: bounds the temporary memory, and small
# temporaries come from the allocator without page faults. bf16, 20 M elements, one thread: 38 ms with 2**20, 48 with
# 2**22, 53 with 2**24, 55 with 2**19.
WIDEN_CHUNK = 1 << 20

FP32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Rule:
    """What decides a step, apart from the gradients: settings that a run does not change."""

    config: CraftConfig
    max_grad_norm: float | None
    decay_steps: int


class Backend(Protocol):
    """Reduce the gradients of a device to their Gram matrix; then update parameters, moments and the dual state."""

    # Whether gradients are read where autograd left them; otherwise they land in flat buffers.
    in_place: bool

    def step(self, layout: DeviceLayout, groups: Sequence[Mapping[str, Any]], rule: Rule, has_ret: bool) -> None:
        """Reduce and apply on one device."""

    def reduce(self, layout: DeviceLayout, groups: Sequence[Mapping[str, Any]], rule: Rule, has_ret: bool) -> Tensor:
        """Return tt, tr, rr of this device's gradients, fp64, shape (3,)."""

    def apply(
        self,
        layout: DeviceLayout,
        groups: Sequence[Mapping[str, Any]],
        rule: Rule,
        has_ret: bool,
        gram: Tensor,
    ) -> None:
        """Apply the update that follows from the Gram matrix summed over all devices."""


class Decision(NamedTuple):
    """What follows from the Gram matrix; numbers, or tensors of shape ().

    Attributes:
        a: Weight of the task gradient in AdamW's gradient, clip and scale included.
        b: Weight of the retention gradient.
        ratio: b / a.
        finite: Whether the step takes place.
        dual: The dual state after it, in the order of ``DUAL_NAMES``.
        metrics: In the order of ``METRIC_NAMES``.
    """

    a: Any
    b: Any
    ratio: Any
    finite: Any
    dual: list[Any]
    metrics: list[Any]


def decide(gram: Sequence[Any], step_in: Sequence[Any], dual: Sequence[Any], rule: Rule, has_ret: bool) -> Decision:
    """The scalar part of a step, for numbers and for tensors alike.

    Args:
        gram: tt, tr, rr of the gradients as they lie there, a GradScaler's scale included.
        step_in: In the order of ``STEP_IN_NAMES``.
        dual: In the order of ``DUAL_NAMES``.
        rule: Settings.
        has_ret: Whether there is a retention gradient.
    """
    captured, grad_scale, found_inf, measured, ret_weight = step_in
    ratio: Any
    scale: Any
    lam, clock, skipped, ema, xi = dual
    epsilon = epsilon_schedule(clock, rule.config, rule.decay_steps)
    tt, tr, rr = (x / (grad_scale * grad_scale) for x in gram)
    if has_ret:
        coef = coefficients(Gram(tt, tr, rr), lam, rule.config, rule.max_grad_norm, ret_weight)
    else:
        coef = task_only_coefficients(tt, rule.max_grad_norm)
    ratio, scale = coef.b / coef.a, coef.clip / grad_scale
    # A ratio beyond fp32 (a retention gradient of denormals) would turn 0 * inf into NaN.
    finite = isfinite(tt) & isfinite(tr) & isfinite(rr) & (found_inf == 0) & (abs(ratio) <= FP32_MAX)
    if has_ret:
        finite = finite & isfinite(captured)
    after = advance(Multiplier(lam, ema, xi), captured, epsilon, rule.config, finite & (measured > 0) & has_ret)
    clock, skipped = where(finite, clock + 1, clock), where(finite, skipped, skipped + 1)
    missing = tt * math.nan
    named = {
        "dot": tr if has_ret else missing,
        "cos": coef.cos if has_ret else missing,
        "conflict": where(coef.conflict, 1.0, 0.0),
        "grad_norm": coef.grad_norm,
        "lam_before": lam,
        "lam_after": after.lam,
        "epsilon": epsilon,
        "retention_loss": where(measured > 0, captured, math.nan) if has_ret else missing,
        "skipped": where(finite, 0.0, 1.0),
        "skipped_total": skipped,
        "a": coef.a,
        "b": coef.b,
        "clip_scale": coef.clip,
        "tt": tt,
        "rr": rr if has_ret else missing,
        "t": clock,
    }
    return Decision(
        a=coef.a * scale,
        b=coef.b * scale,
        ratio=ratio,
        finite=finite,
        dual=[after.lam, clock, skipped, after.ema, after.xi],
        metrics=[named[name] for name in kernel.METRIC_NAMES],
    )


class NumbaBackend:
    """Two native passes over gradients, parameters and moments where they lie; scalars are Python numbers."""

    in_place = True

    def __init__(self) -> None:
        # Imported here: Numba takes most of a second, and whoever trains on a GPU never needs it.
        from craft_opt.kernels import surgery_adamw_cpu

        self._kernel = surgery_adamw_cpu

    def step(self, layout: DeviceLayout, groups: Sequence[Mapping[str, Any]], rule: Rule, has_ret: bool) -> None:
        """Reduce and apply on one device."""
        self._finish(layout, groups, rule, has_ret, self._gram(layout))

    def reduce(self, layout: DeviceLayout, groups: Sequence[Mapping[str, Any]], rule: Rule, has_ret: bool) -> Tensor:
        """Return tt, tr, rr in fp64, shape (3,)."""
        return torch.tensor(self._gram(layout), dtype=torch.float64)

    def apply(
        self,
        layout: DeviceLayout,
        groups: Sequence[Mapping[str, Any]],
        rule: Rule,
        has_ret: bool,
        gram: Tensor,
    ) -> None:
        """Merge, clip, AdamW and the multiplier."""
        self._finish(layout, groups, rule, has_ret, gram.tolist())

    def _gram(self, layout: DeviceLayout) -> tuple[float, float, float]:
        k, plan = self._kernel, layout.backend_state
        if not isinstance(plan, k.CpuPlan):
            plan = k.CpuPlan([slot.size.numel() for slot in layout.slots], [slot.dtype for slot in layout.slots])
            plan.table[:, k.GROUP] = [slot.group for slot in layout.slots]
            plan.table[:, k.M] = [slot.exp_avg.data_ptr() for slot in layout.slots]
            plan.table[:, k.V] = [slot.exp_avg_sq.data_ptr() for slot in layout.slots]
            if layout.amsgrad:
                plan.table[:, k.V_MAX] = [_present(slot.max_exp_avg_sq).data_ptr() for slot in layout.slots]
            layout.backend_state = plan
        plan.table[:, k.P] = [slot.target.data_ptr() for slot in layout.slots]
        plan.table[:, k.TASK] = _addresses([slot.task_view for slot in layout.slots], layout.task_present)
        plan.table[:, k.RET] = _addresses([slot.ret_view for slot in layout.slots], layout.ret_present)
        return plan.gram()

    def _finish(
        self,
        layout: DeviceLayout,
        groups: Sequence[Mapping[str, Any]],
        rule: Rule,
        has_ret: bool,
        gram: Sequence[float],
    ) -> None:
        buffers, plan = layout.buffers, layout.backend_state
        assert isinstance(plan, self._kernel.CpuPlan), "the reduction made it"
        before = buffers.dual.tolist()
        decision = decide(gram, buffers.step_in.tolist(), before, rule, has_ret)
        if decision.finite:
            stochastic = rule.config.bf16_rounding == "stochastic"
            if stochastic:
                keys = rounding.rounding_keys(rule.config.rounding_seed, layout.streams, int(before[1]))
                plan.table[:, self._kernel.KEY] = keys.numpy()
            plan.update(_packed(groups), buffers.steps, decision.a, decision.b, stochastic=stochastic)
            buffers.steps.add_(_mask(layout.reached, layout.device))
        buffers.dual.copy_(torch.tensor(decision.dual, dtype=torch.float64))
        buffers.metrics.copy_(torch.tensor(decision.metrics, dtype=torch.float64))


class TorchBackend:
    """The step in flat tensor operations: where neither kernel runs, and the second implementation that tests use."""

    in_place = False

    def step(self, layout: DeviceLayout, groups: Sequence[Mapping[str, Any]], rule: Rule, has_ret: bool) -> None:
        """Reduce and apply on one device."""
        self.apply(layout, groups, rule, has_ret, self.reduce(layout, groups, rule, has_ret))

    def reduce(self, layout: DeviceLayout, groups: Sequence[Mapping[str, Any]], rule: Rule, has_ret: bool) -> Tensor:
        """Return tt, tr, rr in fp64, shape (3,)."""
        pairs = [
            (task, layout.buffers.grads_ret[dtype] if has_ret else None)
            for dtype, task in layout.buffers.grads_task.items()
        ]
        return _gram(pairs)

    def apply(
        self,
        layout: DeviceLayout,
        groups: Sequence[Mapping[str, Any]],
        rule: Rule,
        has_ret: bool,
        gram: Tensor,
    ) -> None:
        """Merge, clip, AdamW and the multiplier."""
        buffers = layout.buffers
        dual = buffers.dual.clone()
        decision = decide(gram.unbind(), buffers.step_in.unbind(), dual.unbind(), rule, has_ret)
        self._adamw(layout, groups, rule, decision, has_ret, dual[1])
        buffers.dual.copy_(torch.stack(decision.dual))
        buffers.metrics.copy_(torch.stack([_as_fp64(x, dual) for x in decision.metrics]))

    def _adamw(
        self,
        layout: DeviceLayout,
        groups: Sequence[Mapping[str, Any]],
        rule: Rule,
        decision: Decision,
        has_ret: bool,
        clock: Tensor,
    ) -> None:
        """AdamW on ``a * (g_t + ratio * g_r)`` for every parameter with a gradient, if the step is finite."""
        buffers, finite = layout.buffers, decision.finite
        # A skipped step must leave no NaN behind in the padding of the retention buffer.
        ratio = torch.where(finite, decision.ratio, 0.0).float()
        skip = (~finite).float()
        # torch's fused AdamW divides by grad_scale and writes the quotient back to the gradients.
        divisor = torch.where(finite, 1.0 / decision.a, 1.0).float()

        present = layout.reached
        buffers.steps.add_(_mask(present, layout.device) * finite)
        exact, merged = torch.float32, None
        if has_ret and exact in buffers.grads_task:
            task, merged = buffers.grads_task[exact], buffers.grads_ret[exact]
            if rule.config.off_steps == "reuse":
                # The retention gradient is needed again.
                merged = torch.addcmul(task, merged, ratio)
            else:
                torch.addcmul(task, merged, ratio, out=merged)
                # Segments that no retention gradient reached were written too, and must be zero at the next step.
                for slot in layout.slots:
                    slot.ret_dirty = slot.ret_dirty or slot.dtype is exact
        for batch in _batches(layout.slots, present):
            group = groups[batch[0].group]
            params = [slot.target for slot in batch]
            if batch[0].dtype is exact:
                if merged is not None:
                    grads = [torch.as_strided(merged, s.size, s.stride, s.grad_offset) for s in batch]
                else:
                    # Without retention the buffer is the caller's .grad, which step() leaves as it is.
                    grads = [_present(slot.task_view).clone() for slot in batch]
                _fused_adamw(params, grads, batch, group, divisor, skip)
                continue
            grads = [_present(slot.task_view).float() for slot in batch]
            if has_ret:
                for grad, slot in zip(grads, batch, strict=True):
                    grad.addcmul_(_present(slot.ret_view).float(), ratio)
            wide = [p.float() for p in params]
            _fused_adamw(wide, grads, batch, group, divisor, skip)
            if rule.config.bf16_rounding == "stochastic" and batch[0].dtype is torch.bfloat16:
                for slot, w in zip(batch, wide, strict=True):
                    key = rounding.rounding_key(rule.config.rounding_seed, layout.streams[slot.segment], clock)
                    # Rounding what did not move gives it back, so a skipped step changes nothing here.
                    rounding.stochastic_round_(_in_memory_order(slot.target), _in_memory_order(w), key)
            else:
                torch._foreach_copy_(params, wide)


class TritonBackend:
    """The step in one kernel launch; several devices take its two-phase form."""

    in_place = False

    def step(self, layout: DeviceLayout, groups: Sequence[Mapping[str, Any]], rule: Rule, has_ret: bool) -> None:
        """Everything in one launch."""
        self._prepare(layout, groups, rule, has_ret)
        kernel.fused(layout.plan, layout.buffers, **self._constants(layout, rule, has_ret))

    def reduce(self, layout: DeviceLayout, groups: Sequence[Mapping[str, Any]], rule: Rule, has_ret: bool) -> Tensor:
        """First phase: tt, tr, rr in fp64, shape (3,)."""
        self._prepare(layout, groups, rule, has_ret)
        count = kernel.reduce(layout.plan, layout.buffers, **self._constants(layout, rule, has_ret))
        return layout.buffers.partials[:count].sum(dim=0)

    def apply(
        self,
        layout: DeviceLayout,
        groups: Sequence[Mapping[str, Any]],
        rule: Rule,
        has_ret: bool,
        gram: Tensor,
    ) -> None:
        """Second phase."""
        layout.buffers.partials[0].copy_(gram)
        kernel.apply(layout.plan, layout.buffers, n_partials=1, **self._constants(layout, rule, has_ret))

    def prepare(self, layout: DeviceLayout, groups: Sequence[Mapping[str, Any]], rule: Rule) -> None:
        """Upload what changed in hyperparameters and settings, without waiting."""
        layout.plan.set_groups(_packed(groups))
        if layout.backend_state == rule:
            return
        config = rule.config
        settings = kernel.pack_settings(
            conflict_threshold=config.conflict_threshold,
            max_grad_norm=rule.max_grad_norm,
            lambda_lr=config.lambda_lr,
            lambda_max=config.lambda_max,
            epsilon_start=config.epsilon_start,
            epsilon_end=config.epsilon_end,
            decay_steps=rule.decay_steps,
            nupi_kp=config.nupi_kp,
            nupi_nu=config.nupi_nu,
            retention_ema=config.retention_ema,
            rounding_seed=config.rounding_seed,
        )
        layout.buffers.settings.copy_(settings)
        layout.backend_state = rule

    def _prepare(self, layout: DeviceLayout, groups: Sequence[Mapping[str, Any]], rule: Rule, has_ret: bool) -> None:
        layout.plan.set_addresses([slot.target.data_ptr() for slot in layout.slots])
        layout.plan.set_present(layout.task_present, layout.ret_present if has_ret else None)
        self.prepare(layout, groups, rule)

    @staticmethod
    def _constants(layout: DeviceLayout, rule: Rule, has_ret: bool) -> dict[str, Any]:
        return {
            "merge": rule.config.projection_mode,
            "project": rule.config.use_grad_projection,
            "schedule": rule.config.epsilon_schedule,
            "controller": rule.config.lambda_controller,
            "rounding": rule.config.bf16_rounding,
            "has_ret": has_ret,
            "amsgrad": layout.amsgrad,
        }


@cache
def numba_is_available() -> bool:
    """Whether Numba is installed and may compile."""
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        return False  # somebody debugs; addresses mean nothing to interpreted Python
    try:
        return find_spec("numba") is not None
    except ModuleNotFoundError:  # an import hook that hides it
        return False


def _packed(groups: Sequence[Mapping[str, Any]]) -> list[tuple[float, ...]]:
    return [
        kernel.pack_group(
            float(group["lr"]),
            *map(float, group["betas"]),
            group["eps"],
            group["weight_decay"],
            maximize=group["maximize"],
            amsgrad=group["amsgrad"],
        )
        for group in groups
    ]


def _gram(pairs: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
    """tt, tr, rr of flat gradients in fp64, shape (3,)."""
    device = pairs[0][0].device
    parts: list[Tensor] = []
    zero = torch.zeros((), dtype=torch.float64, device=device)
    for task, ret in pairs:
        for start in range(0, task.numel(), REDUCE_CHUNK):
            t = task[start : start + REDUCE_CHUNK].double()
            if ret is None:
                parts += (torch.dot(t, t), zero, zero)
            else:
                r = ret[start : start + REDUCE_CHUNK].double()
                parts += (torch.dot(t, t), torch.dot(t, r), torch.dot(r, r))
    if not parts:
        return torch.zeros(3, dtype=torch.float64, device=device)
    return torch.stack(parts).view(-1, 3).sum(dim=0)


def _batches(slots: Sequence[Slot], present: Sequence[bool]) -> Iterator[list[Slot]]:
    """Slots with a gradient by dtype and group; half-precision ones at most WIDEN_CHUNK elements at a time."""
    kinds: dict[tuple[torch.dtype, int], list[Slot]] = defaultdict(list)
    for slot, there in zip(slots, present, strict=True):
        if there:
            kinds[slot.dtype, slot.group].append(slot)
    for (dtype, _), members in kinds.items():
        if dtype is torch.float32:
            yield members
            continue
        batch: list[Slot] = []
        size = 0
        for slot in members:
            if batch and size + slot.size.numel() > WIDEN_CHUNK:
                yield batch
                batch, size = [], 0
            batch.append(slot)
            size += slot.size.numel()
        yield batch


def _present(view: Tensor | None) -> Tensor:
    assert view is not None, "the layout allocates before a backend runs"
    return view


def _fused_adamw(
    params: list[Tensor],
    grads: list[Tensor],
    slots: Sequence[Slot],
    group: Mapping[str, Any],
    divisor: Tensor,
    skip: Tensor,
) -> None:
    amsgrad = group["amsgrad"]
    torch._fused_adamw_(
        params,
        grads,
        [slot.exp_avg for slot in slots],
        [slot.exp_avg_sq for slot in slots],
        [_present(slot.max_exp_avg_sq) for slot in slots] if amsgrad else [],
        [slot.step for slot in slots],
        lr=float(group["lr"]),
        beta1=float(group["betas"][0]),
        beta2=float(group["betas"][1]),
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=amsgrad,
        maximize=group["maximize"],
        grad_scale=divisor,
        found_inf=skip,
    )


def _mask(present: Sequence[bool], device: torch.device) -> Tensor:
    if all(present):
        return torch.ones((), dtype=torch.float32, device=device)
    return torch.tensor(present, dtype=torch.float32).to(device, non_blocking=True)


def _addresses(grads: Sequence[Tensor | None], present: Sequence[bool]) -> list[int]:
    return [g.data_ptr() if there and g is not None else 0 for g, there in zip(grads, present, strict=True)]


def _in_memory_order(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor as one dimension, in the order of their addresses."""
    return torch.as_strided(tensor, (tensor.numel(),), (1,))


def _as_fp64(x: Any, like: Tensor) -> Tensor:
    # A fill, not a copy from the host: that would wait for a CUDA device.
    return x.double() if isinstance(x, Tensor) else torch.full((), x, dtype=torch.float64, device=like.device)
