"""Several processes that train one model: replicas (DDP) or shards (FSDP2), and what makes all of them decide alike.

Replicas: DDP averages the task gradients. The retention gradients are averaged here, by one all_reduce of each flat
buffer that starts when a retention backward ends and is under way while the task's forward runs; L_ret and the marks of
which parameters were reached travel beside it. Equal gradients give equal Gram matrices, so nothing else is exchanged.

Shards: FSDP2 reduces and scatters both gradients. What a process holds are parts of the dot products, so the step sums
them (and L_ret, and a GradScaler's verdict) in one all_reduce of five fp64 numbers between its two phases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from craft_opt.optimizer._layout import DeviceLayout
from craft_opt.optimizer._shards import is_sharded


@dataclass(frozen=True)
class Processes:
    """The processes that train one model together.

    Attributes:
        group: Their torch.distributed group, None for the default one.
        count: How many they are.
        sharded: Whether each holds a shard of every parameter, not a replica of all.
        replicas: How many hold the same shard (HSDP).
    """

    group: Any = None
    count: int = 1
    sharded: bool = False
    replicas: int = 1

    @classmethod
    def of(cls, params: Sequence[Tensor], group: Any) -> Processes:
        """Find out from the parameters.

        Raises:
            RuntimeError: The parameters are distributed in a way that the step cannot sum over.
        """
        for p in params:
            if getattr(p, "_fsdp_flattened", False) or type(p).__name__ == "FlatParameter":
                raise RuntimeError(
                    "CraftOptimizer got parameters of FullyShardedDataParallel (FSDP1), whose flat shards hide what "
                    "belongs to which parameter; shard with torch.distributed.fsdp.fully_shard (accelerate: "
                    "fsdp_version 2)"
                )
            if hasattr(p, "ds_id"):
                raise RuntimeError(
                    "CraftOptimizer got parameters partitioned by DeepSpeed, which it cannot sum over; use DDP, or "
                    "torch.distributed.fsdp.fully_shard"
                )
        count = world_size(group)
        shards: list[Any] = [p for p in params if is_sharded(p)]
        if not shards:
            return cls(group, count)
        if len(shards) < len(params):
            raise RuntimeError(
                f"{len(params) - len(shards)} of {len(params)} parameters are plain tensors beside DTensors; shard the "
                f"root module too (fully_shard(model)) and leave ignored_params out, or give them another optimizer"
            )
        mesh = shards[0].device_mesh
        for p in shards:
            kinds = {str(type(placement).__name__) for placement in p.placements if placement.is_partial()}
            if p.device_mesh != mesh or _split(p) != _split(shards[0]) or kinds:
                raise RuntimeError(
                    f"parameters are distributed in different ways ({shards[0].placements} and {p.placements}), as "
                    f"under tensor parallelism, which is not supported; shard every module alike with fully_shard"
                )
        if mesh.ndim == 1 and group is None:
            group = mesh.get_group()
            count = mesh.size()
        if mesh.size() != count:
            raise RuntimeError(
                f"the parameters are sharded over {mesh.size()} processes, and process_group has {count}; pass the "
                f"process_group of all processes that hold a part of the model"
            )
        replicas = 1
        for split, size in zip(_split(shards[0]), mesh.shape, strict=True):
            replicas *= 1 if split else size
        return cls(group, count, sharded=True, replicas=replicas)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, in place; the same bits everywhere."""
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def agree_on_step(self, gram: Tensor, layouts: Sequence[DeviceLayout]) -> Tensor:
        """Sum the Gram matrices of shards; average L_ret and join a GradScaler's verdicts in the layouts' buffers.

        Args:
            gram: tt, tr, rr of what this process holds, fp64, shape (3,).
            layouts: Theirs is the rest.

        Returns:
            tt, tr, rr of the whole gradients, fp64, shape (3,).
        """
        step_in = layouts[0].buffers.step_in
        share = torch.tensor([1.0 / self.replicas] * 3 + [1.0 / self.count, 1.0], dtype=torch.float64)
        mine = torch.cat([gram.to(step_in.device), step_in[0:1], step_in[2:3]])
        total = self.sum(mine) * share.to(step_in.device, non_blocking=True)
        for layout in layouts:
            here = total.to(layout.device, non_blocking=True)
            layout.buffers.step_in[0] = here[3]
            layout.buffers.step_in[2] = (here[4] > 0).double()
        return total[:3]

    def check_parameters(self, layouts: Sequence[DeviceLayout]) -> None:
        """Check that every process holds the same parameters, before buffers of them are summed. Waits for the device.

        Raises:
            RuntimeError: They differ.
        """
        slots = [slot for layout in layouts for slot in layout.slots]
        mine = [float(len(slots)), float(sum(slot.size.numel() for slot in slots))]
        if not self._all_equal(mine, layouts[0].device):
            raise RuntimeError(
                f"the {self.count} processes have different parameters ({mine[0]:.0f} tensors with {mine[1]:.0f} "
                f"elements here); CraftOptimizer needs the whole model in every process, or fully_shard; "
                f"ZeroRedundancyOptimizer and DeepSpeed are not supported"
            )

    def check_gradients(self, task_square: Tensor) -> None:
        """Check that replicas have the same task gradients, before the first update. Waits for the device.

        Args:
            task_square: Squared norm of this process' task gradients, fp64, shape ().

        Raises:
            RuntimeError: They differ.
        """
        mine = task_square.item()
        if not self._all_equal([mine], task_square.device):
            raise RuntimeError(
                f"the task gradients differ between the {self.count} processes (squared norm {mine:.6g} here), so the "
                f"replicas would drift apart; wrap the model in DistributedDataParallel (accelerate: "
                f"accelerator.prepare(model)), or give each process a process_group of its own to train models of "
                f"their own"
            )

    def _all_equal(self, values: Sequence[float], device: torch.device) -> bool:
        # Two NaNs are alike: the step that follows is skipped everywhere.
        mine = torch.tensor(values, dtype=torch.float64).nan_to_num(nan=-1.0)
        highest = torch.cat([mine, -mine]).to(device)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=self.group)
        upper, lower = highest.cpu().chunk(2)
        return torch.equal(upper, -lower)


