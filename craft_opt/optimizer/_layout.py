"""Flat buffers of one device, and how gradients land in them.

A gradient lands in two ways. Autograd may accumulate into ``.grad`` in place where ``.grad`` already is a view of a
flat buffer; that costs a memset and a read-modify-write. Or ``.grad`` is None (``zero_grad`` sets it so), autograd
hands over its own tensor, and we copy it into the buffer once; that is half the traffic, so it is what we do: large
gradients at once in a hook, which frees autograd's tensor, small ones together before the step, because hundreds of
tiny copies would cost more in launches than in bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from craft_opt.kernels.surgery_adamw import SegmentSpec, SurgeryBuffers, SurgeryPlan

# Elements from which a gradient is copied in the hook. Below it, one multi-tensor copy a step is cheaper than a
# launch each (a launch costs about what 64k bf16 elements cost to move on a current data-centre GPU).
LAND_AT_ONCE = 1 << 16

ALIGNMENT = 16  # bytes; the kernel's 128-bit accesses


@dataclass(eq=False, slots=True)
class Slot:
    """One trainable parameter and where its numbers lie in the flat buffers of its device."""

    param: Tensor
    group: int
    segment: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    grad_offset: int
    task_view: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None
    step: Tensor
    ret_view: Tensor | None = None
    ret_present: bool = False
    # Whether the segment may hold anything but zeros: an absent gradient must read as zero.
    task_dirty: bool = False
    ret_dirty: bool = False
    # A dense, aligned stand-in where the parameter itself is not (slices, odd storage offsets).
    staged: Tensor | None = None

    @property
    def target(self) -> Tensor:
        """The tensor whose memory is updated."""
        return self.param if self.staged is None else self.staged


class DeviceLayout:
    """The flat buffers of one device: two gradient buffers a dtype, fp32 moments, step counts, dual state."""

    def __init__(self, device: torch.device, params: Sequence[tuple[Tensor, int]], amsgrad: bool) -> None:
        """Lay out ``params`` (pairs of parameter and index of its group) and allocate all but the retention buffer."""
        self.device = device
        self.amsgrad = amsgrad
        self.plan = SurgeryPlan([SegmentSpec(p.dtype, p.numel(), group) for p, group in params], device)
        self.buffers = SurgeryBuffers.allocate(self.plan, amsgrad=amsgrad, retention=False)
        self.task_present: list[bool] = []
        self.ret_present: list[bool] = []
        # What buffers.settings holds. It lives and dies with them: a backend outlives a layout that is built again.
        self.uploaded_rule: object = None
        self.slots = [self._make_slot(i, p, group) for i, (p, group) in enumerate(params)]

    def _make_slot(self, i: int, p: Tensor, group: int) -> Slot:
        plan, buffers = self.plan, self.buffers
        dense = _is_dense(p)
        stride = p.stride() if dense else torch.empty(p.shape, device="meta").stride()
        aligned = p.data_ptr() % ALIGNMENT == 0
        staged = None if dense and aligned else torch.empty_strided(p.size(), stride, dtype=p.dtype, device=p.device)

        def view(flat: Tensor, offset: int) -> Tensor:
            return torch.as_strided(flat, p.size(), stride, offset)

        moment = plan.moment_offset[i]
        return Slot(
            param=p,
            group=group,
            segment=i,
            dtype=p.dtype,
            size=p.size(),
            stride=stride,
            grad_offset=plan.grad_offset[i],
            task_view=view(buffers.grads_task[p.dtype], plan.grad_offset[i]),
            exp_avg=view(buffers.m, moment),
            exp_avg_sq=view(buffers.v, moment),
            max_exp_avg_sq=None if buffers.vmax is None else view(buffers.vmax, moment),
            step=buffers.steps[i],
            staged=staged,
        )

    def matches(self, slot: Slot) -> bool:
        """Whether the parameter of a slot is still what was laid out, wherever its memory now lies."""
        p = slot.param
        if p.dtype != slot.dtype or p.size() != slot.size or p.device != self.device or not p.requires_grad:
            return False
        needs_stage = not (_is_dense(p) and p.data_ptr() % ALIGNMENT == 0)
        return needs_stage == (slot.staged is not None) and (needs_stage or p.stride() == slot.stride)

    def ensure_retention(self) -> None:
        """Allocate the retention buffers; plain AdamW never pays for them."""
        if self.buffers.grads_ret:
            return
        for dtype in self.plan.dtypes:
            self.buffers.grads_ret[dtype] = torch.zeros_like(self.buffers.grads_task[dtype])
        for slot in self.slots:
            slot.ret_view = torch.as_strided(
                self.buffers.grads_ret[slot.dtype], slot.size, slot.stride, slot.grad_offset
            )

    @torch.no_grad()
    def land(self, *, retention: bool) -> None:
        """Bring every ``.grad`` into the task or the retention buffer and note which parameters have one."""
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        stale: list[Tensor] = []
        for slot in self.slots:
            grad = slot.param.grad
            view = slot.ret_view if retention else slot.task_view
            assert view is not None, "ensure_retention() comes before land(retention=True)"
            if grad is None:
                # A retention segment is only stale once nothing pending lies in it.
                if not retention and slot.task_dirty:
                    stale.append(view)
                    slot.task_dirty = False
            elif grad is not view:
                check_grad(grad)
                targets.append(view)
                sources.append(grad.detach())
            if grad is not None:
                slot.param.grad = view
                if retention:
                    slot.ret_present = slot.ret_dirty = True
                else:
                    slot.task_dirty = True
        if targets:
            torch._foreach_copy_(targets, sources)
        if stale:
            torch._foreach_zero_(stale)
        if not retention:
            self.task_present = [slot.param.grad is not None for slot in self.slots]

    def settle_retention(self) -> bool:
        """Zero the retention segments that hold an old gradient; return whether any gradient is pending."""
        stale = [slot for slot in self.slots if slot.ret_dirty and not slot.ret_present]
        if stale:
            torch._foreach_zero_([slot.ret_view for slot in stale if slot.ret_view is not None])
            for slot in stale:
                slot.ret_dirty = False
        self.ret_present = [slot.ret_present for slot in self.slots]
        return any(self.ret_present)

    def drop_retention(self) -> None:
        """Forget the retention gradient: consumed by a step, or given up."""
        for slot in self.slots:
            slot.ret_present = False

    def stage_in(self) -> None:
        """Copy parameters that the backends cannot address into their stand-ins."""
        for slot in self.slots:
            if slot.staged is not None:
                slot.staged.copy_(slot.param)

    def stage_out(self) -> None:
        """Copy the stand-ins back."""
        for slot in self.slots:
            if slot.staged is not None:
                slot.param.copy_(slot.staged)


def check_grad(grad: Tensor) -> None:
    """Refuse gradients that have no dense flat form."""
    if grad.layout is not torch.strided:
        raise RuntimeError(
            f"CraftOptimizer needs dense gradients, got layout {grad.layout}; "
            f"use sparse=False in the embedding that made it"
        )


def group_by_device(params: Iterable[tuple[Tensor, int]]) -> dict[torch.device, list[tuple[Tensor, int]]]:
    """Return the parameters of each device, in order."""
    devices: dict[torch.device, list[tuple[Tensor, int]]] = {}
    for p, group in params:
        devices.setdefault(p.device, []).append((p, group))
    return devices


def _is_dense(p: Tensor) -> bool:
    """Whether the elements fill one block of memory in some order of the dimensions."""
    expected = 1
    for stride, size in sorted((st, sz) for st, sz in zip(p.stride(), p.size(), strict=True) if sz != 1):
        if stride != expected:
            return False
        expected *= size
    return True
