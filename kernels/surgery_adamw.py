"""One launch for a whole CRaFT step: Gram matrix, surgery, clip, AdamW and the multiplier.

Mathematics. With g_t the task gradient, g_r the retention gradient (both divided by `grad_scale`), λ the
multiplier before the step and x(s) its arguments in the order of the code below:

    tt = <g_t,g_t>   tr = <g_t,g_r>   rr = <g_r,g_r>               sums of exact products, kept in fp64
    cos = tr / (sqrt(tt)·sqrt(rr)), 0 where a norm is 0            conflict = project and cos < threshold
    π = tr/rr if conflict else 0                                   w = ret_weight, 1 for a gradient of this step
    weighted       (a, b) = (1, λ·w − π)
    equal          (a, b) = (½, ½(w − π))
    task_priority  (a, b) = (1, min(λ, 1)·w − π)                   without retention (a, b) = (1, 0)
    ‖g‖² = a²·tt + 2ab·tr + b²·rr,  s = min(1, max_grad_norm / (‖g‖ + 1e-6))
    g = s·(a·g_t + b·g_r)
    m ← β1·m + (1−β1)·g     v ← β2·v + (1−β2)·g²
    p ← p·(1 − lr·wd) − lr/(1−β1^k) · m / (sqrt(v)/sqrt(1−β2^k) + eps)
    L̄ ← β·L̄ + (1−β)·L_ret (L_ret at first)   e = L̄ − ε(t)          t ← t + 1
    ascent         λ ← clip(λ + lambda_lr·e, 0, lambda_max)
    nupi           ξ' = ν·ξ + (1−ν)·e (0 at first), λ ← clip(λ + lambda_lr·e + κ_p·(ξ' − ξ)) (no κ_p at first)

A non-finite Gram matrix, retention loss or coefficient, or `found_inf`, leaves p, m, v, k, λ, L̄, ξ and t as they are;
a step that measured nothing leaves λ, L̄ and ξ. bf16 parameters round to nearest, or stochastically by rounding.py.

Shape of the kernel. A persistent grid streams the two flat gradient buffers once and leaves one row of
partial sums per program (PHASE 1), meets at a grid barrier, and every program adds all the rows in the same order
(so the same bits everywhere, without float atomics); then it walks the parameters backwards, from the gradients
that the L2 cache still holds, through combine, clip and AdamW (PHASE 2). PHASE 0 is both in one launch;
1 and 2 are the same source in two launches, for several devices, for sharding (all-reduce the rows in between)
and for Triton's interpreter, which runs programs one after another and would wait for ever at the barrier.

Sources: gradient surgery, Yu et al. 2020 (arXiv 2001.06782), algorithm 1; AdamW, Loshchilov and Hutter 2019
(arXiv 1711.05101), in torch.optim.AdamW's arrangement; nuPI, Sohrabi et al. 2024 (arXiv 2406.04558), algorithm 1 with
ξ_0 = 0; the barrier is the sign-flip counter of PyTorch Inductor's `x_grid_barrier`. Deviations: conflict is a
threshold on the cosine rather than on the dot product; moments are fp32 for every parameter dtype.
"""

# Triton reads the annotations of device functions itself: theirs are constexprs and nothing else.
# mypy: disallow-untyped-defs=False

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from craft_opt.kernels.layout import (
    ALIGN,
    DEFAULT_CONFIG,
    DUAL_NAMES,
    GROUP_COLUMNS,
    HYPER_COLUMNS,
    MAX_GRID,
    METRIC_NAMES,
    STEP_IN_NAMES,
    SUPPORTED_DTYPES,
    TABLE_COLUMNS,
    TAIL_COLUMNS,
    LaunchConfig,
    SegmentSpec,
    SurgeryBuffers,
    SurgeryPlan,
    is_capturing,
    pack_group,
    pack_settings,
    round_up,
)
from craft_opt.kernels.rounding import rounding_key, stochastic_round_
from torch import Tensor

try:
    import triton
    import triton.language as tl

    _jit = triton.jit
except ImportError:  # the layout, the buffers and the reference below serve machines without triton too
    triton = None

    class tl:  # type: ignore[no-redef]
        constexpr = staticmethod(lambda value: value)

    def _jit(fn: Callable[..., Any] | None = None, **_: Any) -> Any:
        return fn if fn is not None else lambda function: function


__all__ = [
    "CONTROLLERS",
    "DEFAULT_CONFIG",
    "DUAL_NAMES",
    "MAX_GRID",
    "MERGE_MODES",
    "METRIC_NAMES",
    "ROUNDINGS",
    "SCHEDULES",
    "STEP_IN_NAMES",
    "SUPPORTED_DTYPES",
    "LaunchConfig",
    "SegmentSpec",
    "SurgeryBuffers",
    "SurgeryPlan",
    "apply",
    "fused",
    "is_available",
    "is_interpreted",
    "pack_group",
    "pack_settings",
    "reduce",
    "reference_step",
]

MERGE_MODES = {"weighted": 0, "equal": 1, "task_priority": 2}
SCHEDULES = {"linear": 0, "cosine": 1, "exponential": 2}
CONTROLLERS = {"ascent": False, "nupi": True}
ROUNDINGS = {"nearest": False, "stochastic": True}

# The device code's constants: Triton reads globals only as constexprs.
_ALIGN_C = tl.constexpr(ALIGN)
_TABLE_C = tl.constexpr(TABLE_COLUMNS)
_TAIL_C = tl.constexpr(TAIL_COLUMNS)
_HYPER_C = tl.constexpr(HYPER_COLUMNS)
_GROUP_C = tl.constexpr(GROUP_COLUMNS)
_FP32_MAX_C = tl.constexpr(3.4028234663852886e38)
_FP64_MAX_C = tl.constexpr(1.7976931348623157e308)


# --------------------------------------------------------------------------------------------------------------
# Device code
# --------------------------------------------------------------------------------------------------------------


@_jit
def _grid_barrier(counter_ptr):
    """Wait until every program of the grid has arrived; the counter needs no reset between launches.

    Program 0 adds 2³¹ − (n−1), the others 1, so the sum of one round is 2³¹ and flips the sign exactly once, when
    the last program arrives. The acq_rel arrival publishes what the program stored before it; the acquire poll
    makes what the others published visible. debug_barrier carries both from one thread to the whole program.
    """
    tl.debug_barrier()
    others = tl.num_programs(0).to(tl.int64) - 1
    arrival = tl.where(tl.program_id(0) == 0, 2147483648 - others, 1).to(tl.int32)
    before = tl.atomic_add(counter_ptr, arrival, sem="acq_rel", scope="gpu")
    now = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    while (before ^ now) >= 0:
        now = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@_jit
def _to_f32(x, SOFT_CAST: tl.constexpr):
    """Widen to fp32. SOFT_CAST: bf16 by its bits, because the interpreter's own cast garbles subnormals."""
    if SOFT_CAST and x.dtype == tl.bfloat16:
        x = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@_jit
def _from_f32(x, DTYPE: tl.constexpr, SOFT_CAST: tl.constexpr):
    """Round once to DTYPE, nearest-even. SOFT_CAST: bf16 by its bits, because the interpreter truncates."""
    if SOFT_CAST and tl.bfloat16 == DTYPE:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        x = tl.where(x != x, 0x7FC0, rounded).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