class RetentionAverage:
    """The average over replicas of captured retention gradients and their loss, while it is under way."""

    def __init__(self, processes: Processes, layouts: Sequence[DeviceLayout]) -> None:
        """Start it."""
        self._slots = [(slot, layout.in_place) for layout in layouts for slot in layout.slots]
        self._layouts = layouts
        self._group, share = processes.group, 1.0 / processes.count
        flats = [flat for layout in layouts for flat in layout.flat_retention()]
        device = layouts[0].device
        marks = torch.tensor([0.0, *(float(slot.ret_present) for slot, _ in self._slots)], dtype=torch.float64)
        self._shared = marks.to(device, non_blocking=True)
        self._shared[0] = layouts[0].buffers.step_in[0] * share
        self._works = [dist.all_reduce(self._shared, group=self._group, async_op=True)]
        self._host = self._shared
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._fetch_aside(device)
        for flat in flats:
            # As DDP does, divided first: a sum of fp16 gradients may overflow.
            self._works.append(dist.all_reduce(flat.mul_(share), group=self._group, async_op=True))

    def _fetch_aside(self, device: torch.device) -> None:
        """Bring the marks to the host on a stream of its own: the caller's goes on with the task's forward."""
        self._host = torch.empty_like(self._shared, device="cpu", pin_memory=True)
        event = self._event = torch.cuda.Event()
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self._works[0].wait()
            self._host.copy_(self._shared, non_blocking=True)
            event.record(stream)

    def finish(self) -> None:
        """Wait for it, in stream order, and note what it brought. On CUDA the host waits for the marks alone."""
        for work in self._works:
            work.wait()
        if self._event is not None:
            self._event.synchronize()
        for (slot, in_place), mark in zip(self._slots, self._host[1:].tolist(), strict=True):
            if mark > 0:
                slot.ret_present, slot.ret_dirty = True, not in_place
        for layout in self._layouts:
            layout.buffers.step_in[0] = self._shared[0]


def world_size(group: Any = None) -> int:
    """Processes of a group, 1 where torch.distributed is not in use."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def _split(p: Any) -> tuple[bool, ...]:
    """Over which dimensions of its mesh a DTensor is sharded."""
    return tuple(placement.is_shard() for placement in p.placements)
