"""The order in which the kernel sums, emulated at a billion elements and held against exact sums.

A billion random numbers need not be made: a few blocks of the size that the whole grid reads in one trip come back
again and again, each time multiplied by a power of two, which changes no bit of a mantissa. So the products of a trip
are those of its block, exactly scaled, and the true sums are known from `math.fsum`, which rounds once.
"""

import math

import pytest
import torch
from craft_opt.kernels.layout import DEFAULT_CONFIG

F32, BF16 = torch.float32, torch.bfloat16
PROGRAMS = 528  # 132 multiprocessors of an H200, four programs each
ELEMENTS = 10**9
NORM_SQ, COS = 1e-7, 1e-7  # relative, absolute
LAM = 0.7


def tree(sums):
    """Add along the last dimension in halves, as a reduction over lanes and warps does; a power of two of them."""
    while sums.shape[-1] > 1:
        half = sums.shape[-1] // 2
        sums = sums[..., :half] + sums[..., half:]
    return sums[..., 0]


def over_programs(partials):
    """`_sum_partials`: 64 rows at a time onto 64 accumulators, then those."""
    rows = torch.nn.functional.pad(partials, (0, -len(partials) % 64)).view(-1, 64)
    acc = torch.zeros(64, dtype=partials.dtype)
    for row in rows:
        acc = acc + row
    return float(tree(acc))


def blocks(kind, dtype, seed, count=4):
    """Pairs of gradients for one trip of the grid; the retention gradient agrees, conflicts, or all but cancels."""
    gen = torch.Generator().manual_seed(seed)
    for _ in range(count):
        task = torch.randn(PROGRAMS, DEFAULT_CONFIG.reduce_block, generator=gen)
        noise = torch.randn(task.shape, generator=gen)
        ret = {"unrelated": noise, "opposed": noise - 0.2 * task, "cancelling": (1e-3 * noise - task) / LAM}[kind]
        yield task.to(dtype), ret.to(dtype)


@pytest.mark.parametrize("kind", ["unrelated", "opposed", "cancelling"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_norm_and_cosine_at_a_billion_elements(dtype, kind):
    vec = DEFAULT_CONFIG.vec_32bit if dtype == F32 else DEFAULT_CONFIG.vec_16bit
    lanes = DEFAULT_CONFIG.reduce_block // vec
    trips = -(-ELEMENTS // (PROGRAMS * DEFAULT_CONFIG.reduce_block))
    exact, in_lanes = [], []
    for task, ret in blocks(kind, dtype, seed=7):
        products = [(x.double() * y.double()).view(-1) for x, y in ((task, task), (task, ret), (ret, ret))]
        exact.append([math.fsum(p.tolist()) for p in products])
        # A thread's consecutive products, one after another.
        parts = [p.view(PROGRAMS, lanes, vec) for p in products]
        in_lanes.append([sum((p[..., c] for c in range(1, vec)), p[..., 0]) for p in parts])
    acc = [torch.zeros(PROGRAMS, lanes, dtype=torch.float64) for _ in range(3)]
    true: list[list[float]] = [[], [], []]
    for trip in range(trips):
        block, square = trip % len(exact), 4.0 ** ((trip * 7) % 5 - 2)
        for total, part, terms, whole in zip(acc, in_lanes[block], true, exact[block], strict=True):
            total.add_(part, alpha=square)
            terms.append(square * whole)
    tt, tr, rr = (over_programs(tree(total)) for total in acc)
    true_tt, true_tr, true_rr = (math.fsum(terms) for terms in true)

    def norm_sq(a, b, x, y, z):
        return math.fsum((a * a * x, 2.0 * a * b * y, b * b * z))

    assert abs(tt - true_tt) <= NORM_SQ * true_tt
    assert abs(rr - true_rr) <= NORM_SQ * true_rr
    merged = 1.0 * tt + 2.0 * LAM * tr + LAM * LAM * rr
    expected = norm_sq(1.0, LAM, true_tt, true_tr, true_rr)
    assert abs(merged - expected) <= NORM_SQ * expected
    if kind == "cancelling" and dtype == F32:
        assert expected < 1e-5 * true_tt, "the case must cancel"
    cos = tr / (math.sqrt(tt) * math.sqrt(rr))
    assert abs(cos - true_tr / (math.sqrt(true_tt) * math.sqrt(true_rr))) <= COS


def test_one_accumulator_of_fp32_would_fail_the_bound():
    """The bound tells a good summation from a bad one: 2^25 squares onto one fp32 number lose far more."""
    x = torch.randn(1 << 25, generator=torch.Generator().manual_seed(8)).square()
    found, true = float(x.numpy().cumsum(dtype="float32")[-1]), float(x.double().sum())
    assert abs(found - true) > 100 * NORM_SQ * true
