"""The kernel's checks on a GPU: the same as under the interpreter, and what only a device can show."""

import pytest
import torch
from craft_opt.kernels import surgery_adamw as kernel

from tests.kernels.checks import *  # noqa: F403
from tests.kernels.problems import BF16, F32, Form, Modes, Problem, mixed_problem, small_problem, three_groups

pytestmark = pytest.mark.gpu


@pytest.fixture
def device():
    if not torch.cuda.is_available():
        pytest.fail("-m gpu was asked for and torch sees no CUDA device")
    return "cuda"


@pytest.fixture(params=[Form(True), Form(True, 1), Form(False), Form(False, 5)], ids=str)
def form(request):
    return request.param


def _large(seed=0, **changes):
    sizes = [1 << 20, 3 << 18, 100_003, 77, *[2048 * 3 + i for i in range(60)]]
    specs = [((F32, BF16)[i % 2], n, i % 3) for i, n in enumerate(sizes)]
    problem = Problem(specs, three_groups(), device="cuda", seed=seed)
    problem.state()
    problem.random_gradients()
    problem.settings(**changes)
    return problem


def test_the_barrier_holds_over_many_launches_at_full_grid(device):
    # The counter flips its sign at each launch and is never reset; a lost arrival would hang or change the bits.
    results = []
    for _ in range(2):
        problem = _large()
        for _ in range(200):
            kernel.fused(problem.plan, problem.buffers)
        torch.cuda.synchronize()
        results.append((problem.bytes(), problem.buffers.metrics.tolist()))
    assert results[0] == results[1]
    assert problem.buffers.dual[1] == 200.0


def test_forms_and_grids_agree(device):
    found = []
    for form in (Form(True), Form(True, 7), Form(False), Form(False, 33)):
        problem = _large()
        form.run(problem, Modes())
        found.append(problem)
    for other in found[1:]:
        # Another grid adds the partial sums in another order: 1e-16 in the coefficients, so at most one rounding of
        # their fp32 values, one more of each product and sum behind them.
        assert torch.allclose(other.buffers.metrics, found[0].buffers.metrics, rtol=1e-12, atol=0)
        for p, q in zip(other.params, found[0].params, strict=True):
            assert torch.allclose(p.float(), q.float(), rtol=2 * torch.finfo(p.dtype).eps, atol=1e-7)


def test_a_step_never_waits_for_the_device(device):
    problem = mixed_problem(device)
    problem.state()
    problem.random_gradients()
    kernel.fused(problem.plan, problem.buffers)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        for lr in (1e-3, 1e-4):
            problem.plan.set_groups([(lr, *row[1:]) for row in problem.plan.groups])
            problem.present([True] * problem.plan.n_segments, [False] * problem.plan.n_segments)
            kernel.fused(problem.plan, problem.buffers)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_grid_that_cannot_be_resident_is_refused(device):
    problem = small_problem(device)
    problem.state()
    with pytest.raises(ValueError, match="programs fit"):
        kernel.fused(problem.plan, problem.buffers, grid=kernel.MAX_GRID)