@_jit
def _mix(x):
    """The lowbias32 hash on uint32; `craft_opt.kernels.rounding.mix32` has the reference and the source."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@_jit
def _round_bf16(x, element, key):
    """The bf16 neighbours of fp32 x, still in fp32, the upper one with the probability of x's place between them.

    Adding 16 random bits below bf16's last and cutting them off carries with just that probability.
    """
    bits = x.to(tl.uint32, bitcast=True)
    chosen = (bits + (_mix(element ^ key) & 0xFFFF)) & 0xFFFF0000
    # A NaN's payload or an infinity must not take part: the carry would make one the other.
    finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(finite, chosen.to(tl.float32, bitcast=True), x)


@_jit
def _accumulate(acc, x, y):
    """acc[r] += Σ_c x[r, c]·y[r, c] in fp64, where fp32 products are exact to 2⁻⁵³ and 16-bit ones exact.

    The one place that decides how the Gram matrix is summed. fp32 lanes need a fourth accumulator,
    Σ(g_t + λ g_r)², to survive g_t ≈ −λ g_r; with fp64 the error of ‖g‖² stays near 1e-16·(|a|‖g_t‖ + |b|‖g_r‖)²
    and the three sums are enough. The price is the 16 conversions a clock of an sm_80/sm_90 multiprocessor:
    10 a clock at 4.8 TB/s in bf16, so the phase still waits for memory.
    """
    return acc + tl.sum(x.to(tl.float64) * y.to(tl.float64), axis=1)


@_jit
def _gram_of(
    task_ptr,
    ret_ptr,
    n_tiles,
    HAS_RET: tl.constexpr,
    SOFT_CAST: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
):
    """This program's share of (tt, tr, rr) over one pair of flat buffers: no table, no mask."""
    ROWS: tl.constexpr = BLOCK // VEC
    # A row is the VEC consecutive elements of one thread, so the sum over a row stays in its registers and an
    # accumulator costs two registers rather than 2·VEC.
    lane = tl.arange(0, ROWS)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    acc_tt = tl.zeros((ROWS,), tl.float64)
    acc_tr = tl.zeros((ROWS,), tl.float64)
    acc_rr = tl.zeros((ROWS,), tl.float64)
    # The next tile is on its way while this one is added up; unrolling the loop left the loads where they were.
    stride = tl.num_programs(0)
    tile = tl.program_id(0)
    start = tl.multiple_of(tile.to(tl.int64) * BLOCK, BLOCK)
    next_task = tl.load(task_ptr + start + lane, mask=tile < n_tiles, other=0.0)
    next_ret = next_task
    if HAS_RET:
        next_ret = tl.load(ret_ptr + start + lane, mask=tile < n_tiles, other=0.0)
    for following in tl.range(tile + stride, n_tiles + stride, stride):
        task = _to_f32(next_task, SOFT_CAST)
        ret = _to_f32(next_ret, SOFT_CAST)
        start = tl.multiple_of(tl.cast(following, tl.int64) * BLOCK, BLOCK)
        next_task = tl.load(task_ptr + start + lane, mask=following < n_tiles, other=0.0)
        if HAS_RET:
            next_ret = tl.load(ret_ptr + start + lane, mask=following < n_tiles, other=0.0)
            acc_tr = _accumulate(acc_tr, task, ret)
            acc_rr = _accumulate(acc_rr, ret, ret)
        acc_tt = _accumulate(acc_tt, task, task)
    return tl.sum(acc_tt, axis=0), tl.sum(acc_tr, axis=0), tl.sum(acc_rr, axis=0)


@_jit
def _prepare_hyper(
    hyper_ptr,
    groups_ptr,
    table_ptr,
    steps_ptr,
    dual_ptr,
    settings_ptr,
    n_segments,
    STOCHASTIC: tl.constexpr,
    SEG_BLOCK: tl.constexpr,
):
    """Fill the rows of fp32 factors that the update of each segment needs, from fp64 arithmetic.

    In PHASE 1, because the step counts change in PHASE 2 and a division or a power per tile would cost more than this
    table. As torch does, every factor is computed in double precision and rounded once.
    """
    # The last programs, because they have a tile less where the tiles do not divide evenly.
    for chunk in tl.range(
        tl.num_programs(0) - 1 - tl.program_id(0), tl.cdiv(n_segments, SEG_BLOCK), tl.num_programs(0)
    ):
        seg = tl.cast(chunk, tl.int64) * SEG_BLOCK + tl.arange(0, SEG_BLOCK)
        mask = seg < n_segments
        group = tl.load(table_ptr + seg * _TABLE_C + 6, mask=mask, other=0)
        row = groups_ptr + group * _GROUP_C
        lr = tl.load(row, mask=mask, other=0.0)
        beta1 = tl.load(row + 1, mask=mask, other=0.0)
        beta2 = tl.load(row + 2, mask=mask, other=0.0)
        eps = tl.load(row + 3, mask=mask, other=1.0)
        weight_decay = tl.load(row + 4, mask=mask, other=0.0)
        sign = tl.load(row + 5, mask=mask, other=1.0)
        amsgrad = tl.load(row + 6, mask=mask, other=0.0)
        log_beta1 = tl.load(row + 7, mask=mask, other=-1.0)
        log_beta2 = tl.load(row + 8, mask=mask, other=-1.0)
        step = tl.load(steps_ptr + seg, mask=mask, other=0.0).to(tl.float64) + 1.0
        correction1 = 1.0 - tl.exp(step * log_beta1)
        correction2 = 1.0 - tl.exp(step * log_beta2)
        # torch's lerp takes the nearer end as its base, so that β1 = 0 forgets the old moment exactly.
        from_grad = beta1 <= 0.5
        out = hyper_ptr + seg * _HYPER_C
        tl.store(out, (1.0 - lr * weight_decay).to(tl.float32), mask=mask)
        tl.store(out + 1, tl.where(from_grad, -beta1, 1.0 - beta1).to(tl.float32), mask=mask)
        tl.store(out + 2, from_grad.to(tl.float32), mask=mask)
        tl.store(out + 3, beta2.to(tl.float32), mask=mask)
        tl.store(out + 4, (1.0 - beta2).to(tl.float32), mask=mask)
        tl.store(out + 5, (1.0 / tl.sqrt(correction2)).to(tl.float32), mask=mask)
        tl.store(out + 6, eps.to(tl.float32), mask=mask)
        tl.store(out + 7, (lr / correction1).to(tl.float32), mask=mask)
        tl.store(out + 8, sign.to(tl.float32), mask=mask)
        tl.store(out + 9, amsgrad.to(tl.float32), mask=mask)
        if STOCHASTIC:
            # The key of the segment's random numbers; a column of bits in a table of fp32.
            stream = tl.load(table_ptr + seg * _TABLE_C + 8, mask=mask, other=0).to(tl.uint32)
            seed = tl.load(settings_ptr + 10).to(tl.int64).to(tl.uint32)
            clock = tl.load(dual_ptr + 1).to(tl.int64).to(tl.uint32)
            key = _mix(_mix(_mix(seed) ^ stream) ^ clock)
            tl.store(out + 10, key.to(tl.float32, bitcast=True), mask=mask)


@_jit
def _sum_partials(partials_ptr, n_partials):
    """(tt, tr, rr) from all rows of partial sums, added in the same order by every program."""
    column = tl.arange(0, 4)[None, :]
    acc = tl.zeros((64, 4), tl.float64)
    for first in tl.range(0, n_partials, 64):
        row = first + tl.arange(0, 64)[:, None]
        # One accumulator of four columns instead of three vectors: the compiler unrolls this loop, and three
        # times as many loads in flight were what made the kernel spill. .cg: other programs wrote these rows in this
        # launch, so they must come from L2 and never from L1.
        mask = (row < n_partials) & (column < 3)
        acc += tl.load(partials_ptr + row * 3 + column, mask=mask, other=0.0, cache_modifier=".cg")
    sums = tl.sum(acc, axis=0)[None, :]
    tt = tl.sum(tl.sum(tl.where(column == 0, sums, 0.0), axis=1), axis=0)
    tr = tl.sum(tl.sum(tl.where(column == 1, sums, 0.0), axis=1), axis=0)
    rr = tl.sum(tl.sum(tl.where(column == 2, sums, 0.0), axis=1), axis=0)
    return tt, tr, rr


