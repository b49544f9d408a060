"""The two backends of the step: flat tensor operations, and the Triton kernel. Neither waits for the device."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from craft_opt.config import CraftConfig
from craft_opt.dual import epsilon_schedule, update_lambda
from craft_opt.kernels import surgery_adamw as kernel
from craft_opt.optimizer._layout import DeviceLayout, Slot
from craft_opt.surgery import Gram, coefficients, task_only_coefficients

# Elements of a partial dot product. fp32 on two cores, 20 M elements, three dots: 4.5 ms with 2**18, 5.4 ms with 2**17,
# 7.4 ms with 2**16 (call overhead); relative error of a dot 3e-7, 1e-7 and 5e-8. fp64 chunks: 8 to 10 ms.
REDUCE_CHUNK = 1 << 18
# Where fp32 partial dots do not decide: |cos| so near 1 that the merged norm may be all cancellation (its error is at
# most 1e-6 S² / 2‖g‖, and ‖g‖ >= S sqrt(1 - cos²) / 2 with S = ‖a g_t‖ + ‖b g_r‖), a cosine this close to the conflict
# threshold, and squares this close to the ends of the fp32 range.
PARALLEL = 0.995
THRESHOLD_MARGIN = 1e-5
# tr has an error of 3e-7 sqrt(tt rr), so tr/rr, which a projection uses, has 1e-5 of itself only from this cosine on.
PROJECTED_COSINE = 0.05
FP32_SQUARES = (1e-20, 1e30)
# Elements that are widened to fp32 at a time for half-precision parameters: bounds the temporary memory, and small
# temporaries come from the allocator without page faults. bf16, 20 M elements, one thread: 38 ms with 2**20, 48 with
# 2**22, 53 with 2**24, 55 with 2**19.
WIDEN_CHUNK = 1 << 20


@dataclass(frozen=True)
class Rule:
    """What decides a step, apart from the gradients: settings that a run does not change."""

    config: CraftConfig
    max_grad_norm: float | None
    decay_steps: int


class Backend(Protocol):
    """Reduce the gradients of a device to their Gram matrix; then update parameters, moments and the dual state."""

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


class TorchBackend:
    """The step in flat tensor operations, for CPUs and as the second implementation that tests compare with."""

    def step(self, layout: DeviceLayout, groups: Sequence[Mapping[str, Any]], rule: Rule, has_ret: bool) -> None:
        """Reduce and apply on one device."""
        self.apply(layout, groups, rule, has_ret, self.reduce(layout, groups, rule, has_ret))

    def reduce(self, layout: DeviceLayout, groups: Sequence[Mapping[str, Any]], rule: Rule, has_ret: bool) -> Tensor:
        """Return tt, tr, rr in fp64, shape (3,)."""
        pairs = [
            (task, layout.buffers.grads_ret[dtype] if has_ret else None)
            for dtype, task in layout.buffers.grads_task.items()
        ]
        # Choosing by value costs nothing on a CPU; on a CUDA device it would wait for the stream.
        if layout.device.type == "cpu":
            quick = _gram(pairs, torch.float32)
            if _fp32_decides(quick, has_ret, rule.config.conflict_threshold):
                return quick
        return _gram(pairs, torch.float64)

    def apply(
        self,
        layout: DeviceLayout,
        groups: Sequence[Mapping[str, Any]],
        rule: Rule,
        has_ret: bool,
        gram: Tensor,
    ) -> None:
        """Merge, clip, AdamW and the multiplier."""
        buffers, config = layout.buffers, rule.config
        captured, grad_scale, found_inf, measured = buffers.step_in.unbind()
        lam, clock, skipped = buffers.dual.clone().unbind()
        epsilon = epsilon_schedule(clock, config, rule.decay_steps)

        tt, tr, rr = (gram / (grad_scale * grad_scale)).unbind()
        if has_ret:
            coef = coefficients(Gram(tt, tr, rr), lam, config, rule.max_grad_norm)
        else:
            coef = task_only_coefficients(tt, rule.max_grad_norm)
        finite = gram.isfinite().all() & (found_inf == 0)
        if has_ret:
            finite = finite & captured.isfinite()

        # A ratio beyond fp32 (a retention gradient of denormals) would turn 0 * inf into NaN.
        ratio = coef.b / coef.a
        finite = finite & (ratio.abs() <= torch.finfo(torch.float32).max)
        self._adamw(layout, groups, ratio, coef.a * coef.clip / grad_scale, finite, has_ret)

        lam_after = torch.where(finite & (measured > 0), update_lambda(lam, captured, epsilon, config), lam)
        buffers.dual.copy_(torch.stack((lam_after, clock + finite, skipped + ~finite)))
        missing = torch.full_like(tt, math.nan)
        named = {
            "dot": tr if has_ret else missing,
            "cos": coef.cos if has_ret else missing,
            "conflict": coef.conflict.double(),
            "grad_norm": coef.grad_norm,
            "lam_before": lam,
            "lam_after": lam_after,
            "epsilon": epsilon,
            "retention_loss": captured if has_ret else missing,
            "skipped": (~finite).double(),
            "skipped_total": buffers.dual[2],
            "a": coef.a,
            "b": coef.b,
            "clip_scale": coef.clip,
            "tt": tt,
            "rr": rr if has_ret else missing,
            "t": buffers.dual[1],
        }
        buffers.metrics.copy_(torch.stack([named[name] for name in kernel.METRIC_NAMES]))

    def _adamw(
        self,
        layout: DeviceLayout,
        groups: Sequence[Mapping[str, Any]],
        ratio: Tensor,
        scale: Tensor,
        finite: Tensor,
        has_ret: bool,
    ) -> None:
        """AdamW on ``scale * (g_t + ratio * g_r)`` for every parameter with a gradient, if ``finite``."""
        buffers = layout.buffers
        # A skipped step must leave no NaN behind in the padding of the retention buffer.
        ratio = torch.where(finite, ratio, 0.0).float()
        skip = (~finite).float()
        # torch's fused AdamW divides by grad_scale and writes the quotient back to the gradients.
        divisor: Tensor | None = torch.where(finite, 1.0 / scale, 1.0).float()
        if layout.device.type == "cpu" and divisor is not None and divisor.item() == 1.0:
            divisor = None

        present = [t or r for t, r in zip(layout.task_present, layout.ret_present, strict=True)]
        buffers.steps.add_(_mask(present, layout.device) * finite)
        exact = torch.float32
        if has_ret and exact in buffers.grads_task:
            task, ret = buffers.grads_task[exact], buffers.grads_ret[exact]
            if layout.device.type == "cpu":
                # A number where reading it waits for nobody: 3.4 ms against 5.3 ms with a broadcast tensor (20 M).
                torch.add(task, ret, alpha=ratio.item(), out=ret)
            else:
                torch.addcmul(task, ret, ratio, out=ret)
            # Segments that no retention gradient reached were written too, and must be zero again at the next step.
            for slot in layout.slots:
                slot.ret_dirty = slot.ret_dirty or slot.dtype is exact
        for batch in _batches(layout.slots, present):
            group = groups[batch[0].group]
            params = [slot.target for slot in batch]
            if batch[0].dtype is exact:
                grads = [_view(slot, has_ret) for slot in batch]
                if divisor is not None and not has_ret:
                    # Without retention the buffer is the caller's .grad, which step() leaves as it is.
                    grads = [g.clone() for g in grads]
                _fused_adamw(params, grads, batch, group, divisor, skip)
                continue
            grads = [slot.task_view.float() for slot in batch]
            if has_ret:
                for grad, slot in zip(grads, batch, strict=True):
                    grad.addcmul_(_view(slot, True).float(), ratio)
            wide = [p.float() for p in params]
            _fused_adamw(wide, grads, batch, group, divisor, skip)
            torch._foreach_copy_(params, wide)


class TritonBackend:
    """The step in one kernel launch; several devices take its two-phase form."""

    def step(self, layout: DeviceLayout, groups: Sequence[Mapping[str, Any]], rule: Rule, has_ret: bool) -> None:
        """Everything in one launch."""
        self._prepare(layout, groups, rule)
        kernel.fused(layout.plan, layout.buffers, **self._constants(layout, rule, has_ret))

    def reduce(self, layout: DeviceLayout, groups: Sequence[Mapping[str, Any]], rule: Rule, has_ret: bool) -> Tensor:
        """First phase: tt, tr, rr in fp64, shape (3,)."""
        self._prepare(layout, groups, rule)
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

    def _prepare(self, layout: DeviceLayout, groups: Sequence[Mapping[str, Any]], rule: Rule) -> None:
        layout.plan.set_addresses([slot.target.data_ptr() for slot in layout.slots])
        layout.plan.set_present(layout.task_present, layout.ret_present)
        layout.plan.set_groups(
            [
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
        )
        if layout.uploaded_rule != rule:
            config = rule.config
            settings = kernel.pack_settings(
                conflict_threshold=config.conflict_threshold,
                max_grad_norm=rule.max_grad_norm,
                lambda_lr=config.lambda_lr,
                lambda_max=config.lambda_max,
                epsilon_start=config.epsilon_start,
                epsilon_end=config.epsilon_end,
                decay_steps=rule.decay_steps,
            )
            layout.buffers.settings.copy_(settings)
            layout.uploaded_rule = rule

    @staticmethod
    def _constants(layout: DeviceLayout, rule: Rule, has_ret: bool) -> dict[str, Any]:
        return {
            "merge": rule.config.projection_mode,
            "project": rule.config.use_grad_projection,
            "schedule": rule.config.epsilon_schedule,
            "has_ret": has_ret,
            "amsgrad": layout.amsgrad,
        }


def _gram(pairs: Sequence[tuple[Tensor, Tensor | None]], dtype: torch.dtype) -> Tensor:
    """tt, tr, rr of flat gradients in fp64, shape (3,): chunks reduced in ``dtype``, their sums in fp64."""
    device = pairs[0][0].device
    parts: list[Tensor] = []
    zero = torch.zeros((), dtype=dtype, device=device)
    for task, ret in pairs:
        for start in range(0, task.numel(), REDUCE_CHUNK):
            t = task[start : start + REDUCE_CHUNK].to(dtype)
            if ret is None:
                parts += (torch.dot(t, t), zero, zero)
            else:
                r = ret[start : start + REDUCE_CHUNK].to(dtype)
                parts += (torch.dot(t, t), torch.dot(t, r), torch.dot(r, r))
    if not parts:
        return torch.zeros(3, dtype=torch.float64, device=device)
    return torch.stack(parts).double().view(-1, 3).sum(dim=0)


def _fp32_decides(gram: Tensor, has_ret: bool, threshold: float) -> bool:
    """Whether partial dots in fp32 give coefficients and norm to the bounds of the contract."""
    tt, tr, rr = gram.tolist()
    low, high = FP32_SQUARES
    squares = (tt, rr) if has_ret else (tt,)
    if not all(low < square < high for square in squares):
        return False
    if not has_ret:
        return True
    cos = tr / math.sqrt(tt) / math.sqrt(rr)
    clear = cos > threshold + THRESHOLD_MARGIN or cos < min(threshold - THRESHOLD_MARGIN, -PROJECTED_COSINE)
    return clear and abs(cos) < PARALLEL


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


def _view(slot: Slot, retention: bool) -> Tensor:
    return _present(slot.ret_view if retention else slot.task_view)


def _present(view: Tensor | None) -> Tensor:
    assert view is not None, "the layout allocates before a backend runs"
    return view


def _fused_adamw(
    params: list[Tensor],
    grads: list[Tensor],
    slots: Sequence[Slot],
    group: Mapping[str, Any],
    divisor: Tensor | None,
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
        return torch.ones((), device=device)
    return torch.tensor(present, dtype=torch.float32).to(device, non_blocking=True)
