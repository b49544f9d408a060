"""The CRaFT step on a CPU at the cost of its bytes: reduce, then combine, clip and AdamW, as native loops.

The mathematics is that of :mod:`craft_opt.kernels.surgery_adamw`; coefficients, ε and λ are computed between the two
loops by the caller. Gradients are read where autograd left them, so nothing is copied, and neither gradient is written:

    gram     reads g_t, g_r once: 8 bytes a parameter in fp32, 4 in bf16
    update   reads g_t, g_r, p, m, v and writes p, m, v: 32 bytes a parameter in fp32, 24 in bf16

Sums are kept in fp64, where a product of two fp32 numbers is exact; the conversions hide behind the memory. Parameters
are cut into pieces of 2^16 elements, each piece has its own row of partial sums, and the rows are added in order: the
bits do not depend on the number of threads.

Why Numba: torch's own operations read each gradient three times for the three dot products, on one thread
(``torch.dot``), write the merged gradient and read it again, and have no bf16 AdamW with fp32 moments at all. That was
2.3 to 2.8 times ``AdamW(fused=True)`` on two cores; what these loops take is in benchmarks/results/. A C++ extension
would want a compiler on the user's machine.

Threads: torch's own. Its OpenMP team still spins after the backward pass, so threads of another pool (Numba's
``prange``, Python's) wait for a core, and at 1 M parameters they made a step no faster; a team that is lent the loops
starts at once. Where torch brings no GNU OpenMP (outside Linux), and in a forked child, whose team is gone, Python
threads do the same work with the interpreter lock released.

Sources: gradient surgery, Yu et al. 2020 (arXiv 2001.06782), algorithm 1; AdamW, Loshchilov and Hutter 2019
(arXiv 1711.05101), in torch.optim.AdamW's arrangement; stochastic rounding as in :mod:`craft_opt.kernels.rounding`.
"""

# Numba infers the types of the loops itself.
# mypy: disallow-untyped-defs=False, disallow-untyped-calls=False, disallow-untyped-decorators=False
# mypy: disable-error-code=call-arg

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from craft_opt.kernels.layout import GROUP_COLUMNS
from numba import types
from numba.extending import intrinsic
from torch import Tensor

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}

# Elements of a piece: small enough to share out 1 M parameters, large enough that a piece's call is nothing, and two
# fp32 gradients of it (512 KiB) fit a second-level cache.
PIECE = 1 << 16
# Below this many elements a second thread is not worth its waking.
ALONE = 1 << 18
# Ranges of pieces a thread: whoever is done takes the next, so a core that is busy elsewhere holds nobody up.
RANGES_A_THREAD = 8

# Columns of the table of segments: addresses (0 where there is none), code of the dtype, group, rounding key.
P, M, V, V_MAX, TASK, RET, DTYPE, GROUP, KEY, TABLE_COLUMNS = range(10)


# --------------------------------------------------------------------------------------------------------------
# Native code
# --------------------------------------------------------------------------------------------------------------


