"""Where the numbers of one device lie: flat buffers of moments, and of gradients where a backend wants them flat.

A backend that reads gradients where autograd left them (the CPU kernel) gets references: nothing is copied, a captured
retention gradient is kept by moving the tensor out of ``.grad``. For the others gradients land in flat buffers.

A gradient lands in two ways. Autograd may accumulate into ``.grad`` in place where ``.grad`` already is a view of a
flat buffer; that costs a memset and a read-modify-write. Or ``.grad`` is None (``zero_grad`` sets it so), autograd
hands over its own tensor, and we copy it into the buffer once; that is half the traffic, so it is what we do: large
gradients at once in a hook, which frees autograd's tensor, small ones together before the step, because hundreds of
tiny copies would cost more in launches than in bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from craft_opt.kernels.surgery_adamw import SegmentSpec, SurgeryBuffers, SurgeryPlan
from craft_opt.optimizer._shards import is_sharded, like, local_part

# Elements from which a gradient is copied in the hook. Below it, one multi-tensor copy a step is cheaper than a
# launch each (a launch costs about what 64k bf16 elements cost to move on a current data-centre GPU).
LAND_AT_ONCE = 1 << 16

ALIGNMENT = 16  # bytes; the kernel's 128-bit accesses


@dataclass(eq=False, slots=True)
class Slot:
    """One trainable parameter and where its numbers lie in the flat buffers of its device.

    Of a DTensor this process' part is meant throughout; ``param`` and its ``.grad`` alone are the whole.
    """

    param: Tensor
    group: int
    segment: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    grad_offset: int
    # Segments of the flat buffers, or, where gradients stay in place, the gradients of this step.
    task_view: Tensor | None
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None
    step: Tensor
    ret_view: Tensor | None = None
    ret_present: bool = False
    # Whether ret_view still holds the gradient of an earlier step, kept to be reused.
    ret_kept: bool = False
    # Whether the segment may hold anything but zeros: an absent gradient must read as zero.
    task_dirty: bool = False
    ret_dirty: bool = False
    # A dense, aligned stand-in where the parameter itself is not (slices, odd storage offsets).
    staged: Tensor | None = None
    # Asked for in every step, so found out once.
    sharded: bool = False

    @property
    def part(self) -> Tensor:
        """What this process holds of the parameter."""
        return local_part(self.param) if self.sharded else self.param

    def forget(self) -> None:
        """Start from zero steps and zero moments."""
        for tensor in (self.step, self.exp_avg, self.exp_avg_sq, self.max_exp_avg_sq):
            if tensor is not None:
                tensor.zero_()

    @property
    def target(self) -> Tensor:
        """The tensor whose memory is updated."""
        if self.staged is not None:
            return self.staged
        return local_part(self.param) if self.sharded else self.param

    @property
    def grad(self) -> Tensor | None:
        """What this process holds of ``.grad``.

        Raises:
            RuntimeError: It is distributed in another way than the parameter.
        """
        grad: Any = self.param.grad
        if grad is None or not self.sharded:
            return grad
        param: Any = self.param
        if grad.placements != param.placements:
            raise RuntimeError(
                f"a gradient is distributed as {grad.placements} and its parameter as {param.placements}; "
                f"CraftOptimizer needs gradients that fully_shard has reduced and scattered"
            )
        return local_part(grad)

    @grad.setter
    def grad(self, part: Tensor | None) -> None:
        self.param.grad = None if part is None else like(self.param, part)


class DeviceLayout:
    """What the parameters of one device need beside themselves: gradients, fp32 moments, step counts, dual state."""

    def __init__(
        self, device: torch.device, params: Sequence[tuple[Tensor, int, int]], amsgrad: bool, *, in_place: bool
    ) -> None:
        """Lay out ``params`` (parameter, index of its group, its number among all) and allocate all but retention.

        With ``in_place`` gradients stay where autograd puts them and no buffers are made for them.
        """
        self.device = device
        self.amsgrad = amsgrad
        self.in_place = in_place
        self.streams = [stream for _, _, stream in params]
        segments = [SegmentSpec(p.dtype, local_part(p).numel(), group, stream) for p, group, stream in params]
        self.plan = SurgeryPlan(segments, device)
        self.buffers = SurgeryBuffers.allocate(self.plan, amsgrad=amsgrad, task=not in_place, retention=False)
        self.task_present: list[bool] = []
        self.ret_present: list[bool] = []
        # What a backend keeps with these buffers (uploaded settings, tables): it lives and dies with them.
        self.backend_state: object = None
        self.slots = [self._make_slot(i, p, group) for i, (p, group, _) in enumerate(params)]

    def _make_slot(self, i: int, param: Tensor, group: int) -> Slot:
        plan, buffers, p = self.plan, self.buffers, local_part(param)
        dense = _is_dense(p)
        stride = p.stride() if dense else torch.empty(p.shape, device="meta").stride()
        aligned = p.data_ptr() % ALIGNMENT == 0
        staged = None if dense and aligned else torch.empty_strided(p.size(), stride, dtype=p.dtype, device=p.device)

        def view(flat: Tensor, offset: int) -> Tensor:
            return torch.as_strided(flat, p.size(), stride, offset)

        moment = plan.moment_offset[i]
        return Slot(
            param=param,
            group=group,
            segment=i,
            dtype=p.dtype,
            size=p.size(),
            stride=stride,
            grad_offset=plan.grad_offset[i],
            task_view=None if self.in_place else view(buffers.grads_task[p.dtype], plan.grad_offset[i]),
            exp_avg=view(buffers.m, moment),
            exp_avg_sq=view(buffers.v, moment),
            max_exp_avg_sq=None if buffers.vmax is None else view(buffers.vmax, moment),
            step=buffers.steps[i],
            staged=staged,
            sharded=is_sharded(param),
        )

    def matches(self, slot: Slot) -> bool:
        """Whether the parameter of a slot is still what was laid out, wherever its memory now lies."""
        p = slot.part
        if p.dtype != slot.dtype or p.size() != slot.size or p.device != self.device or not slot.param.requires_grad:
            return False
        needs_stage = not (_is_dense(p) and p.data_ptr() % ALIGNMENT == 0)
        return needs_stage == (slot.staged is not None) and (needs_stage or p.stride() == slot.stride)

    def ensure_retention(self) -> None:
        """Allocate the retention buffers; plain AdamW never pays for them."""
        if self.in_place or self.buffers.grads_ret:
            return
        for dtype in self.plan.dtypes:
            self.buffers.grads_ret[dtype] = torch.zeros_like(self.buffers.grads_task[dtype])
        for slot in self.slots:
            slot.ret_view = torch.as_strided(
                self.buffers.grads_ret[slot.dtype], slot.size, slot.stride, slot.grad_offset
            )

    @torch.no_grad()
    def land(self, *, retention: bool) -> None:
        """Take every ``.grad`` as task or retention gradient and note which parameters have one."""
        if retention:
            for slot in self.slots:
                slot.ret_kept = False
        if self.in_place:
            self._refer(retention=retention)
        else:
            self._copy(retention=retention)
        if not retention:
            self.task_present = [slot.param.grad is not None for slot in self.slots]

    def _refer(self, *, retention: bool) -> None:
        for slot in self.slots:
            grad = slot.grad if slot.sharded else slot.param.grad
            if grad is not None:
                check_grad(grad, slot.dtype)
                if grad.requires_grad:
                    grad = grad.detach()
                # The kernel walks a gradient and its parameter in the same order of memory.
                if grad.stride() != slot.stride and not _same_order(grad, slot.stride):
                    grad = torch.empty_strided(slot.size, slot.stride, dtype=grad.dtype).copy_(grad)
            if not retention:
                slot.task_view = grad
            elif grad is not None:
                slot.ret_view, slot.ret_present = grad, True

    def _copy(self, *, retention: bool) -> None:
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        stale: list[Tensor] = []
        for slot in self.slots:
            grad = slot.grad if slot.sharded else slot.param.grad
            view = slot.ret_view if retention else slot.task_view
            assert view is not None, "ensure_retention() comes before land(retention=True)"
            if grad is None:
                # A retention segment is only stale once nothing pending lies in it.
                if not retention and slot.task_dirty:
                    stale.append(view)
                    slot.task_dirty = False
            elif grad is not view:
                check_grad(grad, slot.dtype)
                # A DTensor's local tensor may be a view of ours: the same memory under another name.
                if grad.data_ptr() != view.data_ptr():
                    targets.append(view)
                    sources.append(grad.detach())
            if grad is not None:
                # Making a DTensor a step costs more than the room that FSDP's own gradient takes until it is cleared.
                if not slot.sharded:
                    slot.param.grad = view
                if retention:
                    slot.ret_present = slot.ret_dirty = True
                else:
                    slot.task_dirty = True
        if targets:
            torch._foreach_copy_(targets, sources)
        if stale:
            torch._foreach_zero_(stale)

    def flat_retention(self) -> list[Tensor]:
        """The retention gradients as flat buffers, one a dtype, zero where there is none: what can be averaged at once.

        Where gradients stay in place they are moved into such buffers, for this step.
        """
        if not self.in_place:
            self._clear_stale_retention()
            return list(self.buffers.grads_ret.values())
        flats = {
            dtype: torch.zeros(numel, dtype=dtype, device=self.device) for dtype, numel in self.plan.grad_numel.items()
        }
        for slot in self.slots:
            view = torch.as_strided(flats[slot.dtype], slot.size, slot.stride, slot.grad_offset)
            if slot.ret_present and slot.ret_view is not None:
                view.copy_(slot.ret_view)
            slot.ret_view = view
        return list(flats.values())

    def settle_retention(self) -> bool:
        """Zero the retention segments that hold an old gradient; return whether any gradient is pending."""
        self._clear_stale_retention()
        self.ret_present = [slot.ret_present for slot in self.slots]
        return any(self.ret_present)

    def _clear_stale_retention(self) -> None:
        stale = [slot for slot in self.slots if slot.ret_dirty and not slot.ret_present]
        if stale:
            torch._foreach_zero_([slot.ret_view for slot in stale if slot.ret_view is not None])
            for slot in stale:
                slot.ret_dirty = False

    @property
    def reached(self) -> list[bool]:
        """Which parameters have a gradient of either kind."""
        return [task or ret for task, ret in zip(self.task_present, self.ret_present, strict=True)]

    def drop_retention(self, *, keep: bool = False) -> None:
        """Forget the retention gradient (consumed by a step, or given up), or keep what was pending for reuse."""
        for slot in self.slots:
            if self.in_place:
                # A reference here would keep the caller's gradient alive beyond zero_grad().
                slot.task_view = None
            slot.ret_kept = keep and slot.ret_present
            slot.ret_present = False
            if self.in_place and not slot.ret_kept:
                slot.ret_view = None

    def recall_retention(self) -> None:
        """Make the kept retention gradient pending again."""
        for slot in self.slots:
            slot.ret_present, slot.ret_kept = slot.ret_kept, False

    def stage_in(self) -> None:
        """Copy parameters that the backends cannot address into their stand-ins."""
        for slot in self.slots:
            if slot.staged is not None:
                slot.staged.copy_(slot.part)

    def stage_out(self) -> None:
        """Copy the stand-ins back."""
        for slot in self.slots:
            if slot.staged is not None:
                slot.part.copy_(slot.staged)


def check_grad(grad: Tensor, dtype: torch.dtype) -> None:
    """Refuse gradients that have no dense flat form, or another dtype than their parameter."""
    if grad.dtype != dtype:
        raise RuntimeError(
            f"CraftOptimizer needs gradients of their parameter's dtype, got {grad.dtype} for {dtype}; "
            f"leave the parameter's grad_dtype as it is, or cast: p.grad = p.grad.to(p.dtype)"
        )
    if grad.layout is not torch.strided:
        raise RuntimeError(
            f"CraftOptimizer needs dense gradients, got layout {grad.layout}; "
            f"use sparse=False in the embedding that made it"
        )


def group_by_device(
    params: Iterable[tuple[Tensor, int, int]],
) -> dict[torch.device, list[tuple[Tensor, int, int]]]:
    """Return the parameters of each device, in order, with the index of their group and their number."""
    devices: dict[torch.device, list[tuple[Tensor, int, int]]] = {}
    for p, group, number in params:
        devices.setdefault(p.device, []).append((p, group, number))
    return devices


def _same_order(grad: Tensor, stride: tuple[int, ...]) -> bool:
    """Whether the elements lie as these strides say; the stride of a dimension of one element says nothing."""
    return all(a == b for a, b, n in zip(grad.stride(), stride, grad.size(), strict=True) if n != 1)


def _is_dense(p: Tensor) -> bool:
    """Whether the elements fill one block of memory in some order of the dimensions."""
    expected = 1
    for stride, size in sorted((st, sz) for st, sz in zip(p.stride(), p.size(), strict=True) if sz != 1):
        if stride != expected:
            return False
        expected *= size
    return True
