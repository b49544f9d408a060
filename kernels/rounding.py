"""Stochastic rounding of bf16 parameters, from numbers that are counted and not stored.

    key  = mix(mix(mix(seed) ^ stream) ^ t)          stream: the parameter's number; t: completed steps, the clock
    r_i  = mix(i ^ key) mod 2^16                     i: the element's place in its parameter, in memory order
    p_i  = the bits of the fp32 value + r_i, with the low 16 bits cleared

A value a fraction f of the way between two neighbouring bf16 numbers has 65536·f in its low 16 bits, so the sum
carries into bf16's last bit with probability f, and E[p_i] is the value itself. An update far under half a unit
in the last place, which nearest rounding undoes every time, then moves the weight now and then, and right on average.
Everything is a function of (seed, stream, t, i): a resumed run, every replica and every backend round alike.

Values that are not finite pass unchanged. A finite one beyond the largest bf16 number may round to infinity, as it
does to nearest.

Sources: the hash is lowbias32 of Chris Wellons' hash prospector (public domain); stochastic rounding for training,
Gupta et al. 2015 (arXiv 1502.02551), section 3.
"""

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

__all__ = ["CHUNK", "RoundingScratch", "mix32", "rounding_key", "rounding_keys", "stochastic_round_"]

# Elements at a time: three vectors of this length stay in a core's L2 cache through a dozen passes.
CHUNK = 1 << 15


@overload
def mix32(x: int) -> int: ...
@overload
def mix32(x: Tensor) -> Tensor: ...
def mix32(x: int | Tensor) -> int | Tensor:
    """Return the lowbias32 hash of 32 bits: an unsigned number, or an int32 tensor read as bits.

    Args:
        x: A number in [0, 2^32), or int32 of any shape.

    Example:
        >>> hex(mix32(1))
        '0x688990c0'
    """
    if isinstance(x, Tensor):
        mixed = x.clone()
        _mix_(mixed, torch.empty_like(mixed))
        return mixed
    x ^= x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def _mix_(x: Tensor, scratch: Tensor) -> None:
    # torch has hardly any unsigned arithmetic: int32 products wrap to the same bits, and a mask takes the copies of the
    # sign bit out of the arithmetic shift.
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, None)):
        torch.bitwise_right_shift(x, shift, out=scratch)
        x.bitwise_xor_(scratch.bitwise_and_((1 << (32 - shift)) - 1))
        if factor is not None:
            x.mul_(_signed(factor))


def _signed(x: int) -> int:
    """The int32 number with the low 32 bits of x."""
    return (x + 2**31) % 2**32 - 2**31


@overload
def rounding_key(seed: int, stream: int, t: int) -> int: ...
@overload
def rounding_key(seed: int, stream: int, t: Tensor) -> Tensor: ...
def rounding_key(seed: int, stream: int, t: int | Tensor) -> int | Tensor:
    """Return ``mix(mix(mix(seed) ^ stream) ^ t)``: what one parameter's numbers of one step are drawn from.

    Args:
        seed: In [0, 2^32).
        stream: The parameter's number, in [0, 2^32).
        t: Completed steps, taken modulo 2^32: a number, or a tensor of shape () that the host does not read.

    Returns:
        A number in [0, 2^32), or int32 of shape () on the device of ``t``.
    """
    owner = mix32(mix32(seed) ^ stream)
    if isinstance(t, Tensor):
        return mix32(t.to(torch.int64).to(torch.int32) ^ _signed(owner))
    return mix32(owner ^ (t & 0xFFFFFFFF))


def rounding_keys(seed: int, streams: Sequence[int], t: int) -> Tensor:
    """Return the keys of many parameters at once: :func:`rounding_key` of each, int32 ``[len(streams)]`` on the CPU."""
    owners = mix32(torch.tensor([_signed(mix32(seed) ^ stream) for stream in streams], dtype=torch.int32, device="cpu"))
    return mix32(owners ^ _signed(t))


class RoundingScratch:
    """Working memory of `stochastic_round_`, to be kept from call to call: three int32 vectors of ``size``."""

    def __init__(self, device: torch.device | str = "cpu", size: int = CHUNK) -> None:
        self.place = torch.arange(size, dtype=torch.int32, device=device)
        self.bits = torch.empty_like(self.place)
        self.shifted = torch.empty_like(self.place)


def stochastic_round_(
    target: Tensor,
    wide: Tensor,
    key: int | Tensor,
    offset: int = 0,
    scratch: RoundingScratch | None = None,
) -> Tensor:
    """Round ``wide`` into ``target``: up or down, so that the expected value is ``wide``.

    Args:
        target: bf16 [n], dense; overwritten.
        wide: fp32 [n], dense; left as it is.
        key: From `rounding_key`.
        offset: Place of the first element in its parameter: a parameter may be rounded piece by piece.
        scratch: Working memory to use again; None allocates it.

    Returns:
        ``target``.

    Raises:
        ValueError: Wrong dtype, shape or layout.

    Example:
        >>> wide = torch.full((4096,), 1.0 + 2.0**-10)  # an eighth of the way from 1 to the next bf16 number
        >>> p = stochastic_round_(torch.empty(4096, dtype=torch.bfloat16), wide, rounding_key(seed=0, stream=0, t=0))
        >>> sorted(set(p.tolist())), abs((p > 1).float().mean().item() - 0.125) < 0.02
        ([1.0, 1.0078125], True)
    """
    shape = tuple(target.shape)
    if (
        (target.dtype, wide.dtype) != (torch.bfloat16, torch.float32)
        or target.dim() != 1
        or shape != tuple(wide.shape)
        or not (target.is_contiguous() and wide.is_contiguous())
    ):
        raise ValueError(
            f"stochastic rounding takes dense vectors, fp32 into bf16, of one length; got {wide.dtype} "
            f"{tuple(wide.shape)} into {target.dtype} {shape}"
        )
    if scratch is None:
        scratch = RoundingScratch(target.device, min(CHUNK, max(target.numel(), 1)))
    chunk = scratch.place.numel()
    shift = _signed(key) if isinstance(key, int) else key
    for start in range(0, target.numel(), chunk):
        piece = slice(start, min(start + chunk, target.numel()))
        count = piece.stop - start
        bits = scratch.bits[:count]
        torch.add(scratch.place[:count], _signed(offset + start), out=bits)
        bits.bitwise_xor_(shift)
        _mix_(bits, scratch.shifted[:count])
        value = wide[piece]
        bits.bitwise_and_(0xFFFF).add_(value.view(torch.int32)).bitwise_and_(-0x10000)
        # A NaN's payload or an infinity must not take part: the carry would make one the other.
        target[piece].copy_(torch.where(value.isfinite(), bits.view(torch.float32), value))
    return target