def _pointer_to(target: Any) -> Any:
    """An address (int64) as a pointer to this type."""

    @intrinsic
    def at(_context: Any, address: Any) -> Any:
        def generate(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(target)(address), generate

    return at


_f32_at, _f64_at, _i64_at = (_pointer_to(t) for t in (types.float32, types.float64, types.int64))
_bf16_at = _pointer_to(types.uint16)  # its bits


@intrinsic
def _count_up(_context: Any, address: Any) -> Any:
    """Add 1 to the int64 at an address, atomically, and return what it was."""

    def generate(_context, builder, signature, args):
        word = _int(64)
        return builder.atomic_rmw("add", builder.inttoptr(args[0], word.as_pointer()), word(1), "monotonic")

    return types.int64(address), generate


@intrinsic
def _widen(_context: Any, x: Any) -> Any:
    """fp32 as it is; the bits of bf16 to fp32."""

    def generate(context, builder, signature, args):
        if x == types.float32:
            return args[0]
        wide = builder.shl(builder.zext(args[0], _int(32)), _int(32)(16))
        return builder.bitcast(wide, context.get_value_type(types.float32))

    return types.float32(x), generate


@intrinsic
def _narrow(_context: Any, x: Any, like: Any) -> Any:
    """Round fp32 to the type of ``like``, nearest-even; NaN becomes the quiet NaN."""

    def generate(_context, builder, signature, args):
        if like == types.float32:
            return args[0]
        bits = builder.bitcast(args[0], _int(32))
        odd = builder.and_(builder.lshr(bits, _int(32)(16)), _int(32)(1))
        rounded = builder.lshr(builder.add(bits, builder.add(odd, _int(32)(0x7FFF))), _int(32)(16))
        nan = builder.fcmp_unordered("uno", args[0], args[0])
        return builder.trunc(builder.select(nan, _int(32)(0x7FC0), rounded), _int(16))

    return like(x, like), generate


@intrinsic
def _narrow_stochastic(_context: Any, x: Any, like: Any, index: Any, key: Any) -> Any:
    """Round fp32 to the type of ``like``: bf16 up with the probability of what is cut off; inf and NaN are only cut."""

    def generate(_context, builder, signature, args):
        if like == types.float32:
            return args[0]
        word = _int(32)
        noise = builder.xor(builder.trunc(args[2], word), builder.trunc(args[3], word))
        # The hash of craft_opt.kernels.rounding.mix32.
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            noise = builder.mul(builder.xor(noise, builder.lshr(noise, word(shift))), word(factor))
        noise = builder.and_(builder.xor(noise, builder.lshr(noise, word(16))), word(0xFFFF))
        bits = builder.bitcast(args[0], word)
        exponent = builder.and_(bits, word(0x7F800000))
        finite = builder.icmp_unsigned("!=", exponent, word(0x7F800000))
        return builder.trunc(
            builder.lshr(builder.add(bits, builder.select(finite, noise, word(0))), word(16)), _int(16)
        )

    return like(x, like, index, key), generate


def _int(bits: int) -> Any:
    from llvmlite import ir

    return ir.IntType(bits)


# numpy's division (no exception for 0) is what lets LLVM vectorise it.
_OPTIONS: dict[str, Any] = {"error_model": "numpy", "boundscheck": False}


def _jit(*, reassociate: bool = False) -> Callable[[Any], Any]:
    """Compile without the interpreter lock; keep the machine code on disk where there is a place for it.

    ``reassociate`` lets sums be taken in several lanes; NaN and infinity keep their meaning.
    """
    options = {**_OPTIONS, "nogil": True}
    # No fused multiply-add in the update: it rounds as torch does.
    options["fastmath"] = {"contract", "reassoc", "nsz"} if reassociate else False

    def decorate(function: Any) -> Any:
        with contextlib.suppress(RuntimeError):  # no folder can be written
            return numba.njit(**options, cache=True)(function)
        return numba.njit(**options)(function)

    return decorate


@_jit(reassociate=True)
def _dots(t, r, out):
    tt = 0.0
    tr = 0.0
    rr = 0.0
    for i in range(t.size):
        x = np.float64(_widen(t[i]))
        y = np.float64(_widen(r[i]))
        tt += x * x
        tr += x * y
        rr += y * y
    out[0] = tt
    out[1] = tr
    out[2] = rr


@_jit(reassociate=True)
def _square(g):
    total = 0.0
    for i in range(g.size):
        x = np.float64(_widen(g[i]))
        total += x * x
    return total


@_jit()
def _gram(table, pieces, first, last, out):
    for k in range(first, last):
        segment = pieces[k, 0]
        start = pieces[k, 1]
        n = pieces[k, 2]
        t = table[segment, TASK]
        r = table[segment, RET]
        out[k, :] = 0.0
        if table[segment, DTYPE] == 0:
            if t != 0 and r != 0:
                _dots(numba.carray(_f32_at(t + 4 * start), n), numba.carray(_f32_at(r + 4 * start), n), out[k])
            elif t != 0:
                out[k, 0] = _square(numba.carray(_f32_at(t + 4 * start), n))
            elif r != 0:
                out[k, 2] = _square(numba.carray(_f32_at(r + 4 * start), n))
        elif t != 0 and r != 0:
            _dots(numba.carray(_bf16_at(t + 2 * start), n), numba.carray(_bf16_at(r + 2 * start), n), out[k])
        elif t != 0:
            out[k, 0] = _square(numba.carray(_bf16_at(t + 2 * start), n))
        elif r != 0:
            out[k, 2] = _square(numba.carray(_bf16_at(r + 2 * start), n))


@_jit()
def _factors(group, step):
    """The fp32 factors of an update, from fp64 arithmetic and rounded once, as torch does it."""
    lr, beta1, beta2, eps, weight_decay = group[0], group[1], group[2], group[3], group[4]
    correction1 = 1.0 - np.exp(step * group[7])
    correction2 = 1.0 - np.exp(step * group[8])
    # torch's lerp takes the nearer end as its base, so that β1 = 0 forgets the old moment exactly.
    from_grad = beta1 <= 0.5
    lerp = -beta1 if from_grad else 1.0 - beta1
    return (
        np.float32(1.0 - lr * weight_decay),
        np.float32(lerp),
        np.float32(1.0 if from_grad else 0.0),
        np.float32(beta2),
        np.float32(1.0 - beta2),
        np.float32(1.0 / np.sqrt(correction2)),
        np.float32(eps),
        np.float32(lr / correction1),
    )


@_jit()
def _moments(g, m, v, factors):
    lerp, from_grad, beta2, one_minus_beta2 = factors[1], factors[2], factors[3], factors[4]
    base = (np.float32(1.0) - from_grad) * m + from_grad * g
    return base + lerp * (g - m), v * beta2 + one_minus_beta2 * (g * g)


@_jit()
def _moved(p, m, v, factors):
    return p * factors[0] - factors[7] * (m / (np.sqrt(v) * factors[5] + factors[6]))


@_jit()
def _adamw(p, m, v, t, r, a, b, factors):
    """AdamW on a·g_t + b·g_r, rounding to nearest."""
    for i in range(p.size):
        m[i], v[i] = _moments(a * _widen(t[i]) + b * _widen(r[i]), m[i], v[i], factors)
        p[i] = _narrow(_moved(_widen(p[i]), m[i], v[i], factors), p[i])


@_jit()
def _adamw_stochastic(p, m, v, t, r, a, b, factors, start, key):
    """The same with stochastic rounding; ``start`` is the index of the first element in its parameter."""
    for i in range(p.size):
        m[i], v[i] = _moments(a * _widen(t[i]) + b * _widen(r[i]), m[i], v[i], factors)
        p[i] = _narrow_stochastic(_moved(_widen(p[i]), m[i], v[i], factors), p[i], start + i, key)


@_jit()
def _amsgrad(p, m, v, v_max, t, r, a, b, factors, stochastic, start, key):
    """AdamW over the running maximum of the second moment."""
    for i in range(p.size):
        m[i], v[i] = _moments(a * _widen(t[i]) + b * _widen(r[i]), m[i], v[i], factors)
        v_max[i] = max(v_max[i], v[i])
        moved = _moved(_widen(p[i]), m[i], v_max[i], factors)
        if stochastic:
            p[i] = _narrow_stochastic(moved, p[i], start + i, key)
        else:
            p[i] = _narrow(moved, p[i])


@_jit()
def _update(table, groups, steps, pieces, first, last, a, b, stochastic):
    # Backwards: the caches still hold the end of what the reduction read.
    for k in range(last - 1, first - 1, -1):
        segment = pieces[k, 0]
        start = pieces[k, 1]
        n = pieces[k, 2]
        row = table[segment]
        if row[TASK] == 0 and row[RET] == 0:
            continue
        group = groups[row[GROUP]]
        factors = _factors(group, np.float64(steps[segment]) + 1.0)
        weight_t = np.float32(a * group[5])
        weight_r = np.float32(b * group[5])
        t = row[TASK]
        r = row[RET]
        # An absent gradient is read as the other one with weight 0: no third kind of loop.
        if t == 0:
            t = r
            weight_t = np.float32(0.0)
        if r == 0:
            r = t
            weight_r = np.float32(0.0)
        m = numba.carray(_f32_at(row[M] + 4 * start), n)
        v = numba.carray(_f32_at(row[V] + 4 * start), n)
        if row[DTYPE] == 0:
            p32 = numba.carray(_f32_at(row[P] + 4 * start), n)
            t32 = numba.carray(_f32_at(t + 4 * start), n)
            r32 = numba.carray(_f32_at(r + 4 * start), n)
            if group[6] != 0.0:
                highest = numba.carray(_f32_at(row[V_MAX] + 4 * start), n)
                _amsgrad(p32, m, v, highest, t32, r32, weight_t, weight_r, factors, False, start, row[KEY])
            else:
                _adamw(p32, m, v, t32, r32, weight_t, weight_r, factors)
        else:
            p16 = numba.carray(_bf16_at(row[P] + 2 * start), n)
            t16 = numba.carray(_bf16_at(t + 2 * start), n)
            r16 = numba.carray(_bf16_at(r + 2 * start), n)
            if group[6] != 0.0:
                highest = numba.carray(_f32_at(row[V_MAX] + 4 * start), n)
                _amsgrad(p16, m, v, highest, t16, r16, weight_t, weight_r, factors, stochastic, start, row[KEY])
            elif stochastic:
                _adamw_stochastic(p16, m, v, t16, r16, weight_t, weight_r, factors, start, row[KEY])
            else:
                _adamw(p16, m, v, t16, r16, weight_t, weight_r, factors)


# What a team of threads is told: a counter of the ranges taken, then numbers and addresses.
TAKEN, N_RANGES, RANGES, KIND, TABLE, SEGMENTS, PIECES, N_PIECES, PARTIALS = range(9)
GROUPS, N_GROUPS, STEPS, STOCHASTIC, WEIGHTS = range(9, 14)
JOB_SIZE = WEIGHTS + 2  # a and b, fp64 in the place of two int64
_N_COLUMNS, _N_GROUP_COLUMNS = TABLE_COLUMNS, GROUP_COLUMNS


def _team_member(address):
    """What every thread of a team does: take ranges until there are none left."""
    job = numba.carray(_i64_at(address), JOB_SIZE)
    ranges = numba.carray(_i64_at(job[RANGES]), (job[N_RANGES], 2))
    table = numba.carray(_i64_at(job[TABLE]), (job[SEGMENTS], _N_COLUMNS))
    pieces = numba.carray(_i64_at(job[PIECES]), (job[N_PIECES], 3))
    partials = numba.carray(_f64_at(job[PARTIALS]), (job[N_PIECES], 3))
    groups = numba.carray(_f64_at(job[GROUPS]), (job[N_GROUPS], _N_GROUP_COLUMNS))
    steps = numba.carray(_f32_at(job[STEPS]), job[SEGMENTS])
    weights = numba.carray(_f64_at(address + 8 * WEIGHTS), 2)
    while True:
        k = _count_up(address)
        if k >= job[N_RANGES]:
            break
        first = ranges[k, 0]
        last = ranges[k, 1]
        if job[KIND] == 0:
            _gram(table, pieces, first, last, partials)
        else:
            _update(table, groups, steps, pieces, first, last, weights[0], weights[1], job[STOCHASTIC] != 0)


@functools.cache
def _team() -> Any:
    """The native function that GNU OpenMP calls on every thread, compiled at the first use."""
    signature = types.void(types.int64)  # an address: on the machines that Numba knows it travels like a pointer
    with contextlib.suppress(RuntimeError):
        return numba.cfunc(signature, **_OPTIONS, cache=True)(_team_member)
    return numba.cfunc(signature, **_OPTIONS)(_team_member)


# --------------------------------------------------------------------------------------------------------------
# Launchers
# --------------------------------------------------------------------------------------------------------------


class CpuPlan:
    """The pieces of the parameters of one CPU, and the table that says where everything lies.

    Attributes:
        table: int64 ``[segments, TABLE_COLUMNS]``; the caller fills the columns before every launch.
    """

    def __init__(self, numels: Sequence[int], dtypes: Sequence[torch.dtype]) -> None:
        unknown = sorted({str(dtype) for dtype in dtypes if dtype not in DTYPE_CODES})
        if unknown:
            raise ValueError(f"the CPU kernel updates fp32 and bf16 parameters, got {', '.join(unknown)}")
        rows = [
            (segment, start, min(PIECE, numel - start))
            for segment, numel in enumerate(numels)
            for start in range(0, numel, PIECE)
        ]
        self._pieces = np.array(rows, dtype=np.int64).reshape(-1, 3)
        self._ends = np.cumsum(self._pieces[:, 2])
        self._ranges: dict[int, Any] = {}
        self._partials = np.zeros((len(rows), 3))
        self.table = np.zeros((len(numels), TABLE_COLUMNS), dtype=np.int64)
        self.table[:, DTYPE] = [DTYPE_CODES[dtype] for dtype in dtypes]
        self._job = np.zeros(JOB_SIZE, dtype=np.int64)
        self._job[[TABLE, PIECES, PARTIALS]] = [x.ctypes.data for x in (self.table, self._pieces, self._partials)]
        self._job[[SEGMENTS, N_PIECES]] = len(numels), len(rows)

    def gram(self) -> tuple[float, float, float]:
        """Return tt, tr, rr of the gradients in the table; an absent one (address 0) counts as zeros."""
        self._job[KIND] = 0
        self._share_out(lambda first, last: _gram(self.table, self._pieces, first, last, self._partials))
        tt, tr, rr = self._partials.sum(axis=0).tolist()
        return tt, tr, rr

    def update(self, groups: Sequence[Sequence[float]], steps: Tensor, a: float, b: float, *, stochastic: bool) -> None:
        """Do AdamW on ``a g_t + b g_r`` for every segment with a gradient; step counts are left to the caller.

        Args:
            groups: Rows of :func:`craft_opt.kernels.layout.pack_group`, one a param group.
            steps: Completed steps before this one, fp32, shape (segments,).
            a: Weight of the task gradient, clip and scale included.
            b: Weight of the retention gradient.
            stochastic: Whether bf16 parameters are rounded stochastically, with the table's keys.
        """
        rows = np.array(groups, dtype=np.float64).reshape(-1, GROUP_COLUMNS)
        done = steps.numpy()
        job = self._job
        job[[KIND, N_GROUPS, STOCHASTIC]] = 1, len(rows), stochastic
        job[[GROUPS, STEPS]] = rows.ctypes.data, steps.data_ptr()
        job[WEIGHTS:].view(np.float64)[:] = a, b
        self._share_out(lambda *ends: _update(self.table, rows, done, self._pieces, *ends, a, b, stochastic))

    def _share_out(self, work: Callable[[int, int], None]) -> None:
        """Do the job on this thread and as many others as torch would use; ``work`` does it for a range."""
        total = int(self._ends[-1]) if len(self._ends) else 0
        threads = torch.get_num_threads() if total > ALONE else 1
        if threads == 1:
            work(0, len(self._pieces))
            return
        ranges = self._ranges_for(threads)
        parallel = _openmp()
        if parallel is not None and not _FORKED:
            self._job[[TAKEN, N_RANGES, RANGES]] = 0, len(ranges), ranges.ctypes.data
            parallel(_team().address, self._job.ctypes.data, threads, 0)
            return
        left = iter(ranges.tolist())  # next() is atomic

        def drain() -> None:
            for first, last in left:
                work(first, last)

        waiting = [_pool(threads - 1).submit(drain) for _ in range(threads - 1)]
        drain()
        for future in waiting:
            future.result()

    def _ranges_for(self, threads: int) -> Any:
        """Ranges of pieces of about equal size, the last pieces first: caches still hold the end of the reduction."""
        if threads not in self._ranges:
            parts, total = threads * RANGES_A_THREAD, int(self._ends[-1])
            inner = (int(np.searchsorted(self._ends, total * k // parts)) for k in range(1, parts))
            pairs = [pair for pair in itertools.pairwise([0, *inner, len(self._pieces)]) if pair[0] < pair[1]]
            self._ranges[threads] = np.array(pairs[::-1], dtype=np.int64)
        return self._ranges[threads]


@functools.cache
def _openmp() -> Any:
    """``GOMP_parallel`` of the OpenMP library that torch has loaded, or None where that is another one."""
    for file in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*"):
        with contextlib.suppress(OSError, AttributeError):
            parallel = ctypes.CDLL(str(file), mode=os.RTLD_NOLOAD | os.RTLD_NOW).GOMP_parallel
            parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
            parallel.restype = None
            return parallel
    return None


_POOLS: dict[int, ThreadPoolExecutor] = {}


def _pool(threads: int) -> ThreadPoolExecutor:
    if threads not in _POOLS:
        _POOLS[threads] = ThreadPoolExecutor(threads, thread_name_prefix="craft")
    return _POOLS[threads]


_FORKED: list[bool] = []


def _after_fork() -> None:
    """A forked child has none of its parent's threads; their team or pool would wait for ever."""
    _POOLS.clear()
    _FORKED.append(True)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