@_jit
def _merge_coefficients(
    tt, tr, rr, lam, weight, threshold, MERGE: tl.constexpr, PROJECT: tl.constexpr, HAS_RET: tl.constexpr
):
    """(a, b, cos, conflict) of SPEC section 2. `where` and not `if`: the values live on the device.

    `weight` is that of a retention gradient of an earlier step; the projection, which does not depend on the length of
    g_r, is not weighted.
    """
    if HAS_RET:
        norm_t = tl.sqrt(tt)
        norm_r = tl.sqrt(rr)
        both = (norm_t > 0.0) & (norm_r > 0.0)
        cos = tl.where(both, tr / tl.where(both, norm_t * norm_r, 1.0), 0.0)
        # Rounding may push parallel gradients past ±1, and a threshold of −1 must never fire. The comparison
        # that clamps is False for NaN, which therefore passes through to the finiteness test.
        cos = tl.where(cos > 1.0, 1.0, cos)
        cos = tl.where(cos < -1.0, -1.0, cos)
        if PROJECT:
            # A zero gradient is never a direction to project on, even with a positive threshold.
            conflict = (cos < threshold) & (rr > 0.0)
            projection = tl.where(conflict, tr / tl.where(rr > 0.0, rr, 1.0), 0.0)
        else:
            conflict = cos != cos
            projection = tl.cast(0.0, tl.float64)
        if MERGE == 0:
            a = tl.cast(1.0, tl.float64)
            b = lam * weight - projection
        elif MERGE == 1:
            a = tl.cast(0.5, tl.float64)
            b = 0.5 * (weight - projection)
        else:
            a = tl.cast(1.0, tl.float64)
            b = tl.where(lam < 1.0, lam, 1.0) * weight - projection
    else:
        cos = tl.cast(0.0, tl.float64)
        conflict = cos != cos
        a = tl.cast(1.0, tl.float64)
        b = tl.cast(0.0, tl.float64)
    return a, b, cos, conflict


@_jit
def _epsilon(t, start, end, decay_steps, SCHEDULE: tl.constexpr):
    """ε(t): both ends exactly; decay_steps ≤ 0 is the constant `start`."""
    x = t / tl.where(decay_steps > 0.0, decay_steps, 1.0)
    if SCHEDULE == 0:
        value = start + (end - start) * x
    elif SCHEDULE == 1:
        # cos(πx) = 1 − 2 sin²(πx/2) with the Taylor series of sin on [0, π/2], whose first term left out is under
        # 3e-16. The library's fp64 cosine would bring a stack frame for reducing arguments that never occur here.
        y = tl.where(x < 1.0, x, 1.0) * 1.5707963267948966
        z = y * y
        s = 1.0 - z / 342.0
        s = 1.0 - s * z / 272.0
        s = 1.0 - s * z / 210.0
        s = 1.0 - s * z / 156.0
        s = 1.0 - s * z / 110.0
        s = 1.0 - s * z / 72.0
        s = 1.0 - s * z / 42.0
        s = 1.0 - s * z / 20.0
        s = 1.0 - s * z / 6.0
        s = s * y
        value = start + (end - start) * (s * s)
    else:
        ratio = end / tl.where(start > 0.0, start, 1.0)
        # end = 0 decays at once: 0^x = 0 for x > 0, and log(0) = −inf gives just that.
        value = start * tl.exp(x * tl.log(ratio))
    value = tl.where(t >= decay_steps, end, value)
    return tl.where((t <= 0.0) | (decay_steps <= 0.0), start, value)


