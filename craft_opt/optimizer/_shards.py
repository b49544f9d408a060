"""The part of a DTensor that this process holds, and DTensors made of such parts."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    # Where nobody imported DTensor there is none, and importing it takes a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds: the tensor itself, or a DTensor's local tensor, without a copy."""
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor
    with torch.no_grad():
        return sharded.to_local()


def like(param: Tensor, part: Tensor) -> Tensor:
    """A tensor distributed as ``param``, of which this process holds ``part``; it shares its memory."""
    if not is_sharded(param):
        return part
    from torch.distributed.tensor import DTensor

    p: Any = param
    with torch.no_grad():
        return DTensor.from_local(part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def part_like(param: Tensor, value: Tensor) -> Tensor:
    """The part of ``value``, whole or distributed, that belongs to this process' part of ``param``.

    Raises:
        ValueError: It is distributed in another way.
    """
    if not is_sharded(param):
        if is_sharded(value):
            raise ValueError("a DTensor cannot be loaded for a plain parameter; gather it first with full_tensor()")
        return value
    p: Any = param
    v: Any = value
    if is_sharded(value):
        if v.device_mesh != p.device_mesh or v.placements != p.placements:
            v = v.redistribute(p.device_mesh, p.placements)
        return local_part(v)
    from torch.distributed.tensor import distribute_tensor

    # Every process has all of it: each cuts its part out, and nothing is sent.
    with torch.no_grad():
        return local_part(distribute_tensor(value.detach(), p.device_mesh, p.placements, src_data_rank=None))