@_jit
def _adamw(
    p,
    m,
    v,
    v_max,
    task,
    ret,
    a,
    b,
    b_factor,
    decay,
    lerp,
    from_grad,
    beta2,
    one_minus_beta2,
    inv_sqrt_correction2,
    eps,
    step_size,
    use_max,
    HAS_RET: tl.constexpr,
    AMSGRAD: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Combine, clip (inside a and b) and AdamW, all in fp32, in the order of torch's operations.

    EXACT takes IEEE square roots and divisions, to follow torch to 1e-7. Without it they are within 1 and 2 units in
    the last place (subnormal second moments count as 0): for 16-bit parameters that is lost in the rounding to 8 or 11
    bits, and it saves a third of the instructions, the registers of the slow paths, and those slow paths themselves,
    which every zero second moment would take: the rows of an embedding that no token named.
    """
    g = task * a
    if HAS_RET:
        g += (ret * b) * b_factor
    m = tl.where(from_grad > 0.0, g, m) + lerp * (g - m)
    v = v * beta2 + one_minus_beta2 * (g * g)
    if AMSGRAD:
        v_max = tl.where(use_max > 0.0, tl.maximum(v_max, v, propagate_nan=tl.PropagateNan.ALL), v_max)
        second = tl.where(use_max > 0.0, v_max, v)
    else:
        second = v
    if EXACT:
        ratio = tl.div_rn(m, tl.sqrt_rn(second) * inv_sqrt_correction2 + eps)
    else:
        ratio = m / (tl.sqrt(second) * inv_sqrt_correction2 + eps)
    p = p * decay - step_size * ratio
    return p, m, v, v_max


@_jit
def _apply_tiles(
    task_ptr,
    ret_ptr,
    m_ptr,
    v_ptr,
    vmax_ptr,
    table_ptr,
    tile_seg_ptr,
    hyper_ptr,
    n_tiles,
    a,
    b,
    b_factor,
    DTYPE: tl.constexpr,
    HAS_RET: tl.constexpr,
    AMSGRAD: tl.constexpr,
    SOFT_CAST: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """Update every whole group of 16 elements of the segments of one dtype, last tile first."""
    lane = tl.arange(0, BLOCK // VEC)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    stride = tl.num_programs(0)
    # The owner of the next tile is fetched a tile ahead: otherwise three loads wait for one another on every tile.
    owner = tl.load(tile_seg_ptr + tl.maximum(n_tiles - 1 - tl.program_id(0), 0))
    for k in tl.range(tl.program_id(0), n_tiles, stride):
        tile = n_tiles - 1 - k
        seg = owner.to(tl.int64)
        owner = tl.load(tile_seg_ptr + tl.maximum(tile - stride, 0))
        row = tl.multiple_of(table_ptr + seg * _TABLE_C, 16)
        start = tl.cast(tile, tl.int64) * BLOCK
        # The table's addresses and offsets are those of a segment that began at tile 0, so `start` alone moves them.
        p_address = tl.load(row) + start * (DTYPE.primitive_bitwidth // 8)
        grad_start = tl.multiple_of(tl.load(row + 1) + start, _ALIGN_C)
        moment_start = tl.multiple_of(tl.load(row + 2) + start, _ALIGN_C)
        end = tl.load(row + 4) if HAS_RET else tl.load(row + 3)
        # The promise that counts are multiples of 16 is what keeps masked accesses 128 bits wide.
        count = tl.multiple_of(tl.minimum(end - start, BLOCK).to(tl.int32), _ALIGN_C)
        mask = lane < count
        hyper = tl.multiple_of(hyper_ptr + seg * _HYPER_C, 16)
        decay = tl.load(hyper)
        lerp = tl.load(hyper + 1)
        from_grad = tl.load(hyper + 2)
        beta2 = tl.load(hyper + 3)
        one_minus_beta2 = tl.load(hyper + 4)
        inv_sqrt_correction2 = tl.load(hyper + 5)
        eps = tl.load(hyper + 6)
        step_size = tl.load(hyper + 7)
        sign = tl.load(hyper + 8)

        p_ptr = tl.multiple_of(p_address.to(tl.pointer_type(DTYPE)), 16)
        m_tile = m_ptr + moment_start + lane
        v_tile = v_ptr + moment_start + lane
        # evict_first everywhere: after this everything is dead until the next step, while the gradients not yet
        # reached are what the L2 cache should keep.
        task = _to_f32(
            tl.load(task_ptr + grad_start + lane, mask=mask, other=0.0, eviction_policy="evict_first"), SOFT_CAST
        )
        ret = task
        if HAS_RET:
            ret = _to_f32(
                tl.load(ret_ptr + grad_start + lane, mask=mask, other=0.0, eviction_policy="evict_first"), SOFT_CAST
            )
        p = _to_f32(tl.load(p_ptr + lane, mask=mask, other=0.0, eviction_policy="evict_first"), SOFT_CAST)
        m = tl.load(m_tile, mask=mask, other=0.0, eviction_policy="evict_first")
        v = tl.load(v_tile, mask=mask, other=0.0, eviction_policy="evict_first")
        v_max = v
        use_max = sign
        if AMSGRAD:
            v_max = tl.load(vmax_ptr + moment_start + lane, mask=mask, other=0.0, eviction_policy="evict_first")
            use_max = tl.load(hyper + 9)
        p, m, v, v_max = _adamw(
            p, m, v, v_max, task, ret, a * sign, b * sign, b_factor, decay, lerp, from_grad, beta2, one_minus_beta2,
            inv_sqrt_correction2, eps, step_size, use_max, HAS_RET, AMSGRAD, tl.float32 == DTYPE,
        )  # fmt: skip
        if STOCHASTIC and tl.bfloat16 == DTYPE:
            key = tl.load(hyper + 10).to(tl.uint32, bitcast=True)
            element = (moment_start - tl.load(row + 9)).to(tl.uint32) + lane.to(tl.uint32)
            p = _round_bf16(p, element, key)
        tl.store(p_ptr + lane, _from_f32(p, DTYPE, SOFT_CAST), mask=mask, eviction_policy="evict_first")
        tl.store(m_tile, m, mask=mask, eviction_policy="evict_first")
        tl.store(v_tile, v, mask=mask, eviction_policy="evict_first")
        if AMSGRAD:
            tl.store(vmax_ptr + moment_start + lane, v_max, mask=mask, eviction_policy="evict_first")


@_jit
def _apply_tails(
    task_ptr,
    ret_ptr,
    m_ptr,
    v_ptr,
    vmax_ptr,
    table_ptr,
    tail_ptr,
    hyper_ptr,
    n_tails,
    a,
    b,
    b_factor,
    DTYPE: tl.constexpr,
    HAS_RET: tl.constexpr,
    AMSGRAD: tl.constexpr,
    SOFT_CAST: tl.constexpr,
    TAIL_ROWS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """Update the last numel % 16 elements of the segments that have any, one segment a row."""
    lane = tl.arange(0, _ALIGN_C)[None, :]
    for chunk in tl.range(tl.program_id(0), tl.cdiv(n_tails, TAIL_ROWS), tl.num_programs(0)):
        item = tl.cast(chunk, tl.int64) * TAIL_ROWS + tl.arange(0, TAIL_ROWS)
        valid = item < n_tails
        row = tail_ptr + item * _TAIL_C
        p_address = tl.load(row, mask=valid, other=0)
        grad_index = tl.load(row + 1, mask=valid, other=0)[:, None] + lane
        moment_index = tl.load(row + 2, mask=valid, other=0)[:, None] + lane
        seg = tl.load(row + 3, mask=valid, other=0)
        flags = tl.load(table_ptr + seg * _TABLE_C + 5, mask=valid, other=0)
        count = tl.load(table_ptr + seg * _TABLE_C + 7, mask=valid, other=0)
        if not HAS_RET:
            flags = flags & 1
        mask = (lane < count[:, None]) & (flags[:, None] != 0)
        hyper = hyper_ptr + seg * _HYPER_C
        decay = tl.load(hyper, mask=valid, other=0.0)[:, None]
        lerp = tl.load(hyper + 1, mask=valid, other=0.0)[:, None]
        from_grad = tl.load(hyper + 2, mask=valid, other=0.0)[:, None]
        beta2 = tl.load(hyper + 3, mask=valid, other=0.0)[:, None]
        one_minus_beta2 = tl.load(hyper + 4, mask=valid, other=0.0)[:, None]
        inv_sqrt_correction2 = tl.load(hyper + 5, mask=valid, other=0.0)[:, None]
        eps = tl.load(hyper + 6, mask=valid, other=1.0)[:, None]
        step_size = tl.load(hyper + 7, mask=valid, other=0.0)[:, None]
        sign = tl.load(hyper + 8, mask=valid, other=0.0)[:, None]

        p_tile = p_address[:, None].to(tl.pointer_type(DTYPE)) + lane
        task = _to_f32(tl.load(task_ptr + grad_index, mask=mask, other=0.0), SOFT_CAST)
        ret = task
        if HAS_RET:
            ret = _to_f32(tl.load(ret_ptr + grad_index, mask=mask, other=0.0), SOFT_CAST)
        p = _to_f32(tl.load(p_tile, mask=mask, other=0.0), SOFT_CAST)
        m = tl.load(m_ptr + moment_index, mask=mask, other=0.0)
        v = tl.load(v_ptr + moment_index, mask=mask, other=0.0)
        v_max = v
        use_max = sign
        if AMSGRAD:
            v_max = tl.load(vmax_ptr + moment_index, mask=mask, other=0.0)
            use_max = tl.load(hyper + 9, mask=valid, other=0.0)[:, None]
        p, m, v, v_max = _adamw(
            p, m, v, v_max, task, ret, a * sign, b * sign, b_factor, decay, lerp, from_grad, beta2, one_minus_beta2,
            inv_sqrt_correction2, eps, step_size, use_max, HAS_RET, AMSGRAD, tl.float32 == DTYPE,
        )  # fmt: skip
        if STOCHASTIC and tl.bfloat16 == DTYPE:
            key = tl.load(hyper + 10, mask=valid, other=0.0).to(tl.uint32, bitcast=True)
            first = tl.load(table_ptr + seg * _TABLE_C + 9, mask=valid, other=0)
            p = _round_bf16(p, (moment_index - first[:, None]).to(tl.uint32), key[:, None])
        tl.store(p_tile, _from_f32(p, DTYPE, SOFT_CAST), mask=mask)
        tl.store(m_ptr + moment_index, m, mask=mask)
        tl.store(v_ptr + moment_index, v, mask=mask)
        if AMSGRAD:
            tl.store(vmax_ptr + moment_index, v_max, mask=mask)


@_jit(
    do_not_specialize=[
        "reduce_tiles_f32", "reduce_tiles_bf16", "reduce_tiles_f16", "tiles_f32", "tiles_bf16", "tiles_f16",
        "tails_f32", "tails_bf16", "tails_f16", "n_segments", "n_partials",
    ]
)  # fmt: skip
def surgery_adamw_kernel(
    task_f32_ptr,
    task_bf16_ptr,
    task_f16_ptr,
    ret_f32_ptr,
    ret_bf16_ptr,
    ret_f16_ptr,
    m_ptr,
    v_ptr,
    vmax_ptr,
    steps_ptr,
    step_in_ptr,
    dual_ptr,
    settings_ptr,
    partials_ptr,
    metrics_ptr,
    table_ptr,
    tile_seg_ptr,
    tail_ptr,
    groups_ptr,
    hyper_ptr,
    dual_in_ptr,
    barrier_ptr,
    reduce_tiles_f32,
    reduce_tiles_bf16,
    reduce_tiles_f16,
    tiles_f32,
    tiles_bf16,
    tiles_f16,
    tails_f32,
    tails_bf16,
    tails_f16,
    n_segments,
    n_partials,
    PHASE: tl.constexpr,
    HAS_F32: tl.constexpr,
    HAS_BF16: tl.constexpr,
    HAS_F16: tl.constexpr,
    HAS_TAILS: tl.constexpr,
    MERGE: tl.constexpr,
    PROJECT: tl.constexpr,
    SCHEDULE: tl.constexpr,
    HAS_RET: tl.constexpr,
    AMSGRAD: tl.constexpr,
    NUPI: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    SOFT_CAST: tl.constexpr,
    BLOCK: tl.constexpr,
    REDUCE_BLOCK: tl.constexpr,
    VEC_32BIT: tl.constexpr,
    VEC_16BIT: tl.constexpr,
    SEG_BLOCK: tl.constexpr,
    TAIL_ROWS: tl.constexpr,
):
    """The step; see the head of the file. Sources and argument shapes: `SurgeryPlan` and `SurgeryBuffers`."""
    pid = tl.program_id(0)

    if PHASE != 2:
        tt = tl.cast(0.0, tl.float64)
        tr = tl.cast(0.0, tl.float64)
        rr = tl.cast(0.0, tl.float64)
        if HAS_F32:
            x, y, z = _gram_of(task_f32_ptr, ret_f32_ptr, reduce_tiles_f32, HAS_RET, SOFT_CAST, REDUCE_BLOCK, VEC_32BIT)
            tt += x
            tr += y
            rr += z
        if HAS_BF16:
            x, y, z = _gram_of(
                task_bf16_ptr, ret_bf16_ptr, reduce_tiles_bf16, HAS_RET, SOFT_CAST, REDUCE_BLOCK, VEC_16BIT,
            )  # fmt: skip
            tt += x
            tr += y
            rr += z
        if HAS_F16:
            x, y, z = _gram_of(task_f16_ptr, ret_f16_ptr, reduce_tiles_f16, HAS_RET, SOFT_CAST, REDUCE_BLOCK, VEC_16BIT)
            tt += x
            tr += y
            rr += z
        tl.store(partials_ptr + pid * 3, tt)
        tl.store(partials_ptr + pid * 3 + 1, tr)
        tl.store(partials_ptr + pid * 3 + 2, rr)
        _prepare_hyper(
            hyper_ptr, groups_ptr, table_ptr, steps_ptr, dual_ptr, settings_ptr, n_segments, STOCHASTIC, SEG_BLOCK,
        )  # fmt: skip
        # A snapshot of the dual state: program 0 replaces it below while slower programs may still have to read it.
        if pid == 0:
            for entry in tl.static_range(5):
                tl.store(dual_in_ptr + entry, tl.load(dual_ptr + entry))

    if PHASE == 0:
        _grid_barrier(barrier_ptr)

    if PHASE != 1:
        # Every program computes the coefficients; program 0 reports them. Each value is stored as soon as it is
        # known, because a fp64 scalar kept for later is two registers of every thread during the loops below.
        first = pid == 0
        nan = tl.cast(float("nan"), tl.float64)
        lam = tl.load(dual_in_ptr, cache_modifier=".cg")
        t = tl.load(dual_in_ptr + 1, cache_modifier=".cg")
        tl.store(metrics_ptr + 4, lam, mask=first)
        epsilon = _epsilon(t, tl.load(settings_ptr + 4), tl.load(settings_ptr + 5), tl.load(settings_ptr + 6), SCHEDULE)
        tl.store(metrics_ptr + 6, epsilon, mask=first)
        weight = tl.cast(1.0, tl.float64)
        if HAS_RET:
            retention_loss = tl.load(step_in_ptr)
            measured = tl.load(step_in_ptr + 3) != 0.0
            weight = tl.load(step_in_ptr + 4)
            tl.store(metrics_ptr + 7, tl.where(measured, retention_loss, nan), mask=first)
        else:
            tl.store(metrics_ptr + 7, nan, mask=first)

        inv_scale = 1.0 / tl.load(step_in_ptr + 1)
        tt, tr, rr = _sum_partials(partials_ptr, n_partials)
        # Twice, not squared: the square of a small scale's inverse may overflow where the product does not.
        tt = (tt * inv_scale) * inv_scale
        tr = (tr * inv_scale) * inv_scale
        rr = (rr * inv_scale) * inv_scale
        # `<=` with NaN is False: whatever is not provably finite skips the step.
        ok = (tl.abs(tt) <= _FP64_MAX_C) & (tl.load(step_in_ptr + 2) == 0.0)
        if HAS_RET:
            ok = ok & (tl.abs(tr) <= _FP64_MAX_C) & (tl.abs(rr) <= _FP64_MAX_C)
            # An unmeasured loss is nobody's concern.
            ok = ok & ((tl.abs(retention_loss) <= _FP64_MAX_C) | (measured == 0))
        a, b, cos, conflict = _merge_coefficients(
            tt, tr, rr, lam, weight, tl.load(settings_ptr), MERGE, PROJECT, HAS_RET
        )
        norm_sq = a * a * tt + 2.0 * a * b * tr + b * b * rr
        norm = tl.sqrt(tl.where(norm_sq < 0.0, 0.0, norm_sq))
        if not HAS_RET:
            tr = nan
            cos = nan
            rr = nan
        tl.store(metrics_ptr, tr, mask=first)
        tl.store(metrics_ptr + 1, cos, mask=first)
        tl.store(metrics_ptr + 2, conflict.to(tl.float64), mask=first)
        tl.store(metrics_ptr + 3, norm, mask=first)
        tl.store(metrics_ptr + 10, a, mask=first)
        tl.store(metrics_ptr + 11, b, mask=first)
        tl.store(metrics_ptr + 13, tt, mask=first)
        tl.store(metrics_ptr + 14, rr, mask=first)

        max_grad_norm = tl.load(settings_ptr + 1)
        clip = (max_grad_norm > 0.0) & (max_grad_norm <= _FP64_MAX_C)
        clip_scale = tl.where(clip, max_grad_norm / (norm + 1e-6), 1.0)
        clip_scale = tl.where(clip_scale > 1.0, 1.0, clip_scale)
        tl.store(metrics_ptr + 12, clip_scale, mask=first)

        # fp32 factors of the update. b may exceed fp32 where g_r is nearly nothing; a power of two
        # then carries the excess, so that b·g_r is formed without inf·0.
        a_total = a * clip_scale * inv_scale
        b_total = b * clip_scale * inv_scale
        huge = tl.abs(b_total) > 1.298074214633707e33  # 2^110
        b_total = b_total * tl.where(huge, 7.703719777548943e-34, 1.0)
        ok = ok & (tl.abs(a_total) <= _FP32_MAX_C)
        if HAS_RET:
            ok = ok & (tl.abs(b_total) <= _FP32_MAX_C)
        a32 = a_total.to(tl.float32)
        b32 = b_total.to(tl.float32)
        factor32 = tl.where(huge, 1.298074214633707e33, 1.0).to(tl.float32)
        work = ok.to(tl.int32)  # no trips instead of a branch around the loops

        # λ moves here and not above, where its fp64 scalars would have to be kept through the sums.
        lam_after = lam
        if HAS_RET:
            moves = ok & measured
            ema = tl.load(dual_in_ptr + 3, cache_modifier=".cg")
            # A NaN, which differs from itself, means that nothing has been measured yet.
            beta = tl.load(settings_ptr + 9)
            average = tl.where(ema == ema, beta * ema + (1.0 - beta) * retention_loss, retention_loss)
            tl.store(dual_ptr + 3, tl.where(moves, average, ema), mask=first)
            violation = average - epsilon
            shift = tl.load(settings_ptr + 2) * violation
            if NUPI:
                xi = tl.load(dual_in_ptr + 4, cache_modifier=".cg")
                nu = tl.load(settings_ptr + 8)
                filtered = tl.where(xi == xi, nu * xi + (1.0 - nu) * violation, 0.0)
                shift += tl.where(xi == xi, tl.load(settings_ptr + 7) * (filtered - xi), 0.0)
                tl.store(dual_ptr + 4, tl.where(moves, filtered, xi), mask=first)
            lambda_max = tl.load(settings_ptr + 3)
            lam_after = lam + shift
            lam_after = tl.where(lam_after > lambda_max, lambda_max, lam_after)
            lam_after = tl.where(lam_after < 0.0, 0.0, lam_after)
            lam_after = tl.where(moves, lam_after, lam)
        done = ok.to(tl.float64)
        skipped_total = tl.load(dual_in_ptr + 2, cache_modifier=".cg") + (1.0 - done)
        tl.store(dual_ptr, lam_after, mask=first)
        tl.store(dual_ptr + 1, t + done, mask=first)
        tl.store(dual_ptr + 2, skipped_total, mask=first)
        tl.store(metrics_ptr + 5, lam_after, mask=first)
        tl.store(metrics_ptr + 8, 1.0 - done, mask=first)
        tl.store(metrics_ptr + 9, skipped_total, mask=first)
        tl.store(metrics_ptr + 15, t + done, mask=first)

        for chunk in tl.range(pid, tl.cdiv(n_segments, SEG_BLOCK) * work, tl.num_programs(0)):
            seg = tl.cast(chunk, tl.int64) * SEG_BLOCK + tl.arange(0, SEG_BLOCK)
            mask = seg < n_segments
            flags = tl.load(table_ptr + seg * _TABLE_C + 5, mask=mask, other=0)
            if not HAS_RET:
                flags = flags & 1
            mask = mask & (flags != 0)
            step = tl.load(steps_ptr + seg, mask=mask, other=0.0)
            tl.store(steps_ptr + seg, step + 1.0, mask=mask)

        if HAS_TAILS:
            if HAS_F16:
                tails = tail_ptr + (tails_f32 + tails_bf16) * _TAIL_C
                _apply_tails(
                    task_f16_ptr, ret_f16_ptr, m_ptr, v_ptr, vmax_ptr, table_ptr, tails, hyper_ptr, tails_f16 * work,
                    a32, b32, factor32, tl.float16, HAS_RET, AMSGRAD, SOFT_CAST, TAIL_ROWS,
                    STOCHASTIC,
                )  # fmt: skip
            if HAS_BF16:
                tails = tail_ptr + tails_f32 * _TAIL_C
                _apply_tails(
                    task_bf16_ptr, ret_bf16_ptr, m_ptr, v_ptr, vmax_ptr, table_ptr, tails, hyper_ptr,
                    tails_bf16 * work, a32, b32, factor32, tl.bfloat16, HAS_RET, AMSGRAD, SOFT_CAST, TAIL_ROWS,
                    STOCHASTIC,
                )  # fmt: skip
            if HAS_F32:
                _apply_tails(
                    task_f32_ptr, ret_f32_ptr, m_ptr, v_ptr, vmax_ptr, table_ptr, tail_ptr, hyper_ptr,
                    tails_f32 * work, a32, b32, factor32, tl.float32, HAS_RET, AMSGRAD, SOFT_CAST, TAIL_ROWS,
                    STOCHASTIC,
                )  # fmt: skip

        # Backwards through what PHASE 1 read forwards.
        if HAS_F16:
            tile_map = tile_seg_ptr + tiles_f32 + tiles_bf16
            _apply_tiles(
                task_f16_ptr, ret_f16_ptr, m_ptr, v_ptr, vmax_ptr, table_ptr, tile_map, hyper_ptr, tiles_f16 * work,
                a32, b32, factor32, tl.float16, HAS_RET, AMSGRAD, SOFT_CAST, BLOCK, VEC_16BIT,
                STOCHASTIC,
            )  # fmt: skip
        if HAS_BF16:
            tile_map = tile_seg_ptr + tiles_f32
            _apply_tiles(
                task_bf16_ptr, ret_bf16_ptr, m_ptr, v_ptr, vmax_ptr, table_ptr, tile_map, hyper_ptr,
                tiles_bf16 * work, a32, b32, factor32, tl.bfloat16, HAS_RET, AMSGRAD, SOFT_CAST, BLOCK, VEC_16BIT,
                STOCHASTIC,
            )  # fmt: skip
        if HAS_F32:
            _apply_tiles(
                task_f32_ptr, ret_f32_ptr, m_ptr, v_ptr, vmax_ptr, table_ptr, tile_seg_ptr, hyper_ptr,
                tiles_f32 * work, a32, b32, factor32, tl.float32, HAS_RET, AMSGRAD, SOFT_CAST, BLOCK, VEC_32BIT,
                STOCHASTIC,
            )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------
# Launchers
# --------------------------------------------------------------------------------------------------------------


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernel (TRITON_INTERPRET=1 when this module was imported)."""
    return triton is not None and not isinstance(surgery_adamw_kernel, triton.runtime.JITFunction)


def is_available(device: torch.device | str) -> bool:
    """Whether `fused` can run on `device`: Triton present, and an NVIDIA GPU or the interpreter."""
    if triton is None:
        return False
    return torch.device(device).type == "cuda" or is_interpreted()


def kernel_constants(
    plan: SurgeryPlan,
    *,
    phase: int,
    merge: str,
    project: bool,
    schedule: str,
    has_ret: bool,
    amsgrad: bool,
    soft_cast: bool,
    controller: str = "ascent",
    rounding: str = "nearest",
) -> dict[str, Any]:
    """Return the constexpr arguments of the kernel: what one compiled variant is specialised on.

    Raises:
        ValueError: Unknown `merge`, `schedule`, `controller` or `rounding`.
    """
    for name, value, allowed in (
        ("merge", merge, MERGE_MODES),
        ("schedule", schedule, SCHEDULES),
        ("controller", controller, CONTROLLERS),
        ("rounding", rounding, ROUNDINGS),
    ):
        if value not in allowed:
            raise ValueError(f"{name}={value!r}: needs one of {', '.join(allowed)}")
    config = plan.config
    threads = config.num_warps * 32
    return {
        "PHASE": phase,
        "HAS_F32": torch.float32 in plan.dtypes,
        "HAS_BF16": torch.bfloat16 in plan.dtypes,
        "HAS_F16": torch.float16 in plan.dtypes,
        "HAS_TAILS": bool(plan.tail_order),
        "MERGE": MERGE_MODES[merge],
        "PROJECT": project,
        "SCHEDULE": SCHEDULES[schedule],
        "HAS_RET": has_ret,
        "AMSGRAD": amsgrad,
        # Settings that this variant has no use for make no second one of it.
        "NUPI": has_ret and CONTROLLERS[controller],
        "STOCHASTIC": torch.bfloat16 in plan.dtypes and ROUNDINGS[rounding],
        "SOFT_CAST": soft_cast,
        "BLOCK": config.block,
        "REDUCE_BLOCK": config.reduce_block,
        "VEC_32BIT": config.vec_32bit,
        "VEC_16BIT": config.vec_16bit,
        "SEG_BLOCK": threads,
        "TAIL_ROWS": threads // ALIGN,
    }


def kernel_arguments(plan: SurgeryPlan, buffers: SurgeryBuffers, n_partials: int) -> list[Any]:
    # Pointers that the variant never reads still need a tensor: m stands in.
    task = [buffers.grads_task.get(dtype, buffers.m) for dtype in SUPPORTED_DTYPES]
    ret = [buffers.grads_ret.get(dtype, buffers.m) for dtype in SUPPORTED_DTYPES]
    vmax = buffers.m if buffers.vmax is None else buffers.vmax
    counts: list[int] = []
    for numel in (
        [plan.grad_numel.get(dtype, 0) // plan.config.reduce_block for dtype in SUPPORTED_DTYPES],
        [plan.tiles[dtype] for dtype in SUPPORTED_DTYPES],
        [len(plan.tail_segments[dtype]) for dtype in SUPPORTED_DTYPES],
    ):
        counts.extend(numel)
    return [
        *task, *ret, buffers.m, buffers.v, vmax, buffers.steps, buffers.step_in, buffers.dual, buffers.settings,
        buffers.partials, buffers.metrics, plan.table, plan.tile_seg, plan.tails, plan.group_table, plan.hyper,
        plan.dual_in, plan.barrier, *counts, plan.n_segments, n_partials,
    ]  # fmt: skip


def launch_options(config: LaunchConfig, phase: int, register_ceiling: int) -> dict[str, Any]:
    """Return the compiler's options for one phase under one ceiling of `LaunchConfig.register_ceilings`."""
    return {
        "num_warps": config.num_warps,
        "num_stages": 1,  # Triton's software pipelining of the update loop takes its stores apart
        "launch_cooperative_grid": phase == 0,  # turns a grid too large for the barrier into an error, not a hang
        "maxnreg": register_ceiling,
    }


def _fit(plan: SurgeryPlan, arguments: list[Any], constants: dict[str, Any]) -> tuple[int, int]:
    """Compile a variant; return how many of its programs the device holds at once, and the register ceiling.

    The ceiling is the first one under which nothing spills; the programs are the largest grid whose barrier can be met.
    """
    key = tuple(constants.items())
    if key not in plan.fit:
        if is_capturing():
            named = ", ".join(f"{name}={value}" for name, value in constants.items())
            raise RuntimeError(
                f"this variant of the kernel has not been launched yet ({named}), and a CUDA graph is being captured, "
                "during which nothing can be compiled and loaded: before the capture run one step of the same kind, "
                "with or without retention as the graph will be"
            )
        config = plan.config
        for ceiling in config.register_ceilings:
            options = launch_options(config, constants["PHASE"], ceiling)
            kernel = surgery_adamw_kernel.warmup(*arguments, **constants, **options, grid=(1,))
            kernel._init_handles()
            if kernel.n_spills == 0:
                break
        properties: Any = torch.cuda.get_device_properties(plan.device)
        # Registers are given to a warp in units of 256, shared memory to a program with 1 KiB of the system's own.
        registers = round_up(kernel.n_regs * 32, 256) * config.num_warps
        per_sm = min(
            properties.regs_per_multiprocessor // registers,
            properties.max_threads_per_multi_processor // (32 * config.num_warps),
            properties.shared_memory_per_multiprocessor // (kernel.metadata.shared + 1024),
        )
        plan.fit[key] = min(max(per_sm, 1) * properties.multi_processor_count, MAX_GRID), ceiling
    return plan.fit[key]


def _launch(
    plan: SurgeryPlan,
    buffers: SurgeryBuffers,
    *,
    phase: int,
    n_partials: int,
    grid: int | None,
    merge: str,
    project: bool,
    schedule: str,
    has_ret: bool,
    amsgrad: bool,
    controller: str,
    rounding: str,
) -> int:
    if triton is None:
        raise RuntimeError("the Triton backend needs the package `triton` (pip install triton); or use backend='torch'")
    interpreted = is_interpreted()
    if plan.device.type != "cuda" and not interpreted:
        raise RuntimeError(
            f"the Triton kernel cannot run on {plan.device}: it needs an NVIDIA GPU, or TRITON_INTERPRET=1 in the "
            "environment before triton is imported; backend='torch' runs anywhere"
        )
    plan.flush()
    buffers.check(plan, has_ret=has_ret, amsgrad=amsgrad)
    constants = kernel_constants(
        plan, phase=phase, merge=merge, project=project, schedule=schedule, has_ret=has_ret, amsgrad=amsgrad,
        soft_cast=interpreted, controller=controller, rounding=rounding,
    )  # fmt: skip
    arguments = kernel_arguments(plan, buffers, n_partials)
    if interpreted:
        programs = 1 if grid is None else grid
        if phase == 0 and programs != 1:
            raise ValueError(f"grid={programs}: the interpreter runs programs in turn, so a grid barrier needs grid=1")
        if phase == 0:
            arguments[-1] = programs
        surgery_adamw_kernel[(programs,)](*arguments, **constants)
        return programs
    with torch.cuda.device(plan.device):
        resident, ceiling = _fit(plan, arguments, constants)
        tiles = sum(plan.tiles.values())
        reduce_tiles = sum(plan.grad_numel.values()) // plan.config.reduce_block
        programs = min(resident, max(tiles, reduce_tiles, 1)) if grid is None else grid
        if programs > MAX_GRID or (phase == 0 and programs > resident):
            raise ValueError(
                f"grid={programs}: at most {min(resident, MAX_GRID)} programs fit on {plan.device} at once"
            )
        if phase == 0:
            arguments[-1] = programs
        options = launch_options(plan.config, phase, ceiling)
        surgery_adamw_kernel[(programs,)](*arguments, **constants, **options)
    return programs


def fused(
    plan: SurgeryPlan,
    buffers: SurgeryBuffers,
    *,
    merge: str = "weighted",
    project: bool = True,
    schedule: str = "linear",
    has_ret: bool = True,
    amsgrad: bool = False,
    controller: str = "ascent",
    rounding: str = "nearest",
    grid: int | None = None,
) -> None:
    """Run the whole step in one launch on the current stream, without synchronising.

    Args:
        plan: Layout, addresses, presence and groups of the parameters of one device.
        buffers: The tensors of the step; parameters, moments, steps, dual and metrics are updated in place.
        merge: "weighted", "equal" or "task_priority".
        project: Whether conflicting task gradients are projected.
        schedule: ε(t): "linear", "cosine" or "exponential".
        has_ret: Whether there is a retention gradient; without it the step is plain AdamW with clip.
        amsgrad: Whether any group uses AMSGrad.
        controller: What moves λ: "ascent" or "nupi".
        rounding: How bf16 parameters are rounded: "nearest" or "stochastic" (`craft_opt.kernels.rounding`).
        grid: Programs; None for as many as the device holds.

    Raises:
        RuntimeError: No triton, or a device that it cannot run on.
        ValueError: Bad mode, buffers or grid.
    """
    _launch(
        plan, buffers, phase=0, n_partials=1, grid=grid, merge=merge, project=project, schedule=schedule,
        has_ret=has_ret, amsgrad=amsgrad, controller=controller, rounding=rounding,
    )  # fmt: skip


def reduce(
    plan: SurgeryPlan,
    buffers: SurgeryBuffers,
    *,
    merge: str = "weighted",
    project: bool = True,
    schedule: str = "linear",
    has_ret: bool = True,
    amsgrad: bool = False,
    controller: str = "ascent",
    rounding: str = "nearest",
    grid: int | None = None,
) -> int:
    """Run the first phase alone and return the number of rows of `buffers.partials` that it wrote.

    It also prepares what `apply` reads besides those rows (hyperparameters, a snapshot of the dual state), so every
    `apply` follows a `reduce` of the same plan. Arguments and errors: see `fused`.
    """
    return _launch(
        plan, buffers, phase=1, n_partials=1, grid=grid, merge=merge, project=project, schedule=schedule,
        has_ret=has_ret, amsgrad=amsgrad, controller=controller, rounding=rounding,
    )  # fmt: skip


def apply(
    plan: SurgeryPlan,
    buffers: SurgeryBuffers,
    *,
    n_partials: int,
    merge: str = "weighted",
    project: bool = True,
    schedule: str = "linear",
    has_ret: bool = True,
    amsgrad: bool = False,
    controller: str = "ascent",
    rounding: str = "nearest",
    grid: int | None = None,
) -> None:
    """Run the second phase alone, from the first `n_partials` rows of `buffers.partials`.

    With several devices or shards these rows are first summed over all of them into one row. Arguments and
    errors: see `fused`.
    """
    if not 1 <= n_partials <= MAX_GRID:
        raise ValueError(f"n_partials={n_partials}: needs 1 to {MAX_GRID}, the number that reduce() returned")
    _launch(
        plan, buffers, phase=2, n_partials=n_partials, grid=grid, merge=merge, project=project, schedule=schedule,
        has_ret=has_ret, amsgrad=amsgrad, controller=controller, rounding=rounding,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------
# Reference
# --------------------------------------------------------------------------------------------------------------


def _reference_epsilon(t: float, start: float, end: float, decay_steps: float, schedule: str) -> float:
    if t <= 0.0 or decay_steps <= 0.0:
        return start
    if t >= decay_steps:
        return end
    x = t / decay_steps
    if schedule == "linear":
        return start + (end - start) * x
    if schedule == "cosine":
        return start + (end - start) * 0.5 * (1.0 - math.cos(math.pi * x))
    return start * (end / start) ** x if start > 0.0 else 0.0


def reference_step(
    plan: SurgeryPlan,
    buffers: SurgeryBuffers,
    params: Sequence[Tensor],
    *,
    merge: str = "weighted",
    project: bool = True,
    schedule: str = "linear",
    has_ret: bool = True,
    amsgrad: bool = False,
    controller: str = "ascent",
    rounding: str = "nearest",
    compute_dtype: torch.dtype = torch.float64,
) -> None:
    """Take the same step in plain torch, parameter by parameter: the oracle that the kernel is compared with.

    It reads scalars on the host, so it synchronises; it is a statement of what the kernel does and no backend.

    Args:
        plan: As for `fused`; addresses are not used.
        buffers: As for `fused`; updated in place.
        params: The parameters, in the plan's order; updated in place.
        merge: "weighted", "equal" or "task_priority".
        project: Whether conflicting task gradients are projected.
        schedule: ε(t): "linear", "cosine" or "exponential".
        has_ret: Whether there is a retention gradient.
        amsgrad: Whether any group uses AMSGrad.
        controller: What moves λ: "ascent" or "nupi".
        rounding: How bf16 `params` are rounded: "nearest" or "stochastic".
        compute_dtype: Arithmetic of the element-wise update; sums and coefficients are fp64 always.

    Raises:
        ValueError: Unknown mode, or a setter of the plan was never called.
    """
    kernel_constants(
        plan, phase=0, merge=merge, project=project, schedule=schedule, has_ret=has_ret, amsgrad=amsgrad,
        soft_cast=False, controller=controller, rounding=rounding,
    )  # fmt: skip
    if plan.groups is None or plan.task_present is None or plan.retention_present is None:
        raise ValueError("set_groups() and set_present() must be called before reference_step()")
    retention_loss, scale, found_inf, measured_flag, weight = buffers.step_in.tolist()
    lam, t, skipped_total, ema, xi = buffers.dual.tolist()
    (
        threshold, max_norm, lambda_lr, lambda_max, eps_start, eps_end, decay_steps, nupi_kp, nupi_nu, beta, seed,
    ) = buffers.settings.tolist()  # fmt: skip
    measured = bool(measured_flag) and has_ret

    tt = tr = rr = 0.0
    for dtype in plan.dtypes:
        task = buffers.grads_task[dtype].double() / scale
        tt += float(task @ task)
        if has_ret:
            ret = buffers.grads_ret[dtype].double() / scale
            tr += float(task @ ret)
            rr += float(ret @ ret)

    a, b, cos, conflict = 1.0, 0.0, 0.0, False
    finite = math.isfinite(tt) and math.isfinite(tr) and math.isfinite(rr)
    if has_ret and finite:
        if tt > 0.0 and rr > 0.0:
            cos = max(-1.0, min(1.0, tr / (math.sqrt(tt) * math.sqrt(rr))))
        conflict = project and cos < threshold and rr > 0.0
        projection = tr / rr if conflict else 0.0
        if merge == "weighted":
            a, b = 1.0, lam * weight - projection
        elif merge == "equal":
            a, b = 0.5, 0.5 * (weight - projection)
        else:
            a, b = 1.0, min(lam, 1.0) * weight - projection
    norm = math.sqrt(max(a * a * tt + 2.0 * a * b * tr + b * b * rr, 0.0)) if finite else math.nan
    clip_scale = min(1.0, max_norm / (norm + 1e-6)) if 0.0 < max_norm < math.inf else 1.0
    ok = finite and found_inf == 0.0 and (math.isfinite(retention_loss) or not measured)

    epsilon = _reference_epsilon(t, eps_start, eps_end, decay_steps, schedule)
    lam_after = lam
    if ok:
        if measured:
            ema = retention_loss if math.isnan(ema) else beta * ema + (1.0 - beta) * retention_loss
            violation = ema - epsilon
            lam_after = lam + lambda_lr * violation
            if CONTROLLERS[controller]:
                filtered = 0.0 if math.isnan(xi) else nupi_nu * xi + (1.0 - nupi_nu) * violation
                lam_after += 0.0 if math.isnan(xi) else nupi_kp * (filtered - xi)
                xi = filtered
            lam_after = min(max(lam_after, 0.0), lambda_max)
        for index, (segment, param) in enumerate(zip(plan.segments, params, strict=True)):
            if not (plan.task_present[index] or (has_ret and plan.retention_present[index])):
                continue
            lr, beta1, beta2, eps, weight_decay, sign, use_max = plan.groups[segment.group][:7]
            grad_part = slice(plan.grad_offset[index], plan.grad_offset[index] + segment.numel)
            moment_part = slice(plan.moment_offset[index], plan.moment_offset[index] + segment.numel)
            g = buffers.grads_task[segment.dtype][grad_part].to(compute_dtype) * (a * clip_scale / scale)
            if has_ret:
                g += buffers.grads_ret[segment.dtype][grad_part].to(compute_dtype) * (b * clip_scale / scale)
            g *= sign
            step = float(buffers.steps[index]) + 1.0
            m = buffers.m[moment_part].to(compute_dtype).lerp_(g, 1.0 - beta1)
            v = buffers.v[moment_part].to(compute_dtype).mul_(beta2).addcmul_(g, g, value=1.0 - beta2)
            second = v
            if use_max and buffers.vmax is not None:
                second = torch.maximum(buffers.vmax[moment_part].to(compute_dtype), v)
                buffers.vmax[moment_part] = second.float()
            denominator = second.sqrt() / math.sqrt(1.0 - beta2**step) + eps
            flat = param.detach().view(-1)
            p = flat.to(compute_dtype) * (1.0 - lr * weight_decay)
            p -= (lr / (1.0 - beta1**step)) * m / denominator
            if ROUNDINGS[rounding] and param.dtype == torch.bfloat16:
                stochastic_round_(flat, p.float(), rounding_key(int(seed), plan.streams[index], int(t)))
            else:
                flat.copy_(p)
            buffers.m[moment_part] = m.float()
            buffers.v[moment_part] = v.float()
            buffers.steps[index] = step

    skipped = float(not ok)
    t, skipped_total = t + 1.0 - skipped, skipped_total + skipped
    buffers.dual.copy_(torch.tensor([lam_after, t, skipped_total, ema, xi], dtype=torch.float64))
    shown = retention_loss if measured else math.nan
    dot, cosine, norm_sq_r = (tr, cos, rr) if has_ret else (math.nan,) * 3
    report = [
        dot, cosine, float(conflict), norm, lam, lam_after, epsilon, shown, skipped, skipped_total, a, b, clip_scale,
        tt, norm_sq_r, t,
    ]  # fmt: skip
    buffers.metrics.copy_(torch.tensor(report, dtype=torch.float64))
